"""What SGLang lacks for drafting on a CPU: permission, attention over a block, acceptance of sampled drafts."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from domino_spec.ops.acceptance import sampled_chain
from domino_spec.settings import UserError

BACKEND = "torch_native"


@contextmanager
def admitted(asked: Any) -> Iterator[None]:
    """A context in which SGLang's check of arguments accepts that a CPU drafts.

    Raises:
        UserError: an attention backend that cannot verify a block on CPU.
    """
    if asked.device != "cpu":
        yield
        return
    from sglang.srt.arg_groups import speculative_hook

    if asked.attention_backend != BACKEND:
        raise UserError(f"--attention-backend {asked.attention_backend}: a Domino draft on CPU needs {BACKEND}")
    _allow_backend()
    platform = speculative_hook.current_platform
    speculative_hook.current_platform = _Drafting(platform)
    try:
        yield
    finally:
        speculative_hook.current_platform = platform


class _Drafting:
    """A platform of SGLang that claims to support drafting."""

    def __init__(self, platform: Any) -> None:
        self._platform = platform

    def __getattr__(self, name: str) -> Any:
        return getattr(self._platform, name)

    def is_out_of_tree(self) -> bool:
        return True

    def supports_speculative_algorithm(self, algorithm: str) -> bool:
        return algorithm == "DFLASH"

    def supports_speculative_draft_attention_backend(self, algorithm: str, backend: str) -> bool:
        return algorithm == "DFLASH" and backend == BACKEND


def _allow_backend() -> None:
    from sglang.srt.arg_groups import choices

    if BACKEND not in choices.DRAFT_ATTENTION_BACKEND_CHOICES:
        choices.add_draft_attention_backend_choices([BACKEND])


def prepare_process() -> None:
    """Prepare the process that runs the models: attention over a block, and no streams."""
    _allow_backend()
    _attend_blocks()
    _ignore_streams()


def _ignore_streams() -> None:
    """SGLang tells the allocator which stream reads a tensor; on CPU there are none, and PyTorch raises."""
    tensors: Any = torch.Tensor
    record = tensors.record_stream

    def record_stream(self: Tensor, stream: Any) -> None:
        if self.device.type != "cpu":
            record(self, stream)

    tensors.record_stream = record_stream


def _attend_blocks() -> None:
    """Let `torch_native` attend for several rows per request after a cached prefix."""
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    plain = TorchNativeAttnBackend.forward_extend

    def forward_extend(
        self: Any, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, save_kv_cache: bool = True
    ) -> Tensor:
        if forward_batch.forward_mode.is_target_verify():
            forward_batch = as_extend(forward_batch)
        return plain(self, q, k, v, layer, forward_batch, save_kv_cache)

    TorchNativeAttnBackend.forward_extend = forward_extend


def as_extend(forward_batch: Any) -> Any:
    """A verify pass as a prefill that continues: its lengths are those of the prefix, without the block."""
    extended = copy.copy(forward_batch)
    prefix = forward_batch.seq_lens
    rows = forward_batch.spec_info.draft_token_num
    extended.extend_prefix_lens = prefix
    extended.extend_seq_lens = torch.full_like(prefix, rows)
    extended.seq_lens = prefix + rows
    return extended


def prepare_backbone(draft_model: Any) -> None:
    """Keep the draft's attention off a kernel that needs a GPU."""
    for layer in draft_model.layers:
        layer.self_attn.use_table_qk_norm_rope = False


def accept_sampled(
    candidates: Tensor, logits: Tensor, candidate_ids: Tensor, draft_probs: Tensor, sampling_info: Any
) -> tuple[Tensor, Tensor]:
    """Speculative sampling (`ops.acceptance.sampled_chain`).

    Args:
        candidates: [R, B], the anchor and its drafts.
        logits: [R * B, V], the target's, penalties applied.
        candidate_ids: [R, B - 1, K], what each draft could have been.
        draft_probs: [R, B - 1, K], how probable that was.
        sampling_info: SGLang's settings of the batch.

    Returns:
        The number of accepted drafts [R] int32 and the bonus tokens [R] int64.
    """
    requests, rows = candidates.shape
    probs = target_distribution(logits, sampling_info, rows).view(requests, rows, -1)
    accepted = sampled_chain(
        probs,
        candidates[:, 1:],
        torch.full_like(candidates[:, 0], rows - 1),
        candidate_ids,
        draft_probs.float(),
        torch.rand(requests, rows - 1, dtype=torch.float64, device=logits.device),
        torch.rand(requests, rows, dtype=torch.float64, device=logits.device),
    )
    bonus = accepted.tokens.gather(1, accepted.num_accepted[:, None])[:, 0]
    return accepted.num_accepted.to(torch.int32), bonus


def target_distribution(logits: Tensor, sampling_info: Any, rows: int) -> Tensor:
    """The distribution that SGLang samples from [R * rows, V] float32: temperature, then top-k, top-p and min-p.

    As its own sampler in PyTorch, all three cut the distribution at temperature, and what is left is renormalised.
    """

    def of_rows(values: Tensor) -> Tensor:
        return values.view(-1).repeat_interleave(rows)[:, None]

    probs = (logits.float() / of_rows(sampling_info.temperatures).float()).softmax(-1)
    ranked, ids = probs.sort(-1, descending=True)
    before = ranked.cumsum(-1) - ranked
    ranks = torch.arange(ranked.shape[-1], device=ranked.device)
    kept = (ranks < of_rows(sampling_info.top_ks)) & (before <= of_rows(sampling_info.top_ps))
    if sampling_info.need_min_p_sampling:
        kept &= ranked >= ranked[:, :1] * of_rows(sampling_info.min_ps)
    ranked = ranked * kept
    return torch.zeros_like(probs).scatter_(1, ids, ranked / ranked.sum(-1, keepdim=True))
