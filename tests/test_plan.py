"""Which plan and lift a field gets, and that every plan gives the same numbers and gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import pykernels as pk

STEPS = 6
END = 0.25
LANES = 5


def lorenz(t, y, p):
    x, v, z = y
    return jnp.stack([p[0] * (v - x), x * (p[1] - z) - v, x * v - p[2] * z])


def perceptron(t, y, weights):
    for w, b in weights[:-1]:
        y = jnp.tanh(w @ y + b)
    w, b = weights[-1]
    return w @ y + b


def coupled(t, y, w):
    return jnp.tanh(w @ y) - y + jnp.sin(t)


def bodies(t, state, masses):
    """Plane motion under pairwise attraction; a pytree as state."""
    apart = state["x"][None, :, :] - state["x"][:, None, :]
    square = jnp.sum(apart**2, axis=-1) + 0.1
    pull = masses[None, :, None] * apart / square[..., None] ** 1.5
    return {"x": state["v"], "v": jnp.sum(pull, axis=1)}


def branching(t, y, p):
    return lax.cond(y[0] > 0.3, lambda y: -p[0] * y, lambda y: jnp.cos(y) * p[1], y)


def choosing(t, y, p):
    return jnp.where(y > t, -p[0] * y, p[1] * jnp.sqrt(jnp.where(y > t, 1.0, 2.0 - y + t)))


def scanning(t, y, p):
    last, rows = lax.scan(lambda c, x: (jnp.sin(c) * x + p[0], c * p[1]), y[0], y)
    return rows - last


def looping(t, y, p):
    return lax.fori_loop(0, 3, lambda i, c: c - p[0] * jnp.sin(c) / (i.astype(y.dtype) + 1), y)


def normed(t, y, p):
    return p[:2] - y / (1.0 + jnp.linalg.norm(y))


def indexing(t, y, p):
    return jnp.roll(y, 1) * jax.nn.one_hot(1, 3) + y[jnp.array([2, 0, 1])] - y.at[0].set(p[0]) * p[-1]


def interpolating(t, y, table):
    return jnp.interp(y, jnp.linspace(-2.0, 2.0, 5), table) - y


def searching(t, y, edges):
    return -y * (1.0 + jnp.searchsorted(edges, y[0]).astype(y.dtype)) + jnp.sum(edges) * 0.1


def looking_up(t, y, table):
    """Each lane looks up where it is, in an array they share."""
    place = jnp.clip(jnp.floor(2.0 * y[0] + 2.0), 0, 4).astype(jnp.int32)
    return table[place] - 0.3 * y * table[0]


def draws(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape))


class Case(NamedTuple):
    """A field, shared arguments and the starts of an ensemble; its lift, None where either may be the faster."""

    field: Callable[..., Any]
    y0s: Any
    args: Any
    lift: str | None


LAYERS = [(0.3 * draws(16, 2), draws(16)), (0.3 * draws(16, 16), draws(16)), (0.3 * draws(2, 16), draws(2))]
SKY = {"x": draws(LANES, 3, 2), "v": 0.3 * draws(LANES, 3, 2)}
PAIR = jnp.asarray([0.7, 0.4])
CASES = {
    "lorenz": Case(lorenz, 1.0 + draws(LANES, 3), jnp.asarray([10.0, 28.0, 8 / 3]), "components"),
    "perceptron": Case(perceptron, draws(LANES, 2), LAYERS, "arrays"),
    "coupled": Case(coupled, draws(LANES, 12), 0.3 * draws(12, 12), "arrays"),
    "bodies": Case(bodies, SKY, jnp.asarray([1.0, 0.5, 0.2]), "arrays"),
    "cond": Case(branching, draws(LANES, 2), PAIR, None),
    "where": Case(choosing, draws(LANES, 2), PAIR, None),
    "scan": Case(scanning, draws(LANES, 3), PAIR, None),
    "fori_loop": Case(looping, draws(LANES, 2), PAIR, None),
    "norm": Case(normed, draws(LANES, 2), PAIR, None),
    "indexing": Case(indexing, draws(LANES, 3), PAIR, None),
    "interp": Case(interpolating, draws(LANES, 2), draws(5), "arrays"),
    "searchsorted": Case(searching, draws(LANES, 2), jnp.asarray([-0.5, 0.0, 0.6]), "arrays"),
    "table": Case(looking_up, draws(LANES, 2), draws(5), "arrays"),
}
SETTINGS: dict[str, Any] = {"method": pk.heun, "step": pk.Fixed(STEPS)}


def total(ys: Any) -> jax.Array:
    """A scalar with different weights for everything."""
    return sum(
        jnp.sum(jnp.sin(leaf + jnp.arange(float(leaf.size)).reshape(leaf.shape)))
        for leaf in jax.tree.leaves(ys)
    )


def fused(case: Case, **config: Any) -> Any:
    """Value and gradients of an ensemble."""

    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def value(y0s, args):
        sol = pk.solve_ensemble(case.field, y0s, 0.0, END, args, config=pk.Config(**config), **SETTINGS)
        return total(sol.ys)

    return jax.jit(value)(case.y0s, case.args)


def plain(case: Case) -> Any:
    """The same by Heun's method written down, under `jax.vmap`."""

    def trajectory(y, args):
        h = END / STEPS

        def step(y, t):
            first = case.field(t, y, args)
            middle = jax.tree.map(lambda a, k: a + h * k, y, first)
            second = case.field(t + h, middle, args)
            return jax.tree.map(lambda a, k, m: a + h / 2 * (k + m), y, first, second), None

        return lax.scan(step, y, h * jnp.arange(float(STEPS)))[0]

    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def value(y0s, args):
        return total(jax.vmap(trajectory, (0, None))(y0s, args))

    return jax.jit(value)(case.y0s, case.args)


def close(got: Any, want: Any, rtol: float = 1e-11) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.all(np.isfinite(b)) and np.any(np.asarray(b) != 0)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(np.abs(b).max()))


def explain(case: Case, **config: Any) -> pk.Explanation:
    return pk.explain(
        case.field, case.y0s, 0.0, 1.0, case.args, in_axes=(0, None), config=pk.Config(**config), **SETTINGS
    )


@pytest.mark.parametrize("name", CASES)
def test_fields_of_the_lanes_plan(name):
    case = CASES[name]
    why = explain(case)
    assert (why.plan, why.lanes) == ("lanes", LANES)
    assert why.lift == case.lift if case.lift else why.lift in ("components", "arrays")
    close(fused(case), plain(case))


@pytest.mark.parametrize("lift", ["components", "arrays"])
def test_both_lifts_give_the_same_numbers(lift):
    for name in ("cond", "indexing"):
        close(fused(CASES[name], lift=lift), plain(CASES[name]))
    assert explain(CASES["cond"], lift=lift).lift == lift


def through_callback(t, y, p):
    @jax.custom_jvp
    def host(x):
        return jax.pure_callback(
            lambda x: np.sin(x), jax.ShapeDtypeStruct(x.shape, x.dtype), x, vmap_method="expand_dims"
        )

    host.defjvp(lambda primals, tangents: (host(*primals), jnp.cos(primals[0]) * tangents[0]))
    return p[0] * host(y) - p[1] * y


def without_callback(t, y, p):
    return p[0] * jnp.sin(y) - p[1] * y


def solving(t, y, m):
    return jnp.linalg.solve(m + jnp.eye(3) * (4.0 + t), y) - y


# The backward pass gives shared operands lanes, but the lift still takes them for shared.
OUTSIDE = {
    "callback": (Case(through_callback, draws(LANES, 2), PAIR, "vmap"), "pure_callback", without_callback),
    "linear solve": (Case(solving, draws(LANES, 3), draws(3, 3), "vmap"), "lu", solving),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_fields_outside_the_lanes_plan(name):
    """They take the array plan, `explain` names the primitive, and values and gradients are right."""
    case, primitive, same = OUTSIDE[name]
    why = explain(case)
    assert why.plan == "array"
    assert primitive in why.reason and primitive in str(why)
    close(fused(case), plain(case._replace(field=same)))
    for config in ({"plan": "lanes"}, {"lift": "components"}, {"lift": "arrays"}):
        with pytest.raises(ValueError, match=primitive):
            explain(case, **config)


def test_components_are_refused_where_they_do_not_apply():
    with pytest.raises(ValueError, match="components lift does not apply"):
        explain(CASES["table"], lift="components")
    assert "dynamic_slice at an index" in explain(CASES["table"]).reason


def test_the_array_plan_can_be_asked_for():
    why = explain(CASES["lorenz"], plan="array")
    assert why.plan == "array" and "config" in why.reason
    close(fused(CASES["lorenz"], plan="array"), plain(CASES["lorenz"]))
    why = explain(CASES["lorenz"], plan="lanes")
    assert (why.plan, why.lift) == ("lanes", "components")


@pytest.mark.parametrize("block", [1, pytest.param(7), pytest.param(64), 256])
def test_blocks_do_not_change_results(block):
    """An ensemble with adaptive steps whose size no block divides: lanes never see each other."""
    lanes = 65
    y0s = jnp.stack([jnp.linspace(-2.0, 2.0, lanes), jnp.ones(lanes)], axis=1)
    p = jnp.asarray([0.7, 3.0])

    def run(block: int) -> Any:
        def value(y0s, p):
            sol = pk.solve_ensemble(
                lambda t, y, p: jnp.stack([y[1], p[1] * (1 - y[0] ** 2) * y[1] - p[0] * y[0]]), y0s, 0.0, 2.0, p,
                method=pk.heun, step=pk.Adaptive(1e-2, 1e-3), max_steps=256, config=pk.Config(block=block),
            )  # fmt: skip
            return jnp.sum(jnp.sin(sol.ys)), (sol.ys, sol.stats)

        return jax.jit(jax.value_and_grad(value, (0, 1), has_aux=True))(y0s, p)

    (value, (ys, stats)), gradients = run(block)
    (value_16, (ys_16, stats_16)), gradients_16 = blocks_of_16(run)
    assert int(stats.attempts.max()) > 1.5 * int(stats.attempts.min())
    for a, b in zip(stats, stats_16, strict=True):
        np.testing.assert_array_equal(a, b)
    close((value, ys, gradients), (value_16, ys_16, gradients_16), rtol=1e-10)


_cache: dict[int, Any] = {}


def blocks_of_16(run: Callable[[int], Any]) -> Any:
    if 16 not in _cache:
        _cache[16] = run(16)
    return _cache[16]


def test_explanations():
    case = CASES["lorenz"]
    settings: dict[str, Any] = {"method": pk.tsit5, "max_steps": 1000}

    def explained(adjoint: Any, **more: Any) -> pk.Explanation:
        return pk.explain(
            case.field, case.y0s, 0.0, 1.0, case.args, in_axes=(0, None), adjoint=adjoint, **settings, **more
        )

    why = explained(pk.Milestones())
    assert why.operations == 8  # s (y - x), x (r - z) - y, x y - b z
    assert (
        str(LANES) in str(why)
        and "components" in str(why)
        and str(why.milestone_bytes_per_trajectory) in str(why)
    )
    one_state_per_attempt = 1000 * 3 * 8
    assert 0 < why.milestone_bytes_per_trajectory < one_state_per_attempt / 2
    assert (
        explained(pk.Milestones(count=100)).milestone_bytes_per_trajectory
        > why.milestone_bytes_per_trajectory
    )
    assert explained(pk.ForwardOnly()).milestone_bytes_per_trajectory == 0
    assert explained(pk.Milestones(), config=pk.Config(block=3, runner="xla")).block <= 3
    single = pk.explain(case.field, case.y0s[0], 0.0, 1.0, case.args)
    assert (single.lanes, single.block) == (1, 1)


def test_explain_integrates_nothing():
    """Not even a failing or endless problem."""
    pk.explain(lambda t, y, _: jnp.full_like(y, jnp.nan), jnp.ones(2), 0.0, 1e30, max_steps=10**9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"plan": "fused"}, "plan"),
        ({"lift": "vmap"}, "lift"),
        ({"block": 0}, "block"),
        ({"block": 2.0}, "block"),
        ({"block": -3}, "block"),
        ({"runner": "gpu"}, "runner"),
        ({"runner": "native", "lift": "arrays"}, "own lift"),
        ({"runner": "pallas", "plan": "array"}, "does not run the array plan"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        pk.Config(**settings)
