"""What we know of transformers: which models can be rewritten, what their arguments mean, how their images are encoded.

In: a Hugging Face model and the arguments of its ``forward``. Out: plain facts (features, grids, layer names, configs)
for the stages behind. Nothing here knows of plans or graphs.
"""

from vlmrewrite.hf.decoder import (
    IMPLEMENTATION,
    attention_swapped,
    decoder_configs,
    decoder_layers,
    parameter_inputs,
    swap_attention,
)
from vlmrewrite.hf.grid import Sizes, frame_grids, grids
from vlmrewrite.hf.inner import (
    Projection,
    decoder_of,
    language_model,
    merged_inside,
    merged_outside,
    projected,
    projections,
)
from vlmrewrite.hf.inputs import named, prompt_end, refuse_packed, tidy, wants_cache, with_tokens, without_full_mask
from vlmrewrite.hf.support import APPLIED, check_support, refuse_checkpointing
from vlmrewrite.hf.vision import (
    MODALITIES,
    Encoded,
    Encoding,
    encode_images,
    encoded_images,
    encoder_features,
    images_of,
    watched,
)

__all__ = [
    "APPLIED",
    "IMPLEMENTATION",
    "MODALITIES",
    "Encoded",
    "Encoding",
    "Projection",
    "Sizes",
    "attention_swapped",
    "check_support",
    "decoder_configs",
    "decoder_layers",
    "decoder_of",
    "encode_images",
    "encoded_images",
    "encoder_features",
    "frame_grids",
    "grids",
    "images_of",
    "language_model",
    "merged_inside",
    "merged_outside",
    "named",
    "parameter_inputs",
    "projected",
    "projections",
    "prompt_end",
    "refuse_checkpointing",
    "refuse_packed",
    "swap_attention",
    "tidy",
    "wants_cache",
    "watched",
    "with_tokens",
    "without_full_mask",
]
