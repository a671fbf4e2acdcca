"""A new user, who has a Python and follows the README and the guide: from nothing to the gradient of an ensemble.

    python .ci/new_user.py PYTHON VENV [--requirement REQUIREMENT]

Runs the README's commands for setting up, with this Python and this folder for the environment, which is made anew (with
REQUIREMENT in the place of what the README installs), then the README's quick start and the guide's first page, each in a
process of its own outside of the repository, with an empty cache. Fails if something does. Prints how long it took, which
should be under five minutes; most of it is the package index's and the machine's doing, so it is no reason to fail.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
AIM = 300
BLOCK = r"^```{}\n(.*?)^```$"


def blocks(language: str, page: str) -> list[str]:
    """The blocks of a language in a page."""
    text = (ROOT / page).read_text()
    return re.findall(BLOCK.format(language), text, re.MULTILINE | re.DOTALL)


def main() -> None:
    """Be the user."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("python", help="the user's Python")
    parser.add_argument("venv", type=Path, help="the environment's folder")
    parser.add_argument("--requirement", help="what to install (default: what the README says)")
    options = parser.parse_args()
    start = time.monotonic()
    venv = options.venv.resolve()
    if venv.exists():
        shutil.rmtree(venv)
    for line in blocks("sh", "README.md")[0].splitlines():
        words = [options.python if word == "python3" else word for word in shlex.split(line)]
        words = [
            str(venv) + word.removeprefix(".venv") if word.startswith(".venv") else word for word in words
        ]
        if options.requirement and "install" in words:
            words = [*words[: words.index("install") + 1], options.requirement]
        run(words, ROOT)
    print(f"set up after {time.monotonic() - start:.0f} s", flush=True)
    quick_start = blocks("python", "README.md")[0] + "\nassert all(jnp.isfinite(g) for g in gradient)\n"
    first_page = "\n".join(blocks("python", "docs/getting_started.md"))
    assert "value_and_grad" in quick_start and "solve_ensemble" in quick_start
    with tempfile.TemporaryDirectory() as folder:
        for code in (quick_start, first_page):
            run([str(venv / "bin" / "python"), "-W", "error", "-c", code], Path(folder))
    print(f"a gradient of an ensemble after {time.monotonic() - start:.0f} s (aim: {AIM:g})", flush=True)


def run(words: list[str], folder: Path) -> None:
    """A user's command: nothing of this shell's Python, nothing cached by pykernels."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "JAX", "XLA"))}
    kept |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    if folder != ROOT:
        kept["XDG_CACHE_HOME"] = str(folder)
    quiet = ["--quiet"] if "install" in words else []
    subprocess.run([*words, *quiet], cwd=folder, env=kept, check=True)


if __name__ == "__main__":
    main()
