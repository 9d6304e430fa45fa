"""The operations on an NVIDIA GPU: the launch arithmetic of kernels/, and cuBLAS where rows are many.

`Cuda` has the functions of ops/cpu.py, which says what each computes. One object belongs to one model instance: one
device, one storage precision (sums are float32 in either), one non-blocking stream. Everything is queued there; while
serving, only `get` and what `fetch` returns wait for the device (and transfer.py, where too many copies are under way).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cupy
import numpy as np

from lightseq_backend.errors import ConfigError
from lightseq_backend.ops import device, linear_launch, vocabulary_launch, warpgroup_launch, weight_memory
from lightseq_backend.ops.cublas import WORKSPACE, Cublas
from lightseq_backend.ops.int8 import quantise
from lightseq_backend.ops.launch import Kernel, driver
from lightseq_backend.ops.slots import RULES, SLOT
from lightseq_backend.ops.transfer import Transfers
from lightseq_backend.quantised import Rounded

log = logging.getLogger(__name__)
Array = Any
PRECISIONS: dict[str, np.dtype[Any]] = {  # of all but the weights of products, which are int8 in that
    "fp16": np.dtype(np.float16),
    "fp32": np.dtype(np.float32),
    "int8": np.dtype(np.float16),
}
SEARCHED_ROWS = 64  # up to so many rows the vocabulary goes through vocabulary.cu, above through cuBLAS
_ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "gelu_erf": 3, "silu": 4}
_GROUPS = ("warpgroup", "warpgroup_vocabulary", "warpgroup_scores", "warpgroup_attention")
_ARCHITECTURES = dict.fromkeys(_GROUPS, warpgroup_launch.ARCHITECTURE)
_RESERVE = 128 << 20  # bytes; graphs, the kernels' code and work space are made after all else
_NORMED_ROWS = 512  # up to so many rows layer_norm has a block a row, above a warp a row, with the same results
_QUERIES = 64  # queries that one block of packed_attention takes
_TENSOR_HEAD = 64  # the head size that kernels/tensor_attention.cu is for
_REACH = 32  # steps that a warp of decode_attention looks at together
# Per cent of a multiprocessor's memory that are shared memory, the same for all kernels, since one that must be set up
# anew cannot begin a kernel beside the last; the rest is L1, through which weights come. All of it where products keep
# weights there, otherwise half of it for fp16, and what the driver chooses for the others and for older GPUs. By whole
# steps on an H200.
_MOST_CARVEOUT, _FP16_CARVEOUT, _DRIVERS_CARVEOUT = 100, 50, -1
# Warps of a multiprocessor that attend, by whether on tensor cores; the other registers are for the kernel that comes
# next. By whole steps on an H200.
_ATTENDING_WARPS = {True: 4, False: 8}


@dataclass(frozen=True)
class Matrix:
    """A weight [inner, wide], twice or three times: `plain` for cuBLAS ([wide, inner] if transposed), `packed` and
    `grouped` for our own kernels, those of warps and of warpgroups (None where there is none that would read it). Of
    int8, `packed` alone; of a vocabulary that no kernel takes as int8, `plain` alone.

    plain    has columns of zeros up to a multiple of ALIGNED_COLUMNS: cuBLAS is six times slower with odd ones
    columns  None, or what our own need besides: for a LayerNorm that is folded in (linear_launch.fold), scales of int8
    folded   whether one is
    """

    plain: Array | None
    transposed: bool
    packed: Array | None
    grouped: Array | None
    columns: Array | None
    folded: bool
    inner: int
    wide: int

    @property
    def int8(self) -> bool:
        return self.packed is not None and self.packed.dtype == np.uint8

    @property
    def aligned_width(self) -> int:
        assert self.plain is not None
        return int(self.plain.shape[0 if self.transposed else 1])


class Cuda:
    """Raises ConfigError when the device, its driver or CuPy cannot be used."""

    NAME = "cuda"
    BURSTS_AHEAD = 2
    SCORED_ROWS = 512
    MOST_BEAMS = 32  # kernels/search.cu MAX_WIDTH, kernels/sampling.cu MOST_BEST
    MOST_CANDIDATES = 32  # kernels/standard_search.cu CANDIDATES, and those two
    LOGITS_ALIGNMENT = weight_memory.ALIGNED_COLUMNS

    def __init__(self, device_id: int = 0, precision: str = "fp16", early: bool = True):
        if precision not in PRECISIONS:
            raise ConfigError(f"precision is {precision!r}; a GPU computes in {' or '.join(PRECISIONS)}")
        self.FLOAT, self.PRECISION = PRECISIONS[precision], precision
        self.device_id = device_id
        self._half, self._int8 = precision != "fp32", precision == "int8"
        device.check(cupy.cuda, device_id)
        self._device = cupy.cuda.Device(device_id)
        self._device.use()
        attributes = self._device.attributes
        capability = int(self._device.compute_capability)
        self._limits = linear_launch.Device(
            capability, attributes["MultiProcessorCount"], attributes["MaxSharedMemoryPerBlockOptin"]
        )
        if self._int8 and capability < 75:
            raise ConfigError(
                f"precision is int8, which needs a GPU of compute capability 7.5; this one has {capability / 10}"
            )
        self._early = early and capability >= 90
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._transfers = Transfers(self._stream)
        # For reading what nothing queued writes any more.
        self._late_transfers = Transfers(cupy.cuda.Stream(non_blocking=True), places=1)
        self._workspace = cupy.cuda.alloc(WORKSPACE)
        self._cublas = Cublas(self._stream.ptr, self._workspace.ptr)
        self._kernels: dict[tuple[Any, ...], Kernel] = {}
        self._rooms: dict[str, Array] = {}
        self._halves = cupy.empty(0, np.float16)  # room for an int8 weight as cuBLAS reads it, one at a time
        self._units: dict[int, Any] = {}  # LayerNorms without gain and bias, by width
        self._carveout = _FP16_CARVEOUT if precision == "fp16" and capability >= 90 else _DRIVERS_CARVEOUT

    # Memory and transfer ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Makes device and stream those of the calling thread."""
        self._device.use()
        self._stream.use()

    def matrix(self, array: np.ndarray | Rounded, norm: Any = None) -> Matrix:
        inner, wide = array.shape
        if self._int8:
            self._make_room(array.shape, "matrix")
            return self._int8_matrix(array, norm)
        can = warpgroup_launch.can(self._limits, inner, wide, self._half)
        return self._float_matrix(np.asarray(array), norm, warpgroup_launch.packed if can else None)

    def vocabulary_matrix(self, array: np.ndarray | Rounded, norm: Any = None) -> Matrix:
        inner, wide = array.shape
        if self._int8 and vocabulary_launch.fits(self._limits, inner, half=True):
            self._make_room(array.shape, "vocabulary_matrix")
            return self._int8_matrix(array, norm, vocabulary_launch.without_norm)
        if self._int8:
            log.info("the vocabulary's weights [%d, %d] are fp16: this GPU has no room for int8 ones", inner, wide)
            return self._float_matrix(np.asarray(array), None, None, False)
        if norm is None:  # our own kernels have one folded in
            return self._float_matrix(np.asarray(array), None, None, False)
        can = warpgroup_launch.can_search(self._limits, array.shape[0], self._half)
        return self._float_matrix(np.asarray(array), norm, warpgroup_launch.packed_vocabulary if can else None)

    def _float_matrix(
        self, array: np.ndarray, norm: Any, group: Callable[[Array], Array] | None, packed: bool = True
    ) -> Matrix:
        """With or without what the one or the other of our kernels reads. group: what makes it for warpgroups."""
        inner, wide = array.shape
        transposed = array.T.flags.c_contiguous and not array.flags.c_contiguous
        columns = None
        with self._stream:
            source = self._upload(array.T if transposed else array)
            plain = _with_aligned_columns(source, 0 if transposed else 1)
            if norm is not None:
                whole, gain, bias = (cupy.asarray(part, np.float32) for part in (array, norm.gain, norm.bias))
                source, columns = linear_launch.fold(whole, gain, bias, self.FLOAT)
                source = cupy.ascontiguousarray(source.T if transposed else source)
            strides = (1, inner) if transposed else (wide, 1)
            lanes = self._packed(source, strides, inner, wide) if packed else None
            groups = group(source.T if transposed else source) if group else None
        return Matrix(plain, transposed, lanes, groups, columns, norm is not None, inner, wide)

    def _int8_matrix(
        self, array: np.ndarray | Rounded, norm: Any, without_norm: Callable[[Array], Array] = lambda scales: scales
    ) -> Matrix:
        """without_norm: what the kernel needs beside the numbers where no LayerNorm is folded in, of the scales."""
        inner, wide = array.shape
        with self._stream:
            if norm is not None:
                gain, bias = cupy.ones(inner, self.FLOAT), cupy.zeros(inner, self.FLOAT)
                self._units.setdefault(inner, norm._replace(gain=gain, bias=bias))
                parts = (cupy.asarray(part, np.float32) for part in (array, norm.gain, norm.bias))
                numbers, columns = linear_launch.fold_int8(*parts)
            else:
                if isinstance(array, Rounded):
                    numbers, scales = map(cupy.asarray, (array.numbers, array.scales))
                else:
                    numbers, scales = quantise(cupy.asarray(array, np.float32))
                columns = without_norm(scales)
            packed = self._packed(cupy.ascontiguousarray(numbers), (wide, 1), inner, wide)
        return Matrix(None, False, packed, None, columns, norm is not None, inner, wide)

    def _make_room(self, shape: tuple[int, ...], use: str) -> None:
        """For an int8 weight made halves; before anything that reads there is captured."""
        if (size := self.shared_bytes(shape, use)) > self._halves.nbytes:
            with self._stream:
                self._halves = cupy.empty(size // 2, np.float16)

    def _packed(self, source: Array, strides: tuple[int, int], inner: int, wide: int) -> Array:
        """source in the order of kernels/linear.cu pack_weight; strides: in numbers, of W's two axes."""
        dtype = np.dtype(np.uint8) if self._int8 else self.FLOAT
        packed = cupy.empty(linear_launch.packed_elements(inner, wide, self._half), dtype)
        self._launch(
            "linear", "pack_weight", (-(-packed.nbytes // 16 // 256),), 256, (source, *strides, packed, inner, wide),
            WEIGHT_BITS=linear_launch.weight_bits(self._half, self._int8),
        )  # fmt: skip
        return packed

    def vector(self, array: np.ndarray) -> Array:
        return self._upload(array)

    def table(self, array: np.ndarray) -> Array:
        return self._upload(array)

    def _upload(self, array: np.ndarray) -> Array:
        with self._stream:
            return cupy.asarray(np.ascontiguousarray(array, np.float32)).astype(self.FLOAT, copy=False)

    def weight_bytes(self, shape: tuple[int, ...], use: str) -> int:
        sizes = {"matrix": weight_memory.matrix_bytes, "vocabulary_matrix": weight_memory.vocabulary_bytes}
        if use not in sizes:
            return math.prod(shape) * self.FLOAT.itemsize
        inner, wide = shape
        return sizes[use](self._limits, inner, wide, self._half, self._int8)

    def shared_bytes(self, shape: tuple[int, ...], use: str) -> int:
        if not self._int8 or use not in ("matrix", "vocabulary_matrix"):
            return 0
        inner, wide = shape
        vocabulary = use == "vocabulary_matrix"
        elements = (
            weight_memory.vocabulary_halves(self._limits, inner, wide)
            if vocabulary
            else weight_memory.halves(inner, wide)
        )
        return elements * self.FLOAT.itemsize

    def available_memory(self) -> int:
        cupy.get_default_memory_pool().free_all_blocks()  # what converting the weights has left behind
        return max(0, int(cupy.cuda.runtime.memGetInfo()[0]) - _RESERVE)

    def allocate(self, size: int) -> Any:
        block = cupy.cuda.alloc(size)
        block.memset_async(0, size, self._stream)
        return block

    def view(self, block: Any, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Records are bytes to CuPy: [lanes, bytes of a record]."""
        if dtype in (SLOT, RULES):
            shape, dtype = (*shape, dtype.itemsize), np.dtype(np.uint8)
        return cupy.ndarray(shape, dtype, block + offset)

    def put(self, destination: Array, source: np.ndarray) -> None:
        if source.dtype in (SLOT, RULES):
            source = np.ascontiguousarray(source).view(np.uint8).reshape(destination.shape)
        if destination.size:
            self._transfers.to_device(destination, np.ascontiguousarray(source, destination.dtype))

    def get(self, source: Array) -> np.ndarray:
        return _records(self._late_transfers.to_host(source)())

    def fetch(self, source: Array) -> Callable[[], np.ndarray]:
        wait = self._transfers.to_host(source)
        return lambda: _records(wait())

    def fault(self) -> str | None:
        """An error of the device stays: everything that is asked of it afterwards fails with it."""
        try:
            self._stream.synchronize()
        except Exception as error:  # what CuPy raises differs by its version
            return f"GPU {self.device_id} has failed: {error}"
        return None

    @staticmethod
    def pass_sizes(most: int) -> list[int]:
        """In steps of a third to a half."""
        sizes = [size for power in range(4, most.bit_length()) for size in (1 << power, 3 << power - 1)]
        return [*(size for size in sizes if size < most), most]

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Runs once, which compiles what is new; then records one graph."""
        run()
        self._stream.synchronize()
        self._stream.begin_capture()
        try:
            run()
        except BaseException:
            with contextlib.suppress(Exception):  # that the capture is void is not what went wrong
                self._stream.end_capture()
            raise
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
        (rows, width), pieces = x.shape, 16 // x.itemsize
        arguments = (x, _stride(x), norm.gain, norm.bias, epsilon, out, width)
        if rows > _NORMED_ROWS and width <= 128 * pieces and width % pieces == _stride(x) % pieces == 0:
            self._launch("norm", "layer_norm_rows", (-(-rows // 4),), 128, (*arguments, rows))
        else:
            self._launch("norm", "layer_norm", (rows,), 128, arguments)

    def linear(self, x: Array, linear: Any, out: Array) -> None:
        self._product_for(x, linear.weight)(x, linear, out)

    def norm_linear(
        self, x: Array, norm: Any, linear: Any, epsilon: float, activation: str, normed: Array, out: Array
    ) -> None:
        product = self._product_for(x, linear.weight)
        if product != self._large_product and linear.weight.folded:
            product(x, linear, out, activation=activation, epsilon=epsilon)
            return
        self.layer_norm(x, self._unfolded(norm, linear.weight), epsilon, normed)
        product(normed, linear, out, activation=activation)

    def linear_residual(self, x: Array, linear: Any, residual: Array, out: Array) -> None:
        self._product_for(x, linear.weight)(x, linear, out, residual)

    def packed_attention(self, qkv: Array, starts: Array, heads: int, causal: bool, out: Array) -> None:
        size, sequences = out.shape[1] // heads, len(starts) - 1
        if warpgroup_launch.can_attend(self._limits, size, self._half):
            plan, paired = warpgroup_launch.attention_plan(self._limits, len(qkv), sequences, heads, causal)
            box = _tensor_map(qkv, warpgroup_launch.ATTENDED_BOX)
            self._launch(
                "warpgroup_attention", "warpgroup_attention", plan.grid, plan.threads,
                (box, qkv, starts, out, sequences, heads, int(causal), int(paired)),
                shared=plan.shared, **dict(plan.definitions),
            )  # fmt: skip
            return
        tensor = self._half and self._limits.capability >= 75 and size % 8 == 0
        paired = warpgroup_launch.takes_pairs(self._limits, len(qkv), heads, causal)
        self._launch(
            "attention", "packed_attention_tensor" if tensor else "packed_attention",
            (heads, len(qkv) // (_QUERIES << paired) + min(sequences, _QUERIES)), 128 if tensor else 256,
            (qkv, starts, out, sequences, heads, int(causal), int(paired)), HEAD_SIZE=size,
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
        arguments = (qkv, rows, slots, ancestors, keys, values, out, heads, steps)
        self._attend("decode_attention", (heads, len(rows)), heads * len(rows), steps, 16, arguments, out)

    def cross_attention(
        self, query: Array, rows: Array, slots: Array, keys: Array, values: Array, heads: int, out: Array
    ) -> None:
        steps = keys.shape[1]
        arguments = (query, rows, slots, keys, values, out, heads, steps)
        self._attend("cross_attention", (heads, len(rows)), heads * len(rows) // 4, steps, 4, arguments, out)

    def store(self, key_values: Array, lanes: Array, steps: Array, keys: Array, values: Array) -> None:
        layers, lane_count, most_steps, hidden = keys.shape
        self._launch(
            "attention", "store", (len(lanes), layers), 256,
            (key_values, _stride(key_values), lanes, steps, keys, values, hidden, most_steps, lane_count), HEAD_SIZE=8,
        )  # fmt: skip

    def vocabulary_logits(
        self, x: Array, norm: Any, output: Any, epsilon: float, scale: float, normed: Array, logits: Array
    ) -> None:
        if self._searches(len(x), output.weight):
            x = self._to_be_searched(x, norm, output, epsilon, normed)
            self._vocabulary(x, output, epsilon, scale, logits=logits)
            return
        self._vocabulary_products(x, norm, output, epsilon, normed, logits)
        rows, vocabulary = logits.shape
        if scale != 1 or output.bias is not None:
            self._launch(
                "sampling", "finish_logits", (-(-vocabulary // 1024), min(rows, 65535)), 256,
                (logits, _stride(logits), output.bias, rows, vocabulary, scale),
            )  # fmt: skip

    def apply_rules(
        self, rows: Array, slots: Array, rules: Array, listed: Array, contexts: Array, history: Array, logits: Array,
        normalisations: Array,
    ) -> None:  # fmt: skip
        arguments = (
            rows, slots, rules, listed, contexts, history, logits, _stride(logits), normalisations,
            logits.shape[1], history.shape[1], listed.shape[1],
        )  # fmt: skip
        self._launch("sampling", "apply_rules", (len(rows),), 1024, arguments)

    def top(
        self, logits: Array, banned: int, ids: Array, log_probabilities: Array, normalisations: Array | None = None
    ) -> None:
        self._top(logits, None, banned, ids, log_probabilities, 1.0, normalisations)

    def vocabulary_search(
        self, x: Array, norm: Any, output: Any, epsilon: float, scale: float, normed: Array, logits: Array,
        banned: int, ids: Array, log_probabilities: Array, rows: Array, slots: Array, ancestors: Array, history: Array,
        details: Array,
    ) -> None:  # fmt: skip
        if not self._searches(len(x), output.weight):
            self._vocabulary_products(x, norm, output, epsilon, normed, logits)
            self._top(logits, output.bias, banned, ids, log_probabilities, scale)
            self.beam_step(rows, slots, ancestors, history, details, ids, log_probabilities)
            return
        x, best = self._to_be_searched(x, norm, output, epsilon, normed), ids.shape[1]
        tiles, statistics, choices = self._best_of_tiles(x, output, epsilon, scale, banned, best, rows, slots)
        arguments = (rows, slots, ancestors, history, details, statistics, choices, tiles, best, history.shape[1])
        self._launch("search", "vocabulary_beam_step", (len(rows),), 1024, arguments)

    def vocabulary_standard_search(
        self, x: Array, norm: Any, output: Any, epsilon: float, scale: float, normed: Array, logits: Array,
        banned: int, ids: Array, log_probabilities: Array, rows: Array, slots: Array, ancestors: Array, history: Array,
        details: Array, pool: Array, pool_details: Array,
    ) -> None:  # fmt: skip
        if self._searches(len(x), output.weight):
            x = self._to_be_searched(x, norm, output, epsilon, normed)
            tiles, statistics, choices = self._best_of_tiles(
                x, output, epsilon, scale, banned, ids.shape[1], rows, slots
            )
            arguments = (rows, slots, statistics, choices, ids, log_probabilities, tiles, ids.shape[1])
            self._launch("search", "best_of_tiles", (len(rows),), 1024, arguments)
        else:
            self._vocabulary_products(x, norm, output, epsilon, normed, logits)
            self._top(logits, output.bias, banned, ids, log_probabilities, scale)
        self.standard_step(rows, slots, ancestors, history, details, pool, pool_details, ids, log_probabilities)

    def vocabulary_scores(
        self, x: Array, norm: Any, output: Any, epsilon: float, scale: float, normed: Array, logits: Array,
        targets: Array, out: Array,
    ) -> None:  # fmt: skip
        if self._scores_by_groups(len(x), output.weight):
            x = self._normed(x, self._unfolded(norm, output.weight), epsilon, normed)
            self._group_scores(x, output, scale, targets, out)
            return
        for start in range(0, len(x), len(logits)):
            rows = slice(start, start + len(logits))
            own, normed_rows = x[rows], normed[rows]
            own_logits = logits[: len(own)]
            if self._searches(len(own), output.weight):
                own = self._to_be_searched(own, norm, output, epsilon, normed_rows)
                self._vocabulary(own, output, epsilon, scale, logits=own_logits)
                self.target_log_probabilities(own_logits, targets[rows], out[rows])
                continue
            self._vocabulary_products(own, norm, output, epsilon, normed_rows, own_logits)
            self._target_log_probabilities(own_logits, output.bias, targets[rows], out[rows], scale)

    def target_log_probabilities(self, logits: Array, targets: Array, out: Array) -> None:
        self._target_log_probabilities(logits, None, targets, out, 1.0)

    def beam_step(
        self, rows: Array, slots: Array, ancestors: Array, history: Array, details: Array, ids: Array,
        log_probabilities: Array,
    ) -> None:  # fmt: skip
        arguments = (rows, slots, ancestors, history, details, ids, log_probabilities, ids.shape[1], history.shape[1])
        self._launch("search", "beam_step", (len(rows),), 128, arguments)

    def standard_step(
        self, rows: Array, slots: Array, ancestors: Array, history: Array, details: Array, pool: Array,
        pool_details: Array, ids: Array, log_probabilities: Array,
    ) -> None:  # fmt: skip
        arguments = (
            rows, slots, ancestors, history, details, pool, pool_details, ids, log_probabilities,
            ids.shape[1], history.shape[1],
        )  # fmt: skip
        self._launch("standard_search", "standard_step", (len(rows),), 128, arguments)

    def sample_step(
        self, rows: Array, slots: Array, history: Array, details: Array, logits: Array, banned: int
    ) -> None:
        arrivals = self._room("arrivals", (len(rows),), np.int32)
        stride, vocabulary = _stride(logits), logits.shape[1]
        arguments = (rows, slots, history, details, logits, stride, arrivals, vocabulary, banned, history.shape[1])
        self._launch("sampling", "sample_step", (len(rows),), 1024, arguments)

    # How they are launched --------------------------------------------------------------------------------------------

    def _streams(self, rows: int, weight: Matrix) -> bool:
        return linear_launch.pays(self._limits, rows, weight.inner, weight.wide, self._half)

    def _searches(self, rows: int, weight: Matrix) -> bool:
        if weight.packed is None:
            return False
        if weight.int8 or self._searches_by_groups(rows, weight):
            return True
        fits = vocabulary_launch.fits(self._limits, weight.inner, self._half)
        return rows <= SEARCHED_ROWS and fits and self._streams(1, weight)

    def _searches_by_groups(self, rows: int, weight: Matrix) -> bool:
        return weight.grouped is not None and warpgroup_launch.pays_to_search(rows)

    def _normed(self, x: Array, norm: Any, epsilon: float, normed: Array) -> Array:
        """The LayerNorm of x, in normed, or x where there is none."""
        if norm is None:
            return x
        self.layer_norm(x, norm, epsilon, normed)
        return normed

    def _to_be_searched(self, x: Array, norm: Any, output: Any, epsilon: float, normed: Array) -> Array:
        """What the kernels of the vocabulary read: x, or its LayerNorm where there is one and none is folded in."""
        return self._normed(x, None if output.weight.folded else norm, epsilon, normed)

    def _product_for(self, x: Array, weight: Matrix) -> Callable[..., None]:
        """The fastest of the three for so many rows; of int8 weights there are two."""
        grouped = weight.grouped is not None and x.strides[0] % 16 == x.data.ptr % 16 == 0
        if grouped and warpgroup_launch.pays(self._limits, len(x), weight.inner, weight.wide, weight.folded):
            return self._group_product
        streams = not linear_launch.unpacks(len(x)) if weight.int8 else self._streams(len(x), weight)
        return self._small_product if streams else self._large_product

    def _small_product(
        self, x: Array, linear: Any, out: Array, residual: Array | None = None, activation: str = "none",
        epsilon: float | None = None,
    ) -> None:  # fmt: skip
        """out = residual + activation(x . W + b); with epsilon, of the LayerNorm of x that is folded into W."""
        weight: Matrix = linear.weight
        norm = epsilon is not None
        assert norm == weight.folded
        aligned = weight.inner * x.itemsize % 16 == 0 and x.strides[0] % 16 == 0 and x.data.ptr % 16 == 0
        plan = linear_launch.plan(
            self._limits, len(x), weight.inner, weight.wide, self._half, norm, aligned, weight.int8
        )
        if plan.holds_weights:
            self._carveout = _MOST_CARVEOUT
        arguments = (
            x, _stride(x), weight.packed, weight.columns, epsilon or 0.0, linear.bias,
            residual, 0 if residual is None else _stride(residual), out, _stride(out), len(x), weight.wide,
        )  # fmt: skip
        fours = linear_launch.in_fours(weight.wide, *map(_rows, (linear.bias, residual, out)))
        self._launch(
            "linear", "linear", plan.grid, plan.threads, arguments, shared=plan.shared, cluster=plan.cluster[0],
            FOURS=int(fours), ACTIVATION=_ACTIVATIONS[activation], **dict(plan.definitions),
        )  # fmt: skip

    def _group_product(
        self, x: Array, linear: Any, out: Array, residual: Array | None = None, activation: str = "none",
        epsilon: float | None = None,
    ) -> None:  # fmt: skip
        """As _small_product."""
        weight: Matrix = linear.weight
        norm = epsilon is not None
        plan = warpgroup_launch.plan(self._limits, len(x), weight.inner, weight.wide, norm)
        x_map = _tensor_map(x, dict(plan.definitions)["ROWS"])
        arguments = (
            x_map, weight.grouped, weight.columns, epsilon or 0.0, linear.bias,
            residual, 0 if residual is None else _stride(residual), out, _stride(out), len(x), weight.wide,
        )  # fmt: skip
        self._launch(
            "warpgroup", "warpgroup_linear", plan.grid, plan.threads, arguments, shared=plan.shared,
            cluster=plan.cluster[0], ACTIVATION=_ACTIVATIONS[activation], **dict(plan.definitions),
        )  # fmt: skip

    def _large_product(
        self, x: Array, linear: Any, out: Array, residual: Array | None = None, activation: str = "none"
    ) -> None:
        """out = residual + activation(x . W + b), by cuBLAS; x has been through the LayerNorm in front."""
        if linear.weight.int8:
            linear = self._as_halves(linear, 0, linear.weight.wide)
        weight: Matrix = linear.weight
        complete = self._cublas.product(
            x, weight.plain, weight.transposed, out, bias=linear.bias, activation=activation, residual=residual
        )
        if not complete:
            rows, wide = out.shape
            width = 256 * (8 if self._half else 4)
            self._launch(
                "linear", "bias_activation", (-(-wide // width), min(rows, 65535)), 256,
                (out, linear.bias, rows, wide, _ACTIVATIONS[activation], 1.0),
            )  # fmt: skip

    def _unfolded(self, norm: Any, weight: Matrix) -> Any:
        """The LayerNorm whose result is multiplied by W: of an int8 one that it is folded into, without its gain and
        bias, which stay there."""
        return self._units[weight.inner] if weight.int8 and weight.folded else norm

    def _as_halves(self, linear: Any, first: int, wide: int, scale: float = 1.0) -> Any:
        """Of an int8 linear so many outputs, from a multiple of sixteen on, as a linear of halves; it lasts until the
        next is made. What the bias of a LayerNorm folded in gives is in its bias, scaled as the product will be."""
        weight: Matrix = linear.weight
        assert weight.packed is not None
        assert weight.columns is not None
        outputs, inner = slice(first, first + wide), weight.inner
        columns = weight.columns.reshape(-1, weight.wide)[:, outputs]
        given = bias = None if linear.bias is None else linear.bias[outputs]
        offsets = None
        if weight.folded:
            offsets, bias = columns[1], self._room("bias of halves", (wide,), np.float16)
        stride, begin = weight_memory.aligned(inner), linear_launch.packed_elements(inner, first, half=True)
        halves = self._halves[: weight_memory.halves(inner, wide)].reshape(wide, stride)
        pieces = linear_launch.packed_elements(inner, wide, half=True) // 16
        self._launch(
            "linear", "unpack_weight", (-(-pieces // 256),), 256,
            (weight.packed[begin:], columns[-1], given, offsets, scale, halves, stride, bias if weight.folded else None,
             inner, wide),
            WEIGHT_BITS=8,
        )  # fmt: skip
        return linear._replace(weight=Matrix(halves[:, :inner], True, None, None, None, False, inner, wide), bias=bias)

    def _attend(
        self, name: str, grid: tuple[int, int], working: int, steps: int, most: int, arguments: tuple[Any, ...],
        out: Array,
    ) -> None:  # fmt: skip
        """A step's attention, a block for each head of each row. working: blocks that do; each has up to `most` warps,
        as many as have steps of their own (_REACH each), as long as all of them are on the device together. Results do
        not depend on it."""
        size = out.shape[1] // grid[0]
        tensor = self._half and self._limits.capability >= 75 and size == _TENSOR_HEAD
        together = _ATTENDING_WARPS[tensor] * self._limits.multiprocessors // max(1, working)
        warps = max(1, min(most, -(-steps // _REACH), together))
        family, name = ("tensor_attention", f"{name}_tensor") if tensor else ("attention", name)
        self._launch(family, name, grid, 32 << warps.bit_length() - 1, arguments, HEAD_SIZE=size)

    def _best_of_tiles(
        self, x: Array, output: Any, epsilon: float, scale: float, banned: int, best: int, rows: Array, slots: Array
    ) -> tuple[int, Array, Array]:
        """How many tiles the vocabulary has, and of each row and tile the statistics and the best choices."""
        count, tiles = len(x), vocabulary_launch.tiles(output.weight.wide)
        statistics = self._room("statistics", (count, tiles, 2), np.float32)
        choices = self._room("choices", (count, tiles, best), np.uint64)
        self._vocabulary(
            x, output, epsilon, scale, rows=rows, slots=slots, statistics=statistics, choices=choices,
            best=best, banned=banned,
        )  # fmt: skip
        return tiles, statistics, choices

    def _vocabulary(
        self, x: Array, output: Any, epsilon: float, scale: float, *, rows: Array | None = None,
        slots: Array | None = None, logits: Array | None = None, statistics: Array | None = None,
        choices: Array | None = None, best: int = 1, banned: int = -1,
    ) -> None:  # fmt: skip
        weight: Matrix = output.weight
        assert weight.columns is not None
        if self._searches_by_groups(len(x), weight):
            family = name = "warpgroup_vocabulary"
            plan = warpgroup_launch.vocabulary_plan(self._limits, len(x), weight.inner, weight.wide)
            x_map = _tensor_map(x, dict(plan.definitions)["ROWS"])
            operands = (x_map, weight.grouped)
        else:
            family = name = "vocabulary"
            plan = vocabulary_launch.plan(
                self._limits, len(x), weight.inner, weight.wide, self._half, weight.int8, weight.folded
            )
            operands = (x, weight.packed)
        arguments = (
            *operands, weight.columns, output.bias, rows, slots,
            logits, 0 if logits is None else _stride(logits), statistics, choices,
            len(x), weight.wide, best, banned, epsilon, scale,
        )  # fmt: skip
        self._launch(family, name, plan.grid, plan.threads, arguments, shared=plan.shared, **dict(plan.definitions))

    def _scores_by_groups(self, rows: int, weight: Matrix) -> bool:
        can = weight.int8 or (weight.plain is not None and weight.transposed)
        can = can and warpgroup_launch.can_score(self._limits, weight.inner, self._half)
        return can and warpgroup_launch.pays_to_score(rows)

    def _group_scores(self, x: Array, output: Any, scale: float, targets: Array, out: Array) -> None:
        """vocabulary_scores of what has been through its LayerNorm."""
        inner, vocabulary, int8 = output.weight.inner, output.weight.wide, output.weight.int8
        tiles = warpgroup_launch.scored_tiles(vocabulary)
        statistics = self._room("scored statistics", (len(x), tiles, 2), np.float32)
        kept = self._room("scored targets", (len(x),), np.float32)
        most = warpgroup_launch.scored_part(inner, vocabulary) if int8 else vocabulary
        for first in range(0, vocabulary, most):
            wide = min(most, vocabulary - first)
            part = self._as_halves(output, first, wide, scale) if int8 else output
            plan = warpgroup_launch.scores_plan(self._limits, len(x), inner, wide)
            maps = (_tensor_map(one, warpgroup_launch.SCORED_BOX) for one in (x, part.weight.plain))
            self._launch(
                "warpgroup_scores", "warpgroup_scores", plan.grid, plan.threads,
                (*maps, part.bias, targets, statistics, kept, len(x), wide, scale, first, tiles),
                shared=plan.shared, cluster=plan.cluster[0], **dict(plan.definitions),
            )  # fmt: skip
        arguments = (statistics, kept, out, len(x), tiles)
        self._launch("search", "target_of_tiles", (-(-len(x) // 8),), 256, arguments)

    def _vocabulary_products(
        self, x: Array, norm: Any, output: Any, epsilon: float, normed: Array, logits: Array
    ) -> None:
        """logits = layer_norm(x) . W, or x . W where there is no norm, by cuBLAS, without scale and bias; it may write
        between the rows, too."""
        weight: Matrix = output.weight
        normed = self._normed(x, norm, epsilon, normed)
        wide = weight.aligned_width if _stride(logits) >= weight.aligned_width else None
        self._cublas.product(normed, weight.plain, weight.transposed, logits, wide=wide)

    def _top(
        self, logits: Array, bias: Array | None, banned: int, ids: Array, log_probabilities: Array, scale: float,
        normalisations: Array | None = None,
    ) -> None:  # fmt: skip
        arguments = (
            logits, _stride(logits), bias, ids, log_probabilities, logits.shape[1], ids.shape[1], banned, scale,
            normalisations,
        )  # fmt: skip
        self._launch("sampling", "top", (len(logits),), 1024, arguments)

    def _target_log_probabilities(
        self, logits: Array, bias: Array | None, targets: Array, out: Array, scale: float
    ) -> None:
        arguments = (logits, _stride(logits), bias, targets, out, logits.shape[1], scale)
        self._launch("sampling", "target_log_probabilities", (len(logits),), 1024, arguments)

    def _launch(
        self, family: str, name: str, grid: tuple[int, ...], block: int, arguments: tuple[Any, ...],
        *, shared: int = 0, cluster: int = 1, **defines: int,
    ) -> None:  # fmt: skip
        constants = tuple(sorted({**defines, "HALF": int(self._half)}.items()))
        key = (family, name, constants)
        if key not in self._kernels:
            self._kernels[key] = Kernel(family, name, constants, _ARCHITECTURES.get(family))
        self._kernels[key](
            grid, block, arguments, stream=self._stream.ptr, shared=shared, cluster=cluster, early=self._early,
            carveout=self._carveout,
        )  # fmt: skip

    def _room(self, name: str, shape: tuple[int, ...], dtype: Any) -> Array:
        """Work space of the object's own, zeroed when it is first taken; graphs keep its address, so it never moves."""
        size = int(np.prod(shape))
        if name not in self._rooms or self._rooms[name].size < size:
            self._rooms[f"{name} {len(self._rooms)}"] = self._rooms.get(name)
            with self._stream:
                self._rooms[name] = cupy.zeros(size, dtype)
        return self._rooms[name][:size].reshape(shape)


def _with_aligned_columns(array: Array, axis: int) -> Array:
    missing = weight_memory.aligned(array.shape[axis]) - array.shape[axis]
    if not missing:
        return array
    return cupy.pad(array, [(0, missing) if i == axis else (0, 0) for i in range(2)])


def _tensor_map(matrix: Array, rows: int) -> Any:
    """For copies of so many of its rows."""
    count, inner = matrix.shape
    return warpgroup_launch.tensor_map(driver(), matrix.data.ptr, count, inner, _stride(matrix), rows)


def _stride(array: Array) -> int:
    return int(array.strides[0] // array.itemsize)


def _rows(array: Array | None) -> tuple[int, int, int] | None:
    """Address, the size of a number, and how many numbers its rows are apart."""
    return None if array is None else (array.data.ptr, array.itemsize, _stride(array) if array.ndim > 1 else 0)


def _records(copy: np.ndarray) -> np.ndarray:
    """Bytes that are slots, as slots."""
    is_slots = copy.dtype == np.uint8 and copy.ndim == 2 and copy.shape[1] == SLOT.itemsize
    return copy.view(SLOT)[:, 0] if is_slots else copy
