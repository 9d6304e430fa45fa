"""What was asked (Request), how far it is (Sequence) and what goes back (Output)."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from lightseq_backend.config import MAX_SEED, Config, DecodingOptions, GptConfig, TransformerConfig
from lightseq_backend.errors import RequestError
from lightseq_backend.small import SHORT, as_int32, counting, joined, largest

GENERATE = "generate"
SCORE = "score"

# Seconds of its time in the queue that a request gives to others: it goes before what came so much later, no more.
HIGH, NORMAL, LOW = "high", "normal", "low"
PRIORITIES = {HIGH: 0.0, NORMAL: 2.0, LOW: 10.0}


class Hypothesis(NamedTuple):
    """One generated text.

    tokens    int32 [n]: without start token or prompt; the end token is included when finished
    score     length-normalised log-probability
    finished  False when the step limit cut it
    token_log_probabilities  float32 [n], where the request asked for them
    silent    how many of its last tokens are no text: a further end id is none
    text      what it reads as, its prompt included, where a stop word of text ended it: that may end inside a token
    """

    tokens: np.ndarray
    score: float
    finished: bool
    token_log_probabilities: np.ndarray | None = None
    silent: int = 0
    text: str | None = None


class Output(NamedTuple):
    """The answer to one Request.

    hypotheses  best first; empty for a score request
    steps       decode steps the sequence took; after a standard search, tokens of the longest hypothesis
    cut         whether the step limit came before every beam (or sample) had ended
    loss        mean negative log-likelihood of the scored tokens, natural log (score requests)
    target_log_probabilities  float32 [n]: of each scored token, natural log (score requests)
    first_token  seconds from the request to its first token on the host, where it reported progress
    """

    hypotheses: tuple[Hypothesis, ...] = ()
    steps: int = 0
    cut: bool = False
    loss: float | None = None
    target_log_probabilities: np.ndarray | None = None
    first_token: float | None = None


Decode = Callable[[Iterable[int]], str]
Progress = Callable[[tuple[np.ndarray, ...]], None]


@dataclass(eq=False, slots=True)  # a frozen one takes six times as long to make
class Request:
    """One row of ids and what to do with it; nobody changes it.

    tokens    int32 [n] as the caller sent them, padding included: for a Transformer n counts in the step limit
    options   every field resolved (DecodingOptions.with_changes)
    reply     called exactly once with the Output or the exception, from the engine's thread, which waits meanwhile
    kind      GENERATE or SCORE
    stream    row number within the caller's batch: keeps samples of equal rows with equal seeds apart
    target    int32 [t]: what a Transformer scores, as it would have generated it; None for all other requests
    progress  called after bursts, from the same thread, with what the answer begins with, int32 [n] a text:
              of a beam search one, of samples all; must not block. Never after `reply`
    deadline  when, by time.monotonic(), the answer must be there; then it is DeadlineExceeded
    decode    the text of ids; stop words of text need it
    priority  one of PRIORITIES, in the queue; where rows decode all are equal
    arrived   when it came, by time.monotonic(), where that was before it is submitted
    """

    tokens: np.ndarray
    options: DecodingOptions
    reply: Callable[[Output | Exception], None]
    kind: str = GENERATE
    stream: int = 0
    target: np.ndarray | None = None
    progress: Progress | None = None
    deadline: float | None = None
    decode: Decode | None = None
    priority: str = NORMAL
    arrived: float | None = None


class Timing(NamedTuple):
    """Seconds that an answered sequence took.

    queue        until it had slots
    first_token  until the host saw its first tokens; of what is scored: until its score
    token        from then on a step, of those that took more steps than that; else None
    total        until it was done
    """

    queue: float
    first_token: float
    token: float | None
    total: float


@dataclass(eq=False, slots=True)
class Sequence:
    """A request on its way: what of it is fed, where it sits, how many tokens it may still grow.

    tokens, positions  int32 [m]: the row without padding, and the row of the position table for each token
    limit              tokens it may generate
    rows               of the larger of the passes that read it
    scored             int32 [s]: what is scored, each token but the first `given` by those before it
    slots              the cache lanes it holds, one a beam or sample; empty until admitted
    queued             decode steps that the device has been given for it
    followed           whether its tokens are looked at while it decodes
    stops              what ends its texts beside the model's end id (decoding.stops.Stops), None where nothing does
    arrived, admitted  when it was queued and when it had slots, seconds on a monotonic clock
    seen               when the host saw its first tokens, and how many steps it had taken by then
    """

    request: Request
    tokens: np.ndarray
    positions: np.ndarray
    limit: int
    seed: int
    rows: int
    scored: np.ndarray
    given: int = 1
    slots: list[int] = field(default_factory=list)
    queued: int = 0
    followed: bool = False
    stops: Any = None
    arrived: float = 0.0
    admitted: float = 0.0
    seen: tuple[float, int] | None = None

    @classmethod
    def all_of(cls, requests: Ordered[Request], config: Config) -> list[Sequence]:
        """The sequences that requests ask for; RequestError when this model cannot take one."""
        if len(requests) < 2:
            return [cls.of(request, config) for request in requests]
        plain = _plain([request.tokens for request in requests], config)
        return [cls.of(request, config, row) for request, row in zip(requests, plain)]

    @classmethod
    def of(cls, request: Request, config: Config, plain: np.ndarray | None = None) -> Sequence:
        """The sequence a request asks for; RequestError when this model cannot take it.

        plain: its row as an int32 array of its own, where it is known to be ids of this model without padding
        """
        row = np.asarray(request.tokens) if plain is None else plain
        if request.target is not None and (request.kind != SCORE or isinstance(config, GptConfig)):
            raise RequestError("a target is for scoring a translation; this request takes none")
        columns = _columns(row, config) if plain is None else counting(len(plain))
        if isinstance(config, GptConfig):
            tokens, limit = _text(row, columns, request, config)
            positions = counting(tokens.size)
            scored, given = tokens, 1
        else:
            # Padding is dropped, but its columns count: in the positions of what follows and in the step limit.
            tokens, positions = row if len(columns) == len(row) else row[columns], columns
            limit = config.new_tokens(row.size, request.options)
            scored, given = _decoded(request, config)
        stop = request.options.stop
        if stop and request.decode is None and any(isinstance(word, str) for word in stop):
            raise RequestError("stop has words of text; without a tokenizer it takes words of ids")
        seed = request.options.seed
        if seed is None:  # a draw from the system takes long
            seed = 0 if request.kind == SCORE or request.options.searches else secrets.randbelow(MAX_SEED)
        kept = tokens if tokens is plain else as_int32(tokens)
        return cls(
            request=request,
            tokens=kept,
            positions=positions.astype(np.int32, copy=False),
            limit=limit,
            seed=seed,
            rows=max(len(kept), len(scored)) if request.kind == SCORE else len(kept),
            scored=kept if scored is tokens else as_int32(scored) if len(scored) else _NOTHING,
            given=given,
            followed=request.kind == GENERATE and (request.progress is not None or request.options.stops),
        )

    @property
    def width(self) -> int:
        """The cache lanes it needs: a scored target attends to its source in one, a scored text keeps nothing."""
        if self.request.kind == GENERATE:
            return self.request.options.width
        return int(self.request.target is not None)

    def timing(self, now: float, steps: int) -> Timing:
        """steps: those it took in all"""
        first, steps_by_then = self.seen or (now, steps)
        token = (now - first) / (steps - steps_by_then) if steps > steps_by_then else None
        return Timing(self.admitted - self.arrived, first - self.arrived, token, now - self.arrived)

    def lanes(self, first: int = 0) -> slice | np.ndarray:
        """Its slots, which ascend, as an index into an array of the lanes from `first` on; of neighbours, a slice."""
        lead, width = self.slots[0] - first, len(self.slots)
        if self.slots[-1] - self.slots[0] == width - 1:
            return slice(lead, lead + width)
        return np.array(self.slots) - first


def _text(row: np.ndarray, columns: np.ndarray, request: Request, config: GptConfig) -> tuple[np.ndarray, int]:
    """What a GPT reads of a row, and how many tokens it may add. columns: those that hold no padding.

    Padding between tokens is fed as LightSeq feeds it, as a token without embedding (id -1 here). A text of n tokens
    is scored over its first n columns (lightseq_format.md 3.8); a prompt is what lies between its first and last token.
    """
    tokens = row
    padded = columns.size < row.size
    if padded:
        tokens = np.where(row == config.padding_id, -1, row.astype(np.int64))  # among uint8, -1 is 255 to NumPy 2
    if request.kind == SCORE:
        scored = tokens[: columns.size] if padded else tokens
        if padded and (scored[1:] < 0).any() and not 0 <= config.padding_id < config.vocabulary:
            raise RequestError(
                f"padding (id {config.padding_id}) stands between tokens; it has no place in the vocabulary"
            )
        return scored, 0
    prompt = tokens[columns[0] : columns[-1] + 1] if padded else tokens
    options = request.options
    if options.decoder_prefix or options.forced_bos_token_id is not None:
        raise RequestError("this model continues texts: its prompt is all that comes first")
    limit = config.new_tokens(prompt.size, options)
    if limit < 1:
        raise RequestError(f"the prompt has {prompt.size} tokens; max_length {options.max_length} leaves none to add")
    return prompt, limit


_NOTHING = np.zeros(0, np.int32)
_UNSIGNED = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}


def _decoded(request: Request, config: TransformerConfig) -> tuple[np.ndarray, int]:
    """What a Transformer's decoder reads of a target, and how many of those tokens are not scored."""
    if request.kind != SCORE:
        return _NOTHING, 0
    if request.target is None:
        raise RequestError("this model translates; it scores a target that is given with its source")
    target = _without_filling(request.target, config)
    forced = [config.start_id] if config.forced_id is None else [config.start_id, config.forced_id]
    limit = config.max_positions - len(forced)
    if target.size > limit:
        raise RequestError(f"the target has {target.size} ids; this model takes {limit} (max_step)")
    outside = np.flatnonzero((target < 0) | (target >= config.vocabulary))
    if outside.size:
        column = int(outside[0])
        raise RequestError(
            f"id {int(target[column])} at column {column} of the target is outside the vocabulary "
            f"(0 to {config.vocabulary - 1})"
        )
    return np.concatenate([forced, target.astype(np.int64)]), len(forced)


def _without_filling(target: np.ndarray, config: TransformerConfig) -> np.ndarray:
    """The target without what fills it up to the length of others: padding, or end ids as in an answer."""
    if target.ndim != 1 or not np.issubdtype(target.dtype, np.integer):
        raise RequestError(
            f"a target of ids is one-dimensional and integer; this one is {target.dtype} {list(target.shape)}"
        )
    fills = (target == config.padding_id) | (target == config.end_id)
    size = target.size - int(np.argmin(fills[::-1])) if not fills.all() else 0
    filled = np.flatnonzero(target[size:] == config.end_id)
    if filled.size:
        size += int(filled[0]) + 1
    if size == 0:
        raise RequestError("the target is empty; it needs at least one id")
    return target[:size]


def _plain(rows: Ordered[np.ndarray], config: Config) -> Ordered[np.ndarray | None]:
    """Int32 copies of rows that are nothing but ids, looked through all at once, for a call of NumPy's costs more than
    what it does to a row; of none where one of them is anything else, or too long."""
    unknown = [None] * len(rows)
    first = rows[0]
    for row in rows:
        if not (
            isinstance(row, np.ndarray) and row.dtype == first.dtype and row.dtype.kind in "iu" and row.ndim == 1
            and 0 < row.size <= config.max_positions and row.flags.c_contiguous
        ):  # fmt: skip
            return unknown
    together = joined(rows)
    if not _only_ids(together, config):
        return unknown
    together = as_int32(together)
    ends = list(accumulate(map(len, rows)))
    return [together[start:end] for start, end in zip((0, *ends), ends)]


def _only_ids(row: np.ndarray, config: Config) -> bool:
    """Whether one-dimensional integers, one or more, are ids of this model, none of them padding."""
    most = largest(row.view(_UNSIGNED[row.itemsize]))  # without a sign, a negative id is a large one
    if most >= config.input_vocabulary:
        return False
    return not (0 <= config.padding_id <= most and np.count_nonzero(row == config.padding_id))


def _columns(row: np.ndarray, config: Config) -> np.ndarray:
    """Where a row holds something else than padding; RequestError when this model cannot take the row."""
    if row.ndim != 1 or row.dtype.kind not in "iu":
        raise RequestError(f"a row of ids is one-dimensional and integer; this one is {row.dtype} {list(row.shape)}")
    if row.size == 0:
        raise RequestError("the row is empty; it needs at least one id")
    if row.size > config.max_positions:
        raise RequestError(f"the row has {row.size} ids; this model takes {config.max_positions} (max_step)")
    columns = counting(row.size)
    if row.size <= SHORT:  # for what most rows are, a list is faster
        ids = row.tolist()
        if config.padding_id not in ids and min(ids) >= 0 and max(ids) < config.input_vocabulary:
            return columns
    if _only_ids(row, config):
        return columns
    columns = np.flatnonzero(row != config.padding_id)
    if columns.size == 0:
        raise RequestError(f"the row holds only padding (id {config.padding_id})")
    tokens = row[columns]
    outside = np.flatnonzero((tokens < 0) | (tokens >= config.input_vocabulary))
    if outside.size:
        column = int(columns[outside[0]])
        raise RequestError(
            f"id {int(row[column])} at column {column} is outside the vocabulary (0 to {config.input_vocabulary - 1})"
        )
    return columns
