"""The user's field as data: one jaxpr for one trajectory, with everything it closes over hoisted to operands."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

PyTree = Any


@dataclass(frozen=True, eq=False)
class Field:
    """A field traced for one trajectory: a jaxpr whose only constants are integers and masks, and the shapes around it.

    Inputs of `jaxpr`: t, the leaves of y, then the operands (leaves of args, then hoisted closed-over arrays); outputs: the
    time derivatives of the leaves of y. Compared and hashed by identity, as JAX does with jaxprs: the tracing cache below is
    what makes equal calls share compiled programs.
    """

    jaxpr: jex.ClosedJaxpr
    y_shapes: tuple[tuple[int, ...], ...]
    operands: tuple[jax.ShapeDtypeStruct, ...]
    dtype: np.dtype

    @property
    def elements(self) -> int:
        """Number of state elements of one trajectory."""
        return sum(int(np.prod(shape)) for shape in self.y_shapes)

    @property
    def function(self) -> Callable[..., list[jax.Array]]:
        """The field as the user wrote it: of the jaxpr's inputs, for one trajectory, with its own derivative rules."""
        return jex.jaxpr_as_fun(self.jaxpr)


def _setting(name: str) -> Hashable:
    return getattr(jax.config, name)


class _Signature:
    """What tracing depends on besides the function: shapes, dtypes and structure of y and args."""

    def __init__(self, y: PyTree, args: PyTree) -> None:
        y_leaves, y_tree = jax.tree.flatten(y)
        arg_leaves, args_tree = jax.tree.flatten(args)
        self.y_leaves, self.y_tree, self.arg_leaves, self.args_tree = y_leaves, y_tree, arg_leaves, args_tree
        self.key = (
            self.y_tree,
            self.args_tree,
            tuple((leaf.shape, leaf.dtype) for leaf in (*self.y_leaves, *self.arg_leaves)),
            # These change what a trace contains.
            _setting("jax_enable_x64"),
            _setting("jax_numpy_dtype_promotion"),
        )


def trace_field(field: Callable[..., PyTree], y: PyTree, args: PyTree) -> tuple[Field, list[jax.Array]]:
    """Trace `field(t, y, args)` for one trajectory and hoist what it closes over.

    `y`, `args`: pytrees of arrays or ShapeDtypeStructs of a single trajectory; the leaves of y share one floating dtype.
    Returns the field and the values of its hoisted operands, the last of `field.operands`. The trace is cached on the
    function object, its closure's contents and the signature, unless it closes over traced values. As with `jax.jit`, the
    function must be pure and global arrays are read when it is first traced.

    Raises TypeError if the derivative's structure, shapes or dtypes are not those of the state.
    """
    signature = _Signature(y, args)
    cache = _cache_of(field)
    captured = _captured(field)
    if cache is not None:
        found = cache.get(signature.key)
        if found is not None and len(found[0]) == len(captured) and all(map(_same, found[0], captured)):
            return found[1], found[2]
    traced, consts = _trace(field, signature)
    if cache is not None and not any(isinstance(leaf, jax.core.Tracer) for leaf in (*consts, *captured)):
        cache[signature.key] = (captured, traced, consts)
    return traced, consts


_caches: weakref.WeakKeyDictionary[Any, dict[Hashable, Any]] = weakref.WeakKeyDictionary()
_methods: weakref.WeakKeyDictionary[Any, dict[Hashable, dict[Hashable, Any]]] = weakref.WeakKeyDictionary()


def _cache_of(field: Callable[..., PyTree]) -> dict[Hashable, Any] | None:
    """The function's own cache, or None for callables that can not be keys. A bound method lives as long as its object."""
    try:
        if isinstance(field, types.MethodType):
            return _methods.setdefault(field.__self__, {}).setdefault(field.__func__, {})
        return _caches.setdefault(field, {})
    except TypeError:  # not hashable, or not weakly referable
        return None


def _captured(field: Callable[..., PyTree]) -> tuple[Any, ...]:
    """What the function closes over: a rebound closure variable must not find the old trace."""
    if isinstance(field, functools.partial):
        return (*_captured(field.func), *field.args, *field.keywords.values())
    cells = getattr(getattr(field, "__func__", field), "__closure__", None) or ()
    return tuple(cell.cell_contents for cell in cells if _is_filled(cell))


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018  (reading an empty cell raises)
    except ValueError:
        return False
    return True


def _same(a: Any, b: Any) -> bool:
    return a is b


def _trace(function: Callable[..., PyTree], signature: _Signature) -> tuple[Field, list[jax.Array]]:
    dtype = np.dtype(signature.y_leaves[0].dtype)

    def flat(t: jax.Array, *leaves: jax.Array) -> list[jax.Array]:
        n = len(signature.y_leaves)
        y = jax.tree.unflatten(signature.y_tree, leaves[:n])
        args = jax.tree.unflatten(signature.args_tree, leaves[n:])
        return _checked_derivative(function(t, y, args), signature)

    avals = [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in (*signature.y_leaves, *signature.arg_leaves)
    ]
    closed = jax.make_jaxpr(flat)(jax.ShapeDtypeStruct((), dtype), *avals)
    jaxpr = closed.jaxpr
    pairs = list(zip(jaxpr.constvars, closed.consts, strict=True))
    kept = [(v, c) for v, c in pairs if _is_index(c)]
    moved = [(v, c) for v, c in pairs if not _is_index(c)]
    invars = [*jaxpr.invars, *(v for v, _ in moved)]
    open_jaxpr = jex.Jaxpr(
        [v for v, _ in kept], invars, jaxpr.outvars, jaxpr.eqns, jaxpr.effects, jaxpr.debug_info
    )
    operands = [_struct(v.aval) for v in invars[1 + len(signature.y_leaves) :]]
    shapes = tuple(tuple(leaf.shape) for leaf in signature.y_leaves)
    hoisted = jex.ClosedJaxpr(open_jaxpr, [np.asarray(c) for _, c in kept])
    return Field(hoisted, shapes, tuple(operands), dtype), [jnp.asarray(c) for _, c in moved]


def _is_index(const: Any) -> bool:
    """Known integers and masks stay constants: with known indices, indexing is free."""
    return not isinstance(const, jax.core.Tracer) and not jnp.issubdtype(const.dtype, jnp.inexact)


def _struct(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def _checked_derivative(derivative: PyTree, signature: _Signature) -> list[jax.Array]:
    leaves = jax.tree.leaves(derivative)
    tree: Any = jax.tree.structure(derivative)
    if tree != signature.y_tree:
        raise TypeError(
            f"the field must return a pytree of the state's structure: {signature.y_tree}, but it returned {tree}"
        )
    return [_checked_leaf(leaf, like) for leaf, like in zip(leaves, signature.y_leaves, strict=True)]


def _checked_leaf(leaf: Any, like: Any) -> jax.Array:
    value = jnp.asarray(leaf, like.dtype) if isinstance(leaf, (bool, int, float)) else jnp.asarray(leaf)
    if value.shape != tuple(like.shape):
        raise TypeError(
            f"the field returned a derivative of shape {value.shape} for a state of shape {tuple(like.shape)}"
        )
    if value.dtype == like.dtype:
        return value
    if value.weak_type or jnp.issubdtype(value.dtype, jnp.integer) or value.dtype == bool:
        return value.astype(like.dtype)
    raise TypeError(
        f"the field returned {value.dtype} for a state of {like.dtype}: cast it, or give y0 and args one dtype "
        "(time has the state's dtype)"
    )


def as_state(y0: PyTree) -> PyTree:
    """`y0` as a pytree of floating arrays of one dtype.

    Raises TypeError for integer, complex or mixed dtypes, ValueError for a state without elements.
    """
    leaves, tree = jax.tree.flatten(y0)
    arrays = [_as_array(leaf, "y0") for leaf in leaves]
    dtypes = {str(a.dtype) for a in arrays}
    if not arrays or (all(a.size == 0 and 0 in a.shape for a in arrays) and not any(a.ndim for a in arrays)):
        raise ValueError("y0 has no elements: there is nothing to integrate")
    for a in arrays:
        if a.dtype not in (jnp.float32, jnp.float64):
            raise TypeError(
                f"y0 must be float32 or float64, not {a.dtype}: write 1.0, not 1, or use .astype(float)"
            )
    if len(dtypes) > 1:
        raise TypeError(f"the leaves of y0 must share one dtype, not {sorted(dtypes)}")
    return jax.tree.unflatten(tree, arrays)


def as_operands(args: PyTree, dtype: np.dtype) -> PyTree:
    """`args` as a pytree of arrays; Python floats take the state's dtype. Raises TypeError for leaves that are no arrays."""
    return jax.tree.map(
        lambda leaf: jnp.asarray(leaf, dtype) if type(leaf) is float else _as_array(leaf, "args"), args
    )


def _as_array(leaf: Any, name: str) -> jax.Array:
    if not isinstance(
        leaf, (bool, int, float, complex, np.ndarray, np.generic, jax.Array, Sequence)
    ) and not hasattr(leaf, "__jax_array__"):
        raise TypeError(
            f"{name} must be a pytree of arrays, but has a leaf {leaf!r}: close the field over it instead"
        )
    if isinstance(leaf, str):
        raise TypeError(
            f"{name} must be a pytree of arrays, but has a leaf {leaf!r}: close the field over it instead"
        )
    return jnp.asarray(leaf)
