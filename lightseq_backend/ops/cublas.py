"""cuBLAS for the large products, through ctypes on the library that CuPy has loaded.

CuPy's own wrapper refuses a capturing stream and cannot set a workspace; the library can do both.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

from lightseq_backend.errors import ConfigError

_OPERATION = {False: 0, True: 1}  # CUBLAS_OP_N, CUBLAS_OP_T
_TYPE = {"float32": 0, "float16": 2}  # CUDA_R_32F, CUDA_R_16F
_COMPUTE_32F, _COMPUTE_32F_FAST_TF32 = 68, 77
_DEFAULT_ALGORITHM = -1
WORKSPACE = 32 << 20  # bytes; what NVIDIA advises for Hopper


class Cublas:
    """A handle on one stream, with a workspace of its own, so that its calls can be captured in a graph."""

    def __init__(self, stream: int, workspace: int, tf32: bool = False):
        """stream: cudaStream_t; workspace: device address of WORKSPACE bytes."""
        self._library = _library()
        self._handle = ctypes.c_void_p()
        self._compute = _COMPUTE_32F_FAST_TF32 if tf32 else _COMPUTE_32F
        self._call("cublasCreate_v2", ctypes.byref(self._handle))
        # Setting the stream takes the workspace away: the order matters.
        self._call("cublasSetStream_v2", self._handle, ctypes.c_void_p(stream))
        self._call("cublasSetWorkspace_v2", self._handle, ctypes.c_void_p(workspace), ctypes.c_size_t(WORKSPACE))

    def product(self, x: Any, weight: Any, transposed: bool, out: Any, add: bool = False) -> None:
        """out = x . weight, or out += x . weight; float32 sums.

        x: [rows, in]; weight: [in, out], or [out, in] if transposed; out: [rows, out]. The rows
        of x and out may lie further apart than they are long.
        """
        rows, depth = x.shape
        width = out.shape[1]
        # cuBLAS counts by columns, so it is asked for out^T = weight^T . x^T.
        self._call(
            "cublasGemmEx",
            self._handle,
            _OPERATION[transposed],
            _OPERATION[False],
            width,
            rows,
            depth,
            ctypes.byref(ctypes.c_float(1.0)),
            ctypes.c_void_p(weight.data.ptr),
            _TYPE[weight.dtype.name],
            depth if transposed else width,
            ctypes.c_void_p(x.data.ptr),
            _TYPE[x.dtype.name],
            x.strides[0] // x.itemsize,
            ctypes.byref(ctypes.c_float(float(add))),
            ctypes.c_void_p(out.data.ptr),
            _TYPE[out.dtype.name],
            out.strides[0] // out.itemsize,
            self._compute,
            _DEFAULT_ALGORITHM,
        )

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise RuntimeError(f"{name} failed with status {status}")


def _library() -> ctypes.CDLL:
    import cupy_backends.cuda.libs.cublas as loaded  # loads the library as CuPy finds it

    handle = loaded.create()  # some versions of CuPy load it at the first call only
    loaded.destroy(handle)
    for line in Path("/proc/self/maps").read_text().splitlines():
        match = re.search(r"(/\S*libcublas\.so\S*)$", line)
        if match:
            return ctypes.CDLL(match.group(1))
    raise ConfigError("CuPy has loaded no libcublas: install the extra cuda12 or cuda13")
