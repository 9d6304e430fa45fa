"""Makes what training reads from the gathered catalogues: pairs in three parts, SentencePiece models, ids.

    python -m examples.fr2en.prepare --data build/fr2en

Writes training.tsv.xz, validation.tsv and test.tsv (package, French, English), source.spm, target.spm and vocab.json
as MarianMT has them, and tokens.npz, the ids of the training and validation pairs.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from examples.fr2en import catalogues, clean

VOCABULARY = 5998  # pieces of both languages together, <unk> among them; </s> and <pad> come to them
LONGEST_TOKENS = 120  # a pair with a longer side is not trained on
SEED = 7
_TEST, _VALIDATION = 3000, 2000  # pairs
_OF_ONE_PACKAGE = 150  # pairs of one package in test or validation
_PART_OF_HASH = {"test": range(5), "validation": range(5, 8)}  # of 100
_SHARE_IDENTICAL = 0.02  # of training pairs, those whose sides are equal
_OF_ONE_TEXT = 3  # training pairs with the same text on one side
_FAMILY = re.compile(r"^lib(?=\w{3})|[-.]?\d[\d.]*|-(data|common|l10n|i18n|locales|client|core|gtk|qt)\b")
# What the tokenizer must never cut.
_CODES = ["%s", "%d", "%u", "%i", "%lu", "%ld", "%c", "%x", "%f", "%1", "%2", "%3", "%4", "%1$s", "%2$s", "%3$s"]


@dataclass(frozen=True)
class Pair:
    package: str
    french: str
    english: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="where gather put the catalogues")
    prepare(parser.parse_args().data)


def prepare(data: Path, vocabulary: int = VOCABULARY) -> None:
    parts = split(read(data / "catalogues"))
    for name, pairs in parts.items():
        lines = "".join(f"{pair.package}\t{pair.french}\t{pair.english}\n" for pair in pairs)
        if name == "training":
            (data / "training.tsv.xz").write_bytes(lzma.compress(lines.encode()))
        else:
            (data / f"{name}.tsv").write_text(lines, encoding="utf-8")
        words = sum(len(pair.english.split()) for pair in pairs)
        packages = len({pair.package for pair in pairs})
        print(f"{name}: {len(pairs)} pairs of {packages} packages, {words} English words")
    train_tokenizer(parts["training"], data, vocabulary)
    tokenize(parts, data)


def read(folder: Path) -> list[Pair]:
    """Every distinct pair, with the package that has it first, in the packages' order."""
    pairs: dict[tuple[str, str], str] = {}
    for file in sorted(folder.glob("*/*.mo")):
        for english, french in catalogues.messages(file.read_bytes()):
            for pair in clean.pairs(english, french):
                pairs.setdefault(pair, file.parent.name)
    return [Pair(package, french, english) for (french, english), package in pairs.items()]


def part_of(package: str) -> str:
    """training, validation or test: by the hash of what packages of one program share in their names."""
    family = _FAMILY.sub("", package)
    number = zlib.crc32(f"{SEED} {family}".encode()) % 100
    return next((part for part, numbers in _PART_OF_HASH.items() if number in numbers), "training")


def split(pairs: list[Pair]) -> dict[str, list[Pair]]:
    """Pairs by part. Validation and test share no package and, on neither side, a text with training or each other.

    Texts that differ in case, signs and format codes alone count as one (clean.key).
    """
    draw = random.Random(SEED)
    parts: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        parts[part_of(pair.package)].append(pair)
    taken = {clean.key(text) for pair in parts["training"] for text in (pair.french, pair.english)}
    result = {"training": _levelled(parts["training"], draw)}
    for part, size in (("validation", _VALIDATION), ("test", _TEST)):
        result[part] = _held_out(parts[part], taken, size, draw)
        taken |= {clean.key(text) for pair in parts[part] for text in (pair.french, pair.english)}
    return result


def _levelled(pairs: list[Pair], draw: random.Random) -> list[Pair]:
    """Training pairs, shuffled: few with equal sides, and no text more than _OF_ONE_TEXT times on its side."""
    pairs = draw.sample(pairs, len(pairs))
    identical = int(_SHARE_IDENTICAL * len(pairs))
    french: Counter[str] = Counter()
    english: Counter[str] = Counter()
    kept = []
    for pair in pairs:
        if pair.french == pair.english:
            identical -= 1
            if identical < 0:
                continue
        french[pair.french] += 1
        english[pair.english] += 1
        if max(french[pair.french], english[pair.english]) <= _OF_ONE_TEXT:
            kept.append(pair)
    return kept


def _held_out(pairs: list[Pair], taken: set[str], size: int, draw: random.Random) -> list[Pair]:
    """`size` pairs of new texts at most, at most _OF_ONE_PACKAGE a package, no French text twice."""
    seen = set(taken)
    of_package: Counter[str] = Counter()
    kept = []
    for pair in draw.sample(pairs, len(pairs)):
        keys = {clean.key(pair.french), clean.key(pair.english)}
        if len(keys) == 1 or keys & seen or of_package[pair.package] == _OF_ONE_PACKAGE:
            continue
        seen |= keys
        of_package[pair.package] += 1
        kept.append(pair)
    return kept[:size]


def train_tokenizer(pairs: list[Pair], data: Path, vocabulary: int) -> None:
    """One SentencePiece model of both languages, as source.spm and target.spm, and vocab.json beside them."""
    import sentencepiece

    rules = data / "spellings.tsv"
    rules.write_text("".join(f"{_codes(one)}\t{_codes(other)}\n" for one, other in sorted(clean.SPELLINGS.items())))
    with (data / "source.spm").open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([text for pair in pairs for text in (pair.french, pair.english)]),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocabulary,
            character_coverage=0.9998,
            normalization_rule_tsv=str(rules),
            user_defined_symbols=_CODES,
            bos_id=-1,
            eos_id=-1,
            minloglevel=1,
        )
    (data / "target.spm").write_bytes((data / "source.spm").read_bytes())
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(data / "source.spm"))
    names = ["</s>", "<unk>", *(pieces.id_to_piece(index) for index in range(1, len(pieces))), "<pad>"]
    (data / "vocab.json").write_text(
        json.dumps({name: index for index, name in enumerate(names)}, ensure_ascii=False, indent=0), encoding="utf-8"
    )


def _codes(text: str) -> str:
    return " ".join(f"{ord(sign):X}" for sign in text)


def tokenize(parts: dict[str, list[Pair]], data: Path) -> None:
    """tokens.npz: PART_SIDE, the ids of all texts, each ended by </s>, and PART_SIDE_lengths."""
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(data / "source.spm"))
    arrays = {}
    for part in ("training", "validation"):
        french = [_ids(text) for text in pieces.encode([pair.french for pair in parts[part]])]
        english = [_ids(text) for text in pieces.encode([pair.english for pair in parts[part]])]
        fits = [max(len(one), len(other)) <= LONGEST_TOKENS for one, other in zip(french, english, strict=True)]
        for side, texts in (("french", french), ("english", english)):
            kept = [text for text, fit in zip(texts, fits, strict=True) if fit]
            arrays[f"{part}_{side}"] = np.concatenate([np.array(text, np.uint16) for text in kept])
            arrays[f"{part}_{side}_lengths"] = np.array([len(text) for text in kept], np.uint8)
        print(f"{part}: {sum(fits)} pairs, {sum(map(len, french))} and {sum(map(len, english))} tokens")
    np.savez_compressed(data / "tokens.npz", **arrays)


def _ids(pieces: Iterable[int]) -> list[int]:
    """vocab.json's ids of SentencePiece's: its <unk> (0) is 1 there, and the rest move by one; </s> (0) at the end."""
    return [*(piece + 1 for piece in pieces), 0]


if __name__ == "__main__":
    main()
