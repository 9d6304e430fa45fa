"""Beam search at Transformer-base size: this engine beside Hugging Face and CTranslate2 on the same weights.

    python -m benchmarks.models [--repeats N] [--results FOLDER]

Engines take turns, a translation each, N times over; medians are reported. Time a step = (time for 24 tokens - time
for 1 token) / 23, which leaves out the encoder and what every call costs once.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine, transformer_base
from benchmarks.peers import PEERS
from benchmarks.transformer_base import BEAMS, CONFIG, NEW_TOKENS, SENTENCES, SOURCE_TOKENS
from benchmarks.worker import Worker

OURS, HUGGING_FACE, CTRANSLATE2, GEMMS = "this engine", "Hugging Face", "CTranslate2", "GEMMs alone"
THREADS = "2"
SETTINGS = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
ALLOWED_MEMORY = 300 * 2**20  # beside weights and arena
WANTED_SPEED = 1.3  # times Hugging Face's
MODEL = (
    f"Transformer-base: {CONFIG.encoder_layers}+{CONFIG.decoder_layers} layers, hidden {CONFIG.hidden}, "
    f"FFN {CONFIG.inner}, {CONFIG.heads} heads, vocabulary {CONFIG.vocabulary}, pre-norm, {CONFIG.activation}, "
    f"random weights, fp32; {SENTENCES} sources of {SOURCE_TOKENS} tokens, beam {BEAMS}, exactly {NEW_TOKENS} "
    f"tokens generated, {THREADS} threads"
)


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "transformer.pb"
        transformer_base.write(path)
        report = {"machine": machine.describe(), "model": MODEL, "repeats": arguments.repeats, "runs": []}
        for environment in _environments():
            report["runs"].append(_measure(path, environment, arguments.repeats))
    text = _markdown(report)
    print(text)
    arguments.results.mkdir(parents=True, exist_ok=True)
    stem = arguments.results / f"models-{machine.file_name()}"
    stem.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    stem.with_suffix(".md").write_text(text)
    print(f"written: {stem}.json, {stem}.md")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=9, help="translations of each engine (default: 9)")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder for the report")
    return parser.parse_args()


def _environments() -> list[dict[str, str | None]]:
    """The OpenBLAS settings to measure with: those of this environment and, if there are any, none."""
    threads: dict[str, str | None] = {"OMP_NUM_THREADS": THREADS, "OPENBLAS_NUM_THREADS": THREADS}
    given = {name: value for name, value in os.environ.items() if name in SETTINGS}
    settings = [{**threads, **given}]
    return [*settings, {**threads, **dict.fromkeys(given)}] if given else settings


def _measure(path: Path, environment: dict[str, str | None], repeats: int) -> dict[str, Any]:
    names = [OURS, HUGGING_FACE, GEMMS]
    if importlib.util.find_spec("ctranslate2"):
        names.insert(2, CTRANSLATE2)
    sources = transformer_base.sources()
    with ExitStack() as stack:
        made_of = (path, BEAMS, SENTENCES)
        workers = {name: stack.enter_context(Worker(PEERS[name], made_of, environment)) for name in names}
        agreement = _agreement(workers, sources)
        seconds: dict[str, dict[int, list[float]]] = {name: {1: [], NEW_TOKENS: []} for name in names}
        others: list[float] = []
        for worker in workers.values():
            worker.ask("translate", sources, NEW_TOKENS, BEAMS)
        for _ in range(repeats):
            for name, worker in workers.items():
                for tokens, taken in seconds[name].items():
                    machine.wait_until_idle(patience=1)
                    busy = machine.busy_seconds()
                    wall, processor = worker.ask("time", sources, tokens, BEAMS)
                    taken.append(wall)
                    others.append((machine.busy_seconds() - busy - processor) / wall / (os.cpu_count() or 1))
        ours = workers[OURS]
        return {
            "openblas_settings": {key: value for key, value in environment.items() if value and key in SETTINGS},
            "numpy_blas": ours.ask("blas"),
            "others_share_of_cores": [max(0.0, share) for share in statistics.quantiles(others, n=10)][4::4],
            "engines": {name: _figures(taken) for name, taken in seconds.items()},
            "agreement": agreement,
            "memory": {**ours.ask("sizes"), "peak": ours.ask("peak_memory")},
        }


def _agreement(workers: dict[str, Worker], sources: np.ndarray) -> dict[str, Any]:
    """How far the engines compute the same function. Log-probabilities of ids that are never chosen are left out."""
    ours = workers[OURS]
    beams, greedy = (ours.ask("translate", sources, NEW_TOKENS, width) for width in (BEAMS, 1))
    found: dict[str, Any] = {}
    for name in (HUGGING_FACE, CTRANSLATE2):
        if name in workers:
            theirs = (workers[name].ask("translate", sources, NEW_TOKENS, width) for width in (BEAMS, 1))
            equal = [int((a == b).all(axis=2).sum()) for a, b in zip((beams, greedy), theirs, strict=True)]
            found[name] = {
                "equal_beam_hypotheses": [equal[0], SENTENCES * BEAMS],
                "equal_greedy_texts": [equal[1], SENTENCES],
            }
    here, there = (workers[name].ask("probe", sources) for name in (OURS, HUGGING_FACE))
    for probe in (here, there):
        probe["first_step"] = np.delete(probe["first_step"], [CONFIG.padding_id, CONFIG.end_id], axis=1)
    for name in here:
        found[HUGGING_FACE][f"{name}_largest_difference"] = float(np.abs(here[name] - there[name]).max())
        found[HUGGING_FACE][f"{name}_standard_deviation"] = float(there[name].std())
    return found


def _figures(taken: dict[int, list[float]]) -> dict[str, Any]:
    steps = [(whole - once) / (NEW_TOKENS - 1) * 1e3 for whole, once in zip(taken[NEW_TOKENS], taken[1], strict=True)]
    total = statistics.median(taken[NEW_TOKENS])
    return {
        "ms_a_step": statistics.median(steps),
        "ms_a_step_fastest": min(steps),
        "ms_a_step_slowest": max(steps),
        "total_ms": total * 1e3,
        "first_token_ms": statistics.median(taken[1]) * 1e3,
        "tokens_a_second": SENTENCES * NEW_TOKENS / total,
    }


# The report ----------------------------------------------------------------------------------------------------------


def _markdown(report: dict[str, Any]) -> str:
    where = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in where["packages"].items() if version)
    lines = [
        "# Beam search on the CPU",
        "",
        f"{report['model']}.",
        "",
        f"{where['processor']}, {where['cores']} cores, load average {where['load_average_1min']} at the start; "
        f"Python {where['python']}, {versions}; {where['date']}.",
        "",
        f"Medians of {report['repeats']} translations of each engine, taking turns, after warming up; each engine in "
        f"a process of its own. A step is (time for {NEW_TOKENS} tokens - time for 1) / {NEW_TOKENS - 1}; its fastest "
        "and slowest are beside it. Tokens of the best hypotheses are counted. The processes of Hugging Face and "
        "CTranslate2 do not depend on the OpenBLAS settings: what differs between the tables there is noise.",
    ]
    for run in report["runs"]:
        lines += ["", *_run_lines(run)]
    return "\n".join(lines) + "\n"


def _run_lines(run: dict[str, Any]) -> list[str]:
    settings = ", ".join(f"{key}={value}" for key, value in run["openblas_settings"].items())
    engines, memory = run["engines"], run["memory"]
    lines = [
        f"## NumPy on {run['numpy_blas']} ({settings or 'no OpenBLAS settings'})",
        "",
        "| | ms a step | fastest - slowest | first token, ms | total, ms | tokens/s |",
        "|--|--:|--:|--:|--:|--:|",
    ]
    for name, one in engines.items():
        start = f"| {name} | {one['ms_a_step']:.1f} | {one['ms_a_step_fastest']:.1f} - {one['ms_a_step_slowest']:.1f} |"
        whole = f" {one['first_token_ms']:.0f} | {one['total_ms']:.0f} | {one['tokens_a_second']:.0f} |"
        lines.append(start + (" | | |" if name == GEMMS else whole))
    middle, high = run["others_share_of_cores"]
    lines += ["", f"Meanwhile other processes used {middle:.0%} of the cores (median; {high:.0%} in the worst tenth)."]
    step, total = (engines[HUGGING_FACE][key] / engines[OURS][key] for key in ("ms_a_step", "total_ms"))
    verdict = "met" if min(step, total) >= WANTED_SPEED else "MISSED"
    speed = f"{step:.2f} times as fast as Hugging Face a step, {total:.2f} times in all"
    lines += ["", f"{speed} (wanted: {WANTED_SPEED}; {verdict})."]
    used = memory["peak"] - memory["weights"] - memory["arena"]
    verdict = "met" if used <= ALLOWED_MEMORY else "MISSED"
    lines += [
        "",
        f"Peak memory of this engine's process {_mib(memory['peak'])} = weights {_mib(memory['weights'])} + arena "
        f"{_mib(memory['arena'])} {'+' if used >= 0 else '-'} {_mib(abs(used))} (allowed: + {_mib(ALLOWED_MEMORY)}; "
        f"{verdict}). Pages of the arena count once they are touched.",
        "",
        *(_agreement_line(name, one) for name, one in run["agreement"].items()),
    ]
    return lines


def _agreement_line(name: str, one: dict[str, Any]) -> str:
    beam, greedy = one["equal_beam_hypotheses"], one["equal_greedy_texts"]
    text = (
        f"{name}: {beam[0]} of {beam[1]} beam hypotheses and {greedy[0]} of {greedy[1]} greedy texts have the same ids."
    )
    if "encoder_largest_difference" in one:
        text += (
            f" Largest difference: {one['encoder_largest_difference']:.1e} in the encoder's output (whose standard "
            f"deviation is {one['encoder_standard_deviation']:.2f}), {one['first_step_largest_difference']:.1e} in the "
            f"first step's log-probabilities (standard deviation {one['first_step_standard_deviation']:.2f})."
        )
    return text


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"


if __name__ == "__main__":
    main()
