"""From rows to the arrays of a request, and from the arrays of an answer back to rows: no network here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightseq_client.errors import INTERNAL, ClientError, ModelError, RequestFailed, RowError
from lightseq_client.vocabulary import Codec, ServerText

TRANSLATE = "translate"
GENERATE = "generate"
SCORE = "score"
INTEGER_TYPES: dict[str, type[np.signedinteger[Any]]] = {"INT32": np.int32, "INT64": np.int64}
RowLike = Sequence[int] | str
FLOAT_TYPES = ("FP16", "FP32", "FP64")
TEXT_INPUT, TEXT_OUTPUT = "text_input", "text_output"  # Triton's own clients for text call them so
FINAL, FIRST_TOKEN = "final", "first_token_ms"  # outputs of a model that streams
DETAILS = "token_log_probabilities"  # an option, and the output that its answer is in
LOG_PROBABILITY = "log_probability"


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
    """One row on its way: its place among the caller's rows (from 1), as it was given, and its ids."""

    number: int
    given: object
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Answer:
    """What came back for one row.

    number         the row's place among the caller's rows, from 1
    given, ids     the row as it was given and as it was sent, without padding; no ids where it was sent as text
    hypotheses     best first; empty for a score
    loss           mean negative log-likelihood, natural log (scores only)
    prompt_length  how many ids of every hypothesis are the prompt's; 0 for a translation, and where it was sent as text
    latency        seconds from the first attempt to the answer, waits between attempts included
    """

    number: int
    given: object
    ids: tuple[int, ...]
    hypotheses: tuple[Hypothesis, ...]
    loss: float | None
    prompt_length: int
    latency: float

    @property
    def tokens(self) -> int:
        """Tokens of the best hypothesis that the model chose, or tokens that it scored."""
        if not self.hypotheses:
            return max(0, len(self.ids) - 1)
        return len(self.hypotheses[0].ids) - self.prompt_length


@dataclass(frozen=True)
class Failure:
    """Why the row of that number has no answer."""

    number: int
    given: object
    error: ClientError


@dataclass(frozen=True)
class Signature:
    """The tensors of one model: `ids` and `scores` are output names, None where there is no such output.

    reads_text, writes_text  there is an input text_input, an output text_output
    streams  it answers in parts, and not in one piece
    """

    input: str
    datatype: str
    ids: str | None
    scores: str | None
    reads_text: bool = False
    writes_text: bool = False
    streams: bool = False

    def takes_text(self, task: str) -> bool:
        return self.reads_text and (self.writes_text or task == SCORE)

    def given(self, rows: np.ndarray) -> tuple[str, str]:
        """Name and data type of the input that takes these rows: of ids, or of text where they are objects."""
        return (TEXT_INPUT, "BYTES") if rows.dtype == np.object_ else (self.input, self.datatype)

    def outputs(self, rows: np.ndarray, parameters: Mapping[str, Any]) -> list[str]:
        """Names of the outputs that an answer to these rows, asked for with these parameters, has."""
        text = TEXT_OUTPUT if rows.dtype == np.object_ and self.ids else None
        details = DETAILS if self.ids and parameters.get(DETAILS) in (True, "true") else None
        return [name for name in (self.ids, self.scores, text, details) if name is not None]


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


def signature(task: str, model: str, metadata: Mapping[str, Any]) -> Signature:
    """Read from the model's metadata which tensor is what, by data type: names are the model's own affair.

    Ids go in and come out as integers, scores and losses as floating point. ModelError when the model
    does not have what the task needs.
    """
    inputs = [tensor for tensor in metadata["inputs"] if tensor["datatype"] in INTEGER_TYPES]
    ids = [tensor["name"] for tensor in metadata["outputs"] if tensor["datatype"] in INTEGER_TYPES]
    scores = [
        tensor["name"]
        for tensor in metadata["outputs"]
        if tensor["datatype"] in FLOAT_TYPES and tensor["name"] not in (DETAILS, FIRST_TOKEN)
    ]
    wants_ids = task != SCORE
    if len(inputs) != 1 or len(ids) != wants_ids or (len(scores) > 1 if wants_ids else len(scores) != 1):
        needs = "one integer output and at most one of floats" if wants_ids else "one output, of floats"
        raise ModelError(
            f"model {model} cannot {task}: that needs one integer input and {needs}; "
            f"it has inputs {_tensors(metadata['inputs'])} and outputs {_tensors(metadata['outputs'])}"
        )
    if scores == [LOG_PROBABILITY]:
        raise ModelError(f"model {model} cannot {task}: it gives {LOG_PROBABILITY}, which is not a loss")
    texts = {
        tensor["name"] for part in ("inputs", "outputs") for tensor in metadata[part] if tensor["datatype"] == "BYTES"
    }
    return Signature(
        inputs[0]["name"],
        inputs[0]["datatype"],
        next(iter(ids), None),
        next(iter(scores), None),
        TEXT_INPUT in texts,
        TEXT_OUTPUT in texts,
        FINAL in {tensor["name"] for tensor in metadata["outputs"]},
    )


def encoded(call: Call, chunk: list[tuple[int, RowLike]]) -> tuple[list[Row], list[Failure]]:
    """The rows that can be sent, and why the others cannot."""
    rows, failures = [], []
    for number, given in chunk:
        try:
            if call.sends_text:
                rows.append(Row(number, _text(given), ()))
                continue
            values = call.codec.encode(given) if isinstance(given, str) else given
            rows.append(Row(number, given, checked_ids(values, call.tensors.datatype)))
        except RowError as error:
            failures.append(Failure(number, given, error))
    return rows, failures


def answers_of(call: Call, rows: list[Row], outputs: dict[str, Any], latency: float) -> list[Answer | Failure]:
    """Read the outputs (name: array) of one request back into its rows."""
    tensors, codec = call.tensors, call.codec
    if tensors.ids is None:
        losses = losses_of(outputs[str(tensors.scores)], len(rows))
        return [Answer(row.number, row.given, row.ids, (), loss, 0, latency) for row, loss in zip(rows, losses)]
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


def checked_ids(values: Iterable[object], datatype: str) -> tuple[int, ...]:
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
        raise RowError("the row is empty")
    return tuple(ids)


def grouped(rows: Sequence[Row], may_pad: bool) -> list[list[Row]]:
    """Rows that may share a request: all of them when padding is allowed, else those of equal length."""
    if may_pad:
        return [list(rows)] if rows else []
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(len(row.ids), []).append(row)
    return list(groups.values())


def text_matrix(rows: Sequence[Row]) -> np.ndarray:
    """The rows as one array of text [rows, 1]."""
    return np.array([[str(row.given).encode(errors="replace")] for row in rows], np.object_)


def matrix(rows: Sequence[Row], datatype: str, padding_id: int | None) -> np.ndarray:
    """The rows as one array [rows, longest], filled up on the right with padding_id."""
    width = max(len(row.ids) for row in rows)
    array = np.full((len(rows), width), 0 if padding_id is None else padding_id, INTEGER_TYPES[datatype])
    for place, row in zip(array, rows):
        place[: len(row.ids)] = row.ids
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


def losses_of(losses: np.ndarray, rows: int) -> list[float]:
    """losses [rows, 1] or [rows]: one a row."""
    if losses.size != rows:
        raise RequestFailed(INTERNAL, f"the model answered losses of shape {list(losses.shape)} for {rows} rows")
    return [float(loss) for loss in losses.ravel()]


def ended(ids: tuple[int, ...], start: int, end_id: int | None) -> tuple[int, ...]:
    """The ids up to and with the first end id at or behind `start`."""
    if end_id is None or end_id not in ids[start:]:
        return ids
    return ids[: ids.index(end_id, start) + 1]


def _tensors(tensors: Iterable[Mapping[str, Any]]) -> str:
    return ", ".join(f"{tensor['name']} {tensor['datatype']}" for tensor in tensors) or "none"


def _text(given: object) -> str:
    if not isinstance(given, str):
        raise RowError(f"{given!r} is not text")
    return given


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
