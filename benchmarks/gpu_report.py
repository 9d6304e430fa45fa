"""The records of one run as tables, a plot and one JSON file: results/gpu-<name>.md, .svg, .json.

python -m benchmarks.gpu_report FILE... [--results FOLDER]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.gpu_models import MODELS, TINY
from benchmarks.gpu_records import OURS, Record, read

HERE = Path(__file__).parent
TITLES = {name: model.title for name, model in (MODELS | TINY).items()}
PRECISIONS = ("fp16", "int8", "fp32")
STEP = "decode step"
PLOTTED = ("big", "fp16", 24)  # model, precision, length of the plot


def main() -> None:
    made = argparse.ArgumentParser(prog="python -m benchmarks.gpu_report", description=__doc__.split("\n")[0])
    made.add_argument("files", nargs="+", type=Path, help="what --records of the other programs wrote")
    made.add_argument("--results", type=Path, default=HERE / "results", help="folder that takes the report")
    options = made.parse_args()
    conditions, records = read(options.files)
    for path in write(options.results, conditions, records):
        print(f"written: {path}")


def write(folder: Path, conditions: list[dict[str, Any]], records: list[Record]) -> list[Path]:
    """Writes the report of one GPU and returns what it wrote; SystemExit where the files are of several."""
    names = sorted({one["gpu"] for one in conditions})
    if len(names) != 1:
        raise SystemExit(f"one report is about one GPU; these files are of {', '.join(names) or 'none'}")
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / machine.file_name(names[0])
    quoted = Quoted()
    plot = stem.with_suffix(".svg")
    written = [stem.with_suffix(".json"), stem.with_suffix(".md")]
    if draw(plot, Figures(records), quoted):
        written.append(plot)
    contents = {"conditions": conditions, "records": [asdict(record) for record in records]}
    written[0].write_text(json.dumps(contents, indent=1) + "\n")
    written[1].write_text(markdown(conditions, Figures(records), quoted, plot.name if plot in written else None))
    return written


class Figures:
    """Records by what they are of."""

    def __init__(self, records: Iterable[Record]):
        self.records = list(records)

    def of(self, **wanted: object) -> list[Record]:
        return [one for one in self.records if all(getattr(one, name) == value for name, value in wanted.items())]

    def one(self, **wanted: object) -> Record | None:
        return next(iter(self.of(**wanted)), None)

    def engines(self, **wanted: object) -> list[str]:
        """In the order they came, this one's first."""
        return sorted(dict.fromkeys(record.engine for record in self.of(**wanted)), key=lambda name: name != OURS)

    def subjects(self, what: str) -> list[tuple[str, str]]:
        """Models and precisions that there is such a figure of, in the order that people expect."""
        found = {(one.model, one.precision) for one in self.records if one.what == what}
        return [(model, precision) for model in TITLES for precision in PRECISIONS if (model, precision) in found]


class Quoted(Figures):
    """Peers that need more than a Python package: measured once, not in this run."""

    def __init__(self) -> None:
        contents = json.loads((HERE / "quoted_peers.json").read_text())
        self.provenance: str = contents["provenance"]
        super().__init__(Record(**record) for record in contents["records"])


# Tables --------------------------------------------------------------------------------------------------------------


def markdown(conditions: list[dict[str, Any]], figures: Figures, quoted: Quoted, plot: str | None) -> str:
    sections = (
        _short(figures),
        _steps(figures, quoted),
        _reading(figures, quoted),
        _perplexity(figures, quoted),
        _requests(figures),
        _loop(figures),
        _loading(figures),
        _operations(figures),
    )
    lines = [f"# Decoding on a GPU: {conditions[0]['gpu']}", "", *_conditions(conditions), *_own_notes(figures)]
    if plot:
        lines += ["", f"![Microseconds a decode step of Transformer-big, against the batch]({plot})"]
    for section in sections:
        lines += ["", *section] if section else []
    return "\n".join(lines) + "\n"


def _conditions(conditions: list[dict[str, Any]]) -> list[str]:
    """What each program of the run ran on, for each precision; the last run of it."""
    rows = []
    for one in {(one["program"], *one.get("operations_a_second", ())): one for one in conditions}.values():
        rates = [f"copy {one['copy_bytes_a_second'] / 1e12:.2f} TB/s"] if "copy_bytes_a_second" in one else []
        products = one.get("operations_a_second", {})
        rates += [f"{precision} product {rate / 1e12:.0f} TFLOP/s" for precision, rate in products.items()]
        rest = {name: value for name, value in one.items() if name not in _NO_VERSIONS}
        rows.append([one["program"], one["date"], ", ".join(f"{n} {v}" for n, v in rest.items()), ", ".join(rates)])
    apart = (
        "Programs of different dates ran with the kernels of their day, perhaps on other cards, which differ by 4 %."
    )
    return [
        "Random weights; beam 4 and as many tokens as the source has; GPT-2: greedy, a prompt of 32 tokens, 32 more.",
        "Medians. A floor is the bytes that must be read and written (weights, and the caches that are read), once",
        "each, at the bandwidth of a 1 GiB device copy measured in the same run (reads and writes counted), or the",
        "arithmetic at the rate of a large product where that takes longer. Peers in the same run unless quoted.",
        *([apart] if len({one["date"] for one in conditions}) > 1 else []),
        "",
        *_table(["program", "date", "on", "measured there"], rows, left=4),
    ]


def _own_notes(figures: Figures) -> list[str]:
    """What a reader must know of our own figures, and which."""
    found: dict[str, dict[str, None]] = {}
    for one in figures.of(engine=OURS):
        if one.note:
            found.setdefault(one.note, {})[one.what.partition(":")[0]] = None  # of parts, the whole
    return ["", *(f"- {'; '.join(whats)}: {note}." for note, whats in found.items())] if found else []


_NO_VERSIONS = ("program", "date", "gpu", "copy_bytes_a_second", "operations_a_second")


def _short(figures: Figures) -> list[str]:
    """One line a model: what a README shows."""
    batches, rows = (1, 8, 32), []
    for model, precision in figures.subjects(STEP):
        for length in (24, 32):
            found = {
                batch: figures.one(engine=OURS, model=model, precision=precision, length=length, what=STEP, batch=batch)
                for batch in batches
            }
            if not any(found.values()):
                continue
            floor = next(one.more.get("weights_floor_us") for one in found.values() if one)
            cells = [_number(one.value) if one else "" for one in found.values()]
            rows.append([f"{TITLES[model]}, {length} tokens, {precision}", *cells, _number(floor)])
    if not rows:
        return []
    head = ["us a decode step", *(f"batch {batch}" for batch in batches), "floor, weights alone"]
    return ["## In short", "", *_table(head, rows)]


def _steps(figures: Figures, quoted: Quoted) -> list[str]:
    lines = []
    for model, precision in figures.subjects(STEP):
        subject = {"model": model, "precision": precision, "what": STEP}
        ours = figures.of(engine=OURS, **subject)
        places = sorted({(one.batch, one.length) for one in figures.of(**subject)})
        if not places:
            continue
        own = {(one.batch, one.length): one for one in ours}
        rows = [
            [f"**{OURS}**", *(_bold(own.get(place)) for place in places)],
            ["floor", *(_number(own[place].floor if place in own else None) for place in places)],
            ["of the floor reached", *(_share(own.get(place)) for place in places)],
        ]
        for label, source in (("", figures), (", quoted", quoted)):
            for engine in source.engines(**subject):
                if engine == OURS:
                    continue
                theirs = {(one.batch, one.length): one for one in source.of(engine=engine, **subject)}
                if not theirs.keys().isdisjoint(places):
                    rows.append([engine + label, *(_beside(theirs.get(place), own.get(place)) for place in places)])
        head = ["us", *(f"batch {batch}, {length}" for batch, length in places)]
        lines += ["", f"### {TITLES[model]}, {precision}", "", *_table(head, rows)]
    if not lines:
        return []
    lines += ["", *_served(figures), *_notes(figures, quoted)]
    return [
        "## A decode step, and peers beside",
        "",
        "By batch and source (or prompt) length, near the last token. In brackets: how many times this engine's time.",
        *lines,
    ]


def _served(figures: Figures) -> list[str]:
    lines = []
    for one in figures.records:
        if one.what.startswith(f"{STEP} with"):
            where = f"{TITLES[one.model]}, {one.precision}, batch {one.batch}, {one.length} tokens"
            lines += [f"With the room that serving takes unless told otherwise ({where}): {one.value:.0f} us.", ""]
    return lines


def _notes(figures: Figures, quoted: Quoted) -> list[str]:
    steps = [*figures.of(what=STEP), *quoted.of(what=STEP)]
    found = dict.fromkeys((one.engine, one.note) for one in steps if one.note and one.engine != OURS)
    notes = [f"- {engine}: {note}." for engine, note in found]
    return [f"Quoted: {quoted.provenance} What a step is of the peers:", "", *notes]


def _reading(figures: Figures, quoted: Quoted) -> list[str]:
    rows = []
    for what in ("encoder", "prompts"):
        for one in (one for subject in figures.subjects(what) for one in _of(figures, what, subject)):
            other = quoted.one(model=one.model, precision=one.precision, batch=one.batch, length=one.length, what=what)
            rows.append([
                *(TITLES[one.model], one.precision, one.batch, one.length, _number(one.value)),
                *(_number(one.more.get("device_ms")), _number(one.floor), _share(one)),
                f"{_beside(other, one)}" if other else "",
            ])  # fmt: skip
    head = ["model", "precision", "batch", "length", "ms", "on the device", "floor", "reached", "LightSeq 3.x, quoted"]
    if not rows:
        return []
    return [
        "## Encoder, prompts",
        "",
        "From the call until the device is done, and the device's part of it.",
        "",
        *_table(head, rows, left=2),
    ]


def _perplexity(figures: Figures, quoted: Quoted) -> list[str]:
    rows = []
    for subject in figures.subjects("perplexity"):
        for one in _of(figures, "perplexity", subject):
            place = {"model": one.model, "precision": one.precision, "batch": one.batch, "length": one.length}
            rows.append([
                *(TITLES[one.model], one.precision, f"**{OURS}**", _number(one.value)),
                *(_number(one.more.get("device_ms")), _number(one.floor), _share(one)),
            ])  # fmt: skip
            for label, source in (("", figures), (", quoted", quoted)):
                for other in source.of(what="perplexity", **place):
                    if other.engine != OURS:
                        rows.append(["", "", other.engine + label, _beside(other, one), "", "", ""])
    head = ["model", "precision", "", "ms", "on the device", "floor", "reached"]
    if not rows:
        return []
    return ["## Perplexity, 8 texts of 512 tokens", "", *_table(head, rows, left=3)]


def _requests(figures: Figures) -> list[str]:
    what, rows = "whole requests", []
    for subject in figures.subjects(what):
        for one in _of(figures, what, subject):
            parts = one.more["parts_ms"]
            place = {"model": one.model, "precision": one.precision, "batch": one.batch, "length": one.length}
            others = [other for other in figures.of(what=what, **place) if other.engine != OURS]
            rows.append([
                *(TITLES[one.model], one.precision, one.batch, one.length, _number(one.value), _number(parts)),
                f"{one.value / parts:.2f}", *(_beside(other, one) for other in others[:1]),
                *([""] if not others else []),
            ])  # fmt: skip
    head = ["model", "precision", "batch", "length", "ms", "encoder + tokens x step", "ratio", "Hugging Face"]
    if not rows:
        return []
    return ["## Whole requests", "", "From submitting to the answer.", "", *_table(head, rows, left=2)]


def _loop(figures: Figures) -> list[str]:
    what = "a burst in the loop"
    rows = [
        [
            *(TITLES[one.model], one.precision, one.batch, f"{one.more['steps']:.0f}", _number(one.value)),
            *(_number(one.more["device_us"]), _number(one.more["host_us"]), f"{one.more['busy_percent']:.1f} %"),
        ]
        for subject in figures.subjects(what)
        for one in _of(figures, what, subject)
    ]  # fmt: skip
    head = ["model", "precision", "batch", "steps", "us in the loop", "same steps alone", "host's work", "GPU busy"]
    if not rows:
        return []
    return [
        "## The engine's loop",
        "",
        "A burst of steps in the midst of a long decode, from burst to burst; the same steps queued back to back; what",
        "the host does for a burst when it need not wait. The GPU is busy for the second's share of the first.",
        "",
        *_table(head, rows, left=2),
    ]


def _loading(figures: Figures) -> list[str]:
    lines = []
    found = [one for one in figures.records if one.what.startswith("load, ")]
    runs = dict.fromkeys(one.what[len("load, ") :].split(": ")[0] for one in found)
    parts = dict.fromkeys(one.what.split(": ")[1] for one in found)
    rows = []
    for run in runs:
        seconds = {one.what.split(": ")[1]: one.value for one in found if one.what.startswith(f"load, {run}: ")}
        rows.append([run, *(f"{seconds[part]:.2f}" if part in seconds else "" for part in parts)])
    if rows:
        where = f"{TITLES[found[0].model]}, {found[0].precision}"
        lines += [f"{where}, from its file, in fresh processes, seconds:", "", *_table(["", *parts], rows), ""]
    kinds = ("load: weights in memory to the device", "load: engine and its graphs")
    subjects = figures.subjects(kinds[0])
    rows = [
        [
            TITLES[model],
            precision,
            *(_seconds(figures.one(model=model, precision=precision, what=kind)) for kind in kinds),
        ]
        for model, precision in subjects
    ]
    if rows:
        head = ["model", "precision", "weights to the device", "engine and its graphs"]
        lines += ["From arrays in memory, as the benchmarks ran (kernels compiled or not), seconds:", ""]
        lines += _table(head, rows, left=2)
    if not lines:
        return []
    return ["## Loading", "", *lines]


def _operations(figures: Figures) -> list[str]:
    lines = []
    whole = "all operations of a step"
    for model, precision in figures.subjects(whole):
        found = [one for one in figures.of(model=model, precision=precision) if one.what.startswith("operation ")]
        rows = []
        for what in dict.fromkeys(one.what for one in found):
            for one in (one for one in found if one.what == what):
                speed = (one.bytes or 0) / one.value / 1e3  # bytes a microsecond are MB a second
                stream = one.more.get("stream_us")
                rows.append([
                    *(what.removeprefix("operation "), f"{one.more['per_step']:.0f}", one.batch, f"{one.value:.2f}"),
                    *(f"{speed:.0f}", _share(one), f"{stream:.2f}" if stream else ""),
                    f"{stream / one.value:.0%}" if stream else "",
                ])  # fmt: skip
        for one in figures.of(model=model, precision=precision, what=whole):
            rows.append(["all of a step", "", one.batch, f"{one.value:.1f}", "", "", "", ""])
        head = ["operation", "calls a step", "rows", "us", "GB/s", "of a copy", "stream, us", "of the stream"]
        lines += ["", f"### {TITLES[model]}, {precision}, {_operation_length(found)}", "", *_table(head, rows)]
    if not lines:
        return []
    return [
        "## Operations of a decode step",
        "",
        "Each in a graph of many calls over different weights. `stream`: a chain of kernels in such a graph that only",
        "read those weights. Attention and what is small is read from the device's cache in part.",
        *lines,
    ]


def _operation_length(found: Sequence[Record]) -> str:
    return f"{found[0].length} source or prompt tokens, at the end of a request" if found else ""


def _of(figures: Figures, what: str, subject: tuple[str, str]) -> list[Record]:
    """This engine's, in the order of batches and lengths."""
    found = figures.of(engine=OURS, what=what, model=subject[0], precision=subject[1])
    return sorted(found, key=lambda one: (one.batch, one.length))


def _table(head: Sequence[Any], rows: Sequence[Sequence[Any]], left: int = 1) -> list[str]:
    rule = ["--"] * left + ["--:"] * (len(head) - left)
    return [f"| {' | '.join(map(str, row))} |" for row in (head, rule, *rows)]


def _number(value: float | None) -> str:
    """Three digits, or all before the point."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _bold(record: Record | None) -> str:
    return f"**{_number(record.value)}**" if record else ""


def _seconds(record: Record | None) -> str:
    return f"{record.value:.2f}" if record else ""


def _share(record: Record | None) -> str:
    return f"{record.floor / record.value:.0%}" if record and record.floor else ""


def _beside(record: Record | None, ours: Record | None) -> str:
    if record is None:
        return ""
    return f"{_number(record.value)} ({record.value / ours.value:.1f}x)" if ours else _number(record.value)


# The plot ------------------------------------------------------------------------------------------------------------


def draw(path: Path, figures: Figures, quoted: Quoted) -> bool:
    """Microseconds a step against the batch; whether there is a plot."""
    model, precision, length = PLOTTED
    subject = {"model": model, "precision": precision, "length": length, "what": STEP}
    ours = _of(figures, STEP, (model, precision))
    ours = [one for one in ours if one.length == length]
    if not ours:
        return False
    try:
        import matplotlib as mpl
    except ImportError:
        print("no plot: matplotlib is not installed")
        return False
    mpl.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    line: Callable[..., Any] = axes.plot
    for label, source, style in (("", figures, "-"), (" (quoted)", quoted, ":")):
        for engine in source.engines(**subject):
            found = sorted(source.of(engine=engine, **subject), key=lambda one: one.batch)
            width = 2.5 if engine == OURS else 1.2
            places = [one.batch for one in found], [one.value for one in found]
            line(*places, style, marker="o", markersize=4, linewidth=width, label=engine + label)
    line([one.batch for one in ours], [one.floor for one in ours], "--", color="black", label="floor")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([one.batch for one in ours], [str(one.batch) for one in ours])
    axes.set_xlabel(f"sentences, beam 4, {length} tokens each")
    axes.set_ylabel("microseconds a decode step")
    axes.set_title(f"{TITLES[model]}, {precision}")
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
    return True


if __name__ == "__main__":
    main()
