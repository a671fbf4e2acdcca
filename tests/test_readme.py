"""What the README and the guide promise: their code runs as it stands, their commands are those of .ci/run."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.integrate import solve_ivp

import pykernels as pk

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = sorted((ROOT / "docs").glob("*.md"))

# One after the other, each page in a namespace of its own; a block stands in its page's lines, for tracebacks.
RUN_PAGES = """
import json, sys, traceback, warnings
warnings.simplefilter("error")
failed = {}
for name, code in json.load(sys.stdin).items():
    try:
        exec(compile(code, name, "exec"), {"__name__": "__main__"})
    except BaseException:
        failed[name] = traceback.format_exc()
for name, text in failed.items():
    print(f"{name}:\\n{text}", file=sys.stderr)
sys.exit(bool(failed))
"""


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def code_in_place(text: str) -> str:
    """A page's Python, with every other line of it empty."""
    code: list[str] = []
    inside = False
    for line in text.splitlines():
        if line.startswith("```"):
            inside = line == "```python"
            line = ""
        code.append(line if inside else "")
    return "\n".join(code)


def test_the_guide_s_blocks_run_in_a_user_s_process(tmp_path: Path) -> None:
    """In default settings (float32), warnings being errors, outside of this repository, all pages in one process."""
    assert len(PAGES) >= 7
    pages = {page.name: code_in_place(page.read_text()) for page in PAGES}
    assert all(len(code.split()) > 10 for code in pages.values())
    result = subprocess.run(
        [sys.executable, "-c", RUN_PAGES], input=json.dumps(pages), capture_output=True, text=True, cwd=tmp_path,
        timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def test_languages_of_blocks_are_known() -> None:
    """A block that is neither run nor read by a test would rot."""
    for page in (ROOT / "README.md", *PAGES):
        marks = re.findall(r"^```(\w*)$", page.read_text(), re.MULTILINE)
        assert not marks[1::2] or set(marks[1::2]) == {""}, page.name
        assert set(marks[::2]) <= {"python", "sh", ""}, page.name


def test_python_blocks_run_in_a_user_s_process(tmp_path: Path) -> None:
    """One after the other, in default settings (float32), outside of this repository."""
    code = blocks("python")
    assert len(code) >= 3
    script = tmp_path / "readme.py"
    script.write_text("\n".join(code) + "\nprint(float(value), *map(float, gradient))\n")
    command = [sys.executable, "-W", "error", str(script)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert result.returncode == 0, result.stderr
    _, second, third, fitted, counts, numbers = result.stdout.splitlines()
    assert second.startswith("(21, 3) ")
    assert third.startswith("[ True  True False] ")
    popt, x, fun = re.fullmatch(r"\[(.*)\] \[(.*)\] (.*)", fitted).groups()
    # 100,000 points with noise of 0.1: standard errors near 0.001. Adam's last steps of 0.01 are ten times as long.
    np.testing.assert_allclose([float(p) for p in popt.split()], [2.5, 0.7], atol=0.005)
    np.testing.assert_allclose([float(p) for p in x.split()], [2.5, 0.7], atol=0.05)
    assert float(fun) == pytest.approx(0.01, rel=0.05)
    assert counts == "Counts(rows=500, masked=0, nonfinite=0, skipped=0)"
    value, *gradient = map(float, numbers.split())
    # The solver's tolerance is 1e-5 per step in float32; central differences of a 1e-10 solution are better than that.
    p, h = np.array([10.0, 20.0, 8 / 3]), 1e-4
    assert value == pytest.approx(lorenz_mean_square(p), rel=1e-3)
    differences = [
        (lorenz_mean_square(p + h * e) - lorenz_mean_square(p - h * e)) / (2 * h) for e in np.eye(3)
    ]
    assert gradient == pytest.approx(differences, rel=1e-3)


def lorenz_mean_square(p: np.ndarray) -> float:
    """The quick start's loss by SciPy, all trajectories as one system."""

    def field(t: float, flat: np.ndarray) -> np.ndarray:
        x, y, z = flat.reshape(3, -1)
        return np.concatenate([p[0] * (y - x), x * (p[1] - z) - y, x * y - p[2] * z])

    y0 = np.tile(np.linspace(0.5, 1.5, 1000), 3)
    final = solve_ivp(field, (0.0, 1.0), y0, "DOP853", rtol=1e-10, atol=1e-10).y[:, -1]
    return float(np.mean(final**2))


def test_commands_name_files_that_exist_and_ci_runs_them() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    texts = [README, *(page.read_text() for page in PAGES)]
    lines = [line for text in texts for block in blocks("sh", text) for line in block.splitlines()]
    assert len(lines) >= 6
    for line in lines:
        words = shlex.split(line)
        for word in words[1:]:
            if word.endswith(".py"):
                assert (ROOT / word).is_file(), line
    test_command = next(line for line in lines if "pytest" in line)
    assert test_command.removeprefix(".venv/bin/") in script
    # The set-up is the README's own: .ci/new_user.py reads it.
    assert "new_user.py" in script


def test_every_exported_method_is_listed() -> None:
    methods = [name for name in pk.__all__ if isinstance(getattr(pk, name), pk.ButcherTableau)]
    assert len(methods) >= 10
    for name in methods:
        assert f"`{name}`" in README, name


def test_links_to_files_resolve() -> None:
    for name in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (ROOT / name).is_file(), name
    for text in (README, *(page.read_text() for page in PAGES)):
        for name in re.findall(r"`((?:[a-z_.]+/)?[A-Za-z_]+\.(?:py|md|csv|toml))`", text):
            places = (ROOT / name, ROOT / "pykernels" / name)
            assert any(place.is_file() for place in places), name
