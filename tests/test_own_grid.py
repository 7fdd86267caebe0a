"""Scans from elsewhere that keep their own voxels: any spacing, any channels, 2D images."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from PIL import Image

from planners import paths
from planners.dataset import Case, load_dataset, single_images
from planners.errors import DatasetError
from planners.files import read_json
from planners.own_grid import own_grid_plan
from planners.plans import load_plan
from pretrain.pools import build_pool
from pretrain.volumes import CaseInfo, Pool, Volumes
from tests.stubs import PLAN, make_home
from tests.tiny import DATASET, SPACING_MM, tiny_plan, tiny_scan, write_tiny_plan

OTHER = "Dataset902_Other"
THICK_MM = (0.9, 0.7, 6.0)  # (z, y, x): slices are thick along x


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    """A home dataset, another of two channels with thick slices along x, and a folder with a volume and two pictures."""
    before = dict(os.environ)
    root = tmp_path_factory.mktemp("own") / "root"
    make_home(root, cases=3)
    other, folder = paths.raw(OTHER), root / "scans"
    for place in (other / "imagesTr", other / "labelsTr", folder):
        place.mkdir(parents=True)
    for channel in range(2):
        image = SimpleITK.GetImageFromArray(100 * channel + tiny_scan(7, 2)[0][channel])
        image.SetSpacing(THICK_MM[::-1])
        SimpleITK.WriteImage(image, str(other / f"imagesTr/a_000{channel}.nii.gz"))
    labels = SimpleITK.GetImageFromArray(tiny_scan(7)[1])
    labels.SetSpacing(THICK_MM[::-1])
    SimpleITK.WriteImage(labels, str(other / "labelsTr/a.nii.gz"))
    content = read_json(paths.raw(DATASET) / "dataset.json")
    content |= {"channel_names": {"0": "T1", "1": "T2"}, "numTraining": 1}
    (other / "dataset.json").write_text(json.dumps(content))
    alone = SimpleITK.GetImageFromArray(tiny_scan(8)[0][0])
    alone.SetSpacing((2.0, 2.0, 2.0))
    SimpleITK.WriteImage(alone, str(folder / "alone.nii.gz"))
    pixels = np.random.default_rng(0).integers(1, 255, (40, 50, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "colour.png")
    Image.fromarray(pixels[..., 0]).save(folder / "grey.png")
    plan = load_plan(DATASET, PLAN)
    plan["configurations"]["child"] = {"inherits_from": "3d_fullres", "batch_size": 3}
    write_tiny_plan(plan)
    made = build_pool(
        load_dataset(DATASET), plan, "child", images=folder, more_datasets=[OTHER], own_grid=True, workers=0
    )
    os.environ.clear()
    os.environ.update(before)
    return made


def named(pool: Pool, name: str) -> CaseInfo:
    return next(case for case in pool.cases if case.id.rpartition("/")[2] == name)


def test_each_scan_keeps_its_spacing_and_channels(pool: Pool) -> None:
    assert named(pool, "case_00").spacing == SPACING_MM
    assert named(pool, "a").spacing == pytest.approx((6.0, 0.9, 0.7))
    assert named(pool, "alone").spacing == pytest.approx((2.0, 2.0, 2.0))
    assert [named(pool, n).channels for n in ("case_00", "a", "alone", "colour", "grey")] == [1, 2, 1, 3, 1]


def test_voxels_are_not_resampled(pool: Pool) -> None:
    info = named(pool, "a")
    raw = tiny_scan(7, 2)[0]
    assert info.shape == (raw.shape[3], raw.shape[1], raw.shape[2])
    read = Volumes(pool)[info.id].read((0, 0, 0), info.shape)
    for channel in range(2):  # z-scored: other channels than the home dataset's
        turned = raw[channel].transpose(2, 0, 1)
        assert np.allclose(read[channel], (turned - turned.mean()) / turned.std(), atol=1e-3)


def test_a_picture_is_a_case_of_one_thick_slice(pool: Pool) -> None:
    info = named(pool, "grey")
    assert info.shape == (1, 40, 50)
    assert info.spacing == (999.0, 1.0, 1.0)
    assert info.orientation == ""


def test_the_home_datasets_own_data_are_untouched(pool: Pool) -> None:
    folder = next(path for path in pool.files.values() if path.stem == "case_00").parent
    assert {path.suffix for path in folder.iterdir()} == {".b2nd", ".pkl"}
    assert len(list(folder.glob("*.pkl"))) == 3


def test_the_plans_intensities_are_kept_for_scans_of_the_same_kind() -> None:
    case = Case("a", (Path("a.nii.gz"),))
    plan = tiny_plan()
    plan["configurations"]["3d_fullres"]["normalization_schemes"] = ["CTNormalization"]
    kept = own_grid_plan(plan, "3d_fullres", case, home_intensities=True)
    assert kept["configurations"]["3d_fullres"]["normalization_schemes"] == ["CTNormalization"]
    other = own_grid_plan(plan, "3d_fullres", case, home_intensities=False)
    assert set(other["configurations"]["3d_fullres"]["normalization_schemes"]) == {"ZScoreNormalization"}
    assert plan["configurations"]["3d_fullres"]["resampling_fn_data"] == "resample_data_or_seg_to_shape"


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    for name in ("a.nii.gz", "a.mha"):
        (tmp_path / name).touch()
    with pytest.raises(DatasetError, match=r"a.mha and a.nii.gz"):
        single_images(tmp_path)


def test_a_folder_without_scans_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DatasetError, match="No scan found"):
        single_images(tmp_path)
