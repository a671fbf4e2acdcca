"""The same name for the same kernel in every process: a hash of everything it is made from.

Python's own hashes of jaxprs are by identity. Here a jaxpr is its equations with variables numbered in order; whatever is
not plain data (the functions of a `jax.custom_jvp` rule, say) has no name that means the same elsewhere, and neither has
then the kernel.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Primitive

from pykernels.lanes import CALLS


class _Nameless(Exception):
    pass


def digest(value: Any) -> str | None:
    """A hash of plain data, dataclasses, arrays and jaxprs, nested; None if there is anything else in it."""
    hasher = hashlib.sha256(_versions())
    try:
        _feed(hasher, value)
    except _Nameless:
        return None
    return hasher.hexdigest()


@functools.cache
def _versions() -> bytes:
    """JAX's version and this package's own text: what turns the data into a kernel."""
    text = hashlib.sha256(jax.__version__.encode())
    for path in sorted(Path(__file__).resolve().parents[1].rglob("*.py")):
        text.update(path.read_bytes())
    return text.digest()


def _feed(hasher: Any, value: Any) -> None:
    def put(kind: str, *parts: Any) -> None:
        # Lengths make the encoding unambiguous.
        text = repr((kind, *parts)).encode()
        hasher.update(len(text).to_bytes(8, "little") + text)

    def put_all(kind: str, items: Any) -> None:
        items = list(items)
        put(kind, len(items))
        for item in items:
            _feed(hasher, item)

    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        put(type(value).__name__, value.hex() if isinstance(value, float) else value)
    elif isinstance(value, enum.Enum):
        put("enum", type(value).__name__, value.name)
    elif isinstance(value, (np.ndarray, np.generic, jax.Array)):
        array = np.asarray(value)
        put("array", array.shape, array.dtype.str)
        hasher.update(np.ascontiguousarray(array).tobytes())
    elif isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic)):
        put("dtype", np.dtype(value).str)
    elif isinstance(value, (tuple, list, frozenset)):
        named = type(value).__name__ if isinstance(value, tuple) else "list"
        put_all(named, sorted(value) if isinstance(value, frozenset) else value)
    elif isinstance(value, dict):
        put_all("dict", (pair for key in sorted(value) for pair in (key, value[key])))
    elif isinstance(value, jax.ShapeDtypeStruct):
        put("struct", value.shape, value.dtype.str)
    elif isinstance(value, Primitive):
        put("primitive", value.name)
    elif isinstance(value, ClosedJaxpr) and not isinstance(value, Jaxpr):
        put_all("consts", value.consts)
        _feed(hasher, value.jaxpr)
    elif isinstance(value, Jaxpr):
        _feed_jaxpr(value, put, put_all)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        put_all(type(value).__name__, (getattr(value, f.name) for f in dataclasses.fields(value)))
    else:
        raise _Nameless


def _feed_jaxpr(jaxpr: Jaxpr, put: Any, put_all: Any) -> None:
    numbers: dict[Any, int] = {}

    def aval(atom: Any) -> tuple[Any, ...]:
        kind = atom.aval
        return (
            getattr(kind, "shape", None),
            str(getattr(kind, "dtype", kind)),
            getattr(kind, "weak_type", False),
        )

    def bind(variables: Any) -> None:
        for variable in variables:
            numbers[variable] = len(numbers)
            put("variable", aval(variable))

    def use(atoms: Any) -> None:
        for atom in atoms:
            if isinstance(atom, Literal):
                put("literal", aval(atom))
                put_all("value", [np.asarray(atom.val)])
            else:
                put("use", numbers[atom])

    put_all("consts", getattr(jaxpr, "consts", ()))
    bind(jaxpr.constvars)
    bind(jaxpr.invars)
    for eqn in jaxpr.eqns:
        put("equation", eqn.primitive.name, len(eqn.invars), len(eqn.outvars))
        use(eqn.invars)
        # A call is what it calls: its other settings (shardings, donation) say nothing inside a kernel.
        callee = CALLS.get(eqn.primitive.name)
        put_all("params", [eqn.params if callee is None else eqn.params[callee]])
        bind(eqn.outvars)
    use(jaxpr.outvars)
