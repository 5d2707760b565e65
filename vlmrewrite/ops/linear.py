"""Gradients of other libraries' operators that have none, where these are linear: those of plain weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_OFF = 0.05
"""How far a linear map may be from one, by rounding of what it takes and gives, as a share of the largest number."""


class Differentiable:
    """An operator that autograd does not know: PyTorch would go on as if it were constant.

    A map ``[.., in]`` to ``[.., out]`` of the one argument that has a gradient is linear if it is so with the numbers
    of the first call that asks for one. Its gradient is that of the weights that the unit vectors show; rounding of
    activations is passed straight through (arXiv 1308.3432, section 3). These weights, in x out in the dtype of the
    activations, are there while one backward step of it runs.

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
            self._linear = _is_linear(run, x.detach())
        if not self._linear:
            raise NotImplementedError(self._refusal("it is no linear map"))
        return _Linear.apply(x, run)  # type: ignore[no-untyped-call]

    def _refusal(self, why: str) -> str:
        return (
            f"{self.operator} has no gradient, and something before it is trained: {why}. Expected a call under"
            " torch.no_grad(), or no parameter before it that requires a gradient"
        )


@torch.no_grad()
def _is_linear(run: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Whether a map of ``x``, [.., in], to [.., out] adds up."""
    other, nothing = x.flip(-1), run(torch.zeros_like(x))
    both, apart = run(x + other) + nothing, run(x) + run(other)
    if not x.dtype.is_floating_point or both.shape[:-1] != x.shape[:-1]:
        return False
    return bool((both - apart).abs().max() <= _OFF * apart.abs().max())


class _Linear(torch.autograd.Function):
    """A linear map, given as a function of [.., in]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.run, ctx.inside = run, x.shape[-1]
        return run(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        unit = torch.eye(ctx.inside, dtype=gradient.dtype, device=gradient.device)
        weights = ctx.run(unit) - ctx.run(torch.zeros_like(unit[:1]))
        return gradient @ weights.to(gradient.dtype).T, None
