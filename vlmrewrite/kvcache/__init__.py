"""The KV cache whose keys carry their logical positions, so that layers may hold different tokens.

In: keys and values as a model's attention makes them. Out: all keys, values and positions of a layer.
"""

from vlmrewrite.kvcache.adopt import adopt, adopted
from vlmrewrite.kvcache.cache import PositionCache
from vlmrewrite.kvcache.layer import PositionLayer

__all__ = ["PositionCache", "PositionLayer", "adopt", "adopted"]
