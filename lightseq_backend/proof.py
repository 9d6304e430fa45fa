"""Whether a converted model computes what its original does: the same ids to both, and the differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from lightseq_backend import ops, weights
from lightseq_backend.config import BEAM_SEARCH, Config, DecodingOptions, EngineConfig, GptConfig
from lightseq_backend.engine import Engine
from lightseq_backend.engine.buffers import allocate
from lightseq_backend.models.gpt import Gpt
from lightseq_backend.models.pack import Pack
from lightseq_backend.models.transformer import Transformer
from lightseq_backend.ops.slots import SEARCH

TOLERANCE = 2e-4  # of the largest absolute value; float32 sums in another order differ by a tenth of it
STEPS = 16  # tokens that are generated, at most
_LONGEST = 24  # ids of an input, at most
_ROOM = EngineConfig(slots=1, max_beam_size=1)


class Original(Protocol):
    """What export/original.py, export/original_fairseq.py and export/plain.py have."""

    def encode(self, ids: Sequence[int]) -> np.ndarray: ...

    def logits(self, ids: Sequence[int], grown: Sequence[int] = ()) -> np.ndarray: ...

    def greedy(self, ids: Sequence[int], steps: int) -> list[int]: ...


@dataclass
class Comparison:
    """Largest differences over all inputs, as shares of the largest absolute value there was.

    encoder  None for a model without one
    ties     generated texts that part where the original's two best scores are within the tolerance
    unlike   what both generated, where that is no excuse
    """

    inputs: int = 0
    encoder: float | None = None
    logits: float = 0.0
    ties: int = 0
    unlike: list[tuple[list[int], list[int], list[int]]] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        return max(self.encoder or 0.0, self.logits) <= TOLERANCE and not self.unlike

    def lines(self, what: str = "the original") -> list[str]:
        """As text; what: which computation this was compared with."""
        shown = [f"compared with {what} on {self.inputs} random inputs (tolerance {TOLERANCE:g}):"]
        if self.encoder is not None:
            shown.append(f"  encoder output      largest difference {self.encoder:.1e} of the largest value")
        shown.append(f"  first-step logits   largest difference {self.logits:.1e} of the largest value")
        same = f"{self.inputs - len(self.unlike)} of {self.inputs} the same"
        shown.append(f"  greedy ids          {same}{f', {self.ties} up to a tie' if self.ties else ''}")
        for ids, ours, theirs in self.unlike[:3]:
            shown.append(f"    {ids}: {ours} here, {theirs} there")
        return shown


def compare(path: str | Path, original: Original, inputs: int = 4, seed: int = 0, dialect: str = "head") -> Comparison:
    """Loads a weight file as serving does, on the CPU, and gives random ids to it and to the original."""
    probe = Probe(path, dialect)
    result = Comparison(encoder=None if probe.is_gpt else 0.0)
    for ids in random_inputs(probe.config, inputs, seed):
        result.inputs += 1
        if result.encoder is not None:
            result.encoder = max(result.encoder, _difference(probe.encode(ids), original.encode(ids)))
        result.logits = max(result.logits, _difference(probe.logits(ids), original.logits(ids)))
        steps = min(STEPS, probe.config.max_positions - len(ids) - 2) if probe.is_gpt else STEPS
        steps = min(steps, probe.limit(len(ids)))
        ours, theirs = probe.greedy(ids, steps), original.greedy(ids, steps)
        if ours != theirs:
            if _tied(original, ids, ours, theirs):
                result.ties += 1
            else:
                result.unlike.append((ids, ours, theirs))
    return result


def random_inputs(config: Config, count: int, seed: int) -> list[list[int]]:
    """Rows of ids of many lengths, without those that mean something to decoding."""
    random = np.random.default_rng(seed)
    special = {config.padding_id, config.end_id, *([] if isinstance(config, GptConfig) else [config.start_id])}
    usable = np.array([token for token in range(config.input_vocabulary) if token not in special])
    most = max(1, min(_LONGEST, config.max_positions // 2))
    rows: list[list[int]] = [random.choice(usable, random.integers(1, most + 1)).tolist() for _ in range(count)]
    return rows


class Probe:
    """A weight file's model on the CPU, one text at a time, with its inner results."""

    def __init__(self, path: str | Path, dialect: str = "head"):
        self._ops = ops.load("cpu")
        self._ops.start()
        self.config, arrays = weights.load(path, dialect)
        self.is_gpt = isinstance(self.config, GptConfig)
        made = Gpt if isinstance(self.config, GptConfig) else Transformer
        self._model = made(self.config, arrays, self._ops)  # type: ignore[arg-type]
        self._buffers = allocate(self._model, _ROOM, 1, self._ops)
        self._engine = Engine(self._model, _ROOM, self._ops)

    def encode(self, ids: Sequence[int]) -> np.ndarray:
        """The encoder's output, float32 [ids, hidden]; it is kept for `logits` as well."""
        pack, work = self._pack(ids), self._buffers.work.first(len(ids))
        assert isinstance(self._model, Transformer)
        self._model.prefill(pack, work, self._buffers.cache)
        return np.array(self._model.encoded(work))

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Scores of the first token after ids, or after the start token: float32 [vocabulary]."""
        work, head, logits = self._buffers.work, self._model.head, self._buffers.state.logits[:1]
        if isinstance(self._model, Gpt):
            self._model.read(self._pack(ids), work.first(len(ids)))
            x = work.x[len(ids) - 1 : len(ids)]
        else:
            self.encode(ids)
            record, one = self._buffers.state.slots[:1], work.first(1)
            record["method"], record["width"], record["memory"], record["memory_length"] = SEARCH, 1, 0, len(ids)
            for length, token in enumerate((self._model.config.start_id, self._model.config.forced_id)):
                if token is not None:
                    record["length"], record["token"] = length, token
                    self._model.step(np.zeros(1, np.int32), self._buffers.state.slots, one, self._buffers.cache)
            x = one.x
        self._ops.vocabulary_logits(x, head.norm, head.output, head.epsilon, head.scale, work.normed[:1], logits)
        return np.array(logits[0])

    def limit(self, length: int) -> int:
        """Tokens that an input of that length may grow in a search of the model's own."""
        return self.config.new_tokens(length, replace(DecodingOptions(), beam_size=1))

    def greedy(self, ids: Sequence[int], steps: int) -> list[int]:
        """What the engine generates with one beam, at most so many tokens. LightSeq's search has none of the rules that
        the file may have as defaults."""
        changes: dict[str, object] = {"sampling_method": BEAM_SEARCH, "beam_size": 1, "num_hypotheses": 1}
        if steps < 1:
            return []
        changes["max_new_tokens"] = steps
        tokens: list[int] = self._engine.answer([ids], changes=changes)[0].hypotheses[0].tokens.tolist()
        return tokens

    def _pack(self, ids: Sequence[int]) -> Pack:
        count = len(ids)
        columns, nothing = np.arange(count, dtype=np.int32), np.zeros(count, np.int32)
        starts = np.array([0, *[count] * count], np.int32)
        return Pack(
            tokens=np.array(ids, np.int32), positions=columns, targets=nothing, starts=starts, lanes=nothing,
            steps=columns,
        )  # fmt: skip


def _difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    if ours.shape != theirs.shape or not np.isfinite(ours).all():
        return float("inf")
    return float(np.abs(ours - theirs).max() / max(1e-30, np.abs(theirs).max()))


def _tied(original: Original, ids: Sequence[int], ours: list[int], theirs: list[int]) -> bool:
    """Whether two texts part at two tokens that the original scores alike."""
    place = next((i for i, pair in enumerate(zip(ours, theirs)) if pair[0] != pair[1]), None)
    if place is None:
        return False
    scores = original.logits(ids, ours[:place])
    return bool(abs(scores[ours[place]] - scores[theirs[place]]) <= TOLERANCE * np.abs(scores).max())
