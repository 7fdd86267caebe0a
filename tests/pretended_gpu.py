"""A GPU that is not there: its tensors live on the CPU, but refuse to be mixed with tensors of the CPU, as a GPU's do.

Unlike PyTorch's `FakeTensorMode` it computes, so results can be compared and loops over data run; it also keeps what a real
GPU would have to be waited for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

GPU = torch.device("cuda", 0)
_aten = torch.ops.aten
_READ = (_aten._local_scalar_dense, _aten.nonzero, _aten.equal, _aten.masked_select)


class _OnGPU(torch.Tensor):
    """`held` is what it holds; views of it are views of that."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, real: torch.Tensor) -> _OnGPU:
        made = torch.Tensor._make_wrapper_subclass(
            cls, real.size(), strides=real.stride(), storage_offset=real.storage_offset(), dtype=real.dtype,
            device="meta", dispatch_device=True,
        )  # fmt: skip
        made.held = real
        return made

    def tolist(self) -> list:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        raise AssertionError(f"{operation} outside the block of pretended_gpu")


class _Mode(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        there = [t for t in tensors if isinstance(t, _OnGPU)]
        if operation is torch.ops.prim.device.default:
            return GPU
        packet = operation.overloadpacket
        copies = packet in (_aten._to_copy, _aten.copy_)
        if there and not copies and any(t.ndim for t in tensors if not isinstance(t, _OnGPU)):
            raise RuntimeError(f"{operation}: expected all tensors to be on the same device, found cuda:0 and cpu")
        target = kwargs.get("device")
        on_gpu = torch.device(target).type == "cuda" if target is not None else bool(there)
        if there and (packet in _READ or not on_gpu or _counts_mask(packet, args)):
            self.waits.append(str(packet))
        with unset_fake_temporarily():
            real_args, real_kwargs = tree_map_only(_OnGPU, lambda t: t.held, (args, kwargs))
            if target is not None and on_gpu:
                real_kwargs["device"] = "cpu"
            result = operation(*real_args, **real_kwargs)
            if packet is _aten._to_copy and on_gpu and not there:
                result = result.clone()  # as far from its source as a GPU is
        if operation._schema.is_mutable and tensors and isinstance(result, torch.Tensor):
            return args[0]
        return tree_map_only(torch.Tensor, _OnGPU, result) if on_gpu else result


def _counts_mask(packet: Any, args: tuple) -> bool:
    """Whether the places of a mask are looked for; to fill them with a number they are not."""
    if packet not in (_aten.index, _aten.index_put_):
        return False
    fills = packet is _aten.index_put_ and args[2].numel() == 1 and not isinstance(args[2], _OnGPU)
    return not fills and any(index is not None and index.dtype == torch.bool for index in args[1])


@contextmanager
def pretended_gpu() -> Iterator[list[str]]:
    """Within the block `GPU` can be used; gives the list of the operations that had to be waited for."""
    with FakeTensorMode(), _Mode() as mode:  # without the former PyTorch looks for the GPU's driver
        yield mode.waits


def content(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the pretended GPU as one of the CPU."""
    assert isinstance(tensor, _OnGPU), "a tensor of the CPU"
    return tensor.held
