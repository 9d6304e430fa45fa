"""What the standard search is compared over: settings under the names of Hugging Face's generate, and ours for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from small_checkpoints import POSITIONS

Settings = dict[str, Any]
FAMILIES = ("marian", "bart", "m2m_100", "gpt2")
MOST = POSITIONS  # tokens, what is fed included
COMMITTED = 4  # hypotheses that are committed (make_convert_fixtures.py)

SEARCHES: dict[str, Settings] = {
    "one beam": {"num_beams": 1},
    "four beams": {"num_beams": 4},
    "eight beams": {"num_beams": 8},
    "eight beams, early": {"num_beams": 8, "early_stopping": True},
    "four beams, never early": {"num_beams": 4, "early_stopping": "never"},
    "short texts": {"num_beams": 4, "length_penalty": -1.0},
    "plain sums": {"num_beams": 4, "length_penalty": 0.0, "early_stopping": "never"},
    "long texts, never early": {"num_beams": 4, "length_penalty": 2.0, "early_stopping": "never"},
    "long texts, early": {"num_beams": 3, "length_penalty": 0.6, "early_stopping": True},
}
RULES: dict[str, Settings] = {
    "repetition penalty": {"num_beams": 4, "repetition_penalty": 1.4},
    "repetition reward": {"num_beams": 2, "repetition_penalty": 0.7},
    "repetition penalty, one beam": {"num_beams": 1, "repetition_penalty": 1.4},
    # Without the padding id: M2M100 has no position for it in the middle of a text, here it is an id like others.
    "no unigram twice": {"num_beams": 4, "no_repeat_ngram_size": 1, "suppress_tokens": [1]},
    "no trigram twice": {"num_beams": 4, "no_repeat_ngram_size": 3},
    "no bigram twice, one beam": {"num_beams": 1, "no_repeat_ngram_size": 2},
    "bad words": {"num_beams": 4, "bad_words_ids": [[5], [7, 8], [16, 16], [17, 5, 3], [27, 27]]},
    "least length": {"num_beams": 4, "min_length": 9},
    "least new tokens": {"num_beams": 8, "min_new_tokens": 7, "early_stopping": True},
    "forced end": {"num_beams": 4, "forced_eos_token_id": 6},
    "forced end, one beam": {"num_beams": 1, "forced_eos_token_id": 6},
    "suppressed": {"num_beams": 4, "suppress_tokens": [4, 16, 17, 27], "begin_suppress_tokens": [9, 10, 5]},
    "all together": {
        "num_beams": 4, "repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "bad_words_ids": [[5], [9, 9]],
        "min_length": 6, "min_new_tokens": 5, "suppress_tokens": [4], "begin_suppress_tokens": [10],
        "early_stopping": True, "length_penalty": 1.3,
    },
}  # fmt: skip
# Several ends, of which the model's own is the first: 2, but for GPT-2.
ENDS: dict[str, Settings] = {
    "two ends": {"num_beams": 4, "eos_token_id": [7]},
    "eight ends": {"num_beams": 4, "eos_token_id": [7, 9, 12, 15, 5, 8, 11]},
    "eight ends, many beams": {"num_beams": 12, "eos_token_id": [7, 9, 12, 15, 5, 8, 11]},
    "three ends, early": {"num_beams": 3, "early_stopping": True, "eos_token_id": [6, 14]},
    "three ends, never early": {"num_beams": 8, "early_stopping": "never", "eos_token_id": [6, 14]},
    "three ends, one beam": {"num_beams": 1, "eos_token_id": [6, 14]},
    "rules on ends": {
        "num_beams": 4, "eos_token_id": [6, 14, 9], "min_new_tokens": 4, "bad_words_ids": [[6], [8], [10, 14]],
        "repetition_penalty": 1.2, "no_repeat_ngram_size": 2,
    },
}  # fmt: skip


def options(settings: Settings, max_length: int) -> dict[str, Any]:
    """The options of a request that ask for what these settings ask of generate."""
    ours = {"eos_token_id": "end_ids"}
    own = {ours.get(name, name): value for name, value in settings.items() if name != "num_beams"}
    return {"sampling_method": "standard_beam", "beam_size": settings["num_beams"], "max_length": max_length, **own}


def blocks(config: Any, count: int, lengths: tuple[int, ...] = (2, 3, 5, 7, 9, 12), seed: int = 0) -> list[np.ndarray]:
    """About `count` random rows as int64 [rows, length], a block a length; a source ends with the end id."""
    random = np.random.default_rng(seed)
    special = {config.padding_id, config.end_id}
    ids = [id_ for id_ in range(3, config.input_vocabulary) if id_ not in special]
    made = [random.choice(ids, (-(-count // len(lengths)), length)) for length in lengths]
    if hasattr(config, "start_id"):
        for block in made:
            block[:, -1] = config.end_id
    return made


def committed_rows(config: Any) -> list[list[int]]:
    """The rows that committed results are of."""
    return [block[0].tolist() for block in blocks(config, 3, lengths=(3, 6, 10), seed=5)]


def original(folder: Path) -> Any:
    """The model of a directory as transformers has it, float32."""
    import torch
    import transformers

    torch.set_num_threads(1)
    config = transformers.AutoConfig.from_pretrained(folder)
    made = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    return made.from_pretrained(folder, dtype=torch.float32).eval()


def generated(
    model: Any, block: np.ndarray, settings: Settings, prefix: list[int]
) -> list[list[tuple[list[int], float]]]:
    """generate's hypotheses for every row: what follows the row or the decoder's prefix, and the score."""
    import torch

    beams, gpt = settings["num_beams"], model.config.model_type == "gpt2"
    end, ids = model.config.eos_token_id, torch.tensor(block)
    ends = [end, *settings.get("eos_token_id", [])]
    more = {"eos_token_id": ends} if len(ends) > 1 else {}
    given = {} if gpt or not prefix else {"decoder_input_ids": torch.tensor([prefix] * len(block))}
    with torch.no_grad():
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, num_return_sequences=beams,
            return_dict_in_generate=True, output_scores=True,
            **{"max_length": MOST, "pad_token_id": end if gpt else model.config.pad_token_id, **settings, **more},
            **given,
        )  # fmt: skip
    skipped = block.shape[1] if gpt else max(1, len(prefix)) + (settings.get("forced_bos_token_id") is not None)
    scores = np.full(len(found.sequences), np.nan) if beams == 1 else found.sequences_scores.numpy()
    hypotheses: list[tuple[list[int], float]] = []
    for tokens, score in zip(found.sequences[:, skipped:].tolist(), scores.tolist()):
        kept = tokens[: next((place for place, token in enumerate(tokens, 1) if token in ends), len(tokens))]
        hypotheses.append((kept, score))
    return [hypotheses[row * beams : (row + 1) * beams] for row in range(len(block))]
