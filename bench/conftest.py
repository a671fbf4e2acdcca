"""Options of the benchmarks."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="tiny sizes: a smoke test and no measurement")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    from bench.cases import selected

    if "case" in metafunc.fixturenames:
        chosen = selected(quick=metafunc.config.getoption("--quick"))
        metafunc.parametrize("case", chosen, ids=[case.name for case in chosen], scope="module")
