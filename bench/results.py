"""What a report keeps, and its file."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass
class Row:
    """A right answer and what it took. Seconds are per run; `spread` is half the range of the middle half of the samples,
    relative to the median. A rival that broke has NaN for its median, and `note` says how."""

    section: str
    case: str
    x: float
    rival: str
    kind: str
    seconds: float
    spread: float = 0.0
    samples: list[float] = field(default_factory=list)
    error: float | None = None
    gradient_error: float | None = None
    compile_seconds: float | None = None
    temporary_bytes: int | None = None  # XLA's own account
    peak_bytes: int | None = (
        None  # the process's growth during a run; what allocators keep in stock does not show
    )
    evaluations: int | None = None
    note: str = ""

    @property
    def memory(self) -> int | None:
        return self.peak_bytes if self.temporary_bytes is None else self.temporary_bytes


@dataclass
class Report:
    """All that is kept of a run."""

    setting: dict[str, str]
    rows: list[Row] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    laws: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    quick: bool = False

    def leave_out(self, what: str) -> None:
        """Once, with a line."""
        if what not in self.left_out:
            self.left_out.append(what)
            print(f"left out: {what}", flush=True)


def read(path: Path) -> Report:
    """A report from its JSON file."""
    said = json.loads(path.read_text())
    rows = [
        Row(**(row | {"seconds": float("nan")} if row["seconds"] is None else row))
        for row in said.pop("rows")
    ]
    return Report(**said, rows=rows)


def write(report: Report, path: Path) -> None:
    """JSON, in which NaN is null."""
    said = dataclasses.asdict(report)
    for row in said["rows"]:
        row["seconds"] = None if math.isnan(row["seconds"]) else row["seconds"]
    path.write_text(json.dumps(said, indent=1, allow_nan=False) + "\n")


def spread(samples: Sequence[float]) -> float:
    """Half the range of the middle half, relative to the median."""
    if len(samples) < 2:
        return 0.0
    low, middle, high = np.quantile(samples, (0.25, 0.5, 0.75))
    return float((high - low) / 2 / middle)
