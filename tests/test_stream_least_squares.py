"""Streamed least squares against SciPy's."""

from __future__ import annotations

import functools
import os
import signal

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from pykernels.stream import CovarianceWarning, NonFiniteError, curve_fit, least_squares

ROWS = 211
RNG = np.random.default_rng(1)
X = RNG.uniform(0.0, 4.0, ROWS)
SIGMA = RNG.uniform(0.01, 0.1, ROWS)
TRUE = np.array([2.5, 0.7, 0.3])
Y = TRUE[0] * np.exp(-TRUE[1] * X) + TRUE[2] + SIGMA * RNG.normal(size=ROWS)
P0 = [1.0, 1.0, 0.0]
# With these and exact derivatives SciPy's solution is the optimum to about the root of the precision.
TIGHT = {"ftol": 1e-15, "xtol": 1e-15, "gtol": 1e-15}


def decay(x, a, b, c):
    return a * jnp.exp(-b * x) + c


def numpy_decay(x, a, b, c):
    return a * np.exp(-b * x) + c


def slopes(x, a, b, c):
    e = np.exp(-b * x)
    return np.stack([e, -a * x * e, np.ones_like(x)], axis=1)


fitted = functools.partial(curve_fit, decay, X, Y, P0, batch_size=50)
expected = functools.partial(optimize.curve_fit, numpy_decay, X, Y, P0, jac=slopes, **TIGHT)

LIKE_SCIPY = {
    "plain": {},
    "sigma": {"sigma": SIGMA},
    "absolute": {"sigma": SIGMA, "absolute_sigma": True},
    "one_sigma": {"sigma": np.full(ROWS, 0.05), "absolute_sigma": True},
    "bounds": {"bounds": ([0, 0, 0], [10, 3, 1])},
    "active_bounds": {"bounds": ([0, 0, 0], [2.3, 3, np.inf])},
    "fixed_sign": {"bounds": optimize.Bounds([0, 0, -1], [9, 9, 0])},
}


@pytest.mark.parametrize("name", LIKE_SCIPY)
def test_parameters_and_covariance_equal_scipy_s(name):
    options = LIKE_SCIPY[name]
    popt, pcov = fitted(**options)
    other, covariance = expected(**options)
    if "active" in name or "sign" in name:
        # SciPy's trust region stays inside of the bounds: its solution is near, not at them.
        np.testing.assert_allclose(popt, other, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(pcov, covariance, rtol=1e-4)
    else:
        np.testing.assert_allclose(popt, other, rtol=1e-7)
        np.testing.assert_allclose(pcov, covariance, rtol=1e-6)
    assert type(popt) is np.ndarray and pcov.dtype == np.float64


def test_one_number_for_sigma():
    popt, pcov = fitted(sigma=0.05, absolute_sigma=True)
    other, covariance = fitted(sigma=np.full(ROWS, 0.05), absolute_sigma=True)
    np.testing.assert_array_equal(popt, other)
    np.testing.assert_array_equal(pcov, covariance)


def test_recovered_parameters_are_within_three_sigma():
    popt, pcov = fitted(sigma=SIGMA, absolute_sigma=True)
    assert np.all(np.abs(popt - TRUE) < 3 * np.sqrt(np.diag(pcov)))


def test_memory_maps_sources_and_lists(tmp_path):
    popt, pcov = fitted(sigma=SIGMA)
    maps = []
    for name, column in (("x", X), ("y", Y), ("s", SIGMA)):
        np.save(tmp_path / f"{name}.npy", column)
        maps.append(np.load(tmp_path / f"{name}.npy", mmap_mode="r"))
    pieces = [(X[a:b], Y[a:b], SIGMA[a:b]) for a, b in ((0, 60), (60, ROWS))]
    for found in (
        curve_fit(decay, maps[0], maps[1], P0, maps[2], batch_size=50),
        curve_fit(decay, lambda: iter(pieces), p0=P0, batch_size=50),
        curve_fit(decay, (X, Y, SIGMA), p0=P0, batch_size=50),
        curve_fit(decay, list(X), list(Y), [1, 1, 0], list(SIGMA), batch_size=50, prefetch=1),
    ):
        np.testing.assert_array_equal(found[0], popt)
        np.testing.assert_array_equal(found[1], pcov)


def plane(x, a, b):
    return a * x[0] + b * x[1] ** 2


def plane_of_rows(x, a, b):
    return plane(x.T, a, b)


def test_two_predictors_in_every_layout():
    x = RNG.normal(size=(2, ROWS))
    y = plane(x, 2.0, -1.0) + 0.1 * RNG.normal(size=ROWS)
    other, covariance = optimize.curve_fit(plane, x, y, **TIGHT)
    for found in (
        curve_fit(plane, x, y),
        curve_fit(plane, (x[0], list(x[1])), y),
        curve_fit(plane_of_rows, x.T.copy(), y),
    ):
        np.testing.assert_allclose(found[0], other, rtol=1e-7)
        np.testing.assert_allclose(found[1], covariance, rtol=1e-6)


def test_vector_y_pytrees_and_weights():
    x, weights = RNG.normal(size=(ROWS, 2)), RNG.uniform(0.5, 2.0, ROWS)
    y = x @ RNG.normal(size=(2, 3)) + RNG.normal(size=(ROWS, 3))

    def linear(x, p):
        return x @ p["m"]

    for method in ("lm", "gauss-newton"):
        result = least_squares(
            linear, (x, y, weights), {"m": jnp.zeros((2, 3))}, batch_size=50, method=method
        )
        root = np.sqrt(weights)[:, None]
        solution = np.linalg.lstsq(root * x, root * y, rcond=None)[0]
        np.testing.assert_allclose(result.x["m"], solution, rtol=1e-8)
        np.testing.assert_allclose(result.cost, np.sum((root * (x @ solution - y)) ** 2) / 2, rtol=1e-12)
        assert result.success and result.residuals == 3 * ROWS and result.counts.rows == ROWS
    block = np.linalg.inv(x.T @ (weights[:, None] * x)) * 2 * result.cost / (3 * ROWS - 6)
    np.testing.assert_allclose(result.covariance()[::3, ::3], block, rtol=1e-9)


@pytest.mark.parametrize("loss", ["huber", "cauchy", "arctan"])
def test_robust_losses_equal_scipy_s(loss):
    y = Y.copy()
    y[::10] += 3.0
    result = least_squares(decay, (X, y), P0, loss=loss, f_scale=0.1, batch_size=50)
    other = optimize.least_squares(
        lambda p: numpy_decay(X, *p) - y, result.x + 1e-3, loss=loss, f_scale=0.1, **TIGHT
    )
    np.testing.assert_allclose(result.cost, other.cost, rtol=1e-9)
    np.testing.assert_allclose(result.x, other.x, rtol=1e-5)


def test_the_result():
    result = least_squares(decay, (X, Y), P0, batch_size=50, bounds=(0.0, [2.3, 9.0, 9.0]))
    assert (result.active_mask == [0, 1, 0]).all() or (result.active_mask == [1, 0, 0]).all()
    assert result["cost"] == result.history[-1] == min(result.history)
    assert result.nit == len(result.history) - 1 <= result.nfev and set(result.keys()) >= {
        "x",
        "jtj",
        "message",
    }
    assert result.optimality < 1e-5
    r = numpy_decay(X, *np.asarray(result.x)) - Y
    np.testing.assert_allclose(result.cost, np.sum(r**2) / 2, rtol=1e-12)


def test_first_guesses_are_scipy_s():
    def line(x, a, b):
        return a * x + b

    popt, _ = curve_fit(line, X, 3 * X + 1)
    np.testing.assert_allclose(popt, [3, 1], rtol=1e-9)
    popt, _ = curve_fit(line, X, 3 * X + 1, bounds=([2, -np.inf], [4, 0.5]))
    assert popt[1] == 0.5
    with pytest.raises(ValueError, match="give p0"):
        curve_fit(lambda x, *p: p[0] * x, X, Y)


def test_float32():
    x, y = X.astype(np.float32), Y.astype(np.float32)
    result = least_squares(decay, (x, y), jnp.array(P0, jnp.float32), batch_size=50)
    assert result.success and result.x.dtype == np.float32
    np.testing.assert_allclose(result.x, fitted()[0], rtol=1e-4)


def test_points_that_are_not_finite():
    y = Y.copy()
    y[[1, 150]] = np.nan
    kept = np.isfinite(y)
    popt, pcov, info, message, status = curve_fit(
        decay, X, y, P0, batch_size=50, nan_policy="omit", full_output=True
    )
    other, covariance = optimize.curve_fit(numpy_decay, X[kept], Y[kept], P0, **TIGHT)
    np.testing.assert_allclose(popt, other, rtol=1e-7)
    np.testing.assert_allclose(pcov, covariance, rtol=1e-6)
    assert info["counts"] == (ROWS - 2, 0, 2, 0) and status > 0 and "within" in message
    with pytest.raises(NonFiniteError, match="of batch 0 are not finite"):
        curve_fit(decay, X, y, P0, batch_size=50)


def logarithm(x, a):
    return jnp.log(a) * x


def test_a_step_to_where_the_model_is_not_defined_is_shortened():
    result = least_squares(logarithm, (X, -2 * X), [2.0], batch_size=50)
    np.testing.assert_allclose(result.x, np.exp(-2), rtol=1e-7)


def test_singular_problems_have_an_infinite_covariance():
    def redundant(x, a, b):
        return (a + b) * x

    with pytest.warns(CovarianceWarning, match="could not be estimated"):
        popt, pcov = curve_fit(redundant, X, 3 * X)
    np.testing.assert_allclose(np.sum(popt), 3.0, rtol=1e-9)
    assert np.all(np.isinf(pcov)) and pcov.shape == (2, 2)
    with pytest.warns(CovarianceWarning):
        assert np.all(np.isinf(curve_fit(decay, X[:3], Y[:3], P0)[1]))


def test_ctrl_c_returns_the_best_so_far():
    reads = []

    def batches():
        reads.append(1)
        if len(reads) == 8:
            os.kill(os.getpid(), signal.SIGINT)
        yield X, Y

    result = least_squares(decay, batches, P0)
    assert (result.success, result.status, result.nfev) == (False, -1, 8)
    assert result.cost == min(result.history) < result.history[0]


ERRORS = {
    "no_convergence": (lambda: fitted(maxfev=2), RuntimeError, "did not converge: out of passes"),
    "jac": (lambda: fitted(jac="3-point"), ValueError, "automatic differentiation"),
    "method": (lambda: fitted(method="dogbox"), ValueError, "method must be"),
    "lm_bounds": (lambda: fitted(method="lm", bounds=(0, 1)), ValueError, "no bounds"),
    "nan_policy": (lambda: fitted(nan_policy="propagate"), ValueError, "nan_policy"),
    "outside": (lambda: fitted(bounds=(2, 3)), ValueError, "outside of the bounds"),
    "crossed": (lambda: fitted(bounds=(3, 2)), ValueError, "less than"),
    "matrix": (lambda: fitted(sigma=np.eye(ROWS)), ValueError, "covariance matrix"),
    "sigma": (lambda: fitted(sigma=SIGMA[:5]), ValueError, r"sigma has shape \(5,\)"),
    "rows": (lambda: curve_fit(decay, X[:5], Y), ValueError, "211 points"),
    "source_sigma": (lambda: curve_fit(decay, [(X, Y)], sigma=1.0), ValueError, r"\(x, y, sigma\)"),
    "once": (lambda: curve_fit(decay, iter([(X, Y)])), ValueError, "once per iteration"),
    "kind": (lambda: least_squares(decay, (X, Y), P0, method="newton"), ValueError, "method must be"),
    "passes": (lambda: least_squares(decay, (X, Y), P0, max_passes=0), ValueError, "max_passes"),
    "bounds": (lambda: least_squares(decay, (X, Y), P0, bounds=(0, [1, 2])), ValueError, "3 numbers"),
    "weights": (
        lambda: least_squares(decay, (X, Y, np.ones((ROWS, 2))), P0),
        TypeError,
        "one number per row",
    ),
    "loss": (lambda: least_squares(decay, (X, Y), P0, loss="l2"), ValueError, "loss must be"),
    "f_scale": (lambda: least_squares(decay, (X, Y), P0, f_scale=0), ValueError, "f_scale must be"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        call()
