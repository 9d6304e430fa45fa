"""What becomes of a line: the model that a command names, the rows it reads, and its answers as lines again."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from lightseq_backend.answers import Answer, Failure, Score
from lightseq_backend.errors import RequestError

if TYPE_CHECKING:
    from lightseq_backend.loaded import Model


class Written(NamedTuple):
    """A line of the output, without its end, and why it is empty where the model could not take the input's."""

    number: int
    line: str
    error: RequestError | None = None


def open_model(options: argparse.Namespace) -> Model:
    """The model that a command's options name."""
    from lightseq_backend.loaded import Model

    return Model(
        options.model, device=options.device, precision=options.precision, dialect=options.dialect,
        tokenizer=options.tokenizer, source_language=options.source_language, slots=options.slots,
        window=options.window,
    )  # fmt: skip


def written(
    model: Model, options: argparse.Namespace, rows: Iterable[Any], first: int, changes: dict[str, Any]
) -> Iterator[Written]:
    """The lines that belong to rows, which are lines too, or pairs of them for scores; numbers count from `first`.

    changes: options of decoding. RequestError, at once, where one cannot be honoured.
    """
    row_of: Callable[[bytes], Any] = _ids if options.ids else _text
    parse: Callable[[Any], Any] = row_of
    if options.task == "score" and not model.continues_texts:
        parse = lambda line: tuple(map(row_of, _halves(line)))  # noqa: E731
    shared: dict[str, Any] = {"errors": "return", "first": first, "ahead": int(options.window > 1), "parse": parse}
    answers: Iterator[Answer | Score | Failure]
    if options.task == "score":
        answers = model.score(rows, **shared)
    else:
        answers = (model.translate if options.task == "translate" else model.generate)(rows, **shared, **changes)
    return (_written(answer, options) for answer in answers)


def _halves(line: bytes | tuple[bytes, bytes]) -> tuple[bytes, bytes]:
    if isinstance(line, tuple):
        return line
    parts = line.split(b"\t")
    if len(parts) != 2:
        raise RequestError(f"the line has {len(parts) - 1} tabs; it needs one, between source and target")
    return parts[0], parts[1]


def _text(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"the text is not UTF-8: byte {error.start} is {line[error.start]:#x}") from None


def _ids(line: bytes) -> list[int]:
    ids = []
    for word in line.split():
        try:
            ids.append(int(word))
        except ValueError:
            raise RequestError(f"{word.decode(errors='replace')!r} is not an id") from None
    return ids


def _written(answer: Answer | Score | Failure, options: argparse.Namespace) -> Written:
    return Written(answer.number, _line(answer, options), answer.error if isinstance(answer, Failure) else None)


def _line(answer: Answer | Score | Failure, options: argparse.Namespace) -> str:
    if options.json:
        return json.dumps(_fields(answer), ensure_ascii=False, allow_nan=False)
    if isinstance(answer, Failure):
        return ""
    if isinstance(answer, Score):
        parts = "\t" + " ".join(f"{part:.6f}" for part in answer.token_log_probabilities) if options.tokens else ""
        return f"{answer.total:.6f}{parts}"
    if options.ids or answer.text is None:
        return " ".join(map(str, answer.ids))
    return answer.text.replace("\r", "\\r").replace("\n", "\\n")


def _fields(answer: Answer | Score | Failure) -> dict[str, Any]:
    fields: dict[str, Any] = {"line": answer.number + 1}
    if isinstance(answer, Failure):
        return fields | {"error": str(answer.error)}
    if isinstance(answer, Score):
        numbers = {"log_probability": _finite(answer.total), "perplexity": _finite(answer.perplexity)}
        parts = [_finite(part) for part in answer.token_log_probabilities]
        return fields | {**numbers, "ids": answer.ids, "token_log_probabilities": parts}
    hypotheses = []
    for one in answer.hypotheses:
        own: dict[str, Any] = {"ids": one.ids, "text": one.text, "score": _finite(one.score), "finished": one.finished}
        if one.token_log_probabilities is not None:
            own["token_log_probabilities"] = [_finite(part) for part in one.token_log_probabilities]
        hypotheses.append(own)
    return fields | {"prompt_length": answer.prompt_length, "hypotheses": hypotheses}


def _finite(number: float) -> float | None:
    """JSON has no word for what is not."""
    return number if math.isfinite(number) else None
