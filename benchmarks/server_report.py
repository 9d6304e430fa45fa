"""The report of `make bench-server`: JSON, and tables with what was aimed at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.server_models import LATER, NOOP, NOOP_LATER, SERVED, STATIC, STREAM

ENGINE_SHARE, GAIN, ADDED_MS = 0.9, 1.5, 0.5  # aims: of the engine's tokens/s, over static batches, beyond the no-op
ENGINE, AWAKE = "engine alone", ", cores awake"


def write(folder: Path, report: dict[str, Any]) -> list[Path]:
    """Writes both files, named after the processor or the GPU."""
    stem = folder / f"server-{machine.file_name(report['machine'].get('gpu'))}"
    folder.mkdir(parents=True, exist_ok=True)
    written = [stem.with_suffix(".json"), stem.with_suffix(".md")]
    written[0].write_text(json.dumps(report, indent=1) + "\n")
    written[1].write_text(markdown(report))
    return written


def markdown(report: dict[str, Any]) -> str:
    where, load = report["machine"], report["load"]
    title = where.get("gpu", f"{where['processor']}, {where['cores']} cores")
    lines = [
        f"# The server's share: {title}",
        "",
        f"{load['model']} (hidden {load['hidden']}, FFN {load['inner']}, {load['heads']} heads, {load['layers']}+"
        f"{load['layers']} layers, vocabulary {load['vocabulary']}), random weights, {load['beams']} beams, "
        f"{load['slots']} slots; sources of {' to '.join(map(str, load['tokens of a source, least to most']))} tokens, "
        f"log-normal, {load['tokens of a source, mean']:.1f} on average, each answered with as many. "
        f"perf_analyzer over gRPC on the same machine, {report['seconds']:g} s each or more, medians of "
        f"{report['repeats']}; load average {where['load_average_1min']} in the end; {where['date']}.",
        "",
        "Tokens a second of the best hypotheses. Static is the same engine behind Triton's dynamic batching: a batch "
        "waits for its longest. In brackets the share by the processor time of the engine's process.",
        "",
        "| under way | engine alone | served | share | static | served / static |",
        "|--:|--:|--:|--:|--:|--:|",
        *(_throughput(run) for run in report["runs"]),
        "",
        "Milliseconds to the answer, and to the first token of a greedy stream (p50, p95, p99), and the cores in "
        "use: by the engine alone, and when served by the models' processes, Triton and perf_analyzer.",
        "",
        "| under way | engine alone | served | static | first token | no-op | no-op, requests/s | cores |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|",
        *(_latency(run) for run in report["runs"]),
        "",
        *_verdicts(report),
    ]
    return "\n".join(lines) + "\n"


def _throughput(run: dict[str, Any]) -> str:
    engine, served, static = (run[name]["tokens"] for name in (ENGINE, SERVED, STATIC))
    # Tokens by processor time of the engine's process: what other processes take of the cores is not in that.
    engine_time, served_time = run[ENGINE]["cores"]["engine"], run[SERVED]["cores"]["models"]
    by_time = served / served_time / (engine / engine_time)
    share, gain = f"{served / engine:.0%} ({by_time:.0%})", f"{served / static:.2f}"
    return f"| {run['concurrency']} | {engine:.0f} | {served:.0f} | {share} | {static:.0f} | {gain} |"


def _latency(run: dict[str, Any]) -> str:
    cells = [_three(run[name]["latency"]) for name in (ENGINE, SERVED, STATIC)]
    cells += [_three(run[STREAM]["first"]), _three(run[NOOP]["latency"]), f"{run[NOOP]['requests']:.0f}"]
    cores = run[ENGINE]["cores"] | run[SERVED]["cores"]
    cells.append(", ".join(f"{cores[name]:.2f}" for name in ("engine", "models", "triton", "callers")))
    return f"| {run['concurrency']} | " + " | ".join(cells) + " |"


def _three(latency: dict[str, float]) -> str:
    return ", ".join(f"{value:.3g}" if value < 1000 else f"{value:.0f}" for value in latency.values())


def _verdicts(report: dict[str, Any]) -> list[str]:
    busiest = max(report["runs"], key=lambda run: float(run[ENGINE]["tokens"]))
    share = busiest[SERVED]["tokens"] / busiest[ENGINE]["tokens"]
    gain = busiest[SERVED]["tokens"] / busiest[STATIC]["tokens"]
    verdicts = [
        f"- At {busiest['concurrency']} under way the server gives {share:.0%} of the engine's tokens "
        f"(aim: {ENGINE_SHARE:.0%}; {_met(share >= ENGINE_SHARE)}).",
        f"- There it gives {gain:.2f} times what static batches do (aim: {GAIN}; {_met(gain >= GAIN)}).",
        _added(report["short"], "", "One short request at a time"),
    ]
    if how := report.get("awake"):
        verdicts.append(_added(report["short"], AWAKE, f"With cores kept awake ({how}) it"))
    return verdicts


def _added(short: dict[str, Any], ending: str, title: str) -> str:
    """What serving adds to a lone request; ending: of the names in `short`."""
    engine, served, noop, later = (
        short[name + ending]["latency"]["p50"] for name in (ENGINE, SERVED, NOOP, NOOP_LATER)
    )
    pause = LATER * 1e3
    added, triton = served - engine, later - pause
    return (
        f"- {title} takes {served:.2f} ms, the engine alone {engine:.2f}, a no-op {noop:.2f}: {added:.2f} ms are "
        f"added, {added - noop:.2f} beyond the no-op (aim: {ADDED_MS}; {_met(added <= noop + ADDED_MS)}). To a no-op "
        f"that answers {pause:g} ms later, as models that take others meanwhile do, Triton adds {triton:.2f}; beyond "
        f"that it is {added - triton:.2f} ({_met(added <= triton + ADDED_MS)})."
    )


def _met(holds: bool) -> str:
    return "met" if holds else "MISSED"
