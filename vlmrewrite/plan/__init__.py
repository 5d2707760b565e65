"""The vocabulary: what a pass can say about which tokens each decoder layer works on, and the counts of a call.

In: the depth of a decoder, passes, and for each call its vision mask. Out: a :class:`Plan` and a :class:`Call`.
Nothing here knows of graphs.
"""

from vlmrewrite.plan.blocks import ATTRIBUTE, LayerCopy, Weights, build
from vlmrewrite.plan.budget import Budget, Depth, Layers, check_depth, chosen_layers, layer_index, tokens_kept
from vlmrewrite.plan.call import Call, Extra
from vlmrewrite.plan.counts import TokenCounts, describe
from vlmrewrite.plan.interface import Pass, frozen_pass
from vlmrewrite.plan.listing import events
from vlmrewrite.plan.needs import FEATURES, NEEDS, Inputs
from vlmrewrite.plan.pipeline import Outcome, run_passes
from vlmrewrite.plan.plan import Plan
from vlmrewrite.plan.policy import Policy
from vlmrewrite.plan.tokens import (
    All,
    Difference,
    Image,
    Intersection,
    Last,
    Nothing,
    Pair,
    Selection,
    Text,
    TokenSet,
    Union,
    Vision,
    contains,
    difference,
    intersection,
    substitute,
    text_part,
    union,
    vision_part,
)
from vlmrewrite.plan.vocabulary import Branch, Chooser, Edit, LayerPlan

__all__ = [
    "ATTRIBUTE",
    "FEATURES",
    "NEEDS",
    "All",
    "Branch",
    "Budget",
    "Call",
    "Chooser",
    "Depth",
    "Difference",
    "Edit",
    "Extra",
    "Image",
    "Inputs",
    "Intersection",
    "Last",
    "LayerCopy",
    "LayerPlan",
    "Layers",
    "Nothing",
    "Outcome",
    "Pair",
    "Pass",
    "Plan",
    "Policy",
    "Selection",
    "Text",
    "TokenCounts",
    "TokenSet",
    "Union",
    "Vision",
    "Weights",
    "build",
    "check_depth",
    "chosen_layers",
    "contains",
    "describe",
    "difference",
    "events",
    "frozen_pass",
    "intersection",
    "layer_index",
    "run_passes",
    "substitute",
    "text_part",
    "tokens_kept",
    "union",
    "vision_part",
]
