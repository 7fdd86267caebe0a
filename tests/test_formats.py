"""Other tools read what is exported for them: stock nnU-Net a model and weights, nnU-Net's fine-tuning nnssl's layout."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dynamic_network_architectures.architectures.primus import PrimusS
from nnunetv2.model_sharing.model_import import install_model_from_zip_file
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

from autoseg.formats import nnssl_checkpoint
from autoseg.share import export
from planners import paths
from planners.errors import SettingsError
from pretrain.checkpoint import load_encoder
from pretrain.encoders import build_segmentation_network, encoder_of
from pretrain.networks.registry import build_network
from tests.shared import tiny_card, use, write_tiny_encoder
from tests.tiny import DATASET, dataset_json, tiny_plan, write_tiny_dataset
from tests.trained import read, train_tiny
from trainers.checkpoint import save_checkpoint
from trainers.predict import predict
from trainers.runs import stock_command


@pytest.fixture
def data(tmp_path) -> Path:
    return use(tmp_path / "data")


def network(plan: dict | None = None) -> torch.nn.Module:
    torch.manual_seed(99)
    return build_segmentation_network(plan or tiny_plan(), "3d_fullres", dataset_json())


def plain_plan() -> dict:
    """The tiny plan with nnU-Net's plain network, whose stem is its first stage."""
    plan = tiny_plan()
    architecture = plan["configurations"]["3d_fullres"]["architecture"]
    architecture["network_class_name"] = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
    architecture["arch_kwargs"]["n_conv_per_stage"] = architecture["arch_kwargs"].pop("n_blocks_per_stage")
    return plan


def test_nnunet_installs_and_predicts_an_exported_model(tmp_path):
    home = use(tmp_path / "home")
    trained = train_tiny(home, settings={"epochs": 2})
    ours = predict(trained.scans, tmp_path / "ours", dataset=901, device="cpu", mirroring=False)
    archive = export(901, format="nnunet", output=tmp_path / "model.zip")
    assert b"/home/" not in archive.read_bytes() and str(tmp_path).encode() not in archive.read_bytes()
    use(tmp_path / "elsewhere")
    paths.results(DATASET).parent.mkdir(parents=True)
    install_model_from_zip_file(str(archive))
    installed = paths.results(DATASET) / trained.model.name
    checkpoint = torch.load(installed / "fold_0" / "checkpoint_final.pth", weights_only=True)
    assert checkpoint["trainer_name"] == "nnUNetTrainer" and set(checkpoint["init_args"]) == {"configuration", "fold"}

    arguments = [*stock_command(installed, (0,), "cpu").split()[1:], "-npp", "0", "-nps", "0", "--disable_tta"]
    arguments = [{"INPUT": str(trained.scans), "OUTPUT": str(tmp_path / "stock")}.get(a, a) for a in arguments]
    start = "from nnunetv2.inference.predict_from_raw_data import predict_entry_point; predict_entry_point()"
    done = subprocess.run(
        [sys.executable, "-c", start, *arguments], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(ours.written) == 2
    for mask in ours.written:
        assert (read(mask) == read(tmp_path / "stock" / mask.name)).mean() >= 0.999


@pytest.mark.parametrize("plan", [tiny_plan(), plain_plan()], ids=["residual", "plain"])
def test_nnunet_trains_from_exported_weights(data, tmp_path, plan):
    folder = write_tiny_encoder(plan)
    file = export(901, encoder="voco", format="nnunet", output=tmp_path / "weights.pth")
    target = network(plan)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    load_pretrained_weights(target, str(file))
    pretrained, _ = load_encoder(folder)
    state = encoder_of(target).state_dict()
    assert all(torch.equal(state[name], value) for name, value in pretrained.items())
    assert any(not torch.equal(before[f"encoder.{name}"], value) for name, value in pretrained.items())
    heads = [name for name in before if ".seg_layers." in name]
    assert heads and all(torch.equal(target.state_dict()[name], before[name]) for name in heads)
    again = export(901, encoder="voco", format="nnunet", output=tmp_path / "again.pth")
    one, two = (torch.load(f, weights_only=True)["network_weights"] for f in (file, again))
    assert all(torch.equal(one[name], two[name]) for name in one)


def load_as_nnunet_master(target: torch.nn.Module, file: Path) -> None:
    """What nnU-Net's fine-tuning does with nnssl's layout: by prefix into the submodules, strictly."""
    checkpoint = torch.load(file, weights_only=True)
    plan, weights = checkpoint["nnssl_adaptation_plan"], checkpoint["network_weights"]
    for own, key in ((target.key_to_encoder, plan["key_to_encoder"]), (target.key_to_stem, plan["key_to_stem"])):
        part = {name.replace(key, "", 1).lstrip("."): value for name, value in weights.items() if name.startswith(key)}
        target.get_submodule(own).load_state_dict(part)


@pytest.mark.parametrize("plan", [tiny_plan(), plain_plan()], ids=["residual", "plain"])
def test_nnssls_layout_fills_the_encoder_by_nnunets_rule(data, tmp_path, plan):
    folder = write_tiny_encoder(plan)
    file = export(901, encoder="voco", format="nnssl", output=tmp_path / "nnssl.pth")
    target = network(plan)
    load_as_nnunet_master(target, file)
    pretrained, _ = load_encoder(folder)
    state = encoder_of(target).state_dict()
    assert all(torch.equal(state[name], value) for name, value in pretrained.items())


def test_nnssls_layout_describes_the_network_and_the_data(data, tmp_path):
    write_tiny_encoder()
    file = export(901, encoder="voco", format="nnssl", output=tmp_path / "nnssl.pth")
    checkpoint = torch.load(file, weights_only=True)
    plan = checkpoint["nnssl_adaptation_plan"]
    architecture = tiny_plan()["configurations"]["3d_fullres"]["architecture"]
    assert plan["architecture_plans"]["arch_class_name"] == "ResidualEncoderUNet"
    assert plan["architecture_plans"]["arch_kwargs"] == architecture["arch_kwargs"]
    configuration = plan["pretrain_plan"]["configurations"]["3d_fullres"]
    assert configuration["spacing"] == [2.5, 1.1, 1.0] and configuration["patch_size"] == [8, 24, 20]
    assert configuration["normalization_schemes"] == ["ZScoreNormalization"]
    assert plan["pretrain_num_input_channels"] == 1 and plan["recommended_downstream_patchsize"] == [8, 24, 20]
    stem = plan["keys_to_in_proj"]
    assert all(f"{key}.weight" in checkpoint["network_weights"] for key in stem) and len(stem) == 2
    assert checkpoint["citations"][0]["apa_citations"] == ["Wu et al. 2024"]
    assert b"case_0" not in file.read_bytes() and str(data).encode() not in file.read_bytes()


def primus_card(**changes):
    arguments = {"embed_dim": 396, "eva_depth": 12, "eva_numheads": 6, "patch_embed_size": [8, 8, 8],
                 "input_shape": [16, 16, 16], "init_values": 0.1, "scale_attn_inner": True, **changes}  # fmt: skip
    architecture = {
        "network_class_name": "pretrain.networks.Primus", "arch_kwargs": arguments, "_kw_requires_import": [],
    }  # fmt: skip
    return tiny_card(tiny_plan(), architecture=architecture, patch_size=[16, 16, 16])


def test_a_primus_of_a_known_size_is_named_and_any_other_refused(tmp_path):
    card = primus_card()
    own = build_network(card.architecture, 1, 2, deep_supervision=False)
    save_checkpoint(tmp_path / "primus.pth", nnssl_checkpoint(own.encoder.state_dict(), card, None))
    plan = torch.load(tmp_path / "primus.pth", weights_only=True)["nnssl_adaptation_plan"]
    assert plan["architecture_plans"] == {
        "arch_class_name": "PrimusS", "arch_kwargs": None, "arch_kwargs_requiring_import": None,
    }  # fmt: skip
    assert plan["key_to_lpe"] == "eva.pos_embed"
    preset = PrimusS(1, 3, (8, 8, 8), (16, 16, 16))
    load_as_nnunet_master(preset, tmp_path / "primus.pth")
    state = preset.state_dict()
    assert all(torch.equal(state[name], value) for name, value in own.encoder.state_dict().items())
    for change in ({"eva_numheads": 12}, {"init_values": None}, {"num_register_tokens": 4}):
        with pytest.raises(SettingsError, match=r"(?s)nnssl cannot hold.*Primus"):
            nnssl_checkpoint({}, primus_card(**change), None)


def test_what_a_format_cannot_hold_is_refused_with_the_reason(data, tmp_path):
    write_tiny_encoder(tiny_plan(dims=2), run="flat")
    with pytest.raises(SettingsError, match=r"(?s)nnssl cannot hold.*2D.*3D ResidualEncoderUNet"):
        export(901, encoder="voco-flat", format="nnssl", output=tmp_path / "a.pth")
    assert not (tmp_path / "a.pth").exists()
    with pytest.raises(SettingsError, match="autoseg, nnunet, nnssl"):
        export(901, encoder="voco-flat", format="onnx", output=tmp_path / "a.pth")
    assert export(901, encoder="voco-flat", format="nnunet", output=tmp_path / "b.pth").is_file()


def test_a_model_is_not_exported_for_nnssl(data, tmp_path):
    write_tiny_dataset(data, cases=1)
    model = paths.results(DATASET) / "AutosegTrainer__tinyPlans__3d_fullres"
    (model / "fold_0").mkdir(parents=True)
    for name in ("plans.json", "dataset.json", "fold_0/checkpoint_final.pth"):
        (model / name).write_text("{}")
    with pytest.raises(SettingsError, match="nnssl holds encoders"):
        export(901, format="nnssl", output=tmp_path / "a.pth")


@pytest.mark.official
def test_nnunets_own_fine_tuning_loads_it(data, tmp_path):
    """Needs a checkout of nnU-Net's master, named by AUTOSEG_NNUNET_MASTER."""
    master = os.environ.get("AUTOSEG_NNUNET_MASTER")
    if not master:
        pytest.skip("AUTOSEG_NNUNET_MASTER names no checkout")
    folder = write_tiny_encoder()
    file = export(901, encoder="voco", format="nnssl", output=tmp_path / "nnssl.pth")
    program = """
import sys, torch
from nnunetv2.training.nnUNetTrainer.pretraining.pretrainedTrainer import PretrainedTrainer
from safetensors.torch import load_file
file, encoder, channels = sys.argv[1], sys.argv[2], int(sys.argv[3])
checkpoint = torch.load(file, weights_only=True)
plan = checkpoint["nnssl_adaptation_plan"]
architecture, pretrain = plan["architecture_plans"], list(plan["pretrain_plan"]["configurations"].values())[0]
network = PretrainedTrainer.build_network_architecture(
    architecture["arch_class_name"], architecture["arch_kwargs"], architecture["arch_kwargs_requiring_import"],
    plan["recommended_downstream_patchsize"], channels, 3, False)
PretrainedTrainer.load_pretrained_weights(
    network, file, plan["pretrain_num_input_channels"], channels, pretrain["patch_size"], pretrain["patch_size"],
    plan["key_to_encoder"], plan["key_to_stem"], tuple(plan["keys_to_in_proj"]), plan["key_to_lpe"])
state, count = network.encoder.state_dict(), 0
for name, tensor in load_file(encoder).items():
    if state[name].shape == tensor.shape:
        assert torch.equal(state[name], tensor), name
        count += 1
    else:
        assert torch.allclose(state[name].sum(1), tensor.sum(1), atol=1e-6), name
print("loaded", count)
"""
    for channels, expected in ((1, len(load_encoder(folder)[0])), (2, len(load_encoder(folder)[0]) - 1)):
        done = subprocess.run(
            [sys.executable, "-c", program, str(file), str(folder / "encoder.safetensors"), str(channels)],
            env={**os.environ, "PYTHONPATH": master}, capture_output=True, text=True, cwd=tmp_path, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"loaded {expected}" in done.stdout
