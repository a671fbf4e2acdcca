"""Checkpoints of a fit: one file each, written atomically, the last few kept, read back only if every byte is right.

A file is a line with the format's version, a line with the SHA-256 of everything behind it, and behind it the length of a
JSON header, the header, and the arrays' bytes. Nothing in it is executed when it is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any

MAGIC = "pykernels stream checkpoint"
VERSION = 1
_NAME = re.compile(r"fit-(\d{12})\.ckpt")


class CheckpointError(RuntimeError):
    """A checkpoint can not be read, or is of another fit."""


class UnreadableCheckpointError(CheckpointError):
    """A checkpoint is damaged or of another format; an earlier one may be whole."""


class CheckpointWarning(UserWarning):
    """A checkpoint could not be read, and an earlier one is used."""


@dataclass(frozen=True)
class Checkpoint:
    """Where and how often a fit is saved.

    `folder` is created. A checkpoint is written every `every` batches, and at the end of every epoch and of the fit; the
    last `keep` of them stay.
    """

    folder: str | os.PathLike[str]
    every: int | None = None
    keep: int = 3

    def __post_init__(self) -> None:
        if (self.every is not None and self.every < 1) or self.keep < 1:
            raise ValueError("Checkpoint(every=, keep=) must be positive")

    def save(self, number: int, tree: PyTree, data: dict[str, Any]) -> Path:
        """Write a pytree of arrays and JSON data under a number that grows; atomic: the file is there whole or not at
        all."""
        folder = Path(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"fit-{number:012d}.ckpt"
        content = _pack(tree, data)
        digest = hashlib.sha256(content).hexdigest()
        handle, temporary = tempfile.mkstemp(prefix=".fit-", suffix=".part", dir=folder)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(f"{MAGIC} {VERSION}\n{digest}\n".encode())
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        _sync_folder(folder)
        for old in self.paths()[: -self.keep]:
            old.unlink(missing_ok=True)
        return path

    def paths(self) -> list[Path]:
        """The checkpoints there are, the oldest first."""
        folder = Path(self.folder)
        return sorted(p for p in folder.iterdir() if _NAME.fullmatch(p.name)) if folder.is_dir() else []

    def load_last(self, like: PyTree) -> tuple[PyTree, dict[str, Any]] | None:
        """The last checkpoint that can be read, None if there is none at all. Warns about those that can not; raises
        CheckpointError if none can."""
        reasons = []
        for path in reversed(self.paths()):
            try:
                return load(path, like)
            except (UnreadableCheckpointError, OSError) as error:
                reasons.append(str(error))
                warnings.warn(f"{error}; the checkpoint before it is used", CheckpointWarning, stacklevel=4)
        if reasons:
            raise CheckpointError(f"no checkpoint in {self.folder} can be used: {'; '.join(reasons)}")
        return None


def load(path: str | os.PathLike[str], like: PyTree) -> tuple[PyTree, dict[str, Any]]:
    """Read a checkpoint: the arrays in the structure of `like`, and the data. Raises CheckpointError, which says what is
    wrong with it."""
    content = Path(path).read_bytes()
    first, _, rest = content.partition(b"\n")
    magic, _, version = first.decode("ascii", "replace").rpartition(" ")
    if magic != MAGIC:
        raise UnreadableCheckpointError(f"{path} is no checkpoint of pykernels, or is damaged")
    if version != str(VERSION):
        raise UnreadableCheckpointError(
            f"{path} has format {version}; this version of pykernels reads format {VERSION}"
        )
    digest, _, packed = rest.partition(b"\n")
    if hashlib.sha256(packed).hexdigest() != digest.decode("ascii", "replace"):
        raise UnreadableCheckpointError(f"{path} is truncated or damaged: its checksum is wrong")
    header, arrays = _unpack(packed)
    names, tree = _names(like), jax.tree.structure(like)
    if names != header["names"]:
        missing = sorted(set(names) ^ set(header["names"]))
        raise CheckpointError(
            f"{path} is of a fit with other parameters or another optimizer: {', '.join(missing[:4])} in only one of them"
        )
    for name, leaf, array in zip(names, jax.tree.leaves(like), arrays, strict=True):
        raw = _raw(leaf)
        if (array.shape, array.dtype) != (raw.shape, raw.dtype):
            raise CheckpointError(
                f"{path} is of another fit: {name} is {array.dtype}{list(array.shape)} in it, here "
                f"{raw.dtype}{list(raw.shape)}"
            )
    leaves = [_restored(array, leaf) for array, leaf in zip(arrays, jax.tree.leaves(like), strict=True)]
    return jax.tree.unflatten(tree, leaves), header["data"]


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _raw(leaf: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def _restored(array: np.ndarray, like: Any) -> jax.Array:
    if _is_key(like):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(like))
    return jnp.asarray(array)


def _names(tree: PyTree) -> list[str]:
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _pack(tree: PyTree, data: dict[str, Any]) -> bytes:
    arrays = [_raw(leaf) for leaf in jax.tree.leaves(tree)]
    header = {
        "names": _names(tree),
        "arrays": [[array.dtype.name, list(array.shape)] for array in arrays],
        "data": data,
    }
    text = json.dumps(header).encode()
    parts = [len(text).to_bytes(8, "little"), text]
    return b"".join(parts + [np.ascontiguousarray(array).tobytes() for array in arrays])


def _unpack(packed: bytes) -> tuple[dict[str, Any], list[np.ndarray]]:
    length = int.from_bytes(packed[:8], "little")
    header, place, arrays = json.loads(packed[8 : 8 + length]), 8 + length, []
    for name, shape in header["arrays"]:
        dtype = jnp.dtype(name)  # knows bfloat16 and its like
        count = int(np.prod(shape, dtype=np.int64))
        arrays.append(np.frombuffer(packed, dtype, count, place).reshape(shape).copy())
        place += count * dtype.itemsize
    return header, arrays


def _sync_folder(folder: Path) -> None:
    """The new name must be on disk too, where the system can do that."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
