"""The step kernels of the array plan: what one pass over a state in memory does, as kernel bodies over Refs.

A state is (rows, columns): a row is a trajectory and has its own step size, a column an element of its state. A body is a
function of Refs for a piece of one row: how many vectors of columns there are, then one Ref per operand that is read, then
one per result. A Ref of a state is (vectors, columns of a vector): vectors are counted by the body's only loop, the columns
of a vector are the lanes that `llvm.py` knows. What there is one of per row is a scalar. How rows are cut into pieces, and
whose threads take them, is the runner's business (`columns.py`, `triton.py`).

Bodies read every operand once and write every result once. Sums over columns are over the piece, in a fixed order.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

if TYPE_CHECKING:
    from jaxtyping import Array

INT32 = np.dtype(np.int32)
Matrix = tuple[tuple[float, ...], ...]


class Kind(enum.Enum):
    """What a buffer has one of."""

    STATE = enum.auto()  # (rows, columns)
    ROW = enum.auto()  # (rows,), or one scalar for all rows
    SUM = enum.auto()  # (rows,): a result, the sum over a row's pieces
    SLOTS = enum.auto()  # (slots, rows, columns), of which a pass touches each row's slot


@dataclass(frozen=True)
class Buffer:
    """An operand or a result. `repeats`: where a last vector has too few columns, what is missing repeats the last one,
    otherwise it is zero. `slots`, of Kind.SLOTS: their number, and `slot` is the operand that tells which one."""

    kind: Kind
    dtype: np.dtype
    repeats: bool = field(default=False, kw_only=True)
    slots: int = field(default=0, kw_only=True)
    slot: int = field(default=0, kw_only=True)

    def shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """Its shape, with one entry per row where there may be a scalar."""
        state = (rows, columns)
        return {Kind.STATE: state, Kind.SLOTS: (self.slots, *state)}.get(self.kind, (rows,))


@dataclass(frozen=True)
class Pass:
    """Everything static about a pass; hashable, the parameter of its primitive. `runner` is the one asked for, None: the
    platform's."""

    dtype: np.dtype
    runner: str | None = field(default=None, kw_only=True)

    @property
    def operands(self) -> list[Buffer]:
        raise NotImplementedError

    @property
    def results(self) -> list[Buffer]:
        raise NotImplementedError

    @property
    def in_place(self) -> dict[int, int]:
        """Operands whose memory is a result's: operand number to result number. A body has one Ref for both."""
        return {}

    @property
    def rewrites(self) -> bool:
        """Whether a result is read before it is written: it is in the caches then."""
        return False

    def body(self, count: Any, *refs: Any) -> None:
        """The kernel."""
        raise NotImplementedError

    def _state(self, repeats: bool = False) -> Buffer:
        return Buffer(Kind.STATE, self.dtype, repeats=repeats)

    def _row(self) -> Buffer:
        return Buffer(Kind.ROW, self.dtype)


def _each(count: Any, body: Callable[[Any, Any], Any], initial: Any = None) -> Any:
    """`body` for every vector of the piece."""
    return lax.fori_loop(jnp.int32(0), count[...], body, initial)


def _weighted(weights: Sequence[float], values: Sequence[Array]) -> Array | None:
    """A sum of multiples, None if there is nothing in it; a weight of 1 costs nothing."""
    total = None
    for weight, value in zip(weights, values, strict=True):
        if weight == 0:
            continue
        term = value if weight == 1 else weight * value
        total = term if total is None else total + term
    return total


def _stepped(base: Array | None, h: Array, slope: Array | None, like: Array) -> Array:
    """base + h slope, what is missing left out."""
    if slope is None:
        return jnp.zeros_like(like) if base is None else base
    return h * slope if base is None else base + h * slope


@dataclass(frozen=True)
class Combine(Pass):
    """`out[i] = sum_j (plain[i][j] + h scaled[i][j]) x[j]`. Operands: the x, then h. Linear in the x, and in h. `replaces`:
    the first result is in the first operand's place."""

    plain: Matrix
    scaled: Matrix
    replaces: bool = False

    @property
    def count(self) -> int:
        return len(self.plain[0])

    @property
    def operands(self) -> list[Buffer]:
        return [*[self._state()] * self.count, self._row()]

    @property
    def results(self) -> list[Buffer]:
        return [self._state()] * len(self.plain)

    @property
    def in_place(self) -> dict[int, int]:
        return {0: 0} if self.replaces else {}

    @property
    def rewrites(self) -> bool:
        return self.replaces

    def body(self, count: Any, *refs: Any) -> None:
        outs = refs[len(refs) - len(self.plain) :]
        given = [*outs[: self.replaces], *refs[: self.count - self.replaces]]
        h = refs[self.count - self.replaces][...]

        def step(i: Array, _: Any) -> None:
            for out, value in zip(outs, self.combined([x[i] for x in given], h), strict=True):
                out[i] = value

        _each(count, step)

    def combined(self, given: Sequence[Array], h: Array) -> list[Array]:
        """The results of these operands, with `h` of a shape that broadcasts."""
        return [
            _stepped(_weighted(plain, given), h, _weighted(scaled, given), given[0])
            for plain, scaled in zip(self.plain, self.scaled, strict=True)
        ]


@dataclass(frozen=True)
class Finish(Pass):
    """The end of an attempt: the new state, the scaled embedded error's sum of squares, and the milestone when one is due.

    Operands: y, the slopes, h, then `new` (the new state, if `given`), `error` (what the slopes add to, if `partial`), the
    milestone buffer and the slot of each row (if `slots`). Results: the new state (unless `given`), the sum, the buffer.
    """

    weights: tuple[float, ...]  # unused if `given`
    error_weights: tuple[float, ...]
    rtol: float
    atol: float
    given: bool
    partial: bool
    slots: int | None

    @property
    def operands(self) -> list[Buffer]:
        slopes = [self._state()] * len(self.error_weights)
        out = [self._state(repeats=True), *slopes, self._row()]
        out += [self._state(repeats=True)] * self.given + [self._state()] * self.partial
        if self.slots is not None:
            out += [self._buffer(len(out) + 1), Buffer(Kind.ROW, INT32)]
        return out

    def _buffer(self, slot: int) -> Buffer:
        return Buffer(Kind.SLOTS, self.dtype, slots=self.slots or 0, slot=slot)

    @property
    def results(self) -> list[Buffer]:
        out = [] if self.given else [self._state()]
        out += [Buffer(Kind.SUM, self.dtype)]
        return out if self.slots is None else [*out, self._buffer(len(self.operands) - 1)]

    @property
    def in_place(self) -> dict[int, int]:
        return {} if self.slots is None else {len(self.operands) - 2: len(self.results) - 1}

    def parts(self, values: Sequence[Any]) -> tuple[Any, list[Any], Any, Any, Any, list[Any]]:
        """Operands as y, slopes, h, new, error (None where there is none), and the rest."""
        rest = list(values)
        y, slopes, rest = rest[0], rest[1 : 1 + len(self.error_weights)], rest[1 + len(self.error_weights) :]
        h = rest.pop(0)
        new = rest.pop(0) if self.given else None
        error = rest.pop(0) if self.partial else None
        return y, slopes, h, new, error, rest

    def body(self, count: Any, *refs: Any) -> None:
        y, slopes, h_ref, new, error, rest = self.parts(refs)
        slot = None if self.slots is None else rest.pop(0)
        out = None if self.given else rest.pop(0)
        total, h = rest.pop(0), h_ref[...]

        def sweep(milestone: Any) -> Array:
            def step(i: Array, squares: Array) -> Array:
                before = y[i]
                k = [slope[i] for slope in slopes]
                after = self.new_state(before, k, h) if new is None else new[i]
                if out is not None:
                    out[i] = after
                if milestone is not None:
                    milestone[i] = before
                return squares + self.square(before, after, k, h, None if error is None else error[i])

            zeros = jnp.zeros(y.shape[1:], self.dtype)
            return jnp.sum(_each(count, step, zeros))

        if slot is None:
            total[...] = sweep(None)
        else:
            due = is_inside(slot[...], self.slots or 0)
            total[...] = lax.cond(due, lambda: sweep(rest[0]), lambda: sweep(None))

    def new_state(self, y: Array, slopes: Sequence[Array], h: Array) -> Array:
        """The new state where it is not given."""
        return _stepped(y, h, _weighted(self.weights, slopes), y)

    def square(self, y: Array, new: Array, slopes: Sequence[Array], h: Array, error: Array | None) -> Array:
        """The square of each element's error over its tolerance, NaN where the new state is not finite."""
        error = _stepped(error, h, _weighted(self.error_weights, slopes), y)
        # Cheaper than a maximum that minds NaN: a NaN of y is chosen, one of the new state found below.
        larger = jnp.where(abs(new) > abs(y), abs(new), abs(y))
        ratio = error / (self.atol + self.rtol * larger)
        return jnp.where(abs(new) < jnp.inf, ratio * ratio, jnp.nan)


def is_inside(slot: Array, slots: int) -> Array:
    """Whether there is a slot of this number."""
    return (slot >= 0) & (slot < slots)


@dataclass(frozen=True)
class Accept(Pass):
    """`where(accepted, new, old)` by row, in the place of the old one, for several states. Operands: the old ones, the new
    ones, accepted (bool). Rows that are not accepted are not touched."""

    count: int

    @property
    def operands(self) -> list[Buffer]:
        return [*[self._state()] * (2 * self.count), Buffer(Kind.ROW, np.dtype(bool))]

    @property
    def results(self) -> list[Buffer]:
        return [self._state()] * self.count

    @property
    def in_place(self) -> dict[int, int]:
        return {i: i for i in range(self.count)}

    def body(self, count: Any, *refs: Any) -> None:
        news, accepted, outs = refs[: self.count], refs[self.count], refs[self.count + 1 :]

        def copy(i: Array, _: Any) -> None:
            for new, out in zip(news, outs, strict=True):
                out[i] = new[i]

        lax.cond(accepted[...], lambda: _each(count, copy), lambda: None)


@dataclass(frozen=True)
class Save(Pass):
    """Operands: the milestone buffer, each row's slot, the value; a row whose slot there is not is not saved. Result: the
    buffer."""

    slots: int

    @property
    def operands(self) -> list[Buffer]:
        return [*self.results, Buffer(Kind.ROW, INT32), self._state()]

    @property
    def results(self) -> list[Buffer]:
        return [Buffer(Kind.SLOTS, self.dtype, slots=self.slots, slot=1)]

    @property
    def in_place(self) -> dict[int, int]:
        return {0: 0}

    def body(self, count: Any, *refs: Any) -> None:
        slot, value, out = refs

        def copy(i: Array, _: Any) -> None:
            out[i] = value[i]

        lax.cond(is_inside(slot[...], self.slots), lambda: _each(count, copy), lambda: None)


@dataclass(frozen=True)
class Restore(Pass):
    """Operands: the milestone buffer, each row's slot. Result: the value; zero in a row whose slot there is not."""

    slots: int

    @property
    def operands(self) -> list[Buffer]:
        return [Buffer(Kind.SLOTS, self.dtype, slots=self.slots, slot=1), Buffer(Kind.ROW, INT32)]

    @property
    def results(self) -> list[Buffer]:
        return [self._state()]

    def body(self, count: Any, *refs: Any) -> None:
        buffer, slot, out = refs

        def copy(i: Array, _: Any) -> None:
            out[i] = buffer[i]

        def clear(i: Array, _: Any) -> None:
            out[i] = jnp.zeros(out.shape[1:], self.dtype)

        lax.cond(is_inside(slot[...], self.slots), lambda: _each(count, copy), lambda: _each(count, clear))


def shape_of(pass_: Pass, operands: Sequence[Any]) -> tuple[int, int]:
    """Rows and columns of a pass's operands."""
    for buffer, operand in zip(pass_.operands, operands, strict=True):
        if buffer.kind in (Kind.STATE, Kind.SLOTS):
            rows, columns = operand.shape[-2:]
            return rows, columns
    raise AssertionError("a pass without a state")


def structs_of(buffers: Sequence[Buffer], rows: int, columns: int) -> list[jax.ShapeDtypeStruct]:
    """Shapes and dtypes of buffers."""
    return [jax.ShapeDtypeStruct(b.shape(rows, columns), b.dtype) for b in buffers]
