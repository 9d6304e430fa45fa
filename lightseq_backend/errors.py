"""The errors this package raises on purpose; everything else is a bug of ours."""


class RequestError(ValueError):
    """The caller asked for something this model cannot do. Answered alone; nothing else notices."""


class Overloaded(RuntimeError):
    """No room now, because the queue is full or the engine is stopping: come again later. The message may say when."""


class Cancelled(RuntimeError):
    """Whoever asked wants no answer any more."""


class DeadlineExceeded(RuntimeError):
    """The answer was not there at the time the request set for it."""


class NotUnderWay(RuntimeError):
    """There is no request of that id, or it has had its answer."""


class WeightError(ValueError):
    """A weight file cannot be used. The message names every fault found, one a line."""


class ConfigError(ValueError):
    """A setting cannot be honoured. The message names every fault found, one a line."""
