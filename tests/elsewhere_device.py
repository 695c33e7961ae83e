"""A second device that every machine has, so that a tensor left on the CPU is found without a GPU.

Tensors of it hold their numbers on the CPU and say that they are elsewhere. An operation on one of
them and on a plain tensor fails, as on CUDA, but for what CUDA allows too: numbers (no dimensions),
copies, and places to index by. It goes by the name of "lazy", a type that nobody uses and whose
backward pass torch runs on the CPU; autograd, PEFT and transformers work on it as they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("lazy")
MIXED = {"aten::copy_", "aten::index", "aten::index_put", "aten::index_put_", "aten::_to_copy"}


class Far(torch.Tensor):
    """A tensor that is elsewhere."""

    @staticmethod
    def __new__(cls, held: torch.Tensor, requires_grad: bool = False):
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=DEVICE, requires_grad=requires_grad,
        )  # fmt: skip
        made.held = held
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Far({self.held})"

    def tolist(self):
        return self.held.tolist()

    @property
    def data(self):
        return Far(self.held)

    @data.setter
    def data(self, other):
        self.held = other.held

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        product = func in (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
        if product and args[0].dim() == 1:  # torch would squeeze in place: a shape here stays
            return (args[0].unsqueeze(0) @ args[1]).squeeze(0)
        with torch._C.DisableTorchFunctionSubclass():  # which would call a plain result Far
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Watch(TorchDispatchMode):
    """Sees what is made by a device's name, of which no tensor tells."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _run(func, args, kwargs):
    name, given = func._schema.name, tree_flatten((args, kwargs))[0]
    tensors = [x for x in given if isinstance(x, torch.Tensor)]
    far = [x for x in tensors if isinstance(x, Far)]
    if far and name not in MIXED and any(x.dim() for x in tensors if not isinstance(x, Far)):
        shapes = [f"{'elsewhere' if isinstance(x, Far) else 'cpu'} {(*x.shape,)}" for x in tensors]
        raise RuntimeError(f"{name}: tensors on two devices: {', '.join(shapes)}")
    wanted = kwargs.get("device")
    here = tree_map(lambda x: x.held if isinstance(x, Far) else x, (args, kwargs))
    if wanted is not None:
        here[1]["device"] = torch.device("cpu")
    found = func(*here[0], **here[1])
    if func._schema.is_mutable:
        return kwargs["out"] if "out" in kwargs else args[0] if name.endswith("_") else found
    away = bool(far) if wanted is None else torch.device(wanted).type == DEVICE.type
    return tree_map(lambda x: Far(x) if away and isinstance(x, torch.Tensor) else x, found)


@contextmanager
def elsewhere(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The model with its weights elsewhere, for as long as the block lasts."""
    homes: dict = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                homes.setdefault(id(p), torch.nn.Parameter(Far(p.data), p.requires_grad))
                module._parameters[name] = homes[id(p)]
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = Far(b)
    # torch.tensor(…, device=…) shall make its numbers on the CPU and copy them, seen by _Watch.
    lifts, asks = torch._C._only_lift_cpu_tensors(), torch.is_autocast_enabled
    torch._C._set_only_lift_cpu_tensors(True)
    torch.is_autocast_enabled = lambda kind="cuda": kind != DEVICE.type and asks(kind)
    try:
        with _Watch():
            yield model
    finally:
        torch._C._set_only_lift_cpu_tensors(lifts)
        torch.is_autocast_enabled = asks
