"""The testing kit: tiny models, hypothesis strategies, agreement with the oracle; Triton without a GPU."""

from vlmrewrite import moved

moved.register(__name__)
