"""Will it serve? Answered from configurations and headers, before gigabytes are loaded.

Target and draft are outlined on PyTorch's meta device, and the engine's own code is asked for its caches there, so what
is said about memory is what will be allocated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from domino_spec import __version__
from domino_spec.decoding.cycle import Drafter
from domino_spec.draft.config import DraftConfig
from domino_spec.draft.domino import Draft
from domino_spec.draft.load import AnyDraft, draft_directory, fit_of, read_any_draft
from domino_spec.drafters.lookup import PlainDecoding
from domino_spec.drafters.methods import KIND_NAMES, check_draft, check_settings, default_method, kind_of, make_drafter
from domino_spec.engines.hooks import check_hooks
from domino_spec.engines.launch import ENGINES, check_served, installed_version
from domino_spec.ops.native import bindings as cpu
from domino_spec.serve.memory import bytes_of, cache_needs, fits, memory_sentence
from domino_spec.settings import UserError
from domino_spec.target.load import load_tokenizer, target_source
from domino_spec.target.model import Target
from domino_spec.target.native import can_pack
from domino_spec.target.outline import TargetOutline, outline_target


@dataclass(frozen=True)
class Finding:
    """What was found out about one part."""

    part: str
    sentence: str
    works: bool = True
    """False: it stands in the way."""


@dataclass(frozen=True)
class Plan:
    """What is to be served, and how."""

    engine: str
    """local, or one of `launch.ENGINES`."""
    target: str
    draft: str | None
    method: str | None
    """None for the draft's own."""
    device: str
    """auto, cpu, mps, cuda or cuda:N."""
    dtype: str
    """auto, or the name of one of PyTorch's types."""
    slots: int
    capacity: int | None
    """Tokens per slot; None for what the engine takes."""
    candidates: int | None
    num_drafts: int | None
    prefix_bytes: int
    allow_other_target: bool
    settings: tuple[str, ...] = ()
    """Arguments of `make_drafter` that were asked for; the method must read them."""


def preflight(plan: Plan) -> list[Finding]:
    """What can be known about a plan without loading weights, part by part."""
    findings: list[Finding] = []

    def ask(part: str, question: Callable[[], Any], say: Callable[[Any], str] = str) -> Any:
        """The answer to a question, and a finding about it; None where it is an error."""
        try:
            answer = question()
            findings.append(Finding(part, say(answer)))
            return answer
        except UserError as error:
            findings.append(Finding(part, str(error), works=False))
            return None

    device = ask("device", lambda: choose_device(plan.device), _device_sentence)
    ask("engine", lambda: _engine(plan, device))
    target = ask("target", lambda: _outline_target(plan.target), _target_sentence)
    draft = None
    if plan.draft is not None:
        name = plan.draft
        draft = ask("draft", lambda: _outline_draft(name), _draft_sentence)
        if draft is not None:
            ask("method", lambda: _method(plan, draft))
        if draft is not None and target is not None:
            fit = fit_of(draft.config, name, target.target, plan.allow_other_target)
            findings.append(Finding("pairing", fit.sentence, fit.fits))
    if device is not None and target is not None and all(finding.works for finding in findings):
        findings.append(_memory(plan, device, target, draft))
    return findings


def _engine(plan: Plan, device: torch.device | None) -> str:
    """What decodes, its inner hooks checked.

    Raises:
        UserError: it is not installed, or not as the plug-in expects it.
    """
    if plan.engine not in ENGINES:
        return f"domino-spec {__version__}"
    version = installed_version(plan.engine)
    if plan.draft is None:
        return f"{plan.engine} {version}"
    on_cpu = device is None or device.type == "cpu"
    if plan.engine == "vllm":
        from domino_spec.engines.vllm import table

        check_hooks("vllm", version, table.V1 if on_cpu else table.V2)
    else:
        from domino_spec.engines.sglang import check_engine

        check_engine()
    return f"{plan.engine} {version}, which is as the plug-in expects"


def choose_device(name: str) -> torch.device:
    """The device that a name stands for.

    Raises:
        UserError: this machine does not have it.
    """
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(f"{name} was asked for, but PyTorch sees {count or 'no'} CUDA device{'s' * (count > 1)}")
    return device


def _device_sentence(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device}, {torch.cuda.get_device_name(device)}"
    return f"{device}, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)


def _outline_target(name: str) -> TargetOutline:
    """The target without its weights. Its tokenizer is loaded, too: nothing can be served without it."""
    outline = outline_target(name)
    load_tokenizer(target_source(name), f"target {name}")
    return outline


def _target_sentence(outline: TargetOutline) -> str:
    target = outline.target
    weights = f"{outline.parameters / 1e6:,.0f} M parameters"
    if outline.quantization:
        weights += f", quantised ({outline.quantization})"
    elif outline.weight_bytes is None:
        weights += ", not downloaded yet"
    return (
        f"{target.name}: {outline.architecture}, {target.num_layers} layers, hidden size {target.hidden_size}, "
        f"vocabulary {target.vocab_size:,}, {target.max_length:,} tokens, {weights}"
    )


def _outline_draft(name: str) -> AnyDraft:
    return read_any_draft(draft_directory(name), outline=True)


def _draft_sentence(draft: AnyDraft) -> str:
    config = draft.config
    subset = f" among {config.draft_vocab_size:,} frequent tokens" if config.draft_vocab_size else ""
    kind = KIND_NAMES[kind_of(draft)].partition(" ")[2]
    if not isinstance(config, DraftConfig):
        return f"{kind}, one layer; trained for {config.max_drafts} drafts in a row{subset}"
    labels = "one position later" if config.shift_label else "of their own position"
    return (
        f"{kind}, {config.num_hidden_layers} layers; {config.block_size} slots predict the token {labels}, so up to "
        f"{config.max_drafts} drafts a cycle{subset}"
    )


def _method(plan: Plan, draft: AnyDraft) -> str:
    """What the method does with the draft, above all with its head."""
    if plan.engine in ENGINES:
        drafts = check_served(plan.engine, draft, plan.num_drafts)
        method = f"{kind_of(draft)}, {drafts} drafts a cycle"
    else:
        method = plan.method or default_method(draft)
        check_draft(method, draft)
        check_settings([method], plan.settings)
    head = draft.config.head
    if head is None or not method.startswith("domino"):
        return method
    width = "all logits" if plan.candidates is None else f"the {plan.candidates} best base logits"
    pure = {0: "", 1: " but the first"}.get(head.pure_draft_prefix_len, f" but the first {head.pure_draft_prefix_len}")
    return (
        f"{method}; the head (GRU {head.gru_hidden_dim}, low rank {head.low_rank}) corrects {width} of all drafts{pure}"
    )


def _memory(plan: Plan, device: torch.device, outline: TargetOutline, draft: AnyDraft | None) -> Finding:
    """Weights and caches, against what the device has left."""
    target = outline.target
    dtype = target.dtype if plan.dtype == "auto" else getattr(torch, plan.dtype)
    if plan.dtype == "auto" and device.type == "cpu":
        dtype = torch.float32
    target.model.to(dtype)
    weights = outline.weight_bytes if outline.quantization and outline.weight_bytes else _bytes(target.model)
    if draft is not None:
        draft = draft.to(dtype).bind(target)
    if plan.engine in ENGINES:
        return _engine_memory(plan, device, target, weights, draft)
    copied = can_pack(device, dtype)
    needs = {"target": weights + copied * _packed_bytes(target.model, target.lm_head_weight, device)}
    drafter: Drafter = PlainDecoding()
    if draft is not None:
        drafter = make_drafter(
            plan.method or default_method(draft),
            draft,
            requests=1,
            device=device,
            candidates=plan.candidates,
            num_drafts=plan.num_drafts,
        )
        own_rows = draft.ends.lm_head.nbytes if isinstance(draft, Draft) and draft.draft_vocab_ids is not None else 0
        packed = _packed_bytes(draft, draft.ends.lm_head, device) if isinstance(draft, Draft) else 0
        needs["draft"] = _bytes(draft) + own_rows + copied * packed
    from domino_spec.serve.server import slot_capacity

    tokens = slot_capacity(target.max_length, plan.capacity)
    needs |= cache_needs(target, drafter, plan.slots, tokens, plan.prefix_bytes)
    return memory_finding(needs, device)


def _engine_memory(plan: Plan, device: torch.device, target: Target, weights: int, draft: AnyDraft | None) -> Finding:
    """Weights, and the least of caches that makes sense: one text of full length. An engine takes all it is given."""
    tokens = plan.capacity or target.max_length
    needs = {"target": weights}
    caches: list[Any] = [target.new_cache(1, tokens)]
    if draft is not None:
        needs["draft"] = _bytes(draft)
        caches.append(make_drafter(kind_of(draft), draft, requests=1, device=device).allocate(1, tokens))
    needs[f"caches of one text of {tokens:,} tokens"] = bytes_of(caches)
    return memory_finding(needs, device)


def memory_finding(needs: Mapping[str, int], device: torch.device) -> Finding:
    """What is needed, in bytes by purpose, against what the device has left."""
    return Finding("memory", memory_sentence(needs, device), fits(needs, device))


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _packed_bytes(module: nn.Module, lm_head: Tensor, device: torch.device) -> int:
    """What packed copies take beside the weights: the LM head's always, all linear layers' without native loops."""
    if cpu.is_available(device, lm_head.dtype):
        return lm_head.nbytes
    linears = sum(m.weight.nbytes for m in module.modules() if type(m) is nn.Linear and m.weight is not lm_head)
    return linears + lm_head.nbytes
