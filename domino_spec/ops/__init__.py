"""The hot operations, one page each: plain PyTorch first, with C loops for a CPU and Triton kernels for CUDA."""
