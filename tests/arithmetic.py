"""The least arithmetic of an attempt with adaptive steps, counted from the method's tableau and the field's jaxpr.

One instruction each: an addition, product, fused multiply-add, maximum, comparison, selection, reciprocal, logarithm to base
2 or exponential to base 2. Signs and absolute values cost nothing (they are modifiers of operands), nor does anything moved,
converted or loaded. What is counted is the algorithm of `stepper.py` and `stepsize.py` for the final state, without the
guards for states that are not finite, and without what rounding or a compiler adds.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from jax.extend.core import Jaxpr, Literal

from pykernels.kernels.stepper import Solve
from pykernels.lanes import open_jaxpr

# A correctly rounded quotient: a reciprocal, a Newton step on it (2), the product, its remainder, the correction
# (Markstein, IBM Journal of Research and Development 34, 1990). The check for operands that this cannot do is not counted.
DIVISION = 6
# x^p as exp2(p log2 x).
POWER = 3

_FREE = frozenset(
    {
        "neg",
        "abs",
        "slice",
        "squeeze",
        "reshape",
        "concatenate",
        "stack",
        "broadcast_in_dim",
        "convert_element_type",
    }
)


def field_operations(jaxpr: Any) -> int:
    """Operations of a field of elementwise arithmetic on scalars; a product that is only added to something is free."""
    inner, _ = open_jaxpr(jaxpr)
    return _operations(inner)


def _operations(jaxpr: Jaxpr) -> int:
    uses = Counter(v for eqn in jaxpr.eqns for v in eqn.invars if not isinstance(v, Literal))
    products: set[Any] = set()
    total = 0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name in ("jit", "pjit", "closed_call"):
            total += field_operations(eqn.params["jaxpr"])
            continue
        if name in _FREE:
            continue
        total += DIVISION if name == "div" else 1
        if name == "mul":
            products.add(eqn.outvars[0])
        elif name in ("add", "sub") and any(
            not isinstance(v, Literal) and v in products and uses[v] == 1 for v in eqn.invars
        ):
            total -= 1  # one of the products is part of a fused multiply-add
    return total


def least(solve: Solve) -> dict[str, int]:
    """Instructions of one attempt, part by part. For a method with an embedded error and a controller without memory."""
    method, n = solve.method, solve.field.elements
    assert method.error is not None and solve.step.memory == 0 and solve.saves is None
    carried = method.fsal and n > 0
    field = field_operations(solve.field.jaxpr)
    new_stages = method.stages - carried
    rows = [sum(a != 0 for a in row) for row in method.a]
    if not method.fsal:
        rows.append(sum(b != 0 for b in method.b))
    errors = sum(e != 0 for e in method.error)
    return {
        # A product, fused multiply-adds, and one with h and y; or with the weights multiplied by h, if that is less.
        "stages": min(sum(r + 1 for r in rows) * n, sum(r * n + r for r in rows)),
        "field": new_stages * field,
        "error": (errors + 1) * n,
        # |y| or |y1|, times rtol plus atol; the quotient; squares and their sum; its mean.
        "norm": (2 + DIVISION + 1) * n + 1,
        # The power, safety, two limits (others if the attempt was rejected), the next step.
        "controller": POWER + 1 + 4 + 1,
        # The test; the state, a carried stage, and time with its correction.
        "acceptance": 1 + n + n * carried + 2,
        # What remains; whether the step ends there; its sign; a compensated sum; the end exactly.
        "time": 2 + 2 + 2 + 7 + 2,
        # Whether the step is too small; why the trajectory ends; attempts, accepted ones; the loop.
        "bookkeeping": 3 + 3 + 2 + 2,
    }
