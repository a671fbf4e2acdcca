"""Tableaus against the full set of rooted-tree order conditions, against diffrax, and against misprints."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import diffrax
import jax.numpy as jnp
import numpy as np
import pytest

from pykernels import tableau
from pykernels.tableau import METHODS, ButcherTableau

# A rooted tree is the tuple of its root's subtrees. A Runge-Kutta method has order p if and only if
# sum_i b_i phi_i(tree) = 1 / density(tree) for every tree of at most p vertices (Butcher, 1963).
Tree = tuple[Any, ...]

THETAS = (0.1, 0.25, 0.5, 2 / 3, 0.9, 1.0)
each_method = pytest.mark.parametrize("method", METHODS, ids=str)


@cache
def trees(vertices: int) -> tuple[Tree, ...]:
    """All rooted trees with this many vertices, each once."""

    def forests(total: int, largest: int, last: int) -> Iterator[Tree]:
        # Subtrees in non-increasing (size, index) order, so that no forest comes twice.
        if total == 0:
            yield ()
            return
        for size in range(min(total, largest), 0, -1):
            candidates = trees(size)
            stop = last + 1 if size == largest else len(candidates)
            for index in range(stop):
                for rest in forests(total - size, size, index):
                    yield (candidates[index], *rest)

    if vertices == 1:
        return ((),)
    return tuple(forests(vertices - 1, vertices - 1, len(trees(vertices - 1)) - 1))


def size(tree: Tree) -> int:
    return 1 + sum(map(size, tree))


def density(tree: Tree) -> int:
    return size(tree) * math.prod(map(density, tree))


class Elementary:
    """Elementary weights of a tableau, its interpolant's extra stages included."""

    def __init__(self, method: ButcherTableau) -> None:
        stages, total = method.stages, method.stages + len(method.dense_a)
        self.matrix = np.zeros((total, total))
        for i, row in enumerate(method.a):
            self.matrix[i + 1, : i + 1] = row
        for j, row in enumerate(method.dense_a):
            self.matrix[stages + j, : stages + j] = row
        self.b = np.array(method.b + (0.0,) * len(method.dense_a))
        self.error = None if method.error is None else np.array(method.error + (0.0,) * len(method.dense_a))
        self.dense = np.array(method.dense)
        self._weights: dict[Tree, np.ndarray] = {}

    def phi(self, tree: Tree) -> np.ndarray:
        if tree not in self._weights:
            value = np.ones(len(self.matrix))
            for subtree in tree:
                value = value * (self.matrix @ self.phi(subtree))
            self._weights[tree] = value
        return self._weights[tree]

    def dense_at(self, theta: float) -> np.ndarray:
        return self.dense @ theta ** np.arange(1, self.dense.shape[1] + 1)

    def defect(self, weights: np.ndarray, vertices: int, theta: float = 1.0) -> float:
        """The largest error in the conditions of this order, for a step of theta."""
        return max(
            abs(float(weights @ self.phi(tree)) - theta**vertices / density(tree)) for tree in trees(vertices)
        )


@cache
def elementary(method: ButcherTableau) -> Elementary:
    return Elementary(method)


def test_the_trees_are_all_there() -> None:
    # OEIS A000081.
    assert [len(set(trees(n))) for n in range(1, 10)] == [1, 1, 2, 4, 9, 20, 48, 115, 286]
    assert all(size(tree) == n for n in range(1, 10) for tree in trees(n))
    assert density(((), ((),))) == 4 * 2


@each_method
def test_the_solution_has_its_order_and_no_more(method: ButcherTableau) -> None:
    weights = elementary(method)
    for order in range(1, method.order + 1):
        assert weights.defect(weights.b, order) < 1e-13
    assert weights.defect(weights.b, method.order + 1) > 1e-6


@pytest.mark.parametrize("method", [m for m in METHODS if m.error is not None], ids=str)
def test_the_embedded_solution_has_one_order_less(method: ButcherTableau) -> None:
    weights = elementary(method)
    embedded = weights.b - weights.error
    for order in range(1, method.error_order):
        assert weights.defect(embedded, order) < 1e-13
    assert weights.defect(embedded, method.error_order) > 1e-5


@each_method
@pytest.mark.parametrize("theta", THETAS)
def test_the_interpolant_has_its_order(method: ButcherTableau, theta: float) -> None:
    weights = elementary(method)
    for order in range(1, method.dense_order + 1):
        # vern7's polynomials cancel from 1e3: rounding its coefficients alone leaves 1e-13.
        assert weights.defect(weights.dense_at(theta), order, theta) < 5e-13


@each_method
def test_the_interpolant_has_no_higher_order(method: ButcherTableau) -> None:
    weights = elementary(method)
    assert weights.defect(weights.dense_at(0.5), method.dense_order + 1, 0.5) > 1e-6


@each_method
def test_the_interpolant_is_smooth_from_step_to_step(method: ButcherTableau) -> None:
    """Its slopes at the ends are f(t, y) and f(t + h, y1), except for the straight line."""
    if method.name == "euler":
        return
    weights = elementary(method)
    degree = weights.dense.shape[1]
    start, end = np.zeros((2, len(weights.matrix)))
    start[0] = 1.0
    ends = [i for i, row in enumerate(weights.matrix) if i > 0 and np.array_equal(row, weights.b)]
    end[ends] = 1.0
    assert len(ends) == 1
    np.testing.assert_array_equal(weights.dense[:, 0], start)
    # The published digits of dopri8's interpolant leave 3e-11, every other method 1e-12.
    np.testing.assert_allclose(weights.dense @ np.arange(1, degree + 1), end, atol=5e-11)


def _step(method: ButcherTableau, h: float, thetas: np.ndarray) -> tuple[float, float, np.ndarray]:
    """One step for y' = y cos(3 t) + y^2 / 4 from y(0.1) = 1: y1, its error estimate, the interpolant."""
    k: list[float] = []
    for c, row in zip(method.c + method.dense_c, ((), *method.a, *method.dense_a), strict=True):
        t, y = 0.1 + c * h, 1 + h * sum(a * slope for a, slope in zip(row, k, strict=True))
        k.append(y * math.cos(3 * t) + y * y / 4)
    powers = thetas[:, None] ** np.arange(1, len(method.dense[0]) + 1)
    estimate = sum(e * slope for e, slope in zip(method.error or (), k, strict=False))
    y1 = 1 + h * sum(b * slope for b, slope in zip(method.b, k, strict=False))
    return y1, h * estimate, 1 + h * (powers @ np.array(method.dense).T @ np.array(k))


def _reference(t: np.ndarray) -> np.ndarray:
    # With u = 1 / y: u' = -u cos(3 t) - 1/4, a linear equation, by Gauss-Legendre quadrature.
    nodes, weights = np.polynomial.legendre.leggauss(40)

    def primitive(x: np.ndarray) -> np.ndarray:
        return (np.sin(3 * x) - np.sin(0.3)) / 3

    s = 0.1 + (t[:, None] - 0.1) * (nodes + 1) / 2
    integral = (t - 0.1) / 2 * (np.exp(primitive(s)) @ weights)
    return np.exp(primitive(t)) / (1 - integral / 4)


@each_method
def test_local_errors_shrink_as_promised(method: ButcherTableau) -> None:
    """The layout's meaning, independently of the order conditions: a step of a non-autonomous equation."""
    thetas = np.array([0.3, 0.5, 0.8])
    # Small enough for the leading term, large enough for errors far above rounding.
    h = 0.01 if method.order <= 3 else 0.05 if method.order <= 5 else 0.2
    errors, estimates, dense_errors = [], [], []
    for step in (h, h / 2):
        y1, estimate, dense = _step(method, step, thetas)
        exact = _reference(0.1 + step * np.append(thetas, 1.0))
        errors.append(abs(y1 - exact[-1]))
        estimates.append(abs(estimate))
        dense_errors.append(np.abs(dense - exact[:-1]).max())
    assert math.log2(errors[0] / errors[1]) > method.order + 0.7
    assert math.log2(dense_errors[0] / dense_errors[1]) > method.dense_order + 0.7
    if method.error is not None:
        assert math.log2(estimates[0] / estimates[1]) > method.error_order - 0.3


DIFFRAX = {
    "midpoint": diffrax.Midpoint(),
    "heun": diffrax.Heun(),
    "ralston": diffrax.Ralston(),
    "bosh3": diffrax.Bosh3(),
    "tsit5": diffrax.Tsit5(),
    "dopri5": diffrax.Dopri5(),
    "dopri8": diffrax.Dopri8(),
}


@pytest.mark.parametrize("name", DIFFRAX)
def test_the_numbers_are_diffrax_numbers(name: str) -> None:
    method: ButcherTableau = getattr(tableau, name)
    solver = DIFFRAX[name]
    theirs = solver.tableau
    assert method.error is not None
    np.testing.assert_array_equal(method.c[1:], theirs.c)
    np.testing.assert_array_equal(method.b, theirs.b_sol)
    np.testing.assert_allclose(method.error, theirs.b_error, rtol=0, atol=1e-16)
    assert len(method.a) == len(theirs.a_lower)
    for row, their_row in zip(method.a, theirs.a_lower, strict=True):
        np.testing.assert_array_equal(row, their_row)
    assert method.fsal == theirs.fsal


@pytest.mark.parametrize("name", ["euler", *DIFFRAX])
def test_the_orders_are_diffrax_orders(name: str) -> None:
    method: ButcherTableau = getattr(tableau, name)
    solver = DIFFRAX.get(name, diffrax.Euler())
    terms = diffrax.ODETerm(lambda t, y, args: y)
    assert method.order == solver.order(terms)
    assert method.error_order == solver.error_order(terms)


# The two-stage methods differ on purpose: diffrax takes the last stage for the slope at the end of the step.
@pytest.mark.parametrize("name", ["bosh3", "tsit5", "dopri5", "dopri8"])
def test_the_interpolants_are_diffrax_interpolants(name: str) -> None:
    method: ButcherTableau = getattr(tableau, name)
    weights = elementary(method)
    k = jnp.eye(method.stages)  # the "state" is the vector of weights itself
    y0, y1 = jnp.zeros(method.stages), jnp.asarray(weights.b)
    path = DIFFRAX[name].interpolation_cls(t0=0.0, t1=1.0, y0=y0, y1=y1, k=k)
    for theta in np.linspace(0, 1, 11):
        np.testing.assert_allclose(weights.dense_at(theta), path.evaluate(theta), rtol=0, atol=3e-13)


def test_fsal_is_derived() -> None:
    fsal = {method.name for method in METHODS if method.fsal}
    assert fsal == {"bosh3", "tsit5", "dopri5", "dopri8"}


@each_method
def test_hermite_and_extra_stages(method: ButcherTableau) -> None:
    assert method.stages == len(method.c) == len(method.a) + 1
    extra = {"midpoint": 1, "heun": 1, "ralston": 1, "rk4": 1, "vern7": 6}.get(method.name, 0)
    assert len(method.dense_a) == len(method.dense_c) == extra
    if extra:
        assert method.dense_a[0] == method.b
        assert method.dense_c[0] == 1


def test_hermite_is_the_cubic() -> None:
    """Through value and slope at both ends, on a polynomial that determines it."""
    coefficients = np.array(tableau.heun.dense)
    y, slope0, increment, slope1 = 0.7, -1.3, 0.4, 2.2
    k = np.array([slope0, 2 * increment - slope0, slope1])  # b = (1/2, 1/2)
    cubic = np.polynomial.Polynomial([y, *(k @ coefficients)])
    assert cubic(0.0) == y
    np.testing.assert_allclose(
        [cubic(1.0), cubic.deriv()(0.0), cubic.deriv()(1.0)], [y + increment, slope0, slope1], rtol=1e-15
    )


def test_methods_lists_every_method_once() -> None:
    constants = {name: value for name, value in vars(tableau).items() if isinstance(value, ButcherTableau)}
    assert {method.name: method for method in METHODS} == constants
    assert len(METHODS) == len(set(METHODS)) == 10
    assert [m.order for m in METHODS] == sorted(m.order for m in METHODS)


@each_method
def test_equality_hash_and_repr(method: ButcherTableau) -> None:
    twin = dataclasses.replace(method)
    assert twin is not method
    assert twin == method
    assert hash(twin) == hash(method)
    assert copy.deepcopy(method) == pickle.loads(pickle.dumps(method)) == method
    assert repr(method) == str(method) == method.name
    renamed = dataclasses.replace(method, name="other")
    assert renamed != method
    assert {method: 1, renamed: 2}[twin] == 1


def test_different_methods_differ() -> None:
    assert len({hash(method) for method in METHODS}) == len(METHODS)
    smaller_error = tuple(0.5 * e for e in tableau.tsit5.error or ())
    assert dataclasses.replace(tableau.tsit5, error=smaller_error) != tableau.tsit5


def test_the_hash_is_computed_once() -> None:
    twin = dataclasses.replace(tableau.vern7)
    hash(twin)
    object.__setattr__(twin, "a", None)  # a second look at the numbers would show
    assert hash(twin) == hash(tableau.vern7)


def test_a_pickled_hash_is_right_in_another_process() -> None:
    hash(tableau.dopri8)
    script = (
        "import pickle, sys; from pykernels import tableau;"
        "m = pickle.loads(sys.stdin.buffer.read());"
        "assert {tableau.dopri8: 1}[m] == 1"
    )
    subprocess.run(
        [sys.executable, "-c", script],
        input=pickle.dumps(tableau.dopri8),
        check=True,
        cwd=Path(tableau.__file__).parents[1],
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )


def test_fields_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        tableau.tsit5.order = 6  # type: ignore[misc]


def test_any_real_numbers_become_floats_in_tuples() -> None:
    method = ButcherTableau.with_hermite(
        name="heun", order=2, c=[0, 1], a=[[1]], b=[np.float64(0.5), 0.5], error=[0.5, -0.5]
    )
    assert method == tableau.heun
    assert hash(method) == hash(tableau.heun)
    assert all(type(x) is float for row in (method.c, method.b, *method.a, *method.dense) for x in row)


def _numbers(method: ButcherTableau) -> Iterator[tuple[str, dict[str, Any]]]:
    """For each coefficient, the field changed in that one number."""

    def bump(row: tuple[float, ...], j: int) -> tuple[float, ...]:
        return (*row[:j], row[j] + 1e-9 * max(1.0, abs(row[j])), *row[j + 1 :])

    for field in ("c", "b", "error", "dense_c"):
        row = getattr(method, field) or ()
        for j in range(len(row)):
            yield f"{field}[{j}]", {field: bump(row, j)}
    for field in ("a", "dense", "dense_a"):
        rows = getattr(method, field)
        for i, row in enumerate(rows):
            for j in range(len(row)):
                yield f"{field}[{i}][{j}]", {field: (*rows[:i], bump(row, j), *rows[i + 1 :])}


@each_method
def test_every_single_misprint_is_caught(method: ButcherTableau) -> None:
    missed = []
    for place, change in _numbers(method):
        try:
            dataclasses.replace(method, **change)
        except ValueError:
            continue
        missed.append(place)
    assert missed == []


def _replace(field: str, change: Any, method: ButcherTableau = tableau.dopri5) -> dict[str, Any]:
    return {"method": method, field: change(getattr(method, field))}


CORRUPTIONS = {
    "order is 0": _replace("order", lambda _: 0),
    "b is empty": _replace("b", lambda _: ()),
    r"c has 6 entries for 7 stages": _replace("c", lambda c: c[:-1]),
    r"rows of a must have 1, 2, \.\.\., 6 entries": _replace("a", lambda a: (*a[:-1], (*a[-1], 0.0))),
    r"error has 6 entries for 7 stages": _replace("error", lambda e: e[:-1]),
    r"rows of dense_a must have 10, 11": _replace("dense_a", lambda a: a[1:], tableau.vern7),
    r"dense_c has 5 entries for 6 rows": _replace("dense_c", lambda c: c[1:], tableau.vern7),
    r"dense has 6 rows for 7 stages and 0 extra": _replace("dense", lambda d: d[1:]),
    r"rows of dense differ in length": _replace("dense", lambda d: (*d[:-1], d[-1][:-1])),
    r"dense_order is 0, must be between 1 and the degree of dense, 4": _replace("dense_order", lambda _: 0),
    r"dense_order is 5, must be between 1 and the degree of dense, 4": _replace("dense_order", lambda _: 5),
    r"a coefficient is not finite": _replace("b", lambda b: (math.nan, *b[1:])),
    r"coefficient is not finite": _replace(
        "dense_a", lambda a: (*a[:-1], (math.inf, *a[-1][1:])), tableau.vern7
    ),
    r"c\[0\] is 0\.1, must be 0": _replace("c", lambda c: (0.1, *c[1:])),
    r"row 1 of a must add up to c\[2\]": _replace("c", lambda c: (*c[:2], 0.31, *c[3:])),
    r"row 2 of dense_a must add up to dense_c\[2\]": _replace(
        "dense_a", lambda a: (*a[:2], (a[2][0] + 1e-9, *a[2][1:]), *a[3:]), tableau.vern7
    ),
    r"error must add up to 0": _replace("error", lambda e: (e[0] + 1e-9, *e[1:])),
    r"order 5 asks that b integrates theta\^0": _replace("b", lambda b: (b[0] + 1e-9, *b[1:])),
    # The sum stays 1, the mean does not.
    r"order 5 asks that b integrates theta\^1": _replace(
        "b", lambda b: (b[0] + 1e-9, b[1], b[2] - 1e-9, *b[3:])
    ),
    r"order 6 asks that b integrates theta\^5": _replace("order", lambda _: 6),
    r"dense_order 4 asks that dense integrates theta\^0, at theta\^2": _replace(
        "dense", lambda d: ((d[0][0], d[0][1] + 1e-9, d[0][2] - 1e-9, d[0][3]), *d[1:])
    ),
    r"dense_order 6 asks that dense integrates theta\^5": _replace(
        "dense_order", lambda _: 6, tableau.dopri8
    ),
    # Weight moved between the two stages at the end of the step: no quadrature formula sees it.
    r"dense at theta = 1 must equal b, row 5": _replace(
        "dense", lambda d: (*d[:5], (*d[5][:3], d[5][3] + 1e-9), (*d[6][:3], d[6][3] - 1e-9))
    ),
}


@pytest.mark.parametrize("message", CORRUPTIONS)
def test_the_self_check_names_what_is_wrong(message: str) -> None:
    changes = dict(CORRUPTIONS[message])
    method = changes.pop("method")
    with pytest.raises(ValueError, match=f"tableau '{method.name}': .*{message}"):
        dataclasses.replace(method, **changes)
