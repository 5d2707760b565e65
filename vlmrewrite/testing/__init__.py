"""Tools to test passes with: the oracle, hypothesis strategies, and tiny models of real architectures."""
