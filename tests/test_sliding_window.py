"""Logits in slabs: nnU-Net's weighted mean of windows in single precision, without the volume's logits in memory."""

import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from planners.errors import SettingsError
from tests.tiny import dataset_json, tiny_plan
from trainers import sliding_window
from trainers.predictor import AutosegPredictor
from trainers.sliding_window import Windows


def predictor(dims=3, *, kind=AutosegPredictor, weights=1, **options):
    """A predictor with a small random network of three classes."""
    torch.manual_seed(0)
    conv = torch.nn.Conv3d if dims == 3 else torch.nn.Conv2d
    network = torch.nn.Sequential(conv(1, 3, 3, padding=1))
    manager = PlansManager(tiny_plan(dims=dims))
    made = kind(device=torch.device("cpu"), **options)
    states = [{k: v + fold for k, v in network.state_dict().items()} for fold in range(weights)]
    network.load_state_dict(states[0])
    settings = manager.get_configuration("3d_fullres" if dims == 3 else "2d")
    made.manual_initialization(network, manager, settings, states, dataset_json(), "nnUNetTrainer", (0, 1))
    return made


def volume(*shape):
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))


def nnunets_in_single_precision(data, dims):
    """The loop of nnU-Net's predictor with its windows, its mirroring and its Gaussian, but float32."""
    stock = predictor(dims, kind=nnUNetPredictor, allow_tqdm=False)
    patch = tuple(stock.configuration_manager.patch_size)
    weights = compute_gaussian(patch, 1 / 8, 10, torch.float32, torch.device("cpu"))
    total, weight_sum = torch.zeros(3, *data.shape[1:]), torch.zeros(data.shape[1:])
    with torch.inference_mode():
        for window in stock._internal_get_sliding_window_slicers(data.shape[1:]):
            total[window] += stock._internal_maybe_mirror_and_predict(data[window][None].contiguous())[0] * weights
            weight_sum[window[1:]] += weights
    return total / weight_sum


@pytest.mark.parametrize(("dims", "shape"), [(3, (21, 31, 23)), (3, (8, 24, 45)), (2, (5, 31, 23))], ids=str)
@pytest.mark.parametrize("together", [1, 2**20])
def test_logits_are_those_of_nnunet_in_single_precision(dims, shape, together, monkeypatch):
    monkeypatch.setattr("trainers.predictor._VOXELS_PER_FORWARD", {"cpu": together})
    data = volume(*shape)
    logits = predictor(dims).predict_logits_from_preprocessed_data(data)
    assert torch.allclose(logits, nnunets_in_single_precision(data, dims), atol=1e-5)


@pytest.mark.parametrize(("dims", "shape"), [(3, (5, 31, 17)), (3, (21, 9, 45)), (2, (3, 9, 31))], ids=str)
def test_a_volume_smaller_than_the_patch_is_padded_as_nnunet_does(dims, shape):
    data = volume(*shape)
    logits = predictor(dims).predict_logits_from_preprocessed_data(data)
    theirs = predictor(dims, kind=nnUNetPredictor, allow_tqdm=False).predict_logits_from_preprocessed_data(data)
    assert logits.shape == theirs.shape
    middle = (
        slice(None),
        *(slice(n // 3, -(n // 3)) for n in shape),
    )  # elsewhere their weights suffer from half precision
    assert torch.allclose(logits[middle], theirs.float()[middle], atol=0.02)


@pytest.mark.parametrize("patch", [(8, 24, 20), (7, 33, 5), (96, 1, 3), (24, 20)], ids=str)
def test_weights_are_those_of_nnunet(patch):
    windows = Windows((100, 40, 40), patch, 0.5)
    theirs = compute_gaussian(patch, 1 / 8, 1, torch.float32, torch.device("cpu"))
    assert torch.allclose(windows.weights.view(patch), theirs, rtol=1e-6, atol=0)
    total = torch.zeros(100, 40, 40)
    for z in windows.starts[0]:
        for y in windows.starts[1]:
            for x in windows.starts[2]:
                d, h, w = windows.size
                total[z : z + d, y : y + h, x : x + w] += windows.weights
    assert torch.allclose(windows.weight_sum(3, 50), total[3:50], rtol=1e-5, atol=0)


def test_only_the_depth_of_a_window_is_in_memory(monkeypatch):
    monkeypatch.setattr("trainers.predictor._VOXELS_PER_FORWARD", {"cpu": 1})
    made = []
    zeros = sliding_window._zeros
    monkeypatch.setattr(sliding_window, "_zeros", lambda shape, device: made.append(shape) or zeros(shape, device))
    sizes = [slab.shape[1] for slab in predictor().logit_slabs(volume(60, 24, 20))]
    assert made == [(3, 8, 24, 20)]
    assert sizes == [4] * 15  # halves of a window


def test_the_network_sees_air_only_once():
    asked = []
    made = predictor()
    made.network.register_forward_pre_hook(lambda _, inputs: asked.append(len(inputs[0])))
    data = torch.full((1, 60, 24, 20), -1.0)
    data[:, 50:] = volume(10, 24, 20)
    logits = made.predict_logits_from_preprocessed_data(data)
    windows = len(Windows(data.shape[1:], (8, 24, 20), 0.5).starts[0])
    assert sum(asked) / 4 < windows / 2
    assert torch.allclose(logits, nnunets_in_single_precision(data, 3), atol=1e-5)


def test_constant_windows_of_other_values_and_folds_have_other_answers():
    data = torch.cat([torch.full((1, 16, 24, 20), value) for value in (-1.0, 2.0, -1.0)], dim=1)
    one = [predictor(weights=1), predictor(weights=2), predictor(weights=2)]
    one[1].list_of_parameters = one[1].list_of_parameters[1:]
    one[1].network.load_state_dict(one[1].list_of_parameters[0])
    first, second, both = (made.predict_logits_from_preprocessed_data(data) for made in one)
    assert torch.allclose(first, nnunets_in_single_precision(data, 3), atol=1e-5)
    assert torch.allclose((first + second) / 2, both, atol=1e-4)
    assert not torch.allclose(first, second, atol=0.1)


def test_bfloat16_is_only_for_cpus_that_have_it(monkeypatch):
    monkeypatch.setattr("trainers.predictor.cpu_has_bfloat16", lambda: False)
    with pytest.raises(SettingsError, match="would be slower"):
        predictor(precision="bfloat16")
    with pytest.raises(SettingsError, match="No such precision"):
        predictor(precision="float16")


def test_bfloat16_is_what_the_network_computes_in(monkeypatch):
    monkeypatch.setattr("trainers.predictor.cpu_has_bfloat16", lambda: True)
    data, kinds = volume(21, 31, 23), []
    reduced, exact = predictor(precision="bfloat16"), predictor()
    for made in (reduced, exact):
        made.network.register_forward_hook(lambda _module, _inputs, output: kinds.append(output.dtype))
    logits = reduced.predict_logits_from_preprocessed_data(data)
    difference = (logits - exact.predict_logits_from_preprocessed_data(data)).abs().max()
    assert (kinds[0], kinds[-1], logits.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert 0 < difference < 0.05


def test_a_network_is_compiled_once_and_takes_the_weights_of_each_fold(monkeypatch):
    class Compiled:
        def __init__(self, network):
            self._orig_mod = network
            compiled.append(self)

        def __call__(self, x):
            return self._orig_mod(x)

        def __len__(self):
            raise TypeError("as torch's compiled networks do where the network has no length")

    compiled = []
    monkeypatch.setattr("trainers.predictor.has_compiler", lambda: True)
    monkeypatch.setattr(torch, "compile", Compiled)
    data, made = volume(21, 31, 23), predictor(weights=2, compiled=True)
    results = [made.predict_logits_from_preprocessed_data(data) for _ in range(2)]
    assert len(compiled) == 1
    assert torch.equal(*results)
    assert torch.equal(results[0], predictor(weights=2).predict_logits_from_preprocessed_data(data))


def test_compiling_needs_a_compiler(monkeypatch):
    monkeypatch.setattr("trainers.predictor.has_compiler", lambda: False)
    with pytest.raises(SettingsError, match=r"C\+\+ compiler"):
        predictor(compiled=True)
