"""The commands `convert` and `compare`: another library's model as a model directory, two models side by side."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lightseq_backend.config import DIALECTS, TABLE
from lightseq_backend.errors import ConfigError

if TYPE_CHECKING:
    from lightseq_backend import proof
    from lightseq_backend.export.model import Model

FORMATS = {"safetensors": ".safetensors", "protobuf": ".pb", "hdf5": ".hdf5"}


def add_convert_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "source",
        metavar="SOURCE",
        type=Path,
        help="a Hugging Face directory, a fairseq checkpoint (.pt) or its directory, arrays (.npz), or a weight file",
    )
    command.add_argument("target", metavar="TARGET", type=Path, help="for example model_repository/NAME; new or empty")
    command.add_argument("--name", help="the model's name; TARGET's last part by default")
    command.add_argument("--format", choices=FORMATS, default="safetensors", help="of the weights that are written")
    command.add_argument(
        "--forced-id",
        type=int,
        metavar="ID",
        help="the decoder's first token: a multilingual model's target language",
    )
    command.add_argument(
        "--source-language", metavar="LANGUAGE", help="the source's, where a tokenizer of several must be told"
    )
    command.add_argument("--ids-only", action="store_true", help="leave the tokenizer out: ids in, ids out")
    command.add_argument("--no-check", action="store_true", help="do not compare the result with its source")
    _add_reading(command)


def convert(options: argparse.Namespace) -> None:
    from lightseq_backend import text
    from lightseq_backend.export import directory, sources

    _check_reading(options)
    with directory.new_directory(options.target) as partial:
        model = sources.read(options.source, options.forced_id, options.dialect, options.kind)
        if options.source_language:
            model = replace(model, source_language=options.source_language)
        if options.format != "safetensors":  # LightSeq's formats have the tables and no word for what they are
            model = replace(model, config=replace(model.config, positions=TABLE, position_offset=0))
        tokenizer = None if options.ids_only else sources.directory_of(options.source)
        name = options.name or options.target.resolve().name
        weights = directory.write(partial, name, model, tokenizer, FORMATS[options.format])
        for note in model.notes:
            print(f"not converted: {note}")
        if tokenizer and not text.files_of(partial):
            print(f"{tokenizer} has no tokenizer of a known kind: the model takes and gives ids")
        if not options.no_check:
            if sources.is_huggingface(options.source):
                _check_original(options.source, weights, model)
            else:
                _check_arrays(options.source, weights, model)
                _check_computed(options.source, weights, model)
    print(f"{options.target} is ready to be served")


def add_compare_arguments(command: argparse.ArgumentParser) -> None:
    for name in ("first", "second"):
        command.add_argument(name, metavar=name.upper(), type=Path, help="a weight file, or whatever convert takes")
    command.add_argument(
        "--tolerance", type=float, default=0.0, help="largest absolute difference that counts as none (default 0)"
    )
    _add_reading(command)


def compare(options: argparse.Namespace) -> int:
    """0 where the two are the same within the tolerance, 1 where they are not."""
    from lightseq_backend.export import comparison, sources

    models = []
    for path in (options.first, options.second):
        reading = {"dialect": options.dialect, "kind": options.kind} if sources.is_lightseqs(path) else {}
        models.append(sources.read(path, **reading))
    result = comparison.compare(*models)
    print("\n".join(result.lines(options.tolerance)))
    return 0 if result.holds(options.tolerance) else 1


def _add_reading(command: argparse.ArgumentParser) -> None:
    command.add_argument("--dialect", choices=DIALECTS, help="the LightSeq release whose reading holds (head)")
    command.add_argument("--kind", choices=("transformer", "gpt"), help="what LightSeq's file is; found by default")


def _check_reading(options: argparse.Namespace) -> None:
    """ConfigError where --dialect or --kind would be of no use."""
    from lightseq_backend.export import sources

    if sources.is_lightseqs(options.source):
        return
    for name in ("dialect", "kind"):
        if getattr(options, name) is not None:
            raise ConfigError(f"--{name} is for LightSeq's files; {options.source} says itself what it is")


def _check_arrays(source: Path, weights: Path, model: Model) -> None:
    """Reads back what was written; ConfigError where that is not what was read from the source."""
    from lightseq_backend.export import comparison, sources

    written = comparison.compare(model, sources.read(weights, dialect=_dialect_of(weights, model)))
    if not written.holds():
        raise ConfigError("\n  ".join(["what was written is not what was read; nothing was kept", *written.lines()]))
    print(f"read back: all {len(written.arrays)} arrays and all settings are what {source} was read as")


def _check_original(source: Path, weights: Path, model: Model) -> None:
    """Prints how far a converted model is from its original; ConfigError where that is too far."""
    from lightseq_backend import proof
    from lightseq_backend.export.original import Original, missing_packages

    missing = missing_packages()
    if missing:
        print(f"not compared with the original: {' and '.join(missing)} would have to be installed")
        return
    _judge(proof.compare(weights, Original(source, model.config)), "the original")


def _check_computed(source: Path, weights: Path, model: Model) -> None:
    """The same, beside fairseq for a checkpoint that it can run, else beside a plain pass over the source's arrays."""
    from lightseq_backend import proof
    from lightseq_backend.export import sources

    original: proof.Original | None
    original, what = sources.by_fairseq(source, model.config)
    if original is None:
        reason = f" ({what})" if what else ""
        original, what = sources.plain(source, model.config), f"a plain pass over the arrays of {source}{reason}"
    if original is not None:
        _judge(proof.compare(weights, original, dialect=_dialect_of(weights, model) or "head"), what)


def _judge(comparison: proof.Comparison, what: str) -> None:
    print("\n".join(comparison.lines(what)))
    if not comparison.holds:
        raise ConfigError("the converted model differs from its original; nothing was kept")


def _dialect_of(weights: Path, model: Model) -> str | None:
    """What must be said for a written file to be read as it was meant."""
    from lightseq_backend.export import sources

    return model.config.dialect.name if sources.is_lightseqs(weights) else None
