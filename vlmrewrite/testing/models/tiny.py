"""What tiny models are made of: prompts, images, videos, sizes, and random weights that attend to something."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

Side = Literal["left", "right"]

VOCABULARY = 64

HIDDEN = 32

PAD, START, END, TILE, IMAGE, VIDEO = 0, 2, 3, 4, 5, 6

SPECIAL = 8
"""Token ids from here on are text."""


@dataclass(frozen=True)
class Row:
    """One prompt: ``before`` text tokens, images and videos with a text token between them, ``after`` text tokens.

    Attributes:
        images: how many images there are.
        before: text tokens in front of the first image.
        after: text tokens behind the last video.
        videos: how many videos follow the images.
    """

    images: int
    before: int = 2
    after: int = 3
    videos: int = 0


class Pictures(Protocol):
    """Random images, or videos, for prompts that hold ``counts`` of them each."""

    def __call__(self, counts: Sequence[int], generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        """The token ids of each image or video, markers around it included, and what the vision tower takes."""
        ...


@dataclass(frozen=True)
class TinyVLM:
    """A tiny model of a family.

    Attributes:
        name: of the family.
        model: the Hugging Face model, in eval mode, fp32, on the CPU.
        image_token_id: of the tokens that vision features of images replace.
        pictures: makes images.
        token_types: the input that marks image tokens by 1 and video tokens by 2, if the family has one.
        video_token_id: of the tokens that vision features of videos replace; None if the family takes no videos.
        clips: makes videos, or None.
        finish: turns the inputs that are ready otherwise into those of the family, if there is more to do.
    """

    name: str
    model: Any
    image_token_id: int
    pictures: Pictures
    token_types: str | None = None
    video_token_id: int | None = None
    clips: Pictures | None = None
    finish: Callable[[dict[str, Any]], dict[str, Any]] | None = None

    def inputs(self, rows: Sequence[Row], *, side: Side = "left", seed: int = 0) -> dict[str, Any]:
        """Inputs of a batch; the same seed gives the same text, images and videos.

        Args:
            rows: the prompts.
            side: where shorter rows are padded.
            seed: of the text, the images and the videos.

        Returns:
            input_ids and attention_mask, int64 [B, T], pixel_values and the like if there is an image or a video; where
            the model is.

        Raises:
            ValueError: there is no row, a row without a token, or a video for a family that takes none.
        """
        if not rows or any(row.images + row.videos + row.before + row.after < 1 for row in rows):
            raise ValueError(f"expected at least one row and a token in each, got {rows}")
        generator = torch.Generator().manual_seed(seed)
        images: list[list[int]] = []
        videos: list[list[int]] = []
        pixels: dict[str, Tensor] = {}
        if any(row.images for row in rows):
            images, pixels = self.pictures([row.images for row in rows], generator)
        if any(row.videos for row in rows):
            if self.clips is None:
                raise ValueError(f"{self.name} takes no videos; expected videos=0 in each row, got {rows}")
            videos, frames = self.clips([row.videos for row in rows], generator)
            pixels = pixels | frames
        image, video, sequences = iter(images), iter(videos), []
        for row in rows:
            prompt = text_tokens(row.before, generator)
            for i in range(row.images + row.videos):
                prompt += text_tokens(min(i, 1), generator) + next(image if i < row.images else video)
            sequences.append(torch.tensor(prompt + text_tokens(row.after, generator)))
        ids = torch.nn.utils.rnn.pad_sequence(sequences, True, PAD, padding_side=side)
        out: dict[str, Any] = {"input_ids": ids, "attention_mask": ids.ne(PAD).long()}
        if self.token_types is not None:
            out[self.token_types] = ids.eq(self.image_token_id).long()
            if self.video_token_id is not None:
                out[self.token_types] += 2 * ids.eq(self.video_token_id).long()
        out = out | pixels
        out = out if self.finish is None else self.finish(out)
        device = self.model.device
        return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in out.items()}


def text_tokens(n: int, generator: torch.Generator) -> list[int]:
    """``n`` random ids of text."""
    return torch.randint(SPECIAL, VOCABULARY, (n,), generator=generator).tolist()


def choice(generator: torch.Generator, n: int) -> int:
    """A random number from 0 to ``n - 1``."""
    return int(torch.randint(n, (), generator=generator))


def tiny_model(
    name: str,
    kind: type[PreTrainedModel],
    config: Any,
    pictures: Pictures,
    seed: int,
    token_types: str | None = None,
    gain: float = 1.5,
    slow: str | None = None,
    **more: Any,
) -> TinyVLM:
    """A model of class ``kind`` with random weights, each ``gain`` times as large as would keep the size of a vector.

    ``slow`` ends the names of the parameters that are the logarithm of how fast a recurrence forgets; it then forgets
    a twentieth as fast, so that it remembers more than a token. ``more`` goes to :class:`TinyVLM`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config).float().eval()
        for key, p in model.named_parameters():
            fan_in = _fan_in(p)
            p.data = torch.randn_like(p) * (gain * fan_in**-0.5) if fan_in else p.data + 0.1 * torch.randn_like(p)
            p.data -= 3.0 if slow is not None and key.endswith(slow) else 0.0
    for part in model.modules():  # generate() of some families calls that of a model inside
        if isinstance(part, PreTrainedModel) and part.can_generate():
            settings = part.generation_config
            settings.pad_token_id, settings.eos_token_id, settings.bos_token_id = PAD, None, None
            settings.suppress_tokens = list(range(SPECIAL))
    token = more.pop("image_token_id", None) or config.image_token_id
    return TinyVLM(name, model, token, pictures, token_types, **more)


def _fan_in(p: Tensor) -> int:
    """How many inputs a weight adds up; 0 for those that add up none."""
    square = p.dim() == 3 and p.shape[0] > 1 and min(p.shape[1:]) >= HIDDEN // 2  # experts side by side
    return p.shape[-1] if square else p[0].numel() if p.dim() > 1 else 0


def decoder_sizes(layers: int, **more: Any) -> dict[str, Any]:
    """Arguments of a decoder's configuration, as most families name them."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    ids = {"pad_token_id": PAD, "bos_token_id": None, "eos_token_id": None}
    return {**sizes, **heads, **ids, "num_hidden_layers": layers, **more}


def tower_sizes(**more: Any) -> dict[str, Any]:
    """Arguments of a vision tower's configuration, as most families name them."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {**sizes, "patch_size": 4, **more}


def square(size: int, tokens: int, *, marked: bool = False) -> Pictures:
    """Images that all have one size and one number of tokens."""

    def pictures(counts: Sequence[int], generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        ids = [START, *[IMAGE] * tokens, END] if marked else [IMAGE] * tokens
        pixels = torch.randn(sum(counts), 3, size, size, generator=generator)
        return [ids] * len(pixels), {"pixel_values": pixels}

    return pictures


def tiled(size: int) -> Pictures:
    """Images of one tile, or of two and a thumbnail, 4 tokens a tile, between markers."""

    def pictures(counts: Sequence[int], generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        tiles = [(1, 3)[choice(generator, 2)] for _ in range(sum(counts))]
        ids = [[START, *[IMAGE] * (4 * n), END] for n in tiles]
        return ids, {"pixel_values": torch.randn(sum(tiles), 3, size, size, generator=generator)}

    return pictures


def patches(
    grids: Sequence[tuple[int, int, int]],
    shape: Sequence[int],
    ids: Callable[[tuple[int, int, int]], list[int]],
    names: tuple[str, str] = ("pixel_values", "image_grid_thw"),
) -> Pictures:
    """Images or videos that come as patches, one behind the other, and grids that say how many there are.

    Args:
        grids: patches over time, height and width; each image takes one of them.
        shape: of a patch.
        ids: the token ids of an image of such a grid.
        names: of the inputs that hold patches and grids.
    """

    def pictures(counts: Sequence[int], generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        chosen = [grids[choice(generator, len(grids))] for _ in range(sum(counts))]
        pixels = torch.randn(sum(t * h * w for t, h, w in chosen), *shape, generator=generator)
        return [ids(grid) for grid in chosen], {names[0]: pixels, names[1]: torch.tensor(chosen)}

    return pictures
