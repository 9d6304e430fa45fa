"""The command `lightseq-client`: translate, generate, score, health."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any, TextIO
from uuid import uuid4

from lightseq_client.answers import Answer, Failure, Given
from lightseq_client.client import DEFAULT_MODELS, DEFAULT_STREAMS, Client
from lightseq_client.errors import ModelError, RequestFailed, RowError, ServerUnreachable, VocabularyError
from lightseq_client.lines import Lines
from lightseq_client.output import Json, JsonStream, Plain, PlainStream, Summary
from lightseq_client.protocols import DEFAULT_URLS, checked_url
from lightseq_client.signature import GENERATE, SCORE, TRANSLATE
from lightseq_client.vocabulary import Codec, Ids, ServerText, Words

HEALTH = "health"
ALL_GOOD, SOME_FAILED, USAGE, NOT_SERVED = 0, 1, 2, 3
INTERRUPTED, PIPE_CLOSED = 130, 141  # as the shell reports a process that SIGINT or SIGPIPE ended
BAR_DELAY = 1.0  # seconds that a run must last before it gets a progress bar

_EPILOG = """\
exit codes:
  0    all good
  1    some rows failed: each is named on standard error, the others are answered
  2    wrong usage: options, vocabulary or output file
  3    server not reachable, or model not ready or not of this kind
  130  interrupted: what was answered by then is written
  141  whoever read the output went away
"""
_ROWS = """

Rows come from the arguments, one row an argument, or else from standard input, one row a line. A row is ids
with blanks between them ("17 4 2"), or text with --text. A failed row leaves an empty line in plain output,
so that line n always belongs to row n.
"""
_PAIRS = """\
Where the model scores translations, a row is a source, a tab and its target: what the model would write, as ids
with the end id. What comes is the mean negative log-likelihood of the tokens after the first (of models with an
output loss), or the log-probability of all that is scored (log_probability), and with --json each token's too;
the logarithm is the natural one.
"""
_TEXT = "With --text the server tokenises; where it cannot, or with --vocabulary, "
_DESCRIPTIONS = {
    TRANSLATE: "Translate rows." + _ROWS + _TEXT + "a source is sent as its words and </s>.",
    GENERATE: "Continue prompts; the output begins with the prompt." + _ROWS + _TEXT + "a prompt is sent as <s> "
    "and its words.",
    SCORE: "Score texts, or translations that are given." + _ROWS + _PAIRS + _TEXT + "a row is sent as <s> and its\n"
    "words, of a pair each side as its words and </s>.",
    HEALTH: "State of the server and its models, with their versions.",
}
_OPTIONS: dict[str, tuple[Callable[[str], Any], str]] = {
    "sampling_method": (str, "beam_search, standard_beam, topk_greedy, greedy, topk, topp or sample"),
    "beam_size": (int, "hypotheses a search carries"),
    "length_penalty": (float, "0 sums log-probabilities, 1 divides by (5 + length) / 6"),
    "diverse_lambda": (float, "keeps beams apart"),
    "top_k": (int, "sample among that many"),
    "top_p": (float, "sample among the likeliest that together reach this"),
    "temperature": (float, "below 1 sharper, above 1 flatter"),
    "seed": (int, "same seed, same text"),
    "max_new_tokens": (int, "at most so many tokens"),
    "num_hypotheses": (int, "hypotheses to return"),
    "early_stopping": (str, "true, false or never: when a standard_beam ends"),
    "max_length": (int, "at most so many tokens, with the prompt or the start token"),
    "min_length": (int, "at least so many, counted in the same way"),
    "min_new_tokens": (int, "at least so many new tokens"),
    "no_repeat_ngram_size": (int, "no n-gram of that size occurs twice"),
    "repetition_penalty": (float, "over 1: tokens that were there are less likely"),
    "suppress_tokens": (str, "ids that are never chosen, [3, 4]"),
    "begin_suppress_tokens": (str, "ids that do not come first"),
    "bad_words_ids": (str, "words of ids that never come, [[3, 4], [5]]"),
    "forced_bos_token_id": (int, "what a translation begins with: its language, say"),
    "forced_eos_token_id": (int, "the last token where the limit cuts"),
    "token_log_probabilities": (str, "true: with --json, what every token is worth"),
    "decoder_prefix": (str, "ids that a translation begins with"),
    "stop": (str, 'what the text ends before: a text, or a list, ["a", [3, 4]]'),
    "include_stop": (str, "true: it ends behind that"),
    "end_ids": (str, "ids that end it as the model's own end id does, [3, 4]"),
    "deadline_ms": (float, "milliseconds after which no answer is wanted"),
}


class _UsageError(Exception):
    """What argparse cannot see by itself."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code (see --help)."""
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed help or what was wrong
        return int(stop.code or 0)
    if arguments.command != HEALTH and arguments.model is None:
        names = DEFAULT_STREAMS if getattr(arguments, "stream", False) else DEFAULT_MODELS
        arguments.model = names[arguments.command]
    try:
        with ExitStack() as opened:
            return _health(arguments, opened) if arguments.command == HEALTH else _task(arguments, opened)
    except (_UsageError, VocabularyError) as error:
        return _complain(str(error), USAGE)
    except (ServerUnreachable, ModelError) as error:
        return _complain(str(error), NOT_SERVED)
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED)
    except BrokenPipeError:
        _silence_stdout()
        return PIPE_CLOSED


def _task(arguments: argparse.Namespace, opened: ExitStack) -> int:
    task = arguments.command
    rows, ready, total = _rows(arguments)
    client = _client(arguments, opened)
    if getattr(arguments, "stream", False):
        return _stream(arguments, opened, client, rows)
    codec = _codec(arguments, client)
    items = client.answers(
        task,
        map(_parts, rows) if task == SCORE else rows,
        model=arguments.model,
        codec=codec,
        rows_per_request=arguments.rows_per_request,
        ready=ready,
        **{name: getattr(arguments, name, None) for name in _OPTIONS},
    )
    file = _output(arguments.output, opened)  # only now: without a server the old file stays as it is
    writer = Json(file, task, arguments.text) if arguments.json else Plain(file, getattr(arguments, "all", False))
    summary = Summary("requests" if arguments.rows_per_request == 1 else "rows")
    started = time.perf_counter()
    try:
        with closing(items):
            counted, tell = _with_bar(items, total, file)
            for item in counted:
                if isinstance(item, Answer):
                    summary.answer(item)
                    writer.answer(item)
                else:
                    summary.failure(item)
                    tell(f"lightseq-client: line {item.number}: {item.error}")
                    writer.failure(item)
    finally:
        if not arguments.quiet:
            _tell(summary.text(time.perf_counter() - started))
    return SOME_FAILED if summary.failures else ALL_GOOD


def _stream(arguments: argparse.Namespace, opened: ExitStack, client: Client, rows: Iterable[str]) -> int:
    """Row after row, each as it comes: the first text's parts on one line, or a JSON object a part."""
    options = {name: getattr(arguments, name) for name in _OPTIONS}
    codec = _codec(arguments, client)
    file = _output(arguments.output, opened)
    writer = JsonStream(file) if arguments.json else PlainStream(file)
    failed = 0
    for number, row in enumerate(rows, 1):
        try:
            with closing(
                client.stream(
                    arguments.command, row, model=arguments.model, codec=codec, request_id=uuid4().hex, **options
                )
            ) as parts:
                for part in parts:
                    writer.part(number, part)
                    if part.first_token_ms is not None and not arguments.quiet:
                        _tell(f"line {number}: first token {part.first_token_ms:.1f} ms, {part.seconds:.3f} s")
        except (RequestFailed, RowError) as error:
            failed += 1
            writer.failure(number)
            _tell(f"lightseq-client: line {number}: {error}")
    return SOME_FAILED if failed else ALL_GOOD


def _health(arguments: argparse.Namespace, opened: ExitStack) -> int:
    client = _client(arguments, opened, admin_key=arguments.admin_key)
    health = client.health(arguments.model or ())
    file = _output(arguments.output, opened)
    writer = Json(file, HEALTH, False) if arguments.json else Plain(file, False)
    writer.health(client.url, client.protocol, health)
    return ALL_GOOD if health.ready and all(model.ready for model in health.models) else NOT_SERVED


def _client(arguments: argparse.Namespace, opened: ExitStack, **settings: Any) -> Client:
    for name in ("concurrency", "timeout", "retries"):
        if hasattr(arguments, name):
            settings[name] = getattr(arguments, name)
    try:
        return opened.enter_context(Client(arguments.url, arguments.protocol, **settings))
    except (ImportError, RuntimeError) as error:  # RuntimeError: tritonclient without this protocol
        raise _UsageError(f"{error}: install the extra `client`") from None


def _codec(arguments: argparse.Namespace, client: Client) -> Codec:
    if not arguments.text:
        if arguments.vocabulary:
            raise _UsageError("--vocabulary needs --text")
        return Ids(end_id=getattr(arguments, "end_id", None), padding_id=arguments.padding_id)
    if getattr(arguments, "end_id", None) is not None or arguments.padding_id is not None:
        raise _UsageError("--end-id and --padding-id are for ids; with --text the vocabulary knows them")
    if not arguments.vocabulary and client.takes_text(arguments.command, arguments.model):
        return ServerText()
    directory = arguments.vocabulary or _beside_weights(arguments.model, client)
    translates = arguments.command == TRANSLATE or (
        arguments.command == SCORE and client.takes_targets(arguments.model)
    )
    return (Words.for_translation if translates else Words.for_generation)(directory, warn=_warn)


def _beside_weights(model: str, client: Client) -> str:
    """The directory of the model's weights in the repository here; models may share one file (../gpt/gpt.pb)."""
    return os.path.normpath(Path("model_repository", model, client.weights(model) or "none").parent)


def _parts(line: str) -> Given:
    """The line; one with tabs as what lies between them: a source and its target."""
    return tuple(line.split("\t")) if "\t" in line else line


def _rows(arguments: argparse.Namespace) -> tuple[Iterable[str], Callable[[], bool], int | None]:
    """The rows, whether the next one is there already, and how many there are where that is known."""
    if arguments.rows:
        return arguments.rows, lambda: True, len(arguments.rows)
    try:
        lines = Lines(sys.stdin.fileno())
    except (AttributeError, OSError, ValueError):  # no stdin at all, or one that is no file
        return (line.rstrip("\r\n") for line in sys.stdin or ()), lambda: True, None
    if sys.stdin.isatty():
        _tell("one row a line; Ctrl-D ends")
    return lines, lines.ready, lines.count()


def _output(path: str | None, opened: ExitStack) -> TextIO:
    if path is None:
        return sys.stdout
    try:
        return opened.enter_context(open(path, "w", encoding="utf-8"))
    except OSError as error:
        raise _UsageError(f"cannot write {path}: {error.strerror}") from None


def _with_bar(
    items: Iterator[Answer | Failure], total: int | None, file: TextIO
) -> tuple[Iterator[Answer | Failure], Callable[[str], None]]:
    """The items, counted by a bar on a terminal's standard error unless the answers themselves appear on one;
    and how to write a line beside the bar."""
    if not sys.stderr.isatty() or file.isatty():
        return items, _tell
    try:
        from tqdm import tqdm
    except ImportError:  # a bar is not worth a failure
        return items, _tell
    bar = tqdm(items, total=total, unit="row", delay=BAR_DELAY, file=sys.stderr)
    return iter(bar), lambda text: tqdm.write(text, file=sys.stderr)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _complain(text: str, code: int) -> int:
    _tell(f"lightseq-client: {text}")
    return code


def _warn(text: str) -> None:
    _tell(f"lightseq-client: warning: {text}")


def _silence_stdout() -> None:
    """Let Python's own flush at exit find somewhere to write."""
    with suppress(OSError, ValueError):  # a stdout that is no file has nothing to flush either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "lightseq-client", description="Ask LightSeq models on a Triton server.", epilog=_EPILOG, formatter_class=form
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="translate|generate|score|health")
    for name, description in _DESCRIPTIONS.items():
        title = description.split("\n")[0]
        command = commands.add_parser(
            name, help=title, description=description, epilog=_EPILOG, formatter_class=form, allow_abbrev=False
        )
        _add_common(command)
        if name == HEALTH:
            _add_health(command)
        else:
            _add_task(command, name)
    return parser


def _add_common(command: argparse.ArgumentParser) -> None:
    urls = ", ".join(f"{url} for {protocol}" for protocol, url in DEFAULT_URLS.items())
    command.add_argument("--url", type=_url, help=f"host:port (default: {urls})")
    command.add_argument("--protocol", choices=tuple(DEFAULT_URLS), default="grpc", help="(default: %(default)s)")
    command.add_argument("--json", action="store_true", help="one JSON object a line")
    command.add_argument("--output", metavar="FILE", help="write there instead of to standard output")


def _add_health(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", action="append", metavar="NAME", help="ask for this model only (may be repeated)")
    command.add_argument("--admin-key", metavar="KEY", help="for servers that restrict the list of their models")


def _add_task(command: argparse.ArgumentParser, task: str) -> None:
    command.add_argument("rows", nargs="*", metavar="ROW", help="a row; without any, standard input")
    command.add_argument("--model", metavar="NAME", help=f"(default: {DEFAULT_MODELS[task]})")
    command.add_argument("--text", action="store_true", help="rows and answers are text, not ids")
    command.add_argument(
        "--vocabulary",
        metavar="DIR",
        help="where the vocabulary files are (default: the server tokenises, or else beside the weights in "
        "model_repository)",
    )
    command.add_argument("--concurrency", type=_whole, default=8, metavar="N", help="requests at once (%(default)s)")
    command.add_argument("--rows-per-request", type=_whole, default=1, metavar="N", help="rows a matrix (%(default)s)")
    command.add_argument("--padding-id", type=int, metavar="ID", help="fill rows of a matrix up to one length with it")
    command.add_argument("--timeout", type=_seconds, default=60.0, metavar="S", help="of one attempt (%(default)g)")
    command.add_argument("--retries", type=_count, default=8, metavar="N", help="when unavailable (%(default)s)")
    command.add_argument("--quiet", action="store_true", help="no timing summary")
    if task == SCORE:
        return
    command.add_argument("--stream", action="store_true", help=f"as it comes, row by row, from {DEFAULT_STREAMS[task]}")
    command.add_argument("--all", action="store_true", help="all hypotheses: row, rank, score, text, tab-separated")
    command.add_argument("--end-id", type=int, metavar="ID", help="cut hypotheses behind the first of it")
    options = command.add_argument_group("decoding options (default: what the model's file says)")
    for name, (kind, text) in _OPTIONS.items():
        options.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="X", help=text)


def _url(text: str) -> str:
    try:
        return checked_url(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _whole(text: str) -> int:
    return _at_least(int(text), 1)


def _count(text: str) -> int:
    return _at_least(int(text), 0)


def _at_least(number: int, least: int) -> int:
    if number < least:
        raise argparse.ArgumentTypeError(f"{number} is below {least}")
    return number


def _seconds(text: str) -> float:
    seconds = float(text)
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"{text} is not over 0")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
