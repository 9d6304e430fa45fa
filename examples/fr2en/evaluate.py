"""BLEU and chrF of a model directory on held-out packages, through this engine.

python -m examples.fr2en.evaluate --model model_repository/fr2en --test build/fr2en/test.tsv
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import lightseq_backend


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True, help="lines of package, French and English")
    parser.add_argument("--beam", type=int, default=4, help="beams (default: 4)")
    parser.add_argument("--output", type=Path, help="takes the translations, a line each")
    options = parser.parse_args()
    rows = read(options.test)
    with lightseq_backend.load(options.model) as model:
        answers = [answer.text for answer in model.translate([french for _, french, _ in rows], beam_size=options.beam)]
    if options.output:
        options.output.write_text("".join(f"{answer}\n" for answer in answers), encoding="utf-8")
    print(json.dumps(scores(answers, [english for _, _, english in rows]), indent=1))
    for package, (count, bleu) in sorted(by_package(rows, answers).items(), key=lambda item: -item[1][1]):
        print(f"{bleu:6.1f}  {count:4}  {package}")


def read(file: Path) -> list[tuple[str, str, str]]:
    """(package, French, English) of every line."""
    rows = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()]
    return [(package, french, english) for package, french, english in rows]


def scores(answers: list[str], references: list[str]) -> dict[str, Any]:
    """sacrebleu's, with its signatures: case counts in "bleu", not in "bleu_lowercase"."""
    from sacrebleu.metrics import BLEU, CHRF

    kinds = {"bleu": BLEU(), "bleu_lowercase": BLEU(lowercase=True), "chrf": CHRF()}
    found: dict[str, Any] = {
        name: round(metric.corpus_score(answers, [references]).score, 2) for name, metric in kinds.items()
    }
    equal = sum(answer == reference for answer, reference in zip(answers, references, strict=True))
    found["exact_percent"] = round(100 * equal / len(references), 1)
    return found | {"sentences": len(references), "signature": str(kinds["bleu"].get_signature())}


def by_package(rows: list[tuple[str, str, str]], answers: list[str]) -> dict[str, tuple[int, float]]:
    """(sentences, BLEU) of each package."""
    from sacrebleu.metrics import BLEU

    groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for (package, _, english), answer in zip(rows, answers, strict=True):
        groups[package].append((answer, english))
    return {
        package: (len(pairs), BLEU().corpus_score([one for one, _ in pairs], [[other for _, other in pairs]]).score)
        for package, pairs in groups.items()
    }


if __name__ == "__main__":
    main()
