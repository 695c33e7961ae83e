"""Backward passes of the modules that train, shown to a capture sequence by sequence.

Serves bbkit.gradients: at a linear map a sequence's gradient is a product of what came in and what
comes back; any other module (embedding, norm, DoRA's magnitude) runs once more by itself, and goes
back once for each capability, no further than its own parameters.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import get_device_states, set_device_states

HOLDERS = (nn.ParameterDict, nn.ParameterList)  # without a forward: their parent's is watched


class _Linear(torch.autograd.Function):
    """nn.functional.linear that shows its backward pass to a capture.

    Unlike a hook it keeps its input as autograd does, so that checkpointing still frees it.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, capture, names):
        ctx.save_for_backward(x, weight)
        ctx.capture, ctx.names = capture, names
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, delta):
        x, weight = ctx.saved_tensors
        needs, grads = ctx.needs_input_grad, [None, None, None]
        if needs[0]:
            grads[0] = (delta @ weight.to(delta.dtype)).to(x.dtype)
        outer = delta.reshape(len(delta), -1, delta.shape[-1])  # (N, T, out)
        if needs[1]:
            grads[1] = ctx.capture.take_in(ctx.names[0], outer, x.reshape(len(x), -1, x.shape[-1]))
        if needs[2]:
            summed = ctx.capture.take_in(ctx.names[1], outer, outer.new_ones(*outer.shape[:2], 1))
            grads[2] = None if summed is None else summed[:, 0]
        return *grads, None, None


class _Whole(torch.autograd.Function):
    """What a module gave, unchanged; its backward pass has the module run again for a capture."""

    @staticmethod
    def forward(ctx, out, capture, again, names, *tensors):
        ctx.capture, ctx.again, ctx.names = capture, again, names
        ctx.own = tensors[: len(names)]
        ctx.save_for_backward(*tensors[len(names) :])
        return out.view_as(out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, delta):
        inputs, advantages = ctx.saved_tensors, ctx.capture.advantages
        own = [p.detach().requires_grad_() for p in ctx.own]
        with torch.enable_grad():
            out = ctx.again(own, inputs)

        def back(slope: Tensor) -> tuple:
            return torch.autograd.grad(out, own, slope, retain_graph=True, allow_unused=True)

        grads: tuple = (None,) * len(own)
        if len(delta) != len(advantages):  # packed, or one row for all: not to be told apart
            grads, advantages = back(delta), advantages[:, :0]
        for row, column in enumerate(advantages.T):
            weighed = delta * column.to(delta).view(-1, *[1] * (delta.dim() - 1))
            for name, part in zip(ctx.names, back(weighed), strict=True):
                if part is not None:
                    ctx.capture.add(name, row, part)
        return delta, None, None, None, *grads, *(None for _ in inputs)


def _linear(module: Any, capture: Any, names: dict[int, str], running: list) -> Callable:
    """The forward of a plain linear map, shown."""
    own = (names.get(id(module.weight), ""), names.get(id(module.bias), ""))

    def forward(x):
        if not torch.is_grad_enabled() or running:  # generation
            return nn.functional.linear(x, module.weight, module.bias)
        return _Linear.apply(x, module.weight, module.bias, capture, own)

    return forward


def _whole(given: Callable, capture: Any, places: dict[str, tuple], running: list) -> Callable:
    """The forward of any module, shown; `places` say where its parameters stand, by name."""
    own = [capture.parameters[name] for name in places]
    device = own[0].device

    def called(parameters, args, kwargs):
        try:
            for (holder, key), parameter in zip(places.values(), parameters, strict=True):
                holder._parameters[key] = parameter
            return given(*args, **kwargs)
        finally:
            for (holder, key), parameter in zip(places.values(), own, strict=True):
                holder._parameters[key] = parameter

    def forward(*args, **kwargs):
        if not torch.is_grad_enabled() or running:
            return given(*args, **kwargs)
        flat, spec = tree_flatten((args, kwargs))
        where = [i for i, value in enumerate(flat) if isinstance(value, Tensor)]
        cast, dtype = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
        drawn, (gpus, theirs) = torch.get_rng_state(), get_device_states(own[0])

        def redraw():
            torch.set_rng_state(drawn)
            set_device_states(gpus, theirs)

        def again(parameters, inputs):
            known = list(flat)
            for i, value in zip(where, inputs, strict=True):
                known[i] = value.detach()
            running.append(given)
            try:
                with torch.random.fork_rng(gpus), torch.autocast(device.type, dtype, enabled=cast):
                    redraw()
                    return called(parameters, *tree_unflatten(known, spec))
            finally:
                running.pop()

        out = called([p.detach() for p in own], args, kwargs)
        if not isinstance(out, Tensor):  # its gradients reach `.grad`, and count as missed
            redraw()
            return given(*args, **kwargs)
        return _Whole.apply(out, capture, again, tuple(places), *own, *(flat[i] for i in where))

    return forward


@contextmanager
def watch(model: nn.Module, capture: Any) -> Iterator[Any]:
    """Let a `gradients.Capture` see the forward and backward passes inside, however many."""
    names = {id(p): n for n, p in capture.parameters.items()}
    running: list = []  # again, for its gradients: what it calls is not to be seen twice

    def note(name: str) -> Callable[[Tensor | None], None]:
        return lambda grad: capture.passed_by.add(name) if grad is not None else None

    with ExitStack() as undo:
        for name, parameter in capture.parameters.items():
            undo.callback(parameter.register_hook(note(name)).remove)
        for module in model.modules():
            if isinstance(module, HOLDERS) or "forward" in vars(module):
                continue  # a forward that someone replaced may compute something else
            held = [module, *(child for child in module.children() if isinstance(child, HOLDERS))]
            places = {
                names[id(p)]: (h, key)
                for h in held for key, p in h._parameters.items() if id(p) in names
            }  # fmt: skip
            if places:
                shown: Any = _whole(module.forward, capture, places, running)
                if type(module) is nn.Linear:
                    shown = _linear(module, capture, names, running)
                module.forward = shown
                undo.callback(delattr, module, "forward")
        yield capture


class Pass(NamedTuple):
    """At which advantages, into which row, with which sign; what it counts for in the loss."""

    advantages: Tensor
    row: int
    sign: float
    counts: float


def replays(
    columns: Tensor, whole: Tensor, weights: Sequence[float], clips: bool = False
) -> list[Pass]:
    """The passes that give a gradient of each of the columns (N, K) apart.

    Where a loss `clips` by the sign of its advantages, what opposes `whole` (N,), the sum by the
    weights, takes a pass of its own at the opposite sign: all are clipped as the whole is.

    >>> [p.advantages.tolist() for p in replays(torch.tensor([[2.0], [-1.0]]), torch.ones(2), [1])]
    [[2.0, -1.0]]
    """
    passes = []
    for k, (column, weight) in enumerate(zip(columns.T, weights, strict=True)):
        against = (column * whole < 0) & clips
        if against.any():
            passes.append(Pass(-column * against, k, -1.0, -weight))
        passes.append(Pass(column * ~against, k, 1.0, weight))
    return passes
