"""Which rows run in the next step.

Owns the queue and the sharing of a step's rows. A step is planned first: a row for every sequence that decodes, then one for
every prompt, running ones and newcomers alike; the oldest prompt gets a quarter of what is left, and the shortest ones all else.
So a short prompt passes a long one, and none starves: no newcomer can lower that quarter, so the oldest prompt ends, and every
prompt becomes the oldest. Pages are then taken in the order of urgency (priority, then age). When they run out, cached prefixes
go first, then the least urgent sequence gives up its pages and starts again later with all its tokens. Refuses to know tensors,
text and time. Read `step_sizer.py` for how many rows a step may have, `runner.py` for what is made of a chunk, `engine.py` for
who commits its rows.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from gemcutter.cache.block_table import BlockTable
from gemcutter.cache.kv_cache import PagedKVCache
from gemcutter.cache.prefix_cache import PrefixCache, common_length
from gemcutter.engine.media import whole_blocks
from gemcutter.engine.request import SequenceState
from gemcutter.engine.step_sizer import StepSizer
from gemcutter.errors import CapacityError

SHARE_OF_OLDEST = 4  # the oldest prompt gets one row of so many, whatever shorter ones want
ON_DEVICE = -1  # in place of an id that the step before samples, and which the device alone knows yet


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """Rows of one sequence in one step, with all that was true of them when they were scheduled.

    Row i computes the token `ids[i]` at position `start` + i, in pages that are reserved in `table`. `logit_rows` are the rows
    whose final states are wanted. After each of the last `num_sampled` rows a token is sampled: 1 to decode, 1 + K where the last
    K ids are drafts, 0 in the middle of a prompt. `targets` are the prompt tokens after the rows where their log-probabilities
    are wanted. `want_probs` asks for the probabilities from which each token was sampled.
    """

    sequence: SequenceState  # for its identity and its request; what changes in it is not read again
    table: BlockTable
    start: int
    ids: tuple[int, ...]
    logit_rows: range
    num_sampled: int
    in_prompt: bool = False  # no token had been sampled yet
    is_last: bool = False  # nothing known of the sequence is left to compute after it
    targets: tuple[int, ...] = ()
    drafts: tuple[int, ...] = ()
    want_probs: bool = False

    @property
    def rows(self) -> int:
        """Return the number of rows."""
        return len(self.ids)

    @property
    def reports(self) -> bool:
        """Return whether log-probabilities or states of its last rows, one or all, go into the prompt's report."""
        first = self.sequence.request.reports_from
        return self.in_prompt and first is not None and first < self.start + self.rows

    @classmethod
    def of(
        cls, sequence: SequenceState, table: BlockTable, rows: int, drafts: tuple[int, ...] = (), ahead: int = 0
    ) -> ScheduledChunk:
        """Describe the next `rows` pending rows of a sequence, behind `ahead` rows under way; drafts may follow the last."""
        start, request, in_prompt = table.length + ahead, sequence.request, sequence.in_prompt
        is_last = start + rows == sequence.num_tokens
        assert is_last or not drafts
        num_sampled = 1 + len(drafts) if is_last and request.max_tokens else 0
        num_rows = rows + len(drafts)
        first = num_rows - max(num_sampled, int(is_last))
        targets: tuple[int, ...] = ()
        if in_prompt and request.reports_from is not None and (reported := max(request.reports_from, start)) < start + rows:
            first = reported - start
            targets = sequence.ids(reported + 1, start + rows + 1) if request.prompt_logprobs is not None else ()
        ids = (*sequence.ids(start, start + rows), *drafts)
        return cls(sequence, table, start, ids, range(first, num_rows), num_sampled, in_prompt, is_last, targets, drafts)

    @property
    def decodes(self) -> bool:
        """Return whether it is the row of the token sampled last, alone or with drafts behind it."""
        return not self.in_prompt and self.is_last and self.rows == 1 + len(self.drafts)

    def following(self) -> ScheduledChunk:
        """Return the single row after this one, for the token that this one samples."""
        return replace(self, start=self.start + self.rows, ids=(ON_DEVICE,), logit_rows=range(1), in_prompt=False, targets=())


class Proposer(Protocol):
    """Guesses the tokens that sequences will sample next; they are verified in one step, so a wrong guess costs time alone."""

    def propose(self, wanted: Sequence[tuple[SequenceState, int]], others: int, room: int) -> Mapping[int, tuple[int, ...]]:
        """Return draft ids to follow the last tokens of some of the sequences, by their numbers.

        Each may get as many as stand beside it, all together `room`; `others` rows of other sequences are in the step.
        """


def _most_shared(sequence: SequenceState) -> int:
    """Return how many leading tokens of a sequence may come from the prefix cache: the rows after them must be computed."""
    first = sequence.request.reports_from if sequence.in_prompt else None
    return sequence.num_tokens - 1 if first is None else first


def urgency(sequence: SequenceState) -> tuple[int, int]:
    """Return the place of a sequence in every queue: the lower priority first, among equals the older request."""
    return sequence.request.priority, sequence.number


@dataclass(slots=True)
class RowPlan:
    """Which sequence gets how many rows of a step, by its number; none of them has pages yet."""

    left: int  # rows that nobody has
    rows: dict[int, int] = field(default_factory=dict)
    drafts: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    def give(self, sequence: SequenceState, rows: int) -> None:
        """Let a sequence have more rows, as far as there are some."""
        if (given := min(rows, self.left)) > 0:
            self.rows[sequence.number] = self.of(sequence) + given
            self.left -= given

    def of(self, sequence: SequenceState) -> int:
        """Return the rows that a sequence has."""
        return self.rows.get(sequence.number, 0)

    def wanted(self, sequence: SequenceState) -> int:
        """Return the rows that a sequence could still use; a newcomer's cached prefix is not known yet."""
        return sequence.pending - self.of(sequence)

    def share(self, prompts: Sequence[SequenceState]) -> None:
        """Share all rows that are left among prompts, the oldest of which is the first."""
        for oldest in prompts[:1]:
            self.give(oldest, min(self.wanted(oldest), -(-self.left // SHARE_OF_OLDEST)))
        for prompt in sorted(prompts, key=self.wanted):
            self.give(prompt, self.wanted(prompt))


@dataclass(frozen=True, slots=True)
class Awaited:
    """A beginning that another request computes: how many tokens of it, and into which table."""

    other: SequenceState
    table: BlockTable
    shared: int

    @property
    def is_coming(self) -> bool:
        """Return whether it still runs, and is not there yet."""
        return self.other.table is self.table and self.table.length < self.shared


class Scheduler:
    """Continuous admission over one pool; a `sizer` makes steps smaller than `max_batched_tokens` rows.

    Where up to `most_begun` steps are under way at once, as in a pipeline, each of them has its share of the rows.
    """

    def __init__(
        self,
        pool: PagedKVCache,
        context: int,
        max_batched_tokens: int,
        max_num_seqs: int,
        prefix: PrefixCache,
        proposer: Proposer | None = None,
        sizer: StepSizer | None = None,
        most_begun: int = 1,
    ) -> None:
        self.pool, self.context, self.prefix, self.proposer, self.sizer = pool, context, prefix, proposer, sizer
        self.max_batched_tokens, self.max_num_seqs, self.most_begun = max_batched_tokens, max_num_seqs, most_begun
        self.waiting: deque[SequenceState] = deque()  # the most urgent first
        self.running: list[SequenceState] = []  # the most urgent first
        self.preemptions = self.prefix_queries = self.prefix_hits = 0  # since the start; the latter two in tokens
        self.waiting_tokens = 0  # of all who wait
        self._has_large_block = False  # a block of media goes beyond the step's rows
        self._is_full = False  # the newcomer whose turn it is found no pages
        self.awaiting: set[int] = set()  # who was not let in, because somebody computes its beginning
        self._awaited: dict[int, Awaited] = {}  # by who waits for it
        self._asked: dict[int, set[int]] = {}  # boundaries to ask of newcomers once they have tables, by their numbers

    def enqueue(self, sequence: SequenceState) -> None:
        """Let a sequence wait for its turn."""
        insort(self.waiting, sequence, key=urgency)
        self.waiting_tokens += sequence.num_tokens

    def schedule(self) -> list[ScheduledChunk]:
        """Reserve the rows of the next step; an empty list means there is nothing to do."""
        decoding = self._decoding()
        newcomers = self._newcomers()
        self._has_large_block = False
        plan = self._plan(decoding, newcomers)
        chunks, everyone = list[ScheduledChunk](), len(decoding) + len(self._prompts())
        for sequence in list(self.running):  # in this order, so that nobody younger has pages for the step yet
            if sequence in self.running and (rows := plan.of(sequence)):  # it may have been preempted just now
                chunks += self._reserve(sequence, rows, plan.drafts.get(sequence.number, ()))
        if len(chunks) == everyone:  # else somebody waits for pages or rows, which are not a newcomer's to take
            chunks += self._admit_all(newcomers, plan.rows)
        is_decoding = {sequence.number for sequence in decoding}
        return sorted(chunks, key=lambda chunk: chunk.sequence.number not in is_decoding)

    def _decoding(self) -> list[SequenceState]:
        """Return who decodes in the next step: all who can, or their share where several steps are under way at once."""
        replying = sum(not sequence.in_prompt for sequence in self.running)
        found = [sequence for sequence in self.running if sequence.decodes]
        return found[: -(-replying // self.most_begun)]

    def _prompts(self) -> list[SequenceState]:
        """Return who has prompt rows, or those of a preemption, to be scheduled."""
        return [sequence for sequence in self.running if sequence.pending and not sequence.decodes]

    def _plan(self, decoding: Sequence[SequenceState], newcomers: Sequence[SequenceState]) -> RowPlan:
        """Share a step's rows: who decodes comes first, but for a row of the most urgent sequence, which always goes on."""
        rows = -(-self.max_batched_tokens // self.most_begun)
        if self.sizer is not None:
            rows = min(rows, len(decoding) + self.sizer.prompt_rows(len(decoding), rows))
        plan = RowPlan(rows)
        prompts = self._prompts()
        urgent = [sequence for sequence in self.running[:1] if sequence in decoding or sequence in prompts]
        everyone = [*urgent, *decoding, *prompts, *newcomers]
        for sequence in everyone:
            if not plan.of(sequence):
                plan.give(sequence, 1)
        if self.proposer is not None and decoding:
            wanted = [(sequence, self._most_drafts(sequence)) for sequence in decoding if plan.of(sequence)]
            plan.drafts = self.proposer.propose(wanted, rows - plan.left - len(wanted), plan.left)
            plan.left -= sum(map(len, plan.drafts.values()))
        plan.share(prompts if self._is_full else [*prompts, *newcomers])
        return plan

    def _admit_all(self, newcomers: Sequence[SequenceState], rows: Mapping[int, int]) -> list[ScheduledChunk]:
        """Let newcomers in as planned, as long as there are pages; rows that a cached prefix spares are the next one's."""
        chunks, spare = list[ScheduledChunk](), 0
        for sequence in newcomers:
            if not (planned := rows.get(sequence.number, 0)):
                break
            admitted = self._admit(sequence, planned + spare)
            self._is_full = admitted is None
            if admitted is None:
                break
            chunks.append(admitted)
            spare += planned - admitted.rows
        return chunks

    def schedule_after(self, chunks: Sequence[ScheduledChunk]) -> list[ScheduledChunk]:
        """Reserve the rows that follow chunks whose tokens are not known yet; none unless the next step surely has the same ones.

        A sequence may still stop: its row is computed for nothing then, and nobody reads what it wrote. Nothing is committed.
        """
        if self.proposer is not None or (self.waiting and len(self.running) < self.max_num_seqs):
            return []
        if any(chunk.sequence.table is not chunk.table or self._may_be_last(chunk) for chunk in chunks):
            return []
        if len(chunks) < len(self.running):
            return []  # somebody had no rows in this step, and may have some in the next
        try:
            for chunk in chunks:
                chunk.table.reserve(chunk.rows + 1)
        except CapacityError:  # the next call of `schedule` will find pages
            for chunk in chunks:
                chunk.table.reserve(chunk.rows)
            return []
        return [chunk.following() for chunk in chunks]

    def _may_be_last(self, chunk: ScheduledChunk) -> bool:
        """Return whether a chunk is a prompt's, whose pages are kept at its end, or its token is sure to end the reply."""
        after = chunk.start + chunk.rows + 1  # tokens, with the one to come
        limit = min(len(chunk.sequence.request.prompt) + chunk.sequence.request.max_tokens, self.context)
        return chunk.in_prompt or not chunk.is_last or after >= limit

    def _newcomers(self) -> list[SequenceState]:
        """Return whose turn it is to be let in; who waits for a beginning that others compute lets the next ones pass."""
        places, found = max(self.max_num_seqs - len(self.running), 0), list[SequenceState]()
        self._asked.clear()
        self.awaiting.clear()
        for sequence in self.waiting:
            if len(found) == places:
                break
            if self._awaits_prefix(sequence, found):
                self.awaiting.add(sequence.number)
            else:
                found.append(sequence)
        return found

    def _awaits_prefix(self, sequence: SequenceState, newcomers: Sequence[SequenceState]) -> bool:
        """Return whether a more urgent prompt, running or about to, computes more of a request's beginning than is cached.

        It is asked for the windows where the two part, and the request goes on from there. Whether it waits or runs, those rows
        take the same time; so they are computed once. Nobody waits for a request that does not run: it may be cancelled.
        """
        known = self._awaited.pop(sequence.number, None)
        if known is not None and known.is_coming:
            self._awaited[sequence.number] = known
            return True
        request = sequence.request
        most = _most_shared(sequence)
        if not self.prefix.is_on or not sequence.in_prompt or not most:
            return False
        space, size, cached = (request.adapter, request.cache_salt), self.prefix.page_tokens, None
        for other in (*self.running, *newcomers):
            if not other.in_prompt or (other.request.adapter, other.request.cache_salt) != space:
                continue
            shared = min(common_length(sequence.prompt_key, other.prompt_key), most) // size * size
            if shared < size or shared <= other.computed or urgency(sequence) < urgency(other):
                continue
            cached = self.prefix.usable(sequence.prompt_key[: most + 1], *space) if cached is None else cached
            if shared < cached + size:
                continue
            if other.table is None:
                self._asked.setdefault(other.number, set()).add(shared)
            else:
                self.prefix.ask(other.table, shared)
                self._awaited[sequence.number] = Awaited(other, other.table, shared)
            return True
        return False

    def _admit(self, sequence: SequenceState, budget: int) -> ScheduledChunk | None:
        request, found = sequence.request, None
        if most := _most_shared(sequence):
            found = self.prefix.find(sequence.key_ids(0, most + 1), request.adapter, request.cache_salt)
        table = BlockTable(self.pool) if found is None else found
        sequence.table = table
        if not (rows := self._uncut(sequence, min(sequence.pending, budget), budget)):
            table.release()
            sequence.table = None
            return None
        while True:
            try:
                table.reserve(rows)
                break
            except CapacityError:
                if not self.prefix.evict(table.shortage(rows)):
                    table.release()
                    sequence.table = None
                    return None
        for boundary in self._asked.pop(sequence.number, ()):
            self.prefix.ask(table, boundary)
        self._count_hit(sequence, table.length)
        self.waiting.remove(sequence)
        self.waiting_tokens -= sequence.num_tokens
        insort(self.running, sequence, key=urgency)
        return ScheduledChunk.of(sequence, table, rows)

    def _count_hit(self, sequence: SequenceState, cached: int) -> None:
        """Note what a prompt was spared; what it finds of its own after a preemption does not count."""
        report = sequence.report
        if not sequence.was_admitted:
            sequence.was_admitted, report.cached_tokens = True, cached
            self.prefix_queries += sequence.num_tokens
            self.prefix_hits += cached
        elif sequence.in_prompt:  # else the report has been given
            report.cached_tokens = min(report.cached_tokens, cached)

    def _reserve(self, sequence: SequenceState, rows: int, drafts: tuple[int, ...]) -> list[ScheduledChunk]:
        """Reserve rows of a running sequence, taking pages from cached prefixes and less urgent sequences if need be."""
        table = sequence.table
        assert table is not None
        ahead = table.reserved
        if not (rows := self._uncut(sequence, rows, rows)):
            return []  # another block has the step
        while True:
            try:
                table.reserve(ahead + rows + len(drafts))
                return [ScheduledChunk.of(sequence, table, rows, drafts, ahead)]
            except CapacityError:
                if drafts:
                    drafts = ()  # a guess is worth nobody's pages
                elif not self.prefix.evict(table.shortage(ahead + rows)) and not self._preempt_younger(sequence):
                    return []  # more urgent sequences hold the pages; they will finish

    def _uncut(self, sequence: SequenceState, rows: int, planned: int) -> int:
        """Return how many of its next rows a sequence gets instead of `rows`, so that no block of media is cut.

        A block may be larger than what is `planned`; one of a step's is computed all the same, the others wait: none there.
        """
        start = sequence.scheduled
        found = whole_blocks(sequence.blocks, start, rows)
        if found <= planned:
            return found
        if self._has_large_block:
            return 0
        self._has_large_block = True
        return found

    def _most_drafts(self, sequence: SequenceState) -> int:
        """Return how many drafts a sequence may get: its last token needs none."""
        return max(min(sequence.request.max_tokens - len(sequence.reply), self.context - sequence.num_tokens) - 1, 0)

    def _preempt_younger(self, sequence: SequenceState) -> bool:
        """Send the least urgent sequence back to wait, unless it is this one, whose juniors have no rows in the step yet."""
        victim = self.running[-1]
        if victim is sequence:
            return False
        self.leave(victim)
        self.enqueue(victim)
        self.preemptions += 1
        return True

    def forget_rows(self) -> None:
        """Take back what was reserved for steps that did not happen."""
        for sequence in self.running:
            if sequence.table is not None:
                sequence.table.commit(0)
        for sequence in self.waiting:
            if sequence.table is not None:  # it was about to be admitted
                sequence.table.release()
                sequence.table = None

    def leave(self, sequence: SequenceState) -> None:
        """Take a sequence out and free its pages."""
        self._awaited.pop(sequence.number, None)
        if sequence in self.running:
            self._is_full = False
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
            self.waiting_tokens -= sequence.num_tokens
        if sequence.table is not None:
            sequence.table.release()
            sequence.table = None
