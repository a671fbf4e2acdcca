"""Compiled programs, kept for the next call with the same functions, shapes and options."""

from __future__ import annotations

import functools
import itertools
import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

PROGRAMS = 64


class _Cache:
    """Compiled programs by the functions they contain, with what these close over, and by options: the most recent ones.

    Functions are told apart as objects, so two closures from one factory are two models. As with `jax.jit` a function
    must be pure; but a closure variable or an attribute of a method's object that was bound anew is seen, and gives a new
    program.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._entries: OrderedDict[Hashable, tuple[tuple[Any, ...], Any]] = OrderedDict()
        self._lock = threading.RLock()  # one program is built of others

    def get(self, functions: Sequence[Any], static: Hashable, build: Callable[[], Any]) -> Any:
        """The program for these functions and options, built if there is none."""
        key = (*functions, static)
        captured = tuple(itertools.chain.from_iterable(map(_captured, functions)))
        try:
            hash(key)
        except TypeError:  # a callable that can not be a key
            return build()
        with self._lock:
            found = self._entries.get(key)
            if found is None or len(found[0]) != len(captured) or not all(map(_is, found[0], captured)):
                found = self._entries[key] = captured, build()
            self._entries.move_to_end(key)
            while len(self._entries) > self._size:
                self._entries.popitem(last=False)
            return found[1]


def _is(a: Any, b: Any) -> bool:
    return a is b


def _captured(function: Any) -> tuple[Any, ...]:
    """What a function depends on beside its code, as far as one can see."""
    if isinstance(function, functools.partial):
        return (*_captured(function.func), *function.args, *function.keywords.values())
    if isinstance(function, types.MethodType):
        return (*_captured(function.__func__), *getattr(function.__self__, "__dict__", {}).values())
    cells = getattr(function, "__closure__", None) or ()
    defaults = (*(getattr(function, "__defaults__", None) or ()),)
    return (*(cell.cell_contents for cell in cells if _is_filled(cell)), *defaults)


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018  (reading an empty cell raises)
    except ValueError:
        return False
    return True


programs = _Cache(PROGRAMS)


class _Same:
    """A key that is equal to that of the same object only."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def settings_of(value: Any, seen: dict[int, int] | None = None) -> Any:
    """What makes an optimizer this one: the functions it consists of and the numbers they close over. Optimizers are made
    anew for every fit; two with equal settings shall share a compiled program.
    """
    seen = {} if seen is None else seen
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return type(value).__name__, repr(value)
    if not isinstance(value, (tuple, list, dict, types.FunctionType)):
        return _Same(value)
    if id(value) in seen:  # functions share what they close over, and may close over themselves
        return "seen", seen[id(value)]
    seen[id(value)] = len(seen)
    if isinstance(value, dict):
        return "dict", tuple((settings_of(k, seen), settings_of(v, seen)) for k, v in value.items())
    if isinstance(value, (tuple, list)):
        return type(value), tuple(settings_of(v, seen) for v in value)
    cells = (c.cell_contents if _is_filled(c) else _Same(c) for c in value.__closure__ or ())
    return (
        _Same(value.__code__),
        _Same(value.__globals__),
        tuple(settings_of(cell, seen) for cell in cells),
        settings_of(value.__defaults__, seen),
        settings_of(value.__kwdefaults__, seen),
    )
