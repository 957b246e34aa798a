"""Inner loops: PyTorch truth in `reference` and `blended`, with C twins for CPU and Triton twins for CUDA."""
