"""Perplexity of a Hugging Face GPT-2 directory on held-out text, by PyTorch in float32.

    python -m examples.gpt.evaluate [--model build/gpt/model] [--text build/gpt/test.txt]
    python -m examples.gpt.evaluate --fixture tests/gpt_en.json --paragraphs 200

The first prints it by token, word and byte; the second writes what `tests/test_gpt_en.py` compares the engine with.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from examples.gpt import prepare

_AT_ONCE = 8  # windows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("build/gpt/model"))
    parser.add_argument("--tokenizer", type=Path, default=Path("build/gpt/data/tokenizer.json"))
    parser.add_argument("--text", type=Path, default=Path("build/gpt/test.txt"))
    parser.add_argument("--seed", type=int, default=prepare.SEED)
    parser.add_argument("--paragraphs", type=int, default=200, help="of the fixture")
    parser.add_argument("--fixture", type=Path, help="write this file, and nothing else")
    arguments = parser.parse_args()
    model, tokenizer = load(arguments.model, arguments.tokenizer)
    documents = arguments.text.read_text(encoding="utf-8").strip().split("\n\n")
    if arguments.fixture is None:
        print(json.dumps(measured(model, tokenizer, documents), indent=1))
        return
    paragraphs = [paragraph for document in documents for paragraph in document.splitlines()]
    chosen = random.Random(arguments.seed).sample(paragraphs, arguments.paragraphs)
    arguments.fixture.write_text(json.dumps(scored(model, tokenizer, chosen), indent=0) + "\n", encoding="utf-8")


def load(model: Path, tokenizer: Path) -> tuple[Any, Any]:
    from tokenizers import Tokenizer
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(model, dtype=torch.float32).eval(), Tokenizer.from_file(str(tokenizer))


def measured(model: Any, tokenizer: Any, documents: list[str]) -> dict[str, float]:
    """Of whole documents, END behind each counted; a window begins with END and holds as much as the model takes."""
    end, positions = tokenizer.token_to_id(prepare.END), model.config.n_positions
    windows = []
    for encoding in tokenizer.encode_batch(documents, add_special_tokens=False):
        ids = [*encoding.ids, end]
        windows += [[end, *ids[first : first + positions - 1]] for first in range(0, len(ids), positions - 1)]
    total = sum(log_probability for log_probability, _ in log_probabilities(model, windows))
    tokens = sum(len(window) - 1 for window in windows)
    words, size = (sum(counts) for counts in zip(*((len(d.split()) + 1, len(d.encode()) + 1) for d in documents)))
    return {
        "documents": len(documents),
        "tokens": tokens,
        "words": words,
        "bytes": size,
        "perplexity_per_token": math.exp(-total / tokens),
        "perplexity_per_word": math.exp(-total / words),
        "bits_per_byte": -total / size / math.log(2),
    }


def scored(model: Any, tokenizer: Any, texts: list[str]) -> list[dict[str, Any]]:
    """Each text with its ids, END in front, and the sum of the log-probabilities of all but that one."""
    rows = [tokenizer.encode(text).ids for text in texts]
    kept = [(text, row) for text, row in zip(texts, rows) if len(row) <= model.config.n_positions]
    found = dict(sorted((place, total) for total, place in log_probabilities(model, [row for _, row in kept])))
    return [{"text": text, "ids": row, "log_probability": found[place]} for place, (text, row) in enumerate(kept)]


@torch.no_grad()
def log_probabilities(model: Any, rows: list[list[int]]) -> Iterator[tuple[float, int]]:
    """(sum over the row's ids after the first, number of the row), rows of like length together; sums in float64."""
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
    for begin in range(0, len(order), _AT_ONCE):
        places = order[begin : begin + _AT_ONCE]
        longest = len(rows[places[-1]])
        ids = torch.tensor([rows[place] + [0] * (longest - len(rows[place])) for place in places])
        every = model(ids).logits[:, :-1].log_softmax(dim=-1).gather(2, ids[:, 1:, None])[:, :, 0].double()
        for place, row in zip(places, every):
            yield float(row[: len(rows[place]) - 1].sum()), place


if __name__ == "__main__":
    main()
