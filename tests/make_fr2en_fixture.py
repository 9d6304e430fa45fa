"""Makes tests/fr2en/held_out.tsv: French, English and what transformers translates with the shipped weights, beam 4.

    python tests/make_fr2en_fixture.py build/fr2en

Needs the test.tsv that `python -m examples.fr2en` left there, whose first 500 pairs it takes, PyTorch and transformers.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from benchmarks import marian
from benchmarks.translator import BEAMS, MODEL, PAIRS, HuggingFace
from examples.fr2en.evaluate import read

SENTENCES = 500


def main() -> None:
    rows = read(Path(sys.argv[1]) / "test.tsv")[:SENTENCES]
    with tempfile.TemporaryDirectory() as folder:
        marian.save(MODEL, Path(folder) / "marian")
        texts = HuggingFace(Path(folder), "fp32", "cpu").translate([french for _, french, _ in rows], BEAMS)
    lines = [f"{french}\t{english}\t{text}\n" for (_, french, english), text in zip(rows, texts, strict=True)]
    PAIRS.parent.mkdir(exist_ok=True)
    PAIRS.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
