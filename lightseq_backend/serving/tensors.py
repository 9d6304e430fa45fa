"""Between Triton's tensors and NumPy's arrays, right under every NumPy.

Triton 24.10's Python stub reads the item size of a dtype where NumPy 1 kept it; NumPy 2 moved it, and what is
there now is 0. `as_numpy()` then repeats the first value over the whole array and `Tensor(name, array)` sends no
bytes at all, both without an error. DLPack asks NumPy for no struct of its own, so numbers travel that way, whatever
the NumPy (2 is all there is for Python 3.13). Strings cannot: their first byte is repeated before any Python sees
them, and the stub ends with the error of parsing that. `survive_strings` has it hand out what can be refused instead.

All here runs for every request, with the interpreter's lock, which is what bounds how many a model answers.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import triton_python_backend_utils as pb_utils


def to_numpy(tensor: pb_utils.Tensor) -> np.ndarray:
    """The numbers of an input tensor, read-only for safety's sake; they live as long as the array does."""
    return np.from_dlpack(_Asked(tensor))


def to_tensor(name: str, array: np.ndarray) -> pb_utils.Tensor:
    """An output tensor over strings, or over numbers; where those are not C-contiguous or not writeable, a copy."""
    import triton_python_backend_utils as pb_utils

    if array.dtype == np.object_:
        return pb_utils.Tensor(name, array)
    if not array.size:  # nothing to get wrong, and the stub takes the strides of an empty array for a fault
        return pb_utils.Tensor(name, array)
    if not (array.flags.c_contiguous and array.flags.writeable):
        array = np.array(array, order="C")
    # The stub compares strides even where an axis of length 1 makes them meaningless; reshaping tidies them.
    capsule = array.reshape(-1).reshape(array.shape).__dlpack__()
    tensor = pb_utils.Tensor.from_dlpack(name, capsule)
    # The stub marks a capsule as taken with a name of its own, "used_dlpack", instead of the protocol's
    # "used_dltensor"; NumPy, on dropping the capsule, would take it for broken and print an error each time.
    _set_name(capsule, _USED)
    return tensor


def strings_arrive() -> bool:
    """Whether this stub, under this NumPy, gives and takes string tensors: it does where it does numbers."""
    numbers = np.array([1, 2], np.int32)
    return bool((to_tensor("probe", numbers).as_numpy() == numbers).all())


def survive_strings() -> None:
    """Where strings do not arrive: have every string tensor read as empty strings, in its shape, instead of ending
    the process of whoever was sent one."""
    import triton_python_backend_utils as pb_utils

    pb_utils.deserialize_bytes_tensor = lambda _: np.empty(0, np.object_).view(_Unreadable)


class _Unreadable(np.ndarray):
    def reshape(self, *shape: Any, **_: Any) -> np.ndarray:  # type: ignore[override]
        return np.full(shape[0] if len(shape) == 1 else shape, b"", np.object_)


class _Asked:
    """A tensor as NumPy 2 asks for it: with arguments that the stub refuses, by an exception each time."""

    __slots__ = ("_tensor",)

    def __init__(self, tensor: pb_utils.Tensor) -> None:
        self._tensor = tensor

    def __dlpack__(self, **_: object) -> object:
        return self._tensor.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        device: tuple[int, int] = self._tensor.__dlpack_device__()
        return device


_USED = b"used_dltensor"  # a capsule keeps a pointer to its name: this object must live on
_set_name = ctypes.pythonapi.PyCapsule_SetName
_set_name.argtypes, _set_name.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_int
