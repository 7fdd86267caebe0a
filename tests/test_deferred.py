"""nnU-Net imported without what few of its functions use: nothing missing when it is used, nothing heavy before."""

from __future__ import annotations

import json
import subprocess
import sys
import threading

import pytest

from planners.deferred import deferred

HEAVY = {"matplotlib.pyplot", "pandas", "scipy.stats", "seaborn", "SimpleITK", "skimage", "sklearn", "torch._dynamo"}
NAME = "deferred_example"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of a class and a module, neither imported yet, and one that imports both at its top."""
    folder = tmp_path / NAME
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "class Shape:\n    sides = 4\n\ndef area(side, *, height=1):\n    return side * height\n"
    )
    (folder / "inner.py").write_text("VALUE = 7\n")
    (tmp_path / "importer_example.py").write_text(
        f"import {NAME} as whole\nimport {NAME}.inner as inner\n"
        f"from {NAME} import Shape, area\nfrom {NAME} import inner as again\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in (NAME, f"{NAME}.inner", "importer_example"):
        sys.modules.pop(name, None)


def imported():
    import importlib

    with deferred((NAME, f"{NAME}.inner")):
        return importlib.import_module("importer_example")


def test_nothing_is_imported_until_it_is_used(package):
    importer = imported()
    assert not isinstance(3, importer.Shape)
    assert NAME not in sys.modules and f"{NAME}.inner" not in sys.modules
    assert importer.area(3, height=2) == 6
    assert NAME in sys.modules and f"{NAME}.inner" not in sys.modules


def test_what_is_used_is_the_real_thing(package):
    importer = imported()
    assert importer.Shape.sides == importer.whole.Shape.sides == 4
    assert importer.again.VALUE == 7 and importer.inner.VALUE + 0 == 7
    import deferred_example

    assert isinstance(deferred_example.Shape(), importer.Shape) and isinstance(importer.Shape(), deferred_example.Shape)


def test_use_within_the_block_reaches_the_real_thing(package):
    (package / "importer_example.py").write_text(f"import {NAME}\nimport {NAME}.inner\nfound = {NAME}.area(5)\n")
    assert imported().found == 5
    assert sys.modules[NAME].Shape.sides == 4  # the real one stays loaded
    assert f"{NAME}.inner" not in sys.modules


def test_use_in_one_thread_does_not_mind_imports_in_another(package):
    importer, done, problems = imported(), threading.Event(), []

    def use() -> None:
        try:
            while not done.is_set():
                assert importer.area(2) == 2
        except Exception as problem:
            problems.append(problem)

    thread = threading.Thread(target=use)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread.start()
    names = [f"{NAME}_{number}" for number in range(20_000)]
    try:
        for name in names:
            sys.modules[name] = sys
    finally:
        sys.setswitchinterval(before)
        done.set()
        thread.join()
        for name in names:
            sys.modules.pop(name, None)
    assert not problems


def test_what_is_loaded_already_is_left_alone(package):
    import deferred_example

    importer = imported()
    assert importer.Shape is deferred_example.Shape


def test_a_failure_leaves_no_stand_in(package):
    (package / "importer_example.py").write_text(f"import {NAME}\nraise ValueError\n")
    with pytest.raises(ValueError):
        imported()
    assert NAME not in sys.modules


@pytest.mark.parametrize(
    ("first", "ours"),
    [("TRAINER", "trainers.train"), ("PREDICTOR", "trainers.predict"), ("TRAINER, FABRIC", "pretrain.loop")],
    ids=["train", "predict", "pretrain"],
)
def test_the_commands_start_without_heavy_libraries(first, ours):
    program = (
        f"import json, sys; from planners.deferred import {first}, import_quickly; import_quickly({first})\n"
        f"import {ours}; print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert ours in loaded
    assert not HEAVY & loaded
