"""The whole-solve kernel bodies: a block of trajectories, forward and backward, over Refs and lane vectors.

A body is a function of Refs: one per operand, one per result, one per scratch buffer, each with the block's lanes as its
last axis. It knows nothing about how it is run: `kernels/xla.py` discharges the Refs into XLA loops, other runners may take
the traced jaxpr to machine code. Everything uniform in a block (attempt numbers, slots) is a scalar; everything else is a
vector over lanes, and lanes never meet except in the loops' "is anyone still running" and, in the backward body, in the
sums for shared operands.

The forward body saves a milestone at the start of every segment. The backward body goes through the segments from the last
to the first: restore the milestone, run the segment's attempts again while writing (t, h or 0, y) to scratch, then walk the
scratch backwards, pulling the cotangent through one step at a time.

Why the replay is the forward pass again. Two compilations may round differently, so nothing that is decided by a comparison
is recomputed: accept/reject decisions are stored, one bit per attempt and lane. Step sizes are recomputed: rounding changes
the embedded error, relative to the tolerance, by eps/tol, and h by as much. The replayed segment misses the next milestone's
time by the sum of these, so its last accepted step is stretched to meet it. With tolerances near eps (float32 users have
them) the embedded error is rounding noise and the miss may be many steps long: then the segment is replayed once more, each
step scaled by what was missed. Its steps are still as long as the controller's to within its noise, and the gradient is the
exact one of a solve that the tolerance cannot tell from the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from pykernels import schedule
from pykernels.interpolation import dense_slopes, dense_weights, weighted_sum
from pykernels.kernels import rolled
from pykernels.kernels.buffers import Buffer, Rows, load, merge, store
from pykernels.kernels.stepper import (
    Method,
    Optional,
    Pieces,
    Pulled,
    Solve,
    State,
    Stepper,
    Taken,
    any_lane,
    in_step,
    inner,
    outcome,
    plus,
    together,
)
from pykernels.schedule import Record
from pykernels.stepsize import Adaptive, Fixed, limit

if TYPE_CHECKING:
    from jaxtyping import Array


@dataclass(frozen=True)
class Kernel:
    """A body with everything that is static about it; hashable. Forward, or backward with respect to the inputs in `wrt`.

    Operands, in order: the solve's inputs; backward then also attempts (0 for lanes whose cotangents are all zero or that
    failed), decisions, milestone rows, and the cotangents of the values; last the `tables`, which a runner brings itself.
    Then come results and scratch buffers.
    """

    solve: Solve
    record: Record | None
    wrt: tuple[bool, ...] | None = None

    @property
    def body(self) -> Callable[..., None]:
        """The function of Refs: operands, results, scratch."""
        if self.wrt is None:
            return forward(self.solve, self.record)
        assert self.record is not None
        return backward(self.solve, self.record, self.wrt)

    @property
    def operands(self) -> list[Buffer]:
        """What the kernel reads; `lanes` False: shared by all lanes."""
        solve = self.solve
        dtypes = [solve.field.dtype] * solve.first_operand + [s.dtype for s in solve.field.operands]
        inputs = [
            Buffer(shape, np.dtype(dtype), lane)
            for shape, dtype, lane in zip(input_shapes(solve), dtypes, solve.lane, strict=True)
        ]
        tables = [Buffer(table.shape, table.dtype, lanes=False) for table in self.tables]
        if self.wrt is None:
            return [*inputs, *tables]
        values = len(solve.field.y_shapes)
        buffers = forward_buffers(solve, self.record)
        return [*inputs, Buffer((), np.dtype(np.int32)), *buffers[values + 1 :], *buffers[:values], *tables]

    @property
    def tables(self) -> list[np.ndarray]:
        """Constants that the body reads as its last operands."""
        return rolled.tables(self.solve) if self.solve.rolled else []

    @property
    def results(self) -> list[Buffer]:
        """What the kernel writes; `lanes` False: one partial sum per block, to be added."""
        if self.wrt is None:
            return forward_buffers(self.solve, self.record)
        assert self.record is not None
        return backward_buffers(self.solve, self.record, self.wrt)[0]

    @property
    def scratch(self) -> list[Buffer]:
        """What a block needs while it runs."""
        if self.wrt is None:
            return _step_scratch(self.solve, None)
        assert self.record is not None
        return backward_buffers(self.solve, self.record, self.wrt)[1]

    @property
    def silent(self) -> int | None:
        """The operand that must be zero in lanes that only fill up a block: nothing is pulled back through them."""
        return None if self.wrt is None else len(self.solve.lane)


def _step_scratch(solve: Solve, wrt: Sequence[bool] | None) -> list[Buffer]:
    """What single steps need, and with `wrt` their pullbacks."""
    if not solve.rolled:
        return []
    return rolled.step_buffers(solve) + ([] if wrt is None else rolled.pullback_buffers(solve, wrt))


def _method(solve: Solve, wrt: Sequence[bool] | None, refs: Sequence[Any]) -> Method:
    """The method of a body, for derivatives if there is `wrt`. `refs`: the tables, then `_step_scratch`."""
    differentiated = wrt is not None
    if solve.rolled:
        return rolled.Rolled(solve, refs, differentiated=differentiated, spread=wrt)
    return Method(solve, differentiated=differentiated, spread=wrt)


class _Reader:
    """Values of a kernel's inputs from their Refs."""

    def __init__(self, solve: Solve, method: Method, refs: Sequence[Any]) -> None:
        self.solve, self.method, self.refs = solve, method, refs
        self.lanes = refs[solve.first_y].shape[-1]

    def lane_vector(self, index: int) -> Array:
        value = self.refs[index][...]
        return value if self.solve.lane[index] else jnp.broadcast_to(value, (self.lanes,))

    def pieces(self, index: int, shape: tuple[int, ...], *, spread: bool = False) -> Pieces:
        """Pieces of an input; `spread`: a shared one gets a lane axis, so that its cotangents stay per lane."""
        ref = self.refs[index]
        values = [load(ref, at) for at in self.method.lift.pieces(shape)]
        if spread and not self.solve.lane[index]:
            values = [jnp.broadcast_to(v[..., None], (*v.shape, self.lanes)) for v in values]
        return values

    def state(self) -> Pieces:
        """Pieces of y0."""
        shapes = self.solve.field.y_shapes
        return [p for i, shape in enumerate(shapes, self.solve.first_y) for p in self.pieces(i, shape)]

    def stepper(self, operands: list[Pieces]) -> Stepper:
        dt0 = self.lane_vector(2) if self.solve.has_dt0 else None
        return Stepper(self.solve, self.method, self.lane_vector(0), self.lane_vector(1), dt0, operands)

    def save_time(self, row: Array) -> Array:
        """Save time number `row` (clamped): a scalar if shared, a lane vector otherwise."""
        index = self.solve.first_y - 1
        row = jnp.clip(row, 0, self.solve.saves - 1)
        return self.refs[index][row, :] if self.solve.lane[index] else self.refs[index][row]


class _Milestones:
    """What restarts a segment, in rows: (t, low, h, controller memory) for adaptive steps, and the state."""

    def __init__(self, solve: Solve, method: Method, refs: Sequence[Any]) -> None:
        self.solve = solve
        self.rows = Rows(solve, method, refs, self.scalars(solve))

    @staticmethod
    def scalars(solve: Solve) -> int:
        return 3 + solve.step.memory if isinstance(solve.step, Adaptive) else 0

    @classmethod
    def buffers(cls, solve: Solve, rows: int) -> list[Buffer]:
        return Rows.buffers(solve, rows, cls.scalars(solve))

    def save(self, row: Array, state: State) -> None:
        self.rows.write(
            row, (state.t, state.low, state.h, *state.memory) if self.solve.adaptive else (), state.y
        )

    def restore(self, row: Array, stepper: Stepper, start: Array) -> State:
        """The state at a milestone; a carried first stage is evaluated again, cheaper than storing it."""
        scalars, y = self.rows.read(row)
        t, low, h = scalars[:3] if scalars else (None, None, None)
        at = t if t is not None else stepper.time(start)
        k0 = stepper.method.field(at, y, stepper.operands) if self.solve.carries_stage else None
        return State(t, low, h, tuple(scalars[3:]), y, k0, None, None, None)

    def arrival(self, row: Array, stepper: Stepper, live: Array) -> tuple[Array, Array]:
        """Where the segment before a milestone ends: its time for the lanes that were live then, t1 for the others."""
        t1 = stepper.t1
        if not self.solve.adaptive:
            return t1, jnp.zeros_like(t1)
        t, low = (self.rows.scalar_ref[row, i, :] for i in (0, 1))
        return jnp.where(live, t, t1), jnp.where(live, low, 0.0)


def forward_buffers(solve: Solve, record: Record | None) -> list[Buffer]:
    """Results of the forward body: the values' leaves; status, attempts and accepted attempts as rows of one buffer; with
    `record`, decisions (row 0 the stride, then words of decisions if adaptive) and milestone rows."""
    dtype, rows = solve.field.dtype, () if solve.saves is None else (solve.saves,)
    buffers = [Buffer((*rows, *shape), dtype) for shape in solve.field.y_shapes]
    buffers.append(Buffer((3,), np.dtype(np.int32)))
    if record is not None:
        words = record.words(solve.max_steps) if solve.adaptive else 0
        buffers.append(Buffer((1 + words,), np.dtype(np.int32)))
        buffers += _Milestones.buffers(solve, record.count)
    return buffers


def forward(solve: Solve, record: Record | None) -> Callable[..., None]:
    """The forward body: integrates a block from t0 to t1, saving values, counts and (with `record`) milestones."""
    n_inputs, n_y, n_tables = len(solve.lane), len(solve.field.y_shapes), len(Kernel(solve, record).tables)
    n_recorded = len(forward_buffers(solve, record)) - n_y - 1

    def body(*refs: Any) -> None:
        split = _splitter(refs)
        inputs, tables, value_refs, (counts_ref,) = split(n_inputs), split(n_tables), split(n_y), split(1)
        record_refs, step_refs = split(n_recorded), split(len(_step_scratch(solve, None)))
        method = _method(solve, None, [*tables, *step_refs])
        reader = _Reader(solve, method, inputs)
        operands = [
            reader.pieces(solve.first_operand + i, struct.shape)
            for i, struct in enumerate(solve.field.operands)
        ]
        y0 = [p for i, s in enumerate(solve.field.y_shapes) for p in reader.pieces(solve.first_y + i, s)]
        stepper = reader.stepper(operands)
        saver = None if solve.saves is None else _Saver(reader, stepper, value_refs)
        state = stepper.begin(y0)
        pointer = None if saver is None else saver.begin(y0)
        bound = jnp.asarray(stepper.bound(), jnp.int32)
        zero = jnp.int32(0)

        def attempts(start: Array, end: Array, state: State, pointer: Any, word: Any) -> tuple[Any, ...]:
            def go_on(carry: tuple[Any, ...]) -> Array:
                return (carry[0] < end) & stepper.running(carry[1])

            def attempt(carry: tuple[Any, ...]) -> tuple[Any, ...]:
                i, state, pointer, word = carry
                state, taken = stepper.attempt(state, i)
                if saver is not None:
                    pointer = saver.save(pointer, taken)
                if word is not None:
                    word = word | lax.shift_left(
                        taken.accepted.astype(jnp.int32), jnp.broadcast_to(i - start, word.shape)
                    )
                return i + 1, state, pointer, word

            return lax.while_loop(go_on, attempt, (start, state, pointer, word))

        if record is None:
            _, state, _, _ = attempts(zero, bound, state, pointer, None)
        else:
            state = _recorded(solve, method, record, record_refs, stepper, state, pointer, bound, attempts)
        _store_results(solve, method, stepper, state, value_refs, counts_ref)

    return body


def _recorded(
    solve: Solve, method: Method, record: Record, refs: Sequence[Any], stepper: Stepper, state: State, pointer: Any,
    bound: Any, attempts: Callable[..., tuple[Any, ...]],
) -> State:  # fmt: skip
    """The forward loop with milestones: segments, in them bursts that share a word of decisions, in them attempts."""
    decisions_ref, rows = refs[0], _Milestones(solve, method, refs[1:])

    def go_on(carry: tuple[Any, ...]) -> Array:
        return (carry[0] < bound) & stepper.running(carry[2])

    def segment(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        i, stride, state, pointer = carry
        rows.save(schedule.slot(i, record), state)
        stride, end = schedule.segment(i, stride, record)
        end = jnp.minimum(end, bound)
        if not solve.adaptive:
            i, state, pointer, _ = attempts(i, end, state, pointer, None)
            return i, stride, state, pointer

        def burst(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            start, state, pointer = carry
            stop = jnp.minimum(start + record.burst, end)
            empty = jnp.zeros(stepper.t0.shape, jnp.int32)
            i, state, pointer, word = attempts(start, stop, state, pointer, empty)
            decisions_ref[1 + start // record.burst, :] = word
            return i, state, pointer

        i, state, pointer = lax.while_loop(
            lambda carry: (carry[0] < end) & stepper.running(carry[1]), burst, (i, state, pointer)
        )
        return i, stride, state, pointer

    _, stride, state, _ = lax.while_loop(
        go_on, segment, (jnp.int32(0), jnp.int32(record.base), state, pointer)
    )
    decisions_ref[0, :] = jnp.broadcast_to(stride, stepper.t0.shape)
    return state


def _store_results(
    solve: Solve, method: Method, stepper: Stepper, state: State, value_refs: Sequence[Any], counts_ref: Any
) -> None:
    if solve.saves is None:
        _store_leaves(method, value_refs, solve.field.y_shapes, state.y)
    for row, value in enumerate(outcome(solve, stepper, state)):
        counts_ref[row, :] = value.astype(jnp.int32)


def _store_leaves(
    method: Method, refs: Sequence[Any], shapes: Sequence[tuple[int, ...]], pieces: Pieces
) -> None:
    position = 0
    for ref, shape in zip(refs, shapes, strict=True):
        for at in method.lift.pieces(shape):
            store(ref, at, jnp.broadcast_to(pieces[position], ref.shape[len(at) :]))
            position += 1


class _Saver:
    """Writes values at the save times. The pointer is (rows done per lane, each lane's next save time).

    Rows are visited one at a time, all lanes that need the row together: a masked update of a uniform row, no scatter.
    Lanes in step cost one visit per row; the worst case is one visit per lane and row.
    """

    def __init__(self, reader: _Reader, stepper: Stepper, refs: Sequence[Any]) -> None:
        self.reader, self.stepper, self.refs = reader, stepper, refs
        self.never = stepper.direction * jnp.inf

    def begin(self, y0: Pieces) -> tuple[Array, Array]:
        """Rows at or before t0 hold the initial state."""
        start = self.stepper.t0
        first = jnp.broadcast_to(self.reader.save_time(jnp.int32(0)), start.shape)
        pointer = (jnp.zeros(start.shape, jnp.int32), first if self.reader.solve.saves else self.never)

        def value(due: Array) -> Pieces:
            # The second term is zero and carries the derivative with respect to the save time and t0.
            return plus(y0, due - start, self.stepper.method.field(start, y0, self.stepper.operands))

        return self._rows(pointer, jnp.ones(start.shape, bool), start, value)

    def save(self, pointer: tuple[Array, Array], taken: Taken) -> tuple[Array, Array]:
        method = self.stepper.method

        def value(due: Array) -> Pieces:
            theta = (due - taken.t) / taken.h
            stages = method.extend(taken.stages, taken.t, taken.h, taken.y, self.stepper.operands)
            return plus(taken.y, taken.h, weighted_sum(dense_weights(method.tableau, theta), stages))

        return self._rows(pointer, taken.accepted, taken.end, value)

    def _rows(
        self, pointer: tuple[Array, Array], lanes: Array, reached: Array, value: Callable[[Array], Pieces]
    ) -> tuple[Array, Array]:
        solve, direction = self.reader.solve, self.stepper.direction

        def pending(due: Array) -> Array:
            return lanes & (direction * due <= direction * reached)

        def row(pointer: tuple[Array, Array]) -> tuple[Array, Array]:
            done, due = pointer
            waiting = pending(due)
            current = jnp.min(jnp.where(waiting, done, solve.saves))
            mask = waiting & (done == current)
            self._write(current, mask, value(due))
            following = jnp.where(current + 1 < solve.saves, self.reader.save_time(current + 1), self.never)
            return done + mask.astype(jnp.int32), jnp.where(mask, following, due)

        return lax.while_loop(lambda pointer: any_lane(pending(pointer[1])), row, pointer)

    def _write(self, row: Array, mask: Array, pieces: Pieces) -> None:
        method, position = self.stepper.method, 0
        for ref, shape in zip(self.refs, self.reader.solve.field.y_shapes, strict=True):
            for at in method.lift.pieces(shape):
                merge(ref, (row, *at), mask, pieces[position])
                position += 1


def backward_buffers(solve: Solve, record: Record, wrt: Sequence[bool]) -> tuple[list[Buffer], list[Buffer]]:
    """Results and scratch of the backward body. Results: one cotangent per input with `wrt`, in input order; those of shared
    operands are partial sums, one per block, those of t0, t1, dt0 and save times always one per lane."""
    shapes = input_shapes(solve)
    dtypes = [solve.field.dtype] * solve.first_operand + [struct.dtype for struct in solve.field.operands]
    results = [
        Buffer(shape, dtype, lanes=lane or i < solve.first_operand)
        for i, (shape, dtype, lane) in enumerate(zip(shapes, dtypes, solve.lane, strict=True))
        if wrt[i]
    ]
    scratch = _step_scratch(solve, wrt) + Rows.buffers(solve, record.scratch, _noted_scalars(solve, wrt))
    for rows in _replay_rows(solve, record):
        scratch += _Milestones.buffers(solve, rows)
    return results, scratch


def _noted_scalars(solve: Solve, wrt: Sequence[bool]) -> int:
    """Scalars noted per replayed attempt: t and h, and how the step size came about if time is differentiated."""
    return (4 if any(wrt[: 2 + solve.has_dt0]) else 2) if solve.adaptive else 0


def input_shapes(solve: Solve) -> list[tuple[int, ...]]:
    """Shapes of a solve's inputs without lanes."""
    saves = [] if solve.saves is None else [(solve.saves,)]
    operands = [tuple(struct.shape) for struct in solve.field.operands]
    return [()] * (2 + solve.has_dt0) + saves + list(solve.field.y_shapes) + operands


def _replay_rows(solve: Solve, record: Record) -> list[int]:
    """Milestones each nested level of replay keeps."""
    longest, rows = schedule.longest_segment(solve.max_steps, record), []
    for stride in schedule.replay_strides(solve.max_steps, record):
        rows.append(-(-longest // stride))
        longest = stride
    return rows


class _Cotangents(NamedTuple):
    """What is carried backwards through the attempts."""

    y: Pieces
    operands: list[Pieces]  # of those wanted, unless the method adds them up
    t: Optional  # of the current time, of the next step size (of all steps if fixed) and of t1
    h: Optional
    t1: Optional
    pointer: Any  # rows of saved values not yet passed, and the latest of their times


def backward(solve: Solve, record: Record, wrt: Sequence[bool]) -> Callable[..., None]:
    """The backward body: from cotangents of the forward body's values to those of its inputs.

    Refs: the inputs; attempts (0 for lanes whose cotangents are all zero or that failed), decisions, milestone rows; the
    values' cotangents; then `backward_buffers`.
    """
    n_inputs, n_y = len(solve.lane), len(solve.field.y_shapes)
    n_milestones, n_tables = len(_Milestones.buffers(solve, record.count)), len(Kernel(solve, record).tables)

    def body(*refs: Any) -> None:
        results, scratch = backward_buffers(solve, record, wrt)
        step_scratch = len(_step_scratch(solve, wrt))
        split = _splitter(refs)
        inputs, (attempts_ref, decisions_ref) = split(n_inputs), split(2)
        milestone_refs, cotangent_refs, tables = split(n_milestones), split(n_y), split(n_tables)
        result_refs, step_refs = split(len(results)), split(step_scratch)
        scratch_refs = split(len(scratch) - step_scratch)
        method = _method(solve, wrt, [*tables, *step_refs])
        reader = _Reader(solve, method, inputs)
        pull = _Pullback(solve, record, wrt, method, reader, attempts_ref[...], decisions_ref, scratch_refs)
        rows = _Milestones(solve, method, milestone_refs)
        pull.attach(cotangent_refs, _result_of(solve, wrt, result_refs, solve.first_y - 1))
        cotangents = pull.begin()
        # Never 0, or the loop below would not end.
        stride, count = jnp.maximum(jnp.max(decisions_ref[0, :]), 1), jnp.max(pull.attempts)

        def segment(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            start, cotangents = carry
            # Behind a lane's own last segment, where a lane is a thread, there are no attempts and no milestone: any will
            # do for them.
            milestone = jnp.where(start < count, start, 0)
            state = rows.restore(schedule.slot(milestone, record), pull.stepper, start)
            stop = in_step(jnp.minimum(start + stride, count))
            # Read again, not carried: registers are scarce.
            following = jnp.where(start + stride < count, start + stride, 0)
            target = rows.arrival(
                schedule.slot(following, record), pull.stepper, pull.attempts > start + stride
            )
            cotangents, _ = pull.attempts_range(0, state, start, stop, cotangents, target)
            return start - stride, cotangents

        # Lanes that run in step do the same segment at the same time: were each to begin with its own last one, a short
        # rest of one would keep waiting the others' whole segments, and theirs it.
        segments = together((count + stride - 1) // stride)
        _, cotangents = lax.while_loop(
            lambda carry: carry[0] >= 0, segment, ((segments - 1) * stride, cotangents)
        )
        pull.finish(cotangents, result_refs)

    return body


def _splitter(refs: Sequence[Any]) -> Callable[[int], Sequence[Any]]:
    position = 0

    def take(count: int) -> Sequence[Any]:
        nonlocal position
        position += count
        return refs[position - count : position]

    return take


def _result_of(solve: Solve, wrt: Sequence[bool], refs: Sequence[Any], index: int) -> Any | None:
    """The Ref of one input's cotangent, or None if it is not wanted."""
    return refs[sum(wrt[:index])] if wrt[index] else None


class _Pullback:
    """The backward pass over ranges of attempts: replay, then walk back."""

    def __init__(
        self, solve: Solve, record: Record, wrt: Sequence[bool], method: Method, reader: _Reader, attempts: Array,
        decisions: Any, scratch: Sequence[Any],
    ) -> None:  # fmt: skip
        self.solve, self.record, self.wrt, self.method, self.reader = solve, record, wrt, method, reader
        self.attempts, self.decisions_ref = attempts, decisions
        self.times = any(wrt[: 2 + solve.has_dt0])
        spread = solve.spreads_shared
        self.wanted = wrt[solve.first_operand :]
        self.operands = [
            reader.pieces(i, struct.shape, spread=spread and wrt[i])
            for i, struct in enumerate(solve.field.operands, solve.first_operand)
        ]
        lanes = zip(self.wanted, solve.lane[solve.first_operand :], strict=True)
        self.per_lane = [lane or spread for wanted, lane in lanes if wanted]
        self.stepper = reader.stepper(self.operands)
        shared = any(w and not lane for w, lane in zip(wrt, solve.lane, strict=True))
        self.masked = shared and not spread
        split = _splitter(scratch)
        noted = _noted_scalars(solve, wrt)
        self.notes = Rows(solve, method, split(len(Rows.buffers(solve, 1, noted))), noted)
        self.strides = schedule.replay_strides(solve.max_steps, record)
        size = len(_Milestones.buffers(solve, 1))
        self.levels = [_Milestones(solve, method, split(size)) for _ in self.strides]
        self.cotangent_refs: Sequence[Any] = ()
        self.save_times_ref: Any | None = None

    def attach(self, cotangent_refs: Sequence[Any], save_times_ref: Any | None) -> None:
        self.cotangent_refs = cotangent_refs
        self.save_times_ref = save_times_ref if self.solve.saves is not None else None

    @property
    def _dates(self) -> bool:
        """Whether anything about time is differentiated: t0, t1, dt0 or the save times."""
        return self.times or self.save_times_ref is not None

    def begin(self) -> _Cotangents:
        solve, zero = self.solve, jnp.zeros_like(self.stepper.t0)
        refs = self.cotangent_refs
        if solve.saves is None:
            y = self._row_pieces(())
            pointer = None
        else:
            y = [
                jnp.zeros(ref.shape[1 + len(at) :], solve.field.dtype)
                for ref, shape in zip(refs, solve.field.y_shapes, strict=True)
                for at in self.method.lift.pieces(shape)
            ]
            rows = jnp.full(zero.shape, solve.saves, jnp.int32)
            last = jnp.broadcast_to(self.reader.save_time(jnp.int32(solve.saves - 1)), zero.shape)
            pointer = (rows, last if solve.saves else self.stepper.direction * -jnp.inf)
        if isinstance(self.method, rolled.Rolled):
            self.method.clear_sums()
            operands = []
        else:
            operands = [
                [jnp.zeros_like(p) for p in pieces]
                for pieces, w in zip(self.operands, self.wanted, strict=True)
                if w
            ]
        t, h, t1 = (zero, zero, zero) if self.times else (None, None, None)
        return _Cotangents(y, operands, t, h, t1, pointer)

    def _row_pieces(self, row: tuple[Any, ...]) -> Pieces:
        """Cotangents of one row of saved values (or of the final state)."""
        return [
            load(ref, (*row, *at))
            for ref, shape in zip(self.cotangent_refs, self.solve.field.y_shapes, strict=True)
            for at in self.method.lift.pieces(shape)
        ]

    def attempts_range(
        self,
        level: int,
        state: State,
        start: Array,
        stop: Array,
        cotangents: _Cotangents,
        target: tuple[Array, Array],
    ) -> tuple[_Cotangents, tuple[Array, Array]]:
        """Pull back attempts start..stop, which begin at `state` and end at time `target` (for lanes still live then)."""
        arrival = target
        if level == len(self.strides):
            if self._drifts:
                gap = self._replay_aligned(state, start, stop, target)
            else:
                gap = self._gap(self._replay(state, start, stop, self._note), start, target)
            cotangents = self._walk(start, stop, cotangents, gap)
        else:
            cotangents = self._nested(level, state, start, stop, cotangents, target)
        if self.solve.adaptive:
            begun = self.attempts > start
            arrival = jnp.where(begun, state.t, target[0]), jnp.where(begun, state.low, target[1])
        return cotangents, arrival

    def _nested(
        self,
        level: int,
        state: State,
        start: Array,
        stop: Array,
        cotangents: _Cotangents,
        target: tuple[Array, Array],
    ) -> _Cotangents:
        stride, rows = self.strides[level], self.levels[level]
        count = (stop - start + stride - 1) // stride

        def outward(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            index, state = carry
            rows.save(index, state)
            begin = start + index * stride
            # Nothing needs the end of the last one.
            end = jnp.where(index + 1 < count, begin + stride, begin)
            return index + 1, self._replay(state, begin, end, None)

        lax.while_loop(lambda carry: carry[0] < count, outward, (jnp.int32(0), state))

        def homeward(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            index, cotangents, target = carry
            begin = start + (index - 1) * stride
            restored = rows.restore(index - 1, self.stepper, begin)
            end = jnp.minimum(begin + stride, stop)
            cotangents, target = self.attempts_range(level + 1, restored, begin, end, cotangents, target)
            return index - 1, cotangents, target

        return lax.while_loop(lambda carry: carry[0] > 0, homeward, (count, cotangents, target))[1]

    @property
    def _drifts(self) -> bool:
        """Whether the tolerance is so near eps that recomputed step sizes may lead a segment astray."""
        step = self.solve.step
        return isinstance(step, Adaptive) and step.rtol < 1000 * self.stepper.eps

    def _gap(self, end: State, start: Array, target: tuple[Array, Array]) -> Optional:
        """By how much the replay of a segment misses its end."""
        if not self.solve.adaptive:
            return None
        return jnp.where(self.attempts > start, (target[0] - end.t) + (target[1] - end.low), 0.0)

    def _replay_aligned(self, state: State, start: Array, stop: Array, target: tuple[Array, Array]) -> Array:
        """Replay a segment, and once more with scaled steps if a lane missed the end by over a quarter of a step."""
        attempts = (stop - start).astype(state.t.dtype)

        def wanted(carry: tuple[Array, Array, Array]) -> Array:
            return carry[0] < 2

        def replay(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            turn, scale, _ = carry
            end = self._replay(state, start, stop, self._note, (turn > 0, scale))
            gap = self._gap(end, start, target)
            replayed = (end.t - state.t) + (end.low - state.low)
            missed = abs(gap) * attempts > 0.25 * abs(replayed)
            # Lanes that need no scaling get the same steps again, to the bit.
            scale = jnp.where(missed, 1 + gap / replayed, 1.0)
            return turn + jnp.where(any_lane(missed), jnp.int32(1), jnp.int32(2)), scale, gap

        zero = jnp.zeros_like(state.t)
        self.notes.scalar_ref[0, 1, :] = (
            zero  # read, and not used, before the first attempt has noted anything
        )
        return lax.while_loop(wanted, replay, (jnp.int32(0), zero, zero))[2]

    def _replay(
        self, state: State, start: Array, stop: Array, note: Callable[[Array, Taken], None] | None,
        scaled: tuple[Array, Array] | None = None,
    ) -> State:  # fmt: skip
        """Attempts start..stop again; `scaled` (again, scale): if again, with the noted step sizes times scale."""

        def attempt(carry: tuple[Array, State]) -> tuple[Array, State]:
            i, state = carry
            if scaled is not None:
                again, scale = scaled
                noted = self.notes.scalar_ref[jnp.where(again, i - start, 0), 1, :]
                state = state._replace(h=jnp.where(again, abs(noted) * scale, state.h))
            state, taken = self.stepper.attempt(state, i, self._decisions(i))
            if note is not None:
                note(i - start, taken)
            return i + 1, state

        return lax.while_loop(lambda carry: carry[0] < stop, attempt, (start, state))[1]

    def _decisions(self, i: Array) -> tuple[Array, Array]:
        live = i < self.attempts
        if not self.solve.adaptive:
            return live, live
        word = self.decisions_ref[1 + i // self.record.burst, :]
        bit = lax.shift_right_logical(word, jnp.broadcast_to(i % self.record.burst, word.shape)) & 1
        return live, live & (bit == 1)

    def _note(self, row: Array, taken: Taken) -> None:
        values = (taken.t, taken.h, taken.slope, taken.clipped.astype(taken.t.dtype))
        self.notes.write(row, values[: self.notes.scalars], taken.y)

    def _walk(self, start: Array, stop: Array, cotangents: _Cotangents, gap: Optional) -> _Cotangents:
        def go_on(carry: tuple[Any, ...]) -> Array:
            return carry[0] > start

        def back(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            i, cotangents, gap = carry
            i = i - 1
            values, y = self.notes.read(i - start)
            slope = clipped = None
            if self.solve.adaptive:
                t, h = values[:2]
                accepted = h != 0
                h = jnp.where(accepted, h + gap, h)
                gap = jnp.where(accepted, 0.0, gap)
                if self.times:
                    slope, clipped = values[2], values[3] > 0
            else:
                t, accepted = self.stepper.time(i), i < self.attempts
                h, clipped = self.stepper.h, jnp.zeros(t.shape, bool)
                if self.stepper.steps is not None:
                    clipped = i + 1 == self.stepper.steps
                    h = jnp.where(clipped, self.stepper.t1 - t, h)
            cotangents = self._step(i, t, h, y, accepted, slope, clipped, cotangents)
            return i, cotangents, gap

        return lax.while_loop(go_on, back, (stop, cotangents, gap))[1]

    def _step(
        self, i: Array, t: Array, h: Array, y: Pieces, accepted: Array, slope: Optional, clipped: Optional,
        cotangents: _Cotangents,
    ) -> _Cotangents:  # fmt: skip
        """Through one attempt, backwards."""
        dense = self.solve.saves is not None
        mask = accepted if self.masked else None
        pulled = self.method.linearize(
            t, h, y, self.operands, self.wanted, mask, dense=dense, times=self._dates
        )
        stage_cts = pulled.begin()
        direct = [jnp.zeros_like(p) for p in y]
        t_ct = h_ct = jnp.zeros_like(t) if self._dates else None
        pointer = cotangents.pointer
        if dense:
            pointer, direct, stage_cts, t_ct, h_ct = self._saved_values(
                pointer, t, h, pulled, accepted, direct, stage_cts, t_ct, h_ct
            )
        y1_ct = [jnp.where(accepted, ct, 0.0) for ct in cotangents.y]
        y_ct, wanted_ct, *time_ct = pulled.pull(stage_cts, y1_ct, accepted)
        new_y = [jnp.where(accepted, a + b, ct) for a, b, ct in zip(y_ct, direct, cotangents.y, strict=True)]
        operands = [
            self._accumulate(total, terms, accepted, lanes)
            # None of them where the method adds them up.
            for total, terms, lanes in zip(cotangents.operands, wanted_ct, self.per_lane, strict=False)
        ]
        new = cotangents._replace(y=new_y, operands=operands, pointer=pointer)
        if not self.times:
            return new
        t_ct = jnp.where(accepted, t_ct + time_ct[0], 0.0)
        h_ct = jnp.where(accepted, h_ct + time_ct[1], 0.0)
        return self._step_times(i, new, t_ct, h_ct, accepted, slope, clipped)

    @staticmethod
    def _accumulate(totals: Pieces, terms: Pieces, accepted: Array, per_lane: bool) -> Pieces:
        """Add an operand's cotangents: masked here if they have lanes, else the lift has left out the dead lanes."""
        if per_lane:
            terms = [jnp.where(accepted, term, 0.0) for term in terms]
        return [total + term for total, term in zip(totals, terms, strict=True)]

    def _saved_values(
        self, pointer: Any, t: Array, h: Array, pulled: Pulled, accepted: Array, direct: Pieces, stage_cts: Any,
        t_ct: Any, h_ct: Any,
    ) -> tuple[Any, Pieces, Any, Any, Any]:  # fmt: skip
        """Cotangents of the rows saved in this step, spread over its start, stages, time and size.

        A row is Y = y + h sum_s b_s(theta) k_s with theta = (date - t) / h.
        """
        direction, tableau = self.stepper.direction, self.method.tableau

        def pending(pointer: tuple[Array, Array]) -> Array:
            return accepted & (pointer[0] > 0) & (direction * pointer[1] > direction * t)

        def row(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            pointer, direct, stage_cts, t_ct, h_ct = carry
            current, mask, following = self._pass_row(pointer, pending(pointer))
            theta = jnp.where(mask, (pointer[1] - t) / jnp.where(mask, h, 1.0), 0.0)
            ct = [jnp.where(mask, p, 0.0) for p in self._row_pieces((current,))]
            weights = dense_weights(tableau, theta)
            direct = [a + b for a, b in zip(direct, ct, strict=True)]
            stage_cts = pulled.add(stage_cts, [None if w is None else h * w for w in weights], ct)
            if self._dates:
                speed = inner(weighted_sum(dense_slopes(tableau, theta), pulled.stages), ct)
                h_ct = h_ct + inner(weighted_sum(weights, pulled.stages), ct) - theta * speed
                t_ct = t_ct - speed
                self._save_time_cotangent(current, mask, speed)
            return following, direct, stage_cts, t_ct, h_ct

        return lax.while_loop(
            lambda carry: any_lane(pending(carry[0])), row, (pointer, direct, stage_cts, t_ct, h_ct)
        )

    def _pass_row(
        self, pointer: tuple[Array, Array], waiting: Array
    ) -> tuple[Array, Array, tuple[Array, Array]]:
        """The latest row any lane waits for, the lanes that do, and the pointer behind it."""
        done, due = pointer
        current = jnp.max(jnp.where(waiting, done, 0)) - 1
        mask = waiting & (done == current + 1)
        before = jnp.where(current > 0, self.reader.save_time(current - 1), self.stepper.direction * -jnp.inf)
        return current, mask, (done - mask.astype(jnp.int32), jnp.where(mask, before, due))

    def _save_time_cotangent(self, row: Array, mask: Array, value: Array) -> None:
        if self.save_times_ref is not None:
            merge(self.save_times_ref, (row,), mask, value)

    def _step_times(
        self, i: Array, cotangents: _Cotangents, t_ct: Array, h_ct: Array, accepted: Array, slope: Optional,
        clipped: Optional,
    ) -> _Cotangents:  # fmt: skip
        """Backwards through how a step's start and size came about, for gradients by t0, t1 and dt0.

        Adaptive: next t = t + h, next h = factor * h, and h = t1 - t where the step was cut at the end. Fixed(n):
        t = t0 + i h; the cotangents of h are collected. Fixed(dt): t = t0 + i dt, the last h = t1 - t.
        """
        if self.solve.adaptive:
            h_total = slope * cotangents.h + jnp.where(accepted, cotangents.t, 0.0) + h_ct
            cut = jnp.where(clipped, h_total, 0.0)
            return cotangents._replace(
                t=cotangents.t + t_ct - cut, h=jnp.where(clipped, 0.0, h_total), t1=cotangents.t1 + cut
            )
        if self.stepper.steps is None:
            return cotangents._replace(
                t=cotangents.t + t_ct, h=cotangents.h + i.astype(t_ct.dtype) * t_ct + h_ct
            )
        cut = jnp.where(clipped, h_ct, 0.0)
        return cotangents._replace(t=cotangents.t + t_ct - cut, t1=cotangents.t1 + cut)

    def finish(self, cotangents: _Cotangents, refs: Sequence[Any]) -> None:
        """Rows at or before t0, then the results."""
        solve = self.solve
        if solve.saves is not None:
            cotangents = self._initial_rows(cotangents)
        results: dict[int, Any] = {}
        if self.times:
            t, h, t1 = cotangents.t, cotangents.h, cotangents.t1
            if isinstance(solve.step, Fixed) and solve.step.steps is not None:
                share = h / solve.step.steps
                results[0], results[1] = t - share, share
            else:
                results[0], results[1] = t, t1
            if solve.has_dt0:
                dt0: Any = self.stepper.dt0
                free = abs(dt0) <= limit(solve.step, abs(dt0))
                results[2] = jnp.where(free, h * self.stepper.direction * jnp.sign(dt0), 0.0)
        for i, value in results.items():
            ref = _result_of(solve, self.wrt, refs, i)
            if ref is not None:
                ref[...] = value
        start = sum(self.wrt[: solve.first_y])
        operands = start + len(solve.field.y_shapes)
        lanes = solve.lane[solve.first_operand :]
        wanted = [lane for lane, w in zip(lanes, self.wanted, strict=True) if w]
        if isinstance(self.method, rolled.Rolled):
            self.method.store_sums(refs[operands:], wanted)
        else:
            self._store_operands(refs[operands:], cotangents.operands, wanted)
        _store_leaves(self.method, refs[start:operands], solve.field.y_shapes, cotangents.y)

    def _store_operands(self, refs: Sequence[Any], totals: Sequence[Pieces], lane: Sequence[bool]) -> None:
        structs = [s for s, w in zip(self.solve.field.operands, self.wanted, strict=True) if w]
        for ref, struct, total, per_lane, has_lanes in zip(
            refs, structs, totals, self.per_lane, lane, strict=True
        ):
            for at, piece in zip(self.method.lift.pieces(struct.shape), total, strict=True):
                store(ref, at, jnp.sum(piece, axis=-1) if per_lane and not has_lanes else piece)

    def _initial_rows(self, cotangents: _Cotangents) -> _Cotangents:
        k0 = None
        if self._dates:
            k0 = self.method.field(self.stepper.t0, self.reader.state(), self.operands)

        def row(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            pointer, y, t = carry
            current, mask, following = self._pass_row(pointer, pointer[0] > 0)
            ct = [jnp.where(mask, p, 0.0) for p in self._row_pieces((current,))]
            if k0 is not None:
                speed = inner(k0, ct)
                self._save_time_cotangent(current, mask, speed)
                t = t if t is None else t - jnp.where(mask, speed, 0.0)
            return following, [a + b for a, b in zip(y, ct, strict=True)], t

        pointer, y, t = lax.while_loop(
            lambda carry: any_lane(carry[0][0] > 0), row, (cotangents.pointer, cotangents.y, cotangents.t)
        )
        return cotangents._replace(pointer=pointer, y=y, t=t)
