"""The table of GPU kernels is complete, and a slice of it, compiled again, takes what the table says."""

from __future__ import annotations

import itertools

import pytest
from gpu_matrix import (
    KINDS,
    PROBLEMS,
    RUNNERS,
    Entry,
    Table,
    compile_entry,
    cost,
    matrix,
    ptxas,
    sliced,
    versions,
)

from pykernels.kernels import cuda, pallas

TABLE = Table.read()


SLICE = sliced()


def test_the_slice_touches_every_row_and_column() -> None:
    for axis in range(len(Entry._fields)):
        assert {e[axis] for e in SLICE} == {e[axis] for e in matrix() if e.field in PROBLEMS}
    assert {(e.runner, e.field) for e in SLICE} == set(itertools.product(RUNNERS, PROBLEMS))
    assert {(e.runner, e.kind) for e in SLICE} == set(itertools.product(RUNNERS, KINDS))


def test_the_table_is_complete() -> None:
    """`python bench/gpu_matrix.py` writes it."""
    assert set(TABLE.rows) == set(matrix())


def test_lorenz_does_not_spill() -> None:
    for entry, row in TABLE.rows.items():
        if entry.field == "lorenz" and entry.method == "tsit5":
            assert row.spilled == 0, entry


@pytest.mark.parametrize("entry", SLICE, ids=["-".join(map(str, e)) for e in SLICE])
def test_an_entry_takes_what_the_table_says(entry: Entry) -> None:
    missing = cuda.unavailable() or pallas.without_triton()
    if missing is not None or not ptxas().exists():
        pytest.skip(missing or "no ptxas: it comes with triton")
    found, wanted = cost(*compile_entry(entry)), TABLE.rows[entry]
    if versions() == TABLE.versions:
        assert found[:3] == wanted[:3]
    else:  # other compilers allocate a little differently
        assert abs(found.registers - wanted.registers) <= 16
        assert found.spilled <= wanted.spilled + 64 and found.shared == wanted.shared
