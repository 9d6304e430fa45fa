"""One engine in a process of its own, so that neither threads nor memory nor BLAS settings of two ever meet."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from benchmarks import machine


class Worker:
    """Starts the process, which makes an engine; `ask` has it call something. Use as a context manager.

    make(*arguments): the engine; both are pickled.
    environment: variables to set, or to unset where the value is None, before the process starts.
    """

    def __init__(self, make: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str | None]):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(make, arguments, theirs), daemon=True)
        before = dict(os.environ)
        try:
            for name, value in environment.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
            self._process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        theirs.close()
        self._receive()

    def ask(self, what: str, *arguments: Any) -> Any:
        """What "time" (seconds and processor seconds of a translate), "peak_memory" (bytes), "blas" or a method of the
        engine gives."""
        self._connection.send((what, *arguments))
        return self._receive()

    def _receive(self) -> Any:
        answer = self._connection.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self._connection.close()
        self._process.join(10)
        self._process.terminate()


def _serve(make: Callable[..., Any], made_of: tuple[Any, ...], connection: Connection) -> None:
    try:
        engine = make(*made_of)
        connection.send(True)
        while True:
            what, *arguments = connection.recv()
            if what == "time":
                start, used = time.perf_counter(), time.process_time()
                engine.translate(*arguments)
                connection.send((time.perf_counter() - start, time.process_time() - used))
            elif what == "peak_memory":
                connection.send(machine.peak_memory())
            elif what == "blas":
                connection.send(machine.blas())
            else:
                connection.send(getattr(engine, what)(*arguments))
    except EOFError:
        pass
    except Exception as error:
        connection.send(error)
