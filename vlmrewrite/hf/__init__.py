"""What we know of transformers: which models can be rewritten, what their arguments mean, how their images are encoded.

In: a Hugging Face model and the arguments of its ``forward``. Out: plain facts (features, grids, layer names, configs)
for the stages behind. Nothing here knows of plans or graphs.
"""

from vlmrewrite.hf.caches import cannot_hold, refuse_implementation
from vlmrewrite.hf.checkpointing import Checkpointing, is_checkpointing, take_checkpointing
from vlmrewrite.hf.decoder import (
    EXPERTS,
    IMPLEMENTATION,
    attention_swapped,
    decoder_configs,
    decoder_layers,
    parameter_inputs,
    swap_attention,
)
from vlmrewrite.hf.exchanged import exchanged, has_own_forward, hooked, is_bound
from vlmrewrite.hf.frames import frames_of, in_order, picked_of
from vlmrewrite.hf.grid import Sizes, frame_grids, grids, learned_queries
from vlmrewrite.hf.inner import (
    Projection,
    decoder_of,
    language_model,
    marked,
    merged_inside,
    merged_outside,
    projected,
    projections,
    run_around,
)
from vlmrewrite.hf.inputs import (
    argument_names,
    keeping_all_tokens,
    named,
    prompt_end,
    prompt_end_in,
    refuse_packed,
    tidy,
    wants_cache,
    with_tokens,
    without_full_mask,
)
from vlmrewrite.hf.lent import APPLIED, Site, copied, device_of, elsewhere, hollow, lends, put_forward, sites, to_bring
from vlmrewrite.hf.mixers import (
    Kept,
    attending,
    cache_argument,
    cache_layers,
    cache_states,
    feedforward_layers,
    indexed_mixers,
    is_recurrent,
    mixer_of,
    recurrent_mixers,
)
from vlmrewrite.hf.numbers import goes_by_number
from vlmrewrite.hf.pictures import refuse_one_size, refuse_smaller, smaller
from vlmrewrite.hf.placement import scattered
from vlmrewrite.hf.support import check_support
from vlmrewrite.hf.undo import Undo, drop
from vlmrewrite.hf.vision import (
    MODALITIES,
    Encoded,
    EncoderOutput,
    Encoding,
    encode_images,
    encoded_images,
    encoder_features,
    images_of,
    watched,
)
from vlmrewrite.hf.weights import chosen, dequantise, has_sizes
from vlmrewrite.hf.wrapped import base_model_of, on_base_model

__all__ = [
    "APPLIED",
    "EXPERTS",
    "IMPLEMENTATION",
    "MODALITIES",
    "Checkpointing",
    "Encoded",
    "EncoderOutput",
    "Encoding",
    "Kept",
    "Projection",
    "Site",
    "Sizes",
    "Undo",
    "argument_names",
    "attending",
    "attention_swapped",
    "base_model_of",
    "cache_argument",
    "cache_layers",
    "cache_states",
    "cannot_hold",
    "check_support",
    "chosen",
    "copied",
    "decoder_configs",
    "decoder_layers",
    "decoder_of",
    "dequantise",
    "device_of",
    "drop",
    "elsewhere",
    "encode_images",
    "encoded_images",
    "encoder_features",
    "exchanged",
    "feedforward_layers",
    "frame_grids",
    "frames_of",
    "goes_by_number",
    "grids",
    "has_own_forward",
    "has_sizes",
    "hollow",
    "hooked",
    "images_of",
    "in_order",
    "indexed_mixers",
    "is_bound",
    "is_checkpointing",
    "is_recurrent",
    "keeping_all_tokens",
    "language_model",
    "learned_queries",
    "lends",
    "marked",
    "merged_inside",
    "merged_outside",
    "mixer_of",
    "named",
    "on_base_model",
    "parameter_inputs",
    "picked_of",
    "projected",
    "projections",
    "prompt_end",
    "prompt_end_in",
    "put_forward",
    "recurrent_mixers",
    "refuse_implementation",
    "refuse_one_size",
    "refuse_packed",
    "refuse_smaller",
    "run_around",
    "scattered",
    "sites",
    "smaller",
    "swap_attention",
    "take_checkpointing",
    "tidy",
    "to_bring",
    "wants_cache",
    "watched",
    "with_tokens",
    "without_full_mask",
]
