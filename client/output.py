"""What the command line writes: answers as lines or JSON, and the timing summary."""

from __future__ import annotations

import json
import math
from array import array
from typing import Any, TextIO

from lightseq_client.answers import Answer, Failure, Hypothesis
from lightseq_client.client import Health
from lightseq_client.signature import GENERATE
from lightseq_client.stream import Part


class Plain:
    """The best hypothesis, or the score, a line; with every_hypothesis one line each: row, rank, score, text.

    Line n belongs to row n: a failed row leaves an empty one. With every_hypothesis it leaves none.
    """

    def __init__(self, file: TextIO, every_hypothesis: bool):
        self._file = file
        self._every = every_hypothesis

    def answer(self, answer: Answer) -> None:
        score = answer.log_probability if answer.loss is None else answer.loss
        if score is not None:
            self._line(f"{score:.6f}")
        elif not self._every:
            self._line(answer.hypotheses[0].text or "")
        else:
            for rank, found in enumerate(answer.hypotheses, 1):
                worth = "-" if found.score is None else f"{found.score:.6f}"
                self._line(f"{answer.number}\t{rank}\t{worth}\t{found.text}")

    def failure(self, failure: Failure) -> None:
        if not self._every:
            self._line("")

    def health(self, url: str, protocol: str, health: Health) -> None:
        self._line(f"server {url} ({protocol}): live, {'ready' if health.ready else 'not ready'}")
        for model in health.models:
            state = "ready" if model.ready else "not ready" + (f" ({model.state})" if model.state else "")
            version = f", version {model.version}" if model.version else ""
            self._line(f"model {model.name}: {state}{version}{': ' + model.reason if model.reason else ''}")

    def _line(self, text: str) -> None:
        # Flushed line by line: whoever reads the other end of a pipe may be waiting for this one.
        print(text, file=self._file, flush=True)


class Json:
    """One object a line. A score or loss that is not finite is null: JSON has no word for it."""

    def __init__(self, file: TextIO, task: str, shows_text: bool):
        self._file = file
        self._prompts = task == GENERATE
        self._shows_text = shows_text

    def answer(self, answer: Answer) -> None:
        fields: dict[str, Any] = {"line": answer.number, "input": answer.given}
        if answer.ids:  # where the server tokenised, it keeps them to itself
            fields["input_ids"] = answer.ids
        if answer.target:
            fields["target_ids"] = answer.target
        if answer.loss is not None:
            fields["loss"] = _finite(answer.loss)
        elif answer.log_probability is not None:
            fields["log_probability"] = _finite(answer.log_probability)
            if answer.token_log_probabilities is not None:
                fields["token_log_probabilities"] = [*map(_finite, answer.token_log_probabilities)]
        else:
            if self._prompts and answer.ids:
                fields["prompt_length"] = answer.prompt_length
            fields["hypotheses"] = [self._hypothesis(found) for found in answer.hypotheses]
        fields["latency_ms"] = round(answer.latency * 1e3, 3)
        self._object(fields)

    def _hypothesis(self, found: Hypothesis) -> dict[str, Any]:
        fields: dict[str, Any] = {"ids": found.ids, "score": _finite(found.score)}
        if self._shows_text:
            fields["text"] = found.text
        if found.token_log_probabilities is not None:
            fields["token_log_probabilities"] = found.token_log_probabilities
        return fields

    def failure(self, failure: Failure) -> None:
        self._object({"line": failure.number, "input": failure.given, "error": str(failure.error)})

    def health(self, url: str, protocol: str, health: Health) -> None:
        models = [
            {"name": m.name, "version": m.version, "ready": m.ready, "state": m.state, "reason": m.reason}
            for m in health.models
        ]
        self._object({"url": url, "protocol": protocol, "live": health.live, "ready": health.ready, "models": models})

    def _object(self, fields: dict[str, Any]) -> None:
        print(json.dumps(fields, ensure_ascii=False, allow_nan=False), file=self._file, flush=True)


class PlainStream:
    """A line a row, its first text as it comes; a row that fails may have begun one."""

    def __init__(self, file: TextIO):
        self._file = file

    def part(self, number: int, part: Part) -> None:
        text = part.texts[0] if part.answer is None else "\n"
        print(text, end="", file=self._file, flush=True)

    def failure(self, number: int) -> None:
        print(file=self._file, flush=True)


class JsonStream:
    """An object a part: ids and texts that are new. The last one of a row has the hypotheses instead."""

    def __init__(self, file: TextIO):
        self._file = file

    def part(self, number: int, part: Part) -> None:
        fields: dict[str, Any] = {"line": number, "seconds": round(part.seconds, 6)}
        if part.answer is None:
            fields |= {"ids": part.ids, "texts": part.texts}
        else:
            found = part.answer.hypotheses
            fields |= {
                "hypotheses": [{"ids": one.ids, "score": _finite(one.score), "text": one.text} for one in found],
                "first_token_ms": part.first_token_ms,
            }
        print(json.dumps(fields, ensure_ascii=False, allow_nan=False), file=self._file, flush=True)

    def failure(self, number: int) -> None:
        """Standard error tells of it."""


class Summary:
    """Counts and times of one run. unit is what a row was: a request, unless several shared one."""

    def __init__(self, unit: str) -> None:
        self.failures = 0
        self._unit = unit
        self._tokens = 0
        self._latencies = array("d")  # seconds; 8 bytes each, for millions of rows

    def answer(self, answer: Answer) -> None:
        self._tokens += answer.tokens
        self._latencies.append(answer.latency)

    def failure(self, failure: Failure) -> None:
        self.failures += 1

    def text(self, seconds: float) -> str:
        answered = len(self._latencies)
        text = f"{answered + self.failures} {self._unit}, {self.failures} failed, {seconds:.3f} s"
        if answered:
            rates = f"{answered / seconds:.1f} {self._unit}/s, {self._tokens / seconds:.1f} tokens/s"
            ordered = sorted(self._latencies)
            times = " ".join(f"p{p} {percentile(ordered, p) * 1e3:.1f}" for p in (50, 95, 99))
            text += f", {rates}, latency {times} ms"
        return text


def percentile(ordered: list[float], percent: int) -> float:
    """The smallest value that at least that many percent do not exceed (nearest rank)."""
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
