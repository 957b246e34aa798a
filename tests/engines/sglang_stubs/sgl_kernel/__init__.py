"""Stands in for SGLang's compiled kernels, of which no CPU build is published: what drafting calls, in PyTorch."""

from __future__ import annotations

import ctypes


def assign_extend_cache_locs_cpu(req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, pool_len):
    """Write every request's cache slots at positions start .. end - 1 behind each other."""
    written = 0
    for row, start, end in zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True):
        out_cache_loc[written : written + end - start] = req_to_token[row, start:end]
        written += end - start


def assign_req_to_token_pool_cpu(req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, pool_len):
    """The other direction: enter every request's new cache slots into its row."""
    read = 0
    for row, start, end in zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True):
        req_to_token[row, start:end] = out_cache_loc[read : read + end - start].to(req_to_token.dtype)
        read += end - start


def copy_all_layer_kv_cache_cpu(data_ptrs, strides, tgt_loc, src_loc):
    """Copy rows of every layer's cache; all are read before any is written."""
    for pointer, stride in zip(data_ptrs.tolist(), strides.tolist(), strict=True):
        rows = [ctypes.string_at(pointer + row * stride, stride) for row in src_loc.tolist()]
        for row, content in zip(tgt_loc.tolist(), rows, strict=True):
            ctypes.memmove(pointer + row * stride, content, stride)


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*arguments, **options):
        raise NotImplementedError(f"sgl_kernel.{name} is a stub")

    return missing
