"""Measurements of recipes, stored, and what compares two of them: see ``docs/performance.md``."""
