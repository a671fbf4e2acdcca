"""Fit the Lotka-Volterra equations to the Hudson's Bay Company's lynx and hare pelts, by gradients through the solver.

    python examples/lynx_hare.py [--output figure.png]

Hares u are born at rate alpha and eaten at rate beta v; lynxes v starve at rate gamma and are born at rate delta u:

    du/dt = u (alpha - beta v),   dv/dt = v (delta u - gamma)

The four rates and the two populations of 1900 minimise the mean square of the residuals of the populations'
logarithms, which supposes errors in proportion to the populations. All six are positive, so their logarithms are
fitted, by Adam with a step that decays to zero, all in one compiled program. Prints the parameters and the residual
and writes a figure.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import pykernels as pk

HERE = Path(__file__).parent


class Parameters(NamedTuple):
    """Rates per year; populations in thousands of pelts."""

    alpha: jax.Array
    beta: jax.Array
    gamma: jax.Array
    delta: jax.Array
    hare: jax.Array
    lynx: jax.Array


# In the right order of magnitude: a cycle of about 2 pi / sqrt(alpha gamma) = 10 years around (gamma / delta, alpha / beta).
START = Parameters(*map(np.log, (0.6, 0.025, 0.7, 0.02, 30.0, 4.0)))

STEPS = 1000  # the gradient's norm is then 1e-7


def lotka_volterra(t: jax.Array, y: jax.Array, p: Parameters) -> jax.Array:
    del t
    hare, lynx = y
    return jnp.stack([hare * (p.alpha - p.beta * lynx), lynx * (p.delta * hare - p.gamma)])


def populations(log_parameters: Parameters, years: jax.Array) -> jax.Array:
    """Hares and lynxes at the given years, the first of which is the start; shape (years, 2)."""
    p = Parameters(*map(jnp.exp, log_parameters))
    y0 = jnp.stack([p.hare, p.lynx])
    step = pk.Adaptive(rtol=1e-8, atol=1e-8)
    return pk.solve(lotka_volterra, y0, years[0], years[-1], p, step=step, save_at=years).ys


def fit(years: jax.Array, pelts: jax.Array) -> tuple[Parameters, float]:
    """The fitted parameters and the root mean square of the residuals of the logarithms."""

    def loss(log_parameters: Parameters) -> jax.Array:
        return jnp.mean((jnp.log(populations(log_parameters, years)) - jnp.log(pelts)) ** 2)

    adam = optax.adam(optax.cosine_decay_schedule(0.05, STEPS))

    @jax.jit
    def minimise(parameters: Parameters) -> tuple[Parameters, jax.Array]:
        def step(carry, _):
            parameters, state = carry
            value, gradient = jax.value_and_grad(loss)(parameters)
            updates, state = adam.update(gradient, state)
            return (optax.apply_updates(parameters, updates), state), value

        (parameters, _), values = jax.lax.scan(step, (parameters, adam.init(parameters)), length=STEPS)
        return parameters, values[-1]

    log_parameters, value = minimise(jax.tree.map(jnp.asarray, START))
    return Parameters(*map(jnp.exp, log_parameters)), float(jnp.sqrt(value))


def draw(output: Path, years: np.ndarray, pelts: np.ndarray, fitted: Parameters, residual: float) -> None:
    """The record as points and the fitted solution as lines."""
    fine = jnp.linspace(years[0], years[-1], 401)
    curves = np.asarray(populations(Parameters(*map(jnp.log, fitted)), fine))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for column, (name, colour) in enumerate((("snowshoe hare", "tab:blue"), ("Canada lynx", "tab:red"))):
        axes.plot(fine, curves[:, column], color=colour, label=f"{name}, fitted")
        axes.plot(years, pelts[:, column], "o", color=colour, label=f"{name}, record")
    axes.set(xlabel="year", ylabel="pelts (thousands)", xticks=years[::2], ylim=(0, 95))
    axes.set_title(f"Lotka-Volterra fit, residual {residual:.2f} in log units (root mean square)")
    axes.legend(ncols=2, frameon=False, loc="upper center")
    figure.savefig(output, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=HERE / "lynx_hare.png",
        help="figure's file (default: beside the script)",
    )
    output = parser.parse_args().output
    jax.config.update("jax_enable_x64", True)
    lines = (HERE / "data" / "lynx_hare.csv").read_text().splitlines()
    record = np.genfromtxt([line for line in lines if not line.startswith("#")], delimiter=",", names=True)
    years, pelts = record["year"], np.stack([record["hare"], record["lynx"]], axis=-1)
    fitted, residual = fit(jnp.asarray(years), jnp.asarray(pelts))
    for name, value in fitted._asdict().items():
        print(f"{name:8} {float(value):8.4f}")
    print(f"residual {residual:8.4f}")
    draw(output, years, pelts, fitted, residual)
    print(f"figure   {output}")


if __name__ == "__main__":
    main()
