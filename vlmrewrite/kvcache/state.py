"""One layer's recurrent and convolutional states, which have a row for each row of the batch and no token axis.

A layer that is feed-forward alone has none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from vlmrewrite.ops import fill

FINAL = "this model has recurrent layers, whose state cannot go back to earlier tokens"


class StateLayer(LinearAttentionLayer):
    """transformers' layer of such states, which cannot go back and is written anew, never in place.

    (The tensors of a captured graph are put here as they come; transformers marks its own as static, so that a graph
    would be compiled anew for each cache.)
    """

    holes = False

    @property
    def is_croppable(self) -> bool:
        """Whether it can forget tokens: it remembers none."""
        return self.number_of_states == 0

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
    ) -> Tensor:
        """Append [B, C, t]; returns what a convolution needs, and keeps the last ``conv_kernel_size`` of it."""
        size = self.conv_kernel_size[state_idx] or conv_kernel_size or conv_states.shape[-1]
        if self.has_previous_state[state_idx]:
            conv_states = torch.cat([self.conv_states[state_idx], conv_states], -1)  # type: ignore[list-item]
        else:
            conv_states = F.pad(conv_states, (max(0, size - conv_states.shape[-1]), 0))
        fill(self, "conv_states", state_idx, conv_states[..., -size:].clone(memory_format=torch.contiguous_format))
        return conv_states

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Take the new state, [B, ...]."""
        fill(self, "recurrent_states", state_idx, recurrent_states)
        return recurrent_states

    def activate_past_recording(self) -> None:
        """Refuse to remember earlier states, as assistants want it."""
        if not self.is_croppable:
            raise NotImplementedError(f"{FINAL}: generate without an assistant")

    def crop(self, tokens_to_remove: int, shared: Any = None) -> None:
        """Refuse to forget tokens.

        Raises:
            NotImplementedError: there are tokens to forget.
        """
        if tokens_to_remove and not self.is_croppable:
            raise NotImplementedError(f"{FINAL}, and crop({tokens_to_remove}) was called: start with an empty cache")

    def reorder_cache(self, beam_idx: Tensor, shared: Any = None) -> None:
        """Rows of the next step come from rows ``beam_idx`` [B]."""
        self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int, shared: Any = None) -> None:
        """Repeat every row ``repeats`` times."""
        self._each(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor, shared: Any = None) -> None:
        """Keep only the rows ``indices``."""
        self._each(lambda x: x[indices])

    def release(self) -> None:
        """Lay the states out in one way only."""
        self._each(lambda x: x.contiguous())

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        for states in (self.conv_states, self.recurrent_states):
            states.update({i: change(x) for i, x in states.items() if x is not None})
