"""Pools of scans: where they come from, what is known of each, and crops of them."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import blosc2
import numpy as np
import pytest

from planners import paths
from planners.dataset import load_dataset
from planners.errors import DatasetError
from pretrain.case_index import otsu
from pretrain.crops import best_of, mirrored, read_window, resize, turned
from pretrain.pools import build_pool
from pretrain.volumes import Pool, Volumes
from tests.stubs import copy_home, make_home
from tests.tiny import DATASET, SPACING_MM, tiny_plan, tiny_scan, write_image


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    before = dict(os.environ)
    root = make_home(tmp_path_factory.mktemp("volumes") / "root", cases=3)
    os.environ.clear()
    os.environ.update(before)
    return root


@pytest.fixture
def home(prepared: Path, tmp_path: Path) -> Path:
    return copy_home(prepared, tmp_path / "root")


def pool_of(**options: object) -> Pool:
    return build_pool(load_dataset(DATASET), tiny_plan(), "3d_fullres", workers=0, **options)  # type: ignore[arg-type]


def test_a_pool_knows_its_cases_without_reading_voxels_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pool_of()
    assert [case.id for case in pool.cases] == [f"{DATASET}/case_{i:02d}" for i in range(3)]
    info = pool.cases[0]
    array = blosc2.open(str(pool.files[info.id]), mode="r")
    assert info.shape == array.shape[1:]
    assert info.spacing == SPACING_MM
    assert info.original_spacing == pytest.approx(SPACING_MM, rel=1e-6)
    assert info.channels == 1
    monkeypatch.setattr("pretrain.case_index.measure_case", None)  # would fail if called
    assert pool_of() == pool


def test_the_index_lies_beside_the_folder_that_nnunet_reads(home: Path) -> None:
    pool_of()
    base = paths.preprocessed(DATASET)
    assert (base / "tiny_3d.pool.json").is_file()
    assert {path.suffix for path in (base / "tiny_3d").iterdir()} == {".b2nd", ".pkl"}


def test_a_changed_case_is_measured_again(home: Path) -> None:
    before = pool_of()
    a, b = (before.files[f"{DATASET}/case_0{i}"] for i in (0, 1))
    shutil.copy(b, a)
    os.utime(a)
    assert pool_of().cases[0].foreground_threshold == before.cases[1].foreground_threshold


def test_the_foreground_is_found(home: Path) -> None:
    pool = pool_of()
    for index, info in enumerate(pool.cases):
        voxels = Volumes(pool)[info.id].read((0, 0, 0), info.shape)[0]
        inside = np.zeros(info.shape, bool)
        inside[tuple(slice(a, b) for a, b in info.foreground_box)] = True
        labels = tiny_scan(index)[1]
        assert inside[labels == 2].all()
        assert inside.mean() < 0.7
        assert (voxels[labels == 2] > info.foreground_threshold).mean() > 0.95


def test_a_threshold_between_two_classes() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(0, 1, 3000), rng.normal(10, 1, 1000)])
    assert 3 < otsu(values) < 7
    assert otsu(np.full(10, 2.0)) < 2


def test_unlabelled_scans_other_folders_and_datasets_join(home: Path, tmp_path: Path) -> None:
    write_image(tiny_scan(50)[0][0], paths.raw(DATASET) / "imagesUn" / "more_0000.nii.gz")
    write_image(tiny_scan(51)[0][0], tmp_path / "scans" / "plain.nii.gz")
    other = "Dataset902_Other"
    shutil.copytree(paths.raw(DATASET), paths.raw(other))
    pool = pool_of(images=tmp_path / "scans", more_datasets=[902])
    sources = [case.source for case in pool.cases]
    assert sources.count(DATASET) == 3
    assert sources.count(f"{DATASET}/imagesUn") == 1
    assert sources.count(other) == 4
    assert sum(source.startswith("scans-") for source in sources) == 1
    assert len({case.id for case in pool.cases}) == 9
    assert {p.suffix for p in (paths.preprocessed(DATASET) / "tiny_3d").iterdir()} == {".b2nd", ".pkl"}
    assert len(list((paths.preprocessed(DATASET) / "tiny_3d").glob("*.pkl"))) == 3


def test_scans_of_the_dataset_do_not_come_back_through_a_folder(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "autoseg"):
        pool = pool_of(images=paths.raw(DATASET) / "imagesTr", exclude_fold=0)
    assert len(pool) == 2
    assert "belong to the dataset already" in caplog.text


def test_other_channels_are_refused(home: Path) -> None:
    other = paths.raw("Dataset902_Other")
    shutil.copytree(paths.raw(DATASET), other)
    content = json.loads((other / "dataset.json").read_text())
    (other / "dataset.json").write_text(json.dumps({**content, "channel_names": {"0": "T1", "1": "T2"}}))
    with pytest.raises(DatasetError, match="other channels"):
        pool_of(more_datasets=["Dataset902_Other"])


def test_some_cases_are_held_out(home: Path) -> None:
    pool = pool_of()
    learn, held_out = pool.split(0.1, seed=0)
    assert len(held_out) == 1
    assert {c.id for c in learn.cases} | {c.id for c in held_out.cases} == {c.id for c in pool.cases}
    assert set(held_out.files) == {held_out.cases[0].id}
    assert pool.split(0.1, seed=0) == (learn, held_out)


def test_windows_over_the_border_are_filled_with_the_minimum(home: Path) -> None:
    pool = pool_of()
    volume = Volumes(pool)[pool.cases[0].id]
    shape = volume.info.shape
    whole = volume.read((0, 0, 0), shape)
    window, inside = read_window(volume, (-2, 1, 3), (shape[0] + 3, 5, 6))
    assert inside == [(2, 2 + shape[0]), (0, 5), (0, 6)]
    assert np.array_equal(window[:, 2:-1], whole[:, :, 1:6, 3:9])
    assert (window[:, :2] == whole[:, :, 1:6, 3:9].min()).all()
    plane, inside = read_window(volume.plane(4), (1, -1), (5, 6))
    assert inside == [(0, 5), (1, 6)]
    assert np.array_equal(plane[:, :, 1:], whole[:, 4, 1:6, :5])


def test_resizing_keeps_borders_and_constants() -> None:
    ramp = np.arange(8, dtype=np.float32)[None, None, :] * np.ones((1, 4, 1), np.float32)
    assert np.allclose(resize(ramp, (4, 4))[0, 0], [0.5, 2.5, 4.5, 6.5])
    assert resize(ramp, (4, 8)) is ramp


def test_the_best_of_some_tries() -> None:
    values = iter([0.1, 0.5, 0.3, 0.9])
    assert best_of(3, lambda: ((v := next(values)), v), 0.8) == (0.5, 0.5)
    values = iter([0.1, 0.9, 0.3])
    assert best_of(3, lambda: ((v := next(values)), v), 0.8) == (0.9, 0.9)


def test_mirrors_and_turns() -> None:
    rng = np.random.default_rng(0)
    crop = np.arange(2 * 3 * 4 * 4.0).reshape(2, 3, 4, 4)
    assert np.array_equal(mirrored(crop, rng, 1.0), crop[:, ::-1, ::-1, ::-1])
    assert mirrored(crop, rng, 0.0) is crop
    assert turned(crop[..., :3], rng, 1.0, (1, 1, 1)).shape == (2, 3, 4, 3)
    assert turned(crop, rng, 1.0, (1, 1, 2)) is crop
    assert not np.array_equal(turned(crop, rng, 1.0, (5, 1, 1)), crop)
