"""The optimisers are torch's."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from pretrain.optimisers import SGD, Adam, AdamW

OPTIONS = {
    "Adam": {"amsgrad": True},
    "AdamW": {"betas": (0.9, 0.98), "weight_decay": 0.05},
    "SGD": {"momentum": 0.99, "nesterov": True},
}


def trained(kind, options) -> tuple[nn.Module, dict]:
    """A small network after three steps, the middle one of an optimiser that went on from its state."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    inputs = torch.randn(4, 5)
    optimizer = kind(network[0].parameters(), lr=0.03, **options)
    optimizer.add_param_group({"params": list(network[2].parameters()), "lr": 0.01})
    for step in range(3):
        optimizer.zero_grad()
        network(inputs).square().mean().backward()
        optimizer.step()
        if step == 1:
            state = optimizer.state_dict()
            optimizer = kind(network[0].parameters(), lr=0.5, **options)
            optimizer.add_param_group({"params": list(network[2].parameters())})
            optimizer.load_state_dict(state)
    return network, optimizer.state_dict()


@pytest.mark.parametrize("kind", [Adam, AdamW, SGD])
def test_steps_and_state_are_those_of_torch(kind):
    name = kind.__name__
    ours, our_state = trained(kind, OPTIONS[name])
    theirs, their_state = trained(getattr(torch.optim, name), OPTIONS[name])
    for mine, reference in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, reference)
    assert our_state["param_groups"] == their_state["param_groups"]


@pytest.mark.parametrize("kind", [Adam, AdamW, SGD])
def test_hooks_run_and_gradients_are_not_tracked(kind):
    seen = []
    parameter = nn.Parameter(torch.ones(2))
    optimizer = kind([parameter], lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    parameter.sum().backward()
    optimizer.step()
    assert len(seen) == 1
    assert parameter.is_leaf and parameter.grad_fn is None


def test_a_step_needs_no_compiler():
    program = (
        "import sys, torch; from pretrain.optimisers import AdamW, SGD\n"
        "for kind in (AdamW, SGD):\n"
        "    p = torch.nn.Parameter(torch.ones(2)); o = kind([p], lr=.1); p.sum().backward(); o.step(); o.zero_grad()\n"
        "    o.load_state_dict(o.state_dict())\n"
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
