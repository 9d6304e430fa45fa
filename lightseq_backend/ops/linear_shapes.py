"""Shapes of kernels/linear.cu's blocks that were measured: by whole steps of the models named, one product after the
other (`python -m benchmarks.gpu_tune`). linear_launch.py has rules for all other products, precisions and devices."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """How a product is divided.

    outputs  columns of the result that a block takes: 32, 48 or 64
    split    blocks of a cluster that share a sum
    warps    of a block, which share it further
    depth    chunks of a warp whose weights are under way in registers
    late     whether the next kernel may begin only once x is on its way
    ahead    chunks of a warp behind those in registers that are under way to shared memory
    """

    outputs: int
    split: int
    warps: int
    depth: int
    late: bool
    ahead: int = 0


Product = tuple[int, int, bool]  # inner, wide, whether a LayerNorm is folded in
Shapes = dict[int, Shape]  # by the most rows that each is for; all with the same split and warps: the order of a sum

MOST_ROWS = (8, 16, 32, 128)
Table = dict[Product, Shapes]
H200_FP16: Table = {
    (1024, 3072, True): {  # Transformer-big: queries, keys and values
        8: Shape(48, 1, 8, 4, False),
        16: Shape(32, 1, 8, 4, False),
        32: Shape(32, 1, 8, 4, False),
    },
    (1024, 1024, False): {  # Transformer-big: output of attention
        8: Shape(32, 2, 4, 4, False),
        16: Shape(64, 2, 4, 4, False),
        32: Shape(48, 2, 4, 4, True),
    },
    (1024, 1024, True): {  # Transformer-big: query of cross attention
        8: Shape(64, 2, 4, 4, False),
        16: Shape(48, 2, 4, 4, False),
        32: Shape(32, 2, 4, 4, True),
        128: Shape(32, 2, 4, 4, False),
    },
    (1024, 4096, True): {  # Transformer-big: FFN 1
        8: Shape(64, 2, 8, 2, False),
        16: Shape(48, 2, 8, 2, False),
        32: Shape(64, 2, 8, 2, False),
    },
    (4096, 1024, False): {  # Transformer-big: FFN 2
        8: Shape(48, 4, 8, 4, False),
        16: Shape(32, 4, 8, 4, False),
        32: Shape(64, 4, 8, 2, True),
    },
    (512, 1536, True): {  # Transformer-base: queries, keys and values
        8: Shape(32, 2, 8, 1, False),
        16: Shape(32, 2, 8, 1, False),
        32: Shape(48, 2, 8, 1, False),
    },
    (512, 512, False): {  # Transformer-base: output of attention
        8: Shape(32, 4, 4, 1, False),
        16: Shape(48, 4, 4, 1, True),
        32: Shape(48, 4, 4, 1, True),
        128: Shape(64, 4, 4, 1, False),
    },
    (512, 512, True): {  # Transformer-base: query of cross attention
        8: Shape(64, 4, 4, 1, True),
        16: Shape(48, 4, 4, 1, False),
        32: Shape(32, 4, 4, 1, False),
        128: Shape(48, 4, 4, 1, False),
    },
    (512, 2048, True): {  # Transformer-base: FFN 1
        8: Shape(64, 1, 8, 2, False),
        16: Shape(48, 1, 8, 2, False),
        32: Shape(32, 1, 8, 2, True),
        128: Shape(32, 1, 8, 2, True),
    },
    (2048, 512, False): {  # Transformer-base: FFN 2
        8: Shape(48, 4, 4, 4, False),
        16: Shape(64, 4, 4, 4, True),
        32: Shape(48, 4, 4, 4, True),
        128: Shape(48, 4, 4, 4, False),
    },
    (768, 2304, True): {  # GPT-2 124M: queries, keys and values
        8: Shape(48, 1, 8, 3, False),
        16: Shape(64, 1, 8, 3, False),
        32: Shape(64, 1, 8, 2, True),
    },
    (768, 768, False): {  # GPT-2 124M: output of attention
        8: Shape(48, 2, 8, 2, False),
        16: Shape(32, 2, 8, 2, False),
        32: Shape(32, 2, 8, 2, True),
    },
    (768, 3072, True): {  # GPT-2 124M: FFN 1
        8: Shape(48, 2, 4, 3, False),
        16: Shape(64, 2, 4, 2, True),
        32: Shape(64, 2, 4, 3, True),
    },
    (3072, 768, False): {  # GPT-2 124M: FFN 2
        8: Shape(64, 4, 8, 3, False),
        16: Shape(64, 4, 8, 3, True),
        32: Shape(32, 4, 8, 3, True),
    },
}
H200_FP32: Table = {
    (1024, 3072, True): {  # Transformer-big: queries, keys and values
        8: Shape(64, 4, 4, 4, True),
        16: Shape(64, 4, 4, 3, False),
        32: Shape(64, 4, 4, 2, False),
        128: Shape(64, 4, 4, 2, False),
    },
    (1024, 1024, False): {  # Transformer-big: output of attention
        8: Shape(32, 4, 8, 2, False),
        16: Shape(64, 4, 8, 2, False),
        32: Shape(48, 4, 8, 2, False),
        128: Shape(32, 4, 8, 2, False),
    },
    (1024, 1024, True): {  # Transformer-big: query of cross attention
        8: Shape(48, 4, 8, 2, False),
        16: Shape(32, 4, 8, 2, False),
        32: Shape(48, 4, 8, 2, False),
        128: Shape(48, 4, 8, 2, False),
    },
    (1024, 4096, True): {  # Transformer-big: FFN 1
        8: Shape(64, 2, 8, 2, False),
        16: Shape(64, 2, 8, 4, True),
        32: Shape(64, 2, 8, 2, False),
        128: Shape(64, 2, 8, 2, False),
    },
    (4096, 1024, False): {  # Transformer-big: FFN 2
        8: Shape(32, 4, 8, 4, False),
        16: Shape(32, 4, 8, 4, False),
        32: Shape(48, 4, 8, 4, False),
        128: Shape(48, 4, 8, 2, False),
    },
}
H200_INT8: Table = {
    (1024, 3072, True): {  # Transformer-big: queries, keys and values
        8: Shape(64, 2, 8, 2, True),
        16: Shape(48, 2, 8, 2, True),
        32: Shape(64, 2, 8, 2, False),
        128: Shape(48, 2, 8, 2, False),
    },
    (1024, 1024, False): {  # Transformer-big: output of attention
        8: Shape(32, 2, 8, 2, False),
        16: Shape(32, 2, 8, 2, True),
        32: Shape(32, 2, 8, 2, True),
        128: Shape(64, 2, 8, 2, False),
    },
    (1024, 1024, True): {  # Transformer-big: query of cross attention
        8: Shape(32, 4, 4, 2, False),
        16: Shape(64, 4, 4, 2, False),
        32: Shape(32, 4, 4, 2, False),
        128: Shape(64, 4, 4, 2, False),
    },
    (1024, 4096, True): {  # Transformer-big: FFN 1
        8: Shape(48, 1, 4, 8, False),
        16: Shape(32, 1, 4, 8, True),
        32: Shape(32, 1, 4, 8, False),
        128: Shape(64, 1, 4, 4, True),
    },
    (4096, 1024, False): {  # Transformer-big: FFN 2
        8: Shape(64, 2, 8, 8, True),
        16: Shape(32, 2, 8, 8, True),
        32: Shape(48, 2, 8, 8, True),
        128: Shape(64, 2, 8, 6, True),
    },
    (512, 1536, True): {  # Transformer-base: queries, keys and values
        8: Shape(32, 2, 8, 1, False),
        16: Shape(48, 2, 8, 1, False),
        32: Shape(64, 2, 8, 1, True),
        128: Shape(48, 2, 8, 1, False),
    },
    (512, 512, False): {  # Transformer-base: output of attention
        8: Shape(32, 2, 4, 2, False),
        16: Shape(32, 2, 4, 2, True),
        32: Shape(32, 2, 4, 2, True),
        128: Shape(32, 2, 4, 2, True),
    },
    (512, 512, True): {  # Transformer-base: query of cross attention
        8: Shape(32, 4, 4, 1, False),
        16: Shape(32, 4, 4, 1, False),
        32: Shape(32, 4, 4, 1, False),
        128: Shape(32, 4, 4, 1, False),
    },
    (512, 2048, True): {  # Transformer-base: FFN 1
        8: Shape(64, 2, 8, 1, True),
        16: Shape(64, 2, 8, 1, True),
        32: Shape(48, 2, 8, 1, True),
        128: Shape(64, 2, 8, 1, True),
    },
    (2048, 512, False): {  # Transformer-base: FFN 2
        8: Shape(64, 4, 8, 2, True),
        16: Shape(32, 4, 8, 2, True),
        32: Shape(64, 4, 8, 2, True),
        128: Shape(48, 4, 8, 2, False),
    },
    (768, 2304, True): {  # GPT-2 124M: queries, keys and values
        8: Shape(64, 1, 8, 3, True),
        16: Shape(64, 1, 8, 3, False),
        32: Shape(32, 1, 8, 3, False),
    },
    (768, 768, False): {  # GPT-2 124M: output of attention
        8: Shape(32, 2, 4, 3, False),
        16: Shape(32, 2, 4, 3, False),
        32: Shape(32, 2, 4, 3, True),
    },
    (768, 3072, True): {  # GPT-2 124M: FFN 1
        8: Shape(64, 2, 4, 3, True),
        16: Shape(64, 2, 4, 3, False),
        32: Shape(48, 2, 4, 3, True),
    },
    (3072, 768, False): {  # GPT-2 124M: FFN 2
        8: Shape(64, 4, 8, 3, True),
        16: Shape(64, 4, 8, 3, True),
        32: Shape(48, 4, 8, 3, True),
    },
}
# By compute capability and multiprocessors (an H100 with as many takes them too, where nothing was measured), then by
# bits of a weight.
BY_DEVICE: dict[tuple[int, int], dict[int, Table]] = {(90, 132): {32: H200_FP32, 16: H200_FP16, 8: H200_INT8}}


def measured(capability: int, multiprocessors: int, bits: int, product: Product) -> Shapes:
    """Those of a product whose weights have so many bits; {} where there are none."""
    return BY_DEVICE.get((capability, multiprocessors), {}).get(bits, {}).get(product, {})
