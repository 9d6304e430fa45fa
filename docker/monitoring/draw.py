"""Draws the panels of grafana/dashboard.json from a running Prometheus: a picture where no Grafana is at hand.

usage: python docker/monitoring/draw.py http://127.0.0.1:9090 picture.png [minutes]    (needs matplotlib)
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

DASHBOARD = Path(__file__).parent / "grafana" / "dashboard.json"
POINTS = 180  # a line
COLUMNS = 3
UNITS = {"s": "seconds", "bytes": "bytes", "reqps": "1/s"}


def main(server: str, picture: str, minutes: str = "5") -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = json.loads(DASHBOARD.read_text())["panels"]
    figure, axes = pyplot.subplots(math.ceil(len(panels) / COLUMNS), COLUMNS, figsize=(18, 18), layout="constrained")
    now = time.time()
    for panel, axis in zip(panels, axes.flat, strict=True):
        for target in panel["targets"]:
            for labels, times, values in series(server, target["expr"], now - 60 * float(minutes), now):
                axis.plot([t - now for t in times], values, label=legend(target["legendFormat"], labels))
        axis.set_title(panel["title"])
        axis.set_ylabel(UNITS.get(panel["fieldConfig"]["defaults"]["unit"], ""))
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=6, framealpha=0.4, ncols=2)
        else:
            axis.text(0.5, 0.5, "no data", ha="center", transform=axis.transAxes)
    figure.supxlabel("seconds before now")
    figure.savefig(picture, dpi=60)


def series(server: str, expression: str, start: float, end: float) -> list[tuple[dict[str, str], list[float], Any]]:
    """(labels, times, values) of each line that Prometheus has for a panel's expression."""
    expression = expression.replace("$__rate_interval", "20s").replace("$model", ".*")
    query = {"query": expression, "start": start, "end": end, "step": (end - start) / POINTS}
    url = f"{server}/api/v1/query_range?{urllib.parse.urlencode(query)}"
    with urllib.request.urlopen(url, timeout=30) as answer:
        result = json.load(answer)["data"]["result"]
    return [
        (line["metric"], [moment for moment, _ in line["values"]], [float(value) for _, value in line["values"]])
        for line in result
    ]


def legend(template: str, labels: dict[str, str]) -> str:
    return re.sub(r"{{(\w+)}}", lambda name: labels.get(name[1], ""), template)


if __name__ == "__main__":
    main(*sys.argv[1:])
