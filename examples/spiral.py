"""Train a neural ODE on the cubic spiral, by gradients through 256 trajectories with adaptive steps of their own.

    python examples/spiral.py [--output figure.png] [--iterations 3000]

The spiral is that of Chen, Rubanova, Bettencourt and Duvenaud (Neural Ordinary Differential Equations, NeurIPS 2018),

    dy/dt = A^T y^3,   A = [[-0.1, 2], [-2, -0.1]],   y(0) = (2, 0),   0 <= t <= 25,

with powers element by element. A perceptron 2-64-64-2 takes the right-hand side's place, as there on the cubes of the state.
It sees 256 stretches of the spiral, ten points each over one unit of time, and is trained by Adam on the mean square of the
residuals, all of it one compiled program. The measure is the whole spiral from its start, which no stretch shows: the mean
absolute error (that of the authors' demonstration) and the mean square error over 1,000 times. Prints them and writes a
figure.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import pykernels as pk

HERE = Path(__file__).parent

Layers = list[tuple[jax.Array, jax.Array]]  # weight and bias

MATRIX = np.asarray([[-0.1, 2.0], [-2.0, -0.1]], np.float32)
START = np.asarray([2.0, 0.0], np.float32)
TIMES = np.linspace(0.0, 25.0, 1000, dtype=np.float32)

TRAJECTORIES, POINTS, LENGTH = 256, 10, 1.0
WIDTHS = (2, 64, 64, 2)


def spiral(t: jax.Array, y: jax.Array, matrix: jax.Array) -> jax.Array:
    del t
    return y**3 @ matrix


def perceptron(t: jax.Array, y: jax.Array, layers: Layers) -> jax.Array:
    del t
    *hidden, (weight, bias) = layers
    value = y**3
    for w, b in hidden:
        value = jnp.tanh(w @ value + b)
    return weight @ value + bias


def initial_layers(seed: int = 0) -> Layers:
    rng = np.random.default_rng(seed)
    return [
        (
            jnp.asarray(rng.normal(size=(after, before)) / np.sqrt(before), jnp.float32),
            jnp.zeros(after, jnp.float32),
        )
        for before, after in itertools.pairwise(WIDTHS)
    ]


def stretches(seed: int = 1) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Starts (trajectories, 2), times (points,) and states (trajectories, points, 2) of pieces of the spiral."""
    # More of them early, where the spiral is fast.
    begins = np.sort((TIMES[-1] - LENGTH) * np.random.default_rng(seed).uniform(size=TRAJECTORIES) ** 3)
    times = jnp.linspace(0.0, LENGTH, POINTS, dtype=jnp.float32)
    step = pk.Adaptive(rtol=1e-6, atol=1e-6)
    starts = pk.solve(
        spiral, START, 0.0, TIMES[-1], MATRIX, step=step, save_at=jnp.asarray(begins, jnp.float32)
    ).ys
    states = pk.solve_ensemble(spiral, starts, 0.0, LENGTH, MATRIX, step=step, save_at=times).ys
    return starts, times, states


def train(layers: Layers, iterations: int) -> tuple[Layers, jax.Array]:
    """The trained layers and the loss of every iteration."""
    starts, times, states = stretches()

    def loss(layers: Layers) -> jax.Array:
        step = pk.Adaptive(rtol=1e-4, atol=1e-5)
        predicted = pk.solve_ensemble(
            perceptron, starts, 0.0, LENGTH, layers, step=step, save_at=times, max_steps=256, throw=False
        )
        return jnp.mean((predicted.ys - states) ** 2)

    adam = optax.adam(optax.cosine_decay_schedule(1e-2, iterations))

    @jax.jit
    def minimise(layers: Layers) -> tuple[Layers, jax.Array]:
        def step(carry, _):
            layers, state = carry
            value, gradient = jax.value_and_grad(loss)(layers)
            updates, state = adam.update(gradient, state)
            return (optax.apply_updates(layers, updates), state), value

        (layers, _), losses = jax.lax.scan(step, (layers, adam.init(layers)), length=iterations)
        return layers, losses

    return minimise(layers)


def whole(layers: Layers) -> tuple[np.ndarray, np.ndarray]:
    """The spiral and the trained field's curve from the same start, (times, 2) each."""
    step = pk.Adaptive(rtol=1e-6, atol=1e-6)
    truth = pk.solve(spiral, START, 0.0, TIMES[-1], MATRIX, step=step, save_at=TIMES)
    learned = pk.solve(perceptron, START, 0.0, TIMES[-1], layers, step=step, save_at=TIMES)
    return np.asarray(truth.ys), np.asarray(learned.ys)


def draw(output: Path, truth: np.ndarray, learned: np.ndarray, losses: np.ndarray, error: float) -> None:
    """Both curves in time and in the plane, and the loss."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    in_time, in_plane, of_training = figure.subplots(1, 3)
    for column, colour in enumerate(("tab:blue", "tab:red")):
        in_time.plot(TIMES, truth[:, column], color=colour, label=f"$y_{column + 1}$, spiral")
        in_time.plot(TIMES, learned[:, column], "--", color="black", linewidth=1)
    in_time.set(xlabel="t", title=f"mean absolute error {error:.3f}")
    in_time.legend(frameon=False)
    in_plane.plot(*truth.T, color="tab:blue", label="spiral")
    in_plane.plot(*learned.T, "--", color="black", linewidth=1, label="neural ODE")
    in_plane.set(xlabel="$y_1$", ylabel="$y_2$", aspect="equal")
    in_plane.legend(frameon=False, loc="upper right")
    of_training.semilogy(losses)
    of_training.set(xlabel="iteration", title="mean square of the residuals")
    figure.savefig(output, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=HERE / "spiral.png", help="figure's file (default: beside the script)"
    )
    parser.add_argument(
        "--iterations", type=int, default=3000, help="of Adam (default 3000; 100 for a quick look)"
    )
    options = parser.parse_args()
    layers, losses = train(initial_layers(), options.iterations)
    truth, learned = whole(layers)
    error, square = float(np.mean(np.abs(truth - learned))), float(np.mean((truth - learned) ** 2))
    print(f"loss     {float(losses[-1]):.3e}")
    print(f"absolute {error:.3e}")
    print(f"square   {square:.3e}")
    draw(options.output, truth, learned, np.asarray(losses), error)
    print(f"figure   {options.output}")


if __name__ == "__main__":
    main()
