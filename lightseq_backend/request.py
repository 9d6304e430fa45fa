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
    token_log_probabilities  float32 [n], where the request asked for them
    """

    tokens: np.ndarray
    score: float
    finished: bool
    token_log_probabilities: np.ndarray | None = None


@dataclass(frozen=True)
class Output:
    """The answer to one Request.

    hypotheses  best first; empty for a score request
    steps       decode steps the sequence took; after a standard search, tokens of the longest hypothesis
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


@dataclass(eq=False)
class Sequence:
    """A request on its way: what of it is fed, where it sits, how many tokens it may still grow.

    tokens, positions  int32 [m]: the row without padding, and the row of the position table for each token
    limit              tokens it may generate
    slots              the cache lanes it holds, one a beam or sample; empty until admitted
    queued             decode steps that the device has been given for it
    """

    request: Request
    tokens: np.ndarray
    positions: np.ndarray
    limit: int
    seed: int
    slots: list[int] = field(default_factory=list)
    queued: int = 0

    @classmethod
    def of(cls, request: Request, config: Config) -> Sequence:
        """The sequence a request asks for; RequestError when this model cannot take it."""
        row = np.asarray(request.tokens)
        columns = _columns(row, config)
        if isinstance(config, GptConfig):
            tokens, limit = _text(row, columns, request, config)
            positions = np.arange(tokens.size)
        elif request.kind == SCORE:
            raise RequestError("this model translates; only a GPT model scores text")
        else:
            # Padding is dropped, but its columns count: in the positions of what follows and in the step limit.
            tokens, positions = row[columns], columns
            limit = config.new_tokens(row.size, request.options)
        seed = request.options.seed
        return cls(
            request=request,
            tokens=tokens.astype(np.int32),
            positions=positions.astype(np.int32),
            limit=limit,
            seed=secrets.randbelow(MAX_SEED) if seed is None else seed,
        )


def _text(row: np.ndarray, columns: np.ndarray, request: Request, config: GptConfig) -> tuple[np.ndarray, int]:
    """What a GPT reads of a row, and how many tokens it may add. columns: those that hold no padding.

    Padding between tokens is fed as LightSeq feeds it, as a token without embedding (id -1 here). A text of n tokens
    is scored over its first n columns (lightseq_format.md 3.8); a prompt is what lies between its first and last token.
    """
    tokens = row
    if columns.size < row.size:
        tokens = np.where(row == config.padding_id, -1, row.astype(np.int64))  # among uint8, -1 is 255 to NumPy 2
    if request.kind == SCORE:
        scored = tokens[: columns.size]
        if not 0 <= config.padding_id < config.vocabulary and (scored[1:] < 0).any():
            raise RequestError(
                f"padding (id {config.padding_id}) stands between tokens; it has no place in the vocabulary"
            )
        return scored, 0
    prompt = tokens[columns[0] : columns[-1] + 1]
    options = request.options
    if options.decoder_prefix or options.forced_bos_token_id is not None:
        raise RequestError("this model continues texts: its prompt is all that comes first")
    limit = config.new_tokens(prompt.size, options)
    if limit < 1:
        raise RequestError(f"the prompt has {prompt.size} tokens; max_length {options.max_length} leaves none to add")
    return prompt, limit


def _columns(row: np.ndarray, config: Config) -> np.ndarray:
    """Where a row holds something else than padding; RequestError when this model cannot take the row."""
    if row.ndim != 1 or not np.issubdtype(row.dtype, np.integer):
        raise RequestError(f"a row of ids is one-dimensional and integer; this one is {row.dtype} {list(row.shape)}")
    if row.size == 0:
        raise RequestError("the row is empty; it needs at least one id")
    if row.size > config.max_positions:
        raise RequestError(f"the row has {row.size} ids; this model takes {config.max_positions} (max_step)")
    columns = np.flatnonzero(row != config.padding_id)
    if columns.size == 0:
        raise RequestError(f"the row holds only padding (id {config.padding_id})")
    tokens = row if columns.size == row.size else row[columns]
    if tokens.min() < 0 or tokens.max() >= config.input_vocabulary:
        column = int(columns[np.flatnonzero((tokens < 0) | (tokens >= config.input_vocabulary))[0]])
        raise RequestError(
            f"id {int(row[column])} at column {column} is outside the vocabulary (0 to {config.input_vocabulary - 1})"
        )
    return columns
