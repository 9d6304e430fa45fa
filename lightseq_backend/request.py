"""What was asked (Request), how far it is (Sequence) and what goes back (Output)."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from lightseq_backend.config import MAX_SEED, Config, DecodingOptions, GptConfig
from lightseq_backend.errors import RequestError

GENERATE = "generate"
SCORE = "score"


@dataclass(frozen=True)
class Hypothesis:
    """One generated text.

    tokens    int32 [n]: without start token or prompt; the end token is included when finished
    score     length-normalised log-probability
    finished  False when the step limit cut it
    """

    tokens: np.ndarray
    score: float
    finished: bool


@dataclass(frozen=True)
class Output:
    """The answer to one Request.

    hypotheses  best first; empty for a score request
    steps       decode steps the sequence took
    cut         whether the step limit came before every beam (or sample) had ended
    loss        mean negative log-likelihood of the tokens after the first, natural log (score requests)
    """

    hypotheses: tuple[Hypothesis, ...] = ()
    steps: int = 0
    cut: bool = False
    loss: float | None = None


@dataclass(frozen=True)
class Request:
    """One row of ids and what to do with it.

    tokens    int32 [n] as the caller sent them, padding included: for a Transformer n counts in the step limit
    options   every field resolved (DecodingOptions.with_changes)
    reply     called exactly once, from the engine's thread, with the Output or the exception; must not block
    kind      GENERATE or SCORE
    stream    row number within the caller's batch: keeps samples of equal rows with equal seeds apart
    """

    tokens: np.ndarray
    options: DecodingOptions
    reply: Callable[[Output | Exception], None]
    kind: str = GENERATE
    stream: int = 0


@dataclass
class Sequence:
    """A request on its way: what of it is fed, where it sits, how many tokens it may still grow.

    tokens, positions  int32 [m]: the row without padding, and the column each token had
    limit              tokens it may generate
    slots              the cache lanes it holds, one a beam or sample; empty until admitted
    """

    request: Request
    tokens: np.ndarray
    positions: np.ndarray
    limit: int
    seed: int
    slots: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, request: Request, config: Config) -> Sequence:
        """The sequence a request asks for; RequestError when this model cannot take it."""
        row = np.asarray(request.tokens)
        _check_row(row, config)
        columns = np.flatnonzero(row != config.padding_id)
        positions = columns
        if isinstance(config, GptConfig):
            # A prompt padded on the left starts at position 0 all the same; a source keeps its columns, as in LightSeq.
            positions = columns - columns[0]
            limit = config.new_tokens(int(positions[-1]) + 1, request.options)
        else:
            if request.kind == SCORE:
                raise RequestError("this model translates; only a GPT model scores text")
            limit = config.new_tokens(row.size, request.options)
        seed = request.options.seed
        return cls(
            request=request,
            tokens=row[columns].astype(np.int32),
            positions=positions.astype(np.int32),
            limit=limit,
            seed=secrets.randbelow(MAX_SEED) if seed is None else seed,
        )


def _check_row(row: np.ndarray, config: Config) -> None:
    if row.ndim != 1 or not np.issubdtype(row.dtype, np.integer):
        raise RequestError(f"a row of ids is one-dimensional and integer; this one is {row.dtype} {list(row.shape)}")
    if row.size == 0:
        raise RequestError("the row is empty; it needs at least one id")
    if row.size > config.max_positions:
        raise RequestError(f"the row has {row.size} ids; this model takes {config.max_positions} (max_step)")
    padding = row == config.padding_id
    if padding.all():
        raise RequestError(f"the row holds only padding (id {config.padding_id})")
    outside = np.flatnonzero(((row < 0) | (row >= config.input_vocabulary)) & ~padding)
    if outside.size:
        column = int(outside[0])
        raise RequestError(
            f"id {int(row[column])} at column {column} is outside the vocabulary (0 to {config.input_vocabulary - 1})"
        )
