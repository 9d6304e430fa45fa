"""The GPU benchmarks as far as they go without one: tiny models on the CPU, records, the report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import nvrtc
import pytest
from kernel_ops import ACTIVATIONS

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import (  # noqa: E402
    gpu,
    gpu_engine,
    gpu_load,
    gpu_models,
    gpu_ops,
    gpu_report,
    gpu_tune,
    perf,
    server,
    server_engine,
    server_models,
    server_report,
    server_run,
)
from benchmarks.gpu_models import MODELS, TINY  # noqa: E402
from benchmarks.gpu_records import Record, Recorder, read  # noqa: E402
from lightseq_backend.ops import linear_launch  # noqa: E402
from lightseq_backend.ops.linear_launch import Device  # noqa: E402
from lightseq_backend.ops.linear_shapes import BY_DEVICE  # noqa: E402
from lightseq_backend.serving import cores  # noqa: E402


def run(program: object, monkeypatch: pytest.MonkeyPatch, records: Path, *options: str) -> list[Record]:
    """What a program measures on the CPU."""
    monkeypatch.setattr(sys, "argv", ["", "--device", "cpu", "--records", str(records), *options])
    program.main()
    return read([records])[1]


def test_models_and_operations_are_measured_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = run(gpu, monkeypatch, tmp_path / "models", "--quick")
    operations = run(gpu_ops, monkeypatch, tmp_path / "operations", "--rows", "4")
    assert {one.what for one in models} == {
        *("decode step", "encoder", "prompts", "whole requests", "perplexity"),
        *("load: weights in memory to the device", "load: engine and its graphs"),
    }
    assert len({one.what for one in operations}) == 12
    assert all(one.value > 0 for one in [*models, *operations])
    written = gpu_report.write(tmp_path, *read([tmp_path / "models", tmp_path / "operations"]))
    assert [path.suffix for path in written] == [".json", ".md"]
    assert len(json.loads(written[0].read_text())["records"]) == len(models) + len(operations)
    text = written[1].read_text()
    for heading in ("A decode step", "Encoder, prompts", "Perplexity", "Whole requests", "Loading", "Operations"):
        assert f"\n## {heading}" in text


def test_int8_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = run(gpu, monkeypatch, tmp_path / "models", "--quick", "--precision", "int8")
    operations = run(gpu_ops, monkeypatch, tmp_path / "operations", "--rows", "4", "--precision", "int8")
    assert {one.precision for one in [*models, *operations]} == {"int8"}
    # Two layers of [32, 96], [32, 32], [32, 64] and [64, 32], and for the logits [32, 211]: a byte each, four a column.
    weights = 2 * (32 * (96 + 32 + 64) + 64 * 32 + 4 * (96 + 32 + 64 + 32)) + 211 * (32 + 4)
    steps = [one for one in models if one.what == "decode step" and one.model == "tiny-gpt"]
    assert {one.more["weights_bytes"] for one in steps} == {weights}
    query = next(one for one in operations if one.what == "operation query")
    assert query.bytes == 32 * 32 + 4 * 32 + 2 * 4 * (32 + 32)
    text = gpu_report.write(tmp_path, *read([tmp_path / "models", tmp_path / "operations"]))[1].read_text()
    assert "a tiny GPT, 32 tokens, int8" in text


def test_a_burst_in_the_loop_takes_its_steps() -> None:
    engine = tiny_engine()
    rows = gpu_models.rows(TINY["tiny"], 2, 6)
    taken = gpu_engine.bursts(engine, rows, {}, tokens=20)
    assert engine.idle
    assert min(taken) > 0


def test_a_rewound_step_is_a_real_one() -> None:
    engine = tiny_engine()
    decoding = gpu_engine.Decoding(engine, gpu_models.rows(TINY["tiny"], 2, 6), {"max_new_tokens": 6})
    decoding.rewind(5)
    decoding.step()
    records = engine._buffers.state.slots[: decoding.rows]
    assert (decoding.generated, decoding.rows) == (6, 8)
    assert (records["generated"] == 6).all()
    assert (records["length"] == 6).all()
    assert not records["done"].any()


def test_shared_history_counts_once() -> None:
    decoding = gpu_engine.Decoding(tiny_engine(), gpu_models.rows(TINY["tiny"], 2, 6), {"max_new_tokens": 6})
    ancestors = decoding.engine._buffers.cache.ancestors
    ancestors[:8, :3] = np.array([[0, 0, 0]] * 4 + [[4, 4, 5]] * 3 + [[4, 4, 7]])
    assert decoding.history_entries(3) == 2 + 2 + 3
    # Two layers, keys and values of 32 floats; sources of six tokens.
    assert decoding.cache_bytes(3) == 2 * 2 * 32 * 4 * (7 + 2 * 6)


def test_tuning_finds_what_makes_steps_shortest() -> None:
    """Planted: orders and late launches that are faster, and the fastest of all, which 32 rows cannot have."""
    device, table = Device(90, 132, 227 * 1024), gpu_tune.Table()
    good = {(1024, 3072, True): (2, 4), (4096, 1024, False): (8, 8)}

    def seconds(rows: int) -> float:
        taken = 1.0
        for inner, wide, norm in (part.product for part in found):
            made = linear_launch.plan(device, rows, inner, wide, True, norm, True)
            shape = dict(made.definitions)
            order = shape["SPLIT"], shape["WARPS"]
            if order == (4, 8) and (inner, wide) == (1024, 3072):
                if rows == 32:
                    return float("inf")
                taken -= 0.3
            taken -= 0.1 * (good.get((inner, wide, norm)) == order)
            taken -= 0.01 * (shape["LATE"] == (rows > 8)) + 0.01 * (shape["OUTPUTS"] == 48)
        return taken

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BY_DEVICE, (90, 132), {16: table})
        found = list(gpu_tune.parts(MODELS["big"]))
        search = gpu_tune.Search(found, device, gpu_tune.PRECISIONS["fp16"], table, (4, 8, 32, 128), seconds)
        rounds = 0
        while search.go_round():
            rounds += 1
            assert rounds < 5
    for product, order in good.items():
        assert {(shape.split, shape.warps) for shape in table[product].values()} == {order}
    for product, shapes in table.items():
        assert {most: shape.late for most, shape in shapes.items()} == {most: most > 8 for most in shapes}
        assert {shape.outputs for shape in shapes.values()} == {48}
        assert set(shapes) == ({8, 32, 128} if product == (1024, 1024, True) else {8, 32})  # else warpgroups'


@pytest.mark.parametrize("precision", gpu_tune.PRECISIONS)
def test_tuning_compiles_what_the_engine_launches(precision: str) -> None:
    """The definitions of ops/cuda.py _small_product, whose end is made of fours."""
    device, numbers = Device(90, 132, 227 * 1024), gpu_tune.PRECISIONS[precision]
    table: gpu_tune.Table = {}
    search = gpu_tune.Search(gpu_tune.parts(MODELS["gpt2"]), device, numbers, table, (1, 32), lambda rows: 1.0)
    builds = search.builds()
    assert len(builds) == len(set(builds)) > 100
    size = 2 if numbers.half else 4
    fours = linear_launch.in_fours(3072, (1 << 20, size, 0), (1 << 21, size, 3072))
    (shapes,) = (tried for part, tried in search.parts.items() if part.product == (768, 3072, True))
    for rows in (8, 32):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(BY_DEVICE, (90, 132), {numbers.bits: {(768, 3072, True): {rows: shapes[0]}}})
            made = linear_launch.plan(device, rows, 768, 3072, numbers.half, True, True, numbers.int8)
        assert dict(made.definitions)["DEPTH"] == shapes[0].depth
        wanted = {**dict(made.definitions), "FOURS": int(fours), "ACTIVATION": ACTIVATIONS["gelu"]}
        assert tuple(sorted(wanted.items())) in builds
    assert not search.go_round()  # nothing is better: nothing changes
    assert not table


@pytest.mark.parametrize(
    ("name", "precision", "most"),
    [
        ("query of cross attention", "fp16", {8, 32, 128}),
        ("output of attention", "fp16", {8, 32}),
        ("output of attention", "fp32", {8, 32}),
        ("FFN 1", "fp16", {8, 32}),
        ("FFN 1", "int8", {8, 32, 128}),
    ],
)
def test_tuning_is_for_rows_that_its_kernel_gets(name: str, precision: str, most: set[int]) -> None:
    device, numbers = Device(90, 132, 227 * 1024), gpu_tune.PRECISIONS[precision]

    def seconds(rows: int) -> float:
        return 1.0 - 0.1 * any(table.values())  # any shape is better than the rules'

    table: gpu_tune.Table = {}
    (part,) = (part for part in gpu_tune.parts(MODELS["big"]) if part.name == name)
    assert gpu_tune.Search([part], device, numbers, table, (4, 8, 32, 128), seconds).go_round()
    assert set(table[part.product]) == most
    assert all(shape.depth > 0 for shape in table[part.product].values())


def tiny_engine() -> gpu_engine.Engine:
    model = TINY["tiny"]
    return gpu_engine.load(*gpu_models.build(model), "cpu", "fp32", slots=8, max_beam_size=4).engine


def test_loading_is_taken_apart(tmp_path: Path) -> None:
    gpu_load.weights.save(tmp_path / "transformer.pb", *gpu_models.build(TINY["tiny"]))
    seconds = gpu_load.in_process(tmp_path, "cpu", "fp32")
    assert list(seconds) == [*gpu_load.PARTS, "device"]
    assert min(seconds.values()) > 0


def test_bytes_of_a_step_are_those_of_its_matrices() -> None:
    assert gpu_models.decoder_bytes(MODELS["big"], "fp16") == 237_633_536
    assert gpu_models.decoder_bytes(MODELS["big"], "int8") == 237_633_536 // 2 + 4 * 97_600
    assert gpu_models.decoder_bytes(MODELS["gpt2"], "fp32") == 2 * 247_064_064
    for model in TINY.values():
        _, arrays = gpu_models.build(model)
        decoder = [
            name for name in arrays if name.startswith(("decoder", "layer", "output")) and "cross_kv" not in name
        ]
        matrices = [arrays[name].nbytes for name in decoder if name.endswith(".weight")]
        assert gpu_models.decoder_bytes(model, "fp32") == sum(matrices)


def test_records_outlive_a_broken_run(tmp_path: Path) -> None:
    path = tmp_path / "records"
    for value in (2.0, 3.0):  # a second run goes on in the same file
        with Recorder("models", path, {"gpu": "A"}) as recorder:
            recorder.add(Record("this engine", "big", "fp16", 8, 24, "decode step", value, "us", bytes=10, floor=1.5))
    with path.open("a") as file:
        file.write('{"record": {"engine": "this eng')
    conditions, records = read([path])
    assert [one["gpu"] for one in conditions] == ["A", "A"]
    assert records == [Record("this engine", "big", "fp16", 8, 24, "decode step", 3.0, "us", bytes=10, floor=1.5)]


def test_a_report_is_of_one_gpu(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="these files are of A, B"):
        gpu_report.write(tmp_path, [{"gpu": "A"}, {"gpu": "B"}], [])


def test_a_report_says_what_to_know_of_its_own_figures(tmp_path: Path) -> None:
    conditions = [{"program": "models", "date": "2026-11-29", "gpu": "A"}]
    records = [
        Record("this engine", "big", "fp16", 8, 24, what, 1.0, "ms", floor=0.5, note="on a busy host")
        for what in ("encoder", "prompts")
    ]
    text = gpu_report.write(tmp_path, conditions, records)[1].read_text()
    assert "\n- encoder; prompts: on a busy host.\n" in text
    plain = gpu_report.write(tmp_path, conditions, [replace(one, note="") for one in records])[1].read_text()
    assert "busy" not in plain


def test_a_report_says_of_each_precision_when_it_was_measured(tmp_path: Path) -> None:
    runs = (("2026-11-27", "fp16"), ("2026-11-29", "fp32"), ("2026-11-30", "fp16"))
    conditions = [
        {"program": "models", "date": date, "gpu": "A", "operations_a_second": {precision: 1e12}}
        for date, precision in runs
    ]
    text = gpu_report.write(tmp_path, conditions, [])[1].read_text()
    rows = [line for line in text.splitlines() if line.startswith("| models |")]
    assert [("2026-11-30" in row, "fp32" in row) for row in rows] == [(True, False), (False, True)]


def test_quoted_peers_stand_beside_what_is_measured() -> None:
    quoted = gpu_report.Quoted()
    assert "not in the run" in quoted.provenance
    for one in quoted.records:
        assert one.model in MODELS
        assert one.unit == ("us" if one.what == "decode step" else "ms")
        assert one.length in (*MODELS[one.model].lengths, gpu.TEXT_LENGTH)


@pytest.mark.skipif(nvrtc.find() is None, reason="NVRTC is not installed")
@pytest.mark.parametrize("architecture", [75, 90])
def test_stream_kernel_keeps_its_loads_in_registers(architecture: int) -> None:
    toolkit = nvrtc.find()
    assert toolkit is not None
    taken = toolkit.compile(gpu_engine._STREAM, architecture, {})["stream"]
    assert taken.spilled == 0
    assert taken.registers >= 32  # eight loads of sixteen bytes under way


# The server's share --------------------------------------------------------------------------------------------------

EXPORT = {
    "experiments": [
        {
            "window_boundaries": [0, 1_000_000_000, 2_000_000_000],
            "requests": [
                {"timestamp": begun, "request_inputs": {"source_ids": first}, "response_timestamps": arrivals}
                for begun, first, arrivals in [
                    (-5e8, 3, [1e8, 5e8]),  # begun before, answered within
                    (1e8, 10, [2e8, 11e8]),
                    (2e8, [3, 4, 5], [3e8, 5e8]),  # as perf_analyzer 2.60 writes it
                    (19e8, 10, [21e8]),  # answered behind the end
                    (19e8, 3, []),
                ]
            ],
        }
    ]
}


def test_what_perf_analyzer_exports_is_read(tmp_path: Path) -> None:
    path = tmp_path / "export.json"
    text = json.dumps(EXPORT).encode()
    path.write_bytes(text.replace(b'"window', b'"response_outputs": "\xff\xc3\\u0000", "window', 1))
    run = server_run.read_export(path, {3: 5, 10: 20}, {"models": 1.5})
    assert (run.requests, run.tokens) == (1.5, (5 + 20 + 5) / 2)
    assert run.latency["p50"] == pytest.approx(1000)
    assert run.first["p50"] == pytest.approx(100)
    assert run.cores == {"models": 1.5}
    assert server_run.middle([run, run._replace(tokens=7.0), run._replace(tokens=9.0)]).tokens == 9


def test_translations_of_the_bench_are_as_long_as_it_takes_them_to_be(tmp_path: Path) -> None:
    load = server_models.LOADS["cpu"]
    counts = server_models.lengths()
    assert (len(counts), counts.min(), counts.max()) == (256, 4, 100)
    rows = server_models.sources(load, counts)
    assert len({row[0] for row in rows}) == 256  # by which an answer's tokens are known
    engine = server_engine.local.build(server_models.write_weights(tmp_path / "w.safetensors", load), slots=16)
    for row, output in zip(rows[:3], engine.answer(rows[:3]), strict=True):
        assert len(output.hypotheses[0].tokens) == len(row)
    engine.start()
    run = server_engine.closed_loop(engine, [[5, 6, 7], [8] * 9], concurrency=3, seconds=0.2)
    engine.stop()
    assert run.requests > 0
    assert 3 <= run.tokens / run.requests <= 9


BUSY = """
import subprocess, sys, threading
child = subprocess.Popen([sys.executable, "-c", "print('spins', flush=True)\\nwhile True: pass"])
print("spins", flush=True)
while True:
    threading.Thread(target=int).start()
"""


def test_cores_are_counted_of_a_server_whose_threads_come_and_go() -> None:
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, start_new_session=True) as busy:
        try:
            assert busy.stdout is not None
            assert [busy.stdout.readline() for _ in range(2)] == [b"spins\n"] * 2
            for _ in range(50):
                with server.cores_used(busy.pid) as used:
                    time.sleep(0.02)
                assert used["models"] >= 0
            with server.cores_used(busy.pid) as used:
                time.sleep(0.5)
        finally:
            os.killpg(busy.pid, signal.SIGKILL)
    assert used["triton"] > 0
    assert 0 < used["models"] <= 1.1
    assert used["callers"] == pytest.approx(0, abs=0.1)


@pytest.mark.timeout(400)
def test_server_is_measured_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "QUICK_INTERVAL", 0.2)
    options = ["--device", "cpu", "--quick", "--concurrency", "2", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["", *options])
    server.main()
    (report,) = (json.loads(path.read_text()) for path in tmp_path.glob("server-*.json"))
    (run,) = report["runs"]
    for name in ("engine alone", "served", "static", "stream", "noop"):
        assert run[name]["tokens"] > 0
    assert run["stream"]["first"]["p50"] < run["stream"]["latency"]["p50"]
    assert run["noop"]["latency"]["p50"] < run["served"]["latency"]["p50"]
    (text,) = (path.read_text() for path in tmp_path.glob("server-*.md"))
    assert report["awake"] in text
    assert text.count("(aim: ") == (4 if report["awake"] else 3)  # a CPU quota forbids it


def test_report_without_cores_kept_awake_has_no_verdict_on_them() -> None:
    path = next((ROOT / "benchmarks" / "results").glob("server-*.json"))
    report = json.loads(path.read_text())
    report.pop("awake", None)
    assert server_report.markdown(report).count("(aim: ") == 3


def test_lone_requests_are_measured_where_cores_cannot_be_kept_awake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quota = tmp_path / "cpu.max"
    quota.write_text("100000 100000")
    monkeypatch.setattr(cores, "CPU_MAX", quota)
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda process: {0, 1})
    bench = server.Bench("cpu", 0.2)
    monkeypatch.setattr(bench, "_in_turn", lambda: {"noop": "measured"})
    assert bench.short() == {"noop": "measured"}
    assert not bench.awake
    assert "CPU quota" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ("No valid requests recorded within time interval. Please use a larger time window.", server_run.TooShort),
        ("error: Failed to init manager inputs", SystemExit),
    ],
)
def test_windows_in_which_nothing_was_answered_are_told_from_other_failures(
    said: str, error: type[SystemExit], tmp_path: Path
) -> None:
    analyzer = tmp_path / "perf_analyzer"
    analyzer.write_text(f"#!/bin/sh\necho '{said}'\nexit 99\n")
    analyzer.chmod(0o755)
    with pytest.raises(SystemExit, match=said.split(".")[0]) as raised:
        perf.analyze(analyzer, "127.0.0.1:1", "gpt", tmp_path / "rows.json", 2, [])
    assert type(raised.value) is error


def test_windows_are_made_longer_until_something_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def analysed(name: str, rows: list[list[int]], concurrency: int, interval: float) -> str:
        asked.append(interval)
        if interval < enough:
            raise server_run.TooShort("nothing")
        return "measured"

    bench = server.Bench("cpu", 0.2)
    monkeypatch.setattr(bench, "_analysed", analysed)
    enough = 3.0
    assert bench._served("served", [[5]], 2, 0.0) == "measured"
    assert asked == pytest.approx([0.2, 0.8, 3.2])
    enough = 1e9
    with pytest.raises(server_run.TooShort):
        bench._served("served", [[5]], 2, 0.0)
