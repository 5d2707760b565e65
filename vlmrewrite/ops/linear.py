"""Gradients of other libraries' operators that have none, where these are linear: those of plain weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_OFF = 0.05
"""How far it may be from a linear map, by rounding of what it takes and gives, as a share of a channel's largest."""

_TOKENS = 16


class Differentiable:
    """An operator that autograd does not know: PyTorch would go on as if it were constant.

    A map ``[.., in]`` to ``[.., out]`` of the one argument that has a gradient is linear if it is so with random
    numbers, when a gradient is first asked for. Its gradient is that of the weights that the unit vectors show;
    rounding of activations is passed straight through (arXiv 1308.3432, section 3). These weights, in x out in the
    dtype of the activations, are there while one backward step of it runs.

    Args:
        operator: of another library.
    """

    def __init__(self, operator: Any) -> None:
        self.operator = operator
        self.__name__: str = operator.name().replace("::", "_").replace(".", "_")
        self._linear: bool | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the operator gives.

        Raises:
            NotImplementedError: a gradient is asked for, and it is not linear, or a compiler traces it.
        """
        given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        asked = [key for key, x in given.items() if isinstance(x, Tensor) and x.requires_grad]
        if not asked or not torch.is_grad_enabled():
            return self.operator(*args, **kwargs)
        if torch.compiler.is_dynamo_compiling():
            raise NotImplementedError(self._refusal("a compiler cannot be given one: expected backend='eager'"))
        if len(asked) > 1:
            raise NotImplementedError(self._refusal(f"{len(asked)} of its arguments ask for one"))

        def run(x: Tensor) -> Tensor:
            each = given | {asked[0]: x}
            named = {key: each[key] for key in kwargs}
            return self.operator(*(each[i] for i in range(len(args))), **named)  # type: ignore[no-any-return]

        x = given[asked[0]]
        if self._linear is None:
            self._linear = _is_linear(run, x)
        if not self._linear:
            raise NotImplementedError(self._refusal("it is no linear map"))
        rest = [other for key, other in given.items() if isinstance(other, Tensor) and key != asked[0]]
        return _Linear.apply(x, run, *rest)  # type: ignore[no-untyped-call]

    def _refusal(self, why: str) -> str:
        return (
            f"{self.operator} has no gradient, and something before it is trained: {why}. Expected a call under"
            " torch.no_grad(), or no parameter before it that requires a gradient"
        )


@torch.no_grad()
def _is_linear(run: Callable[[Tensor], Any], like: Tensor) -> bool:
    """Whether a map of [.., in] to [.., out] adds up, in each of the numbers that it gives."""
    if not like.is_floating_point():
        return False
    shape, numbers = (*(1,) * (like.dim() - 2), _TOKENS, like.shape[-1]), torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=numbers).to(like.device, like.dtype) for _ in range(2))
    try:
        nothing, *found = (run(x) for x in (torch.zeros_like(a), a, b, a + b))
        each, other, both = (x.double() - nothing for x in found)
    except Exception:  # it takes no other tokens than those that it was given, or gives no tensor
        return False
    if both.shape[:-1] != a.shape[:-1]:
        return False
    size = (each.abs() + other.abs()).flatten(0, -2).amax(0)
    return bool(((both - each - other).abs().flatten(0, -2).amax(0) <= _OFF * size).all())


class _Linear(torch.autograd.Function):
    """A linear map, given as a function of [.., in]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Callable[[Tensor], Tensor], *rest: Tensor) -> Tensor:
        ctx.run, ctx.inside, ctx.dtype = run, x.shape[-1], x.dtype
        ctx.save_for_backward(*rest)  # by which PyTorch sees that one is written to meanwhile
        return run(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rest = ctx.saved_tensors
        unit = torch.eye(ctx.inside, dtype=ctx.dtype, device=gradient.device)
        weights = ctx.run(unit) - ctx.run(torch.zeros_like(unit[:1]))
        return (gradient @ weights.to(gradient.dtype).T).to(ctx.dtype), None, *[None] * len(rest)
