"""Weights arrive whole, adapted by rule, or are accounted for as new and unused."""

import copy
import json

import pytest
import torch

from planners.errors import PretrainedMismatch
from pretrain.encoders import build_segmentation_network, encoder_of
from pretrain.transfer import distinct, transfer
from tests.tiny import dataset_json, tiny_plan


def encoder(channels: int = 1, depths: tuple[int, int, int] = (1, 3, 3), features: int = 8, seed: int = 0):
    torch.manual_seed(seed)
    plan = tiny_plan(channels=channels)
    arguments = plan["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    arguments["kernel_sizes"] = [[depth, 3, 3] for depth in depths]
    arguments["features_per_stage"] = [features, 16, 32]
    return encoder_of(build_segmentation_network(plan, "3d_fullres", dataset_json(channels)))


def short_names(module: torch.nn.Module) -> dict:
    state = module.state_dict()
    return {names[0]: state[names[0]].clone() for names in distinct(state.items())}


def test_equal_encoders_fit_wholly_and_aliases_count_once():
    source, target = encoder(seed=0), encoder(seed=1)
    report = transfer(short_names(source), target)
    assert report.encoder_share == 1.0
    assert (report.adapted, report.new, report.unused) == ((), (), ())
    assert len(report.loaded) == len(list(target.parameters()))
    assert all(
        torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True)
    )


def test_the_whole_network_can_be_the_target_and_only_its_encoder_is_counted():
    target = build_segmentation_network(tiny_plan(), "3d_fullres", dataset_json())
    source = {f"encoder.{name}": tensor for name, tensor in short_names(encoder(seed=1)).items()}
    report = transfer(source, target)
    assert report.encoder_share == 1.0
    assert report.new
    assert all(name.startswith("decoder.") for name, _ in report.new)


@pytest.mark.parametrize(("old", "new"), [(1, 3), (3, 1), (2, 5)])
def test_other_input_channels_keep_the_response_to_equal_channels(old, new):
    source, target = encoder(channels=old, seed=0), encoder(channels=new, seed=1)
    report = transfer(short_names(source), target)
    image = torch.randn(1, 1, 8, 24, 20)
    assert [rule for _, rule in report.adapted] == [f"input channels {old} to {new} by the sum, spread evenly"]
    weight, adapted = (e.stem.convs[0].conv.weight for e in (source, target))
    assert torch.allclose(weight.sum(1), adapted.sum(1), atol=1e-6)
    assert torch.allclose(adapted, adapted[:, :1].expand_as(adapted))
    # the sum over old channels answers to the same image in each of them
    expected = source(image.expand(-1, old, -1, -1, -1))[-1]
    assert torch.allclose(target(image.expand(-1, new, -1, -1, -1))[-1], expected, atol=1e-4)


@pytest.mark.parametrize(("old", "new"), [((1, 1, 1), (3, 3, 3)), ((3, 3, 3), (1, 1, 1))])
def test_other_kernel_depths_keep_the_response_to_volumes_constant_along_the_slices(old, new):
    source, target = encoder(depths=old, seed=0), encoder(depths=new, seed=1)
    report = transfer(short_names(source), target)
    assert report.encoder_share == 1.0
    assert report.adapted
    weight, other = (e.stem.convs[0].conv.weight for e in (source, target))
    # away from the borders a kernel meets equal slices, so only its sum over depth matters
    assert torch.allclose(weight.sum(2), other.sum(2), atol=1e-6)
    if new == (3, 3, 3):
        assert torch.count_nonzero(other[:, :, [0, 2]]) == 0


def test_what_does_not_fit_is_refused_with_a_table_and_nothing_changes():
    source, target = encoder(features=12), encoder(seed=1)
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(PretrainedMismatch, match=r"stem\.convs\.0\.conv\.weight") as caught:
        transfer(short_names(source), target)
    assert caught.value.exit_code == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())


def test_a_lower_share_is_reported_exactly():
    tensors = short_names(encoder(seed=0))
    removed = tensors.pop("stem.convs.0.conv.weight").numel()
    tensors["nonsense"] = torch.zeros(3)
    target = encoder(seed=1)
    report = transfer(tensors, target, minimum_share=0.5)
    assert report.encoder_share == pytest.approx(1 - removed / sum(p.numel() for p in target.parameters()))
    assert report.new == (("stem.convs.0.conv.weight", "not among the pretrained tensors"),)
    assert report.unused == ("nonsense",)
    assert json.loads(json.dumps(report.to_json()))["unused"] == ["nonsense"]
