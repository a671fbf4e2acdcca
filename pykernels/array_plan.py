"""The array plan: whole solves of large states, one step at a time. The loops are XLA's, the field runs as the user wrote
it, and everything else in a step is a few passes over memory.

A state is a list of its leaves, each an array (rows, columns): a row is a trajectory, its columns the leaf's elements. Time,
step size and whatever else there is one of per trajectory are vectors (rows,). The passes work on one leaf at a time, so
leaves of different shapes are never copied together. What the passes are is handed in: step kernels, or their plain meaning.

All rows make their attempts together: row by row a step is accepted or not, and who has arrived takes attempts of no
consequence. The forward loop notes the time and the size of every attempt, which cost nothing beside a state; the replay
therefore needs no error estimate and no controller, and takes the very steps of the forward pass. Attempts that no row
accepted are skipped when going back.

Backwards, one step y1 = y + h sum_i b_i k_i with k_i = f(t + c_i h, u_i), u_i = y + h sum_j a_ij k_j is pulled back stage
by stage (Hairer, Lubich & Wanner, Geometric Numerical Integration, VI.10: the adjoint of a Runge-Kutta method):

    kappa_i = h (b_i lambda + sum_{l > i} a_li mu_l),    mu_i = (df/du_i)^T kappa_i,    lambda <- lambda + sum_i mu_i

from the last stage to the first, each kappa and each sum in one pass over memory, so that a step needs its stages and one
cotangent per stage, whatever the number of steps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pykernels import lanes, schedule
from pykernels.interpolation import dense_slopes, dense_weights
from pykernels.kernels.body import Kernel
from pykernels.kernels.stepper import Pieces, Solve, State, Stepper, any_lane, outcome
from pykernels.schedule import Record, record_for
from pykernels.stepsize import limit

if TYPE_CHECKING:
    from jaxtyping import Array

Optional = Any  # a vector over rows, or None where it is not needed

# Up to so many bytes, of a trajectory and in all, every attempt's state is kept: then nothing is replayed. Under `jax.vmap`
# it is one trajectory that asks, and there may be many.
EVERY_STATE_BYTES = 128 * 2**10
EVERY_STATE_BYTES_IN_ALL = 64 * 2**20
# From so many rows of at most so many columns on, the field is evaluated with the rows last (see `_narrow_lift`); measured
# with `bench/plans.py --layouts`.
MANY_ROWS = 64
NARROW = 8
# Beyond so many bytes more levels of replay take the place of more states.
MILESTONE_BYTES = 2**30


class Passes(NamedTuple):
    """The passes over memory, each on one leaf (rows, columns); see `primitives.py` for what they do."""

    stage: Callable[..., Any]  # rk_stage
    finish: Callable[..., tuple[Array, ...]]  # rk_finish
    accept: Callable[..., list[Array]]  # rk_accept
    save: Callable[..., Array]  # milestone_save
    restore: Callable[..., Array]  # milestone_restore
    empty: Callable[..., Array]  # uninitialized


def default_record(solve: Solve, rows: int) -> Record:
    """Milestones and scratch where neither is asked for.

    Small states are all kept, up to EVERY_STATE_BYTES: going back then replays nothing. Larger ones as in the lanes plan,
    sqrt(max_steps) milestones and as much scratch, unless that would be more than MILESTONE_BYTES: then the n-th root of
    max_steps of both, with n - 1 levels of replay, for the smallest n that fits (the largest one if none does). Levels
    beyond the first cost a replay only where a solve makes more attempts than milestones times scratch.
    """
    size, most = solve.field.elements * solve.field.dtype.itemsize, solve.max_steps
    if most * size <= min(EVERY_STATE_BYTES, EVERY_STATE_BYTES_IN_ALL // rows):
        return record_for(most, most, 1)
    root = most
    for levels in range(2, max(most.bit_length(), 3)):
        root = max(math.ceil(most ** (1 / levels) - 1e-9), 2)
        if levels * root * size * rows <= MILESTONE_BYTES:
            break
    return record_for(most, root, root)


def record_shapes(solve: Solve, record: Record | None, rows: int) -> list[jax.ShapeDtypeStruct]:
    """What a recorded solve returns besides values and counts: the stride, (1, rows); for adaptive steps each attempt's time
    and size, (max_steps, 2, rows); each leaf's milestones, (slots, rows, columns)."""
    if record is None:
        return []
    dtype = solve.field.dtype
    shapes = [jax.ShapeDtypeStruct((1, rows), np.dtype(np.int32))]
    if solve.adaptive:
        shapes.append(jax.ShapeDtypeStruct((solve.max_steps, 2, rows), dtype))
    return shapes + [
        jax.ShapeDtypeStruct((record.count, rows, math.prod(s)), dtype) for s in solve.field.y_shapes
    ]


def memory(solve: Solve, record: Record) -> int:
    """Bytes per trajectory of milestones, scratch and noted steps."""
    kept = sum(math.prod(s.shape) * np.dtype(s.dtype).itemsize for s in record_shapes(solve, record, 1))
    scratch = record.scratch + sum(_replay_rows(solve, record))
    return kept + scratch * solve.field.elements * solve.field.dtype.itemsize


def run(kernel: Kernel, operands: Sequence[Array], rows: int, passes: Passes) -> list[Array]:
    """Run a whole solve, forward or backward, in the manner of the other runners: states come and go with rows last.

    Operands and results are the kernel's, but for the record, which is `record_shapes`.
    """
    solve, record = kernel.solve, kernel.record
    if rows == 0:
        values = [jnp.zeros((*b.shape, 0) if b.lanes else b.shape, b.dtype) for b in kernel.results]
        if kernel.wrt is not None:
            return values
        kept = [jnp.zeros(s.shape, s.dtype) for s in record_shapes(solve, record, 0)]
        return values[: len(solve.field.y_shapes) + 1] + kept
    inputs, rest = operands[: len(solve.lane)], operands[len(solve.lane) :]
    if kernel.wrt is None:
        return _Forward(solve, record, _System(solve, inputs, rows, passes)).run()
    assert record is not None
    attempts, stride, *recorded = rest[: -len(solve.field.y_shapes)]
    system = _System(solve, inputs, rows, passes)
    cotangents = [_rows_first(ct) for ct in rest[-len(solve.field.y_shapes) :]]
    pull = _Backward(solve, record, kernel.wrt, system, attempts, recorded, cotangents)
    return pull.run(jnp.maximum(jnp.max(stride), 1))


def _rows_first(value: Array) -> Array:
    return jnp.moveaxis(value, -1, 0)


def _rows_last(value: Array) -> Array:
    return jnp.moveaxis(value, 0, -1)


def _across(vector: Array, like: Array) -> Array:
    """A vector over rows, shaped to multiply a leaf (rows, columns)."""
    return vector.reshape(vector.shape[0], *(1,) * (like.ndim - 1))


def _chosen(mask: Array, yes: tuple[Any, ...], no: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(jnp.where(mask, a, b) for a, b in zip(yes, no, strict=True))


def _inner(a: Pieces, b: Pieces) -> Array:
    """Inner product of two states, row by row."""
    return functools.reduce(jnp.add, [jnp.sum(x * y, axis=-1) for x, y in zip(a, b, strict=True)])


class _Slopes(NamedTuple):
    """`Stepper` asks the method for its tableau and for the field, whose states then have rows last."""

    tableau: Any
    field: Callable[..., Pieces]


def _narrow_lift(solve: Solve, rows: int) -> lanes.Lift | None:
    """The field with the rows as the last axis, where that pays: many rows of few columns, multiplied by matrices that they
    share. The weights' cotangents are then products X Y^T of wide matrices; with the rows first, X^T Y, XLA's CPU client
    takes up to seven times as long (64 x 256 by 256 x 2: 31 us against 4). With matrices of their own, rows are a batch of
    products, which `jax.vmap` does better.
    """
    field, lane = solve.field, (True, *[True] * len(solve.field.y_shapes), *solve.lane[solve.first_operand :])
    if rows < MANY_ROWS or field.elements > NARROW or lanes.unsupported(field.jaxpr, lane) is not None:
        return None
    if lanes.products_of_lanes(field.jaxpr, lane):
        return None
    return lanes.lift(field.jaxpr, lane, "arrays", differentiated=True)


class _System:
    """The field on states in rows, and the passes on all leaves of a state."""

    def __init__(self, solve: Solve, inputs: Sequence[Array], rows: int, passes: Passes) -> None:
        self.solve, self.rows, self.passes = solve, rows, passes
        self.shapes = solve.field.y_shapes
        self.lane = solve.lane[solve.first_operand :]
        self.operands = [
            _rows_first(x) if lane else x
            for x, lane in zip(inputs[solve.first_operand :], self.lane, strict=True)
        ]
        self.inputs = inputs
        self.lift = _narrow_lift(solve, rows)
        self._buffers = 0

        def vector(index: int) -> Array:
            return jnp.broadcast_to(inputs[index], (rows,))

        def slopes(t: Array, y: Pieces, operands: Any) -> Pieces:
            del operands
            return [k.T for k in self.field(t, [p.T for p in y])]

        self.stepper = Stepper(
            solve, _Slopes(solve.method, slopes), vector(0), vector(1), vector(2) if solve.has_dt0 else None, []  # type: ignore[arg-type]
        )  # fmt: skip

    def y0(self) -> Pieces:
        leaves = self.inputs[self.solve.first_y : self.solve.first_operand]
        return [
            _rows_first(leaf).reshape(self.rows, math.prod(s))
            for leaf, s in zip(leaves, self.shapes, strict=True)
        ]

    def save_time(self, row: Array) -> Array:
        """Save time number `row` (clamped), (rows,)."""
        dates = self.inputs[self.solve.first_y - 1]
        return jnp.broadcast_to(dates[jnp.clip(row, 0, self.solve.saves - 1)], (self.rows,))

    def rows_last(self, y: Pieces, leading: tuple[int, ...] = ()) -> list[Array]:
        """Leaves (*leading, rows, columns) as users see them, (*leading, *shape, rows)."""
        return [
            jnp.moveaxis(p, -2, -1).reshape(*leading, *s, self.rows)
            for p, s in zip(y, self.shapes, strict=True)
        ]

    def field(self, t: Array, y: Pieces, operands: Sequence[Array] | None = None) -> Pieces:
        """The time derivative, row by row; operands are the solve's unless given. A single row is no batch."""
        operands = self.operands if operands is None else operands
        states = [p.reshape(self.rows, *s) for p, s in zip(y, self.shapes, strict=True)]
        if self.rows == 1:
            mine = [x[0] if lane else x for x, lane in zip(operands, self.lane, strict=True)]
            slopes = self.solve.field.function(t[0], *[p[0] for p in states], *mine)
        elif self.lift is not None:
            # Without the barriers XLA folds the transpositions into the products, which it then computes the slow way.
            last = [
                lax.optimization_barrier(_rows_last(x)) if lane else x
                for x, lane in zip([*states, *operands], self.lift.lane[1:], strict=True)
            ]
            lifted = self.lift([[t], *([x] for x in last)])
            slopes = [_rows_first(lax.optimization_barrier(k)) for (k,) in lifted]
        else:
            axes = (0, *[0] * len(states), *[0 if lane else None for lane in self.lane])
            slopes = jax.vmap(self.solve.field.function, in_axes=axes)(t, *states, *operands)
        return [k.reshape(self.rows, p.shape[1]) for k, p in zip(slopes, y, strict=True)]

    def stage(
        self,
        y: Pieces | None,
        slopes: Sequence[Pieces],
        h: Array,
        weights: Sequence[float],
        *,
        in_place: bool = False,
    ) -> Pieces:
        """y + h sum_i w_i k_i; `in_place`: in the memory of y, which is not needed any more."""
        if not any(weights):
            return y if y is not None else [jnp.zeros_like(p) for p in slopes[0]]
        bases = [None] * len(self.shapes) if y is None else y
        return [
            self.passes.stage(b, [k[i] for k in slopes], h, weights, in_place=in_place)
            for i, b in enumerate(bases)
        ]

    def attempt(self, t: Array, h: Array, y: Pieces, k0: Pieces) -> tuple[list[Pieces], Pieces, Array]:
        """The stages of a step, its new state, and the mean square of its error in units of the tolerance (infinite if not
        finite)."""
        tableau, step, leaves = self.solve.method, self.solve.step, range(len(self.shapes))
        rows, error = tableau.a[:-1] if tableau.fsal else tableau.a, tableau.error
        assert error is not None
        stages = [k0]
        for row, c in zip(rows, tableau.c[1:], strict=False):
            stages.append(self.field(t + c * h, self.stage(y, stages, h, row)))
        if tableau.fsal:
            # The pass that makes the new state reads all slopes, and sums what is known of the error.
            count = len(stages)
            pairs = [
                self.passes.stage(y[i], [k[i] for k in stages], h, tableau.b[:count], error[:count])
                for i in leaves
            ]
            new = [pair[0] for pair in pairs]
            stages.append(self.field(t + tableau.c[-1] * h, new))
            sums = [
                self.passes.finish(
                    y[i], [stages[-1][i]], h, None, error[count:], step.rtol, step.atol, new=new[i], error=pairs[i][1]
                )[1]
                for i in leaves
            ]  # fmt: skip
        else:
            results = [
                self.passes.finish(y[i], [k[i] for k in stages], h, tableau.b, error, step.rtol, step.atol)
                for i in leaves
            ]
            new, sums = [r[0] for r in results], [r[1] for r in results]
        square = functools.reduce(jnp.add, sums) / self.solve.field.elements
        return stages, new, jnp.where(jnp.isnan(square), jnp.inf, square)

    def accept(self, olds: Sequence[Pieces], news: Sequence[Pieces], mask: Array) -> list[Pieces]:
        """The new states in the rows of the mask, in the place of the old ones."""
        leaves = [
            self.passes.accept([y[i] for y in olds], [y[i] for y in news], mask)
            for i in range(len(self.shapes))
        ]
        return [list(state) for state in zip(*leaves, strict=True)]

    def save(self, buffers: Sequence[Array], slot: Array, y: Pieces) -> list[Array]:
        return [self.passes.save(b, slot, p) for b, p in zip(buffers, y, strict=True)]

    def restore(self, buffers: Sequence[Array], slot: Array) -> Pieces:
        """The states of a slot, or of each row's own."""
        return [self.passes.restore(b, slot) for b in buffers]

    def buffers(self, slots: int) -> list[Array]:
        """For so many states, with undefined contents."""
        return [self.empty(slots, self.rows, math.prod(s)) for s in self.shapes]

    def empty(self, *shape: int) -> Array:
        self._buffers += 1
        return self.passes.empty(shape, self.solve.field.dtype, number=self._buffers)

    def stages(
        self, t: Array, h: Array, y: Pieces, k0: Pieces, *, last: bool = False, in_place: bool = False
    ) -> tuple[list[Pieces], Pieces]:
        """The stages of a step and its new state. `last` False leaves out an FSAL stage; `in_place` as in `stage`."""
        tableau, stages = self.solve.method, [k0]
        for row, c in zip(tableau.a, tableau.c[1:], strict=True):
            ends = tableau.fsal and len(stages) == tableau.stages - 1 and not last
            argument = self.stage(y, stages, h, row, in_place=in_place and ends)
            if ends:
                return stages, argument
            stages.append(self.field(t + c * h, argument))
        if tableau.fsal:
            return stages, argument
        return stages, self.stage(y, stages, h, tableau.b, in_place=in_place)

    def step(self, t: Array, h: Array, y: Pieces, made: Array | None) -> Pieces:
        """The new state after a step whose size is known, in the place of the old one, in the rows that made it (None:
        all)."""
        k0 = self.field(t, y)
        if made is None or self.rows == 1:
            return self.stages(t, h, y, k0, in_place=True)[1]
        return self.accept([y], [self.stages(t, h, y, k0)[1]], made)[0]

    def extend(self, stages: Sequence[Pieces], t: Array, h: Array, y: Pieces) -> list[Pieces]:
        """Append the stages that only the interpolant needs."""
        stages = list(stages)
        for row, c in zip(self.solve.method.dense_a, self.solve.method.dense_c, strict=True):
            stages.append(self.field(t + c * h, self.stage(y, stages, h, row)))
        return stages

    def interpolate(
        self, y: Pieces, h: Array, weights: Sequence[Optional], stages: Sequence[Pieces]
    ) -> Pieces:
        """y + h sum_i w_i k_i with weights that differ from row to row."""
        values = []
        for leaf, base in enumerate(y):
            terms = [
                _across(h * w, base) * k[leaf] for w, k in zip(weights, stages, strict=True) if w is not None
            ]
            values.append(functools.reduce(jnp.add, terms, base))
        return values


class _Loop(NamedTuple):
    """What the attempts of the forward pass hand on."""

    state: State  # without y and k0
    y: Pieces
    k0: Pieces | None  # the first stage, if it is the last one of the step before
    saved: list[Array]  # (saves, rows, columns) per leaf
    pointer: Any  # rows of saved values done per trajectory, and the next one's time
    noted: (
        Array | None
    )  # time and size of attempts, (max_steps, 2, rows); the size is negative where it was rejected


class _Forward:
    """The forward pass."""

    def __init__(self, solve: Solve, record: Record | None, system: _System) -> None:
        self.solve, self.record, self.system, self.stepper = solve, record, system, system.stepper
        # With fixed steps and nothing to interpolate an FSAL stage is as well evaluated at the start of its step.
        self.carried = solve.method.fsal and (solve.adaptive or solve.saves is not None)
        self.never = self.stepper.direction * jnp.inf

    def run(self) -> list[Array]:
        """Values, counts and the record."""
        solve, stepper, system, record = self.solve, self.stepper, self.system, self.record
        loop = self._begin()
        bound = jnp.asarray(stepper.bound(), jnp.int32)
        kept: list[Array] = []
        if record is None:
            _, loop = self._attempts(jnp.int32(0), bound, loop)
        else:
            stride, loop, milestones = self._recorded(record, bound, loop)
            noted = [loop.noted] if loop.noted is not None else []
            kept = [jnp.broadcast_to(stride, (1, system.rows)), *noted, *milestones]
        counts = outcome(solve, stepper, loop.state._replace(y=[p.T for p in loop.y]))
        values = (
            system.rows_last(loop.y) if solve.saves is None else system.rows_last(loop.saved, (solve.saves,))
        )
        return [*values, jnp.stack([c.astype(jnp.int32) for c in counts]), *kept]

    def _begin(self) -> _Loop:
        solve, stepper, system = self.solve, self.stepper, self.system
        y = system.y0()
        state = stepper.begin([p.T for p in y])
        k0 = [k.T for k in state.k0] if self.carried else None
        noted = None
        if self.record is not None and solve.adaptive:
            noted = system.empty(solve.max_steps, 2, system.rows)
        saved: list[Array] = []
        pointer = None
        if solve.saves is not None:
            saved = [jnp.zeros((solve.saves, *p.shape), p.dtype) for p in y]
            pointer = (
                jnp.zeros(system.rows, jnp.int32),
                system.save_time(jnp.int32(0)) if solve.saves else self.never,
            )
            everyone, start = jnp.ones(system.rows, bool), stepper.t0

            def value(due: Array) -> Pieces:
                # The second term is zero and shows where the value goes when its time moves.
                return system.stage(y, [system.field(start, y)], due - start, [1.0])

            pointer, saved = self._save(pointer, saved, everyone, start, value)
        return _Loop(state._replace(y=[], k0=None), y, k0, saved, pointer, noted)

    def _recorded(self, record: Record, bound: Array, loop: _Loop) -> tuple[Array, _Loop, list[Array]]:
        """The loop over segments: the stride it ended with, what the last attempt left, the milestones."""
        system, stepper = self.system, self.stepper

        def go_on(carry: tuple[Any, ...]) -> Array:
            return (carry[0] < bound) & stepper.running(carry[2].state)

        def segment(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            i, stride, loop, milestones = carry
            milestones = system.save(milestones, schedule.slot(i, record), loop.y)
            stride, end = schedule.segment(i, stride, record)
            i, loop = self._attempts(i, jnp.minimum(end, bound), loop)
            return i, stride, loop, milestones

        start = (jnp.int32(0), jnp.int32(record.base), loop, system.buffers(record.count))
        _, stride, loop, milestones = lax.while_loop(go_on, segment, start)
        return stride, loop, milestones

    def _attempts(self, i: Array, end: Array, loop: _Loop) -> tuple[Array, _Loop]:
        def go_on(carry: tuple[Array, _Loop]) -> Array:
            return (carry[0] < end) & self.stepper.running(carry[1].state)

        def attempt(carry: tuple[Array, _Loop]) -> tuple[Array, _Loop]:
            i, loop = carry
            return i + 1, self._adaptive(loop, i) if self.solve.adaptive else self._fixed(loop, i)

        return lax.while_loop(go_on, attempt, (i, loop))

    def _adaptive(self, loop: _Loop, i: Array) -> _Loop:
        system, stepper = self.system, self.stepper
        state, y, t = loop.state, loop.y, loop.state.t
        h, clipped = stepper.next_size(state)
        k0 = loop.k0 if loop.k0 is not None else system.field(t, y)
        stages, new, square = system.attempt(t, h, y, k0)
        state, verdict = stepper.decide(state, h, clipped, square)
        accepted = verdict.accepted
        loop = self._saved(loop, accepted, t, h, verdict.end, stages)
        noted = loop.noted
        if noted is not None:
            noted = noted.at[i].set(jnp.stack([t, jnp.where(accepted, abs(h), -abs(h))]))
        if loop.k0 is None:
            (y,) = system.accept([y], [new], accepted)
            return loop._replace(state=state, y=y, noted=noted)
        y, k0 = system.accept([y, loop.k0], [new, stages[-1]], accepted)
        return loop._replace(state=state, y=y, k0=k0, noted=noted)

    def _fixed(self, loop: _Loop, i: Array) -> _Loop:
        system, stepper, y = self.system, self.stepper, loop.y
        t, h, live, last = stepper.fixed_size(i)
        made = live if stepper.steps is not None else None  # None: every row makes every step
        if not self.carried and self.solve.saves is None:
            return loop._replace(y=system.step(t, h, y, made))
        k0 = loop.k0 if loop.k0 is not None else system.field(t, y)
        stages, new = system.stages(t, h, y, k0, last=True)
        end = jnp.where(last, stepper.t1, stepper.time(i + 1))
        loop = self._saved(loop, live, t, h, end, stages)
        olds, news = ([y, k0], [new, stages[-1]]) if self.carried else ([y], [new])
        if made is not None and system.rows > 1:
            news = system.accept(olds, news, made)
        return loop._replace(y=news[0], k0=news[1] if self.carried else None)

    def _saved(self, loop: _Loop, rows: Array, t: Array, h: Array, end: Array, stages: list[Pieces]) -> _Loop:
        """Write the values at the save times inside a step, for the rows that made it."""
        if self.solve.saves is None:
            return loop
        system, y = self.system, loop.y
        size = jnp.where(rows, h, jnp.ones_like(h))

        def value(due: Array) -> Pieces:
            weights = dense_weights(self.solve.method, (due - t) / size)
            return system.interpolate(y, h, weights, system.extend(stages, t, h, y))

        pointer, saved = self._save(loop.pointer, loop.saved, rows, end, value)
        return loop._replace(pointer=pointer, saved=saved)

    def _save(
        self, pointer: Any, saved: list[Array], rows: Array, reached: Array, value: Callable[[Array], Pieces]
    ) -> tuple[Any, list[Array]]:
        """One saved row after another, all trajectories that need it together, up to the time they have reached."""
        direction, saves = self.stepper.direction, self.solve.saves

        def pending(due: Array) -> Array:
            return rows & (direction * due <= direction * reached)

        def row(carry: tuple[Any, list[Array]]) -> tuple[Any, list[Array]]:
            (done, due), saved = carry
            waiting = pending(due)
            current = jnp.min(jnp.where(waiting, done, saves))
            mask = waiting & (done == current)
            saved = [
                buffer.at[current].set(jnp.where(_across(mask, piece), piece, buffer[current])) if buffer.size else buffer
                for buffer, piece in zip(saved, value(due), strict=True)
            ]  # fmt: skip
            following = jnp.where(current + 1 < saves, self.system.save_time(current + 1), self.never)
            return (done + mask.astype(jnp.int32), jnp.where(mask, following, due)), saved

        return lax.while_loop(lambda carry: any_lane(pending(carry[0][1])), row, (pointer, saved))


def _replay_rows(solve: Solve, record: Record) -> list[int]:
    """States each nested level of replay keeps."""
    longest, rows = schedule.longest_segment(solve.max_steps, record), []
    for stride in schedule.replay_strides(solve.max_steps, record):
        rows.append(-(-longest // stride))
        longest = stride
    return rows


class _Cotangents(NamedTuple):
    """What is carried backwards through the steps."""

    y: Pieces
    operands: list[Array | None]
    t: Optional  # of the current time, of the next step size (of all steps if fixed) and of t1
    h: Optional
    t1: Optional
    pointer: Any  # rows of saved values not yet passed, and the latest of their times
    dates: Array | None  # of the save times, (saves, rows)


class _Step(NamedTuple):
    """One step to be pulled back."""

    i: Array
    t: Array
    h: Array  # 0 in rows that did not make it
    accepted: Array
    slope: Optional  # d(next h) / d(this h)
    clipped: Optional  # h was t1 - t


class _Scratch(NamedTuple):
    """Buffers of the replay: the states of one segment, and the milestones of every nested level."""

    states: list[Array]
    levels: list[list[Array]]


class _Backward:
    """The backward pass: replay a segment, then walk it back."""

    def __init__(
        self, solve: Solve, record: Record, wrt: Sequence[bool], system: _System, attempts: Array,
        recorded: Sequence[Array], cotangents: Pieces,
    ) -> None:  # fmt: skip
        self.solve, self.record, self.wrt, self.system, self.stepper = (
            solve,
            record,
            wrt,
            system,
            system.stepper,
        )
        self.attempts = attempts
        self.noted = recorded[0] if solve.adaptive else None
        self.milestones = list(recorded[1:] if solve.adaptive else recorded)
        lead = () if solve.saves is None else (solve.saves,)
        # (rows, columns), or (rows, saves, columns)
        self.given = [
            ct.reshape(system.rows, *lead, math.prod(s))
            for ct, s in zip(cotangents, system.shapes, strict=True)
        ]
        self.strides = schedule.replay_strides(solve.max_steps, record)
        self.times = any(wrt[: 2 + solve.has_dt0])
        self.dated = solve.saves is not None and wrt[solve.first_y - 1]
        self.wanted = list(wrt[solve.first_operand :])
        # A row that is not part of a step must not add 0 * NaN to the cotangents of what all rows share.
        self.shared = system.rows > 1 and any(
            w and not lane for w, lane in zip(self.wanted, system.lane, strict=True)
        )

    def run(self, stride: Array) -> list[Array]:
        """Cotangents of the inputs with `wrt`."""
        count, record, system = jnp.max(self.attempts), self.record, self.system
        if schedule.longest_segment(self.solve.max_steps, record) == 1:  # every state is a milestone
            return self._results(self._walk(jnp.int32(0), count, self._begin(), self.milestones))
        scratch = _Scratch(
            system.buffers(record.scratch), [system.buffers(n) for n in _replay_rows(self.solve, record)]
        )

        def segment(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            start, cotangents, scratch = carry
            y = system.restore(self.milestones, schedule.slot(start, record))
            cotangents, scratch = self._range(
                0, y, start, jnp.minimum(start + stride, count), cotangents, scratch
            )
            return start - stride, cotangents, scratch

        first = (count + stride - 1) // stride - 1
        _, cotangents, _ = lax.while_loop(
            lambda carry: carry[0] >= 0, segment, (first * stride, self._begin(), scratch)
        )
        return self._results(cotangents)

    def _begin(self) -> _Cotangents:
        solve, system = self.solve, self.system
        zero = jnp.zeros_like(self.stepper.t0)
        if solve.saves is None:
            y, pointer = self.given, None
        else:
            y = [jnp.zeros((system.rows, math.prod(s)), solve.field.dtype) for s in system.shapes]
            last = system.save_time(jnp.int32(solve.saves - 1)) if solve.saves else self._past()
            pointer = (jnp.full(zero.shape, solve.saves, jnp.int32), last)
        operands = [
            jnp.zeros_like(x) if w else None for x, w in zip(system.operands, self.wanted, strict=True)
        ]
        t, h, t1 = (zero, zero, zero) if self.times else (None, None, None)
        dates = jnp.zeros((solve.saves, system.rows), solve.field.dtype) if self.dated else None
        return _Cotangents(y, operands, t, h, t1, pointer, dates)

    def _past(self) -> Array:
        return self.stepper.direction * -jnp.inf

    # Which attempts were steps.

    def _accepted(self, i: Array) -> Array:
        """Whether attempt i, (), or each row's own attempt, (rows,), was a step."""
        live = i < self.attempts
        return live if self.noted is None else live & (self._noted(i)[1] > 0)

    def _noted(self, i: Array) -> tuple[Array, Array]:
        """Time and signed size of attempt i, or of each row's own."""
        assert self.noted is not None
        i = jnp.minimum(i, self.solve.max_steps - 1)
        if i.ndim == 0:
            return self.noted[i, 0], self.noted[i, 1]
        rows = jnp.arange(self.system.rows)
        return self.noted[i, 0, rows], self.noted[i, 1, rows]

    def _next(self, i: Array, stop: Array) -> Array:
        """The first attempt from i on that some row accepted, at most stop."""
        if self.noted is None:
            return i
        return lax.while_loop(lambda i: (i < stop) & ~any_lane(self._accepted(i)), lambda i: i + 1, i)

    def _taken(self, i: Array) -> _Step:
        stepper, accepted = self.stepper, self._accepted(i)
        if self.noted is None:
            t, h, _, last = stepper.fixed_size(i)
            return _Step(i, t, jnp.where(accepted, h, 0.0), accepted, None, last)
        t, size = self._noted(i)
        size = abs(size)
        h = jnp.where(accepted, stepper.direction * size, 0.0)
        if not self.times:
            return _Step(i, t, h, accepted, None, None)
        # What is left after a step that does not go to the end is more than a sliver.
        clipped = (abs(stepper.t1 - t) - size < 0.5 * stepper.sliver) & (i < self.attempts)
        # The next size follows from this one by a factor, unless it was limited. If it goes to the end, its cotangent
        # never comes here.
        following = abs(self._noted(i + 1)[1])
        slope = following / jnp.where(size > 0, size, 1.0)
        if self.solve.step.dtmax is not None:
            slope = jnp.where(following >= self.solve.step.dtmax, 0.0, slope)
        slope = jnp.where(i + 1 < self.attempts, slope, 1.0)
        return _Step(i, t, h, accepted, slope, clipped)

    # Replay.

    def _range(
        self, level: int, y: Pieces, start: Array, stop: Array, cotangents: _Cotangents, scratch: _Scratch
    ) -> tuple[_Cotangents, _Scratch]:
        """Pull back attempts start..stop, which begin at `y`."""
        if level < len(self.strides):
            return self._nested(level, y, start, stop, cotangents, scratch)
        scratch = self._note(y, start, stop, scratch)
        return self._walk(start, stop, cotangents, scratch.states), scratch

    def _advance(self, i: Array, y: Pieces) -> Pieces:
        taken = self._taken(i)
        return self.system.step(taken.t, taken.h, y, taken.accepted)

    def _note(self, y: Pieces, start: Array, stop: Array, scratch: _Scratch) -> _Scratch:
        """Write the states that the segment's steps begin with. Where the last one leads is known already."""
        system, most = self.system, self.record.scratch - 1

        def write(states: list[Array], i: Array, y: Pieces) -> list[Array]:
            return system.save(states, jnp.minimum(i - start, most), y)

        def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            i, following, y, states = carry
            states = write(states, i, y)
            return following, self._next(following + 1, stop), self._advance(i, y), states

        first = self._next(start, stop)
        i, _, y, states = lax.while_loop(
            lambda carry: carry[1] < stop, step, (first, self._next(first + 1, stop), y, scratch.states)
        )
        return scratch._replace(states=write(states, i, y))

    def _nested(
        self, level: int, y: Pieces, start: Array, stop: Array, cotangents: _Cotangents, scratch: _Scratch
    ) -> tuple[_Cotangents, _Scratch]:
        """Cut a range that is longer than the scratch by further milestones."""
        system, stride = self.system, self.strides[level]
        count = (stop - start + stride - 1) // stride

        def forwards(end: Array, i: Array, y: Pieces) -> Pieces:
            def step(carry: tuple[Array, Pieces]) -> tuple[Array, Pieces]:
                i, y = carry
                return self._next(i + 1, end), self._advance(i, y)

            return lax.while_loop(lambda carry: carry[0] < end, step, (self._next(i, end), y))[1]

        def outward(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            index, y, buffers = carry
            buffers = system.save(buffers, index, y)
            begin = start + index * stride
            # Nothing needs the end of the last one.
            end = jnp.where(index + 1 < count, begin + stride, begin)
            return index + 1, forwards(end, begin, y), buffers

        _, _, mine = lax.while_loop(
            lambda carry: carry[0] < count, outward, (jnp.int32(0), y, scratch.levels[level])
        )

        def homeward(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            index, cotangents, inner = carry
            begin = start + (index - 1) * stride
            y = system.restore(mine, index - 1)
            end = jnp.minimum(begin + stride, stop)
            cotangents, inner = self._range(level + 1, y, begin, end, cotangents, inner)
            return index - 1, cotangents, inner

        inner = scratch._replace(levels=[*scratch.levels[:level], [], *scratch.levels[level + 1 :]])
        _, cotangents, inner = lax.while_loop(
            lambda carry: carry[0] > 0, homeward, (count, cotangents, inner)
        )
        return cotangents, inner._replace(levels=[*inner.levels[:level], mine, *inner.levels[level + 1 :]])

    # Walk back.

    def _walk(self, start: Array, stop: Array, cotangents: _Cotangents, states: list[Array]) -> _Cotangents:
        """Pull back attempts start..stop, whose states are `states`.

        Where sizes are chosen row by row, so is what is rejected: each row goes back through its own steps, and as many are
        pulled back as the row with the most steps has, not as many as there are attempts that some row accepted.
        """
        own = self.noted is not None and self.system.rows > 1

        def left(i: Array) -> Array:
            return i > start

        def skip(carry: tuple[Array, Any]) -> tuple[Array, Any]:
            """Behind the latest step before i, through the attempts since."""

            def rejected(i: Array) -> Array:
                accepted = self._accepted(i - 1)
                return left(i) & ~(accepted if own else any_lane(accepted))

            def through(carry: tuple[Array, Any]) -> tuple[Array, Any]:
                i, times = carry
                here = rejected(i)
                if self.times:
                    zero = jnp.zeros_like(self.stepper.t0)
                    passed = self._through_size(self._taken(i - 1), times, zero, zero)
                    times = _chosen(here, passed, times)
                return i - here.astype(jnp.int32), times

            if self.noted is None:
                return carry
            return lax.while_loop(lambda carry: jnp.any(rejected(carry[0])), through, carry)

        def times_of(cotangents: _Cotangents) -> Any:
            return (cotangents.t, cotangents.h, cotangents.t1)

        def back(carry: tuple[Array, _Cotangents]) -> tuple[Array, _Cotangents]:
            i, cotangents = carry
            before, here = jnp.maximum(i - 1, start), left(i)
            taken = self._taken(before)
            taken = taken._replace(h=jnp.where(here, taken.h, 0.0), accepted=taken.accepted & here)
            y = self.system.restore(states, before - start)
            times = times_of(cotangents)
            cotangents = self._step(taken, y, cotangents)
            if self.times:
                times = _chosen(here, times_of(cotangents), times)
            i, (t, h, t1) = skip((before, times))
            return i, cotangents._replace(t=t, h=h, t1=t1)

        last = jnp.full(self.system.rows, stop) if own else stop
        i, (t, h, t1) = skip((last, times_of(cotangents)))
        return lax.while_loop(
            lambda carry: jnp.any(left(carry[0])), back, (i, cotangents._replace(t=t, h=h, t1=t1))
        )[1]

    def _alive(self, taken: _Step, y: Pieces) -> tuple[Array, Array, Pieces, list[Array]]:
        """(t, h, y, operands) with the rows that are not part of the step in the place of one that is: their cotangents are
        zero, and what they are multiplied by is then finite if it is for the others."""
        operands = self.system.operands
        if not self.shared:
            return taken.t, taken.h, y, operands
        accepted = taken.accepted
        one = jnp.argmax(accepted)

        def alive(x: Array) -> Array:
            return jnp.where(_across(accepted, x), x, x[one])

        operands = [alive(x) if lane else x for x, lane in zip(operands, self.system.lane, strict=True)]
        return alive(taken.t), alive(taken.h), [alive(p) for p in y], operands

    def _step(self, taken: _Step, y: Pieces, cotangents: _Cotangents) -> _Cotangents:
        """Through one step, backwards."""
        solve, system, tableau = self.solve, self.system, self.solve.method
        dense, dates = solve.saves is not None, self.times or self.dated
        t, h, y, operands = self._alive(taken, y)
        rows: list[tuple[float, ...]] = [(), *tableau.a, *(tableau.dense_a if dense else ())]
        abscissae = [*tableau.c, *(tableau.dense_c if dense else ())]
        weights = [*tableau.b, *[0.0] * len(tableau.dense_c)]
        if tableau.fsal and not dense:
            rows.pop()
        stages: list[Pieces] = []
        pulls = []
        for row, c in zip(rows, abscissae, strict=False):
            argument = system.stage(y, stages, h, row) if row else y
            slope, pull = self._differentiable(t + c * h if c else t, argument, operands, dates)
            stages.append(slope)
            pulls.append(pull)
        pointer, given, extra, save = cotangents.pointer, None, None, None
        t_ct: Any = jnp.zeros_like(t) if dates else None
        h_ct: Any = t_ct
        if dense:
            pointer, given, extra, t_ct, h_ct, save = self._saved(taken, stages, cotangents, t_ct, h_ct)
        ones = jnp.ones_like(t)
        mus: list[Pieces] = []  # of the stages behind, the latest first
        totals = list(cotangents.operands)
        for j in reversed(range(len(stages))):
            behind = [row[j] for row in reversed(rows[j + 1 : len(stages)])]
            kappa = system.stage(None, [cotangents.y, *mus], taken.h, [weights[j], *behind])
            if extra is not None:
                kappa = [a + b for a, b in zip(kappa, extra[j], strict=True)]
            mu, operand_cts, stage_t_ct = pulls[j](kappa)
            mus.append(mu)
            if dates:
                along = _inner(stages[j], kappa) / jnp.where(taken.accepted, taken.h, 1.0)
                t_ct, h_ct = t_ct + stage_t_ct, h_ct + abscissae[j] * stage_t_ct + along
            totals = self._accumulate(totals, operand_cts, taken.accepted)
        terms = mus if given is None else [*mus, given]
        new = system.stage(cotangents.y, terms, ones, [1.0] * len(terms), in_place=system.rows == 1)
        if system.rows > 1:
            (new,) = system.accept([cotangents.y], [new], taken.accepted)
        cotangents = cotangents._replace(y=new, operands=totals, pointer=pointer)
        if self.dated:
            cotangents = cotangents._replace(dates=save)
        if not self.times:
            return cotangents
        t_ct, h_ct = (jnp.where(taken.accepted, ct, 0.0) for ct in (t_ct, h_ct))
        times = self._through_size(taken, (cotangents.t, cotangents.h, cotangents.t1), t_ct, h_ct)
        return cotangents._replace(t=times[0], h=times[1], t1=times[2])

    def _differentiable(
        self, t: Array, y: Pieces, operands: list[Array], dates: bool
    ) -> tuple[Pieces, Callable[[Pieces], tuple[Pieces, list[Array], Any]]]:
        """The field, and its transpose: from a cotangent of the slope to those of y, the wanted operands and t."""
        wanted = [x for x, w in zip(operands, self.wanted, strict=True) if w]

        def field(y: Pieces, wanted: list[Array], t: Array) -> Pieces:
            rest: Iterator[Array] = iter(wanted)
            mine = [next(rest) if w else x for x, w in zip(operands, self.wanted, strict=True)]
            return self.system.field(t, y, mine)

        if dates:
            slope, pull = jax.vjp(field, y, wanted, t)
            return slope, lambda ct: pull(ct)
        slope, pull = jax.vjp(lambda y, wanted: field(y, wanted, t), y, wanted)
        return slope, lambda ct: (*pull(ct), None)

    def _accumulate(self, totals: list[Any], terms: list[Array], accepted: Array) -> list[Any]:
        rest = iter(terms)
        added = []
        for total, lane in zip(totals, self.system.lane, strict=True):
            term = None if total is None else next(rest)
            if term is not None and lane and self.system.rows > 1:
                term = jnp.where(_across(accepted, term), term, 0.0)
            added.append(None if total is None else total + term)
        return added

    def _saved(
        self, taken: _Step, stages: list[Pieces], cotangents: _Cotangents, t_ct: Any, h_ct: Any
    ) -> tuple[Any, ...]:
        """Cotangents of the values saved in this step, spread over its start, stages, time and size.

        A value is Y = y + h sum_s b_s(theta) k_s with theta = (date - t) / h. The part of dY/dh at constant theta is in the
        stages' cotangents.
        """
        direction, tableau, (t, h, accepted) = self.stepper.direction, self.solve.method, taken[1:4]
        dates = t_ct is not None

        def pending(pointer: tuple[Array, Array]) -> Array:
            return accepted & (pointer[0] > 0) & (direction * pointer[1] > direction * t)

        def row(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            pointer, given, extra, t_ct, h_ct, save = carry
            current, mask, following = self._pass_row(pointer, pending(pointer))
            theta = jnp.where(mask, (pointer[1] - t) / jnp.where(mask, h, 1.0), 0.0)
            ct = self._given_row(current, mask)
            given = [a + b for a, b in zip(given, ct, strict=True)]
            extra = [
                stage if w is None else [a + _across(h * w, a) * b for a, b in zip(stage, ct, strict=True)]
                for stage, w in zip(extra, dense_weights(tableau, theta), strict=True)
            ]
            if dates:
                speed = self._speed(theta, stages, ct)
                t_ct, h_ct = t_ct - speed, h_ct - theta * speed
                save = self._date(save, current, mask, speed)
            return following, given, extra, t_ct, h_ct, save

        zeros = [jnp.zeros_like(p) for p in stages[0]]
        start = (cotangents.pointer, zeros, [zeros] * len(stages), t_ct, h_ct, cotangents.dates)
        return lax.while_loop(lambda carry: any_lane(pending(carry[0])), row, start)

    def _speed(self, theta: Array, stages: list[Pieces], ct: Pieces) -> Array:
        """Inner product of dY/dtheta / h with a cotangent."""
        total = jnp.zeros_like(theta)
        for w, k in zip(dense_slopes(self.solve.method, theta), stages, strict=True):
            if w is not None:
                total = total + w * _inner(k, ct)
        return total

    def _given_row(self, row: Array, mask: Array) -> Pieces:
        return [
            jnp.where(mask[:, None], lax.dynamic_index_in_dim(ct, row, 1, keepdims=False), 0.0)
            for ct in self.given
        ]

    def _pass_row(
        self, pointer: tuple[Array, Array], waiting: Array
    ) -> tuple[Array, Array, tuple[Array, Array]]:
        """The latest saved row that any trajectory waits for, which ones do, and the pointer behind it."""
        done, due = pointer
        current = jnp.max(jnp.where(waiting, done, 0)) - 1
        mask = waiting & (done == current + 1)
        before = jnp.where(current > 0, self.system.save_time(current - 1), self._past())
        return current, mask, (done - mask.astype(jnp.int32), jnp.where(mask, before, due))

    @staticmethod
    def _date(dates: Any, row: Array, mask: Array, value: Array) -> Any:
        return None if dates is None else dates.at[row].set(jnp.where(mask, value, dates[row]))

    def _through_size(
        self, taken: _Step, times: tuple[Any, ...], t_ct: Array, h_ct: Array
    ) -> tuple[Array, ...]:
        """Backwards through how a step's start and size came about, for gradients by t0, t1 and dt0.

        Adaptive: next t = t + h, next h = factor * h, and h = t1 - t where the step was cut at the end. Fixed(n):
        t = t0 + i h; the cotangents of h are collected. Fixed(dt): t = t0 + i dt, the last h = t1 - t.
        """
        t, h, t1 = times
        if self.solve.adaptive:
            total = taken.slope * h + jnp.where(taken.accepted, t, 0.0) + h_ct
            cut = jnp.where(taken.clipped, total, 0.0)
            return t + t_ct - cut, jnp.where(taken.clipped, 0.0, total), t1 + cut
        if self.stepper.steps is None:
            return t + t_ct, h + taken.i.astype(t_ct.dtype) * t_ct + h_ct, t1
        cut = jnp.where(taken.clipped, h_ct, 0.0)
        return t + t_ct - cut, h, t1 + cut

    # Results.

    def _results(self, cotangents: _Cotangents) -> list[Array]:
        solve, stepper, system = self.solve, self.stepper, self.system
        if solve.saves is not None:
            cotangents = self._initial_rows(cotangents)
        results: dict[int, Any] = {}
        if self.times:
            t, h, t1 = cotangents.t, cotangents.h, cotangents.t1
            if not solve.adaptive and stepper.steps is None:
                share = h / solve.step.steps
                results[0], results[1] = t - share, share
            else:
                results[0], results[1] = t, t1
            if solve.has_dt0:
                dt0: Any = stepper.dt0
                free = abs(dt0) <= limit(solve.step, abs(dt0))
                results[2] = jnp.where(free, h * stepper.direction * jnp.sign(dt0), 0.0)
        if self.dated:
            results[solve.first_y - 1] = cotangents.dates
        results.update(enumerate(system.rows_last(cotangents.y), solve.first_y))
        for i, (total, lane) in enumerate(
            zip(cotangents.operands, system.lane, strict=True), solve.first_operand
        ):
            results[i] = jnp.moveaxis(total, 0, -1) if total is not None and lane else total
        return [results[i] for i, wanted in enumerate(self.wrt) if wanted]

    def _initial_rows(self, cotangents: _Cotangents) -> _Cotangents:
        """Through the rows saved at t0."""
        k0 = None
        if self.times or self.dated:
            k0 = self.system.field(self.stepper.t0, self.system.y0())

        def row(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            pointer, y, t, dates = carry
            current, mask, following = self._pass_row(pointer, pointer[0] > 0)
            ct = self._given_row(current, mask)
            if k0 is not None:
                speed = _inner(k0, ct)
                dates = self._date(dates, current, mask, speed)
                t = t if t is None else t - jnp.where(mask, speed, 0.0)
            return following, [a + b for a, b in zip(y, ct, strict=True)], t, dates

        start = (cotangents.pointer, cotangents.y, cotangents.t, cotangents.dates)
        pointer, y, t, dates = lax.while_loop(lambda carry: any_lane(carry[0][0] > 0), row, start)
        return cotangents._replace(pointer=pointer, y=y, t=t, dates=dates)
