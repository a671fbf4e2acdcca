"""Tables in files: `.npy` and `.npz` shards, HDF5, Parquet. A new format is a `Column` and a function that makes a
`Table`."""

from __future__ import annotations

import bisect
import glob
import itertools
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pykernels.stream.columns import Column, PathLike, PyTree, Raw, Sliced, concatenate, optional
from pykernels.stream.source import Table


def npy(names: PyTree) -> Table:
    """`.npy` files. `names`: a pytree, as a batch is to be, of a path, a pattern such as `"x-*.npy"` (its files are
    shards, in sorted order) or a list of paths.

    >>> source = pk.stream.npy(("x-*.npy", "y-*.npy"))  # batches (x, y)
    """
    return Table(_map_names(lambda name: _joined([_npy_column(path) for path in _paths(name)]), names))


def npz(files: PathLike | Sequence[PathLike], names: PyTree) -> Table:
    """Arrays of `.npz` files. `files`: a path, a pattern or a list of paths, the shards; `names`: a pytree, as a batch is
    to be, of array names in each of them.
    """
    paths = _paths(files)
    return Table(_map_names(lambda name: _joined([_Member(path, name) for path in paths]), names))


def hdf5(files: PathLike | Sequence[PathLike], names: PyTree) -> Table:
    """Datasets of HDF5 files, through h5py (`pip install pykernels[stream]`). `files`: a path, a pattern or a list of
    paths, the shards; `names`: a pytree, as a batch is to be, of dataset names.

    >>> source = pk.stream.hdf5("run.h5", ("detector/time", "detector/counts"))
    """
    h5py = optional("h5py")
    opened = [(path, h5py.File(path, "r")) for path in _paths(files)]

    def column(name: str) -> Column:
        for path, file in opened:
            if name not in file:
                raise KeyError(f"{path} has no dataset {name!r}, only {sorted(file)}")
        return _joined([Sliced(file[name]) for _, file in opened])

    return Table(_map_names(column, names))


def parquet(files: PathLike | Sequence[PathLike], names: PyTree) -> Table:
    """Columns of Parquet files, through pyarrow (`pip install pykernels[stream]`). `files`: a path, a pattern or a list
    of paths, the shards; `names`: a pytree, as a batch is to be, of column names. A column of lists of one length is an
    array with that many columns; missing values are NaN. One row group is in memory at a time.
    """
    groups: list[int] = []

    def column(name: str) -> Column:
        parts = [_ParquetColumn(path, name) for path in _paths(files)]
        groups.extend(itertools.chain.from_iterable(part.groups for part in parts))
        return _joined(parts)

    columns = _map_names(column, names)
    return Table(columns, block=max(groups, default=1) or 1)


def _map_names(function: Callable[[Any], Column], names: PyTree) -> PyTree:
    return jax.tree.map(function, names, is_leaf=lambda leaf: isinstance(leaf, list))


def _joined(parts: Sequence[Column]) -> Column:
    return parts[0] if len(parts) == 1 else _Joined(parts)


def _paths(files: PathLike | Sequence[PathLike]) -> list[PathLike]:
    if not isinstance(files, (str, os.PathLike)):
        paths = list(files)
    elif Path(files).exists():
        paths = [files]
    else:
        paths = [*sorted(glob.glob(os.fspath(files)))]
    if not paths:
        raise FileNotFoundError(f"no file matches {files!r}")
    return paths


def _npy_column(path: PathLike) -> Column:
    with open(path, "rb") as file:
        shape, fortran, dtype, offset = _npy_header(file, path)
    if fortran and len(shape) > 1:
        return Sliced(np.load(path, mmap_mode="r"))
    return Raw(path, dtype, shape, offset)


class _Member:
    """An array of an `.npz` file, read as a stream: compressed or not, no more than the wanted rows are in memory. Going
    back means to start again, and, where it is compressed, so does going forward means to decompress what lies
    between."""

    def __init__(self, path: PathLike, name: str) -> None:
        self._path, self._name = os.fspath(path), name
        self._file: Any = None
        with zipfile.ZipFile(self._path) as archive:
            if f"{name}.npy" not in archive.namelist():
                names = [n.removesuffix(".npy") for n in archive.namelist()]
                raise KeyError(f"{self._path} has no array {name!r}, only {names}")
            with archive.open(f"{name}.npy") as file:
                self.shape, fortran, self.dtype, self._offset = _npy_header(file, self._path)
        if fortran and len(self.shape) > 1:
            raise ValueError(
                f"{self._path}: array {name!r} is in Fortran order, whose rows are not consecutive"
            )

    def read(self, start: int, stop: int) -> np.ndarray:
        size = self.dtype.itemsize * int(np.prod(self.shape[1:], dtype=np.int64))
        if self._file is None:
            with zipfile.ZipFile(self._path) as archive:
                self._file = archive.open(f"{self._name}.npy")
        self._file.seek(self._offset + start * size)
        data = self._file.read((stop - start) * size)
        if stop == self.shape[0]:
            self.close()
        return np.frombuffer(data, self.dtype).reshape(stop - start, *self.shape[1:])

    def close(self) -> None:
        """Let go of the file; the next read opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            self._file.close()


def _npy_header(file: Any, path: PathLike) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, order, dtype and the data's offset in an open `.npy` file."""
    try:
        version = np.lib.format.read_magic(file)
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, fortran, dtype = read(file)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)} is not an array in NumPy's format: {error}") from error
    if not shape:
        raise ValueError(f"{os.fspath(path)} is a single number: the first axis must be the rows")
    return shape, fortran, dtype, file.tell()


class _Joined:
    """Shards, one below the other."""

    def __init__(self, parts: Sequence[Column]) -> None:
        rows, dtypes = {part.shape[1:] for part in parts}, {part.dtype for part in parts}
        if len(rows) > 1 or len(dtypes) > 1:
            raise ValueError(
                f"shards must have rows of one shape and dtype, not of shapes {sorted(rows)} and dtypes "
                f"{sorted(map(str, dtypes))}"
            )
        self._parts = parts
        self._ends = list(itertools.accumulate(part.shape[0] for part in parts))
        self.shape = (self._ends[-1], *rows.pop())
        self.dtype = dtypes.pop()

    def read(self, start: int, stop: int) -> np.ndarray | jax.Array:
        pieces = []
        i = bisect.bisect_right(self._ends, start)
        while start < stop:
            begin = self._ends[i] - self._parts[i].shape[0]
            end = min(stop, self._ends[i])
            if start < end:
                pieces.append(self._parts[i].read(start - begin, end - begin))
            start, i = end, i + 1
        return concatenate(pieces) if pieces else np.empty((0, *self.shape[1:]), self.dtype)


class _ParquetColumn:
    """A column of one Parquet file; the row group last read stays in memory."""

    def __init__(self, path: PathLike, name: str) -> None:
        parquet = optional("pyarrow.parquet")
        self._path, self._name = os.fspath(path), name
        self._file = parquet.ParquetFile(self._path)
        if name not in self._file.schema_arrow.names:
            raise KeyError(f"{self._path} has no column {name!r}, only {self._file.schema_arrow.names}")
        metadata = self._file.metadata
        self.groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self._ends = list(itertools.accumulate(self.groups))
        self._held: tuple[int, np.ndarray] | None = None
        first = self._group(0) if self.groups else np.empty(0)
        self.shape: tuple[int, ...] = (metadata.num_rows, *first.shape[1:])
        self.dtype = first.dtype

    def read(self, start: int, stop: int) -> np.ndarray:
        pieces = []
        i = bisect.bisect_right(self._ends, start)
        while start < stop:
            begin, end = self._ends[i] - self.groups[i], min(stop, self._ends[i])
            if start < end:
                pieces.append(self._group(i)[start - begin : end - begin])
            start, i = end, i + 1
        return np.concatenate(pieces) if pieces else np.empty((0, *self.shape[1:]), self.dtype)

    def _group(self, i: int) -> np.ndarray:
        if self._held is None or self._held[0] != i:
            self._held = None
            column = self._file.read_row_group(i, columns=[self._name]).column(0).combine_chunks()
            self._held = (i, self._values(column))
        return self._held[1]

    def _values(self, column: Any) -> np.ndarray:
        """Lists of one length become rows of an array; missing values become NaN."""
        pyarrow = optional("pyarrow")
        if pyarrow.types.is_fixed_size_list(column.type):
            rows = column.flatten().to_numpy(zero_copy_only=False)
            return rows.reshape(len(column), column.type.list_size)
        if pyarrow.types.is_list(column.type) or pyarrow.types.is_large_list(column.type):
            lengths = set(column.value_lengths().unique().to_pylist())
            if len(lengths) > 1:
                raise ValueError(f"{self._path}: the lists in column {self._name!r} differ in length")
            rows = column.flatten().to_numpy(zero_copy_only=False)
            return rows.reshape(len(column), -1)
        return column.to_numpy(zero_copy_only=False)
