"""The vocabulary: what a pass can say about which tokens each decoder layer works on, and the counts of a call.

In: the depth of a decoder, passes, and for each call its vision mask. Out: a :class:`Plan` and a :class:`Call`.
Nothing here knows of graphs.
"""

from vlmrewrite.plan.blocks import ATTRIBUTE, LayerCopy, Weights, blocks_of, build
from vlmrewrite.plan.budget import Budget, Depth, Layers, Per, check_depth, chosen_layers, layer_index, tokens_kept
from vlmrewrite.plan.call import GROUPED, Call, Extra
from vlmrewrite.plan.counts import PER, TokenCounts, describe
from vlmrewrite.plan.listing import dispatched, events
from vlmrewrite.plan.needs import FEATURES, NEEDS
from vlmrewrite.plan.pipeline import Outcome, Pass, frozen_pass, run_passes
from vlmrewrite.plan.plan import Plan
from vlmrewrite.plan.substitution import substitute
from vlmrewrite.plan.tokens import (
    All,
    Frame,
    Image,
    Images,
    Last,
    Nothing,
    Pair,
    Selection,
    Text,
    TokenSet,
    Video,
    Videos,
    Vision,
    contains,
)
from vlmrewrite.plan.vocabulary import Begin, Branch, Chooser, Edit, LayerPlan, Policy
from vlmrewrite.plan.wanted import ends_in_last_column, for_last

__all__ = [
    "ATTRIBUTE",
    "FEATURES",
    "GROUPED",
    "NEEDS",
    "PER",
    "All",
    "Begin",
    "Branch",
    "Budget",
    "Call",
    "Chooser",
    "Depth",
    "Edit",
    "Extra",
    "Frame",
    "Image",
    "Images",
    "Last",
    "LayerCopy",
    "LayerPlan",
    "Layers",
    "Nothing",
    "Outcome",
    "Pair",
    "Pass",
    "Per",
    "Plan",
    "Policy",
    "Selection",
    "Text",
    "TokenCounts",
    "TokenSet",
    "Video",
    "Videos",
    "Vision",
    "Weights",
    "blocks_of",
    "build",
    "check_depth",
    "chosen_layers",
    "contains",
    "describe",
    "dispatched",
    "ends_in_last_column",
    "events",
    "for_last",
    "frozen_pass",
    "layer_index",
    "run_passes",
    "substitute",
    "tokens_kept",
]
