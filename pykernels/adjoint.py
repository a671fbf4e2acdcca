"""How a solve is differentiated. Each adjoint is a small frozen object with one method; add one here to add an adjoint.

`integrate(solve, inputs)` takes a static `Solve` and its inputs (lanes last) and returns the values' leaves, status,
attempts and accepted attempts, differentiable in its own way.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pykernels import array_plan, primitives
from pykernels.interpolation import dense_weights, weighted_sum
from pykernels.kernels import body, xla
from pykernels.kernels.body import Kernel
from pykernels.kernels.stepper import SUCCESS, Method, Pieces, Solve, State, Stepper, is_finite, outcome
from pykernels.schedule import Record, record_for


class Adjoint(Protocol):
    """What `solve` needs of an adjoint."""

    def integrate(self, solve: Solve, inputs: Sequence[jax.Array]) -> list[jax.Array]:
        """Values' leaves, status, attempts, accepted: differentiable with respect to `inputs`."""
        ...

    def memory(self, solve: Solve, lanes: int) -> int:
        """Bytes per trajectory, of so many, that reverse mode keeps between the forward and the backward pass, or during
        it."""
        ...

    def kernels(self, solve: Solve) -> list[Kernel]:
        """The kernels it runs, backwards with respect to everything that has a derivative; none if it is plain JAX."""
        ...


@dataclass(frozen=True)
class ForwardOnly:
    """A simple loop over steps. Forward mode (`jax.jvp`, `jax.jacfwd`) carries the tangents in the same loop, with the step
    sizes of the values; reverse mode raises TypeError."""

    def integrate(self, solve: Solve, inputs: Sequence[jax.Array]) -> list[jax.Array]:
        return primitives.solve(inputs, solve)

    def memory(self, solve: Solve, lanes: int) -> int:
        del solve, lanes
        return 0

    def kernels(self, solve: Solve) -> list[Kernel]:
        return [Kernel(solve, None)]


@dataclass(frozen=True)
class Milestones:
    """Reverse mode by online milestones: restart points stored during the solve, from which the backward pass replays.

    `count` restart points (default about sqrt(max_steps), rounded up to an odd number) and `scratch` states for the replay
    of one segment (default the same). While the solve makes at most `count * scratch` attempts, every attempt is replayed
    once; beyond that every other milestone is dropped and further levels of replay are used, so memory stays bounded and
    each level costs one more forward sweep. The gradient is that of the discrete solution with its step sizes held constant.
    In the array plan a default is fitted to the size of the state, see `array_plan.default_record`.

    Raises ValueError for sizes below 1.
    """

    count: int | None = None
    scratch: int | None = None

    def __post_init__(self) -> None:
        for name in ("count", "scratch"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"Milestones({name}=) must be a positive int, not {value!r}")

    def record(self, solve: Solve, lanes: int = 1) -> Record:
        """The storage this adjoint gives a solve of so many trajectories."""
        if solve.kind == "vmap" and self.count is None and self.scratch is None:
            return array_plan.default_record(solve, max(lanes, 1))
        return record_for(solve.max_steps, self.count, self.scratch)

    def integrate(self, solve: Solve, inputs: Sequence[jax.Array]) -> list[jax.Array]:
        # What is known now can not be differentiated. Deciding here, not by symbolic zeros in the forward rule, keeps the
        # residuals' structure independent of how the call is differentiated: JAX 0.10 remembers only the latest one.
        y = range(solve.first_y, solve.first_operand)
        wrt = tuple(
            i in y or (isinstance(x, jax.core.Tracer) and jnp.issubdtype(x.dtype, jnp.floating))
            for i, x in enumerate(inputs)
        )
        record = self.record(solve, inputs[solve.first_y].shape[-1])
        return _with_milestones(solve, record, wrt, *inputs)

    def memory(self, solve: Solve, lanes: int) -> int:
        record = self.record(solve, lanes)
        if solve.kind == "vmap":
            return array_plan.memory(solve, record)
        kept = body.forward_buffers(solve, record)[len(solve.field.y_shapes) + 1 :]
        _, scratch = body.backward_buffers(solve, record, [True] * len(solve.lane))
        return sum(math.prod(b.shape) * np.dtype(b.dtype).itemsize for b in (*kept, *scratch))

    def kernels(self, solve: Solve) -> list[Kernel]:
        operands = [jnp.issubdtype(struct.dtype, jnp.floating) for struct in solve.field.operands]
        wrt = (*[True] * solve.first_operand, *operands)
        return [Kernel(solve, self.record(solve)), Kernel(solve, self.record(solve), wrt)]


@dataclass(frozen=True)
class BoundedTree:
    """Reverse mode through a tree of at most `max_steps` steps, in plain JAX: any order of derivative, forward and reverse.

    The steps are the leaves of a tree of nested scans with `branching` children; subtrees whose lanes have all finished are
    skipped, and every subtree is a `jax.checkpoint`, so reverse mode keeps O(branching * depth) states and evaluates every
    step at most `depth` times again. Slower than `Milestones`; its program grows with the tree's depth only.
    """

    branching: int = 16

    def __post_init__(self) -> None:
        if self.branching < 2:
            raise ValueError(f"BoundedTree(branching=) must be at least 2, not {self.branching!r}")

    def integrate(self, solve: Solve, inputs: Sequence[jax.Array]) -> list[jax.Array]:
        return _bounded_tree(self, solve, list(inputs))

    def depth(self, max_steps: int) -> int:
        """Levels of scans that hold `max_steps` leaves."""
        depth = 1
        while self.branching**depth < max_steps:
            depth += 1
        return depth

    def memory(self, solve: Solve, lanes: int) -> int:
        del lanes
        states = self.branching * self.depth(solve.max_steps)
        return states * (solve.field.elements + 4) * solve.field.dtype.itemsize

    def kernels(self, solve: Solve) -> list[Kernel]:
        del solve
        return []


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _with_milestones(
    solve: Solve, record: Record, wrt: tuple[bool, ...], *inputs: jax.Array
) -> list[jax.Array]:
    del record, wrt
    return primitives.solve(inputs, solve)


def _milestones_forward(
    solve: Solve, record: Record, wrt: tuple[bool, ...], *inputs: jax.Array
) -> tuple[list[jax.Array], Any]:
    del wrt
    results = primitives.solve(inputs, solve, record)
    count = len(solve.field.y_shapes)
    return results[: count + 3], (inputs, results[count], results[count + 1], results[count + 3 :])


def _milestones_backward(
    solve: Solve, record: Record, wrt: tuple[bool, ...], residuals: Any, cotangents: Sequence[Any]
) -> tuple[Any, ...]:
    inputs, status, attempts, recorded = residuals
    values = cotangents[: len(solve.field.y_shapes)]
    results = iter(primitives.pull_back(inputs, status, attempts, recorded, values, solve, record, wrt))
    return tuple(next(results) if w else None for w in wrt)


_with_milestones.defvjp(_milestones_forward, _milestones_backward)


class _Tree(NamedTuple):
    """What the leaves of the bounded tree pass on."""

    attempt: jax.Array
    state: State
    rows: Pieces  # values at the save times, (saves, *shape, lanes) per piece


@functools.partial(jax.jit, static_argnums=(0, 1))
def _bounded_tree(adjoint: BoundedTree, solve: Solve, inputs: Sequence[jax.Array]) -> list[jax.Array]:
    lanes = inputs[solve.first_y].shape[-1]
    solve = xla.resolve(solve, lanes, differentiated=True)
    method = Method(solve, differentiated=True, spread=[True] * len(solve.lane))

    def with_lanes(index: int) -> jax.Array:
        value = inputs[index]
        return value if solve.lane[index] else jnp.broadcast_to(value[..., None], (*value.shape, lanes))

    def pieces(index: int) -> Pieces:
        shape = inputs[index].shape[:-1] if solve.lane[index] else inputs[index].shape
        # A lift that keeps shared operands shared leaves dead lanes out of their cotangents itself.
        value = with_lanes(index) if method.lift.spreads_shared else inputs[index]
        return [value[(*at, ...)] for at in method.lift.pieces(shape)]

    operands = [pieces(i) for i in range(solve.first_operand, len(inputs))]
    y0 = [p for i in range(solve.first_y, solve.first_operand) for p in pieces(i)]
    t0, t1 = with_lanes(0), with_lanes(1)
    stepper = Stepper(solve, method, t0, t1, with_lanes(2) if solve.has_dt0 else None, operands)
    saves = None if solve.saves is None else with_lanes(solve.first_y - 1)
    state = stepper.begin(y0)
    # Rows at t0; the second term is zero and carries the derivative with respect to the save time.
    rows = []
    if saves is not None:
        slope = method.field(t0, y0, operands)
        rows = [p + _rowwise(saves - t0, p) * k for p, k in zip(y0, slope, strict=True)]
    bound = jnp.broadcast_to(jnp.asarray(stepper.bound(), jnp.int32), ())

    def unfinished(carry: _Tree) -> jax.Array:
        running = (carry.attempt < bound) & jnp.ones(lanes, bool)
        if carry.state.status is not None:
            running = running & (carry.state.status < 0)
        return primitives.any_lane(running)

    def leaf(carry: _Tree) -> _Tree:
        return _tree_step(stepper, saves, carry)

    def node(inner: Callable[[_Tree], _Tree]) -> Callable[[_Tree], _Tree]:
        def children(carry: _Tree) -> _Tree:
            return lax.scan(lambda c, _: (inner(c), None), carry, None, length=adjoint.branching)[0]

        return jax.checkpoint(lambda carry: lax.cond(unfinished(carry), children, lambda c: c, carry))

    tree = jax.checkpoint(lambda carry: lax.cond(unfinished(carry), leaf, lambda c: c, carry))
    for _ in range(adjoint.depth(solve.max_steps)):
        tree = node(tree)
    final = tree(_Tree(jnp.int32(0), state, rows))
    values = final.state.y if saves is None else final.rows
    status, attempts, accepted = outcome(solve, stepper, final.state)
    leaves = _unpieces(method, solve, values, () if saves is None else (solve.saves,))
    failed = status != SUCCESS
    poison = jnp.where(failed, jnp.asarray(jnp.nan, solve.field.dtype), 0.0)
    return [primitives.fail(leaf, failed) + poison for leaf in leaves] + [status, attempts, accepted]


def _tree_step(stepper: Stepper, saves: jax.Array | None, carry: _Tree) -> _Tree:
    """One attempt. It is made twice: once for the decisions, with the state held constant, and once for the values, with
    every lane that did not accept a step replaced by constants, so that it contributes exactly zero to any gradient."""
    method, state = stepper.method, carry.state
    held = state._replace(y=lax.stop_gradient(state.y), k0=lax.stop_gradient(state.k0))
    new, taken = stepper.attempt(held, carry.attempt)
    # A fixed step into infinity is made, but not differentiated.
    accepted = taken.accepted & is_finite(new.y)

    def guard(piece: jax.Array) -> jax.Array:
        return jnp.where(accepted, piece, lax.stop_gradient(piece))

    spread = method.lift.spreads_shared
    lanes = stepper.solve.lane[stepper.solve.first_operand :]
    operands = [
        [guard(p) if (spread or has) and jnp.issubdtype(p.dtype, jnp.floating) else p for p in o]
        for o, has in zip(stepper.operands, lanes, strict=True)
    ]
    y = [guard(p) for p in state.y]
    t, h = guard(taken.t), guard(taken.h)
    k0 = method.field(t, y, operands, accepted)
    dense = saves is not None
    stages, y1 = method.step(t, h, y, k0, operands, accepted, last=False, dense=dense)
    moved = [
        jnp.where(accepted, a, jnp.where(taken.accepted, b + lax.stop_gradient(c - b), b))
        for a, b, c in zip(y1, state.y, new.y, strict=True)
    ]
    rows = carry.rows
    if saves is not None:
        direction = stepper.direction
        inside = (
            accepted
            & (direction * saves > direction * taken.t)
            & (direction * saves <= direction * taken.end)
        )
        some = primitives.any_lane(jnp.any(inside, axis=0))
        rows = lax.cond(some, lambda: _fill_rows(method, rows, saves, inside, t, h, y, stages), lambda: rows)
    return _Tree(carry.attempt + 1, new._replace(y=moved), rows)


def _fill_rows(
    method: Method, rows: Pieces, saves: jax.Array, inside: jax.Array, t: jax.Array, h: jax.Array, y: Pieces,
    stages: Sequence[Pieces],
) -> Pieces:  # fmt: skip
    """Interpolated values for the rows whose time lies inside the step, all rows at once."""
    size = jnp.where(h == 0, jnp.ones_like(h), h)

    def row(date: jax.Array, mask: jax.Array, old: Pieces) -> Pieces:
        theta = jnp.where(mask, (date - t) / size, 0.5)
        value = weighted_sum(dense_weights(method.tableau, theta), stages)
        return [jnp.where(mask, a + h * k, b) for a, k, b in zip(y, value, old, strict=True)]

    return jax.vmap(row)(saves, inside, rows)


def _rowwise(vector: jax.Array, piece: jax.Array) -> jax.Array:
    """(saves, lanes) shaped to multiply a piece (*shape, lanes) row by row."""
    return vector.reshape(vector.shape[0], *(1,) * (piece.ndim - 1), vector.shape[-1])


def _unpieces(method: Method, solve: Solve, pieces: Pieces, rows: tuple[int, ...]) -> list[jax.Array]:
    leaves, position = [], 0
    for shape in solve.field.y_shapes:
        places = method.lift.pieces(shape)
        mine = pieces[position : position + len(places)]
        position += len(places)
        if places == [()]:
            leaves.append(mine[0])
        else:
            stacked = jnp.stack(mine, axis=len(rows)) if mine else jnp.zeros((*rows, 0, 1))
            leaves.append(stacked.reshape(*rows, *shape, stacked.shape[-1]))
    return leaves
