"""The decoding loop, continuous: requests come and go, and a slot that one leaves is the next one's.

Each step reads a part of the prompts that wait, then runs one cycle for all requests that are being decoded: propose,
verify, commit. Slots are memory allocated once. Those in use are always the first ones, so that a pass costs nothing
for those that are not; a request that ends is replaced by the last one.

The cycle may be a static one (`static`), which CUDA runs as one graph; the host hears of it while the next one runs.

A request's text does not depend on who else is decoded: its random numbers are keyed by its own seed and positions.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch

from domino_spec.config import UserError
from domino_spec.decoding.drafter import Cycle, Drafter, DraftPlan, DraftPolicy, cycle_room, is_static
from domino_spec.decoding.generation import Ending, Generation, Request, check_prompt
from domino_spec.decoding.prefixes import Prefix, PrefixCache
from domino_spec.decoding.sampling import Sampling
from domino_spec.decoding.slots import Slot, Stats, take_unread
from domino_spec.decoding.state import Proposal, State, Verdict
from domino_spec.decoding.static import Flight, StaticCycles
from domino_spec.decoding.verify import commit, verify
from domino_spec.decoding.watch import DraftWatch
from domino_spec.target.model import PREFILL_CHUNK, Target

_log = logging.getLogger(__name__)

READ_ROWS = 2048
"""Rows of one prefill pass over several prompts."""
MOST_UNREAD = 1024
"""Tokens of a request after which the drafter takes in what was committed without drafts: features take memory."""
IN_TRIAL = 4
"""Requests that a trial drafts for at most."""


@dataclass
class _Batch:
    """The requests that are being decoded, as the loop sees them until one comes or goes."""

    state: State
    own: Any


class Engine:
    """Decodes many requests together.

    Args:
        target: the frozen model.
        drafter: any drafting method.
        slots: requests that are decoded together; others wait.
        capacity: tokens that a request may have, prompt and answer together.
        num_drafts: drafts per cycle; None for the drafter's most.
        policy: decides, cycle by cycle, how many drafts pay; None always drafts. It is not asked where a request
            samples its drafts: their number would decide which text a seed gives.
        matching_rule: see `verify`.
        prefixes: keeps texts that ended, for prompts that begin like them; None keeps none.
        static: run static cycles where the drafter allows, captured as graphs on CUDA. Requests that want
            log-probabilities have ordinary ones, and so has whoever is decoded beside them.
        watch: counts what is accepted, and warns where drafting is of no use; None watches nothing.

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
        rows = capacity + cycle_room(drafter)
        device = target.device
        empty = torch.zeros(slots, dtype=torch.long, device=device)
        self._state = State(
            torch.zeros(slots, rows, dtype=torch.long, device=device),
            empty,
            empty.clone(),
            torch.ones(slots, dtype=torch.bool, device=device),
            target.new_cache(slots, rows),
            Sampling([], device),
        )
        self._own = drafter.allocate(slots, rows)
        self._waiting: deque[Slot] = deque()
        self._reading: list[Slot] = []
        self._read_from = 0
        self._running: list[Slot] = []
        self._batch: _Batch | None = None
        self._static = self._static_cycles() if static else None
        self._late: Flight | None = None

    def _static_cycles(self) -> StaticCycles | None:
        if not is_static(self.drafter):
            _log.warning("cycles are ordinary ones, which wait for the host: the drafter works there in part")
            return None
        return StaticCycles(self.target, self.drafter, self._state, self._own, self.num_drafts, self.matching_rule)

    @property
    def busy(self) -> bool:
        """Whether any request is not done."""
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
        """End a request where it is; its slot is free from the next step on."""
        if generation.finish_reason is None:
            generation.finish_reason = "cancelled"

    @torch.inference_mode()
    def step(self) -> list[Generation]:
        """Read a part of the prompts that wait, then run one cycle; returns the generations that grew or ended."""
        self._release()
        self._take_up()
        self._read_prompts()
        late, self._late = self._late, None
        if not self._running:
            return []
        if self._static is not None and all(slot.request.top_logprobs is None for slot in self._running):
            self._late = self._launch(self._static, late)
            return [] if late is None else self._hear(late)
        if late is not None:
            return self._hear(late)
        batch = self._batch = self._batch or self._view()
        plan = self._plan()
        trial = self._trial(batch) if plan is not None and plan.trial else None
        wanted = self.num_drafts if plan is None else plan.drafts
        if wanted > 0:
            self._read_committed(0, len(self._running))
        started = time.perf_counter()
        offered = self._propose(batch, wanted)
        proposal = plan.cut(offered) if plan is not None and wanted > 0 else offered
        verdict = verify(self.target, batch.state, proposal, self.drafter.feature_layers, self.matching_rule)
        commit(batch.state, verdict)
        self._advance(batch, proposal, verdict)
        if self.policy is not None and plan is not None:
            seconds = time.perf_counter() - started
            offered, trial_seconds = trial or (offered, None)
            self.policy.observe(Cycle(plan, offered, proposal, verdict, seconds, trial_seconds))
        return self._deliver(proposal, verdict)

    # Reading prompts

    def _take_up(self) -> None:
        """Give free slots, those after the ones in use, to requests that wait."""
        if self._reading or not self._waiting:
            return
        free = self.slots - len(self._running)
        taken = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
        self._reading = [slot for slot in taken if slot.generation.finish_reason is None]
        for slot in self._reading:
            slot.taken_up = time.perf_counter()
            slot.prefix = self.prefixes.longest(slot.request.prompt_ids) if self.prefixes is not None else None
            slot.generation.cached_tokens = 0 if slot.prefix is None else slot.prefix[1]
        # Those with the most to read first: the prompts that a pass still reads are then always the first ones.
        self._reading.sort(key=lambda slot: slot.generation.cached_tokens - len(slot.request.prompt_ids))
        self._read_from = len(self._running)
        for place, slot in enumerate(self._reading, self._read_from):
            prompt = torch.tensor(slot.request.prompt_ids, device=self._state.tokens.device)
            self._state.tokens[place, : len(prompt)] = prompt
            self._state.lengths[place] = self._state.prompt_lengths[place] = len(prompt)
            self._state.cache.lengths[place] = 0
            self._own.clear(place)
            if slot.prefix is not None:
                prefix, rows = slot.prefix
                self._state.cache.put_rows(place, rows, prefix.target_rows)
                self._own.put_rows(place, rows, prefix.draft_rows)
                slot.prefix = None

    def _read_prompts(self) -> None:
        """Prefill one chunk of the prompts being read; all but their last token, which the first cycle verifies."""
        while self._reading:
            first, last = self._read_from, self._read_from + len(self._reading)
            unread = (self._state.lengths[first:last] - 1 - self._state.cache.lengths[first:last]).tolist()
            left = [0 if s.generation.finish_reason else n for s, n in zip(self._reading, unread, strict=True)]
            if any(left):
                self._read_chunk(max(i for i, n in enumerate(left, 1) if n), max(left))
                if self._running:  # they wait for one chunk at a time
                    return
            else:
                self._start_reading_requests()

    def _read_chunk(self, requests: int, most: int) -> None:
        """Read rows of the first `requests` prompts being read, none of which has more than `most` left."""
        started = time.perf_counter()
        state = self._state.view(self._read_from, self._read_from + requests, self._state.sampling)
        own = self._own.view(self._read_from, self._read_from + requests)
        done = state.cache.lengths
        # Padded rows of shorter prompts are written too, but every row is overwritten before it can be seen.
        room = state.cache.capacity - int(done.max())
        rows = min(most, PREFILL_CHUNK, max(64, READ_ROWS // requests), room)
        counts = (state.lengths - 1 - done).clamp(max=rows)
        index = done[:, None] + torch.arange(rows + 1, device=done.device)
        tokens = state.tokens.gather(1, index.clamp(max=state.tokens.shape[1] - 1))
        features = self.target.forward(tokens[:, :-1], state.cache, self.drafter.feature_layers).features
        state.cache.lengths += counts
        self.drafter.read(own, tokens[:, 1:], features, counts)
        self.stats.prompt_tokens += int(counts.sum())
        self.stats.read_seconds += time.perf_counter() - started

    def _start_reading_requests(self) -> None:
        """Decode those whose prompts are read: they join the others, whose number may have fallen meanwhile."""
        self._batch = None
        started = time.perf_counter()
        for place, slot in enumerate(self._reading, self._read_from):
            if place != len(self._running):
                self._move(place, len(self._running))
            self._state.active[len(self._running)] = True
            slot.first_cycle = started
            slot.generation.seconds_prefill = started - slot.taken_up
            self._running.append(slot)
        self._reading = []
        self._release()

    # One cycle

    def _view(self) -> _Batch:
        count = len(self._running)
        return _Batch(self._state.view(0, count, self._sampling(count)), self._own.view(0, count))

    def _sampling(self, requests: int) -> Sampling:
        return Sampling([slot.request.settings for slot in self._running[:requests]], self.target.device)

    def _plan(self) -> DraftPlan | None:
        """What the policy wants; None for all drafts, if there is no policy or it must not decide."""
        if self.policy is None or self.num_drafts == 0:
            return None
        if self.drafter.samples and not all(slot.request.settings.greedy for slot in self._running):
            return None
        return self.policy.plan(len(self._running), self.num_drafts)

    def _trial(self, batch: _Batch) -> tuple[Proposal, float]:
        """Draft for a few requests, without verifying; the seconds that it took."""
        few, started = min(len(self._running), IN_TRIAL), time.perf_counter()
        self._read_committed(0, few)
        state = batch.state.view(0, few, self._sampling(few))
        proposal = self.drafter.propose(state, batch.own.view(0, few), self.num_drafts)
        return proposal, time.perf_counter() - started

    def _propose(self, batch: _Batch, wanted: int) -> Proposal:
        if wanted == 0:
            return Proposal.empty(len(self._running), self.target.device)
        return self.drafter.propose(batch.state, batch.own, wanted)

    def _advance(self, batch: _Batch, proposal: Proposal, verdict: Verdict) -> None:
        self.stats.count(len(self._running), int(proposal.num_drafts.sum()), int(verdict.num_accepted.sum()))
        if proposal.tokens.shape[1]:
            self.drafter.advance(batch.own, verdict)
            return
        for place, slot in enumerate(self._running):
            own = slice(place, place + 1)
            slot.unread.append((verdict.tokens[own], None if verdict.features is None else verdict.features[own]))
            if len(slot.unread) >= MOST_UNREAD:
                self._read_committed(place, place + 1)

    def _read_committed(self, first: int, last: int) -> None:
        """Let the drafter take in what was committed without drafts, all cycles in one go: of some requests."""
        slots = self._running[first:last]
        width = len(self.drafter.feature_layers) * self.target.hidden_size
        # Those with less to read are padded to those with the most, and must have room for it.
        most = self._state.tokens.shape[1] - max(slot.length for slot in slots)
        while any(slot.unread for slot in slots):
            self.drafter.read(self._own.view(first, last), *take_unread(slots, most, width, self.target))

    def _deliver(self, proposal: Proposal, verdict: Verdict) -> list[Generation]:
        tokens, accepted = verdict.tokens.tolist(), verdict.num_accepted.tolist()
        proposed, sound = proposal.num_drafts.tolist(), verdict.sound.tolist()
        if self.watch is not None:
            self.watch.count(proposed, accepted)
        now, grown = time.perf_counter(), []
        for r, slot in enumerate(self._running):
            grown.append(slot.generation)
            slot.grow(tokens[r][: accepted[r] + 1], proposed[r], sound[r], now, verdict, r)
        self._release()
        return grown

    # One static cycle

    def _launch(self, static: StaticCycles, late: Flight | None) -> Flight:
        """Start a cycle; nobody may have heard of the one before."""
        self._read_committed(0, len(self._running))
        return static.launch(self._running, late, self._plan())

    def _hear(self, flight: Flight) -> list[Generation]:
        """Deliver what a cycle decided to those who are still there."""
        heard = flight.hear()
        now, grown = time.perf_counter(), []
        decoded = [r for r, accepted in enumerate(heard.accepted) if accepted >= 0]
        if decoded:
            drafts, accepted = (sum(values[r] for r in decoded) for values in (heard.num_drafts, heard.accepted))
            self.stats.count(len(decoded), drafts, accepted)
            if self.watch is not None:
                self.watch.count(heard.num_drafts, heard.accepted)
        if self.policy is not None and flight.plan is not None and decoded:
            self.policy.observe(flight.cycle(heard, decoded))
        for r in decoded:
            slot = flight.slots[r]
            grown.append(slot.generation)
            slot.grow(heard.tokens[r][: heard.accepted[r] + 1], heard.num_drafts[r], heard.sound[r], now, None, r)
        for slot, accepted, ended in zip(flight.slots, heard.accepted, heard.ended, strict=True):
            assert slot.generation.finish_reason or (accepted >= 0 and not ended), "it would stand still for ever"
        self._release()
        return grown

    # Slots

    def _release(self) -> None:
        """Free the slots of requests that have ended."""
        ended = [place for place, slot in enumerate(self._running) if slot.generation.finish_reason is not None]
        if not ended:
            return
        self._batch = None
        for place in ended:
            if self._running[place].generation.finish_reason in ("stop", "length"):
                self._keep_prefix(place)
            self._vacate(place, self._running[place])
        for place in reversed(ended):
            last = self._running.pop()
            if place < len(self._running):
                self._move(len(self._running), place)
                self._vacate(len(self._running), last)
                self._running[place] = last
        if self._static is not None:
            self._static.rest(len(self._running), len(self._running) + len(ended))

    def _vacate(self, place: int, slot: Slot) -> None:
        """Leave nothing in a place that is not finite: nobody has seen what stands behind a text."""
        caches, rows = (self._state.cache, self._own), self._state.tokens.shape[1]
        self._state.tokens[place] = 0  # the next prompt may be padded with what stands here
        if slot.generation.finish_reason not in (None, "stop", "length"):
            for cache in caches:
                cache.wipe(place, rows)
        elif self._static is not None:  # an ordinary pass reads little beyond texts, and overwrites that before
            # Cycles may have committed more than was kept, one that nobody has heard of too; they wrote further yet.
            most = min(slot.length + 3 * (self.drafter.max_drafts + 1), rows)
            for cache in caches:
                cache.wipe(place, most, slot.length - 1)

    def _keep_prefix(self, place: int) -> None:
        if self.prefixes is not None:
            self._read_committed(place, place + 1)
            state, generation = self._state, self._running[place].generation
            length = len(generation.prompt_ids) + generation.num_tokens  # without what a cycle committed past the end
            tokens = state.tokens[place, :length].clone().cpu()
            target_rows, draft_rows = state.cache.rows_of(place, length - 1), self._own.rows_of(place, length - 1)
            self.prefixes.add(Prefix(tokens, target_rows, draft_rows))

    def _move(self, source: int, destination: int) -> None:
        self._state.move(source, destination)
        self._own.move(source, destination)
