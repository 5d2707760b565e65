"""The command line: what there is, what a recipe would do to a model, what it does, and what that costs."""

from vlmrewrite import moved
from vlmrewrite.cli import apply as apply
from vlmrewrite.cli import bench as bench
from vlmrewrite.cli import eval as eval
from vlmrewrite.cli import families as families
from vlmrewrite.cli import inspect as inspect
from vlmrewrite.cli import listing as listing
from vlmrewrite.cli import map as map
from vlmrewrite.cli import serve as serve
from vlmrewrite.cli import serve_args as serve_args
from vlmrewrite.cli import train as train
from vlmrewrite.cli import tune as tune
from vlmrewrite.cli.app import app

__all__ = ["app"]

moved.register(__name__)
