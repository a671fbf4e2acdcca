"""The step kernels in Triton, one per kind of pass. `triton.py` imports this file where a program is lowered for a GPU.

A kernel's pointers are its pass's operands, then its results, in the order in which the pass lists them; parameters that are
not needed are None. Everything else is known when it is compiled. A program has BLOCK columns of one row, and programs are
numbered along the rows. A program reads its columns before it writes them, so results may be in their operands' places.

Weights are Python's numbers; Triton makes them constants of the arrays' type.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _place(COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """The program's row, its columns, which of them there are, and where they are in a state."""
    blocks: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    row = program // blocks
    columns = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    return row, columns < COLUMNS, row.to(tl.int64) * COLUMNS + columns


@triton.jit
def _in_slot(slot, at, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Where the columns are in the slot of a milestone buffer."""
    return slot.to(tl.int64) * (ROWS * COLUMNS) + at


@triton.jit
def combine(
    p0, p1, p2, p3, p4, p5, p6, p7, p8, p9, p10, p11, p12, p13, p14, p15, p16, p17, p18, p19,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    PLAIN: tl.constexpr, SCALED: tl.constexpr, COUNT: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """`passes.Combine`; the matrices row by row."""
    p = (p0, p1, p2, p3, p4, p5, p6, p7, p8, p9, p10, p11, p12, p13, p14, p15, p16, p17, p18, p19)
    row, inside, at = _place(COLUMNS, BLOCK)
    h = tl.load(p[COUNT] + row)
    x = ()
    for j in tl.static_range(COUNT):
        x = x + (tl.load(p[j] + at, mask=inside),)  # noqa: RUF005  # Triton knows no stars here
    for i in tl.static_range(OUTPUTS):
        total = tl.zeros_like(x[0])
        for j in tl.static_range(COUNT):
            if SCALED[i * COUNT + j] != 0:
                total += SCALED[i * COUNT + j] * x[j]
        total = h * total
        for j in tl.static_range(COUNT):
            if PLAIN[i * COUNT + j] != 0:
                total = PLAIN[i * COUNT + j] * x[j] + total
        tl.store(p[COUNT + 1 + i] + at, total, mask=inside)


@triton.jit
def finish(
    p0, p1, p2, p3, p4, p5, p6, p7, p8, p9, p10, p11, p12, p13, p14, p15, p16, p17, p18, p19,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    WEIGHTS: tl.constexpr, ERRORS: tl.constexpr, COUNT: tl.constexpr, RTOL: tl.constexpr, ATOL: tl.constexpr,
    GIVEN: tl.constexpr, PARTIAL: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """`passes.Finish`, but for the sum over a row's programs: each stores its part. SLOTS is 0 without milestones."""
    p = (p0, p1, p2, p3, p4, p5, p6, p7, p8, p9, p10, p11, p12, p13, p14, p15, p16, p17, p18, p19)
    H: tl.constexpr = COUNT + 1
    ERROR: tl.constexpr = H + (1 if GIVEN else 0) + 1
    BUFFER: tl.constexpr = ERROR + (1 if PARTIAL else 0)
    RESULTS: tl.constexpr = BUFFER + (2 if SLOTS else 0)
    TOTAL: tl.constexpr = RESULTS + (0 if GIVEN else 1)
    row, inside, at = _place(COLUMNS, BLOCK)
    y = tl.load(p[0] + at, mask=inside, other=1)
    h = tl.load(p[H] + row)
    slope = tl.zeros_like(y)
    error = tl.zeros_like(y)
    for j in tl.static_range(COUNT):
        k = tl.load(p[1 + j] + at, mask=inside, other=0)
        error += ERRORS[j] * k
        if not GIVEN:
            slope += WEIGHTS[j] * k
    error = h * error
    if PARTIAL:
        error += tl.load(p[ERROR] + at, mask=inside, other=0)
    if GIVEN:
        new = tl.load(p[H + 1] + at, mask=inside, other=1)
    else:
        new = y + h * slope
        tl.store(p[RESULTS] + at, new, mask=inside)
    # No maximum of Triton's: it would prefer a number to NaN.
    largest = tl.where(tl.abs(new) > tl.abs(y), tl.abs(new), tl.abs(y))
    ratio = error / (ATOL + RTOL * largest)
    square = tl.where(tl.abs(new) < float("inf"), ratio * ratio, float("nan"))
    tl.store(p[TOTAL] + tl.program_id(0), tl.sum(tl.where(inside, square, 0.0), axis=0))
    if SLOTS:
        slot = tl.load(p[BUFFER + 1] + row)
        due = (slot >= 0) & (slot < SLOTS)
        tl.store(p[TOTAL + 1] + _in_slot(slot, at, ROWS, COLUMNS), y, mask=inside & due)


@triton.jit
def accept(
    p0, p1, p2, p3, p4, p5, p6, p7, p8, p9, p10, p11, p12, p13, p14, p15, p16, p17, p18, p19,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """`passes.Accept`."""
    p = (p0, p1, p2, p3, p4, p5, p6, p7, p8, p9, p10, p11, p12, p13, p14, p15, p16, p17, p18, p19)
    row, inside, at = _place(COLUMNS, BLOCK)
    inside = inside & (tl.load(p[2 * COUNT] + row) != 0)
    for i in tl.static_range(COUNT):
        new = tl.load(p[COUNT + i] + at, mask=inside)
        tl.store(p[2 * COUNT + 1 + i] + at, new, mask=inside)


@triton.jit
def save(
    p0, p1, p2, p3,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """`passes.Save`: the buffer, the slots, the value, the buffer again."""
    row, inside, at = _place(COLUMNS, BLOCK)
    slot = tl.load(p1 + row)
    inside = inside & (slot >= 0) & (slot < SLOTS)
    value = tl.load(p2 + at, mask=inside)
    tl.store(p3 + _in_slot(slot, at, ROWS, COLUMNS), value, mask=inside)


@triton.jit
def restore(
    p0, p1, p2,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """`passes.Restore`: the buffer, the slots, the value."""
    row, inside, at = _place(COLUMNS, BLOCK)
    slot = tl.load(p1 + row)
    there = inside & (slot >= 0) & (slot < SLOTS)
    value = tl.load(p0 + _in_slot(slot, at, ROWS, COLUMNS), mask=there, other=0)
    tl.store(p2 + at, value, mask=inside)
