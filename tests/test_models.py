"""Encoder output and logits of both models against a float64 recomputation of the whole text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import small_models
from reference import GptReference, TransformerReference

from lightseq_backend.config import DIALECTS, EngineConfig
from lightseq_backend.engine.buffers import Buffers, allocate
from lightseq_backend.errors import WeightError
from lightseq_backend.models.gpt import Gpt
from lightseq_backend.models.pack import Pack
from lightseq_backend.models.transformer import Transformer
from lightseq_backend.ops import cpu as ops
from lightseq_backend.ops.slots import SEARCH

TOLERANCE = 5e-5
SLOTS = 8

TRANSFORMERS: dict[str, dict[str, Any]] = {
    "pre-norm relu": {},
    "pre-norm gelu": {"activation": "gelu"},
    "post-norm relu": {"post_norm": True},
    "post-norm gelu unscaled": {"post_norm": True, "activation": "gelu", "scaled_embedding": False},
    "unscaled": {"scaled_embedding": False},
    "deep encoder": {"encoder_layers": 3},
    "deep decoder": {"decoder_layers": 3},
    "one head": {"heads": 1},
    "a head a feature": {"heads": 16},
    "odd sizes": {"hidden": 35, "heads": 5, "inner": 19, "encoder_layers": 2, "decoder_layers": 2},
    "inner smaller than hidden": {"inner": 3},
    "v0 epsilon": {"dialect": DIALECTS["v0"]},
    "threaded products": {"hidden": 96, "inner": 1400, "heads": 3},
    "own epsilon": {"norm_epsilon": 1e-2},
    "first sublayer without a norm": {"post_norm": True, "first_norm": False, "activation": "silu"},
    "pre-norm, first sublayer without a norm": {"first_norm": False, "encoder_layers": 2, "decoder_layers": 2},
    "norm of the embeddings": {"embedding_norm": True, "activation": "gelu_erf"},
    "untied": {"untied": True, "scaled_embedding": False},
    "decoder post-norm": {"decoder_post_norm": True, "encoder_layers": 2, "decoder_layers": 2},
    "decoder post-norm without a first norm": {"decoder_post_norm": True, "decoder_first_norm": False},
    "encoder post-norm": {
        "post_norm": True,
        "first_norm": False,
        "decoder_post_norm": False,
        "decoder_first_norm": True,
    },
    "norm of the target's embeddings": {"decoder_embedding_norm": True},
    "norm of the source's embeddings": {"embedding_norm": True, "decoder_embedding_norm": False},
    "encoder without a final norm": {"encoder_final_norm": False, "encoder_layers": 2},
    "decoder without a final norm": {"decoder_final_norm": False, "decoder_layers": 2},
}
SOURCES = {
    "no padding": [3, 4, 5, 6, 7],
    "one token": [3],
    "padding right": [3, 4, 5, 0, 0, 0],
    "padding left": [0, 0, 3, 4, 5],
    "padding inside": [3, 0, 4, 0, 0, 5],
    "padding everywhere": [0, 3, 0, 4, 0],
    "full context": [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 1, 2],
    "start and end ids": [1, 2, 2, 1],
}
TARGET = [5, 1, 9, 0, 2, 5, 5]


@dataclass
class Run:
    """A model with memory of its own, fed by hand."""

    model: Any
    buffers: Buffers

    @classmethod
    def of(cls, model: Any) -> Run:
        ops.start()
        return cls(model, allocate(model, EngineConfig(slots=SLOTS, max_beam_size=1), 1, ops))

    def prefill(self, texts: list[tuple[list[int], list[int], int]]) -> np.ndarray:
        """Reads packed (tokens, positions, lane) in one pass; what a decoder then reads, or a head."""
        lengths = [len(tokens) for tokens, _, _ in texts]
        pack = Pack(
            tokens=np.array([token for tokens, _, _ in texts for token in tokens], np.int32),
            positions=np.array([position for _, positions, _ in texts for position in positions], np.int32),
            lanes=np.array([lane for tokens, _, lane in texts for _ in tokens], np.int32),
            steps=np.array([step for length in lengths for step in range(length)], np.int32),
            targets=np.zeros(sum(lengths), np.int32),
            starts=np.cumsum([0, *lengths]).astype(np.int32),
        )
        work = self.buffers.work.first(len(pack.tokens))
        self.model.prefill(pack, work, self.buffers.cache)
        return (self.model.encoded(work) if isinstance(self.model, Transformer) else work.normed).copy()

    def step(self, lanes: list[int]) -> np.ndarray:
        """Logits of one step over those lanes."""
        rows = np.array(lanes, np.int32)
        work, head, slots = self.buffers.work.first(len(rows)), self.model.head, self.buffers.state.slots
        self.model.step(rows, slots, work, self.buffers.cache)
        logits = self.buffers.state.logits[: len(rows)]
        ops.vocabulary_logits(work.x, head.norm, head.output, head.epsilon, head.scale, work.normed, logits)
        return logits.copy()

    def occupy(self, lane: int, token: int, length: int, memory_length: int = 0) -> None:
        record = self.buffers.state.slots[lane : lane + 1]
        record["method"], record["width"], record["token"], record["length"] = SEARCH, 1, token, length
        record["memory"], record["memory_length"] = lane, memory_length
        self.buffers.cache.ancestors[lane, :length] = lane

    def advance(self, lane: int, token: int) -> None:
        record = self.buffers.state.slots[lane : lane + 1]
        record["token"] = token
        record["length"] += 1


def _kept(row: list[int]) -> tuple[list[int], list[int]]:
    columns = [column for column, token in enumerate(row) if token != 0]
    return [row[column] for column in columns], columns


@pytest.mark.parametrize("settings", TRANSFORMERS.values(), ids=TRANSFORMERS)
def test_encoder_output_equals_recomputation_with_masked_padding(settings: dict[str, Any]) -> None:
    config, arrays = small_models.transformer(1, **settings)
    run = Run.of(Transformer(config, arrays, ops))
    output = run.prefill([(*_kept(row), lane) for lane, row in enumerate(SOURCES.values())])
    wanted = [TransformerReference(config, arrays, row) for row in SOURCES.values()]
    np.testing.assert_allclose(output, np.concatenate([one.memory[one.real] for one in wanted]), atol=TOLERANCE)


@pytest.mark.parametrize("settings", TRANSFORMERS.values(), ids=TRANSFORMERS)
def test_decoder_logits_equal_recomputation_of_the_whole_text(settings: dict[str, Any]) -> None:
    config, arrays = small_models.transformer(2, **settings)
    run = Run.of(Transformer(config, arrays, ops))
    sources = [_kept(row) for row in SOURCES.values()]
    run.prefill([(*source, lane) for lane, source in enumerate(sources)])
    for lane, (tokens, _) in enumerate(sources):
        run.occupy(lane, config.start_id, 0, len(tokens))
    lanes = list(range(len(sources)))
    steps = [run.step(lanes)]
    for token in TARGET:
        for lane in lanes:
            run.advance(lane, token)
        steps.append(run.step(lanes))
    logits = np.stack(steps, axis=1)
    wanted = np.stack([TransformerReference(config, arrays, row).logits(TARGET) for row in SOURCES.values()])
    np.testing.assert_allclose(logits, wanted, atol=TOLERANCE * np.abs(wanted).max())


GPTS: dict[str, dict[str, Any]] = {
    "gelu": {},
    "relu": {"activation": "relu"},
    "one layer": {"layers": 1},
    "odd sizes": {"hidden": 35, "heads": 5, "inner": 19, "layers": 3},
    "v0 epsilon": {"dialect": DIALECTS["v0"]},
    "own epsilon": {"norm_epsilon": 1e-2},
    "gelu_erf": {"activation": "gelu_erf"},
    "threaded products": {"hidden": 96, "inner": 1400, "heads": 3},
    "without a final norm": {"final_norm": False},
}
PROMPTS = [[3], [4, 5], [6, 7, 8, 9, 10], [1, 1, 1], [2, 0, 2, 0, 2]]


@pytest.mark.parametrize("settings", GPTS.values(), ids=GPTS)
def test_gpt_logits_equal_recomputation_of_the_whole_text(settings: dict[str, Any]) -> None:
    config, arrays = small_models.gpt(3, **settings)
    run = Run.of(Gpt(config, arrays, ops))
    # The prompts but their last tokens, which the first step feeds.
    run.prefill([(prompt[:-1], list(range(len(prompt) - 1)), lane) for lane, prompt in enumerate(PROMPTS)])
    for lane, prompt in enumerate(PROMPTS):
        run.occupy(lane, prompt[-1], len(prompt) - 1)
    lanes = list(range(len(PROMPTS)))
    steps = [run.step(lanes)]
    for token in TARGET:
        for lane in lanes:
            run.advance(lane, token)
        steps.append(run.step(lanes))
    for lane, prompt in enumerate(PROMPTS):
        wanted = GptReference(config, arrays).logits([*prompt, *TARGET])[len(prompt) - 1 :]
        ours = np.stack([logits[lane] for logits in steps])
        np.testing.assert_allclose(ours, wanted, atol=TOLERANCE * np.abs(wanted).max())


def test_gpt_read_equals_recomputation_of_the_whole_text() -> None:
    config, arrays = small_models.gpt(4, hidden=24, heads=3)
    run = Run.of(Gpt(config, arrays, ops))
    texts = [[3, 4, 5], [9], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0, 1]]
    lengths = [len(text) for text in texts]
    pack = Pack(
        tokens=np.concatenate(texts).astype(np.int32),
        positions=np.concatenate([np.arange(length) for length in lengths]).astype(np.int32),
        lanes=np.zeros(sum(lengths), np.int32),
        steps=np.zeros(sum(lengths), np.int32),
        targets=np.zeros(sum(lengths), np.int32),
        starts=np.cumsum([0, *lengths]).astype(np.int32),
    )
    work, head = run.buffers.work.first(len(pack.tokens)), run.model.head
    logits = np.empty((len(pack.tokens), config.vocabulary), np.float32)
    run.model.read(pack, work)
    ops.vocabulary_logits(work.x, head.norm, head.output, head.epsilon, head.scale, work.normed, logits)
    wanted = np.concatenate([GptReference(config, arrays).logits(text) for text in texts])
    np.testing.assert_allclose(logits, wanted, atol=TOLERANCE * np.abs(wanted).max())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_named(bad: float) -> None:
    config, arrays = small_models.gpt()
    arrays["layer.1.ffn_inner.weight"][3, 5] = arrays["norm.gain"][0] = bad
    with pytest.raises(WeightError) as caught:
        Gpt(config, arrays, ops)
    expected = {"layer.1.ffn_inner.weight holds NaN or infinity", "norm.gain holds NaN or infinity"}
    assert set(str(caught.value).splitlines()) == expected
