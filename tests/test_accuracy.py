"""The discrete solutions against exact ones: orders, reference problems, interpolants, directions, time without drift."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
import scipy.integrate
from jax.flatten_util import ravel_pytree
from problems import Problem

import pykernels as pk
from pykernels.tableau import METHODS

methods = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)


def bell(t, y, args):
    """Not linear, not autonomous: y = 1 / (1 + t^2)."""
    return -2 * t * y**2


def bell_solution(t: Any) -> np.ndarray:
    return 1 / (1 + np.asarray(t) ** 2)


#: Steps to t = 2 at which the error is well above rounding and close to its asymptotic power.
STEPS = {
    "euler": 128,
    "midpoint": 128,
    "heun": 128,
    "ralston": 128,
    "bosh3": 64,
    "rk4": 64,
    "tsit5": 32,
    "dopri5": 32,
}
STEPS |= {"vern7": 8, "dopri8": 6}


@methods
def test_order_of_convergence(method: pk.ButcherTableau) -> None:
    count = STEPS[method.name]
    coarse, fine = (
        abs(float(pk.solve(bell, 1.0, 0.0, 2.0, method=method, step=pk.Fixed(n)).ys) - 0.2)
        for n in (count, 2 * count)
    )
    assert fine > 2e-15
    assert np.log2(coarse / fine) > method.order - 0.25


@methods
def test_order_of_the_interpolant(method: pk.ButcherTableau) -> None:
    """Single steps of sizes h and h/2: the error inside is O(h^(dense_order + 1)), at the end O(h^(order + 1))."""
    sizes = np.array([1.0, 0.5]) * {8: 0.3, 7: 0.15, 5: 0.1, 4: 0.1}.get(method.order, 0.02)
    theta = np.array([0.15, 0.4, 0.65, 0.9, 1.0])
    start = 0.3
    dates = start + sizes[:, None] * theta
    solution = pk.solve_ensemble(
        bell,
        np.full(2, bell_solution(start)),
        start,
        dates[:, -1],
        method=method,
        step=pk.Fixed(1),
        save_at=dates,
    )
    np.testing.assert_array_equal(solution.ts, dates)
    coarse, fine = np.abs(np.asarray(solution.ys) - bell_solution(dates))
    assert np.log2(np.max(coarse[:-1]) / np.max(fine[:-1])) > method.dense_order + 0.75
    assert np.max(fine[:-1]) > 2e-15
    if fine[-1] > 2e-15:
        assert np.log2(coarse[-1] / fine[-1]) > method.order + 0.75


@pytest.mark.parametrize("problem", problems.PROBLEMS, ids=lambda p: p.name)
def test_reference_problems_equal_scipy(problem: Problem) -> None:
    """dopri8 and vern7 at tight tolerances against SciPy's DOP853, to 1e-12."""
    method = pk.vern7 if problem in (problems.KEPLER, problems.SIR, problems.PERCEPTRON) else pk.dopri8
    y0, unravel = ravel_pytree(jax.tree.map(jnp.asarray, problem.y0()))
    args = jax.tree.map(jnp.asarray, problem.args())
    flat = jax.jit(lambda t, y: ravel_pytree(problem.field(t, unravel(y), args))[0])
    wanted = scipy.integrate.solve_ivp(
        lambda t, y: np.asarray(flat(t, y)),
        (problem.t0, problem.t1),
        y0,
        method="DOP853",
        rtol=3e-14,
        atol=1e-15,
    ).y[:, -1]
    step = pk.Adaptive(rtol=1e-13, atol=1e-14)
    ys = pk.solve(problem.field, problem.y0(), problem.t0, problem.t1, args, method=method, step=step).ys
    np.testing.assert_allclose(ravel_pytree(ys)[0], wanted, rtol=1e-12, atol=1e-12)


def test_decay_equals_its_closed_form() -> None:
    problem = problems.DECAY
    rates, y0s = np.linspace(0.5, 2.0, 5), problems.spread(problem.y0(), 5)
    solution = pk.solve_ensemble(
        problem.field, y0s, problem.t0, problem.t1, rates, in_axes=(0, 0), method=pk.vern7,
        step=pk.Adaptive(rtol=1e-13, atol=1e-14),
    )  # fmt: skip
    exact = problems.decay_solution(problem.t1, y0s, rates[:, None])
    np.testing.assert_allclose(solution.ys, exact, rtol=1e-13)


@pytest.mark.parametrize("rtol", [1e-4, 1e-7, 1e-10])
def test_the_error_follows_the_tolerance(rtol: float) -> None:
    """Within a hundred tolerances, and not by taking absurdly many steps."""
    solution = pk.solve(bell, 1.0, 0.0, 2.0, method=pk.tsit5, step=pk.Adaptive(rtol=rtol, atol=rtol))
    assert 1e-3 * rtol < abs(float(solution.ys) - 0.2) < 100 * rtol
    assert int(solution.stats.attempts) < 10 * rtol**-0.2


@pytest.mark.parametrize("step", [pk.Adaptive(rtol=1e-6), pk.Fixed(40), pk.Fixed(0.07)], ids=str)
def test_backwards_equals_forwards_of_the_reversed_field(step: Any) -> None:
    problem = problems.FORCED_OSCILLATOR
    y0, args, dates = problem.y0(), problem.args(), np.linspace(problem.t1, problem.t0, 6)

    def reversed_field(s, y, args):
        return -problem.field(-s, y, args)

    run = functools.partial(pk.solve, y0=y0, args=args, method=pk.tsit5, step=step)
    backward = run(problem.field, t0=problem.t1, t1=problem.t0, save_at=dates)
    forward = run(reversed_field, t0=-problem.t1, t1=-problem.t0, save_at=-dates)
    np.testing.assert_allclose(backward.ys, forward.ys, rtol=0, atol=1e-13)
    assert (
        backward.stats.accepted == forward.stats.accepted
        and backward.stats.rejected == forward.stats.rejected
    )


def test_there_and_back_again() -> None:
    problem, step = problems.FORCED_OSCILLATOR, pk.Adaptive(rtol=1e-11, atol=1e-12)
    there = pk.solve(
        problem.field, problem.y0(), problem.t0, problem.t1, problem.args(), method=pk.dopri5, step=step
    )
    back = pk.solve(
        problem.field, there.ys, problem.t1, problem.t0, problem.args(), method=pk.dopri5, step=step
    )
    np.testing.assert_allclose(back.ys, problem.y0(), rtol=1e-8)


@pytest.mark.parametrize(
    "step", [pk.Adaptive(rtol=1e-9, atol=1e-10), pk.Fixed(100), pk.Fixed(0.013)], ids=str
)
@pytest.mark.parametrize("method", [pk.tsit5, pk.vern7], ids=lambda m: m.name)
def test_saved_values(step: Any, method: pk.ButcherTableau) -> None:
    """At t0 the initial state, at t1 the final one, between them the solution; times may repeat and differ by trajectory."""
    y0s = bell_solution(np.zeros(3))
    dates = np.array([[0.0, 0.5, 0.5, 1.0], [0.0, 1e-9, 0.3, 0.99], [0.7, 0.8, 0.9, 1.0]])
    run = functools.partial(pk.solve_ensemble, bell, y0s, 0.0, 1.0, method=method, step=step)
    saved, final = run(save_at=dates), run()
    np.testing.assert_allclose(saved.ys, bell_solution(dates), rtol=2e-8)
    np.testing.assert_array_equal(saved.ys[:2, 0], 1.0)
    np.testing.assert_allclose(saved.ys[::2, -1], final.ys[::2], rtol=1e-13)
    assert saved.ys[0, 1] == saved.ys[0, 2]
    np.testing.assert_array_equal(saved.stats.attempts, final.stats.attempts)
    shared = run(save_at=dates[0])
    np.testing.assert_allclose(shared.ys, np.tile(saved.ys[0], (3, 1)), rtol=1e-13)


# Time in float32. The state follows time itself, y = t, and forgets its own rounding errors at a rate of 10^4.


def follower(t, y, args):
    return 1 + 1e4 * (t - y)


def test_fixed_steps_do_not_drift_in_float32() -> None:
    """A million steps. A running sum of float32 steps would arrive a percent away from t1."""
    count = 1_000_000
    summed = np.add.accumulate(np.full(count, 1 / count, np.float32), dtype=np.float32)[-1]
    assert abs(summed - 1) > 5e-3
    for step in (pk.Fixed(count), pk.Fixed(1 / count)):
        solution = pk.solve(
            follower,
            np.float32(0),
            0.0,
            1.0,
            method=pk.euler,
            step=step,
            adjoint=pk.ForwardOnly(),
            max_steps=2 * count,
        )
        assert solution.ys.dtype == np.float32 and solution.stats.attempts == count
        np.testing.assert_allclose(solution.ys, 1.0, rtol=1e-5)


def test_adaptive_steps_do_not_drift_in_float32() -> None:
    """10^5 steps of `dtmax`: t1 is reached after exactly that many. A running sum in float32 would need hundreds more."""
    count = 100_000
    summed = np.add.accumulate(np.full(count, 1 / count, np.float32), dtype=np.float32)[-1]
    assert abs(summed - 1) * count > 50
    step = pk.Adaptive(rtol=1e-2, atol=1e-2, dtmax=1 / count)
    dates = np.array([0.1, 0.5, 0.9], np.float32)
    solution = pk.solve(
        follower, np.float32(0), 0.0, 1.0, method=pk.heun, step=step, dt0=1 / count, save_at=dates, max_steps=2 * count,
        adjoint=pk.ForwardOnly(),
    )  # fmt: skip
    assert solution.stats.rejected == 0
    assert abs(int(solution.stats.accepted) - count) <= 1
    np.testing.assert_allclose(solution.ys, dates, rtol=0, atol=2e-6)
