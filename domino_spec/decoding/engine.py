"""The decoding loop: requests come and go, and those that are there are decoded together, one cycle at a time.

Each `Engine.step` reads a part of the prompts that wait, then runs one cycle for all requests that are being decoded:
propose, verify, commit. `decode` makes an engine for a batch of prompts and runs it to the end.

A request occupies a *slot*, a row of tensors that are allocated once. The slots in use are always the first ones, so
that a pass costs nothing for the others; if a request ends, the last one moves into its slot. A request's text does not
depend on which others are decoded with it: its random numbers are keyed by its own seed and positions.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from domino_spec.decoding.cycle import (
    Drafter,
    DraftPlan,
    DraftPolicy,
    ObservedCycle,
    Proposal,
    State,
    Verdict,
    commit,
    cycle_room,
    scope,
    verify,
)
from domino_spec.decoding.prefixes import Prefix, PrefixCache
from domino_spec.decoding.request import (
    CycleResult,
    DraftWatch,
    Ending,
    Generation,
    Limits,
    Request,
    Slot,
    Stats,
    check_prompt,
    take_unread,
)
from domino_spec.decoding.sampling import Sampling, SamplingSettings, seed_of
from domino_spec.settings import UserError
from domino_spec.target.model import PREFILL_CHUNK, Target

READ_ROWS = 2048
"""Rows of one prefill pass over several prompts."""
MOST_UNREAD = 1024
"""Cycles without drafts after which the drafter reads what they committed: their features take memory."""
TRIAL_REQUESTS = 4
"""Requests that a trial drafts for at most."""


class Engine:
    """Decodes many requests together.

    Args:
        target: the frozen model.
        drafter: any drafting method.
        slots: requests that are decoded together; others wait.
        capacity: tokens that a request may have, prompt and answer together.
        num_drafts: drafts per cycle; None for the drafter's most.
        policy: decides, cycle by cycle, how many drafts pay; None always drafts. It is not asked if a request samples
            its drafts: their number would decide which text a seed gives.
        matching_rule: see `verify`.
        prefixes: keeps texts that ended, for prompts that begin like them; None keeps none.
        static: run static cycles (`graphs/`), captured as graphs on CUDA, if the drafter can. While a request wants
            log-probabilities, cycles are ordinary ones.
        watch: counts what is accepted, and warns if drafting is of no use; None counts nothing.

    Raises:
        UserError: fewer slots than one.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        *,
        slots: int,
        capacity: int,
        num_drafts: int | None = None,
        policy: DraftPolicy | None = None,
        matching_rule: bool = False,
        prefixes: PrefixCache | None = None,
        static: bool = False,
        watch: DraftWatch | None = None,
    ) -> None:
        if slots < 1:
            raise UserError(f"an engine needs at least one slot, got {slots}")
        self.target, self.drafter, self.policy, self.matching_rule = target, drafter, policy, matching_rule
        self.slots, self.capacity, self.prefixes, self.watch = slots, capacity, prefixes, watch
        self.num_drafts = drafter.max_drafts if num_drafts is None else min(num_drafts, drafter.max_drafts)
        self.stats = Stats()
        rows, device = capacity + cycle_room(drafter), target.device
        self.state = State(
            tokens=torch.zeros(slots, rows, dtype=torch.long, device=device),
            lengths=torch.zeros(slots, dtype=torch.long, device=device),
            prompt_lengths=torch.zeros(slots, dtype=torch.long, device=device),
            active=torch.ones(slots, dtype=torch.bool, device=device),
            cache=target.new_cache(slots, rows),
            sampling=Sampling([], device),
        )
        """Of all slots."""
        self.cache = drafter.allocate(slots, rows)
        """The drafter's, for all slots."""
        self._waiting: deque[Slot] = deque()
        self._reading: list[Slot] = []
        self._read_from = 0
        """The place of the first prompt being read: behind the requests that were decoded when it was admitted."""
        self._running: list[Slot] = []
        self._batch: tuple[State, Any] | None = None
        """The part of state and cache of those that are being decoded, until one comes or goes."""
        self.static = None
        """Runs static cycles; None runs ordinary ones."""
        if static:
            from domino_spec.decoding.graphs.cycles import static_cycles

            memory = self.state, self.cache
            self.static = static_cycles(target, drafter, *memory, self.num_drafts, matching_rule, policy)

    @property
    def busy(self) -> bool:
        """Whether any request has not ended."""
        return bool(self._waiting or self._reading or self._running)

    @property
    def num_running(self) -> int:
        """Requests being decoded or read."""
        return len(self._running) + len(self._reading)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._waiting)

    def check(self, request: Request) -> None:
        """Refuse a request that cannot be decoded.

        Raises:
            UserError: see `check_prompt`; or it is larger than a slot.
        """
        length, limit = len(request.prompt_ids), request.limits.max_new_tokens
        check_prompt(self.target, request.prompt_ids, limit)
        if length + limit > self.capacity:
            raise UserError(
                f"a prompt of {length} tokens and max_new_tokens {limit} exceed the {self.capacity} tokens of a slot"
            )

    def submit(self, request: Request, generation: Generation | None = None) -> Generation:
        """Queue a request; returns its generation, which `step` grows (or grows the one given).

        Raises:
            UserError: see `check`.
        """
        self.check(request)
        generation = Generation(list(request.prompt_ids)) if generation is None else generation
        self._waiting.append(Slot(request, generation, Ending(self.target, request.limits), time.perf_counter()))
        return generation

    def cancel(self, generation: Generation) -> None:
        """End a request as it is; its slot is free from the next step on."""
        if generation.finish_reason is None:
            generation.finish_reason = "cancelled"

    @torch.inference_mode()
    def step(self) -> list[Generation]:
        """Read a part of the prompts that wait, then run one cycle; returns the generations that grew or ended."""
        self._release()
        if self._waiting or self._reading:
            self._admit()
            self._read_prompts()
        if not self._running:
            if self.static is not None:
                self.static.pending = None  # its requests have ended
            return []
        if self.static is not None and self.static.takes(self._running):
            self._read_committed(self._running)
            late = self.static.step(self._running)
            return [] if late is None else self._deliver(late)
        return self._deliver(self._cycle())

    # One cycle

    def _cycle(self) -> CycleResult:
        """Propose, verify, commit."""
        state, cache = self._batch = self._batch or self._view(len(self._running))
        plan = None if self.policy is None else self._plan()
        num_drafts = self.num_drafts if plan is None else plan.drafts
        trial = self._trial() if plan is not None and plan.trial else None
        if num_drafts and any(slot.unread for slot in self._running):
            self._read_committed(self._running)
        started = time.perf_counter()
        with scope("propose"):
            offered = self._propose(state, cache, num_drafts)
            proposal = plan.cut(offered) if plan is not None and num_drafts else offered
        with scope("accept"):
            verdict = verify(self.target, state, proposal, self.drafter.feature_layers, self.matching_rule)
            commit(state, verdict)
        with scope("read"):
            if proposal.tokens.shape[1]:
                self.drafter.advance(cache, verdict)
            else:
                self._postpone(verdict)
        if self.policy is not None and plan is not None:
            seconds, (offered, trial_seconds) = time.perf_counter() - started, trial or (offered, None)
            self.policy.observe(ObservedCycle(plan, offered, proposal, verdict, seconds, trial_seconds))
        return CycleResult(
            slots=list(self._running),
            tokens=verdict.tokens.tolist(),
            num_accepted=verdict.num_accepted.tolist(),
            num_drafts=proposal.num_drafts.tolist(),
            finite=verdict.finite.tolist(),
            verdict=verdict,
        )

    def _view(self, requests: int) -> tuple[State, Any]:
        """State and drafter's cache of the first requests that are being decoded."""
        sampling = Sampling([slot.request.settings for slot in self._running[:requests]], self.target.device)
        return self.state.view(0, requests, sampling), self.cache.view(0, requests)

    def _propose(self, state: State, cache: Any, num_drafts: int) -> Proposal:
        if num_drafts == 0:
            return Proposal.empty(len(self._running), self.target.device)
        return self.drafter.propose(state, cache, num_drafts)

    def _postpone(self, verdict: Verdict) -> None:
        """Keep what a cycle without drafts committed; the drafter reads it before it drafts again."""
        for place, slot in enumerate(self._running):
            row = slice(place, place + 1)
            slot.unread.append((verdict.tokens[row], None if verdict.features is None else verdict.features[row]))
            if len(slot.unread) >= MOST_UNREAD:
                self._read_committed([slot], place)

    def _read_committed(self, slots: Sequence[Slot], first: int = 0) -> None:
        """Let the drafter read what was committed without drafts, all cycles together, of these slots from `first`."""
        width = len(self.drafter.feature_layers) * self.target.hidden_size
        # Those with less to read are padded to those with the most, and must have room for it.
        most = self.state.tokens.shape[1] - max(slot.length for slot in slots)
        while any(slot.unread for slot in slots):
            part = self.cache.view(first, first + len(slots))
            self.drafter.read(part, *take_unread(slots, most, width, self.target))

    def _deliver(self, result: CycleResult) -> list[Generation]:
        """Grow the generations by what a cycle decided, and count it."""
        now, grown = time.perf_counter(), []
        decoded = [row for row, accepted in enumerate(result.num_accepted) if accepted >= 0]
        if decoded:
            drafts = sum(result.num_drafts[row] for row in decoded)
            self.stats.cycles += 1
            self.stats.drafted_cycles += drafts > 0
            self.stats.verify_passes += len(decoded)
            self.stats.drafts += drafts
            self.stats.committed_tokens += sum(result.num_accepted[row] + 1 for row in decoded)
        if self.watch is not None:
            self.watch.count(result.num_drafts, result.num_accepted)
        for row in decoded:
            grown.append(result.slots[row].generation)
            result.slots[row].grow(result, row, now)
        self._release()
        return grown

    # How many drafts pay, if a policy decides it

    def _plan(self) -> DraftPlan | None:
        """What the policy wants; None if it must not decide: the number of sampled drafts would decide a text."""
        assert self.policy is not None
        if self.num_drafts == 0:
            return None
        if self.drafter.samples and not all(slot.request.settings.greedy for slot in self._running):
            return None
        return self.policy.plan(len(self._running), self.num_drafts)

    def _trial(self) -> tuple[Proposal, float]:
        """Draft for a few requests, without verifying; the proposal, and the seconds that it took."""
        few, started = min(len(self._running), TRIAL_REQUESTS), time.perf_counter()
        self._read_committed(self._running[:few])
        proposal = self.drafter.propose(*self._view(few), self.num_drafts)
        return proposal, time.perf_counter() - started

    # Prompts

    def _admit(self) -> None:
        """Give free slots, those after the ones in use, to requests that wait."""
        if self._reading:
            return
        free = self.slots - len(self._running)
        taken = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
        self._reading = [slot for slot in taken if slot.generation.finish_reason is None]
        self._read_from = len(self._running)
        for slot in self._reading:
            slot.admitted = time.perf_counter()
            if self.prefixes is not None and (found := self.prefixes.longest(slot.request.prompt_ids)) is not None:
                slot.prefix, slot.generation.cached_tokens = found, found[1]
        # Those with the most to read first: the prompts that a pass still reads are then always the first ones.
        self._reading.sort(key=lambda slot: slot.generation.cached_tokens - len(slot.request.prompt_ids))
        for place, slot in enumerate(self._reading, self._read_from):
            self.state.put(place, slot.request.prompt_ids)
            self.cache.clear(place)
            if slot.prefix is not None:
                self._reuse(place, *slot.prefix)
                slot.prefix = None

    def _reuse(self, place: int, prefix: Prefix, rows: int) -> None:
        """Copy the rows of an earlier text into a slot."""
        self.state.cache.put_rows(place, rows, prefix.target_rows)
        self.cache.put_rows(place, rows, prefix.draft_rows)

    def _read_prompts(self) -> None:
        """Prefill one chunk of the prompts being read; all but their last token, which the first cycle verifies."""
        while self._reading:
            first, last = self._read_from, self._read_from + len(self._reading)
            unread = (self.state.lengths[first:last] - 1 - self.state.cache.lengths[first:last]).tolist()
            left = [0 if s.generation.finish_reason else n for s, n in zip(self._reading, unread, strict=True)]
            if any(left):
                self._read_chunk(max(i for i, n in enumerate(left, 1) if n), max(left))
                if self._running:  # they wait for one chunk at a time
                    return
            else:
                self._start_decoding()

    def _read_chunk(self, requests: int, most: int) -> None:
        """Read rows of the first `requests` prompts being read, none of which has more than `most` left."""
        started = time.perf_counter()
        state = self.state.view(self._read_from, self._read_from + requests, self.state.sampling)
        cache = self.cache.view(self._read_from, self._read_from + requests)
        done = state.cache.lengths
        # Padded rows of shorter prompts are written too, but every row is overwritten before it can be seen.
        room = state.cache.capacity - int(done.max())
        rows = min(most, PREFILL_CHUNK, max(64, READ_ROWS // requests), room)
        counts = (state.lengths - 1 - done).clamp(max=rows)
        index = done[:, None] + torch.arange(rows + 1, device=done.device)
        tokens = state.tokens.gather(1, index.clamp(max=state.tokens.shape[1] - 1))
        features = self.target.forward(tokens[:, :-1], state.cache, self.drafter.feature_layers).features
        state.cache.lengths += counts
        self.drafter.read(cache, tokens[:, 1:], features, counts)
        self.stats.prompt_tokens += int(counts.sum())
        self.stats.read_seconds += time.perf_counter() - started

    def _start_decoding(self) -> None:
        """Decode those whose prompts are read: they join the others, whose number may have fallen meanwhile."""
        self._batch, started = None, time.perf_counter()
        for place, slot in enumerate(self._reading, self._read_from):
            if place != len(self._running):
                self._move(place, len(self._running))
            self.state.active[len(self._running)] = True
            slot.first_cycle = started
            slot.generation.seconds_prefill = started - slot.admitted
            self._running.append(slot)
        self._reading = []
        self._release()

    # Slots

    def _release(self) -> None:
        """Free the slots of requests that have ended."""
        for place in reversed(range(len(self._running))):
            if self._running[place].generation.finish_reason is not None:
                self._free(place)

    def _free(self, place: int) -> None:
        """Free the slot of a request that has ended: the last request moves into it."""
        self._batch = None
        slot = self._running[place]
        if self.prefixes is not None and slot.generation.finish_reason in ("stop", "length"):
            self.prefixes.add(self._prefix(place, slot))
        if self.static is not None or slot.generation.finish_reason not in ("stop", "length"):
            self._wipe(place, slot)
        last = self._running.pop()
        if last is not slot:
            self._move(len(self._running), place)
            self._running[place] = last
            if self.static is not None:
                self._wipe(len(self._running), last)
        self.state.tokens[len(self._running)] = 0  # the next prompt may be padded with what stands here
        if self.static is not None:
            self.static.park(len(self._running))

    def _prefix(self, place: int, slot: Slot) -> Prefix:
        self._read_committed([slot], place)
        length = slot.length  # without what a cycle committed past the end
        tokens = self.state.tokens[place, :length].clone().cpu()
        return Prefix(tokens, self.state.cache.rows_of(place, length - 1), self.cache.rows_of(place, length - 1))

    def _wipe(self, place: int, slot: Slot) -> None:
        """Zero the rows that a request leaves behind and later passes could read: they may not be finite.

        An ordinary pass overwrites what little it reads past a text. A static one reads further: the rows past a text
        that cycles wrote, also those that committed more than was kept, and the one whose result was not read yet.
        """
        first, rows = 0, self.state.tokens.shape[1]
        if slot.generation.finish_reason in (None, "stop", "length"):
            first, rows = slot.length - 1, min(slot.length + 3 * (self.drafter.max_drafts + 1), rows)
        self.state.cache.wipe(place, rows, first)
        self.cache.wipe(place, rows, first)

    def _move(self, source: int, destination: int) -> None:
        self.state.move(source, destination)
        self.cache.move(source, destination)


def decode(
    target: Target,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    *,
    settings: SamplingSettings,
    limits: Limits,
    num_drafts: int | None = None,
    matching_rule: bool = False,
    generations: list[Generation] | None = None,
    seeds: Sequence[int] | None = None,
    watch: DraftWatch | None = None,
) -> Iterator[list[Generation]]:
    """Decode R requests together; yields the same list of generations, grown, after every cycle.

    Args:
        target: the frozen model.
        drafter: any drafting method.
        prompts: token ids of every request.
        settings: the distribution that the output follows; request r draws from the stream `seed + r`.
        limits: when a request ends.
        num_drafts: drafts per cycle; None for the drafter's most.
        matching_rule: see `verify`.
        generations: filled in place, for callers that must keep partial text when the loop is interrupted.
        seeds: of every request's stream, in place of `seed + r`.
        watch: see `Engine`.

    Raises:
        UserError: see `check_prompt`; or, once all others have ended, a request's values were not finite.
    """
    generations = [] if generations is None else generations
    if seeds is None:
        seeds = [seed_of(settings.seed, r) for r in range(len(prompts))]
    requests = [Request(p, replace(settings, seed=seed), limits) for p, seed in zip(prompts, seeds, strict=True)]
    for prompt in prompts:
        check_prompt(target, prompt, limits.max_new_tokens)
    capacity = max(map(len, prompts)) + limits.max_new_tokens
    options: Any = dict(num_drafts=num_drafts, matching_rule=matching_rule, watch=watch)
    engine = Engine(target, drafter, slots=len(prompts), capacity=capacity, **options)
    generations += [engine.submit(request) for request in requests]
    while engine.busy:
        engine.step()
        yield generations
    for place, generation in enumerate(generations, 1):
        if generation.finish_reason == "error":
            raise _not_finite(target, generation, f"request {place} of {len(generations)}")


def _not_finite(target: Target, generation: Generation, request: str) -> UserError:
    return UserError(
        f"{target.name} gave values that are not finite after {generation.num_tokens} tokens of {request}: check its "
        f"weights, or load it in another precision than {str(target.dtype).removeprefix('torch.')}"
    )
