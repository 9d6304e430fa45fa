"""Trains the translator on what prepare.py made, as a MarianMT directory of Hugging Face.

    python -m examples.fr2en.train --data build/fr2en --output build/fr2en/trained --seconds 480 [--resume DIRECTORY]

Needs PyTorch and transformers, no network. Writes config.json, generation_config.json, the averaged weights in fp16,
training.json (settings, losses and validation BLEU over time) and training.log.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from examples.common import loop
from examples.fr2en.scores import bleu

END, UNKNOWN = 0, 1
LONGEST = 160  # positions of the model
SMOOTHING = 0.1
_WIDTHS = 4  # a batch's width is a multiple of it
_POOL = 30  # batches whose pairs are sorted by length together
_SCORED = 250  # validation pairs that are translated for BLEU
_GENERATED = 100  # tokens of a translation at most


@dataclass(frozen=True)
class Settings:
    """Sizes of the model and of a batch. tokens: of both sides, padding counted, in one step."""

    hidden: int = 256
    inner: int = 1024
    heads: int = 4
    encoder_layers: int = 6
    decoder_layers: int = 3
    dropout: float = 0.1
    tokens: int = 32_000
    rate: float = 1.5e-3
    warmup: int = 1000
    seed: int = 7


@dataclass(frozen=True)
class Batch:
    """source: [n, width], target: [n, other width], ids with END at the end and padding behind it."""

    source: Tensor
    target: Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="what prepare.py wrote")
    parser.add_argument("--output", type=Path, required=True, help="the directory that takes the model")
    parser.add_argument("--seconds", type=float, default=480, help="of training, evaluation included (default: 480)")
    parser.add_argument("--resume", type=Path, help="begin with the weights of what an earlier run wrote")
    for name, value in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"default: {value}")
    options = vars(parser.parse_args())
    data, output, seconds, resume = (options.pop(name) for name in ("data", "output", "seconds", "resume"))
    train(data, output, seconds, Settings(**options), resume)


def train(data: Path, output: Path, seconds: float, settings: Settings, resume: Path | None = None) -> None:
    loop.seed(settings.seed)
    # Its attention makes a plan for every new shape, and hardly two batches have the same: half a second a step.
    torch.backends.cuda.enable_cudnn_sdp(False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = list(json.loads((data / "vocab.json").read_text(encoding="utf-8")))
    with np.load(data / "tokens.npz") as arrays:
        training, validation = (Pairs.of(arrays, part, len(names) - 1, device) for part in ("training", "validation"))
    model = marian(settings, len(names))
    if resume is not None:
        earlier = type(model).from_pretrained(resume, torch_dtype=torch.float32)
        model.load_state_dict(earlier.state_dict())
    model.to(device)
    schedule = loop.Schedule(
        seconds=seconds, rate=settings.rate, warmup=settings.warmup, evaluate_every=0.08, averaged=3
    )
    trained = loop.train(
        model,
        training.batches(settings.tokens, np.random.default_rng(settings.seed)),
        lambda batch: loss(model, batch, SMOOTHING),
        lambda: evaluate(model, validation, names),
        schedule,
        output / "training.log",
    )
    model.half().save_pretrained(output, max_shard_size="12MB")
    facts: dict[str, Any] = {
        "settings": asdict(settings),
        "resumed": _facts_of(resume),
        "schedule": asdict(schedule),
        "parameters": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "pairs": len(training),
        "steps": trained.steps,
        "seconds": trained.seconds,
        "scores": trained.scores,
        "curves": trained.curves,
    }
    (output / "training.json").write_text(json.dumps(facts, indent=1))


def _facts_of(run: Path | None) -> dict[str, Any] | None:
    """What an earlier run says of itself."""
    return None if run is None else json.loads((run / "training.json").read_text())  # type: ignore[no-any-return]


def marian(settings: Settings, vocabulary: int) -> Any:
    """A new MarianMTModel: post-norm, one embedding for both sides and the output; padding is its last id."""
    from transformers import MarianConfig, MarianMTModel

    layers = {"encoder_layers": settings.encoder_layers, "decoder_layers": settings.decoder_layers}
    sizes = {
        f"{side}_{size}": value
        for side in ("encoder", "decoder")
        for size, value in (("attention_heads", settings.heads), ("ffn_dim", settings.inner))
    }
    config = MarianConfig(
        vocab_size=vocabulary,
        decoder_vocab_size=vocabulary,
        d_model=settings.hidden,
        max_position_embeddings=LONGEST,
        activation_function="relu",
        dropout=settings.dropout,
        attention_dropout=0.0,
        activation_dropout=0.0,
        init_std=settings.hidden**-0.5,  # embeddings are multiplied by sqrt(hidden)
        scale_embedding=True,
        share_encoder_decoder_embeddings=True,
        tie_word_embeddings=True,
        pad_token_id=vocabulary - 1,
        decoder_start_token_id=vocabulary - 1,
        eos_token_id=END,
        bos_token_id=END,
        forced_eos_token_id=END,
        attn_implementation="sdpa",
        **layers,
        **sizes,
    )
    model = MarianMTModel(config)
    _initialise(model)
    model.generation_config.update(bad_words_ids=[[vocabulary - 1]], num_beams=4, max_length=LONGEST - 32)
    return model


def _initialise(model: Any) -> None:
    """Matrices of layers uniform after Glorot; the embedding keeps its hidden ** -0.5."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "layers" in name:
            torch.nn.init.xavier_uniform_(parameter)


@dataclass(frozen=True)
class Side:
    """One language's texts. ids: end to end, on the device; starts, lengths: [texts], on the host."""

    ids: Tensor
    starts: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, ids: np.ndarray, lengths: np.ndarray, device: torch.device) -> Side:
        lengths = lengths.astype(np.int64)
        return cls(torch.from_numpy(ids.astype(np.int32)).to(device), np.cumsum(lengths) - lengths, lengths)

    def rows(self, chosen: np.ndarray, padding: int) -> Tensor:
        """[chosen, width]: these texts, gathered on the device, which the host does not wait for."""
        width = _width(int(self.lengths[chosen].max()))
        host = torch.from_numpy(np.stack([self.starts[chosen], self.lengths[chosen]]))
        if self.ids.is_cuda:
            host = host.pin_memory()
        starts, lengths = host.to(self.ids.device, non_blocking=True)
        places = torch.arange(width, device=self.ids.device)
        inside = places < lengths[:, None]
        index = torch.where(inside, starts[:, None] + places, 0)
        return torch.where(inside, self.ids[index], padding).long()


def _width(longest: Any) -> Any:
    """The next multiple of _WIDTHS, which attention's kernels want."""
    return -(-longest // _WIDTHS) * _WIDTHS


@dataclass(frozen=True)
class Pairs:
    """All pairs of a part: French, English and what fills their rows up."""

    source: Side
    target: Side
    padding: int

    @classmethod
    def of(cls, arrays: Any, part: str, padding: int, device: torch.device) -> Pairs:
        sides = (
            Side.of(arrays[f"{part}_{language}"], arrays[f"{part}_{language}_lengths"], device)
            for language in ("french", "english")
        )
        return cls(*sides, padding)

    def __len__(self) -> int:
        return len(self.source.lengths)

    def batch(self, chosen: np.ndarray) -> Batch:
        return Batch(self.source.rows(chosen, self.padding), self.target.rows(chosen, self.padding))

    def batches(self, tokens: int, draw: np.random.Generator) -> Iterator[Batch]:
        """Without end: each epoch shuffled, pairs of like lengths together, batches in any order."""
        while True:
            plan = self._plan(tokens, draw)
            for index in draw.permutation(len(plan)):
                yield self.batch(plan[index])

    def _plan(self, tokens: int, draw: np.random.Generator) -> list[np.ndarray]:
        """Indices of one epoch's batches: pairs sorted by width and length within pools of _POOL batches."""
        order = draw.permutation(len(self))
        pool = 1 + int(_POOL * tokens / float((self.source.lengths + self.target.lengths).mean()))
        plan: list[np.ndarray] = []
        for start in range(0, len(order), pool):
            part = order[start : start + pool]
            widths = -(-self.source.lengths[part] // _WIDTHS)
            plan += self._cut(part[np.lexsort((self.target.lengths[part], widths))], tokens)
        return plan

    def _cut(self, order: np.ndarray, tokens: int) -> Iterator[np.ndarray]:
        """`order` in runs that hold at most `tokens` once padded; at least one pair each."""
        start = 0
        while start < len(order):
            lengths = [side.lengths[order[start : start + tokens]] for side in (self.source, self.target)]
            widths = sum(_width(np.maximum.accumulate(each)) for each in lengths)
            held = widths * np.arange(1, len(lengths[0]) + 1)
            count = max(1, int(np.searchsorted(held, tokens, side="right")))
            yield order[start : start + count]
            start += count


def loss(model: Any, batch: Batch, smoothing: float) -> Tensor:
    """Mean cross-entropy of a target token, END counted and padding not, after the right ones before it."""
    padding = model.config.pad_token_id
    return functional.cross_entropy(
        logits(model, batch).flatten(0, 1).float(),
        batch.target.flatten(),
        ignore_index=padding,
        label_smoothing=smoothing,
    )


def logits(model: Any, batch: Batch) -> Tensor:
    """[n, target width, vocabulary]. The masks are made here, so that nothing asks the device what they hold."""
    padding = model.config.pad_token_id
    seen = torch.zeros(batch.source.shape, device=batch.source.device, dtype=_working(model))
    seen = seen.masked_fill(batch.source == padding, torch.finfo(seen.dtype).min)[:, None, None, :]
    before = functional.pad(batch.target[:, :-1], (1, 0), value=padding)
    output = model(
        input_ids=batch.source,
        attention_mask=seen,
        decoder_input_ids=before,
        use_cache=False,
    )
    return output.logits


def _working(model: Any) -> torch.dtype:
    return torch.bfloat16 if torch.is_autocast_enabled() else model.dtype


def evaluate(model: Any, pairs: Pairs, names: list[str]) -> dict[str, float]:
    """loss: mean cross-entropy of a token of all pairs, without smoothing; bleu: of greedy translations of some."""
    total, tokens = 0.0, 0
    for chosen in np.array_split(np.arange(len(pairs)), max(1, len(pairs) // 250)):
        count = int(pairs.target.lengths[chosen].sum())
        total += loss(model, pairs.batch(chosen), 0.0).item() * count
        tokens += count
    some = pairs.batch(np.arange(min(_SCORED, len(pairs))))
    given = model.generate(
        some.source,
        attention_mask=(some.source != pairs.padding).long(),
        num_beams=1,
        do_sample=False,
        max_length=_GENERATED,
    )
    return {"loss": total / tokens, "bleu": bleu(_texts(given, names), _texts(some.target, names))}


def _texts(ids: Tensor, names: list[str]) -> list[str]:
    """Rows of ids as text, up to END."""
    texts = []
    for row in ids.tolist():
        row = row[1:] if row[0] == len(names) - 1 else row  # generate begins with the decoder's start
        row = row[: row.index(END)] if END in row else row
        texts.append("".join(names[index] for index in row).replace("▁", " ").strip())
    return texts


if __name__ == "__main__":
    main()
