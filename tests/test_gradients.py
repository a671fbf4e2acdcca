"""Gradients against diffrax: the same method, controller, tolerances and first step give the same steps and, since both hold
step sizes constant, the same gradient of the discrete solution."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from problems import Problem

import pykernels as pk

LANES = 3
DT0 = 0.01
MAX_STEPS = 256
_SOLVERS = {
    "bosh3": diffrax.Bosh3,
    "tsit5": diffrax.Tsit5,
    "dopri5": diffrax.Dopri5,
    "dopri8": diffrax.Dopri8,
}


def loss(ys: Any) -> jax.Array:
    """A quadratic form of all leaves, with weights of both signs."""
    return sum(jnp.sum(np.sin(1.0 + np.arange(x.size)).reshape(x.shape) * x**2) for x in jax.tree.leaves(ys))


def lane_losses(ys: Any) -> jax.Array:
    return jnp.sum(jax.vmap(loss)(ys))


def on_device(tree: Any) -> Any:
    return jax.tree.map(jnp.asarray, tree)


def stack(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def lane_of(tree: Any, i: int) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf[i]), tree)


def assert_close(ours: Any, theirs: Any, tolerance: float = 1e-9) -> None:
    """Every leaf to `tolerance` of its largest entry."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.max(np.abs(b)))
        assert np.max(np.abs(b)) > 0


@dataclasses.dataclass(frozen=True)
class Case:
    problem: Problem
    method: pk.ButcherTableau
    step: pk.Adaptive
    saved: bool
    shared: bool

    def __str__(self) -> str:
        values, args = "saved" if self.saved else "final", "shared" if self.shared else "lanes"
        return f"{self.problem.name}-{self.method.name}-{values}-{args}"

    @property
    def save_at(self) -> jax.Array | None:
        if not self.saved:
            return None
        return jnp.linspace(self.problem.t0, self.problem.t1, 7)[1:]


def settings(rtol: float, atol: float, p: float = 0.0, i: float = 1.0, d: float = 0.0) -> pk.Adaptive:
    return pk.Adaptive(rtol=rtol, atol=atol, pcoeff=p, icoeff=i, dcoeff=d)


PI = settings(1e-6, 1e-8, p=0.4, i=0.3)
PID = settings(1e-5, 1e-7, p=0.2, i=0.3, d=0.1)
CASES = (
    Case(problems.LORENZ, pk.tsit5, settings(1e-6, 1e-8), saved=True, shared=False),
    Case(problems.LOTKA_VOLTERRA, pk.bosh3, settings(1e-4, 1e-6), saved=False, shared=True),
    Case(problems.PENDULUM, pk.dopri5, PI, saved=False, shared=True),
    Case(problems.KEPLER, pk.bosh3, settings(1e-4, 1e-6), saved=False, shared=False),
    Case(problems.FORCED_OSCILLATOR, pk.tsit5, PID, saved=True, shared=False),
    Case(problems.SIR, pk.dopri5, settings(1e-6, 1e-8), saved=False, shared=False),
    Case(problems.COUPLED, pk.tsit5, PI, saved=True, shared=True),
    Case(problems.PERCEPTRON, pk.dopri8, settings(1e-7, 1e-9), saved=True, shared=True),
)


def diffrax_solve(
    problem: Problem, method: pk.ButcherTableau, controller: Any, t0: Any, t1: Any, dt0: Any, save_at: Any, y0: Any,
    args: Any,
) -> Any:  # fmt: skip
    saveat = diffrax.SaveAt(t1=True) if save_at is None else diffrax.SaveAt(ts=save_at)
    term, solver = diffrax.ODETerm(problem.field), _SOLVERS[method.name]()
    # A checkpoint per step: where diffrax recomputes steps, its rounding differs between the passes, and with it the step
    # sizes (by eps / tol), so that its gradient is good to some 1e-9 only.
    adjoint = diffrax.RecursiveCheckpointAdjoint(checkpoints=MAX_STEPS)
    solution = diffrax.diffeqsolve(
        term,
        solver,
        t0,
        t1,
        dt0,
        y0,
        args,
        saveat=saveat,
        stepsize_controller=controller,
        adjoint=adjoint,
        max_steps=MAX_STEPS,
    )
    return jax.tree.map(lambda y: y[0], solution.ys) if save_at is None else solution.ys, solution.stats


def diffrax_controller(step: pk.Adaptive) -> diffrax.PIDController:
    return diffrax.PIDController(
        rtol=step.rtol, atol=step.atol, pcoeff=step.pcoeff, icoeff=step.icoeff, dcoeff=step.dcoeff
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_and_steps_are_those_of_diffrax(case: Case) -> None:
    problem, save_at = case.problem, case.save_at
    y0s = on_device(problems.spread(problem.y0(), LANES))
    args = on_device(problem.args() if case.shared else problems.spread(problem.args(), LANES, seed=1))

    def ours(y0s: Any, args: Any) -> Any:
        solution = pk.solve_ensemble(
            problem.field, y0s, problem.t0, problem.t1, args, in_axes=(0, None if case.shared else 0),
            method=case.method, step=case.step, dt0=DT0, save_at=save_at, max_steps=MAX_STEPS,
        )  # fmt: skip
        return lane_losses(solution.ys), solution

    def theirs(y0: Any, args: Any) -> Any:
        ys, stats = diffrax_solve(
            problem,
            case.method,
            diffrax_controller(case.step),
            problem.t0,
            problem.t1,
            DT0,
            save_at,
            y0,
            args,
        )
        return loss(ys), (ys, stats)

    (y0s_ct, args_ct), solution = jax.jit(jax.grad(ours, argnums=(0, 1), has_aux=True))(y0s, args)
    oracle = jax.jit(jax.grad(theirs, argnums=(0, 1), has_aux=True))
    results = [oracle(lane_of(y0s, i), args if case.shared else lane_of(args, i)) for i in range(LANES)]
    assert np.all(solution.ok)
    assert_close(solution.ys, stack([ys for _, (ys, _) in results]))
    assert_close(y0s_ct, stack([ct for (ct, _), _ in results]))
    args_cts = stack([ct for (_, ct), _ in results])
    assert_close(args_ct, jax.tree.map(lambda ct: jnp.sum(ct, axis=0), args_cts) if case.shared else args_cts)
    for i, (_, (_, stats)) in enumerate(results):
        assert solution.stats.accepted[i] == stats["num_accepted_steps"]
        assert solution.stats.rejected[i] == stats["num_rejected_steps"]
        assert solution.stats.attempts[i] == stats["num_steps"]


def test_the_cases_cover_rejections_and_every_kind_of_argument() -> None:
    """The comparison above would be blind to rejected steps if none of its solves had any."""
    assert {(case.saved, case.shared) for case in CASES} == {
        (a, b) for a in (True, False) for b in (True, False)
    }
    assert {case.problem for case in CASES} == set(problems.PROBLEMS)
    rejected = {
        case.problem.name: int(
            pk.solve(
                case.problem.field, case.problem.y0(), case.problem.t0, case.problem.t1, case.problem.args(),
                method=case.method, step=case.step, dt0=DT0, max_steps=MAX_STEPS,
            ).stats.rejected
        )
        for case in CASES
        if case.problem in (problems.LOTKA_VOLTERRA, problems.KEPLER)
    }  # fmt: skip
    assert all(count > 0 for count in rejected.values()), rejected


def _time_gradients(problem: Problem, method: pk.ButcherTableau, step: pk.Adaptive, saved: bool) -> Any:
    """Our and diffrax's gradient functions with respect to (t0, t1, dt0, save_at, y0), for one trajectory."""
    args = on_device(problem.args())

    def theirs(times: Any, y0: Any) -> Any:
        ys, _ = diffrax_solve(
            problem, method, diffrax_controller(step), times["t0"], times["t1"], times["dt0"],
            times["save_at"] if saved else None, y0, args,
        )  # fmt: skip
        return loss(ys)

    return args, jax.jit(jax.grad(theirs, argnums=(0, 1)))


def _assert_times_close(ours: Any, theirs: Any) -> None:
    """To 1e-9 of the largest of all gradients: the derivative by t1 of a loss on values saved at t1 is of truncation size, a
    difference of two large numbers."""
    scale = max(float(np.max(np.abs(leaf))) for leaf in jax.tree.leaves(theirs))
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-9 * scale, err_msg=name)


def test_gradients_by_all_times_saved_at_both_ends() -> None:
    problem, method, step = problems.FORCED_OSCILLATOR, pk.tsit5, settings(1e-6, 1e-8)
    args, oracle = _time_gradients(problem, method, step, saved=True)
    times = {
        "t0": problem.t0,
        "t1": problem.t1,
        "dt0": 0.02,
        "save_at": np.linspace(problem.t0, problem.t1, 6),
    }
    times, y0 = on_device(times), on_device(problem.y0())

    def ours(times: Any, y0: Any) -> Any:
        return loss(
            pk.solve(problem.field, y0, args=args, method=method, step=step, max_steps=MAX_STEPS, **times).ys
        )

    mine, mine_y = jax.jit(jax.grad(ours, argnums=(0, 1)))(times, y0)
    exact, exact_y = oracle(times, y0)
    _assert_times_close({**mine, "y0": mine_y}, {**exact, "y0": exact_y})
    assert abs(exact["dt0"]) > 0 and abs(exact["t0"]) > 1e-3 and np.all(np.abs(exact["save_at"]) > 1e-3)


def test_gradients_by_times_of_each_trajectory() -> None:
    problem, method, step = problems.LORENZ, pk.bosh3, settings(1e-4, 1e-6)
    args, oracle = _time_gradients(problem, method, step, saved=False)
    times = {
        "t0": np.array([0.0, 0.1, -0.2]),
        "t1": np.array([1.0, 0.7, 0.4]),
        "dt0": np.array([0.01, 0.005, 0.02]),
    }
    times, y0s = on_device(times), on_device(problems.spread(problem.y0(), LANES))

    def ours(times: Any, y0s: Any) -> Any:
        ys = pk.solve_ensemble(
            problem.field, y0s, args=args, method=method, step=step, max_steps=MAX_STEPS, **times
        ).ys
        return lane_losses(ys)

    mine, mine_y = jax.jit(jax.grad(ours, argnums=(0, 1)))(times, y0s)
    for i in range(LANES):
        exact, exact_y = oracle(lane_of(times, i), lane_of(y0s, i))
        assert_close({**lane_of(mine, i), "y0": mine_y[i]}, {**exact, "y0": exact_y})


@functools.cache
def _stepping_oracle() -> Any:
    """diffrax along given times; its gradient by them, the initial state and the parameters."""
    problem = problems.FORCED_OSCILLATOR

    def theirs(times: Any, y0: Any, args: Any) -> Any:
        controller = diffrax.StepTo(times)
        ys, _ = diffrax_solve(problem, pk.dopri5, controller, times[0], times[-1], None, None, y0, args)
        return loss(ys), ys

    return jax.jit(jax.grad(theirs, argnums=(0, 1, 2), has_aux=True))


@pytest.mark.parametrize("step", [pk.Fixed(24), pk.Fixed(0.13)], ids=str)
def test_fixed_steps_and_their_gradients_are_those_of_diffrax(step: pk.Fixed) -> None:
    """24 equal steps; 23 steps of 0.13 and a shortened one. (diffrax's ConstantStepSize takes other steps: the first as
    asked, the others equal.)"""
    problem = problems.FORCED_OSCILLATOR
    y0, args = on_device((problem.y0(), problem.args()))

    def dates(t0: jax.Array, t1: jax.Array) -> jax.Array:
        if step.steps is not None:
            return t0 + (t1 - t0) * jnp.linspace(0.0, 1.0, 25)
        return jnp.append(t0 + 0.13 * jnp.arange(24.0), t1)

    def ours(t0: Any, t1: Any, y0: Any, args: Any) -> Any:
        solution = pk.solve(problem.field, y0, t0, t1, args, method=pk.dopri5, step=step)
        return loss(solution.ys), solution

    ends = jnp.asarray(problem.t0), jnp.asarray(problem.t0 + 3.0)
    (*mine, y0_ct, args_ct), solution = jax.jit(jax.grad(ours, argnums=(0, 1, 2, 3), has_aux=True))(
        *ends, y0, args
    )
    times, pull = jax.vjp(dates, *ends)
    (times_ct, *exact), ys = _stepping_oracle()(times, y0, args)
    assert solution.stats.attempts == 24
    assert_close(solution.ys, ys, 1e-13)
    assert_close((tuple(mine), y0_ct, args_ct), (pull(times_ct), *exact), 1e-11)


def test_closed_over_parameters() -> None:
    """A field may close over traced values: the gradient by them is that by the same values as args."""
    problem = problems.LOTKA_VOLTERRA
    y0s, rates = on_device((problems.spread(problem.y0(), LANES), problem.args()))
    run = functools.partial(pk.solve_ensemble, y0s=y0s, t0=0.0, t1=3.0, method=pk.bosh3, max_steps=256)

    def passed(rates: jax.Array) -> jax.Array:
        return lane_losses(run(problem.field, args=rates).ys)

    def closed_over(rates: jax.Array) -> jax.Array:
        def field(t: Any, y: Any, args: None) -> Any:
            return problem.field(t, y, rates)

        return lane_losses(run(field).ys)

    assert_close(jax.jit(jax.grad(closed_over))(rates), jax.grad(passed)(rates), 1e-12)
