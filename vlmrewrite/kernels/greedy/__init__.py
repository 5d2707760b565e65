"""Greedy selection of the most diverse vision tokens, all images in one launch."""
