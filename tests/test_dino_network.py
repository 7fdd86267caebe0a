"""MedDINOv3's segmentation network: widths, parameters, what the trainer and the transfer ask of it (meddinov3.md 2.2, 6.1)."""

from __future__ import annotations

import pydoc

import pytest
import torch
from dynamic_network_architectures.building_blocks.patch_encode_decode import LayerNormNd

from planners.errors import PlanError
from pretrain.encoders import encoder_of
from pretrain.networks.dino import ChannelNorm
from pretrain.networks.registry import build_network, has_deep_supervision
from pretrain.transfer import transfer


def architecture(**changes) -> dict:
    arguments = {"embed_dim": 96, "depth": 4, "num_heads": 3}
    return {
        "network_class_name": "pretrain.networks.MedDINOv3",
        "arch_kwargs": {**arguments, **changes},
        "_kw_requires_import": [],
    }


def network(*, channels=1, classes=3, **changes):
    torch.manual_seed(5)
    return build_network(architecture(**changes), channels, classes, deep_supervision=False)


def test_nnunet_locates_the_class():
    assert pydoc.locate("pretrain.networks.MedDINOv3").__name__ == "MedDINOv3"


def test_maps_and_logits_have_their_sizes():
    """meddinov3.md 6.1 (11), the smoke network."""
    model = network(classes=5)
    scan = torch.randn(2, 1, 64, 96)
    assert torch.cat(encoder_of(model)(scan), 1).shape == (2, 384, 4, 6)
    assert model(scan).shape == (2, 5, 64, 96)
    with pytest.raises(PlanError, match=r"60 × 96 voxels \(y, x\)"):
        model(scan[:, :, :60])


@pytest.mark.parametrize("classes", [2, 15])
def test_the_base_decoder_has_the_published_widths(classes):
    """meddinov3.md 2.2 and 6.1 (11): 25.08 M parameters, and 1.57 M of the single-scale network."""
    with torch.device("meta"):
        model = network(classes=classes, embed_dim=768, depth=12, num_heads=12)
        single = network(classes=classes, embed_dim=768, depth=12, num_heads=12, taken=[11])
    widths = [stage[0].weight.shape[:2] for stage in model.decoder.stages]
    assert widths == [(3072, 1536), (1536, 768), (768, 384), (384, 192)]
    count = sum(p.numel() for p in model.decoder.parameters())
    assert count == 25_076_160 + 192 * classes + classes
    assert model.encoder.taken == [2, 5, 8, 11]
    widths = [stage[0].weight.shape[:2] for stage in single.decoder.stages]
    assert widths == [(768, 384), (384, 192), (192, 96), (96, 48)]
    assert sum(p.numel() for p in single.decoder.parameters()) / 1e6 == pytest.approx(1.57, abs=0.005)
    assert model.encoder.output_channels == [768] * 4


def test_the_norm_over_channels_is_primus():
    """meddinov3.md 6.1 (17)."""
    ours, theirs = ChannelNorm(6, eps=1e-6), LayerNormNd(6)
    with torch.no_grad():
        for norm in (ours, theirs):
            norm.weight.copy_(torch.arange(6.0))
            norm.bias.copy_(torch.arange(6.0) / 7)
    x = 3 * torch.randn(2, 6, 5, 4) + 1
    assert (ours(x) - theirs(x)).abs().max() < 1e-5


def test_every_parameter_learns():
    model = network().train()
    model(torch.randn(2, 1, 32, 32)).square().mean().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]


def test_checkpointing_changes_no_gradient():
    gradients, image = [], torch.randn(3, 1, 32, 32)
    for again in (False, True):
        model = network(use_checkpoint=again, drop_path=0.0).train()
        model(image).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.allclose(*gradients, atol=1e-7)


def test_there_is_one_output():
    assert not has_deep_supervision(architecture())
    with pytest.raises(ValueError, match="one output"):
        build_network(architecture(), 1, 2, deep_supervision=True)


def test_the_encoder_moves_between_networks_with_other_channels_and_classes():
    source, target = network(channels=3, classes=2), network(channels=2, classes=7)
    report = transfer(source.encoder.state_dict(), encoder_of(target))
    assert report.encoder_share == 1
    assert [name for name, _ in report.adapted] == ["patch_embed.proj.weight"]
    assert torch.equal(target.encoder.blocks[3].mlp.fc1.weight, source.encoder.blocks[3].mlp.fc1.weight)
