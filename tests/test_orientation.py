"""Scans that lie in different ways are read as if all lay alike; voxels are moved, not resampled."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO, SimpleITKIOWithReorient

from planners import paths
from planners.dataset import load_dataset
from pretrain.orientation import AS_STORED, alignment, orientation
from pretrain.pools import aligned, build_pool, lying_alike, thickest_first
from pretrain.volumes import Pool, Volume, Volumes
from tests.stubs import make_home
from tests.tiny import DATASET, Array, tiny_plan, tiny_scan, write_image, write_tiny_plan

AXES = ("LR", "PA", "SI")
ORIENTATIONS = ["".join(letters) for order in permutations(AXES) for letters in product(*order)]


def scan_lying(code: str) -> SimpleITK.Image:
    """A scan whose intensity is its place in the patient, 1 to the left, 10 to the back and 100 upwards a mm."""
    size = {"L": 4, "P": 5, "S": 6}
    grid = np.indices((size["S"], size["P"], size["L"]))
    image = SimpleITK.GetImageFromArray((grid * np.array([100, 10, 1])[:, None, None, None]).sum(0).astype(np.float32))
    return SimpleITK.DICOMOrient(image, code)  # ITK: LPS of an identity direction, the name of where x, y and z grow to


@pytest.mark.parametrize("reader", [SimpleITKIO, NibabelIO, SimpleITKIOWithReorient, NibabelIOWithReorient])
@pytest.mark.parametrize("code", ["LPS", "RAI", "SLA", "PSR"])
def test_the_orientation_is_that_of_the_array_that_nnunet_reads(tmp_path: Path, reader: type, code: str) -> None:
    file = tmp_path / "scan.nii.gz"
    SimpleITK.WriteImage(scan_lying(code), str(file))
    array, properties = reader().read_images((str(file),))
    step = {"L": 1, "P": 10, "S": 100, "R": -1, "A": -10, "I": -100}
    found = orientation(properties, [0, 1, 2])
    assert [np.diff(array[0], axis=axis).flat[0] for axis in range(3)] == [step[letter] for letter in found]
    assert orientation(properties, [2, 0, 1]) == found[2] + found[0] + found[1]


def test_files_that_do_not_say_how_they_lie() -> None:
    assert orientation({"spacing": (999, 1, 1)}, [0, 1, 2]) == ""
    assert orientation({"sitk_stuff": {"direction": (1.0, 0.0, 0.0, 1.0)}}, [0, 1, 2]) == ""


def test_an_oblique_scan_gets_the_nearest_orientation() -> None:
    c, s = np.cos(0.5), np.sin(0.5)
    assert orientation({"sitk_stuff": {"direction": (c, -s, 0, s, c, 0, 0, 0, 1)}}, [0, 1, 2]) == "SPL"


@pytest.mark.parametrize("stored", ORIENTATIONS)
def test_aligned_boxes_are_those_of_the_aligned_array(stored: str) -> None:
    whole = np.random.default_rng(0).normal(size=(2, 4, 5, 6))
    how = alignment(stored, "SPL")
    expected = how.applied(whole)
    start, size = (1, 0, 2), [n - 3 for n in expected.shape[1:]]
    part = how.applied(whole[(slice(None), *how.stored_box(expected.shape[1:], start, size))])
    assert np.array_equal(part, expected[(slice(None), *(slice(a, a + n) for a, n in zip(start, size, strict=True)))])
    assert (how == AS_STORED) == (stored == "SPL")


def write_cases(codes: list[str], root: Path) -> None:
    """The tiny dataset with isotropic voxels, one case for each way to lie."""
    for index, code in enumerate(codes):
        image = SimpleITK.GetImageFromArray(tiny_scan(0)[0][0])
        SimpleITK.WriteImage(SimpleITK.DICOMOrient(image, code), str(root / f"imagesTr/case_{index:02d}_0000.nii.gz"))
        labels = SimpleITK.GetImageFromArray(tiny_scan(0)[1])
        SimpleITK.WriteImage(SimpleITK.DICOMOrient(labels, code), str(root / f"labelsTr/case_{index:02d}.nii.gz"))


@pytest.fixture
def lying_differently(tmp_path: Path) -> Pool:
    """One scan, stored in four ways, the first one twice."""
    before = dict(os.environ)
    make_home(tmp_path / "root", cases=5)
    write_cases(["LPS", "LPS", "RAS", "LAI", "SRP"], paths.raw(DATASET))
    plan = tiny_plan()
    plan["configurations"]["3d_fullres"]["spacing"] = [1.0, 1.0, 1.0]
    write_tiny_plan(plan)
    pool = build_pool(load_dataset(DATASET), plan, "3d_fullres", workers=0)
    os.environ.clear()
    os.environ.update(before)
    return pool


def test_one_scan_stored_in_four_ways_is_read_alike(lying_differently: Pool) -> None:
    first, *others = lying_differently.cases
    volumes = Volumes(lying_differently)
    expected = volumes[first.id].read((2, 3, 4), (6, 5, 4))
    assert first.alignment == AS_STORED
    for case in others:
        assert (case.shape, case.foreground_box) == (first.shape, first.foreground_box)
        assert np.allclose(volumes[case.id].read((2, 3, 4), (6, 5, 4)), expected, atol=1e-4)
    unaligned = Volume(replace(others[1], alignment=AS_STORED), lying_differently.files[others[1].id])
    assert not np.allclose(unaligned.read((2, 3, 4), (6, 5, 4)), expected, atol=0.1)


def test_axes_of_other_spacing_do_not_change_places(caplog: pytest.LogCaptureFixture) -> None:
    infos = [Array(np.zeros((1, 4, 5, 6)), f"v{i}", spacing=(3.0, 1.0, 1.0)).info for i in range(4)]
    cases = [replace(info, orientation=o) for info, o in zip(infos, ("SPL", "SPL", "PSL", "SLA"), strict=True)]
    with caplog.at_level(logging.WARNING, "autoseg"):
        found = lying_alike(cases)
    assert found[2] == cases[2]
    assert "v2" in caplog.text
    assert found[3].shape == (4, 6, 5)
    assert found[3].alignment.order == (0, 2, 1)


def test_a_scan_that_does_not_say_how_it_lies_is_named_where_others_do(caplog: pytest.LogCaptureFixture) -> None:
    infos = [Array(np.zeros((1, 4, 5, 6)), name).info for name in ("known", "mute")]
    with caplog.at_level(logging.WARNING, "autoseg"):
        assert lying_alike([replace(infos[0], orientation="SPL"), infos[1]])[1] == infos[1]
    assert "mute" in caplog.text
    caplog.clear()
    assert lying_alike(infos) == infos
    assert not caplog.text


def test_the_thickest_axis_comes_first() -> None:
    voxels = np.arange(60.0).reshape(1, 3, 4, 5)
    info = thickest_first(Array(voxels, spacing=(1.0, 0.8, 5.0)).info)
    assert (info.shape, info.spacing) == ((5, 3, 4), (5.0, 1.0, 0.8))
    assert np.array_equal(info.alignment.applied(voxels), voxels.transpose(0, 3, 1, 2))
    plain = Array(voxels, spacing=(1.0, 1.0, 1.0)).info
    assert thickest_first(plain) == plain


def test_the_foreground_box_turns_with_the_scan() -> None:
    info = replace(Array(np.zeros((1, 4, 5, 6))).info, foreground_box=((1, 3), (0, 5), (2, 6)), orientation="SPL")
    assert aligned(info, alignment("SPL", "RIP")).foreground_box == ((0, 4), (1, 3), (0, 5))


def test_unlabelled_scans_are_turned_to_the_home_datasets_way(tmp_path: Path) -> None:
    before = dict(os.environ)
    make_home(tmp_path / "root", cases=3)
    image = SimpleITK.ReadImage(str(paths.raw(DATASET) / "imagesTr/case_00_0000.nii.gz"))
    flipped = SimpleITK.DICOMOrient(image, "RPS")
    place = paths.raw(DATASET) / "imagesUn"
    place.mkdir()
    for index in range(5):  # more than the labelled ones: they must not decide
        SimpleITK.WriteImage(flipped, str(place / f"un_{index}_0000.nii.gz"))
    write_image(tiny_scan(9)[0][0], place / "straight_0000.nii.gz")
    pool = build_pool(load_dataset(DATASET), tiny_plan(), "3d_fullres", workers=0)
    os.environ.clear()
    os.environ.update(before)
    mirrored = {case.id.rpartition("/")[2]: case.alignment.mirrored for case in pool.cases}
    assert mirrored["case_00"] == mirrored["straight"] == (False, False, False)
    assert mirrored["un_0"] == (False, False, True)
    volumes = Volumes(pool)
    same = [volumes[f"{source}"].read((0, 0, 0), pool.cases[0].shape) for source in
            (f"{DATASET}/case_00", f"{DATASET}/imagesUn/un_0")]  # fmt: skip
    assert np.allclose(*same, atol=1e-4)
