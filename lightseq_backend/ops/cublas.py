"""cuBLAS for the large products, through ctypes on the libraries that CuPy has loaded.

cuBLASLt is called, the part of cuBLAS that adds a bias, an activation and a residual in the same kernel, and that needs
no handle bound to a stream. CuPy's own wrapper has no such epilogues and refuses a capturing stream.
"""

from __future__ import annotations

import ctypes
import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lightseq_backend.errors import ConfigError
from lightseq_backend.ops.quickest import quickest

WORKSPACE = 32 << 20  # bytes; what NVIDIA advises for Hopper
_TYPE = {"float32": 0, "float16": 2}  # CUDA_R_32F, CUDA_R_16F
_COMPUTE_32F, _COMPUTE_32F_FAST_TF32 = 68, 77
_TRANSPOSE, _EPILOGUE, _BIAS_POINTER = 3, 7, 8  # cublasLtMatmulDescAttributes_t
_PLAIN, _BIAS = 1, 4  # cublasLtEpilogue_t
_ACTIVATIONS = {"none": 0, "relu": 2, "gelu": 32}  # its GELU is the tanh form
_MOST_WORKSPACE, _ALIGNMENTS = 1, (5, 6, 7, 8)  # cublasLtMatmulPreferenceAttributes_t; of A, B, C, D
_ALIGNED = 256  # bytes; no algorithm wants more
# cuBLAS proposes by what it knows, not by what it measures: on an H200 its first proposal for some hundreds of rows
# takes up to half as long again as its best. For so many rows the first few are measured; also of those without a
# workspace, for where it has one it hands out tiles by a counter, which it clears in front of every product.
_MEASURED, _PROPOSALS = 512, 8


class _Algorithm(ctypes.Structure):
    _fields_ = [("data", ctypes.c_uint64 * 8)]


class _Found(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t"""

    _fields_ = [
        ("algorithm", _Algorithm),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    ]


@dataclass(frozen=True)
class _Product:
    """What an algorithm is chosen by. Counted by columns as cuBLAS does: out^T [wide, rows] = W^T . x^T.

    strides     numbers from one row to the next: of the weight, of x, of the residual, of out
    alignments  bytes, of their addresses
    """

    rows: int
    inner: int
    wide: int
    transposed: bool
    types: tuple[str, str]
    strides: tuple[int, int, int, int]
    alignments: tuple[int, int, int, int]
    epilogue: int


class _Operands(NamedTuple):
    """Arrays of CuPy. added: what `beta`, 0 or 1, times is added to the product; it may be `out`."""

    weight: Any
    x: Any
    added: Any
    out: Any
    bias: Any
    beta: float

    @property
    def matrices(self) -> tuple[Any, ...]:
        return self[:4]


@dataclass(frozen=True)
class _Plan:
    """biased: whether the bias is added by it; workspace: bytes it may take"""

    description: ctypes.c_void_p
    layouts: tuple[ctypes.c_void_p, ...]  # of the weight, x, the residual, out
    algorithm: _Algorithm
    biased: bool
    workspace: int


class Cublas:
    """Products on one stream, with a workspace of its own, so that its calls can be captured in a graph."""

    def __init__(self, stream: int, workspace: int, tf32: bool = False):
        """stream: cudaStream_t; workspace: device address of WORKSPACE bytes, which concurrent products must not share.

        tf32: let float32 products round their operands to TF32.
        """
        self._library = _library()
        self._stream, self._workspace = ctypes.c_void_p(stream), ctypes.c_void_p(workspace)
        self._compute = _COMPUTE_32F_FAST_TF32 if tf32 else _COMPUTE_32F
        self._handle = ctypes.c_void_p()
        self._call("cublasLtCreate", ctypes.byref(self._handle))
        self._plans: dict[_Product, _Plan | None] = {}

    def product(
        self, x: Any, weight: Any, transposed: bool, out: Any, *,
        bias: Any = None, activation: str = "none", residual: Any = None, wide: int | None = None,
    ) -> bool:  # fmt: skip
        """out = [residual +] activation(x . weight + bias); float32 sums. False: bias and activation are still to do.

        x: [rows, in]; weight: [in, wide], or [wide, in] if transposed; residual, which excludes an activation, and out:
        [rows, wide]; bias: [wide], of out's type. Rows may lie further apart than they are long.
        wide: columns to compute, where it is more than out is said to have (there must be room between its rows).
        """
        assert residual is None or activation == "none"
        wide = wide or out.shape[1]
        epilogue = _PLAIN  # where cuBLAS lacks the activation, it is left to the caller, and the bias with it
        if activation in _ACTIVATIONS:
            epilogue = _ACTIVATIONS[activation] | (0 if bias is None else _BIAS) or _PLAIN
        added, beta = (out, 0.0) if residual is None else (residual, 1.0)
        operands = _Operands(weight, x, added, out, bias, beta)
        plan = self._plan(operands, wide, transposed, epilogue)
        if plan is None and epilogue != _PLAIN:
            epilogue, plan = _PLAIN, self._plan(operands, wide, transposed, _PLAIN)
        if plan is None:
            raise RuntimeError(f"cuBLAS has no product of {x.shape} and {weight.shape} in {x.dtype.name}")
        self._run(plan, operands)
        return epilogue != _PLAIN or (bias is None and activation == "none")

    def _run(self, plan: _Plan, operands: _Operands) -> None:
        if plan.biased:
            self._describe(plan.description, _BIAS_POINTER, ctypes.c_void_p(operands.bias.data.ptr))
        of_weight, of_x, of_added, of_out = plan.layouts
        at_weight, at_x, at_added, at_out = (ctypes.c_void_p(one.data.ptr) for one in operands.matrices)
        self._call(
            "cublasLtMatmul", self._handle, plan.description,
            ctypes.byref(ctypes.c_float(1.0)), at_weight, of_weight, at_x, of_x,
            ctypes.byref(ctypes.c_float(operands.beta)), at_added, of_added, at_out, of_out,
            ctypes.byref(plan.algorithm), self._workspace, ctypes.c_size_t(plan.workspace), self._stream,
        )  # fmt: skip

    def _plan(self, operands: _Operands, wide: int, transposed: bool, epilogue: int) -> _Plan | None:
        rows, inner = operands.x.shape
        strides = [one.strides[0] // one.itemsize for one in operands.matrices]
        alignments = [min(_ALIGNED, one.data.ptr & -one.data.ptr) for one in operands.matrices]
        key = _Product(
            rows, inner, wide, transposed, (operands.x.dtype.name, operands.out.dtype.name),
            (strides[0], strides[1], strides[2], strides[3]),
            (alignments[0], alignments[1], alignments[2], alignments[3]), epilogue,
        )  # fmt: skip
        if key not in self._plans:
            plans = self._make(key)
            self._plans[key] = self._quickest(plans, operands) if plans else None
        return self._plans[key]

    def _quickest(self, plans: list[_Plan], operands: _Operands) -> _Plan:
        """The first, where rows are few or there is no memory for trying the others."""
        if operands.x.shape[0] < _MEASURED or len(plans) == 1:
            return plans[0]
        if operands.beta:  # what is added may lie where the sum goes
            out = operands.out
            try:
                operands = operands._replace(out=type(out)(out.strides[0] * len(out), np.uint8))
            except MemoryError:  # CuPy's own is one
                return plans[0]
        ways = [functools.partial(self._run, plan, operands) for plan in plans]
        return plans[quickest(ways, self._stream.value or 0)]

    def _make(self, product: _Product) -> list[_Plan]:
        """With each of the first algorithms that cuBLAS proposes, its first choice in front; none where it has none."""
        description = ctypes.c_void_p()
        self._call("cublasLtMatmulDescCreate", ctypes.byref(description), self._compute, _TYPE["float32"])
        self._describe(description, _TRANSPOSE, ctypes.c_int32(product.transposed))
        self._describe(description, _EPILOGUE, ctypes.c_uint32(product.epilogue))
        rows, inner, wide = product.rows, product.inner, product.wide
        shapes = ((inner, wide) if product.transposed else (wide, inner), (inner, rows), (wide, rows), (wide, rows))
        of_inputs, of_results = product.types
        types = (of_inputs, of_inputs, of_results, of_results)
        layouts = tuple(map(self._layout, types, shapes, product.strides))
        biased = bool(product.epilogue & _BIAS)
        return [
            _Plan(description, layouts, algorithm, biased, workspace)
            for workspace in ((WORKSPACE, 0) if rows >= _MEASURED else (WORKSPACE,))
            for algorithm in self._proposed(product, description, layouts, workspace)
        ]

    def _proposed(
        self, product: _Product, description: ctypes.c_void_p, layouts: tuple[ctypes.c_void_p, ...], workspace: int
    ) -> list[_Algorithm]:
        preference = ctypes.c_void_p()
        self._call("cublasLtMatmulPreferenceCreate", ctypes.byref(preference))
        self._prefer(preference, _MOST_WORKSPACE, ctypes.c_uint64(workspace))
        for attribute, alignment in zip(_ALIGNMENTS, product.alignments):
            self._prefer(preference, attribute, ctypes.c_uint32(alignment))
        found, count = (_Found * _PROPOSALS)(), ctypes.c_int()
        status = self._library.cublasLtMatmulAlgoGetHeuristic(
            self._handle, description, *layouts, preference, _PROPOSALS, found, ctypes.byref(count)
        )
        self._call("cublasLtMatmulPreferenceDestroy", preference)
        return [] if status else [one.algorithm for one in found[: count.value] if not one.state]

    def _layout(self, kind: str, shape: tuple[int, int], stride: int) -> ctypes.c_void_p:
        layout = ctypes.c_void_p()
        rows, columns = (ctypes.c_uint64(size) for size in shape)
        self._call(
            "cublasLtMatrixLayoutCreate", ctypes.byref(layout), _TYPE[kind], rows, columns, ctypes.c_int64(stride)
        )
        return layout

    def _describe(self, description: ctypes.c_void_p, attribute: int, value: Any) -> None:
        size = ctypes.c_size_t(ctypes.sizeof(value))
        self._call("cublasLtMatmulDescSetAttribute", description, attribute, ctypes.byref(value), size)

    def _prefer(self, preference: ctypes.c_void_p, attribute: int, value: Any) -> None:
        size = ctypes.c_size_t(ctypes.sizeof(value))
        self._call("cublasLtMatmulPreferenceSetAttribute", preference, attribute, ctypes.byref(value), size)

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise RuntimeError(f"{name} failed with status {status}")


def _library() -> ctypes.CDLL:
    import cupy_backends.cuda.libs.cublas as loaded  # loads the library as CuPy finds it

    handle = loaded.create()  # some versions of CuPy load it at the first call only
    loaded.destroy(handle)
    for line in Path("/proc/self/maps").read_text().splitlines():
        match = re.search(r"(/\S*libcublasLt\.so\S*)$", line)
        if match:
            return ctypes.CDLL(match.group(1))
    raise ConfigError("CuPy has loaded no libcublasLt: install the extra cuda12 or cuda13")
