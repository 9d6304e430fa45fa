"""Which tensor of a model is what, read from the model's metadata."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightseq_client.errors import ModelError

TRANSLATE = "translate"
GENERATE = "generate"
SCORE = "score"
INTEGER_TYPES: dict[str, type[np.signedinteger[Any]]] = {"INT32": np.int32, "INT64": np.int64}
FLOAT_TYPES = ("FP16", "FP32", "FP64")
TEXT_INPUT, TEXT_OUTPUT = "text_input", "text_output"  # Triton's own clients for text call them so
TARGET_IDS, TARGET_TEXT = "target_ids", "target_text"  # inputs of a model that scores given translations
FINAL, FIRST_TOKEN = "final", "first_token_ms"  # outputs of a model that streams
DETAILS = "token_log_probabilities"  # an option, and the output that its answer is in
LOG_PROBABILITY = "log_probability"


@dataclass(frozen=True)
class Signature:
    """The tensors of one model: `ids` and `scores` are output names, None where there is no such output.

    reads_text, writes_text  there is an input text_input, an output text_output
    streams  it answers in parts, and not in one piece
    target   name and data type of the input of ids to score, where it scores given translations
    reads_target_text  there is an input target_text
    details  a score comes with the part that each token has in it
    """

    input: str
    datatype: str
    ids: str | None
    scores: str | None
    reads_text: bool = False
    writes_text: bool = False
    streams: bool = False
    target: tuple[str, str] | None = None
    reads_target_text: bool = False
    details: bool = False

    def takes_text(self, task: str) -> bool:
        reads = self.reads_text and (self.reads_target_text or self.target is None)
        return reads and (self.writes_text or task == SCORE)

    def given(self, sides: Sequence[np.ndarray]) -> list[tuple[str, str, np.ndarray]]:
        """Name and data type of the input that takes each side, sources and then targets: of ids, or of text where
        they are objects."""
        texts, ids = ((TEXT_INPUT, "BYTES"), (TARGET_TEXT, "BYTES")), ((self.input, self.datatype), self.target)
        inputs = texts if sides[0].dtype == np.object_ else ids
        return [(*tensor, side) for tensor, side in zip(inputs, sides) if tensor is not None]

    def outputs(self, sides: Sequence[np.ndarray], parameters: Mapping[str, Any]) -> list[str]:
        """Names of the outputs that an answer to these rows, asked for with these parameters, has."""
        text = TEXT_OUTPUT if sides[0].dtype == np.object_ and self.ids else None
        wants_details = parameters.get(DETAILS) in (True, "true") if self.ids else self.details
        details = DETAILS if wants_details else None
        return [name for name in (self.ids, self.scores, text, details) if name is not None]


def signature(task: str, model: str, metadata: Mapping[str, Any]) -> Signature:
    """Read from the model's metadata which tensor is what, by data type: names are the model's own affair.

    Ids go in and come out as integers, scores and losses as floating point. ModelError when the model
    does not have what the task needs.
    """
    inputs = [tensor for tensor in metadata["inputs"] if tensor["datatype"] in INTEGER_TYPES]
    targets = [tensor for tensor in inputs if task == SCORE and tensor["name"] == TARGET_IDS]
    inputs = [tensor for tensor in inputs if tensor not in targets]
    ids = [tensor["name"] for tensor in metadata["outputs"] if tensor["datatype"] in INTEGER_TYPES]
    scores = [
        tensor["name"]
        for tensor in metadata["outputs"]
        if tensor["datatype"] in FLOAT_TYPES and tensor["name"] not in (DETAILS, FIRST_TOKEN)
    ]
    wants_ids = task != SCORE
    if len(inputs) != 1 or len(ids) != wants_ids or (len(scores) > 1 if wants_ids else len(scores) != 1):
        needs = "and one integer output and at most one of floats"
        if not wants_ids:
            needs = f"(for translations {TARGET_IDS} too) and one output, of floats"
        raise ModelError(
            f"model {model} cannot {task}: that needs one integer input {needs}; "
            f"it has inputs {_tensors(metadata['inputs'])} and outputs {_tensors(metadata['outputs'])}"
        )
    texts = {
        tensor["name"] for part in ("inputs", "outputs") for tensor in metadata[part] if tensor["datatype"] == "BYTES"
    }
    outputs = {tensor["name"] for tensor in metadata["outputs"]}
    return Signature(
        inputs[0]["name"],
        inputs[0]["datatype"],
        next(iter(ids), None),
        next(iter(scores), None),
        TEXT_INPUT in texts,
        TEXT_OUTPUT in texts,
        FINAL in outputs,
        next(((tensor["name"], tensor["datatype"]) for tensor in targets), None),
        TARGET_TEXT in texts,
        DETAILS in outputs,
    )


def _tensors(tensors: Iterable[Mapping[str, Any]]) -> str:
    return ", ".join(f"{tensor['name']} {tensor['datatype']}" for tensor in tensors) or "none"
