"""Values and gradients over streams: equal to the full batch for every split, whatever is in the rows that do not count."""

from __future__ import annotations

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pykernels as pk
from pykernels.stream import NonFiniteError, Shuffle, Terms, passes, value, value_and_grad

ROWS = 103
RNG = np.random.default_rng(0)
X = RNG.uniform(0.1, 4.0, ROWS)
Y = 2.5 * np.exp(-0.7 * X) + 0.1 * RNG.normal(size=ROWS)
P0 = {"scale": jnp.float64(1.5), "rate": jnp.float64(0.9)}
TRACES: list[str] = []


def decay(params, batch):
    TRACES.append("decay")
    x, y = batch
    return (params["scale"] * jnp.exp(-params["rate"] * x) - y) ** 2


def logarithms(params, batch):
    """Not finite where x is zero, as padding may be."""
    x, y = batch
    return (params["scale"] + params["rate"] * jnp.log(x) - y) ** 2


def full(terms, params, batch):
    return jax.value_and_grad(lambda p: jnp.mean(terms(p, batch)))(params)


def assert_same(found, expected, rtol=1e-12):
    """A sum of a hundred numbers, in whatever order: 1e-12 is the issue's bound, about 1e-15 is what comes out."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol)


@pytest.mark.parametrize(
    ("terms", "batch_size"), [*((decay, n) for n in (1, 7, 64, ROWS, ROWS + 3, None)), (logarithms, 64)]
)
def test_streamed_equals_full_batch(terms, batch_size):
    found = value_and_grad(terms, (X, Y), batch_size=batch_size)(P0)
    assert_same(found, full(terms, P0, (X, Y)))
    assert found[0].dtype == np.float64


@pytest.mark.parametrize(("chunk_bytes", "prefetch"), [(1, 0), (1000, 2), (1 << 20, 1)])
def test_chunks_do_not_matter(chunk_bytes, prefetch, monkeypatch):
    expected = value_and_grad(decay, (X, Y), batch_size=7)(P0)
    monkeypatch.setattr(passes, "CHUNK_BYTES", chunk_bytes)
    found = value_and_grad(decay, (X, Y), batch_size=7, prefetch=prefetch)(P0)
    assert jax.tree.leaves(jax.tree.map(np.array_equal, found, expected)) == [True] * 3  # to the bit


def test_order_does_not_matter():
    expected = full(decay, P0, (X, Y))
    for shuffle in (3, Shuffle(1, block=10, blocks=2)):
        assert_same(value_and_grad(decay, (X, Y), batch_size=7, shuffle=shuffle)(P0), expected)
    uneven = [(X[a:b], Y[a:b]) for a, b in [(0, 5), (5, 5), (5, 80), (80, ROWS)]]
    assert_same(value_and_grad(decay, uneven)(P0), expected)
    assert_same(value_and_grad(decay, lambda: iter(uneven), batch_size=16)(P0), expected)
    assert_same(value_and_grad(decay, (jnp.asarray(X), jnp.asarray(Y)), batch_size=16)(P0), expected)


def test_big_batches_are_evaluated_in_pieces():
    """20,000 rows of 16 bytes: pieces of 5,000 to 10,000; 19,997 is prime and stays whole."""
    x, y = np.resize(X, 20_000), np.resize(Y, 20_000)
    for rows in (20_000, 19_997):
        found = value_and_grad(decay, (x[:rows], y[:rows]), batch_size=rows, nan="mask")(P0)
        assert_same(found, full(decay, P0, (x[:rows], y[:rows])))
    x[11_000] = np.nan
    (_, counts), _ = value_and_grad(decay, (x, y), batch_size=20_000, nan="mask", has_counts=True)(P0)
    assert counts == (19_999, 0, 1, 0)


def test_gradient_against_central_differences_and_forward_mode():
    def loss(a, b):
        return float(jnp.mean(decay({"scale": a, "rate": b}, (X, Y))))

    a, b, h = 1.5, 0.9, 1e-5
    differences = {
        "scale": (loss(a + h, b) - loss(a - h, b)) / (2 * h),
        "rate": (loss(a, b + h) - loss(a, b - h)) / (2 * h),
    }
    reverse = value_and_grad(decay, (X, Y), batch_size=7)(P0)
    forward = value_and_grad(decay, (X, Y), batch_size=7, gradient="forward")(P0)
    streamed = value_and_grad(decay, (X, Y), batch_size=7, gradient="finite-difference")(P0)
    # Central differences with h = 1e-5 in float64: truncation 1e-10, rounding 1e-11.
    assert_same(reverse[1], {k: np.float64(v) for k, v in differences.items()}, rtol=1e-8)
    assert_same(forward, reverse)
    assert_same(streamed, reverse, rtol=1e-8)


def network(params, batch):
    x, y = batch["x"], batch["y"]
    hidden = jnp.tanh(x @ params["layers"][0] + params["bias"])
    return jnp.sum((hidden @ params["layers"][1] - y) ** 2, axis=1)


@pytest.mark.parametrize("gradient", ["reverse", "forward"])
def test_pytrees_of_parameters_matrices_of_x_and_vectors_of_y(gradient):
    params = {"layers": (RNG.normal(size=(3, 4)), RNG.normal(size=(4, 2))), "bias": np.zeros(4)}
    batch = {"x": RNG.normal(size=(ROWS, 3)), "y": RNG.normal(size=(ROWS, 2))}
    found = value_and_grad(network, batch, batch_size=10, gradient=gradient)(params)
    assert_same(found, full(network, jax.tree.map(jnp.asarray, params), batch), rtol=1e-11)


def test_weights():
    weight = RNG.uniform(0.5, 2.0, ROWS)

    def weighted(params, batch):
        x, y, w = batch
        return Terms(decay(params, (x, y)), w)

    def mean(p):
        return jnp.sum(weight * decay(p, (X, Y))) / np.sum(weight)

    assert_same(value_and_grad(weighted, (X, Y, weight), batch_size=7)(P0), jax.value_and_grad(mean)(P0))
    # A weight of zero takes a row out, whatever is in it, without a word.
    y, weight[5] = Y.copy(), 0.0
    y[5] = np.nan
    kept = np.arange(ROWS) != 5
    expected = value_and_grad(weighted, (X[kept], Y[kept], weight[kept]), batch_size=7)(P0)
    (found, counts), slope = value_and_grad(weighted, (X, y, weight), batch_size=7, has_counts=True)(P0)
    assert_same((found, slope), expected)
    assert counts.nonfinite == 0


@pytest.mark.parametrize("dtype", [np.float32, "bfloat16"])
def test_gradients_have_the_dtypes_of_the_parameters(dtype):
    params = jax.tree.map(lambda p: p.astype(dtype), P0)
    found, slope = value_and_grad(decay, (X.astype(dtype), Y.astype(dtype)), batch_size=7)(params)
    assert found.dtype == np.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(slope)} == {np.dtype(dtype)}
    expected = full(decay, P0, (X, Y))
    precision = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(found, expected[0], rtol=10 * precision)
    # The residuals cancel to a tenth of their terms: gradients lose a digit more.
    np.testing.assert_allclose(slope["rate"].astype(float), expected[1]["rate"], rtol=100 * precision)


def test_mixed_dtypes():
    params = {"scale": jnp.float32(1.5), "rate": jnp.float64(0.9)}

    def terms(p, batch):
        return decay({"scale": p["scale"].astype(float), "rate": p["rate"]}, batch)

    for gradient in ("reverse", "finite-difference"):
        found, slope = value_and_grad(terms, (X, Y), batch_size=7, gradient=gradient)(params)
        assert (found.dtype, slope["scale"].dtype, slope["rate"].dtype) == (float, np.float32, float)
        expected = full(decay, P0, (X, Y))
        np.testing.assert_allclose(
            slope["rate"], expected[1]["rate"], rtol=1e-3 if "fin" in gradient else 1e-12
        )


def shifted(params, x):
    return params + x


def test_compensated_sums_keep_what_plain_float32_loses():
    """A first term of 2^24 swallows all the ones behind it, a batch at a time, unless the errors are kept."""
    x = np.ones(4001, np.float32)
    x[0] = 2.0**24
    exact = (2.0**24 + 4000) / 4001
    zero = jnp.float32(0)
    plain = value_and_grad(shifted, x, batch_size=1, compensated=False)(zero)[0]
    kept = value_and_grad(shifted, x, batch_size=1)(zero)[0]
    assert abs(plain - exact) / exact > 1e-4
    np.testing.assert_allclose(kept, exact, rtol=2 * np.finfo(np.float32).eps)


NAN_AT = [3, 4, 50, ROWS - 1]


def test_rows_that_are_not_finite():
    terms = logarithms
    x, y = X.copy(), Y.copy()
    y[NAN_AT[:2]], x[NAN_AT[2]], y[NAN_AT[3]] = np.nan, np.nan, np.inf
    kept = np.setdiff1d(np.arange(ROWS), NAN_AT)
    make = functools.partial(value_and_grad, terms, (x, y), batch_size=10, has_counts=True)
    (found, counts), slope = make(nan="mask")(P0)
    assert counts == (ROWS - 4, 0, 4, 0)
    assert_same((found, slope), full(terms, P0, (X[kept], Y[kept])))
    (found, counts), slope = make(nan="skip")(P0)
    kept = np.setdiff1d(np.arange(ROWS), [*range(10), *range(50, 60), *range(100, ROWS)])
    assert counts == (len(kept), 0, 4, 3)
    assert_same((found, slope), full(terms, P0, (X[kept], Y[kept])))
    with pytest.raises(
        NonFiniteError, match=r"of batch 0 are not finite \(rows 0 to 10.*nan=\"mask\""
    ) as caught:
        make()(P0)
    assert caught.value.batch == 0


def roots(params, x):
    """Finite at zero, with a derivative that is not."""
    return jnp.sqrt(params * x)


def test_terms_with_an_infinite_derivative():
    x = np.array([1.0, 2.0, 0.0, 4.0])
    with pytest.raises(NonFiniteError, match="the gradient of batch 1 are not finite"):
        value_and_grad(roots, x, batch_size=2)(1.0)
    (found, counts), slope = value_and_grad(roots, x, batch_size=2, nan="mask", has_counts=True)(1.0)
    assert counts == (2, 0, 0, 1)
    assert_same((found, slope), full(roots, 1.0, x[:2]))


def test_nothing_is_left():
    with pytest.raises(ValueError, match="no row is left: 0 are masked, 103 are not finite"):
        value_and_grad(decay, (X, np.full(ROWS, np.nan)), nan="mask")(P0)
    with pytest.raises(ValueError, match="the source has no rows"):
        value_and_grad(decay, (X[:0], Y[:0]))(P0)
    with pytest.raises(ValueError, match="the source has no rows"):
        value_and_grad(decay, [])(P0)


def explosive(t, y, p):
    return p[0] * y + p[1] * y**2


def trajectories(params, batch):
    sols = pk.solve_ensemble(
        explosive, batch["y0"], 0.0, 1.0, params, save_at=batch["ts"], max_steps=64, throw=False
    )
    return jnp.mean((sols.ys - batch["ys"]) ** 2, axis=1)


def trajectories_ok(params, batch):
    sols = pk.solve_ensemble(
        explosive, batch["y0"], 0.0, 1.0, params, save_at=batch["ts"], max_steps=64, throw=False
    )
    return Terms(jnp.mean((sols.ys - batch["ys"]) ** 2, axis=1), ok=sols.ok)


def test_one_diverging_trajectory_changes_no_other_gradient():
    """y' = p y + q y^2 from y = 20 has a pole near t = 0.1."""
    count = 22
    data = {
        "y0": RNG.uniform(0.1, 0.5, count),
        "ts": np.sort(RNG.uniform(0, 1, (count, 4)), axis=1),
        "ys": RNG.uniform(0.1, 0.5, (count, 4)),
    }
    params = jnp.array([-0.5, 0.5])
    kept = np.arange(count) != 5
    healthy = {name: column[kept] for name, column in data.items()}
    expected = full(trajectories, params, healthy)
    data["y0"][5] = 20.0
    (found, counts), slope = value_and_grad(trajectories, data, batch_size=8, nan="mask", has_counts=True)(
        params
    )
    assert counts == (count - 1, 0, 1, 0)
    assert_same((found, slope), expected)
    # With the solver's own mask no policy is needed, and the counts say that it was the user's choice.
    (found, counts), slope = value_and_grad(trajectories_ok, data, batch_size=8, has_counts=True)(params)
    assert counts == (count - 1, 1, 0, 0)
    assert_same((found, slope), expected)


def make_power(power):
    def terms(params, x):
        TRACES.append(f"power {power}")
        return params * x**power

    return terms


class Model:
    def __init__(self, factor):
        self.factor = factor

    def first(self, params, x):
        TRACES.append("first")
        return self.factor * params * x

    def second(self, params, x):
        TRACES.append("second")
        return self.factor * params * x**2


def at_one(terms):
    return float(value_and_grad(terms, X, batch_size=10)(1.0)[1])


def test_one_trace_and_none_for_the_second_call():
    def terms(params, batch):
        return decay(params, batch)

    TRACES.clear()
    for size in (ROWS, 77):  # other tails, the same programs
        function = value_and_grad(terms, (X[:size], Y[:size]), batch_size=10)
        function(P0)
        function(P0)
    value_and_grad(terms, (X, Y), batch_size=10)(P0)
    value_and_grad(terms, [(X[:10], Y[:10]), (X[10:13], Y[10:13])])(P0)
    value(terms, (X, Y), P0, batch_size=10)
    value_and_grad(terms, (X, Y), batch_size=10, gradient="forward")(P0)
    assert len(TRACES) == 1
    value_and_grad(terms, (X, Y), batch_size=11)(P0)
    assert len(TRACES) == 2


def test_models_are_told_apart():
    TRACES.clear()
    square, cube = make_power(2), make_power(3)
    for terms, expected in ((square, np.mean(X**2)), (cube, np.mean(X**3))) * 2:
        np.testing.assert_allclose(at_one(terms), expected, rtol=1e-12)
    assert TRACES == ["power 2", "power 3"]
    one, other = Model(2.0), Model(3.0)
    for terms, expected in (
        (one.first, 2 * np.mean(X)),
        (other.first, 3 * np.mean(X)),
        (one.second, 2 * np.mean(X**2)),
        (jax.jit(square), np.mean(X**2)),
        (functools.partial(lambda n, p, x: p * x * n, 5.0), 5 * np.mean(X)),
    ):
        np.testing.assert_allclose(at_one(terms), expected, rtol=1e-12)
    TRACES.clear()
    assert at_one(one.first) == at_one(one.first) and TRACES == []
    one.factor = 4.0  # seen, although it is the same function
    np.testing.assert_allclose(at_one(one.first), 4 * np.mean(X), rtol=1e-12)


def test_a_closure_variable_bound_anew_is_seen():
    power = 2

    def terms(params, x):
        return params * x**power

    np.testing.assert_allclose(at_one(terms), np.mean(X**2), rtol=1e-12)
    power = 3
    np.testing.assert_allclose(at_one(terms), np.mean(X**3), rtol=1e-12)


def test_callables_that_are_no_keys_work():
    class Unhashable:
        __hash__ = None  # type: ignore[assignment]

        def __call__(self, params, x):
            return params * x

    np.testing.assert_allclose(at_one(Unhashable()), np.mean(X), rtol=1e-12)


def test_the_host_sends_chunks_and_reads_once(monkeypatch):
    """2,000 batches: one program call per chunk, none per batch, and one read of the counts."""
    calls, reads = [], []
    program, get = passes.sums_program, jax.device_get

    def spy(*args):
        run = program(*args)
        return lambda *call: calls.append(1) or run(*call)

    monkeypatch.setattr(passes, "sums_program", spy)
    monkeypatch.setattr(jax, "device_get", lambda tree: reads.append(1) or get(tree))
    x = np.ones(20_000)
    value_and_grad(shifted, x, batch_size=10)(1.0)
    assert len(calls) == 1 and len(reads) == 1


ERRORS = {
    "scalar_term": (lambda: value_and_grad(lambda p, x: jnp.sum(p * x), X)(1.0), TypeError, "one term per row"),
    "column": (lambda: value_and_grad(lambda p, x: (p * x)[:, None], X, batch_size=10)(1.0), TypeError, r"not \(10, 1\)"),
    "complex": (lambda: value_and_grad(lambda p, x: jax.lax.complex(p * x, x), X)(1.0), TypeError, "real"),
    "integers": (lambda: value_and_grad(shifted, X)(1), TypeError, "write 1.0, not 1"),
    "no_parameters": (lambda: value_and_grad(shifted, X)({}), ValueError, "no parameters"),
    "tracer": (lambda: jax.jit(value_and_grad(shifted, X))(1.0), TypeError, "inside of jit"),
    "batch_size": (lambda: value_and_grad(shifted, X, batch_size=0), ValueError, "batch_size must be"),
    "nan": (lambda: value_and_grad(shifted, X, nan="ignore"), ValueError, "nan must be"),
    "gradient": (lambda: value_and_grad(shifted, X, gradient="backward"), ValueError, "gradient must be"),
    "prefetch": (lambda: value_and_grad(shifted, X, prefetch=-1), ValueError, "prefetch must be"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        call()


def test_an_iterator_gives_one_gradient():
    function = value_and_grad(shifted, iter([X]))
    assert_same(function(1.0), full(shifted, 1.0, X))
    with pytest.raises(ValueError, match="read once"):
        function(1.0)


DEVICES = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
import pykernels as pk

rng = np.random.default_rng(0)
x = rng.uniform(0, 4, 103)
y = 2.5 * np.exp(-0.7 * x) + 0.01 * rng.normal(size=103)
y[5] = np.nan

def model(x, a, b):
    return a * jnp.exp(-b * x)

def terms(p, batch):
    return (model(batch[0], p[0], p[1]) - batch[1]) ** 2

def rate(t, y, p):
    return p[0] * y + p[1] * y**2

def solved(p, y0):
    sols = pk.solve_ensemble(rate, y0, 0.0, 1.0, p, throw=False, max_steps=64)
    return pk.stream.Terms(sols.ys**2, ok=sols.ok)

def run(**options):
    p = jnp.array([1.0, 1.0])
    starts = np.where(np.arange(30) == 7, 20.0, np.linspace(0.1, 0.4, 30))
    fit = pk.stream.fit(model, (x, y), p, batch_size=20, epochs=3, nan="mask", **options)
    return (
        pk.stream.value_and_grad(solved, starts, batch_size=16, has_counts=True, **options)(p),
        (fit.x, fit.fun, fit.counts),
        pk.stream.curve_fit(model, x, y, nan_policy="omit", batch_size=20, **options),
    )

def value_and_grad(**options):
    make = pk.stream.value_and_grad(terms, (x, y), batch_size=20, nan="mask", has_counts=True, **options)
    return make(jnp.array([1.0, 1.0]))

def same(one, many):
    assert jax.tree.structure(one) == jax.tree.structure(many)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many)):
        np.testing.assert_allclose(a, b, rtol=1e-10)

assert len(jax.devices()) == 8
rows = jax.make_mesh((8,), ("rows",))
grid = jax.make_mesh((2, 4), ("a", "b"))
one, gradient = run(), value_and_grad()
same(one, run(mesh=rows))
same(gradient, value_and_grad(mesh=grid))
with jax.set_mesh(rows):
    same(gradient, value_and_grad())
print(gradient[0][1], one[0][0][1])
"""


def test_eight_devices_equal_one():
    """Batches of 20 have 24 places on 8 devices; most devices have no row of the last one."""
    command = [sys.executable, "-W", "error", "-c", DEVICES]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "Counts(rows=102, masked=0, nonfinite=1, skipped=0) Counts(rows=29, masked=1, nonfinite=0, skipped=0)"
    ]
