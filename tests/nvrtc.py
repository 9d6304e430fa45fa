"""NVRTC through ctypes: compiles kernels for any GPU on a machine that has none."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path


class CompileError(Exception):
    """The log of a compilation that failed."""


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes of a multiprocessor."""

    registers: int
    spilled: int  # bytes stored
    stack: int  # bytes
    serialized: bool  # whether products of warpgroups wait for each other, one by one


@dataclass(frozen=True)
class Toolkit:
    """An NVRTC library and the directory of cuda_fp16.h."""

    library: ctypes.CDLL
    include: Path

    @functools.cached_property
    def architectures(self) -> frozenset[int]:
        count = ctypes.c_int()
        self.library.nvrtcGetNumSupportedArchs(ctypes.byref(count))
        found = (ctypes.c_int * count.value)()
        self.library.nvrtcGetSupportedArchs(found)
        return frozenset(found)

    def compile(self, text: str, architecture: int | str, definitions: Mapping[str, int | str]) -> dict[str, Resources]:
        """Machine code for sm_<architecture>, thrown away; what its kernels take, by name."""
        options = [f"--gpu-architecture=sm_{architecture}", "-std=c++17", f"-I{self.include}", "--ptxas-options=-v"]
        options += [f"-D{name}={value}" for name, value in definitions.items()]
        arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        program = ctypes.c_void_p()
        if self.library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernels.cu", 0, None, None):
            raise CompileError("nvrtcCreateProgram failed")
        try:
            failed = self.library.nvrtcCompileProgram(program, len(options), arguments)
            log = self._log(program)
        finally:
            self.library.nvrtcDestroyProgram(ctypes.byref(program))
        if failed:
            raise CompileError(log)
        return _resources(log)

    def _log(self, program: ctypes.c_void_p) -> str:
        size = ctypes.c_size_t()
        self.library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        self.library.nvrtcGetProgramLog(program, log)
        return log.value.decode()


def find() -> Toolkit | None:
    """NVIDIA's wheels, CUDA 12 or 13, else an installed toolkit; None where there is neither."""
    for root in _roots():
        libraries = sorted(path for path in root.glob("lib*/libnvrtc.so*") if ".alt." not in path.name)
        header = next((path for path in _headers(root) if path.exists()), None)
        if libraries and header:
            return Toolkit(ctypes.CDLL(str(libraries[-1])), header.parent)
    return None


def _roots() -> Iterator[Path]:
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or []) if spec else []:
        yield from sorted(Path(place).glob("cu*"))
    yield Path(os.environ.get("CUDA_PATH", "/usr/local/cuda"))


def _headers(root: Path) -> Iterator[Path]:
    for folder in (root, root.parent / "cuda_runtime"):
        yield folder / "include" / "cuda_fp16.h"


def _resources(log: str) -> dict[str, Resources]:
    pattern = (
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores.*?Used (\d+) registers"
    )
    serialized = set(re.findall(r"wgmma\S* instructions are serialized .*in the function '(\w+)'", log))
    return {
        name: Resources(int(used), int(spilled), int(stack), name in serialized)
        for name, stack, spilled, used in re.findall(pattern, log, re.DOTALL)
    }
