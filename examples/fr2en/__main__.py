"""From nothing to a model directory: gather, prepare, train, convert, evaluate.

python -m examples.fr2en --data build/fr2en
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from examples.fr2en import gather, prepare, train

MODEL = Path("model_repository/fr2en")
TOKENIZER = ("source.spm", "target.spm", "vocab.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("build/fr2en"), help="default: build/fr2en")
    parser.add_argument("--seconds", type=float, default=480, help="of training (default: 480, meant for a GPU)")
    parser.add_argument("--model", type=Path, default=MODEL, help="what is replaced (default: %(default)s)")
    options = parser.parse_args()
    data: Path = options.data
    gather.gather(gather.listed(), data)
    prepare.prepare(data)
    train.train(data, data / "trained", options.seconds, train.Settings())
    convert(data)
    shutil.copytree(data / "fr2en", options.model, dirs_exist_ok=True)
    test = ["--model", str(options.model), "--test", str(data / "test.tsv")]
    subprocess.run([sys.executable, "-m", "examples.fr2en.evaluate", *test], check=True)


def convert(data: Path) -> None:
    """DATA/trained, with its tokenizer, as the model directory DATA/fr2en."""
    for name in TOKENIZER:
        shutil.copy(data / name, data / "trained" / name)
    shutil.rmtree(data / "fr2en", ignore_errors=True)
    command = [sys.executable, "-m", "lightseq_backend", "convert", str(data / "trained"), str(data / "fr2en")]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
