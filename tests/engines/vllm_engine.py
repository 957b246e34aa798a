"""vLLM inside the test's own process, tiny pairs on disk, and what vLLM drafted beside what this package drafts."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL=os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
    HF_HUB_OFFLINE="1",
)

import torch
from torch import Tensor

from domino_spec.decoding.cycle import Proposal, State
from domino_spec.decoding.request import Limits
from domino_spec.draft.checkpoint import save_draft
from domino_spec.draft.config import DEFAULT_CANDIDATES, DraftConfig, HeadConfig
from domino_spec.draft.domino import Draft
from domino_spec.drafters.block import BlockDrafter
from domino_spec.target.model import Target
from tests import tiny

Drafted = dict[tuple[int, ...], list[int]]
"""The text that was committed, prompt included, to what was drafted after it."""


def tiny_llama(**options: Any) -> Any:
    """A random Llama whose heads are as wide as vLLM's attention on CPU wants them."""
    shape = dict(hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=32)
    return tiny.tiny_model(**{**shape, **options})


def save_pair(
    directory: Path,
    model: Any,
    *,
    shift_label: bool = True,
    block_size: int = 5,
    prefix: int = 1,
    draft_vocab_ids: Tensor | None = None,
    fingerprint: bool = True,
    seed: int = 1,
    **changes: Any,
) -> tuple[Path, Path]:
    """Write a target and a random Domino draft for it; returns both directories."""
    target, where = tiny.as_target(model), directory / "target"
    if not where.exists():
        model.save_pretrained(where)
    shape = dict(
        hidden_size=target.hidden_size,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        vocab_size=target.vocab_size,
        num_target_layers=target.num_layers,
        target_layer_ids=(0, 3),
        mask_token_id=tiny.MASK,
        block_size=block_size,
        shift_label=shift_label,
        head=HeadConfig(gru_hidden_dim=12, low_rank=6, pure_draft_prefix_len=prefix),
        draft_vocab_size=None if draft_vocab_ids is None else len(draft_vocab_ids),
        target_fingerprint=target.fingerprint if fingerprint else None,
    )
    draft = Draft(DraftConfig(**{**shape, **changes}), draft_vocab_ids)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.copy_(1 + noise if "norm" in name else noise)
    number = len(list(directory.glob("draft*")))
    save_draft(draft, directory / f"draft{number}")
    return where, directory / f"draft{number}"


class Running:
    """A vLLM engine; let go of at the end of `engine`, since its remains would end the one that comes after."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm

    def outputs(self, prompts: list[list[int]], count: int, **sampling: Any) -> list[Any]:
        """vLLM's own outputs for `count` tokens after every prompt; greedy unless told otherwise."""
        from vllm import SamplingParams

        fixed = {"temperature": 0.0, "max_tokens": count, "ignore_eos": True, "detokenize": False}
        params = SamplingParams(**{**fixed, **sampling})
        return self.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)

    def generate(self, prompts: list[list[int]], count: int, **sampling: Any) -> list[list[int]]:
        """The tokens of `outputs`."""
        return [list(output.outputs[0].token_ids) for output in self.outputs(prompts, count, **sampling)]

    def metrics(self) -> dict[str, Any]:
        """vLLM's own counters of speculative decoding, by their last words."""
        named = {m.name.removeprefix("vllm:spec_decode_num_"): m for m in self.llm.get_metrics()}
        return {
            name: getattr(m, "value", getattr(m, "values", None)) for name, m in named.items() if "vllm:" not in name
        }

    @property
    def acceptance_length(self) -> float:
        """Mean tokens per verify pass, the bonus included."""
        counted = self.metrics()
        return 1 + counted["accepted_tokens"] / counted["drafts"]


@contextmanager
def engine(
    target: Path | str, draft: Path | str | None = None, num_drafts: int = 0, **options: Any
) -> Iterator[Running]:
    """vLLM in fp32 in this process, with a draft or without; `speculative` adds to the draft's settings."""
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    speculative = options.pop("speculative", {})
    if draft is not None:
        settings = {"method": "dflash", "model": str(draft), "num_speculative_tokens": num_drafts}
        options["speculative_config"] = {**settings, **speculative}
    sizes = dict(max_model_len=128, max_num_seqs=8, max_num_batched_tokens=512, skip_tokenizer_init=True)
    fixed = dict(dtype="float32", enforce_eager=True, distributed_executor_backend="uni", disable_log_stats=False)
    running = Running(None)
    try:
        running.llm = LLM(str(target), **{**fixed, **sizes, **options})
        yield running
    finally:
        running.llm = None
        gc.collect()
        cleanup_dist_env_and_memory()


@contextmanager
def recorded() -> Iterator[list[tuple[str, int, int, list[int]]]]:
    """What vLLM's drafter proposes meanwhile: request, position of the anchor, anchor, drafts."""
    from domino_spec.engines.vllm.proposer import DominoProposer

    records: list[tuple[str, int, int, list[int]]] = []
    original = DominoProposer.propose

    def propose(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        drafts = original(self, *args, **kwargs)
        positions = self.positions[:: self.draft.config.block_size].tolist()
        anchors = self._anchors.tolist()
        records.extend(zip(list(self.runner.input_batch.req_ids), positions, anchors, drafts.tolist(), strict=False))
        return drafts

    DominoProposer.propose = propose
    try:
        yield records
    finally:
        DominoProposer.propose = original


def by_text(
    records: list[tuple[str, int, int, list[int]]], texts: list[list[int]], prompts: list[list[int]]
) -> Drafted:
    """Drafts by the text before them; those after a part of a prompt, which nobody verifies, are left out."""
    drafted: Drafted = {}
    names = sorted({record[0] for record in records}, key=lambda name: int(name.split("-")[0]))
    for request, position, anchor, drafts in records:
        whose = names.index(request)
        text = prompts[whose] + texts[whose]
        if len(prompts[whose]) <= position < len(text):
            assert text[position] == anchor
            drafted[tuple(text[: position + 1])] = drafts
    return drafted


class _Recorder(BlockDrafter):
    """This package's drafter, which notes what it proposed."""

    drafted: Drafted

    def propose(self, state: State, own: Any, num_drafts: int) -> Proposal:
        proposal = super().propose(state, own, num_drafts)
        for row, length, drafts in zip(
            state.tokens.tolist(), state.lengths.tolist(), proposal.tokens.tolist(), strict=True
        ):
            self.drafted[tuple(row[:length])] = drafts
        return proposal


def our_drafts(target: Target, draft: Draft, prompts: list[list[int]], count: int, num_drafts: int) -> Drafted:
    """What this package drafts while it decodes greedily."""
    drafter = _Recorder(draft, candidates=DEFAULT_CANDIDATES)
    drafter.drafted = {}
    limits = Limits(count, stop_token_ids=frozenset())
    tiny.run(target, drafter, prompts, count, limits=limits, num_drafts=num_drafts)
    return drafter.drafted
