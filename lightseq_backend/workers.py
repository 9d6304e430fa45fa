"""Lines over many processes: Ray Data gives each a model of its own, and chunks of the files to answer.

Without RAY_ADDRESS the processes are this machine's, and Ray listens on loopback alone; with it they are those of that
cluster, whose machines need this package, the files and the model at the same paths.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from lightseq_backend.errors import ConfigError, RequestError, WeightError
from lightseq_backend.lines import Chunk
from lightseq_backend.serving.cores import usable_cpus
from lightseq_backend.serving.device import choose_device
from lightseq_backend.serving.embedded import LOOPBACK
from lightseq_backend.written import Written, open_model, written

if TYPE_CHECKING:
    from lightseq_backend.loaded import Model

ADDRESS_VARIABLE = "RAY_ADDRESS"
ATTEMPTS = 4  # at a chunk, by workers that die over it
STORE = 256 << 20  # bytes of shared memory for what is under way on this machine
NO_LINE = -1  # the number that comes with a fault of the whole run

Columns = dict[str, np.ndarray]


def written_by_workers(
    options: argparse.Namespace, chunks: Sequence[Chunk], changes: dict[str, Any], workers: int
) -> Iterator[Written]:
    """The lines that belong to those of the chunks, of which there must be one, each once and in order.

    A worker that dies is replaced, and what it was at is done anew. RequestError where the model, or an option, cannot
    be had, or when workers die over the same chunk again and again; ConfigError without Ray.
    """
    if find_spec("ray") is None:
        raise ConfigError(f"--workers {workers} needs Ray, which is not installed: the extra `ray`")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    due, end = chunks[0].first, chunks[-1].first + chunks[-1].lines
    _start(ray)
    try:
        for columns in _answered(options, chunks, changes, workers):
            for one in _lines_of(columns):
                if one.number != due or due == end:
                    raise RuntimeError(f"line {one.number + 1} came where line {due + 1} was due of {end}")
                due += 1
                yield one
        if due < end:
            raise RuntimeError(f"no line came where line {due + 1} was due of {end}")
    except ray.exceptions.RayError as error:
        reason = str(error).partition("\n")[0]
        raise RequestError(f"the workers fail over the lines behind line {due}, again and again: {reason}") from error
    finally:
        ray.shutdown()


def _start(ray: Any) -> None:
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address := os.environ.get(ADDRESS_VARIABLE):
        try:
            ray.init(**quiet)
        except ConnectionError as error:
            reason = str(error).partition("\n")[0]
            raise RequestError(f"{ADDRESS_VARIABLE} is {address!r}, and no Ray answers there: {reason}") from error
        return
    here = {"num_cpus": usable_cpus(), "object_store_memory": STORE, "_node_ip_address": LOOPBACK}
    ray.init(**here, include_dashboard=False, **quiet)


def _answered(
    options: argparse.Namespace, chunks: Sequence[Chunk], changes: dict[str, Any], workers: int
) -> Iterator[Columns]:
    import ray
    from ray.data import ActorPoolStrategy, DataContext, from_items

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # its errors are raised here
    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    device, _ = choose_device(options.device)
    processors = float(ray.cluster_resources()["CPU"]) / workers
    items = from_items([one._asdict() for one in chunks], override_num_blocks=len(chunks))
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # ray_remote_args_fn goes with Ray 2.64; nothing bounds the attempts instead yet
        answered = items.map_batches(
            Worker,
            batch_size=1,
            compute=ActorPoolStrategy(size=workers),
            fn_constructor_args=(options, changes),
            # Ray counts ten-thousandths, and rounded up the last worker's would not be there.
            num_cpus=math.floor(processors * 10_000) / 10_000 if processors < 1 else int(processors),
            num_gpus=int(device == "gpu"),
            ray_remote_args_fn=lambda: {"max_task_retries": ATTEMPTS - 1},
        )
    yield from answered.iter_batches(batch_size=None, prefetch_batches=1, batch_format="numpy")


def _lines_of(columns: Columns) -> Iterator[Written]:
    for number, line, error in zip(columns["number"], columns["line"], columns["error"]):
        if number == NO_LINE:
            raise RequestError(str(error))
        yield Written(int(number), str(line), RequestError(str(error)) if error else None)


class Worker:
    """One process with a model. Ray calls it with a chunk at a time; what is wrong with model or options is kept until
    then, for of what goes wrong in a constructor nobody gets the message alone."""

    def __init__(self, options: argparse.Namespace, changes: dict[str, Any]):
        self._options, self._changes, self._fault = options, changes, ""
        self._model: Model | None = None
        try:
            self._model = open_model(options)
        except (ConfigError, RequestError, WeightError) as error:
            self._fault = str(error)

    def __call__(self, columns: Columns) -> Columns:
        path, start, lines, first = (columns[name][0] for name in Chunk._fields)
        chunk = Chunk(str(path), int(start), int(lines), int(first))
        if self._model is None:
            return _columns([Written(NO_LINE, "", RequestError(self._fault))])
        try:
            return _columns([*written(self._model, self._options, chunk.read(), chunk.first, self._changes)])
        except RequestError as error:
            return _columns([Written(NO_LINE, "", error)])


def _columns(lines: Sequence[Written]) -> Columns:
    texts = [line.line.encode(errors="replace").decode() for line in lines]
    return {
        "number": np.array([line.number for line in lines], np.int64),
        "line": np.array(texts, object),
        "error": np.array([str(line.error or "") for line in lines], object),
    }
