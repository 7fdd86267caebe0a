"""Files are whole or absent; pickles cannot run code."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest

from planners.errors import DatasetError, PlanError, UnsafeFile
from planners.files import content_hash, read_case_properties, read_json, replacing, write_json


def test_a_failed_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "a.json"
    write_json(target, {"x": 1})
    with pytest.raises(RuntimeError), replacing(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert read_json(target) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_nan_is_refused_in_json(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not (tmp_path / "a.json").exists()


def test_broken_json_is_named(tmp_path):
    (tmp_path / "plan.json").write_text('{"a": ')
    with pytest.raises(DatasetError, match=r"plan\.json"):
        read_json(tmp_path / "plan.json")


def test_hash_ignores_the_order_of_keys():
    assert content_hash({"a": 1, "b": [2, 3]}) == content_hash({"b": [2, 3], "a": 1})


def test_case_properties_are_read(tmp_path):
    properties = {
        "spacing": (1.0, 2.0),
        "class_locations": {1: np.arange(6).reshape(2, 3), (1, 2): []},
        "n": np.float64(2.5),
    }
    (tmp_path / "case.pkl").write_bytes(pickle.dumps(properties))
    read = read_case_properties(tmp_path / "case.pkl")
    assert read["n"] == 2.5
    np.testing.assert_array_equal(read["class_locations"][1], properties["class_locations"][1])


class Malicious:
    def __reduce__(self):
        return os.system, ("touch ran_code",)


def test_a_pickle_that_asks_for_code_is_refused_and_nothing_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "case.pkl").write_bytes(pickle.dumps({"a": Malicious()}))
    with pytest.raises(UnsafeFile, match=r"case\.pkl"):
        read_case_properties(tmp_path / "case.pkl")
    assert not (tmp_path / "ran_code").exists()


def test_errors_say_what_where_found_expected_and_remedy_and_survive_pickling():
    error = PlanError("No plan", where="/x", found=1, expected=2, remedy="make one")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert str(error).splitlines() == [
        "No plan", "  where     /x", "  found     1", "  expected  2", "  to fix    make one",
    ]  # fmt: skip
    assert error.exit_code == 2
