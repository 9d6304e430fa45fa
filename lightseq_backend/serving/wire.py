"""Between Triton's tensors and the engine: which tensor is what, requests in, answers out. NumPy only, no Triton."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightseq_backend.config import Config, GptConfig
from lightseq_backend.errors import RequestError
from lightseq_backend.request import GENERATE, NORMAL, PRIORITIES, SCORE, Decode, Hypothesis, Output
from lightseq_backend.serving.control import CONTROLS
from lightseq_backend.small import copied
from lightseq_backend.weights.directory import INPUTS
from lightseq_backend.weights.layout import GPT, TRANSFORMER

ALL, BEST, SOME = "all", "best", "some"

INTEGERS: dict[str, type[np.generic]] = {"TYPE_INT32": np.int32, "TYPE_INT64": np.int64}
FLOATS: dict[str, type[np.generic]] = {"TYPE_FP32": np.float32}
BOOLEANS: dict[str, type[np.generic]] = {"TYPE_BOOL": np.bool_}
STRINGS: dict[str, type[np.generic]] = {"TYPE_STRING": np.object_}

# Beside the ids, where a model has a tokenizer; the names that Triton's own clients for text use.
TEXT_INPUT, TEXT_OUTPUT = "text_input", "text_output"
# Of a translation that is scored.
TARGET_IDS, TARGET_TEXT = "target_ids", "target_text"
# Of a model that streams: whether this is the answer, after all parts; and how long its first token took.
FINAL, FIRST_TOKEN = "final", "first_token_ms"
# An option and the output that its answer is in; of a model that scores, an output alone.
DETAILS = "token_log_probabilities"
PRIORITY = "queue_priority"  # a parameter of a request that is no option: how it waits, not what it gets

# Parameters of a request that are Triton's own affair: they never reach the options.
TRITON_PARAMETERS = frozenset(
    ["sequence_id", "sequence_start", "sequence_end", "priority", "timeout", "headers", "binary_data_output"]
)


def priority_of(parameters: str) -> str:
    """What a request's parameters, a JSON object as Triton gives it, say of its place in the queue."""
    priority = json.loads(parameters).get(PRIORITY, NORMAL) if PRIORITY in parameters else NORMAL
    if priority not in PRIORITIES:
        raise RequestError(f"{PRIORITY} is {priority!r}; priorities are {', '.join(PRIORITIES)}")
    return priority


@dataclass(frozen=True)
class Form:
    """A set of outputs, LightSeq's but for those of a log-probability.

    ids, scores  names of the outputs; a loss or a log-probability counts as a score
    kind         of the model that has them
    hypotheses   ALL: always [rows, hypotheses, length]; BEST: always [rows, length]; SOME: [rows, length]
                 unless a request asks for more than one hypothesis
    each         name of the output with each token's part of the score
    """

    ids: str | None
    scores: str | None
    kind: str
    hypotheses: str = ALL
    each: str | None = None

    @property
    def names(self) -> set[str]:
        return {name for name in (self.ids, self.scores, self.each) if name is not None}

    @property
    def takes_targets(self) -> bool:
        return self.task == SCORE and self.kind == TRANSFORMER

    @property
    def task(self) -> str:
        return SCORE if self.ids is None else GENERATE


FORMS = (
    Form("target_ids", "target_scores", TRANSFORMER),
    Form("trg_ids:0", "score", TRANSFORMER),
    Form("trg_ids:0", None, TRANSFORMER, BEST),
    Form("result", None, GPT, SOME),
    Form("outputs_ids", None, GPT, SOME),
    Form("gpt_out", "gpt_scores", GPT),
    Form(None, "loss", GPT),
    Form(None, "log_probability", GPT, each=DETAILS),
    Form(None, "log_probability", TRANSFORMER, each=DETAILS),
)
IDS = {form.ids for form in FORMS}
OUTPUTS = sorted(set().union(*(form.names for form in FORMS)))


@dataclass(frozen=True)
class Wire:
    """How one model's requests are read and its answers written.

    input        name of the input tensor of ids
    form         which outputs it has
    ids_type     integer type of the ids that go out
    batched      tensors have a first dimension of rows; without it a request is one row
    text_input   a request may give text in place of ids
    text_output  an answer may hold text beside the ids
    target_text  a request may give the text of a target in place of its ids
    details      an answer may hold the log-probability of every token
    streams      parts of the answer go out before it
    tells_first_token  an answer says how long its first token took
    """

    input: str
    form: Form
    ids_type: np.dtype[Any]
    batched: bool
    text_input: bool = False
    text_output: bool = False
    target_text: bool = False
    details: bool = False
    streams: bool = False
    tells_first_token: bool = False

    def rows(self, ids: np.ndarray, name: str) -> list[np.ndarray]:
        """Copies of the rows of an input of ids: [rows, length], or [length] when not batched."""
        if len(ids) == 0 and self.batched:
            raise RequestError(f"{name} has shape {list(ids.shape)}: no rows; it needs at least one")
        if len(ids) == 1 or not self.batched:
            return [copied(ids.reshape(-1))]
        return list(copied(ids))

    def texts(self, given: np.ndarray, name: str) -> list[str]:
        """The rows of an input of text: objects (UTF-8 bytes) [rows, 1], or [1] when not batched."""
        if given.size == 0 or given.size != (len(given) if self.batched else 1):
            rows = "one string a row" if self.batched else "one string"
            raise RequestError(f"{name} has shape {list(given.shape)}; it needs {rows}")
        return [_utf8(entry, row, given.size) for row, entry in enumerate(given.ravel().tolist())]

    def wants_text(self, from_text: bool, requested: Iterable[str]) -> bool:
        """Whether an answer has text in it: for a request of text unless it wants other outputs alone, for a request
        of ids if it names the outputs that it wants. One that wants all there are cannot be told from one that says
        nothing, and gets what it would get without a tokenizer."""
        names = set(requested)
        return self.text_output and TEXT_OUTPUT in names and (from_text or not self.form.names <= names)

    def changes(self, parameters: str) -> dict[str, object]:
        """The options in a request's parameters, a JSON object as Triton gives it; what is Triton's own is left out."""
        values = json.loads(parameters) if parameters else {}
        changes = {
            name: value
            for name, value in values.items()
            if name not in TRITON_PARAMETERS and name not in (*CONTROLS, PRIORITY) and not name.startswith("triton_")
        }
        if self.form.task == SCORE:
            if changes:
                raise RequestError(f"unknown option {', '.join(sorted(changes))}; scoring has no options")
            return changes
        if changes.get(DETAILS) and not self.details:
            raise RequestError(f"{DETAILS} needs an output of that name in the model's config.pbtxt, which has none")
        if self.form.hypotheses == BEST and changes.get("num_hypotheses", 1) != 1:
            raise RequestError(
                f"num_hypotheses is {changes['num_hypotheses']!r}; this model's output {self.form.ids} holds 1"
            )
        return changes if self.form.hypotheses == ALL else {"num_hypotheses": 1, **changes}

    def answer(
        self, rows: Sequence[np.ndarray], outputs: Sequence[Output], config: Config, decode: Decode | None = None
    ) -> dict[str, np.ndarray]:
        """The output tensors for a request's rows, in LightSeq's shapes.

        ids [rows, hypotheses, length] or [rows, length]; scores float32 [rows, hypotheses]; loss or log-probability
        float32 [rows, 1], its parts [rows, tokens]. Rows are filled up with the end id to the longest, parts with 0.
        With decode also text, objects (str) [rows, hypotheses]. Where the request asked for them, also
        log-probabilities of the tokens, float32 in the shape of the ids.
        """
        form = self.form
        if form.task == SCORE:
            return self._unbatched(_scores(outputs, form))
        texts = [_texts(row, output, config, form) for row, output in zip(rows, outputs, strict=True)]
        lengths, depth = {len(text) for row in texts for text in row}, len(texts[0])
        width = max(lengths)
        if len(lengths) > 1:
            texts = [[text + [config.end_id] * (width - len(text)) for text in row] for row in texts]
        ids = np.array(texts, self.ids_type).reshape(len(rows), depth, width)
        tensors = {str(form.ids): ids}
        if self.details and any(one.token_log_probabilities is not None for one in outputs[0].hypotheses):
            tensors[DETAILS] = _details(rows, outputs, ids.shape, config)
        if form.hypotheses == BEST or (form.hypotheses == SOME and depth == 1):
            tensors = {name: tensor[:, 0] for name, tensor in tensors.items()}
        if form.scores is not None:
            scores = [[hypothesis.score for hypothesis in output.hypotheses] for output in outputs]
            tensors[form.scores] = np.array(scores, np.float32)
        if decode is not None:
            written = [
                [text_of(row, hypothesis, config, decode) for hypothesis in output.hypotheses]
                for row, output in zip(rows, outputs, strict=True)
            ]
            tensors[TEXT_OUTPUT] = np.array(written, np.object_)
        return self._unbatched(tensors)

    def _unbatched(self, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return tensors if self.batched else {name: tensor[0] for name, tensor in tensors.items()}


def read_wire(model_config: Mapping[str, Any], faults: list[str]) -> Wire | None:
    """The tensors that a config.pbtxt (as Triton's JSON) declares; `faults` grows by a line a fault, then None."""
    before = len(faults)
    inputs, reads_text = _without(TEXT_INPUT, model_config.get("input", []), "input", STRINGS, faults)
    inputs, reads_target_text = _without(TARGET_TEXT, inputs, "input", STRINGS, faults)
    targets = [tensor for tensor in inputs if tensor["name"] == TARGET_IDS]
    inputs = [tensor for tensor in inputs if tensor["name"] != TARGET_IDS]
    outputs, writes_text = _without(TEXT_OUTPUT, model_config.get("output", []), "output", STRINGS, faults)
    writes_details = False
    if any(tensor["name"] in IDS for tensor in outputs):  # beside ids; a model that scores has it of its own
        outputs, writes_details = _without(DETAILS, outputs, "output", FLOATS, faults)
    outputs, streams, tells = _stream(model_config, outputs, faults)
    known = _known(inputs, INPUTS, "input", faults) & _known(outputs, OUTPUTS, "output", faults)
    names = {tensor["name"] for tensor in outputs}
    forms = [form for form in FORMS if form.names == names]
    kinds = {INPUTS.get(tensor["name"]) for tensor in inputs}
    form = next((form for form in forms if form.kind in kinds), forms[0] if forms else None)
    if known:
        _check_combination(inputs, names, form, faults)
        _check_targets(bool(targets), reads_target_text, form, faults)
    for tensor in [*inputs, *targets]:
        _check_type(tensor, INTEGERS, "input", faults)
        if len(tensor["dims"]) != 1:
            faults.append(f"input {tensor['name']} has dims {tensor['dims']}; it must have one, [ -1 ]")
    for tensor in outputs:
        if tensor["name"] in OUTPUTS:
            _check_type(tensor, INTEGERS if tensor["name"] in IDS else FLOATS, "output", faults)
    for reads, text, ids in ((reads_text, TEXT_INPUT, inputs), (reads_target_text, TARGET_TEXT, targets)):
        if reads:
            _check_optional(model_config["input"], text, {tensor["name"] for tensor in ids}, faults)
    if writes_text and form is not None and form.task == SCORE:
        faults.append(f"output {TEXT_OUTPUT} has no place in a model that scores; it needs an output of ids")
    if streams and form is not None and form.task == SCORE:
        faults.append("model_transaction_policy is decoupled; a model that scores gives one answer to a request")
    if len(faults) > before:
        return None
    assert form is not None
    types = {tensor["name"]: tensor["data_type"] for tensor in outputs}
    ids_type = np.dtype(INTEGERS[types[form.ids]] if form.ids else np.int32)
    batched = model_config.get("max_batch_size", 0) > 0
    texts = reads_text, writes_text, reads_target_text
    return Wire(inputs[0]["name"], form, ids_type, batched, *texts, writes_details, streams, tells)


def _stream(
    model_config: Mapping[str, Any], outputs: Sequence[Mapping[str, Any]], faults: list[str]
) -> tuple[list[Mapping[str, Any]], bool, bool]:
    """The outputs but a stream's own, whether the model streams, and whether it tells about the first token."""
    streams = bool(model_config.get("model_transaction_policy", {}).get("decoupled"))
    rest, marks = _without(FINAL, outputs, "output", BOOLEANS, faults)
    rest, tells = _without(FIRST_TOKEN, rest, "output", FLOATS, faults)
    if streams and not marks:
        faults.append(f"output {FINAL} (TYPE_BOOL) is missing; it tells a stream's parts from its answer")
    if not streams and (marks or tells):
        faults.append(f"output {FINAL if marks else FIRST_TOKEN} needs a model_transaction_policy that is decoupled")
    return rest, streams, tells


def _without(
    name: str, tensors: Sequence[Mapping[str, Any]], what: str, types: Mapping[str, Any], faults: list[str]
) -> tuple[list[Mapping[str, Any]], bool]:
    """The tensors but the optional one of that name, and whether there is one."""
    for tensor in tensors:
        if tensor["name"] == name:
            _check_type(tensor, types, what, faults)
            if types is STRINGS and len(tensor["dims"]) != 1:
                faults.append(f"{what} {name} has dims {tensor['dims']}; it must have one, [ 1 ] or [ -1 ]")
    rest = [tensor for tensor in tensors if tensor["name"] != name]
    return rest, len(rest) < len(tensors)


def _known(tensors: Sequence[Mapping[str, Any]], names: Any, what: str, faults: list[str]) -> bool:
    unknown = [tensor["name"] for tensor in tensors if tensor["name"] not in names]
    faults += [f"{what} {name!r} is unknown; {what}s are {', '.join(names)}" for name in unknown]
    return not unknown


def _check_combination(
    inputs: Sequence[Mapping[str, Any]], outputs: set[str], form: Form | None, faults: list[str]
) -> None:
    names = [tensor["name"] for tensor in inputs]
    if len(names) != 1:
        faults.append(f"there are {len(names)} inputs ({', '.join(names) or 'none'}); there must be one")
    if form is None:
        sets = "; ".join(dict.fromkeys(" + ".join(sorted(form.names)) for form in FORMS))
        faults.append(f"outputs are {' + '.join(sorted(outputs)) or 'none'}; they must be one of: {sets}")
    elif len(names) == 1 and INPUTS[names[0]] != form.kind:
        shown = ", ".join(sorted(outputs))
        faults.append(f"input {names[0]} is of a {INPUTS[names[0]]} model, but output {shown} of a {form.kind} model")


def _check_targets(ids: bool, text: bool, form: Form | None, faults: list[str]) -> None:
    wanted = form is not None and form.takes_targets
    if wanted and not ids:
        faults.append(f"input {TARGET_IDS} is missing; a translation is scored with it")
    if not wanted and (ids or text):
        sets = " + ".join(sorted(set().union(*(form.names for form in FORMS if form.takes_targets))))
        faults.append(f"input {TARGET_IDS if ids else TARGET_TEXT} is for translators with outputs {sets}")


def _check_optional(declared: Sequence[Mapping[str, Any]], text: str, ids: set[str], faults: list[str]) -> None:
    for tensor in declared:
        name = tensor["name"]
        if name in {text, *ids} and not tensor.get("optional"):
            other = "ids" if name == text else text
            faults.append(f"input {name} must be optional (optional: true): a request gives it or {other}")


def _check_type(tensor: Mapping[str, Any], types: Mapping[str, Any], what: str, faults: list[str]) -> None:
    if tensor["data_type"] not in types:
        faults.append(f"{what} {tensor['name']} is {tensor['data_type']}; it must be {' or '.join(types)}")


def _scores(outputs: Sequence[Output], form: Form) -> dict[str, np.ndarray]:
    if form.each is None:
        return {str(form.scores): np.array([[output.loss] for output in outputs], np.float32)}
    parts = [np.asarray(output.target_log_probabilities, np.float32) for output in outputs]
    each = np.zeros((len(parts), max(map(len, parts))), np.float32)
    for row, part in zip(each, parts):
        row[: len(part)] = part
    return {str(form.scores): each.sum(axis=1, keepdims=True, dtype=np.float64).astype(np.float32), form.each: each}


def _texts(row: np.ndarray, output: Output, config: Config, form: Form) -> list[list[int]]:
    """Ids of each hypothesis as LightSeq's server of that form and dialect would write them (lightseq_format.md 3.5).

    A search that was cut gets one more column, of the end id; V0's generate server has no room for it and
    overwrites the last token. A GPT's text starts with its prompt and has no such column.
    """
    texts: list[list[int]] = [hypothesis.tokens.tolist() for hypothesis in output.hypotheses]
    if isinstance(config, GptConfig):
        prompt = prompt_of(row, config).tolist()
        return [prompt + text for text in texts]
    overwrites = output.cut and config.dialect.name == "v0" and form.scores is not None
    length = output.steps + (output.cut and not overwrites)
    for text in texts:
        text += [config.end_id] * (length - len(text))
        if overwrites:
            text[-1:] = [config.end_id] if text else []
    return texts


def prompt_of(row: np.ndarray, config: Config) -> np.ndarray:
    """What the text of an answer begins with: a GPT's row without padding around it, nothing of a source."""
    columns = np.flatnonzero(row != config.padding_id) if isinstance(config, GptConfig) else np.zeros(0, np.intp)
    return row[columns[0] : columns[-1] + 1] if columns.size else row[:0]


def _details(
    rows: Sequence[np.ndarray], outputs: Sequence[Output], shape: tuple[int, ...], config: Config
) -> np.ndarray:
    """Where the ids have a generated token, its log-probability; 0 elsewhere: a prompt, and behind the end."""
    details = np.zeros(shape, np.float32)
    for r, (row, output) in enumerate(zip(rows, outputs, strict=True)):
        start = len(prompt_of(row, config))
        for k, hypothesis in enumerate(output.hypotheses):
            found = hypothesis.token_log_probabilities
            if found is not None:
                details[r, k, start : start + len(found)] = found
    return details


def text_of(row: np.ndarray, hypothesis: Hypothesis, config: Config, decode: Decode) -> str:
    """What a hypothesis reads as, a GPT's with its prompt."""
    return decode(ids_of_text(row, hypothesis, config)) if hypothesis.text is None else hypothesis.text


def ids_of_text(row: np.ndarray, hypothesis: Hypothesis, config: Config) -> list[int]:
    """What of a hypothesis is text: a GPT's prompt and what was generated, up to the end token."""
    tokens: list[int] = hypothesis.tokens.tolist()
    tokens = tokens[: len(tokens) - hypothesis.silent]
    if hypothesis.finished:
        tokens = tokens[: tokens.index(config.end_id)] if config.end_id in tokens else tokens
    return [*prompt_of_text(row, config), *tokens]


def prompt_of_text(row: np.ndarray, config: Config) -> list[int]:
    """The ids that the text of an answer begins with."""
    return [id_ for id_ in row.tolist() if id_ != config.padding_id] if isinstance(config, GptConfig) else []


def _utf8(entry: object, row: int, rows: int) -> str:
    if isinstance(entry, str):
        return entry
    where = f"row {row}: " if rows > 1 else ""
    try:
        return bytes(entry).decode()  # type: ignore[call-overload, no-any-return]
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{where}the text is not UTF-8: byte {error.start} is {error.object[error.start]:#x}"
        ) from None
