"""Text in place of ids: tokenised on the thread that reads requests, never on the engine's."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from lightseq_backend.config import Config
from lightseq_backend.errors import RequestError
from lightseq_backend.serving.wire import Wire
from lightseq_backend.text import Tokenizer

BYTES_A_POSITION = 64  # of text, before it is tokenised at all: few tokens are that long, and megabytes take seconds


class Texts:
    """A model's tokenizer behind its wire.

    obstacle  why there is no tokenizer, for those who send text all the same
    """

    def __init__(self, wire: Wire, config: Config, tokenizer: Tokenizer | None, obstacle: str) -> None:
        self._wire, self._config, self._tokenizer, self._obstacle = wire, config, tokenizer, obstacle

    @property
    def written(self) -> bool:
        """Whether ids can be turned into text."""
        return self._tokenizer is not None

    def rows(self, given: np.ndarray) -> list[np.ndarray]:
        """int32 rows of ids for a text_input tensor; RequestError says what is wrong with the first bad text."""
        if self._tokenizer is None:
            raise RequestError(f"this model takes ids only: {self._obstacle}")
        texts, rows = self._wire.texts(given), []
        for number, text in enumerate(texts):
            try:
                rows.append(self._row(text, self._tokenizer.encode))
            except RequestError as error:
                raise RequestError(f"row {number}: {error}" if len(texts) > 1 else str(error)) from None
        return rows

    def decode(self, ids: Iterable[int]) -> str:
        assert self._tokenizer is not None
        return self._tokenizer.decode(ids)

    def _row(self, text: str, encode: Callable[[str], list[int]]) -> np.ndarray:
        limit = self._config.max_positions
        size = len(text.encode())
        if size > limit * BYTES_A_POSITION:
            raise RequestError(
                f"the text has {size} bytes; this model takes {limit} tokens, and no more than "
                f"{limit * BYTES_A_POSITION} bytes of text"
            )
        ids = encode(text)
        if len(ids) > limit:
            raise RequestError(f"the text has {len(ids)} tokens; this model takes {limit} (max_step)")
        if self._config.padding_id in ids:  # it would be dropped, or read without its embedding
            raise RequestError(
                f"token {ids.index(self._config.padding_id)} of the text has id {self._config.padding_id}, which this "
                "model takes for padding"
            )
        return np.array(ids, np.int32)
