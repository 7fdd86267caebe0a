"""DINOv3's ViT: timm's answers under timm's names, positions, masks, drop path (meddinov3.md 2.1, 3, 4 and 6.1)."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn

from planners.errors import PlanError
from pretrain.networks.dino_vit import DinoViT, four_blocks
from pretrain.transfer import transfer


def vit(channels=1, *, depth=3, **options) -> DinoViT:
    torch.manual_seed(3)
    network = DinoViT(channels, 24, depth, 2, **options).eval()
    for block in network.blocks:  # as new, a block adds so little that its errors would not be seen
        nn.init.ones_(block.gamma_1)
        nn.init.ones_(block.gamma_2)
    return network


def image(*shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("channels", "sizes", "millions"),
    [(1, (192, 12, 3), 5.4), (1, (384, 12, 6), 21.39), (3, (768, 12, 12), 85.64)],
    ids=["tiny", "small", "base"],
)
def test_sizes_have_the_parameters_of_the_specification(channels, sizes, millions):
    """meddinov3.md 3 and 5; base is the released network."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in DinoViT(channels, *sizes).parameters())
    assert parameters / 1e6 == pytest.approx(millions, abs=0.02)


@pytest.mark.parametrize(("variant", "bias"), [("", False), ("_qkvb", True)])
@pytest.mark.parametrize("size", [(64, 64), (96, 160)])
def test_answers_are_those_of_timms_dinov3_with_the_same_tensors(variant, bias, size):
    """timm's class with fp32 rotation and equal eps gives Meta's numbers (meddinov3.md 4: difference 0.0)."""
    theirs = timm.create_model(
        f"vit_base_patch16_dinov3{variant}", in_chans=2, num_classes=0, embed_dim=24, depth=4, num_heads=2
    ).eval()
    with torch.no_grad():
        for index, (name, parameter) in enumerate(theirs.named_parameters()):
            if "gamma" in name or "bias" in name:  # as new they are tiny or 0, and would hide a difference
                parameter.copy_(image(*parameter.shape, seed=index))
    ours = DinoViT(2, 24, 4, 2, taken=[0, 2, 3], qkv_bias=bias).eval()
    ours.load_state_dict(theirs.state_dict())
    scan = image(2, 2, *size)
    with torch.no_grad():
        expected = theirs.forward_intermediates(scan, indices=[0, 2, 3], norm=True, intermediates_only=True)
        for mine, other in zip(ours(scan), expected, strict=True):
            assert torch.equal(mine, other)
        class_token, patches = ours.tokens(scan)
        everything = theirs.forward_features(scan)
    assert torch.equal(class_token, everything[:, 0])
    assert torch.equal(patches, everything[:, 5:])


def test_the_released_base_network_has_these_tensors():
    """meddinov3.md 3: 162 entries; keys have no bias, and the mask token and the periods are no part of it."""
    with torch.device("meta"):
        state = DinoViT(3, 768, 12, 12).state_dict()
    assert len(state) == 162
    assert state["reg_token"].shape == (1, 4, 768)
    assert state["patch_embed.proj.weight"].shape == (768, 3, 16, 16)
    assert not [name for name in state if "qkv.bias" in name or "rope" in name or "mask" in name]


def test_the_blocks_are_those_of_the_paper():
    assert four_blocks(12) == [2, 5, 8, 11]
    assert four_blocks(4) == [0, 1, 2, 3]
    assert four_blocks(24) == [5, 11, 17, 23]


@pytest.mark.parametrize("size", [(16, 16), (64, 96), (32, 112)])
def test_any_multiple_of_16_has_a_map_of_each_block_taken(size):
    network = vit(2, depth=8)
    maps = network(image(2, 2, *size))
    assert [tuple(m.shape) for m in maps] == [(2, 24, size[0] // 16, size[1] // 16)] * 4
    with pytest.raises(PlanError, match=r"multiples of 16 × 16"):
        network(image(1, 2, size[0] + 8, size[1]))


def test_rotation_is_of_centres_in_the_unit_square():
    """meddinov3.md 6.1 (12), for 4 × 6 patches; the first period is 1, so the first angle is 2π times the coordinate."""
    rope = vit().rope
    sine = rope.get_embed((4, 6)).chunk(2, -1)[0].reshape(4, 6, 12)
    assert torch.allclose(sine[:, 0, 0], (2 * math.pi * torch.tensor([-0.75, -0.25, 0.25, 0.75])).sin(), atol=1e-6)
    columns = torch.tensor([-5, -3, -1, 1, 3, 5]) / 6
    assert torch.allclose(sine[0, :, 3], (2 * math.pi * columns).sin(), atol=1e-6)
    turned = rope.get_embed((6, 4)).chunk(2, -1)[0].reshape(6, 4, 12).transpose(0, 1)
    halves = [sine[..., start : start + 3] for start in (3, 0, 9, 6)]
    assert torch.allclose(turned, torch.cat(halves, -1), atol=1e-6)


def test_the_rotation_stays_in_single_precision_under_autocast():
    rope = vit().rope
    with torch.autocast("cpu", torch.bfloat16):
        found = rope.get_embed((5, 7))
    assert found.dtype == torch.float32
    assert torch.equal(found, rope.get_embed((5, 7)))


def test_prefix_tokens_are_not_rotated():
    """With patches that are all alike, class and storage tokens see the same whatever the positions; patches would not."""
    network = vit(depth=1)
    captured = {}
    attention = network.blocks[0].attn
    attention.q_norm.register_forward_hook(lambda _, __, q: captured.update(before=q))
    original = nn.functional.scaled_dot_product_attention

    def spy(q, *arguments, **options):
        captured["after"] = q
        return original(q, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr("timm.models.eva.F.scaled_dot_product_attention", spy)
        network(image(1, 1, 32, 48))
    assert torch.equal(captured["before"][:, :, :5], captured["after"][:, :, :5])
    assert not torch.isclose(captured["before"][:, :, 5:], captured["after"][:, :, 5:]).all(-1).any()


def test_positions_are_enlarged_in_training_only():
    network, scan = vit(rope_rescale=2.0), image(1, 1, 32, 48)
    assert torch.equal(network.tokens(scan)[1], vit().tokens(scan)[1])
    network.train()
    assert not torch.allclose(network.tokens(scan)[1], network.tokens(scan)[1])
    factors = []
    for _ in range(200):
        cosine = network.rope.get_embed((1, 2)).chunk(2, -1)[1]
        factors.append(float(cosine[0, 5].arccos() * network.rope.periods[2] / (2 * math.pi * 0.5)))  # centre at ±0.5
    assert 0.5 <= min(factors) < 0.6
    assert 1.7 < max(factors) <= 2


def test_masked_patches_are_the_mask_token_and_are_not_seen():
    network, scan, mask_token = vit(), image(2, 1, 32, 48), image(1, 24, seed=4)
    masked = torch.tensor([[0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0]]).bool()
    changed = scan.clone()
    changed[0, :, :16, 16:32] += 5
    changed[0, :, 16:, 16:32] -= 3
    first, second = (network.tokens(x, masked, mask_token)[1] for x in (scan, changed))
    assert torch.equal(first, second)
    assert torch.allclose(first[1], network.tokens(scan)[1][1], atol=1e-6)  # the image without a mask is as it was
    assert not torch.allclose(first, network.tokens(scan, masked, image(1, 24, seed=5))[1])


def test_the_mask_token_takes_the_place_of_the_embedding():
    network = vit(depth=1)
    with torch.no_grad():
        network.blocks[0].gamma_1.zero_()
        network.blocks[0].gamma_2.zero_()
        mask_token, masked = image(1, 24, seed=4), torch.tensor([[True, False]])
        _, patches = network.tokens(image(1, 1, 16, 32), masked, mask_token)
        assert torch.allclose(patches[0, 0], network.norm(mask_token[0]))


@pytest.mark.parametrize("some", [True, False])
def test_the_mask_token_learns_where_there_are_masks(some):
    """meddinov3.md 6.1 (10)."""
    network, mask_token = vit(), torch.zeros(1, 24, requires_grad=True)
    masked = torch.zeros(1, 6, dtype=torch.bool)
    masked[0, 2] = some
    network.tokens(image(1, 1, 32, 48), masked, mask_token)[1].square().sum().backward()
    assert bool((mask_token.grad != 0).any()) == some


def test_drop_path_is_the_same_in_all_blocks_and_off_in_evaluation():
    network = vit(depth=5, drop_path=0.3)
    paths = [path for block in network.blocks for path in (block.drop_path1, block.drop_path2)]
    assert all(isinstance(path, DropPath) for path in paths)
    assert [path.drop_prob for path in paths] == [0.3] * 10
    scan = image(1, 1, 32, 32)
    assert torch.equal(network.tokens(scan)[1], vit(depth=5).tokens(scan)[1])


def test_three_grey_channels_give_what_one_channel_with_the_summed_kernel_gives():
    """meddinov3.md 6.1 (13), by the rule of the transfer."""
    grey = vit(3)
    scan = image(1, 1, 32, 48)
    expected = grey.tokens(scan.expand(-1, 3, -1, -1))[1]
    for channels in (1, 2):
        network = vit(channels)
        report = transfer(grey.state_dict(), network)
        assert report.encoder_share == 1
        found = network.tokens(scan.expand(-1, channels, -1, -1))[1]
        assert (found - expected).abs().max() < 1e-5


def test_layers_hold_every_parameter_once():
    network = vit()
    listed = [id(p) for layer in network.layers() for p in layer]
    assert sorted(listed) == sorted(id(p) for p in network.parameters())
    assert len(network.layers()) == 5


def test_checkpointed_blocks_give_the_same_gradients():
    gradients = []
    for again in (False, True):
        network = vit(drop_path=0.2).train()
        network.set_grad_checkpointing(again)
        torch.manual_seed(1)
        network.tokens(image(2, 1, 32, 32))[1].square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]))
    assert torch.allclose(*gradients, atol=1e-7)


def test_heads_must_hold_pairs_of_pairs_of_channels():
    with pytest.raises(ValueError, match="4, 8, 12"):
        DinoViT(1, 36, 1, 6)
