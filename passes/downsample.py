"""Downsample: the control of smaller pictures; the processor makes them smaller, and the decoder is left as it is.

    layers 0-31    run_on All  ->  layers 0-31    run_on All, with fewer vision tokens in the prompt

Published: at equal tokens it beats many methods that drop tokens. A graph cannot do it: the recipe says how the
processor must be set, ``processor = recipe.processor(processor)``, and ``apply`` alone says that it has to be.
``vlmrewrite.evaluate`` and ``vlmrewrite.tune`` set it themselves. Refused, by the processor, where all pictures have
one number of tokens. Own.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from vlmrewrite.hf import smaller
from vlmrewrite.plan import Plan, frozen_pass


@frozen_pass
class Downsample:
    """Make pictures smaller before they are encoded, by way of the processor.

    Args:
        keep: share of each picture's tokens, about, in (0, 1]: sides are as long as its square root says.
    """

    name: ClassVar[str] = "downsample"
    control: ClassVar[bool] = True

    keep: Annotated[float, Field(gt=0, le=1)]

    def processor(self, processor: Any) -> Any:
        """The processor that makes smaller pictures; see :meth:`vlmrewrite.Recipe.processor`.

        Raises:
            ValueError: it makes as many tokens of a picture however small that is.
        """
        return smaller(processor, self.keep)

    def refuse(self, plan: Plan) -> str | None:
        """Never: what it asks for is not in the plan."""
        return None

    def change(self, plan: Plan) -> None:
        """Nothing: all that is there stays."""
        plan.layer(0).run_on(plan.layer(0).run_set)
