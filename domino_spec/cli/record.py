"""What `--json` prints: plain dictionaries of results, and the lines that `inspect` prints for people."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from domino_spec.cli.race import Racer, RaceResult
from domino_spec.decoding.request import Generation
from domino_spec.draft.config import DraftConfig, SingleLayerConfig
from domino_spec.draft.load import DraftDescription, Fit
from domino_spec.target.model import Target


def setting_record(target: Target, draft: str | None) -> dict[str, Any]:
    """What a result was made with."""
    return {
        "target": target.name,
        "draft": draft,
        "device": str(target.device),
        "dtype": str(target.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def generation_record(
    generation: Generation, target: Target, draft: str | None, method: str, drafting_off: str | None = None
) -> dict[str, Any]:
    """A finished generation. `seconds` is the time of decoding; `seconds_prefill` comes before it.

    `drafting_off` is why nothing was drafted (`methods.why_nothing_is_drafted`).
    """
    return {
        "text": generation.text,
        "token_ids": generation.token_ids,
        "num_tokens": generation.num_tokens,
        "num_verify_passes": generation.num_verify_passes,
        "acceptance_length": generation.acceptance_length,
        "tokens_per_second": generation.tokens_per_second,
        "seconds": generation.seconds_decode,
        "seconds_prefill": generation.seconds_prefill,
        "finish_reason": generation.finish_reason,
        "prompt_tokens": len(generation.prompt_ids),
        "acceptance_lengths": generation.acceptance_lengths,
        "num_drafts": generation.num_drafts,
        "drafted": generation.accepted,
        "method": method,
        "drafting": drafting_off is None,
        "reason": drafting_off,
        **setting_record(target, draft),
    }


def _racer_record(racer: Racer) -> dict[str, Any]:
    assert racer.generation is not None
    return {
        "text": racer.generation.text,
        "token_ids": racer.generation.token_ids,
        "num_tokens": racer.generation.num_tokens,
        "num_verify_passes": racer.generation.num_verify_passes,
        "acceptance_length": racer.generation.acceptance_length,
        "tokens_per_second": racer.tokens_per_second,
        "seconds": racer.seconds,
        "seconds_prefill": racer.generation.seconds_prefill,
    }


def races_record(results: Sequence[RaceResult], target: Target, draft: str | None) -> dict[str, Any]:
    """The races of a demo and what they come to."""
    method = results[0].drafted.method
    races = []
    for result in results:
        evidence = result.top_two
        races.append(
            {
                "prompt": result.prompt,
                "none": _racer_record(result.plain),
                method: _racer_record(result.drafted),
                "speed_up": result.speed_up,
                "equal": result.first_difference is None,
                "first_difference": result.first_difference,
                "top_two_margin": evidence.margin if evidence else None,
                "rounding": evidence.rounding if evidence else None,
            }
        )
    return {
        "method": method,
        **setting_record(target, draft),
        "speed_up": overall_speed_up(results),
        "equal": all(race["equal"] for race in races),
        "races": races,
    }


def overall_speed_up(results: Sequence[RaceResult]) -> float:
    """Tokens per second of decoding over all races, with the draft over alone."""
    plain, drafted = [r.plain for r in results], [r.drafted for r in results]
    return _pace(drafted) / _pace(plain)


def _pace(racers: Sequence[Racer]) -> float:
    return sum(r.generation.num_tokens for r in racers if r.generation) / sum(r.seconds for r in racers)


def draft_record(name: str, description: DraftDescription, fit: Fit | None) -> dict[str, Any]:
    """What `inspect` found; what a kind of draft does not have is None."""
    config = description.config
    head = config.head
    return {
        "draft": name,
        "method": description.method,
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "block_size": config.block_size,
        "shift_label": config.shift_label,
        "max_drafts": config.max_drafts,
        "pure_draft_prefix_len": head.pure_draft_prefix_len if head else None,
        "gru_hidden_dim": head.gru_hidden_dim if head else None,
        "low_rank": head.low_rank if head else None,
        "target_layer_ids": None if config.target_layer_ids is None else list(config.target_layer_ids),
        "last_layer_tap": config.last_layer_tap,
        "num_target_layers": config.num_target_layers,
        "vocab_size": config.vocab_size,
        "draft_vocab_size": config.draft_vocab_size,
        "mask_token_id": config.mask_token_id,
        "target_fingerprint": config.target_fingerprint,
        "parameters": description.parameters,
        "dtypes": list(description.dtypes),
        "file_bytes": description.file_bytes,
        "fits": fit.fits if fit else None,
        "fit": fit.sentence if fit else None,
    }


def draft_lines(name: str, description: DraftDescription, fit: Fit | None) -> list[str]:
    """What `inspect` found, for people."""
    config, parameters = description.config, description.parameters
    subset = f"{config.draft_vocab_size:,} frequent ones of the target's " if config.draft_vocab_size else ""
    layers = "a low, a middle and a high layer, by the published rule"
    if config.target_layer_ids is not None:
        layers = f"layers {', '.join(map(str, config.target_layer_ids))}"
        layers += "" if config.num_target_layers is None else f" of {config.num_target_layers}"
    if config.last_layer_tap:
        layers += f", the last {config.last_layer_tap.replace('_', ' its final ')}"
    rows = [
        ("draft", name),
        *_METHOD_ROWS[config.kind](config),
        ("vocabulary", f"{subset}{config.vocab_size:,} tokens"),
        ("reads", layers),
        ("trained for", config.target_fingerprint or "not stated"),
        ("parameters", ", ".join(f"{part} {count:,}" for part, count in parameters.items())),
        ("files", f"{description.file_bytes / 1e6:.1f} MB, {', '.join(description.dtypes)}"),
    ]
    if fit is not None:
        rows.append(("target", fit.sentence if fit.fits else "does not fit"))
    return [f"{label:<12} {text}" for label, text in rows]


def _block_rows(config: DraftConfig) -> list[tuple[str, str]]:
    head = config.head
    labels = "the token one position later (shifted)" if config.shift_label else "the token at its own position"
    kind = "Domino: DFlash backbone with a Domino head" if head else "DFlash: backbone without a head"
    rows = [
        ("method", kind),
        ("backbone", f"{config.num_hidden_layers} layers, hidden size {config.hidden_size}"),
        ("block", f"{config.block_size} slots, each predicts {labels}; {config.max_drafts} usable drafts"),
        ("mask token", str(config.mask_token_id)),
    ]
    if head:
        prefix = f"corrects all drafts but the first {head.pure_draft_prefix_len}"
        rows.insert(3, ("head", f"GRU width {head.gru_hidden_dim}, low rank {head.low_rank}; {prefix}"))
    return rows


def _single_layer_rows(config: SingleLayerConfig) -> list[tuple[str, str]]:
    shape = f"hidden size {config.hidden_size}, {config.num_attention_heads} heads of {config.head_dim}"
    if config.kind == "dart":
        kind = "DART: one layer that predicts several masked positions in one pass"
        block = f"{config.num_masks} masked positions, {config.max_drafts} levels of drafts"
    else:
        kind = "EAGLE-3: one layer that reads its own outputs, token by token"
        block = f"trained for {config.block_size} tokens in a row; drafts trees of any size"
    return [("method", kind), ("layer", shape), ("block", block)]


_METHOD_ROWS: dict[str, Callable[[Any], list[tuple[str, str]]]] = {
    "domino": _block_rows,
    "dflash": _block_rows,
    "eagle3": _single_layer_rows,
    "dart": _single_layer_rows,
}
