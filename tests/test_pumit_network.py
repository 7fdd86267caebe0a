"""PUMIT's segmentation network: shapes for every DA, its encoder, what the trainer and the transfer ask of it."""

from __future__ import annotations

import pydoc

import pytest
import torch

from planners.anisotropy import strides_of_degree
from planners.errors import PlanError
from pretrain.encoders import encoder_of
from pretrain.networks.registry import build_network, has_deep_supervision
from pretrain.transfer import transfer

DEGREES = range(6)


def architecture(degree, **changes) -> dict:
    arguments = {
        "strides": strides_of_degree(degree, 6),
        "features_per_stage": [4, 5, 6, 7, 8, 9],
        "embed_dim": 24,
        "depth": 4,
        "num_heads": 2,
    }
    return {
        "network_class_name": "pretrain.networks.PUMIT",
        "arch_kwargs": {**arguments, **changes},
        "_kw_requires_import": [],
    }


def network(degree, *, deep_supervision=False, channels=2, **changes):
    torch.manual_seed(5)
    return build_network(architecture(degree, **changes), channels, 3, deep_supervision=deep_supervision)


def patch(degree) -> list[int]:
    return [max(32 >> degree, 1), 32, 64]


def test_nnunet_locates_the_class():
    assert pydoc.locate("pretrain.networks.PUMIT").__name__ == "PUMIT"


@pytest.mark.parametrize("degree", DEGREES)
def test_outputs_lie_on_the_four_finest_levels(degree):
    size = patch(degree)
    outputs = network(degree, deep_supervision=True)(torch.randn(1, 2, *size))
    expected = [[max(size[0] >> max(m - degree, 0), 1), 32 >> m, 64 >> m] for m in range(4)]
    assert [list(output.shape) for output in outputs] == [[1, 3, *grid] for grid in expected]


@pytest.mark.parametrize("degree", DEGREES)
def test_without_deep_supervision_there_is_one_output_the_same(degree):
    model = network(degree, deep_supervision=True).eval()
    image = torch.randn(1, 2, *patch(degree))
    with torch.no_grad():
        finest = model(image)[0]
        model.decoder.deep_supervision = False
        assert torch.equal(model(image), finest)
    assert has_deep_supervision(architecture(degree))


@pytest.mark.parametrize("degree", DEGREES)
def test_kernels_are_flat_where_slices_are_thicker_than_pixels(degree):
    decoder = network(degree).decoder
    fine = [block.convs[0].conv.kernel_size[0] for block in decoder.fine]
    joined = [block.convs[0].conv.kernel_size[0] for block in decoder.join]
    assert fine == [3 if level >= degree else 1 for level in (0, 1)]
    assert joined == [3 if level >= degree else 1 for level in (4, 3, 2, 1, 0)]


@pytest.mark.parametrize("degree", DEGREES)
def test_the_encoder_gives_four_maps_of_tokens(degree):
    encoder = encoder_of(network(degree))
    size = patch(degree)
    maps = encoder(torch.randn(1, 2, *size))
    stride = [max(16 >> degree, 1), 16, 16]
    assert encoder.strides == [stride, [1, 1, 1], [1, 1, 1], [1, 1, 1]]
    assert [list(m.shape[1:]) for m in maps] == [[24, *(n // s for n, s in zip(size, stride, strict=True))]] * 4


@pytest.mark.parametrize(("depth", "taken"), [(12, [3, 5, 7, 11]), (24, [7, 11, 15, 23]), (4, [0, 1, 2, 3])])
def test_the_blocks_that_are_decoded_are_the_authors(depth, taken):
    with torch.device("meta"):
        assert network(0, depth=depth).encoder.taken == taken


def test_maps_are_the_grid_of_their_tokens():
    model = network(2).eval()
    image = torch.randn(1, 2, 8, 32, 64)
    with torch.no_grad():
        hidden = model.encoder.vit(image, 2, return_blocks=[3])[0]
        last = model.encoder(image)[-1]
    assert torch.equal(last[0, :, 1, 1, 2], hidden[0, 1 + 8 + 4 + 2])


def test_layers_are_all_parameters_of_the_encoder_once():
    encoder = network(1).encoder
    layers = encoder.layers()
    assert len(layers) == 1 + 4 + 1
    flat = [id(parameter) for layer in layers for parameter in layer]
    assert len(flat) == len(set(flat))
    assert set(flat) == {id(parameter) for parameter in encoder.parameters()}
    assert any(parameter is encoder.vit.pos_embed for parameter in layers[0])


def test_an_encoder_fills_a_network_for_other_slices_wholly():
    source, target = network(0).encoder, network(3, deep_supervision=True)
    report = transfer(source.state_dict(), target.encoder)
    assert (report.encoder_share, report.adapted, report.new) == (1.0, (), ())
    image = torch.randn(1, 2, 4, 32, 32)
    thin = image.repeat_interleave(8, 2)
    with torch.no_grad():
        maps = zip(target.encoder(image), source(thin), strict=True)
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in maps)


def test_positions_and_channels_of_other_weights_are_adapted():
    """The table of positions comes first and looks like a kernel of as many channels as a token has features."""
    source, target = network(0, channels=3).encoder, network(0, channels=1).encoder
    tensors = source.state_dict()
    tensors["vit.pos_embed"] = torch.arange(3.0).view(1, 1, 3, 1, 1).expand(1, 24, 3, 4, 4)
    report = transfer(tensors, target)
    assert report.encoder_share == 1
    assert dict(report.adapted) == {
        "vit.pos_embed": "positions (3, 4, 4) to (5, 10, 10) by linear interpolation",
        "vit.patch_embed.proj.weight": "input channels 3 to 1 by the sum, spread evenly",
    }
    along_depth = target.vit.pos_embed[0, 0, :, 7, 2].tolist()
    assert along_depth == pytest.approx([0, 0.5, 1, 1.5, 2])
    weight, kept = target.vit.patch_embed["proj"].weight, tensors["vit.patch_embed.proj.weight"]
    assert torch.allclose(weight, kept.sum(1, keepdim=True))


def test_positions_of_tokens_with_other_features_are_not_used():
    tensors = {"vit.pos_embed": torch.zeros(1, 23, 5, 10, 10)}
    report = transfer(tensors, network(0).encoder, minimum_share=0)
    assert ("vit.pos_embed", "positions (1, 23, 5, 10, 10) against (1, 24, 5, 10, 10)") in report.new


def test_sizes_that_are_no_multiples_are_refused():
    with pytest.raises(PlanError, match="multiples of 8 × 32 × 32"):
        network(2)(torch.zeros(1, 2, 8, 48, 32))


def test_a_coarsest_map_of_one_voxel_is_refused():
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        network(1)(torch.zeros(1, 2, 16, 32, 32))


def test_strides_that_belong_to_no_degree_are_refused():
    strides = strides_of_degree(1, 6)
    strides[4] = [1, 2, 2]
    with pytest.raises(ValueError, match="there is no network with strides"):
        network(1, strides=strides)
    with pytest.raises(ValueError, match="there is no network with strides"):
        network(1, strides=strides_of_degree(1, 5))
