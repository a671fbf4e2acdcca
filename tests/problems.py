"""The initial-value problems that tests and benchmarks share: fields, initial states, parameters and spans. Numbers only."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any


@dataclass(frozen=True)
class Problem:
    """dy/dt = field(t, y, args) from t0 to t1; `y0` and `args` build NumPy arrays of the dtype they are given."""

    name: str
    field: Callable[[Any, PyTree, PyTree], PyTree]
    y0: Callable[..., PyTree]
    args: Callable[..., PyTree]
    t0: float
    t1: float


def spread(tree: PyTree, lanes: int, scale: float = 0.05, seed: int = 0) -> PyTree:
    """An ensemble around `tree`: every leaf gains a leading axis and is varied by factors within 1 +- scale."""
    rng = np.random.default_rng(seed)

    def vary(leaf: np.ndarray) -> np.ndarray:
        factors = 1 + scale * rng.uniform(-1, 1, (lanes, *np.shape(leaf)))
        return (np.asarray(leaf) * factors).astype(np.asarray(leaf).dtype)

    return jax.tree.map(vary, tree)


def _lorenz(t, y, args):
    sigma, rho, beta = args
    x, v, z = y
    return jnp.stack([sigma * (v - x), x * (rho - z) - v, x * v - beta * z])


def _lotka_volterra(t, y, args):
    prey, predator = y
    a, b, c, d = args[0], args[1], args[2], args[3]
    return a * prey - b * prey * predator, -c * predator + d * prey * predator


def _pendulum(t, y, args):
    acceleration = -args["gravity"] / args["length"] * jnp.sin(y["angle"]) - args["damping"] * y["speed"]
    return {"angle": y["speed"], "speed": acceleration}


def _kepler(t, y, mu):
    position, velocity = y
    return velocity, -mu * position / jnp.sum(position**2) ** 1.5


def _forced_oscillator(t, y, args):
    stiffness, damping, force, frequency = args
    return jnp.stack([y[1], force * jnp.cos(frequency * t) - stiffness * y[0] - damping * y[1]])


def _sir(t, y, args):
    infections = args["contact"] * y["s"] * y["i"]
    recoveries = args["recovery"] * y["i"]
    return {"s": -infections, "i": infections - recoveries, "r": recoveries}


def _coupled(t, y, args):
    return args["p"] * (args["w"] @ jnp.tanh(y)) - y


def _perceptron(t, y, layers):
    *hidden, (weight, bias) = layers
    for w, b in hidden:
        y = jnp.tanh(w @ y + b)
    return weight @ y + bias


def _damped_oscillator(t, y, omega):
    return jnp.stack([omega * y[1], -omega * (y[0] + 0.04 * y[1])])


def _fisher_ring(t, y, args):
    spreading = args[0] * (jnp.roll(y, 1) - 2 * y + jnp.roll(y, -1))
    return spreading + args[1] * y * (1 - y)


def _relaxation(t, y, rate):
    return rate * (jnp.cos(t) - y)


def _decay(t, y, rate):
    return -rate * y


def _coupled_args(dtype=np.float64):
    w = np.random.default_rng(12).normal(size=(12, 12)) / np.sqrt(12)
    return {"p": np.asarray(1.5, dtype), "w": w.astype(dtype)}


def _perceptron_args(dtype=np.float64, hidden=16):
    rng = np.random.default_rng(16)
    sizes = (2, hidden, hidden, 2)
    return [
        (
            (rng.normal(size=(after, before)) / np.sqrt(before)).astype(dtype),
            (0.1 * rng.normal(size=after)).astype(dtype),
        )
        for before, after in itertools.pairwise(sizes)
    ]


def _scalars(*values: float) -> Callable[..., tuple[np.ndarray, ...]]:
    return lambda dtype=np.float64: tuple(np.asarray(v, dtype) for v in values)


def _vector(*values: float) -> Callable[..., np.ndarray]:
    return lambda dtype=np.float64: np.asarray(values, dtype)


def _named(**values: float) -> Callable[..., dict[str, np.ndarray]]:
    return lambda dtype=np.float64: {name: np.asarray(v, dtype) for name, v in values.items()}


LORENZ = Problem("lorenz", _lorenz, _vector(1.0, 2.0, 20.0), _scalars(10.0, 28.0, 8 / 3), 0.0, 2.0)
LOTKA_VOLTERRA = Problem(
    "lotka_volterra", _lotka_volterra, _scalars(2.0, 1.0), _vector(1.1, 0.4, 0.4, 0.1), 0.0, 10.0
)
PENDULUM = Problem(
    "pendulum",
    _pendulum,
    _named(angle=2.5, speed=0.1),
    _named(gravity=9.81, length=1.2, damping=0.05),
    0.0,
    4.0,
)
KEPLER = Problem(
    "kepler",
    _kepler,
    lambda dtype=np.float64: (np.asarray([0.7, 0.0], dtype), np.asarray([0.0, 1.4], dtype)),
    lambda dtype=np.float64: np.asarray(1.1, dtype),
    0.0,
    5.0,
)
#: Its field depends on time; it starts away from t = 0.
FORCED_OSCILLATOR = Problem(
    "forced_oscillator", _forced_oscillator, _vector(1.0, -0.5), _scalars(4.0, 0.2, 1.5, 1.7), 0.5, 6.0
)
SIR = Problem("sir", _sir, _named(s=0.99, i=0.01, r=0.0), _named(contact=1.4, recovery=0.3), 0.0, 20.0)
#: p (W tanh(y)) - y with a dense 12 x 12 matrix.
COUPLED = Problem("coupled", _coupled, _vector(*np.linspace(-1.0, 1.5, 12)), _coupled_args, 0.0, 3.0)
#: A neural field, layers of 2-16-16-2.
PERCEPTRON = Problem("perceptron", _perceptron, _vector(1.0, -0.7), _perceptron_args, 0.0, 4.0)

#: A larger one, 2-64-64-2, not among the eight.
PERCEPTRON_64 = dataclasses.replace(
    PERCEPTRON, name="perceptron64", args=functools.partial(_perceptron_args, hidden=64)
)

#: Of frequencies as they are given: an ensemble of frequencies that spread twentyfold spreads as much in its steps. Damped,
#: since a loss that is constant has a gradient of nothing but errors. Not among the eight.
DIVERGENT = Problem(
    "divergent",
    _damped_oscillator,
    _vector(1.0, 0.0),
    lambda dtype=np.float64: np.asarray(1.0, dtype),
    0.0,
    10.0,
)


def fisher_wave(states: int, dtype=np.float64) -> np.ndarray:
    """Initial values on a ring: one wave over 64 sites, so that rings of 64 k sites hold k copies of one solution."""
    return (0.3 + 0.2 * np.sin(2 * np.pi * np.arange(states) / min(states, 64))).astype(dtype)


#: Reaction and diffusion (Fisher 1937) on a ring of sites: diffusion between neighbours, logistic growth at each site. Not
#: among the eight.
REACTION_DIFFUSION = Problem(
    "reaction_diffusion", _fisher_ring, functools.partial(fisher_wave, 64), _vector(0.5, 1.0), 0.0, 2.0
)

#: The Lorenz system where it spirals into a fixed point, over as many steps as one likes. Not among the eight.
LONG_HORIZON = Problem("long_horizon", _lorenz, _vector(1.0, 0.0, 0.0), _vector(10.0, 14.0, 8 / 3), 0.0, 1.0)

#: Prothero and Robinson's stiff equation: fast relaxation to a slow solution. Not among the eight.
STIFF = Problem("stiff", _relaxation, _vector(0.0), lambda dtype=np.float64: np.asarray(1e4, dtype), 0.0, 2.0)

#: The eight reference problems.
PROBLEMS = (LORENZ, LOTKA_VOLTERRA, PENDULUM, KEPLER, FORCED_OSCILLATOR, SIR, COUPLED, PERCEPTRON)

DECAY = Problem(
    "decay", _decay, _vector(1.0, 2.0, -0.5), lambda dtype=np.float64: np.asarray(0.8, dtype), 0.0, 1.5
)


def decay_solution(t: float, y0: np.ndarray, rate: float) -> np.ndarray:
    """The closed form of DECAY."""
    return y0 * np.exp(-rate * t)
