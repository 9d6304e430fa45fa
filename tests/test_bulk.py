"""The commands translate, generate and score, as a shell runs them: order, files, resuming, errors, constant memory."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import small_models

import lightseq_backend
from lightseq_backend import weights
from lightseq_backend.__main__ import main
from lightseq_backend.lines import Lines, resume
from lightseq_backend.progress import Progress

ROOT = Path(__file__).resolve().parents[1]
TRANSLATOR, GPT = (str(ROOT / "model_repository" / name) for name in ("transformer", "gpt"))
FRENCH = ["quatre-vingt-dix-sept", "mille", "deux cent mille un", "vingt et un", "trois"]
ENGLISH = ["ninety-seven", "one thousand", "two hundred thousand and one", "twenty-one", "three"]


def run(*arguments: object, given: str | bytes = b"", code: int = 0) -> SimpleNamespace:
    """The command in this process, which saves most of a second; those that need one of their own call `start`."""
    data = given.encode() if isinstance(given, str) else given
    with pytest.MonkeyPatch.context() as patch:
        for name, content in (("stdin", data), ("stdout", b""), ("stderr", b"")):
            patch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(content), "utf-8", write_through=True))
        stdout, stderr = sys.stdout.buffer, sys.stderr.buffer
        patch.chdir(ROOT)
        try:
            found = main([*map(str, arguments), "--device", "cpu"])
        except SystemExit as stop:
            found = stop.code
        done = SimpleNamespace(stdout=stdout.getvalue(), stderr=stderr.getvalue())  # type: ignore[attr-defined]
    assert found == code, done.stderr.decode()
    return done


def start(*arguments: object, **files: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "lightseq_backend", *map(str, arguments), "--device", "cpu"]
    return subprocess.Popen(command, cwd=ROOT, **files)  # type: ignore[call-overload, no-any-return]


def text(lines: Sequence[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


# Lines in, lines out ---------------------------------------------------------------------------------------------


def test_standard_input_is_translated_in_order() -> None:
    process = start(
        "translate", TRANSLATOR, "--window", 7,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    stdout, stderr = process.communicate(text(FRENCH * 8).encode())
    assert (process.returncode, stdout.decode()) == (0, text(ENGLISH * 8))
    assert b"40 lines in " in stderr
    assert b" sentences/s" in stderr


def test_files_are_read_as_one_and_a_file_is_written(tmp_path: Path) -> None:
    (tmp_path / "a").write_text(text(FRENCH[:2]) + FRENCH[2])  # its last line has no end
    (tmp_path / "b").write_bytes(text(FRENCH[3:4]).replace("\n", "\r\n").encode())
    output = tmp_path / "out"
    done = run(
        "translate", TRANSLATOR, tmp_path / "a", "-", tmp_path / "b", "--output", output, "--quiet", given=FRENCH[4]
    )
    assert (done.stdout, done.stderr) == (b"", b"")
    assert output.read_text() == text([*ENGLISH[:3], ENGLISH[4], ENGLISH[3]])


def test_nothing_in_nothing_out() -> None:
    assert run("translate", TRANSLATOR).stdout == b""


def test_ids_go_in_and_come_out() -> None:
    with lightseq_backend.load(TRANSLATOR, device="cpu") as model:
        rows = [model.tokenizer.encode(line) for line in FRENCH]
        wanted = [" ".join(map(str, answer.ids)) for answer in model.translate(rows, beam_size=2)]
    given = text([" ".join(map(str, row)) for row in rows])
    assert run("translate", TRANSLATOR, "--ids", "--beam-size", 2, given=given).stdout.decode() == text(wanted)


def test_objects_hold_every_hypothesis() -> None:
    done = run("translate", TRANSLATOR, "--json", "--num-hypotheses", 3, "--length-penalty", 0.0, given=text(FRENCH))
    with lightseq_backend.load(TRANSLATOR, device="cpu") as model:
        answers = list(model.translate(FRENCH, num_hypotheses=3, length_penalty=0.0))
    for number, (line, answer) in enumerate(zip(done.stdout.splitlines(), answers, strict=True), 1):
        found = json.loads(line)
        assert (found["line"], found["prompt_length"]) == (number, 0)
        assert [(tuple(one["ids"]), one["text"], one["score"], one["finished"]) for one in found["hypotheses"]] == [
            (one.ids, one.text, one.score, one.finished) for one in answer.hypotheses
        ]


def test_prompts_are_continued() -> None:
    done = run("generate", GPT, "--sampling-method", "greedy", "--max-new-tokens", 2, given="twelve , thirteen\n")
    assert done.stdout == b"twelve , thirteen , fourteen\n"


def test_seeded_samples_are_the_apis() -> None:
    options = {"sampling_method": "sample", "seed": 3, "temperature": 4.0, "max_new_tokens": 6}
    with lightseq_backend.load(GPT, device="cpu") as model:
        wanted = [answer.text for answer in model.generate(["twelve ,"] * 4, **options)]
    flags = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    assert run("generate", GPT, *flags, given="twelve ,\n" * 4).stdout.decode() == text(wanted)
    assert len(set(wanted)) > 1


def test_scores_are_the_apis(tmp_path: Path) -> None:
    with lightseq_backend.load(TRANSLATOR, device="cpu") as model:
        scores = list(model.score(zip(FRENCH, ENGLISH, strict=True)))
    totals = text([f"{score.total:.6f}" for score in scores])
    pairs = text([f"{one}\t{other}" for one, other in zip(FRENCH, ENGLISH, strict=True)])
    assert run("score", TRANSLATOR, given=pairs).stdout.decode() == totals
    (tmp_path / "targets").write_text(text(ENGLISH))
    done = run("score", TRANSLATOR, "--targets", tmp_path / "targets", "--tokens", given=text(FRENCH))
    for line, score in zip(done.stdout.decode().splitlines(), scores, strict=True):
        total, parts = line.split("\t")
        assert float(total) == pytest.approx(score.total, abs=1e-6)
        assert [float(part) for part in parts.split()] == pytest.approx(score.token_log_probabilities, abs=1e-6)


def test_texts_are_scored() -> None:
    with lightseq_backend.load(GPT, device="cpu") as model:
        (wanted,) = model.score(["twelve , thirteen"])
    found = json.loads(run("score", GPT, "--json", given="twelve , thirteen\n").stdout)
    assert found == {
        "line": 1,
        "log_probability": wanted.total,
        "perplexity": wanted.perplexity,
        "ids": list(wanted.ids),
        "token_log_probabilities": list(wanted.token_log_probabilities),
    }


# Going on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [0, 1, 5, 17, 18, 19, 40])
def test_run_is_gone_on_with_behind_the_last_complete_line(tmp_path: Path, cut: int) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    source.write_text(text(FRENCH * 2))
    whole = text(ENGLISH * 2).encode()
    output.write_bytes(whole[:cut])
    done = run("translate", TRANSLATOR, source, "--output", output, "--resume")
    assert output.read_bytes() == whole
    kept = whole[:cut].count(b"\n")
    assert f"going on behind line {kept} of {output}".encode() in done.stderr
    half = cut - len(b"".join(whole.splitlines(True)[:kept]))
    assert (f"without the {half} bytes of half a line".encode() in done.stderr) == (half > 0)
    assert f"{10 - kept} lines in ".encode() in done.stderr


def test_seeded_samples_go_on_as_they_would_have(tmp_path: Path) -> None:
    flags = ["--sampling-method", "sample", "--seed", 3, "--temperature", 4.0, "--max-new-tokens", 6]
    source, output = tmp_path / "in", tmp_path / "out"
    source.write_text("twelve ,\n" * 6)
    run("generate", GPT, source, "--output", output, *flags)
    whole = output.read_bytes()
    output.write_bytes(b"".join(whole.splitlines(True)[:4]))
    run("generate", GPT, source, "--output", output, "--resume", *flags)
    assert output.read_bytes() == whole


def test_output_longer_than_its_input_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text(text(ENGLISH))
    done = run("translate", TRANSLATOR, "--output", tmp_path / "out", "--resume", given=text(FRENCH[:3]), code=2)
    assert f"{tmp_path / 'out'} has 5 lines and the input only 3".encode() in done.stderr
    assert (tmp_path / "out").read_text() == text(ENGLISH)


def test_lines_are_counted_across_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightseq_backend.lines._CHUNK", 4)
    for content, lines, cut in ((b"", 0, 0), (b"abcdefgh", 0, 8), (b"ab\ncdefgh\n\nx", 3, 1), (b"abc\n", 1, 0)):
        (tmp_path / "out").write_bytes(content)
        file, found, half = resume(tmp_path / "out")
        with file:
            file.write(b"next")
        assert (found, half) == (lines, cut)
        assert (tmp_path / "out").read_bytes() == content[: len(content) - cut] + b"next"
        (tmp_path / "out").write_bytes(content)
        assert Lines([str(tmp_path / "out")]).count() == lines + (cut > 0)


# Errors ----------------------------------------------------------------------------------------------------------


def test_bad_line_ends_the_run_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "a").write_text(text(FRENCH[:2]))
    (tmp_path / "b").write_text(text([FRENCH[2], "xyz", FRENCH[3]]))
    done = run("translate", TRANSLATOR, tmp_path / "a", tmp_path / "b", code=2)
    assert done.stdout.decode() == text(ENGLISH[:3])
    wanted = f"lightseq: {tmp_path / 'b'}, line 2: the text has 1 tokens and none of them is in the vocabulary"
    assert done.stderr.decode().startswith(wanted)


def test_bad_lines_may_be_left_empty() -> None:
    given = text([FRENCH[0], "", FRENCH[1], "xyz"]).encode() + b"\xff\xfe\n" + FRENCH[2].encode()
    done = run("translate", TRANSLATOR, "--skip-bad", given=given, code=1)
    assert done.stdout.decode() == text([ENGLISH[0], "", ENGLISH[1], "", "", ENGLISH[2]])
    places = [line for line in done.stderr.decode().splitlines() if "standard input, line " in line]
    assert [line.split(":")[1].strip() for line in places] == [f"standard input, line {n}" for n in (2, 4, 5)]
    assert "the text is not UTF-8: byte 0 is 0xff" in places[2]
    assert "3 lines could not be answered" in done.stderr.decode()
    objects = run("translate", TRANSLATOR, "--skip-bad", "--json", given="xyz\nmille\n", code=1).stdout.splitlines()
    assert json.loads(objects[0])["error"].startswith("the text has 1 tokens")


@pytest.mark.parametrize(
    ("arguments", "given", "message"),
    [
        (("translate", TRANSLATOR, "--ids"), "5 x 7\n", "standard input, line 1: 'x' is not an id"),
        (("translate", TRANSLATOR, "--ids"), "5 4000\n", "standard input, line 1: id 4000 at column 1"),
        (("score", TRANSLATOR), "mille\n", "line 1: the line has 0 tabs; it needs one"),
        (("score", TRANSLATOR), "mille\tone\tthousand\n", "line 1: the line has 2 tabs"),
        (("score", TRANSLATOR, "--targets", "README.md"), "mille\n", "the input ends after 1 lines"),
        (("score", GPT, "--targets", "README.md"), "one\n", "--targets is for translators"),
        (("translate", GPT), "", "this model continues texts"),
        (("generate", TRANSLATOR), "", "this model translates"),
        (("translate", TRANSLATOR, "none.txt"), "", "none.txt cannot be read: there is no such file"),
        (("translate", TRANSLATOR, "docs"), "", "docs cannot be read: it is a directory"),
        (("translate", TRANSLATOR, "--resume"), "", "--resume needs --output"),
        (("translate", TRANSLATOR, "README.md", "--output", "README.md"), "", "README.md is read and written"),
        (("translate", TRANSLATOR, "--output", "/nowhere/out"), "", "/nowhere/out cannot be written: No such file"),
        (("translate", TRANSLATOR, "--output", "/dev/full"), "mille\n", "/dev/full: No space left on device"),
        (
            ("translate", TRANSLATOR, "--num-hypotheses", 2),
            "",
            "num_hypotheses is 2; a line has room for one text",
        ),
        (("translate", TRANSLATOR, "--beam-size", 99), "", "beam_size is 99"),
        (("translate", TRANSLATOR, "--beam-size", "many"), "", "'many' is neither a number"),
        (("translate", TRANSLATOR, "--window", 0), "", "window is 0"),
        (("translate", "nowhere"), "", "nowhere"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " in value else "",
)
def test_what_is_wrong_is_said_in_a_line(arguments: Sequence[object], given: str, message: str) -> None:
    done = run(*arguments, given=given, code=2)
    assert message in done.stderr.decode()
    assert "Traceback" not in done.stderr.decode()
    assert done.stdout == b""


def test_old_output_stays_where_the_command_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious\n")
    for wrong in (("--beam-size", 99), ("--top-k", 2)):
        run("translate", TRANSLATOR, "--output", tmp_path / "out", *wrong, code=2)
    assert (tmp_path / "out").read_text() == "precious\n"


# Pipes, terminals, signals ---------------------------------------------------------------------------------------


def test_reader_that_goes_away_ends_the_run_quietly(tmp_path: Path) -> None:
    (tmp_path / "in").write_text(text(FRENCH * 2000))
    process = start(
        "translate", TRANSLATOR, tmp_path / "in", "--window", 8, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == b"ninety-seven\n"
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(30) == 141


def test_interrupted_run_keeps_what_was_answered_and_can_be_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "in").write_text(text(FRENCH * 8))
    process = start(
        "translate", TRANSLATOR, "-", "--output", tmp_path / "out", "--window", 4,
        stdin=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what a shell starts behind it ignores it
    )  # fmt: skip
    process.stdin.write(text(FRENCH * 4).encode())
    process.stdin.flush()  # and no end: it waits for more
    while not (tmp_path / "out").exists() or (tmp_path / "out").read_bytes().count(b"\n") < 8:
        assert process.poll() is None
        os.sched_yield()
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert b"interrupted; what was answered is written" in process.stderr.read()
    process.stdin.close()
    run("translate", TRANSLATOR, tmp_path / "in", "--output", tmp_path / "out", "--resume")
    assert (tmp_path / "out").read_text() == text(ENGLISH * 8)


def test_terminal_gets_each_answer_before_the_next_line() -> None:
    ours, theirs = pty.openpty()
    process = start("translate", TRANSLATOR, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    os.close(theirs)
    for source, target in zip(FRENCH[:3], ENGLISH):
        os.write(ours, f"{source}\n".encode())
        assert process.stdout.readline().decode() == f"{target}\n"
    os.write(ours, b"\x04")
    assert process.wait(30) == 0
    assert b"a line at a time; Ctrl-D ends" in process.stderr.read()
    os.close(ours)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("quiet", "shows_bar"), [(False, True), (False, False), (True, True)])
def test_bar_appears_on_a_terminal_and_counts_sentences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet: bool, shows_bar: bool
) -> None:
    (tmp_path / "in").write_text(text(FRENCH))
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setattr("lightseq_backend.progress.BAR_DELAY", 0.0)
    with Progress(Lines([str(tmp_path / "in")]), done=2, quiet=quiet, shows_bar=shows_bar) as progress:
        progress.advance()
        progress.tell("beside it")
    shown = terminal.getvalue()
    assert ("/5 [" in shown) == (shows_bar and not quiet)
    assert "beside it\n" in shown
    assert ("1 lines in 0.0 s" in shown) == (not quiet)


def test_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    monkeypatch.setattr("lightseq_backend.progress.LOG_PERIOD", 0.0)
    with Progress(Lines([]), done=0, quiet=False, shows_bar=True) as progress:
        for _ in range(3):
            progress.advance()
    assert [line.split()[0] for line in log.getvalue().splitlines()] == ["1", "2", "3", "3"]


# Millions of lines -----------------------------------------------------------------------------------------------

ENDLESS = """
import resource, sys
import numpy as np
from lightseq_backend import __main__, local
from lightseq_backend.request import Hypothesis, Output

LINES = 200_000

class Engine:
    '''Answers at once: what is left is the commands' own work, and their memory.'''
    def __init__(self, engine):
        self.model, self.options, self.start = engine.model, engine.options, lambda: None
    def stop(self, finish):
        pass
    def submit(self, requests):
        for request in requests:
            request.reply(Output((Hypothesis(request.tokens[:2], -1.0, True),)))

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

def lines():
    for number in range(LINES):
        if number == LINES // 10:
            early.append(peak())
        yield b"%d 7 2\\n" % (3 + number % 5)

class Input:
    buffer = type("Buffer", (), {"__enter__": lambda self: lines(), "__exit__": lambda *a: None})()
    isatty = staticmethod(lambda: False)

early, built = [], local.build
local.build = lambda *arguments: Engine(built(*arguments))
sys.stdin = Input
code = __main__.main(["translate", sys.argv[1], "--ids", "--output", sys.argv[2], "--device", "cpu"])
print(code, peak() - early[0])
"""


def test_memory_does_not_grow_with_the_lines(tmp_path: Path) -> None:
    weights.save(tmp_path / "transformer.pb", *small_models.transformer())
    program = [sys.executable, "-c", textwrap.dedent(ENDLESS), tmp_path / "transformer.pb", tmp_path / "out"]
    done = subprocess.run(program, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    code, growth = map(int, done.stdout.split())  # KiB
    assert (code, growth < 2048) == (0, True), growth
    assert (tmp_path / "out").read_bytes() == b"".join(b"%d 7\n" % (3 + number % 5) for number in range(200_000))
