"""Explicit Runge-Kutta methods as data: frozen, hashable, self-checking Butcher tableaus.

A method is one constant: its tableau says how to step, how to estimate the error of a step and how to
interpolate inside it. Everything else that a solver needs (stage count, FSAL, the order used by the step
size controller) is derived. Coefficients are Python floats (nearest float64), never arrays, so that a kernel
body can close over them and a tableau can be a static argument of `jax.jit`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, Self

# Relative to the sum of the magnitudes of the terms added. The methods below leave at most 1e-16, their
# interpolants 9e-15 (vern7), 5e-15 (dopri8) and 1e-16 (all others).
_TOLERANCE = 1e-13

_Row = tuple[float, ...]


@dataclass(frozen=True, kw_only=True, repr=False)
class ButcherTableau:
    """An explicit Runge-Kutta method for `dy/dt = f(t, y)`, with its embedded error and its interpolant.

    One step of size `h` from `(t, y)` evaluates the stages

        k_0 = f(t, y),    k_i = f(t + c[i] h, y + h * sum_{j<i} a[i-1][j] k_j),    0 < i < stages

    and gives `y1 = y + h * sum_i b[i] k_i`, the error estimate `h * sum_i error[i] k_i`, and, with the stages
    of `dense_a` appended to the list, `Y(t + theta h) = y + h * sum_i b_i(theta) k_i` for `0 <= theta <= 1`,
    where `b_i(theta) = sum_m dense[i][m] theta^(m+1)`.

    Equality and hash are by value. Numbers of any real type are accepted and stored as floats in tuples.

    **Fields** (keyword only)

    - `name`: what `repr` shows.
    - `order`: order of the propagated solution `y1`; its local error is O(h^(order+1)).
    - `c`: abscissae, length `stages`, `c[0] == 0`.
    - `a`: the strictly lower triangle, `stages - 1` rows; row `i` is that of stage `i + 1`, `i + 1` entries.
    - `b`: weights, length `stages`.
    - `error`: `b` minus the embedded weights, length `stages`; `None` if the method has no embedded error.
    - `dense`: one row per stage, the extra ones last; entry `m` is the coefficient of `theta^(m+1)`.
    - `dense_order`: the local error of the interpolant is O(h^(dense_order+1)) uniformly in theta.
    - `dense_a`: rows of the extra stages that only the interpolant needs; row `j` has `stages + j` entries.
      A row equal to `b` is `f(t + h, y1)`: after an accepted step, the next step's first stage.
    - `dense_c`: abscissae of the extra stages.

    **Raises** `ValueError` if the shapes do not fit together, a number is not finite, a row of `a` does not
    add up to its abscissa, the error weights do not add up to 0, the weights or the interpolant miss a
    quadrature condition `sum_i b_i(theta) c_i^(k-1) = theta^k / k` of their order, or the interpolant does
    not end at `y1`. A single misprint breaks one of these; the other order conditions are left to the tests.
    """

    name: str
    order: int
    c: _Row
    a: tuple[_Row, ...]
    b: _Row
    error: _Row | None
    dense: tuple[_Row, ...]
    dense_order: int
    dense_a: tuple[_Row, ...] = ()
    dense_c: _Row = ()

    def __post_init__(self) -> None:
        def store(field: str, value: Any) -> None:
            object.__setattr__(self, field, value)

        for field in ("c", "b", "dense_c"):
            store(field, _floats(getattr(self, field)))
        for field in ("a", "dense", "dense_a"):
            store(field, tuple(_floats(row) for row in getattr(self, field)))
        if self.error is not None:
            store("error", _floats(self.error))
        self._check_shapes()
        self._check_values()

    @classmethod
    def with_hermite(
        cls,
        *,
        name: str,
        order: int,
        c: Sequence[float],
        a: Sequence[Sequence[float]],
        b: Sequence[float],
        error: Sequence[float] | None,
    ) -> Self:
        """A method without an interpolant of its own: cubic Hermite through both ends of the step.

        The cubic with the values `y`, `y1` and the slopes `k_0`, `f(t + h, y1)` is

            Y = y + h [(theta - 2 theta^2 + theta^3) k_0 + (3 theta^2 - 2 theta^3) sum_i b_i k_i
                       + (theta^3 - theta^2) f(t + h, y1)].

        The last slope is the last stage if the method is FSAL, else one extra stage whose row is `b`. The
        interpolant's order is `min(order, 3)`.
        """
        c, b = _floats(c), _floats(b)
        rows = tuple(_floats(row) for row in a)
        fsal = _is_fsal(c, rows, b)
        dense = [[0.0, 3 * weight, -2 * weight] for weight in (b if fsal else (*b, 0.0))]
        for stage, slope in ((0, (1.0, -2.0, 1.0)), (-1, (0.0, -1.0, 1.0))):
            dense[stage] = [x + y for x, y in zip(dense[stage], slope, strict=True)]
        return cls(
            name=name,
            order=order,
            c=c,
            a=rows,
            b=b,
            error=None if error is None else _floats(error),
            dense=tuple(tuple(row) for row in dense),
            dense_order=min(order, 3),
            dense_a=() if fsal else (b,),
            dense_c=() if fsal else (1.0,),
        )

    @property
    def stages(self) -> int:
        """Stages of a step, without the interpolant's extra ones (there are `len(dense_a)` of those)."""
        return len(self.b)

    @property
    def fsal(self) -> bool:
        """First same as last: the last stage is `f(t + h, y1)`, the first stage of the next step."""
        return _is_fsal(self.c, self.a, self.b)

    @property
    def error_order(self) -> int:
        """The order of the error estimate that a step size controller divides its exponents by.

        The estimate is the difference of two solutions of orders `order` and `order - 1` (so it is for every
        embedded method here), hence O(h^order). `order` for a method with `error=None` too, as in diffrax.
        """
        return self.order

    def __repr__(self) -> str:
        return self.name

    @cached_property
    def _hash(self) -> int:
        # Numbers only: their hashes are the same in every process, so that a copy unpickled elsewhere, which
        # brings this cached value along, still hashes as its equals do. Those of strings and None are not.
        return hash((self.order, self.c, self.a, self.b, self.dense))

    def __hash__(self) -> int:
        return self._hash

    def _require(self, condition: bool, message: str) -> None:
        if not condition:
            raise ValueError(f"tableau {self.name!r}: {message}")

    def _require_sum(self, terms: Iterable[float], target: float, message: str) -> None:
        terms = tuple(terms)
        scale = math.fsum(abs(term) for term in (*terms, target, 1.0))
        value = math.fsum(terms)
        self._require(abs(value - target) <= _TOLERANCE * scale, f"{message}: {value!r} is not {target!r}")

    def _check_shapes(self) -> None:
        stages, extra = len(self.b), len(self.dense_a)
        degree = len(self.dense[0]) if self.dense else 0
        self._require(stages > 0, "b is empty")
        self._require(self.order >= 1, f"order is {self.order}, must be at least 1")
        self._require(len(self.c) == stages, f"c has {len(self.c)} entries for {stages} stages")
        self._require(
            [len(row) for row in self.a] == list(range(1, stages)),
            f"the rows of a must have 1, 2, ..., {stages - 1} entries",
        )
        self._require(
            self.error is None or len(self.error) == stages,
            f"error has {len(self.error or ())} entries for {stages} stages",
        )
        self._require(
            [len(row) for row in self.dense_a] == list(range(stages, stages + extra)),
            f"the rows of dense_a must have {stages}, {stages + 1}, ... entries",
        )
        self._require(
            len(self.dense_c) == extra, f"dense_c has {len(self.dense_c)} entries for {extra} rows of dense_a"
        )
        self._require(
            len(self.dense) == stages + extra,
            f"dense has {len(self.dense)} rows for {stages} stages and {extra} extra ones",
        )
        self._require(all(len(row) == degree for row in self.dense), "the rows of dense differ in length")
        self._require(
            1 <= self.dense_order <= degree,
            f"dense_order is {self.dense_order}, must be between 1 and the degree of dense, {degree}",
        )

    def _check_values(self) -> None:
        rows = (self.c, self.b, self.dense_c, self.error or (), *self.a, *self.dense, *self.dense_a)
        self._require(all(math.isfinite(x) for row in rows for x in row), "a coefficient is not finite")

        self._require(self.c[0] == 0, f"c[0] is {self.c[0]!r}, must be 0")
        for i, row in enumerate(self.a):
            self._require_sum(row, self.c[i + 1], f"row {i} of a must add up to c[{i + 1}]")
        for j, row in enumerate(self.dense_a):
            self._require_sum(row, self.dense_c[j], f"row {j} of dense_a must add up to dense_c[{j}]")
        if self.error is not None:
            self._require_sum(self.error, 0.0, "error must add up to 0")

        for k in range(1, self.order + 1):
            self._require_sum(
                (w * x ** (k - 1) for w, x in zip(self.b, self.c, strict=True)),
                1 / k,
                f"order {self.order} asks that b integrates theta^{k - 1}",
            )
        nodes = self.c + self.dense_c
        for k in range(1, self.dense_order + 1):
            for m, column in enumerate(zip(*self.dense, strict=True), start=1):
                self._require_sum(
                    (w * x ** (k - 1) for w, x in zip(column, nodes, strict=True)),
                    1 / k if m == k else 0.0,
                    f"dense_order {self.dense_order} asks that dense integrates theta^{k - 1}, at theta^{m}",
                )
        for i, (row, weight) in enumerate(zip(self.dense, self.b + (0.0,) * len(self.dense_a), strict=True)):
            self._require_sum(row, weight, f"dense at theta = 1 must equal b, row {i}")


def _is_fsal(c: _Row, a: tuple[_Row, ...], b: _Row) -> bool:
    return bool(a) and b[-1] == 0 and a[-1] == b[:-1] and c[-1] == 1


def _floats(numbers: Iterable[Any]) -> _Row:
    return tuple(float(x) for x in numbers)


def _row(text: str) -> _Row:
    """Decimals or ratios separated by blanks, each rounded once to float64."""
    return tuple(float(Fraction(word)) for word in text.split())


def _rows(text: str) -> tuple[_Row, ...]:
    """Rows separated by semicolons, which may span lines."""
    return tuple(_row(row) for row in text.split(";"))


def _difference(b: _Row, b_hat: _Row) -> _Row:
    return tuple(x - y for x, y in zip(b, b_hat, strict=True))


def _quartic(b: _Row, b_mid: _Row) -> tuple[_Row, ...]:
    """The quartic through `y`, `y_mid`, `y1` whose end slopes are the first and the last (FSAL) stage.

    `b_mid` are the weights of `y_mid = y + h * sum_i b_mid[i] k_i` at theta = 1/2.
    """
    rows = [
        [0.0, 16 * mid - 5 * end, 14 * end - 32 * mid, 16 * mid - 8 * end]
        for end, mid in zip(b, b_mid, strict=True)
    ]
    for stage, slope in ((0, (1.0, -4.0, 5.0, -2.0)), (-1, (0.0, 1.0, -3.0, 2.0))):
        rows[stage] = [x + y for x, y in zip(rows[stage], slope, strict=True)]
    return tuple(tuple(row) for row in rows)


#: Euler's method, order 1, no embedded error. Interpolant: the straight line.
euler = ButcherTableau(name="euler", order=1, c=(0,), a=(), b=(1,), error=None, dense=((1,),), dense_order=1)

#: The explicit midpoint rule, order 2(1), with Euler's method embedded. Interpolant: cubic Hermite, order 2.
midpoint = ButcherTableau.with_hermite(
    name="midpoint", order=2, c=(0, 1 / 2), a=((1 / 2,),), b=(0, 1), error=(1, -1)
)

#: Heun's second-order method (the explicit trapezoidal rule), 2(1), with Euler's method embedded.
#: Interpolant: cubic Hermite, order 2.
heun = ButcherTableau.with_hermite(
    name="heun", order=2, c=(0, 1), a=((1,),), b=(1 / 2, 1 / 2), error=(1 / 2, -1 / 2)
)

#: Ralston's second-order method of least truncation error (Ralston, "Runge-Kutta methods with minimum error
#: bounds", Math. Comp. 16, 1962), 2(1), with Euler's method embedded. Interpolant: cubic Hermite, order 2.
ralston = ButcherTableau.with_hermite(
    name="ralston", order=2, c=(0, 2 / 3), a=((2 / 3,),), b=(1 / 4, 3 / 4), error=(3 / 4, -3 / 4)
)

#: Bogacki and Shampine's 3(2) pair, FSAL ("A 3(2) pair of Runge-Kutta formulas", Appl. Math. Lett. 2, 1989).
#: Interpolant: cubic Hermite, order 3.
bosh3 = ButcherTableau.with_hermite(
    name="bosh3",
    order=3,
    c=_row("0 1/2 3/4 1"),
    a=_rows("1/2; 0 3/4; 2/9 1/3 4/9"),
    b=_row("2/9 1/3 4/9 0"),
    error=_difference(_row("2/9 1/3 4/9 0"), _row("7/24 1/4 1/3 1/8")),
)

#: The classical fourth-order method (Kutta, Z. Math. Phys. 46, 1901), no embedded error.
#: Interpolant: cubic Hermite, order 3.
rk4 = ButcherTableau.with_hermite(
    name="rk4",
    order=4,
    c=_row("0 1/2 1/2 1"),
    a=_rows("1/2; 0 1/2; 0 0 1"),
    b=_row("1/6 1/3 1/3 1/6"),
    error=None,
)

_TSIT5_B = _row("""
    0.096460766818065229518167 0.01 0.47988965041449957478
    1.3790085741037418932 -3.2900695154360806799 2.3247105240997739824 0
""")

#: Tsitouras' 5(4) pair, FSAL ("Runge-Kutta pairs of order 5(4) satisfying only the first column simplifying
#: assumption", Comput. Math. Appl. 62, 2011). Interpolant: his own quartic, order 4, multiplied out.
tsit5 = ButcherTableau(
    name="tsit5",
    order=5,
    c=_row("0 0.161 0.327 0.9 0.98002554090450971030 1 1"),
    a=(
        *_rows("""
            0.161;
            -0.0084806554923569885444 0.33548065549235698854;
            2.8971530571054934321 -6.3594484899750748431 4.3622954328695814110;
            5.3258648284392566044 -11.748883564062827878 7.4955393428898362083 -0.092495066361755249257;
            5.8614554429464200287 -12.920969317847109292 8.1593678985761586432 -0.071584973281400997225
            -0.028269050394068382909
        """),
        _TSIT5_B[:-1],
    ),
    b=_TSIT5_B,
    error=_difference(
        _TSIT5_B,
        _row("""
            0.094680755765839458075 0.0091835655403432530968 0.48777052842476157079
            1.2342975669304789857 -2.7077123499835254549 1.8666284181705870358 1/66
        """),
    ),
    dense=_rows("""
        1 -2.763706197274826 2.9132554618219126 -1.0530884977290216;
        0 0.1317 -0.2234 0.1017;
        0 3.9302962368947516 -5.941033872131505 2.490627285651253;
        0 -12.411077166933676 30.33818863028232 -16.548102889244902;
        0 37.50931341651104 -88.1789048947664 47.37952196281928;
        0 -27.896526289197286 65.09189467479366 -34.87065786149661;
        0 1.5 -4 2.5
    """),
    dense_order=4,
)

_DOPRI5_B = _row("35/384 0 500/1113 125/192 -2187/6784 11/84 0")

#: Dormand and Prince's 5(4) pair, FSAL ("A family of embedded Runge-Kutta formulae", J. Comput. Appl. Math.
#: 6, 1980), embedded weights of Shampine ("Some practical Runge-Kutta formulas", Math. Comp. 46, 1986).
#: Interpolant: the quartic through Shampine's midpoint, order 4.
dopri5 = ButcherTableau(
    name="dopri5",
    order=5,
    c=_row("0 1/5 3/10 4/5 8/9 1 1"),
    a=(
        *_rows("""
            1/5;
            3/40 9/40;
            44/45 -56/15 32/9;
            19372/6561 -25360/2187 64448/6561 -212/729;
            9017/3168 -355/33 46732/5247 49/176 -5103/18656
        """),
        _DOPRI5_B[:-1],
    ),
    b=_DOPRI5_B,
    error=_difference(_DOPRI5_B, _row("1951/21600 0 22642/50085 451/720 -12231/42400 649/6300 1/60")),
    dense=_quartic(
        _DOPRI5_B,
        _row("""
            6025192743/60171106304 0 51252292925/130801643196 -2691868925/90256659456
            187940372067/3189068634112 -1776094331/39487288512 11237099/470086768
        """),
    ),
    dense_order=4,
)

_DOPRI8_B = _row("""
    14005451/335480064 0 0 0 0 -59238493/1068277825 181606767/758867731 561292985/797845732
    -1041891430/1371343529 760417239/1151165299 118820643/751138087 -528747749/2220607170 1/4 0
""")

#: Prince and Dormand's 8(7) pair ("High order embedded Runge-Kutta formulae", J. Comput. Appl. Math. 7, 1981)
#: with a 14th stage f(t + h, y1), which makes it FSAL. Interpolant: that of Bogacki and Shampine
#: ("Interpolating high-order Runge-Kutta formulas", Comput. Math. Appl. 20, 1990), of degree 6. It satisfies
#: all conditions of order 5 and misses those of order 6 by at most about 1e-5: order 5 with a small constant.
dopri8 = ButcherTableau(
    name="dopri8",
    order=8,
    c=_row("""
        0 1/18 1/12 1/8 5/16 3/8 59/400 93/200 5490023248/9719169821 13/20 1201146811/1299019798 1 1 1
    """),
    a=(
        *_rows("""
            1/18;
            1/48 1/16;
            1/32 0 3/32;
            5/16 0 -75/64 75/64;
            3/80 0 0 3/16 3/20;
            29443841/614563906 0 0 77736538/692538347 -28693883/1125000000 23124283/1800000000;
            16016141/946692911 0 0 61564180/158732637 22789713/633445777 545815736/2771057229
            -180193667/1043307555;
            39632708/573591083 0 0 -433636366/683701615 -421739975/2616292301 100302831/723423059
            790204164/839813087 800635310/3783071287;
            246121993/1340847787 0 0 -37695042795/15268766246 -309121744/1061227803 -12992083/490766935
            6005943493/2108947869 393006217/1396673457 123872331/1001029789;
            -1028468189/846180014 0 0 8478235783/508512852 1311729495/1432422823 -10304129995/1701304382
            -48777925059/3047939560 15336726248/1032824649 -45442868181/3398467696 3065993473/597172653;
            185892177/718116043 0 0 -3185094517/667107341 -477755414/1098053517 -703635378/230739211
            5731566787/1027545527 5232866602/850066563 -4093664535/808688257 3962137247/1805957418
            65686358/487910083;
            403863854/491063109 0 0 -5068492393/434740067 -411421997/543043805 652783627/914296604
            11173962825/925320556 -13158990841/6184727034 3936647629/1978049680 -160528059/685178525
            248638103/1413531060 0
        """),
        _DOPRI8_B[:-1],
    ),
    b=_DOPRI8_B,
    error=_difference(
        _DOPRI8_B,
        _row("""
            13451932/455176623 0 0 0 0 -808719846/976000145 1757004468/5645159321 656045339/265891186
            -3867574721/1518517206 465885868/322736535 53011238/667516719 2/45 0 0
        """),
    ),
    dense=_rows("""
        1 -6.6910181737837595697 19.9990069333683970610 -30.0610568289666450593
        22.1396504998094068976 -6.3448349392860401388;
        0 0 0 0 0 0;
        0 0 0 0 0 0;
        0 0 0 0 0 0;
        0 0 0 0 0 0;
        0 -7.6142658045872677172 52.2273532792945524050 -121.4999627731334642623
        116.4422149550342161651 -39.6107919852202505218;
        0 10.7281392630428866124 -46.8919164181093621583 83.1721004639847717481
        -67.1451318825957197185 20.3761213808791436958;
        0 0.5526637063753648783 -0.1890893225010595467 9.5724507555993664382
        -16.5672243527496524646 7.3347098826795362023;
        0 4.2186562625665153803 -35.7075975946222072821 87.8406057677205645007
        -89.9916014847245016028 32.8801774352459155182;
        0 -0.6627209125361597559 6.2736448083240352160 -17.4152107770762969005
        22.6237489648532849093 -10.1588990526426760954;
        0 -1.2636789001135462218 10.3160881272450748458 -28.5903289514790976966
        32.2362340167355370113 -12.5401268098782561200;
        0 5.4106037898590422230 -34.7650769866611817349 81.6630950584341412934
        -82.1020315488359848644 29.5553001484516038033;
        0 -7.0321379067945741781 47.7457971078225540396 -114.9375291377009418170
        116.2662185791119533462 -41.7923486424390588923;
        0 2.3537586759714983486 -19.0082099341608028453 50.2558364226176017553
        -53.9020777466385396792 20.3006925822100825485
    """),
    dense_order=5,
)

_VERN7_B = _row("""
    0.04715561848627222170431765108838175679569 0 0 0.2575056429843415189596436101037687580986
    0.2621665397741262047713863095764527711129 0.1521609265673855740323133199165117535523
    0.4939969170032484246907175893227876844296 -0.2943031171403250441557244744092703429139
    0.08131747232495109999734599440136761892478 0
""")

#: Verner's "most efficient" 7(6) pair ("Numerically optimal Runge-Kutta pairs with interpolants", Numer.
#: Algorithms 53, 2010), 10 stages, not FSAL. Interpolant: his of degree 7 with 6 extra stages, the first of
#: them f(t + h, y1), corrected to be of order 7. The published numbers miss 12 of 48 conditions of order 7
#: by up to 3e-7: row 2 of `dense_a` and `dense` were solved for again, by Newton's method from the published
#: values, under all conditions up to order 7 with everything else kept: the other rows, stage order 6 of the
#: extra stages, C1 continuity. The solution is locally unique and moves `dense_a` by 1.2e-4. The polynomials
#: cancel from 1.2e3, so that b_i(theta) is good to 1e-13 in float64 and 1e-4 in float32.
vern7 = ButcherTableau(
    name="vern7",
    order=7,
    c=_row("""
        0 0.005 0.10888888888888888889 0.16333333333333333333 0.4555
        0.6095094489978381317087004421486024949638 0.884 0.925 1 1
    """),
    a=_rows("""
        0.005;
        -1.0767901234567901235 1.1856790123456790123;
        0.040833333333333333333 0 0.1225;
        0.63891392362557267805 0 -2.4556726382236568097 2.2722587145980841316;
        -2.6615773750187571311 0 10.804513886456137696 -8.3539146573961994120 0.82048759495665697914;
        6.0677414346967709927 0 -24.711273635911085797 20.427517930788893940 -1.9061579788166471506
        1.0061722492420680148;
        12.054670076253202995 0 -49.754784950468989328 41.142888638604676633 -4.4617601499740041856
        2.042334822239175 -0.09834843665406107;
        10.138146522881808 0 -42.6411360317175 35.76384003992257 -4.3480228403929075
        2.0098622683770357 0.3487490460338272 -0.27143900510483127;
        -45.030072034298677124 0 187.32724376545888408 -154.02882369350186906 18.564653063475362339
        -7.1418096792950788549 1.3088085781613786251 0 0
    """),
    b=_VERN7_B,
    error=_difference(
        _VERN7_B,
        _row("""
            0.04460860660634117628731817597479197781432 0 0 0.2671640378571372680509102260943837899738
            0.2201018300177293019979715776650753096323 0.2188431703143156830983120833512893824578
            0.2289871705411202883378173889763552365362 0 0 0.02029518466335628222767054793810430358554
        """),
    ),
    dense=_rows("""
        1 -8.411004540899803 33.66442209648738 -70.78659335743612
        80.64831399942253 -47.20942427858328 11.141441699495573;
        0 0 0 0 0 0 0;
        0 0 0 0 0 0 0;
        0 8.76996098732756 -88.52966115330736 346.99642623637675
        -629.2494004558637 529.580901380079 -167.31072135162802;
        0 8.928698802029581 -90.13206337254442 353.277121725745
        -640.6389237257631 539.1664075327398 -170.33907442243276;
        0 5.1821986281350725 -52.31246629732253 205.04132305841074
        -371.82552858719583 312.93108653374594 -98.864452409206;
        0 16.82422815996898 -169.83464582356245 665.6753723461491
        -1207.1473861859586 1015.9440762468973 -320.96764782649126;
        0 -10.023185612164143 101.18052146463677 -396.5821047498204
        719.168938862184 -605.2578430926154 191.2193700106389;
        0 2.7694579878906938 -27.9567010162023 109.57768521426051
        -198.71009471853702 167.23587022592284 -52.834900221009796;
        0 0 0 0 0 0 0;
        0 -2.173288105965699 22.033708202513978 -86.9245373077731
        159.22179840682253 -135.93837717055322 43.780695974955506;
        0 -4.967384379587532 23.1138294869249 -31.266993126740374
        -2.8414192016064805 31.865421733672143 -15.903454512662655;
        0 10.837916693444168 -50.430113577027775 68.21881313246698
        6.199452724859546 -69.52447400622975 34.69840503248683;
        0 -11.300437504801142 130.45355811401316 -488.19523285473247
        832.2563100411098 -665.2389664500693 202.02476865447983;
        0 -5.926459079395399 63.30788410530493 -265.47473125075453
        520.0971041530581 -467.3692555780953 155.36545764988222;
        0 -10.510702035982336 105.44172777008572 -409.5565490661521
        732.820834687468 -606.1854230769109 187.9901117214916
    """),
    dense_order=7,
    dense_a=(
        _VERN7_B,
        *_rows("""
            0.0523222769159969 0 0 0.22495861826705715 0.017443709248776376 -0.007669379876829393
            0.03435896044073285 -0.0410209723009395 0.025651133005205617 0 -0.0160443457;
            0.05304616176448354 0 0 0.1220050874253934 0.017859293465747616 -0.0006587118404823124
            0.008421831302895576 -0.012959598572602787 0.009396087514297737 0 -0.0053377867529564365
            -0.0667723643067736;
            0.03887903257436304 0 0 -0.0024403203308301317 -0.0013928917214672623 -0.00047446291558680135
            0.00039207932413159514 -0.00040554733285128004 0.00019897093147716726 0 -0.00010278198793179169
            0.03385661513870267 0.1814893063199928;
            0.05723681204690013 0 0 0.22265948066761182 0.12344864200186899 0.04006332526666491
            -0.05269894848581452 0.04765971214244523 -0.02138895885042213 0 0.015193891064036402
            0.12060546716289655 -0.022779423016187374 0;
            0.051372038802756814 0 0 0.5414214473439406 0.350399806692184 0.14193112269692182
            0.10527377478429423 -0.031081847805874016 -0.007401883149519145 0 -0.006377932504865363
            -0.17325495908361865 -0.18228156777622026 0 0
        """),
    ),
    dense_c=_row("1 0.29 0.125 0.25 0.53 0.79"),
)

#: Every method of this module, by increasing order.
METHODS = (euler, midpoint, heun, ralston, bosh3, rk4, tsit5, dopri5, vern7, dopri8)
