"""A pack as it is laid for a pass: its parts, what fills it up, and what is scored of it."""

from __future__ import annotations

import numpy as np
import pytest

from lightseq_backend.models.pack import Pack

NOBODY, PADDING = 9, 7


def laid(rows: int, texts: list[list[int]], targets: np.ndarray | None = None) -> dict[str, list[int]]:
    """Texts of places 10, 20, ... and lanes 1, 2, ..."""
    arrays = [np.array(text, np.int32) for text in texts]
    places = [np.arange(len(text), dtype=np.int32) + 10 * (i + 1) for i, text in enumerate(texts)]
    memory = Pack.laid(rows, arrays, places, range(1, len(texts) + 1), NOBODY, targets)
    assert (memory.dtype, len(memory)) == (np.int32, Pack.elements(rows))
    return {name: part.tolist() for name, part in vars(Pack.of(memory, rows)).items()}


def test_texts_lie_end_to_end_and_nobody_fills_the_rest() -> None:
    assert laid(6, [[5, -1, 6], [8]]) == {
        "tokens": [5, -1, 6, 8, -1, -1],
        "positions": [10, 11, 12, 20, 0, 0],
        "lanes": [1, 1, 1, 2, NOBODY, NOBODY],
        "steps": [0, 1, 2, 0, 0, 0],
        "targets": [0] * 6,
        "starts": [0, 3, 4, 4, 4, 4, 4],
    }


def test_pack_of_which_nothing_is_kept_ends_before_lanes_and_steps() -> None:
    texts = [np.array(text, np.int32) for text in ([5, -1, 6], [8])]
    places = [np.arange(len(text), dtype=np.int32) for text in texts]
    targets = Pack.targets_of(texts, PADDING)
    shorter = Pack.laid(6, texts, places, None, NOBODY, targets)
    assert len(shorter) == Pack.elements(6, keeps=False)
    whole = Pack.laid(6, texts, places, [1, 2], NOBODY, targets)
    np.testing.assert_array_equal(shorter, whole[: len(shorter)])
    parts = vars(Pack.of(whole, 6))
    assert [len(parts[name]) for name in ("lanes", "steps")] == [6, 6]
    assert np.shares_memory(parts["lanes"], whole[len(shorter) :])


@pytest.mark.parametrize("text", [[5], [5, 6, 7]])
def test_single_text_may_fill_a_pack(text: list[int]) -> None:
    pack = laid(len(text), [text])
    assert (pack["tokens"], pack["lanes"]) == (text, [1] * len(text))
    assert pack["starts"] == [0] + [len(text)] * len(text)


def test_each_row_is_scored_for_the_token_after_it() -> None:
    texts = [np.array(text, np.int32) for text in ([5, -1, 6], [8], [3, 4])]
    targets = Pack.targets_of(texts, PADDING)
    assert targets.tolist() == [PADDING, 6, 0, 0, 4, 0]
    assert laid(8, [text.tolist() for text in texts], targets)["targets"] == [PADDING, 6, 0, 0, 4, 0, 0, 0]
