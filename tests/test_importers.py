"""Each published layout is recognised by its content, loads whole and computes the same features; anything else is refused."""

import copy
import dataclasses
import json
import os
import pickle
import re
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from dynamic_network_architectures.architectures import primus as official_primus
from safetensors.torch import save_file

from planners.errors import AutosegError, DatasetError, PretrainedMismatch, UnsafeFile
from planners.run_names import check_run_name
from pretrain.checkpoint import save_encoder
from pretrain.encoders import encoder_of
from pretrain.importers import nnssl, primus
from pretrain.importers.reading import RECOGNISERS, read_weights
from pretrain.importers.weights import Weights
from pretrain.networks.registry import build_network
from pretrain.transfer import transfer
from tests import layouts
from tests.test_checkpoint import card
from tests.tiny import tiny_plan

IMAGE = (64, 32, 32)


@pytest.fixture(scope="module")
def voco_state() -> layouts.State:
    return layouts.voco_encoder(layouts.swin())


def saved(tmp_path: Path, content: object, name: str = "weights.pt") -> Path:
    torch.save(content, tmp_path / name)
    return tmp_path / name


def loaded(weights: Weights, *, channels: int | None = None, share: float = 1.0, seed: int = 5):
    """A network of the weights' architecture with the weights in it, and the report."""
    torch.manual_seed(seed)
    network = build_network(weights.architecture, channels or weights.channels, 3, deep_supervision=False).eval()
    target = encoder_of(network) if weights.scope == "encoder" else network
    report = transfer(
        weights.tensors, target, minimum_share=share, position_grids=weights.position_grids, part=weights.part
    )
    return network, report


def image(size: tuple[int, ...] = IMAGE, channels: int = 1) -> torch.Tensor:
    return torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def swin_features(network) -> list[torch.Tensor]:
    """The five maps of the transformer, and the blocks of the encoder before and after it."""
    x = image()
    hidden = network.swinViT(x, network.normalize)
    return [*hidden, network.encoder1(x), network.encoder10(hidden[4])]


def swin_architecture(feature_size: int) -> dict:
    arguments = {"feature_size": feature_size, "use_v2": True}
    return {"network_class_name": "pretrain.networks.SwinUNETR", "arch_kwargs": arguments, "_kw_requires_import": []}


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


WRAPPERS = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "module.backbone": lambda state: layouts.prefixed("module.backbone.", state),
    "student": lambda state: layouts.prefixed("student.", state),
    "net, compiled": lambda state: {"net": layouts.prefixed("_orig_mod.module.", state)},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("use_v2", [True, False])
def test_voco_encoders_load_whole_in_every_wrapper(wrapper, use_v2, tmp_path):
    source = layouts.swin(use_v2=use_v2)
    weights = read_weights(saved(tmp_path, WRAPPERS[wrapper](layouts.voco_encoder(source))))
    assert (weights.method, weights.scope, weights.channels, weights.spatial_dims) == ("voco", "encoder", 1, 3)
    assert weights.architecture["arch_kwargs"]["use_v2"] is use_v2
    network, report = loaded(weights)
    assert (report.encoder_share, report.adapted, report.new, report.unused) == (1.0, (), (), ())
    assert same(swin_features(network), swin_features(source))


def test_voco_names_what_its_authors_trained_with(tmp_path):
    weights = read_weights(saved(tmp_path, layouts.voco_encoder(layouts.swin()), "VoCo_B_SSL_head.pt"))
    assert (weights.name, weights.kind) == ("VoCo-B-SSL-head", "VoCo SwinUNETR encoder, feature size 12")
    assert (weights.patch_size, weights.spacing, weights.modality) == ((96, 96, 96), (1.5, 1.5, 1.5), "CT")
    assert [(scheme.name, scheme.window) for scheme in weights.intensity] == [("ct-abdomen", (-175.0, 250.0))]
    assert "public test images" in weights.warnings[0]


def test_the_published_size_has_the_published_counts(tmp_path):
    """Of VoCo_10k and VoCo_B: 145 tensors, 53 M numbers; of VoComni_B: 167 tensors (voco.md 4, 4.1)."""
    with torch.device("meta"):
        network = build_network(swin_architecture(48), 1, 21, deep_supervision=False)
    state = layouts.voco_encoder(network)
    assert (len(state), len(network.state_dict())) == (145, 167)
    assert state["swinViT.layers1.0.blocks.0.attn.relative_position_bias_table"].shape == (2197, 3)
    assert state["swinViT.layers1.0.blocks.0.attn.relative_position_index"].shape == (343, 343)
    assert state["encoder1.layer.conv1.conv.weight"].shape == (48, 1, 3, 3, 3)
    index = "relative_position_index"
    full = {n: torch.zeros(t.shape, dtype=torch.int64 if index in n else torch.float32) for n, t in state.items()}
    weights = read_weights(saved(tmp_path, full))
    assert len(weights.tensors) == 145
    assert weights.architecture["arch_kwargs"]["feature_size"] == 48
    assert round(sum(t.numel() for t in weights.tensors.values() if t.is_floating_point()) / 1e6) == 53


def test_a_dump_of_the_second_version_gives_its_shared_encoder(tmp_path):
    source = layouts.swin()
    weights = read_weights(saved(tmp_path, layouts.voco_v2_dump(source)))
    network, report = loaded(weights)
    assert report.encoder_share == 1.0
    assert same(swin_features(network), swin_features(source))
    assert sorted(name.split(".")[0] for name, _ in weights.dropped) == ["student"] * 6 + ["teacher"] * 6


@pytest.mark.parametrize("branch", ["teacher", "student"])
def test_of_two_networks_the_one_asked_for_is_taken_and_said(branch, tmp_path):
    sources = {"student": layouts.swin(seed=1), "teacher": layouts.swin(seed=2)}
    path = saved(tmp_path, layouts.voco_v1_dump(sources["student"], sources["teacher"]))
    weights = read_weights(path, branch=branch)
    assert same(swin_features(loaded(weights)[0]), swin_features(sources[branch]))
    assert any(f"the {branch} is taken" in warning for warning in weights.warnings)
    assert branch != "teacher" or read_weights(path).warnings == weights.warnings


def test_vocomni_brings_its_decoder_but_not_its_classes(tmp_path):
    source = layouts.swin()
    weights = read_weights(saved(tmp_path, source.state_dict(), "VoComni_B.pt"))
    assert (weights.method, weights.scope) == ("vocomni", "encoder+decoder")
    assert {name for name, _ in weights.dropped} == {"out.conv.conv.weight", "out.conv.conv.bias"}
    network, report = loaded(weights)
    assert {name for name, _ in report.new} == {"out.conv.conv.weight", "out.conv.conv.bias"}
    assert same(swin_features(network), swin_features(source))
    assert all(torch.equal(t, source.state_dict()[n]) for n, t in network.state_dict().items() if "out." not in n)


def test_other_input_channels_reach_every_kernel_that_sees_the_image(tmp_path):
    weights = read_weights(saved(tmp_path, layouts.voco_encoder(layouts.swin())))
    network, report = loaded(weights, channels=2)
    assert [name for name, _ in report.adapted] == [
        "swinViT.patch_embed.proj.weight",
        "encoder1.layer.conv1.conv.weight",
        "encoder1.layer.conv3.conv.weight",
    ]
    assert report.encoder_share == 1.0
    x = image()
    with torch.no_grad():
        one, two = loaded(weights)[0].encoder(x), network.encoder(x.expand(-1, 2, -1, -1, -1))
    # the last map has two voxels, whose instance norm enlarges rounding errors
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(one[:4], two[:4], strict=True))
    assert torch.allclose(one[4], two[4], atol=1e-2)


def test_monais_self_supervised_transformer_fills_the_transformer_only(tmp_path):
    source = layouts.swin(use_v2=False)
    weights = read_weights(saved(tmp_path, layouts.monai_ssl(source), "model_swinvit.pt"))
    assert (weights.method, weights.part) == ("swin-ssl", ("swinViT",))
    assert {name for name, _ in weights.dropped} == {"rotation_head.weight", "contrastive_head.weight"}
    network, report = loaded(weights)
    assert 0 < report.encoder_share < 0.5
    assert all(name.startswith("encoder") for name, _ in report.new)
    assert same(swin_features(network)[:5], swin_features(source)[:5])
    with pytest.raises(PretrainedMismatch, match="of the encoder"):
        transfer(weights.tensors, network.encoder, minimum_share=0.95)


def test_a_network_with_organ_embeddings_loses_only_these(tmp_path):
    source = layouts.swin(use_v2=False, outputs=32)
    weights = read_weights(saved(tmp_path, layouts.suprem(source)))
    assert weights.method == "supervised"
    assert "organ embeddings" in weights.kind
    network, report = loaded(weights)
    assert report.encoder_share == 1.0
    assert {"organ_embedding", "precls_conv.0.weight", "out.conv.conv.bias"} <= {name for name, _ in weights.dropped}
    assert same(swin_features(network), swin_features(source))


def test_an_index_table_of_another_kind_is_refused(tmp_path):
    state = dict(layouts.voco_encoder(layouts.swin()))
    name = "swinViT.layers1.0.blocks.0.attn.relative_position_index"
    state[name] = state[name].flip(0)
    weights = read_weights(saved(tmp_path, state))
    with pytest.raises(PretrainedMismatch, match=re.escape(name)):
        loaded(weights)


def test_vocomni_for_nnunet_gives_its_encoder_and_names_both_traps(tmp_path):
    source = layouts.vocomni_unet()
    weights = read_weights(saved(tmp_path, source.state_dict(), "VoComni_nnunet.pt"))
    assert "VoComni PlainConvUNet" in weights.kind
    assert ("strides [1, 2, 2]" in weights.warnings[1], "corrupt" in weights.warnings[2]) == (True, True)
    network, report = loaded(weights)
    assert (report.encoder_share, report.adapted, report.new, report.unused) == (1.0, (), (), ())
    x = image((32, 32, 64))
    with torch.no_grad():
        assert same(network.encoder(x), source.encoder(x))
    with pytest.raises(PretrainedMismatch, match="0 % of the encoder"):
        transfer(weights.tensors, layouts.resenc().encoder, minimum_share=0.95)


def resenc_plan(**changes):
    plan = layouts.adaptation_plan("ResidualEncoderUNet", layouts.SMALL_RESENC, keys=("encoder.stages", "encoder.stem"))
    return {**plan, **changes}


@pytest.mark.parametrize("method", ["mae", "voco", "no plan"])
def test_nnssl_resenc_checkpoints_load_whole(method, tmp_path):
    source = layouts.resenc()
    state = source.state_dict()
    if method == "voco":  # the encoder alone, with a projector
        state = layouts.prefixed("encoder.", source.encoder.state_dict())
        state |= layouts.prefixed("projector.", layouts.projector(28, 16))
    content = layouts.nnssl(
        state, None if method == "no plan" else resenc_plan(), "VoCoTrainer" if method == "voco" else "BaseMAETrainer"
    )
    weights = read_weights(saved(tmp_path, content))
    assert weights.method == ("voco" if method == "voco" else "mae")
    assert weights.architecture["arch_kwargs"]["n_blocks_per_stage"] == [1, 2, 2, 1]
    network, report = loaded(weights)
    assert (report.encoder_share, report.adapted, report.new, report.unused) == (1.0, (), (), ())
    x = image((16, 24, 16))
    with torch.no_grad():
        assert same(network.encoder(x), source.encoder(x))
    assert layouts.SECRET not in repr(weights)
    if method != "no plan":
        assert (weights.spacing, weights.patch_size, weights.modality) == ((1, 1, 1), (160, 160, 160), "MR")
        assert (weights.trained_on, weights.intensity[0].name) == ("Dataset745_OpenMind", "zscore")
        assert "Isensee" in weights.citation


@pytest.mark.parametrize("network", ["ResEncL", "NoSkipResEncL"])
def test_nnssl_presets_are_built_from_our_table(network, tmp_path, monkeypatch):
    features = [4, 4, 6, 6, 8, 8]
    monkeypatch.setitem(nnssl._RESENC_L, "features_per_stage", features)
    source = layouts.resenc(nnssl._RESENC_L)
    plan = layouts.adaptation_plan(network, None, keys=("encoder.stages", "encoder.stem"))
    weights = read_weights(saved(tmp_path, layouts.nnssl(source.state_dict(), plan, "BaseMAETrainer")))
    assert loaded(weights)[1].encoder_share == 1.0
    assert any("without skip connections" in warning for warning in weights.warnings) == (network == "NoSkipResEncL")


def test_an_nnssl_folder_has_its_plan_beside_the_weights(tmp_path):
    source = layouts.resenc()
    saved(tmp_path, layouts.nnssl(source.state_dict(), None, "BaseMAETrainer"), "checkpoint_final.pth")
    (tmp_path / "adaptation_plan.json").write_text(json.dumps(resenc_plan(trainer_name="BaseMAETrainer")))
    for path in (tmp_path, tmp_path / "checkpoint_final.pth"):
        weights = read_weights(path)
        assert weights.kind == "nnssl ResidualEncoderUNet encoder (BaseMAETrainer)"
        assert weights.name == re.sub(r"[^A-Za-z0-9.-]+", "-", tmp_path.name).strip(".-")


def test_a_plan_that_names_code_or_contradicts_its_tensors_is_refused(tmp_path):
    state = layouts.resenc().state_dict()
    plan = resenc_plan()
    plan["architecture_plans"]["arch_class_name"] = "os.system"
    with pytest.raises(UnsafeFile, match=r"os\.system"):
        read_weights(saved(tmp_path, layouts.nnssl(state, plan, "BaseMAETrainer")))
    plan = resenc_plan()
    plan["architecture_plans"]["arch_kwargs"]["features_per_stage"] = [4, 6, 8, 12]
    with pytest.raises(PretrainedMismatch, match="do not belong to the network"):
        read_weights(saved(tmp_path, layouts.nnssl(state, plan, "BaseMAETrainer")))
    plan["architecture_plans"]["arch_kwargs"]["n_blocks_per_stage"] = [1, 10**9, 1, 1]
    with pytest.raises(PretrainedMismatch, match=r"absurd size(?s:.*)1000000000"):
        read_weights(saved(tmp_path, layouts.nnssl(state, plan, "BaseMAETrainer")))
    with pytest.raises(PretrainedMismatch, match="key_to_stem"):
        read_weights(saved(tmp_path, layouts.nnssl(state, {"key_to_encoder": "encoder.stages"}, "x")))


PRIMUS = {"embed_dim": 48, "eva_depth": 2, "eva_numheads": 2}


def primus_content(trainer: str, patch: int = 32, prefix: str = ""):
    torch.manual_seed(0)
    network = build_network(
        {
            "network_class_name": primus.NETWORK,
            "arch_kwargs": {**PRIMUS, "patch_embed_size": [8] * 3, "input_shape": [patch] * 3, "init_values": 0.1,
                            "scale_attn_inner": True},
            "_kw_requires_import": [],
        }, 1, 1, deep_supervision=False,
    ).eval()  # fmt: skip
    plan = layouts.adaptation_plan("PrimusS", None, keys=(f"{prefix}eva", f"{prefix}down_projection"), patch=patch)
    return layouts.nnssl(layouts.prefixed(prefix, network.state_dict()), plan, trainer), network


@pytest.mark.parametrize("prefix", ["", "encoder."])
def test_primus_of_nnssl_loads_whole(prefix, tmp_path, monkeypatch):
    monkeypatch.setitem(primus.SIZES, "PrimusS", PRIMUS)
    content, source = primus_content("SimMIMEvaTrainer", prefix=prefix)
    weights = read_weights(saved(tmp_path, content))
    assert weights.position_grids == {"eva.pos_embed": (4, 4, 4)}
    network, report = loaded(weights)
    assert (report.encoder_share, report.adapted, report.unused) == (1.0, (), ())
    x = image((32, 32, 32))
    with torch.no_grad():
        assert same(network.encoder(x), source.encoder(x))


def test_tokens_that_nnssl_counts_along_y_first_are_turned_so_that_the_features_stay(tmp_path, monkeypatch):
    monkeypatch.setitem(primus.SIZES, "PrimusS", PRIMUS)
    content, source = primus_content("BaseEvaMAETrainer")
    network, report = loaded(read_weights(saved(tmp_path, content)))
    assert report.encoder_share == 1.0
    x = image((32, 32, 32))
    with torch.no_grad():
        # as nnssl's EvaMAE computes it: "b c w h d -> b (h w d) c"
        tokens, _ = source.eva(source.down_projection(x).permute(0, 3, 2, 4, 1).flatten(1, 3))
        theirs = tokens.unflatten(1, (4, 4, 4)).permute(0, 4, 2, 1, 3)
        assert torch.allclose(network.encoder(x)[0], theirs, atol=1e-5)
        assert not torch.allclose(source.encoder(x)[0], theirs, atol=1e-2)


@pytest.mark.parametrize("size", primus.SIZES)
def test_the_sizes_of_primus_are_those_of_its_authors(size):
    with torch.device("meta"):
        official = getattr(official_primus, size)(1, 1, (8, 8, 8), (32, 32, 32), init_values=0.1, scale_attn_inner=True)
        arguments = {**primus.SIZES[size], "patch_embed_size": [8] * 3, "input_shape": [32] * 3}
        arguments |= {"init_values": 0.1, "scale_attn_inner": True}
    network = build_network(
        {"network_class_name": primus.NETWORK, "arch_kwargs": arguments, "_kw_requires_import": []},
        1, 1, deep_supervision=False,
    )  # fmt: skip
    shapes = {name: tensor.shape for name, tensor in official.state_dict().items()}
    assert {name: tensor.shape for name, tensor in network.state_dict().items()} == shapes


def test_positions_of_another_patch_are_interpolated_and_a_ramp_stays_a_ramp(tmp_path, monkeypatch):
    monkeypatch.setitem(primus.SIZES, "PrimusS", PRIMUS)
    content, _ = primus_content("SimMIMEvaTrainer")
    ramp = torch.stack(torch.meshgrid(*[torch.linspace(0, 1, 4)] * 3, indexing="ij"), -1).reshape(1, 64, 3)
    content["network_weights"]["eva.pos_embed"] = ramp.repeat(1, 1, 16)
    weights = read_weights(saved(tmp_path, content))
    architecture = copy.deepcopy(weights.architecture)
    architecture["arch_kwargs"]["input_shape"] = [24, 40, 48]
    network, report = loaded(dataclasses.replace(weights, architecture=architecture))
    assert dict(report.adapted) == {"eva.pos_embed": "positions (4, 4, 4) to (3, 5, 6) by linear interpolation"}
    axes = [torch.linspace(0, 1, n) for n in (3, 5, 6)]
    expected = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(1, 90, 3).repeat(1, 1, 16)
    assert torch.allclose(network.state_dict()["eva.pos_embed"], expected, atol=1e-6)


def test_a_nnunet_checkpoint_brings_encoder_and_decoder(tmp_path):
    content, source = layouts.nnunet()
    weights = read_weights(saved(tmp_path, content, "checkpoint_final.pth"))
    assert weights.kind == "nnU-Net ResidualEncoderUNet, 3d_fullres of Dataset901_Tiny, fold_0 (nnUNetTrainer)"
    assert (weights.scope, weights.patch_size, weights.spacing) == ("encoder+decoder", (8, 24, 20), (2.5, 1.1, 1.0))
    assert [scheme.name for scheme in weights.intensity] == ["zscore"]
    network, report = loaded(weights)
    assert report.encoder_share == 1.0
    assert all("seg_layers" in name for name, _ in report.new)
    theirs = source.state_dict()
    assert all(torch.equal(t, theirs[n]) for n, t in network.state_dict().items() if "seg_layers" not in n)


def test_a_model_folder_gives_fold_0_unless_there_is_none(tmp_path):
    content, _ = layouts.nnunet()
    model = tmp_path / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    for fold in ("fold_3", "fold_all", "fold_0"):
        (model / fold).mkdir(parents=True)
        saved(model / fold, {**content, "trainer_name": f"of_{fold}"}, "checkpoint_final.pth")
        expected = {"fold_3": "fold_3", "fold_all": "fold_all", "fold_0": "fold_0"}[fold]
        weights = read_weights(model)
        assert f"{expected} (of_{expected})" in weights.kind
        assert weights.name == "nnUNetTrainer-nnUNetPlans-3d-fullres" == check_run_name(weights.name)


def test_plans_without_an_architecture_entry_are_converted(tmp_path):
    content, _ = layouts.nnunet()
    plan = content["init_args"]["plans"] = layouts.old_style(content["init_args"]["plans"])
    before = copy.deepcopy(plan)
    architecture = tiny_plan()["configurations"]["3d_fullres"]["architecture"]
    architecture["network_class_name"] = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
    architecture["arch_kwargs"]["n_conv_per_stage"] = architecture["arch_kwargs"].pop("n_blocks_per_stage")
    network = build_network(architecture, 1, 3, deep_supervision=True)
    content["network_weights"] = network.state_dict()
    weights = read_weights(saved(tmp_path, content))
    assert weights.architecture["network_class_name"].endswith("PlainConvUNet")
    assert loaded(weights)[1].encoder_share == 1.0
    assert plan == before


def test_the_network_of_another_trainer_is_refused_by_name(tmp_path):
    content, _ = layouts.nnunet()
    foreign = copy.deepcopy(content)
    foreign["init_args"]["plans"]["configurations"]["3d_fullres"]["architecture"]["network_class_name"] = (
        "umamba.UMamba"
    )
    with pytest.raises(UnsafeFile, match=r"umamba\.UMamba"):
        read_weights(saved(tmp_path, foreign))
    changed = {**content, "trainer_name": "nnUNetTrainerUMamba"}
    changed["network_weights"] = {n.replace("stages", "levels"): t for n, t in content["network_weights"].items()}
    with pytest.raises(PretrainedMismatch, match="nnUNetTrainerUMamba"):
        read_weights(saved(tmp_path, changed))


def test_own_encoders_are_recognised_by_folder_and_by_file(tmp_path):
    network, _ = layouts.nnunet()[1], None
    folder = tmp_path / "voco-long"
    save_encoder(folder, network.encoder, card())
    for path in (folder, folder / "encoder.safetensors"):
        weights = read_weights(path)
        assert (weights.name, weights.card, weights.method) == ("voco-long", card(), "voco")
        assert loaded(weights)[1].encoder_share == 1.0


@pytest.mark.parametrize("name", ["x.pt", "x.pth", "x.bin", "x.ckpt", "x.model", "x.safetensors", "no suffix"])
@pytest.mark.parametrize("written", ["torch", "old torch", "safetensors"])
def test_the_name_of_a_file_does_not_matter(name, written, voco_state, tmp_path):
    path = tmp_path / name
    if written == "safetensors":
        save_file({n: t.contiguous() for n, t in voco_state.items()}, path)
    else:
        torch.save(voco_state, path, _use_new_zipfile_serialization=written == "torch")
    assert read_weights(path).method == "voco"


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_single(kind, tmp_path):
    state = {n: t.to(kind) if t.is_floating_point() else t for n, t in layouts.voco_encoder(layouts.swin()).items()}
    weights = read_weights(saved(tmp_path, state))
    assert {t.dtype for t in weights.tensors.values()} == {torch.float32, torch.int64}
    name = "encoder10.layer.conv1.conv.weight"
    assert torch.equal(weights.tensors[name], state[name].float())


class Attack:
    """What a pickle can do to whoever loads it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("written", ["torch", "old torch", "pickle"])
@pytest.mark.parametrize("name", ["VoCo_10k.pt", "x.safetensors"])
def test_a_file_that_asks_for_code_is_refused_and_nothing_runs(written, name, tmp_path):
    marker, path = tmp_path / "ran", tmp_path / name
    content = {"state_dict": layouts.projector(4, 4), "args": Attack(marker)}
    if written == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=written == "torch")
    with pytest.raises(AutosegError) as caught:
        read_weights(path)
    assert not marker.exists()
    assert caught.value.exit_code == 2
    if written != "pickle":
        assert isinstance(caught.value, UnsafeFile)
        assert "system" in str(caught.value)
        assert "weights_only=False" in str(caught.value)  # how to convert it, for those who trust it
    pickle.loads(pickle.dumps(content))
    assert marker.exists()  # the attack works where it is let


def test_a_torchscript_archive_is_refused_with_the_way_out(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pt")
    with pytest.raises(UnsafeFile, match=r"torch\.jit\.load"):
        read_weights(tmp_path / "script.pt")


def zipped(path: Path, **members: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


BROKEN = {
    "empty": (b"", "an empty file"),
    "keras": (b"\x89HDF\r\n\x1a\n" + bytes(64), "HDF5"),
    "web page": (b"<!DOCTYPE html><html><title>Sign in</title></html>", "web page.*log in"),
    "text": (b"404: Not Found\nreally", "text: 404"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "git lfs pull"),
    "gzip": (b"\x1f\x8b\x08" + bytes(40), "gzip"),
    "noise": (bytes(range(1, 256)), "unknown content, beginning with 01 02"),
    "huge header": ((1 << 60).to_bytes(8, "little") + b'{"a":{}}', "safetensors"),
    "claims too much": (
        (header := b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}')
        and len(header).to_bytes(8, "little") + header,
        "safetensors",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_file_of_weights_is_named(kind, tmp_path):
    content, message = BROKEN[kind]
    (tmp_path / "VoCo_10k.pt").write_bytes(content)
    with pytest.raises(DatasetError, match=f"(?s)VoCo_10k.*({message})|({message}).*VoCo_10k"):
        read_weights(tmp_path / "VoCo_10k.pt")


def test_zip_files_that_are_not_torchs_are_told_apart(tmp_path):
    path = tmp_path / "model.zip"
    zipped(path, **{"Dataset291/fold_0/checkpoint_final.pth": b"x"})
    with pytest.raises(DatasetError, match=r"(?s)checkpoint_final\.pth.*unpack it"):
        read_weights(path)
    zipped(path, **{"config.json": b"{}", "model.weights.h5": b"x"})
    with pytest.raises(DatasetError, match=r"a zip file with config\.json"):
        read_weights(path)
    zipped(path, **{"a/data.pkl": b"x", "a/data/0": bytes(1_000_000)})
    with pytest.raises(DatasetError, match="claims to hold 1000001"):
        read_weights(path)


@pytest.mark.parametrize("written", ["torch", "old torch", "safetensors"])
def test_a_truncated_file_is_named(written, voco_state, tmp_path):
    path = tmp_path / "weights.pt"
    if written == "safetensors":
        save_file({n: t.contiguous() for n, t in voco_state.items()}, path)
    else:
        torch.save(voco_state, path, _use_new_zipfile_serialization=written == "torch")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DatasetError, match=r"(?s)weights\.pt.*download it again"):
        read_weights(path)


def test_a_tensor_larger_than_its_file_is_refused(tmp_path):
    state = {"a": torch.zeros(1).expand(10**9)}
    with pytest.raises(DatasetError, match=r"claims a size.*(?s:.*)\(1000000000,\)"):
        read_weights(saved(tmp_path, state))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value, tmp_path):
    state = {n: t.clone() for n, t in layouts.voco_encoder(layouts.swin()).items()}
    state["encoder1.layer.conv1.conv.weight"][0, 0, 0] = value
    with pytest.raises(PretrainedMismatch, match=r"not finite(?s:.*)encoder1\.layer\.conv1"):
        read_weights(saved(tmp_path, state))


def test_a_file_without_tensors_and_one_of_unknown_layout_say_what_they_hold(tmp_path):
    with pytest.raises(DatasetError, match=r"no weights(?s:.*)epoch"):
        read_weights(saved(tmp_path, {"epoch": 3, "loss": [1.0]}))
    with pytest.raises(DatasetError, match="no weights"):
        read_weights(saved(tmp_path, [1, 2]))
    with pytest.raises(PretrainedMismatch, match=r"conv1\.weight(?s:.*)VoCo") as caught:
        read_weights(saved(tmp_path, {"conv1.weight": torch.zeros(2), "fc.bias": torch.zeros(2)}))
    assert all(name in str(caught.value) for name, _ in RECOGNISERS)


def test_folders_with_nothing_known_with_several_files_and_missing_paths_are_named(tmp_path):
    with pytest.raises(DatasetError, match="No such file"):
        read_weights(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match=r"no weights that are known(?s:.*)nothing"):
        read_weights(tmp_path)
    saved(tmp_path, layouts.voco_encoder(layouts.swin()), "a.pt")
    assert read_weights(tmp_path).method == "voco"
    saved(tmp_path, {}, "b.pt")
    with pytest.raises(DatasetError, match=r"a\.pt, b\.pt"):
        read_weights(tmp_path)


def test_the_options_of_a_training_script_beside_the_weights_are_no_danger(tmp_path):
    content = {"state_dict": layouts.voco_encoder(layouts.swin()), "args": Namespace(lr=1e-4, logdir="runs/1")}
    assert read_weights(saved(tmp_path, content)).method == "voco"
