"""torch's optimisers without what keeps its compiler from tracing them.

torch wraps the methods of its optimisers so that a compiled function leaves them alone. The wrappers import the compiler at the
first call, which takes almost as long as importing torch. Networks are compiled here, never a step of the optimiser.
"""

from __future__ import annotations

from typing import Any

import torch


def _inside(method: Any) -> Any:
    """The method that a wrapper calls (`functools.wraps` keeps it), or itself where torch wraps it no more."""
    return getattr(method, "__wrapped__", method)


class _Unwrapped(torch.optim.Optimizer):
    add_param_group = _inside(torch.optim.Optimizer.add_param_group)
    load_state_dict = _inside(torch.optim.Optimizer.load_state_dict)
    state_dict = _inside(torch.optim.Optimizer.state_dict)
    zero_grad = _inside(torch.optim.Optimizer.zero_grad)


class Adam(_Unwrapped, torch.optim.Adam):
    """torch.optim.Adam, whose step is not differentiated."""

    step = torch.no_grad()(_inside(torch.optim.Adam.step))


class AdamW(_Unwrapped, torch.optim.AdamW):
    """torch.optim.AdamW, whose step is not differentiated."""

    step = torch.no_grad()(_inside(torch.optim.AdamW.step))


class SGD(_Unwrapped, torch.optim.SGD):
    """torch.optim.SGD, whose step is not differentiated."""

    step = torch.no_grad()(_inside(torch.optim.SGD.step))
