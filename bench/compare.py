"""Two reports against each other: what moved beyond noise."""

from __future__ import annotations

import math

from bench.results import Report, Row
from bench.timing import in_bytes, in_seconds

# Moved: all samples of one run on one side of all samples of the other, and medians further apart than this; machines differ
# from hour to hour by as much.
LEAST = 1.1
# Memory is XLA's own account, which repeats exactly.
LEAST_MEMORY = 1.01


def moved(old: Report, new: Report) -> list[str]:
    """A line for each row that is faster, slower, larger, smaller, gone or new."""
    before, after = (
        {(row.section, row.case, row.x, row.rival): row for row in report.rows if not math.isnan(row.seconds)}
        for report in (old, new)
    )
    lines = []
    for key in [*before, *(key for key in after if key not in before)]:
        name = f"{key[0]}: {key[1]}, {key[2]:g}, {key[3]}"
        if key not in after:
            lines.append(f"gone: {name}")
        elif key not in before:
            lines.append(f"new: {name}")
        else:
            lines += [f"{what}: {name}" for what in _changes(before[key], after[key])]
    return lines


def _changes(old: Row, new: Row) -> list[str]:
    said = []
    ratio = new.seconds / old.seconds
    apart = min(new.samples) > max(old.samples) or max(new.samples) < min(old.samples)
    if apart and max(ratio, 1 / ratio) > LEAST:
        what = f"slower, {ratio:.2f} times" if ratio > 1 else f"faster, {1 / ratio:.2f} times"
        said.append(f"{what}, {in_seconds(old.seconds)} to {in_seconds(new.seconds)}")
    if old.temporary_bytes and new.temporary_bytes:
        ratio = new.temporary_bytes / old.temporary_bytes
        if max(ratio, 1 / ratio) > LEAST_MEMORY:
            what = "larger" if ratio > 1 else "smaller"
            said.append(f"{what}, {in_bytes(old.temporary_bytes)} to {in_bytes(new.temporary_bytes)}")
    return said
