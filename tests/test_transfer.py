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


def u_net(dims: int = 3, *, depths: tuple[int, ...] = (3, 3, 3), upsampling: int = 2, seed: int = 0):
    torch.manual_seed(seed)
    plan = tiny_plan(dims=dims)
    name = "3d_fullres" if dims == 3 else "2d"
    arguments = plan["configurations"][name]["architecture"]["arch_kwargs"]
    arguments["kernel_sizes"] = [[depth, 3, 3][3 - dims :] for depth in depths]
    arguments["strides"] = [[1, 1, 1][3 - dims :], *[[upsampling, 2, 2][3 - dims :]] * 2]
    return build_segmentation_network(plan, name, dataset_json(), deep_supervision=False).eval()


def volume(image: torch.Tensor, slices: int = 24) -> torch.Tensor:
    """(B, C, y, x) repeated along the slices."""
    return image.unsqueeze(2).expand(-1, -1, slices, -1, -1)


def test_a_3d_network_in_2d_answers_as_for_a_volume_of_equal_slices():
    source, target = u_net(), u_net(2, seed=1)
    report = transfer(source.state_dict(), target)
    assert (report.new, report.unused, report.encoder_share) == ((), (), 1.0)
    assert {rule for _, rule in report.adapted} == {"3d to 2d by the sum over depth", "3d to 2d by the mean over depth"}
    weight, flat = (network.encoder.stages[1].blocks[0].conv1.conv.weight for network in (source, target))
    assert torch.allclose(weight.sum(2), flat, atol=1e-6)
    weight, flat = (network.decoder.transpconvs[0].weight for network in (source, target))
    assert torch.allclose(weight.mean(2), flat, atol=1e-6)


def test_a_2d_network_in_3d_answers_as_for_each_slice():
    source = u_net(2)
    image = torch.randn(1, 1, 16, 24, generator=torch.Generator().manual_seed(0))
    for depths, upsampling in (((1, 1, 1), 1), ((1, 3, 3), 2)):
        target = u_net(depths=depths, upsampling=upsampling, seed=1)
        report = transfer(source.state_dict(), target)
        assert (report.new, report.unused, report.encoder_share) == ((), (), 1.0)
        with torch.no_grad():
            output = target(volume(image))
            expected = source(image)
        assert torch.allclose(output[:, :, 12], expected, atol=1e-4)  # centre slices: the kernels reach no border


@pytest.mark.parametrize(("old", "new"), [(1, 2), (2, 1)])
def test_up_sampling_kernels_are_repeated_or_averaged_along_the_slices(old, new):
    source, target = u_net(upsampling=old), u_net(upsampling=new, seed=1)
    report = transfer(source.state_dict(), target)
    assert report.new == ()
    weight, other = (network.decoder.transpconvs[0].weight for network in (source, target))
    assert weight.shape[2] == old
    assert torch.allclose(other, weight.mean(2, keepdim=True).expand_as(other), atol=1e-6)


def test_a_deeper_target_says_which_stages_are_new_and_a_shallower_one_which_are_unused():
    deep, shallow = encoder(seed=0), torch.nn.Module()
    tensors = {name: tensor for name, tensor in short_names(deep).items() if not name.startswith("stages.2.")}
    report = transfer(tensors, encoder(seed=1), minimum_share=0.1)
    assert {why for _, why in report.new} == {"the pretrained network has no stages.2"}
    shallow.stem, shallow.stages = encoder(seed=1).stem, torch.nn.ModuleList(encoder(seed=1).stages[:2])
    report = transfer(short_names(deep), shallow)
    assert report.encoder_share == 1.0
    assert all(name.startswith("stages.2.") for name in report.unused)


class Positions(torch.nn.Module):
    """A table of positions, and an index derived from its size."""

    def __init__(self, grid: tuple[int, ...], extra: int, index: int = 4) -> None:
        super().__init__()
        tokens = extra + int(torch.tensor(grid).prod())
        self.table = torch.nn.Parameter(torch.randn(1, tokens, 3))
        self.register_buffer("index", torch.arange(index))
        self.register_buffer("steps", torch.tensor(extra))
        self.position_grids = {"table": grid}


@pytest.mark.parametrize(("old", "new"), [(1, 0), (1, 1), (3, 1)])
def test_position_tables_keep_the_class_tokens_the_target_has(old, new):
    source, target = Positions((2, 3, 4), old), Positions((4, 3, 1), new)
    places = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(3), torch.arange(4), indexing="ij"), -1)
    with torch.no_grad():
        source.table[:, old:] = places.view(1, 24, 3).float()
    report = transfer(source.state_dict(), target, position_grids=source.position_grids)
    assert report.encoder_share == 1.0
    assert torch.equal(target.table[:, :new], source.table[:, :new])
    grid = target.table[0, new:].view(4, 3, 1, 3)
    assert torch.allclose(grid[:, 0, 0, 0], torch.tensor([0, 1 / 3, 2 / 3, 1]), atol=1e-6)
    assert torch.allclose(grid[0, :, 0, 1], torch.tensor([0.0, 1, 2]))
    assert (grid[..., 2] == 1.5).all()  # one token along an axis takes its middle
    assert ("class tokens dropped" in report.adapted[0][1]) == (old > new)


def test_a_position_table_without_a_known_grid_or_with_too_few_class_tokens_is_not_used():
    source = Positions((2, 3, 4), 0)
    for target, grids in ((Positions((4, 3, 1), 0), {}), (Positions((4, 3, 1), 1), source.position_grids)):
        report = transfer(source.state_dict(), target, minimum_share=0.0, position_grids=grids)
        assert [name for name, _ in report.new] == ["table"]
    assert "grid (2, 3, 4)" in report.new[0][1]


def test_derived_tensors_are_compared_and_never_counted_nor_copied():
    source, target = Positions((2, 2, 2), 0), Positions((2, 2, 2), 0)
    target.steps += 5  # a counter
    report = transfer(source.state_dict(), target)
    assert (report.loaded, report.unused, report.encoder_share) == (("table",), (), 1.0)
    assert int(target.steps) == 5
    assert transfer(Positions((2, 2, 2), 0, index=9).state_dict(), target).unused == ()
    source.index += 1
    before = target.table.clone()
    with pytest.raises(PretrainedMismatch, match="index"):
        transfer(source.state_dict(), target, minimum_share=0.0)
    assert torch.equal(target.table, before)


def test_the_share_can_be_asked_of_a_part():
    tensors = {name: tensor for name, tensor in short_names(encoder(seed=0)).items() if name.startswith("stem.")}
    report = transfer(tensors, encoder(seed=1), part=("stem",))
    assert report.encoder_share < 0.1
    with pytest.raises(PretrainedMismatch, match=r"0 % of the encoder's stages"):
        transfer(tensors, encoder(seed=1), part=("stages",))
