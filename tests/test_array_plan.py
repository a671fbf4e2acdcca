"""The array plan: the same solves as the lanes plan, as diffrax and as forward sensitivities, with bounded memory."""

from __future__ import annotations

import functools
import re
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from problems import KEPLER, LORENZ, PERCEPTRON, SIR, spread

import pykernels as pk
from pykernels import array_plan, lanes
from pykernels.field import trace_field
from pykernels.kernels import cpu
from pykernels.kernels.stepper import Solve

ARRAY, LANES = pk.Config(plan="array"), pk.Config(plan="lanes")


def close(got: Any, want: Any, rtol: float) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.all(np.isfinite(b)) and np.any(np.asarray(b) != 0)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(np.abs(b).max()))


def total(ys: Any) -> jax.Array:
    """A scalar with different weights for everything."""
    leaves = jax.tree.leaves(ys)
    return sum(jnp.sum(jnp.sin(x + jnp.arange(float(x.size)).reshape(x.shape))) for x in leaves)


# The same numbers as the lanes plan.

# (problem, method, step, whether values are saved on the way)
SOLVES = {
    "lorenz, rejections": (LORENZ, pk.tsit5, pk.Adaptive(1e-4, 1e-6), False),
    "two leaves, saved": (KEPLER, pk.bosh3, pk.Adaptive(1e-4, 1e-6, pcoeff=0.3, icoeff=0.4, dtmax=0.4), True),
    "three leaves, another interpolant": (SIR, pk.heun, pk.Adaptive(1e-3, 1e-3), True),
    "shared weights": (PERCEPTRON, pk.heun, pk.Adaptive(1e-2, 1e-2), False),
    "fixed sizes": (LORENZ, pk.heun, pk.Fixed(0.013), True),
    "fixed number": (KEPLER, pk.rk4, pk.Fixed(40), False),
}


@pytest.mark.parametrize("name", SOLVES)
def test_values_and_gradients_of_the_lanes_plan(name):
    """Every trajectory has its own interval, every input its gradient."""
    problem, method, step, saved = SOLVES[name]
    adaptive = isinstance(step, pk.Adaptive)
    length = problem.t1 - problem.t0
    inputs = {
        "y0": spread(problem.y0(), 3),
        "args": jax.tree.map(jnp.asarray, problem.args()),
        "t0": jnp.asarray(problem.t0),
        "t1": problem.t0 + length * jnp.asarray([0.3, 0.2, 0.4]),
        "dt0": jnp.asarray(0.2) if adaptive else None,
        "dates": problem.t0 + length * jnp.asarray([0.0, 0.05, 0.11, 0.15]) if saved else None,
    }

    def field(t, y, args):
        return jax.tree.map(lambda k: k * (1 + 0.1 * jnp.sin(t)), problem.field(t, y, args))

    @functools.partial(jax.jit, static_argnums=1)
    @functools.partial(jax.value_and_grad, has_aux=True)
    def solved(inputs, config):
        sol = pk.solve_ensemble(
            field, inputs["y0"], inputs["t0"], inputs["t1"], inputs["args"], dt0=inputs["dt0"],
            save_at=inputs["dates"], method=method, step=step, config=config, max_steps=256,
        )  # fmt: skip
        return total(sol.ys), (sol.ys, sol.stats)

    (value, (ys, stats)), gradient = solved(inputs, ARRAY)
    (value_, (ys_, stats_)), gradient_ = solved(inputs, LANES)
    for a, b in zip(stats, stats_, strict=True):
        np.testing.assert_array_equal(a, b)
    close((value, ys), (value_, ys_), 1e-12)
    if saved:  # what is saved before the end does not move with it
        assert not np.any(gradient.pop("t1")) and not np.any(gradient_.pop("t1"))
    close(gradient, gradient_, 1e-9)
    if name == "lorenz, rejections":
        assert int(stats.rejected.max()) > 0 and len(set(np.asarray(stats.attempts))) > 1


def test_gradients_of_diffrax():
    """One trajectory with a pytree as state, and nothing of ours in the reference."""
    y0, args = KEPLER.y0(), KEPLER.args()

    def ours(y0, args):
        step = pk.Adaptive(1e-6, 1e-6)
        return total(pk.solve(KEPLER.field, y0, 0.0, 1.0, args, step=step, dt0=0.01, config=ARRAY).ys)

    def theirs(y0, args):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(KEPLER.field), diffrax.Tsit5(), 0.0, 1.0, 0.01, y0, args,
            stepsize_controller=diffrax.PIDController(rtol=1e-6, atol=1e-6), max_steps=64,
        )  # fmt: skip
        return total(jax.tree.map(lambda leaf: leaf[0], sol.ys))

    close(*(jax.jit(jax.value_and_grad(f, (0, 1)))(y0, args) for f in (ours, theirs)), 1e-9)


# Rows.


def test_narrow_rows_last_are_the_same_as_rows_first(monkeypatch):
    """Many rows of few columns: the field is evaluated with the rows last, forwards and backwards."""
    y0s = spread(PERCEPTRON.y0(), array_plan.MANY_ROWS)
    layers = jax.tree.map(jnp.asarray, PERCEPTRON.args())
    lifts = []
    lift = array_plan._narrow_lift
    monkeypatch.setattr(array_plan, "_narrow_lift", lambda *a: lifts.append(lift(*a)) or lifts[-1])

    def solved():
        def loss(layers, y0s):
            sols = pk.solve_ensemble(
                PERCEPTRON.field, y0s, 0.0, 1.0, layers, step=pk.Adaptive(1e-4, 1e-4), config=ARRAY
            )
            return total(sols.ys), sols.stats.attempts

        jax.clear_caches()
        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(layers, y0s)

    last = solved()
    assert lifts and all(lifts)
    monkeypatch.setattr(array_plan, "NARROW", 0)
    lifts.clear()
    first = solved()
    assert lifts and not any(lifts)
    close(last, first, 1e-10)


@pytest.mark.parametrize(
    ("field", "shapes"),
    [
        (lambda t, y, w: jnp.sin(t) * (w @ y), [(3,), (3, 3)]),
        (lambda t, y, w: lax.scan(lambda y, m: (jnp.tanh(m @ y), None), y, w)[0], [(2,), (3, 2, 2)]),
        (lambda t, y, w: jnp.outer(y, y) @ y, [(3,), ()]),
        (lambda t, y, w: lax.while_loop(lambda y: y[0] < 1, lambda y: y + y * (y @ y), y), [(2,), ()]),
        (lambda t, y, w: lax.cond(t > 1, lambda: w @ y, lambda: y * (y @ y)), [(2,), (2, 2)]),
    ],
)
def test_products_in_which_rows_have_both_factors(field, shapes):
    y, w = (jnp.ones(shape) for shape in shapes)
    traced, _ = trace_field(field, y, w)
    found = lanes.products_of_lanes(traced.jaxpr, (True, True, False))
    batched = jax.make_jaxpr(jax.vmap(field, in_axes=(0, 0, None)))(jnp.ones(5), jnp.ones((5, *y.shape)), w)
    batches = re.findall(r"dimension_numbers=\(\(.*?\), \((\[.*?\]), (\[.*?\])\)\)", str(batched))
    assert batches, "it has products"
    assert found == any(left != "[]" for left, _ in batches), "as JAX batches them"


@pytest.mark.parametrize("storage", [pk.Milestones(256, 1), pk.Milestones(4, 4)])
def test_rows_go_back_through_their_own_steps(storage):
    """As many steps are pulled back as the row with the most steps has, where every state is kept; rejected attempts, which
    are others in each row, cost nothing."""
    pulled = []

    @jax.custom_vjp
    def slope(y, rate):
        return rate * jnp.stack([y[1], -y[0]])

    def forwards(y, rate):
        return slope(y, rate), (y, rate)

    def backwards(kept, ct):
        y, rate = kept
        jax.debug.callback(lambda: pulled.append(1))
        return rate * jnp.stack([-ct[1], ct[0]]), ct @ jnp.stack([y[1], -y[0]])

    slope.defvjp(forwards, backwards)
    rates = jnp.asarray([1.0, 3.0, 9.0, 14.0])
    y0s = jnp.ones((4, 2))

    def loss(rates, slope, config):
        sols = pk.solve_ensemble(
            lambda t, y, rate: slope(y, rate * (1 + jnp.sin(6 * t) ** 2)), y0s, 0.0, 2.0, rates, in_axes=(0, 0),
            step=pk.Adaptive(1e-4, 1e-6), dt0=0.3, adjoint=storage, config=config, max_steps=255,
        )  # fmt: skip
        return total(sols.ys), sols.stats

    gradient, stats = jax.jit(jax.grad(lambda rates: loss(rates, slope, ARRAY), has_aux=True))(rates)
    jax.effects_barrier()
    stages = pk.tsit5.stages - 1
    assert len(pulled) % stages == 0
    steps, accepted, attempts = len(pulled) // stages, int(stats.accepted.max()), int(stats.attempts.max())
    assert attempts > accepted
    if storage.count == 256:
        assert steps == accepted
    else:
        assert accepted <= steps < attempts
    plain = slope.__wrapped__
    close(gradient, jax.grad(lambda rates: loss(rates, plain, LANES)[0])(rates), 1e-9)


# Storage.


@functools.cache
def gradient_with(count: int | None, scratch: int | None) -> Any:
    """Some 90 attempts, a quarter of them rejected, of trajectories out of step."""
    y0 = spread(SIR.y0(), 2, 0.3)

    def kicked(t, y, p):
        return jax.tree.map(lambda k: k * jnp.where(jnp.sin(9 * t) > 0, 3.0, 1.0), SIR.field(t, y, p))

    def loss(y0, args):
        sol = pk.solve_ensemble(
            kicked, y0, 0.0, 3.0, args, method=pk.heun, step=pk.Adaptive(1e-3, 1e-3), config=ARRAY, max_steps=200,
            adjoint=pk.Milestones(count, scratch),
        )  # fmt: skip
        return total(sol.ys), sol.stats

    (value, stats), gradient = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(y0, SIR.args())
    assert 60 < int(stats.attempts.max()) < 200 and int(stats.rejected.min()) > 10
    return value, gradient


@pytest.mark.parametrize(("count", "scratch"), [(3, 4), (7, 15), (200, 1)])
def test_gradients_do_not_depend_on_the_storage(count, scratch):
    """Thinned and nested, thinned, and every state kept, against one long segment."""
    close(gradient_with(count, scratch), gradient_with(3, 200), 1e-12)


def spec(elements: int, max_steps: int) -> Solve:
    shape = jax.ShapeDtypeStruct((elements,), np.float32)
    field, _ = trace_field(lambda t, y, args: -y, shape, None)
    return Solve(field, pk.tsit5, pk.Adaptive(), max_steps, False, None, "vmap", (False, False, True), 0)


def test_default_storage():
    """Small states are all kept; huge ones are few, at the price of levels that only long solves need."""
    small = array_plan.default_record(spec(2, 4096), 256)
    assert (small.base, small.count) == (1, 4097)
    medium = array_plan.default_record(spec(10_000, 4096), 1)
    assert (medium.base, medium.count) == (64, 65)
    assert array_plan.memory(spec(10_000, 4096), medium) == 4 * (10_000 * (65 + 64) + 2 * 4096 + 1)
    huge = spec(4_000_000, 4096)
    record = array_plan.default_record(huge, 1)
    assert record.count == 17
    assert array_plan.memory(huge, record) < array_plan.MILESTONE_BYTES
    # An ensemble in one call knows its size.
    assert array_plan.default_record(spec(2, 4096), 10**5).base > 1
    for most in (1, 2, 3, 10, 100):
        for elements in (1, 10**5, 10**9):
            record = array_plan.default_record(spec(elements, most), 1)
            assert record.count >= 3 and record.base >= 1


# Reaction and diffusion.


def shifted(u, edge, axis, by):
    """u moved along an axis; what comes in is `edge`."""
    padding = [(0, 0, 0)] * u.ndim
    padding[axis] = (by, -by, 0)
    return lax.pad(u, edge, padding)


def laplacian(u, edge):
    return sum(shifted(u, edge, axis, by) for axis in (0, 1) for by in (1, -1)) - 4 * u


def brusselator(t, y, p):
    """On a rectangle at whose edges the concentrations are those of the steady state."""
    u, v = y
    a, b, d = p
    rate = u * u * v
    return a + rate - (b + 1) * u + d * laplacian(u, a), b * u - rate + d * laplacian(v, b / a)


def concentrations(rows: int, columns: int, dtype: Any = np.float64) -> Any:
    x, y = np.linspace(0, 3, rows)[:, None], np.linspace(0, 5, columns)[None]
    return (1 + 0.3 * np.sin(x * y)).astype(dtype), (3 + 0.2 * np.cos(x - y)).astype(dtype)


RATES = tuple(jnp.asarray(x) for x in (1.0, 3.0, 0.2))


def test_gradient_against_forward_sensitivities():
    y0 = concentrations(13, 7)

    def loss(adjoint, y0, p):
        sol = pk.solve(
            brusselator, y0, 0.0, 1.5, p, method=pk.bosh3, step=pk.Adaptive(1e-4, 1e-4), adjoint=adjoint, config=ARRAY,
            max_steps=256,
        )  # fmt: skip
        return total(sol.ys)

    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=np.shape(x))), (y0, RATES))
    gradient = jax.jit(jax.grad(functools.partial(loss, pk.Milestones(5, 4)), (0, 1)))(y0, RATES)
    forward = functools.partial(loss, pk.ForwardOnly())
    along = jax.jit(lambda d: jax.jvp(forward, (y0, RATES), d)[1])(direction)
    inner = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, gradient, direction)))
    np.testing.assert_allclose(inner, along, rtol=1e-9)


STATE_BYTES = 2 * 4 * 128 * 257


@functools.cache
def compiled_gradient(count: int, scratch: int) -> Any:
    y0 = concentrations(128, 257, np.float32)
    rates = tuple(x.astype(np.float32) for x in RATES)

    def loss(y0, p):
        sol = pk.solve(
            brusselator, y0, 0.0, 1.0, p, step=pk.Adaptive(1e-4, 1e-4), adjoint=pk.Milestones(count, scratch),
            config=ARRAY, max_steps=48,
        )  # fmt: skip
        return jnp.sum(sol.ys[0])

    return jax.jit(jax.grad(loss, (0, 1))).lower(y0, rates).compile()


def test_memory_is_milestones_and_a_constant_number_of_states():
    sizes = {
        storage: compiled_gradient(*storage).memory_analysis().temp_size_in_bytes / STATE_BYTES
        for storage in ((5, 16), (15, 32))
    }
    # 48 attempts never need another level: count + 1 slots, made odd, and the scratch.
    few, many = sizes[5, 16] - (7 + 16), sizes[15, 32] - (17 + 32)
    assert abs(few - many) < 0.1, "nothing else grows"
    # A step's stages, their arguments and cotangents, what the field's derivative keeps, and the loops' carries.
    assert many < 24


def loops_of(text: str) -> dict[str, list[str]]:
    """The instructions of every loop body of a compiled program."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        header = re.match(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if header:
            name = header.group(1)
            found[name] = []
        else:
            found[name if name else ""] = [*found.get(name, []), line]
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    assert bodies
    return {body: found[body] for body in bodies}


def test_milestones_are_written_in_place():
    """No loop of the compiled program copies a buffer of milestones."""
    buffer = re.compile(r"f32\[(7|16),1,32896\]")
    bodies = loops_of(compiled_gradient(5, 16).as_text())
    lines = [line for body in bodies.values() for line in body]
    assert any(buffer.search(line) for line in lines)
    copies = [line for line in lines if re.search(r"= f32\[(7|16),1,32896\]\S* (copy|select|fusion)\(", line)]
    assert not copies, copies


# Shapes, runners, aliases.


def mixed(t, y, p):
    """Leaves of very different shapes, with an empty one."""
    mean = jnp.mean(y["many"])
    return {
        "one": -p * y["one"] + mean,
        "seven": jnp.roll(y["seven"], 1) - y["seven"] * y["one"],
        "many": -y["many"] * (1 + y["seven"][:3, None] ** 2),
        "none": y["none"],
    }


MIXED = {
    "one": np.asarray([1.0, 0.5]),
    "seven": np.linspace(-1, 1, 14).reshape(2, 7),
    "many": np.sin(np.arange(2 * 3 * 341.0)).reshape(2, 3, 341),
    "none": np.zeros((2, 0, 4)),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_odd_sizes_and_leaves_of_different_shapes(dtype):
    """Step kernels and plain JAX."""
    y0 = jax.tree.map(lambda x: jnp.asarray(x, dtype), MIXED)

    def solved(config: pk.Config) -> Any:
        @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
        def value(y0, p):
            sol = pk.solve_ensemble(
                mixed, y0, 0.0, 1.0, p, method=pk.heun, step=pk.Adaptive(1e-2, 1e-2), config=config, max_steps=40,
                adjoint=pk.Milestones(5, 8),
            )  # fmt: skip
            squares = [jnp.sum(leaf**2) for leaf in jax.tree.leaves(sol.ys)]
            return functools.reduce(jnp.add, squares), sol.ys

        return jax.jit(value)(y0, jnp.asarray(0.7, dtype))

    plain = solved(pk.Config(plan="array", runner="xla"))
    (_, ys), (gradient, _) = plain
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves((ys, gradient)))
    assert ys["none"].shape == (2, 0, 4)

    def without_empty(result: Any) -> Any:
        (value, ys), (gradient, p) = result
        return value, *({k: v for k, v in tree.items() if k != "none"} for tree in (ys, gradient)), p

    rtol = 1e-5 if dtype == np.float32 else 1e-12
    native = pk.Config(plan="array", runner=None if cpu.unavailable() else "native")
    close(without_empty(solved(native)), without_empty(plain), rtol)


def test_donated_and_kept_inputs():
    y0 = tuple(map(jnp.asarray, concentrations(128, 257, np.float32)))
    before = jax.tree.map(np.asarray, y0)
    rates = tuple(x.astype(np.float32) for x in RATES)

    def solved(y0, p):
        return pk.solve(brusselator, y0, 0.0, 0.3, p, step=pk.Adaptive(1e-4, 1e-4), config=ARRAY).ys

    kept = jax.jit(solved)(y0, rates)
    jax.tree.map(np.testing.assert_array_equal, y0, before)
    twice = jax.jit(lambda y0, p: (solved(y0, p), y0))(y0, rates)
    donated = jax.jit(solved, donate_argnums=0)(jax.tree.map(jnp.copy, y0), rates)
    jax.tree.map(np.testing.assert_array_equal, donated, kept)
    jax.tree.map(np.testing.assert_array_equal, twice, (kept, before))


# Failures.


def growing(t, y, rate):
    return {"a": rate * y["a"] ** 2, "b": jnp.cos(t) * y["b"] + 0 * y["a"][0]}


def test_failed_trajectories_are_alone():
    """One has a pole, one is NaN from the start; the others have the same bits without them."""
    start = {"a": jnp.ones((4, 2)).at[2].set(jnp.nan), "b": jnp.ones((4, 3))}
    sound = jnp.asarray([0, 3])
    rates = jnp.asarray([0.1, 5.0, 0.1, 0.3])

    @functools.partial(jax.jit, static_argnums=3)
    @functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
    def masked(y0, scale, rates, all_of_them):
        sol = pk.solve_ensemble(
            lambda t, y, p: growing(t, y, p[0] * p[1]), y0, 0.0, 1.0, (scale, rates), in_axes=(0, (None, 0)),
            method=pk.bosh3, step=pk.Adaptive(1e-4, 1e-4), throw=False, config=ARRAY, max_steps=64,
        )  # fmt: skip
        ok = sol.ok[:, None] | all_of_them
        return sum(jnp.sum(jnp.where(ok, leaf, 0.0) ** 2) for leaf in (sol.ys["a"], sol.ys["b"])), sol

    one = jnp.asarray(1.0)
    (value, sol), gradient = masked(start, one, rates, False)
    assert list(np.asarray(sol.status)) == [0, *np.asarray(sol.status[1:3]), 0]
    assert sol.status[1] in (pk.Status.STEP_TOO_SMALL, pk.Status.NON_FINITE, pk.Status.MAX_STEPS)
    assert sol.status[2] == pk.Status.NON_FINITE
    assert np.all(np.isnan(sol.ys["a"][1:3])) and np.all(np.isnan(sol.ys["b"][1:3]))
    (value_, sol_), gradient_ = masked(jax.tree.map(lambda x: x[sound], start), one, rates[sound], False)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[sound], b), sol.ys, sol_.ys)
    np.testing.assert_array_equal(value, value_)
    by_state, by_scale, by_rates = gradient
    close((jax.tree.map(lambda x: x[sound], by_state), by_scale, by_rates[sound]), gradient_, 1e-13)
    assert not np.any(by_state["a"][1:3]) and not np.any(by_rates[1:3])
    # A failure that is used shows, in its own gradients and in those of what it shares.
    _, (by_state, by_scale, by_rates) = masked(start, one, rates, True)
    assert np.isnan(by_scale) and np.all(np.isnan(by_rates[1:3])) and np.all(np.isfinite(by_rates[sound]))


# Transformations.


def test_under_vmap_it_is_the_ensemble():
    """vmap of a solve and of its gradient: rows of one program, with every input batched or shared."""
    y0s, rates = jnp.linspace(0.5, 1.5, 6).reshape(3, 2), jnp.asarray([1.0, 2.0, 3.0])

    def value(y0, w, rate):
        sol = pk.solve(
            lambda t, y, p: jnp.tanh(p[0] @ y) * p[1] - y, y0, 0.0, 1.0, (w, rate), method=pk.bosh3,
            step=pk.Adaptive(1e-3, 1e-3), config=ARRAY, max_steps=32, throw=False, save_at=jnp.asarray([0.4, 1.0]),
        )  # fmt: skip
        return total(sol.ys)

    w = jnp.asarray([[0.3, -1.0], [0.8, 0.2]])
    batched = jax.jit(jax.vmap(jax.value_and_grad(value, (0, 1, 2)), (0, None, 0)))(y0s, w, rates)
    alone = [jax.jit(jax.value_and_grad(value, (0, 1, 2)))(y, w, r) for y, r in zip(y0s, rates, strict=True)]
    close(batched, jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone), 1e-12)

    def together(y0s, w, rates):
        return jnp.sum(jax.vmap(value, (0, None, 0))(y0s, w, rates))

    by_state, by_w, by_rate = jax.jit(jax.grad(together, (0, 1, 2)))(y0s, w, rates)
    close((by_state, by_w, by_rate), (batched[1][0], jnp.sum(batched[1][1], axis=0), batched[1][2]), 1e-12)


def test_second_derivatives_and_scan():
    def value(adjoint, y0):
        def leg(y, _):
            return pk.solve(
                lambda t, y, p: jnp.sin(y) * y[::-1], y, 0.0, 0.5, None, method=pk.heun, step=pk.Fixed(4), config=ARRAY,
                adjoint=adjoint,
            ).ys, None  # fmt: skip

        return jnp.sum(lax.scan(leg, y0, None, length=2)[0] ** 3)

    y0 = jnp.asarray([0.5, 1.0, -0.3])
    tree = functools.partial(value, pk.BoundedTree(2))
    close(
        jax.jit(jax.grad(functools.partial(value, pk.Milestones())))(y0), jax.jit(jax.grad(tree))(y0), 1e-12
    )
    hessian = jax.jit(jax.hessian(tree))(y0)
    finite = (jax.grad(tree)(y0 + 1e-6 * y0) - jax.grad(tree)(y0 - 1e-6 * y0)) / 2e-6
    np.testing.assert_allclose(hessian @ y0, finite, rtol=1e-7)
    np.testing.assert_allclose(hessian, hessian.T, rtol=1e-12)


def test_empty_ensemble():
    def value(y0, p):
        return jnp.sum(pk.solve_ensemble(lambda t, y, p: -p * y, y0, 0.0, 1.0, p, config=ARRAY).ys)

    by_state, by_rate = jax.grad(value, (0, 1))(jnp.zeros((0, 3)), jnp.asarray(2.0))
    assert by_state.shape == (0, 3) and by_rate == 0.0


# Choice.


def test_choice_of_the_plan():
    def plan(field, *shape, args=None, **config):
        y0 = jax.ShapeDtypeStruct(shape, np.float32)
        return pk.explain(field, jnp.zeros(y0.shape, y0.dtype), 0.0, 1.0, args, config=pk.Config(**config))

    small, large = plan(lambda t, y, p: -y, 30), plan(lambda t, y, p: -y, 10**5)
    assert (small.plan, large.plan) == ("lanes", "array")
    assert "100000 state elements" in large.reason
    assert plan(lambda t, y, p: -y, 10**5, plan="lanes").plan == "lanes"
    assert plan(lambda t, y, p: -y, 10**5, runner="xla").plan == "array"
    w = jnp.zeros((200, 200), jnp.float32)
    products = plan(lambda t, y, w: w @ y, 200, args=w)
    assert products.plan == "array" and "40000" in products.reason
    assert "array" in str(products)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"plan": "array", "runner": "pallas"}, "does not run the array plan"),
        ({"plan": "lanes", "runner": "triton"}, "does not run the lanes plan"),
        ({"plan": "array", "lift": "arrays"}, "field as written"),
    ],
)
def test_settings_that_do_not_fit_together(config, message):
    with pytest.raises(ValueError, match=message):
        pk.Config(**config)
