"""A kernel's buffers and how a body reads and writes them: single elements, and rows that each hold a whole state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array

    from pykernels.kernels.stepper import Method, Pieces, Solve


@dataclass(frozen=True)
class Buffer:
    """An operand, result or scratch buffer of a kernel: its shape without lanes. `lanes` False: a result has one partial sum
    per block, scratch belongs to a block. `stack`: scratch so small that it may lie on the stack of whoever runs a lane."""

    shape: tuple[int, ...]
    dtype: Any
    lanes: bool = True
    stack: bool = False


def load(ref: Any, index: tuple[Any, ...]) -> Array:
    """`ref[(*index, ...)]`, also for a buffer without elements, which JAX 0.12 refuses to index."""
    if 0 in ref.shape:
        return jnp.zeros(ref.shape[len(index) :], ref.dtype)
    return ref[(*index, ...)]


def store(ref: Any, index: tuple[Any, ...], value: Array) -> None:
    """`ref[(*index, ...)] = value`, also for a buffer without elements."""
    if 0 not in ref.shape:
        ref[(*index, ...)] = value


def merge(ref: Any, index: tuple[Any, ...], mask: Array, value: Array) -> None:
    """Store in the lanes of the mask only. A runner's own view of a buffer may know better than to read the other lanes."""
    if hasattr(ref, "merge"):
        ref.merge(index, mask, value)
    else:
        store(ref, index, jnp.where(mask, value, load(ref, index)))


class Rows:
    """Rows of lane vectors in a few buffers: one for scalars per lane, one per leaf of the state."""

    def __init__(self, solve: Solve, method: Method, refs: Sequence[Any], scalars: int) -> None:
        self.shapes, self.method, self.scalars = solve.field.y_shapes, method, scalars
        self.scalar_ref: Any = refs[0] if scalars else None
        self.leaf_refs = refs[1:] if scalars else refs

    @staticmethod
    def buffers(solve: Solve, rows: int, scalars: int) -> list[Buffer]:
        """What holds so many rows."""
        first = [Buffer((rows, scalars), solve.field.dtype)] if scalars else []
        return first + [Buffer((rows, *shape), solve.field.dtype) for shape in solve.field.y_shapes]

    def write(self, row: Array | int, scalars: Sequence[Array], y: Pieces) -> None:
        """Fill a row."""
        for i, value in enumerate(scalars):
            self.scalar_ref[row, i, :] = value
        for (ref, at), piece in zip(self._places(), y, strict=True):
            store(ref, (row, *at), piece)

    def read(self, row: Array | int) -> tuple[list[Array], Pieces]:
        """A row's scalars and its state."""
        scalars = [self.scalar_ref[row, i, :] for i in range(self.scalars)]
        return scalars, [load(ref, (row, *at)) for ref, at in self._places()]

    def _places(self) -> list[tuple[Any, tuple[int, ...]]]:
        pairs = zip(self.leaf_refs, self.shapes, strict=True)
        return [(ref, at) for ref, shape in pairs for at in self.method.lift.pieces(shape)]
