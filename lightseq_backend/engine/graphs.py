"""What is captured at load and only replayed while serving; whatever changes between replays lives in device memory."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable
from functools import partial
from types import ModuleType
from typing import Any

from lightseq_backend.config import DecodingOptions, GptConfig
from lightseq_backend.engine.buffers import Buffers, buckets
from lightseq_backend.models.pack import Pack

# Mixes of methods that a step exists for. What is not needed is not done: none of the first four has rules.
SEARCHING, SAMPLING, SEARCHING_AND_SAMPLING, STANDARD_SEARCHING, ANY = MIXES = (
    "searching",
    "sampling",
    "searching and sampling",
    "standard searching",
    "any",
)


def mix_of(wanted: Iterable[tuple[DecodingOptions, bool]]) -> str:
    """The mix that takes sequences with these options, and whether rules of theirs act in the steps to come."""
    ruled, methods = False, set()
    for one, acts in wanted:
        ruled = ruled or acts
        methods.add(STANDARD_SEARCHING if one.standard else SEARCHING if one.searches else SAMPLING)
    if ruled or len(methods) > 1:
        return SEARCHING_AND_SAMPLING if methods == {SEARCHING, SAMPLING} and not ruled else ANY
    return methods.pop()


class Steps:
    """Decode steps, one for each number of rows and each mix of methods."""

    def __init__(self, model: Any, buffers: Buffers, slots: int, ops: ModuleType):
        self.buckets = buckets(slots)
        self._graphs = {
            (rows, mix): ops.capture(_step(model, buffers, rows, mix, ops)) for rows in self.buckets for mix in MIXES
        }

    def bucket(self, rows: int) -> int:
        """The smallest number of rows a step exists for that is at least `rows`."""
        return self.buckets[bisect_left(self.buckets, rows)]

    def run(self, rows: int, mix: str) -> None:
        """One step over the first `rows` rows of the state; `rows` is one of the buckets, `mix` one of MIXES."""
        self._graphs[rows, mix]()


class Passes:
    """Passes over a pack in buffers.prompt, one for each number of rows it may be laid out for."""

    def __init__(self, model: Any, buffers: Buffers, scores: bool, ops: ModuleType):
        """scores: whether there are passes that score."""
        self.sizes = ops.pass_sizes(buffers.prompt_rows)
        sizes = self.sizes[::-1]  # the largest first, whose work space serves the others
        self._prefills = {rows: ops.capture(partial(_prefill, model, buffers, rows)) for rows in sizes}
        self._scores = {
            rows: ops.capture(partial(_score, model, buffers, rows, ops)) for rows in (sizes if scores else ())
        }

    def size(self, rows: int) -> int:
        """The smallest pack there is a pass for that has at least `rows`."""
        return self.sizes[bisect_left(self.sizes, rows)]

    def prefill(self, rows: int) -> None:
        """Reads prompts or sources; their keys and values are kept. rows: a `size`."""
        self._prefills[rows]()

    def score(self, rows: int) -> None:
        """buffers.scored[r] = the log-probability that row r gives to its target. rows: a `size`."""
        self._scores[rows]()


def _prefill(model: Any, buffers: Buffers, rows: int) -> None:
    model.prefill(Pack.of(buffers.prompt, rows), buffers.work.first(rows), buffers.cache)


def _score(model: Any, buffers: Buffers, rows: int, ops: ModuleType) -> None:
    pack, work, head = Pack.of(buffers.prompt, rows), buffers.work.first(rows), model.head
    if isinstance(model.config, GptConfig):
        model.read(pack, work)
    else:
        model.read_targets(pack, buffers.state.slots, work, buffers.cache)
    ops.vocabulary_scores(
        work.x, head.norm, head.output, head.epsilon, head.scale, work.normed, buffers.state.logits, pack.targets,
        buffers.scored[:rows],
    )  # fmt: skip


def _step(model: Any, buffers: Buffers, count: int, mix: str, ops: ModuleType) -> Callable[[], None]:
    work, state, cache, head = buffers.work.first(count), buffers.state, buffers.cache, model.head
    rows, logits, normalisations = state.rows[:count], state.logits[:count], state.normalisations[:count]
    best = state.ids[:count], state.log_probabilities[:count]
    candidates = state.candidate_ids[:count], state.candidate_log_probabilities[:count]
    search = (rows, state.slots, cache.ancestors, state.history, state.details)
    standard_search = (*search, state.pool, state.pool_details)
    rules = (rows, state.slots, state.rules, state.listed, state.contexts, state.history, logits, normalisations)
    vocabulary = (work.x, head.norm, head.output, head.epsilon, head.scale, work.normed, logits)

    def run() -> None:
        model.step(rows, state.slots, work, cache)
        if mix == SEARCHING:
            ops.vocabulary_search(*vocabulary, head.banned, *best, *search)
            return
        if mix == STANDARD_SEARCHING:
            ops.vocabulary_standard_search(*vocabulary, head.banned, *candidates, *standard_search)
            return
        ops.vocabulary_logits(*vocabulary)
        if mix == SEARCHING_AND_SAMPLING:
            ops.top(logits, head.banned, *best)
            ops.beam_step(*search, *best)
        elif mix == ANY:
            ops.apply_rules(*rules)
            ops.top(logits, head.banned, *candidates, normalisations)
            ops.beam_step(*search, *candidates)
            ops.standard_step(*standard_search, *candidates)
        ops.sample_step(rows, state.slots, state.history, state.details, logits, head.banned)

    return run
