"""Where stop words end a text. The host looks for them, so that no step has to."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence as Ordered
from dataclasses import dataclass

import numpy as np

from lightseq_backend.config import Config, DecodingOptions, GptConfig
from lightseq_backend.ops.choice import length_norm
from lightseq_backend.request import Hypothesis, Output, Sequence


@dataclass(frozen=True)
class Stop:
    """Where a text of ids ends.

    found   tokens up to and with the one that completes the stop
    kept    tokens of the answer
    text    of the answer with its prompt, where the stop is one of text
    """

    found: int
    kept: int
    text: str | None = None


class Stops:
    """What ends one sequence's texts.

    What ends before min_new_tokens (or min_length) tokens does not count.
    """

    def __init__(self, sequence: Sequence, config: Config):
        request = sequence.request
        options = request.options
        self._words = [word for word in options.stop if not isinstance(word, str)]
        self._texts = [word for word in options.stop if isinstance(word, str)]
        self._include = options.include_stop
        self._ends = frozenset(options.end_ids)
        self._least = _least(sequence, config)
        self._prompt = sequence.tokens[sequence.tokens >= 0].tolist() if isinstance(config, GptConfig) else []
        self._decode = request.decode
        self._searched: dict[int, int] = {}
        self._found: dict[int, Stop] = {}
        # Every token stands for a byte or more, but for the few that only steer a model.
        self._reach = max((len(text.encode()) for text in self._texts), default=0) + 4

    def look(self, row: int, tokens: np.ndarray) -> Stop | None:
        """`find`, over a text that has grown since the last look at that row."""
        if row not in self._found:
            stop = self.find(tokens, self._searched.get(row, 0))
            self._searched[row] = len(tokens)
            if stop is None:
                return None
            self._found[row] = stop
        return self._found[row]

    def find(self, tokens: np.ndarray, searched: int = 0) -> Stop | None:
        """The first stop of a text. tokens: int32 [n], of which the first `searched` have none. A further end id that
        they end with is no text."""
        if tokens.size and int(tokens[-1]) in self._ends:
            tokens = tokens[:-1]
        stops = [stop for stop in (self._word(tokens), self._text(tokens, searched)) if stop]
        return min(stops, key=lambda stop: (stop.found, stop.kept), default=None)

    def safe(self, tokens: np.ndarray) -> int:
        """How many of the tokens stay, whatever comes: those behind may be the beginning of a stop word."""
        if self._include:
            return len(tokens)
        safe = len(tokens) - max((_overlap(tokens.tolist(), word) for word in self._words), default=0)
        if self._texts and self._begun(self._recent(tokens, len(tokens))):
            text = self.read(tokens)
            safe = min(safe, self._within(tokens, len(text) - self._begun(text)))
        return safe

    def read(self, tokens: np.ndarray) -> str:
        """The text of a prompt and tokens behind it."""
        assert self._decode is not None
        return self._decode([*self._prompt, *tokens.tolist()])

    def _word(self, tokens: np.ndarray) -> Stop | None:
        found: list[Stop] = []
        for word in self._words:
            if len(word) <= len(tokens):
                windows = np.lib.stride_tricks.sliding_window_view(tokens, len(word))
                ends = np.flatnonzero((windows == word).all(axis=1)) + len(word)
                ends = ends[ends >= self._least]
                if ends.size:
                    end = int(ends[0])
                    found.append(Stop(end, end if self._include else end - len(word)))
        return min(found, key=lambda stop: (stop.found, stop.kept), default=None)

    def _text(self, tokens: np.ndarray, searched: int) -> Stop | None:
        if not self._texts or len(tokens) < self._least:
            return None
        if searched:  # a look at what is new; what it reads as alone may differ in a blank from what it is
            recent = self._recent(tokens, searched)
            if not any(word.strip() in recent for word in self._texts):
                return None
        start = len(self.read(tokens[: max(0, self._least - 1)]))

        def found_in(count: int) -> bool:
            text = self.read(tokens[:count])
            return any(word in text[start:] for word in self._texts)

        if not found_in(len(tokens)):
            return None
        count = bisect_left(range(len(tokens) + 1), True, key=found_in)
        text = self.read(tokens[:count])
        places = [(place, word) for word in self._texts if (place := text.find(word, start)) >= 0]
        place, word = min(places)
        end = place + len(word) if self._include else place
        kept = count if self._include else self._within(tokens[:count], end)
        return Stop(count, kept, text=text[:end])

    def _recent(self, tokens: np.ndarray, searched: int) -> str:
        """What is read behind the first `searched` tokens, with enough before it for the longest stop word."""
        assert self._decode is not None
        return self._decode(tokens[max(0, searched - self._reach) :].tolist())

    def _begun(self, text: str) -> int:
        """How many characters at a text's end may be the beginning of a stop word."""
        return max(_overlap(text, word) for word in self._texts)

    def _within(self, tokens: np.ndarray, length: int) -> int:
        """The most tokens whose text has at most that length."""
        return bisect_left(range(len(tokens) + 1), True, key=lambda n: len(self.read(tokens[:n])) > length) - 1


def cut(output: Output, stops: Stops, options: DecodingOptions) -> Output:
    """An output whose hypotheses, with the log-probability of every token, end where their first stop is."""
    hypotheses = tuple(_cut(one, stops.find(one.tokens), options) for one in output.hypotheses)
    longest = max(len(one.tokens) for one in hypotheses)
    return output._replace(hypotheses=hypotheses, steps=longest, cut=not all(one.finished for one in hypotheses))


def _cut(one: Hypothesis, stop: Stop | None, options: DecodingOptions) -> Hypothesis:
    details = one.token_log_probabilities
    assert details is not None
    shown = details if options.token_log_probabilities else None
    if stop is None:
        return one._replace(token_log_probabilities=shown)
    total = float(details[: stop.found].sum(dtype=np.float64))
    if options.length_penalty < 0 and options.searches:
        score = total / stop.found
    else:
        score = total * float(length_norm(stop.found, options.length_penalty))
    each = None if shown is None else shown[: stop.kept]
    return Hypothesis(one.tokens[: stop.kept], score, True, each, text=stop.text)


def _least(sequence: Sequence, config: Config) -> int:
    """Tokens that there must be before an end counts."""
    options = sequence.request.options
    before = len(sequence.tokens) if isinstance(config, GptConfig) else 1 + len(config.prefix(options))
    return max(1, options.min_new_tokens or options.min_length - before)


def _overlap(text: Ordered[object], word: Ordered[object]) -> int:
    """How much of a word, less than all of it, a text may have the beginning of at its end."""
    for size in range(min(len(text), len(word) - 1), 0, -1):
        if list(text[len(text) - size :]) == list(word[:size]):
            return size
    return 0
