"""Text in place of ids: tokenised on the thread that reads requests, never on the engine's."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from lightseq_backend.config import Config
from lightseq_backend.errors import RequestError
from lightseq_backend.serving.wire import TARGET_TEXT, TEXT_INPUT, Wire
from lightseq_backend.text import Tokenizer, with_language
from lightseq_backend.text.rows import source_row, target_row


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
        return self._rows(given, TEXT_INPUT, source_row)

    def targets(self, given: np.ndarray) -> list[np.ndarray]:
        """int32 rows of ids for a target_text tensor, as `rows`."""
        return self._rows(given, TARGET_TEXT, target_row)

    def with_language(self, changes: dict[str, object]) -> dict[str, object]:
        return with_language(changes, self._tokenizer, self._config)

    def decode(self, ids: Iterable[int]) -> str:
        assert self._tokenizer is not None
        return self._tokenizer.decode(ids)

    def _rows(
        self, given: np.ndarray, name: str, row_of: Callable[[str, Tokenizer, Config], np.ndarray]
    ) -> list[np.ndarray]:
        if self._tokenizer is None:
            raise RequestError(f"this model takes ids only: {self._obstacle}")
        texts, rows = self._wire.texts(given, name), []
        for number, text in enumerate(texts):
            try:
                rows.append(row_of(text, self._tokenizer, self._config))
            except RequestError as error:
                raise RequestError(f"row {number}: {error}" if len(texts) > 1 else str(error)) from None
        return rows
