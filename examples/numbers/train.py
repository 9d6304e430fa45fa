"""Trains both models of the model repository and writes their weights and vocabularies: `make train`.

    python -m examples.numbers.train [--output model_repository] [--threads 2]

Every draw is seeded. Training takes a few minutes on two cores; the scores printed at the end are those of numbers
that training never saw.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.numbers import data
from examples.numbers.model import Counter, Translator
from lightseq_backend import weights
from lightseq_backend.config import TOPK, DecodingOptions, GptConfig, TransformerConfig

SEED = 2019
HERE = Path(__file__).parent
PADDING = 0
_CHUNK = 32  # batches that are sorted by length together, so that little of a batch is padding


@dataclass(frozen=True)
class Schedule:
    """examples are drawn once and gone through in random order, `batch` a step; the rate rises, then falls to zero."""

    examples: int
    steps: int
    batch: int
    rate: float
    smoothing: float = 0.0


# Smoothing keeps some probability on wrong words: a beam's second to fourth hypotheses then mean something.
TRANSLATOR = Schedule(examples=200_000, steps=1_500, batch=192, rate=2e-3, smoothing=0.05)
COUNTER = Schedule(examples=40_000, steps=1_700, batch=64, rate=1.5e-3)

# What the model reads and the ids it should answer, of which PADDING is not asked for.
Example = tuple[list[int], list[int]]
Logits = Callable[[Tensor, Tensor], Tensor]  # (inputs [batch, n], wanted [batch, m]) -> [batch, m, vocabulary]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("model_repository"), help="gets transformer/ and gpt/")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train_translator(options.output / "transformer")
    train_counter(options.output / "gpt")


def train_translator(output: Path) -> None:
    """French numbers to English: transformer.pb, source.vocab.txt, target.vocab.txt; and the pairs for testing."""
    source, target = data.translator_vocabularies()
    split = data.split_numbers(SEED, TRANSLATOR.examples)
    held_out = [(data.french(n), data.english(n)) for n in split.held_out]
    _write_pairs(HERE / "held_out.tsv", held_out)
    examples = [(source.encode(data.french(n)), target.encode(data.english(n))) for n in split.training]
    tests = [(source.encode(french), target.encode(english)) for french, english in held_out]

    config = TransformerConfig(
        hidden=128,
        inner=256,
        heads=4,
        encoder_layers=2,
        decoder_layers=2,
        source_vocabulary=len(source),
        target_vocabulary=len(target),
        max_positions=64,
        padding_id=PADDING,
        start_id=target.id(data.START),
        end_id=target.id(data.END),
        extra_decode_length=16,  # "mille cent un" grows from 3 words to 6; no number grows by more than 4
        activation="relu",
        decoding=DecodingOptions(beam_size=4, length_penalty=0.6),
    )
    torch.manual_seed(SEED)
    model = Translator(config)

    def logits(sources: Tensor, wanted: Tensor) -> Tensor:
        starts = torch.full_like(wanted[:, :1], config.start_id)
        return model(sources, torch.cat([starts, wanted[:, :-1]], dim=1))

    train("translator", model, logits, examples, TRANSLATOR)
    print(f"translator: {exact_share(logits, tests):.2%} of {len(tests)} held-out numbers exact, without a beam")
    output.mkdir(parents=True, exist_ok=True)
    (output / "source.vocab.txt").write_text(source.file(), encoding="utf-8")
    (output / "target.vocab.txt").write_text(target.file(), encoding="utf-8")
    weights.save(output / "transformer.pb", config, model.arrays())


def train_counter(output: Path) -> None:
    """Counting on in English: gpt.pb and vocab.txt; and the prompts for testing."""
    vocabulary = data.counter_vocabulary()
    prompts = data.counting_prompts(SEED, 500)
    _write_pairs(HERE / "counting.tsv", prompts)
    config = GptConfig(
        hidden=128,
        inner=512,
        heads=4,
        layers=3,
        vocabulary=len(vocabulary),
        max_positions=128,
        padding_id=PADDING,
        end_id=vocabulary.id(data.END),
        decoding=DecodingOptions(TOPK, top_k=1),  # a plain request counts right, and the same each time
    )
    texts = data.counting_texts(SEED, COUNTER.examples)
    start = [vocabulary.id(data.START)]
    # One text in five comes without <s>, so that a client may leave it out.
    coded = [([] if i % 5 == 0 else start) + vocabulary.encode(text) for i, text in enumerate(texts)]
    coded = [ids[: config.max_positions + 1] for ids in coded]
    examples = [(ids[:-1], ids[1:]) for ids in coded]
    tests = [_continuation(vocabulary, *pair) for pair in prompts]
    torch.manual_seed(SEED)
    model = Counter(config)

    def logits(ids: Tensor, _: Tensor) -> Tensor:
        return model(ids)

    train("counter", model, logits, examples, COUNTER)
    share = exact_share(logits, tests)
    print(f"counter: {share:.2%} of {len(tests)} held-out prompts counted exactly to the next ten, greedily")
    output.mkdir(parents=True, exist_ok=True)
    (output / "vocab.txt").write_text(vocabulary.file(), encoding="utf-8")
    weights.save(output / "gpt.pb", config, model.arrays())


def train(name: str, model: nn.Module, logits: Logits, examples: list[Example], schedule: Schedule) -> None:
    """Minimises the cross-entropy of what is wanted."""
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{name}: {parameters:,} parameters, {len(examples):,} examples, {schedule.steps} steps", flush=True)
    optimiser = torch.optim.AdamW(model.parameters(), lr=schedule.rate, betas=(0.9, 0.98), weight_decay=0.01)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimiser, schedule.rate, schedule.steps, pct_start=0.1)
    began, cpu_began = time.monotonic(), time.process_time()
    batches = _batches(examples, schedule.batch)
    for step in range(1, schedule.steps + 1):
        inputs, wanted = next(batches)
        loss = functional.cross_entropy(
            logits(inputs, wanted).flatten(0, 1),
            wanted.flatten(),
            ignore_index=PADDING,
            label_smoothing=schedule.smoothing,
        )
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        rates.step()
        if step % 100 == 0:
            print(f"{name}: step {step}, loss {loss.item():.4f}, {time.monotonic() - began:.0f} s", flush=True)
    seconds, cpu_seconds = time.monotonic() - began, time.process_time() - cpu_began
    print(f"{name}: trained in {seconds:.0f} s, {cpu_seconds:.0f} s of CPU time", flush=True)


@torch.no_grad()
def exact_share(logits: Logits, tests: list[Example]) -> float:
    """Share of the tests that greedy decoding answers exactly, first id to last.

    One pass over the right answers tells: decoding gives an answer if and only if each of its ids is the most
    probable one after those before it.
    """
    right = 0
    for begin in range(0, len(tests), 100):
        inputs, wanted = _matrices(tests[begin : begin + 100])
        hits = (logits(inputs, wanted).argmax(dim=-1) == wanted) | (wanted == PADDING)
        right += int(hits.all(dim=1).sum())
    return right / len(tests)


def _continuation(vocabulary: data.Vocabulary, prompt: str, rest: str) -> Example:
    """A test of the counter: of the whole text only what follows the prompt is asked for."""
    ids = [vocabulary.id(data.START), *vocabulary.encode(f"{prompt} {rest}")]
    said = 1 + len(prompt.split())
    return ids[:-1], [PADDING] * (said - 1) + ids[said:]


def _batches(examples: list[Example], batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches in random order; neighbours in length go together."""
    while True:
        order = torch.randperm(len(examples)).tolist()
        for begin in range(0, len(order) - batch * _CHUNK + 1, batch * _CHUNK):
            chunk = sorted(order[begin : begin + batch * _CHUNK], key=lambda i: len(examples[i][0]))
            for number in torch.randperm(_CHUNK).tolist():
                yield _matrices([examples[i] for i in chunk[number * batch : (number + 1) * batch]])


def _matrices(examples: list[Example]) -> tuple[Tensor, Tensor]:
    inputs, wanted = (
        nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=PADDING)
        for rows in zip(*examples, strict=True)
    )
    return inputs, wanted


def _write_pairs(path: Path, pairs: list[tuple[str, str]]) -> None:
    path.write_text("".join(f"{given}\t{answer}\n" for given, answer in pairs), encoding="utf-8")


if __name__ == "__main__":
    main()
