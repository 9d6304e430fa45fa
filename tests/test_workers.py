"""Lines shared out among processes by Ray Data: what one process would have written, each line once, whatever dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
from test_bulk import ENGLISH, FRENCH, GPT, TRANSLATOR, run, start, text

from lightseq_backend import workers
from lightseq_backend.__main__ import _parser
from lightseq_backend.errors import RequestError
from lightseq_backend.lines import Chunk, Lines

# Without Ray ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 2, 3, 100])
@pytest.mark.parametrize("done", range(8))
def test_chunks_hold_every_line_once_and_in_order(tmp_path: Path, most: int, done: int) -> None:
    contents = [b"a\nbb\r\n\nc", b"", b"\xff\n", b"d\ne"]
    expected = [b"a", b"bb", b"", b"c", b"\xff", b"d", b"e"]
    paths = [tmp_path / str(number) for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    lines = Lines([str(path) for path in paths])
    chunks = [*lines.chunks(most, done)]
    assert [line for chunk in chunks for line in chunk.read()] == expected[done:]
    numbers = [chunk.first + place for chunk in chunks for place in range(chunk.lines)]
    assert numbers == [*range(done, len(expected))]
    assert all(1 <= chunk.lines <= most for chunk in chunks)
    assert lines.place(4) == f"{paths[2]}, line 1"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["translate", TRANSLATOR, "--workers", 0], "--workers is 0; it must be at least 1"),
        (["translate", TRANSLATOR, "--workers", 2], "standard input or a pipe is not"),
        (["translate", TRANSLATOR, __file__, "-", "--workers", 2], "standard input or a pipe is not"),
        (["score", TRANSLATOR, __file__, "--targets", __file__, "--workers", 2], "--targets and --workers do not go"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(arguments: list[object], reason: str) -> None:
    assert reason in run(*arguments, given="mille\n", code=2).stderr.decode()


def test_workers_without_ray_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").write_text(text(FRENCH))
    monkeypatch.setattr(workers, "find_spec", lambda name: None)
    done = run("translate", TRANSLATOR, tmp_path / "in", "--workers", 2, code=2)
    assert done.stderr.decode() == "lightseq: --workers 2 needs Ray, which is not installed: the extra `ray`\n"


def test_cluster_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(workers.ADDRESS_VARIABLE, "127.0.0.1:1")
    ray = MagicMock()
    ray.init.side_effect = ConnectionError("Could not find any running Ray instance.\nMore")
    with pytest.raises(
        RequestError, match=r"RAY_ADDRESS is '127.0.0.1:1', and no Ray answers there: Could not.*instance\.$"
    ):
        workers._start(ray)


def test_nothing_is_shared_out_without_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").touch()
    monkeypatch.setattr(workers, "find_spec", lambda name: None)
    assert run("translate", TRANSLATOR, tmp_path / "in", "--workers", 2).stdout == b""


@pytest.fixture
def options(tmp_path: Path) -> Callable[..., Namespace]:
    """options(name=value, ...) of `lightseq translate`, for a file of French."""
    (tmp_path / "in").write_text(text(FRENCH))

    def made(**changes: object) -> Namespace:
        command = ["translate", TRANSLATOR, str(tmp_path / "in"), "--device", "cpu"]
        return Namespace(**{**vars(_parser().parse_args(command)), **changes})

    return made


def arrived(columns: workers.Columns) -> list[workers.Written]:
    return list(workers._lines_of(columns))


def test_worker_answers_chunks_with_numbered_lines(options: Callable[..., Namespace], tmp_path: Path) -> None:
    worker = workers.Worker(options(), {})
    for chunk in Lines([str(tmp_path / "in")]).chunks(2):
        columns = worker({name: np.array([value]) for name, value in chunk._asdict().items()})
        numbers = [*range(chunk.first, chunk.first + chunk.lines)]
        assert arrived(columns) == [(number, ENGLISH[number], None) for number in numbers]


@pytest.mark.parametrize(
    ("changes", "decoding", "reason"),
    [
        ({"model": "/nowhere"}, {}, "/nowhere cannot be used"),
        ({"tokenizer": "/nowhere"}, {}, "no tokenizer in /nowhere"),
        ({}, {"beam_size": 999}, "beam_size is 999; it must be from 1 to 16"),
    ],
)
def test_fault_of_model_or_options_ends_the_run(
    options: Callable[..., Namespace], changes: dict[str, str], decoding: dict[str, Any], reason: str
) -> None:
    worker = workers.Worker(options(**changes), decoding)
    columns = worker({name: np.array([value]) for name, value in Chunk(str(Path(__file__)), 0, 1, 0)._asdict().items()})
    with pytest.raises(RequestError, match=reason):
        arrived(columns)


@pytest.mark.parametrize("numbers", [[0, 1, 1], [0, 2], [1], [0, 1], [0, 1, 2, 3]])
def test_line_that_comes_twice_or_not_at_all_ends_the_run(
    options: Callable[..., Namespace], monkeypatch: pytest.MonkeyPatch, numbers: list[int]
) -> None:
    ray = MagicMock(**{"exceptions.RayError": ValueError})
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(workers, "find_spec", lambda name: True)
    columns = workers._columns([workers.Written(number, "") for number in numbers])
    monkeypatch.setattr(workers, "_answered", lambda *given: iter([columns]))
    with pytest.raises(RuntimeError, match=r"line \d came where line \d was due|no line came where line 3 was due"):
        list(workers.written_by_workers(options(), [Chunk("in", 0, 2, 0), Chunk("in", 9, 1, 2)], {}, 2))
    ray.shutdown.assert_called_once()


# With it -------------------------------------------------------------------------------------------------------------


def parent_of(process: int | str) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def workers_of(driver: int) -> list[int]:
    """Ids of the processes with a model: children of Ray's own process, which is a child of the driver's."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            name = (entry / "cmdline").read_bytes()
            if name.startswith(b"ray::MapWorker") and parent_of(parent_of(entry.name)) == driver:
                found.append(int(entry.name))
        except (OSError, IndexError):  # it has ended
            continue
    return found


@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed (extra `ray`)")
def test_two_workers_write_what_one_process_does_though_one_is_killed(tmp_path: Path) -> None:
    """Behind what was there, with a bad line. Seeded samples depend on the number of their line: they would show a line
    in another's place."""
    given, output = tmp_path / "in", tmp_path / "out"
    given.write_bytes(b"twelve ,\n\xff\n" + text(["twenty , twenty-one ,", "five ,"] * 200).encode())
    sampled = ["--sampling-method", "sample", "--seed", 5, "--temperature", 4.0, "--max-new-tokens", 40, "--skip-bad"]
    expected = run("generate", GPT, given, *sampled, code=1).stdout
    first = expected.index(b"\n") + 1
    output.write_bytes(expected[:first] + b"half a li")
    command = ["generate", GPT, given, "--output", output, "--resume", "--workers", 2, *sampled]
    process = start(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 100
    while output.stat().st_size <= first + len("half a li") and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    victims = workers_of(process.pid)
    assert len(victims) == 2
    os.kill(victims[0], signal.SIGKILL)
    assert len(output.read_bytes()) < len(expected)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1, stderr.decode()
    assert f"{given}, line 2: the text is not UTF-8: byte 0 is 0xff".encode() in stderr
    assert output.read_bytes() == expected
    assert len(set(expected.splitlines())) > 350
