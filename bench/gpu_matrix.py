"""Compiles the whole matrix of GPU kernels, without a GPU, and writes what each takes into `tests/gpu_kernels.csv`.

    python bench/gpu_matrix.py [--jobs N] [--anew] [--runner native|pallas] [--field NAME ...] [--kind NAME ...]

An hour or two on two cores; may be stopped and started again: entries in the table are not compiled again unless the
versions of Triton, llvmlite or JAX have changed, or `--anew`. Needs the `test` extra.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

import jax

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from gpu_matrix import Cost, Entry, Table, compile_entry, cost, matrix, sliced, versions


def measure(entry: Entry) -> tuple[Entry, Cost | str]:
    """An entry's cost, or why there is none."""
    try:
        return entry, cost(*compile_entry(entry))
    except Exception as error:  # the table says which, and the others go on
        return entry, f"{type(error).__name__}: {str(error)[:300]}"


def start_worker() -> None:
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_platforms", "cpu")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--anew", action="store_true", help="compile what is in the table again")
    parser.add_argument("--runner", choices=["native", "pallas"])
    parser.add_argument("--field", nargs="*")
    parser.add_argument("--kind", nargs="*")
    parser.add_argument("--only-slice", action="store_true", help="what the test suite compiles")
    parser.add_argument("--limit", type=float, default=float("inf"), help="stop after so many seconds")
    options = parser.parse_args()
    table = Table.read()
    if table.versions != versions():
        table.rows, table.versions = {}, versions()
    wanted = [
        entry
        for entry in (sliced() if options.only_slice else matrix())
        if options.runner in (None, entry.runner)
        and (options.field is None or entry.field in options.field)
        and (options.kind is None or entry.kind in options.kind)
        and (options.anew or entry not in table.rows)
    ]
    print(f"{len(wanted)} kernels to compile, {len(table.rows)} in the table")
    failed, start = [], time.monotonic()
    context: Any = multiprocessing.get_context("spawn")
    # Workers are replaced now and then: LLVM and Triton keep some memory of every kernel.
    with context.Pool(options.jobs, start_worker, maxtasksperchild=64) as pool:
        for done, (entry, result) in enumerate(pool.imap_unordered(measure, wanted, chunksize=2), 1):
            if isinstance(result, str):
                failed.append((entry, result))
                print(f"{entry}: {result}", flush=True)
            else:
                table.rows[entry] = result
            if done % 32 == 0:
                table.write()
                print(f"{done} of {len(wanted)} in {time.monotonic() - start:.0f} s", flush=True)
            if time.monotonic() - start > options.limit:
                print("stopped at the limit")
                pool.terminate()
                break
    table.write()
    for entry, reason in failed:
        print(f"FAILED {entry}: {reason}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
