"""The report and its comparison.

    python -m bench report                       all of it, in under ten minutes on two idle cores
    python -m bench report --only "work and"     entries whose name contains this
    python -m bench report --quick               a smoke test at tiny sizes, no figures worth keeping
    python -m bench tables report.json           Markdown and figures again, from the numbers of a report
    python -m bench compare OLD.json NEW.json    what moved beyond noise

The exit status of a report is 1 if an answer of pykernels was wrong.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import jax


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="measure")
    report.add_argument("--only", default="", help="entries whose name contains this")
    report.add_argument("--quick", action="store_true", help="tiny sizes, few samples")
    report.add_argument(
        "--output", type=Path, default=Path("bench/results"), help="folder (default bench/results)"
    )
    report.add_argument("--budget", type=float, help="seconds; what is left then is left out, with a line")
    tables = commands.add_parser("tables", help="write the tables and figures of a report again")
    tables.add_argument("report", type=Path)
    tables.add_argument("--output", type=Path, help="folder (default: the report's)")
    compare = commands.add_parser("compare", help="print what moved beyond noise")
    compare.add_argument("old", type=Path)
    compare.add_argument("new", type=Path)
    options = parser.parse_args()

    from bench import results

    if options.command == "compare":
        from bench.compare import moved

        for line in moved(results.read(options.old), results.read(options.new)):
            print(line)
        return 0
    # Before JAX starts: as many devices as cores, which share one pool of threads.
    jax.config.update("jax_num_cpu_devices", max(os.cpu_count() or 1, 2))
    from bench.report import BUDGET, publish, run

    if options.command == "tables":
        publish(results.read(options.report), options.output or options.report.parent)
        return 0
    made = run(options.output, options.only, options.quick, options.budget or BUDGET)
    if not made.rows:
        parser.error(f"nothing was measured that {options.only!r} names")
    return 1 if any(", pykernels" in line for line in made.wrong) else 0


if __name__ == "__main__":
    sys.exit(main())
