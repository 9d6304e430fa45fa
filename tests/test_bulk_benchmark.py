"""The benchmark of a long run of lines, on a short one."""

from __future__ import annotations

import io
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import bulk, transformer_base  # noqa: E402
from benchmarks.bulk import Sample  # noqa: E402
from lightseq_backend import weights  # noqa: E402

MIB = 2**20


def test_lines_are_as_many_as_asked_for_and_always_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "AT_ONCE", 7)
    files = [io.BytesIO(), io.BytesIO()]
    for file in files:
        bulk.write_lines(file, 30)
    rows = [[int(word) for word in line.split()] for line in files[0].getvalue().splitlines()]
    assert files[0].getvalue() == files[1].getvalue()
    assert (len(rows), len({len(row) for row in rows})) == (30, bulk.LONGEST)
    assert all(bulk.CONFIG.end_id < id_ < bulk.CONFIG.source_vocabulary for row in rows for id_ in row)


def test_run_answers_every_line_and_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "PERIOD", 0.05)
    weights.save(tmp_path / "transformer.pb", bulk.CONFIG, transformer_base.random_arrays(bulk.CONFIG))
    with (tmp_path / "lines").open("wb") as file:
        bulk.write_lines(file, 3000)
    samples, code = bulk.measure(tmp_path / "transformer.pb", tmp_path / "lines", tmp_path / "out", 100)
    answers = (tmp_path / "out").read_text().splitlines()
    assert (code, len(answers), {len(line.split()) for line in answers}) == (0, 3000, {1})
    assert [sample.lines for sample in samples] == sorted(sample.lines for sample in samples)
    assert 0 < samples[-1].lines <= 3000
    assert 20 * MIB < samples[-1].memory < 1000 * MIB


def test_run_is_interrupted_even_where_interrupts_were_ignored(tmp_path: Path) -> None:
    weights.save(tmp_path / "transformer.pb", bulk.CONFIG, transformer_base.random_arrays(bulk.CONFIG))
    with (tmp_path / "lines").open("wb") as file:
        bulk.write_lines(file, 1_000_000)
    heeded = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        _, code = bulk.measure(tmp_path / "transformer.pb", tmp_path / "lines", tmp_path / "out", 3)
    finally:
        signal.signal(signal.SIGINT, heeded)
    assert code in (130, -signal.SIGINT)  # the latter where it had not begun


def test_growth_is_that_behind_the_warm_up() -> None:
    sizes = (900, 50, 52, 57, 51)
    samples = [Sample(64.0 * place, bulk.WARM_UP // 2 * place, size * MIB) for place, size in enumerate(sizes, 1)]
    report = bulk.summary(samples)
    lines = report["largest"]["lines"], report["lines_done"], 64 * report["lines_a_second"]
    assert (report["warm"]["memory"], report["end"]["memory"]) == (50 * MIB, 51 * MIB)
    assert [count / bulk.WARM_UP for count in lines] == [2.0, 2.5, 0.5]
    with pytest.raises(SystemExit, match="warm-up, 100,000 lines"):
        bulk.summary(samples[:2])


@pytest.mark.parametrize(("largest", "verdict"), [(54, "met"), (55, "MISSED")])
def test_report_says_whether_memory_stayed(largest: int, verdict: str) -> None:
    report = bulk.summary([Sample(20, 100_000, 50 * MIB), Sample(30, 200_000, largest * MIB)])
    where = dict.fromkeys(("processor", "cores", "load_average_1min", "python", "date"), "-")
    machine = {**where, "packages": {"numpy": "1"}}
    text = bulk.markdown({"machine": machine, "lines": 1000, "file_bytes": MIB, "exit_code": 130, **report})
    assert f"{largest - 50}.0 MiB\n(allowed: 4; {verdict})" in text
    assert "200,000 lines in 30 s (interrupted, exit code 130), 10,000 lines/s" in text
