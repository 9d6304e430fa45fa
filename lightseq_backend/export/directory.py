"""A model directory as Triton wants it: config.pbtxt, one for machines without a GPU, model.py, weights, tokenizer."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lightseq_backend import text
from lightseq_backend.config import GptConfig
from lightseq_backend.errors import ConfigError
from lightseq_backend.export.model import Model
from lightseq_backend.weights import safetensors, save

MODEL = "from lightseq_backend.serving.model import TritonPythonModel as TritonPythonModel\n"
CONFIG = """\
# {about}
name: "{name}"
backend: "python"
max_batch_size: 16
input [
  {inputs}
]
output [
  {outputs}
]
# Requests that arrive together reach the model in one call; the engine batches by itself.
dynamic_batching {{ default_queue_policy {{ max_queue_size: 1024 }} }}
# {where}
instance_group [ {{ kind: {kind} }} ]
{parameters}"""
PARAMETER = 'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}\n'
KINDS = {
    "KIND_GPU": "On a machine without a GPU configs/cpu.pbtxt takes this file's place (--model-config-name=cpu).",
    "KIND_CPU": "As config.pbtxt, but for a machine without a GPU.",
}
ABOUT = {
    "transformer": "Sequence to sequence: a source in, every hypothesis out, with scores.",
    "gpt": "Text generation: a prompt in, prompt and continuation out.",
}
TEXT_INPUT = '{ name: "text_input", data_type: TYPE_STRING, dims: [ 1 ], optional: true }'
TEXT_OUTPUT = '{ name: "text_output", data_type: TYPE_STRING, dims: [ -1 ] }'
INPUTS = {"transformer": "source_ids", "gpt": "token_ids"}
OUTPUTS = {
    "transformer": (
        '{ name: "target_ids", data_type: TYPE_INT32, dims: [ -1, -1 ] }',
        '{ name: "target_scores", data_type: TYPE_FP32, dims: [ -1 ] }',
        '{ name: "token_log_probabilities", data_type: TYPE_FP32, dims: [ -1, -1 ] }',
    ),
    "gpt": (
        '{ name: "result", data_type: TYPE_INT32, dims: [ -1 ] }',
        '{ name: "token_log_probabilities", data_type: TYPE_FP32, dims: [ -1 ] }',
    ),
}


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A directory to write into, which becomes `target` if all goes well and else is gone.

    ConfigError when there is something at `target` already. Its parents are made.
    """
    if target.is_dir() and any(target.iterdir()):
        raise ConfigError(f"{target} is not empty")
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target} is a file")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that one rename is all that makes a model of it.
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise ConfigError(f"{target} cannot be made: {error.strerror}") from None
    try:
        yield partial
        partial.chmod(0o755)
        os.replace(partial, target)
    except OSError as error:  # a full disk, most likely
        where = f" ({error.filename})" if error.filename else ""
        raise ConfigError(f"{target} cannot be made: {error.strerror or error}{where}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write(
    directory: Path, name: str, model: Model, source: Path | None = None, suffix: str = safetensors.SUFFIX
) -> Path:
    """Writes everything that a model directory needs; returns the weight file. suffix: its format.

    source: where the files of a tokenizer may lie. They are copied, and the model then takes and gives text as well.
    ConfigError when they cannot be used, or are another model's; WeightError where the format cannot hold the model.
    """
    if not re.fullmatch(r"[A-Za-z0-9_.+-]+", name):
        raise ConfigError(f"the name is {name!r}; it may have letters, digits and _ . + -")
    kind = "gpt" if isinstance(model.config, GptConfig) else "transformer"
    parameters = {}
    if suffix != safetensors.SUFFIX and model.config.dialect.name != "head":
        parameters["dialect"] = model.config.dialect.name  # those files leave that open
    tokenizer = text.files_of(source) if source else []
    missing = text.missing_files(source) if source else []
    if missing:
        raise ConfigError(f"{source} has a part of a tokenizer and lacks {', '.join(missing)}; --ids-only does without")
    if tokenizer and model.source_language:
        parameters["source_language"] = model.source_language
    for path in tokenizer:
        shutil.copyfile(path, directory / path.name)
    text.load([directory], model.config, model.source_language)
    for place, instance in (("config.pbtxt", "KIND_GPU"), ("configs/cpu.pbtxt", "KIND_CPU")):
        (directory / place).parent.mkdir(exist_ok=True)
        (directory / place).write_text(_config(name, kind, instance, bool(tokenizer), parameters))
    (directory / "1").mkdir()
    (directory / "1" / "model.py").write_text(MODEL)
    weights = directory / f"{kind}{suffix}"
    save(weights, model.config, model.arrays)
    return weights


def _config(name: str, kind: str, instance: str, takes_text: bool, parameters: Mapping[str, str]) -> str:
    optional = ", optional: true" if takes_text else ""
    ids = f'{{ name: "{INPUTS[kind]}", data_type: TYPE_INT32, dims: [ -1 ], allow_ragged_batch: true{optional} }}'
    inputs = (ids, TEXT_INPUT) if takes_text else (ids,)
    outputs = (*OUTPUTS[kind], TEXT_OUTPUT) if takes_text else OUTPUTS[kind]
    return CONFIG.format(
        about=ABOUT[kind], name=name, inputs=",\n  ".join(inputs), outputs=",\n  ".join(outputs),
        where=KINDS[instance], kind=instance,
        parameters="".join(PARAMETER.format(key=key, value=value) for key, value in parameters.items()),
    )  # fmt: skip
