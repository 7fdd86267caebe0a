"""PUMIT's ViT: sizes, rotation, positions, equal answers for repeated slices, masking (pumit.md 3.4 and 7)."""

from __future__ import annotations

import math

import pytest
import torch
from timm.layers import apply_rot_embed_cat
from torch.nn.functional import conv2d

from planners.errors import PlanError
from pretrain.networks.pumit_vit import ViT, resized_positions, rotary_angles, timm_names
from pretrain.networks.sac import Spacing


def vit(channels=1, *, depth=3) -> ViT:
    torch.manual_seed(3)
    return ViT(channels, 24, depth, 2).double().eval()


def image(*shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("sizes", "parameters"), [((768, 12, 12), 94_930_944), ((1024, 24, 16), 315_498_432)])
def test_base_and_large_have_the_published_number_of_parameters(sizes, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in ViT(3, *sizes).parameters()) == parameters


def test_published_tensors_have_a_place_each_and_the_shapes_fit():
    """pumit.md 6, base size."""
    block = {
        **{f"norm{n}.{kind}": (768,) for n in (1, 2) for kind in ("weight", "bias")},
        **{f"attn.{name}": (768,) for name in ("q_bias", "v_bias", "proj.bias")},
        **{f"attn.{name}.weight": (768, 768) for name in ("q_proj", "k_proj", "v_proj", "proj")},
        **{f"mlp.{name}.weight": (2048, 768) for name in ("w1", "w2")},
        **{f"mlp.{name}": (2048,) for name in ("w1.bias", "w2.bias", "ffn_ln.weight", "ffn_ln.bias")},
        "mlp.w3.weight": (768, 2048),
        "mlp.w3.bias": (768,),
    }
    published = {
        "cls_token": (1, 1, 768),
        "pos_embed": (1, 768, 5, 10, 10),
        "patch_embed.proj.weight": (768, 3, 16, 16, 16),
        "patch_embed.proj.bias": (768,),
        "norm.weight": (768,),
        "norm.bias": (768,),
        **{f"blocks.{number}.{name}": shape for number in range(12) for name, shape in block.items()},
    }
    with torch.device("meta"):
        state = ViT(3, 768, 12, 12).state_dict()
        renamed = timm_names({name: torch.empty(shape) for name, shape in published.items()})
    assert {name: tensor.shape for name, tensor in renamed.items()} == {n: t.shape for n, t in state.items()}


def test_heads_must_hold_pairs_of_pairs_of_channels():
    with pytest.raises(ValueError, match=r"4, 8, 12"):
        ViT(1, 36, 1, 6)


def test_the_angles_are_those_of_the_formula():
    angles = rotary_angles((2, 2, 3), 64)
    assert angles.shape == (12, 32)
    last = angles.reshape(2, 2, 3, 32)[1, 1, 1]
    assert last[:2].tolist() == pytest.approx([1.7848, 1.0457], abs=5e-5)
    one = angles.reshape(2, 2, 3, 32)[0, 1, 2]
    assert one[0] == 1  # row
    assert one[16] == 2  # column


def test_the_rotation_keeps_lengths_and_products_depend_on_distances_only():
    angles = rotary_angles((4, 5, 6), 8)
    table = torch.cat([angles.sin(), angles.cos()], -1).repeat_interleave(2, -1)
    query, key = image(8), image(8, seed=1)
    queries, keys = (apply_rot_embed_cat(v.repeat(120, 1), table).reshape(4, 5, 6, 8) for v in (query, key))
    assert torch.allclose(queries.norm(dim=-1), query.norm().expand(4, 5, 6), rtol=1e-12)
    here, shifted = queries[0, 1, 2] @ keys[1, 3, 1], queries[2, 2, 4] @ keys[3, 4, 3]
    assert float(here) == pytest.approx(float(shifted), rel=1e-12)
    assert abs(here - queries[0, 1, 2] @ keys[1, 3, 2]) > 1e-3


def test_positions_are_averaged_where_the_grid_shrinks_and_interpolated_where_it_grows():
    table = image(1, 3, 4, 2, 2)
    assert resized_positions(table, (4, 2, 2)) is table
    both = resized_positions(table, (2, 2, 4))
    pairs = table.reshape(1, 3, 2, 2, 2, 2).mean(3)
    assert torch.allclose(both[..., 0], pairs[..., 0])
    assert torch.allclose(both[..., 1], 0.75 * pairs[..., 0] + 0.25 * pairs[..., 1])


@pytest.mark.parametrize(("da", "depth"), enumerate([16, 8, 4, 2, 1, 1]))
def test_tokens_become_thinner_with_da(da, depth):
    network = vit()
    assert network(image(2, 1, 2 * depth, 32, 48), da).shape == (2, 1 + 2 * 2 * 3, 24)
    if depth > 1:
        with pytest.raises(PlanError, match="multiples"):
            network(image(1, 1, 2 * depth + 1, 32, 48), da)


@pytest.mark.parametrize("da", [1, 2, 3, 4])
def test_thick_slices_give_the_hidden_states_of_as_many_thin_ones(da):
    network = vit(2)
    thick = image(1, 2, 2 * (16 >> da), 32, 48)
    with torch.no_grad():
        found = network(thick, da, return_blocks=range(3))
        expected = network(thick.repeat_interleave(2**da, 2), 0, return_blocks=range(3))
    assert max((a - b).abs().max() for a, b in zip(found, expected, strict=True)) < 1e-12


@pytest.mark.parametrize("da", [4, 5])
def test_new_patch_kernels_give_every_da_the_answer_of_one_kernel_in_the_plane(da):
    torch.manual_seed(0)
    convolution = ViT(1, 24, 1, 2).patch_embed["proj"]
    weight = convolution.weight
    assert torch.equal(weight[:, :, :1].expand_as(weight), weight)
    plane = torch.randn(1, 1, 32, 48)
    found, _ = convolution(plane[:, :, None], Spacing(da))
    expected = conv2d(plane, weight.sum(2), convolution.bias, 16)
    assert torch.allclose(found[:, :, 0], expected, atol=1e-6)


def test_the_class_token_comes_first_and_has_no_position():
    network = vit(depth=1)
    with torch.no_grad():
        network.blocks[0].attn.proj.weight.zero_()
        network.blocks[0].mlp.fc2.weight.zero_()
    (alone,) = network(image(1, 1, 16, 32, 32), 0, return_blocks=[0])
    assert torch.equal(alone[0, 0], network.cls_token[0, 0])
    tokens, _ = network.patch_embed["proj"](image(1, 1, 16, 32, 32), Spacing(0))
    expected = tokens + resized_positions(network.pos_embed, (1, 2, 2))
    assert torch.allclose(alone[0, 1:].T, expected.flatten(2)[0])


VISIBLE = torch.tensor([[0, 2, 5], [1, 2, 3]])


def masked_patches_changed(pictures: torch.Tensor) -> torch.Tensor:
    """Other voxels in all tokens of the grid (1, 2, 3) but those in VISIBLE."""
    changed = pictures.clone()
    for sample, seen in enumerate(VISIBLE.tolist()):
        for token in set(range(6)) - set(seen):
            row, column = divmod(token, 3)
            changed[sample, :, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] += 5
    return changed


@pytest.mark.parametrize("options", [{}, {"mask_block": 0}, {"mask_block": 2}])
def test_what_is_masked_is_not_seen(options):
    network, pictures = vit(), image(2, 1, 4, 32, 48)
    if options:
        options["mask_token"] = image(1, 1, 24, seed=4)
    first = network(pictures, 2, VISIBLE, **options)
    assert first.shape == (2, 1 + (6 if options else 3), 24)
    assert torch.equal(first, network(masked_patches_changed(pictures), 2, VISIBLE, **options))
    assert not torch.equal(first, network(pictures + 1, 2, VISIBLE, **options))


def test_all_tokens_visible_in_any_order_are_what_no_mask_gives():
    network, pictures = vit(), image(2, 1, 4, 32, 48)
    order = torch.tensor([[5, 3, 1, 0, 2, 4]] * 2)
    plain, permuted = network(pictures, 2), network(pictures, 2, order)
    assert torch.allclose(plain[:, 1:][:, order[0]], permuted[:, 1:], atol=1e-12)
    assert torch.allclose(plain, network(pictures, 2, order, mask_token=image(1, 1, 24)), atol=1e-12)


def test_mask_tokens_are_bare_and_enter_before_their_block():
    network, pictures, mask = vit(depth=2), image(2, 1, 4, 32, 48), image(1, 1, 24, seed=4)
    with torch.no_grad():
        for block in network.blocks:
            block.attn.proj.weight.zero_()
            block.mlp.fc2.weight.zero_()
    before, after = network(pictures, 2, VISIBLE, return_blocks=[0, 1], mask_token=mask, mask_block=1)
    assert (before.shape, after.shape) == ((2, 4, 24), (2, 7, 24))
    hidden = [sorted(set(range(6)) - set(seen)) for seen in VISIBLE.tolist()]
    for sample, tokens in enumerate(hidden):
        assert torch.equal(after[sample, 1:][tokens], mask[0].expand(3, -1))
        assert torch.equal(after[sample, 1:][VISIBLE[sample]], before[sample, 1:])


def test_the_mask_token_and_the_visible_tokens_are_learned_from():
    network, mask = vit(), image(1, 1, 24).requires_grad_()
    network(image(2, 1, 4, 32, 48), 2, VISIBLE, mask_token=mask).square().sum().backward()
    assert mask.grad.abs().min() > 0
    assert all(parameter.grad.abs().max() > 0 for parameter in network.parameters())


def test_deeper_blocks_begin_with_smaller_additions():
    torch.manual_seed(0)
    network = ViT(1, 96, 4, 3)
    scales = [float(block.mlp.fc2.weight.std()) for block in network.blocks]
    assert scales == pytest.approx([0.02 / math.sqrt(2 * n) for n in range(1, 5)], rel=0.03)
