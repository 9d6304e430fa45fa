"""Texts as the rows of ids that requests are made of, with what is refused of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lightseq_backend.config import Config
from lightseq_backend.errors import RequestError
from lightseq_backend.text.tokenizer import Tokenizer

BYTES_A_POSITION = 64  # of text, before it is tokenised at all: few tokens are that long, and megabytes take seconds


def source_row(text: str, tokenizer: Tokenizer, config: Config) -> np.ndarray:
    """int32 ids of a source, a prompt or a text that is scored; RequestError says what is wrong with it."""
    ids = _ids(text, tokenizer.encode, config)
    if config.padding_id in ids:  # it would be dropped, or read without its embedding
        raise RequestError(
            f"token {ids.index(config.padding_id)} of the text has id {config.padding_id}, which this model takes for "
            "padding"
        )
    return np.array(ids, np.int32)


def target_row(text: str, tokenizer: Tokenizer, config: Config) -> np.ndarray:
    """int32 ids of a translation as the model would write it, the end id last; RequestError as for `source_row`."""
    try:
        return np.array(_ids(text, tokenizer.encode_target, config), np.int32)
    except RequestError as error:
        raise RequestError(f"target: {error}") from None


def _ids(text: str, encode: Callable[[str], list[int]], config: Config) -> list[int]:
    limit = config.max_positions
    size = len(text.encode())
    if size > limit * BYTES_A_POSITION:
        raise RequestError(
            f"the text has {size} bytes; this model takes {limit} tokens, and no more than "
            f"{limit * BYTES_A_POSITION} bytes of text"
        )
    ids = encode(text)
    if len(ids) > limit:
        raise RequestError(f"the text has {len(ids)} tokens; this model takes {limit} (max_step)")
    return ids
