"""Clocks, memory and units: what every benchmark here measures with."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# Short runs are repeated within one sample until it takes this long, long ones are not repeated beyond the first.
SAMPLE_SECONDS = 0.02
LONG_SECONDS = 10.0
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of one run, and its result."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def sample(run: Callable[[], Any], seconds: float, target: float = SAMPLE_SECONDS) -> float:
    """Seconds per run, over enough runs of about `seconds` for the clock."""
    runs = max(1, round(target / seconds))
    start = time.perf_counter()
    for _ in range(runs):
        run()
    return (time.perf_counter() - start) / runs


def interleaved(
    runs: Sequence[Callable[[], Any]],
    firsts: Sequence[float],
    repeats: int,
    budget: float = float("inf"),
    target: float = SAMPLE_SECONDS,
) -> list[list[float]]:
    """Samples of each, in turns, since a machine's speed changes. `firsts` are the seconds of an earlier run of each,
    which is the only sample of those that take long; who has used `budget` seconds is given no further turn."""
    samples: list[list[float]] = [[] for _ in runs]
    spent = [0.0] * len(runs)
    for turn in range(repeats):
        for i, (run, seconds, mine) in enumerate(zip(runs, firsts, samples, strict=True)):
            if seconds > LONG_SECONDS:
                mine[:] = [seconds]
            elif turn == 0 or spent[i] + seconds < budget:
                start = time.perf_counter()
                mine.append(sample(run, seconds, target))
                spent[i] += time.perf_counter() - start
    return samples


def peak_bytes(run: Callable[[], Any]) -> int | None:
    """How much more memory the process held at the highest point of a run than before; None where Linux does not tell."""
    try:
        _return_freed_memory()
        CLEAR.write_text("5")  # the high-water mark starts anew
        before = _kilobytes("VmRSS")
        run()
        return max(_kilobytes("VmHWM") - before, 0) * 1024
    except OSError:
        return None


def _return_freed_memory() -> None:
    """What earlier programs have freed would be used again unseen."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _kilobytes(key: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1])
    raise OSError(f"no {key} in {STATUS}")


def setting(packages: Sequence[str]) -> dict[str, str]:
    """Where and with what a run is made: machine, load, versions, commit."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    said = {
        "cpu": cpu_name(),
        "cores": str(os.cpu_count()),
        "load": f"{load:.1f}",
        "commit": commit(),
        "python": platform.python_version(),
    }
    for name in packages:
        try:
            said[name] = version(name)
        except PackageNotFoundError:
            said[name] = "not installed"
    return said


def commit() -> str:
    """The checkout's commit, with a plus sign if files have changed since."""
    root = Path(__file__).resolve().parents[1]

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except OSError:
        return ""


def cpu_name() -> str:
    """The processor's own name for itself."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def in_seconds(seconds: float) -> str:
    """A time in a unit that suits it."""
    return _in_units(seconds, (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)))


def in_bytes(count: float) -> str:
    """A size in a unit that suits it."""
    return _in_units(count, (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0)))


def _in_units(value: float, units: tuple[tuple[str, float], ...]) -> str:
    """In the first unit of which it is at least one, else in the last."""
    unit, scale = next((u for u in units if value >= u[1]), units[-1])
    return f"{value / scale:.3g} {unit}"
