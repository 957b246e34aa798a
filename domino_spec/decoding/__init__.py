"""Propose, verify, commit: lossless speculative decoding for R requests of unequal length."""
