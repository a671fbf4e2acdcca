"""One gradient, many ways to it: finite differences, the three adjoints, the plans, the reference."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from jax.flatten_util import ravel_pytree

import pykernels as pk
from pykernels import primitives, reference
from pykernels.solve import _Problem

LANES = 5


def loss(ys: Any) -> jax.Array:
    return sum(jnp.sum(np.sin(1.0 + np.arange(x.size)).reshape(x.shape) * x**2) for x in jax.tree.leaves(ys))


def assert_close(ours: Any, theirs: Any, tolerance: float) -> None:
    """Every leaf to `tolerance` of its largest entry."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.max(np.abs(b)))
        assert np.max(np.abs(b)) > 0


@pytest.mark.parametrize(
    ("problem", "method"),
    [(problems.PENDULUM, pk.rk4), (problems.FORCED_OSCILLATOR, pk.heun)],
    ids=["pendulum-rk4", "forced_oscillator-heun"],
)
def test_finite_differences(problem: problems.Problem, method: pk.ButcherTableau) -> None:
    """Fourth-order central differences, all as lanes of one ensemble. Fixed steps: the discrete solution is smooth."""
    inputs = {
        "y0": problem.y0(),
        "args": problem.args(),
        "t0": np.array(problem.t0),
        "t1": np.array(problem.t0 + 1.5),
    }
    flat, unravel = ravel_pytree(jax.tree.map(jnp.asarray, inputs))

    def losses(points: jax.Array) -> jax.Array:
        at = jax.vmap(unravel)(points)
        solution = pk.solve_ensemble(
            problem.field,
            at["y0"],
            at["t0"],
            at["t1"],
            at["args"],
            in_axes=(0, 0),
            method=method,
            step=pk.Fixed(20),
        )
        return jax.vmap(loss)(solution.ys)

    width, directions = 4e-4, np.eye(flat.size)
    offsets = np.array([-2.0, -1.0, 1.0, 2.0])[:, None, None] * width * directions
    values = np.asarray(losses((flat + offsets).reshape(-1, flat.size))).reshape(4, flat.size)
    differences = np.array([1.0, -8.0, 8.0, -1.0]) @ values / (12 * width)
    gradient = jax.grad(lambda point: losses(point[None])[0])(flat)
    # Truncation is of size width^4, rounding of size eps / width.
    np.testing.assert_allclose(gradient, differences, rtol=0, atol=1e-10 * np.max(np.abs(differences)))


def _inputs() -> Any:
    """Everything that is differentiable in a call: a shared and a lane argument, states and times of each trajectory."""
    problem = problems.FORCED_OSCILLATOR
    stiffness, damping, force, frequency = problem.args()
    return jax.tree.map(
        jnp.asarray,
        {
            "y0s": problems.spread(problem.y0(), LANES),
            "args": (stiffness, damping * np.linspace(0.5, 1.5, LANES), force, frequency),
            "t0": np.linspace(0.0, 0.4, LANES),
            "t1": np.array(3.0),
            "save_at": np.array([0.4, 0.5, 1.9, 3.0]),
        },
    )


def _run(inputs: Any, adjoint: Any, step: Any, saved: bool, config: pk.Config | None = None) -> pk.Solution:
    return pk.solve_ensemble(
        problems.FORCED_OSCILLATOR.field, inputs["y0s"], inputs["t0"], inputs["t1"], inputs["args"],
        in_axes=(0, (None, 0, None, None)), method=pk.bosh3, step=step, adjoint=adjoint, max_steps=64,
        save_at=inputs["save_at"] if saved else None, config=config,
    )  # fmt: skip


@functools.cache
def _gradient(adjoint: Any, step: Any, saved: bool, config: pk.Config | None = None) -> Any:
    def total(inputs: Any) -> Any:
        solution = _run(inputs, adjoint, step, saved, config)
        return jnp.sum(jax.vmap(loss)(solution.ys)), solution

    gradient, solution = jax.jit(jax.grad(total, has_aux=True))(_inputs())
    assert np.all(solution.ok)
    # Times are compared together: the derivative by t1 of values saved at t1 is of truncation size, a difference of others.
    times = [gradient.pop(name).reshape(-1) for name in ("t0", "t1", "save_at")]
    return {**gradient, "times": jnp.concatenate(times if saved else times[:2])}, solution


ADAPTIVE = pk.Adaptive(rtol=1e-4, atol=1e-6, pcoeff=0.2, icoeff=0.3, dcoeff=0.1)
KINDS = pytest.mark.parametrize(
    ("step", "saved"),
    [(ADAPTIVE, True), (pk.Fixed(20), False), (pk.Fixed(0.11), True)],
    ids=["adaptive-saved", "fixed-final", "fixed-size-saved"],
)


@KINDS
def test_the_bounded_tree_agrees_with_milestones(step: Any, saved: bool) -> None:
    ours, solution = _gradient(pk.Milestones(), step, saved)
    theirs, other = _gradient(pk.BoundedTree(branching=4), step, saved)
    assert_close(ours, theirs, 1e-11)
    assert_close(solution.ys, other.ys, 1e-13)
    for mine, yours in zip(jax.tree.leaves(solution.stats), jax.tree.leaves(other.stats), strict=True):
        np.testing.assert_array_equal(mine, yours)


@KINDS
def test_forward_mode_agrees_with_milestones(step: Any, saved: bool) -> None:
    gradient, _ = _gradient(pk.Milestones(), step, saved)
    inputs = _inputs()
    flat, unravel = ravel_pytree(inputs)
    directions = np.random.default_rng(3).normal(size=(4, flat.size))

    def total(inputs: Any) -> Any:
        return jnp.sum(jax.vmap(loss)(_run(inputs, pk.ForwardOnly(), step, saved).ys))

    push = jax.jit(lambda d: jax.vmap(lambda d: jax.jvp(total, (inputs,), (unravel(d),))[1])(d))
    times = jnp.append(gradient["times"], jnp.zeros(0 if saved else 4))
    t0, t1, save_at = times[:LANES], times[LANES], times[LANES + 1 :]
    flat_gradient = ravel_pytree(
        {"y0s": gradient["y0s"], "args": gradient["args"], "t0": t0, "t1": t1, "save_at": save_at}
    )[0]
    expected = directions @ flat_gradient
    np.testing.assert_allclose(push(directions), expected, rtol=0, atol=1e-11 * np.max(np.abs(expected)))


@pytest.mark.parametrize(("count", "scratch"), [(3, 2), (5, 1), (64, 64)])
def test_any_milestone_storage_gives_the_same_gradient(count: int, scratch: int) -> None:
    """Few milestones: thinned buffers and nested replays."""
    expected, solution = _gradient(pk.Milestones(), ADAPTIVE, True)
    gradient, _ = _gradient(pk.Milestones(count, scratch), ADAPTIVE, True)
    assert np.max(solution.stats.attempts) > 3 * 2
    assert_close(gradient, expected, 1e-12)


PLANS = {
    "components": pk.Config(plan="lanes", lift="components", block=2),
    "arrays": pk.Config(plan="lanes", lift="arrays", block=2),
    "array": pk.Config(plan="array", block=2),
    "native": pk.Config(plan="lanes", block=2),
}


@pytest.mark.parametrize(
    ("step", "saved"), [(ADAPTIVE, True), (pk.Fixed(20), False)], ids=["adaptive", "fixed"]
)
@pytest.mark.parametrize("config", PLANS.values(), ids=PLANS)
def test_plans_agree(config: pk.Config, step: Any, saved: bool) -> None:
    """Also with blocks of two for five trajectories."""
    expected, solution = _gradient(pk.Milestones(), step, saved)
    gradient, other = _gradient(pk.Milestones(), step, saved, config)
    assert_close(other.ys, solution.ys, 1e-13)
    assert_close(gradient, expected, 1e-11)
    # How often the field is evaluated is the plan's own business.
    for name in ("attempts", "accepted", "rejected"):
        np.testing.assert_array_equal(getattr(other.stats, name), getattr(solution.stats, name))


def _decay_to_a_pole(t, y, args):
    return {"a": args["w"] @ y["a"] + jnp.cos(t), "b": args["k"] * y["b"] ** 2}


ORACLE_STEPS = {"adaptive": pk.Adaptive(rtol=1e-3, atol=1e-5), "n": pk.Fixed(8), "dt": pk.Fixed(0.15)}
BAD, GOOD = 2, np.array([0, 1, 3])


def _call(kind: str, config: pk.Config) -> _Problem:
    """Four trajectories with shared and lane arguments; number 2 runs into a pole."""
    y0s = {"a": np.linspace(-1.0, 1.0, 8).reshape(4, 2), "b": np.array([0.3, 0.5, 40.0, -1.0])}
    args = {"w": np.array([[-0.5, 1.0], [-1.0, 0.1]]), "k": np.array([0.5, 1.0, 1.5, 2.0])}
    method = pk.bosh3 if kind == "adaptive" else pk.heun
    return _Problem.of(
        _decay_to_a_pole, y0s, 0.0, 1.0, args, (0, {"w": None, "k": 0}), method, ORACLE_STEPS[kind], None,
        np.array([0.0, 0.03, 0.04, 0.77, 1.0]), 24, config,
    )  # fmt: skip


def _values_and_cotangents(solve: Any, spec: Any, inputs: Any) -> Any:
    count = len(spec.field.y_shapes)

    def values(*inputs: jax.Array) -> Any:
        results = solve(inputs)
        return results[:count], results[count:]

    results, pull, counts = jax.vjp(values, *inputs, has_aux=True)
    return results, counts, pull([jnp.where(jnp.isnan(v), 0.0, jnp.cos(v)) for v in results])


@functools.cache
def _oracle(kind: str) -> Any:
    """The reference's values and counts of all trajectories and its cotangents for the good ones alone."""
    problem = _call(kind, PLANS["components"])
    spec, inputs = problem.spec, problem.inputs
    good = [x[..., GOOD] if lane else x for x, lane in zip(inputs, spec.lane, strict=True)]
    run = functools.partial(_values_and_cotangents, lambda inputs: reference.solve(inputs, spec), spec)
    results = jax.jit(lambda inputs: reference.solve(inputs, spec))(inputs)
    return results[:-3], results[-3:], jax.jit(run)(good)[2]


@pytest.mark.parametrize(
    ("kind", "plan"),
    [
        ("adaptive", "components"),
        ("n", "native"),
        ("dt", "native"),
        ("adaptive", "native"),
        ("n", "arrays"),
        ("dt", "array"),
    ],
)
def test_primitives_mean_what_the_reference_says(kind: str, plan: str) -> None:
    """Values, statuses, counts and cotangents; the trajectory that fails is not used."""
    problem = _call(kind, PLANS[plan])
    spec, inputs = problem.spec, problem.inputs
    wanted, (status, attempts, accepted), wanted_cts = _oracle(kind)
    plain = jax.jit(primitives.solve, static_argnums=1)(inputs, spec)
    run = functools.partial(_values_and_cotangents, functools.partial(pk.Milestones().integrate, spec), spec)
    values, counts, cts = jax.jit(run)(inputs)
    assert status[BAD] != 0 and not np.any(status[GOOD])
    for mine, theirs in zip((*counts, *plain[-3:]), (status, attempts, accepted) * 2, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    for mine, theirs in zip((*values, *plain[:-3]), (*wanted, *wanted), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-12, atol=1e-14)
        assert np.all(np.isnan(mine[..., BAD]))
    for mine, theirs, lane in zip(cts, wanted_cts, spec.lane, strict=True):
        if lane:
            assert not np.any(mine[..., BAD])
        good = mine[..., GOOD] if lane else mine
        np.testing.assert_allclose(good, theirs, rtol=0, atol=1e-11 * np.max(np.abs(theirs)))


def test_second_derivatives() -> None:
    """Through the bounded tree: forward over reverse against differences of the gradient."""
    y0 = np.array([0.5, 1.0])

    def total(y0: jax.Array) -> jax.Array:
        return loss(
            pk.solve(
                lambda t, y, args: -(y**2) + y[::-1], y0, 0.0, 1.0, method=pk.heun, step=pk.Fixed(5),
                adjoint=pk.BoundedTree(branching=5), max_steps=5,
            ).ys
        )  # fmt: skip

    gradient = jax.jit(jax.grad(total))
    hessian = jax.jit(jax.jacfwd(jax.grad(total)))(y0)
    width = 1e-4
    differences = [(gradient(y0 + width * e) - gradient(y0 - width * e)) / (2 * width) for e in np.eye(2)]
    np.testing.assert_allclose(hessian, np.transpose(differences), rtol=1e-6)
    np.testing.assert_allclose(hessian, np.transpose(hessian), rtol=1e-12)
