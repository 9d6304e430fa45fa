"""Makes what the GPT is trained on, from Debian's packages: text, tokenizer, token ids.

    python -m examples.gpt.prepare [--output build/gpt]

Writes under --output: debs/ (what was downloaded), packages.tsv, test.txt (documents of the packages held out, a blank
line between two) and data/, which is all that training reads: training.xz, validation.npy, data.json, and the
tokenizer of the model to come.
"""

from __future__ import annotations

import argparse
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np

from examples.gpt import gather

PACKAGES = Path(__file__).with_name("packages.tsv")
SEED = 7
VOCABULARY = 6_400
END = "<|endoftext|>"  # id 0: between two documents, as in GPT-2's own training
TOKENIZER_CONFIG = {"tokenizer_class": "GPT2TokenizerFast", "bos_token": END, "eos_token": END, "unk_token": END}
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 3, "lp": 1, "pb": 1}]  # of two bytes a token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, default=PACKAGES)
    parser.add_argument("--output", type=Path, default=Path("build/gpt"))
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    output: Path = arguments.output
    archives = gather.download(gather.read_packages(arguments.packages), output / "debs")
    corpus = gather.corpus(archives, arguments.seed, arguments.workers)
    gather.write_packages(output / "packages.tsv", sorted(corpus.packages, key=lambda one: one.package))
    texts = {part: ["\n".join(paragraphs) for paragraphs in documents] for part, documents in corpus.documents.items()}
    np.random.default_rng(arguments.seed).shuffle(texts["training"])
    (output / "test.txt").write_text("\n\n".join(texts["test"]) + "\n", encoding="utf-8")
    write(texts["training"], texts["validation"], output / "data", arguments.seed)


def write(training: list[str], validation: list[str], folder: Path, seed: int) -> None:
    """The folder that training reads."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = trained_tokenizer(training)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG, indent=1) + "\n")
    ids = {"training": encode(tokenizer, training), "validation": encode(tokenizer, validation)}
    (folder / "training.xz").write_bytes(lzma.compress(ids["training"].tobytes(), filters=_FILTERS))
    np.save(folder / "validation.npy", ids["validation"])
    numbers = {
        "seed": seed,
        "vocabulary": tokenizer.get_vocab_size(),
        "end_id": tokenizer.token_to_id(END),
        "training": counts(training, ids["training"]),
        "validation": counts(validation, ids["validation"]),
    }
    (folder / "data.json").write_text(json.dumps(numbers, indent=1) + "\n")
    print(json.dumps(numbers))


def trained_tokenizer(texts: list[str]) -> Any:
    """Byte-level BPE, cut into words as GPT-2's; a text that is encoded as a prompt begins with END."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return tokenizer


def encode(tokenizer: Any, texts: list[str]) -> np.ndarray:
    """uint16 [tokens]: END, and behind every document END again."""
    end = tokenizer.token_to_id(END)
    parts = [np.array([end], np.uint16)]
    for begin in range(0, len(texts), 1_000):
        for encoding in tokenizer.encode_batch(texts[begin : begin + 1_000], add_special_tokens=False):
            parts.append(np.array([*encoding.ids, end], np.uint16))
    return np.concatenate(parts)


def counts(texts: list[str], ids: np.ndarray) -> dict[str, int]:
    return {
        "documents": len(texts),
        "bytes": sum(len(text.encode()) + 1 for text in texts),  # END counts as one
        "words": sum(len(text.split()) for text in texts),
        "tokens": len(ids) - 1,
    }


def read_training(folder: Path) -> np.ndarray:
    """uint16 [tokens] of training.xz"""
    return np.frombuffer(lzma.decompress((folder / "training.xz").read_bytes()), np.uint16)


if __name__ == "__main__":
    main()
