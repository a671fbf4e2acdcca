"""The arithmetic of attempts on lane vectors: a Runge-Kutta method on a lifted field, and a block's steps. No Refs here.

Every array's last axis is the lane axis; lanes never meet.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pykernels.field import Field
from pykernels.interpolation import weighted_sum
from pykernels.lanes import Lift, lift
from pykernels.stepsize import Adaptive, Fixed, initial_step, limit, scaled_error, step_factor, two_sum
from pykernels.tableau import ButcherTableau

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int32

Pieces = list[
    Any
]  # lane values of one pytree leaf or of several: a list of arrays whose last axis is the lane axis

Optional = Any  # a lane vector, or None where the kind of steps does not need it

# Why a trajectory stopped; RUNNING never leaves a kernel.
RUNNING, SUCCESS, MAX_STEPS, STEP_TOO_SMALL, NON_FINITE = -1, 0, 1, 2, 3


@dataclass(frozen=True)
class Solve:
    """Everything static about a whole solve; hashable, the parameter of the solve primitives.

    `lane[i]` tells whether input i has a lane axis. Inputs, in order: t0, t1, dt0 if `has_dt0`, the save times if `saves`,
    the leaves of y0 (always with lanes), the field's operands. `kind` is the lift (see `lanes.py`) or "small": components or
    arrays as the runner chooses; "registers": components, for a runner that keeps a whole attempt in registers. `block` is
    the wanted number of lanes per block, 0: the runner chooses. `runner` is the runner asked for, None: the platform's.
    """

    field: Field
    method: ButcherTableau
    step: Any  # Fixed | Adaptive, see `adaptive`
    max_steps: int
    has_dt0: bool
    saves: Any  # int, or None for the final state
    kind: str
    lane: tuple[bool, ...]
    block: int
    runner: str | None = None
    rolled: bool = False  # stages in a loop, see `rolled.py`: a runner's choice

    @property
    def first_y(self) -> int:
        return 2 + self.has_dt0 + (self.saves is not None)

    @property
    def first_operand(self) -> int:
        return self.first_y + len(self.field.y_shapes)

    @property
    def carries_stage(self) -> bool:
        """Whether an FSAL method's last stage is carried to the next attempt. Not for small fields (components): XLA:CPU
        computes a whole attempt again for every value its loop carries, which costs more than the stage saves."""
        return self.method.fsal and self.kind not in ("components", "small")

    @property
    def adaptive(self) -> bool:
        return isinstance(self.step, Adaptive)

    @property
    def spreads_shared(self) -> bool:
        """Whether the lift gives a shared operand that is differentiated a value, and a cotangent, per lane."""
        return self.kind not in ("arrays", "tiles")

    def with_lanes(self, lane: Sequence[bool]) -> Solve:
        return dataclasses.replace(self, lane=tuple(lane))


class State(NamedTuple):
    """What an attempt carries from one to the next. Fixed steps need `y` and `k0` only: the others are then None, and
    `status`, `attempts` and `accepted` are None during a replay too."""

    t: Optional
    low: Optional  # t + low is the time: compensated summation, no drift in float32
    h: Optional  # size of the next attempt, positive
    memory: tuple[Float[Array, " lanes"], ...]  # the controller's
    y: Pieces
    k0: Optional  # the first stage, if carried: pieces
    status: Optional
    attempts: Optional
    accepted: Optional


class Taken(NamedTuple):
    """One attempt, for whoever saves values from it or differentiates it: from t by h (signed, 0 if not accepted)."""

    t: Float[Array, " lanes"]
    h: Float[Array, " lanes"]
    end: Float[Array, " lanes"]
    accepted: Bool[Array, " lanes"]
    y: Pieces
    stages: Sequence[Pieces]
    clipped: Bool[Array, " lanes"]  # h was t1 - t
    slope: Float[Array, " lanes"]  # d(next h) / d(this h)


class Verdict(NamedTuple):
    """What became of an adaptive attempt."""

    live: Bool[Array, " lanes"]
    accepted: Bool[Array, " lanes"]
    end: Float[Array, " lanes"]  # where it would end
    factor: Float[Array, " lanes"]  # by which the next size differs
    free: Float[Array, " lanes"]  # the next size
    proposed: Float[Array, " lanes"]  # and under `dtmax`


def any_lane(mask: Bool[Array, " lanes"]) -> Bool[Array, ""]:
    """Whether any lane of the block is set (a max of integers: the one reduction every runner has)."""
    return jnp.max(mask.astype(jnp.int32)) > 0


@jax.jit
def _together(count: Int32[Array, ""]) -> Int32[Array, ""]:
    return count + jnp.int32(0)


@jax.jit
def _in_step(count: Int32[Array, ""]) -> Int32[Array, ""]:
    return count + jnp.int32(0)


# The calls' names in a jaxpr.
TOGETHER, IN_STEP = "_together", "_in_step"


def together(count: Int32[Array, ""]) -> Int32[Array, ""]:
    """The largest count among the lanes that share an instruction stream. In a block it is the same for all;
    a runner that gives each lane a thread takes the largest of a warp, by the name of the call."""
    return _together(count)


def in_step(count: Int32[Array, ""]) -> Int32[Array, ""]:
    """The same count, when all lanes that share an instruction stream have come here: loops of different
    lengths before this point do not keep them apart behind it. They must all come here equally often."""
    return _in_step(count)


def is_finite(pieces: Pieces) -> Bool[Array, " lanes"]:
    """Per lane, whether all elements are finite, without branches: the sum of x - x is. It is 0 or NaN, or, where a compiler
    has fused the product a b that x stands for, the finite rounding error a b - x, and infinite where a b overflows."""
    total = jnp.asarray(sum(jnp.sum(p - p, axis=tuple(range(p.ndim - 1))) for p in pieces))
    return jnp.abs(total) < jnp.inf


class Method:
    """A Runge-Kutta method on a lifted field: stages of one step, for values and for `jax.vjp`."""

    def __init__(self, solve: Solve, *, differentiated: bool, spread: Sequence[bool] | None = None) -> None:
        self.tableau = solve.method
        count = 1 + len(solve.field.y_shapes)
        lane = (*(True,) * count, *solve.lane[solve.first_operand :])
        if spread is not None and solve.spreads_shared:
            lane = tuple(
                a or b for a, b in zip(lane, (*(True,) * count, *spread[solve.first_operand :]), strict=True)
            )
        kind = "components" if solve.kind == "registers" else solve.kind
        self.lift: Lift = lift(solve.field.jaxpr, lane, kind, differentiated=differentiated)
        self._counts = [len(self.lift.pieces(shape)) for shape in solve.field.y_shapes]

    def field(self, t: Array, y: Pieces, operands: list[Pieces], mask: Array | None = None) -> Pieces:
        leaves, position = [], 0
        for count in self._counts:
            leaves.append(list(y[position : position + count]))
            position += count
        outputs = self.lift([[t], *leaves, *operands], mask)
        return [piece for leaf in outputs for piece in leaf]

    def step(
        self,
        t: Array,
        h: Array,
        y: Pieces,
        k0: Pieces,
        operands: list[Pieces],
        mask: Array | None = None,
        *,
        last: bool = True,
        dense: bool = False,
    ) -> tuple[Sequence[Pieces], Pieces]:
        """Stages and new state of a step. `last` False leaves out the stage only an error or the next step needs."""
        tableau = self.tableau
        stages = [k0]
        argument = y
        for row, c in zip(tableau.a, tableau.c[1:], strict=True):
            argument = plus(y, h, weighted_sum(row, stages))
            if tableau.fsal and len(stages) == tableau.stages - 1 and not (last or dense):
                return stages, argument
            stages.append(self.field(t + c * h, argument, operands, mask))
        new = argument if tableau.fsal else plus(y, h, weighted_sum(tableau.b, stages))
        return (self.extend(stages, t, h, y, operands, mask) if dense else stages), new

    def extend(
        self,
        stages: Sequence[Pieces],
        t: Array,
        h: Array,
        y: Pieces,
        operands: list[Pieces],
        mask: Array | None = None,
    ) -> Sequence[Pieces]:
        """Append the stages that only the interpolant needs."""
        stages = list(stages)
        for row, c in zip(self.tableau.dense_a, self.tableau.dense_c, strict=True):
            stages.append(self.field(t + c * h, plus(y, h, weighted_sum(row, stages)), operands, mask))
        return stages

    def linearize(
        self,
        t: Array,
        h: Array,
        y: Pieces,
        operands: list[Pieces],
        wanted: Sequence[bool],
        mask: Array | None,
        *,
        dense: bool,
        times: bool,
    ) -> Pulled:
        """Take a step, to be pulled back: by the state, by the operands `wanted` and, with `times`, by its start and size.
        `dense`: there will be cotangents of the stages too."""

        def step(y: Pieces, some: list[Pieces], t: Array, h: Array) -> tuple[Pieces, Sequence[Pieces]]:
            rest = iter(some)
            mine = [next(rest) if w else o for o, w in zip(operands, wanted, strict=True)]
            k0 = self.field(t, y, mine, mask)
            stages, y1 = self.step(t, h, y, k0, mine, mask, last=False, dense=dense)
            return y1, stages if dense else []

        some = [o for o, w in zip(operands, wanted, strict=True) if w]
        if times:
            (_, stages), pull = jax.vjp(step, y, some, t, h)
        else:
            (_, stages), pull = jax.vjp(lambda y, some: step(y, some, t, h), y, some)
        return _Unrolled(stages, h, pull)


class Pulled(abc.ABC):
    """A step that was taken, to be pulled back. Cotangents of the stages are begun, added to, and at last pulled back."""

    stages: Sequence[Pieces]

    @abc.abstractmethod
    def begin(self) -> Any:
        """No cotangents of the stages: what a loop that adds some carries."""

    @abc.abstractmethod
    def add(self, cotangents: Any, weights: Sequence[Optional], ct: Pieces) -> Any:
        """Add weight * ct to the cotangent of every stage that has a weight."""

    @abc.abstractmethod
    def pull(
        self, cotangents: Any, y1_ct: Pieces, accepted: Array
    ) -> tuple[Pieces, list[Pieces], Optional, Optional]:
        """Cotangents, from those of the stages and of the new state, of the old state, of the operands wanted (none if they
        are added up elsewhere), and of the step's start and size. Where the step was not accepted they mean nothing."""


class _Unrolled(Pulled):
    def __init__(self, stages: Sequence[Pieces], h: Array, pull: Any) -> None:
        self.stages, self.h, self._pull = stages, h, pull

    def begin(self) -> list[Pieces]:
        return [[jnp.zeros_like(p) for p in stage] for stage in self.stages]

    def add(self, cotangents: list[Pieces], weights: Sequence[Optional], ct: Pieces) -> list[Pieces]:
        return [
            stage if w is None else [a + w * b for a, b in zip(stage, ct, strict=True)]
            for stage, w in zip(cotangents, weights, strict=True)
        ]

    def pull(
        self, cotangents: list[Pieces], y1_ct: Pieces, accepted: Array
    ) -> tuple[Pieces, list[Pieces], Optional, Optional]:
        del accepted
        y_ct, operands_ct, *times = self._pull((y1_ct, cotangents))
        t_ct, h_ct = times or (None, None)
        return y_ct, operands_ct, t_ct, h_ct


class Stepper:
    """The arithmetic of attempts on one block: begin, attempt, and which lanes are still live."""

    def __init__(
        self, solve: Solve, method: Method, t0: Array, t1: Array, dt0: Optional, operands: list[Pieces]
    ) -> None:
        self.solve, self.method, self.t0, self.t1, self.dt0, self.operands = (
            solve,
            method,
            t0,
            t1,
            dt0,
            operands,
        )
        eps = float(np.finfo(solve.field.dtype).eps)
        self.eps = eps
        self.direction = jnp.where(t1 >= t0, jnp.ones_like(t0), -jnp.ones_like(t0))
        # A step that would leave less than 100 ulp goes to the end: no tiny last intervals, as in diffrax.
        self.sliver = 100 * eps * jnp.maximum(abs(t0), abs(t1))
        if isinstance(solve.step, Fixed):
            if solve.step.steps is not None:
                self.h = (t1 - t0) / solve.step.steps
                self.steps = None
            else:
                length = abs(t1 - t0)
                self.h = self.direction * solve.step.size
                # Rounding must not add a step for the sake of 1e-6 of one.
                steps = jnp.ceil(length / solve.step.size - 1e-6)
                finite = jnp.isfinite(steps)
                bounded = jnp.minimum(jnp.where(finite, steps, 0.0), float(solve.max_steps + 1))
                self.steps = jnp.maximum(bounded, jnp.where(length > 0, 1.0, 0.0)).astype(jnp.int32)

    def bound(self) -> Int32[Array, ""] | int:
        """No lane of the block makes more attempts than this."""
        if self.solve.adaptive or self.steps is None:
            return self.solve.max_steps
        return jnp.minimum(jnp.max(self.steps), self.solve.max_steps).astype(jnp.int32)

    def begin(self, y: Pieces) -> State:
        tableau, solve = self.method.tableau, self.solve
        k0: Any = (
            self.method.field(self.t0, y, self.operands) if solve.carries_stage or solve.adaptive else None
        )
        if not solve.adaptive:
            return State(None, None, None, (), y, k0 if solve.carries_stage else None, None, None, None)
        if self.dt0 is not None:
            h = limit(solve.step, abs(self.dt0))
        else:
            h = initial_step(solve.step, tableau.error_order, y, k0, lambda h: self._euler(h, y, k0))
        zero = jnp.zeros_like(self.t0)
        count = jnp.zeros(zero.shape, jnp.int32)
        sound = is_finite(y) & is_finite(k0) & is_finite([self.t0, self.t1, h])
        done = jnp.where(self.t0 == self.t1, SUCCESS, RUNNING)
        status = jnp.where(sound, done, NON_FINITE).astype(jnp.int32)
        return State(
            self.t0,
            zero,
            h,
            (zero,) * solve.step.memory,
            y,
            k0 if solve.carries_stage else None,
            status,
            count,
            count,
        )

    def _euler(self, h: Array, y: Pieces, k0: Pieces) -> Pieces:
        h = self.direction * h
        return self.method.field(self.t0 + h, plus(y, h, k0), self.operands)

    def running(self, state: State) -> Bool[Array, ""] | bool:
        """Whether any lane still runs, besides the bound on attempts."""
        return any_lane(state.status < 0) if state.status is not None else True

    def attempt(
        self, state: State, i: Int32[Array, ""], forced: tuple[Array, Array] | None = None
    ) -> tuple[State, Taken]:
        """Attempt number i. `forced` (live, accepted) are the decisions of the forward pass during a replay."""
        if self.solve.adaptive:
            return self._adaptive(state, forced)
        return self._fixed(state, i)

    def time(self, i: Int32[Array, ""]) -> Float[Array, " lanes"]:
        """Start of fixed step number i."""
        return self.t0 + i.astype(self.t0.dtype) * self.h

    def fixed_size(self, i: Int32[Array, ""]) -> tuple[Array, Array, Array, Array]:
        """Fixed step number i: its start, its size, which lanes make it, and for which it is the last."""
        t = self.time(i)
        if self.steps is None:
            return t, self.h, jnp.ones(t.shape, bool), jnp.full(t.shape, i + 1 == self.solve.max_steps)
        live, last = i < self.steps, i + 1 == self.steps
        return t, jnp.where(last, self.t1 - t, self.h), live, last

    def _fixed(self, state: State, i: Int32[Array, ""]) -> tuple[State, Taken]:
        t, h, live, last = self.fixed_size(i)
        k0 = state.k0 if state.k0 is not None else self.method.field(t, state.y, self.operands)
        last_used = self.solve.carries_stage or self.solve.saves is not None
        stages, y1 = self.method.step(t, h, state.y, k0, self.operands, last=last_used)
        new = y1 if self.steps is None else select(live, y1, state.y)
        last_stage = stages[-1] if state.k0 is not None else None
        if last_stage is not None and self.steps is not None:
            last_stage = select(live, last_stage, state.k0)
        end = jnp.where(last, self.t1, self.time(i + 1))
        taken = Taken(
            t, h if self.steps is None else jnp.where(live, h, 0.0), end, live, state.y, stages, last, h
        )
        return state._replace(y=new, k0=last_stage), taken

    def _adaptive(self, state: State, forced: tuple[Array, Array] | None) -> tuple[State, Taken]:
        step, tableau = self.solve.step, self.method.tableau
        t = state.t
        h, clipped = self.next_size(state)
        k0 = state.k0 if state.k0 is not None else self.method.field(t, state.y, self.operands)
        stages, y1 = self.method.step(t, h, state.y, k0, self.operands)
        error = [h * e for e in weighted_sum(tableau.error or (), stages)]
        # The new state may not be finite where the field is not defined. Adding y1 - y1, zero or NaN, to the error rejects
        # it without a second pass over the stages: XLA computes the scaled error once, but whatever else depends on the
        # stages over again in every result of the loop.
        error = [e + (p - p) for e, p in zip(error, y1, strict=True)]
        square = scaled_error(step, error, state.y, y1)
        decided, verdict = self.decide(state, h, clipped, square, forced)
        accepted = verdict.accepted
        new = decided._replace(
            y=select(accepted, y1, state.y),
            k0=None if state.k0 is None else select(accepted, stages[-1], state.k0),
        )
        live, capped = verdict.live, verdict.proposed < verdict.free
        slope = jnp.where(live, jnp.where(capped, 0.0, verdict.factor), 1.0)
        taken = Taken(
            t, jnp.where(accepted, h, 0.0), verdict.end, accepted, state.y, stages, clipped & live, slope
        )
        return new, taken

    def next_size(self, state: State) -> tuple[Float[Array, " lanes"], Bool[Array, " lanes"]]:
        """Signed size of an adaptive attempt, and whether it goes to the end."""
        remaining = (self.t1 - state.t) - state.low
        clipped = self.direction * remaining - state.h < self.sliver
        return jnp.where(clipped, remaining, self.direction * state.h), clipped

    def decide(
        self,
        state: State,
        h: Float[Array, " lanes"],
        clipped: Bool[Array, " lanes"],
        square: Float[Array, " lanes"],
        forced: tuple[Array, Array] | None = None,
    ) -> tuple[State, Verdict]:
        """What follows from an attempt's scaled error: everything of the next state except y and k0."""
        step, tableau = self.solve.step, self.method.tableau
        t, low = state.t, state.low
        sound = square < jnp.inf
        if forced is None:
            live = state.status < 0
            accepted = live & sound & (square < 1)
        else:
            live, accepted = forced
        factor, memory = step_factor(step, tableau.error_order, square, accepted, state.memory)
        free = abs(h) * factor
        proposed = limit(step, free)
        stepped_t, stepped_low, finished = self.advance(t, low, h, clipped, accepted)
        if forced is None:
            floor = self.eps * jnp.maximum(abs(t), self.eps * abs(self.t1 - self.t0))
            if step.dtmin is not None:
                floor = jnp.maximum(floor, step.dtmin)
            why = jnp.where(sound, STEP_TOO_SMALL, NON_FINITE)
            ended = jnp.where(finished, SUCCESS, jnp.where(proposed < floor, why, RUNNING))
            status = jnp.where(live, ended, state.status).astype(jnp.int32)
            attempts = state.attempts + live.astype(jnp.int32)
            count = state.accepted + accepted.astype(jnp.int32)
        else:
            status, attempts, count = state.status, state.attempts, state.accepted
        new = state._replace(
            t=jnp.where(accepted, stepped_t, t),
            low=jnp.where(accepted, stepped_low, low),
            h=jnp.where(live, proposed, state.h),
            memory=memory,
            status=status,
            attempts=attempts,
            accepted=count,
        )
        return new, Verdict(live, accepted, stepped_t, factor, free, proposed)

    def advance(
        self, t: Array, low: Array, h: Array, clipped: Array, accepted: Array
    ) -> tuple[Array, Array, Array]:
        """Time after an accepted step as (t, low), and which lanes are then at the end."""
        low_sum, high_error = two_sum(t, h + low)
        finished = accepted & clipped
        return jnp.where(finished, self.t1, low_sum), jnp.where(finished, 0.0, high_error), finished


def outcome(solve: Solve, stepper: Stepper, state: State) -> tuple[Array, Array, Array]:
    """Status, attempts and accepted attempts per lane when the loop has ended."""
    if state.status is not None:
        return jnp.where(state.status < 0, MAX_STEPS, state.status), state.attempts, state.accepted
    steps = jnp.full(stepper.t0.shape, solve.max_steps, jnp.int32) if stepper.steps is None else stepper.steps
    attempts = jnp.minimum(steps, solve.max_steps)
    sound = is_finite(state.y) & is_finite([stepper.t0, stepper.t1])
    status = jnp.where(sound, jnp.where(steps > solve.max_steps, MAX_STEPS, SUCCESS), NON_FINITE)
    return status.astype(jnp.int32), attempts, attempts


def plus(y: Pieces, h: Array, slope: Pieces) -> Pieces:
    """y + h * slope."""
    return [a + h * b for a, b in zip(y, slope, strict=True)]


def select(mask: Array, new: Pieces, old: Pieces) -> Pieces:
    """The new pieces in the lanes of the mask, the old ones elsewhere."""
    return [jnp.where(mask, a, b) for a, b in zip(new, old, strict=True)]


def inner(a: Pieces, b: Pieces) -> Array:
    """Inner product of two states, per lane."""
    products = [jnp.sum(x * y, axis=tuple(range(x.ndim - 1))) for x, y in zip(a, b, strict=True)]
    return functools.reduce(jnp.add, products)
