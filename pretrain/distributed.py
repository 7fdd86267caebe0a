"""Several processes: the mean of gradients, and tensors of all processes put together. On one process nothing happens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn


def several() -> bool:
    """Whether this is one of several processes."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def processes() -> int:
    """How many there are."""
    return distributed.get_world_size() if several() else 1


def gather(tensor: Tensor) -> Tensor:
    """Concatenate (n, …) of every process to (processes · n, …), differentiably; n must be the same everywhere.

    Where all processes compute the same loss from the result, the mean of their gradients is the gradient of that loss on the
    joint batch.
    """
    return _Gather.apply(tensor) if several() else tensor


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # Each process holds the derivative of its own copy of the loss; their sum is what the mean of gradients divides.
        total = gradients[0].contiguous()
        distributed.all_reduce(total)
        return total.chunk(distributed.get_world_size())[distributed.get_rank()]


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes; missing where no process has one."""
    if not several():
        return
    listed = list(parameters)
    has = torch.tensor([p.grad is not None for p in listed], dtype=torch.uint8, device=listed[0].device)
    distributed.all_reduce(has, op=distributed.ReduceOp.MAX)
    chosen = [p for p, there in zip(listed, has.tolist(), strict=True) if there]
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in chosen])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for parameter, gradient in zip(chosen, flat.split([p.numel() for p in chosen]), strict=True):
        parameter.grad = gradient.view_as(parameter)


def equal_start(module: nn.Module) -> None:
    """Give every process the weights and buffers of the first."""
    if several():
        for tensor in module.state_dict().values():
            distributed.broadcast(tensor, 0)


def mean(values: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """The mean of each number over the processes that have it."""
    if not several():
        return dict(values)
    found: list[list[str]] = [[]] * distributed.get_world_size()
    distributed.all_gather_object(found, list(values))
    names = list(dict.fromkeys(name for names in found for name in names))
    sums = torch.tensor([values.get(name, 0.0) for name in names], dtype=torch.float64, device=device)
    distributed.all_reduce(sums)
    return {name: total / sum(name in one for one in found) for name, total in zip(names, sums.tolist(), strict=True)}


def largest(number: int, device: torch.device) -> int:
    """The largest of the processes' numbers."""
    if not several():
        return number
    shared = torch.tensor(number, device=device)
    distributed.all_reduce(shared, op=distributed.ReduceOp.MAX)
    return int(shared)
