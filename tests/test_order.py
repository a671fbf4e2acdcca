"""Lanes in an order of work: blocks hold trajectories of similar work, and nothing but the time it takes shows it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_failures import EXPECTED, run_zoo

import pykernels as pk
from pykernels import Status, primitives
from pykernels.kernels import cpu
from pykernels.kernels.stepper import Solve
from pykernels.order import _most_first, integrate_in_order, lane_order, pilot

LANES = 67
WARP = 32
CONFIGS = [
    pytest.param(
        pk.Config(runner="native"),
        id="native",
        marks=pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable())),
    ),
    pytest.param(pk.Config(runner="xla", block=8), id="xla"),
    pytest.param(pk.Config(plan="array", block=8), id="array"),
]
NAMES = ("y0s", "t0", "t1", "dt0", "save_at", "frequency", "damping", "shared")
OWN = [name != "shared" for name in NAMES]


def field(t, y, args):
    """Oscillators: attempts go with the frequency. `turns` is an integer that lanes have of their own."""
    w, d = args["frequency"], args["damping"] + args["shared"]
    return {"x": w * args["turns"].astype(t.dtype) * y["v"] - d * y["x"], "v": -w * y["x"] + 0.1 * jnp.cos(t)}


@functools.cache
def inputs() -> tuple[Any, ...]:
    """Everything that a lane can have of its own, and one shared argument; in the order of NAMES."""
    rng = np.random.default_rng(5)
    t0, t1 = rng.uniform(0.0, 0.2, LANES), rng.uniform(1.0, 2.0, LANES)
    y0s = {"x": rng.normal(size=LANES), "v": rng.normal(size=LANES)}
    dates = np.linspace(t0, t1, 4, axis=1)
    frequency, damping = np.exp(rng.uniform(0.0, 3.0, LANES)), rng.uniform(0.0, 0.5, LANES)
    return y0s, t0, t1, rng.uniform(1e-3, 1e-2, LANES), dates, frequency, damping, np.asarray(0.1)


def solved(order: Any, *values: Any, **settings: Any) -> pk.Solution:
    y0s, t0, t1, dt0, dates, frequency, damping, shared = values
    turns = np.arange(LANES, dtype=np.int32) % 2 + 1
    args = {"frequency": frequency, "damping": damping, "shared": shared, "turns": turns}
    axes = {"frequency": 0, "damping": 0, "shared": None, "turns": 0}
    return pk.solve_ensemble(
        field, y0s, t0, t1, args, in_axes=(0, axes), dt0=dt0, save_at=dates, order=order,
        **{"method": pk.bosh3, "step": pk.Adaptive(1e-4, 1e-4), "max_steps": 512, **settings},
    )  # fmt: skip


def loss(order: Any, *values: Any, **settings: Any) -> jax.Array:
    ys = solved(order, *values, **settings).ys
    return jnp.sum(jnp.sin(3 * ys["x"])) + jnp.sum(ys["v"] ** 2)


def orders() -> dict[str, Any]:
    """Every way to ask for another order."""
    attempts = solved(None, *inputs()).stats.attempts
    return {
        "work": "work",
        "counts": attempts,
        "numpy": np.asarray(attempts),
        "floats": -np.asarray(attempts) / 3,
    }


def assert_same_bits(got: Any, want: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert np.any(np.asarray(jax.tree.leaves(want)[0]) != 0)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


def assert_same_gradients(got: Sequence[Any], want: Sequence[Any]) -> None:
    """Bit for bit where lanes have their own, equal to rounding where lanes are summed."""
    for own, a, b in zip(OWN, got, want, strict=True):
        if own:
            assert_same_bits(a, b)
        else:
            np.testing.assert_allclose(a, b, rtol=1e-12)


@pytest.mark.parametrize("config", CONFIGS)
def test_values_gradients_and_stats_are_those_without_an_order(config: pk.Config) -> None:
    plain, every = solved(None, *inputs(), config=config), tuple(range(len(NAMES)))
    gradients = jax.grad(functools.partial(loss, None, config=config), every)(*inputs())
    assert np.ptp(plain.stats.attempts) > 20
    for order in orders().values():
        ordered = solved(order, *inputs(), config=config)
        assert_same_bits((ordered.ys, ordered.ts, ordered.stats), (plain.ys, plain.ts, plain.stats))
        np.testing.assert_array_equal(ordered.status, Status.SUCCESS)
    for order in ("work", plain.stats.attempts):
        gradient = jax.grad(functools.partial(loss, order, config=config), every)
        assert_same_gradients(gradient(*inputs()), gradients)
        if config.runner == "native":  # XLA takes long to compile its loops again
            assert_same_gradients(jax.jit(gradient)(*inputs()), gradients)


def test_forward_mode_and_the_bounded_tree() -> None:
    values, every = inputs(), tuple(range(len(NAMES)))
    directions = jax.tree.map(jnp.cos, values)

    def tangents(order: Any, adjoint: Any) -> Any:
        final = functools.partial(solved, order, adjoint=adjoint, max_steps=256)
        return jax.jit(lambda: jax.jvp(lambda *v: final(*v).ys, values, directions))()

    def gradient(order: Any) -> Any:
        value = functools.partial(loss, order, adjoint=pk.BoundedTree(), max_steps=256)
        return jax.jit(jax.grad(value, every))(*values)

    assert_same_bits(tangents("work", pk.ForwardOnly()), tangents(None, pk.ForwardOnly()))
    assert_same_gradients(gradient("work"), gradient(None))
    with pytest.raises(TypeError, match=r"supports jax\.jvp and jax\.jacfwd only"):
        jax.grad(functools.partial(loss, "work", adjoint=pk.ForwardOnly()), 5)(*values)


def test_second_derivatives() -> None:
    def slope(order: Any, shift: jax.Array) -> jax.Array:
        y0s = jnp.linspace(0.5, 1.5, 5)
        rates = jnp.linspace(1.0, 3.0, 5) + shift
        sol = pk.solve_ensemble(
            lambda t, y, k: -k * y**2, y0s, 0.0, 1.0, rates, in_axes=(0, 0), step=pk.Adaptive(1e-2, 1e-2),
            method=pk.heun, adjoint=pk.BoundedTree(), max_steps=16, order=order,
        )  # fmt: skip
        return jnp.sum(sol.ys**2)

    shift = jnp.asarray(0.1)
    want, by_work, by_counts = (
        jax.jit(outer(jax.grad(functools.partial(slope, order))))(shift)
        for outer, order in ((jax.grad, None), (jax.grad, "work"), (jax.jacfwd, np.array([1, 5, 2, 4, 3])))
    )
    assert np.isfinite(want) and want != 0
    np.testing.assert_allclose(by_work, want, rtol=1e-12)
    np.testing.assert_allclose(by_counts, want, rtol=1e-12)


def test_under_vmap() -> None:
    """Batches of ensembles, each with an order of its own: over what the order depends on, over what it does not, and over
    the order itself."""
    y0s, t0, t1, dt0, dates, frequency, damping, _ = inputs()
    frequencies = jnp.stack([frequency, frequency[::-1], 2 * frequency])
    shareds = jnp.asarray([0.1, 0.5, 1.0])

    def gradients(order: Any, frequency: jax.Array, shared: jax.Array) -> Any:
        def value(frequency: jax.Array, shared: jax.Array) -> jax.Array:
            return loss(order, y0s, t0, t1, dt0, dates, frequency, damping, shared)

        return jax.value_and_grad(value, (0, 1))(frequency, shared)

    def check(got: Any, want: Any) -> None:
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)

    one_by_one = [gradients(None, f, s) for f, s in zip(frequencies, shareds, strict=True)]
    want = jax.tree.map(lambda *leaves: jnp.stack(leaves), *one_by_one)

    def total(order: Any, frequencies: jax.Array) -> jax.Array:
        one = functools.partial(loss, order, y0s, t0, t1, dt0, dates)
        return jnp.sum(jax.vmap(lambda f, s: one(f, damping, s))(frequencies, shareds))

    for order in ("work", frequency):
        batched = functools.partial(gradients, order)
        check(jax.jit(jax.vmap(batched))(frequencies, shareds), want)
        check(jax.jit(jax.grad(functools.partial(total, order)))(frequencies), want[1][0])
    nested = jax.jit(jax.vmap(jax.vmap(functools.partial(gradients, "work"), (0, None)), (None, 0)))
    each = np.arange(3)
    check(jax.tree.map(lambda leaf: leaf[each, each], nested(frequencies, shareds)), want)
    check(jax.jit(jax.vmap(gradients))(frequencies, frequencies, shareds), want)
    several = jnp.stack([frequency, -frequency])
    values = jax.vmap(lambda order: gradients(order, frequencies[0], shareds[0])[0])(several)
    np.testing.assert_allclose(values, [one_by_one[0][0]] * 2, rtol=1e-12)


def test_under_shard_map() -> None:
    mesh = jax.make_mesh((1,), ("lanes",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("lanes")
    frequency = jnp.asarray(inputs()[5])

    def value(order: Any, frequency: jax.Array, shared: jax.Array) -> jax.Array:
        """With a counted sum: one over all devices."""
        sol = pk.solve_ensemble(
            lambda t, y, a: -a[0] * (y - jnp.sin(a[0] * t)) + a[1], jnp.ones(LANES), 0.0, 1.0, (frequency, shared),
            in_axes=(0, (0, None)), order=order, max_steps=512,
        )  # fmt: skip
        return sol.ys

    for order in ("work", np.arange(LANES)):

        def mapped(frequency: jax.Array, shared: jax.Array, order: Any = order) -> jax.Array:
            return jax.shard_map(
                functools.partial(value, order),
                mesh=mesh,
                in_specs=(spec, jax.sharding.PartitionSpec()),
                out_specs=spec,
            )(frequency, shared)

        shared = jnp.asarray(0.3)
        np.testing.assert_array_equal(jax.jit(mapped)(frequency, shared), value(None, frequency, shared))
        got, want = (
            jax.jit(jax.grad(lambda *a, f=f: jnp.sum(f(*a) ** 2), (0, 1)))(frequency, shared)
            for f in (mapped, functools.partial(value, None))
        )
        np.testing.assert_allclose(got[0], want[0], rtol=1e-12)
        np.testing.assert_allclose(got[1], want[1], rtol=1e-12)


def test_other_axes_structures_and_shared_states() -> None:
    rates = np.linspace(0.1, 4.0, 12).reshape(2, 6)

    def solve(order: Any) -> pk.Solution:
        return pk.solve_ensemble(
            lambda t, y, a: (-a[0] * y[0], jnp.sin(y[1]) * a[1]),
            (np.ones((2, 6)), np.ones((3, 2))),
            0.0,
            3.0,
            (rates, 0.5),
            in_axes=((1, None), (1, None)),
            order=order,
        )

    plain = solve(None)
    assert plain.ys[0].shape == (6, 2) and plain.ys[1].shape == (6, 3, 2)
    for order in ("work", [3, 1, 2, 6, 5, 4]):
        assert_same_bits((solve(order).ys, solve(order).stats), (plain.ys, plain.stats))


@pytest.mark.parametrize("lanes", [0, 1])
@pytest.mark.parametrize("kind", ["work", "counts"])
def test_nothing_to_order(lanes: int, kind: str) -> None:
    order = "work" if kind == "work" else np.arange(lanes)

    def values(y0s: jax.Array) -> jax.Array:
        return pk.solve_ensemble(lambda t, y, a: -y, y0s, 0.0, 1.0, order=order).ys

    y0s = jnp.ones((lanes, 2))
    np.testing.assert_allclose(values(y0s), np.exp(-1.0) * y0s, rtol=1e-5)
    gradient = jax.jit(jax.grad(lambda y: jnp.sum(values(y))))(y0s)
    np.testing.assert_allclose(gradient, np.exp(-1.0) * y0s, rtol=1e-5)


class Spy(pk.ForwardOnly):
    """Notes what the adjoint is given."""

    def __init__(self) -> None:
        object.__setattr__(self, "calls", [])

    def integrate(self, solve: Solve, inputs: Sequence[jax.Array]) -> list[jax.Array]:
        self.calls.append((solve, list(inputs)))  # type: ignore[attr-defined]
        return super().integrate(solve, inputs)


# Failures.


@pytest.mark.parametrize("order", ["work", np.array([3, 1, 4, 1, 5, 9, 2, 6, 5])], ids=["work", "counts"])
@pytest.mark.parametrize("kind", ["adaptive", "fixed"])
def test_failures_are_those_without_an_order(kind: str, order: Any) -> None:
    plain, ordered = (run_zoo(kind, throw=False, order=o) for o in (None, order))
    np.testing.assert_array_equal(ordered.status, EXPECTED[kind])
    np.testing.assert_array_equal(ordered.ys, plain.ys)
    for a, b in zip(ordered.stats, plain.stats, strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(pk.SolveError) as caught:
        run_zoo(kind, order=order)
    np.testing.assert_array_equal(caught.value.status, EXPECTED[kind])
    assert "not finite: trajectory " in str(caught.value)


def test_failures_of_the_pilot_alone_do_not_matter() -> None:
    """The field is not defined a little beyond the trajectories, where loose steps go. Or the pilot's attempts run out."""
    w = np.linspace(1.0, 30.0, 40)
    for bound, step in ((1.0001, pk.Adaptive(1e-8, 1e-8)), (2.0, pk.Adaptive(1e-4, 1e-4, dtmax=0.01))):
        solve_by = functools.partial(
            pk.solve_ensemble, lambda t, y, w, b=bound: w * jnp.sqrt((b - y) * (b + y)) * jnp.cos(t * w),
            np.zeros(40), 0.0, 0.9, w, in_axes=(0, 0), step=step, max_steps=200, throw=False,
        )  # fmt: skip
        spy = Spy()
        plain = solve_by(adjoint=spy)
        ((solve, given),) = spy.calls
        status = primitives.solve(given, pilot(solve))[-3]
        assert np.any((np.asarray(status) != 0) & np.asarray(plain.ok))
        ordered = solve_by(order="work")
        np.testing.assert_array_equal(ordered.ys, plain.ys)
        np.testing.assert_array_equal(ordered.status, plain.status)


def test_a_failed_lane_s_gradient_stays_its_own() -> None:
    def value(order: Any, rates: jax.Array, shared: jax.Array) -> jax.Array:
        sol = pk.solve_ensemble(
            lambda t, y, a: a[0] * a[1] * y**2, jnp.ones(9), 0.0, 1.0, (rates, shared), in_axes=(0, (0, None)),
            throw=False, order=order,
        )  # fmt: skip
        return jnp.sum(jnp.where(sol.ok, sol.ys, 0.0))

    rates, shared = jnp.asarray([0.1, 5.0, 0.7, 0.2, 3.0, 0.9, 0.3, 0.5, 0.8]), jnp.asarray(1.0)
    want = jax.grad(functools.partial(value, None), (0, 1))(rates, shared)
    assert np.all(np.isfinite(want[0]))
    for order in ("work", np.asarray(rates)):
        got = jax.grad(functools.partial(value, order), (0, 1))(rates, shared)
        np.testing.assert_array_equal(got[0], want[0])
        np.testing.assert_allclose(got[1], want[1], rtol=1e-13)


# What is executed.


def spread_oscillators(order: Any, **settings: Any) -> pk.Solution:
    """1,024 oscillators of 0.5 to 16 radians per time: about 20 times as many attempts for the fastest."""
    frequency = np.exp(np.random.default_rng(0).uniform(np.log(0.5), np.log(16.0), 1024))
    return pk.solve_ensemble(
        lambda t, y, w: jnp.stack([w * y[1], -w * y[0]]), np.tile([1.0, 0.0], (1024, 1)), 0.0, 10.0, frequency,
        in_axes=(0, 0), order=order, **settings,
    )  # fmt: skip


def lockstep(attempts: Any) -> float:
    """What warps that wait for their slowest lane do, in units of what the lanes need."""
    warps = np.asarray(attempts).reshape(-1, WARP)
    return float(WARP * warps.max(axis=1).sum() / warps.sum())


def test_warps_are_filled_with_similar_work() -> None:
    plain = spread_oscillators(None)
    attempts = plain.stats.attempts
    assert np.max(attempts) > 18 * np.min(attempts)
    assert lockstep(attempts) > 2.5
    for order, most in (("work", 1.08), (attempts, 1.06), (attempts.astype(float), 1.06)):
        spy = Spy()
        ordered = spread_oscillators(order, adjoint=spy)
        # What the adjoint is given, hence what the primitive is: solving just that says what each of its lanes needs.
        ((solve, given),) = spy.calls
        assert lockstep(primitives.solve(given, solve)[-2]) <= most
        np.testing.assert_array_equal(ordered.stats.attempts, attempts)
        np.testing.assert_array_equal(ordered.ys, plain.ys)


def test_the_largest_numbers_come_first_and_equal_ones_stay_in_order() -> None:
    spy, y0s = Spy(), np.arange(6.0)
    pk.solve_ensemble(lambda t, y, a: -y, y0s, 0.0, 1.0, order=np.array([2, 7, 2, 9, 7, 2]), adjoint=spy)
    np.testing.assert_array_equal(spy.calls[0][1][2], [3.0, 1.0, 4.0, 0.0, 2.0, 5.0])
    unsigned = np.array([2, 7, 2, 9, 7, 2], np.uint8)
    pk.solve_ensemble(lambda t, y, a: -y, y0s, 0.0, 1.0, order=unsigned, adjoint=spy)
    np.testing.assert_array_equal(spy.calls[1][1][2], spy.calls[0][1][2])
    pk.solve_ensemble(lambda t, y, a: -y, y0s, 0.0, 1.0, adjoint=spy)
    np.testing.assert_array_equal(spy.calls[2][1][2], y0s)


@pytest.mark.parametrize("most", [9, 2**30], ids=["one word", "pairs"])
def test_sorting_counts(most: int) -> None:
    counts = np.random.default_rng(1).integers(0, 10, 50).astype(np.int32)
    want = np.argsort(-counts, kind="stable")
    np.testing.assert_array_equal(_most_first(jnp.asarray(counts), most), want)
    several = jnp.stack([counts, counts[::-1]])
    got = jax.vmap(lambda c: _most_first(c, most))(several)
    np.testing.assert_array_equal(got[0], want)
    assert got.dtype == jnp.int32


def test_the_pilot_is_cheap() -> None:
    spy = Spy()
    attempts = spread_oscillators(None, adjoint=spy).stats.attempts
    ((solve, given),) = spy.calls
    short = primitives.solve(given, pilot(solve))[-2]
    assert 0.1 < np.sum(short) / np.sum(attempts) < 0.3


def spec_of(**settings: Any) -> tuple[Solve, list[jax.Array]]:
    spy = Spy()
    pk.solve_ensemble(lambda t, y, a: -y, np.ones(6), 0.0, adjoint=spy, **{"t1": 1.0, **settings})
    return spy.calls[0]


@pytest.mark.parametrize(
    ("step", "method", "rtol", "atol", "max_steps"),
    [
        (pk.Adaptive(1e-6, 1e-8), pk.tsit5, 1e-3, 1e-5, 1029),
        (pk.Adaptive(1e-4, 1e-3), pk.tsit5, 1e-2, 1e-1, 1631),
        (pk.Adaptive(1e-6, 1e-6), pk.bosh3, 512e-6, 512e-6, 512),  # an eighth of the attempts is enough
        (pk.Adaptive(0.0, 1e-6), pk.tsit5, 0.0, 1e-3, 1029),
        (pk.Adaptive(1e-13, 1e-3), pk.tsit5, 32768e-13, 32.768, 512),
        (pk.Adaptive(2.0, 1e-6), pk.tsit5, 2.0, 1e-6, 4096),  # nothing is looser than that
    ],
)
def test_tolerances_of_the_pilot(
    step: pk.Adaptive, method: pk.ButcherTableau, rtol: float, atol: float, max_steps: int
) -> None:
    solve, _ = spec_of(step=step, method=method, save_at=np.array([0.5]))
    short = pilot(solve)
    assert short.step.rtol == pytest.approx(rtol) and short.step.atol == pytest.approx(atol)
    assert short.max_steps == max_steps and short.saves is None
    assert short.lane == (False, False, True) and solve.lane == (False, False, False, True)
    assert (short.field, short.method, short.kind) == (solve.field, solve.method, solve.kind)


def primitives_in(jaxpr: Any) -> list[str]:
    names = []
    for eqn in jaxpr.eqns:
        names.append(eqn.primitive.name)
        if not eqn.primitive.name.startswith("pykernels"):
            for sub in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                inner = getattr(sub, "jaxpr", sub)
                names += primitives_in(inner) if hasattr(inner, "eqns") else []
    return names


def test_transposition_gathers() -> None:
    """Nothing is added up where lanes meet, so no atomics: the one scatter, of different places, makes the inverse."""
    every = tuple(range(len(NAMES)))
    for order, solves in (("work", 2), (np.arange(LANES), 1)):
        gradient = jax.make_jaxpr(jax.grad(functools.partial(loss, order), every))(*inputs())
        names = primitives_in(gradient.jaxpr)
        assert not [name for name in names if name.startswith("scatter") and name != "scatter"]
        assert names.count("scatter") == 1 and names.count("pykernels_solve") == solves
        # Own inputs (states 2, times 4, arguments 3) in, values 2 and status, attempts and accepted out; cotangents back.
        assert names.count("pykernels_permute") == (9 + 5) + (8 + 2)
    plain = jax.make_jaxpr(jax.grad(functools.partial(loss, None), every))(*inputs())
    assert "pykernels_permute" not in primitives_in(plain.jaxpr)


def test_permute_is_linear_both_ways() -> None:
    places = np.array([2, 0, 3, 1])
    back = np.argsort(places)
    x = jnp.arange(8.0).reshape(2, 4)
    permute = functools.partial(primitives.permute, places=places, back=back)
    np.testing.assert_array_equal(permute(x), x[:, places])
    np.testing.assert_array_equal(jax.jit(permute)(x > 3), (x > 3)[:, places])
    (transposed,) = jax.linear_transpose(permute, x)(x)
    np.testing.assert_array_equal(transposed, x[:, back])
    np.testing.assert_array_equal(jax.jacfwd(permute)(x), jax.jacrev(permute)(x))
    np.testing.assert_array_equal(jax.vmap(permute, 1, 1)(jnp.stack([x, 2 * x], 1))[:, 1], 2 * x[:, places])


# Fixed steps.


def test_fixed_steps_need_no_pilot() -> None:
    t1 = np.array([1.0, 3.0, 0.5, -2.0, 3.0, 0.52])
    solve, given = spec_of(step=pk.Fixed(0.1), t1=t1)
    np.testing.assert_array_equal(lane_order(solve, given, "work"), [1, 4, 3, 0, 5, 2])
    assert "pykernels_solve" not in primitives_in(
        jax.make_jaxpr(lambda given: lane_order(solve, given, "work"))(given).jaxpr
    )
    for settings in ({"step": pk.Fixed(0.1)}, {"step": pk.Fixed(10), "t1": t1}):
        solve, given = spec_of(**settings)
        assert lane_order(solve, given, "work") is None
        np.testing.assert_array_equal(lane_order(solve, given, jnp.arange(6)), np.arange(6)[::-1])


def test_fixed_steps_out_of_attempts_or_time() -> None:
    """An order is a permutation whatever the spans are."""
    t1 = np.array([1.0, 1e9, np.nan, 3.0, np.inf, -np.inf])
    solve, given = spec_of(step=pk.Fixed(0.1), t1=t1, max_steps=20, throw=False)
    np.testing.assert_array_equal(np.sort(lane_order(solve, given, "work")), np.arange(6))


# Arguments.


def test_an_order_is_never_differentiated() -> None:
    def value(counts: jax.Array, y0s: jax.Array) -> jax.Array:
        return jnp.sum(pk.solve_ensemble(lambda t, y, a: -y, y0s, 0.0, 1.0, order=counts).ys)

    counts, y0s = jnp.asarray([2.0, 3.0, 1.0]), jnp.ones(3)
    of_counts, of_y0s = jax.grad(value, (0, 1))(counts, y0s)
    np.testing.assert_array_equal(of_counts, 0.0)
    np.testing.assert_allclose(of_y0s, np.exp(-1.0), rtol=1e-5)
    np.testing.assert_array_equal(jax.jit(jax.grad(value))(y0s * counts, y0s), 0.0)


@pytest.mark.parametrize(
    ("order", "error", "message"),
    [
        ("attempts", ValueError, "order must be 'work', an array or None, not 'attempts'"),
        (np.arange(4), ValueError, r"one number per trajectory, shape \(3,\), not \(4,\)"),
        (np.ones((3, 1)), ValueError, r"shape \(3,\), not \(3, 1\)"),
        (7, ValueError, r"shape \(3,\), not \(\)"),
        (np.ones(3, bool), TypeError, "integers or real numbers, not bool"),
        (np.ones(3, complex), TypeError, "integers or real numbers, not complex"),
    ],
)
def test_wrong_orders(order: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pk.solve_ensemble(lambda t, y, a: -y, np.ones(3), 0.0, 1.0, order=order)


def test_no_order_is_the_solve_itself() -> None:
    solve, given = spec_of()
    calls = []

    def integrate(solve: Solve, inputs: Sequence[jax.Array]) -> list[jax.Array]:
        calls.append(inputs)
        return list(inputs)

    assert integrate_in_order(integrate, solve, given, None)[0] is given[0]
    assert calls == [given]
