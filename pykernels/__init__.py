"""Fused solvers for ordinary differential equations in JAX, forward and backward."""

from pykernels import stream
from pykernels.adjoint import BoundedTree, ForwardOnly, Milestones
from pykernels.kernels.cpu import register as register_native
from pykernels.solve import (
    Config,
    Explanation,
    Solution,
    SolveError,
    Stats,
    Status,
    explain,
    solve,
    solve_ensemble,
)
from pykernels.stepsize import Adaptive, Fixed
from pykernels.tableau import (
    ButcherTableau,
    bosh3,
    dopri5,
    dopri8,
    euler,
    heun,
    midpoint,
    ralston,
    rk4,
    tsit5,
    vern7,
)

__version__ = "0.1.0"

__all__ = [
    "Adaptive",
    "BoundedTree",
    "ButcherTableau",
    "Config",
    "Explanation",
    "Fixed",
    "ForwardOnly",
    "Milestones",
    "Solution",
    "SolveError",
    "Stats",
    "Status",
    "bosh3",
    "dopri5",
    "dopri8",
    "euler",
    "explain",
    "heun",
    "midpoint",
    "ralston",
    "register_native",
    "rk4",
    "solve",
    "solve_ensemble",
    "stream",
    "tsit5",
    "vern7",
]
