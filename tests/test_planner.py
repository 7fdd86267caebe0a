"""Both plans: valid for stock nnU-Net, one set of data, explained, overridable, immutable once used."""

from __future__ import annotations

import json

import numpy as np
import pytest
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from planners import paths
from planners.dataset import load_dataset
from planners.errors import PlanError
from planners.files import read_json, write_json
from planners.fingerprint import fingerprint
from planners.intensity import WINDOWS, parse_scheme
from planners.planner import Overrides, plan_dataset
from planners.plans import load_plan, plan_hash, plan_path, preprocessing_hash
from tests.tiny import DATASET, write_tiny_dataset


def made_up_fingerprint(spacings, shapes):
    """A fingerprint of one CT channel as `planners.fingerprint` writes it, without files."""
    statistics = {"mean": 90.0, "std": 40.0, "median": 92.0, "min": -300.0, "max": 900.0}
    hints = {"low": -1024.0, "high": 1500.0, "integer_share": 1.0, "air_share": 0.3}
    return {
        "spacings": spacings,
        "shapes_after_crop": shapes,
        "foreground_intensity_properties_per_channel": {
            "0": {**statistics, "percentile_00_5": -120.0, "percentile_99_5": 310.0}
        },
        "median_relative_size_after_cropping": 1.0,
        "autoseg": {"channels": [{"name": "CT", **hints, "window_share": dict.fromkeys(WINDOWS, 0.99)}]},
    }


@pytest.fixture
def tiny(tmp_path):
    write_tiny_dataset(tmp_path)
    dataset = load_dataset(DATASET)
    return dataset, fingerprint(dataset)


@pytest.fixture
def planned_for(tmp_path):
    """Plan the tiny dataset as if its scans had other spacings and shapes."""
    write_tiny_dataset(tmp_path, cases=2)
    dataset = load_dataset(DATASET)
    write_json(paths.preprocessed(DATASET) / "dataset_fingerprint.json", fingerprint(dataset))

    def plan(case_spacing, shape, **overrides):
        return plan_dataset(dataset, made_up_fingerprint([case_spacing] * 2, [shape] * 2), Overrides(**overrides))

    return plan


def test_both_plans_share_their_data(tiny):
    pair = plan_dataset(*tiny)
    assert pair.written == ["autosegPlans", "autosegPlans_cpu"]
    for name in ("2d", "3d_fullres"):
        full, cpu = pair.full["configurations"][name], pair.cpu["configurations"][name]
        assert full["data_identifier"] == cpu["data_identifier"]
        assert full["data_identifier"].startswith("autoseg_")
        assert preprocessing_hash(pair.full, name) == preprocessing_hash(pair.cpu, name)
        assert plan_hash(pair.full, name) != plan_hash(pair.cpu, name)


def test_stock_nnunet_builds_the_network_of_both_plans(tiny):
    plan_dataset(*tiny)
    for name in ("autosegPlans", "autosegPlans_cpu"):
        manager = PlansManager(str(plan_path(DATASET, name)))
        for configuration in manager.available_configurations:
            settings = manager.get_configuration(configuration)
            network = get_network_from_plans(
                settings.network_arch_class_name, settings.network_arch_init_kwargs,
                settings.network_arch_init_kwargs_req_import, 1, 3, deep_supervision=True,
            )  # fmt: skip
            assert len(network.encoder.output_channels) == settings.network_arch_init_kwargs["n_stages"]
            assert settings.resampling_fn_data and settings.preprocessor_class


@pytest.mark.parametrize(
    ("spacing", "shape"),
    [((1.0, 1.0, 1.0), (300, 400, 400)), ((5.0, 0.7, 0.7), (60, 512, 512)), ((3.0, 0.8, 0.8), (40, 260, 300))],
)
def test_cpu_plan_stays_within_its_budget(planned_for, spacing, shape):
    plan = planned_for(spacing, shape).cpu
    for name, voxels in (("3d_fullres", 48**3), ("2d", 256**2)):
        configuration = plan["configurations"][name]
        network = configuration["architecture"]["arch_kwargs"]
        assert np.prod(configuration["patch_size"]) <= voxels
        assert configuration["batch_size"] == 2
        assert network["n_stages"] <= 4
        assert network["features_per_stage"] == [8, 16, 32, 64][: network["n_stages"]]
        assert network["n_blocks_per_stage"] == [1, 1, 2, 2][: network["n_stages"]]
        assert all(
            p % s == 0 for p, s in zip(configuration["patch_size"], np.prod(network["strides"], axis=0), strict=True)
        )
    assert set(plan["configurations"]) == {"2d", "3d_fullres"}


def test_full_plan_has_a_cascade_where_nnunet_makes_one(planned_for):
    plan = planned_for((1.0, 1.0, 1.0), (300, 400, 400)).full
    assert {"3d_lowres", "3d_cascade_fullres"} <= set(plan["configurations"])


def test_plan_states_da_and_spread_of_cases(planned_for):
    plan = planned_for((5.0, 0.7, 0.7), (60, 512, 512)).full
    facts = plan["configurations"]["3d_fullres"]["autoseg"]
    assert facts["DA"] == 2
    assert facts["DA_per_stage"][:3] == [2, 1, 0]
    assert plan["configurations"]["2d"]["autoseg"]["DA"] is None
    assert plan["autoseg"]["DA_cases"] == {"min": 2, "median": 2.0, "max": 2}


def test_window_is_written_in_stock_numbers_and_the_fingerprint_stays(planned_for):
    plan = planned_for((1.0, 1.0, 1.0), (60, 60, 60), intensity=(parse_scheme("ct-abdomen"),)).full
    numbers = plan["foreground_intensity_properties_per_channel"]["0"]
    assert [numbers[k] for k in ("percentile_00_5", "percentile_99_5", "mean", "std")] == [-175, 250, -175, 425]
    assert plan["configurations"]["3d_fullres"]["normalization_schemes"] == ["CTNormalization"]


def test_other_intensities_get_other_data(planned_for):
    one = planned_for((1.0, 1.0, 1.0), (60, 60, 60), intensity=(parse_scheme("ct-abdomen"),)).full
    other = planned_for((1.0, 1.0, 1.0), (60, 60, 60), intensity=(parse_scheme("ct:-100,250"),)).full
    assert one["configurations"]["2d"]["data_identifier"] != other["configurations"]["2d"]["data_identifier"]


def test_every_decision_has_a_reason_and_a_way_to_change_it(tiny):
    for plan in (plan_dataset(*tiny).full, plan_dataset(*tiny).cpu):
        rows = plan["configurations"]["3d_fullres"]["autoseg"]["decisions"]
        assert [row["name"] for row in rows][:2] == ["spacing, mm", "anisotropy DA"]
        assert all(row["value"] and row["because"] and row["change"] for row in rows)


def test_patch_is_taken_over_with_fitting_strides(planned_for):
    plan = planned_for((1.0, 1.0, 1.0), (200, 200, 200), patch_size=(64, 96, 96)).full
    configuration = plan["configurations"]["3d_fullres"]
    assert configuration["patch_size"] == [64, 96, 96]
    assert np.prod(configuration["architecture"]["arch_kwargs"]["strides"], axis=0).tolist() == [16, 16, 16]


def test_patch_that_does_not_fit_its_strides_is_refused_with_ones_that_do(planned_for):
    with pytest.raises(PlanError, match=r"--patch-size 56,96,96 or 48,96,96"):
        planned_for((1.0, 1.0, 1.0), (200, 200, 200), patch_size=(50, 96, 96))


def test_spacing_is_taken_over(planned_for):
    plan = planned_for((1.0, 1.0, 1.0), (60, 60, 60), spacing=(2.0, 1.5, 1.5)).full
    assert plan["configurations"]["3d_fullres"]["spacing"] == [2.0, 1.5, 1.5]


def test_more_memory_gives_a_larger_patch(planned_for):
    small = planned_for((1.0, 1.0, 1.0), (300, 400, 400), gpu_memory_gb=6).full
    large = planned_for((1.0, 1.0, 1.0), (300, 400, 400), gpu_memory_gb=24).full
    size = [np.prod(p["configurations"]["3d_fullres"]["patch_size"]) for p in (small, large)]
    assert size[1] > 1.5 * size[0]


def test_planning_again_writes_nothing(tiny):
    plan_dataset(*tiny)
    assert plan_dataset(*tiny).written == []


def test_a_plan_something_was_trained_from_is_immutable(tiny):
    plan_dataset(*tiny)
    fold = paths.results(DATASET) / "AutosegTrainer__autosegPlans_cpu__3d_fullres" / "fold_0"
    fold.mkdir(parents=True)
    (fold / "checkpoint_final.pth").write_bytes(b"")
    with pytest.raises(PlanError, match="--plan-name"):
        plan_dataset(*tiny, Overrides(spacing=(3.0, 1.5, 1.5)))
    for name in ("autosegPlans", "autosegPlans_cpu"):  # neither of the pair has changed
        assert load_plan(DATASET, name)["configurations"]["3d_fullres"]["spacing"] == pytest.approx([2.5, 1.1, 1.0])
    pair = plan_dataset(*tiny, Overrides(spacing=(3.0, 1.5, 1.5)), tag="coarse")
    assert pair.written == ["autosegPlans_coarse", "autosegPlans_coarse_cpu"]


@pytest.mark.parametrize("tag", ["a__b", "", "x/y", "mine_cpu"])
def test_unusable_plan_names_are_refused(tiny, tag):
    with pytest.raises(PlanError):
        plan_dataset(*tiny, tag=tag)


def test_plans_hold_plain_json_without_paths(tiny, tmp_path):
    text = json.dumps(plan_dataset(*tiny).full)
    assert str(tmp_path) not in text


def test_fingerprint_agrees_with_nnunets_on_shapes_spacings_and_percentiles(tiny):
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import (
        DatasetFingerprintExtractor as Stock,
    )
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    dataset, ours = tiny
    stock = [Stock.analyze_case([str(c.images[0])], str(c.label), SimpleITKIO, 100_000) for c in dataset.cases]
    assert ours["shapes_after_crop"] == [list(s[0]) for s in stock]
    np.testing.assert_allclose(ours["spacings"], [s[1] for s in stock])
    foreground = np.concatenate([s[2][0] for s in stock])
    mine = ours["foreground_intensity_properties_per_channel"]["0"]
    assert mine["percentile_99_5"] == pytest.approx(np.percentile(foreground, 99.5), rel=1e-6)
    assert mine["mean"] == pytest.approx(foreground.mean(), rel=1e-5)


def test_fingerprint_is_read_again_and_made_anew_when_a_file_changes(tiny, monkeypatch):
    dataset, _ = tiny
    path = paths.preprocessed(DATASET) / "dataset_fingerprint.json"
    before = path.stat().st_mtime_ns
    fingerprint(dataset)
    assert path.stat().st_mtime_ns == before
    inputs = read_json(path)["autoseg"]["inputs"]
    dataset.cases[0].label.touch()
    assert fingerprint(dataset)["autoseg"]["inputs"] != inputs
    assert path.stat().st_mtime_ns != before
