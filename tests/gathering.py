"""Two processes in tests of gathered terms: real ones, which import little as they start afresh, and threads in their place."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import distributed, nn

from pretrain.distributed import average_gradients, gather, mean


def data() -> tuple[torch.Tensor, nn.Linear]:
    """Four samples and a model."""
    torch.manual_seed(0)
    return torch.randn(4, 3, dtype=torch.float64), nn.Linear(3, 2).double()


def joint_term(z: torch.Tensor) -> torch.Tensor:
    """A term that is not a mean over samples: the entropy of the mean prediction, as in PUMIT."""
    p = z.softmax(1).mean(0)
    return (p * p.log()).sum()


MEASURED = [{"everywhere": 1.0, "first": 4.0}, {"last": 5.0, "everywhere": 3.0}]
"""What each process has measured: not all the same, nor in one order."""


def one_process(rank: int, place: str) -> None:
    """Half of the samples, in one of two processes; leaves the value, the averaged gradients and the
    mean of what was measured in `place`."""
    distributed.init_process_group("gloo", init_method=f"file://{place}/meet", rank=rank, world_size=2)
    x, model = data()
    z = model(x[2 * rank : 2 * rank + 2])
    joint = joint_term(gather(z))
    (joint + (z**2).mean()).backward()
    for name in ("only_here", "nowhere"):
        model.register_parameter(name, nn.Parameter(torch.zeros(1, dtype=torch.float64)))
    if rank == 0:
        model.only_here.grad = torch.ones(1, dtype=torch.float64)
    average_gradients(model.parameters())
    gradients = {name: p.grad for name, p in model.named_parameters()}
    means = mean(MEASURED[rank], torch.device("cpu"))
    torch.save({"joint": joint.detach(), "gradients": gradients, "means": means}, f"{place}/{rank}.pt")
    distributed.destroy_process_group()


def two_threads(
    compute: Callable[[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]], Any], parts: Sequence
) -> list:
    """What `compute(part, gather)` returns in each of two threads that exchange what they gather, in one graph."""
    meet, slots, found = threading.Barrier(2, timeout=60), [torch.empty(0)] * 2, [None, None]

    def rank(number: int) -> None:
        def exchange(tensor: torch.Tensor) -> torch.Tensor:
            slots[number] = tensor
            meet.wait()
            both = torch.cat(slots)
            meet.wait()  # before a slot is used again
            return both

        found[number] = compute(parts[number], exchange)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found
