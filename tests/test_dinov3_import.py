"""DINOv3 as Meta, MedDINOv3 and timm write it: recognised, read whole, and the same values (meddinov3.md 3, 4, 5 and 6.1)."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from typer.testing import CliRunner

from autoseg.cli import app
from planners import paths
from planners.configurations import with_configuration
from planners.dataset import load_dataset
from planners.errors import DatasetError, PretrainedMismatch, UnsafeFile
from planners.fingerprint import fingerprint
from planners.planner import Overrides, plan_dataset
from planners.plans import load_plan
from planners.vit import SIZES
from pretrain.encoders import build_segmentation_network, encoder_info, encoder_of
from pretrain.fit import IMPORTED_SHARE, differences, fit, transfer_weights, try_transfer
from pretrain.importers import dinov3
from pretrain.importers.contents import read_contents
from pretrain.importers.reading import RECOGNISERS, read_weights
from pretrain.importers.weights import Weights
from pretrain.loop import _initialise
from pretrain.method import Target
from pretrain.networks.dino_vit import DinoViT
from pretrain.networks.registry import build_network
from tests import layouts
from tests.test_pumit_import import OTHERS, Configuration
from tests.tiny import write_tiny_dataset
from trainers.train import train

PLAN = "autosegPlans_cpu"
RGB = ["RGBTo01Normalization"] * 3


def saved(tmp_path: Path, content: object, name: str = "weights.pth") -> Path:
    torch.save(content, tmp_path / name)
    return tmp_path / name


def loaded(weights: Weights, channels: int = 3, normalizations: list[str] = RGB):
    """The encoder of a network of the weights' architecture with the weights in it, and the report."""
    torch.manual_seed(5)
    network = build_network(weights.architecture, channels, 2, deep_supervision=False).eval()
    report = transfer_weights(weights, network, IMPORTED_SHARE, normalizations)
    return encoder_of(network), report


def arguments(weights: Weights) -> dict:
    return weights.architecture["arch_kwargs"]


def image(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def in_timms_names(state: layouts.State) -> layouts.State:
    """As timm writes it: no positions, no mask token, no zero biases."""
    kept = {n: t for n, t in state.items() if n not in ("rope_embed.periods", "mask_token") and "qkv.bias" not in n}
    names = (("storage_tokens", "reg_token"), ("ls1.gamma", "gamma_1"), ("ls2.gamma", "gamma_2"))
    for old, new in names:
        kept = {name.replace(old, new): tensor for name, tensor in kept.items()}
    return kept


LAYOUTS = {
    "Meta": (lambda: layouts.dinov3(), 1e-5, ("mask_token", "rope_embed.periods")),
    "MedDINOv3": (lambda: layouts.meddinov3(), 1e-6, ("dino_head.last_layer.weight", "ibot_head.mlp.2.bias")),
    "a run's teacher": (lambda: layouts.meddinov3(layouts.dinov3()), 1e-6, ("dino_head.mlp.4.weight",)),
    "a run's teacher, from pieces": (
        lambda: {"iteration": 7, "model": layouts.dinov3_run()}, 1e-6, ("ibot_head.last_layer.weight",),
    ),
    "a whole run": (
        lambda: layouts.dinov3_dump(layouts.dinov3_run(), layouts.dinov3_run()),
        1e-6,
        ("student.norm.weight", "gram_teacher.backbone.norm.weight", "dino_loss.center"),
    ),
    "wrapped": (lambda: {"model": layouts.prefixed("module.", layouts.dinov3())}, 1e-5, ("mask_token",)),
    "timm": (lambda: in_timms_names(layouts.dinov3()), 1e-5, ()),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads_whole_with_its_values_and_its_eps(layout: str, tmp_path: Path) -> None:
    content, eps, dropped = LAYOUTS[layout]
    weights = read_weights(saved(tmp_path, content()))
    assert arguments(weights) == {
        "embed_dim": 128, "depth": 4, "num_heads": 2, "taken": None, "eps": eps, "qkv_bias": False, "drop_path": 0.2,
    }  # fmt: skip
    assert (weights.method, weights.scope, weights.channels, weights.spatial_dims) == ("dinov3", "encoder", 3, 2)
    assert set(dropped) <= set(dict(weights.dropped))
    encoder, report = loaded(weights)
    assert (report.encoder_share, report.adapted, report.new, report.unused) == (1.0, (), (), ())
    assert encoder.norm.eps == encoder.blocks[3].norm2.eps == eps
    expected = in_timms_names(layouts.dinov3(bias=layout in ("Meta", "a run's teacher", "wrapped", "timm")))
    found = encoder.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_every_tensor_of_metas_file_is_accounted_for(tmp_path: Path) -> None:
    content = layouts.dinov3()
    weights = read_weights(saved(tmp_path, content))
    assert len(weights.tensors) + len(weights.dropped) == len(content)
    reasons = dict(weights.dropped)
    assert reasons["mask_token"] == "part of the masked prediction"
    assert reasons["rope_embed.periods"] == "follows from the sizes"
    assert reasons["blocks.3.attn.qkv.bias"] == "zero in every block"
    assert "multiplied" in reasons["blocks.3.attn.qkv.bias_mask"]
    heads = dict(read_weights(saved(tmp_path, layouts.meddinov3())).dropped)
    assert sum(reason == "head of the pretraining" for reason in heads.values()) == 14


def test_the_layouts_are_those_of_the_published_base_network() -> None:
    """162 tensors of timm's ViT-B/16 (meddinov3.md 3); Meta's file has 26 more, MedDINOv3's network 2."""
    with torch.device("meta"):
        theirs = timm.create_model("vit_base_patch16_dinov3", num_classes=0).state_dict()
        metas, meds = (
            {name: torch.empty(shape) for name, shape in layouts.dinov3_shapes(768, 12, bias=bias).items()}
            for bias in (True, False)
        )
    assert (len(theirs), len(metas), len(meds)) == (162, 188, 164)
    for state in (metas, meds):
        assert {n: t.shape for n, t in in_timms_names(state).items()} == {n: t.shape for n, t in theirs.items()}


def test_a_file_of_timm_is_read(tmp_path: Path) -> None:
    """timm's own class, saved as on the Hub."""
    torch.manual_seed(0)
    sizes = {"embed_dim": 128, "depth": 3, "num_heads": 2}
    theirs = timm.create_model("vit_base_patch16_dinov3_qkvb", num_classes=0, **sizes).eval()
    with torch.no_grad():
        for block in theirs.blocks:
            block.attn.q_bias.normal_()
            block.gamma_1.fill_(1)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    weights = read_weights(tmp_path / "model.safetensors")
    assert (arguments(weights)["qkv_bias"], arguments(weights)["eps"], weights.dropped) == (True, 1e-5, ())
    encoder, report = loaded(weights)
    assert (report.encoder_share, report.adapted, report.new, report.unused) == (1.0, (), (), ())
    with torch.no_grad():
        x = image(1, 3, 32, 48)
        assert torch.equal(encoder(x)[3], theirs.forward_intermediates(x, indices=1, norm=True)[1][0])


def test_biases_that_are_not_zero_are_kept_without_those_of_keys(tmp_path: Path) -> None:
    content = layouts.dinov3(biased=True)
    weights = read_weights(saved(tmp_path, content))
    assert arguments(weights)["qkv_bias"] is True
    encoder, report = loaded(weights)
    assert (report.encoder_share, report.new, report.unused) == (1.0, (), ())
    for number, block in enumerate(encoder.blocks):
        query, key, value = content[f"blocks.{number}.attn.qkv.bias"].chunk(3)
        assert torch.equal(block.attn.q_bias, query)
        assert torch.equal(block.attn.v_bias, value)
        assert float(query.abs().min()) > 0 == float(key.abs().max())
    assert not [name for name, _ in weights.dropped if name.endswith("qkv.bias")]


def test_the_mask_decides_which_biases_count(tmp_path: Path) -> None:
    """Numbers under a mask of zeros never had an effect; those of keys without a mask have one, because keys are turned."""
    content = layouts.dinov3(biased=True)
    for name in content:
        if name.endswith("qkv.bias"):
            content[name] = content[name] + 1
    weights = read_weights(saved(tmp_path, content))
    assert torch.equal(weights.tensors["blocks.0.attn.v_bias"], content["blocks.0.attn.qkv.bias"][256:])
    for name in [name for name in content if name.endswith("bias_mask")]:
        del content[name]
    with pytest.raises(PretrainedMismatch, match=r"blocks\.0\.attn\.qkv\.bias with biases of keys"):
        read_weights(saved(tmp_path, content))


@pytest.mark.parametrize(("size", "qkv_bias"), [(9e-7, False), (2e-6, True)])
def test_biases_below_a_millionth_are_none(size: float, qkv_bias: bool, tmp_path: Path) -> None:
    content = layouts.dinov3()
    content["blocks.2.attn.qkv.bias"][300] = -size
    assert arguments(read_weights(saved(tmp_path, content)))["qkv_bias"] is qkv_bias


def changed(state: layouts.State, **tensors: Tensor | None) -> layouts.State:
    """With other tensors, given with `__` for a dot, or without those that are None."""
    new = state | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in new.items() if tensor is not None}


def gated(state: layouts.State) -> layouts.State:
    names = (("mlp.fc1", "mlp.w1"), ("mlp.fc2", "mlp.w3"))
    for old, new in names:
        state = {name.replace(old, new): tensor for name, tensor in state.items()}
    return state | {f"blocks.{n}.mlp.w2.weight": torch.zeros(512, 128) for n in range(4)}


REFUSED = {
    "no storage tokens": (lambda: layouts.dinov3(storage=0), r"0 storage tokens(?s:.*)expected +4 storage tokens"),
    "eight": (lambda: layouts.dinov3(storage=8), "8 storage tokens"),
    "small patches": (
        lambda: changed(layouts.dinov3(), patch_embed__proj__weight=torch.zeros(128, 3, 8, 14)),
        "patches of 8 × 14 pixels(?s:.*)16 × 16",
    ),
    "gated": (lambda: gated(layouts.dinov3()), "a gated MLP, as ViT-S"),
    "wider": (
        lambda: changed(layouts.dinov3(), blocks__0__mlp__fc1__weight=torch.zeros(768, 128)),
        r"an MLP of 768 features(?s:.*)\(512\)",
    ),
    "a block too few": (
        lambda: {n: t for n, t in layouts.dinov3().items() if not n.startswith("blocks.2.")},
        r"without blocks\.2\.gamma_1, blocks\.2\.gamma_2",
    ),
    "a norm too few": (lambda: changed(layouts.dinov3(), norm__bias=None), r"without norm\.bias"),
    "biases in one block": (
        lambda: changed(layouts.dinov3(biased=True), blocks__1__attn__qkv__bias=None),
        r"without blocks\.1\.attn\.q_bias",
    ),
    "odd biases": (
        lambda: changed(layouts.dinov3(), blocks__1__attn__qkv__bias=torch.zeros(1)),
        r"blocks\.1\.attn\.qkv\.bias of shape \(1,\)",
    ),
    "width": (lambda: layouts.dinov3(96), "96 features a token(?s:.*)a multiple of 64"),
    "width, without periods": (lambda: in_timms_names(layouts.dinov3(96)), "96 features a token"),
    "other positions": (
        lambda: changed(layouts.dinov3(), rope_embed__periods=10_000 ** (torch.arange(16) / 16)),
        "other periods of the positions",
    ),
    "no periods at all": (lambda: changed(layouts.dinov3(), rope_embed__periods=torch.zeros(0)), "multiple of 0"),
    "a changed block": (lambda: changed(layouts.dinov3(), blocks__1__attn__q_norm__weight=torch.ones(64)), "no place"),
}  # fmt: skip


@pytest.mark.parametrize("form", REFUSED)
def test_other_forms_are_refused_with_what_differs(form: str, tmp_path: Path) -> None:
    content, message = REFUSED[form]
    with pytest.raises(PretrainedMismatch, match=message):
        read_weights(saved(tmp_path, content()))


def test_all_that_differs_is_said_at_once(tmp_path: Path) -> None:
    content = changed(gated(layouts.dinov3(96, storage=5)), patch_embed__proj__weight=torch.zeros(96, 3, 14, 14))
    with pytest.raises(PretrainedMismatch) as caught:
        read_weights(saved(tmp_path, content))
    assert all(text in str(caught.value) for text in ("5 storage", "14 × 14", "96 features", "gated MLP"))


def test_the_periods_tell_the_number_of_heads(tmp_path: Path) -> None:
    content = changed(layouts.dinov3(), rope_embed__periods=(100 ** (torch.arange(8) / 8)).bfloat16())
    assert arguments(read_weights(saved(tmp_path, content)))["num_heads"] == 4


def test_absurd_sizes_build_nothing(tmp_path: Path) -> None:
    content = layouts.dinov3() | {"blocks.9999.norm1.weight": torch.ones(128), "blocks.99999.norm1.bias": torch.ones(1)}
    with pytest.raises(PretrainedMismatch, match=r"without blocks\.4\."):
        read_weights(saved(tmp_path, content))
    wide = changed(layouts.dinov3(64, 1), patch_embed__proj__weight=torch.zeros(64 * 200, 1, 16, 16))
    wide = changed(wide, blocks__0__mlp__fc1__weight=torch.zeros(4 * 64 * 200, 1))
    with pytest.raises(PretrainedMismatch, match="absurd size"):
        read_weights(saved(tmp_path, wide))


@pytest.mark.parametrize("branch", ["teacher", "student"])
def test_of_a_whole_run_the_network_asked_for_is_taken(branch: str, tmp_path: Path) -> None:
    student, teacher = layouts.dinov3_run(), layouts.dinov3_run()
    student["backbone.norm.bias"] = student["backbone.norm.bias"] + 1
    weights = read_weights(saved(tmp_path, layouts.dinov3_dump(student, teacher)), branch=branch)
    source = {"student": student, "teacher": teacher}[branch]
    assert torch.equal(weights.tensors["norm.bias"], source["backbone.norm.bias"])
    assert f"its {branch} is taken" in weights.warnings[0]


def test_a_checkpoint_in_pieces_is_refused_and_the_remedy_works(tmp_path: Path) -> None:
    folder = tmp_path / "199"
    content = {"iteration": 199, "model": {f"teacher.{n}": t for n, t in layouts.dinov3_run().items()}}
    dcp.save(content, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    for path in (folder, folder / "__0_0.distcp", folder / ".metadata"):
        with pytest.raises(DatasetError, match="dcp_to_torch_save") as caught:
            read_weights(path)
        assert "torch.distributed.checkpoint.format_utils" in str(caught.value)
        assert repr(str(folder)) in str(caught.value)
    dcp_to_torch_save(folder, tmp_path / "weights.pth")
    assert arguments(read_weights(tmp_path / "weights.pth"))["eps"] == 1e-6


def test_pickled_objects_beside_the_weights_are_not_made(tmp_path: Path) -> None:
    with pytest.raises(UnsafeFile, match="Configuration"):
        read_weights(saved(tmp_path, {**layouts.meddinov3(), "config": Configuration()}))


@pytest.mark.parametrize("other", [*OTHERS, "DINOv2", "PUMIT"])
def test_weights_of_others_are_not_taken_for_dinov3s(other: str, tmp_path: Path) -> None:
    content = {
        **OTHERS,
        "DINOv2": lambda: in_timms_names(layouts.dinov3()) | {"pos_embed": torch.zeros(1, 1370, 128)},
        "PUMIT": layouts.pumit_transformer,
    }
    path = saved(tmp_path, content[other]())
    assert all(dinov3.recognise(contents) is None for contents in read_contents(path, path, {}, "teacher"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dinov3s_weights_are_not_taken_for_those_of_others(layout: str, tmp_path: Path) -> None:
    path = saved(tmp_path, LAYOUTS[layout][0]())
    for contents in read_contents(path, path, {}, "teacher"):
        names = [name for name, recognise in RECOGNISERS if recognise(contents) is not None]
        assert names in ([], ["DINOv3, MedDINOv3"])


@torch.no_grad()
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_channels_that_are_alike_are_seen_as_grey_in_colours(channels: int, tmp_path: Path) -> None:
    """meddinov3.md 6.1 (13): each gets Σw / C, also where there are three."""
    weights = read_weights(saved(tmp_path, layouts.dinov3()))
    grey, _ = loaded(weights)
    encoder, report = loaded(weights, channels, ["ZScoreNormalization"] * channels)
    assert report.encoder_share == 1.0
    rule = f"input channels 3 to {channels} by the sum, spread evenly"
    assert dict(report.adapted) == {"patch_embed.proj.weight": rule}
    kernel = weights.tensors["patch_embed.proj.weight"].sum(1) / channels
    assert all(torch.allclose(encoder.patch_embed.proj.weight[:, c], kernel) for c in range(channels))
    x = image(1, 1, 64, 96)
    for found, expected in zip(encoder(x.expand(-1, channels, -1, -1)), grey(x.expand(-1, 3, -1, -1)), strict=True):
        assert (found - expected).abs().max() < 1e-5


def test_colours_keep_their_kernels(tmp_path: Path) -> None:
    weights = read_weights(saved(tmp_path, layouts.dinov3()))
    encoder, report = loaded(weights)
    assert report.adapted == ()
    assert torch.equal(encoder.patch_embed.proj.weight, weights.tensors["patch_embed.proj.weight"])
    grey = read_weights(saved(tmp_path, layouts.dinov3(channels=1)))
    assert (grey.channels, grey.colours) == (1, False)
    assert loaded(grey, 1, ["CTNormalization"])[1].adapted == ()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_tiny_dataset(tmp_path_factory.mktemp("dinov3"), cases=5)
    dataset = load_dataset(901)
    plan_dataset(dataset, fingerprint(dataset), Overrides())
    return root


@pytest.fixture
def planned(root: Path) -> Path:
    paths.configure(root)
    return root


def fitted(weights: Weights, **options: str):
    return fit(load_dataset(901), weights, plan_name=PLAN, **options)


def test_the_fitted_configuration_has_the_eps_and_the_depth(planned: Path, tmp_path: Path) -> None:
    found = fitted(read_weights(saved(tmp_path, layouts.meddinov3(), "model.pth")))
    assert found.configuration == "2d_model"
    content = found.plan["configurations"][found.configuration]
    assert content["inherits_from"] == "2d"
    assert content["data_identifier"].endswith("_2d_vit")
    expected = {"embed_dim": 128, "depth": 4, "num_heads": 2, "eps": 1e-6, "qkv_bias": False, "drop_path": 0.2}
    assert expected.items() <= content["architecture"]["arch_kwargs"].items()
    assert found.report.encoder_share == 1.0
    network = build_segmentation_network(found.plan, found.configuration, load_dataset(901).json)
    assert network.encoder.norm.eps == 1e-6
    assert network.encoder.patch_embed.proj.weight.shape[1] == 1


def test_a_released_size_gets_the_configuration_of_that_size(
    planned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SIZES, "tiny", {"embed_dim": 128, "depth": 4, "num_heads": 2})
    weights = read_weights(saved(tmp_path, layouts.dinov3()))
    assert weights.kind == "DINOv3 transformer tiny, 4 blocks of 128 features"
    found = fitted(weights)
    assert found.configuration == "2d_vit_tiny"
    assert found.plan["configurations"]["2d_vit_tiny"] == with_configuration(found.plan, "2d_vit_tiny")[
        "configurations"]["2d_vit_tiny"]  # fmt: skip
    other = fitted(read_weights(saved(tmp_path, layouts.meddinov3())))  # another ε
    assert other.configuration == "2d_weights"


def test_a_network_that_computes_otherwise_although_all_tensors_fit_is_named(
    planned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SIZES, "tiny", {"embed_dim": 128, "depth": 4, "num_heads": 2})
    med = fitted(read_weights(saved(tmp_path, layouts.meddinov3())), configuration="2d_vit_tiny")
    assert med.report.encoder_share == 1.0
    assert "eps 1e-05, of the weights 1e-06" in med.decisions[-1].because
    meta = fitted(read_weights(saved(tmp_path, layouts.dinov3())), configuration="2d_vit_tiny")
    assert meta.decisions[-1].because == "asked for with -c"
    biased = read_weights(saved(tmp_path, layouts.dinov3(biased=True)))
    assert "qkv_bias False, of the weights True" in differences(meta.plan, "2d_vit_tiny", biased)
    assert differences(meta.plan, "3d_fullres", biased) == ""


def test_another_depth_is_refused_with_the_blocks(planned: Path, tmp_path: Path) -> None:
    with pytest.raises(PretrainedMismatch, match=r"the pretrained network has no blocks\.4"):
        fitted(read_weights(saved(tmp_path, layouts.dinov3(192))), configuration="2d_vit_tiny")


def test_the_plan_says_whether_channels_are_colours(planned: Path, tmp_path: Path) -> None:
    weights = read_weights(saved(tmp_path, layouts.dinov3()))
    found = fitted(weights)
    labels = {**load_dataset(901).json, "channel_names": {"0": "a", "1": "b", "2": "c"}}
    for name, rules in (("ZScoreNormalization", 1), ("RGBTo01Normalization", 0)):
        plan = copy.deepcopy(found.plan)
        plan["configurations"]["2d"]["normalization_schemes"] = [name] * 3
        assert len(try_transfer(plan, found.configuration, labels, weights, 1.0).adapted) == rules


def shown(path: Path, *options: str) -> str:
    """What `weights inspect` prints, in one line."""
    result = CliRunner().invoke(app, ["weights", "inspect", str(path), *options], env={"COLUMNS": "400"})
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def test_inspecting_names_the_weights_and_their_licence_once(planned: Path, tmp_path: Path) -> None:
    meta = shown(saved(tmp_path, layouts.dinov3()), "-d", "901", "--root", str(planned), "-p", PLAN)
    assert "DINOv3 transformer, 4 blocks of 128 features" in meta
    assert (meta.count("DINOv3 License"), meta.count("Apache"), "CT-3M" in meta) == (1, 0, False)
    assert "part of the masked prediction" in meta
    assert "Into autosegPlans_cpu, 2d_weights" in meta
    assert "encoder 100 %" in meta
    med = shown(saved(tmp_path, layouts.meddinov3()))
    assert (med.count("DINOv3 License"), med.count("Apache-2.0")) == (1, 1)
    for text in ("as MedDINOv3's", "AMOS22, LiTS and BTCV", "CT alone", "65.1084", "178.0166", "1e-06 is taken"):
        assert med.count(text) == 1, text


def seen_normalizations(module: str, monkeypatch: pytest.MonkeyPatch) -> list:
    """What `transfer_weights`, as `module` knows it, is told of the channels from now on."""
    seen: list = []

    def spy(*arguments):
        seen.append(arguments[3])
        return transfer_weights(*arguments)

    monkeypatch.setattr(f"{module}.transfer_weights", spy)
    return seen


def test_training_names_the_licence_and_the_notes_once(
    planned: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", logger="autoseg")
    seen = seen_normalizations("trainers.base", monkeypatch)
    file = saved(tmp_path, layouts.meddinov3(layouts.dinov3(64, 2, bias=False)), "med.pth")
    folder = train(
        901, plan=PLAN, pretrained=file, device="cpu", folds=(0, 1), settings={"epochs": 1, "iterations": 1}
    )[0]
    assert folder.parent.name == f"AutosegTrainer-med__{PLAN}__2d_med"
    assert caplog.text.count("DINOv3 License") == 1
    assert caplog.text.count("AMOS22, LiTS and BTCV") == 1
    assert seen == [["ZScoreNormalization"]] * 2


def test_pretraining_from_them_names_the_licence_and_the_notes_once(
    planned: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", logger="autoseg")
    monkeypatch.setitem(SIZES, "tiny", {"embed_dim": 128, "depth": 4, "num_heads": 2})
    seen = seen_normalizations("pretrain.loop", monkeypatch)
    file, home = saved(tmp_path, layouts.meddinov3(), "med.pth"), load_dataset(901)
    plan = with_configuration(load_plan(home.name, PLAN), "2d_vit_tiny")
    network = build_segmentation_network(plan, "2d_vit_tiny", home.json)
    target = Target(plan, "2d_vit_tiny", encoder_info(plan, "2d_vit_tiny", home.json))
    options: Any = SimpleNamespace(init=file, plan_name=PLAN, configuration="2d_vit_tiny")
    licence = _initialise(network, home, target, options, allow_partial=False)
    assert caplog.text.count(licence) == caplog.text.count("DINOv3 License") == 1
    assert caplog.text.count("AMOS22, LiTS and BTCV") == caplog.text.count("eps 1e-05, of the weights 1e-06") == 1
    assert seen == [["ZScoreNormalization"]]
    assert torch.equal(network.encoder.norm.bias, read_weights(file).tensors["norm.bias"])


def test_our_network_is_the_one_the_names_were_read_from() -> None:
    with torch.device("meta"):
        state = DinoViT(3, 128, 4, 2, qkv_bias=True).state_dict()
    names = {f"blocks.{n}.{name}" for n in range(4) for name in (*dinov3._IN_BLOCK, "attn.q_bias", "attn.v_bias")}
    others = {"cls_token", "reg_token", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias"}
    assert state.keys() == names | others
