"""What can go wrong with a GPU, on a machine without one: driver, memory, weights too large, a device that fails.

CuPy, the CUDA runtime and failing operations are stood in for here; tests/gpu meets the real ones.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import small_models
from repositories import TRANSFORMER, ask, ask_later, golden_cases, grpc, http, write_model
from tritonclient.utils import InferenceServerException
from weight_files import golden

from lightseq_backend import ops
from lightseq_backend.config import EngineConfig
from lightseq_backend.engine import Engine
from lightseq_backend.errors import ConfigError, WeightError
from lightseq_backend.models.checks import bytes_needed
from lightseq_backend.models.gpt import Gpt
from lightseq_backend.models.transformer import Transformer
from lightseq_backend.ops import cpu, cpu_int8, cublas, device, launch
from lightseq_backend.request import Output, Request
from lightseq_backend.serving import device as serving_device
from lightseq_backend.serving.embedded import EmbeddedServer

ILLEGAL = "cudaErrorIllegalAddress: an illegal memory access was encountered"
MODELS: dict[str, Any] = {"transformer": Transformer, "gpt": Gpt}


# The GPU and its driver ----------------------------------------------------------------------------------------------


class CudaError(RuntimeError):
    """As CuPy's CUDARuntimeError."""

    def __init__(self, status: int, text: str):
        super().__init__(text)
        self.status = status


@dataclass
class Runtime:
    """What ops/device.py asks of cupy.cuda.runtime."""

    driver: int = 13000
    built_for: int = 13020
    count: int | Exception = 1
    used: Exception | None = None
    capability: tuple[int, int] = (9, 0)
    device: int | None = None

    def driverGetVersion(self) -> int:
        return self.driver

    def runtimeGetVersion(self) -> int:
        return self.built_for

    def getDeviceCount(self) -> int:
        if isinstance(self.count, Exception):
            raise self.count
        return self.count

    def setDevice(self, number: int) -> None:
        if self.used:
            raise self.used
        self.device = number

    def deviceGetAttribute(self, attribute: int, number: int) -> int:
        return self.capability[{75: 0, 76: 1}[attribute]]


def cuda(runtime: Runtime, compiler: Exception | None = None) -> Any:
    def version() -> tuple[int, int]:
        if compiler:
            raise compiler
        return 13, 2

    nvrtc = SimpleNamespace(getVersion=version, getSupportedArchs=lambda: [75, 80, 86, 90, 100])
    return SimpleNamespace(runtime=runtime, nvrtc=nvrtc)


INSUFFICIENT = CudaError(
    35, "cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version"
)
NONE_THERE = CudaError(100, "cudaErrorNoDevice: no CUDA-capable device is detected")
NOT_READY = CudaError(802, "cudaErrorSystemNotReady: system not yet initialized")
BUSY = CudaError(46, "cudaErrorDevicesUnavailable: CUDA-capable device(s) is/are busy or unavailable")

DEVICES: dict[str, tuple[Runtime, int, list[str]]] = {
    "no driver": (Runtime(0, count=INSUFFICIENT), 0, ["GPU 0", "no NVIDIA driver; install one, or serve on the CPU"]),
    "old driver": (
        Runtime(12040, count=INSUFFICIENT),
        0,
        ["runs CUDA 12.4 and CuPy was built for CUDA 13.2", "update the driver, or install the extra cuda12 instead"],
    ),
    "very old driver": (Runtime(11080, 12090, INSUFFICIENT), 0, ["CUDA 11.8", "CUDA 12.9; update the driver"]),
    "no device": (Runtime(count=NONE_THERE), 0, ["shows no GPU", "nvidia-smi should list one"]),
    "none visible": (Runtime(count=0), 1, ["GPU 1 cannot", "shows no GPU"]),
    "out of range": (Runtime(count=4), 7, ["GPU 7 cannot", "shows 4 GPUs, 0 to 3", "instance_group"]),
    "out of range of one": (Runtime(), 1, ["GPU 1 cannot", "shows GPU 0 alone"]),
    "negative": (Runtime(), -1, ["GPU -1 cannot", "shows GPU 0 alone"]),
    "not ready": (Runtime(count=NOT_READY), 0, ["does not start (cudaErrorSystemNotReady: ", "nvidia-smi may say why"]),
    "busy": (Runtime(used=BUSY), 0, ["cudaErrorDevicesUnavailable: ", "nvidia-smi may say who else uses it"]),
    "too old for the compiler": (Runtime(capability=(7, 0)), 0, ["is 7.0", "CUDA 13.2 begins at 7.5", "extra cuda12"]),
    "too old": (Runtime(capability=(6, 1)), 0, ["is 6.1, the kernels need 7.0; serve on the CPU"]),
}


@pytest.mark.parametrize("name", DEVICES)
def test_gpu_that_cannot_be_used_is_refused_in_one_sentence(name: str) -> None:
    runtime, number, words = DEVICES[name]
    with pytest.raises(ConfigError) as refused:
        device.check(cuda(runtime), number)
    message = str(refused.value)
    assert [each for each in words if each not in message] == [], message
    assert message.startswith(f"GPU {number} cannot be used: ")
    assert "\n" not in message


@pytest.mark.parametrize("runtime", [Runtime(), Runtime(13000, 13020), Runtime(12020, 12090), Runtime(13000, 12090)])
def test_gpu_whose_driver_runs_the_major_version_is_taken(runtime: Runtime) -> None:
    device.check(cuda(runtime), 0)
    assert runtime.device == 0


def test_hidden_gpus_are_named_as_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    with pytest.raises(ConfigError, match=r"shows 2 GPUs, 0 to 1 \(CUDA_VISIBLE_DEVICES is '2,3'\)"):
        device.check(cuda(Runtime(count=2)), 2)


def test_missing_compiler_is_named() -> None:
    missing = RuntimeError("CuPy failed to load libnvrtc.so.12: OSError: no such file\n")
    with pytest.raises(
        ConfigError, match=r"misses a library of CUDA's \(CuPy failed to load libnvrtc.so.12.*extra cuda12"
    ):
        device.check(cuda(Runtime(), missing), 0)


# CuPy ----------------------------------------------------------------------------------------------------------------

OF_CUDA = ("lightseq_backend.ops.cuda", "lightseq_backend.ops.launch", "lightseq_backend.ops.cublas")
OF_CUPY = ("cupy", "cupyx", "cupy.cuda")


@pytest.fixture
def imports_anew() -> Iterator[None]:
    """ops/cuda.py and CuPy are imported again, and what that made is forgotten."""
    before = {name: sys.modules.pop(name) for name in (*OF_CUDA, *OF_CUPY) if name in sys.modules}
    yield
    for name in (*OF_CUDA, *OF_CUPY):
        sys.modules.pop(name, None)
    sys.modules.update(before)


def load_failure() -> str:
    with pytest.raises(ConfigError) as refused:
        ops.load("cuda", 0, "fp16")
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.usefixtures("imports_anew")
def test_missing_cupy_is_named_with_what_to_install() -> None:
    sys.modules["cupy"] = None  # type: ignore[assignment]
    assert "CuPy, which is not installed; install this package's extra cuda13" in load_failure()


@pytest.mark.usefixtures("imports_anew")
def test_broken_cupy_is_named_with_its_own_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cupy").mkdir()
    (tmp_path / "cupy" / "__init__.py").write_text(
        "try:\n"
        "    raise ImportError('libcudart.so.11.0: cannot open shared object file')\n"
        "except ImportError as error:\n"
        "    raise ImportError('\\n=====\\nFailed to import CuPy.\\n\\nmuch advice\\n') from error\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    message = load_failure()
    assert "does not load (ImportError: libcudart.so.11.0: cannot open shared object file); install" in message


@pytest.mark.usefixtures("imports_anew")
def test_fault_of_our_own_is_not_blamed_on_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OF_CUPY:
        sys.modules[name] = MagicMock()
    sys.modules["lightseq_backend.ops.cublas"] = ModuleType("empty")
    with pytest.raises(ImportError, match="WORKSPACE"):
        ops.load("cuda")


@pytest.mark.usefixtures("imports_anew")
@pytest.mark.parametrize("name", ["no driver", "out of range"])
def test_operations_are_not_made_for_a_gpu_that_cannot_be_used(name: str) -> None:
    runtime, number, words = DEVICES[name]
    cupy = MagicMock()
    cupy.cuda.runtime = runtime
    sys.modules.update({"cupy": cupy, "cupyx": MagicMock(), "cupy.cuda": cupy.cuda})
    with pytest.raises(ConfigError) as refused:
        ops.load("cuda", number, "fp16")
    assert all(each in str(refused.value) for each in words)
    cupy.cuda.Stream.assert_not_called()


@pytest.mark.usefixtures("imports_anew")
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError("Out of memory allocating 33,554,432 bytes"), "it has no memory left (Out of memory allocating"),
        (ImportError("libcublas.so.13: cannot open"), "misses a library of CUDA's (libcublas.so.13: cannot open)"),
    ],
)
def test_gpu_that_fails_at_the_start_is_named(error: Exception, words: str) -> None:
    sys.modules["lightseq_backend.ops.cuda"] = MagicMock(Cuda=MagicMock(side_effect=error))
    assert words in load_failure()


# Choosing a device without CuPy --------------------------------------------------------------------------------------


@dataclass
class Driver:
    """What serving/device.py asks of libcuda.so.1."""

    start: int = 0
    count: int = 1
    version: int = 13000

    def cuInit(self, flags: int) -> int:
        return self.start

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self.count
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = self.version
        return 0


@pytest.mark.parametrize(
    ("driver", "cupy", "obstacle"),
    [
        (Driver(start=100), "cupy-cuda12x", "the NVIDIA driver does not start: cuInit gave error 100"),
        (Driver(count=0), "cupy-cuda12x", "the NVIDIA driver shows no device"),
        (Driver(version=12040), "cupy-cuda13x", "the NVIDIA driver runs CUDA 12 and CuPy was built for CUDA 13"),
        (Driver(), None, "CuPy is not installed (extras cuda12, cuda13)"),
        (Driver(), "cupy", None),  # built from source
        (Driver(version=13000), "cupy-cuda12x", None),
        (Driver(version=12000), "cupy-cuda12x", None),
    ],
)
def test_auto_takes_the_gpu_where_nothing_is_in_its_way(
    driver: Driver, cupy: str | None, obstacle: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    monkeypatch.setattr(serving_device, "find_spec", lambda name: cupy if name == "cupy" else name)
    monkeypatch.setattr(serving_device, "_is_installed", lambda name: name == cupy)
    assert serving_device.choose_device("auto") == ("cpu" if obstacle else "gpu", obstacle)


# Launches ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("imports_anew")
def test_refused_launch_is_explained_by_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def explain(text: bytes) -> Any:
        def write(status: int, pointer: Any) -> int:
            pointer._obj.value = text
            return 0

        return write

    driver = SimpleNamespace(
        cuLaunchKernelEx=lambda *arguments: 700,
        cuGetErrorName=explain(b"CUDA_ERROR_ILLEGAL_ADDRESS"),
        cuGetErrorString=explain(b"an illegal memory access was encountered"),
    )
    sys.modules["cupy"] = MagicMock()
    sys.modules["cupy"].RawKernel.return_value.kernel.ptr = 1
    monkeypatch.setattr(launch, "driver", lambda: driver)
    kernel = launch.Kernel("embed", "embed_rows", (("HALF", 1),))
    wanted = r"embed_rows was not launched: CUDA error 700 \(CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access"
    with pytest.raises(RuntimeError, match=wanted):
        kernel((1, 2), 32, (None, 3, 1.5), stream=0)


class Lt:
    """cuBLASLt as far as choosing an algorithm goes: it proposes one, which is of use or is not."""

    def __init__(self, state: int):
        self._state = state

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: 0

    def cublasLtMatmulAlgoGetHeuristic(self, *arguments: Any) -> int:
        *_, found, count = arguments
        found[0].state, count._obj.value = self._state, 1
        return 0


@pytest.mark.parametrize(("state", "words"), [(0, None), (15, r"cuBLAS has no product of \(3, 8\) and \(8, 16\)")])
def test_product_that_cublas_does_not_have_is_named(
    state: int, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def array(*shape: int) -> Any:
        whole = np.zeros(shape, np.float32)
        data = SimpleNamespace(ptr=whole.ctypes.data)
        return SimpleNamespace(shape=shape, strides=whole.strides, itemsize=4, dtype=whole.dtype, data=data)

    monkeypatch.setattr(cublas, "_library", lambda: Lt(state))
    products = cublas.Cublas(stream=0, workspace=0)
    with pytest.raises(RuntimeError, match=words) if words else nullcontext():
        assert products.product(array(3, 8), array(8, 16), False, array(3, 16))


# Weights that do not fit ---------------------------------------------------------------------------------------------


def small(model: str) -> Any:
    return getattr(small_models, model)(3)


def gpu(free: int = 1 << 40, dtype: Any = np.float16, **changes: Any) -> Any:
    """The CPU's operations as those of a GPU that has so many bytes left and keeps each matrix twice."""
    size = np.dtype(dtype).itemsize
    members = {
        "NAME": "cuda",
        "FLOAT": np.dtype(dtype),
        "PRECISION": np.dtype(dtype).name.replace("loat", "p"),
        "available_memory": lambda: free,
        "weight_bytes": lambda shape, use: (2 if "matrix" in use else 1) * int(np.prod(shape)) * size,
    }
    return small_models.cpu_but(**(members | changes))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_weights_that_do_not_fit_are_refused_before_any_is_uploaded(model: str, dtype: Any) -> None:
    config, arrays = small(model)
    needed = bytes_needed(arrays, gpu(dtype=dtype))
    largest = max(array.size for array in arrays.values())
    matrices = sum(array.size for name, array in arrays.items() if name.endswith(".weight"))
    elements = matrices + sum(array.size for array in arrays.values())
    assert needed == elements * np.dtype(dtype).itemsize + 4 * largest
    MODELS[model](config, arrays, gpu(needed, dtype))
    never = MagicMock(side_effect=AssertionError("uploaded"))
    with pytest.raises(ConfigError) as refused:
        MODELS[model](config, arrays, gpu(needed - 1, dtype, matrix=never, vector=never, table=never))
    precision, advice = (
        ("fp16", "a GPU with more memory") if dtype is np.float16 else ("fp32", "in fp16 they need half as much")
    )
    wanted = f"the weights need {needed / 2**20:.0f} MiB in {precision} and {(needed - 1) / 2**20:.0f} MiB are free, "
    assert wanted + "so that not even one slot would fit: " in str(refused.value)
    assert advice in str(refused.value)


@pytest.mark.parametrize("operation", ["matrix", "vector", "table"])
def test_upload_that_fails_all_the_same_says_as_much(operation: str) -> None:
    full = MagicMock(side_effect=MemoryError("Out of memory allocating 512 bytes"))
    wanted = (
        r"the weights need 0 MiB in fp16 and 1024 MiB are free \(then: Out of memory allocating 512 bytes\), so that"
    )
    with pytest.raises(ConfigError, match=wanted):
        Gpt(*small("gpt"), gpu(1 << 30, **{operation: full}))


def test_weights_on_the_cpu_take_no_memory_of_their_own() -> None:
    Gpt(*small("gpt"), gpu(0, np.float32, weight_bytes=cpu.weight_bytes))


def test_int8_on_the_cpu_says_what_its_copies_take(caplog: pytest.LogCaptureFixture) -> None:
    config, arrays = small("gpt")
    sizes = [array.size + array.shape[-1] for name, array in arrays.items() if name.endswith(".weight")]
    needed = 4 * (sum(sizes) + max(array.size for array in arrays.values()))
    assert bytes_needed(arrays, cpu_int8) == needed
    changes = {"weight_bytes": cpu_int8.weight_bytes, "PRECISION": "int8"}
    with pytest.raises(ConfigError, match=r"MiB in int8 and 0 MiB are free, .*: fp32 needs none beside them on a CPU"):
        Gpt(config, arrays, small_models.cpu_but(available_memory=lambda: needed - 1, **changes))
    with caplog.at_level("INFO", "lightseq_backend"):
        Gpt(config, arrays, small_models.cpu_but(available_memory=lambda: needed, **changes))
    assert f"weights: {4 * sum(sizes)} bytes in int8" in caplog.messages


def test_what_all_weights_share_is_counted_once() -> None:
    arrays = small("gpt")[1]
    shared = {"matrix": 100, "vocabulary_matrix": 300}
    with_it = gpu(shared_bytes=lambda shape, use: shared.get(use, 0))
    assert bytes_needed(arrays, with_it) == bytes_needed(arrays, gpu()) + 300


def test_projections_of_the_source_are_one_matrix_for_all_layers() -> None:
    arrays = small_models.transformer(decoder_layers=3)[1]
    asked: list[tuple[tuple[int, ...], str]] = []
    bytes_needed(arrays, gpu(weight_bytes=lambda *shape_and_use: asked.append(shape_and_use) or 1))
    assert ((16, 3 * 32), "matrix") in asked
    assert ((16, 32), "matrix") not in asked
    assert [shape for shape, use in asked if use == "vocabulary_matrix"] == [(16, 11)]


def test_engine_whose_memory_is_gone_when_it_is_taken_says_what_fits() -> None:
    config, arrays = small("gpt")
    room = EngineConfig(slots=500, max_beam_size=4)
    size = Engine(Gpt(config, arrays, cpu), room, cpu).memory
    full = MagicMock(side_effect=MemoryError)
    frees = iter([1 << 40, 1 << 40, size * 3 // 4])  # the weights', the plan's, after the failure
    backend = gpu(dtype=np.float32, allocate=full, available_memory=lambda: next(frees))
    with pytest.raises(
        ConfigError, match=r"for 500 slots and 1024 prompt tokens; .* are free: [1-9][0-9]* slots would"
    ):
        Engine(Gpt(config, arrays, backend), room, backend)
    full.assert_called_once_with(size)


def test_engine_with_more_beams_than_the_kernels_have_room_for_is_refused() -> None:
    config, arrays = small_models.gpt(3, vocabulary=99, padding_id=99)
    backend = small_models.cpu_but(MOST_BEAMS=32)
    with pytest.raises(ConfigError, match=r"^max_beam_size is 33; a GPU searches with 32 at most$"):
        small_models.engine(config, arrays, backend, slots=64, max_beam_size=33)
    small_models.engine(config, arrays, backend, slots=64, max_beam_size=32)


# Weights that half precision cannot hold -----------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("value", [65505.0, -70000.0, 1e30])
def test_weights_beyond_half_precision_are_all_named(model: str, value: float) -> None:
    config, arrays = small(model)
    names = list(arrays)[:: len(arrays) // 5]
    for name in names:
        arrays[name] = arrays[name].copy()
        arrays[name].flat[-1] = value
    with pytest.raises(WeightError) as refused:
        MODELS[model](config, arrays, gpu())
    wanted = {f"{name} holds {abs(value):g}; fp16 ends at 65504: use precision fp32" for name in names}
    assert set(str(refused.value).splitlines()) == wanted
    MODELS[model](config, arrays, gpu(dtype=np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_named_in_half_precision_too(value: float) -> None:
    config, arrays = small("transformer")
    arrays["encoder.0.attention_norm.gain"][3] = arrays["decoder.0.ffn_inner.weight"][2, 1] = value
    with pytest.raises(WeightError) as refused:
        Transformer(config, arrays, gpu())
    assert set(str(refused.value).splitlines()) == {
        "encoder.0.attention_norm.gain holds NaN or infinity",
        "decoder.0.ffn_inner.weight holds NaN or infinity",
    }


def test_largest_half_is_taken() -> None:
    config, arrays = small("gpt")
    arrays["positions"][0, 0], arrays["norm.bias"][1] = 65504, -65504
    Gpt(config, arrays, gpu())


def with_large_product(model: str, value: float, **settings: Any) -> Any:
    """A gain and, in the row of the weight behind it, an element whose product is `value`; each is small enough."""
    config, arrays = getattr(small_models, model)(3, **settings)
    layer = {"transformer": "encoder.0", "gpt": "layer.1"}[model]
    arrays[f"{layer}.ffn_norm.gain"][4] = -1000
    arrays[f"{layer}.ffn_inner.weight"][4, 7] = value / 1000
    return config, arrays


@pytest.mark.parametrize(("model", "layer"), [("transformer", "encoder.0"), ("gpt", "layer.1")])
def test_weight_whose_product_with_the_gain_is_beyond_half_precision_is_named(model: str, layer: str) -> None:
    config, arrays = with_large_product(model, 66000.0)
    wanted = f"{layer}.ffn_inner.weight times {layer}.ffn_norm.gain holds 66000; fp16 ends at 65504: use precision fp32"
    with pytest.raises(WeightError, match=f"^{wanted}$"):
        MODELS[model](config, arrays, gpu())
    MODELS[model](config, arrays, gpu(dtype=np.float32))
    MODELS[model](*with_large_product(model, 65000.0), gpu())


def test_gain_that_is_not_folded_into_the_weight_is_not_multiplied() -> None:
    config, arrays = with_large_product("transformer", 66000.0, post_norm=True)
    Transformer(config, arrays, gpu())


# A device that fails -------------------------------------------------------------------------------------------------


class Failing:
    """The CPU's operations until `fail`, when they fail as a GPU's do that a kernel has wrecked.

    What is queued seems to succeed; the first to be waited for tells, and from then on everything fails. recovers: it
    does not; only `fault` knows.
    """

    BURSTS_AHEAD = 2

    def __init__(self, recovers: bool = False):
        self.wrecked = self.told = False
        self._recovers = recovers

    def __getattr__(self, name: str) -> Any:
        member = getattr(cpu, name)
        if not callable(member) or isinstance(member, type) or name in ("capture", "matrix", "vector", "table"):
            return member

        def call(*arguments: Any, **named: Any) -> Any:
            if self.told and not self._recovers:
                raise CudaError(700, ILLEGAL)
            return member(*arguments, **named)

        return call

    def fail(self) -> None:
        self.wrecked = True

    def fetch(self, source: Any) -> Any:
        report = cpu.fetch(source)

        def wait() -> Any:
            if self.wrecked and not (self.told and self._recovers):
                self.told = True
                raise CudaError(700, ILLEGAL)
            return report()

        return wait

    def fault(self) -> str | None:
        return f"GPU 0 has failed: {ILLEGAL}" if self.told else None


class Answers:
    def __init__(self) -> None:
        self.results: dict[int, list[Output | Exception]] = {}
        self._changed = threading.Condition()

    def to(self, number: int) -> Any:
        def reply(result: Output | Exception) -> None:
            with self._changed:
                self.results.setdefault(number, []).append(result)
                self._changed.notify()

        return reply

    def wait_for(self, count: int) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: len(self.results) >= count, 30)


def requests(engine: Engine, answers: Answers, numbers: range) -> list[Request]:
    changes = {"sampling_method": "beam_search", "beam_size": 4}
    return [Request(np.array([3 + number % 7, 4]), engine.options(changes), answers.to(number)) for number in numbers]


@pytest.mark.parametrize("recovers", [False, True], ids=["", "recovers"])
@pytest.mark.parametrize("model", MODELS)
def test_failed_device_ends_everything_with_its_error(model: str, recovers: bool) -> None:
    config, arrays = getattr(small_models, model)(3, max_positions=200)
    backend: Any = Failing(recovers)
    engine = Engine(MODELS[model](config, arrays, backend), EngineConfig(slots=8, max_beam_size=4, queue=64), backend)
    engine.answer([[3, 4]])
    answers = Answers()
    engine.submit(requests(engine, answers, range(20)))
    backend.fail()
    engine.start()
    assert answers.wait_for(20)
    assert engine.alive
    assert not engine.ready
    assert engine.fault == f"GPU 0 has failed: {ILLEGAL}"
    texts = {number: [str(result) for result in results] for number, results in answers.results.items()}
    # Those under way get the error as it came; those that waited get the fault.
    assert all(text in ([ILLEGAL], [engine.fault]) for text in texts.values()), texts
    assert (len(texts), engine.slots_in_use, engine.waiting) == (20, 0, 0)
    with pytest.raises(RuntimeError, match="GPU 0 has failed: cudaErrorIllegalAddress"):
        engine.submit(requests(engine, answers, range(20, 21)))
    started = time.monotonic()
    engine.stop()
    assert time.monotonic() - started < 5
    assert all(len(results) == 1 for results in answers.results.values())


# Through Triton ------------------------------------------------------------------------------------------------------

GOOD = golden_cases("t01_base")[0]
ADMIN = {"admin-key": "test"}
WRECKED = 77  # a source with this id wrecks the device; neither a position nor a slot is that large
# In the engine's process and in Triton's.
FAILING_ENGINE = f"""
from lightseq_backend.ops import cpu
from lightseq_backend.serving.engine_process import main

wrecked, put, fetch = False, cpu.put, cpu.fetch

def wrecking_put(destination, source):
    global wrecked
    wrecked = wrecked or (source.dtype.names is None and {WRECKED} in source)
    put(destination, source)

def failing_fetch(source):
    def wait():
        if wrecked:
            raise RuntimeError({ILLEGAL!r})
        return report()
    report = fetch(source)
    return wait

cpu.put, cpu.fetch, cpu.BURSTS_AHEAD = wrecking_put, failing_fetch, 2
cpu.fault = lambda: "GPU 0 has failed: " + {ILLEGAL!r} if wrecked else None
main()
"""
FAILING_MODEL = """
from lightseq_backend.serving.model import TritonPythonModel as Served

class TritonPythonModel(Served):
    ENGINE = "failing_engine"

    def execute(self, requests):
        super().execute(requests)
        print("READY", self.is_ready(), flush=True)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    root = tmp_path_factory.mktemp("repository")
    for name in ("failing", "other"):
        write_model(root, name, golden("t01_base.pb"), TRANSFORMER)
    write_model(root, "huge", golden("t01_base.pb"), TRANSFORMER, parameters={"slots": 20_000_000})
    (root / "failing" / "1" / "model.py").write_text(FAILING_MODEL)
    (root / "failing" / "1" / "failing_engine.py").write_text(FAILING_ENGINE)
    served = ["failing", "other"]
    with EmbeddedServer(root, device="cpu", models=served, admin_key="test", stop_timeout=5) as running:
        yield running


def failure(answer: Any) -> tuple[str, str]:
    with pytest.raises(InferenceServerException) as failed:
        answer()
    return failed.value.status(), failed.value.message()


def test_model_on_a_failed_device_answers_internal_with_the_cuda_error_and_unloads(server: EmbeddedServer) -> None:
    internal = "StatusCode.INTERNAL"
    with grpc(server.grpc) as client:
        good = ask(client, "failing", "source_ids", GOOD["source_ids"])
        assert good["target_ids"].tolist() == [GOOD["rows"][0]["ids"]]
        assert "READY True" in server.log
        answers = [ask_later(client, "failing", "source_ids", GOOD["source_ids"]) for _ in range(20)]
        wrecking = ask_later(client, "failing", "source_ids", [[WRECKED, 3]])
        answers += [ask_later(client, "failing", "source_ids", GOOD["source_ids"]) for _ in range(20)]
        assert failure(wrecking) == (internal, f"RuntimeError: {ILLEGAL}")
        with ThreadPoolExecutor(40) as pool:  # nothing hangs
            for ended in pool.map(outcome, answers):
                assert ended in (GOOD["rows"][0]["ids"], (internal, ILLEGAL))
        later = failure(lambda: ask(client, "failing", "source_ids", GOOD["source_ids"]))
        assert later == (internal, f"RuntimeError: GPU 0 has failed: {ILLEGAL}")
        deadline = time.monotonic() + 20
        while "READY False" not in server.log and time.monotonic() < deadline:  # an answer may be faster than the log
            assert failure(lambda: ask(client, "failing", "source_ids", GOOD["source_ids"])) == later
        assert "READY False" in server.log
        other = ask(client, "other", "source_ids", GOOD["source_ids"])
        assert other["target_ids"].tolist() == [GOOD["rows"][0]["ids"]]
    started = time.monotonic()
    with http(server.http) as admin:
        admin.unload_model("failing", headers=ADMIN)
        assert not admin.is_model_ready("failing")
    assert time.monotonic() - started < 20


def outcome(answer: Any) -> Any:
    """The ids of an answer, or the status and message of an error."""
    try:
        return answer()["target_ids"].tolist()[0]
    except InferenceServerException as error:
        return error.status(), error.message().removeprefix("RuntimeError: ").removeprefix("GPU 0 has failed: ")


def test_model_that_does_not_fit_does_not_load_and_says_what_would(server: EmbeddedServer) -> None:
    with http(server.http) as admin:
        with pytest.raises(InferenceServerException) as refused:
            admin.load_model("huge", headers=ADMIN)
    message = str(refused.value)
    assert "huge: the engine needs " in message
    assert " MiB for 20000000 slots and 1024 prompt tokens; " in message
    assert " slots would fit" in message
