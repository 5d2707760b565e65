"""What DAPE's trained blocks are trained by: next token, alignment of text with regions, and how many regions.

    with the recipe applied:  DAPE(budget=0.5, mode="inject", matching="learned")
    loss = dape_loss(model, inputs | {"labels": labels}); loss.total.backward()

``total = lm + 0.1 alignment + 0.01 counts``; **all formulas are this project's own**. Choosing a cover is discrete:
``lm`` reaches the matching through the straight-through gate of :func:`vlmrewrite.passes.dape.ops.dape_pool` alone; the
other two are differentiable in the matching's parameters.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from vlmrewrite.hf import encode_images, encoded_images
from vlmrewrite.passes.dape.blocks import Matching
from vlmrewrite.passes.dape.matching import bar, match
from vlmrewrite.passes.dape.regions import density, pool, region_owner
from vlmrewrite.passes.dape.technique import POOL
from vlmrewrite.runtime import before_labels, last_call, prompt_ends

ALIGNMENT, COUNTS = 0.1, 0.01

SOFTNESS = 0.05


class Losses(NamedTuple):
    """The parts of DAPE's training loss, scalars; see :func:`dape_loss`."""

    total: Tensor
    lm: Tensor
    alignment: Tensor
    counts: Tensor


def contrast(rho: Tensor, z: Tensor, own: Tensor) -> Tensor:
    """Token-region contrast: each text token should match regions of its own row better than those of other rows.

    ``sum_i rho_i l_i / sum_i rho_i`` with ``l_i = -log(sum_{j in own_i} exp z_ij / sum_j exp z_ij)`` over the text
    tokens i that have a region of their own and a foreign one; 0 without such tokens. The form with several positives
    is that of MIL-NCE (Miech et al., 2020); the weights are this project's own, and have no gradient: it would make
    tokens light that match badly.

    Args:
        rho, z: text density [n] and match [n, R], as :func:`vlmrewrite.passes.dape.matching.match` returns them.
        own: which regions are of the token's own row, bool [n, R].
    """
    some = own.any(1) & (~own).any(1)
    rho, z, own = rho[some].detach(), z[some], own[some]
    if not len(z):
        return z.sum()
    lost = z.logsumexp(1) - z.masked_fill(~own, -torch.inf).logsumexp(1)
    return (rho * lost).sum() / rho.sum()


def occupancy(rho: Tensor, z: Tensor, own: Tensor, target: Tensor) -> Tensor:
    """How far the mean number of regions of a text token is from its target: ``(mean_i count_i / target_i - 1)^2``.

    ``count_i = sum_{j in own_i} sigmoid((zhat_ij - (0.9 - 0.3 rho_i)) / 0.05)``, a soft form of the rule by which
    :func:`.matching.aligned` keeps regions; zhat is z scaled to [0, 1] over the regions of the token's row.

    Args:
        rho, z, own: as for :func:`contrast`.
        target: regions that each token should have, float [n].
    """
    some = own.any(1)
    rho, z, own, target = rho[some], z[some], own[some], target[some]
    if not len(z):
        return z.sum()
    low = z.masked_fill(~own, torch.inf).amin(1, keepdim=True)
    high = z.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
    scaled = (z - low) / (high - low).clamp(min=1e-6)
    kept = torch.sigmoid((scaled - bar(rho)[:, None]) / SOFTNESS).masked_fill(~own, 0.0)
    return ((kept.sum(1) / target).mean() - 1).square()


def dape_loss(model: nn.Module, inputs: dict[str, Any], *, target: float | None = None) -> Losses:
    """One forward of a model that DAPE with a learned matching is applied to, and its training loss.

    The prompt of a row ends before its first label: which regions there are, and which get detail, is chosen as
    ``generate()`` would choose it, without a look at the answer.

    Args:
        model: rewritten by a recipe with ``DAPE(matching="learned")``.
        inputs: what its forward takes, with an image and ``labels`` [B, T] (-100: no label).
        target: regions that a text token should have on average. None: a sixteenth of the tokens of its row's
            images, half of what it may have.

    Returns:
        scalars with gradients; ``total`` is what to train by.

    Raises:
        ValueError: no recipe is applied, it has no learned matching, the inputs hold no labels, no text or no image, or
            ``target`` is not positive.
    """
    labels = inputs.get("labels")
    if not isinstance(labels, Tensor) or not bool((labels != -100).any()):
        raise ValueError(f"expected labels with a label among the inputs, got {', '.join(inputs)}")
    if target is not None and not target > 0:
        raise ValueError(f"target={target}; expected a number of regions greater than 0")
    if not isinstance(inputs.get("input_ids"), Tensor):
        raise ValueError(f"expected input_ids among the inputs, got {', '.join(inputs)}")
    given = encode_images(model, dict(inputs))
    _images(given)
    with prompt_ends(model, before_labels(labels)):
        lm = model(**given).loss
    alignment, counts = dape_terms(model, given, target=target)
    return Losses(lm + ALIGNMENT * alignment + COUNTS * counts, lm, alignment, counts)


def dape_terms(model: nn.Module, given: dict[str, Any], *, target: float | None = None) -> tuple[Tensor, Tensor]:
    """What :func:`dape_loss` adds to the loss of the next token, of the last call of a model: alignment and counts.

    Args:
        model: as for :func:`dape_loss`; its last call was with these inputs, and its prompts ended where the answers
            begin.
        given: what it was given, images encoded (:func:`vlmrewrite.hf.encode_images`).
        target: as for :func:`dape_loss`.

    Returns:
        two scalars without their weights, 0.1 and 0.01.
    """
    images = _images(given)
    program, call, chosen = last_call(model)
    pools = [e for e in program.plan.edits if e.op is POOL and e.weights]
    if not pools:
        raise ValueError("no DAPE with matching='learned' is applied, so that there is nothing to train by this loss")
    (edit,) = pools
    member = call.members(edit.tokens, chosen)[call.vision]
    owner, level = region_owner(member, call.fact("lengths", "frame"), cast(Tensor, call.grid())).unbind(0)
    features = encoded_images(images).features.flatten(0, -2)
    means = pool(features, owner)[0][member]
    row = call.flat // call.length
    seen = density(features, owner)
    most = seen.new_zeros(len(call.vision)).scatter_reduce(0, row, seen, "amax")
    prompt = call.text & (call.everywhere <= call.last)
    text = model.get_input_embeddings()(given["input_ids"])[prompt]  # type: ignore[operator]
    weights = [program.blocks.get_parameter(name) for name in edit.weights]
    assert len(weights) == len(Matching.NAMES)
    rho, z = match(text, means, level[member], (seen / most[row].clamp(min=1e-12))[member], weights)
    rows = prompt.nonzero()[:, 0]
    own = rows[:, None] == row[member][None]
    wanted = call.vision.sum(1)[rows] / 16 if target is None else torch.full_like(rho, target)
    return contrast(rho, z, own), occupancy(rho, z, own, wanted)


def _images(given: dict[str, Any]) -> Any:
    images = (given.get("mm_encoder_outputs") or {}).get("image")
    if images is None:
        raise ValueError(f"the inputs hold no image: {', '.join(given)}; expected pixel_values or the like")
    return images
