"""Inner loops: PyTorch truth, with C twins for CPU and Triton twins (`*_triton` and what they import) for CUDA."""
