"""Preprocessing: nnU-Net's own result, resumable, and a bad case takes no other with it."""

from __future__ import annotations

import multiprocessing

import numpy as np
import pytest
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class, nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from planners import paths, preprocess
from planners.dataset import load_dataset
from planners.errors import CasesFailed, PlanError
from planners.files import read_case_properties
from planners.fingerprint import fingerprint
from planners.planner import plan_dataset
from planners.plans import folds, load_plan
from planners.preprocess import is_preprocessed, preprocess_dataset, preprocess_unlabelled
from tests.tiny import DATASET, write_tiny_dataset


@pytest.fixture
def planned(tmp_path):
    write_tiny_dataset(tmp_path, cases=4, test_cases=1)
    dataset = load_dataset(DATASET)
    return dataset, plan_dataset(dataset, fingerprint(dataset)).full


def folder_of(plan, configuration="3d_fullres"):
    return paths.preprocessed(DATASET) / plan["configurations"][configuration]["data_identifier"]


def times(folder):
    return {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}


def test_files_are_what_nnunet_makes_and_reads(planned):
    dataset, plan = planned
    preprocess_dataset(DATASET, "autosegPlans", ["3d_fullres"])
    assert infer_dataset_class(str(folder_of(plan))) is nnUNetDatasetBlosc2
    stored = nnUNetDatasetBlosc2(str(folder_of(plan)))
    assert sorted(stored.identifiers) == [case.name for case in dataset.cases]
    image, labels, _, properties = stored.load_case("case_01")
    case = dataset.cases[1]
    manager = PlansManager(plan)
    expected, expected_labels, _ = DefaultPreprocessor(verbose=False).run_case(
        [str(case.images[0])], str(case.label), manager, manager.get_configuration("3d_fullres"), dataset.json
    )
    assert np.abs(image[:] - expected).max() < 1e-5 * expected.std()
    np.testing.assert_array_equal(labels[:], expected_labels)
    assert set(properties["class_locations"]) == {1, 2}
    assert read_case_properties(folder_of(plan) / "case_01.pkl")["spacing"] == properties["spacing"]


def test_twice_writes_nothing(planned):
    _, plan = planned
    preprocess_dataset(DATASET, "autosegPlans", ["3d_fullres", "2d"])
    before = times(folder_of(plan))
    preprocess_dataset(DATASET, "autosegPlans_cpu", ["3d_fullres"])
    assert times(folder_of(plan)) == before


def test_a_changed_scan_is_done_again_and_the_others_are_not(planned):
    dataset, plan = planned
    preprocess_dataset(DATASET, "autosegPlans", ["3d_fullres"])
    before = times(folder_of(plan))
    dataset.cases[2].images[0].touch()
    assert not is_preprocessed(DATASET, plan, "3d_fullres")
    preprocess_dataset(DATASET, "autosegPlans", ["3d_fullres"])
    after = times(folder_of(plan))
    assert {name for name in after if after[name] != before[name]} == {
        "case_02.b2nd",
        "case_02_seg.b2nd",
        "case_02.pkl",
    }
    assert is_preprocessed(DATASET, plan, "3d_fullres")


def test_a_removed_scan_leaves_the_training_folder(planned):
    dataset, plan = planned
    preprocess_dataset(DATASET, "autosegPlans", ["3d_fullres"])
    dataset.cases[0].images[0].unlink()
    preprocess_dataset(DATASET, "autosegPlans", ["3d_fullres"])
    assert not list(folder_of(plan).glob("case_00*"))


def test_a_broken_scan_is_named_and_the_others_are_finished(planned):
    dataset, plan = planned
    dataset.cases[1].images[0].write_bytes(b"not an image")
    with pytest.raises(CasesFailed, match="case_01") as caught:
        preprocess_dataset(DATASET, "autosegPlans", ["3d_fullres"])
    assert caught.value.exit_code == 1
    assert len(list(folder_of(plan).glob("*.pkl"))) == 3


def run_and_die(root: str) -> None:
    """Preprocess and be killed while the third case is worked on."""
    import os
    import signal

    paths.configure(root)
    original = preprocess.preprocess_case
    done = []

    def dying(*args):
        if len(done) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(1)
        return original(*args)

    preprocess.preprocess_case = dying
    preprocess_dataset(DATASET, "autosegPlans", ["3d_fullres"])


def test_a_killed_run_continues_where_it_was(planned, tmp_path):
    _, plan = planned
    process = multiprocessing.get_context("spawn").Process(target=run_and_die, args=(str(tmp_path),))
    process.start()
    process.join()
    assert process.exitcode == -9
    before = {p.name: p.stat().st_mtime_ns for p in folder_of(plan).glob("*.pkl")}
    assert len(before) == 2
    preprocess_dataset(DATASET, "autosegPlans", ["3d_fullres"])
    after = {p.name: p.stat().st_mtime_ns for p in folder_of(plan).glob("*.pkl")}
    assert len(after) == 4
    assert before.items() <= after.items()
    assert not list(folder_of(plan).glob(".partial*"))


def test_unlabelled_scans_stay_out_of_the_training_folder(planned):
    dataset, plan = planned
    preprocess_dataset(DATASET, "autosegPlans", ["3d_fullres"])
    before = times(folder_of(plan))
    folder = preprocess_unlabelled(DATASET, plan, "3d_fullres", "imagesUn", dataset.cases[:2])
    assert folder.parent.name == f"{folder_of(plan).name}_unlabelled"
    assert sorted(p.name for p in folder.glob("*.b2nd") if "_seg" not in p.name) == ["case_00.b2nd", "case_01.b2nd"]
    assert times(folder_of(plan)) == before


def test_data_that_stock_nnunet_made_are_used_and_never_written(planned):
    dataset, plan = planned
    stock = {**plan, "plans_name": "nnUNetPlans"}
    stock["configurations"]["3d_fullres"]["data_identifier"] = "nnUNetPlans_3d_fullres"
    from planners.files import write_json
    from planners.plans import plan_path

    write_json(plan_path(DATASET, "nnUNetPlans"), stock)
    folder = paths.preprocessed(DATASET) / "nnUNetPlans_3d_fullres"
    folder.mkdir()
    for case in dataset.cases:
        (folder / f"{case.name}.pkl").write_bytes(b"")
    before = times(folder)
    preprocess_dataset(DATASET, "nnUNetPlans", ["3d_fullres"])
    assert times(folder) == before
    (folder / "case_00.pkl").unlink()
    with pytest.raises(PlanError, match="only some of the cases"):
        preprocess_dataset(DATASET, "nnUNetPlans", ["3d_fullres"])


def test_splits_are_nnunets_and_small_datasets_get_fewer_folds(planned):
    splits = folds(DATASET)
    assert len(splits) == 4
    assert sorted(name for split in splits for name in split["val"]) == ["case_00", "case_01", "case_02", "case_03"]
    assert folds(DATASET) == splits


def test_missing_plans_are_listed(planned):
    with pytest.raises(PlanError, match="autosegPlans, autosegPlans_cpu"):
        load_plan(DATASET, "mine")
