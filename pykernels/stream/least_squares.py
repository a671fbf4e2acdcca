"""Nonlinear least squares over a stream: J'J and J'r are sums over rows too, and small.

Gauss-Newton and Levenberg-Marquardt need nothing else of the data, so one pass per iteration is enough, and the memory is
that of a batch and a matrix of the parameters. The price of the normal equations is precision: the condition number of J
is squared. Their columns are scaled to one before they are solved, on the host in float64.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from pykernels.stream.fit import interruptions, model_params
from pykernels.stream.loss import LOSSES, Loss, Model, check_loss, residuals, x_y_weights
from pykernels.stream.passes import Counts, NonFiniteError, Options, Passes
from pykernels.stream.source import Shuffle, Source, Table, as_source
from pykernels.stream.sums import (
    Gradient,
    NanPolicy,
    Objective,
    Reduction,
    Rows,
    Sums,
    as_params,
    common_dtype,
    ravel,
)

PyTree = Any
Bounds = tuple[Any, Any]


# A robust loss is concave in the squares of large residuals: without a lower bound outliers would make the matrix singular.
LEAST_CURVATURE = 0.1


class CovarianceWarning(UserWarning):
    """The covariance of the parameters could not be estimated."""


@dataclass(frozen=True)
class LeastSquaresResult:
    """What `least_squares` returns, with the names of `scipy.optimize.least_squares`; fields can be read as keys too.

    `x`: the parameters, in the structure of `p0`; `cost`: 0.5 * sum(weight * f_scale^2 rho((residual / f_scale)^2));
    `grad`: its gradient; `jtj`: J'J there, over the parameters as one vector, from which `covariance` is; `counts.rows`:
    rows used; `residuals`: numbers in them (rows, times the elements of a row of y). `status`: 0 out of passes, 1 gtol, 2
    ftol, 3 xtol, 5 no further decrease, -1 interrupted. `nfev`: passes; `nit`: steps taken.
    """

    x: PyTree
    cost: float
    grad: np.ndarray
    jtj: np.ndarray
    residuals: int
    active_mask: np.ndarray
    optimality: float
    counts: Counts
    nfev: int
    nit: int
    status: int
    message: str
    success: bool
    history: list[float] = field(repr=False)

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def keys(self) -> list[str]:
        """Names of the fields."""
        return list(self.__dataclass_fields__)

    def covariance(self, *, absolute_sigma: bool = False) -> np.ndarray:
        """The covariance of the parameters, as one vector, in the linear approximation at `x`: the inverse of J'J, times
        the residual variance 2 cost / (residuals - parameters) unless the weights are 1 / sigma^2 and `absolute_sigma`.

        Infinite, with a CovarianceWarning, where the data do not determine the parameters.
        """
        n = len(self.grad)
        inverse = _pseudo_inverse(self.jtj)
        if inverse is not None and not absolute_sigma:
            inverse = inverse * (2 * self.cost / (self.residuals - n)) if self.residuals > n else None
        if inverse is None or not np.all(np.isfinite(inverse)):
            warnings.warn(
                "the covariance of the parameters could not be estimated", CovarianceWarning, stacklevel=2
            )
            return np.full((n, n), np.inf)
        return inverse


_MESSAGES = {
    -1: "interrupted",
    0: "out of passes (max_passes)",
    1: "the gradient is within gtol",
    2: "the relative decrease of the cost is within ftol",
    3: "the relative change of the parameters is within xtol",
    5: "no step decreases the cost further",
}


def least_squares(
    model: Model,
    source: Any,
    p0: PyTree,
    *,
    method: Literal["lm", "gauss-newton"] = "lm",
    bounds: Bounds = (-math.inf, math.inf),
    loss: Loss = "linear",
    f_scale: float = 1.0,
    ftol: float = 1e-10,
    xtol: float = 1e-10,
    gtol: float = 1e-10,
    max_passes: int = 100,
    batch_size: int | None = None,
    nan: NanPolicy = "raise",
    compensated: bool | None = None,
    shuffle: int | Shuffle | None = None,
    prefetch: int = 0,
    mesh: Mesh | None = None,
) -> LeastSquaresResult:
    """Fit a model to (x, y) data by weighted nonlinear least squares: one pass over the stream per iteration.

    `model`, `source`, `p0`, `loss` and `f_scale` as in `fit`; weights are those of squares, 1 / sigma^2. `method`:
    Levenberg-Marquardt, damped as by Nielsen (1999) in the scale of the parameters, or "gauss-newton", its undamped
    steps. `bounds`: lower and upper, numbers or in the structure of `p0`; steps are projected on them (Kanzow, Yamashita
    and Fukushima 2004). `ftol`: relative decrease of the cost; `xtol`: relative change of the parameters; `gtol`: largest
    cosine of the angle between the residuals and a column of J, of parameters that no bound holds (MINPACK's); none goes
    below the precision of the parameters. Columns of J are made in forward mode, all of them together. The rest as in
    `value_and_grad`. Ctrl-C returns the best parameters so far.

    Raises NonFiniteError with `nan="raise"` if the residuals at `p0` are not finite (a step to such a point is
    shortened), and ValueError or TypeError for arguments that do not fit together.
    """
    if method not in ("lm", "gauss-newton"):
        raise ValueError(f"method must be 'lm' or 'gauss-newton', not {method!r}")
    if max_passes < 1:
        raise ValueError(f"max_passes must be positive, not {max_passes!r}")
    options = Options.of(batch_size, shuffle, prefetch, mesh, nan, "forward", compensated)
    params, unpack = model_params(p0)
    passes = Passes(as_source(source), options)
    objective = normal_objective(_rows_of(model, unpack), (model,), loss, f_scale, ("rows", unpack))
    tolerances = _Tolerances(ftol, xtol, gtol, max_passes)
    return _LevenbergMarquardt(passes, objective, params, bounds, method == "lm", tolerances).run()


class _Rows(NamedTuple):
    """What a model makes of a batch: residuals, one row each, and weights of rows."""

    residuals: jax.Array
    weights: jax.Array | None


def _rows_of(model: Model, unpack: bool) -> Callable[[PyTree, PyTree], _Rows]:
    def rows(params: PyTree, batch: PyTree) -> _Rows:
        x, y, weights = x_y_weights(batch)
        return _Rows(residuals(model, unpack, params, x, y), weights)

    return rows


def normal_objective(
    rows_of: Callable[[PyTree, PyTree], _Rows],
    functions: tuple[Any, ...],
    loss: Loss,
    f_scale: float,
    static: Hashable,
) -> Objective:
    """Sums of a weighted robust cost and its normal equations, as a reduction.

    With a loss rho of z = (r / f_scale)^2 the cost is f_scale^2 rho(z) / 2, its gradient J' rho' r, and its Gauss-Newton
    matrix J' (rho' + 2 z rho'') J (Triggs et al. 2000), whose factor is kept at least a tenth of rho'.
    """
    check_loss(loss, f_scale)

    def reduction(rows_of: Callable[[PyTree, PyTree], _Rows], kind: str, gradient: Gradient) -> Reduction:
        del kind, gradient
        return _normal_reduction(rows_of, LOSSES[loss], f_scale)

    return Objective(rows_of, functions, ("normal", loss, f_scale, static), reduction)


def _normal_reduction(
    rows_of: Callable[[PyTree, PyTree], _Rows], rho: Callable[[jax.Array], jax.Array], f_scale: float
) -> Reduction:
    def linearized(params: PyTree, batch: PyTree) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Residuals (rows, elements), their Jacobian (rows, elements, parameters), and weights."""
        dtype, count = common_dtype(params), jax.tree.leaves(batch)[0].shape[0]
        flat, restore = ravel(params)

        def at(p: jax.Array) -> tuple[jax.Array, jax.Array | None]:
            r, weights = rows_of(restore(p), batch)
            return r.reshape(count, -1).astype(dtype), weights

        r, along, weights = jax.linearize(at, flat, has_aux=True)
        jacobian = jax.vmap(along, out_axes=-1)(jnp.eye(flat.size, dtype=flat.dtype)).astype(dtype)
        if weights is None:
            return r, jacobian, None
        if weights.shape != (count,):
            raise TypeError(f"weights must be one number per row, shape ({count},), not {weights.shape}")
        return r, jacobian, weights.astype(dtype)

    def sums(
        params: PyTree, batch: PyTree, use: jax.Array, count: jax.Array
    ) -> tuple[Sums, jax.Array | None]:
        r, jacobian, weights = linearized(params, batch)
        used = jnp.broadcast_to(use[:, None], r.shape)
        zero = jnp.zeros((), r.dtype)
        w = jnp.ones((), r.dtype) if weights is None else weights[:, None]
        z = (r / f_scale) ** 2
        rho1, rho2 = _derivatives(rho, z)
        cost = jnp.sum(jnp.where(used, w * f_scale**2 * rho(z), zero)) / 2
        slope = jnp.where(used, w * rho1 * r, zero)
        curvature = jnp.where(used, w * jnp.maximum(rho1 + 2 * z * rho2, LEAST_CURVATURE * rho1), zero)
        jacobian = jnp.where(used[..., None], jacobian, zero)
        exactly = lax.Precision.HIGHEST
        gradient = jnp.einsum("re,ren->n", slope, jacobian, precision=exactly)
        matrix = jnp.einsum("ren,rem->nm", curvature[..., None] * jacobian, jacobian, precision=exactly)
        # The number of residuals has the place of the sum of the weights, which nobody needs here.
        all_ok = None if weights is None else jnp.bool_(True)
        return Sums(cost, (count * r.shape[1]).astype(r.dtype), (gradient, matrix)), all_ok

    def rows(params: PyTree, batch: PyTree) -> Rows:
        r, jacobian, weights = linearized(params, batch)
        finite = jnp.all(jnp.isfinite(r), axis=1) & jnp.all(jnp.isfinite(jacobian), axis=(1, 2))
        everything = jnp.ones_like(finite)
        if weights is None:
            return Rows(everything, finite, everything)
        return Rows(everything, finite & jnp.isfinite(weights), weights != 0)

    return Reduction(sums, rows)


def _derivatives(rho: Callable[[jax.Array], jax.Array], z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """rho'(z) and rho''(z), elementwise."""
    ones = jnp.ones_like(z)

    def first(z: jax.Array) -> jax.Array:
        return jax.jvp(rho, (z,), (ones,))[1]

    return jax.jvp(first, (z,), (ones,))


class _Tolerances(NamedTuple):
    ftol: float
    xtol: float
    gtol: float
    max_passes: int


class _Point(NamedTuple):
    """The cost and its normal equations somewhere, in float64 on the host."""

    x: np.ndarray
    cost: float
    grad: np.ndarray
    matrix: np.ndarray
    residuals: int
    counts: Counts


class _LevenbergMarquardt:
    """Minimise a sum of squares from its normal equations."""

    def __init__(
        self, passes: Passes, objective: Objective, params: PyTree, bounds: Bounds, damped: bool, tolerances: _Tolerances
    ) -> None:  # fmt: skip
        self._passes, self._objective, self._damped = passes, objective, damped
        passes.source.check_passes(2, "least squares reads them once per iteration")
        flat, self._restore = ravel(params)
        self._dtype = flat.dtype
        x = np.asarray(flat, np.float64)
        self._low, self._high = (_bound(bound, params, len(x)) for bound in bounds)
        if not np.all(self._low < self._high):
            raise ValueError("each lower bound must be less than its upper bound")
        if np.any(x < self._low) or np.any(x > self._high):
            raise ValueError("p0 is outside of the bounds")
        self._x0 = x
        precision = float(jnp.finfo(common_dtype(params)).eps)
        ftol, xtol, gtol, max_passes = tolerances
        self._tolerances = _Tolerances(
            max(ftol, precision), max(xtol, precision), max(gtol, precision), max_passes
        )
        self.passes_done = 0

    def run(self) -> LeastSquaresResult:
        point = self._evaluate(self._x0)
        history, steps, status = [point.cost], 0, None
        damping, growth = (1e-3, 2.0) if self._damped else (0.0, 2.0)
        shrink = 1.0
        try:
            with interruptions() as interrupted:
                status = self._converged(point)
                while status is None:
                    if self.passes_done >= self._tolerances.max_passes:
                        status = 0
                        break
                    if interrupted():
                        status = -1
                        break
                    step = shrink * self._step(point, damping)
                    # In the precision of the parameters, so that the next point is really where it is said to be.
                    x = np.asarray(
                        np.asarray(np.clip(point.x + step, self._low, self._high), self._dtype), np.float64
                    )
                    step = x - point.x
                    small = np.linalg.norm(step) <= self._tolerances.xtol * np.linalg.norm(point.x)
                    if small and damping <= 1:  # a damped step is small for another reason
                        status = 3
                        break
                    trial = self._try(x)
                    predicted = -(point.grad @ step + step @ point.matrix @ step / 2)
                    decrease = point.cost - trial.cost if trial is not None else -math.inf
                    if trial is not None and decrease > 0:
                        ratio = decrease / predicted if predicted > 0 else 1.0
                        old, point, steps = point.cost, trial, steps + 1
                        history.append(point.cost)
                        damping, growth = damping * max(1 / 3, 1 - (2 * ratio - 1) ** 3), 2.0
                        shrink = min(1.0, 2 * shrink)
                        status = self._converged(point)
                        if status is None and decrease <= self._tolerances.ftol * old and ratio > 0.25:
                            status = 2
                    elif self._damped:
                        damping, growth = max(damping, 1e-16) * growth, growth * 2
                        if growth > 2.0**40:
                            status = 5
                    else:
                        shrink /= 4
                        if shrink < 1e-8:
                            status = 5
                    # At the bottom rounding alone decides; what is predicted tells that it is the bottom.
                    if status is None and decrease <= 0 and predicted <= self._tolerances.ftol * point.cost:
                        status = 2
        except KeyboardInterrupt:
            status = -1
        return self._result(point, steps, status, history)

    def _evaluate(self, x: np.ndarray) -> _Point:
        params = self._restore(jnp.asarray(x, self._dtype))
        sums, counts = self._passes.sums(self._objective, "normal", params)
        self.passes_done += 1
        cost, count, (grad, matrix) = jax.device_get((sums.value, sums.weight, sums.rest))
        # Rows are counted exactly, numbers of residuals in floating point.
        elements = round(float(count) / counts.rows)
        grad, matrix = np.asarray(grad, np.float64), np.asarray(matrix, np.float64)
        return _Point(x, float(cost), grad, matrix, elements * counts.rows, counts)

    def _try(self, x: np.ndarray) -> _Point | None:
        """The next point, or None where the residuals are not finite."""
        try:
            return self._evaluate(x)
        except NonFiniteError:
            self.passes_done += 1
            return None

    def _free(self, point: _Point) -> np.ndarray:
        """Parameters that are not held by a bound: at it, with the cost decreasing beyond."""
        return ~((point.x <= self._low) & (point.grad > 0) | (point.x >= self._high) & (point.grad < 0))

    def _step(self, point: _Point, damping: float) -> np.ndarray:
        """-(J'J + damping diag(J'J))^-1 J'r over the free parameters, in units in which J'J has ones on its diagonal."""
        free = self._free(point)
        step = np.zeros_like(point.x)
        matrix, grad = point.matrix[np.ix_(free, free)], point.grad[free]
        scale = _scale(matrix)
        scaled = matrix / np.outer(scale, scale) + damping * np.eye(len(grad))
        step[free] = -np.linalg.lstsq(scaled, grad / scale, rcond=None)[0] / scale
        return step

    def _optimality(self, point: _Point) -> float:
        """The largest cosine between the residuals and a column of J; at bounds, of what they leave free."""
        free = self._free(point)
        if not np.any(free) or point.cost == 0:
            return 0.0
        scale = np.sqrt(2 * point.cost) * _scale(point.matrix)
        return float(np.max(np.abs(point.grad[free]) / scale[free]))

    def _converged(self, point: _Point) -> int | None:
        return 1 if self._optimality(point) <= self._tolerances.gtol else None

    def _result(
        self, point: _Point, steps: int, status: int | None, history: list[float]
    ) -> LeastSquaresResult:
        status = 0 if status is None else status
        mask = np.where(point.x <= self._low, -1, np.where(point.x >= self._high, 1, 0))
        return LeastSquaresResult(
            x=self._restore(jnp.asarray(point.x, self._dtype)),
            cost=point.cost,
            grad=point.grad,
            jtj=point.matrix,
            residuals=point.residuals,
            active_mask=mask,
            optimality=self._optimality(point),
            counts=point.counts,
            nfev=self.passes_done,
            nit=steps,
            status=status,
            message=_MESSAGES[status],
            success=status > 0,
            history=history,
        )


def _scale(matrix: np.ndarray) -> np.ndarray:
    diagonal = np.sqrt(np.maximum(np.diag(matrix), 0.0))
    return np.where(diagonal > 0, diagonal, 1.0)


def _pseudo_inverse(matrix: np.ndarray) -> np.ndarray | None:
    """The inverse of a symmetric matrix, by its eigenvalues in units in which its diagonal is one; None if it is
    singular."""
    scale = _scale(matrix)
    values, vectors = np.linalg.eigh(matrix / np.outer(scale, scale))
    if not np.all(np.isfinite(values)) or values[0] <= len(scale) * np.finfo(float).eps * values[-1]:
        return None
    return (vectors / values) @ vectors.T / np.outer(scale, scale)


def _bound(bound: Any, params: PyTree, n: int) -> np.ndarray:
    """One side of the bounds, for each parameter."""
    if (
        np.ndim(bound) == 0
        and not isinstance(bound, (dict, list, tuple))
        and jax.tree.leaves(bound) == [bound]
    ):
        return np.full(n, float(bound))
    leaves = jax.tree.leaves(bound)
    like = jax.tree.leaves(params)
    if len(leaves) == len(like):
        return np.concatenate(
            [
                np.broadcast_to(np.asarray(b, np.float64), p.shape).reshape(-1)
                for b, p in zip(leaves, like, strict=True)
            ]
        )
    flat = np.asarray(leaves, np.float64).reshape(-1)
    if flat.shape != (n,):
        raise ValueError(f"bounds must be numbers or have the structure of p0, with {n} numbers in all")
    return flat


def curve_fit(
    f: Model,
    xdata: Any,
    ydata: Any = None,
    p0: Any = None,
    sigma: Any = None,
    absolute_sigma: bool = False,
    check_finite: bool | None = None,
    bounds: Bounds = (-math.inf, math.inf),
    method: Literal["lm", "trf"] | None = None,
    jac: None = None,
    *,
    full_output: bool = False,
    nan_policy: Literal["raise", "omit"] | None = None,
    loss: Loss = "linear",
    f_scale: float = 1.0,
    ftol: float = 1e-10,
    xtol: float = 1e-10,
    gtol: float = 1e-10,
    maxfev: int = 100,
    batch_size: int | None = None,
    prefetch: int = 0,
    mesh: Mesh | None = None,
) -> Any:
    """`scipy.optimize.curve_fit` over data that do not fit in memory: `f(x, *params)`, returns `(popt, pcov)` as NumPy
    arrays.

    `xdata`, `ydata`, `sigma`: arrays or memory maps. As in SciPy `xdata` may have shape (k, M) for M points, and `f` then
    gets slices of shape (k, rows); shapes (M, ...), rows first, work too, unless M = k. Or `xdata` is a source of batches
    (x, y) or (x, y, sigma), rows first, and `ydata` and `sigma` are None. `p0` defaults to ones, within finite bounds to
    their middle. `sigma`: standard deviations, one for all or one per point; a covariance matrix is not possible here.
    `absolute_sigma`, `bounds` and `full_output` (the infodict has `nfev`, `cost`, `grad` and `counts`, without residuals)
    as in SciPy. `nan_policy` "omit" leaves out points whose residual is not finite; otherwise they raise. The Jacobian is
    exact, so `jac` must be None; `method` only names what SciPy would take: it is Levenberg-Marquardt, projected where
    there are bounds. The rest as in `least_squares`. `pcov` is infinite, with a CovarianceWarning, where it can not be
    estimated.

    Raises RuntimeError if the fit does not converge within `maxfev` passes; ValueError, TypeError or NonFiniteError for
    data or arguments that do not fit.
    """
    if jac is not None:
        raise ValueError("jac must be None: derivatives are computed by automatic differentiation")
    if method not in (None, "lm", "trf"):
        raise ValueError(f"method must be None, 'lm' or 'trf', not {method!r}")
    if nan_policy not in (None, "raise", "omit"):
        raise ValueError(f"nan_policy must be None, 'raise' or 'omit', not {nan_policy!r}")
    low, high = _bounds_arrays(bounds)
    if method == "lm" and (np.any(np.isfinite(low)) or np.any(np.isfinite(high))):
        raise ValueError("method 'lm' has no bounds, as in SciPy: leave method out")
    start = _start(f, p0, low, high)
    source, stacked, has_sigma = _points(xdata, ydata, sigma)
    del check_finite  # what is not finite is found in any case

    def rows(params: jax.Array, batch: PyTree) -> _Rows:
        x, y, *deviations = batch
        x = jax.tree.map(lambda leaf: leaf.astype(params.dtype), x)
        r = residuals(f, True, params, jnp.stack(x) if stacked else x, y)
        return _Rows(r, deviations[0].astype(params.dtype) ** -2 if deviations else None)

    static = ("curve", stacked, has_sigma)
    objective = normal_objective(rows, (f,), loss, f_scale, static)
    nan: NanPolicy = "mask" if nan_policy == "omit" else "raise"
    passes = Passes(source, Options.of(batch_size, None, prefetch, mesh, nan))
    tolerances = _Tolerances(ftol, xtol, gtol, maxfev)
    result = _LevenbergMarquardt(passes, objective, start, (low, high), True, tolerances).run()
    if not result.success and result.status != -1:
        raise RuntimeError(f"the fit did not converge: {result.message}")
    popt = np.asarray(result.x)
    pcov = result.covariance(absolute_sigma=absolute_sigma)
    if not full_output:
        return popt, pcov
    info = {"nfev": result.nfev, "cost": result.cost, "grad": result.grad, "counts": result.counts}
    return popt, pcov, info, result.message, result.status


def _bounds_arrays(bounds: Any) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper bounds, of a tuple or a `scipy.optimize.Bounds`."""
    low, high = (bounds.lb, bounds.ub) if hasattr(bounds, "lb") else bounds
    low, high = np.broadcast_arrays(np.asarray(low, np.float64), np.asarray(high, np.float64))
    return low, high


def _start(f: Model, p0: Any, low: np.ndarray, high: np.ndarray) -> jax.Array:
    """SciPy's first guess where there is none: ones, or what is inside of the bounds."""
    if p0 is not None:
        return as_params(jnp.atleast_1d(jnp.asarray(np.asarray(p0, np.float64))))
    kinds = [parameter.kind for parameter in inspect.signature(f).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds or len(kinds) < 2:
        raise ValueError("the number of parameters can not be told from the model's signature: give p0")
    low, high = (np.broadcast_to(b, (len(kinds) - 1,)) for b in (low, high))
    start = np.where(np.isfinite(low), low + 1, np.where(np.isfinite(high), high - 1, 1.0))
    middle = np.isfinite(low) & np.isfinite(high)
    start[middle] = (low[middle] + high[middle]) / 2
    return as_params(jnp.asarray(start))


def _points(xdata: Any, ydata: Any, sigma: Any) -> tuple[Source, bool, bool]:
    """The source of (x, y) or (x, y, sigma), whether x is k predictors that the model takes stacked, and if there is
    sigma."""
    if ydata is None:
        if sigma is not None:
            raise ValueError("with a source, sigma is the third part of its batches: (x, y, sigma)")
        source = as_source(xdata)
        return source, False, True
    y = ydata if hasattr(ydata, "shape") else np.asarray(ydata)
    if not y.shape:
        raise ValueError("ydata must be an array")
    columns, stacked = _predictors(xdata, y.shape[0])
    if sigma is None:
        return Table((columns, y)), stacked, False
    deviations = sigma if hasattr(sigma, "shape") else np.asarray(sigma, np.float64)
    if deviations.ndim > 1:
        raise ValueError(
            "sigma must be one number or one per point; a covariance matrix does not fit a stream"
        )
    if deviations.ndim == 1 and deviations.shape != y.shape[:1]:
        raise ValueError(f"sigma has shape {deviations.shape}, but there are {y.shape[0]} points")
    if deviations.ndim == 0:
        deviations = np.broadcast_to(deviations, y.shape[:1])
    return Table((columns, y, deviations)), stacked, True


def _predictors(xdata: Any, points: int) -> tuple[Any, bool]:
    """x with rows first: an array, or the k rows of an array of shape (k, points)."""
    if isinstance(xdata, (list, tuple)):
        if xdata and all(np.ndim(part) == 1 and len(part) == points for part in xdata):
            return tuple(p if hasattr(p, "shape") else np.asarray(p) for p in xdata), True
        xdata = np.asarray(xdata)
    if xdata.ndim == 2 and xdata.shape[1] == points:
        return tuple(xdata[i] for i in range(xdata.shape[0])), True
    if xdata.shape[0] != points:
        raise ValueError(f"xdata has shape {xdata.shape}, but there are {points} points in ydata")
    return xdata, False
