"""Weights from elsewhere find a plan, a configuration and a network, and say why."""

import copy
import json

import pytest
import torch

from autoseg.console import print_transfer
from planners import paths
from planners.dataset import load_dataset
from planners.errors import PretrainedMismatch, SettingsError
from planners.files import content_hash
from planners.fingerprint import fingerprint
from planners.intensity import parse_scheme
from planners.planner import Overrides, plan_dataset
from planners.plans import available_plans, load_plan
from pretrain.encoders import encoder_of
from pretrain.fit import fit
from pretrain.importers.weights import Weights
from pretrain.networks.registry import build_network
from pretrain.transfer import TransferReport, distinct
from tests.tiny import DATASET, SPACING_MM, write_tiny_dataset
from trainers.job import prepare
from trainers.train import train

PLAN = "autosegPlans_cpu"
SWIN = {
    "network_class_name": "pretrain.networks.SwinUNETR",
    "arch_kwargs": {
        "feature_size": 12, "depths": [2, 2, 2, 2], "num_heads": [3, 6, 12, 24], "window_size": 7, "use_v2": True,
        "use_checkpoint": True,
    },
    "_kw_requires_import": [],
}  # fmt: skip


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    root = write_tiny_dataset(tmp_path_factory.mktemp("planned"), cases=5)
    dataset = load_dataset(901)
    plan_dataset(dataset, fingerprint(dataset), Overrides())
    return root


@pytest.fixture(autouse=True)
def _here(planned):
    paths.configure(planned)


def weights_of(architecture, *, channels=1, encoder_only=True, **known) -> Weights:
    torch.manual_seed(3)
    network = build_network(architecture, channels, 3, deep_supervision=False)
    state = (encoder_of(network) if encoder_only else network).state_dict()
    names = [names[0] for names in distinct(state.items())]
    return Weights(
        name="Theirs", kind="test weights", method="voco", architecture=architecture,
        tensors={name: state[name] for name in names if state[name].is_floating_point()},
        scope="encoder" if encoder_only else "encoder+decoder",
        channels=channels, spatial_dims=3, sha256="ab" * 32, **known,
    )  # fmt: skip


def own_architecture() -> dict:
    return copy.deepcopy(load_plan(DATASET, PLAN)["configurations"]["3d_fullres"]["architecture"])


def tree(root) -> dict:
    return {str(p.relative_to(root)): p.stat().st_mtime_ns for p in sorted(root.rglob("*")) if p.is_file()}


def test_weights_that_fill_the_plans_network_leave_the_plan_as_it_is():
    found = fit(load_dataset(901), weights_of(own_architecture()), plan_name=PLAN)
    assert (found.plan_name, found.configuration, found.unwritten) == (PLAN, "3d_fullres", ())
    assert found.report.encoder_share == 1.0


def test_weights_of_another_network_add_a_configuration_on_the_same_data():
    found = fit(load_dataset(901), weights_of(SWIN), plan_name=PLAN)
    assert found.configuration == "3d_fullres_swin_12"
    assert [plan["plans_name"] for plan in found.unwritten] == [PLAN]
    assert found.report.encoder_share == 1.0
    assert found.plan["configurations"]["3d_fullres_swin_12"]["inherits_from"] == "3d_fullres"
    assert "no place for weights of a SwinUNETR" in found.decisions[-1].because
    assert found.configuration not in load_plan(DATASET, PLAN)["configurations"]  # nothing was written


def test_a_wider_unet_becomes_a_configuration_with_the_plans_kernels():
    theirs = own_architecture()
    arguments = theirs["arch_kwargs"]
    arguments["features_per_stage"] = [10 * 2**i for i in range(arguments["n_stages"])]
    arguments["kernel_sizes"] = [[3, 3, 3]] * arguments["n_stages"]
    found = fit(load_dataset(901), weights_of(theirs), plan_name=PLAN)
    assert found.configuration == "3d_fullres_theirs"
    built = found.plan["configurations"]["3d_fullres_theirs"]["architecture"]["arch_kwargs"]
    assert built["features_per_stage"] == arguments["features_per_stage"]
    assert built["kernel_sizes"] == own_architecture()["arch_kwargs"]["kernel_sizes"]
    assert found.report.encoder_share == 1.0
    assert {rule for _, rule in found.report.adapted} == {"kernel depth 3 to 1 by summing"}


def test_a_deeper_unet_gives_the_stages_the_plan_has():
    theirs = own_architecture()
    arguments = theirs["arch_kwargs"]
    arguments["n_stages"] += 1
    for key, more in (("features_per_stage", 48), ("strides", [2, 2, 2]), ("kernel_sizes", [3, 3, 3]),
                      ("n_blocks_per_stage", 1)):  # fmt: skip
        arguments[key] = [*arguments[key], more]
    arguments["n_conv_per_stage_decoder"] = [*arguments["n_conv_per_stage_decoder"], 1]
    found = fit(load_dataset(901), weights_of(theirs), plan_name=PLAN)
    assert found.configuration == "3d_fullres"
    assert found.report.encoder_share == 1.0
    last = f"stages.{arguments['n_stages'] - 1}."
    assert found.report.unused
    assert all(name.startswith(last) for name in found.report.unused)


def test_another_file_of_the_same_name_does_not_take_the_place_of_the_first():
    plan = load_plan(DATASET, PLAN)
    before = copy.deepcopy(plan)
    narrow, wide = own_architecture(), own_architecture()
    for architecture, base in ((narrow, 10), (wide, 12)):
        stages = architecture["arch_kwargs"]["n_stages"]
        architecture["arch_kwargs"]["features_per_stage"] = [base * 2**i for i in range(stages)]
    file = paths.preprocessed(DATASET) / f"{PLAN}.json"
    try:
        file.write_text(json.dumps(fit(load_dataset(901), weights_of(narrow), plan_name=PLAN).plan))
        again = fit(load_dataset(901), weights_of(narrow), plan_name=PLAN)
        other = fit(load_dataset(901), weights_of(wide), plan_name=PLAN)
    finally:
        file.write_text(json.dumps(before))
    assert (again.configuration, again.unwritten) == ("3d_fullres_theirs", ())
    assert other.configuration == "3d_fullres_theirs-ababab"


def test_a_configuration_asked_for_must_be_able_to_take_the_weights():
    with pytest.raises(PretrainedMismatch, match=r"Theirs \(test weights\).*do not fit this network"):
        fit(load_dataset(901), weights_of(SWIN), plan_name=PLAN, configuration="3d_fullres")


def test_coarse_data_are_prepared_again_for_weights_that_know_finer_ones():
    # planned at 2.5×1.1×1.0; two fifths of the scale are lost by keeping it, no voxel by going finer
    theirs = weights_of(own_architecture(), spacing=(1.0, 1.0, 1.0))
    found = fit(load_dataset(901), theirs, plan_name=PLAN)
    assert found.plan_name == "autosegPlans_Theirs_cpu"
    assert [plan["plans_name"] for plan in found.unwritten] == ["autosegPlans_Theirs", "autosegPlans_Theirs_cpu"]
    assert found.plan["configurations"]["3d_fullres"]["spacing"] == [1.0, 1.0, 1.0]
    assert "as Theirs was trained" in json.dumps(found.plan["configurations"]["3d_fullres"]["autoseg"]["decisions"])
    assert available_plans(DATASET) == ["autosegPlans", "autosegPlans_cpu"]


def test_a_plan_that_is_named_keeps_its_data():
    theirs = weights_of(own_architecture(), spacing=(1.0, 1.0, 1.0))
    found = fit(load_dataset(901), theirs, plan_name=PLAN, keep_data=True)
    assert found.plan_name == PLAN
    assert found.plan["configurations"]["3d_fullres"]["spacing"] == pytest.approx(list(SPACING_MM))


def test_windows_of_ct_do_not_reach_scans_without_hounsfield_units():
    theirs = weights_of(own_architecture(), spacing=None, intensity=(parse_scheme("ct-abdomen"),))
    found = fit(load_dataset(901), theirs, plan_name=PLAN)
    assert found.plan_name == PLAN
    assert any("another kind of scale" in row.because for row in found.decisions)


def test_a_dry_run_reports_every_tensor_and_writes_nothing(planned, tmp_path):
    file = tmp_path / "VoCo_tiny.pt"
    network = build_network(SWIN, 1, 3, deep_supervision=False)
    torch.save(encoder_of(network).state_dict(), file)
    before, plans_before = tree(planned), content_hash(load_plan(DATASET, PLAN))
    seen = []
    assert train(901, pretrained=file, device="cpu", dry_run=True, on_dry_run=lambda *found: seen.append(found)) == []
    ((job, report),) = seen
    assert job.configuration == "3d_fullres_swin_12"
    named = {name for name, *_ in report.rows()}
    assert {
        n for n, t in network.state_dict().items() if t.is_floating_point() and not n.startswith(("dec", "out"))
    } <= named
    assert tree(planned) == before
    assert content_hash(load_plan(DATASET, PLAN)) == plans_before


def test_weights_of_others_are_trained_from_and_named_in_the_run(planned, tmp_path, caplog):
    caplog.set_level("INFO", logger="autoseg")
    theirs = own_architecture()
    network = build_network(theirs, 1, 5, deep_supervision=False)
    file = tmp_path / "foreign_model.pth"
    torch.save({"network_weights": network.state_dict()}, file)
    folder = train(901, pretrained=file, device="cpu", settings={"epochs": 1, "iterations": 1})[0]
    assert folder.parent.name == f"AutosegTrainer-foreign-model__{PLAN}__3d_fullres"
    stored = json.loads((folder.parent / "plans.json").read_text())["autoseg"]["train"]["pretrained"]
    assert stored["name"] == "foreign-model"
    transfer = json.loads((folder.parent / "transfer.json").read_text())
    assert transfer["encoder_share"] == 1.0
    assert str(tmp_path) not in json.dumps(transfer)


def test_a_run_from_a_file_continues_only_with_the_same_file(planned, tmp_path):
    file = tmp_path / "one.pth"
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = build_network(own_architecture(), 1, 5, deep_supervision=False).state_dict()
        torch.save({"network_weights": state}, file)
        if seed == 1:
            train(901, pretrained=file, run="from-file", device="cpu", settings={"epochs": 1, "iterations": 1})
            assert prepare(901, pretrained=file, run="from-file", device="cpu").resolved.settings.epochs == 1
    with pytest.raises(SettingsError, match=r"begun with other options[\s\S]*--pretrained one"):
        prepare(901, pretrained=file, run="from-file", device="cpu")


def test_inspecting_puts_neighbours_of_one_fate_together(capsys):
    names = [f"stages.5.blocks.{i}.conv.weight" for i in range(3)]
    report = TransferReport(0.5, ("stem.conv",), (("stages.0.conv", "summed"),), (), (*names, "projector"))
    print_transfer(report, every_tensor=False)
    shown = capsys.readouterr().out
    assert "stages.5… (3 tensors)" in shown
    assert "projector" in shown
    assert "stem.conv" not in shown
    print_transfer(report)
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("stem.conv", *names))
