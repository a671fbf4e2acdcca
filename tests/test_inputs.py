"""What `solve` and `solve_ensemble` accept and refuse: bad input has an error that says what is wrong, odd input works."""

# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pykernels as pk

Y0 = np.array([1.0, 2.0])


def decay(t, y, args):
    return jax.tree.map(lambda leaf: -leaf, y)


def scaled(t, y, rate):
    return rate * y


solve = functools.partial(pk.solve, decay, Y0, 0.0, 1.0)
heun = functools.partial(pk.solve, method=pk.heun)
heuns = functools.partial(pk.solve_ensemble, method=pk.heun)
ensemble = functools.partial(pk.solve_ensemble, decay, np.ones((3, 2)), 0.0, 1.0)

BAD_CALLS = {
    "field_is_no_function": (lambda: pk.solve(3.0, Y0, 0.0, 1.0), TypeError, "field must be a function"),
    "derivative_shape": (
        lambda: pk.solve(lambda t, y, a: y[:1], Y0, 0.0, 1.0),
        TypeError,
        r"derivative of shape \(1,\) for a state of shape \(2,\)",
    ),
    "derivative_structure": (
        lambda: pk.solve(lambda t, y, a: (y, y), Y0, 0.0, 1.0),
        TypeError,
        "pytree of the state's structure",
    ),
    "derivative_none": (lambda: pk.solve(lambda t, y, a: None, Y0, 0.0, 1.0), TypeError, "structure"),
    "derivative_dtype": (
        lambda: pk.solve(lambda t, y, a: y.astype(jnp.float32), Y0, 0.0, 1.0),
        TypeError,
        "returned float32 for a state of float64",
    ),
    "derivative_complex": (
        lambda: pk.solve(lambda t, y, a: y.astype(complex), Y0, 0.0, 1.0),
        TypeError,
        "returned complex128 for a state of float64",
    ),
    "integer_state": (
        lambda: pk.solve(decay, np.array([1, 2]), 0.0, 1.0),
        TypeError,
        "y0 must be float.*not int64",
    ),
    "python_integer_state": (lambda: pk.solve(decay, 1, 0.0, 1.0), TypeError, "write 1.0, not 1"),
    "boolean_state": (lambda: pk.solve(decay, True, 0.0, 1.0), TypeError, "y0 must be float.*not bool"),
    "complex_state": (
        lambda: pk.solve(decay, Y0 + 1j, 0.0, 1.0),
        TypeError,
        "y0 must be float.*not complex128",
    ),
    "half_state": (lambda: pk.solve(decay, Y0.astype(np.float16), 0.0, 1.0), TypeError, "not float16"),
    "mixed_dtypes": (
        lambda: pk.solve(decay, (Y0, Y0.astype(np.float32)), 0.0, 1.0),
        TypeError,
        "share one dtype.*float32.*float64",
    ),
    "no_state": (lambda: pk.solve(decay, (), 0.0, 1.0), ValueError, "y0 has no elements"),
    "empty_state": (lambda: pk.solve(decay, np.zeros((0, 3)), 0.0, 1.0), ValueError, "y0 has no elements"),
    "empty_states": (lambda: heuns(decay, np.zeros((4, 0)), 0.0, 1.0), ValueError, "y0 has no elements"),
    "text_state": (lambda: pk.solve(decay, "y", 0.0, 1.0), TypeError, "pytree of arrays.*'y'"),
    "text_args": (
        lambda: solve({"a": "fast"}),
        TypeError,
        "args must be a pytree of arrays.*'fast'.*close the field",
    ),
    "object_args": (lambda: solve(object()), TypeError, "args must be a pytree of arrays"),
    "method": (lambda: solve(method="tsit5"), TypeError, "method must be a ButcherTableau.*'tsit5'"),
    "step": (lambda: solve(step=0.1), TypeError, "step must be Fixed.*Adaptive.*0.1"),
    "step_class": (lambda: solve(step=pk.Adaptive), TypeError, "step must be Fixed"),
    "adjoint": (lambda: solve(adjoint="reverse"), TypeError, "adjoint must be Milestones"),
    "adjoint_class": (lambda: solve(adjoint=pk.Milestones), TypeError, "adjoint must be Milestones"),
    "negative_rtol": (
        lambda: pk.Adaptive(rtol=-1e-3),
        ValueError,
        "tolerances must be non-negative.*rtol=-0.001",
    ),
    "negative_atol": (lambda: pk.Adaptive(atol=-1e-3), ValueError, "tolerances must be non-negative"),
    "zero_tolerances": (lambda: pk.Adaptive(rtol=0.0, atol=0.0), ValueError, "not both zero"),
    "nan_tolerance": (
        lambda: pk.Adaptive(rtol=float("nan")),
        ValueError,
        r"Adaptive\(rtol=\) must be finite",
    ),
    "text_tolerance": (
        lambda: pk.Adaptive(rtol="small"),
        TypeError,
        r"Adaptive\(rtol=\) must be a Python number",
    ),
    "boolean_tolerance": (
        lambda: pk.Adaptive(rtol=True),
        TypeError,
        r"Adaptive\(rtol=\) must be a Python number",
    ),
    "traced_tolerance": (
        lambda: jax.jit(lambda rtol: solve(step=pk.Adaptive(rtol=rtol)).ys)(1e-3),
        TypeError,
        r"Adaptive\(rtol=\) must be a Python number",
    ),
    "dtmin": (lambda: pk.Adaptive(dtmin=0.0), ValueError, "dtmin must be positive"),
    "dtmax": (
        lambda: pk.Adaptive(dtmin=0.1, dtmax=0.01),
        ValueError,
        "dtmax must be positive and above dtmin",
    ),
    "factormin": (lambda: pk.Adaptive(factormin=2.0), ValueError, "factormin"),
    "safety": (lambda: pk.Adaptive(safety=0.0), ValueError, "safety"),
    "no_fixed_steps": (lambda: pk.Fixed(0), ValueError, "positive finite"),
    "negative_fixed_step": (lambda: pk.Fixed(-0.1), ValueError, "positive finite"),
    "infinite_fixed_step": (lambda: pk.Fixed(float("inf")), ValueError, "positive finite"),
    "text_fixed_step": (lambda: pk.Fixed("0.1"), TypeError, "Fixed takes a number of steps"),
    "adaptive_euler": (lambda: solve(method=pk.euler), ValueError, "euler has no embedded error"),
    "adaptive_rk4": (lambda: solve(method=pk.rk4), ValueError, "rk4 has no embedded error"),
    "dt0_with_fixed": (
        lambda: solve(step=pk.Fixed(4), dt0=0.1),
        ValueError,
        "dt0 is the first step of Adaptive",
    ),
    "dt0_direction": (lambda: solve(dt0=-0.1), ValueError, "dt0 must be finite, not zero, and have the sign"),
    "dt0_direction_backward": (lambda: pk.solve(decay, Y0, 1.0, 0.0, dt0=0.1), ValueError, "sign of t1 - t0"),
    "dt0_zero": (lambda: solve(dt0=0.0), ValueError, "not zero"),
    "dt0_nan": (lambda: solve(dt0=float("nan")), ValueError, "dt0 must be finite"),
    "no_attempts": (lambda: solve(max_steps=0), ValueError, "max_steps must be a positive int, not 0"),
    "fractional_attempts": (lambda: solve(max_steps=10.0), ValueError, "max_steps must be a positive int"),
    "boolean_attempts": (lambda: solve(max_steps=True), ValueError, "max_steps must be a positive int"),
    "save_before": (lambda: solve(save_at=[-0.1, 0.5]), ValueError, "save_at must lie between t0 and t1"),
    "save_after": (lambda: solve(save_at=[0.5, 1.1]), ValueError, "save_at must lie between t0 and t1"),
    "save_unsorted": (lambda: solve(save_at=[0.5, 0.4]), ValueError, "save_at must be sorted"),
    "save_nan": (lambda: solve(save_at=[0.5, float("nan")]), ValueError, "save_at"),
    "save_single_nan": (lambda: solve(save_at=[float("nan")]), ValueError, "save_at"),
    "save_forward_on_the_way_back": (
        lambda: pk.solve(decay, Y0, 1.0, 0.0, save_at=[0.2, 0.5]),
        ValueError,
        "sorted in the direction of integration",
    ),
    "save_scalar": (lambda: solve(save_at=0.5), ValueError, r"save_at must have shape \(n,\), not \(\)"),
    "save_matrix": (lambda: solve(save_at=np.zeros((2, 2))), ValueError, r"save_at must have shape \(n,\)"),
    "save_complex": (lambda: solve(save_at=np.array([0.5j])), TypeError, "save_at must be real"),
    "save_lanes": (
        lambda: ensemble(save_at=np.zeros((2, 1))),
        ValueError,
        r"\(n,\) or \(3, n\), not \(2, 1\)",
    ),
    "complex_time": (lambda: pk.solve(decay, Y0, 0.0, 1j), TypeError, "t1 must be a real number"),
    "vector_time": (
        lambda: pk.solve(decay, Y0, np.zeros(1), 1.0),
        ValueError,
        r"t0 must be a scalar.*\(1,\)",
    ),
    "time_lanes": (
        lambda: pk.solve_ensemble(decay, np.ones((3, 2)), 0.0, np.ones(2)),
        ValueError,
        r"t1 must be a scalar or of shape \(3,\), not of shape \(2,\)",
    ),
    "lanes_disagree": (
        lambda: ensemble(np.ones(4), in_axes=(0, 0)),
        ValueError,
        r"disagree about the number of trajectories: \[3, 4\]",
    ),
    "no_lanes": (lambda: ensemble(in_axes=(None, None)), ValueError, "at least one leaf"),
    "axis_out_of_range": (
        lambda: ensemble(in_axes=(2, None)),
        ValueError,
        r"axis 2 of an array of shape \(3, 2\)",
    ),
    "axis_of_a_scalar": (lambda: ensemble(1.0, in_axes=(0, 0)), ValueError, "axis 0 of an array of shape"),
    "axes_no_prefix": (
        lambda: ensemble({"a": np.ones(3)}, in_axes=(0, {"b": 0})),
        ValueError,
        "in_axes for args must be a pytree prefix",
    ),
    "axes_number": (lambda: ensemble(in_axes=0), TypeError, r"in_axes must be \(axis of y0s, axis of args\)"),
    "axes_three": (lambda: ensemble(in_axes=(0, None, None)), TypeError, "in_axes must be"),
    "axes_text": (lambda: ensemble(in_axes=("y", None)), (TypeError, ValueError), "in_axes"),
    "plan": (lambda: pk.Config(plan="gpu"), ValueError, r"Config\(plan=\)"),
    "lift": (lambda: pk.Config(lift="scalars"), ValueError, r"Config\(lift=\)"),
    "block": (lambda: pk.Config(block=0), ValueError, r"Config\(block=\)"),
    "milestones": (
        lambda: pk.Milestones(count=0),
        ValueError,
        r"Milestones\(count=\) must be a positive int",
    ),
    "branching": (lambda: pk.BoundedTree(branching=1), ValueError, "branching"),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_input(call: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_mistakes_in_the_field_keep_their_own_error() -> None:
    def field(t, y, args):
        return jnp.zeros((3, 3)) @ y

    with pytest.raises(TypeError, match="dot_general"):
        pk.solve(field, Y0, 0.0, 1.0)


def test_forward_only_refuses_reverse_mode() -> None:
    run = functools.partial(
        pk.solve, scaled, Y0, 0.0, 1.0, step=pk.Fixed(3), method=pk.heun, adjoint=pk.ForwardOnly()
    )

    def total(rate: Any) -> jax.Array:
        return jnp.sum(run(rate).ys)

    for reverse in (jax.grad(total), jax.jit(jax.grad(total)), jax.jacrev(total)):
        with pytest.raises(TypeError, match=r"Milestones\(\)"):
            reverse(0.5)
    with pytest.raises(TypeError, match=r"Milestones\(\)"):
        jax.vmap(jax.grad(total))(np.array([0.5]))
    np.testing.assert_allclose(
        jax.jacfwd(total)(0.5), 3 * (1 + 1 / 6 + 1 / 72) ** 2 * (1 + 1 / 6), rtol=1e-14
    )


STEPS = pytest.mark.parametrize("step", [pk.Adaptive(rtol=1e-3), pk.Fixed(5), pk.Fixed(0.3)], ids=str)


@STEPS
def test_no_time_to_integrate(step: Any) -> None:
    """t1 == t0: the state as it is, with the gradient of the identity."""

    def values(y0: jax.Array, rate: jax.Array) -> Any:
        solution = heun(scaled, y0, 0.7, 0.7, rate, step=step, save_at=[0.7, 0.7])
        return heun(scaled, y0, 0.7, 0.7, rate, step=step).ys, solution.ys, solution.status

    (final, saved, status), pull = jax.vjp(values, Y0, 0.5)
    np.testing.assert_array_equal(final, Y0)
    np.testing.assert_array_equal(saved, [Y0, Y0])
    assert status == pk.Status.SUCCESS
    zero = np.zeros((), jax.dtypes.float0)
    y0_ct, rate_ct = pull((np.array([1.0, 0.0]), np.array([[0.0, 3.0], [0.0, 4.0]]), zero))
    np.testing.assert_array_equal(y0_ct, [1.0, 7.0])
    assert rate_ct == 0.0


@STEPS
def test_backwards_and_forwards_again(step: Any) -> None:
    """Backwards in time is forwards with the field's sign changed: the same steps, the same bits."""
    save_at = np.array([0.1, 0.5, 1.0])
    backward = heun(scaled, Y0, 1.0, 0.0, -0.5, step=step, save_at=1.0 - save_at)
    forward = heun(scaled, Y0, 0.0, 1.0, 0.5, step=step, save_at=save_at)
    np.testing.assert_allclose(backward.ys, forward.ys, rtol=1e-14)
    assert backward.stats.attempts == forward.stats.attempts
    np.testing.assert_array_equal(backward.ts, 1.0 - save_at)


@STEPS
def test_empty_ensemble(step: Any) -> None:
    rate = np.array(0.5)

    def values(y0s: jax.Array, rate: jax.Array) -> Any:
        solution = heuns(scaled, y0s, 0.0, 1.0, rate, step=step)
        return solution.ys, solution

    ys, pull, solution = jax.vjp(values, np.zeros((0, 2)), rate, has_aux=True)
    assert ys.shape == (0, 2) and solution.status.shape == (0,) and solution.stats.attempts.shape == (0,)
    assert heuns(scaled, np.zeros((0, 2)), 0.0, 1.0, rate, step=step, save_at=[0.5]).ys.shape == (0, 1, 2)
    y0s_ct, rate_ct = pull(ys)
    assert y0s_ct.shape == (0, 2) and rate_ct == 0.0
    assert heuns(
        scaled, np.zeros((0, 2)), 0.0, 1.0, np.zeros((0, 2)), in_axes=(0, 0), step=step
    ).ys.shape == (0, 2)


def logistic(t, y, rate):
    return rate * y * (1.0 - y)


@functools.cache
def _single_solve() -> Any:
    def total(rate: Any, y0: Any) -> Any:
        solution = heun(logistic, y0, 0.0, 1.0, rate, step=pk.Adaptive(rtol=1e-3))
        return jnp.sum(solution.ys), (solution.ys, solution.stats)

    return jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))


@pytest.mark.parametrize("lanes", [1, 7, 65, 130])
def test_ensembles_of_odd_sizes_equal_single_solves(lanes: int) -> None:
    """Blocks are padded: the padding must not show, least of all in the gradient by a shared argument."""
    y0s = np.linspace(0.1, 2.0, 2 * lanes).reshape(lanes, 2)

    def total(rate: Any, y0s: Any) -> Any:
        solution = heuns(logistic, y0s, 0.0, 1.0, rate, step=pk.Adaptive(rtol=1e-3))
        return jnp.sum(solution.ys), solution

    (rate_ct, y0s_ct), solution = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(1.5, y0s)
    single = [_single_solve()(1.5, y0) for y0 in y0s]
    np.testing.assert_allclose(solution.ys, [ys for _, (ys, _) in single], rtol=1e-12)
    np.testing.assert_allclose(y0s_ct, [ct for (_, ct), _ in single], rtol=1e-12)
    np.testing.assert_allclose(rate_ct, np.sum([ct for (ct, _), _ in single]), rtol=1e-12)
    for name in ("attempts", "accepted", "rejected", "field_evaluations"):
        np.testing.assert_array_equal(
            getattr(solution.stats, name), [getattr(stats, name) for _, (_, stats) in single]
        )


@pytest.mark.parametrize("adjoint", [pk.Milestones(), pk.BoundedTree()], ids=["Milestones", "BoundedTree"])
@pytest.mark.parametrize("step", [pk.Adaptive(rtol=1e-3), pk.Fixed(5)], ids=str)
def test_float32_stays_float32(step: Any, adjoint: Any) -> None:
    """Also when float64 is switched on, with Python floats and float64 times: time has the state's dtype."""
    seen = []

    def field(t, y, rate):
        seen.append((t.dtype, y.dtype, rate.dtype))
        return -rate * y + 0.1 * t

    def total(y0: Any, rate: Any, save_at: Any) -> Any:
        solution = heun(field, y0, 0.0, 1.0, rate, step=step, save_at=save_at, adjoint=adjoint, max_steps=16)
        return jnp.sum(solution.ys), solution

    y0 = np.ones(2, np.float32)
    gradient = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
    (y0_ct, rate_ct), solution = gradient(y0, np.float32(0.5), np.array([0.5, 1.0]))
    assert {str(dtype) for dtypes in seen for dtype in dtypes} == {"float32"}
    assert y0_ct.dtype == rate_ct.dtype == solution.ys.dtype == solution.ts.dtype == np.float32
    assert {leaf.dtype for leaf in jax.tree.leaves((solution.status, solution.stats))} == {np.dtype(np.int32)}
    program = str(jax.make_jaxpr(gradient)(y0, np.float32(0.5), np.array([0.5, 1.0], np.float32)))
    assert not re.search(r"f64\[\d", program)  # scalar constants are weakly typed


def test_pytrees() -> None:
    """Scalars, matrices and empty leaves, in dictionaries and tuples; args of every kind."""
    y0 = {
        "scalar": np.array(1.0),
        "matrix": np.arange(6.0).reshape(2, 3),
        "pair": (np.ones(3), np.zeros((0, 2))),
    }
    args = {
        "rate": 0.5,
        "count": 2,
        "mask": np.array([True, False, True]),
        "nothing": None,
        "index": np.array([2, 0, 1]),
    }

    def field(t, y, args):
        first, empty = y["pair"]
        return {
            "scalar": -args["rate"] * y["scalar"],
            "matrix": y["matrix"] * 0.05 * args["count"].astype(float),
            "pair": (jnp.where(args["mask"], -first, 0.0)[args["index"]], empty),
        }

    def total(y0: Any, rate: Any) -> Any:
        solution = pk.solve(
            field,
            y0,
            0.0,
            1.0,
            {**args, "rate": rate},
            save_at=[0.5, 1.0],
            step=pk.Adaptive(rtol=1e-8, atol=1e-9),
        )
        return solution.ys["scalar"][-1] + jnp.sum(solution.ys["matrix"][-1]), solution.ys

    (y0_ct, rate_ct), ys = jax.grad(total, argnums=(0, 1), has_aux=True)(y0, 0.5)
    assert jax.tree.structure(ys) == jax.tree.structure(y0) == jax.tree.structure(y0_ct)
    assert jax.tree.map(np.shape, ys) == {"scalar": (2,), "matrix": (2, 2, 3), "pair": ((2, 3), (2, 0, 2))}
    np.testing.assert_allclose(ys["scalar"], np.exp([-0.25, -0.5]), rtol=1e-6)
    np.testing.assert_allclose(ys["matrix"][1], y0["matrix"] * np.exp(0.1), rtol=1e-6)
    np.testing.assert_allclose(y0_ct["matrix"], np.full((2, 3), np.exp(0.1)), rtol=1e-6)
    np.testing.assert_allclose(rate_ct, -np.exp(-0.5), rtol=1e-6)
    assert y0_ct["pair"][1].shape == (0, 2)


@pytest.mark.parametrize("config", [None, pk.Config(plan="array")], ids=["lanes", "array"])
def test_gradients_pass_integers_and_masks_by(config: Any) -> None:
    """Integer and boolean arguments are data: differentiating by the floats beside them works, shared or per trajectory."""
    args = {"rate": np.array([0.5, 1.0, 2.0]), "on": np.array([True, False, True]), "power": np.array(2)}

    def field(t, y, args):
        return jnp.where(args["on"], -args["rate"], 0.0) * y * args["power"].astype(float)

    def total(rate: Any) -> jax.Array:
        axes = (0, {"rate": 0, "on": 0, "power": None})
        ys = pk.solve_ensemble(
            field, np.ones(3), 0.0, 1.0, {**args, "rate": rate}, in_axes=axes, config=config
        ).ys
        return jnp.sum(ys)

    rate = args["rate"]
    np.testing.assert_allclose(
        jax.grad(total)(rate), np.where(args["on"], -2 * np.exp(-2 * rate), 0.0), rtol=1e-5
    )


def test_lists_and_scalars_as_python_numbers() -> None:
    ys = heun(decay, [1.0, (2.0,)], 0, 1, step=pk.Fixed(50)).ys
    assert isinstance(ys, list) and isinstance(ys[1], tuple)
    np.testing.assert_allclose([ys[0], ys[1][0]], np.array([1.0, 2.0]) * np.exp(-1.0), rtol=1e-3)


def test_axes_other_than_the_first() -> None:
    """in_axes follows jax.vmap: prefixes, other axes, negative axes, shared states with arguments per trajectory."""
    rates = np.linspace(0.1, 1.0, 4)
    y0s = np.arange(8.0).reshape(2, 4)
    run = functools.partial(heuns, scaled, t0=0.0, t1=1.0, step=pk.Fixed(4))
    expected = run(y0s.T, args=rates, in_axes=(0, 0)).ys
    np.testing.assert_array_equal(run(y0s, args=rates, in_axes=(1, 0)).ys, expected)
    np.testing.assert_array_equal(run(y0s, args=rates, in_axes=(-1, -1)).ys, expected)
    shared = run(y0s[:, 1], args=rates, in_axes=(None, 0)).ys
    np.testing.assert_array_equal(shared[1], expected[1])
    ct = jax.grad(lambda y0: jnp.sum(run(y0, args=rates, in_axes=(None, 0)).ys))(y0s[:, 1])
    np.testing.assert_allclose(ct, np.full(2, np.sum(shared[:, 0] / y0s[0, 1])), rtol=1e-13)


def test_the_field_is_traced_once() -> None:
    calls = []

    def field(t, y, rate):
        calls.append(0)
        return -rate * y

    def run(y0: Any = Y0, rate: float = 0.5) -> Any:
        return heun(field, y0, 0.0, 1.0, rate, step=pk.Fixed(3)).ys

    run()
    assert len(calls) == 1
    run(2 * Y0, 0.7)
    jax.grad(lambda rate: jnp.sum(run(rate=rate)))(0.5)
    jax.jit(run)(Y0)
    heuns(field, np.ones((3, 2)), 0.0, 1.0, 0.5, step=pk.Fixed(4))
    assert len(calls) == 1
    run(np.ones(3))
    assert len(calls) == 2


def test_changed_closures_are_seen() -> None:
    rate = np.array(0.5)

    def field(t, y, args):
        return -rate * y

    def run() -> float:
        return float(heun(field, 1.0, 0.0, 1.0, step=pk.Fixed(100)).ys)

    np.testing.assert_allclose(run(), np.exp(-0.5), rtol=1e-4)
    rate = np.array(2.0)
    np.testing.assert_allclose(run(), np.exp(-2.0), rtol=1e-3)


def test_nothing_traced_outlives_its_transformation() -> None:
    """A field that closed over a tracer is traced anew, outside and inside other transformations."""
    rate: Any = 0.0

    def field(t, y, args):
        return -rate * y

    def run(value: Any) -> jax.Array:
        nonlocal rate
        rate = value
        return heun(field, 1.0, 0.0, 1.0, step=pk.Fixed(100)).ys

    expected = np.exp(-0.5)
    np.testing.assert_allclose(jax.jit(run)(0.5), expected, rtol=1e-4)
    np.testing.assert_allclose(run(0.5), expected, rtol=1e-4)
    np.testing.assert_allclose(jax.grad(run)(0.5), -expected, rtol=1e-3)
    np.testing.assert_allclose(run(jnp.asarray(0.5)), expected, rtol=1e-4)


def test_no_save_times() -> None:
    solution = heun({"a": decay}["a"], Y0, 0.0, 1.0, step=pk.Fixed(3), save_at=[])
    assert solution.ys.shape == (0, 2) and solution.ts.shape == (0,) and solution.ok
    many = heuns(decay, np.ones((4, 2)), 0.0, 1.0, step=pk.Fixed(3), save_at=np.zeros((4, 0)))
    assert many.ys.shape == (4, 0, 2) and many.ts.shape == (4, 0)


def test_shapes_of_a_solution() -> None:
    y0s = {"a": np.ones((4, 2)), "b": np.ones(4)}
    final = heuns(decay, y0s, 0.0, 1.0, step=pk.Fixed(3))
    assert jax.tree.map(np.shape, final.ys) == {"a": (4, 2), "b": (4,)} and final.ts.shape == (4,)
    saved = heuns(decay, y0s, 0.0, 1.0, step=pk.Fixed(3), save_at=[0.1, 0.2, 0.3])
    assert jax.tree.map(np.shape, saved.ys) == {"a": (4, 3, 2), "b": (4, 3)} and saved.ts.shape == (4, 3)
    assert saved.status.shape == saved.stats.field_evaluations.shape == (4,)
    single = heun(
        decay, {"a": np.ones(2), "b": np.array(1.0)}, 0.0, 1.0, step=pk.Fixed(3), save_at=[0.1, 0.2, 0.3]
    )
    assert jax.tree.map(np.shape, single.ys) == {"a": (3, 2), "b": (3,)} and single.ts.shape == (3,)
    assert single.status.shape == ()
