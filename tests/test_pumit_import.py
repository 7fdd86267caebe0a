"""PUMIT's published layouts: recognised, read whole, and the same values. Numbers: methods/pumit.md §2.6, §4 and §6."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv3d

from planners.anisotropy import strides_of_degree
from planners.configurations import with_configuration
from planners.errors import DatasetError, PretrainedMismatch, UnsafeFile
from planners.sac import SIZES
from pretrain.encoders import encoder_of
from pretrain.fit import IMPORTED_SHARE, _add_network, transfer_weights, try_transfer
from pretrain.importers import pumit
from pretrain.importers.contents import read_contents
from pretrain.importers.pumit import read_tokenizer
from pretrain.importers.reading import RECOGNISERS, read_weights
from pretrain.importers.weights import Weights
from pretrain.methods.pumit.tokenizer import Tokenizer
from pretrain.networks.pumit_vit import resized_positions
from pretrain.networks.registry import build_network
from pretrain.networks.sac import Spacing
from tests import layouts
from tests.tiny import dataset_json, tiny_plan

DEGREES = range(6)


def saved(tmp_path: Path, content: object) -> Path:
    torch.save(content, tmp_path / "weights.ckpt")
    return tmp_path / "weights.ckpt"


def loaded(weights: Weights, degree: int = 0, channels: int = 1):
    """The encoder of a network for one DA with the weights in it, and the report."""
    torch.manual_seed(5)
    architecture = copy.deepcopy(weights.architecture)
    architecture["arch_kwargs"] |= {"strides": strides_of_degree(degree, 6), "features_per_stage": [4, 4, 4, 4, 4, 4]}
    network = build_network(architecture, channels, 2, deep_supervision=False).eval()
    report = transfer_weights(weights, network, IMPORTED_SHARE)
    return encoder_of(network), report


def image(degree: int, channels: int, tokens: int = 2) -> Tensor:
    shape = (1, channels, 1 if degree == 5 else tokens * (16 >> degree), 32, 48)
    return torch.randn(shape, generator=torch.Generator().manual_seed(degree))


def test_the_layouts_have_the_published_counts() -> None:
    """34,253,955 parameters of the tokenizer; 94,930,944 of the base transformer, and 315,498,432 of the large one."""

    def count(shapes: dict[str, tuple[int, ...]]) -> int:
        return sum(torch.Size(shape).numel() for shape in shapes.values())

    assert count(layouts.pumit_tokenizer_shapes((128, 256, 512), 1024)) == 34_253_955
    for width, depth, parameters in ((768, 12, 94_930_944), (1024, 24, 315_498_432)):
        shapes = layouts.pumit_transformer_shapes(width, depth, 1024)
        encoder = {n: s for n, s in shapes.items() if not n.startswith(("mim_head", "mask_token"))}
        assert count(encoder) == parameters


def test_the_transformer_loads_whole_and_says_what_it_is(tmp_path: Path) -> None:
    content = layouts.pumit_transformer()
    weights = read_weights(saved(tmp_path, content))
    assert (weights.kind, weights.method, weights.scope) == (
        "PUMIT transformer, 3 blocks of 128 features", "pumit", "encoder",
    )  # fmt: skip
    assert weights.licence == "not stated (function2-llx/PUMIT has none)"
    assert "Decathlon" in weights.warnings[0]
    transformer = {"embed_dim": 128, "depth": 3, "num_heads": 2}
    assert transformer.items() <= weights.architecture["arch_kwargs"].items()
    heads = {"mask_token", *(f"mim_head.{n}.{kind}" for n in (0, 2) for kind in ("weight", "bias"))}
    assert dict(weights.dropped) == dict.fromkeys(heads, "part of the masked prediction")
    encoder, report = loaded(weights, channels=3)
    assert (report.encoder_share, report.adapted, report.new, report.unused) == (1.0, (), (), ())
    assert len(report.loaded) == len(content["state_dict"]) - len(heads)
    state, found = content["state_dict"], encoder.vit
    pairs = {
        "cls_token": found.cls_token,
        "pos_embed": found.pos_embed,
        "patch_embed.proj.weight": found.patch_embed["proj"].weight,
        "blocks.1.attn.q_bias": found.blocks[1].attn.q_proj.bias,
        "blocks.1.attn.v_bias": found.blocks[1].attn.v_proj.bias,
        "blocks.1.attn.q_proj.weight": found.blocks[1].attn.q_proj.weight,
        "blocks.1.attn.k_proj.weight": found.blocks[1].attn.k_proj.weight,
        "blocks.1.mlp.w1.weight": found.blocks[1].mlp.fc1_g.weight,
        "blocks.1.mlp.w2.weight": found.blocks[1].mlp.fc1_x.weight,
        "blocks.1.mlp.ffn_ln.weight": found.blocks[1].mlp.norm.weight,
        "blocks.2.mlp.w3.weight": found.blocks[2].mlp.fc2.weight,
        "norm.bias": found.norm.bias,
    }
    assert all(torch.equal(tensor, state[name]) for name, tensor in pairs.items())


@torch.no_grad()
@pytest.mark.parametrize("degree", DEGREES)
def test_an_image_of_one_channel_is_seen_as_one_of_three_equal_channels(degree: int, tmp_path: Path) -> None:
    weights = read_weights(saved(tmp_path, layouts.pumit_transformer()))
    (one, report), (three, _) = loaded(weights, degree), loaded(weights, degree, channels=3)
    assert report.encoder_share == 1.0
    assert dict(report.adapted) == {
        "vit.patch_embed.proj.weight": "input channels 3 to 1 by the sum, spread evenly",
    }
    x = image(degree, 1)
    pairs = zip(one(x), three(x.expand(-1, 3, -1, -1, -1)), strict=True)
    assert all(torch.allclose(a, b, atol=1e-3, rtol=1e-4) for a, b in pairs)


@torch.no_grad()
@pytest.mark.parametrize("degree", DEGREES)
def test_tokens_are_sums_over_their_voxels_plus_positions(degree: int, tmp_path: Path) -> None:
    """With blocks that add nothing the maps are the patch embedding, whose kernel is pooled to 16 >> DA slices."""
    content = layouts.pumit_transformer()
    state = content["state_dict"]
    for name in state:
        if ".attn.proj." in name or ".mlp.w3." in name:
            state[name] = torch.zeros_like(state[name])
    encoder, _ = loaded(read_weights(saved(tmp_path, content)), degree)
    x, depth = image(degree, 1), max(16 >> degree, 1)
    kernel = state["patch_embed.proj.weight"].sum(1, keepdim=True)
    kernel = kernel.reshape(128, 1, depth, 16 // depth, 16, 16).sum(3)
    tokens = conv3d(x, kernel, state["patch_embed.proj.bias"], (depth, 16, 16))
    expected = tokens + resized_positions(state["pos_embed"], tokens.shape[2:])
    assert all(torch.allclose(found, expected, atol=1e-3, rtol=1e-4) for found in encoder(x))


def test_positions_of_another_grid_are_resized_by_the_transfer(tmp_path: Path) -> None:
    content = layouts.pumit_transformer()
    ramp = torch.arange(3.0).view(1, 1, 3, 1, 1).expand(1, 128, 3, 12, 12)
    content["state_dict"]["pos_embed"] = ramp.clone()
    encoder, report = loaded(read_weights(saved(tmp_path, content)), channels=3)
    assert report.encoder_share == 1.0
    assert dict(report.adapted) == {"vit.pos_embed": "positions (3, 12, 12) to (5, 10, 10) by linear interpolation"}
    assert encoder.vit.pos_embed[0, 7, :, 4, 4].tolist() == pytest.approx([0, 0.5, 1, 1.5, 2])


def test_tables_of_rotations_are_left_out_and_a_tokenizer_beside_the_transformer_too(tmp_path: Path) -> None:
    content = layouts.pumit_transformer()
    content["state_dict"] |= {"rope.freqs_cos": torch.zeros(4), "blocks.0.attn.rope.freqs_sin": torch.zeros(4)}
    content["state_dict"]["tokenizer.encoder.0.bias"] = torch.zeros(4)
    weights = read_weights(saved(tmp_path, content))
    reasons = dict(weights.dropped)
    assert reasons["rope.freqs_cos"] == reasons["blocks.0.attn.rope.freqs_sin"] == "follows from the sizes"
    assert reasons["tokenizer.encoder.0.bias"] == "tokenizer"
    assert loaded(weights)[1].unused == ()


def test_what_is_not_the_published_transformer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PretrainedMismatch, match=r"attention heads(?s:.*)96 features"):
        read_weights(saved(tmp_path, layouts.pumit_transformer(96, 1)))
    pooled = layouts.pumit_transformer(64, 1)
    kernel = pooled["state_dict"]["patch_embed.proj.weight"]
    pooled["state_dict"]["patch_embed.proj.weight"] = kernel.reshape(64, 3, 4, 4, 16, 16).sum(3)  # for one DA
    with pytest.raises(PretrainedMismatch, match=r"no place: vit\.patch_embed\.proj\.weight"):
        read_weights(saved(tmp_path, pooled))
    positions = layouts.pumit_transformer(64, 1)
    positions["state_dict"]["pos_embed"] = torch.zeros(1, 63, 5, 10, 10)
    with pytest.raises(PretrainedMismatch, match=r"no place: vit\.pos_embed"):
        read_weights(saved(tmp_path, positions))
    flat = layouts.pumit_transformer(64, 1)  # EVA-02 itself, which knows a plane only
    flat["state_dict"] |= {"patch_embed.proj.weight": kernel[:, :, 0], "pos_embed": torch.zeros(1, 257, 64)}
    with pytest.raises(PretrainedMismatch, match="layout that is not known"):
        read_weights(saved(tmp_path, flat))


class Configuration:
    """Of a training script, pickled beside the weights."""


@pytest.mark.parametrize("content", [layouts.pumit_transformer, layouts.pumit_tokenizer])
def test_pickled_objects_beside_the_weights_are_not_made(content: Any, tmp_path: Path) -> None:
    path = saved(tmp_path, {**content(), "hyper_parameters": Configuration()})
    with pytest.raises(UnsafeFile, match="Configuration"):
        read_weights(path)
    with pytest.raises(UnsafeFile, match="Configuration"):
        read_tokenizer(path)


def test_a_published_size_gets_the_configuration_of_that_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "b", {"embed_dim": 128, "depth": 3, "num_heads": 2})
    weights = read_weights(saved(tmp_path, layouts.pumit_transformer()))
    assert weights.kind == "PUMIT transformer B, 3 blocks of 128 features"
    name, plan = _add_network(tiny_plan(), "3d_fullres", weights)
    assert name == "3d_fullres_sac_b"
    assert plan == with_configuration(tiny_plan(), "3d_fullres_sac_b")
    assert try_transfer(plan, name, dataset_json(), weights, IMPORTED_SHARE).encoder_share == 1.0


def test_another_size_gets_a_configuration_of_its_name(tmp_path: Path) -> None:
    weights = read_weights(saved(tmp_path, layouts.pumit_transformer()))
    plan = tiny_plan()
    name, plan = _add_network(plan, "3d_fullres", weights)
    assert name == "3d_fullres_weights"
    assert plan["configurations"][name]["architecture"]["arch_kwargs"]["embed_dim"] == 128
    assert try_transfer(plan, name, dataset_json(), weights, IMPORTED_SHARE).encoder_share == 1.0


OTHERS = {
    "VoCo": lambda: layouts.voco_encoder(layouts.swin()),
    "SuPreM": lambda: layouts.suprem(layouts.swin(use_v2=False)),
    "self-supervised": lambda: layouts.monai_ssl(layouts.swin(use_v2=False)),
    "nnssl": lambda: layouts.nnssl(layouts.resenc().state_dict(), None, "BaseMAETrainer"),
    "nnU-Net": lambda: layouts.nnunet()[0],
    "PCRLv2": lambda: layouts.PCRLNetwork(2).state_dict(),
}


@pytest.mark.parametrize("other", OTHERS)
def test_weights_of_others_are_not_taken_for_pumits(other: str, tmp_path: Path) -> None:
    path = saved(tmp_path, OTHERS[other]())
    assert all(pumit.recognise(contents) is None for contents in read_contents(path, path, {}, "teacher"))
    with pytest.raises(PretrainedMismatch, match="No tokenizer of PUMIT"):
        read_tokenizer(path)


@pytest.mark.parametrize("content", [layouts.pumit_transformer, layouts.pumit_tokenizer])
def test_pumits_weights_are_not_taken_for_those_of_others(content: Any, tmp_path: Path) -> None:
    path = saved(tmp_path, content())
    (contents,) = read_contents(path, path, {}, "teacher")
    assert [name for name, recognise in RECOGNISERS if name != "PUMIT" and recognise(contents) is not None] == []


def test_the_tokenizer_loads_whole_as_the_authors_trained_it(tmp_path: Path) -> None:
    content = layouts.pumit_tokenizer()
    found = read_tokenizer(saved(tmp_path, content))
    assert found.options == {
        "in_channels": 3,
        "channels": (8, 16, 24),
        "codes": 10,
        "k3_rule": "article",
        "transposed_pool": "sum",
    }
    assert (found.name, found.dropped, len(found.sha256)) == ("weights", (), 64)
    tokenizer = Tokenizer(**found.options)
    tokenizer.load_state_dict(found.tensors)
    state = content["model"]
    assert all(torch.equal(tensor, state[name]) for name, tensor in tokenizer.state_dict().items())
    assert len(state) == len(tokenizer.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("degree", DEGREES)
def test_a_gray_tokenizer_has_the_tokens_of_three_equal_channels_and_their_brightness(
    degree: int, tmp_path: Path
) -> None:
    path = saved(tmp_path, layouts.pumit_tokenizer())
    colour, gray = read_tokenizer(path), read_tokenizer(path, gray=True)
    assert gray.options == {**colour.options, "in_channels": 1}
    models = []
    for found in (colour, gray):
        models.append(Tokenizer(**found.options).double().eval())
        models[-1].load_state_dict(found.tensors)
    x = image(degree, 1).double()
    (tokens, y), (expected, rgb) = (
        models[1](x, Spacing(degree)),
        models[0](x.expand(-1, 3, -1, -1, -1), Spacing(degree)),
    )
    assert torch.allclose(tokens, expected, atol=1e-6)
    brightness = 0.299 * rgb[:, :1] + 0.587 * rgb[:, 1:2] + 0.114 * rgb[:, 2:]
    assert torch.allclose(y, brightness, atol=1e-6)
    assert float(y.std()) > 1e-2


def test_an_incomplete_tokenizer_is_refused(tmp_path: Path) -> None:
    for name, change in (
        ("decoder.4.weight", None),
        ("quantize.proj.weight", torch.zeros(11, 24)),
        ("encoder.6.weight", torch.zeros(23, 16, 2, 2, 2)),
    ):
        content = layouts.pumit_tokenizer()
        content["model"][name] = change
        if change is None:
            del content["model"][name]
        with pytest.raises(PretrainedMismatch, match=f"not complete(?s:.*){name}|cannot be built(?s:.*)23"):
            read_tokenizer(saved(tmp_path, content))


def test_the_tokenizer_is_no_encoder_and_the_transformer_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(PretrainedMismatch, match=r"tokenizer is no encoder(?s:.*)\(10, 24\)"):
        read_weights(saved(tmp_path, layouts.pumit_tokenizer()))
    with pytest.raises(PretrainedMismatch, match=r"No tokenizer(?s:.*)cls_token"):
        read_tokenizer(saved(tmp_path, layouts.pumit_transformer(64, 1)))
    with pytest.raises(DatasetError, match="No such file"):
        read_tokenizer(tmp_path / "nowhere")
