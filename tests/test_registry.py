"""Only names of the exact table are built; everything else is refused before anything is imported."""

import copy
import os

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from planners.errors import PlanError, UnsafeFile
from pretrain.networks.registry import LAYERS, NETWORKS, build_network, check_architecture
from tests.tiny import tiny_plan

ARCHITECTURE = tiny_plan()["configurations"]["3d_fullres"]["architecture"]
MALICIOUS = [
    "torch.nn.functional.torch.hub.os.system",
    "dynamic_network_architectures.architectures.unet.torch.hub.os.system",
    "os.system",
    "torch.nn.Module",
    "",
    ["torch.nn.LeakyReLU"],
    7,
]


@pytest.mark.parametrize("name", MALICIOUS)
@pytest.mark.parametrize("place", ["network", "nonlin", "norm_op", "conv_op"])
def test_names_outside_the_table_are_refused_and_nothing_runs(name, place, monkeypatch):
    ran = []
    monkeypatch.setattr(os, "system", lambda *a, **k: ran.append(a))
    architecture = copy.deepcopy(ARCHITECTURE)
    if place == "network":
        architecture["network_class_name"] = name
    else:
        architecture["arch_kwargs"][place] = name
    with pytest.raises(UnsafeFile) as caught:
        build_network(architecture, 1, 3, deep_supervision=True)
    assert caught.value.exit_code == 2
    assert not ran


def test_only_the_four_layer_arguments_may_be_imported():
    architecture = copy.deepcopy(ARCHITECTURE)
    architecture["arch_kwargs"]["block"] = "torch.nn.LeakyReLU"
    architecture["_kw_requires_import"] = [*architecture["_kw_requires_import"], "block"]
    with pytest.raises(UnsafeFile, match="_kw_requires_import"):
        check_architecture(architecture)


def test_an_architecture_without_a_network_is_a_plan_error():
    with pytest.raises(PlanError, match="network_class_name"):
        check_architecture({"arch_kwargs": {}})


@pytest.mark.parametrize("names", LAYERS.values(), ids=LAYERS)
def test_every_layer_of_the_table_exists(names):
    for path in names.values():
        assert issubclass(getattr(torch.nn, path.rpartition(".")[2]), torch.nn.Module)


@pytest.mark.parametrize("network", [name for name in NETWORKS if name.startswith("dynamic_network_architectures")])
def test_the_network_is_the_one_nnunet_builds(network):
    architecture = copy.deepcopy(ARCHITECTURE)
    architecture["network_class_name"] = network
    if "PlainConv" in network:
        architecture["arch_kwargs"]["n_conv_per_stage"] = architecture["arch_kwargs"].pop("n_blocks_per_stage")
    torch.manual_seed(3)
    ours = build_network(architecture, 2, 3, deep_supervision=True)
    torch.manual_seed(3)
    stock = get_network_from_plans(
        network, architecture["arch_kwargs"], architecture["_kw_requires_import"], 2, 3, True, True
    )
    assert type(ours) is type(stock)
    theirs = stock.state_dict()
    assert ours.state_dict().keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.state_dict().items())
