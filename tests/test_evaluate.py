"""Folders of masks are paired by name, compared on one grid and in one set of label values, and written out."""

import csv
import json
import shutil

import numpy as np
import pytest
import SimpleITK
from rich.console import Console

from autoseg.evaluation import evaluate, print_evaluation
from planners import paths
from planners.errors import DatasetError
from tests.tiny import DATASET, write_tiny_dataset


@pytest.fixture
def folders(tmp_path):
    """A dataset with three labelled cases, and perfect predictions of them."""
    write_tiny_dataset(tmp_path, cases=3)
    references = paths.raw(DATASET) / "labelsTr"
    predictions = tmp_path / "masks"
    shutil.copytree(references, predictions)
    return predictions, references


def change(path, voxels):
    image = SimpleITK.ReadImage(str(path))
    new = SimpleITK.GetImageFromArray(voxels(SimpleITK.GetArrayFromImage(image)))
    if new.GetSize() == image.GetSize():
        new.CopyInformation(image)
    SimpleITK.WriteImage(new, str(path))


def remap_dataset(remap):
    path = paths.raw(DATASET) / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "autoseg": {"remap": remap}}))


def to_original(value_of):
    def voxels(v):
        return np.array([0, *value_of], dtype=np.uint16)[v]

    return voxels


def test_perfect_masks_score_one_and_background_is_no_structure(folders):
    result = evaluate(*folders, DATASET)
    assert set(result.summary) == {"organ", "core", "mean"}
    assert result.summary["mean"]["dice"] == 1
    assert result.summary["organ"]["cases"] == 3
    assert result.problems == ()


def test_rows_are_written_as_csv_and_json(folders):
    predictions, _ = folders
    change(predictions / "case_01.nii.gz", lambda v: np.where(v == 2, 0, v))
    for name in ("case_00", "case_02"):
        for folder in folders:
            change(folder / f"{name}.nii.gz", lambda v: np.where(v == 2, 1, v))
    result = evaluate(*folders, DATASET, tolerance_mm=2.0)
    rows = list(csv.DictReader((predictions / "metrics.csv").open()))
    assert [(row["case"], row["structure"]) for row in rows][:2] == [("case_00", "organ"), ("case_00", "core")]
    assert (rows[1]["dice"], rows[1]["missed"]) == ("", "0")  # absent from both
    assert (rows[3]["dice"], rows[3]["missed"]) == ("0.0", "1")
    written = json.loads((predictions / "metrics.json").read_text())
    assert written["tolerance_mm"] == 2.0
    assert written["cases"]["case_00"]["core"]["dice"] is None
    assert written["summary"]["core"] == result.summary["core"]
    assert written["summary"]["core"]["cases"] == 1


def test_cases_that_cannot_be_compared_are_listed_and_the_others_are(folders):
    predictions, references = folders
    (predictions / "case_00.nii.gz").unlink()
    change(predictions / "case_01.nii.gz", lambda v: v[1:])
    shutil.copy(references / "case_02.nii.gz", predictions / "extra.nii.gz")
    result = evaluate(*folders, DATASET)
    assert list(result.rows) == ["case_02"]
    text = "\n".join(result.problems)
    for expected in (
        "case_00: no prediction",
        "extra: no reference",
        "case_01: prediction and reference lie on different",
    ):
        assert expected in text


def test_a_moved_header_is_another_grid(folders):
    path = folders[0] / "case_01.nii.gz"
    image = SimpleITK.ReadImage(str(path))
    image.SetOrigin([0.0, 0.0, 0.0])
    SimpleITK.WriteImage(image, str(path))
    assert "case_01" not in evaluate(*folders, DATASET).rows


def test_nothing_to_compare_is_an_error(folders, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match=r"(?s)same name.*case_00"):
        evaluate(folders[0], tmp_path / "empty", DATASET)


@pytest.mark.parametrize("original_references", [True, False])
def test_masks_in_original_values_are_compared_with_either(folders, original_references, tmp_path):
    """205 and 500 were made 1 and 2; `predict` writes 205 and 500 again."""
    predictions, references = folders
    remap_dataset({"205": 1, "500": 2})
    own = tmp_path / "own"
    shutil.copytree(references, own)
    for folder in [predictions] + [own] * original_references:
        for path in folder.glob("*.nii.gz"):
            change(path, to_original([205, 500]))
    result = evaluate(predictions, own, DATASET)
    assert result.summary["mean"]["dice"] == 1
    assert result.summary["core"]["cases"] == 3


def test_swapped_values_are_told_apart_by_where_the_references_lie(folders, tmp_path):
    predictions, references = folders
    remap_dataset({"2": 1, "1": 2})
    for path in predictions.glob("*.nii.gz"):
        change(path, to_original([2, 1]))
    assert evaluate(predictions, references, DATASET).summary["mean"]["dice"] == 1


def test_values_of_neither_kind_are_refused(folders):
    remap_dataset({"205": 1, "500": 2})
    change(folders[0] / "case_01.nii.gz", lambda v: v * 7)
    with pytest.raises(DatasetError, match="neither"):
        evaluate(*folders, DATASET)


def test_regions_and_ignored_voxels_follow_the_dataset(tmp_path):
    write_tiny_dataset(tmp_path, cases=2, regions=True)
    folder = paths.raw(DATASET)
    content = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**content, "labels": {**content["labels"], "ignore": 3}}))
    predictions = tmp_path / "masks"
    shutil.copytree(folder / "labelsTr", predictions)
    for index in range(2):
        change(folder / f"labelsTr/case_0{index}.nii.gz", lambda v: np.where(np.arange(v.shape[-1]) > 11, 3, v))
    summary = evaluate(predictions, folder / "labelsTr", DATASET).summary
    assert set(summary) == {"whole", "core", "mean"}
    assert summary["mean"]["dice"] == 1


def test_the_table_names_structures_and_problems(folders):
    (folders[0] / "case_00.nii.gz").unlink()
    console = Console(record=True, width=120)
    print_evaluation(evaluate(*folders, DATASET), console)
    text = console.export_text()
    for expected in ("organ", "NSD at 1 mm", "not compared case_00: no prediction", "metrics.csv"):
        assert expected in text
