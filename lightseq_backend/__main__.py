"""The command line: `python -m lightseq_backend COMMAND`, or `lightseq COMMAND` where the package is installed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lightseq_backend import bulk, conversion
from lightseq_backend.config import DIALECTS
from lightseq_backend.errors import ConfigError, RequestError, WeightError

Commands = argparse._SubParsersAction


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. 0 when it did its work, 2 with one message on stderr when what it was given is wrong."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options) or 0
    except (ConfigError, RequestError, WeightError) as error:
        print(f"lightseq: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightseq", description="Transformer and GPT-2 inference on LightSeq's weights"
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_inspect(commands)
    _add_run(commands)
    _add_convert(commands)
    _add_compare(commands)
    bulk.add_commands(commands)
    _add_serve(commands)
    return parser


def _add_weights(command: argparse.ArgumentParser) -> None:
    """The arguments that say which weight file a command is about, and how to read it."""
    command.add_argument("weights", metavar="WEIGHTS", help="a weight file, for example transformer.pb, or a directory")
    command.add_argument("--dialect", choices=DIALECTS, help="the LightSeq release whose reading holds (head)")
    command.add_argument("--kind", choices=("transformer", "gpt"), help="what the file is; found from it by default")


def _add_inspect(commands: Commands) -> None:
    command = commands.add_parser("inspect", help="print what a weight file holds")
    _add_weights(command)
    command.set_defaults(command=_inspect)


def _inspect(options: argparse.Namespace) -> None:
    from lightseq_backend.weights import directory
    from lightseq_backend.weights.describe import describe

    found = directory.find(options.weights)
    lines = describe(found.weights, options.dialect or found.dialect, options.kind or found.kind)
    print("\n".join(lines))


def _add_run(commands: Commands) -> None:
    command = commands.add_parser("run", help="run a test case ten times, without a server, and print its results")
    _add_weights(command)
    command.add_argument("test_case", metavar="TEST_CASE", help="LightSeq's text: batch size, length, ids")
    command.add_argument("--score", action="store_true", help="perplexity instead of generation (GPT)")
    command.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> None:
    from lightseq_backend import local

    rows = local.read_test_case(options.test_case)
    engine = local.build(options.weights, options.dialect, options.kind)
    print("\n".join(local.run(engine, rows, options.score)))


def _add_convert(commands: Commands) -> None:
    command = commands.add_parser("convert", help="make a model directory of another library's model, and check it")
    conversion.add_convert_arguments(command)
    command.set_defaults(command=conversion.convert)


def _add_compare(commands: Commands) -> None:
    command = commands.add_parser("compare", help="say how two models differ; exit code 0: not at all, 1: they do")
    conversion.add_compare_arguments(command)
    command.set_defaults(command=conversion.compare)


def _add_serve(commands: Commands) -> None:
    from lightseq_backend.serving import embedded

    command = commands.add_parser("serve", help="serve a model repository with the embedded Triton")
    embedded.add_arguments(command)
    command.set_defaults(command=embedded.serve)


if __name__ == "__main__":
    sys.exit(main())
