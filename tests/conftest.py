"""Every test runs in float64 with strict dtype promotion; warnings are errors (see pyproject.toml)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from pykernels.kernels import cpu

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--runner",
        choices=["default", "native", "xla"],
        default="default",
        help="the runner of all tests that do not choose one: what this machine takes by default, the native one (an error "
        "where there is none), or the portable one",
    )
    parser.addoption("--ptxrun", default=None, help="folder of ptxrun, which executes PTX on the CPU")


def pytest_configure(config: pytest.Config) -> None:
    """Before the test modules are imported: some ask at once whether there is a native runner."""
    runner = config.getoption("--runner")
    reason = cpu.unavailable()
    if runner == "native" and reason is not None:
        raise pytest.UsageError(f"--runner native: {reason}")
    if runner == "xla":
        cpu.unavailable = lambda: "switched off by --runner xla"


@pytest.fixture(scope="session")
def ptxrun(request: pytest.FixtureRequest) -> Any:
    """ptxrun's module that runs a JAX function with its CUDA kernels executed from their PTX."""
    folder = request.config.getoption("--ptxrun")
    if folder is None:
        pytest.skip("no --ptxrun")
    sys.path.insert(0, str(Path(folder).resolve()))
    import from_jax

    return from_jax
