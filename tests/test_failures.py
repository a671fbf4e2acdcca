"""Trajectories that fail: they say why, stop alone, and change no other lane and no shared gradient by one bit."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pykernels as pk
from pykernels import Status

PLANS = {
    "components": pk.Config(plan="lanes", lift="components", block=4),
    "arrays": pk.Config(plan="lanes", lift="arrays", block=4),
    "array": pk.Config(plan="array", block=4),
}
plans = pytest.mark.parametrize("config", PLANS.values(), ids=PLANS)


def zoo(t, y, args):
    """Grows like y^2 to a pole if `growth`, oscillates with `frequency`, is not a number after `defined_until`."""
    growth, frequency, defined_until = args
    return growth * y**2 + jnp.cos(frequency * t) + 0.0 * jnp.sqrt(defined_until - t)


#: Per trajectory: y0, t1, (growth, frequency, defined_until), status with adaptive steps, with fixed steps.
ANIMALS = {
    "harmless": (1.0, 1.0, (0.0, 1.0, 9.0), Status.SUCCESS, Status.SUCCESS),
    "pole": (2.0, 1.0, (1.0, 1.0, 9.0), Status.STEP_TOO_SMALL, Status.NON_FINITE),
    "nan_at_once": (1.0, 1.0, (0.0, 1.0, -1.0), Status.NON_FINITE, Status.NON_FINITE),
    "nan_later": (1.0, 1.0, (0.0, 1.0, 0.5), Status.NON_FINITE, Status.NON_FINITE),
    "nan_state": (np.nan, 1.0, (0.0, 1.0, 9.0), Status.NON_FINITE, Status.NON_FINITE),
    "infinite_state": (np.inf, 1.0, (0.0, 1.0, 9.0), Status.NON_FINITE, Status.NON_FINITE),
    "nan_time": (1.0, np.nan, (0.0, 1.0, 9.0), Status.NON_FINITE, Status.NON_FINITE),
    "long": (1.0, 8.0, (0.0, 600.0, 9.0), Status.MAX_STEPS, Status.MAX_STEPS),
    "nothing_to_do": (1.0, 0.0, (0.0, 1.0, 9.0), Status.SUCCESS, Status.SUCCESS),
}
Y0 = np.array([animal[0] for animal in ANIMALS.values()])
T1 = np.array([animal[1] for animal in ANIMALS.values()])
ARGS = tuple(np.array(column) for column in zip(*[animal[2] for animal in ANIMALS.values()], strict=True))
STEPS = {"adaptive": pk.Adaptive(rtol=1e-3, atol=1e-5), "fixed": pk.Fixed(0.01)}
EXPECTED = {
    "adaptive": [animal[3] for animal in ANIMALS.values()],
    "fixed": [animal[4] for animal in ANIMALS.values()],
}


def run_zoo(kind: str, config: pk.Config | None = None, **options: Any) -> pk.Solution:
    return pk.solve_ensemble(
        zoo,
        Y0,
        0.0,
        T1,
        ARGS,
        in_axes=(0, 0),
        method=pk.bosh3,
        step=STEPS[kind],
        max_steps=500,
        config=config,
        **options,
    )


@plans
@pytest.mark.parametrize("kind", STEPS)
def test_statuses(kind: str, config: pk.Config) -> None:
    solution = run_zoo(kind, config, throw=False)
    assert [Status(s) for s in solution.status.tolist()] == EXPECTED[kind]
    np.testing.assert_array_equal(solution.ok, solution.status == Status.SUCCESS)
    np.testing.assert_array_equal(np.isnan(solution.ys), ~np.asarray(solution.ok))
    np.testing.assert_allclose(solution.ys[0], 1 + np.sin(1.0), rtol=1e-3)
    assert solution.ys[-1] == 1.0
    stats = solution.stats
    np.testing.assert_array_equal(stats.attempts, stats.accepted + stats.rejected)
    assert stats.attempts[list(ANIMALS).index("long")] == 500
    assert stats.attempts[-1] == 0


def test_saved_values_of_failed_trajectories_are_nan() -> None:
    """All of them: also those saved before the failure."""
    lanes = [0, 1, 3, 4]
    solution = pk.solve_ensemble(
        zoo, Y0[lanes], 0.0, 1.0, tuple(a[lanes] for a in ARGS), in_axes=(0, 0), method=pk.bosh3,
        save_at=np.array([0.0, 0.1, 1.0]), throw=False,
    )  # fmt: skip
    np.testing.assert_array_equal(solution.ok, [True, False, False, False])
    np.testing.assert_allclose(solution.ys[0], 1 + np.sin([0.0, 0.1, 1.0]), rtol=1e-5)
    assert np.all(np.isnan(solution.ys[1:]))


def test_smallest_step() -> None:
    """dtmin is no clamp: a trajectory that would need a smaller step stops."""
    solution = pk.solve_ensemble(
        zoo, Y0[:2], 0.0, 1.0, tuple(a[:2] for a in ARGS), in_axes=(0, 0), method=pk.bosh3, throw=False,
        step=pk.Adaptive(rtol=1e-3, atol=1e-5, dtmin=1e-3),
    )  # fmt: skip
    assert [Status(s) for s in solution.status.tolist()] == [Status.SUCCESS, Status.STEP_TOO_SMALL]
    assert solution.stats.attempts[1] < run_zoo("adaptive", throw=False).stats.attempts[1]


def test_the_error_names_trajectories_and_reasons() -> None:
    with pytest.raises(pk.SolveError) as caught:
        run_zoo("adaptive")
    message, names = str(caught.value), list(ANIMALS)
    np.testing.assert_array_equal(caught.value.status, EXPECTED["adaptive"])
    assert message.startswith("7 of 9 trajectories failed")
    assert f"max_steps): trajectory {names.index('long')}" in message
    assert f"dtmin or rounding: trajectory {names.index('pole')}" in message
    assert "not finite: trajectory 2, 3, 4, 5, 6" in message
    assert "throw=False" in message


def test_the_error_of_a_single_trajectory() -> None:
    bad = tuple(a[1] for a in ARGS)
    with pytest.raises(
        pk.SolveError, match="1 of 1 trajectories failed; the step would have to go under"
    ) as caught:
        pk.solve(zoo, Y0[1], 0.0, 1.0, bad, method=pk.bosh3)
    assert caught.value.status == Status.STEP_TOO_SMALL and "trajectory 0" not in str(caught.value)
    solution = pk.solve(zoo, Y0[1], 0.0, 1.0, bad, method=pk.bosh3, throw=False)
    assert np.isnan(solution.ys) and solution.status == Status.STEP_TOO_SMALL and not solution.ok


def test_transformations_do_not_raise() -> None:
    """Under jit and vmap nothing is known yet: the values tell."""
    good, bad = (tuple(a[i] for a in ARGS) for i in (0, 1))

    def value(y0: jax.Array, args: Any) -> jax.Array:
        return pk.solve(zoo, y0, 0.0, 1.0, args, method=pk.bosh3).ys

    assert np.isnan(jax.jit(value)(2.0, bad))
    gradient = jax.jit(jax.grad(value))
    assert np.isnan(gradient(2.0, bad)) and np.isfinite(gradient(2.0, good))
    both = jax.vmap(value)(
        np.array([1.0, 2.0]), tuple(np.array(pair) for pair in zip(good, bad, strict=True))
    )
    np.testing.assert_array_equal(np.isnan(both), [False, True])


# One trajectory of a small ensemble runs into a pole. `w` is shared, `a` has lanes.
LANES, BAD = 7, 4


def growing(t, y, args):
    return args["w"] @ y + args["a"] * y**2


AXES = (0, {"w": None, "a": 0})
SHARED = {"w": np.array([[-1.0, 0.5], [-0.3, -0.8]]), "a": np.linspace(0.5, 1.0, LANES)}
HARMLESS = np.linspace(0.1, 0.4, 2 * LANES).reshape(LANES, 2)
FATAL = np.where(np.arange(LANES)[:, None] == BAD, 50.0, HARMLESS)
OTHERS = np.arange(LANES) != BAD


@functools.cache
def gradient_of(kind: str, config: pk.Config, adjoint: Any, saves: bool = False) -> Any:
    """(y0s, args, mask, use_ok) -> gradient by (y0s, args) of a loss on the trajectories in `mask` (and, if `use_ok`, that
    arrived), and the solution."""
    step = pk.Adaptive(rtol=1e-4, atol=1e-6) if kind == "adaptive" else pk.Fixed(20)

    def loss(y0s: jax.Array, args: Any, mask: jax.Array, use_ok: jax.Array) -> Any:
        solution = pk.solve_ensemble(
            growing, y0s, 0.0, 1.0, args, in_axes=AXES, method=pk.bosh3, step=step, adjoint=adjoint, max_steps=128,
            config=config, save_at=np.array([0.0, 0.01, 0.7]) if saves else None,
        )  # fmt: skip
        kept = mask & (solution.ok | ~use_ok)
        ys = jnp.where(kept.reshape(LANES, *(1,) * (solution.ys.ndim - 1)), solution.ys, 0.0)
        return jnp.sum(ys**3), solution

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))


ADJOINTS = [(pk.Milestones(), name, False) for name in PLANS]
ADJOINTS += [(pk.Milestones(), name, True) for name in ("components", "arrays")]
ADJOINTS += [(pk.BoundedTree(), name, False) for name in ("components", "arrays")]


@pytest.mark.parametrize("kind", ["adaptive", "fixed"])
@pytest.mark.parametrize(
    ("adjoint", "plan", "saves"),
    ADJOINTS,
    ids=[f"{type(a).__name__}-{n}{'-saved' * s}" for a, n, s in ADJOINTS],
)
def test_gradients_beside_a_failed_trajectory(kind: str, adjoint: Any, plan: str, saves: bool) -> None:
    gradient = gradient_of(kind, PLANS[plan], adjoint, saves)
    everyone = np.ones(LANES, bool)
    (wanted_y0, wanted), expected = gradient(HARMLESS, SHARED, OTHERS, False)
    (y0, args), solution = gradient(FATAL, SHARED, everyone, True)
    np.testing.assert_array_equal(expected.ok, everyone)
    np.testing.assert_array_equal(solution.ok, OTHERS)
    np.testing.assert_array_equal(solution.ys[OTHERS], expected.ys[OTHERS])
    # Unused, the failed trajectory contributes exactly zero: to the shared matrix, to its own arguments, to everyone's.
    np.testing.assert_array_equal(args["w"], wanted["w"])
    np.testing.assert_array_equal(y0, wanted_y0)
    np.testing.assert_array_equal(args["a"], wanted["a"])
    assert np.all(np.isfinite(args["w"])) and np.all(np.asarray(args["w"]) != 0) and not np.any(y0[BAD])
    # Used, it makes its own and the shared gradients NaN, but nobody else's.
    (y0, args), _ = gradient(FATAL, SHARED, everyone, False)
    (wanted_y0, wanted), _ = gradient(HARMLESS, SHARED, everyone, False)
    assert np.all(np.isnan(y0[BAD])) and np.isnan(args["a"][BAD]) and np.all(np.isnan(args["w"]))
    np.testing.assert_array_equal(y0[OTHERS], wanted_y0[OTHERS])
    np.testing.assert_array_equal(args["a"][OTHERS], wanted["a"][OTHERS])


@pytest.mark.parametrize("kind", ["adaptive", "fixed"])
def test_forward_mode_beside_a_failed_trajectory(kind: str) -> None:
    step = pk.Adaptive(rtol=1e-4, atol=1e-6) if kind == "adaptive" else pk.Fixed(20)

    def values(y0s: jax.Array, args: Any) -> jax.Array:
        return pk.solve_ensemble(
            growing,
            y0s,
            0.0,
            1.0,
            args,
            in_axes=AXES,
            method=pk.bosh3,
            step=step,
            adjoint=pk.ForwardOnly(),
            max_steps=128,
        ).ys

    push = jax.jit(
        lambda y0s: jax.jvp(values, (y0s, SHARED), (jnp.ones_like(y0s), jax.tree.map(np.ones_like, SHARED)))
    )
    ys, tangents = push(FATAL)
    wanted_ys, wanted_tangents = push(HARMLESS)
    assert np.all(np.isnan(ys[BAD])) and np.all(np.isnan(tangents[BAD]))
    np.testing.assert_array_equal(ys[OTHERS], wanted_ys[OTHERS])
    np.testing.assert_array_equal(tangents[OTHERS], wanted_tangents[OTHERS])
    assert np.all(np.isfinite(tangents[OTHERS]))


@pytest.mark.parametrize("kind", ["adaptive", "fixed"])
def test_one_of_256_diverges(kind: str) -> None:
    """The other 255 keep every bit of their values, counts and gradients."""
    lanes, bad = 256, 100
    step = pk.Adaptive(rtol=1e-5, atol=1e-7) if kind == "adaptive" else pk.Fixed(40)
    harmless, rates = np.linspace(0.1, 0.6, lanes), np.linspace(0.5, 1.0, lanes)
    others = np.arange(lanes) != bad

    def field(t, y, rate):
        return rate * y**2 - 0.1 * y

    @jax.jit
    def everything(y0s: jax.Array, rates: jax.Array) -> Any:
        def values(y0s: jax.Array, rates: jax.Array) -> Any:
            solution = pk.solve_ensemble(
                field, y0s, 0.0, 1.0, rates, in_axes=(0, 0), method=pk.tsit5, step=step, max_steps=400
            )
            return solution.ys, solution

        ys, pull, solution = jax.vjp(values, y0s, rates, has_aux=True)
        return ys, pull(np.cos(np.arange(lanes))), solution.stats, solution.ok

    ys, gradients, stats, ok = everything(np.where(others, harmless, 1e3), rates)
    wanted_ys, wanted_gradients, wanted_stats, all_ok = everything(harmless, rates)
    np.testing.assert_array_equal(ok, others)
    assert np.all(all_ok) and np.isnan(ys[bad]) and all(np.isnan(ct[bad]) for ct in gradients)
    for mine, wanted in zip(
        jax.tree.leaves((ys, gradients, stats)),
        jax.tree.leaves((wanted_ys, wanted_gradients, wanted_stats)),
        strict=True,
    ):
        np.testing.assert_array_equal(mine[others], wanted[others])
    assert all(np.all(np.isfinite(ct[others])) for ct in gradients)
