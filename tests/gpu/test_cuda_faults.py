"""What goes wrong with a real GPU: it is not there, it is full, weights do not suit it, a kernel wrecks it."""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cupy
import numpy as np
import pytest
import small_models

from lightseq_backend import ops
from lightseq_backend.config import EngineConfig, GptConfig
from lightseq_backend.engine import Engine
from lightseq_backend.errors import ConfigError, WeightError
from lightseq_backend.models.checks import bytes_needed
from lightseq_backend.models.gpt import Gpt
from lightseq_backend.models.transformer import Transformer
from lightseq_backend.ops.launch import Kernel

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
LARGE: dict[str, Any] = {
    "hidden": 512, "inner": 2048, "heads": 8, "layers": 6, "vocabulary": 16000, "padding_id": 16000,
}  # fmt: skip
LONG: dict[str, Any] = {"hidden": 256, "inner": 512, "heads": 4, "layers": 4, "max_positions": 1024}


def model(config: Any, arrays: Any, gpu: Any) -> Any:
    return (Gpt if isinstance(config, GptConfig) else Transformer)(config, arrays, gpu)


@contextmanager
def left(size: int) -> Iterator[None]:
    """All of the device's memory but so many bytes is taken."""
    ballast = cupy.cuda.runtime.malloc(free_now() - size)
    try:
        yield
    finally:
        cupy.cuda.runtime.free(ballast)


def free_now() -> int:
    gc.collect()  # the engines of other tests
    cupy.get_default_memory_pool().free_all_blocks()
    return int(cupy.cuda.runtime.memGetInfo()[0])


# The GPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [cupy.cuda.runtime.getDeviceCount(), 99, -1])
def test_gpu_that_is_not_there_is_refused_with_those_that_are(number: int) -> None:
    count = cupy.cuda.runtime.getDeviceCount()
    shown = "GPU 0 alone" if count == 1 else f"{count} GPUs, 0 to {count - 1}"
    with pytest.raises(ConfigError, match=f"^GPU {number} cannot be used: the NVIDIA driver shows {shown}.*; choose"):
        ops.load("cuda", number, "fp16")


def test_hidden_gpu_is_refused() -> None:
    program = (
        "from lightseq_backend import ops\ntry: ops.load('cuda')\nexcept Exception as e: print(type(e).__name__, e)"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert (
        "ConfigError GPU 0 cannot be used: the NVIDIA driver shows no GPU (CUDA_VISIBLE_DEVICES is '')" in done.stdout
    )


def test_refused_launch_is_explained_and_harms_nothing() -> None:
    gpu = ops.load("cuda", 0, "fp16")
    gpu.start()
    kernel = Kernel("embed", "embed_rows", (("HALF", 1),))
    with pytest.raises(RuntimeError, match=r"embed_rows was not launched: CUDA error \d+ \(CUDA_ERROR_INVALID_\w+: "):
        kernel((1,), 4096, (None, None, None, None, None, 8), stream=gpu._stream.ptr)
    assert gpu.fault() is None
    config, arrays = small_models.gpt()
    assert Engine(model(config, arrays, gpu), EngineConfig(slots=8, max_beam_size=4), gpu).answer([[3]])


# Memory --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_weights_that_do_not_fit_are_refused_before_any_is_uploaded(precision: str) -> None:
    config, arrays = small_models.gpt(1, **LARGE)
    gpu = ops.load("cuda", 0, precision)
    gpu.start()
    needed = bytes_needed(arrays, gpu)
    before = free_now()
    model(config, arrays, gpu)
    assert free_now() >= before - 64 * MIB  # but for the kernels' code it is all given back
    with left(needed - 8 * MIB):
        free = free_now()
        with pytest.raises(ConfigError) as refused:
            model(config, arrays, gpu)
        assert free_now() == free
    message = re.fullmatch(
        rf"the weights need {needed / MIB:.0f} MiB in {precision} and (\d+) MiB are free, so that not even one slot "
        "would fit: .*",
        str(refused.value),
    )
    assert message, str(refused.value)
    assert int(message[1]) <= free / MIB + 1


@pytest.mark.parametrize("precision", ["fp16", "fp32", "int8"])
def test_bytes_of_weights_are_what_they_take(precision: str) -> None:
    config, arrays = small_models.gpt(1, **LARGE)
    gpu = ops.load("cuda", 0, precision)
    gpu.start()
    staged = 4 * max(array.size for array in arrays.values())
    wanted = bytes_needed(arrays, gpu) - staged
    before = cupy.get_default_memory_pool().used_bytes()
    kept = model(config, arrays, gpu)
    taken = cupy.get_default_memory_pool().used_bytes() - before
    print(f"{precision}: {taken / MIB:.1f} MiB taken, {wanted / MIB:.1f} MiB expected")
    assert 0.97 * wanted <= taken <= 1.03 * wanted
    del kept


def test_upload_that_fails_all_the_same_says_what_was_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    config, arrays = small_models.gpt(1, **LARGE)
    gpu = ops.load("cuda", 0, "fp16")
    gpu.start()
    needed = bytes_needed(arrays, gpu)
    frees = iter([1 << 50])  # what the check is told; then the truth
    monkeypatch.setattr(gpu, "available_memory", lambda: next(frees, free_now()))
    with (
        left(needed // 2),
        pytest.raises(ConfigError, match=rf"need {needed / MIB:.0f} MiB in fp16.*\(then: Out of mem"),
    ):
        model(config, arrays, gpu)
    assert gpu.fault() is None


def test_engine_that_does_not_fit_says_how_many_slots_would_and_they_do() -> None:
    config, arrays = small_models.gpt(1, **LONG)
    gpu = ops.load("cuda", 0, "fp16")
    gpu.start()
    built = model(config, arrays, gpu)
    with left(600 * MIB):
        with pytest.raises(ConfigError) as refused:
            Engine(built, EngineConfig(slots=200, max_beam_size=4), gpu)
        message = re.fullmatch(
            r"the engine needs (\d+) MiB for 200 slots and 1024 prompt tokens; (\d+) MiB are free: (\d+) slots would "
            "fit",
            str(refused.value),
        )
        assert message, str(refused.value)
        needed, free, slots = map(int, message.groups())
        assert needed > free > 0
        assert 4 <= slots < 200
        before = free_now()
        engine = Engine(built, EngineConfig(slots=slots, max_beam_size=4), gpu)
        beside = before - free_now() - engine.memory
        print(f"{slots} slots in {engine.memory / MIB:.0f} MiB; graphs and code take {beside / MIB:.1f} MiB beside")
        assert engine.answer([[3, 4]] * 50, changes={"sampling_method": "beam_search", "beam_size": 4})
    del engine


def test_engine_whose_memory_is_gone_when_it_is_taken_says_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    config, arrays = small_models.gpt(1, **LONG)
    gpu = ops.load("cuda", 0, "fp16")
    gpu.start()
    built = model(config, arrays, gpu)
    frees = iter([1 << 50])
    monkeypatch.setattr(gpu, "available_memory", lambda: next(frees, free_now()))
    with (
        left(300 * MIB),
        pytest.raises(ConfigError, match=r"MiB for 200 slots .* MiB are free: [1-9]\d* slots would fit"),
    ):
        Engine(built, EngineConfig(slots=200, max_beam_size=4), gpu)
    assert gpu.fault() is None


# Weights -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_named(precision: str, value: float) -> None:
    config, arrays = small_models.transformer()
    arrays["decoder.0.ffn_inner.weight"][1, 2] = value
    with pytest.raises(WeightError, match=r"^decoder.0.ffn_inner.weight holds NaN or infinity$"):
        model(config, arrays, ops.load("cuda", 0, precision))


def test_weights_beyond_half_precision_are_named_and_taken_in_full_precision() -> None:
    config, arrays = small_models.gpt()
    arrays["layer.0.ffn_inner.weight"][3, 2] = 7e4
    with pytest.raises(
        WeightError, match=r"^layer.0.ffn_inner.weight holds 70000; fp16 ends at 65504: use precision fp32$"
    ):
        model(config, arrays, ops.load("cuda", 0, "fp16"))
    gpu = ops.load("cuda", 0, "fp32")
    assert Engine(model(config, arrays, gpu), EngineConfig(slots=8, max_beam_size=4), gpu).answer([[3]])


def test_product_with_the_gain_beyond_half_precision_is_named() -> None:
    config, arrays = small_models.gpt()
    arrays["layer.1.ffn_norm.gain"][3], arrays["layer.1.ffn_inner.weight"][3, 2] = 1000, -70
    wanted = (
        r"^layer.1.ffn_inner.weight times layer.1.ffn_norm.gain holds 70000; fp16 ends at 65504: use precision fp32$"
    )
    with pytest.raises(WeightError, match=wanted):
        model(config, arrays, ops.load("cuda", 0, "fp16"))


# A kernel that wrecks the device -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["transformer", "gpt"])
def test_wrecked_device_ends_everything_with_its_error(kind: str) -> None:
    program = Path(__file__).with_name("wrecked_device.py")
    done = subprocess.run([sys.executable, str(program), kind], capture_output=True, text=True, timeout=110)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("REPORT ")] or [done.stderr[-3000:]]
    report = json.loads(line.removeprefix("REPORT "))
    print(f"{kind}: all answered after {report['answered_after']:.2f} s, stopped after {report['stopped_after']:.2f} s")
    illegal = "illegal memory access"
    assert report["in_time"]
    assert report["fault"].startswith("GPU 0 has failed: ")
    assert illegal in report["fault"]
    assert (report["alive"], report["ready"], report["slots_in_use"]) == (True, False, 0)
    assert illegal in report["later"]
    assert report["stopped_after"] < 10
    results = report["results"]
    assert len(results) == 200
    assert {len(texts) for texts in results.values()} == {1}
    failed = [texts[0] for texts in results.values() if texts[0] != "answered"]
    assert len(failed) >= 190
    assert [text for text in failed if "IllegalAddress" not in text and "ILLEGAL_ADDRESS" not in text] == []
