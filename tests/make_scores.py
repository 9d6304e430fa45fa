"""Makes tests/checkpoints/scores.npz: log-probabilities that transformers gives to tokens, after tests/checkpoints.

Needs torch 2.13.0 and transformers 5.23.0: `python tests/make_scores.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from small_checkpoints import FOLDER, VOCABULARY

SCORES = FOLDER / "scores.npz"
FAMILIES = ("gpt2", "marian", "bart", "mbart", "m2m_100")
Ids = Sequence[int]


def main() -> None:
    np.savez_compressed(
        SCORES,
        **{name: np.concatenate([log_probabilities(name, *case) for case in cases(name)]) for name in FAMILIES},
    )


def cases(name: str) -> list[tuple[list[int], list[int]]]:
    """Sources and targets of many lengths; of a GPT, texts and what follows their first token."""
    rows = []
    for length, wanted in ((1, 12), (4, 1), (11, 5), (26, 20)):
        ids, target = (
            [6 + (7 * i * i + 3 * i + first) % (VOCABULARY - 7) for i in range(count)]  # none that means something
            for first, count in ((2, length), (5, wanted))
        )
        rows.append((ids, target) if name != "gpt2" else ([ids[0], *target], target))
    return rows


def log_probabilities(name: str, ids: Ids, target: Ids, forced: int | None = None) -> np.ndarray:
    """float32 [target]: of each token of a target, by the original, run once over all of it."""
    import torch
    import transformers

    folder = str(Path(FOLDER) / name)
    with torch.no_grad():
        if name == "gpt2":
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            logits = model(torch.tensor([ids])).logits[0, :-1]
        else:
            model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()
            fed = [model.config.decoder_start_token_id, *([] if forced is None else [forced]), *target[:-1]]
            logits = model(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([fed])).logits[0]
            logits = logits[len(fed) - len(target) :]
        shares = torch.log_softmax(logits, -1)
        found: np.ndarray = shares.gather(-1, torch.tensor(target)[:, None])[:, 0].numpy()
        return found


if __name__ == "__main__":
    main()
