"""Every kind of problem of a dataset is found, together with the others, and judged as error or warning."""

import json
import os
import signal

import numpy as np
import pytest
import SimpleITK

from planners import paths, verify
from planners.verify import verify_dataset
from tests.tiny import DATASET, write_tiny_dataset


@pytest.fixture
def folder(tmp_path):
    """A sound dataset of two channels and three cases."""
    write_tiny_dataset(tmp_path, cases=3, channels=2)
    return paths.raw(DATASET)


def image_of(folder, case="case_01", channel=0):
    return folder / f"imagesTr/{case}_{channel:04d}.nii.gz"


def label_of(folder, case="case_01"):
    return folder / f"labelsTr/{case}.nii.gz"


def change(path, voxels=None, **header):
    """Rewrite an image with voxels from a function of the old ones, or with other header entries (x, y, z)."""
    image = SimpleITK.ReadImage(str(path))
    if voxels is not None:
        new = SimpleITK.GetImageFromArray(voxels(SimpleITK.GetArrayFromImage(image)))
        if new.GetSize() == image.GetSize():
            new.CopyInformation(image)
        image = new
    for name, value in header.items():
        getattr(image, f"Set{name}")(value)
    SimpleITK.WriteImage(image, str(path))


def describe(folder, **changes):
    path = folder / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def found(severity=None):
    return [(p.kind, p.case) for p in verify_dataset(DATASET) if severity in (None, p.severity)]


def test_a_sound_dataset_has_no_problem(folder):
    assert verify_dataset(DATASET) == []


def test_missing_files_are_named(folder):
    image_of(folder, channel=1).unlink()
    label_of(folder, "case_02").unlink()
    for channel in (0, 1):
        image_of(folder, "case_00", channel).unlink()
    problems = {(p.kind, p.case, p.file) for p in verify_dataset(DATASET) if p.severity == "error"}
    assert problems == {
        ("missing channel", "case_01", "imagesTr/case_01_0001.nii.gz"),
        ("missing label", "case_02", "labelsTr/case_02.nii.gz"),
        ("missing image", "case_00", "labelsTr/case_00.nii.gz"),
    }


def test_files_outside_the_scheme_are_named(folder):
    image_of(folder).rename(folder / "imagesTr/stray.nii.gz")
    image_of(folder, "case_00").rename(folder / "imagesTr/case_00_0002.nii.gz")
    (folder / "imagesTr/notes.txt").touch()
    kinds = {(p.kind, p.severity, p.file) for p in verify_dataset(DATASET)}
    assert ("file name", "error", "imagesTr/stray.nii.gz") in kinds
    assert ("surplus channel", "error", "imagesTr/case_00_0002.nii.gz") in kinds
    assert ("ignored file", "warning", "imagesTr/notes.txt") in kinds


@pytest.mark.parametrize("damage", [b"not an image", "half"])
def test_unreadable_files_do_not_hide_the_other_problems(folder, damage):
    path = image_of(folder)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if damage == "half" else damage)
    change(label_of(folder, "case_02"), lambda v: v * 7)
    assert found("error") == [("unreadable", "case_01"), ("undeclared labels", "case_02")]


@pytest.mark.parametrize(
    ("shift_mm", "expected"),
    [(1e-6, []), (0.02, [("harmless rounding", "warning")]), (1.5, [("fixable geometry", "error")])],
)
@pytest.mark.parametrize("which", ["channel", "label"])
def test_origins_are_judged_by_how_far_they_move_a_voxel(folder, shift_mm, expected, which):
    path = label_of(folder) if which == "label" else image_of(folder, channel=1)
    change(path, Origin=[-3.5 + shift_mm, 12.25, 40.0])
    assert [(p.kind, p.severity) for p in verify_dataset(DATASET)] == expected


def test_a_fixable_header_says_how_to_fix_it(folder):
    change(label_of(folder), Direction=[-1, 0, 0, 0, -1, 0, 0, 0, 1])
    (problem,) = verify_dataset(DATASET)
    assert problem.file == "labelsTr/case_01.nii.gz"
    assert "copy the header of case_01_0000.nii.gz onto case_01.nii.gz" in problem.remedy


def test_a_small_spacing_error_counts_over_the_whole_volume(folder):
    """1 % of the spacing is a fifth of a voxel at the far corner of 22 voxels."""
    change(label_of(folder), Spacing=[1.01, 1.1, 2.5])
    assert found() == [("fixable geometry", "case_01")]


def test_other_shapes_are_wrong(folder):
    change(label_of(folder), lambda v: v[:-1])
    change(image_of(folder, "case_02", 1), lambda v: v[:, 1:])
    assert found("error") == [("wrong geometry", "case_01"), ("wrong geometry", "case_02")]


def test_labels_are_judged_by_value_not_by_type(folder):
    change(label_of(folder, "case_00"), lambda v: v.astype(np.float32))
    assert verify_dataset(DATASET) == []
    change(label_of(folder), lambda v: v.astype(np.float32) * 0.5)
    change(label_of(folder, "case_02"), lambda v: np.where(v == 2, 14, v))
    assert found("error") == [("labels not integer", "case_01"), ("undeclared labels", "case_02")]


def test_region_values_are_declared(tmp_path):
    write_tiny_dataset(tmp_path, cases=2, regions=True)
    assert verify_dataset(DATASET) == []


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_found(folder, value):
    change(image_of(folder, channel=1), lambda v: np.where(v == v.max(), np.float32(value), v))
    (problem,) = verify_dataset(DATASET)
    assert (problem.kind, problem.file) == ("NaN or Inf", "imagesTr/case_01_0001.nii.gz")


def test_empty_images_are_errors_and_empty_labels_warnings(folder):
    change(image_of(folder), lambda v: v * 0 - 1000)
    change(label_of(folder, "case_02"), lambda v: v * 0)
    assert found("error") == [("empty image", "case_01")]
    assert found("warning") == [("no structure", "case_02")]


def test_duplicates_are_found_by_voxels_not_by_file(folder):
    for channel in (0, 1):
        image = SimpleITK.ReadImage(str(image_of(folder, "case_00", channel)))
        SimpleITK.WriteImage(SimpleITK.Cast(image, SimpleITK.sitkFloat64), str(image_of(folder, "case_09", channel)))
    label_of(folder, "case_09").write_bytes(label_of(folder, "case_00").read_bytes())
    describe(folder, numTraining=4)
    (problem,) = verify_dataset(DATASET)
    assert (problem.kind, problem.severity, problem.case) == ("duplicate", "warning", "case_09")
    assert "case_00" in problem.found


def test_single_slices_are_warnings(folder):
    for path in (image_of(folder), image_of(folder, channel=1), label_of(folder)):
        change(path, lambda v: v[6:7])
    assert found() == [("single slice", "case_01")]


def test_unlabelled_scans_are_verified_too(folder):
    (folder / "imagesUn").mkdir()
    image_of(folder, channel=0).rename(folder / "imagesUn/x_0000.nii.gz")
    image_of(folder, channel=1).unlink()
    label_of(folder).unlink()
    assert ("missing channel", "imagesUn/x") in found("error")


def test_the_description_is_held_against_the_cases(folder):
    describe(folder, numTraining=5, labels={"background": 0, "organ": 1, "core": 2, "tail": 3})
    problems = verify_dataset(DATASET)
    assert [(p.kind, p.severity) for p in problems] == [("number of cases", "warning"), ("unused label", "warning")]
    assert "tail" in problems[1].found


def die_on_the_second_case(folder, name, images, label, declared):
    if name == "case_01":
        os.kill(os.getpid(), signal.SIGKILL)
    return verify._CaseReport()


def test_a_case_that_kills_its_worker_is_named_and_the_others_are_checked(folder, monkeypatch):
    monkeypatch.setattr(verify, "_check_case", die_on_the_second_case)
    (problem,) = verify_dataset(DATASET, workers=1)
    assert (problem.kind, problem.case, problem.severity) == ("unreadable", "case_01", "error")


def test_colour_photographs_are_verified_without_geometry(tmp_path):
    paths.configure(tmp_path)
    folder = paths.raw("Dataset902_Photographs")
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, labels in (("a", (0, 1)), ("b", (0, 3))):
        colours = SimpleITK.GetImageFromArray(rng.integers(0, 255, (13, 17, 3), dtype=np.uint8), isVector=True)
        SimpleITK.WriteImage(colours, str(folder / f"imagesTr/{name}_0000.png"))
        mask = SimpleITK.GetImageFromArray(rng.choice(labels, (13, 17)).astype(np.uint8))
        SimpleITK.WriteImage(mask, str(folder / f"labelsTr/{name}.png"))
    content = {
        "channel_names": {"0": "R", "1": "G", "2": "B"},
        "labels": {"background": 0, "cell": 1},
        "file_ending": ".png",
    }
    (folder / "dataset.json").write_text(json.dumps({**content, "numTraining": 2}))
    assert [(p.kind, p.case) for p in verify_dataset(902)] == [("undeclared labels", "b")]
