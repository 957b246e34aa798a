"""Will it serve? Answered from configurations and headers, before gigabytes are loaded.

Target and draft are outlined on PyTorch's meta device, and the engine's own code allocates its caches there, so the
memory that is named is the memory that will be allocated. The last part binds the address.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from domino_spec import __version__
from domino_spec.decoding.cycle import Drafter, cycle_room
from domino_spec.devices import choose_device, free_memory
from domino_spec.draft.load import AnyDraft, draft_directory, fit_of, read_any_draft
from domino_spec.drafters.lookup import PlainDecoding
from domino_spec.drafters.methods import KIND_NAMES, check_draft, check_settings, default_method, make_drafter
from domino_spec.ops.native import bindings as cpu
from domino_spec.settings import UserError, found
from domino_spec.target.load import load_tokenizer, target_source
from domino_spec.target.model import Target
from domino_spec.target.native import can_pack
from domino_spec.target.outline import TargetOutline, outline_target

LOCAL = "local"
"""The engine of this package; the others are plug-ins."""


DEFAULT_CAPACITY = 4096


@dataclass(frozen=True)
class Finding:
    """What was found out about one part."""

    part: str
    sentence: str
    works: bool = True
    """False if it prevents serving."""


@dataclass(frozen=True)
class Plan:
    """What is to be served, and how."""

    engine: str
    """local, vllm or sglang."""
    target: str
    draft: str | None
    method: str | None
    """None for the draft's default (`methods.default_method`)."""
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
    """What is known about a plan without loading weights, part by part."""
    findings: list[Finding] = []

    def ask(part: str, question: Callable[[], Any], say: Callable[[Any], str] = str) -> Any:
        """The answer to a question, and a finding about it; None if it is an error."""
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
    """The engine that decodes; a plug-in's hooks are checked.

    Raises:
        UserError: it is not installed, or not as the plug-in expects it.
    """
    if plan.engine == LOCAL:
        return f"domino-spec {__version__}"
    from domino_spec.engines.hooks import check_hooks
    from domino_spec.engines.launch import installed_version

    version = installed_version(plan.engine)
    if plan.draft is None:
        return f"{plan.engine} {version}"
    on_cpu = device is None or device.type == "cpu"
    if plan.engine == "vllm":
        from domino_spec.engines.vllm.install import HOOKS_V1, HOOKS_V2

        check_hooks("vllm", version, HOOKS_V1 if on_cpu else HOOKS_V2)
    else:
        from domino_spec.engines.sglang import check_engine

        check_engine()
    return f"{plan.engine} {version}, which is as the plug-in expects"


def _device_sentence(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device}, {torch.cuda.get_device_name(device)}"
    return f"{device}, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)


def _outline_target(name: str) -> TargetOutline:
    """The target without its weights. Its tokenizer is loaded too, since nothing can be served without it."""
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
    kind = KIND_NAMES[draft.kind].partition(" ")[2]
    return f"{kind}, {config.drafting_summary}{subset}"


def _method(plan: Plan, draft: AnyDraft) -> str:
    """What the method does with the draft and its head."""
    if plan.engine != LOCAL:
        from domino_spec.engines.launch import check_served

        drafts = check_served(plan.engine, draft, plan.num_drafts)
        method = f"{draft.kind}, {drafts} drafts a cycle"
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
    """Weights and caches, compared with what the device has left."""
    target = outline.target
    dtype = target.dtype if plan.dtype == "auto" else getattr(torch, plan.dtype)
    if plan.dtype == "auto" and device.type == "cpu":
        dtype = torch.float32
    target.model.to(dtype)
    weights = outline.weight_bytes if outline.quantization and outline.weight_bytes else _module_bytes(target.model)
    if draft is not None:
        draft = draft.to(dtype).bind(target)
    if plan.engine != LOCAL:
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
        cut_rows = draft.ends.lm_head.nbytes if draft.borrows_lm_head and draft.draft_vocab_ids is not None else 0
        packed = _packed_bytes(draft, draft.ends.lm_head, device) if draft.borrows_lm_head else 0
        needs["draft"] = _module_bytes(draft) + cut_rows + copied * packed
    tokens = slot_capacity(target.max_length, plan.capacity)
    needs |= cache_needs(target, drafter, plan.slots, tokens, plan.prefix_bytes)
    return memory_finding(needs, device)


def slot_capacity(longest: int, capacity: int | None) -> int:
    """Tokens per slot: as asked for, else the target's longest text but at most `DEFAULT_CAPACITY`.

    Raises:
        UserError: the target has no room for so many.
    """
    capacity = min(longest, DEFAULT_CAPACITY) if capacity is None else capacity
    if not 2 <= capacity <= longest:
        raise UserError(f"capacity must be between 2 and the {longest} tokens of the target, got {capacity}")
    return capacity


def _engine_memory(plan: Plan, device: torch.device, target: Target, weights: int, draft: AnyDraft | None) -> Finding:
    """Weights, and the caches of one text of full length. The engine's options decide how much more it uses."""
    tokens = plan.capacity or target.max_length
    needs = {"target": weights}
    caches: list[Any] = [target.new_cache(1, tokens)]
    if draft is not None:
        needs["draft"] = _module_bytes(draft)
        caches.append(make_drafter(draft.kind, draft, requests=1, device=device).allocate(1, tokens))
    needs[f"caches of one text of {tokens:,} tokens"] = bytes_of(caches)
    return memory_finding(needs, device)


# Memory

GIB = 2**30
MOST_SLOTS = 1024
"""Even for a tiny target, measuring the cost of passes with more requests takes minutes."""
ROOM = 0.9
"""The part of what is available that weights and caches may take; activations need what is left."""


def check_slots(slots: int) -> None:
    """Refuse a number of slots out of range.

    Raises:
        UserError: saying what does.
    """
    if not 1 <= slots <= MOST_SLOTS:
        raise UserError(f"slots must be between 1 and {MOST_SLOTS:,}, got {slots}")


def cache_needs(target: Target, drafter: Drafter, slots: int, capacity: int, prefix_bytes: int) -> dict[str, int]:
    """Bytes of an engine's caches by purpose, computed from the caches of one slot."""
    rows = capacity + cycle_room(drafter)
    one = bytes_of((target.new_cache(1, rows), drafter.allocate(1, rows)))
    needs = {f"caches of {slots} slots of {capacity:,} tokens": slots * one}
    return needs | ({"earlier turns": prefix_bytes} if prefix_bytes else {})


def check_room(target: Target, drafter: Drafter, slots: int, capacity: int, prefix_bytes: int) -> None:
    """Refuse what the target's device cannot hold.

    Raises:
        UserError: saying what is needed, what there is, and which options ask for less.
    """
    finding = memory_finding(cache_needs(target, drafter, slots, capacity, prefix_bytes), target.device)
    if not finding.works:
        raise UserError(f"{finding.sentence}: ask for fewer --slots, less --capacity or less --prefix-cache")


def memory_finding(needs: Mapping[str, int], device: torch.device) -> Finding:
    """What is needed, in bytes by purpose, against what the device has left. If that is not known, it works."""
    total, available = sum(needs.values()), free_memory(device)
    parts = ", ".join(f"{purpose} {_gib(count)}" for purpose, count in needs.items())
    sentence = f"{_gib(total)} GiB needed ({parts})"
    if available is None:
        return Finding("memory", f"{sentence}; how much is available is not known on this system")
    fits = total <= ROOM * available
    return Finding("memory", f"{sentence}, {_gib(available)} available{'' if fits else ': too little'}", fits)


def bytes_of(value: Any) -> int:
    """Bytes of all tensors in caches of any kind."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, (list, tuple)):
        return sum(map(bytes_of, value))
    return sum(map(bytes_of, vars(value).values())) if hasattr(value, "__dict__") else 0


def _gib(count: int) -> str:
    return f"{count / GIB:.1f}" if count >= 0.05 * GIB else f"{count / GIB:.2f}"


def _module_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _packed_bytes(module: nn.Module, lm_head: Tensor, device: torch.device) -> int:
    """What packed copies add to the weights: the LM head's always, all linear layers' without native loops."""
    if cpu.is_available(device, lm_head.dtype):
        return lm_head.nbytes
    linears = sum(m.weight.nbytes for m in module.modules() if type(m) is nn.Linear and m.weight is not lm_head)
    return linears + lm_head.nbytes


# Addresses


def check_host(host: str) -> None:
    """Refuse what is neither an IP address nor a well-formed host name.

    Raises:
        UserError: it is neither.
    """
    try:
        ipaddress.ip_address(host)
        return
    except ValueError:
        pass
    try:
        labels = host.encode("idna").decode("ascii").removesuffix(".").split(".")
    except UnicodeError:
        labels = [""]
    if len(host) > 253 or not all(map(_LABEL.fullmatch, labels)) or labels[-1].isdigit():
        raise UserError(f"--host: expected an address or a host name, such as 127.0.0.1, found {found(host)}")


_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?", re.IGNORECASE)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_api_key(host: str, api_key: str | None) -> None:
    """Refuse an address that other machines reach without a key.

    Raises:
        UserError: there is no API key.
    """
    if not is_loopback(host) and not api_key:
        raise UserError(
            f"{host} is reached from other machines: give --api-key or DOMINO_SPEC_API_KEY, or leave out --host"
        )


def bind(host: str, port: int, api_key: str | None) -> socket.socket:
    """A bound socket that does not listen yet; port 0 takes a free one.

    Raises:
        UserError: the address cannot be had, or others reach it and there is no API key.
    """
    check_host(host)
    check_api_key(host, api_key)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        where = f"{host} port {port}" if port else host
        raise UserError(f"cannot listen on {where}: {reason}; choose another --port or --host") from None
    return bound


def url(bound: socket.socket) -> str:
    """Where clients find it."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
