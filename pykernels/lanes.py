"""From one trajectory to a block of lanes.

A field is traced once, for one trajectory, to a jaxpr of small static shapes. `lift` turns that jaxpr into a function
of a block of trajectories whose lanes are always the *last* axis, in one of three ways:

* ``"components"``: every scalar of every array is a value of its own, a lane vector ``(block,)``. Whatever only moves
  scalars about (reshape, slice, concatenate, gather with known indices, ...) happens while tracing and leaves no
  operation behind; what remains is elementwise arithmetic.
* ``"arrays"``: every array keeps its shape and gains the lanes behind it, ``(*shape, block)``. A value that is the same
  for all lanes stays as it is, so a matrix product with a shared matrix stays one product ``W @ Y``.
* ``"vmap"``: `jax.vmap`, for every jaxpr; the meaning the other two are tested against.

Which lift applies is decided from the jaxpr alone, by the tables of primitive names in this file (`unsupported`,
`component_obstacle`), before anything runs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.extend import core as jex_core
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# The allow-list: names of primitives of JAX 0.10.2 to 0.12 (a name that one of them lacks does no harm).

# One output scalar per input scalar. An operand may have rank 0, or length 1 along an axis, beside a larger one.
_ELEMENTWISE = _names(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e bitcast_convert_type cbrt ceil
    clamp clz convert_element_type copy copy_p cos cosh digamma div eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt
    igamma igamma_grad_a igammac integer_pow is_finite le le_to lgamma log log1p log2 logistic lt lt_to max min mul
    mulhi name ne neg nextafter not one_minus_square or polygamma polynomial population_count pow reduce_precision
    regularized_incomplete_beta rem round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign sin
    sinh sqrt square stop_gradient sub tan tanh xor zeta"""
)
# The arrays lift runs these with the lanes as one more trailing axis and the parameters unchanged ...
_SAME = _names(
    """argmax argmin concatenate cumlogsumexp cummax cummin cumprod cumsum optimization_barrier reduce_and reduce_max
    reduce_min reduce_or reduce_prod reduce_sum reduce_xor rev sort split squeeze stack top_k unstack"""
)
# ... and these with the parameters extended by that axis, or by rules of their own.
_SCATTER = _names("scatter scatter-add scatter-sub scatter-mul scatter-min scatter-max")
_OWN = (
    _names(
        """broadcast_in_dim dot_general dynamic_slice dynamic_update_slice gather iota pad reshape slice tile
        transpose"""
    )
    | _SCATTER
)
_CONTROL = frozenset({"cond", "scan", "while"})
# Calls are inlined; the value is the parameter that holds the callee. Rematerialisation is the caller's business.
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "eval_jaxpr": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
}
_CUSTOM = frozenset({"custom_jvp_call", "custom_vjp_call"})
# JAX 0.12 keeps some functions as "high" primitives, which know their own expansion; these are inlined too.
_EXPANDED = frozenset({"SearchSorted"})

_ARRAYS = _ELEMENTWISE | _SAME | _OWN | _CONTROL | _CUSTOM | _EXPANDED | frozenset(CALLS)
# The components lift has no rule for these.
_NOT_COMPONENTS = frozenset({"cumlogsumexp", "sort", "top_k"})
# Derivatives of these at ties are a matter of JAX's choice, so the components lift takes JAX's rule for them.
_TIES = frozenset({"cummax", "cummin", "reduce_max", "reduce_min"})

# Moving scalars about: free, for `operation_count`.
_FREE = _names(
    """broadcast_in_dim concatenate copy copy_p dynamic_slice dynamic_update_slice gather iota name optimization_barrier
    pad reshape rev scatter slice split squeeze stack stop_gradient tile transpose unstack"""
)
# One operation per scalar read rather than per scalar written.
_BY_INPUT = _names(
    """argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_xor"""
)

# Longest contraction that a product with lanes in both factors writes out term by term. XLA on CPU does not vectorise a
# sum over an axis before the last: 12 x 12 by 12 in 128 lanes took 37 us, and 3.4 us written out (two busy cores);
# the gradient with respect to both factors took 33 and 24 us, but with 24 terms 111 and 605 us.
_SPLIT = 16
# Longest scan, in scalar operations, that the components lift unrolls.
_UNROLL = 1000
# Shortest side of a product that Triton's `dot` takes.
TILE_DOT = 16
# From this side on the products of a float32 go to the tensor cores: with 64 the backward pass spills an eighth as much as
# with multiply-adds, with 16 three times as much (tsit5, sm_90).
TENSOR_DOT = 32


def _name(eqn: JaxprEqn) -> str:
    name = eqn.primitive.name
    return type(eqn.params["_prim"]).__name__ if name == "call_hi_primitive" else name


def open_jaxpr(jaxpr: Any) -> tuple[Jaxpr, Sequence[Any]]:
    """An open jaxpr and its constants, of either kind of jaxpr (JAX 0.12 has only one kind)."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def _callee(eqn: JaxprEqn) -> Any:
    """The jaxpr that a call, a custom rule's primal or a high primitive stands for."""
    name = _name(eqn)
    if name in CALLS:
        return eqn.params[CALLS[name]]
    if name in _CUSTOM:
        return eqn.params["call_jaxpr"]
    return jax.make_jaxpr(eqn.params["_prim"].expand)(*[_struct(a) for a in eqn.invars])


def _aval(atom: Any) -> Any:
    return atom.aval


def _struct(atom: Any) -> jax.ShapeDtypeStruct:
    aval = _aval(atom)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=getattr(aval, "weak_type", False))


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """Numbers of constants and of carries of a scan."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # JAX 0.12
    return len(list(consts)), len(list(carry))


def _is_float(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)


def _is_constant(x: Any) -> bool:
    """Whether x is known while tracing and rank 0: such a value can be an operand of any elementwise primitive."""
    return isinstance(x, np.generic)


class _Rule(NamedTuple):
    """One equation as a function of its distinct variables, and its derivatives as JAX (or its user) defines them."""

    jaxpr: Any
    inputs: list[Var]
    outputs: list[Var]

    @property
    def floats(self) -> list[bool]:
        return [_is_float(_aval(v).dtype) for v in self.inputs]

    @property
    def float_outputs(self) -> list[bool]:
        return [_is_float(_aval(v).dtype) for v in self.outputs]

    def _split(self, primals: Sequence[Any]) -> tuple[Callable[..., Any], list[Any]]:
        """The function of the float inputs alone, its float outputs apart from the others, and those inputs."""
        evaluate = jex_core.jaxpr_as_fun(self.jaxpr)
        floats, float_outputs = self.floats, self.float_outputs

        def function(*differentiable: Any) -> tuple[list[Any], list[Any]]:
            rest = iter(differentiable)
            outs = evaluate(*[next(rest) if f else p for f, p in zip(floats, primals, strict=True)])
            pairs = list(zip(outs, float_outputs, strict=True))
            return [o for o, f in pairs if f], [o for o, f in pairs if not f]

        return function, [p for f, p in zip(floats, primals, strict=True) if f]

    def jvp(self) -> Any:
        """Jaxpr (*inputs, *tangents of float inputs) -> (*outputs, *tangents of float outputs)."""

        def jvp(primals: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
            function, differentiable = self._split(primals)
            floats, moved, others = jax.jvp(function, tuple(differentiable), tuple(tangents), has_aux=True)
            return [*_merge(self.float_outputs, floats, others), *moved]

        inputs = [_struct(v) for v in self.inputs]
        return jax.make_jaxpr(jvp)(inputs, [s for s, f in zip(inputs, self.floats, strict=True) if f])

    def vjp(self) -> Any:
        """Jaxpr (*inputs, *cotangents of float outputs) -> (*cotangents of float inputs)."""

        def vjp(primals: Sequence[Any], cotangents: Sequence[Any]) -> Sequence[Any]:
            function, differentiable = self._split(primals)
            _, pull, _ = jax.vjp(function, *differentiable, has_aux=True)
            return pull(list(cotangents))

        outputs = [_struct(v) for v, f in zip(self.outputs, self.float_outputs, strict=True) if f]
        return jax.make_jaxpr(vjp)([_struct(v) for v in self.inputs], outputs)


def _rule(eqn: JaxprEqn, parent: Jaxpr) -> _Rule:
    inputs = list(dict.fromkeys(v for v in eqn.invars if isinstance(v, Var)))
    outputs = [v for v in eqn.outvars if not isinstance(v, jex_core.DropVar)]
    one = parent.replace(
        constvars=(),
        invars=inputs,
        outvars=outputs,
        eqns=[eqn],
        effects=eqn.effects,
        debug_info=parent.debug_info,
    )
    return _Rule(jex_core.ClosedJaxpr(one, ()), inputs, outputs)


def _merge(kinds: Sequence[bool], yes: Sequence[Any], no: Sequence[Any]) -> list[Any]:
    first, second = iter(yes), iter(no)
    return [next(first) if kind else next(second) for kind in kinds]


class _Interpreter:
    """Runs a jaxpr of one trajectory on values of a block of lanes; what a value is, the two lifts define.

    `mask` tells the living lanes. `differentiated`: derivatives of what is run may be taken. `linear`: what is run is a
    derivative rule, so some values are tangents, through which only linear operations may be laid.
    """

    ties: frozenset[str] = frozenset()

    def __init__(self, block: int, mask: Array | None, differentiated: bool, linear: bool = False) -> None:
        self.block = block
        self.mask = mask
        self.differentiated = differentiated
        self.linear = linear

    def with_mask(self, mask: Array | None, *, differentiated: bool, linear: bool) -> Any:
        return type(self)(self.block, mask, differentiated, linear)

    def constant(self, value: Any, aval: Any) -> Any:
        """The value of something known while tracing."""
        raise NotImplementedError

    def equation(self, name: str, eqn: JaxprEqn, args: list[Any], parent: Jaxpr) -> list[Any]:
        raise NotImplementedError

    def has_lanes(self, value: Any) -> bool:
        raise NotImplementedError

    def unknowns(self, value: Any, like: Any) -> list[Any]:
        """The arrays of `value` at the places where `like` is not known while tracing."""
        raise NotImplementedError

    def replace(self, value: Any, arrays: Sequence[Any], *, tangent: bool) -> Any:
        """`value` with other unknowns, of the same shapes; what is known is zero in a tangent."""
        raise NotImplementedError

    def finish(self, value: Any, lanes: bool) -> list[Array]:
        """All arrays of a value, given lanes if `lanes`."""
        raise NotImplementedError

    def start(self, arrays: Sequence[Any], shape: tuple[int, ...], lanes: bool) -> Any:
        """The value of these arrays: the inverse of `finish`."""
        raise NotImplementedError

    def run(self, jaxpr: Any, args: Sequence[Any]) -> list[Any]:
        jaxpr, consts = open_jaxpr(jaxpr)
        env: dict[Any, Any] = {}
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            env[var] = self.constant(const, var.aval)
        env.update(zip(jaxpr.invars, args, strict=True))

        def read(atom: Any) -> Any:
            return self.constant(atom.val, atom.aval) if isinstance(atom, Literal) else env[atom]

        for eqn in jaxpr.eqns:
            name, values = _name(eqn), [read(a) for a in eqn.invars]
            custom = name in _CUSTOM
            if name in CALLS or name in _EXPANDED or (custom and not self.differentiated):
                outs = self.run(_callee(eqn), values)
            elif custom or (self.differentiated and name in self.ties):
                outs = self.custom(eqn, values, jaxpr)
            else:
                outs = self.equation(name, eqn, values, jaxpr)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(a) for a in jaxpr.outvars]

    def custom(self, eqn: JaxprEqn, args: list[Any], parent: Jaxpr) -> list[Any]:
        """An equation that keeps its own derivative rule: that rule is lifted in its turn, when it is asked for."""
        rule = _rule(eqn, parent)
        by_var = {v: a for v, a in zip(eqn.invars, args, strict=True) if isinstance(v, Var)}
        values = [by_var[v] for v in rule.inputs]
        lanes = any(self.has_lanes(v) for v in values)
        groups = [self.unknowns(v, v) for v in values]
        ends = np.cumsum([0, *map(len, groups)])

        def inputs(flat: Sequence[Any], *, tangent: bool) -> list[Any]:
            return [
                self.replace(v, flat[ends[i] : ends[i + 1]], tangent=tangent)
                for i, v in enumerate(values)
                if rule.floats[i] or not tangent
            ]

        def primal(mask: Array | None, *flat: Array) -> list[list[Array]]:
            plain = self.with_mask(mask, differentiated=False, linear=self.linear)
            return [plain.finish(o, lanes) for o in plain.run(rule.jaxpr, inputs(flat, tangent=False))]

        def jvp(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
            mask, *flat = primals
            lifted = self.with_mask(mask, differentiated=True, linear=True)
            outs = lifted.run(rule.jvp(), [*inputs(flat, tangent=False), *inputs(tangents[1:], tangent=True)])
            results = [lifted.finish(o, lanes) for o in outs]
            outs, moved = results[: len(rule.outputs)], results[len(rule.outputs) :]
            still = [
                [np.zeros(x.shape, jax.dtypes.float0) for x in out]
                for out, is_float in zip(outs, rule.float_outputs, strict=True)
                if not is_float
            ]
            return outs, _merge(rule.float_outputs, moved, still)

        def forward(mask: Array | None, *flat: Array) -> tuple[Any, Any]:
            return primal(mask, *flat), (mask, flat)

        def backward(residuals: Any, cotangents: list[list[Array]]) -> tuple[Any, ...]:
            mask, flat = residuals
            lifted = self.with_mask(mask, differentiated=False, linear=False)
            arriving = [
                lifted.start(c, _aval(v).shape, lanes)
                for c, v, is_float in zip(cotangents, rule.outputs, rule.float_outputs, strict=True)
                if is_float
            ]
            outs = iter(lifted.run(rule.vjp(), [*inputs(flat, tangent=False), *arriving]))
            leaving: list[Any] = [None]
            for i, is_float in enumerate(rule.floats):
                primals = flat[ends[i] : ends[i + 1]]
                if is_float:
                    cts = lifted.unknowns(next(outs), values[i])
                    leaving += [lifted.fit(c, x) for c, x in zip(cts, primals, strict=True)]
                else:
                    leaving += [None] * len(primals)
            return tuple(leaving)

        if _name(eqn) == "custom_vjp_call":
            with_vjp = jax.custom_vjp(primal)
            with_vjp.defvjp(forward, backward)
            call: Callable[..., Any] = with_vjp
        else:
            with_jvp = jax.custom_jvp(primal)
            with_jvp.defjvp(jvp)
            call = with_jvp
        results = call(self.mask, *[x for group in groups for x in group])
        outs = {v: self.start(r, _aval(v).shape, lanes) for v, r in zip(rule.outputs, results, strict=True)}
        return [outs.get(v) for v in eqn.outvars]

    def fit(self, cotangent: Any, primal: Array) -> Array:
        """A cotangent in the shape of its primal: summed over the living lanes, or given lanes, where need be."""
        cotangent = jnp.asarray(cotangent, primal.dtype)
        if cotangent.ndim > primal.ndim:
            return jnp.sum(self.bury(cotangent), -1)
        if cotangent.ndim < primal.ndim:
            return _broadcast(cotangent, primal.shape[:-1], self.block, False)
        return cotangent

    def bury(self, x: Array) -> Array:
        """Zero in dead lanes."""
        if self.mask is None or not _is_float(x.dtype):
            return x
        return lax.select(_broadcast(self.mask, x.shape[:-1], self.block, True), x, jnp.zeros_like(x))

    def gate(self, mask: Array | None, x: Array) -> Array:
        """The identity, through which no cotangent passes in lanes outside `mask`.

        The cotangent of ``select(m, x, c)`` is ``select(m, ct, 0)``: exactly zero outside, even where ct is NaN. A tangent
        becomes zero outside as well, because a rule for it may only hold linear operations.
        """
        if mask is None or not _is_float(x.dtype):
            return x
        outside = jnp.zeros_like(x) if self.linear else lax.stop_gradient(x)
        return lax.select(_broadcast(mask, x.shape[:-1], self.block, True), x, outside)


def _broadcast(x: Any, shape: tuple[int, ...], block: int, lanes: bool) -> Array:
    """x, of a shape that broadcasts to `shape` (and lanes behind, if `lanes`), in the shape (*shape, block)."""
    x = jnp.asarray(x)
    rank = x.ndim - lanes
    if x.shape == (*shape, block) and lanes:
        return x
    axes = tuple(range(len(shape) - rank, len(shape)))
    return lax.broadcast_in_dim(x, (*shape, block), axes + ((len(shape),) if lanes else ()))


# A field's arrays, lanes behind.


class _Value(NamedTuple):
    x: Any
    lanes: bool


class _Arrays(_Interpreter):
    def constant(self, value: Any, aval: Any) -> _Value:
        if isinstance(value, jax.Array) or np.shape(value):
            return _Value(value, False)
        return _Value(np.asarray(value, aval.dtype)[()], False)

    def has_lanes(self, value: _Value) -> bool:
        return value.lanes

    def unknowns(self, value: _Value, like: _Value) -> list[Any]:
        return [value.x]

    def replace(self, value: _Value, arrays: Sequence[Any], *, tangent: bool) -> _Value:
        (x,) = arrays
        return _Value(x, value.lanes)

    def finish(self, value: _Value, lanes: bool) -> list[Array]:
        return [self.spread(value) if lanes else jnp.asarray(value.x)]

    def start(self, arrays: Sequence[Any], shape: tuple[int, ...], lanes: bool) -> _Value:
        (x,) = arrays
        return _Value(x, lanes)

    def spread(self, value: _Value, shape: tuple[int, ...] | None = None) -> Array:
        """The array of a value in the shape (*shape, block): where a value without lanes meets lanes.

        Its cotangent is the sum over the living lanes, so dead lanes are gated off.
        """
        x = value.x
        shape = (np.shape(x)[:-1] if value.lanes else np.shape(x)) if shape is None else shape
        wide = _broadcast(x, shape, self.block, value.lanes)
        return self.gate(self.mask, wide) if isinstance(x, Tracer) and not value.lanes else wide

    def equation(self, name: str, eqn: JaxprEqn, args: list[_Value], parent: Jaxpr) -> list[_Value]:
        if not any(v.lanes for v in args):
            if name in _CONTROL:
                return self.without_lanes(eqn, args, parent)
            return _values(eqn, eqn.primitive.bind(*[v.x for v in args], **eqn.params), False)
        if name in _ELEMENTWISE:
            return self.elementwise(name, eqn, args)
        if name in _SAME:
            return self.bind(eqn, [self.spread(v) for v in args])
        if name in _SCATTER:
            return self.scatter(eqn, args)
        return getattr(self, name)(eqn, args)

    def bind(self, eqn: JaxprEqn, xs: Sequence[Any], **changed: Any) -> list[_Value]:
        return _values(eqn, eqn.primitive.bind(*xs, **{**eqn.params, **changed}), True)

    def without_lanes(self, eqn: JaxprEqn, args: list[_Value], parent: Jaxpr) -> list[_Value]:
        rule = _rule(eqn, parent)
        by_var = {v: a.x for v, a in zip(eqn.invars, args, strict=True) if isinstance(v, Var)}
        outs = jex_core.jaxpr_as_fun(rule.jaxpr)(*[by_var[v] for v in rule.inputs])
        by_var = {v: _Value(o, False) for v, o in zip(rule.outputs, outs, strict=True)}
        return [by_var.get(v, _Value(None, False)) for v in eqn.outvars]

    def custom(self, eqn: JaxprEqn, args: list[Any], parent: Jaxpr) -> list[Any]:
        if any(v.lanes for v in args):
            return super().custom(eqn, args, parent)
        return self.without_lanes(eqn, args, parent)

    def one_by_one(self, eqn: JaxprEqn, args: list[_Value]) -> list[_Value]:
        """JAX's own batching of one primitive, for the rare use of it that has no rule here."""

        def one(*xs: Any) -> Any:
            return eqn.primitive.bind(*xs, **eqn.params)

        axes = [-1 if v.lanes else None for v in args]
        return _values(eqn, jax.vmap(one, in_axes=axes, out_axes=-1)(*[v.x for v in args]), True)

    def elementwise(self, name: str, eqn: JaxprEqn, args: list[_Value]) -> list[_Value]:
        shape = _aval(eqn.outvars[0]).shape
        # The cases of select_n and the operand of clamp must have the full shape, every other operand may be a scalar.
        full = {"select_n": range(1, len(args)), "clamp": (1,)}.get(name, ())
        xs = [
            v.x if _is_constant(v.x) and i not in full else self.spread(v, shape) for i, v in enumerate(args)
        ]
        return self.bind(eqn, xs)

    def broadcast_in_dim(self, eqn: JaxprEqn, args: list[_Value]) -> list[_Value]:
        shape, axes = eqn.params["shape"], eqn.params["broadcast_dimensions"]
        return self.bind(
            eqn, [args[0].x], shape=(*shape, self.block), broadcast_dimensions=(*axes, len(shape))
        )

    def reshape(self, eqn: JaxprEqn, args: list[_Value]) -> list[_Value]:
        return self.bind(eqn, [args[0].x], new_sizes=(*eqn.params["new_sizes"], self.block))

    def transpose(self, eqn: JaxprEqn, args: list[_Value]) -> list[_Value]:
        order = eqn.params["permutation"]
        return self.bind(eqn, [args[0].x], permutation=(*order, len(order)))

    def tile(self, eqn: JaxprEqn, args: list[_Value]) -> list[_Value]:
        return self.bind(eqn, [args[0].x], reps=(*eqn.params["reps"], 1))

    def slice(self, eqn: JaxprEqn, args: list[_Value]) -> list[_Value]:
        p = eqn.params
        return self.bind(
            eqn,
            [args[0].x],
            start_indices=(*p["start_indices"], 0),
            limit_indices=(*p["limit_indices"], self.block),
            strides=None if p["strides"] is None else (*p["strides"], 1),
        )

    def pad(self, eqn: JaxprEqn, args: list[_Value]) -> list[_Value]:
        config = (*eqn.params["padding_config"], (0, 0, 0))
        operand, filling = args
        x = self.spread(operand)
        if _is_constant(filling.x):
            return self.bind(eqn, [x, filling.x], padding_config=config)
        (padded,) = self.bind(eqn, [x, np.zeros((), x.dtype)], padding_config=config)
        inside = lax.pad(np.ones(x.shape[:-1], bool), np.False_, config[:-1])
        shape = _aval(eqn.outvars[0]).shape
        wide = _broadcast(inside, shape, self.block, False)
        return [_Value(lax.select(wide, padded.x, self.spread(filling, shape)), True)]

    def dot_general(self, eqn: JaxprEqn, args: list[_Value]) -> list[_Value]:
        p, (left, right) = eqn.params, args
        (lc, rc), (lb, rb) = p["dimension_numbers"]
        if left.lanes and right.lanes:
            return [_Value(self.product_of_lanes(eqn, left.x, right.x), True)]
        swap = left.lanes
        precision = p["precision"]
        if swap:
            left, right, lc, rc, lb, rb = right, left, rc, lc, rb, lb
            precision = precision[::-1] if isinstance(precision, tuple) else precision
        # The lanes are the last free axis of the second factor, so they come out last.
        y = right.x if _is_concrete(left.x) else self.bury(right.x)
        numbers = ((tuple(lc), tuple(rc)), (tuple(lb), tuple(rb)))
        (product,) = self.bind(eqn, [left.x, y], dimension_numbers=numbers, precision=precision)
        z = product.x if _is_concrete(left.x) else self.bury(product.x)
        if swap:
            batch = len(lb)
            rows = np.ndim(left.x) - batch - len(lc)
            order = (*range(batch), *range(batch + rows, z.ndim - 1), *range(batch, batch + rows), z.ndim - 1)
            z = z if order == tuple(range(z.ndim)) else lax.transpose(z, order)
        return [_Value(z, True)]

    def product_of_lanes(self, eqn: JaxprEqn, x: Array, y: Array) -> Array:
        """A product where every lane has both factors: no matrix product, but sums of elementwise products."""
        (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
        out = _aval(eqn.outvars[0])
        length = math.prod(x.shape[i] for i in lc)

        def align(a: Array, batch: Sequence[int], contracted: Sequence[int]) -> Array:
            """Axes (*batch, *free, contracted, lanes)."""
            free = [i for i in range(a.ndim - 1) if i not in (*batch, *contracted)]
            order = (*batch, *free, *contracted, a.ndim - 1)
            a = a if order == tuple(range(a.ndim)) else lax.transpose(a, order)
            return a.astype(out.dtype).reshape(*a.shape[: len(batch) + len(free)], length, self.block)

        x, y = align(x, lb, lc), align(y, rb, rc)
        b, m, rank = len(lb), x.ndim - 2, len(out.shape)
        x_axes, y_axes = range(m), (*range(b), *range(m, rank))
        if not 0 < length <= _SPLIT:
            shape, ends = (*out.shape, length, self.block), (rank, rank + 1)
            x = lax.broadcast_in_dim(x, shape, (*x_axes, *ends))
            return lax.reduce_sum(x * lax.broadcast_in_dim(y, shape, (*y_axes, *ends)), (rank,))
        shape = (*out.shape, self.block)
        total: Any = None
        for p, q in zip(lax.split(x, (1,) * length, m), lax.split(y, (1,) * length, y.ndim - 2), strict=True):
            p = lax.broadcast_in_dim(lax.squeeze(p, (m,)), shape, (*x_axes, rank))
            q = lax.broadcast_in_dim(lax.squeeze(q, (y.ndim - 2,)), shape, (*y_axes, rank))
            total = p * q if total is None else total + p * q
        return total

    def dynamic_slice(self, eqn: JaxprEqn, args: list[_Value]) -> list[_Value]:
        operand, *starts = args
        if any(s.lanes for s in starts):
            return self.looked_up(eqn, args)
        sizes = (*eqn.params["slice_sizes"], self.block)
        return self.bind(eqn, [operand.x, *_with_lane_start(starts)], slice_sizes=sizes)

    def dynamic_update_slice(self, eqn: JaxprEqn, args: list[_Value]) -> list[_Value]:
        operand, update, *starts = args
        spread = [self.spread(operand), self.spread(update)]
        if any(s.lanes for s in starts):
            return self.one_by_one(eqn, [*[_Value(x, True) for x in spread], *starts])
        return self.bind(eqn, [*spread, *_with_lane_start(starts)])

    def looked_up(self, eqn: JaxprEqn, args: list[_Value]) -> list[_Value]:
        """Every lane reads at its own index, of its own array or of one for all lanes."""
        outs = self.one_by_one(eqn, args)
        return (
            outs if args[0].lanes or _is_concrete(args[0].x) else [_Value(self.bury(o.x), True) for o in outs]
        )

    def gather(self, eqn: JaxprEqn, args: list[_Value]) -> list[_Value]:
        operand, indices = args
        if indices.lanes:
            return self.looked_up(eqn, args)
        numbers = eqn.params["dimension_numbers"]
        numbers = numbers._replace(offset_dims=(*numbers.offset_dims, len(_aval(eqn.outvars[0]).shape)))
        sizes = (*eqn.params["slice_sizes"], self.block)
        return self.bind(eqn, [operand.x, indices.x], dimension_numbers=numbers, slice_sizes=sizes)

    def scatter(self, eqn: JaxprEqn, args: list[_Value]) -> list[_Value]:
        operand, indices, updates = args
        x, u = self.spread(operand), self.spread(updates)
        if indices.lanes:
            return self.one_by_one(eqn, [_Value(x, True), indices, _Value(u, True)])
        numbers = eqn.params["dimension_numbers"]
        numbers = numbers._replace(update_window_dims=(*numbers.update_window_dims, u.ndim - 1))
        return self.bind(eqn, [x, indices.x, u], dimension_numbers=numbers)

    def given(self, value: _Value, lanes: bool) -> _Value:
        return _Value(self.spread(value), True) if lanes and not value.lanes else value

    def cond(self, eqn: JaxprEqn, args: list[_Value]) -> list[_Value]:
        index, *operands = args
        branches = eqn.params["branches"]
        if not index.lanes:
            kinds = _lanes_after("cond", eqn, [v.lanes for v in args])

            def run(branch: Any) -> Callable[[], list[Any]]:
                return lambda: [
                    self.given(o, k).x for o, k in zip(self.run(branch, operands), kinds, strict=True)
                ]

            outs = lax.switch(jnp.asarray(index.x, jnp.int32), [run(b) for b in branches])
            return [_Value(o, k) for o, k in zip(outs, kinds, strict=True)]
        number = lax.convert_element_type(index.x, np.int32)
        results: list[Array] = []
        for i, branch in enumerate(branches):
            chosen = lax.eq(number, lax.full_like(number, i))
            living = chosen if self.mask is None else lax.bitwise_and(chosen, self.mask)
            inner = self
            entering = operands
            if self.differentiated:
                # A lane takes no part in the branches it has not chosen: their derivatives may be infinite there.
                inner = self.with_mask(living, differentiated=True, linear=self.linear)
                entering = [_Value(self.gate(living, v.x), True) if v.lanes else v for v in operands]
            outs = [inner.spread(o) for o in inner.run(branch, entering)]
            if results:
                wide = [_broadcast(chosen, o.shape[:-1], self.block, True) for o in outs]
                outs = [lax.select(w, o, r) for w, o, r in zip(wide, outs, results, strict=True)]
            results = outs
        return [_Value(o, True) for o in results]

    def scan(self, eqn: JaxprEqn, args: list[_Value]) -> list[_Value]:
        p = eqn.params
        n, m = scan_counts(p)
        consts, init, xs = args[:n], args[n : n + m], args[n + m :]
        kinds = _lanes_after("scan", eqn, [v.lanes for v in args])

        def body(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
            values = [_Value(c, k) for c, k in zip(carry, kinds[:m], strict=True)]
            values += [_Value(a, v.lanes) for a, v in zip(x, xs, strict=True)]
            outs = self.run(p["jaxpr"], [*consts, *values])
            outs = [self.given(o, k).x for o, k in zip(outs, kinds, strict=True)]
            return outs[:m], outs[m:]

        start = [jnp.asarray(self.given(v, k).x) for v, k in zip(init, kinds[:m], strict=True)]
        options = {"length": p["length"], "reverse": p["reverse"], "unroll": p["unroll"]}
        carry, ys = lax.scan(body, start, [v.x for v in xs], **options)
        return [_Value(o, k) for o, k in zip([*carry, *ys], kinds, strict=True)]

    def while_(self, eqn: JaxprEqn, args: list[_Value]) -> list[_Value]:
        p = eqn.params
        n, m = p["cond_nconsts"], p["body_nconsts"]
        cond_consts, body_consts, init = args[:n], args[n : n + m], args[n + m :]
        kinds = _lanes_after("while", eqn, [v.lanes for v in args])
        start = [jnp.asarray(self.given(v, k).x) for v, k in zip(init, kinds, strict=True)]

        def values(carry: Sequence[Any]) -> list[_Value]:
            return [_Value(c, k) for c, k in zip(carry, kinds, strict=True)]

        def goes_on(carry: Sequence[Any]) -> _Value:
            return self.run(p["cond_jaxpr"], [*cond_consts, *values(carry)])[0]

        def step(carry: Sequence[Any]) -> list[Any]:
            outs = self.run(p["body_jaxpr"], [*body_consts, *values(carry)])
            return [self.given(o, k).x for o, k in zip(outs, kinds, strict=True)]

        if not _while_lanes(eqn, [v.lanes for v in args])[0]:
            outs = lax.while_loop(lambda carry: goes_on(carry).x, step, start)
            return values(outs)

        def running(carry: Sequence[Any]) -> Array:
            wanted = self.spread(goes_on(carry))
            return wanted if self.mask is None else lax.bitwise_and(wanted, self.mask)

        def masked(state: tuple[Array, list[Any]]) -> tuple[Array, list[Any]]:
            active, carry = state
            wide = [_broadcast(active, c.shape[:-1], self.block, True) for c in carry]
            new = [lax.select(w, a, b) for w, a, b in zip(wide, step(carry), carry, strict=True)]
            return lax.bitwise_and(active, running(new)), new

        _, outs = lax.while_loop(lambda state: jnp.any(state[0]), masked, (running(start), start))
        return values(outs)


setattr(_Arrays, "while", _Arrays.while_)


class _Tiles(_Arrays):
    """Arrays for GPU programs, whose values are tiles of threads: products with shared matrices are matrix products where
    both sides are long enough for Triton's `dot`, else sums of elementwise products."""

    def dot_general(self, eqn: JaxprEqn, args: list[_Value]) -> list[_Value]:
        left, right = args
        ((lc,), (rc,)), _ = eqn.params["dimension_numbers"]
        if left.lanes:
            left, right, lc, rc = right, left, rc, lc
        matrix = left.x if lc == 1 else lax.transpose(left.x, (1, 0))
        y = self.bury(right.x)
        if min(matrix.shape) >= TILE_DOT:
            # Tensor cores multiply 10 bits of a float32: three products of the parts make up for what one loses.
            three = y.dtype == np.float32 and min(matrix.shape) >= TENSOR_DOT
            precision = lax.DotAlgorithmPreset.TF32_TF32_F32_X3 if three else lax.Precision.HIGHEST
            product = lax.dot(matrix, y, precision=precision)
        else:
            shape = (*matrix.shape, self.block)
            left_wide, right_wide = (
                lax.broadcast_in_dim(x, shape, axes) for x, axes in ((matrix, (0, 1)), (y, (1, 2)))
            )
            product = lax.reduce_sum(left_wide * right_wide, (1,))
        return [_Value(self.bury(product), True)]


def _values(eqn: JaxprEqn, outs: Any, lanes: bool) -> list[_Value]:
    return [_Value(o, lanes) for o in (outs if eqn.primitive.multiple_results else [outs])]


def _with_lane_start(starts: Sequence[_Value]) -> list[Any]:
    """The starts of a window, and behind them that of all lanes, in the same integer type."""
    known = [s.x for s in starts]
    return [*known, known[0].dtype.type(0) if known else np.int32(0)]


def _is_concrete(x: Any) -> bool:
    return not isinstance(x, Tracer)


def _lanes_after(name: str, eqn: JaxprEqn, lanes: Sequence[bool]) -> list[bool]:
    """Which results of an equation have lanes, as the arrays lift makes them."""
    if name in CALLS or name in _EXPANDED:
        return _lanes_out(_callee(eqn), lanes)
    if name == "cond":
        branches = [_lanes_out(b, lanes[1:]) for b in eqn.params["branches"]]
        return [lanes[0] or any(kinds) for kinds in zip(*branches, strict=True)]
    if name == "scan":
        n, m = scan_counts(eqn.params)
        carry = list(lanes[n : n + m])
        while True:
            outs = _lanes_out(eqn.params["jaxpr"], [*lanes[:n], *carry, *lanes[n + m :]])
            new = [a or b for a, b in zip(carry, outs[:m], strict=True)]
            if new == carry:
                return [*carry, *outs[m:]]
            carry = new
    if name == "while":
        return _while_lanes(eqn, lanes)[1]
    return [any(lanes)] * len(eqn.outvars)


def _while_lanes(eqn: JaxprEqn, lanes: Sequence[bool]) -> tuple[bool, list[bool]]:
    """Whether a loop's condition has lanes, and which of its carries have."""
    p = eqn.params
    n, m = p["cond_nconsts"], p["body_nconsts"]
    carry = list(lanes[n + m :])
    while True:
        (condition,) = _lanes_out(p["cond_jaxpr"], [*lanes[:n], *carry])
        outs = _lanes_out(p["body_jaxpr"], [*lanes[n : n + m], *carry])
        new = [a or b or condition for a, b in zip(carry, outs, strict=True)]
        if new == carry:
            return condition, carry
        carry = new


def _lanes_out(jaxpr: Any, lanes: Sequence[bool]) -> list[bool]:
    jaxpr, _ = open_jaxpr(jaxpr)
    env: dict[Any, bool] = dict.fromkeys(jaxpr.constvars, False)
    env.update(zip(jaxpr.invars, lanes, strict=True))
    for eqn in jaxpr.eqns:
        kinds = [env.get(a, False) if isinstance(a, Var) else False for a in eqn.invars]
        env.update(zip(eqn.outvars, _lanes_after(_name(eqn), eqn, kinds), strict=True))
    return [env.get(a, False) if isinstance(a, Var) else False for a in jaxpr.outvars]


# A field's scalars, each a value of its own. A value is an integer array of the value's shape: places in `store`, where
# the pieces are. A piece is a lane vector (block,), a scalar () without lanes, or, if it is known, a NumPy scalar.


class _Components(_Interpreter):
    ties = _TIES

    def __init__(
        self,
        block: int,
        mask: Array | None,
        differentiated: bool,
        linear: bool = False,
        store: list[Any] | None = None,
    ) -> None:
        super().__init__(block, mask, differentiated, linear)
        self.store = [] if store is None else store

    def with_mask(self, mask: Array | None, *, differentiated: bool, linear: bool) -> _Components:
        return _Components(self.block, mask, differentiated, linear, self.store)

    def put(self, piece: Any) -> int:
        self.store.append(piece)
        return len(self.store) - 1

    def constant(self, value: Any, aval: Any) -> np.ndarray:
        known = np.asarray(value, aval.dtype)
        return self.start([known[i] for i in np.ndindex(known.shape)], known.shape, False)

    def pieces(self, value: np.ndarray) -> list[Any]:
        return [self.store[i] for i in value.flat]

    def is_known(self, value: np.ndarray) -> bool:
        return all(map(_is_constant, self.pieces(value)))

    def known(self, value: np.ndarray, dtype: Any) -> np.ndarray:
        """The NumPy array of a value that is known."""
        return np.array(self.pieces(value), dtype).reshape(value.shape)

    def has_lanes(self, value: np.ndarray) -> bool:
        return any(np.ndim(p) for p in self.pieces(value))

    def unknowns(self, value: np.ndarray, like: np.ndarray) -> list[Any]:
        pairs = zip(self.pieces(value), self.pieces(like), strict=True)
        return [p for p, q in pairs if not _is_constant(q)]

    def replace(self, value: np.ndarray, arrays: Sequence[Any], *, tangent: bool) -> np.ndarray:
        rest = iter(arrays)
        new = [(p * 0 if tangent else p) if _is_constant(p) else next(rest) for p in self.pieces(value)]
        return self.start(new, value.shape, False)

    def finish(self, value: np.ndarray, lanes: bool) -> list[Array]:
        return [self.widen(p) if lanes else jnp.asarray(p) for p in self.pieces(value)]

    def start(self, arrays: Sequence[Any], shape: tuple[int, ...], lanes: bool) -> np.ndarray:
        return np.array([self.put(a) for a in arrays], np.int64).reshape(shape)

    def widen(self, piece: Any) -> Array:
        return piece if np.ndim(piece) else _broadcast(piece, (), self.block, False)

    def apply(self, eqn: JaxprEqn, pieces: Sequence[Any], full: Sequence[int] = ()) -> Any:
        """An elementwise primitive on one scalar of each operand; those in `full` may not be known beside lanes."""
        if all(map(_is_constant, pieces)):
            return _fold(eqn, pieces)
        if any(np.ndim(p) for p in pieces):
            pieces = [p if _is_constant(p) and i not in full else self.widen(p) for i, p in enumerate(pieces)]
        return eqn.primitive.bind(*pieces, **eqn.params)

    def combine(self, function: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
        if _is_constant(a) and _is_constant(b):
            return _known_scalar(function, a, b)
        if np.ndim(a) != np.ndim(b):
            a, b = (p if _is_constant(p) else self.widen(p) for p in (a, b))
        return function(a, b)

    def choose(self, condition: Any, yes: Any, no: Any) -> Any:
        """`yes` where the condition holds."""
        if _is_constant(condition):
            return yes if condition else no
        if yes is no:
            return yes
        if any(np.ndim(p) for p in (condition, yes, no)):
            condition, yes, no = map(self.widen, (condition, yes, no))
        return lax.select(condition, jnp.asarray(yes), jnp.asarray(no))

    def equation(self, name: str, eqn: JaxprEqn, args: list[np.ndarray], parent: Jaxpr) -> list[np.ndarray]:
        if name in ("cond", "scan"):
            return getattr(self, name)(eqn, args)
        if name == "while" or (name not in _COMPONENTS and name not in _ELEMENTWISE):
            return self.folded(eqn, args)
        if name == "select_n":
            return [self.select_n(eqn, args)]
        if name in _ELEMENTWISE:
            return [self.elementwise(name, eqn, args)]
        outs = _COMPONENTS[name](self, eqn, args)
        return list(outs) if eqn.primitive.multiple_results else [outs]

    def custom(self, eqn: JaxprEqn, args: list[Any], parent: Jaxpr) -> list[Any]:
        if not all(map(self.is_known, args)):
            return super().custom(eqn, args, parent)
        if _name(eqn) in _CUSTOM:
            return self.run(_callee(eqn), args)
        return self.equation(_name(eqn), eqn, args, parent)

    def folded(self, eqn: JaxprEqn, args: list[np.ndarray]) -> list[np.ndarray]:
        """An equation whose operands are all known, evaluated while tracing."""
        known = [self.known(a, _aval(v).dtype) for a, v in zip(args, eqn.invars, strict=True)]
        with jax.ensure_compile_time_eval():
            outs = eqn.primitive.bind(*known, **eqn.params)
        outs = outs if eqn.primitive.multiple_results else [outs]
        return [self.constant(np.asarray(o), v.aval) for o, v in zip(outs, eqn.outvars, strict=True)]

    def elementwise(self, name: str, eqn: JaxprEqn, args: list[np.ndarray]) -> np.ndarray:
        shape = _aval(eqn.outvars[0]).shape
        before, after = _aval(eqn.invars[0]).dtype, _aval(eqn.outvars[0]).dtype
        if before == after and name in ("convert_element_type", "copy", "copy_p", "name"):
            return args[0]
        full = (1,) if name == "clamp" else ()
        wide = [self.pieces(np.broadcast_to(a, shape)) for a in args]
        return self.start([self.apply(eqn, p, full) for p in zip(*wide, strict=True)], shape, False)

    def select_n(self, eqn: JaxprEqn, args: list[np.ndarray]) -> np.ndarray:
        shape = _aval(eqn.outvars[0]).shape
        wide = [self.pieces(np.broadcast_to(a, shape)) for a in args]

        def pick(which: Any, *cases: Any) -> Any:
            if _is_constant(which):
                return cases[int(which)]
            if len(cases) == 2 and which.dtype == np.bool_:
                return self.choose(which, cases[1], cases[0])
            return self.by_index(which, cases)

        return self.start([pick(*p) for p in zip(*wide, strict=True)], shape, False)

    def by_index(self, index: Any, cases: Sequence[Any]) -> Any:
        result = cases[0]
        for i, case in enumerate(cases[1:], 1):
            result = self.choose(lax.eq(index, lax.full_like(index, i)), case, result)
        return result

    def reduce(self, eqn: JaxprEqn, args: list[np.ndarray]) -> np.ndarray:
        (value,), axes = args, eqn.params["axes"]
        kept = [i for i in range(value.ndim) if i not in axes]
        shape = tuple(value.shape[i] for i in kept)
        rows = value.transpose(*kept, *axes).reshape(math.prod(shape), -1)
        function, neutral = _REDUCTIONS[_name(eqn)]
        dtype = _aval(eqn.outvars[0]).dtype
        results = []
        for row in rows:
            pieces = self.pieces(row)
            results.append(pieces[0] if pieces else neutral(np.dtype(dtype)))
            for piece in pieces[1:]:
                results[-1] = self.combine(function, results[-1], piece)
        return self.start(results, shape, False)

    def cumulate(self, eqn: JaxprEqn, args: list[np.ndarray]) -> np.ndarray:
        axis, reverse = eqn.params["axis"], eqn.params["reverse"]
        function = _CUMULATIVE[_name(eqn)]
        rows = np.moveaxis(args[0], axis, -1)
        rows = rows[..., ::-1] if reverse else rows
        out = rows.copy()
        for i in range(1, rows.shape[-1]):
            for j in np.ndindex(rows.shape[:-1]):
                a, b = self.store[out[*j, i - 1]], self.store[rows[*j, i]]
                out[*j, i] = self.put(self.combine(function, a, b))
        return np.moveaxis(out[..., ::-1] if reverse else out, -1, axis)

    def arg_extreme(self, eqn: JaxprEqn, args: list[np.ndarray]) -> np.ndarray:
        """The first place of the largest (smallest) piece; a NaN counts as larger (smaller) than all."""
        (value,), (axis,), dtype = args, eqn.params["axes"], np.dtype(eqn.params["index_dtype"])
        rows = np.moveaxis(value, axis, -1)
        better = lax.gt if _name(eqn) == "argmax" else lax.lt
        results = []
        for j in np.ndindex(rows.shape[:-1]):
            best, place = self.store[rows[*j, 0]], dtype.type(0)
            for i in range(1, rows.shape[-1]):
                piece = self.store[rows[*j, i]]
                wins = self.combine(better, piece, best)
                if _is_float(_aval(eqn.invars[0]).dtype):
                    nan, seen = self.combine(lax.ne, piece, piece), self.combine(lax.eq, best, best)
                    wins = self.combine(lax.bitwise_or, wins, self.combine(lax.bitwise_and, nan, seen))
                best, place = self.choose(wins, piece, best), self.choose(wins, dtype.type(i), place)
            results.append(place)
        return self.start(results, rows.shape[:-1], False)

    def dot_general(self, eqn: JaxprEqn, args: list[np.ndarray]) -> np.ndarray:
        (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
        x, y = args
        lf = [i for i in range(x.ndim) if i not in (*lc, *lb)]
        rf = [i for i in range(y.ndim) if i not in (*rc, *rb)]
        shape = tuple([x.shape[i] for i in (*lb, *lf)] + [y.shape[i] for i in rf])
        batch, k = math.prod(x.shape[i] for i in lb), math.prod(x.shape[i] for i in lc)
        left = x.transpose(*lb, *lf, *lc).reshape(batch, math.prod(x.shape[i] for i in lf), k)
        right = y.transpose(*rb, *rf, *rc).reshape(batch, math.prod(y.shape[i] for i in rf), k)
        dtype = _aval(eqn.outvars[0]).dtype
        convert = lambda p: p.astype(dtype)  # noqa: E731
        results = []
        for b, i, j in np.ndindex(batch, left.shape[1], right.shape[1]):
            total = None
            for p, q in zip(
                map(convert, self.pieces(left[b, i])), map(convert, self.pieces(right[b, j])), strict=True
            ):
                if any(_is_constant(a) and a == 0 for a in (p, q)):
                    continue
                one = [_is_constant(a) and a == 1 for a in (p, q)]
                term = q if one[0] else p if one[1] else self.combine(lax.mul, p, q)
                total = term if total is None else self.combine(lax.add, total, term)
            results.append(dtype.type(0) if total is None else total)
        return self.start(results, shape, False)

    def pad(self, eqn: JaxprEqn, args: list[np.ndarray]) -> np.ndarray:
        operand, filling = args
        config = eqn.params["padding_config"]
        spaced = tuple(
            low + high + n + max(n - 1, 0) * gap
            for (low, high, gap), n in zip(config, operand.shape, strict=True)
        )
        out = np.full(spaced, filling, np.int64)
        for index in np.ndindex(operand.shape):
            place = tuple(low + i * (gap + 1) for i, (low, _, gap) in zip(index, config, strict=True))
            if all(0 <= i < n for i, n in zip(place, spaced, strict=True)):
                out[place] = operand[index]
        return out

    def starts(
        self, args: Sequence[np.ndarray], shape: Sequence[int], sizes: Sequence[int]
    ) -> tuple[slice, ...]:
        """The window of a dynamic slice with known indices, moved inside as JAX does."""
        known = [int(self.store[int(a)]) for a in args]
        clamped = [min(max(i, 0), n - size) for i, n, size in zip(known, shape, sizes, strict=True)]
        return tuple(slice(i, i + size) for i, size in zip(clamped, sizes, strict=True))

    def dynamic_slice(self, eqn: JaxprEqn, args: list[np.ndarray]) -> np.ndarray:
        return args[0][self.starts(args[1:], args[0].shape, eqn.params["slice_sizes"])]

    def dynamic_update_slice(self, eqn: JaxprEqn, args: list[np.ndarray]) -> np.ndarray:
        out = args[0].copy()
        out[self.starts(args[2:], out.shape, args[1].shape)] = args[1]
        return out

    def gather(self, eqn: JaxprEqn, args: list[np.ndarray]) -> np.ndarray:
        """JAX's own gather, of the places in the store; a place out of bounds reads the filling."""
        operand, indices = args
        dtype, filling = np.dtype(_aval(eqn.outvars[0]).dtype), eqn.params["fill_value"]
        if filling is None:
            filling = np.nan if _is_float(dtype) else True if dtype == np.bool_ else _lowest_or_highest(dtype)
        outside = self.put(np.asarray(filling, dtype)[()])
        params = {**eqn.params, "fill_value": outside}
        with jax.ensure_compile_time_eval():
            out = eqn.primitive.bind(
                operand.astype(np.int32), self.known(indices, _aval(eqn.invars[1]).dtype), **params
            )
        return np.asarray(out, np.int64)

    def scatter(self, eqn: JaxprEqn, args: list[np.ndarray]) -> np.ndarray:
        operand, indices, updates = args
        index = self.known(indices, _aval(eqn.invars[1]).dtype)
        name, p = _name(eqn), eqn.params
        if name == "scatter":
            with jax.ensure_compile_time_eval():
                places = [a.astype(np.int32) for a in (operand, updates)]
                out = eqn.primitive.bind(places[0], index, places[1], **p)
            return np.asarray(out, np.int64)
        # Which update meets which place: scatter-add one update at a time into zeros.
        each = np.eye(updates.size, dtype=np.int32).reshape(updates.size, *updates.shape)
        numbers, zeros = p["dimension_numbers"], np.zeros(operand.shape, np.int32)
        with jax.ensure_compile_time_eval():
            hits = [np.asarray(lax.scatter_add(zeros, index, u, numbers, mode=p["mode"])) for u in each]
        function = _SCATTERED[name]
        out = operand.copy()
        for hit, piece in zip(hits, self.pieces(updates), strict=True):
            for place in map(tuple, np.argwhere(hit)):
                out[place] = self.put(self.combine(function, self.store[out[place]], piece))
        return out

    def cond(self, eqn: JaxprEqn, args: list[np.ndarray]) -> list[np.ndarray]:
        """Every branch is evaluated, and each lane selects its own: there is no control flow."""
        index, *operands = args
        number, branches = self.store[int(index)], eqn.params["branches"]
        if _is_constant(number):
            return self.run(branches[int(number)], operands)
        number = lax.convert_element_type(number, np.int32)
        results: list[list[np.ndarray]] = []
        for i, branch in enumerate(branches):
            entering = operands
            if self.differentiated:
                chosen = lax.eq(number, lax.full_like(number, i))
                entering = [
                    self.start([self.enter(chosen, p) for p in self.pieces(v)], v.shape, False)
                    for v in operands
                ]
            results.append(self.run(branch, entering))
        outs = []
        for values in zip(*results, strict=True):
            columns = zip(*map(self.pieces, values), strict=True)
            outs.append(self.start([self.by_index(number, c) for c in columns], values[0].shape, False))
        return outs

    def enter(self, chosen: Array, piece: Any) -> Any:
        """A piece as a branch sees it: no derivative passes where the branch is not chosen."""
        if _is_constant(piece) or not _is_float(piece.dtype):
            return piece
        if np.ndim(chosen) == 0 and np.ndim(piece) == 0:
            outside = jnp.zeros_like(piece) if self.linear else lax.stop_gradient(piece)
            return lax.select(chosen, piece, outside)
        return self.gate(self.widen(chosen), self.widen(piece))

    def scan(self, eqn: JaxprEqn, args: list[np.ndarray]) -> list[np.ndarray]:
        p = eqn.params
        n, m = scan_counts(p)
        consts, carry, xs = args[:n], args[n : n + m], args[n + m :]
        rows: list[list[np.ndarray]] = []
        order = range(p["length"])
        for i in reversed(order) if p["reverse"] else order:
            outs = self.run(p["jaxpr"], [*consts, *carry, *[x[i, ...] for x in xs]])
            carry = [np.asarray(o) for o in outs[:m]]
            rows.append(outs[m:])
        rows = rows[::-1] if p["reverse"] else rows
        shapes = [_aval(v).shape for v in eqn.outvars[m:]]
        columns = zip(*rows, strict=True) if rows else [()] * len(shapes)
        stacked = [np.array([*c], np.int64).reshape(s) for c, s in zip(columns, shapes, strict=True)]
        return [*carry, *stacked]


def _fold(eqn: JaxprEqn, pieces: Sequence[Any]) -> Any:
    """An elementwise primitive of known scalars: by NumPy where that is exact, or else by JAX, at once."""
    dtype = np.dtype(_aval(eqn.outvars[0]).dtype)
    if (function := _NUMPY.get(_name(eqn))) is not None:
        with np.errstate(all="ignore"):
            return np.asarray(function(*pieces), dtype)[()]
    with jax.ensure_compile_time_eval():
        return np.asarray(eqn.primitive.bind(*pieces, **eqn.params), dtype)[()]


def _known_scalar(function: Callable[..., Any], *pieces: Any) -> Any:
    with jax.ensure_compile_time_eval():
        return np.asarray(function(*pieces))[()]


def _lowest_or_highest(dtype: np.dtype) -> int:
    """What a gather fills with, for integers: the lowest signed or the highest unsigned number."""
    return np.iinfo(dtype).min if np.issubdtype(dtype, np.signedinteger) else np.iinfo(dtype).max


def _extreme(dtype: np.dtype, sign: int) -> np.generic:
    """The least (sign -1) or largest value of a dtype, the neutral element of max or min."""
    if _is_float(dtype):
        return dtype.type(sign * np.inf)
    if dtype == np.bool_:
        return np.bool_(sign > 0)
    limits = np.iinfo(dtype)
    return dtype.type(limits.max if sign > 0 else limits.min)


_REDUCTIONS: dict[str, tuple[Callable[[Any, Any], Any], Callable[[np.dtype], np.generic]]] = {
    "reduce_sum": (lax.add, lambda dtype: dtype.type(0)),
    "reduce_prod": (lax.mul, lambda dtype: dtype.type(1)),
    "reduce_max": (lax.max, lambda dtype: _extreme(dtype, -1)),
    "reduce_min": (lax.min, lambda dtype: _extreme(dtype, 1)),
    "reduce_and": (lax.bitwise_and, lambda dtype: dtype.type(-1 if dtype != np.bool_ else True)),
    "reduce_or": (lax.bitwise_or, lambda dtype: dtype.type(0)),
    "reduce_xor": (lax.bitwise_xor, lambda dtype: dtype.type(0)),
}
_CUMULATIVE = {"cumsum": lax.add, "cumprod": lax.mul, "cummax": lax.max, "cummin": lax.min}
_SCATTERED = {
    "scatter-add": lax.add,
    "scatter-sub": lax.sub,
    "scatter-mul": lax.mul,
    "scatter-min": lax.min,
    "scatter-max": lax.max,
}
# Known scalars: where NumPy gives the same number as XLA, to the last bit.
_NUMPY: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "and": np.bitwise_and,
    "eq": np.equal,
    "ge": np.greater_equal,
    "gt": np.greater,
    "le": np.less_equal,
    "lt": np.less,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "ne": np.not_equal,
    "neg": np.negative,
    "not": np.invert,
    "or": np.bitwise_or,
    "sub": np.subtract,
}


def _broadcast_places(value: np.ndarray, shape: Sequence[int], axes: Sequence[int]) -> np.ndarray:
    inner = [1] * len(shape)
    for axis, n in zip(axes, value.shape, strict=True):
        inner[axis] = n
    return np.broadcast_to(value.reshape(inner), shape)


def _slices(p: dict[str, Any]) -> tuple[slice, ...]:
    strides = p["strides"] or (1,) * len(p["start_indices"])
    return tuple(slice(*s) for s in zip(p["start_indices"], p["limit_indices"], strides, strict=True))


_Rules = dict[str, Callable[[_Components, JaxprEqn, list[np.ndarray]], Any]]
_COMPONENTS: _Rules = {
    "argmax": _Components.arg_extreme,
    "argmin": _Components.arg_extreme,
    "broadcast_in_dim": lambda c, e, a: _broadcast_places(
        a[0], e.params["shape"], e.params["broadcast_dimensions"]
    ),
    "concatenate": lambda c, e, a: np.concatenate(a, e.params["dimension"]),
    "dot_general": _Components.dot_general,
    "dynamic_slice": _Components.dynamic_slice,
    "dynamic_update_slice": _Components.dynamic_update_slice,
    "gather": _Components.gather,
    "optimization_barrier": lambda c, e, a: a,
    "pad": _Components.pad,
    "reshape": lambda c, e, a: a[0].reshape(e.params["new_sizes"]),
    "rev": lambda c, e, a: np.flip(a[0], e.params["dimensions"]),
    "slice": lambda c, e, a: a[0][_slices(e.params)],
    "split": lambda c, e, a: np.split(a[0], np.cumsum(e.params["sizes"])[:-1], e.params["axis"]),
    "squeeze": lambda c, e, a: np.squeeze(a[0], tuple(e.params["dimensions"])),
    "stack": lambda c, e, a: np.stack(a, e.params["axis"]),
    "tile": lambda c, e, a: np.tile(a[0], e.params["reps"]),
    "transpose": lambda c, e, a: a[0].transpose(e.params["permutation"]),
    "unstack": lambda c, e, a: [np.asarray(x) for x in np.moveaxis(a[0], e.params["axis"], 0)],
}
_COMPONENTS |= dict.fromkeys(_REDUCTIONS, _Components.reduce)
_COMPONENTS |= dict.fromkeys(_CUMULATIVE, _Components.cumulate)
_COMPONENTS |= dict.fromkeys(_SCATTER, _Components.scatter)


# What others use.


@dataclasses.dataclass(frozen=True)
class Lift:
    """A field for a block of lanes. Call it with one list of arrays per input of the jaxpr, in the order of `pieces`.

    For ``arrays`` and ``vmap`` an input is one array, ``(*shape, block)`` if it has lanes and ``shape`` if it is shared.
    For ``components`` it is one array per scalar, ``(block,)``, or ``()`` (``(block,)`` is accepted too) if it is shared.
    Input 0 always has lanes. The results come in the same form, always with lanes.

    Attributes:
      kind: ``"components"``, ``"arrays"`` or ``"vmap"``.
      spreads_shared: whether a shared input must be given lanes before its derivative is taken: then the caller sums
        the cotangent over the living lanes. Otherwise the lift does, and `mask` must tell which lanes live.
    """

    kind: str
    spreads_shared: bool
    jaxpr: Jaxpr | ClosedJaxpr = dataclasses.field(repr=False)
    lane: tuple[bool, ...] = dataclasses.field(repr=False)
    differentiated: bool = dataclasses.field(repr=False)
    tiles: bool = False

    def pieces(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Index tuples under which one leaf of that shape is handed over, in order."""
        return list(np.ndindex(shape)) if self.kind == "components" else [()]

    def __call__(self, inputs: Sequence[Sequence[Array]], mask: Array | None = None) -> list[list[Array]]:
        """The field's results for a block.

        Args:
          inputs: for each input of the jaxpr its pieces.
          mask: bool ``(block,)``, the living lanes, or None for all. What dead lanes compute is of no meaning, and they
            contribute exactly zero, never 0 * NaN, to the cotangents of shared inputs. Needed where `spreads_shared`
            is false; elsewhere ignored.
        """
        block = inputs[0][0].shape[-1]
        inputs = [[jnp.asarray(x) for x in pieces] for pieces in inputs]
        if self.kind == "vmap":
            function = jex_core.jaxpr_as_fun(jex_core.ClosedJaxpr(*open_jaxpr(self.jaxpr)))
            axes = [-1 if lanes else None for lanes in self.lane]
            return [[o] for o in jax.vmap(function, in_axes=axes, out_axes=-1)(*[x for (x,) in inputs])]
        if self.kind == "arrays":
            arrays = (_Tiles if self.tiles else _Arrays)(block, mask, self.differentiated)
            values = [arrays.start(x, (), lanes) for x, lanes in zip(inputs, self.lane, strict=True)]
            return [arrays.finish(o, True) for o in arrays.run(self.jaxpr, values)]
        scalars = _Components(block, None, self.differentiated)
        variables = open_jaxpr(self.jaxpr)[0].invars
        places = [scalars.start(x, _aval(v).shape, True) for x, v in zip(inputs, variables, strict=True)]
        return [scalars.finish(o, True) for o in scalars.run(self.jaxpr, places)]


def lift(jaxpr: Jaxpr | ClosedJaxpr, lane: Sequence[bool], kind: str, *, differentiated: bool) -> Lift:
    """Lifts a jaxpr of one trajectory to a block of lanes.

    Args:
      jaxpr: with inputs (t, *state leaves, *operand leaves). An open jaxpr without constants, or a closed one with
        concrete constants: these are known while tracing, so arrays may be indexed by them in the components lift.
      lane: for each input whether each lane has its own; `lane[0]` is True.
      kind: ``"components"``, ``"arrays"``, ``"tiles"`` (arrays with GPU programs' products) or ``"vmap"``. `unsupported`,
        `component_obstacle` and `tile_obstacle` tell what applies.
      differentiated: whether derivatives of the lifted function will be taken. If so, functions with rules of their own
        (`jax.custom_jvp`, `jax.custom_vjp`) keep them, and a `lax.cond` that becomes a selection lets no derivative
        through from the branch a lane has not taken. If not, the lifted function is smaller.

    Raises:
      ValueError: an unknown kind, `lane` of the wrong length, or constants without a known value.
    """
    lane = tuple(map(bool, lane))
    inner, consts = open_jaxpr(jaxpr)
    if kind not in ("components", "arrays", "tiles", "vmap"):
        raise ValueError(f"unknown kind of lift {kind!r}: expected 'components', 'arrays', 'tiles' or 'vmap'")
    if len(lane) != len(inner.invars) or not lane or not lane[0]:
        raise ValueError(
            f"lane needs one entry for each of {len(inner.invars)} inputs, the first True; got {lane}"
        )
    if len(inner.constvars) != len(consts) or any(isinstance(c, Tracer) for c in consts):
        raise ValueError("constants of the jaxpr without a known value: make them inputs")
    tiles = kind == "tiles"
    kind = "arrays" if tiles else kind
    return Lift(kind, kind != "arrays", jaxpr, lane, differentiated, tiles)


def unsupported(
    jaxpr: Jaxpr | ClosedJaxpr, lane: Sequence[bool], *, differentiated: bool = True
) -> str | None:
    """None if the arrays lift can run this jaxpr, else the name of the first primitive (or the reason) why not.

    With `differentiated` the derivative rules of custom functions in it are examined as well.
    """
    for v in open_jaxpr(jaxpr)[0].invars:
        if (reason := _bad_dtype(v.aval)) is not None:
            return reason
    return _first_unsupported(jaxpr, differentiated)


def _bad_dtype(aval: Any) -> str | None:
    dtype = getattr(aval, "dtype", None)
    if dtype is not None and (jnp.issubdtype(dtype, np.number) or dtype == np.bool_):
        return f"values of dtype {dtype}" if jnp.issubdtype(dtype, np.complexfloating) else None
    return f"values of type {aval}"


def _first_unsupported(jaxpr: Any, differentiated: bool) -> str | None:
    jaxpr, _ = open_jaxpr(jaxpr)
    for eqn in jaxpr.eqns:
        name = _name(eqn)
        if name not in _ARRAYS:
            return name
        reasons = [_misuse(name, eqn)]
        reasons += [_first_unsupported(inner, differentiated) for inner in _inner(name, eqn)]
        reasons += [_bad_dtype(v.aval) for v in eqn.outvars]
        for reason in reasons:
            if reason is not None:
                return reason
        if name in _CUSTOM and differentiated:
            rule = _rule(eqn, jaxpr)
            derivative = rule.vjp() if name == "custom_vjp_call" else rule.jvp()
            if (reason := _first_unsupported(derivative, False)) is not None:
                return reason
    return None


def _inner(name: str, eqn: JaxprEqn) -> list[Any]:
    """The jaxprs an equation runs."""
    if name in CALLS or name in _CUSTOM or name in _EXPANDED:
        return [_callee(eqn)]
    keys = {"cond": (), "scan": ("jaxpr",), "while": ("cond_jaxpr", "body_jaxpr")}.get(name, ())
    return [*(eqn.params["branches"] if name == "cond" else ()), *(eqn.params[k] for k in keys)]


def _misuse(name: str, eqn: JaxprEqn) -> str | None:
    """Why a use of a primitive on the list has no rule."""
    p = eqn.params
    if eqn.effects:
        return f"{name} with side effects"
    if name == "reshape" and p["dimensions"] is not None:
        return "reshape with dimensions"
    if name == "bitcast_convert_type" and _aval(eqn.invars[0]).shape != _aval(eqn.outvars[0]).shape:
        return "bitcast_convert_type between widths"
    if name == "dot_general" and _aval(eqn.outvars[0]).dtype == np.bool_:
        return "dot_general of bool"
    if name == "broadcast_in_dim" and len(eqn.invars) != 1:
        return "broadcast_in_dim with a dynamic shape"
    return None


def component_obstacle(
    jaxpr: Jaxpr | ClosedJaxpr, lane: Sequence[bool], *, differentiated: bool = True
) -> str | None:
    """None if the components lift can run this jaxpr, else the name of the first primitive (or the reason) why not."""
    reason = unsupported(jaxpr, lane, differentiated=differentiated)
    return reason or _obstacle(jaxpr, [False] * len(open_jaxpr(jaxpr)[0].invars), differentiated)[0]


def _obstacle(jaxpr: Any, known: Sequence[bool], differentiated: bool) -> tuple[str | None, list[bool]]:
    """The first obstacle, and which results are known while tracing, given which inputs are."""
    jaxpr, _ = open_jaxpr(jaxpr)
    env: dict[Any, bool] = dict.fromkeys(jaxpr.constvars, True)
    env.update(zip(jaxpr.invars, known, strict=True))
    for eqn in jaxpr.eqns:
        kinds = [env[a] if isinstance(a, Var) else True for a in eqn.invars]
        reason, outs = _equation_obstacle(_name(eqn), eqn, kinds, differentiated, jaxpr)
        if reason is not None:
            return reason, []
        env.update(zip(eqn.outvars, outs, strict=True))
    return None, [env[a] if isinstance(a, Var) else True for a in jaxpr.outvars]


def _equation_obstacle(
    name: str, eqn: JaxprEqn, known: list[bool], differentiated: bool, parent: Jaxpr
) -> tuple[str | None, list[bool]]:
    p, outs = eqn.params, [all(known)] * len(eqn.outvars)
    if name in CALLS or name in _EXPANDED:
        return _obstacle(_callee(eqn), known, differentiated)
    if name in _CUSTOM:
        reason, _ = _obstacle(_callee(eqn), known, differentiated)
        if reason is None and differentiated and not all(known):
            rule = _rule(eqn, parent)
            derivative = rule.vjp() if name == "custom_vjp_call" else rule.jvp()
            reason, _ = _obstacle(derivative, [False] * len(open_jaxpr(derivative)[0].invars), False)
        return reason, outs
    if name == "cond":
        for branch in p["branches"]:
            reason, _ = _obstacle(branch, known[1:], differentiated)
            if reason is not None:
                return reason, outs
    elif name == "scan":
        length, n = p["length"], scan_counts(p)
        if length * max(operation_count(p["jaxpr"]), 1) > _UNROLL:
            return f"scan of {length} steps", outs
        consts, carry, xs = known[: n[0]], known[n[0] : sum(n)], known[sum(n) :]
        while True:
            reason, results = _obstacle(p["jaxpr"], [*consts, *carry, *xs], differentiated)
            if reason is not None:
                return reason, outs
            new = [a and b for a, b in zip(carry, results, strict=False)]
            if new == carry:
                return None, [*carry, *results[n[1] :]]
            carry = new
    elif all(known):
        return None, outs
    elif name == "while" or name in _NOT_COMPONENTS:
        return name, outs
    else:
        first = {"gather": 1, "dynamic_slice": 1, "dynamic_update_slice": 2}.get(name, 1)
        indices = known[first:2] if name == "gather" or name in _SCATTER else known[first:]
        moves = name in _SCATTER or name in ("gather", "dynamic_slice", "dynamic_update_slice")
        if moves and not all(indices):
            return f"{name} at an index that depends on the inputs", outs
    return None, outs


# What tiles of threads can do: nothing that takes values apart or puts them together.
_TILED = (
    _ELEMENTWISE | frozenset(CALLS) | _CUSTOM | _names("broadcast_in_dim dot_general reduce_sum transpose")
)


def tile_obstacle(jaxpr: Jaxpr | ClosedJaxpr, lane: Sequence[bool]) -> str | None:
    """None if the tiles lift can run this jaxpr and pays, else why not: a shape that is no power of two, a primitive, a
    product of other than a shared matrix with a vector, or no product at all."""
    reason = unsupported(jaxpr, lane)
    if reason is not None:
        return reason
    try:
        products = _tile_products(jaxpr, lane)
    except _NoTiles as obstacle:
        return str(obstacle)
    return None if products else "no products with shared matrices"


class _NoTiles(Exception):
    pass


def _tile_products(jaxpr: Any, lane: Sequence[bool]) -> int:
    """The number of products. Raises _NoTiles."""
    jaxpr, _ = open_jaxpr(jaxpr)
    env: dict[Any, bool] = dict.fromkeys(jaxpr.constvars, False)
    env.update(zip(jaxpr.invars, lane, strict=True))
    count = 0
    for v in (*jaxpr.invars, *(out for eqn in jaxpr.eqns for out in eqn.outvars)):
        if any(size & (size - 1) or size == 0 for size in _aval(v).shape):
            raise _NoTiles(f"shape {_aval(v).shape} is not of powers of two")
    for eqn in jaxpr.eqns:
        name = _name(eqn)
        if name not in _TILED:
            raise _NoTiles(f"{name} has no rule on tiles")
        kinds = [env[a] if isinstance(a, Var) else False for a in eqn.invars]
        inner = _inner(name, eqn)
        if inner:
            count += sum(_tile_products(i, kinds) for i in inner)
        elif name == "dot_general":
            (lc, _), batch = eqn.params["dimension_numbers"]
            matrix, vector = eqn.invars[::-1] if kinds[0] else eqn.invars
            if (
                all(kinds) or not any(kinds) or any(batch) or len(lc) != 1
                or len(_aval(matrix).shape) != 2 or len(_aval(vector).shape) != 1
            ):  # fmt: skip
                raise _NoTiles("a product of other than a shared matrix with a vector")
            count += 1
        env.update(zip(eqn.outvars, [any(kinds)] * len(eqn.outvars), strict=True))
    return count


def products_of_lanes(jaxpr: Any, lane: Sequence[bool]) -> bool:
    """Whether a product in it has lanes in both factors: then lanes are a batch of products, not an axis of one."""
    jaxpr, _ = open_jaxpr(jaxpr)
    env: dict[Any, bool] = dict.fromkeys(jaxpr.constvars, False)
    env.update(zip(jaxpr.invars, lane, strict=True))
    for eqn in jaxpr.eqns:
        name = _name(eqn)
        kinds = [env.get(a, False) if isinstance(a, Var) else False for a in eqn.invars]
        if name == "dot_general" and all(kinds):
            return True
        outs = _lanes_after(name, eqn, kinds)
        if any(
            products_of_lanes(i, k)
            for i, k in zip(_inner(name, eqn), _inner_lanes(name, eqn, kinds, outs), strict=True)
        ):
            return True
        env.update(zip(eqn.outvars, outs, strict=True))
    return False


def _inner_lanes(
    name: str, eqn: JaxprEqn, lanes: Sequence[bool], outs: Sequence[bool]
) -> list[Sequence[bool]]:
    """Which inputs of the jaxprs that an equation runs have lanes."""
    if name == "cond":
        return [lanes[1:]] * len(eqn.params["branches"])
    if name == "scan":
        n, m = scan_counts(eqn.params)
        return [[*lanes[:n], *outs[:m], *lanes[n + m :]]]
    if name == "while":
        n, m = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        return [[*lanes[:n], *outs], [*lanes[n : n + m], *outs]]
    return [lanes] * len(_inner(name, eqn))


def operation_count(jaxpr: Any) -> int:
    """Scalar operations of one evaluation.

    One per scalar that an elementwise primitive writes or a reduction reads; a product counts its multiply-adds; a scan
    counts its steps, a `while` loop one, a branch the longest; moving scalars about counts nothing.
    """
    jaxpr, _ = open_jaxpr(jaxpr)
    return sum(_operations(_name(eqn), eqn) for eqn in jaxpr.eqns)


def _operations(name: str, eqn: JaxprEqn) -> int:
    written = sum(math.prod(getattr(v.aval, "shape", ())) for v in eqn.outvars)
    first = math.prod(_aval(eqn.invars[0]).shape) if eqn.invars else 0
    if name in _FREE:
        return 0
    if name == "cond":
        return max(map(operation_count, eqn.params["branches"]))
    if name == "scan":
        return eqn.params["length"] * operation_count(eqn.params["jaxpr"])
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return written * math.prod(_aval(eqn.invars[0]).shape[i] for i in contracted)
    if name == "polynomial":
        return written * 2 * (len(eqn.invars) - 2)
    if name in ("sort", "top_k"):
        return first * max(first.bit_length(), 1)
    if name in _SCATTER:
        return math.prod(_aval(eqn.invars[2]).shape)
    if name in _BY_INPUT:
        return first
    inner = _inner(name, eqn)
    return sum(map(operation_count, inner)) if inner else written
