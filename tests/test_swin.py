"""SwinUNETR is MONAI's, Primus is dynamic-network-architectures'; their encoders are views with the published names."""

import copy
import pydoc
import subprocess
import sys

import pytest
import torch
from dynamic_network_architectures.architectures import primus
from monai.networks import nets

from pretrain.encoders import encoder_of
from pretrain.networks.registry import build_network, has_deep_supervision
from pretrain.networks.swin import SwinUNETR
from tests.tiny import tiny_plan

SWIN = {
    "network_class_name": "pretrain.networks.SwinUNETR",
    "arch_kwargs": {
        "feature_size": 12,
        "depths": [2, 2, 2, 2],
        "num_heads": [3, 6, 12, 24],
        "window_size": 7,
        "use_v2": True,
        "use_checkpoint": False,
    },
    "_kw_requires_import": [],
}
PRIMUS = {
    "network_class_name": "pretrain.networks.Primus",
    "arch_kwargs": {
        "embed_dim": 48,
        "eva_depth": 2,
        "eva_numheads": 4,
        "patch_embed_size": [2, 4, 8],
        "input_shape": [4, 12, 16],
        "init_values": 0.1,
        "scale_attn_inner": True,
    },
    "_kw_requires_import": [],
}
PARTS = ("swinViT", "encoder1", "encoder2", "encoder3", "encoder4", "encoder10")


def swin(channels=2, classes=3, **changes):
    torch.manual_seed(5)
    architecture = {**SWIN, "arch_kwargs": {**SWIN["arch_kwargs"], **changes}}
    return build_network(architecture, channels, classes, deep_supervision=False).eval()


def primus_network(channels=2, classes=3, **changes):
    torch.manual_seed(5)
    architecture = {**PRIMUS, "arch_kwargs": {**PRIMUS["arch_kwargs"], **changes}}
    return build_network(architecture, channels, classes, deep_supervision=False).eval()


@pytest.mark.parametrize("name", ["SwinUNETR", "Primus"])
def test_nnunet_locates_the_classes_and_the_package_imports_no_torch(name):
    assert pydoc.locate(f"pretrain.networks.{name}").__name__ == name
    done = subprocess.run(
        [sys.executable, "-c", "import sys, pretrain.networks; assert 'torch' not in sys.modules"], check=False
    )
    assert done.returncode == 0


def test_a_class_that_is_not_there_is_an_attribute_error():
    assert pydoc.locate("pretrain.networks.Swin") is None


@pytest.mark.parametrize("use_v2", [True, False])
def test_the_networks_tensors_have_monais_names_and_shapes(use_v2):
    ours = swin(use_v2=use_v2).state_dict()
    theirs = nets.SwinUNETR(2, 3, feature_size=12, use_v2=use_v2).state_dict()
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in theirs.items()}
    assert any("layers1c" in name for name in ours) == use_v2


def test_the_encoders_names_are_those_of_the_published_checkpoints():
    """voco.md 4.1: 145 entries at 48 features, 22 more in the whole network, all of them in the decoder."""
    with torch.device("meta"):
        network = build_network(
            {**SWIN, "arch_kwargs": {**SWIN["arch_kwargs"], "feature_size": 48}}, 1, 14, deep_supervision=False
        )
    encoder, whole = network.encoder.state_dict(), network.state_dict()
    assert {name.split(".")[0] for name in encoder} == set(PARTS)
    assert (len(encoder), len(whole)) == (145, 167)
    assert encoder["swinViT.layers1.0.blocks.0.attn.relative_position_bias_table"].shape == (2197, 3)
    assert encoder["encoder1.layer.conv1.conv.weight"].shape == (48, 1, 3, 3, 3)
    missing = network.load_state_dict(encoder, strict=False, assign=True)
    assert not missing.unexpected_keys
    assert len(missing.missing_keys) == 22
    assert {name.split(".")[0] for name in missing.missing_keys} == {*(f"decoder{n}" for n in range(1, 6)), "out"}


def test_the_skips_are_what_monais_modules_compute():
    network = swin()
    monai = nets.SwinUNETR(2, 3, feature_size=12, use_v2=True).eval()
    monai.load_state_dict(network.state_dict())
    image = torch.randn(1, 2, 64, 32, 32)
    with torch.no_grad():
        skips = network.encoder(image)
        hidden = monai.swinViT(image, True)
        expected = [monai.encoder1(image), *(getattr(monai, f"encoder{n + 2}")(hidden[n]) for n in range(3))]
        expected.append(monai.encoder10(hidden[4]))
        assert torch.equal(network(image), monai(image))
    assert [tuple(s.shape[1:]) for s in skips] == [
        (12, 64, 32, 32),
        (12, 32, 16, 16),
        (24, 16, 8, 8),
        (48, 8, 4, 4),
        (192, 2, 1, 1),
    ]
    assert all(torch.equal(a, b) for a, b in zip(skips, expected, strict=True))
    encoder = network.encoder
    assert encoder.output_channels == [skip.shape[1] for skip in skips]
    sizes = [[image.shape[2 + a] // skip.shape[2 + a] for a in range(3)] for skip in skips]
    assert torch.cumprod(torch.tensor(encoder.strides), 0).tolist() == sizes


@pytest.mark.parametrize("make", [swin, primus_network])
def test_the_encoder_is_a_view(make):
    network = make()
    first, second = encoder_of(network), encoder_of(network)
    assert not any(name.startswith("encoder.") for name in network.state_dict())
    assert all(a is b for a, b in zip(first.parameters(), second.parameters(), strict=True))
    own = {id(p) for p in network.parameters()}
    assert {id(p) for p in first.parameters()} < own
    first.train()
    assert next(first.children()).training
    assert next(network.children()).training
    network.eval()
    assert not any(module.training for module in encoder_of(network).modules())
    copied = copy.deepcopy(first)
    assert copied.state_dict().keys() == first.state_dict().keys()
    assert not own & {id(p) for p in copied.parameters()}
    assert not {id(p) for p in copy.deepcopy(network).encoder.parameters()} & own


def test_checkpointing_changes_the_memory_and_not_the_gradients():
    gradients = []
    for use_checkpoint in (False, True):
        network = swin(use_checkpoint=use_checkpoint)
        image = torch.randn(1, 2, 64, 32, 32, generator=torch.Generator().manual_seed(1))
        network(image).square().mean().backward()
        gradients.append([p.grad for p in network.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(*gradients, strict=True))
    assert gradients[0][0].abs().max() > 0


def test_primus_is_the_one_of_the_library():
    network = primus_network()
    library = primus.Primus(
        2, 48, (2, 4, 8), 3, eva_depth=2, eva_numheads=4, input_shape=(4, 12, 16), init_values=0.1,
        scale_attn_inner=True,
    ).eval()  # fmt: skip
    library.load_state_dict(network.state_dict())
    image = torch.randn(2, 2, 4, 12, 16)
    with torch.no_grad():
        assert torch.equal(network(image), library(image))


@pytest.mark.parametrize("registers", [0, 3])
def test_primus_encoder_gives_the_map_its_decoder_takes(registers):
    network = primus_network(num_register_tokens=registers)
    encoder = network.encoder
    names = {name.split(".")[0] for name in encoder.state_dict()}
    assert names == {"down_projection", "eva", *(["register_tokens"] if registers else [])}
    assert (encoder.output_channels, encoder.strides) == ([48], [[2, 4, 8]])
    assert encoder.position_grids == {"eva.pos_embed": (2, 3, 2)}
    image = torch.randn(1, 2, 4, 12, 16)
    with torch.no_grad():
        (tokens,) = encoder(image)
        assert tokens.shape == (1, 48, 2, 3, 2)
        assert torch.equal(network.up_projection(tokens), network(image))


@pytest.mark.parametrize("architecture", [SWIN, PRIMUS])
def test_networks_with_one_output_refuse_deep_supervision(architecture):
    assert not has_deep_supervision(architecture)
    with pytest.raises(ValueError, match="one output"):
        build_network(architecture, 1, 3, deep_supervision=True)


def test_unets_have_deep_supervision():
    assert has_deep_supervision(tiny_plan()["configurations"]["3d_fullres"]["architecture"])


def test_sizes_that_are_no_multiples_of_32_are_refused():
    with pytest.raises(ValueError, match="divisible"):
        SwinUNETR(1, 2, feature_size=12)(torch.zeros(1, 1, 48, 32, 32))
