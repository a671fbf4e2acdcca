"""The example as a user runs it: its own process, its own settings, the real record."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "lynx_hare.py"

# Posterior means of the same model with multiplicative errors and weak priors: B. Carpenter, Predator-Prey Population
# Dynamics: the Lotka-Volterra model in Stan, 2018. Their posterior standard deviations are above 10 %.
PUBLISHED = {"alpha": 0.55, "beta": 0.028, "gamma": 0.80, "delta": 0.024}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, float], Path]:
    """The printed numbers and the figure's path."""
    figure = tmp_path_factory.mktemp("example") / "figure.png"
    command = [sys.executable, "-W", "error", str(EXAMPLE), "--output", str(figure)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    return {line[0]: float(line[1]) for line in lines if line[0] != "figure"}, figure


def test_parameters_are_in_the_published_neighbourhood(run: tuple[dict[str, float], Path]) -> None:
    numbers, _ = run
    for name, value in PUBLISHED.items():
        assert numbers[name] == pytest.approx(value, rel=0.15), name


def test_residual_is_that_of_the_minimum(run: tuple[dict[str, float], Path]) -> None:
    """The same minimum found without this library: SciPy's least squares over SciPy's DOP853."""
    from scipy.integrate import solve_ivp
    from scipy.optimize import least_squares

    numbers, _ = run
    names = ("alpha", "beta", "gamma", "delta", "hare", "lynx")
    lines = (EXAMPLE.parent / "data" / "lynx_hare.csv").read_text().splitlines()
    table = np.array([line.split(",") for line in lines if line[0].isdigit()], dtype=float)
    years, pelts = table[:, 0], table[:, 1:]
    assert table.shape == (21, 3)

    def residuals(log_parameters: np.ndarray) -> np.ndarray:
        a, b, c, d, hare, lynx = np.exp(log_parameters)

        def field(t: float, y: np.ndarray) -> list[float]:
            return [y[0] * (a - b * y[1]), y[1] * (d * y[0] - c)]

        times = (years[0], years[-1])
        solution = solve_ivp(field, times, [hare, lynx], "DOP853", years, rtol=1e-9, atol=1e-9)
        return (np.log(solution.y.T) - np.log(pelts)).ravel()

    best = least_squares(residuals, np.log([numbers[name] for name in names]), xtol=1e-10, gtol=1e-10)
    # 0.5 units of the last of the four digits printed
    assert numbers["residual"] == pytest.approx(np.sqrt(np.mean(best.fun**2)), abs=0.5e-4)
    for name, value in zip(names, np.exp(best.x), strict=True):
        assert numbers[name] == pytest.approx(value, abs=0.6e-4, rel=1e-4), name


def test_figure_has_a_drawing(run: tuple[dict[str, float], Path]) -> None:
    image = matplotlib.image.imread(run[1])
    assert image.shape[0] > 400 and image.shape[1] > 600
    assert len(np.unique(image.reshape(-1, image.shape[-1]), axis=0)) > 10  # more than an empty page
