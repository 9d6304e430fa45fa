"""What a request's parameters say of the request itself, not of its text: how long it may take, which one to stop."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache

from lightseq_backend.errors import RequestError

CONTROLS = DEADLINE, CANCEL, NAME = "deadline_ms", "cancel_request_id", "request_id"
LONGEST_DEADLINE = 86_400_000  # milliseconds: a day


@dataclass(frozen=True)
class Control:
    """patience: seconds until an answer is of no use; cancel: the id of a request to stop; name: the request's own
    id, where Triton is not told it."""

    patience: float | None = None
    cancel: str | None = None
    name: str = ""


@lru_cache(maxsize=256)  # most requests give the same parameters
def read_control(parameters: str) -> Control:
    """parameters: a JSON object as Triton gives it."""
    if not any(name in parameters for name in CONTROLS):
        return Control()
    values = json.loads(parameters)
    deadline = values.get(DEADLINE)
    if deadline is not None and (type(deadline) not in (int, float) or not 0 < deadline <= LONGEST_DEADLINE):
        raise RequestError(f"{DEADLINE} is {deadline!r}; it must be over 0 and at most {LONGEST_DEADLINE}")
    for name in (CANCEL, NAME):
        if name in values and not (isinstance(values[name], str) and values[name]):
            raise RequestError(f"{name} is {values[name]!r}; it must be the id of a request")
    return Control(None if deadline is None else deadline / 1e3, values.get(CANCEL), values.get(NAME, ""))
