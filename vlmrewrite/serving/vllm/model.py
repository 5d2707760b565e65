"""The model's side: rows of features are left out, and kept ones have the positions of the whole prompt."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from vlmrewrite.compat import vllm
from vlmrewrite.serving.placeholders import Layout, Span, original, resolved, table_of, with_columns
from vlmrewrite.serving.select import BeforeDecoder
from vlmrewrite.serving.vllm.settings import KEY, LONGER, check_engine, check_model, serving_of

_OWN = "vlmrewrite_before"


def before_of(model: Any) -> BeforeDecoder | None:
    """What a loaded model's recipe does before the decoder, or None."""
    found: BeforeDecoder | None = getattr(model, _OWN, None)
    return found


def pruned(base: Any) -> type:
    """A class of models like those of ``base`` that leave tokens of images out if their configuration has a recipe."""

    class Pruned(base):  # type: ignore[misc]
        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            serving = serving_of(vllm_config.model_config)
            if serving is None:
                super().__init__(vllm_config=vllm_config, prefix=prefix)
                return
            check_model(base, vllm_config.model_config)
            check_engine(vllm_config)
            if "image" not in (known := vllm.modalities(vllm_config.model_config)):
                raise ValueError(f"expected a model whose processor takes what it calls 'image', got one of {known}")
            super().__init__(vllm_config=vllm.as_unchanged(vllm_config, KEY, LONGER), prefix=prefix)
            setattr(self, _OWN, serving.before)
            self.vlmrewrite_axes = vllm.axes_of(vllm_config.model_config)
            self.vlmrewrite_width = vllm_config.model_config.get_hidden_size()
            self.supports_mrope = self.supports_multimodal_pruning = True
            if serving.before.needs_grids and not self.vlmrewrite_axes:
                raise ValueError(
                    "a pass asks for the rows and columns of images, which an engine knows of models with M-RoPE alone"
                )
            rows, longest = vllm.rows_of_ropes(self), vllm_config.model_config.max_model_len
            text = vllm_config.model_config.hf_config.get_text_config()
            window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
            if window is not None and window < longest:
                vllm.warn(f"with a recipe of vlmrewrite, sliding windows of {window} tokens count those that are left")
            vllm.log(
                "vlmrewrite: kept tokens have the positions of the whole prompt, which may lie behind max_model_len,"
                f" {longest}: up to {LONGER * longest}"
            )
            if rows is not None and rows < LONGER * longest:
                raise ValueError(
                    f"max_model_len: expected at most {rows // LONGER} with a recipe of vlmrewrite, got {longest}:"
                    f" tokens keep the positions of the whole prompt, and the model has {rows}"
                )

        def embed_multimodal(self, **kwargs: Any) -> Any:
            """Rows that are kept of each image, with columns that tell where they stood."""
            layouts = kwargs.pop(KEY, None)
            features = super().embed_multimodal(**kwargs)
            before = before_of(self)
            if before is None or layouts is None:
                return features
            return tuple(
                self._kept(before, rows.flatten(0, -2), Layout.from_tensor(numbers), _alone(kwargs, i, len(layouts)))
                for i, (rows, numbers) in enumerate(zip(features, layouts, strict=True))
            )

        def _kept(self, before: BeforeDecoder, rows: Tensor, layout: Layout, arguments: dict[str, Any]) -> Tensor:
            places = layout.places
            if len(rows) != len(places):
                raise ValueError(f"expected {len(places)} features of an image, as its placeholders, got {len(rows)}")
            axes, at = self.vlmrewrite_axes, places[None]
            if axes:
                spans = [Span(0, len(layout.content), layout.mask, None)]
                at = self._positions(list(layout.content), spans, [(vllm.item(arguments), "image")])[0][:, places]
            grids = [_grid_of(at)] if before.needs_grids else None
            seen = rows[:, : self.vlmrewrite_width].split(layout.lengths)
            found = before.choose(seen, places=layout.starts, grids=grids, earlier=layout.earlier)
            firsts = accumulate(layout.lengths, initial=0)
            kept = torch.cat([x.indices + first for x, first in zip(found, firsts, strict=False)])
            return with_columns(rows[kept], (at - at[:, :1])[:, kept.to(at.device)])

        def _positions(
            self, tokens: list[int], spans: Sequence[Span], images: Sequence[tuple[Any, str]]
        ) -> tuple[Tensor, int]:
            """Positions of a whole prompt, [A, T], and the one behind it."""
            if not self.vlmrewrite_axes:
                return torch.arange(len(tokens))[None], len(tokens)
            features = [
                vllm.feature(data, modality, span.offset, span.length, span.mask)
                for (data, modality), span in zip(images, spans, strict=True)
            ]
            positions, delta = super().get_mrope_input_positions(tokens, features)
            return positions, len(tokens) + int(delta)

        def get_mrope_input_positions(self, input_tokens: Any, mm_features: Any) -> tuple[Tensor, int]:
            """A table of positions, as far as they are known before the images are encoded."""
            if before_of(self) is None:
                found: tuple[Tensor, int] = super().get_mrope_input_positions(input_tokens, mm_features)
                return found
            spans = [_span_of(f) for f in mm_features]
            prompt = original(input_tokens, spans)
            whole = self._positions(prompt.tokens, prompt.spans, [(f.data, f.modality) for f in mm_features])
            table = table_of(prompt, *whole)
            return table, resolved(table, [], 0)[2]

        def recompute_mrope_positions(
            self, input_ids: Any, multimodal_embeddings: Any, mrope_positions: Tensor, num_computed_tokens: int
        ) -> tuple[Any, Tensor, int]:
            """The table with positions of the images that are encoded now, whose columns are taken off."""
            if before_of(self) is None:
                given = input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens
                found: tuple[Any, Tensor, int] = super().recompute_mrope_positions(*given)
                return found
            return resolved(mrope_positions, multimodal_embeddings, num_computed_tokens)

        def forward(self, input_ids: Any, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
            """The model on positions without the rows of the table that are the engine's."""
            if before_of(self) is not None:
                axes = self.vlmrewrite_axes
                positions = positions[:axes] if axes else positions[0]
            return super().forward(input_ids, positions, *args, **kwargs)

    Pruned.__name__, Pruned.__qualname__, Pruned.__module__ = base.__name__, base.__qualname__, base.__module__
    return Pruned


def _span_of(feature: Any) -> Span:
    place, numbers = feature.mm_position, (feature.data or {}).get(KEY)
    if numbers is None and feature.modality == "image":
        raise ValueError(f"the image at {place.offset} came without what vlmrewrite put beside it; got {feature.data}")
    layout = None if numbers is None else Layout.from_tensor(numbers.data)
    return Span(place.offset, place.length, place.is_embed, layout)


def _alone(arguments: dict[str, Any], i: int, n: int) -> dict[str, Any]:
    """Of arguments for n images, what is of one: those that have an entry for each image."""
    of_images = {k: v for k, v in arguments.items() if isinstance(v, list) or (isinstance(v, Tensor) and v.dim())}
    return {k: v[i] for k, v in of_images.items() if len(v) == n}


def _grid_of(positions: Tensor) -> tuple[int, int]:
    """Rows and columns of an image whose positions go by them, [A, N]."""
    rows, columns = ((int(x.max()) - int(x.min()) + 1) if len(positions) > 1 else 0 for x in positions[-2:])
    return rows, columns
