"""The architecture: who may import whom, who may touch JAX's extension API, and an import without side effects."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pykernels

PACKAGE = Path(pykernels.__file__).parent

# A module imports only modules of a lower rank. Give a new module its place here.
RANKS = {
    "tableau": 0,
    "field": 0,
    "lanes": 0,
    "schedule": 0,
    "stepsize": 0,
    "interpolation": 1,
    "kernels": 0,
    "kernels.stepper": 2,
    "kernels.buffers": 3,
    "kernels.rolled": 4,
    "kernels.body": 5,
    "kernels.identity": 1,
    "kernels.native": 1,
    "kernels.disk": 0,
    "kernels.elf": 0,
    "kernels.launch": 0,
    "kernels.report": 1,
    "kernels.passes": 1,
    "kernels.ir": 5,
    "kernels.llvm": 6,
    "kernels.cpu": 7,
    "kernels.cuda": 7,
    "kernels.pallas": 7,
    "kernels.columns": 8,
    "kernels.triton_kernels": 0,
    "kernels.triton": 8,
    "kernels.xla": 7,
    "reference": 7,
    "array_plan": 8,
    "primitives": 9,
    "adjoint": 10,
    "order": 10,
    "solve": 11,
    "stream": 12,
    "compat": 12,
    "": 13,
}
INTERPRETERS = {"primitives"}
EXTENSION_CORE = {"field", "lanes", "reference", "primitives", "kernels.llvm", "kernels.identity"}
PALLAS = {"kernels.pallas"}


def modules() -> dict[str, Path]:
    """Names below pykernels, '' for the package itself."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def rank(module: str) -> int:
    """The rank of a module; packages without a rank of their own modules (`stream`, `compat`) have one for all."""
    name = module
    while name not in RANKS and "." in name:
        name = name.rpartition(".")[0]
    assert name in RANKS, f"pykernels.{module} has no rank: add it to RANKS"
    return RANKS[name]


def imported(source: str, module: str, *, is_package: bool) -> set[str]:
    """Absolute names of everything a module's source imports, wherever in it: `a.b` for both `import a.b` and
    `from a import b`."""
    names = set()
    package = f"pykernels.{module}".rstrip(".").split(".")
    package = package if is_package else package[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            start = ".".join(filter(None, (base, node.module)))
            names |= {f"{start}.{alias.name}" for alias in node.names}
    return names


def attributes(source: str) -> set[str]:
    """Dotted names used in a module's source, e.g. `jax.interpreters.mlir`."""
    return {
        ast.unparse(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.Attribute, ast.Name))
    }


def own(name: str) -> str | None:
    """The module of ours that an imported name comes from, None for other packages."""
    if name != "pykernels" and not name.startswith("pykernels."):
        return None
    name = name.removeprefix("pykernels").lstrip(".")
    while name not in MODULES:
        name = name.rpartition(".")[0]
    return name


def dependencies(module: str) -> set[str]:
    path = MODULES[module]
    names = imported(path.read_text(), module, is_package=path.name == "__init__.py")
    return {target for target in map(own, names) if target is not None}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    for target in dependencies(module):
        family = module.partition(".")[0]
        if family in ("stream", "compat") and target.partition(".")[0] == family:
            continue  # within one package only cycles are forbidden
        assert rank(target) < rank(module), f"pykernels.{module} imports pykernels.{target}"


def test_no_cycles():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"cycle: {' -> '.join((*path, module))}"
        if module not in done:
            for target in dependencies(module):
                visit(target, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize("module", MODULES)
def test_private_and_extension_api(module):
    source = MODULES[module].read_text()
    names = imported(source, module, is_package=MODULES[module].name == "__init__.py")
    used = names | attributes(source)

    def touches(prefix: str) -> bool:
        return any(name == prefix or name.startswith(f"{prefix}.") for name in used)

    assert not touches("jaxlib")
    # Pallas gives its Triton IR to nobody but XLA otherwise.
    private = "_src" in {part for name in used for part in name.split(".")}
    assert not private or module in PALLAS
    assert not touches("jax.interpreters") or module in INTERPRETERS
    assert not touches("jax.extend") or module in EXTENSION_CORE
    assert not touches("jax.experimental.pallas") or module in PALLAS
    # Platforms are chosen in lowering rules.
    assert not any(name.rpartition(".")[2] in ("default_backend", "get_backend") for name in used)
    # Settings belong to the user.
    assert not any(name.endswith(("config.update", "logging.basicConfig")) for name in used)


def test_the_walk_sees_what_it_looks_for():
    source = (
        "import jax\nfrom jax._src import core\nfrom . import solve\nfrom .. import x\n"
        "def f():\n    import jax.interpreters.mlir\n    return jax.default_backend()\n"
    )
    names = imported(source, "kernels.body", is_package=False)
    assert names == {
        "jax",
        "jax._src.core",
        "pykernels.kernels.solve",
        "pykernels.x",
        "jax.interpreters.mlir",
    }
    assert "jax.default_backend" in attributes(source)
    assert own("pykernels.kernels.body.Solve") == "kernels.body" and own("jax.numpy") is None
    assert dependencies("interpolation") == {"tableau"} and "kernels.body" in dependencies("adjoint")
    assert imported("from . import body", "kernels", is_package=True) == {"pykernels.kernels.body"}


IMPORT = """
import logging, os, sys, warnings
import jax, jax.numpy
root = logging.getLogger()
before = (root.level, list(root.handlers), list(logging.getLogger("jax").handlers), logging.getLogger("jax").level)
names, environment, filters = set(logging.root.manager.loggerDict), dict(os.environ), list(warnings.filters)
settings = {name: getattr(jax.config, name) for name in dir(jax.config) if name.startswith("jax_")}
import pykernels
after = (root.level, list(root.handlers), list(logging.getLogger("jax").handlers), logging.getLogger("jax").level)
assert before == after
ours = logging.root.manager.loggerDict.get("pykernels")
assert ours is None or not (ours.handlers or ours.level), "logging is configured"
assert environment == dict(os.environ) and filters == list(warnings.filters)
assert settings == {name: getattr(jax.config, name) for name in settings}
assert not jax.config.jax_enable_x64
heavy = {"scipy", "diffrax", "equinox", "llvmlite", "triton", "jax_triton", "jaxtyping", "matplotlib"}
heavy |= {"optax", "h5py", "pyarrow", "tqdm"}
loaded = heavy & {name.partition(".")[0] for name in sys.modules}
assert not loaded, loaded
assert "jax.experimental.pallas" not in sys.modules
# No platform of this name exists, so whoever touches a device raises: the import did not, this does.
try:
    jax.devices()
except RuntimeError as error:
    assert "no_such_platform" in str(error)
else:
    raise AssertionError("the platform should not exist")
print("imported")
"""


def test_the_import_has_no_side_effects():
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    environment |= {"JAX_PLATFORMS": "no_such_platform", "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "imported\n" and done.stderr == ""


def test_every_public_name_exists_and_has_a_docstring():
    for name in pykernels.__all__:
        value = getattr(pykernels, name)
        assert value.__doc__, f"pykernels.{name} has no docstring"
    assert sorted(pykernels.__all__) == sorted(set(pykernels.__all__))
