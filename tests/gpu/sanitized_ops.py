"""Every kernel once and more, over small and ragged cases, for compute-sanitizer to look at: see test_sanitizer.py.

usage: sanitized_ops.py MOST   with the bytes up to which a case is small
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import cupy

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import op_cases

from lightseq_backend import ops
from lightseq_backend.ops.launch import Kernel

LARGE_PRODUCT = "241x257x99"
SCORED = "300x128x1000"  # rows of kernels/warpgroup_scores.cu
GROUP_PRODUCT = "50x192x5504"  # kernels/warpgroup.cu
GROUP_HEAD = op_cases.Shape(40, 1024, 500)  # kernels/warpgroup_vocabulary.cu
ATTENTION = "300 64/1"  # kernels/warpgroup_attention.cu
WIDEST = 1000  # of a vocabulary
MORE_HEADS = (op_cases.Shape(70, 64, 257), op_cases.Shape(99, 64, 264, transposed=True, bias=False))  # rows of cuBLAS


def small_cases(most: int) -> list[op_cases.Case]:
    """Those of up to so many bytes, and of every operation the smallest."""
    op_cases.HEADS = (*(shape for shape in op_cases.HEADS if shape.wide <= WIDEST), *MORE_HEADS)
    cases = op_cases.cases()
    extra = {LARGE_PRODUCT, GROUP_PRODUCT, ATTENTION, str(GROUP_HEAD), *(str(shape) for shape in MORE_HEADS)}
    least: dict[str, int] = {}
    for case in cases:
        least[case.op] = min(case.bytes(), least.get(case.op, case.bytes()))
    return [
        case
        for case in cases
        if case.bytes() <= max(most, least[case.op]) or any(case.name.startswith(e) for e in extra)
    ]


def refuse_epilogues(gpu: Any) -> None:
    """As where cuBLAS has no product that adds bias and activation itself, and a kernel of ours must."""
    cublas = gpu._cublas
    make = cublas._make
    cublas._plans.clear()
    cublas._make = lambda product: make(product) if product.epilogue == 1 else []


def main(most: int) -> None:
    # Every array becomes an allocation of its own, so that none lies where another one's overrun goes unseen.
    cupy.cuda.set_allocator(None)
    launched = set()
    launch = Kernel.__call__

    def recording(kernel: Kernel, *arguments: Any, **named: Any) -> None:
        launched.add(kernel.name)
        launch(kernel, *arguments, **named)

    Kernel.__call__ = recording  # type: ignore[method-assign]
    cases, started = small_cases(most), time.monotonic()
    for precision in ("fp16", "fp32"):
        gpu = ops.load("cuda", 0, precision)
        gpu.start()
        for case in cases:
            op_cases.run(gpu, case)
        refuse_epilogues(gpu)
        for case in cases:
            if case.name.startswith(LARGE_PRODUCT):
                op_cases.run(gpu, case)
    gpu = ops.load("cuda", 0, "int8")
    gpu.start()
    halved = [case for case in op_cases.cases() if case.name.startswith((LARGE_PRODUCT, SCORED))]
    for case in halved:
        op_cases.run(gpu, case)
    cupy.cuda.runtime.deviceSynchronize()
    print(f"{2 * len(cases) + len(halved)} cases in {time.monotonic() - started:.1f} s")
    print("launched", *sorted(launched), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
