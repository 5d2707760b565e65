"""The study: techniques and controls at equal FLOPs on two small models; ``python -m examples.digits.study``."""
