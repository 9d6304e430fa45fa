"""From rows to the arrays of a request, and from the arrays of an answer back to rows: no network here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lightseq_client.errors import INTERNAL, ClientError, ModelError, RequestFailed, RowError
from lightseq_client.signature import (
    DETAILS,
    GENERATE,
    INTEGER_TYPES,
    LOG_PROBABILITY,
    TEXT_OUTPUT,
    Signature,
)
from lightseq_client.vocabulary import Codec, ServerText

RowLike = Sequence[int] | str
Given = RowLike | tuple[RowLike, ...]  # where translations are scored: a source and its target
_SIDES = (str, Sequence, np.ndarray)  # what such a pair consists of, and no row of ids does


@dataclass(frozen=True)
class Hypothesis:
    """One text the model found.

    ids    as the server sent them, a prompt included; cut behind the first end id where that is known,
           else filled up with end ids to the length of the longest hypothesis of the answer
    score  length-normalised log-probability; None where the model has no output for it
    text   what the codec makes of the ids
    token_log_probabilities  where they were asked for: one an id, 0 for those of a prompt
    """

    ids: tuple[int, ...]
    score: float | None = None
    text: str | None = None
    token_log_probabilities: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Row:
    """One row on its way: its place among the caller's rows (from 1), as it was given, and its ids.

    target  ids of the translation to score; none in other requests, and none where both sides go as text
    """

    number: int
    given: object
    ids: tuple[int, ...]
    target: tuple[int, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What came back for one row.

    number         the row's place among the caller's rows, from 1
    given, ids     the row as it was given and as it was sent, without padding; no ids where it was sent as text
    hypotheses     best first; empty for a score
    loss           mean negative log-likelihood, natural log (scores only, of models that give it)
    prompt_length  how many ids of every hypothesis are the prompt's; 0 for a translation, and where it was sent as text
    latency        seconds from the first attempt to the answer, waits between attempts included
    target         ids of the translation that was scored, as it was sent
    log_probability, token_log_probabilities  natural log, of all that was scored and of each of its tokens (scores
                   only, of models that give them); 0 behind what fills a row up, and behind the end of a row that was
                   sent as text together with longer ones
    """

    number: int
    given: object
    ids: tuple[int, ...]
    hypotheses: tuple[Hypothesis, ...]
    loss: float | None
    prompt_length: int
    latency: float
    target: tuple[int, ...] = ()
    log_probability: float | None = None
    token_log_probabilities: tuple[float, ...] | None = None

    @property
    def tokens(self) -> int:
        """Tokens of the best hypothesis that the model chose, or tokens that it scored."""
        if not self.hypotheses:
            return len(self.target) or len(self.token_log_probabilities or self.ids[1:])
        return len(self.hypotheses[0].ids) - self.prompt_length


@dataclass(frozen=True)
class Failure:
    """Why the row of that number has no answer."""

    number: int
    given: object
    error: ClientError


@dataclass(frozen=True)
class Call:
    """What all requests of one task share."""

    task: str
    model: str
    tensors: Signature
    codec: Codec
    pads: bool
    parameters: dict[str, Any]

    @property
    def sends_text(self) -> bool:
        return isinstance(self.codec, ServerText)


def call_of(task: str, model: str, tensors: Signature, codec: Codec, options: Mapping[str, Any], streams: bool) -> Call:
    """What requests share that ask a model with these options; ModelError where it does not answer in that way."""
    if tensors.streams != streams:
        raise ModelError(f"model {model} {'answers in parts: stream it' if tensors.streams else 'does not stream'}")
    if isinstance(codec, ServerText) and not tensors.takes_text(task):
        raise ModelError(f"model {model} cannot {task} text: it has no text_input, or no text_output for the answer")
    pads = isinstance(codec, ServerText) or (codec.padding_id is not None and task != GENERATE)
    parameters = {  # a parameter holds no list: its JSON travels
        option: json.dumps(value) if isinstance(value, list | tuple) else value
        for option, value in options.items()
        if value is not None
    }
    return Call(task, model, tensors, codec, pads, parameters)


def encoded(call: Call, chunk: list[tuple[int, Given]]) -> tuple[list[Row], list[Failure]]:
    """The rows that can be sent, and why the others cannot."""
    rows, failures = [], []
    for number, given in chunk:
        try:
            rows.append(_row(call, number, given))
        except RowError as error:
            failures.append(Failure(number, given, error))
    return rows, failures


def answers_of(call: Call, rows: list[Row], outputs: dict[str, Any], latency: float) -> list[Answer | Failure]:
    """Read the outputs (name: array) of one request back into its rows."""
    tensors, codec = call.tensors, call.codec
    if tensors.ids is None:
        return _scores(call, rows, outputs, latency)
    scores = None if tensors.scores is None else outputs[tensors.scores]
    if call.sends_text:
        return _text_answers(call, rows, outputs, scores, latency)
    answers: list[Answer | Failure] = []
    details = details_of(outputs, outputs[tensors.ids])
    for number, (row, found) in enumerate(zip(rows, hypotheses_of(outputs[tensors.ids], scores, len(rows)))):
        start = len(row.ids) if call.task == GENERATE else 0
        try:
            texts = tuple(
                _hypothesis(ended(ids, start, codec.end_id), score, codec, details[number][k])
                for k, (ids, score) in enumerate(found)
            )
            answers.append(Answer(row.number, row.given, row.ids, texts, None, start, latency))
        except ClientError as error:  # the vocabulary is another model's
            answers.append(Failure(row.number, row.given, error))
    return answers


def texts_of(texts: np.ndarray, rows: int) -> list[list[str]]:
    """texts, objects (UTF-8 bytes) [rows, hypotheses]: those of each row."""
    if texts.ndim != 2 or len(texts) != rows:
        raise RequestFailed(INTERNAL, f"the model answered texts of shape {list(texts.shape)} for {rows} rows")
    return [[bytes(text).decode(errors="replace") for text in row] for row in texts.tolist()]


def checked_ids(values: Iterable[object], datatype: str, what: str = "row") -> tuple[int, ...]:
    """The row as integers that fit the model's input; RowError names what does not."""
    limits = np.iinfo(INTEGER_TYPES[datatype])
    ids = []
    for value in values:
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
            raise RowError(f"{value!r} is not an id")
        if not limits.min <= value <= limits.max:
            raise RowError(f"id {value} does not fit the model's input, which is {datatype}")
        ids.append(int(value))
    if not ids:
        raise RowError(f"the {what} is empty")
    return tuple(ids)


def grouped(rows: Sequence[Row], may_pad: bool) -> list[list[Row]]:
    """Rows that may share a request: all of them when padding is allowed, else those of equal length."""
    if may_pad:
        return [list(rows)] if rows else []
    groups: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((len(row.ids), len(row.target)), []).append(row)
    return list(groups.values())


def sides_of(call: Call, rows: Sequence[Row]) -> list[np.ndarray]:
    """The rows as one array, or where targets are scored as two, sources and targets: of ids [rows, longest], or of
    text [rows, 1]."""
    target, padding_id = call.tensors.target, call.codec.padding_id
    if call.sends_text:
        given: list[Any] = [row.given for row in rows]
        sides = zip(*given) if target is not None else [given]
        return [np.array([[text.encode(errors="replace")] for text in side], np.object_) for side in sides]
    sources = matrix([row.ids for row in rows], call.tensors.datatype, padding_id)
    return [sources] if target is None else [sources, matrix([row.target for row in rows], target[1], padding_id)]


def matrix(rows: Sequence[Sequence[int]], datatype: str, padding_id: int | None) -> np.ndarray:
    """Rows of ids as one array [rows, longest], filled up on the right with padding_id."""
    array = np.full((len(rows), max(map(len, rows))), 0 if padding_id is None else padding_id, INTEGER_TYPES[datatype])
    for place, ids in zip(array, rows):
        place[: len(ids)] = ids
    return array


def hypotheses_of(
    ids: np.ndarray, scores: np.ndarray | None, rows: int
) -> list[list[tuple[tuple[int, ...], float | None]]]:
    """Per row its (ids, score) pairs, best first.

    ids [rows, length] or [rows, hypotheses, length]; scores [rows, hypotheses], or [rows] where there is
    one hypothesis. RequestFailed when the shapes do not fit each other.
    """
    all_ids = ids[:, None, :] if ids.ndim == 2 else ids
    if all_ids.ndim != 3 or len(all_ids) != rows or not all_ids.shape[1]:
        raise RequestFailed(INTERNAL, f"the model answered ids of shape {list(ids.shape)} for {rows} rows")
    count = all_ids.shape[1]
    if scores is not None and scores.size != rows * count:
        shapes = f"{list(scores.shape)} beside ids of shape {list(ids.shape)}"
        raise RequestFailed(INTERNAL, f"the model answered scores of shape {shapes}")
    flat = [None] * (rows * count) if scores is None else [float(score) for score in scores.ravel()]
    return [[(tuple(all_ids[row, k].tolist()), flat[row * count + k]) for k in range(count)] for row in range(rows)]


def details_of(outputs: Mapping[str, np.ndarray], ids: np.ndarray) -> list[list[tuple[float, ...] | None]]:
    """Log-probabilities of the tokens by row and hypothesis; None each where the answer has none."""
    details, rows = outputs.get(DETAILS), len(ids)
    if details is None:
        return [[None] * (1 if ids.ndim == 2 else ids.shape[1])] * rows
    return [[tuple(found) for found in row] for row in (details[:, None] if details.ndim == 2 else details).tolist()]


def ended(ids: tuple[int, ...], start: int, end_id: int | None) -> tuple[int, ...]:
    """The ids up to and with the first end id at or behind `start`."""
    if end_id is None or end_id not in ids[start:]:
        return ids
    return ids[: ids.index(end_id, start) + 1]


def _row(call: Call, number: int, given: Any) -> Row:
    is_pair = isinstance(given, list | tuple) and any(isinstance(part, _SIDES) for part in given)
    parts = len(given) if is_pair else 1
    if call.tensors.target is None:
        if parts > 1:
            raise RowError(f"the row has {parts} parts; model {call.model} takes one text, or one row of ids")
        if call.sends_text:
            return Row(number, _text(given), ())
        return Row(number, given, _ids(call.codec.encode, given, call.tensors.datatype))
    if parts != 2:
        plural = "" if parts == 1 else "s"
        raise RowError(
            f"the row has {parts} part{plural}; model {call.model} scores two: a source and its target, in a line "
            "with a tab between"
        )
    source, target = given
    if call.sends_text:
        return Row(number, (_text(source), _text(target)), ())
    # A codec that writes both sides alike has no encode_target.
    encode_target = getattr(call.codec, "encode_target", call.codec.encode)
    ids = _ids(call.codec.encode, source, call.tensors.datatype, "source")
    return Row(number, given, ids, _ids(encode_target, target, call.tensors.target[1], "target"))


def _ids(encode: Callable[[str], Iterable[int]], given: RowLike, datatype: str, what: str = "row") -> tuple[int, ...]:
    return checked_ids(encode(given) if isinstance(given, str) else given, datatype, what)


def _text(given: object) -> str:
    if not isinstance(given, str):
        raise RowError(f"{given!r} is not text")
    return given


def _scores(call: Call, rows: list[Row], outputs: dict[str, Any], latency: float) -> list[Answer | Failure]:
    """Of outputs loss or log_probability [rows, 1] or [rows], and token_log_probabilities [rows, tokens]."""
    name = str(call.tensors.scores)
    numbers, parts = outputs[name], outputs.get(DETAILS)
    if numbers.size != len(rows) or (parts is not None and (parts.ndim != 2 or len(parts) != len(rows))):
        shapes = ", ".join(f"{key} of shape {list(array.shape)}" for key, array in outputs.items())
        raise RequestFailed(INTERNAL, f"the model answered {shapes} for {len(rows)} rows")
    answers: list[Answer | Failure] = []
    for place, (row, number) in enumerate(zip(rows, numbers.ravel().tolist())):
        answer = Answer(row.number, row.given, row.ids, (), number, 0, latency, row.target)
        if name == LOG_PROBABILITY:
            tokens = len(row.target) or len(row.ids[1:]) if row.ids else None
            own = None if parts is None else tuple(parts[place, :tokens].tolist())
            answer = replace(answer, loss=None, log_probability=number, token_log_probabilities=own)
        answers.append(answer)
    return answers


def _text_answers(
    call: Call, rows: list[Row], outputs: dict[str, Any], scores: np.ndarray | None, latency: float
) -> list[Answer | Failure]:
    answers: list[Answer | Failure] = []
    found = hypotheses_of(outputs[str(call.tensors.ids)], scores, len(rows))
    details = details_of(outputs, outputs[str(call.tensors.ids)])
    for number, (row, ranked, texts) in enumerate(zip(rows, found, texts_of(outputs[TEXT_OUTPUT], len(rows)))):
        if len(texts) != len(ranked):
            raise RequestFailed(INTERNAL, f"the model answered {len(texts)} texts for {len(ranked)} hypotheses")
        hypotheses = tuple(
            Hypothesis(ids, score, text, details[number][k])
            for k, ((ids, score), text) in enumerate(zip(ranked, texts))
        )
        answers.append(Answer(row.number, row.given, (), hypotheses, None, 0, latency))
    return answers


def _hypothesis(
    ids: tuple[int, ...], score: float | None, codec: Codec, details: tuple[float, ...] | None
) -> Hypothesis:
    return Hypothesis(ids, score, codec.decode(ids), None if details is None else details[: len(ids)])
