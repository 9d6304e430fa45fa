"""The operations on an NVIDIA GPU: the launch arithmetic of kernels/, and cuBLAS where rows are many.

`Cuda` has the functions of ops/cpu.py, which says what each computes. One object belongs to one model instance: one
device, one storage precision (sums are float32 in either), one non-blocking stream. Everything is queued there;
`fetch` and `get` are the only ones that wait.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cupy
import cupyx
import numpy as np

from lightseq_backend.errors import ConfigError
from lightseq_backend.ops import linear_launch, vocabulary_launch
from lightseq_backend.ops.cublas import WORKSPACE, Cublas
from lightseq_backend.ops.launch import Kernel
from lightseq_backend.ops.slots import SLOT

Array = Any
PRECISIONS = {"fp16": np.dtype(np.float16), "fp32": np.dtype(np.float32)}
STREAMED_ROWS = 64  # up to so many rows a product reads its weights by our own kernel, above by cuBLAS
_ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2}
_QUERIES = 64  # queries that one block of packed_attention takes
_REACH = 32  # steps that a warp of decode_attention looks at together
_ATTENDING_WARPS = 8  # of a multiprocessor: half its registers, the rest is for the kernel that comes next


@dataclass(frozen=True)
class Matrix:
    """A weight [inner, wide], twice: `plain` for cuBLAS ([wide, inner] if transposed), `packed` for our own kernels.

    columns: None, or what `packed` needs besides where a LayerNorm is folded into it (linear_launch.fold).
    """

    plain: Array
    transposed: bool
    packed: Array
    columns: Array | None
    inner: int
    wide: int


class Cuda:
    """Raises ConfigError when the device, its driver or CuPy cannot be used."""

    NAME = "cuda"
    BURSTS_AHEAD = 2
    SCORED_ROWS = 512

    def __init__(self, device_id: int = 0, precision: str = "fp16", early: bool = True):
        if precision not in PRECISIONS:
            raise ConfigError(f"precision is {precision!r}; a GPU computes in {' or '.join(PRECISIONS)}")
        self.FLOAT = PRECISIONS[precision]
        self.device_id = device_id
        self._half = precision == "fp16"
        try:
            self._device = cupy.cuda.Device(device_id)
            self._device.use()
            attributes = self._device.attributes
        except Exception as error:  # CuPy raises of its own what the driver says, and not always the same
            raise ConfigError(f"GPU {device_id} cannot be used: {error}") from error
        capability = int(self._device.compute_capability)
        self._limits = linear_launch.Device(
            capability, attributes["MultiProcessorCount"], attributes["MaxSharedMemoryPerBlockOptin"]
        )
        self._early = early and capability >= 90
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._copies = cupy.cuda.Stream(non_blocking=True)  # for reading what nothing queued writes any more
        self._workspace = cupy.cuda.alloc(WORKSPACE)
        self._cublas = Cublas(self._stream.ptr, self._workspace.ptr)
        self._kernels: dict[tuple[Any, ...], Kernel] = {}
        self._rooms: dict[str, Array] = {}

    # Memory and transfer ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Makes device and stream those of the calling thread."""
        self._device.use()
        self._stream.use()

    def matrix(self, array: np.ndarray, norm: Any = None) -> Matrix:
        inner, wide = array.shape
        transposed = array.T.flags.c_contiguous and not array.flags.c_contiguous
        plain = source = self._upload(array.T if transposed else array)
        columns = None
        if norm is not None and self._half:
            with self._stream:
                whole, gain, bias = (cupy.asarray(part, np.float32) for part in (array, norm.gain, norm.bias))
                source, columns = linear_launch.fold(whole, gain, bias, self.FLOAT)
                source = cupy.ascontiguousarray(source.T if transposed else source)
        packed = cupy.empty(linear_launch.packed_elements(inner, wide, self._half), self.FLOAT)
        strides = (1, inner) if transposed else (wide, 1)
        pieces = packed.nbytes // 16
        self._launch(
            "linear", "pack_weight", (-(-pieces // 256),), 256,
            (source, *strides, packed, inner, wide),
        )  # fmt: skip
        return Matrix(plain, transposed, packed, columns, inner, wide)

    def vector(self, array: np.ndarray) -> Array:
        return self._upload(array)

    def table(self, array: np.ndarray) -> Array:
        return self._upload(array)

    def _upload(self, array: np.ndarray) -> Array:
        with self._stream:
            return cupy.asarray(np.ascontiguousarray(array, np.float32)).astype(self.FLOAT, copy=False)

    def available_memory(self) -> int:
        return int(cupy.cuda.runtime.memGetInfo()[0])

    def allocate(self, size: int) -> Any:
        block = cupy.cuda.alloc(size)
        block.memset_async(0, size, self._stream)
        return block

    def view(self, block: Any, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Records are bytes to CuPy: [lanes, bytes of a record]."""
        if dtype == SLOT:
            shape, dtype = (*shape, SLOT.itemsize), np.dtype(np.uint8)
        return cupy.ndarray(shape, dtype, block + offset)

    def put(self, destination: Array, source: np.ndarray) -> None:
        if source.dtype == SLOT:
            source = np.ascontiguousarray(source).view(np.uint8).reshape(destination.shape)
        if destination.size:
            destination.set(np.ascontiguousarray(source, destination.dtype), stream=self._stream)

    def get(self, source: Array) -> np.ndarray:
        copy = source.get(stream=self._copies)
        self._copies.synchronize()
        return _records(copy)

    def fetch(self, source: Array) -> Callable[[], np.ndarray]:
        room = cupyx.empty_pinned(source.shape, source.dtype)
        cupy.cuda.runtime.memcpyAsync(
            room.ctypes.data, source.data.ptr, source.nbytes, cupy.cuda.runtime.memcpyDeviceToHost, self._stream.ptr
        )
        arrived = cupy.cuda.Event(disable_timing=True)
        arrived.record(self._stream)

        def wait() -> np.ndarray:
            arrived.synchronize()
            return _records(np.array(room))

        return wait

    def fault(self) -> str | None:
        """An error of the device stays: everything that is asked of it afterwards fails with it."""
        try:
            self._stream.synchronize()
        except Exception as error:  # what CuPy raises differs by its version
            return f"GPU {self.device_id} has failed: {error}"
        return None

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Runs once, which compiles what is new; then records one graph."""
        run()
        self._stream.synchronize()
        self._stream.begin_capture()
        try:
            run()
        finally:
            graph = self._stream.end_capture()
        graph.upload(self._stream)
        return functools.partial(graph.launch, self._stream)

    # Operations -------------------------------------------------------------------------------------------------------

    def embed_tokens(
        self, tokens: Array, positions: Array, token_table: Array, position_table: Array, out: Array
    ) -> None:
        arguments = (tokens, positions, token_table, position_table, out, out.shape[1])
        self._launch("embed", "embed_tokens", (len(out),), 128, arguments)

    def embed_rows(self, rows: Array, slots: Array, token_table: Array, position_table: Array, out: Array) -> None:
        arguments = (rows, slots, token_table, position_table, out, out.shape[1])
        self._launch("embed", "embed_rows", (len(out),), 128, arguments)

    def layer_norm(self, x: Array, norm: Any, epsilon: float, out: Array) -> None:
        arguments = (x, _stride(x), norm.gain, norm.bias, epsilon, out, x.shape[1])
        self._launch("norm", "layer_norm", (len(x),), 128, arguments)

    def linear(self, x: Array, linear: Any, out: Array) -> None:
        weight: Matrix = linear.weight
        if self._streams(len(x), weight):
            self._product(x, linear, out)
            return
        self._cublas.product(x, weight.plain, weight.transposed, out)
        self._finish(out, linear.bias, "none")

    def norm_linear(
        self, x: Array, norm: Any, linear: Any, epsilon: float, activation: str, normed: Array, out: Array
    ) -> None:
        weight: Matrix = linear.weight
        streams = self._streams(len(x), weight)
        if streams and weight.columns is not None:
            self._product(x, linear, out, activation=activation, epsilon=epsilon)
            return
        self.layer_norm(x, norm, epsilon, normed)
        if streams:
            self._product(normed, linear, out, activation=activation)
            return
        self._cublas.product(normed, weight.plain, weight.transposed, out)
        self._finish(out, linear.bias, activation)

    def linear_residual(self, x: Array, linear: Any, residual: Array, out: Array) -> None:
        weight: Matrix = linear.weight
        if self._streams(len(x), weight):
            self._product(x, linear, out, residual)
            return
        if residual.data.ptr != out.data.ptr:
            kind = cupy.cuda.runtime.memcpyDeviceToDevice
            cupy.cuda.runtime.memcpyAsync(out.data.ptr, residual.data.ptr, out.nbytes, kind, self._stream.ptr)
        self._cublas.product(x, weight.plain, weight.transposed, out, add=True)
        self._finish(out, linear.bias, "none")

    def packed_attention(self, qkv: Array, starts: Array, heads: int, causal: bool, out: Array) -> None:
        size, sequences = out.shape[1] // heads, len(starts) - 1
        tensor = self._half and self._limits.capability >= 75 and size % 8 == 0
        self._launch(
            "attention", "packed_attention_tensor" if tensor else "packed_attention",
            (len(qkv) // _QUERIES + sequences, heads), 128 if tensor else 256,
            (qkv, starts, out, sequences, heads, int(causal)), HEAD_SIZE=size,
        )  # fmt: skip

    def decode_attention(
        self,
        qkv: Array,
        rows: Array,
        slots: Array,
        ancestors: Array,
        keys: Array,
        values: Array,
        heads: int,
        out: Array,
    ) -> None:
        steps = keys.shape[1]
        self._launch(
            "attention", "decode_attention", (heads, len(rows)), 32 * self._warps(heads * len(rows), steps, 16),
            (qkv, rows, slots, ancestors, keys, values, out, heads, steps), HEAD_SIZE=out.shape[1] // heads,
        )  # fmt: skip

    def cross_attention(
        self, query: Array, rows: Array, slots: Array, keys: Array, values: Array, heads: int, out: Array
    ) -> None:
        steps = keys.shape[1]
        self._launch(
            "attention", "cross_attention", (heads, len(rows)), 32 * self._warps(heads * len(rows) // 4, steps, 4),
            (query, rows, slots, keys, values, out, heads, steps), HEAD_SIZE=out.shape[1] // heads,
        )  # fmt: skip

    def store(self, key_values: Array, lanes: Array, steps: Array, keys: Array, values: Array) -> None:
        hidden = key_values.shape[1] // 2
        self._launch(
            "attention", "store", (len(lanes),), 256,
            (key_values, _stride(key_values), lanes, steps, keys, values, hidden, keys.shape[1]), HEAD_SIZE=8,
        )  # fmt: skip

    def vocabulary_logits(
        self, x: Array, norm: Any, output: Any, epsilon: float, scale: float, normed: Array, logits: Array
    ) -> None:
        if len(x) <= STREAMED_ROWS:
            self._vocabulary(x, norm, output, epsilon, scale, logits=logits)
            return
        weight: Matrix = output.weight
        self.layer_norm(x, norm, epsilon, normed)
        self._cublas.product(normed, weight.plain, weight.transposed, logits)
        rows, vocabulary = logits.shape
        self._launch(
            "sampling", "finish_logits", (-(-vocabulary // 1024), rows), 256,
            (logits, output.bias, rows, vocabulary, scale),
        )  # fmt: skip

    def top(self, logits: Array, banned: int, ids: Array, log_probabilities: Array) -> None:
        arguments = (logits, ids, log_probabilities, logits.shape[1], ids.shape[1], banned)
        self._launch("sampling", "top", (len(logits),), 1024, arguments)

    def vocabulary_top(
        self, x: Array, norm: Any, output: Any, epsilon: float, scale: float, normed: Array,
        logits: Array, banned: int, ids: Array, log_probabilities: Array,
    ) -> None:  # fmt: skip
        rows, best = ids.shape
        statistics, choices = self.tile_results(rows, output.weight.wide, best)
        if rows <= STREAMED_ROWS or output.weight.wide % 8:  # cuBLAS is slow where rows of logits are not aligned
            self._vocabulary(
                x, norm, output, epsilon, scale, statistics=statistics, choices=choices, best=best, banned=banned
            )
        else:
            weight: Matrix = output.weight
            self.layer_norm(x, norm, epsilon, normed)
            self._cublas.product(normed, weight.plain, weight.transposed, logits)
            plan = vocabulary_launch.plan(self._limits, STREAMED_ROWS, weight.inner, weight.wide, self._half)
            arguments = (
                logits, output.bias, None, None, statistics, choices, rows, weight.wide, best, banned, scale,
            )  # fmt: skip
            blocks = -(-statistics.shape[1] // vocabulary_launch.SUMMARISING)
            self._launch(
                "vocabulary", "vocabulary_tiles", (blocks, rows), 8 * vocabulary_launch.SUMMARISING, arguments,
                **dict(plan.definitions),
            )  # fmt: skip
        self.merge_best(statistics, choices, ids, log_probabilities)

    def tile_results(self, rows: int, vocabulary: int, best: int) -> tuple[Array, Array]:
        """What the parts of vocabulary_top hand over: statistics [rows, tiles, 2] and choices [rows, tiles, best]."""
        tiles = vocabulary_launch.tiles(vocabulary)
        statistics = self._room("statistics", (rows, tiles, 2), np.float32)
        return statistics, self._room("choices", (rows, tiles, best), np.uint64)

    def merge_best(self, statistics: Array, choices: Array, ids: Array, log_probabilities: Array) -> None:
        """The second part of vocabulary_top."""
        rows, tiles, best = choices.shape
        arguments = (statistics, choices, ids, log_probabilities, tiles, best)
        self._launch("search", "vocabulary_best", (rows,), vocabulary_launch.best_threads(tiles), arguments)

    def target_log_probabilities(self, logits: Array, targets: Array, out: Array) -> None:
        arguments = (logits, targets, out, logits.shape[1])
        self._launch("sampling", "target_log_probabilities", (len(logits),), 1024, arguments)

    def beam_step(
        self, rows: Array, slots: Array, ancestors: Array, history: Array, ids: Array, log_probabilities: Array
    ) -> None:
        arguments = (rows, slots, ancestors, history, ids, log_probabilities, ids.shape[1], history.shape[1])
        self._launch("search", "beam_step", (len(rows),), 128, arguments)

    def sample_step(self, rows: Array, slots: Array, history: Array, logits: Array, banned: int) -> None:
        arrivals = self._room("arrivals", (len(rows),), np.int32)
        arguments = (rows, slots, history, logits, arrivals, logits.shape[1], banned, history.shape[1])
        self._launch("sampling", "sample_step", (len(rows),), 1024, arguments)

    # How they are launched --------------------------------------------------------------------------------------------

    def _streams(self, rows: int, weight: Matrix) -> bool:
        return linear_launch.pays(self._limits, rows, weight.inner, weight.wide, self._half)

    def _product(
        self, x: Array, linear: Any, out: Array, residual: Array | None = None, activation: str = "none",
        epsilon: float | None = None,
    ) -> None:  # fmt: skip
        """out = residual + activation(x . W + b); with epsilon, of the LayerNorm of x that is folded into W."""
        weight: Matrix = linear.weight
        norm = epsilon is not None
        assert norm == (weight.columns is not None)
        aligned = weight.inner * x.itemsize % 16 == 0 and x.strides[0] % 16 == 0 and x.data.ptr % 16 == 0
        plan = linear_launch.plan(self._limits, len(x), weight.inner, weight.wide, self._half, norm, aligned)
        arguments = (
            x, _stride(x), weight.packed, weight.columns, epsilon or 0.0, linear.bias,
            residual, 0 if residual is None else _stride(residual),
            out, _stride(out), len(x), weight.wide, _ACTIVATIONS[activation], 1.0,
        )  # fmt: skip
        self._launch(
            "linear", "linear", plan.grid, linear_launch.THREADS, arguments,
            shared=plan.shared, cluster=plan.cluster[0], **dict(plan.definitions),
        )  # fmt: skip

    def _vocabulary(
        self, x: Array, norm: Any, output: Any, epsilon: float, scale: float, *, logits: Array | None = None,
        statistics: Array | None = None, choices: Array | None = None, best: int = 1, banned: int = -1,
    ) -> None:  # fmt: skip
        weight: Matrix = output.weight
        plan = vocabulary_launch.plan(self._limits, len(x), weight.inner, weight.wide, self._half)
        arguments = (
            x, norm.gain, norm.bias, weight.packed, output.bias, None, None, logits, statistics, choices,
            len(x), weight.wide, best, banned, epsilon, scale,
        )  # fmt: skip
        self._launch(
            "vocabulary", "vocabulary", plan.grid, vocabulary_launch.threads(plan), arguments,
            shared=plan.shared, **dict(plan.definitions),
        )  # fmt: skip

    def _warps(self, blocks: int, steps: int, most: int) -> int:
        """Warps of a block that attends to up to so many steps; results do not depend on it.

        As many as have steps of their own (_REACH each), as long as all of them are on the device together.
        """
        together = _ATTENDING_WARPS * self._limits.multiprocessors // max(1, blocks)
        warps = max(1, min(most, -(-steps // _REACH), together))
        return 1 << warps.bit_length() - 1

    def _finish(self, x: Array, bias: Array | None, activation: str) -> None:
        if bias is None and activation == "none":
            return
        rows, wide = x.shape
        width = 256 * (8 if self._half else 4)
        self._launch(
            "linear", "bias_activation", (-(-wide // width), min(rows, 65535)), 256,
            (x, bias, rows, wide, _ACTIVATIONS[activation], 1.0),
        )  # fmt: skip

    def _launch(
        self, family: str, name: str, grid: tuple[int, ...], block: int, arguments: tuple[Any, ...],
        *, shared: int = 0, cluster: int = 1, **defines: int,
    ) -> None:  # fmt: skip
        constants = tuple(sorted({**defines, "HALF": int(self._half)}.items()))
        key = (family, name, constants)
        if key not in self._kernels:
            self._kernels[key] = Kernel(family, name, constants)
        self._kernels[key](
            grid, block, arguments, stream=self._stream.ptr, shared=shared, cluster=cluster, early=self._early
        )

    def _room(self, name: str, shape: tuple[int, ...], dtype: Any) -> Array:
        """Work space of the object's own, zeroed when it is first taken; graphs keep its address, so it never moves."""
        size = int(np.prod(shape))
        if name not in self._rooms or self._rooms[name].size < size:
            self._rooms[f"{name} {len(self._rooms)}"] = self._rooms.get(name)
            with self._stream:
                self._rooms[name] = cupy.zeros(size, dtype)
        return self._rooms[name][:size].reshape(shape)


def _stride(array: Array) -> int:
    return int(array.strides[0] // array.itemsize)


def _records(copy: np.ndarray) -> np.ndarray:
    """Bytes that are slots, as slots."""
    is_slots = copy.dtype == np.uint8 and copy.ndim == 2 and copy.shape[1] == SLOT.itemsize
    return copy.view(SLOT)[:, 0] if is_slots else copy
