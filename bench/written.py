"""Fields written by hand for solvers outside of JAX, by the names in `Problem.written`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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


def _relaxation(t: float, y: Any, rate: Any) -> Any:
    return rate * (math.cos(t) - y)


FIELDS = {
    "lorenz": Written(3, 3, _lorenz, _lorenz_torch, _LORENZ_CPP),
    "stiff": Written(1, 1, _relaxation),
}


def rows(y0s: Any, args: Any, alone: bool) -> tuple[np.ndarray, np.ndarray]:
    """States and arguments with trajectories first, of shapes (trajectories, states) and (trajectories, arguments)."""
    y, p = (np.asarray(a, np.float64) for a in (y0s, args))
    return (y[None], p[None]) if alone else (y, p.reshape(len(y), -1))
