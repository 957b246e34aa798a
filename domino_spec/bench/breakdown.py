"""Where a cycle's time goes, as a bench tells it: the median seconds of each stage at a real context of its prompts.

The measurement is `profile`'s; a bench keeps of it what predicts the speed-ups that it measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from domino_spec.bench.cells import table
from domino_spec.bench.profile import profile_cycles
from domino_spec.bench.profile_report import stage_name
from domino_spec.draft.config import DEFAULT_CANDIDATES
from domino_spec.draft.load import AnyDraft
from domino_spec.target.model import Target


@dataclass(frozen=True)
class Breakdown:
    """Median seconds of one request's cycle at temperature 0."""

    method: str
    num_drafts: int
    context: int
    """Committed tokens before the cycle."""
    candidates: int | None
    """K of the head's restricted candidates."""
    repeats: int
    threads: int
    plain_step: float
    """One step of method `none` at the same context."""
    cycle: float
    stages: dict[str, float]
    """By the names in `profile_watch.STAGES`, and `host_gap`: what they leave of the cycle. Each is a median of its
    own, so they add up to the cycle but for noise."""

    @property
    def cost_ratio(self) -> float:
        """c: the tau at which the draft starts to pay, and what tau is divided by to give the speed-up."""
        return self.cycle / self.plain_step


def measure_breakdown(
    target: Target,
    draft: AnyDraft,
    context: Sequence[int],
    *,
    method: str = "domino",
    num_drafts: int | None = None,
    candidates: int | None = DEFAULT_CANDIDATES,
    repeats: int = 20,
) -> Breakdown:
    """Time a cycle, its stages and a plain step, in turn, `repeats` times.

    Args:
        target: the model served.
        draft: bound to it.
        context: token ids of the committed text; the last one is the anchor.
        method: that the draft serves.
        num_drafts: N; None for the most the method makes.
        candidates: K, or None for the whole draft vocabulary.
        repeats: how often; medians are taken.

    Raises:
        UserError: as `profile.profile_cycles`.
    """
    wanted = [(method, num_drafts)]
    profile = profile_cycles(
        target, draft, wanted, context=context, candidates=candidates, repeats=repeats, bandwidth=False
    )
    found = profile.methods[-1]
    stages = {name: stage.seconds.median for name, stage in found.stages.items()}
    return Breakdown(
        method=method,
        num_drafts=found.num_drafts,
        context=profile.context,
        candidates=None if method == "dflash" else candidates,
        repeats=repeats,
        threads=profile.threads,
        plain_step=profile.plain_step.median,
        cycle=found.cycle.median,
        stages=stages | {"host_gap": found.host_gap.median},
    )


def render_breakdown(breakdown: Breakdown) -> str:
    """A Markdown table of one breakdown, milliseconds and shares of the cycle."""
    rows = [(stage_name(name, breakdown.method), seconds) for name, seconds in breakdown.stages.items()]
    rows += [("**cycle**", breakdown.cycle), ("plain step", breakdown.plain_step)]
    cells = [[name, f"{seconds * 1e3:.2f}", f"{seconds / breakdown.cycle:.1%}"] for name, seconds in rows]
    return (
        f"{breakdown.method}, {breakdown.num_drafts} drafts, context {breakdown.context} tokens, "
        f"{breakdown.threads} threads, median of {breakdown.repeats}:\n\n"
        f"{table(['stage', 'ms', 'share of the cycle'], cells)}\n\n"
        f"Cost ratio c = {breakdown.cost_ratio:.2f}: speed-up = tau / c, so the draft pays above tau "
        f"{breakdown.cost_ratio:.2f} and doubles the speed at tau {2 * breakdown.cost_ratio:.2f}."
    )
