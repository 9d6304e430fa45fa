"""Runs CUDA kernels without a GPU: their own source, compiled by g++ over machine.h, launched on NumPy arrays.

    kernels = Kernels("norm.cu", HALF=1)
    kernels.launch("layer_norm", grid=rows, block=128, arguments=(x, gain, bias, np.float32(1e-6), out), shared=0)

Arrays are device memory (float16 where HALF=1): what the kernel writes is in them afterwards. A view stands for its
address, so a slice of columns goes with a leading dimension, and one array given twice is one memory. Numbers are
NumPy scalars of exactly the parameter's type. Every launch runs twice: threads and blocks in ascending order, all warps
side by side, and in descending order, a warp far ahead of the others. A difference means a barrier is missing.

With LIGHTSEQ_SANITIZE=1 in the environment kernels are compiled with the address and undefined-behaviour sanitizers;
`sanitized` gives a process the environment for that.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightseq_backend.ops.launch import source

Array = np.ndarray[Any, Any]
Size = int | tuple[int, ...]

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "kernels"
SHARED_MEMORY = 227 * 1024  # the most a block may ask for, on sm_90
_ORDERS = (0, 1)  # ascending, descending


class LaunchError(Exception):
    """What a GPU would answer with a hang, a fault or a wrong result."""


@dataclass(frozen=True)
class TensorMap:
    """A kernel's argument of that type: a matrix of halves, and the (columns, rows) of the box that one copy takes."""

    array: Array
    box: tuple[int, int]


class Kernels:
    """The kernels of one source, compiled with these definitions; `text` is for tests of this package itself."""

    def __init__(self, source: str, text: str | None = None, **definitions: int | str):
        self.source, self._text, self._definitions = source, text, definitions

    def launch(
        self,
        name: str,
        grid: Size,
        block: Size,
        arguments: Sequence[Any],
        shared: int = 0,
        cluster: Size = 1,
        orders: Sequence[int] = _ORDERS,
    ) -> None:
        """Launches once for each order, from the same memory; raises LaunchError unless all end alike."""
        sizes = [*_three(grid), *_three(block), *_three(cluster)]
        if any(wide % part for wide, part in zip(sizes[:3], sizes[6:])):
            raise LaunchError(f"{name}: a grid of {grid} is not made of clusters of {cluster}")
        if not 0 < np.prod(sizes[3:6]) <= 1024 or not 0 <= shared <= SHARED_MEMORY or 0 in sizes:
            raise LaunchError(f"{name}: cannot launch grid {grid}, block {block}, {shared} bytes of shared memory")
        self._check(name, arguments)
        run = getattr(self._library, f"launch_{name}")
        run.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
        run.restype = ctypes.c_char_p
        before = _Memory(arguments)
        outcomes = []
        for order in orders:
            memory = before.copy()
            fault = run((ctypes.c_uint * 9)(*sizes), shared, order, memory.pointers(arguments))
            if fault:
                raise LaunchError(f"{name}: {fault.decode()}")
            outcomes.append(memory)
        for outcome in outcomes[1:]:
            if outcome.contents() != outcomes[0].contents():
                raise LaunchError(f"{name}: the result depends on the order of threads: a barrier or a block too few")
        outcomes[0].write_back(name)

    def signature(self, name: str) -> list[str]:
        """The kind and size of each parameter: p8 a pointer, i4, i8, f4."""
        tell = getattr(self._library, f"signature_{name}")
        tell.restype = ctypes.c_char_p
        return tell().decode().split()

    def _check(self, name: str, arguments: Sequence[Any]) -> None:
        given = [_kind(argument) for argument in arguments]
        if given != self.signature(name):
            raise LaunchError(f"{name} takes {' '.join(self.signature(name))}, not {' '.join(given)}")

    @functools.cached_property
    def _library(self) -> ctypes.CDLL:
        text = source(self.source.removesuffix(".cu")) if self._text is None else self._text
        return ctypes.CDLL(str(_compiled(text, self._definitions)))


def kernel_names(text: str, definitions: Mapping[str, int | str]) -> list[str]:
    """The names of the `extern "C" __global__` kernels that there are under these definitions."""
    flags = [f"-D{name}={value}" for name, value in definitions.items()]
    bare = re.sub(r"^\s*#\s*include\s*<.*$", "", text, flags=re.M)
    plain = _run([_compiler(), "-E", "-P", "-x", "c++", "-DCUDA_ON_CPU=1", "-D__CUDA_ARCH__=900", *flags, "-"], bare)
    heads = re.findall(r'extern\s+"C"\s+__global__\s([^{;]*)', plain)
    attributes = ("__launch_bounds__", "__cluster_dims__", "__align__")
    return [next(name for name in re.findall(r"(\w+)\s*\(", head) if name not in attributes) for head in heads]


def sanitized(command: Sequence[str], timeout: float = 100) -> subprocess.CompletedProcess[str]:
    """Runs `python command...` as its own process in which kernels are compiled with the sanitizers."""
    library = subprocess.run([_compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    environment = {
        **os.environ,
        "LIGHTSEQ_SANITIZE": "1",
        "LD_PRELOAD": library.stdout.strip(),
        # Python itself leaks, and NumPy reads the real end of what Python allocates.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
    }
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


def available() -> bool:
    """Whether there is a compiler."""
    return shutil.which(_compiler()) is not None


# Memory --------------------------------------------------------------------------------------------------------------

_libc = ctypes.CDLL(None)
_libc.posix_memalign.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
_libc.free.argtypes = [ctypes.c_void_p]


class _Memory:
    """Copies of the arrays behind arguments, each an allocation of its exact size, aligned as cudaMalloc does."""

    def __init__(self, arguments: Sequence[Any]):
        arrays = [argument.array if isinstance(argument, TensorMap) else argument for argument in arguments]
        roots = [_root(array) for array in arrays if isinstance(array, np.ndarray)]
        self._roots = {root.ctypes.data: root for root in roots}
        self._images = {address: _bytes(address, root.nbytes) for address, root in self._roots.items()}
        self._addresses = {}
        for address, image in self._images.items():
            pointer = ctypes.c_void_p()
            if _libc.posix_memalign(ctypes.byref(pointer), 256, max(1, len(image))) or not pointer.value:
                raise MemoryError(f"{len(image)} bytes")
            ctypes.memmove(pointer.value, image, len(image))
            self._addresses[address] = pointer.value

    def copy(self) -> _Memory:
        return _Memory(list(self._roots.values()))

    def pointers(self, arguments: Sequence[Any]) -> Any:
        """void** of where each argument's value is kept."""
        self._values = [self._value(argument) for argument in arguments]
        return (ctypes.c_void_p * len(arguments))(*(value.ctypes.data for value in self._values))

    def contents(self) -> list[bytes]:
        return [_bytes(self._addresses[address], len(image)) for address, image in self._images.items()]

    def write_back(self, name: str) -> None:
        for (address, root), content in zip(self._roots.items(), self.contents()):
            if content == self._images[address]:
                continue
            if not root.flags.writeable:
                raise LaunchError(f"{name} writes to an array of shape {root.shape} that is not writeable")
            ctypes.memmove(address, content, len(content))

    def _value(self, argument: Any) -> Array:
        if argument is None:
            return np.zeros(1, np.uint64)
        if isinstance(argument, TensorMap):
            (columns, rows), stride = argument.array.shape[::-1], argument.array.strides[0] // 2
            where = [self._address(argument.array), columns, rows, stride]
            return np.frombuffer(struct.pack("4Q2I88x", *where, *argument.box), np.uint8)
        if not isinstance(argument, np.ndarray):
            return np.array([argument])
        return np.array([self._address(argument)], np.uint64)

    def _address(self, array: Array) -> int:
        start = _root(array).ctypes.data
        return int(self._addresses[start] + array.ctypes.data - start)

    def __del__(self) -> None:
        for pointer in self._addresses.values():
            _libc.free(pointer)


def _root(array: Array) -> Array:
    """The array whose memory a view looks at."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    if not (array.flags.c_contiguous or array.flags.f_contiguous):
        raise LaunchError(f"an array of shape {array.shape} has gaps and no base")
    return array


def _bytes(address: int, size: int) -> bytes:
    return ctypes.string_at(address, size)


def _kind(argument: Any) -> str:
    if isinstance(argument, TensorMap):
        return "i128"
    if argument is None or isinstance(argument, np.ndarray):
        return "p8"
    if not isinstance(argument, np.generic):
        raise LaunchError(f"{argument!r} is not a NumPy scalar: CuPy would pass it as eight bytes")
    return f"{'f' if argument.dtype.kind == 'f' else 'i'}{argument.dtype.itemsize}"


def _three(size: Size) -> tuple[int, int, int]:
    given = (size,) if isinstance(size, int) else tuple(size)
    x, y, z = (*given, 1, 1, 1)[:3]
    return x, y, z


# Compiling -----------------------------------------------------------------------------------------------------------

_FLAGS = ("-std=c++17", "-O1", "-shared", "-fPIC", "-fno-strict-aliasing", "-w", "-x", "c++")
_SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")


def _compiled(text: str, definitions: Mapping[str, int | str]) -> Path:
    """The shared library of a source, kept in the temporary directory by a hash of all that goes into it."""
    flags = [*_FLAGS, *_machine_flags(), *(_SANITIZERS if os.environ.get("LIGHTSEQ_SANITIZE") else ())]
    flags += [f"-D{name}={value}" for name, value in sorted(definitions.items())]
    machine = "".join(path.read_text() for path in sorted(HERE.glob("*.[hp]*")) if path.is_file())
    key = hashlib.sha256("\0".join([text, machine, *flags]).encode()).hexdigest()[:24]
    folder = Path(tempfile.gettempdir()) / f"lightseq-cuda-on-cpu-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{key}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            source, made = Path(work, "kernels.cc"), Path(work, "kernels.so")
            source.write_text(_program(text, definitions))
            _run([_compiler(), *flags, f"-I{HERE}", str(source), "-o", str(made)])
            made.rename(library)
    return library


def _run(command: Sequence[str], given: str | None = None) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    outcome = subprocess.run(command, input=given, capture_output=True, text=True, env=environment, check=False)
    if outcome.returncode:
        raise LaunchError(f"{' '.join(command)}\n{outcome.stderr[:4000]}")
    return outcome.stdout


@functools.cache
def _machine_flags() -> tuple[str, ...]:
    """AVX2 has conversions from fp16; without it each is a call."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        words = set()
    return ("-march=x86-64-v3",) if words >= {"avx2", "f16c", "fma", "bmi2"} else ()


def _program(text: str, definitions: Mapping[str, int | str]) -> str:
    calls = [
        f'extern "C" const char* launch_{name}(const unsigned* sizes, size_t shared, int order, void** arguments) {{\n'
        f"    return cuda_on_cpu::launch({name}, sizes, shared, order, arguments);\n}}\n"
        f'extern "C" const char* signature_{name}() {{ return cuda_on_cpu::signature({name}); }}\n'
        for name in kernel_names(text, definitions)
    ]
    return '#include "machine.h"\n' + _with_shared_memory(text) + "\n" + "".join(calls)


_ALIGN = r"(?:__align__\s*\(\s*(?P<{0}>\d+)\s*\)\s*)?"
_SHARED = re.compile(
    r"(?P<extern>extern\s+)?__shared__\s+" + _ALIGN.format("first") +
    r"(?P<type>(?:(?:unsigned|signed|long|short|volatile|struct)\s+)*[A-Za-z_][\w:]*(?:\s*<[^;<>]*>)?(?:\s*\*)*)\s*"
    + _ALIGN.format("second") + r"(?P<names>[^;=()]*);"
)  # fmt: skip


def _with_shared_memory(text: str) -> str:
    """Declarations of shared variables, as references to the memory of the block that runs."""

    def rewrite(found: re.Match[str]) -> str:
        kind, align = found["type"], found["first"] or found["second"] or "1"
        lines = "\n" * found[0].count("\n")
        if found["extern"]:
            name = found["names"].split("[")[0].strip()
            return f"{kind}* {name} = ({kind}*)cuda_on_cpu::dynamic_shared<{align}>();{lines}"
        made = []
        for declared in found["names"].split(","):
            parts = re.match(r"\s*(\w+)\s*((?:\[[^\]]*\]\s*)*)$", declared, re.S)
            if not parts:
                raise LaunchError(f"cannot read the declaration {found[0]}")
            name, dimensions = parts.groups()
            made.append(
                f"typedef {kind} {name}_in_shared {dimensions}; {name}_in_shared& {name} = "
                f"cuda_on_cpu::shared<{name}_in_shared, {align}>([] {{}});"
            )
        return " ".join(made).replace("\n", " ") + lines

    return _SHARED.sub(rewrite, text)
