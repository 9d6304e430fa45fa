"""The commands translate, generate and score: a line in, a line out, however many there are."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from itertools import chain, islice, zip_longest
from typing import Any, BinaryIO

from lightseq_backend.config import DIALECTS, OPTION_TYPES
from lightseq_backend.errors import RequestError
from lightseq_backend.lines import STDIN, Lines, begin, resume
from lightseq_backend.progress import Progress
from lightseq_backend.serving.device import DEVICES
from lightseq_backend.written import Written, open_model, written

_WINDOWS, _SHARES = 8, 4  # of a worker's chunks: how long at most, and how many at least
SOME_SKIPPED, INTERRUPTED, PIPE_CLOSED = 1, 130, 141  # the last two as a shell reports SIGINT and SIGPIPE
ABOUT = {
    "translate": "Translate lines.",
    "generate": "Continue lines; each is written with what follows it.",
    "score": "The log-probability of texts (GPT), or of translations: each line is a source, a tab and a target.",
}
EPILOG = """\
Line n of the output belongs to line n of the input. Line breaks inside a text are written as \\n and \\r;
--json has everything and exactly. A line that the model cannot take ends the run with its number and the
reason; what came before it is written. exit codes: 0 all good, 1 lines were skipped (--skip-bad),
2 something is wrong, 130 interrupted, 141 whoever read the output went away.
"""


def add_commands(commands: argparse._SubParsersAction) -> None:
    for name, about in ABOUT.items():
        command = commands.add_parser(
            name, help=about, description=about, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        _add_files(command, name)
        _add_model(command)
        if name != "score":
            _add_options(command)
        if name == "translate":
            command.add_argument("--target-language", metavar="CODE", help="for translators into many languages")
        command.set_defaults(command=_run, task=name)


def _add_files(command: argparse.ArgumentParser, task: str) -> None:
    command.add_argument("model", metavar="MODEL", help="a model's directory, or its weight file")
    command.add_argument("files", nargs="*", metavar="FILE", help="read as one; standard input by default, or as -")
    command.add_argument("--output", metavar="FILE", help="write there instead of to standard output")
    command.add_argument("--resume", action="store_true", help="go on behind the complete lines of --output's file")
    command.add_argument("--ids", action="store_true", help="lines are ids with blanks between them, not text")
    command.add_argument("--json", action="store_true", help="write an object a line: ids, texts, scores")
    command.add_argument("--skip-bad", action="store_true", help="write an empty line for what the model cannot take")
    command.add_argument("--quiet", action="store_true", help="no progress, no summary")
    command.add_argument(
        "--window", type=int, default=512, metavar="N",
        help="lines read ahead and sorted by length (%(default)s); 1: answer a line before the next is read",
    )  # fmt: skip
    command.add_argument(
        "--workers", type=int, default=1, metavar="N",
        help="processes that share the lines of files (%(default)s); more than one needs the extra `ray`",
    )  # fmt: skip
    if task == "score":
        command.add_argument("--targets", metavar="FILE", help="targets, a line a source, instead of tabs in the lines")
        command.add_argument("--tokens", action="store_true", help="behind a tab: each token's part of the score")


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", choices=DEVICES, default="auto", help="auto: the GPU where one can be used")
    command.add_argument("--precision", choices=("fp16", "fp32", "int8"), help="fp16 on a GPU, fp32 on a CPU")
    command.add_argument("--dialect", choices=DIALECTS, help="the LightSeq release whose reading holds (head)")
    command.add_argument("--tokenizer", metavar="DIR", help="where its files are; beside the weights by default")
    command.add_argument("--source-language", metavar="CODE", help="for tokenizers of many languages")
    command.add_argument("--slots", type=int, default=64, metavar="N", help="rows that decode at once (%(default)s)")


def _add_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("options of decoding (docs/protocol.md); the weight file's by default")
    for name, kind in OPTION_TYPES.items():
        group.add_argument(
            f"--{name.replace('_', '-')}", dest=f"option_{name}", metavar=kind.__name__.upper(),
            type=str if kind is str else _json_value,
        )  # fmt: skip


def _json_value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number, true or false, nor a list") from None


def _run(options: argparse.Namespace) -> int:
    try:
        return _answer_lines(options)
    except KeyboardInterrupt:
        _tell("lightseq: interrupted; what was answered is written")
        return INTERRUPTED
    except BrokenPipeError:
        with suppress(OSError, ValueError):  # let Python's own flush at exit find somewhere to write
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except OSError as error:  # a full disk, say
        raise RequestError(f"{error.filename or options.output or 'output'}: {error.strerror or error}") from None


def _answer_lines(options: argparse.Namespace) -> int:
    lines = Lines(options.files)
    targets = Lines([options.targets]) if getattr(options, "targets", None) else None
    changes = {name: value for name in OPTION_TYPES if (value := getattr(options, f"option_{name}", None)) is not None}
    if getattr(options, "target_language", None):
        changes["target_language"] = options.target_language
    _check(options, lines, targets, changes)
    if lines.paths == (STDIN,) and sys.stdin.isatty():
        options.window = 1
        _tell("a line at a time; Ctrl-D ends")
    with ExitStack() as opened:
        if options.workers > 1:
            return _share_out(options, lines, changes, opened)
        model = opened.enter_context(open_model(options))
        if targets and model.continues_texts:
            raise RequestError("--targets is for translators; this model scores texts")
        file, done = _gone_on_with(options, opened) if options.resume else (None, 0)
        answered = written(model, options, _rows(options, lines, targets, done), done, changes)
        if file is None:
            file = _output(options, opened)
        return _write(answered, file, options, lines, done)


def _share_out(options: argparse.Namespace, lines: Lines, changes: dict[str, Any], opened: ExitStack) -> int:
    from lightseq_backend.workers import written_by_workers

    total = lines.count()
    if total is None:
        raise RequestError("--workers shares out files, which are read again; standard input or a pipe is not")
    file, done = _gone_on_with(options, opened) if options.resume else (None, 0)
    if total < done:
        raise _too_short(options, done, total)
    # Long enough to fill a batch from, short enough that nobody works alone for long at the end.
    most = min(_WINDOWS * options.window, max(1, -(-(total - done) // (_SHARES * options.workers))))
    chunks = [*lines.chunks(most, done)]
    answered = written_by_workers(options, chunks, changes, options.workers) if chunks else iter(())
    first = [*islice(answered, 1)]
    if file is None:
        file = _output(options, opened)
    return _write(chain(first, answered), file, options, lines, done)


def _output(options: argparse.Namespace, opened: ExitStack) -> BinaryIO:
    """To be called once all was checked: until then an old file stays as it is."""
    return opened.enter_context(begin(options.output)) if options.output else sys.stdout.buffer


def _too_short(options: argparse.Namespace, done: int, lines: int) -> RequestError:
    return RequestError(f"{options.output} has {done} lines and the input only {lines}")


def _check(options: argparse.Namespace, lines: Lines, targets: Lines | None, changes: dict[str, Any]) -> None:
    if options.resume and not options.output:
        raise RequestError("--resume needs --output: what was written to a pipe cannot be read again")
    if options.workers < 1:
        raise RequestError(f"--workers is {options.workers}; it must be at least 1")
    if targets and options.workers > 1:
        raise RequestError("--targets and --workers do not go together; give lines of source, tab and target")
    if options.output and (lines.includes(options.output) or (targets and targets.includes(options.output))):
        raise RequestError(f"{options.output} is read and written")
    if changes.get("num_hypotheses", 1) != 1 and not options.json:
        raise RequestError(f"num_hypotheses is {changes['num_hypotheses']}; a line has room for one text: add --json")
    if changes.get("token_log_probabilities") and not options.json:
        raise RequestError("token_log_probabilities needs --json: a line has room for text alone")


def _gone_on_with(options: argparse.Namespace, opened: ExitStack) -> tuple[BinaryIO, int]:
    file, done, cut = resume(options.output)
    half = f", without the {cut} bytes of half a line" if cut else ""
    _tell(f"going on behind line {done} of {options.output}{half}")
    return opened.enter_context(file), done


def _rows(options: argparse.Namespace, lines: Lines, targets: Lines | None, done: int) -> Iterator[Any]:
    """What is still to be answered, `done` lines being written."""
    rows: Iterator[Any] = iter(lines) if targets is None else _paired(lines, targets)
    passed = sum(1 for _ in islice(rows, done))
    if passed < done:
        raise _too_short(options, done, passed)
    return rows


def _paired(lines: Lines, targets: Lines) -> Iterator[tuple[bytes, bytes]]:
    for number, (line, target) in enumerate(zip_longest(lines, targets)):
        if line is None or target is None:
            ended = "the input" if line is None else targets.paths[0]
            raise RequestError(f"{ended} ends after {number} lines; there must be as many sources as targets")
        yield line, target


def _write(written: Iterable[Written], file: BinaryIO, options: argparse.Namespace, lines: Lines, done: int) -> int:
    skipped = 0
    with Progress(lines, done, options.quiet, shows_bar=not file.isatty()) as progress:
        for number, line, error in written:
            if error is not None:
                message = f"{lines.place(number)}: {error}"
                if not options.skip_bad:
                    raise RequestError(message)
                progress.tell(f"lightseq: {message}")
                skipped += 1
            file.write(f"{line}\n".encode(errors="replace"))
            file.flush()  # line by line: whoever reads the other end may be waiting for this one
            progress.advance()
    if skipped:
        _tell(f"lightseq: {skipped} lines could not be answered; theirs are empty")
    return SOME_SKIPPED if skipped else 0


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
