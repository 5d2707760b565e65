"""What a GPU is asked, in the order of tests/gpu.sh."""
