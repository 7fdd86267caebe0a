"""What each of two processes does in the tests of terms and numbers of both. Imports little: both processes start afresh."""

from __future__ import annotations

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
