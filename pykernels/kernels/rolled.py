"""A step whose stages are a loop: one copy of the field in the kernel, whatever the number of stages.

Unrolled, a step is stages x operations of the field, and backwards four times that: a dozen coupled states and a method of
thirteen stages are tens of thousands of instructions, most of whose values no register holds. Compilers are quadratic in
them, and what is spilled goes through memory anyway. Here the stages' slopes lie in rows of a scratch buffer from the start,
the coefficients in two small tables, and the loop over the stages multiplies by those that are not zero.

The step of row s has its argument at Y_s = y + h S_s, with S_s = sum_j a_sj k_j and k_s = f(t + c_s h, Y_s). Backwards, with
cotangents K_s of the stages (Hager, Numerische Mathematik 87, 2000), from the last stage to the first

    v_s = (df/dy)^T K_s,   K_j += h a_sj v_s,   y' += v_s,   t' += (df/dt)^T K_s,   h' += c_s (df/dt)^T K_s + <S_s, v_s>

after the new state y + h sum_j b_j k_j has given K_j = h b_j y1' to all stages. Cotangents of the operands are added up in a
scratch buffer too.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pykernels.kernels.buffers import Buffer, Rows, load, store
from pykernels.kernels.stepper import Method, Pieces, Pulled, Solve, inner, plus
from pykernels.lanes import operation_count
from pykernels.tableau import ButcherTableau

if TYPE_CHECKING:
    from jaxtyping import Array, Int32


# A step is unrolled while its slopes, in bytes per lane, and the field's operations are at most so many. Measured by what
# spills on sm_90, forward and backward: fields of up to 20 operations and 512 bytes of slopes (4 states, float64, dopri8)
# spill nothing, or little; 12 coupled states, 190 operations, up to 150 kB backward, a twentieth of that in a loop.
UNROLLED_BYTES, UNROLLED_OPERATIONS = 512, 100


def pays(solve: Solve) -> bool:
    """Whether a GPU's kernel is better off with its stages in a loop."""
    size = _stages(solve) * solve.field.elements * solve.field.dtype.itemsize
    return size > UNROLLED_BYTES or operation_count(solve.field.jaxpr) > UNROLLED_OPERATIONS


def _stages(solve: Solve) -> int:
    """Rows of slopes: the interpolant's stages too where values are saved."""
    tableau = solve.method
    return tableau.stages + (len(tableau.dense_a) if solve.saves is not None else 0)


def _coefficients(tableau: ButcherTableau) -> list[tuple[float, ...]]:
    """Coefficients by rows: each stage's (the first has none), then the interpolant's stages', then the new state's."""
    return [(), *tableau.a, *tableau.dense_a, tableau.b]


def tables(solve: Solve) -> list[np.ndarray]:
    """The coefficients that are not zero, as operands of a kernel: where each row begins and, behind that, the stage each
    of them belongs to (int32); their values and, behind those, the stages' abscissae."""
    tableau = solve.method
    rows = [[(j, a) for j, a in enumerate(row) if a] for row in _coefficients(tableau)]
    begins = np.cumsum([0, *map(len, rows)])
    stages, values = [j for row in rows for j, _ in row], [a for row in rows for _, a in row]
    nodes = (*tableau.c, *tableau.dense_c)
    return [np.array([*begins, *stages], np.int32), np.array([*values, *nodes], solve.field.dtype)]


def step_buffers(solve: Solve) -> list[Buffer]:
    """Scratch of a step: its slopes."""
    return [dataclasses.replace(b, stack=True) for b in Rows.buffers(solve, _stages(solve), 0)]


def pullback_buffers(solve: Solve, wrt: Sequence[bool]) -> list[Buffer]:
    """Scratch of a pullback beside its step's: the stages' cotangents, and those of the operands in `wrt`."""
    return step_buffers(solve) + _sums(solve, wrt)


def _sums(solve: Solve, wrt: Sequence[bool]) -> list[Buffer]:
    first = solve.first_operand
    return [
        Buffer(tuple(operand.shape), np.dtype(operand.dtype), lane or solve.spreads_shared, stack=True)
        for operand, wanted, lane in zip(solve.field.operands, wrt[first:], solve.lane[first:], strict=True)
        if wanted
    ]


class Rolled(Method):
    """A method whose stages are a loop. `refs`: those of the tables, of `step_buffers` and, for a pullback, of
    `pullback_buffers`."""

    def __init__(
        self, solve: Solve, refs: Sequence[Any], *, differentiated: bool, spread: Sequence[bool] | None = None
    ) -> None:
        super().__init__(solve, differentiated=differentiated, spread=spread)
        self.integers, self.numbers, *rest = refs
        count = len(solve.field.y_shapes)
        self.rows = len(_coefficients(solve.method))
        self.values = sum(map(np.count_nonzero, _coefficients(solve.method)))
        self.slopes = Rows(solve, self, rest[:count], 0)
        self.cotangents = Rows(solve, self, rest[count : 2 * count], 0) if len(rest) > count else None
        self.sums = (
            list(zip(rest[2 * count :], _sums(solve, spread or ()), strict=True)) if differentiated else []
        )

    def _entries(self, row: Array | int) -> tuple[Array, Array]:
        """The places of a row's coefficients: from, to."""
        return self.integers[row], self.integers[row + 1]

    def _stage(self, entry: Array) -> Int32[Array, ""]:
        return self.integers[entry + np.int32(self.rows + 1)]

    def _node(self, stage: Array) -> Array:
        return self.numbers[stage + np.int32(self.values)]

    def _slope(self, row: Array | int, like: Pieces) -> Pieces:
        """The sum of a row's coefficients times the stages."""
        first, last = self._entries(row)

        def add(carry: tuple[Array, Pieces]) -> tuple[Array, Pieces]:
            entry, total = carry
            (_, slope), weight = self.slopes.read(self._stage(entry)), self.numbers[entry]
            return entry + 1, [a + weight * b for a, b in zip(total, slope, strict=True)]

        zeros = [jnp.zeros_like(p) for p in like]
        return lax.while_loop(lambda carry: carry[0] < last, add, (first, zeros))[1]

    def _run(
        self, first: int, last: int, t: Array, h: Array, y: Pieces, operands: list[Pieces], mask: Any
    ) -> Pieces:
        """Stages first..last, and the argument of the last one of them."""

        def stage(carry: tuple[Array, Pieces]) -> tuple[Array, Pieces]:
            s, _ = carry
            argument = plus(y, h, self._slope(s, y))
            self.slopes.write(s, (), self.field(t + self._node(s) * h, argument, operands, mask))
            return s + 1, argument

        return lax.while_loop(lambda carry: carry[0] < last, stage, (jnp.int32(first), y))[1]

    @property
    def _new_state(self) -> int:
        """The row of the new state: an FSAL method's last stage is there."""
        return self.tableau.stages - 1 if self.tableau.fsal else self.rows - 1

    def step(
        self, t: Array, h: Array, y: Pieces, k0: Pieces, operands: list[Pieces], mask: Array | None = None, *,
        last: bool = True, dense: bool = False,
    ) -> tuple[Sequence[Pieces], Pieces]:  # fmt: skip
        count, fsal = self.tableau.stages, self.tableau.fsal
        self.slopes.write(0, (), k0)
        if fsal and (last or dense):
            new = self._run(1, count, t, h, y, operands, mask)
        else:
            count -= fsal
            self._run(1, count, t, h, y, operands, mask)
            new = plus(y, h, self._slope(self._new_state, y))
        stages: Sequence[Pieces] = _Stages(self.slopes, count)
        return (self.extend(stages, t, h, y, operands, mask) if dense else stages), new

    def extend(
        self, stages: Sequence[Pieces], t: Array, h: Array, y: Pieces, operands: list[Pieces],
        mask: Array | None = None,
    ) -> Sequence[Pieces]:  # fmt: skip
        count = len(stages) + len(self.tableau.dense_a)
        self._run(len(stages), count, t, h, y, operands, mask)
        return _Stages(self.slopes, count)

    def linearize(
        self, t: Array, h: Array, y: Pieces, operands: list[Pieces], wanted: Sequence[bool],
        mask: Array | None, *, dense: bool, times: bool,
    ) -> Pulled:  # fmt: skip
        stages, _ = self.step(
            t, h, y, self.field(t, y, operands, mask), operands, mask, last=False, dense=dense
        )
        return _Pullback(self, stages, t, h, y, operands, wanted, mask, times)

    def clear_sums(self) -> None:
        """Nothing has been added to the operands' cotangents."""
        for ref, buffer in self.sums:
            self._by_rows(buffer, functools.partial(self._clear, ref))

    def store_sums(self, results: Sequence[Any], lane: Sequence[bool]) -> None:
        """Write the operands' cotangents to their results, summed over the lanes where there is no `lane`."""
        for result, (ref, buffer), has_lanes in zip(results, self.sums, lane, strict=True):
            self._by_rows(
                buffer, functools.partial(self._hand_over, ref, result, buffer.lanes and not has_lanes)
            )

    @staticmethod
    def _clear(ref: Any, at: tuple[Any, ...]) -> None:
        store(ref, at, jnp.zeros(ref.shape[len(at) :], ref.dtype))

    @staticmethod
    def _hand_over(ref: Any, result: Any, summed: bool, at: tuple[Any, ...]) -> None:
        value = load(ref, at)
        store(result, at, jnp.sum(value, axis=-1) if summed else value)

    def _by_rows(self, buffer: Buffer, do: Callable[[tuple[Any, ...]], None]) -> None:
        """`do` at every place of a buffer, row after row in a loop: the kernel stays short however many there are, and the
        compiler does not take them for so many registers."""
        if not buffer.shape or self.lift.tiles:
            do(())
            return
        places = self.lift.pieces(buffer.shape[1:])

        def row(i: Array) -> Array:
            for at in places:
                do((i, *at))
            return i + 1

        lax.while_loop(lambda i: i < buffer.shape[0], row, jnp.int32(0))


class _Stages(Sequence[Pieces]):
    """Slopes that are read where they are used."""

    def __init__(self, rows: Rows, count: int) -> None:
        self.rows, self.length = rows, count

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, stage: Any) -> Any:
        return self.rows.read(range(self.length)[stage])[1]


class _Pullback(Pulled):
    """A step taken, its stages in their rows, to be pulled back stage by stage."""

    def __init__(
        self, method: Rolled, stages: Sequence[Pieces], t: Array, h: Array, y: Pieces, operands: list[Pieces],
        wanted: Sequence[bool], mask: Array | None, times: bool,
    ) -> None:  # fmt: skip
        self.method, self.stages, self.t, self.h, self.y = method, stages, t, h, y
        self.operands, self.wanted, self.mask, self.times = operands, wanted, mask, times

    @property
    def _rows(self) -> Rows:
        assert self.method.cotangents is not None
        return self.method.cotangents

    def begin(self) -> Any:
        zeros = [jnp.zeros_like(p) for p in self.y]

        def clear(s: Array) -> Array:
            self._rows.write(s, (), zeros)
            return s + 1

        lax.while_loop(lambda s: s < len(self.stages), clear, jnp.int32(0))
        return ()

    def add(self, cotangents: Any, weights: Sequence[Array | None], ct: Pieces) -> Any:
        for stage, weight in enumerate(weights):
            if weight is not None:
                self._add(stage, weight, ct)
        return cotangents

    def _add(self, stage: Array | int, weight: Array, ct: Pieces) -> None:
        _, before = self._rows.read(stage)
        self._rows.write(stage, (), [a + weight * b for a, b in zip(before, ct, strict=True)])

    def _spread(self, row: Array | int, ct: Pieces) -> None:
        """A row's coefficients times h and a cotangent, to the stages they belong to."""
        first, last = self.method._entries(row)

        def add(entry: Array) -> Array:
            self._add(self.method._stage(entry), self.h * self.method.numbers[entry], ct)
            return entry + 1

        lax.while_loop(lambda entry: entry < last, add, first)

    def pull(
        self, cotangents: Any, y1_ct: Pieces, accepted: Array
    ) -> tuple[Pieces, list[Pieces], Array | None, Array | None]:
        del cotangents  # in their rows
        method, zero = self.method, jnp.zeros_like(self.t)
        self._spread(method._new_state, y1_ct)
        t_ct = h_ct = zero if self.times else None
        if self.times:
            h_ct = inner(method._slope(method._new_state, self.y), y1_ct)

        def back(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            s, y_ct, t_ct, h_ct = carry
            s = s - 1
            slope, c = method._slope(s, self.y), method._node(s)
            _, ct = self._rows.read(s)
            y_term, terms, t_term = self._through_field(self.t + c * self.h, plus(self.y, self.h, slope), ct)
            y_term = [jnp.where(accepted, p, 0.0) for p in y_term]
            self._spread(s, y_term)
            self._accumulate(terms, accepted)
            if self.times:
                t_term = jnp.where(accepted, t_term, 0.0)
                t_ct, h_ct = t_ct + t_term, h_ct + c * t_term + inner(slope, y_term)
            return s, [a + b for a, b in zip(y_ct, y_term, strict=True)], t_ct, h_ct

        start = (jnp.int32(len(self.stages)), y1_ct, t_ct, h_ct)
        _, y_ct, t_ct, h_ct = lax.while_loop(lambda carry: carry[0] > 0, back, start)
        return y_ct, [], t_ct, h_ct

    def _through_field(self, t: Array, y: Pieces, ct: Pieces) -> tuple[Pieces, list[Pieces], Any]:
        """Cotangents of one evaluation of the field: of the state, of the operands wanted, of the time if it is."""
        some = [o for o, wanted in zip(self.operands, self.wanted, strict=True) if wanted]

        def field(y: Pieces, some: list[Pieces], t: Array) -> Pieces:
            rest = iter(some)
            operands = [next(rest) if w else o for o, w in zip(self.operands, self.wanted, strict=True)]
            return self.method.field(t, y, operands, self.mask)

        if self.times:
            _, pull = jax.vjp(field, y, some, t)
            y_ct, terms, t_ct = pull(ct)
            return y_ct, terms, t_ct
        _, pull = jax.vjp(lambda y, some: field(y, some, t), y, some)
        return (*pull(ct), None)

    def _accumulate(self, terms: list[Pieces], accepted: Array) -> None:
        """Add the operands' cotangents: masked here if they have lanes, else the lift has left out the dead lanes."""
        lift = self.method.lift
        for (ref, buffer), pieces in zip(self.method.sums, terms, strict=True):
            for at, term in zip(lift.pieces(buffer.shape), pieces, strict=True):
                term = jnp.where(accepted, term, 0.0) if buffer.lanes else term
                # Row by row, so that few of them are in registers at a time. Tiles have no rows.
                if len(buffer.shape) > len(at) and not lift.tiles:
                    for i in range(buffer.shape[0]):
                        store(ref, (i,), load(ref, (i,)) + term[i])
                else:
                    store(ref, at, load(ref, at) + term)
