"""What was asked (Request), how far it is (Sequence) and what goes back (Output)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from lightseq_backend.config import DecodingOptions

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
