"""The gradient of each capability out of one backward pass, and their Gramian.

Serves the claim of gradient orthogonality. The losses of K capabilities differ by one factor per
sequence, so a backward pass at unit advantage already holds, at each module that trains, the
gradient of each sequence; contracted there with the advantages it gives all K gradients exactly.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bbkit import CannotRun, InputError
from bbkit.combination import combine as combine  # its documented place
from bbkit.combination import gramian
from bbkit.machine.backward import watch as watch


class Capture:
    """The K gradients of a model's trainable parameters, as rows of one matrix (K, P).

    Columns follow `model.parameters()`, trainable ones only, each flattened; float32, or float64
    where they are. What is captured does not reach `.grad`.
    """

    def __init__(self, model: nn.Module, capabilities: int):
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise InputError(
                "gradients: the model has no trainable parameter; put LoRA on it first"
            )
        self.engine = "one_pass"
        self.passed_by: set[str] = set()  # names of what reached `.grad` all the same
        self.advantages = torch.empty(0, capabilities)
        self.sizes = [p.numel() for p in self.parameters.values()]
        first = next(iter(self.parameters.values()))
        exact = torch.promote_types(torch.float32, first.dtype)
        self._rows = torch.zeros(capabilities, sum(self.sizes), device=first.device, dtype=exact)
        self._parts = dict(zip(self.parameters, self._rows.split(self.sizes, dim=1), strict=True))

    def __len__(self) -> int:
        return len(self._rows)

    def next(self, advantages: Tensor) -> None:
        """Advantages (N, K) of the micro-batch whose forward and backward pass come next."""
        if advantages.dim() != 2 or advantages.shape[1] != len(self._rows):
            wanted = f"(N, {len(self._rows)})"
            raise InputError(f"gradients: advantages are {tuple(advantages.shape)}, not {wanted}")
        self.advantages = advantages.detach().to(self._rows)

    @property
    def missed(self) -> list[str]:
        """Parameters that got a gradient past the capture: fused kernels, packed sequences."""
        return [n for n in self.parameters if n in self.passed_by]

    @property
    def gradients(self) -> Tensor:
        """(K, P): row k is the gradient of Σ_i A_ik ℓ_i. Raises CannotRun if any was `missed`."""
        if self.missed:
            raise CannotRun(
                f"gradients: {len(self.missed)} trainable parameters bypass the capture, first "
                f"{self.missed[0]}; send each capability's loss back alone, then Capture.take"
            )
        return self._rows

    @property
    def gramian(self) -> Tensor:
        """(K, K) inner products of the gradients."""
        return gramian(self.gradients)

    @property
    def cosines(self) -> Tensor:
        """(K, K) cosines; NaN for a gradient that is 0."""
        return cosines(self.gramian)

    def clear(self) -> None:
        """Start again: rows of 0 and nothing seen; `.grad` stays as it is."""
        self._rows.zero_()
        self.passed_by.clear()

    def take(self, row: int, sign: float = 1.0) -> None:
        """Replay: add what a backward pass of this row's loss alone left in `.grad`; clear that."""
        self.engine = "replay"
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                self._parts[name][row] += sign * parameter.grad.flatten().to(self._rows)
                parameter.grad = None

    def put(self, coefficients: Tensor) -> None:
        """Write Σ_k c_k g_k into `.grad`, for the optimiser to step along."""
        parts = (coefficients.to(self._rows) @ self.gradients).split(self.sizes)
        for parameter, part in zip(self.parameters.values(), parts, strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.dtype)

    def by(self, group: Callable[[str], str]) -> dict[str, Tensor]:
        """Gramians (K, K) of parts of the model; `group` names the part of a parameter's name."""
        parts: dict[str, Tensor] = {}
        for name, block in zip(self._parts, self.gradients.split(self.sizes, dim=1), strict=True):
            parts[group(name)] = parts.get(group(name), 0) + gramian(block)
        return parts

    def take_in(self, name: str, outer: Tensor, inner: Tensor) -> Tensor | None:
        """Contract outer_iᵀ inner_i of the sequences, (N, T, out) and (N, T, in), with advantages.

        Returns what `.grad` gets: nothing, or the sum of packed ones, which cannot be told apart.
        """
        inner = inner.to(outer.dtype)
        if len(outer) != len(self.advantages):
            return torch.einsum("nto,nti->oi", outer, inner)
        # some sequences at a time: a whole weight's gradients of all of them would not fit
        some = max(1, 2**24 // (outer.shape[-1] * inner.shape[-1]))
        for start in range(0, len(outer), some):
            part = slice(start, start + some)
            block = outer[part].transpose(1, 2) @ inner[part]  # (N, out, in)
            self._parts[name].addmm_(self.advantages[part].T, block.flatten(1).to(self._rows))
        return None

    def add(self, name: str, row: int, gradient: Tensor) -> None:
        """Add to a row what a parameter's gradient is in it, already weighed by its advantages."""
        self._parts[name][row] += gradient.flatten().to(self._rows)


@contextmanager
def capability_gradients(model: nn.Module, advantages: Tensor) -> Iterator[Capture]:
    """Capture the gradients of K capabilities during one `loss.backward()`.

    `advantages` (N, K) follow the batch, the first dimension of what each layer gets; `loss` is
    Σ_i ℓ_i, the terms at unit advantage. Several backward passes add up, each after
    `capture.next(advantages)`. `.grad` stays empty until `put`. After arXiv 1510.01799.

    >>> model = nn.Linear(3, 1, bias=False)
    >>> x, advantages = torch.randn(4, 3), torch.randn(4, 2)
    >>> with capability_gradients(model, advantages) as capture:
    ...     model(x).sum().backward()
    >>> torch.allclose(capture.gradients, advantages.T @ x, atol=1e-6)
    True
    """
    with watch(model, Capture(model, advantages.shape[-1])) as capture:
        capture.next(advantages)
        yield capture


def unfuse(model: nn.Module) -> int:
    """Put PEFT's forwards back where unsloth has set fused LoRA kernels; how many it had set.

    No capture sees these, and K passes cost more than they gain. Where they stay, replay it is.
    """
    llama = sys.modules.get("unsloth.models.llama")
    put_back = getattr(llama, "_decline_fused_lora_for_fsdp", None)
    return put_back(model, "one backward pass gives all gradients") if put_back else 0


def cosines(gramian: Tensor) -> Tensor:
    """(K, K) cosines of a Gramian; NaN where a gradient is 0.

    >>> cosines(torch.tensor([[4.0, 2.0], [2.0, 1.0]]))[0, 1].item()
    1.0
    """
    norm = gramian.diagonal().clamp(min=0).sqrt()
    return gramian / torch.outer(norm, norm)


def null_cosine(parameters: int) -> float:
    """Mean absolute cosine of two random directions in that many dimensions: √(2/(πP)).

    >>> round(null_cosine(200_000), 4)
    0.0018
    """
    return math.sqrt(2 / (math.pi * parameters))


def halves(advantages: Tensor, group: int = 1) -> Tensor:
    """(N, 2K) advantages: the K columns on the even groups, then the K on the odd ones.

    Captured: two estimates of each gradient, independent where `group` completions share a prompt.
    """
    places = torch.arange(len(advantages), device=advantages.device) // group
    even = (places % 2 == 0).unsqueeze(1)
    return torch.cat([advantages * even, advantages * ~even], dim=1)


def reliability(gramian: Tensor) -> Tensor:
    """(K,) cosines of the two halves of each gradient, from the (2K, 2K) Gramian of `halves`."""
    return cosines(gramian).diagonal(len(gramian) // 2)
