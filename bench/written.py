"""Fields written by hand for solvers outside of JAX, by the names in `Problem.written`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np


@dataclass(frozen=True)
class Written:
    """`plain(t, y, p)`: one trajectory, NumPy in, numbers out. `torch(t, y, p)`: tensors with trajectories first.
    `cpp`: the bodies of `field(t, y, p, f)` and `pull(t, y, p, c, cy, cp)`, which adds c^T df/dy and c^T df/dp."""

    states: int
    args: int
    plain: Callable[[float, Any, Any], Any]
    torch: Callable[[Any, Any, Any], Any] | None = None
    cpp: tuple[str, str] | None = None


def _lorenz(t: float, y: Any, p: Any) -> Any:
    a, b, c = y.tolist()  # arithmetic of Python's own numbers is several times faster than of NumPy's
    return [p[0] * (b - a), a * (p[1] - c) - b, a * b - p[2] * c]


def _lorenz_torch(t: Any, y: Any, p: Any) -> Any:
    import torch

    a, b, c = y.unbind(-1)
    sigma, rho, beta = p.unbind(-1)
    return torch.stack([sigma * (b - a), a * (rho - c) - b, a * b - beta * c], dim=-1)


_LORENZ_CPP = (
    "f[0] = p[0] * (y[1] - y[0]); f[1] = y[0] * (p[1] - y[2]) - y[1]; f[2] = y[0] * y[1] - p[2] * y[2];",
    "cy[0] += -p[0] * c[0] + (p[1] - y[2]) * c[1] + y[1] * c[2];"
    "cy[1] += p[0] * c[0] - c[1] + y[0] * c[2];"
    "cy[2] += -y[0] * c[1] - p[2] * c[2];"
    "cp[0] += (y[1] - y[0]) * c[0]; cp[1] += y[0] * c[1]; cp[2] += -y[2] * c[2];",
)


_LOTKA_VOLTERRA_CPP = (
    "f[0] = p[0] * y[0] - p[1] * y[0] * y[1]; f[1] = -p[2] * y[1] + p[3] * y[0] * y[1];",
    "cy[0] += (p[0] - p[1] * y[1]) * c[0] + p[3] * y[1] * c[1];"
    "cy[1] += -p[1] * y[0] * c[0] + (p[3] * y[0] - p[2]) * c[1];"
    "cp[0] += y[0] * c[0]; cp[1] += -y[0] * y[1] * c[0]; cp[2] += -y[1] * c[1]; cp[3] += y[0] * y[1] * c[1];",
)


def _lotka_volterra(t: float, y: Any, p: Any) -> Any:
    prey, predator = y.tolist()
    return [p[0] * prey - p[1] * prey * predator, -p[2] * predator + p[3] * prey * predator]


# States i, r, s and arguments contact, recovery: JAX orders a dict's entries by their names.
_SIR_CPP = (
    "double n = p[0] * y[2] * y[0], r = p[1] * y[0]; f[0] = n - r; f[1] = r; f[2] = -n;",
    "double n = c[0] - c[2], r = c[1] - c[0];"
    "cy[0] += n * p[0] * y[2] + r * p[1]; cy[2] += n * p[0] * y[0]; cp[0] += n * y[2] * y[0]; cp[1] += r * y[0];",
)


def _sir(t: float, y: Any, p: Any) -> Any:
    i, _, s = y.tolist()
    infections, recoveries = p[0] * s * i, p[1] * i
    return [infections - recoveries, recoveries, -infections]


_KEPLER_CPP = (
    "double r2 = y[0] * y[0] + y[1] * y[1], w = -p[0] / (r2 * std::sqrt(r2));"
    "f[0] = y[2]; f[1] = y[3]; f[2] = w * y[0]; f[3] = w * y[1];",
    "double r2 = y[0] * y[0] + y[1] * y[1], w = -p[0] / (r2 * std::sqrt(r2));"
    "double along = c[2] * y[0] + c[3] * y[1], dw = -3 * w / r2 * along;"
    "cy[0] += w * c[2] + dw * y[0]; cy[1] += w * c[3] + dw * y[1]; cy[2] += c[0]; cy[3] += c[1];"
    "cp[0] += w / p[0] * along;",
)


def _kepler(t: float, y: Any, mu: Any) -> Any:
    x, z, *speed = y.tolist()
    weight = -mu / (x * x + z * z) ** 1.5
    return [*speed, weight * x, weight * z]


def _relaxation(t: float, y: Any, rate: Any) -> Any:
    return rate * (math.cos(t) - y)


FIELDS = {
    "lorenz": Written(3, 3, _lorenz, _lorenz_torch, _LORENZ_CPP),
    "lotka_volterra": Written(2, 4, _lotka_volterra, cpp=_LOTKA_VOLTERRA_CPP),
    "sir": Written(3, 2, _sir, cpp=_SIR_CPP),
    "kepler": Written(4, 1, _kepler, cpp=_KEPLER_CPP),
    "stiff": Written(1, 1, _relaxation),
}


def rows(tree: Any, alone: bool) -> np.ndarray:
    """States or arguments in rows, one for each trajectory, leaf after leaf in JAX's order: (trajectories, numbers)."""
    leaves = [np.asarray(leaf, np.float64)[None if alone else ...] for leaf in jax.tree.leaves(tree)]
    return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)


def leaves_of(array: np.ndarray, like: Any, alone: bool) -> Any:
    """The inverse of `rows`, in the shapes of `like`."""
    leaves, tree = jax.tree.flatten(like)
    sizes = [np.size(leaf) // (1 if alone else len(array)) for leaf in leaves]
    parts = np.split(array, np.cumsum(sizes)[:-1], axis=1)
    return jax.tree.unflatten(
        tree, [part.reshape(np.shape(leaf)) for part, leaf in zip(parts, leaves, strict=True)]
    )
