"""The demonstration's own rules; CI runs the demonstration itself."""

from __future__ import annotations

import json

import pytest

from autoseg.demonstration import run_demo
from autoseg.overlay import draw_overlay
from planners import paths
from planners.errors import DatasetError
from tests.tiny import DATASET, write_tiny_dataset


def test_a_dataset_017_of_someone_else_is_never_overwritten(tmp_path):
    folder = tmp_path / "raw" / "Dataset017_Mine"
    folder.mkdir(parents=True)
    (folder / "dataset.json").write_text(json.dumps({"labels": {"background": 0}}))
    with pytest.raises(DatasetError, match="--root DIR"):
        run_demo(tmp_path)
    assert [p.name for p in tmp_path.rglob("*")] == ["raw", "Dataset017_Mine", "dataset.json"]


def test_overlay_shows_every_predicted_case(tmp_path):
    write_tiny_dataset(tmp_path, cases=2)
    raw = paths.raw(DATASET)
    picture = draw_overlay(
        raw / "imagesTr", raw / "labelsTr", raw / "labelsTr", raw / "dataset.json", tmp_path / "a.png"
    )
    assert picture.read_bytes().startswith(b"\x89PNG")
