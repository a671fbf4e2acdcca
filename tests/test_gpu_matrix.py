"""The table of GPU kernels is complete, and a slice of it, compiled again, takes what the table says."""

from __future__ import annotations

import itertools

import pytest
from gpu_matrix import (
    KINDS,
    METHODS,
    PROBLEMS,
    RUNNERS,
    Entry,
    Table,
    compile_entry,
    cost,
    matrix,
    ptxas,
    versions,
)

from pykernels.kernels import cuda, pallas

TABLE = Table.read()


def sliced() -> list[Entry]:
    """Entries that have between them every value of every axis, by both runners, steered clear of the slowest."""
    steps = [
        (m, s) for m in METHODS for s in ("fixed", "adaptive") if s == "fixed" or METHODS[m].error is not None
    ]
    fields = itertools.cycle(PROBLEMS)
    kinds = itertools.cycle(KINDS)
    entries = []
    for i, (method, step) in enumerate(steps):
        field, kind = next(fields), next(kinds)
        for runner, dtype in zip(
            RUNNERS, ("float32", "float64") if i % 2 else ("float64", "float32"), strict=True
        ):
            entries.append(Entry(runner, field, method, step, dtype, kind, (80, 90)[i // 2 % 2]))
    # Every field backward once, where it takes little.
    entries += [
        Entry(("native", "pallas")[i % 2], field, "bosh3", "adaptive", "float32", "backward", 90)
        for i, field in enumerate(PROBLEMS)
    ]
    return entries


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
