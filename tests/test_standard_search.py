"""The standard beam search and its rules against Hugging Face's generate: the same ids and scores."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_checkpoints
import small_models
import standard_cases
from standard_cases import RULES, SEARCHES, Settings

from lightseq_backend.config import GptConfig
from lightseq_backend.engine import Engine
from lightseq_backend.export import huggingface
from lightseq_backend.request import Hypothesis

needs_torch = pytest.mark.skipif(
    not (find_spec("torch") and find_spec("transformers")), reason="torch or transformers is not installed"
)
FAMILIES = ("marian", "bart", "m2m_100", "gpt2")
MOST = small_checkpoints.POSITIONS  # tokens, what is fed included
INPUTS = 150  # of either model of a family, for each of the first three searches; the others have fewer
NEAR = 2e-4  # of a score, relative to 1 + |score|: both compute in float32
TIE = 3e-5  # the same, of hypotheses at the same rank, where another text may stand there


@cache
def pair(family: str, trained: bool, folder: Path) -> tuple[Any, Engine]:
    """A model as transformers has it, and our engine for it; both from one directory."""
    import torch
    import transformers

    torch.set_num_threads(1)
    source = folder / f"{family}-{trained}"
    model = small_checkpoints.build(family)
    if trained:
        train(model, family)
    model.save_pretrained(source)
    read = huggingface.read(source)
    made = transformers.AutoModelForCausalLM if family == "gpt2" else transformers.AutoModelForSeq2SeqLM
    arrays = {name: np.array(array) for name, array in read.arrays.items()}
    engine = small_models.engine(read.config, arrays, slots=64, max_beam_size=16, queue=512)
    return made.from_pretrained(source).eval(), engine


def train(model: Any, family: str) -> None:
    """A few seconds of learning to repeat a text of a few words and to end it; texts then have ends of their own."""
    import torch

    random, end = np.random.default_rng(0), model.config.eos_token_id
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    model.train()
    for _ in range(60):
        length = int(random.integers(1, 6))
        words = random.integers(6, 16, (32, length))
        text = torch.tensor(np.concatenate([words, np.full((32, 1), end)], axis=1))
        loss = model(input_ids=text, labels=text).loss
        if family == "gpt2":
            text = torch.cat([text[:, :-1], text], dim=1)
            loss = model(input_ids=text, labels=text).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("originals")


def generated(model: Any, block: np.ndarray, settings: Settings, prefix: list[int]) -> list[list[Hypothesis]]:
    """generate's hypotheses for every row, from what follows the row or the decoder's prefix."""
    import torch

    beams, gpt = settings["num_beams"], model.config.model_type == "gpt2"
    end, ids = model.config.eos_token_id, torch.tensor(block)
    given = {} if gpt or not prefix else {"decoder_input_ids": torch.tensor([prefix] * len(block))}
    with torch.no_grad():
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, num_return_sequences=beams,
            return_dict_in_generate=True, output_scores=True,
            **{"max_length": MOST, "pad_token_id": end if gpt else model.config.pad_token_id, **settings}, **given,
        )  # fmt: skip
    skipped = block.shape[1] if gpt else max(1, len(prefix)) + (settings.get("forced_bos_token_id") is not None)
    scores = np.full(len(found.sequences), np.nan) if beams == 1 else found.sequences_scores.numpy()
    hypotheses = []
    for tokens, score in zip(found.sequences[:, skipped:].tolist(), scores.tolist()):
        ended = end in tokens
        kept = tokens[: tokens.index(end) + 1] if ended else tokens[: MOST - skipped]
        hypotheses.append(Hypothesis(np.array(kept), score, ended))
    return [hypotheses[row * beams : (row + 1) * beams] for row in range(len(block))]


def compare(model: Any, engine: Engine, settings: Settings, count: int, prefix: list[int] | None = None) -> int:
    """Asserts that both give the same, but for a tie in a hundred rows; how many rows were compared."""
    changes = standard_cases.options(settings, MOST)
    if prefix:
        changes["decoder_prefix"] = prefix[1:]
    faults, compared, ties = [], 0, 0
    for block in standard_cases.blocks(engine.model.config, count):
        theirs = generated(model, block, settings, prefix or [])
        for row, output, wanted in zip(block.tolist(), engine.answer(block.tolist(), changes=changes), theirs):
            compared += 1
            off = max(
                abs(one.score - other.score) / (1 + abs(other.score))
                for one, other in zip(output.hypotheses, wanted, strict=True)
            )
            ours, others = (
                [(one.tokens.tolist(), one.finished) for one in all_] for all_ in (output.hypotheses, wanted)
            )
            if ours != others and off <= TIE:
                ties += 1
            elif ours != others or off > NEAR:
                faults.append(f"{row}: {ours} for {others}, scores off by {off}")
    assert not faults, f"{len(faults)} of {compared} differ\n" + "\n".join(faults[:3])
    assert ties <= compared / 100
    return compared


@needs_torch
@pytest.mark.parametrize("trained", [False, True], ids=["random", "trained"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SEARCHES)
def test_search_gives_what_generate_gives(name: str, family: str, trained: bool, folder: Path) -> None:
    count = INPUTS if name in list(SEARCHES)[:3] else 30
    assert compare(*pair(family, trained, folder), SEARCHES[name], count) >= count


@needs_torch
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", RULES)
def test_rules_are_those_of_generate(name: str, family: str, folder: Path) -> None:
    for trained in (False, True):
        compare(*pair(family, trained, folder), RULES[name], 30)


@needs_torch
@pytest.mark.parametrize("family", ["marian", "m2m_100"])
@pytest.mark.parametrize("beams", [1, 4])
def test_prefix_and_forced_first_token_are_those_of_generate(family: str, beams: int, folder: Path) -> None:
    model, engine = pair(family, False, folder)
    start, rules = model.config.decoder_start_token_id, {"repetition_penalty": 1.3, "min_length": 8}
    for settings in ({"num_beams": beams}, {"num_beams": beams, **rules, "no_repeat_ngram_size": 2}):
        compare(model, engine, settings, 12, [start, 7, 9, 11])
        compare(model, engine, {**settings, "forced_bos_token_id": 8}, 12)


@needs_torch
def test_trained_texts_end_by_themselves(folder: Path) -> None:
    """Else a comparison would say little of the pool of finished hypotheses."""
    for family in FAMILIES:
        _, engine = pair(family, True, folder)
        (block, *_) = standard_cases.blocks(engine.model.config, 60)
        outputs = engine.answer(block.tolist(), changes=standard_cases.options({"num_beams": 4}, MOST))
        ended = [one.finished for output in outputs for one in output.hypotheses]
        assert sum(ended) > len(ended) / 2, family
        assert isinstance(engine.model.config, GptConfig) == (family == "gpt2")
