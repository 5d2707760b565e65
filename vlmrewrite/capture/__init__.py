"""Capture: a model's own forward behind Dynamo's front end, one graph for each way of calling it.

In: a model and a call's arguments. Out: an FX graph with one ``vlm::attention`` node for each decoder layer.
"""

from vlmrewrite import moved
from vlmrewrite.capture.alike import Alike
from vlmrewrite.capture.dynamo import CAPTURES, LIMIT, CapturedForward, captures_of, limit
from vlmrewrite.capture.graph import Graph
from vlmrewrite.capture.hooks import register, running

__all__ = ["CAPTURES", "LIMIT", "Alike", "CapturedForward", "Graph", "captures_of", "limit", "register", "running"]

moved.register(__name__)
