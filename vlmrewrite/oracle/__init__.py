"""The oracle: the meaning of a plan, as the unmodified model under masks. It shares no code with the rewrite.

In: an unmodified model, inputs and masks. Out: the logits that a rewritten model must agree with.
"""

from vlmrewrite.oracle.hooks import oracle_logits, positioned
from vlmrewrite.oracle.masks import LayerMasks
from vlmrewrite.oracle.verify import layer_masks, verify_applied

__all__ = ["LayerMasks", "layer_masks", "oracle_logits", "positioned", "verify_applied"]
