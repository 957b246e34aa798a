"""Triton twins of the operations, for CUDA."""
