"""The data root: --root, else AUTOSEG_ROOT, else nnU-Net's variables, else ./autoseg_data."""

from __future__ import annotations

import os

import pytest

from planners import paths
from planners.errors import DatasetError, SettingsError


def test_a_given_root_overrules_nnunets_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_raw", "/elsewhere")
    monkeypatch.setenv("AUTOSEG_ROOT", str(tmp_path / "from_variable"))
    root = paths.configure(tmp_path / "given")
    assert root.raw == tmp_path / "given" / "raw"
    assert os.environ["nnUNet_raw"] == str(root.raw)


def test_autoseg_root_overrules_nnunets_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_raw", "/elsewhere")
    monkeypatch.setenv("AUTOSEG_ROOT", str(tmp_path))
    assert paths.configure().results == tmp_path / "results"


def test_nnunets_variables_are_kept(tmp_path, monkeypatch):
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name.upper()))
    root = paths.configure()
    assert root.preprocessed == tmp_path / "PREPROCESSED"
    assert root.origin == "nnU-Net's variables"


def test_half_set_variables_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    with pytest.raises(SettingsError, match="nnUNet_results"):
        paths.configure()


def test_default_is_a_folder_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert paths.configure().raw == tmp_path / "autoseg_data" / "raw"
    assert not (tmp_path / "autoseg_data").exists()  # made when first written to


def test_datasets_are_found_by_id_and_name(tmp_path):
    root = paths.configure(tmp_path)
    (root.raw / "Dataset017_BTCV").mkdir(parents=True)
    assert paths.resolve_dataset(17) == paths.resolve_dataset("017") == paths.resolve_dataset("Dataset017_BTCV")
    with pytest.raises(DatasetError, match="Dataset017_BTCV"):
        paths.resolve_dataset(18)


def test_an_id_used_twice_is_refused(tmp_path):
    root = paths.configure(tmp_path)
    (root.raw / "Dataset017_BTCV").mkdir(parents=True)
    (root.results / "Dataset017_Other").mkdir(parents=True)
    with pytest.raises(DatasetError, match="not unique"):
        paths.resolve_dataset(17)
