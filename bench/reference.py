"""Reference solutions and gradients in float64, by SciPy: the judge of every row, no relation of any rival.

The gradient is that of the exact flow: with L = sum(y(T)^2), the adjoint a = dL/dy obeys da/dt = -a^T df/dy backwards from
a(T) = 2 y(T), and dL/dp is the integral of a^T df/dp (Pontryagin's equations). The method is DOP853 at 1e-12 throughout.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.flatten_util import ravel_pytree
from scipy.integrate import solve_ivp

from bench.cases import Problem

TOLERANCE = 1e-12
# Trajectories of an ensemble that are solved; all, where a gradient is a sum over all.
LANES = 12


@dataclass(frozen=True)
class Answer:
    """Leaves of the final states and of the gradient, those of the trajectories `lanes` where leaves have such an axis."""

    states: list[np.ndarray]
    gradient: list[np.ndarray]
    lanes: np.ndarray | None
    gradient_lanes: np.ndarray | None


def reference(problem: Problem) -> Answer:
    """Solves it, or one of the equal parts that its state is made of. Problems that differ in how they are to be solved only
    share their reference."""
    if problem.cell is None:
        return _solved(
            Problem(
                problem.field, problem.inputs, "float64", t1=problem.end, alone=problem.alone,
                shared_args=problem.shared_args,
            )
        )  # fmt: skip
    part = reference(problem.cell)
    states = [np.tile(leaf, problem.repeats) for leaf in part.states]
    return Answer(states, [leaf * problem.repeats for leaf in part.gradient], None, None)


@functools.cache
def _solved(problem: Problem) -> Answer:
    y0s, args = problem.inputs()
    lanes = None
    if not (problem.alone or problem.shared_args):
        lanes = np.unique(np.linspace(0, problem.lanes - 1, LANES).round().astype(int))
        y0s, args = jax.tree.map(lambda a: a[lanes], (y0s, args))
    with jax.enable_x64(True):
        flat, states_of = ravel_pytree(jax.tree.map(lambda a: np.asarray(a, np.float64), y0s))
        flat_args, args_of = ravel_pytree(jax.tree.map(lambda a: np.asarray(a, np.float64), args))
        field = problem.field()
        if not problem.alone:
            field = jax.vmap(field, in_axes=(None, 0, None if problem.shared_args else 0))

        def slope(t: Any, y: Any, p: Any) -> Any:
            return ravel_pytree(field(t, states_of(y), args_of(p)))[0]

        forward = jax.jit(lambda t, y: slope(t, y, flat_args))
        backward = jax.jit(lambda t, y, a: jax.vjp(lambda y, p: slope(t, y, p), y, flat_args)[1](a))
        size = flat.size

        def adjoint(t: float, state: np.ndarray) -> np.ndarray:
            by_y, by_p = backward(t, there.sol(t), state[:size])
            return -np.concatenate([by_y, by_p])

        def solve(f: Any, span: tuple[float, float], start: np.ndarray, dense: bool) -> Any:
            done = solve_ivp(f, span, start, "DOP853", rtol=TOLERANCE, atol=TOLERANCE, dense_output=dense)
            assert done.success, done.message
            return done

        there = solve(lambda t, y: np.asarray(forward(t, y)), (0.0, problem.end), np.asarray(flat), True)
        end = there.y[:, -1]
        back = solve(adjoint, (problem.end, 0.0), np.concatenate([2 * end, np.zeros(flat_args.size)]), False)
        leaves = (states_of(end), args_of(back.y[size:, -1]))
    states, gradient = ([np.asarray(leaf) for leaf in jax.tree.leaves(tree)] for tree in leaves)
    return Answer(states, gradient, lanes, lanes)


def errors(problem: Problem, result: Any) -> tuple[float, float | None, str | None]:
    """The errors of a program's states and gradient (None without), relative to the largest value of a leaf, and why the
    result is wrong, or None."""
    (loss, (ys, _)), gradient = result
    exact = reference(problem)
    state_error = _error(ys, exact.states, exact.lanes)
    gradient_error = None if gradient is None else _error(gradient, exact.gradient, exact.gradient_lanes)
    largest = max(state_error, gradient_error or 0.0)
    if gradient_error is not None and np.isnan(gradient_error):
        largest = gradient_error
    reason = None
    if not largest <= problem.accepted_error:  # nor if it is NaN
        reason = f"error {largest:.1e}, accepted {problem.accepted_error:.1e}"
    elif loss is not None:
        total = sum(float(np.sum(np.asarray(leaf, np.float64) ** 2)) for leaf in jax.tree.leaves(ys))
        if not abs(total - float(loss)) <= 1e-4 * abs(total):
            reason = f"the loss {float(loss):.6g} is not that of the states, {total:.6g}"
    return state_error, gradient_error, reason


def _error(got: Any, exact: list[np.ndarray], lanes: np.ndarray | None) -> float:
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(got)]
    assert len(leaves) == len(exact)
    worst = 0.0
    for mine, other in zip(leaves, exact, strict=True):
        if not np.all(np.isfinite(mine)):  # of all trajectories
            return float("nan")
        chosen = mine if lanes is None else mine[lanes]
        assert chosen.shape == other.shape, (chosen.shape, other.shape)
        worst = max(worst, float(np.max(np.abs(chosen - other))) / max(float(np.max(np.abs(other))), 1e-30))
    return worst
