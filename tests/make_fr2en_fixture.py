"""Makes tests/fr2en/held_out.tsv: French, English and what transformers translates with the shipped weights, beam 4.

    python tests/make_fr2en_fixture.py build/fr2en

Needs what `python -m examples.fr2en` left there, PyTorch and transformers. Takes 500 pairs of the held-out packages.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.translator import BEAMS, PAIRS, HuggingFace
from examples.fr2en.evaluate import read

SENTENCES = 500


def main() -> None:
    data = Path(sys.argv[1])
    rows = read(data / "test.tsv")[:SENTENCES]
    texts = HuggingFace(data / "trained", "fp32", "cpu").translate([french for _, french, _ in rows], BEAMS)
    lines = [f"{french}\t{english}\t{text}\n" for (_, french, english), text in zip(rows, texts, strict=True)]
    PAIRS.parent.mkdir(exist_ok=True)
    PAIRS.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
