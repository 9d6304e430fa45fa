"""Rows without end through an engine: a bounded number under way, the results in the order of the rows."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from queue import SimpleQueue

import numpy as np

from lightseq_backend.config import MAX_SEED, DecodingOptions
from lightseq_backend.engine import Engine
from lightseq_backend.errors import RequestError
from lightseq_backend.request import Decode, Output, Request

Result = Output | Exception
_STREAMS = 65536  # that samples of one seed are kept apart by; rows beyond take the next seed


@dataclass(frozen=True)
class Row:
    """One row on its way: int32 ids (and a target's, where one is scored), or why there are none."""

    number: int
    ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    target: np.ndarray | None = None
    error: RequestError | None = None


def results(
    engine: Engine,
    rows: Iterable[Row],
    kind: str,
    options: DecodingOptions,
    window: int,
    ahead: int = 1,
    decode: Decode | None = None,
) -> Iterator[tuple[Row, Result]]:
    """Each row with its output, or with what is wrong with it. decode: the text of ids, for stop words of text.

    Rows are read a window at a time and submitted longest first; while one window is answered, `ahead` further ones
    are under way, so that the engine is never without work. The engine must be started.
    """
    rows = iter(rows)
    sent: deque[_Window] = deque()
    while True:
        part = list(islice(rows, window))
        if part:
            sent.append(_Window(engine, part, kind, options, decode))
        elif not sent:
            return
        if len(sent) > ahead or not part:
            yield from sent.popleft().results()


class _Window:
    def __init__(self, engine: Engine, rows: list[Row], kind: str, options: DecodingOptions, decode: Decode | None):
        self._rows, self._decode = rows, decode
        self._arrived: SimpleQueue[tuple[int, Result]] = SimpleQueue()
        for place in sorted(range(len(rows)), key=lambda place: -rows[place].ids.size):
            row = rows[place]
            if row.error is not None:
                self._arrived.put((place, row.error))
                continue
            try:
                engine.submit([self._request(place, row, kind, options)])
            except RequestError as error:
                self._arrived.put((place, error))

    def _request(self, place: int, row: Row, kind: str, options: DecodingOptions) -> Request:
        block, stream = divmod(row.number, _STREAMS)
        if options.seed is not None and block:
            options = replace(options, seed=(options.seed + block) & MAX_SEED)

        def reply(result: Result) -> None:
            self._arrived.put((place, result))

        return Request(row.ids, options, reply, kind, stream, row.target, decode=self._decode)

    def results(self) -> Iterator[tuple[Row, Result]]:
        found: dict[int, Result] = {}
        for place, row in enumerate(self._rows):
            while place not in found:
                arrived, result = self._arrived.get()
                found[arrived] = result
            yield row, found.pop(place)
