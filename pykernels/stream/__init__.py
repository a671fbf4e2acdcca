"""Losses over data that do not fit in memory: exact values and gradients, and fits."""

from pykernels.stream.checkpoint import Checkpoint, CheckpointError, CheckpointWarning
from pykernels.stream.columns import Column
from pykernels.stream.files import hdf5, npy, npz, parquet
from pykernels.stream.fit import Epoch, FitResult, Progress, fit, minimize
from pykernels.stream.gradient import value, value_and_grad
from pykernels.stream.least_squares import CovarianceWarning, LeastSquaresResult, curve_fit, least_squares
from pykernels.stream.passes import Counts, NonFiniteError
from pykernels.stream.source import Batches, Shuffle, Source, Table
from pykernels.stream.sums import Terms

__all__ = [
    "Batches",
    "Checkpoint",
    "CheckpointError",
    "CheckpointWarning",
    "Column",
    "Counts",
    "CovarianceWarning",
    "Epoch",
    "FitResult",
    "LeastSquaresResult",
    "NonFiniteError",
    "Progress",
    "Shuffle",
    "Source",
    "Table",
    "Terms",
    "curve_fit",
    "fit",
    "hdf5",
    "least_squares",
    "minimize",
    "npy",
    "npz",
    "parquet",
    "value",
    "value_and_grad",
]
