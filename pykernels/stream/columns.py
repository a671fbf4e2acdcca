"""One array of a table, wherever it lies: in memory, on a device, or in a file."""

from __future__ import annotations

import importlib
import math
import mmap
import os
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

# Of XLA's buffers, in bytes.
ALIGNMENT = 64
# Memory of reads that nobody holds any more, for the next ones: a pass lets go of one read at a time.
_free: deque[memoryview] = deque(maxlen=2)

PyTree = Any
PathLike = str | os.PathLike[str]


@runtime_checkable
class Column(Protocol):
    """One array of a table. Reads may come from another thread, one at a time."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows, then the shape of a row."""

    @property
    def dtype(self) -> np.dtype:
        """Of what `read` returns."""

    def read(self, start: int, stop: int) -> np.ndarray | jax.Array:
        """Rows `start` to `stop`, at most `shape[0]`; no more than these in memory, where the format allows it."""


class Sliced:
    """An array that is read by slicing it: in memory, on a device, or an h5py dataset."""

    def __init__(self, array: Any) -> None:
        self._array = array
        self.shape: tuple[int, ...] = tuple(array.shape)
        self.dtype = np.dtype(array.dtype)

    def read(self, start: int, stop: int) -> np.ndarray | jax.Array:
        if isinstance(self._array, jax.Array):
            # The start is data, so that every full piece is cut by the same program.
            return jax.lax.dynamic_slice_in_dim(self._array, start, stop - start)
        return np.asarray(self._array[start:stop])


class Raw:
    """Rows in C order in a file. Read, not mapped: mapped pages count as resident memory, and faults cost more than
    reads."""

    def __init__(self, path: PathLike, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> None:
        self._path, self._offset = os.fspath(path), offset
        self.shape, self.dtype = shape, dtype

    def read(self, start: int, stop: int) -> np.ndarray:
        rows = _aligned((stop - start, *self.shape[1:]), self.dtype)
        with open(self._path, "rb", buffering=0) as file:
            file.seek(self._offset + start * self.dtype.itemsize * math.prod(self.shape[1:]))
            view = memoryview(rows.reshape(-1).view(np.uint8).data) if rows.size else memoryview(b"")
            while len(view):
                count = file.readinto(view)
                if not count:
                    raise ValueError(f"{self._path} is shorter than its {self.shape[0]} rows")
                view = view[count:]
        return rows


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array, with anything in it, that begins where XLA wants its buffers: on a CPU it becomes one without a copy.

    Its memory is that of an earlier read if there is one of this size that neither the host nor the device holds any more:
    the system hands out new memory page by page, which takes as long as reading into it.
    """
    size = math.prod(shape) * dtype.itemsize
    memory = _memory(size + ALIGNMENT)
    whole = np.frombuffer(memory, np.uint8)  # lives as long as any view of it
    weakref.finalize(whole, _free.append, memory).atexit = False
    begin = -whole.__array_interface__["data"][0] % ALIGNMENT
    return whole[begin : begin + size].view(dtype).reshape(shape)


def _memory(size: int) -> memoryview:
    for _ in range(len(_free)):
        try:
            memory = _free.popleft()
        except IndexError:  # another thread was faster
            break
        if memory.nbytes == size:
            return memory
        _free.append(memory)
    return np.empty(size, np.uint8).data


def as_column(leaf: Any) -> Column:
    """A leaf of a table as a column. Raises TypeError for what is no array, ValueError for a single number."""
    if isinstance(leaf, Column):
        return leaf
    if isinstance(leaf, np.memmap):
        return _mapped(leaf)
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype") and hasattr(leaf, "__getitem__")):
        raise TypeError(
            f"the data must be a pytree of arrays, but have a leaf {leaf!r}: write np.asarray(...) for lists of numbers"
        )
    if not leaf.shape:
        raise ValueError("the data must be arrays whose first axis is the rows, but one is a single number")
    return Sliced(leaf)


def _mapped(array: np.memmap) -> Column:
    """A memory map's rows straight from its file, where they lie there as they are: not for views with other strides, nor
    for copy-on-write maps, whose changes are in memory only."""
    if not array.shape:
        raise ValueError("the data must be arrays whose first axis is the rows, but one is a single number")
    mapping = getattr(array, "_mmap", None)
    if mapping is None or array.filename is None or array.mode == "c" or not array.flags.c_contiguous:
        return Sliced(array)
    if array.mode != "r":
        array.flush()  # what was written to the map is in the file now
    # `offset` is that of the map the array is a view of; the map itself begins at a multiple of the granularity before it.
    begin = array.offset - array.offset % mmap.ALLOCATIONGRANULARITY
    address = np.frombuffer(mapping, np.uint8).__array_interface__["data"][0]
    offset = begin + array.__array_interface__["data"][0] - address
    column = Raw(array.filename, array.dtype, array.shape, offset)
    try:
        ends = [(0, min(1, len(array))), (max(len(array) - 1, 0), len(array))]
        same = all(column.read(*rows).tobytes() == array[slice(*rows)].tobytes() for rows in ends)
    except (OSError, ValueError):
        same = False
    return column if same else Sliced(array)  # the file was removed or replaced since


def concatenate(pieces: Sequence[PyTree]) -> PyTree:
    """Pytrees of arrays, one below the other; arrays on a device stay there."""
    if len(pieces) == 1:
        return pieces[0]

    def join(*leaves: Any) -> Any:
        on_device = isinstance(leaves[0], jax.Array)
        return jnp.concatenate(leaves) if on_device else np.concatenate(leaves)

    return jax.tree.map(join, *pieces)


def native(array: Any) -> Any:
    """In this machine's byte order, with numbers in it."""
    if isinstance(array, jax.Array):
        return array
    if not (np.issubdtype(array.dtype, np.number) or array.dtype == bool or array.dtype.kind == "V"):
        raise TypeError(f"the data must be numbers, not {array.dtype}")
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def optional(module: str) -> Any:
    """Import a package of the extra `stream`. Raises ImportError naming the extra."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module.partition('.')[0]} is needed for this: pip install 'pykernels[stream]'"
        ) from error
