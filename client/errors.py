"""What can go wrong on the caller's side of the wire."""

from __future__ import annotations

INVALID_ARGUMENT = "INVALID_ARGUMENT"
UNAVAILABLE = "UNAVAILABLE"
DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
INTERNAL = "INTERNAL"
UNKNOWN = "UNKNOWN"  # Triton tells no status in a gRPC stream


class ClientError(Exception):
    """Everything this package raises on purpose."""


class RowError(ClientError):
    """A row cannot be sent: it is empty, is no list of ids, or has a word that the vocabulary lacks."""


class VocabularyError(ClientError):
    """A vocabulary file cannot be used, or does not belong to the model. Names every fault found."""


class ServerUnreachable(ClientError):
    """Nobody answers at the server's address."""


class ModelError(ClientError):
    """The server answers, but the model is missing, not ready or not of the kind that the task needs."""


class RequestFailed(ClientError):
    """The server refused a request, or could not serve it.

    status   gRPC's name of the status, whichever protocol was spoken
    message  the server's own words
    """

    def __init__(self, status: str, message: str):
        super().__init__(f"{message} ({status})")
        self.status = status
        self.message = message


class RequestTimeout(RequestFailed):
    """No answer came in time."""

    def __init__(self, seconds: float):
        super().__init__(DEADLINE_EXCEEDED, f"no answer within {seconds:g} s")
