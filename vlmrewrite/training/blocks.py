"""What of a rewritten model is trained."""

from __future__ import annotations

import warnings

from torch import nn

from vlmrewrite.hf import on_base_model
from vlmrewrite.plan import ATTRIBUTE, blocks_of
from vlmrewrite.runtime import session_of


@on_base_model
def trainable_blocks(model: nn.Module) -> nn.ModuleDict:
    """The modules that the recipe of a rewritten model trains, by name.

    ``torch.optim.AdamW(trainable_blocks(model).parameters())`` is what a loop of your own begins with. Blocks ask for a
    gradient when the recipe is applied, and nothing else of the model does, but for what somebody has chosen before
    (adapters): a warning names that. What has been frozen since stays frozen.

    Args:
        model: a model that a recipe with blocks is applied to.

    Raises:
        ValueError: no recipe is applied, or it has no blocks.
    """
    recipe, blocks = session_of(model).recipe, blocks_of(model)
    if blocks is None:
        raise ValueError(
            f"recipe {recipe.name!r} has no blocks: none of {', '.join(map(repr, recipe.passes))} has parameters of its"
            " own, and there is nothing to train"
        )
    if others := other_learners(model):
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        warnings.warn(
            f"{', '.join(others[:3])}{more} of this {type(model).__name__} ask for a gradient too, and are no blocks:"
            " hand them to the optimizer as well, or freeze them",
            stacklevel=3,
        )
    return blocks


def other_learners(model: nn.Module) -> list[str]:
    """Parameters that are no blocks and ask for a gradient, by name."""
    return [n for n, p in model.named_parameters() if p.requires_grad and not n.startswith(f"{ATTRIBUTE}.")]
