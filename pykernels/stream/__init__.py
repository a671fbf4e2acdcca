"""Losses over data that do not fit in memory: exact values and gradients, and fits."""

from pykernels.stream.gradient import Counts, NonFiniteError, Terms, value, value_and_grad
from pykernels.stream.source import (
    Batches,
    Column,
    Shuffle,
    Source,
    Table,
    as_source,
    hdf5,
    npy,
    npz,
    parquet,
)
