"""Families of transformers that have no builder."""

from __future__ import annotations

ABSENT: dict[str, str] = {
    "blip": "the decoder attends to the image by cross-attention; there are no image tokens in its stream",
    "diffusion_gemma": "an encoder reads the images, a decoder denoises whole blocks of text; no token is the next",
    "evolla": "reads proteins, not images, and by cross-attention",
    "florence2": "an encoder reads image and text, the decoder attends to it by cross-attention",
    "git": "the model puts one image in front of each row itself; no ids stand for it, a row cannot have two",
    "idefics": "layers of gated cross-attention attend to the images; there are no image tokens in the stream",
    "mllama": "layers of cross-attention attend to the images; there are no image tokens in the stream",
    "pix2struct": "an encoder reads the image, the decoder attends to it by cross-attention",
    "pp_formulanet": "an encoder reads the image, the decoder attends to it by cross-attention",
    "udop": "an encoder reads image and text, the decoder attends to it by cross-attention",
    "vision-encoder-decoder": "an encoder reads the image, the decoder attends to it by cross-attention",
}
"""Why, by ``model_type``."""
