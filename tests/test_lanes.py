"""Lifting a jaxpr of one trajectory to a block of lanes: every lift against `jax.vmap` of the function itself."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import lax
from jax.extend import core as jex_core

from pykernels import lanes

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
CUSTOM = ("custom_jvp_call", "custom_vjp_call")
TOLERANCE = {np.dtype(np.float32): 2e-5, np.dtype(np.float64): 1e-12}


class Case(NamedTuple):
    """A field of (t, y, *operands): the operands' shapes (or integer arrays) and which of them have lanes."""

    field: Callable[..., Any]
    state: tuple[int, ...]
    operands: tuple[Any, ...] = ()
    lane: tuple[bool, ...] = ()
    obstacle: str | None = None  # what keeps the components lift from running it


def lorenz(t, y, p):
    x, v, z = y
    return jnp.stack([p[0] * (v - x), x * (p[1] - z) - v, x * v - p[2] * z])


def perceptron(activation, t, y, w1, b1, w2, b2, w3, b3):
    y = activation(w1 @ y + b1)
    y = activation(w2 @ y + b2)
    return w3 @ y + b3


WEIGHTS = ((16, 2), (16,), (16, 16), (16,), (2, 16), (2,))
SMALL = ((4, 2), (4,), (4, 4), (4,), (2, 4), (2,))


def dense(t, y, p, w):
    return p * (w @ jnp.tanh(y)) - y


def bodies(t, y, mass):
    position, velocity = y
    apart = position[None, :] - position[:, None]
    n = position.shape[0]
    distance = jnp.linalg.norm(apart + 10 * jnp.eye(n, dtype=y.dtype)[..., None], axis=-1)
    weight = (1 - jnp.eye(n, dtype=y.dtype)) * mass / distance**3
    return jnp.stack([velocity, jnp.sum(weight[..., None] * apart, axis=1)])


def branching(t, y, p):
    return lax.cond(y[0] > 0.2, lambda y, p: jnp.sin(y) * p, lambda y, p: y @ y * p, y, p)


def branching_on_shared(t, y, p):
    return lax.cond(p[0] > 0, lambda y, p: jnp.sin(y) * p, lambda y, p: y - p, y, p)


def switching(t, y, p, i):
    return lax.switch(i, [lambda y: y * p, lambda y: jnp.cos(y), lambda y: jnp.flip(y) - p], y)


def choosing(t, y, p):
    return jnp.where(y > 0, y * p, jnp.exp(y)) + jnp.where(t > 0, p, 2 * p)


def scanning(t, y, p):
    def body(carry, x):
        carry = jnp.sin(carry) * x + p[0]
        return carry, carry * p

    last, rows = lax.scan(body, y, jnp.stack([y, 2 * y, y * y]))
    return last + rows.sum(0)


def scanning_reversed(t, y, p):
    total, rows = lax.scan(lambda c, x: (c * x + p[0], c), jnp.zeros((), y.dtype), y, reverse=True)
    return total + rows


def counting(t, y, p):
    return lax.fori_loop(0, 4, lambda i, c: c + p * i.astype(y.dtype) * jnp.sin(c), y)


def one_hot(t, y, p, i):
    return y * jax.nn.one_hot(i, y.shape[0], dtype=y.dtype) + p[:1]


def indexing(t, y, p):
    picked = y[jnp.array([3, 0, 0])] * p[np.array([1, -1, 2])]
    return (
        y.at[1].set(p[0]).at[jnp.array([0, 2])].add(2 * y[:2]).at[-1].multiply(y[1])
        + picked.sum()
        + y[-1] * p[::2].sum()
    )


def at_kinds(t, y, p):
    y = y.at[1:3].set(p[0]).at[0].min(y[3]).at[3].max(p[1]).at[jnp.array([1, 1, 2])].add(y[:3])
    return y.at[jnp.array([7])].set(5, mode="drop") + jnp.take(y, jnp.array([1, 9]), mode="clip").sum()


def windows(t, y, p):
    part = lax.dynamic_slice(y, (jnp.int32(9),), (2,)) + lax.dynamic_slice(p, (jnp.int32(1),), (2,))
    return lax.dynamic_update_slice(y, part * p[0], (jnp.int32(1),))


def moving_windows(t, y, p, i):
    part = lax.dynamic_slice(y, (i.astype(int),), (2,)) + lax.dynamic_slice(p, (i,), (2,))
    return lax.dynamic_update_slice(p, part * y[0], (i,)) + y.at[i].set(p[0]) + y.at[i].add(p[1])


def shared_window(t, y, p, i):
    i = i.astype(int)
    return lax.dynamic_update_slice(y, lax.dynamic_slice(y * p, (i,), (2,)), (i - 1,)) + y[i]


def interpolating(t, y, xs, fs):
    return jnp.interp(y, xs, fs)


def searching(t, y, xs):
    return y * jnp.searchsorted(xs, y[0]).astype(y.dtype)


def looking_up(t, y, table, i):
    return y * table[i] + table[2]


def shapes(t, y, p):
    m = jnp.concatenate([y, p]).reshape(4, 2)
    m = jnp.transpose(m)[::-1] + jnp.stack([y, p])
    m = jnp.pad(m, ((1, 0), (0, 1)), constant_values=3.0) + jnp.tile(y[:1], (3, 5))
    m = jnp.expand_dims(m, 1) * jnp.roll(p, 1)[:1, None, None]
    a, b, c = jnp.split(m, 3)
    return jnp.squeeze(a + b, (0, 1))[:4] + jnp.repeat(c[0, 0, :2], 2) + jnp.ravel(jnp.outer(y[:2], p[:2]))


def padding(t, y, p):
    return (
        lax.pad(y * p, p[0], ((1, 2, 1),))[: y.shape[0]]
        + lax.pad(p, y[0], ((-1, 1, 0),))
        + lax.pad(y, 1.0 * t, ((0, 0, 0),))
    )


def einsums(t, y, a, b):
    m = jnp.outer(y, y)
    left = jnp.einsum("ij,jk->ik", m, a) + jnp.einsum("ij,jk->ik", a, m) + jnp.einsum("ij,kj->ki", m, m)
    both = jnp.einsum("ij,ij->i", left, b) + jnp.einsum("ijk,k->ij", jnp.stack([m, a]), y).sum(0)
    return both + jnp.einsum("bi,bij->bj", m, jnp.stack([a, b, m])).sum(1) + jnp.trace(a @ b @ m) * b[0]


def crossing(t, y, p):
    return jnp.cross(y, p) + jnp.cross(jnp.asarray([0.0, 0.5, 1.0], y.dtype), y)


def polynomials(t, y, p):
    return jnp.polyval(p, y) + jnp.polyval(y, t)


def reductions(t, y, p):
    m = jnp.outer(y, p)
    total = m.sum(0) + m.max(1) + m.min() + m.prod(0) + jnp.cumsum(m, 1)[0] + jnp.cumprod(m, 0)[1] + m.mean()
    flags = (m > 0).any(0).astype(y.dtype) + (m > -1).all().astype(y.dtype)
    places = jnp.argmax(m, 1).astype(y.dtype) + jnp.argmin(m, 0).astype(y.dtype)
    return total + flags * p + places * y + lax.cummax(y) + lax.cummin(m, 1, True)[0] + jax.nn.softmax(y)


def ties(t, y, p):
    same = jnp.concatenate([y[:1], y[:1], y[:1], p])
    return same.max() * y + lax.cummax(same)[2] + same[:3].min()


def sorting(t, y, p):
    return jnp.sort(y) * p[jnp.argsort(p)] + lax.top_k(y, 4)[0] + y[jnp.argsort(y)]


def scalars(t, y, p):
    y = jnp.clip(y, -0.5, p[0]) + jnp.mod(y, 0.7) + jnp.sign(y) * jnp.abs(y) ** 1.5 + jax.nn.gelu(y)
    y = (
        y
        + jnp.arctan2(y, p)
        + jnp.hypot(y, p)
        + jax.scipy.special.erf(y)
        + jnp.sinc(y)
        + jax.nn.sigmoid(p * y)
    )
    y = (
        y
        + y**3
        + jnp.square(p)
        + jnp.power(jnp.abs(p) + 1, y)
        + jnp.expm1(y)
        + jnp.log1p(y * y)
        + lax.rsqrt(y * y + 1)
    )
    return (
        y
        + (y > p).astype(y.dtype)
        + jnp.floor(y) * p
        + jnp.minimum(y, t)
        + jnp.logaddexp(y, p)
        + jnp.round(p)
    )


def integers(t, y, i, j):
    k = (i * 3 + j) % 5 ^ (i << 1)
    k = jnp.where(k > 2, -k, k) // 2 + jnp.maximum(i, j) + jnp.cumsum(j) + i @ j
    return y * k.astype(y.dtype) + (i & j == 0).astype(y.dtype)


def rematerialised(t, y, p):
    return jax.checkpoint(lambda y: jnp.sin(y) * p)(y) + jax.jit(lambda y: y * y)(y)


@jax.custom_jvp
def odd_square(x, p, n):
    return x * x * p + n.astype(x.dtype), n + 1


@odd_square.defjvp
def _(primals, tangents):
    x, p, n = primals
    dx, dp, dn = tangents
    out = odd_square(x, p, n)
    return out, (7 * x * dx + 11 * dp * jnp.sin(x), dn)


@jax.custom_vjp
def odd_product(x, p, n):
    return x * p * n.astype(x.dtype), jnp.sum(x) * p * n.astype(x.dtype)


def _odd_product_backward(residuals, cotangents):
    x, p = residuals
    first, second = cotangents
    return 5 * first * x + second, 13 * jnp.sum(first * p), None


odd_product.defvjp(lambda x, p, n: (odd_product(x, p, n), (x, p)), _odd_product_backward)


def custom_jvp(t, y, p, n):
    first, m = odd_square(y, p[0], n)
    second, _ = odd_square(p[1], p[2], m)
    third, _ = odd_square(y[0], y[1], jnp.int32(3))
    return first * second + third + lax.cond(y[0] > 0, lambda y: odd_square(y, p[0], n)[0], lambda y: y, y)


def custom_vjp(t, y, p, n):
    first, total = odd_product(y, p[0], n)
    second, _ = odd_product(p, y[0], n)
    return first * total + second + lax.scan(lambda c, _: odd_product(c, p[1], n), y, None, length=2)[0]


def constant(t, y):
    return jnp.zeros_like(y) + 2


def many_results(t, y, p):
    return y, p, t, jnp.arange(3), y[0] > 0


I32 = functools.partial(np.array, dtype=np.int32)
CASES = {
    "lorenz": Case(lorenz, (3,), ((3,),), (False,)),
    "lorenz, lane operands": Case(lorenz, (3,), ((3,),), (True,)),
    "perceptron tanh": Case(functools.partial(perceptron, jnp.tanh), (2,), WEIGHTS, (False,) * 6),
    "perceptron relu": Case(functools.partial(perceptron, jax.nn.relu), (2,), WEIGHTS, (False,) * 6),
    "perceptron softplus": Case(
        functools.partial(perceptron, jax.nn.softplus), (2,), WEIGHTS, (True, False) * 3
    ),
    "small perceptron relu": Case(functools.partial(perceptron, jax.nn.relu), (2,), SMALL, (False,) * 6),
    "small perceptron softplus": Case(
        functools.partial(perceptron, jax.nn.softplus), (2,), SMALL, (True, False) * 3
    ),
    "dense": Case(dense, (12,), ((), (12, 12)), (False, False)),
    "dense, lane operands": Case(dense, (12,), ((), (12, 12)), (True, True)),
    "bodies": Case(bodies, (2, 3, 2), ((3,),), (False,)),
    "cond": Case(branching, (4,), ((4,),), (False,)),
    "window at a shared index": Case(
        shared_window, (4,), ((4,), I32(2)), (False, False), "dynamic_slice at an index"
    ),
    "cond on a shared value": Case(branching_on_shared, (4,), ((4,),), (False,)),
    "switch": Case(switching, (4,), ((4,), I32(2)), (False, True)),
    "switch, shared": Case(switching, (4,), ((4,), I32(1)), (False, False)),
    "where": Case(choosing, (4,), ((4,),), (False,)),
    "scan": Case(scanning, (4,), ((4,),), (False,)),
    "scan reversed": Case(scanning_reversed, (4,), ((4,),), (False,)),
    "fori_loop": Case(counting, (4,), ((4,),), (False,)),
    "one_hot": Case(one_hot, (4,), ((4,), I32(2)), (False, True)),
    "static index": Case(indexing, (4,), ((4,),), (False,)),
    "static index, lanes": Case(indexing, (4,), ((4,),), (True,)),
    "at": Case(at_kinds, (4,), ((4,),), (False,)),
    "windows": Case(windows, (4,), ((4,),), (False,)),
    "moving windows": Case(moving_windows, (4,), ((4,), I32(1)), (False, True), "dynamic_slice at an index"),
    "moving windows, shared": Case(
        moving_windows, (4,), ((4,), I32(2)), (False, False), "dynamic_slice at an index"
    ),
    "interp": Case(interpolating, (3,), ((6,), (6,)), (False, False), "gather at an index"),
    "searchsorted": Case(searching, (3,), ((6,),), (False,), "dynamic_slice at an index"),
    "table": Case(looking_up, (3,), ((4,), I32(1)), (False, True), "dynamic_slice at an index"),
    "table, lanes": Case(looking_up, (3,), ((4, 3), I32(1)), (True, True), "dynamic_slice at an index"),
    "shapes": Case(shapes, (4,), ((4,),), (False,)),
    "pad": Case(padding, (4,), ((4,),), (False,)),
    "einsum": Case(einsums, (3,), ((3, 3), (3, 3)), (False, True)),
    "cross": Case(crossing, (3,), ((3,),), (False,)),
    "polyval": Case(polynomials, (3,), ((4,),), (False,)),
    "reductions": Case(reductions, (3,), ((3,),), (False,)),
    "ties": Case(ties, (3,), ((2,),), (False,)),
    "sort": Case(sorting, (4,), ((4,),), (False,), "sort"),
    "scalars": Case(scalars, (4,), ((4,),), (False,)),
    "integers": Case(integers, (3,), (I32([1, 5, 2]), I32([3, 0, 4])), (False, True)),
    "calls": Case(rematerialised, (3,), ((3,),), (False,)),
    "custom_jvp": Case(custom_jvp, (3,), ((3,), I32(2)), (False, True)),
    "custom_jvp, lane operands": Case(custom_jvp, (3,), ((3,), I32(2)), (True, False)),
    "custom_vjp": Case(custom_vjp, (3,), ((3,), I32(2)), (False, True)),
    "constant": Case(constant, (3,)),
    "many results": Case(many_results, (3,), ((2,),), (False,)),
}


class Setup(NamedTuple):
    jaxpr: Any
    lane: tuple[bool, ...]
    inputs: list[Any]
    axes: list[int | None]


def setup(case: Case, dtype: Any, block: int, seed: int = 0) -> Setup:
    rng = np.random.default_rng(seed)
    lane = (True, True, *case.lane)

    def draw(spec: Any, lanes: bool) -> Any:
        if isinstance(spec, np.ndarray):
            return np.stack([(spec + i) % 3 for i in range(block)], -1).astype(spec.dtype) if lanes else spec
        return rng.normal(size=(*spec, block) if lanes else spec).astype(dtype)

    specs = [(), case.state, *case.operands]
    inputs = [draw(s, k) for s, k in zip(specs, lane, strict=True)]
    if case.field in (interpolating, searching):
        inputs[2] = np.sort(inputs[2])
    one = [x[..., 0] if k else x for x, k in zip(inputs, lane, strict=True)]
    return Setup(jax.make_jaxpr(case.field)(*one), lane, inputs, [-1 if k else None for k in lane])


def is_float(x: Any) -> bool:
    return jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating)


def as_function(lifted: lanes.Lift) -> Callable[..., list[Any]]:
    """The lifted function on whole arrays, lanes last."""

    def function(*inputs: Any, mask: Any = None) -> list[Any]:
        parts = []
        for x, v in zip(inputs, lifted.jaxpr.in_avals, strict=True):
            parts.append([x[i] for i in lifted.pieces(v.shape)])
        outs = []
        for parts_out, v in zip(lifted(parts, mask), lifted.jaxpr.out_avals, strict=True):
            outs.append(
                parts_out[0] if lifted.kind != "components" else jnp.stack(parts_out).reshape(*v.shape, -1)
            )
        return outs

    return function


def with_gradients(function: Callable[..., Any], weights: Callable[[int, Any], Any]) -> Callable[..., Any]:
    """Values, and the gradient of a weighted sum of the float results with respect to every float input."""

    def both(*inputs: Any) -> Any:
        floats = [i for i, x in enumerate(inputs) if is_float(x)]

        def loss(*chosen: Any) -> Any:
            merged = list(inputs)
            for i, x in zip(floats, chosen, strict=True):
                merged[i] = x
            outs = jax.tree.leaves(function(*merged))
            return sum(jnp.sum(o * weights(k, o)) for k, o in enumerate(outs) if is_float(o)), outs

        (_, outs), gradients = jax.value_and_grad(loss, tuple(range(len(floats))), has_aux=True)(
            *[inputs[i] for i in floats]
        )
        return outs, gradients

    return both


def weights(k: int, out: Any) -> Any:
    """Fixed, all different, the same for every lift: a generic cotangent."""
    return jnp.cos(jnp.arange(out.size, dtype=out.dtype).reshape(out.shape) + k)


def close(actual: Any, expected: Any) -> None:
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape and a.dtype == e.dtype
        tolerance = TOLERANCE.get(np.dtype(e.dtype), 0)
        scale = np.max(np.abs(np.where(np.isfinite(e), e, 0)), initial=1) if tolerance else 1
        np.testing.assert_allclose(a, e, rtol=tolerance, atol=tolerance * scale)


def oracle(s: Setup) -> Callable[..., Any]:
    function = jex_core.jaxpr_as_fun(s.jaxpr)
    return lambda *xs: jax.vmap(function, in_axes=s.axes, out_axes=-1, axis_size=xs[0].shape[-1])(*xs)


@pytest.mark.parametrize(
    "name, dtype, block",
    [(n, np.float64, 5) for n in CASES] + [(n, np.float32, 1) for n in list(CASES)[1::5]],
)
def test_lifts_equal_vmap(name: str, dtype: Any, block: int) -> None:
    case = CASES[name]
    s = setup(case, dtype, block)
    assert lanes.unsupported(s.jaxpr, s.lane) is None
    obstacle = lanes.component_obstacle(s.jaxpr, s.lane)
    assert (obstacle or "").startswith(case.obstacle or "") and (obstacle is None) == (case.obstacle is None)
    small = (
        lanes.operation_count(s.jaxpr) < 300 or name == "perceptron tanh"
    )  # what XLA can compile within a second
    kinds = ["arrays", *(["components"] if obstacle is None and small else [])]
    lifted = [lanes.lift(s.jaxpr, s.lane, kind, differentiated=True) for kind in kinds]
    # Only these have something that a lift which will not be differentiated leaves out.
    differs = {e.primitive.name for e in equations(s.jaxpr.jaxpr)} & {"cond", "reduce_max", "cummax", *CUSTOM}
    plain = [lanes.lift(s.jaxpr, s.lane, kind, differentiated=False) for kind in kinds if differs]

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(*inputs: Any) -> Any:
        expected = with_gradients(oracle(s), weights)(*inputs)
        quick = [a for a in lifted if a.kind != "components" or lanes.operation_count(s.jaxpr) < 150]
        return (
            expected,
            [with_gradients(as_function(a), weights)(*inputs) for a in quick],
            [as_function(a)(*inputs) for a in plain],
        )

    (outs, gradients), differentiated, undifferentiated = run(*s.inputs)
    for values, grads in differentiated:
        close(values, outs)
        close(grads, gradients)
    for values in undifferentiated:
        close(values, outs)


@pytest.mark.parametrize("name", ["lorenz", "table", "custom_vjp", "many results"])
def test_vmap_lift(name: str) -> None:
    s = setup(CASES[name], np.float64, 5)
    lifted = lanes.lift(s.jaxpr, s.lane, "vmap", differentiated=True)
    assert lifted.spreads_shared and lifted.pieces((2, 3)) == [()]
    outs, gradients = jax.jit(with_gradients(as_function(lifted), weights))(*s.inputs)
    expected, expected_gradients = jax.jit(with_gradients(oracle(s), weights))(*s.inputs)
    close(outs, expected)
    close(gradients, expected_gradients)


@pytest.mark.parametrize("name", ["lorenz", "cond", "reductions", "custom_jvp", "einsum"])
def test_components_with_shared_operands_spread(name: str) -> None:
    """The caller gives shared operands lanes, differentiates, and sums over the lanes."""
    s = setup(CASES[name], np.float64, 5)
    lifted = lanes.lift(s.jaxpr, s.lane, "components", differentiated=True)
    wide = [
        x if k else np.broadcast_to(x[..., None], (*x.shape, 5))
        for x, k in zip(s.inputs, s.lane, strict=True)
    ]
    outs, gradients = jax.jit(with_gradients(as_function(lifted), weights), compiler_options=QUICK)(*wide)
    expected, expected_gradients = jax.jit(with_gradients(oracle(s), weights))(*s.inputs)
    close(outs, expected)
    floats = [k for x, k in zip(s.inputs, s.lane, strict=True) if is_float(x)]
    close([g if k else g.sum(-1) for g, k in zip(gradients, floats, strict=True)], expected_gradients)


def has_shared(name: str) -> bool:
    case = CASES[name]
    return not all(k or isinstance(o, np.ndarray) for o, k in zip(case.operands, case.lane, strict=True))


SHARED = [n for n in CASES if has_shared(n) and (not n.startswith("perceptron") or n.endswith("relu"))]


def shared_gradients(
    function: Callable[..., Any], s: Setup, inputs: Sequence[Any], ct: Callable[..., Any]
) -> Any:
    places = [i for i, k in enumerate(s.lane) if not k and is_float(inputs[i])]

    def of_shared(*shared: Any) -> Any:
        merged = list(inputs)
        for i, x in zip(places, shared, strict=True):
            merged[i] = x
        return [o for o in function(*merged) if is_float(o)]

    outs, pull = jax.vjp(of_shared, *[inputs[i] for i in places])
    return pull([ct(k, o) for k, o in enumerate(outs)])


@pytest.mark.parametrize("name", SHARED)
def test_dead_lanes_give_shared_operands_nothing(name: str) -> None:
    poison = np.array([1.0, np.nan, 1.0, 1.0, np.inf])
    s = setup(CASES[name], np.float64, 5, seed=1)
    mask = np.array([True, False, True, True, False])
    lifted = lanes.lift(s.jaxpr, s.lane, "arrays", differentiated=True)
    poisoned = [
        np.where(mask, x, poison) if k and is_float(x) else x for x, k in zip(s.inputs, s.lane, strict=True)
    ]
    living = [x[..., mask] if k else x for x, k in zip(s.inputs, s.lane, strict=True)]

    def cotangent(k: int, out: Any) -> Any:
        return jnp.cos(jnp.arange(out.size, dtype=out.dtype).reshape(out.shape) + k)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(poisoned: Any, living: Any) -> Any:
        def poisoned_cotangent(k: int, out: Any) -> Any:
            return cotangent(k, out) * poison

        def living_cotangent(k: int, out: Any) -> Any:
            return cotangent(k, jnp.zeros((*out.shape[:-1], 5), out.dtype))[..., mask]

        def nothing(*inputs: Any) -> Any:
            return as_function(lifted)(*inputs, mask=jnp.zeros(5, bool))

        masked = shared_gradients(
            lambda *x: as_function(lifted)(*x, mask=jnp.asarray(mask)), s, poisoned, poisoned_cotangent
        )
        none = shared_gradients(nothing, s, poisoned, lambda k, o: jnp.full_like(o, jnp.nan))
        return masked, none, shared_gradients(oracle(s), s, living, living_cotangent)

    masked, none, expected = run(poisoned, living)
    assert len(expected)
    close(masked, expected)
    for g in none:
        np.testing.assert_array_equal(g, 0)


def lanes_of(field: Callable[..., Any], *inputs: Any, lane: tuple[bool, ...]) -> Setup:
    one = [x[..., 0] if k else x for x, k in zip(inputs, lane, strict=True)]
    return Setup(jax.make_jaxpr(field)(*one), lane, list(inputs), [-1 if k else None for k in lane])


@pytest.mark.parametrize("kind", ["arrays", "components"])
def test_branch_not_taken_has_no_derivative(kind: str) -> None:
    """sqrt has an infinite derivative at 0, where the other branch is taken: as for one trajectory, not as under vmap."""

    def field(t: Any, y: Any, p: Any) -> Any:
        return lax.cond(y > 0, lambda y, p: jnp.sqrt(y * p), lambda y, p: 3 * y, y, p)

    y, p, t = np.array([0.0, 0.5, 0.0, 2.0]), np.array(1.5), np.zeros(4)
    s = lanes_of(field, t, y, p, lane=(True, True, False))
    function = as_function(lanes.lift(s.jaxpr, s.lane, kind, differentiated=True))
    spread = np.broadcast_to(p, 4) if kind == "components" else p
    outs, (_, dy, dp) = with_gradients(function, weights)(t, y, spread)
    each = [jax.value_and_grad(field, (1, 2))(0.0, a, p) for a in y]
    w = weights(0, outs[0])
    np.testing.assert_allclose(outs[0], [v for v, _ in each])
    np.testing.assert_allclose(dy, [g[0] * c for (_, g), c in zip(each, w, strict=True)])
    np.testing.assert_allclose(jnp.sum(dp), sum(g[1] * c for (_, g), c in zip(each, w, strict=True)))


@pytest.mark.parametrize("kind", ["arrays", "components"])
def test_custom_vjp_result_that_depends_on_no_lane(kind: str) -> None:
    """Against the sum over trajectories: here `jax.vmap` (0.10.2) counts the second result once per lane too often."""

    @jax.custom_vjp
    def product(x: Any, p: Any) -> Any:
        return x * p, jnp.sin(p)

    def backward(residuals: Any, cotangents: Any) -> Any:
        x, p = residuals
        return 3 * cotangents[0] * p, cotangents[0] * x + 7 * cotangents[1]

    product.defvjp(lambda x, p: (product(x, p), (x, p)), backward)

    def field(t: Any, y: Any, p: Any) -> Any:
        return product(y, p)[0] + product(p, 2 * p)[1] + product(y, p)[1]

    y, p, t = np.array([0.3, 0.5, -1.0, 2.0]), np.array(1.5), np.zeros(4)
    s = lanes_of(field, t, y, p, lane=(True, True, False))
    function = as_function(lanes.lift(s.jaxpr, s.lane, kind, differentiated=True))
    (out,), (_, dy, dp) = with_gradients(function, weights)(*s.inputs)
    each = [jax.value_and_grad(field, (1, 2))(0.0, a, p) for a in y]
    w = weights(0, out)
    np.testing.assert_allclose(out, [v for v, _ in each])
    np.testing.assert_allclose(dy, [g[0] * c for (_, g), c in zip(each, w, strict=True)])
    np.testing.assert_allclose(dp, sum(g[1] * c for (_, g), c in zip(each, w, strict=True)))


def newton(t, y, p):
    def body(state):
        y, n = state
        return y - (y * y - p) / (2 * y), n + 1

    root, steps = lax.while_loop(lambda s: jnp.abs(s[0] ** 2 - p) > 1e-9, body, (y, 0))
    return root, steps


def lane_trips(t, y, p, n):
    return lax.fori_loop(0, n, lambda i, c: c * p + i.astype(c.dtype), y)


def shared_condition(t, y, p, n):
    return lax.while_loop(lambda s: s[0] < n, lambda s: (s[0] + 1, jnp.sin(s[1]) + p), (0, y))


@pytest.mark.parametrize(
    "field, operands, lane",
    [
        (newton, (np.array(2.0),), (False,)),
        (newton, (np.array([1.0, 2.0, 30.0, 4.0]),), (True,)),
        (lane_trips, (np.array(0.5), np.array([0, 3, 1, 7])), (False, True)),
        (lane_trips, (np.array(0.5), np.array(3)), (False, False)),
        (shared_condition, (np.array(0.5), np.array(3)), (False, False)),
    ],
)
def test_while(field: Any, operands: Any, lane: Any) -> None:
    y = np.array([1.0, 0.3, 2.0, 5.0])
    s = lanes_of(field, np.zeros(4), y, *operands, lane=(True, True, *lane))
    assert lanes.unsupported(s.jaxpr, s.lane) is None
    assert lanes.component_obstacle(s.jaxpr, s.lane) == "while"
    function = as_function(lanes.lift(s.jaxpr, s.lane, "arrays", differentiated=True))
    expected = oracle(s)(*s.inputs)
    close(jax.jit(function)(*s.inputs), expected)
    tangents = [np.ones_like(x) if is_float(x) else np.zeros(x.shape, jax.dtypes.float0) for x in s.inputs]
    moved = [t for t in jax.jvp(function, s.inputs, tangents)[1] if t.dtype != jax.dtypes.float0]
    close(moved, [t for t in jax.jvp(oracle(s), s.inputs, tangents)[1] if t.dtype != jax.dtypes.float0])


def test_dead_lanes_do_not_keep_a_loop_going() -> None:
    def field(t: Any, y: Any) -> Any:
        return lax.while_loop(lambda y: ~(y > 10), lambda y: y + 1, y)  # never ends on NaN

    y = np.array([1.0, np.nan, 20.0])
    s = lanes_of(field, np.zeros(3), y, lane=(True, True))
    function = as_function(lanes.lift(s.jaxpr, s.lane, "arrays", differentiated=False))
    (out,) = function(*s.inputs, mask=jnp.array([True, False, True]))
    np.testing.assert_array_equal(out[np.array([0, 2])], [11.0, 20.0])


@pytest.mark.parametrize("kind", ["arrays", "components"])
@pytest.mark.parametrize("name", ["lorenz", "cond", "custom_vjp", "scan", "static index"])
def test_inside_a_while_loop_with_its_vjp(kind: str, name: str) -> None:
    """As the adjoint uses it: the vjp of a step within a dynamic loop."""
    s = setup(CASES[name], np.float64, 5)

    def sweep(function: Callable[..., Any], *inputs: Any) -> Any:
        t, y, *operands = inputs

        def step(state: Any) -> Any:
            i, y, ct = state
            out, pull = jax.vjp(lambda y: y + 0.01 * function(t, y, *operands)[0], y)
            return i + 1, out, pull(ct)[0]

        return lax.while_loop(lambda s: s[0] < 3, step, (0, y, jnp.ones_like(y)))[1:]

    reference = oracle(s)
    results = [
        jax.jit(functools.partial(sweep, function), compiler_options=QUICK)(*s.inputs)
        for function in (
            as_function(lanes.lift(s.jaxpr, s.lane, kind, differentiated=True)),
            lambda *xs: jax.tree.leaves(reference(*xs)),
        )
    ]
    close(*results)


def equations(jaxpr: Any) -> list[Any]:
    found = []
    for eqn in jaxpr.eqns:
        found.append(eqn)
        for inner in jex_core.jaxprs_in_params(eqn.params):
            found += equations(inner)
    return found


@pytest.mark.parametrize("field", [dense, lambda t, y, p, w: p * (jnp.tanh(y) @ w) - y])
def test_shared_matrix_gives_one_product(field: Any) -> None:
    y, w, block = np.ones((12, 128)), np.ones((12, 12)), 128
    s = lanes_of(field, np.zeros(block), y, np.array(2.0), w, lane=(True, True, False, False))
    function = as_function(lanes.lift(s.jaxpr, s.lane, "arrays", differentiated=True))
    forward = equations(jax.make_jaxpr(function)(*s.inputs).jaxpr)
    names = [e.primitive.name for e in forward]
    assert names.count("dot_general") == 1 and "transpose" not in names
    (product,) = [e for e in forward if e.primitive.name == "dot_general"]
    assert [v.aval.shape for v in product.invars] == [(12, 12), (12, block)]
    mask = np.arange(block) < 100
    for kwargs in ({}, {"mask": mask}):
        both = with_gradients(functools.partial(function, **kwargs), weights)
        backward = equations(jax.make_jaxpr(both)(*s.inputs).jaxpr)
        assert [e.primitive.name for e in backward].count("dot_general") == 3
        # JAX's transposition rule for a product swaps its factors and turns the result; XLA turns the product instead.
        text = jax.jit(both).lower(*s.inputs).compile().as_text()
        assert " dot(" in text and " transpose(" not in text


@pytest.mark.parametrize(
    "name", ["lorenz", "static index", "shapes", "cross", "fori_loop", "integers", "bodies"]
)
def test_components_are_elementwise_on_lane_vectors(name: str) -> None:
    s = setup(CASES[name], np.float64, 5)
    lifted = lanes.lift(s.jaxpr, s.lane, "components", differentiated=False)
    parts = [[x[i] for i in lifted.pieces(v.shape)] for x, v in zip(s.inputs, s.jaxpr.in_avals, strict=True)]
    jaxpr = jax.make_jaxpr(lifted)(parts)
    assert not jaxpr.consts
    for eqn in equations(jaxpr.jaxpr):
        assert eqn.primitive.name in lanes._ELEMENTWISE | {"broadcast_in_dim"}
        assert all(v.aval.shape in ((), (5,)) for v in [*eqn.invars, *eqn.outvars])


def test_components_skip_zeros_and_ones() -> None:
    matrix = np.array([[0.0, 1.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    s = lanes_of(lambda t, y: jnp.asarray(matrix) @ y, np.zeros(5), np.ones((3, 5)), lane=(True, True))
    lifted = lanes.lift(s.jaxpr, s.lane, "components", differentiated=True)
    jaxpr = jax.make_jaxpr(lifted)([[np.ones(5)], [np.ones(5)] * 3])
    assert [e.primitive.name for e in jaxpr.eqns] == ["mul", "broadcast_in_dim"]


def test_undifferentiated_lift_inlines_custom_rules() -> None:
    s = setup(CASES["custom_vjp"], np.float64, 5)
    for kind in ("arrays", "components"):
        function = as_function(lanes.lift(s.jaxpr, s.lane, kind, differentiated=False))
        names = {e.primitive.name for e in equations(jax.make_jaxpr(function)(*s.inputs).jaxpr)}
        assert not any(name.startswith("custom") for name in names)


def host(y):
    return jax.pure_callback(lambda y: y, jax.ShapeDtypeStruct(y.shape, y.dtype), y)


def printing(y):
    jax.debug.print("{y}", y=y)
    return y


@jax.custom_jvp
def bad_rule(x):
    return 2 * x


bad_rule.defjvp(lambda p, t: (bad_rule(*p), jnp.linalg.solve(jnp.eye(3), t[0])))


@pytest.mark.parametrize(
    "function, expected",
    [
        (host, "pure_callback"),
        (printing, "debug"),
        (lambda y: y + jax.random.normal(jax.random.key(0), (3,)), "random"),
        (lambda y: jnp.linalg.cholesky(jnp.outer(y, y)) @ y, "cholesky"),
        (lambda y: jnp.linalg.solve(jnp.outer(y, y), y), "lu"),
        (lambda y: jnp.linalg.eigh(jnp.outer(y, y))[0], "eigh"),
        (lambda y: jnp.real(jnp.fft.rfft(y)), "fft"),
        (lambda y: jnp.convolve(y, y)[:3], "conv_general_dilated"),
        (lambda y: lax.cond(y[0] > 0, host, lambda y: y, y), "pure_callback"),
        (lambda y: lax.scan(lambda c, _: (host(c), None), y, None, length=2)[0], "pure_callback"),
        (lambda y: lax.while_loop(lambda c: host(c)[0] < 0, lambda c: c, y), "pure_callback"),
        (lambda y: jnp.abs(lax.complex(y, y)), "complex"),
        (lambda y: lax.reshape(jnp.outer(y, y), (9,), dimensions=(1, 0)), "reshape"),
        (bad_rule, "lu"),
    ],
    ids=[f"{i}" for i in range(14)],
)
def test_unsupported_is_named(function: Any, expected: str) -> None:
    jaxpr = jax.make_jaxpr(lambda t, y: function(y))(0.0, np.ones(3))
    names = lanes.unsupported(jaxpr, (True, True)), lanes.component_obstacle(jaxpr, (True, True))
    assert all(name is not None and expected in name for name in names)


def test_forward_alone_does_not_ask_for_the_derivative_rule() -> None:
    jaxpr = jax.make_jaxpr(lambda t, y: bad_rule(y))(0.0, np.ones(3))
    assert lanes.unsupported(jaxpr, (True, True), differentiated=False) is None
    assert lanes.component_obstacle(jaxpr, (True, True), differentiated=False) is None


def test_long_scan_is_an_obstacle() -> None:
    jaxpr = jax.make_jaxpr(lambda t, y: lax.fori_loop(0, 1000, lambda i, y: jnp.sin(y), y))(0.0, np.ones(3))
    assert lanes.unsupported(jaxpr, (True, True)) is None
    assert lanes.component_obstacle(jaxpr, (True, True)) == "scan of 1000 steps"


def test_operation_count() -> None:
    def count(function: Any, *args: Any) -> int:
        return lanes.operation_count(jax.make_jaxpr(function)(*args).jaxpr)

    y, w = np.ones(4), np.ones((3, 4))
    assert count(lambda y: jnp.sin(y) * y, y) == 8
    assert count(lambda y, w: w @ y, y, w) == 12
    assert count(lambda y: jnp.stack([y, y])[:, ::-1].T.reshape(-1), y) == 0
    assert count(jnp.sum, y) == 4
    assert count(lambda y: lax.scan(lambda c, _: (jnp.sin(c), None), y, None, length=5)[0], y) == 20
    assert count(lambda y: lax.cond(True, lambda y: jnp.sin(y), lambda y: jnp.sin(jnp.cos(y)), y), y) == 8


def test_arguments_are_checked() -> None:
    jaxpr = jax.make_jaxpr(lambda t, y: y)(0.0, np.ones(3)).jaxpr
    with pytest.raises(ValueError, match="unknown kind"):
        lanes.lift(jaxpr, (True, True), "rows", differentiated=False)
    with pytest.raises(ValueError, match="one entry for each of 2 inputs"):
        lanes.lift(jaxpr, (True,), "arrays", differentiated=False)


# A program is a list of instructions; each takes arrays from the pool by number and adds one to it. Sizes stay small, and
# values in a range where nothing overflows.


def fit(x: Any, shape: tuple[int, ...]) -> Any:
    """x made to have this shape, by repeating and cutting."""
    size = int(np.prod(shape))
    return jnp.tile(jnp.ravel(x), -(-size // max(x.size, 1)))[:size].reshape(shape)


def cut(x: Any) -> Any:
    return jnp.ravel(x)[:12] if x.size > 12 else x


def axis(x: Any, k: int) -> int:
    return k % x.ndim


def vector(x: Any) -> Any:
    return jnp.atleast_1d(x)


INSTRUCTIONS: dict[str, Callable[[Any, Any, int], Any]] = {
    "add": lambda x, y, k: x + fit(y, x.shape),
    "mul": lambda x, y, k: jnp.sin(x * fit(y, x.shape)),
    "div": lambda x, y, k: x / (1 + fit(y, x.shape) ** 2),
    "max": lambda x, y, k: jnp.maximum(x, fit(y, x.shape)),
    "where": lambda x, y, k: jnp.where(x > fit(y, x.shape), jnp.exp(-(x**2)), fit(y, x.shape)),
    "pick": lambda x, y, k: jnp.where(y.sum() > 0, x, 2 * x),
    "clip": lambda x, y, k: jnp.clip(x, -0.5, y.max()),
    "tanh": lambda x, y, k: jnp.tanh(x),
    "power": lambda x, y, k: x ** (k % 4),
    "outer": lambda x, y, k: jnp.outer(jnp.ravel(x)[:3], jnp.ravel(y)[:4]),
    "matvec": lambda x, y, k: jnp.tanh(fit(x, (2 + k % 2, 3)) @ fit(y, (3,))),
    "matmul": lambda x, y, k: jnp.tanh(fit(x, (2, 3)) @ fit(y, (3, 2 + k % 3))),
    "batched": lambda x, y, k: jnp.tanh(jnp.einsum("bij,bj->ib", fit(x, (2, 2, 3)), fit(y, (2, 3)))),
    "tensor": lambda x, y, k: jnp.tanh(jnp.einsum("ijk,kl->jli", fit(x, (2, 2, 3)), fit(y, (3, 2)))),
    "sum": lambda x, y, k: jnp.sum(vector(x), axis(vector(x), k)),
    "reduce_max": lambda x, y, k: jnp.max(vector(x), axis(vector(x), k)),
    "prod": lambda x, y, k: jnp.prod(jnp.sin(vector(x)), axis(vector(x), k)),
    "cumsum": lambda x, y, k: jnp.tanh(jnp.cumsum(vector(x), axis(vector(x), k))),
    "cummax": lambda x, y, k: lax.cummax(vector(x), axis(vector(x), k), k % 2 == 0),
    "argmax": lambda x, y, k: vector(y) * jnp.argmax(vector(x), axis(vector(x), k)).sum().astype(x.dtype) / 8,
    "sort": lambda x, y, k: jnp.sort(vector(x), axis(vector(x), k)),
    "transpose": lambda x, y, k: jnp.transpose(x),
    "reshape": lambda x, y, k: jnp.reshape(x, (-1, 1) if k % 2 else (1, -1)),
    "concatenate": lambda x, y, k: jnp.concatenate([jnp.ravel(x)[:6], jnp.ravel(y)[:6]]),
    "stack": lambda x, y, k: jnp.stack([jnp.ravel(x)[:1], jnp.ravel(y)[:1]], k % 2),
    "slice": lambda x, y, k: jnp.ravel(x)[k % 3 :: 1 + k % 2] if x.size > 3 else x,
    "reverse": lambda x, y, k: jnp.flip(vector(x), axis(vector(x), k)),
    "pad": lambda x, y, k: lax.pad(jnp.ravel(x)[:5], jnp.ravel(y)[0], ((k % 3 - 1, 1, k % 2),)),
    "roll": lambda x, y, k: jnp.roll(x, k),
    "gather": lambda x, y, k: jnp.ravel(x)[np.array([k, 1, 2 * k]) % x.size],
    "set": lambda x, y, k: jnp.ravel(x).at[k % x.size].set(jnp.ravel(y)[0]),
    "add_at": lambda x, y, k: jnp.ravel(x).at[np.array([k, 0, k]) % x.size].add(fit(y, (3,))),
    "look_up": lambda x, y, k: jnp.ravel(x)[jnp.clip(jnp.floor(2 * jnp.ravel(y)[0]), -2, 2).astype(int) % x.size],
    "cond": lambda x, y, k: lax.cond(y.sum() > 0, lambda x: jnp.sin(x), lambda x: x * y.max(), x),
    "scan": lambda x, y, k: lax.scan(lambda c, r: (jnp.sin(c * r + x), c.sum()), x, fit(y, (3,)), reverse=k % 2 == 0)[k % 2],
    "loop": lambda x, y, k: lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c + i.astype(c.dtype) * y.mean()), x),
    "integers": lambda x, y, k: x * (jnp.floor(jnp.clip(3 * fit(y, x.shape), -9, 9)).astype(int) % 3).astype(x.dtype),
    "softmax": lambda x, y, k: jax.nn.softmax(vector(x), axis(vector(x), k)),
    "relu": lambda x, y, k: jax.nn.relu(x) + jax.nn.softplus(y.sum()),
    "odd": lambda x, y, k: odd_square(x, jnp.sin(y.sum()), jnp.int32(k))[0] / 20,
    "odd_product": lambda x, y, k: odd_product(x, jnp.sin(y.sum()), jnp.int32(k % 3))[k % 2],
    "norm": lambda x, y, k: jnp.sqrt(1 + (x * x).sum()),
    "swap": lambda x, y, k: y,
}  # fmt: skip


def programs(names: Any) -> Any:
    return st.lists(
        st.tuples(st.sampled_from(sorted(names)), *[st.integers(0, 7)] * 3), min_size=1, max_size=7
    )


def program_case(program: Any, dtype: Any) -> Case:
    """A field that runs a program; every value it makes is a result."""

    def field(t: Any, y: Any, p: Any, q: Any, scale: Any) -> Any:
        pool = [y, p, q, scale, t, jnp.asarray([0.5, -1.0, 0.25], dtype)]
        for name, a, b, k in program:
            x, z = pool[-1 - a % len(pool)], pool[-1 - b % len(pool)]
            pool.append(cut(INSTRUCTIONS[name](x, z, k)))
        return pool[6:]

    return Case(field, (3,), ((2, 2), (4,), ()), (False, True, False))


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(programs(INSTRUCTIONS), st.sampled_from([np.float32, np.float64]), st.sampled_from([1, 5]))
def test_random_programs(program: Any, dtype: Any, block: int) -> None:
    case = program_case(program, dtype)
    s = setup(case, dtype, block, seed=len(program))
    assert lanes.unsupported(s.jaxpr, s.lane) is None
    kinds = ["arrays", *(["components"] if lanes.component_obstacle(s.jaxpr, s.lane) is None else [])]
    lifted = [as_function(lanes.lift(s.jaxpr, s.lane, kind, differentiated=True)) for kind in kinds]

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(*inputs: Any) -> Any:
        return [with_gradients(function, weights)(*inputs) for function in [oracle(s), *lifted]]

    (outs, gradients), *results = run(*s.inputs)
    for values, grads in results:
        close(values, outs)
        close(grads, gradients)
