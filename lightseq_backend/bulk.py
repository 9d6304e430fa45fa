"""The commands translate, generate and score: a line in, a line out, however many there are."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from itertools import islice, zip_longest
from typing import TYPE_CHECKING, Any, BinaryIO

from lightseq_backend.answers import Answer, Failure, Score
from lightseq_backend.config import DIALECTS, OPTION_TYPES
from lightseq_backend.errors import RequestError
from lightseq_backend.lines import STDIN, Lines, begin, resume
from lightseq_backend.progress import Progress
from lightseq_backend.serving.device import DEVICES

if TYPE_CHECKING:
    from lightseq_backend.loaded import Model

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
    group = command.add_argument_group("options of decoding (docs/serving.md); the weight file's by default")
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
        raise RequestError(f"{error.filename or options.output or 'output'}: {error.strerror}") from None


def _answer_lines(options: argparse.Namespace) -> int:
    from lightseq_backend.loaded import Model

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
        model = opened.enter_context(
            Model(
                options.model, device=options.device, precision=options.precision, dialect=options.dialect,
                tokenizer=options.tokenizer, source_language=options.source_language, slots=options.slots,
                window=options.window,
            )
        )  # fmt: skip
        file, done = _gone_on_with(options, opened) if options.resume else (None, 0)
        answers = _answers(model, options, lines, targets, changes, done)
        if file is None:  # only now: until all was checked an old file stays as it is
            file = opened.enter_context(begin(options.output)) if options.output else sys.stdout.buffer
        return _write(answers, file, options, lines, done)


def _check(options: argparse.Namespace, lines: Lines, targets: Lines | None, changes: dict[str, Any]) -> None:
    if options.resume and not options.output:
        raise RequestError("--resume needs --output: what was written to a pipe cannot be read again")
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


# Lines to answers ----------------------------------------------------------------------------------------------------


def _answers(
    model: Model, options: argparse.Namespace, lines: Lines, targets: Lines | None, changes: dict[str, Any], done: int
) -> Iterator[Any]:
    if targets and model.continues_texts:
        raise RequestError("--targets is for translators; this model scores texts")
    rows: Iterator[Any] = iter(lines) if targets is None else _paired(lines, targets)
    passed = sum(1 for _ in islice(rows, done))
    if passed < done:
        raise RequestError(f"{options.output} has {done} lines and the input only {passed}")
    row_of: Callable[[bytes], Any] = _ids if options.ids else _text
    parse: Callable[[Any], Any] = row_of
    if options.task == "score" and not model.continues_texts:
        parse = lambda line: tuple(map(row_of, _halves(line)))  # noqa: E731
    shared: dict[str, Any] = {"errors": "return", "first": done, "ahead": int(options.window > 1), "parse": parse}
    if options.task == "score":
        return model.score(rows, **shared)
    method = model.translate if options.task == "translate" else model.generate
    return method(rows, **shared, **changes)


def _paired(lines: Lines, targets: Lines) -> Iterator[tuple[bytes, bytes]]:
    for number, (line, target) in enumerate(zip_longest(lines, targets)):
        if line is None or target is None:
            ended = "the input" if line is None else targets.paths[0]
            raise RequestError(f"{ended} ends after {number} lines; there must be as many sources as targets")
        yield line, target


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


# Answers to lines ----------------------------------------------------------------------------------------------------


def _write(
    answers: Iterator[Answer | Score | Failure], file: BinaryIO, options: argparse.Namespace, lines: Lines, done: int
) -> int:
    skipped = 0
    with Progress(lines, done, options.quiet, shows_bar=not file.isatty()) as progress:
        for answer in answers:
            if isinstance(answer, Failure):
                message = f"{lines.place(answer.number)}: {answer.error}"
                if not options.skip_bad:
                    raise RequestError(message)
                progress.tell(f"lightseq: {message}")
                skipped += 1
            file.write(f"{_line(answer, options)}\n".encode(errors="replace"))
            file.flush()  # line by line: whoever reads the other end may be waiting for this one
            progress.advance()
    if skipped:
        _tell(f"lightseq: {skipped} lines could not be answered; theirs are empty")
    return SOME_SKIPPED if skipped else 0


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


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
