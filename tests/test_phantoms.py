"""The demonstration's phantoms: plausible, varied, reproducible, correctly oriented, and never written over foreign data."""

import json

import numpy as np
import pytest
import SimpleITK

from autoseg.convert.label_sets import LABEL_SETS
from autoseg.phantoms import made_by_demo, write_phantoms
from planners.errors import DatasetError

ORGANS = LABEL_SETS["btcv"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw") / "Dataset017_BTCV"
    write_phantoms(folder, labelled=2, unlabelled=1, test=1)
    return folder


def read(path):
    image = SimpleITK.ReadImage(str(path))
    return image, SimpleITK.GetArrayFromImage(image)


def centre_mm(image, labels, organ):
    """Mean patient coordinates (left, posterior, superior) of an organ."""
    index_zyx = np.argwhere(labels == ORGANS[organ]).mean(axis=0)
    return np.array(image.TransformContinuousIndexToPhysicalPoint(index_zyx[::-1].tolist()))


def test_every_group_is_written_in_nnunet_layout(dataset):
    names = sorted(str(path.relative_to(dataset)) for path in dataset.rglob("*.nii.gz"))
    assert names == [
        "imagesTr/phantom_tr01_0000.nii.gz",
        "imagesTr/phantom_tr02_0000.nii.gz",
        "imagesTs/phantom_ts01_0000.nii.gz",
        "imagesUn/phantom_un01_0000.nii.gz",
        "labelsTr/phantom_tr01.nii.gz",
        "labelsTr/phantom_tr02.nii.gz",
        "labelsTs/phantom_ts01.nii.gz",
    ]
    description = json.loads((dataset / "dataset.json").read_text())
    assert description["labels"] == {"background": 0, **ORGANS}
    assert description["numTraining"] == 2
    assert made_by_demo(dataset)


@pytest.mark.parametrize("case", ["phantom_tr01", "phantom_tr02"])
def test_organs_have_plausible_volumes_and_densities(dataset, case):
    image, labels = read(dataset / f"labelsTr/{case}.nii.gz")
    _, hu = read(dataset / f"imagesTr/{case}_0000.nii.gz")
    millilitres = {
        organ: (labels == value).sum() * np.prod(image.GetSpacing()) / 1000 for organ, value in ORGANS.items()
    }
    density = {organ: hu[labels == value].mean() for organ, value in ORGANS.items()}
    assert 700 < millilitres["liver"] < 1900
    assert 40 < millilitres["spleen"] < 350
    assert 70 < millilitres["rkid"] < 260
    assert min(millilitres.values()) > 0.3
    assert density["gall"] < 30 < 80 < density["liver"] < density["aorta"]
    assert hu.min() < -950
    assert hu.max() > 300


def test_right_organs_lie_on_the_patients_right(dataset):
    image, labels = read(dataset / "labelsTr/phantom_tr01.nii.gz")
    where = {organ: centre_mm(image, labels, organ) for organ in ORGANS}
    left, back, head = 0, 1, 2
    for right_side, left_side in (("rkid", "lkid"), ("liver", "spleen"), ("IVC", "aorta"), ("rad", "lad")):
        assert where[right_side][left] < where[left_side][left]
    assert where["sto"][back] < where["aorta"][back]
    assert where["eso"][head] > where["lkid"][head]


def test_the_same_seed_draws_the_same_voxels_and_subjects_differ(dataset, tmp_path):
    write_phantoms(tmp_path / "again", labelled=1, unlabelled=0, test=1)
    image, first = read(dataset / "imagesTr/phantom_tr01_0000.nii.gz")
    assert np.array_equal(first, read(tmp_path / "again/imagesTr/phantom_tr01_0000.nii.gz")[1])
    other, second = read(dataset / "imagesTr/phantom_tr02_0000.nii.gz")
    assert image.GetSpacing() != other.GetSpacing()
    assert not np.array_equal(first, second)
    test, unlabelled = (
        read(dataset / "imagesTs/phantom_ts01_0000.nii.gz")[1],
        dataset / "imagesUn/phantom_un01_0000.nii.gz",
    )
    assert not np.array_equal(test, read(unlabelled)[1])


def test_another_dataset_is_never_overwritten(tmp_path):
    (tmp_path / "dataset.json").write_text('{"name": "BTCV"}')
    with pytest.raises(DatasetError, match="did not make"):
        write_phantoms(tmp_path, labelled=1, unlabelled=0, test=0)
    assert [path.name for path in tmp_path.iterdir()] == ["dataset.json"]


def test_repeating_writes_nothing_and_other_arguments_replace_everything(tmp_path):
    folder = tmp_path / "Dataset017_BTCV"
    write_phantoms(folder, labelled=2, unlabelled=0, test=0)
    files = sorted(folder.rglob("*.*"))
    files[-1].unlink()
    before = {path: path.stat().st_mtime_ns for path in files[:-1]}
    write_phantoms(folder, labelled=2, unlabelled=0, test=0)
    # The case whose label was lost is drawn again, the other and the description stay.
    kept = [path for path in before if "tr02" not in path.name]
    assert {path: path.stat().st_mtime_ns for path in kept} == {path: before[path] for path in kept}
    assert files[-1].is_file()
    write_phantoms(folder, labelled=1, unlabelled=0, test=0)
    assert sorted(path.name for path in folder.rglob("*.gz")) == ["phantom_tr01.nii.gz", "phantom_tr01_0000.nii.gz"]
