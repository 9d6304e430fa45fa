"""What a loaded model gives back: texts it wrote, scores of what it was given, and rows it could not take."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightseq_backend.errors import RequestError


@dataclass(frozen=True)
class Hypothesis:
    """One text that a model wrote.

    ids       without start token, up to and with the end token where it came to one; a GPT's begin with the prompt
    text      of the ids; None for a model without a tokenizer
    score     length-normalised log-probability
    finished  False when the step limit cut it
    token_log_probabilities  of each new token, where they were asked for
    """

    ids: tuple[int, ...]
    text: str | None
    score: float
    finished: bool
    token_log_probabilities: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Answer:
    """The answer to one row.

    number         of the row, from 0
    hypotheses     best first
    prompt_length  how many ids of every hypothesis are the prompt's; 0 for a translation
    """

    number: int
    hypotheses: tuple[Hypothesis, ...]
    prompt_length: int = 0

    @property
    def best(self) -> Hypothesis:
        return self.hypotheses[0]

    @property
    def text(self) -> str | None:
        return self.best.text

    @property
    def ids(self) -> tuple[int, ...]:
        return self.best.ids


@dataclass(frozen=True)
class Score:
    """Natural log-probabilities of given tokens.

    number  of the row, from 0
    ids     what was scored: a translation's target, or a text after its first token
    token_log_probabilities  of each of the ids
    """

    number: int
    ids: tuple[int, ...]
    token_log_probabilities: tuple[float, ...]

    @property
    def total(self) -> float:
        """The log-probability of all of it."""
        return math.fsum(self.token_log_probabilities)

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood, 0 for no tokens: what LightSeq calls ppl."""
        return 0 - self.total / max(1, len(self.ids))  # 0 - 0 is not -0

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


@dataclass(frozen=True)
class Failure:
    """Why the row of that number, from 0, has no answer."""

    number: int
    error: RequestError
