"""The linear, norm and embed kernels as an ops module, run on the CPU: what ops/cuda.py is on a GPU, without one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from cuda_on_cpu import Kernels, TensorMap

from lightseq_backend.models.layers import Linear, Norm
from lightseq_backend.ops import cpu, linear_launch, warpgroup_launch
from lightseq_backend.ops.int8 import quantise
from lightseq_backend.quantised import Rounded

Array = np.ndarray[Any, Any]
ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "gelu_erf": 3, "silu": 4}


def integers(*values: int) -> tuple[np.int32, ...]:
    return tuple(np.int32(value) for value in values)


@dataclass(frozen=True)
class Packed:
    """A weight [inner, wide] in the orders that `linear` and `warpgroup_linear` read it in."""

    memory: Array
    grouped: Array | None
    columns: Array | None
    folded: bool
    inner: int
    wide: int


class Ops:
    """Functions of ops/cpu.py by kernels compiled for a device; `matrix` takes any strides."""

    def __init__(self, half: bool, device: linear_launch.Device, int8: bool = False):
        self.FLOAT = np.dtype(np.float16 if half else np.float32)
        self.half, self.device, self.int8 = half, device, int8
        self.allocate, self.view, self.put, self.fetch = cpu.allocate, cpu.view, cpu.put, cpu.fetch

    def kernels(self, source: str, **definitions: int) -> Kernels:
        return Kernels(source, **{"HALF": int(self.half), **definitions})

    def vector(self, array: Array) -> Array:
        return np.ascontiguousarray(array, self.FLOAT)

    def table(self, array: Array) -> Array:
        return np.ascontiguousarray(array, self.FLOAT)

    def matrix(self, array: Array | Rounded, norm: Norm | None = None) -> Packed:
        if isinstance(array, Rounded):
            return self._packed(array.numbers, array.scales, False)
        source, columns = np.asarray(array, np.float32 if self.int8 else None), None
        if norm is not None and self.int8:
            source, columns = linear_launch.fold_int8(source, *(part.astype(np.float32) for part in norm))
        elif norm is not None:
            source, columns = linear_launch.fold(source, norm.gain, norm.bias, self.FLOAT)
        elif self.int8:
            source, columns = quantise(source)
        if not self.int8:
            source = source.astype(self.FLOAT)  # keeps the order of a transposed view
        return self._packed(source, columns, norm is not None)

    def _packed(self, source: Array, columns: Array | None, folded: bool) -> Packed:
        inner, wide = source.shape
        count = linear_launch.packed_elements(inner, wide, self.half)
        memory = np.full(count, 77, np.uint8) if self.int8 else np.full(count, np.nan, self.FLOAT)
        strides = (np.int64(stride // source.itemsize) for stride in source.strides)
        kernels = self.kernels("linear.cu", WEIGHT_BITS=linear_launch.weight_bits(self.half, self.int8))
        arguments = (source, *strides, memory, *integers(inner, wide))
        kernels.launch("pack_weight", -(-memory.nbytes // 16 // 256), 256, arguments)
        can = not self.int8 and warpgroup_launch.can(self.device, inner, wide, self.half)
        grouped = warpgroup_launch.packed(source) if can else None
        return Packed(memory, grouped, columns, folded, inner, wide)

    def embed_tokens(
        self, tokens: Array, positions: Array, token_table: Array, position_table: Array, out: Array
    ) -> None:
        arguments = (tokens, positions, token_table, position_table, out, np.int32(out.shape[1]))
        self.kernels("embed.cu").launch("embed_tokens", len(out), 128, arguments)

    def embed_rows(self, rows: Array, slots: Array, token_table: Array, position_table: Array, out: Array) -> None:
        arguments = (rows, slots, token_table, position_table, out, np.int32(out.shape[1]))
        self.kernels("embed.cu").launch("embed_rows", len(out), 128, arguments)

    def layer_norm(self, x: Array, norm: Norm, epsilon: float, out: Array) -> None:
        width = np.int32(x.shape[1])
        arguments = (x, width, norm.gain, norm.bias, np.float32(epsilon), out, width)
        kernels, pieces = self.kernels("norm.cu"), 16 // x.itemsize
        if len(x) > 512 and width <= 128 * pieces and width % pieces == 0:
            kernels.launch("layer_norm_rows", -(-len(x) // 4), 128, (*arguments, np.int32(len(x))))
        else:
            kernels.launch("layer_norm", len(x), 128, arguments)

    def linear(self, x: Array, linear: Linear, out: Array) -> None:
        self.product(x, linear, out)

    def linear_residual(self, x: Array, linear: Linear, residual: Array, out: Array) -> None:
        self.product(x, linear, out, residual)

    def product(
        self, x: Array, linear: Linear, out: Array, residual: Array | None = None,
        activation: str = "none",
    ) -> None:  # fmt: skip
        """out = residual + activation(x . W + b); x, out and residual may be slices of columns."""
        self._launch(x, linear, out, residual, activation)

    def norm_linear(
        self, x: Array, norm: Norm, linear: Linear, epsilon: float, activation: str, normed: Array, out: Array
    ) -> None:
        if not linear.weight.folded:
            self.layer_norm(x, norm, epsilon, normed)
            self._launch(normed, linear, out, None, activation)
        else:
            self._launch(x, linear, out, None, activation, epsilon=epsilon)

    def _launch(
        self, x: Array, linear: Linear, out: Array, residual: Array | None, activation: str,
        epsilon: float | None = None,
    ) -> None:  # fmt: skip
        weight: Packed = linear.weight
        if weight.grouped is not None and warpgroup_launch.pays(
            self.device, len(x), weight.inner, weight.wide, weight.folded
        ):
            self._launch_groups(x, linear, out, residual, activation, epsilon)
            return
        aligned = weight.inner * x.itemsize % 16 == 0 and x.strides[0] % 16 == 0 and x.ctypes.data % 16 == 0
        norm = epsilon is not None
        plan = linear_launch.plan(self.device, len(x), weight.inner, weight.wide, self.half, norm, aligned, self.int8)
        arguments = (
            x, self._stride(x), weight.memory, weight.columns, np.float32(epsilon or 0), linear.bias,
            residual, np.int32(0) if residual is None else self._stride(residual), out, self._stride(out),
            *integers(len(x), weight.wide),
        )  # fmt: skip
        fours = linear_launch.in_fours(weight.wide, *map(_rows, (linear.bias, residual, out)))
        definitions = {"FOURS": int(fours), "ACTIVATION": ACTIVATIONS[activation], **dict(plan.definitions)}
        kernels = Kernels("linear.cu", **definitions)
        kernels.launch("linear", plan.grid, plan.threads, arguments, plan.shared, plan.cluster)

    def _launch_groups(
        self, x: Array, linear: Linear, out: Array, residual: Array | None, activation: str, epsilon: float | None
    ) -> None:
        weight: Packed = linear.weight
        plan = warpgroup_launch.plan(self.device, len(x), weight.inner, weight.wide, epsilon is not None)
        definitions = dict(plan.definitions)
        arguments = (
            TensorMap(x, (64, definitions["ROWS"])), weight.grouped, weight.columns, np.float32(epsilon or 0),
            linear.bias, residual, np.int32(0) if residual is None else self._stride(residual),
            out, self._stride(out), *integers(len(x), weight.wide),
        )  # fmt: skip
        kernels = Kernels("warpgroup.cu", ACTIVATION=ACTIVATIONS[activation], **definitions)
        kernels.launch("warpgroup_linear", plan.grid, plan.threads, arguments, plan.shared, plan.cluster)

    @staticmethod
    def _stride(array: Array) -> np.int32:
        return np.int32(array.strides[0] // array.itemsize)


def _rows(array: Array | None) -> tuple[int, int, int] | None:
    """Address, the size of a number, and how many numbers its rows are apart."""
    if array is None:
        return None
    return array.ctypes.data, array.itemsize, array.strides[0] // array.itemsize if array.ndim > 1 else 0


def row_in_company(
    ops: Ops, x: Array, own: Norm, linear: Linear, activation: str, companies: Sequence[tuple[int, int]]
) -> list[Array]:
    """What becomes of row 5 of x in each company of rows, the first and the one after the last; through `own` and
    `activation` where the weight has a LayerNorm folded in."""
    results = []
    for first, last in companies:
        part, out = x[first:last], np.full((last - first, linear.weight.wide), np.nan, ops.FLOAT)
        if linear.weight.folded:
            ops.norm_linear(part, own, linear, 1e-6, activation, np.empty_like(part), out)
        else:
            ops.linear(part, linear, out)
        results.append(out[5 - first])
    return results
