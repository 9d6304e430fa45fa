"""Bytes that a GPU's weights take, by precision, against the arrays that are made of them and numbers by hand."""

from __future__ import annotations

import cuda_on_cpu
import numpy as np
import pytest
from kernel_ops import Ops
from test_kernels_linear import DEVICES, HOPPER, TURING

from lightseq_backend.ops.linear_launch import Device
from lightseq_backend.ops.weight_memory import halves, matrix_bytes, vocabulary_bytes, vocabulary_halves

COLUMNS = 4  # bytes


def test_int8_takes_a_byte_a_weight_and_its_scales() -> None:
    assert matrix_bytes(HOPPER, 1024, 4096, half=True, int8=True) == 1024 * 4096 + 3 * COLUMNS * 4096
    assert vocabulary_bytes(HOPPER, 1024, 32000, half=True, int8=True) == 1024 * 32000 + 3 * COLUMNS * 32000


@pytest.mark.parametrize("wide", [32000, 32008])  # a multiple of 128, and none
def test_vocabulary_of_hopper_is_there_three_times(wide: int) -> None:
    """For cuBLAS, for warps, which have 16 columns at a time, and for warpgroups, which have 128."""
    lanes, filled = (32000, 32000) if wide == 32000 else (32016, 32128)
    expected = 2 * 1024 * (wide + lanes + filled) + 2 * COLUMNS * wide
    assert vocabulary_bytes(HOPPER, 1024, wide, half=True, int8=False) == expected


def test_vocabulary_of_turing_is_there_for_warps() -> None:
    assert vocabulary_bytes(TURING, 1024, 19, half=True, int8=False) == 2 * 1024 * (24 + 32) + 2 * COLUMNS * 19
    assert vocabulary_bytes(TURING, 1000, 19, half=False, int8=False) == 4 * (1000 * 24 + 1008 * 32) + 2 * COLUMNS * 19


def test_int8_vocabulary_that_has_no_room_is_in_half_precision() -> None:
    assert vocabulary_bytes(TURING, 4096, 32000, half=True, int8=True) == 2 * 4096 * 32000
    assert vocabulary_bytes(HOPPER, 4096, 32000, half=True, int8=True) == 4096 * 32000 + 3 * COLUMNS * 32000


def test_int8_weights_are_made_halves_one_at_a_time_and_a_vocabulary_in_parts() -> None:
    assert (halves(1024, 4096), halves(1001, 3)) == (4096 * 1024, 3 * 1008)
    assert vocabulary_halves(HOPPER, 1024, 32000) == 16384 * 1024  # 32 MiB
    assert vocabulary_halves(HOPPER, 1024, 300) == 512 * 1024
    assert vocabulary_halves(TURING, 1024, 32000) == 0  # where no kernel would read them
    assert vocabulary_halves(HOPPER, 1000, 32000) == 0


@pytest.mark.skipif(not cuda_on_cpu.available(), reason="no C++ compiler")
@pytest.mark.parametrize(("half", "int8"), [(True, True), (True, False), (False, False)], ids=["int8", "fp16", "fp32"])
@pytest.mark.parametrize(("inner", "wide"), [(1000, 257), (1024, 1088), (64, 16)])
@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_bytes_are_those_of_the_arrays(device: Device, inner: int, wide: int, half: bool, int8: bool) -> None:
    made = Ops(half, device, int8).matrix(np.ones((inner, wide), np.float32))
    held = made.memory.nbytes + (0 if made.grouped is None else made.grouped.nbytes)
    columns = (3 if int8 else 2) * COLUMNS * wide  # with a LayerNorm
    plain = 0 if int8 else inner * -(-wide // 8) * 8 * (2 if half else 4)
    assert matrix_bytes(device, inner, wide, half, int8) == held + columns + plain
