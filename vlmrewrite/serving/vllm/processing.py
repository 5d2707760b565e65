"""The processor's side: an image takes as many placeholders as will be kept, and has a key of its own in caches."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

from torch import Tensor

from vlmrewrite.compat import vllm
from vlmrewrite.serving.placeholders import Layout
from vlmrewrite.serving.vllm.settings import KEY, LONGER, Serving, digest, serving_of


class _Placeholders:
    """Tells which tokens of an image's are placeholders; keeps the image's layout beside them."""

    def __init__(self, mask: Tensor, layout: Layout) -> None:
        self.mask, self.layout = mask, layout

    def __call__(self, tokens: Any) -> Tensor:
        return self.mask


def wraps() -> Any:
    """What wraps the methods of a processor."""
    return vllm.wraps_of(_updates, _hashes, _prompt)


def _serving(processor: Any) -> Serving | None:
    return serving_of(processor.info.ctx.model_config)


def _updates(processor: Any) -> vllm.Wrap:
    def wrap(make: Callable[..., Any]) -> Callable[..., Any]:
        def updates_of(mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Any:
            made, serving = make(mm_items, hf_processor_mm_kwargs, out_mm_kwargs), _serving(processor)
            if serving is None or "image" not in made:
                return made
            images = []
            for i, updates in enumerate(made["image"]):
                shrunk = [_shrunk(update, serving) for update in updates]
                layouts = {x for x in map(_layout_of, shrunk) if x is not None}
                if len(layouts) != 1:
                    raise ValueError(f"expected one way to write an image in a prompt, found {len(layouts)}")
                out_mm_kwargs["image"][i][KEY] = vllm.argument(layouts.pop().to_tensor())
                images.append(shrunk)
            return {**made, "image": images}

        return updates_of

    return wrap


def _shrunk(update: Any, serving: Serving) -> Any:
    content = update.content
    layout = Layout.of(content.full, None if content.is_embed is None else content.is_embed(content.full), serving.tile)
    if not layout.pieces:
        return update
    serving.tell(layout.lengths[0])
    tokens, mask = layout.shrunk(serving.before.counts(layout.lengths, layout.starts))
    return update.with_content(vllm.placeholders(tokens, _Placeholders(mask, layout)))


def _layout_of(update: Any) -> Layout | None:
    of = update.content.is_embed
    return of.layout if isinstance(of, _Placeholders) else None


def _hashes(processor: Any) -> vllm.Wrap:
    def wrap(make: Callable[..., Any]) -> Callable[..., Any]:
        def hashes_of(inputs: Any) -> Any:
            made, serving = make(inputs), _serving(processor)
            if serving is None or "image" not in made:
                return made
            keys = [f"{key}-{serving.digest}" for key in made["image"]]
            if not serving.before.by_image:  # what is kept goes by the images in front
                keys = [f"{serving.digest}-{digest(so_far)}" for so_far in accumulate([key] for key in keys)]
            return {**made, "image": keys}

        return hashes_of

    return wrap


def _prompt(processor: Any) -> vllm.Wrap:
    def wrap(make: Callable[..., Any]) -> Callable[..., Any]:
        def prompt_of(mm_items: Any, mm_res: Any) -> Any:
            tokens, places = make(mm_items, mm_res)
            if _serving(processor) is None:
                return tokens, places
            earlier, left_out = 0, 0
            for i, updates in enumerate(mm_res.prompt_updates.get("image", [])):
                [layout, *_] = [x for x in map(_layout_of, updates) if x is not None]
                left_out += len(layout.content) - places["image"][i].length
                if (kwargs := mm_res.kwargs["image"][i]) is not None:
                    kwargs[KEY] = vllm.argument(layout.behind(earlier).to_tensor())
                earlier += len(layout.pieces)
            if left_out > (most := processor.info.ctx.model_config.max_model_len * (LONGER - 1)):
                raise ValueError(
                    f"vlmrewrite leaves {left_out} tokens out of the prompt, and kept ones have the positions of the"
                    f" whole prompt; expected at most {most}: give fewer or smaller images, or a larger max_model_len"
                )
            return tokens, places

        return prompt_of

    return wrap
