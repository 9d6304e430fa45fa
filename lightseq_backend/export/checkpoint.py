"""The files of a Hugging Face directory: its settings and its arrays by name, whole or in shards."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lightseq_backend.errors import ConfigError, WeightError
from lightseq_backend.weights.safetensors import read_tensors

# In the order of preference; the second of each pair says in which shard each array is.
FILES = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. ConfigError where it is none, or not there."""
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is no JSON object")
    return values


def read_arrays(source: Path) -> dict[str, np.ndarray]:
    """All arrays of a directory, as they are stored: mapped where the file can be. WeightError names missing files."""
    arrays: dict[str, np.ndarray] = {}
    for path in _files(source):
        arrays |= read_tensors(path) if path.suffix == ".safetensors" else tensors_of(load_pickle(path))
    return arrays


def _files(source: Path) -> list[Path]:
    for whole, index in FILES:
        if (source / whole).is_file():
            return [source / whole]
        if (source / index).is_file():
            places = read_json(source / index).get("weight_map")
            if not isinstance(places, Mapping) or not all(isinstance(name, str) for name in places.values()):
                raise WeightError(f"{source / index} has no weight_map of names to files")
            names = list(dict.fromkeys(places.values()))
            outside = [name for name in names if Path(name).name != name]
            if outside:
                raise WeightError(f"{source / index} names files elsewhere: {', '.join(outside)}")
            missing = [name for name in names if not (source / name).is_file()]
            if missing:
                raise WeightError(f"{source} lacks shards that {index} names: {', '.join(missing)}")
            return [source / name for name in names]
    raise WeightError(f"{source} has no weights; looked for {', '.join(name for pair in FILES for name in pair)}")


def load_pickle(path: Path, *allowed: type) -> Any:
    """What torch.save wrote, mapped where that can be; no code of the file's is run. allowed: classes beyond tensors
    and plain containers. ConfigError without PyTorch, WeightError where the file cannot be read or holds more."""
    try:
        import torch
    except ImportError:
        raise ConfigError(f"{path} is PyTorch's format: install torch to read it, or save it as safetensors") from None
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # what torch raises depends on what is wrong
        raise WeightError(f"{path} cannot be read: {_reason(error)}") from None


def tensors_of(state: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tensors among some values, as arrays that share their memory; NumPy has no bfloat16, so that becomes
    float32."""
    import torch

    return {
        name: (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        for name, tensor in state.items()
        if isinstance(tensor, torch.Tensor)
    }


def _reason(error: Exception) -> str:
    """What PyTorch says, without its advice to run the code after all."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    if found:
        return f"it pickles {found[1]}, which might run code; nothing but tensors is loaded"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = "" if not lines or lines[0].startswith("Weights only") else f": {lines[0]}"
    return f"it is cut short, damaged or no file of PyTorch's ({type(error).__name__}{said})"


class Arrays:
    """A checkpoint's arrays by name. What is absent or of a wrong shape becomes a fault, a line each.

    What has been asked for is remembered, so that what nobody wanted can be named.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], prefix: str):
        """prefix: what may stand in front of every name, or be missing in all of them."""
        self._arrays = {name.removeprefix(prefix): array for name, array in arrays.items()}
        self._made: dict[str, np.ndarray] = {}
        self.faults: list[str] = []
        self.asked: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def take(self, name: str, *shape: int) -> np.ndarray:
        """The array of that name: float16 as it is, all else float32; zeros and a fault where it cannot be had."""
        self.asked.add(name)
        array = self._arrays.get(name)
        if array is None:
            self.faults.append(f"{name} is missing")
        elif array.shape != shape:
            self.faults.append(f"{name} is {list(array.shape)}; the settings make it {list(shape)}")
        elif not np.issubdtype(array.dtype, np.floating):
            self.faults.append(f"{name} is {array.dtype}; it must hold floats")
        else:
            if array.dtype == np.float16:
                return array
            if name not in self._made:  # the same memory each time, so that what is shared stays shared
                self._made[name] = np.asarray(array, np.float32)
            return self._made[name]
        return np.broadcast_to(np.zeros(1, np.float32), shape)

    def first(self, *names: str) -> str:
        """The first of some names that is there, or else the first."""
        return next((name for name in names if name in self), names[0])

    def alike(self, key: str, *names: str) -> str:
        """`first`, where `key` of config.json says that all names are one array; a fault for each that differs."""
        found = self.first(*names)
        for name in names:
            if name in self and not _equal(self._arrays[name], self._arrays[found]):
                self.faults.append(f"{name} is not {found}, though {key} says so")
        self.asked.update(names)
        return found

    def finish(self, source: Path, known: Callable[[str], bool]) -> None:
        """WeightError with every fault so far, and every array that nobody asked for and `known` does not excuse."""
        left = sorted(name for name in self._arrays if name not in self.asked and not known(name))
        self.faults += [f"{name} has no place in such a model" for name in left]
        if self.faults:
            raise WeightError("\n  ".join([f"{source} cannot be converted:", *self.faults]))


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays are the same, looked at by a few rows at a time: tables are large."""
    if a.shape != b.shape:
        return False
    step = 4096
    return all(np.array_equal(a[row : row + step], b[row : row + step]) for row in range(0, len(a), step))
