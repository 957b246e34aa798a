"""The innermost loops of drafting: PyTorch truth in `reference`; Triton twins will stand beside it."""
