"""Fits over streams: what they find, when they stop, and that a resumed one is the same to the bit."""

from __future__ import annotations

import importlib
import itertools
import os
import signal
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import optimize

from pykernels.stream import (
    Batches,
    Checkpoint,
    CheckpointError,
    CheckpointWarning,
    NonFiniteError,
    Shuffle,
    checkpoint,
    fit,
    minimize,
)

ROWS, BATCH = 100, 16
RNG = np.random.default_rng(0)
TRUE = np.array([2.5, 0.7])
SIGMA = 0.02
X = RNG.uniform(0.0, 4.0, ROWS)
Y = TRUE[0] * np.exp(-TRUE[1] * X) + SIGMA * RNG.normal(size=ROWS)
P0 = [1.0, 1.0]
ADAM = optax.adam(0.05)
TRACES: list[int] = []


def decay(x, a, b):
    TRACES.append(1)
    return a * jnp.exp(-b * x)


def exact(p):
    return float(np.mean((p[0] * np.exp(-p[1] * X) - Y) ** 2))


OPTIMUM, COVARIANCE = optimize.curve_fit(lambda x, a, b: a * np.exp(-b * x), X, Y, P0)


def fit_decay(data=(X, Y), p0=P0, **options):
    options = {"batch_size": BATCH, "optimizer": ADAM, "epochs": 3, **options}
    return fit(decay, data, p0, **options)


def by_hand(epochs):
    """The same fit without a stream."""
    p, state = jnp.array(P0), ADAM.init(jnp.array(P0))
    with jax.numpy_dtype_promotion("standard"):
        for _, start in itertools.product(range(epochs), range(0, ROWS, BATCH)):
            x, y = X[start : start + BATCH], Y[start : start + BATCH]
            slope = jax.grad(lambda p, x=x, y=y: jnp.mean((decay(x, *p) - y) ** 2))(p)
            changes, state = ADAM.update(slope, state)
            p = optax.apply_updates(p, changes)
    return p


def test_updates_are_those_of_a_loop_over_batches():
    result = fit_decay()
    np.testing.assert_allclose(result.x, by_hand(3), rtol=1e-12)
    np.testing.assert_allclose(result.fun, exact(result.x), rtol=1e-12)
    assert (result.success, result.status, result.nfev, result.nit) == (True, 0, 3, 3 * 7)
    assert result.counts == (ROWS, 0, 0, 0) and result.jac is None
    assert result["x"] is result.x and "history" in list(result.keys())
    assert [e.epoch for e in result.history] == [0, 1, 2]


def test_one_trace_per_fit_and_none_for_the_second():
    TRACES.clear()
    fit_decay(batch_size=13)
    assert len(TRACES) == 1
    fit_decay(batch_size=13, optimizer=optax.adam(0.05))  # made anew, the same
    assert len(TRACES) == 1
    fit_decay(batch_size=13, evaluate="epochs")
    fit_decay(batch_size=13, optimizer=optax.adam(0.01), evaluate="never")
    fit_decay(batch_size=13, updates="pass", optimizer=None)
    assert len(TRACES) == 1


def test_recovered_parameters_are_within_three_sigma():
    result = fit_decay(
        epochs=150,
        optimizer=optax.adam(optax.cosine_decay_schedule(0.1, 150 * 7)),
        shuffle=Shuffle(0, block=8, blocks=4),
    )
    error = np.sqrt(np.diag(COVARIANCE))
    assert np.all(np.abs(result.x - TRUE) < 3 * error)


def test_full_passes_with_lbfgs_reach_the_optimum():
    result = fit_decay(updates="pass", optimizer=None, epochs=60)
    np.testing.assert_allclose(result.x, OPTIMUM, rtol=1e-6)  # SciPy's own tolerance is 1e-8 of the cost
    assert (result.success, result.status) == (True, 1) and result.nit <= result.nfev < 60
    np.testing.assert_allclose(result.fun, exact(result.x), rtol=1e-12)
    assert np.max(np.abs(result.jac)) < 1e-6
    losses = [e.loss for e in result.history]
    assert result.fun == min(losses) and result.best_epoch == int(np.argmin(losses))
    with pytest.raises(ValueError, match=r"write optax.lbfgs\(linesearch=None\)"):
        fit_decay(updates="pass", optimizer=optax.lbfgs())


def test_full_passes_with_any_optimizer():
    result = fit_decay(updates="pass", optimizer=optax.sgd(0.2), epochs=3)
    p = jnp.array(P0)
    for _ in range(2):
        p -= 0.2 * jax.grad(lambda p: jnp.mean((decay(X, *p) - Y) ** 2))(p)
    np.testing.assert_allclose(result.x, p, rtol=1e-12)  # the third pass evaluated the second update


def test_a_step_too_far_is_taken_back():
    """A model that is not finite beyond 2.95; the first step of L-BFGS has length one."""

    def terms(p, x):
        return jnp.where(p > 2.95, jnp.nan, (p - 2.9) ** 2) + 0 * x

    result = minimize(terms, np.ones(5), 2.5, updates="pass", epochs=40)
    np.testing.assert_allclose(result.x, 2.9, rtol=1e-7)
    assert any(np.isinf(e.loss) for e in result.history)


@pytest.mark.parametrize("updates", ["batch", "pass"])
def test_pytrees_vector_y_and_weights(updates):
    x, y = RNG.normal(size=(ROWS, 2)), RNG.normal(size=(ROWS, 3))
    weights = RNG.uniform(0.5, 1.5, ROWS)

    def linear(x, p):
        return x @ p["matrix"] + p["shift"]

    p0 = {"matrix": jnp.zeros((2, 3)), "shift": jnp.zeros(3)}
    source = {"x": x, "y": y, "weights": weights}
    options = {} if updates == "pass" else {"optimizer": optax.sgd(0.3)}
    result = fit(linear, source, p0, updates=updates, epochs=60, batch_size=ROWS, **options)
    design = np.concatenate([x, np.ones((ROWS, 1))], axis=1) * np.sqrt(weights)[:, None]
    solution = np.linalg.lstsq(design, y * np.sqrt(weights)[:, None], rcond=None)[0]
    np.testing.assert_allclose(result.x["matrix"], solution[:2], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(result.x["shift"], solution[2], rtol=1e-6, atol=1e-6)


def test_robust_losses_withstand_outliers():
    y = Y.copy()
    y[::10] += 5.0
    plain = fit_decay((X, y), updates="pass", optimizer=None, epochs=60)
    robust = fit_decay((X, y), updates="pass", optimizer=None, epochs=60, loss="soft_l1", f_scale=0.05)
    assert np.max(np.abs(robust.x - TRUE)) < 0.05 < np.max(np.abs(plain.x - TRUE))
    with pytest.raises(ValueError, match="loss must be one of 'linear', 'soft_l1'"):
        fit_decay(loss="l1")


def test_validation_patience_and_best_parameters():
    """Validation data from parameters that lie on the way to the training data's: the best epoch is not the last."""
    held_out = (X[:20], 1.5 * np.exp(-0.9 * X[:20]))
    result = fit_decay(validation=held_out, patience=3, epochs=200, batch_size=10, optimizer=optax.adam(0.03))
    losses = [e.loss for e in result.history]
    best = int(np.argmin(losses))
    assert (result.status, result.best_epoch, len(losses)) == (2, best, best + 4) and len(losses) < 200
    assert result.fun == losses[best]
    held = np.mean((result.x[0] * np.exp(-result.x[1] * held_out[0]) - held_out[1]) ** 2)
    np.testing.assert_allclose(result.fun, held, rtol=1e-12)
    assert result.fun not in [e.running_loss for e in result.history]


def test_callbacks_stop():
    calls = []

    def note(progress):
        calls.append(progress)
        return len(calls) == 4

    result = fit_decay(callback=note, callback_every=3, epochs=5, evaluate="epochs")
    assert (result.success, result.status, result.nit) == (False, 3, 7 + 3)
    assert [(c.epoch, c.batch) for c in calls] == [(0, 3), (0, 6), (1, 0), (1, 3)]
    assert [c.loss is None for c in calls] == [True, True, False, True]
    np.testing.assert_allclose(calls[2].loss, exact(calls[2].params), rtol=1e-12)
    running = [np.mean((decay(X[:16], *P0) - Y[:16]) ** 2)]  # the first batch, at the start
    assert 0 < float(calls[0].running_loss) <= running[0]

    def stop(progress):
        raise StopIteration

    assert fit_decay(callback=stop).nfev == 1


@pytest.mark.parametrize("prefetch", [0, 2])
def test_ctrl_c_returns_the_best_so_far(prefetch):
    def interrupt(progress):
        if progress.epoch == 2:
            os.kill(os.getpid(), signal.SIGINT)

    result = fit_decay(callback=interrupt, epochs=1000, evaluate="epochs", prefetch=prefetch)
    assert (result.success, result.status, result.message) == (False, 4, "interrupted")
    assert len(result.history) == 2
    np.testing.assert_allclose(result.fun, exact(result.x), rtol=1e-12)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not [t for t in threading.enumerate() if t.name == "pykernels-prefetch"]


def test_ctrl_c_in_the_source():
    def batches():
        yield X[:16], Y[:16]
        raise KeyboardInterrupt

    result = fit_decay(batches, evaluate="never", epochs=9)
    assert result.status == 4 and np.all(np.isfinite(result.x))


def test_a_progress_bar(capsys):
    fit_decay(progress=True)
    assert "300/300" in capsys.readouterr().err
    fit_decay(lambda: iter([(X, Y)]), progress=True)  # of unknown length
    assert "300rows" in capsys.readouterr().err.replace(" ", "")


def test_rows_that_are_not_finite():
    y = Y.copy()
    y[[3, 40]] = np.nan
    result = fit_decay((X, y), nan="mask")
    assert result.counts == (ROWS - 2, 0, 2, 0)
    weights = np.isfinite(y).astype(float)
    same = fit_decay((X, np.nan_to_num(y), weights), nan="mask")
    np.testing.assert_allclose(result.x, same.x, rtol=1e-12)
    result = fit_decay((X, y), nan="skip")
    assert result.counts == (ROWS - 32, 0, 2, 2)
    assert np.all(np.isfinite(result.x))
    with pytest.raises(NonFiniteError, match="of batch 0 are not finite"):
        fit_decay((X, y))


def test_iterators_and_streams():
    batches = [(X[a : a + BATCH], Y[a : a + BATCH]) for a in range(0, ROWS, BATCH)]
    expected = fit_decay()
    np.testing.assert_array_equal(fit_decay(batches, batch_size=None).x, expected.x)
    np.testing.assert_array_equal(fit_decay(lambda: iter(batches)).x, expected.x)
    once = fit_decay(iter(batches), epochs=1)
    np.testing.assert_array_equal(once.x, fit_decay(epochs=1).x)
    assert np.isnan(once.fun)  # would be a second pass
    with pytest.raises(ValueError, match=r"epochs is 3.*lambda"):
        fit_decay(iter(batches))
    with pytest.raises(ValueError, match=r"read once.*evaluated"):
        fit_decay(iter(batches), epochs=1, evaluate="epochs")
    used = iter(batches)
    with pytest.raises(ValueError, match=r"no rows in epoch 1"):
        fit_decay(lambda: used)


ERRORS = {
    "shape": (lambda: fit(lambda x, a: (a * x)[:, None], (X, Y), [1.0]), TypeError, r"shape of y, \(100,\)"),
    "batch": (lambda: fit(decay, X, P0), TypeError, r"must be \(x, y\)"),
    "optimizer": (lambda: fit_decay(optimizer=0.1), TypeError, "one of optax's"),
    "updates": (lambda: fit_decay(updates="epoch"), ValueError, "updates must be"),
    "epochs": (lambda: fit_decay(epochs=0), ValueError, "epochs must be"),
    "evaluate": (lambda: fit_decay(evaluate="now"), ValueError, "evaluate must be"),
    "patience": (lambda: fit_decay(evaluate="end", patience=2), ValueError, "patience must be"),
    "every": (lambda: fit_decay(callback_every=0), ValueError, "callback_every must be"),
    "resume": (lambda: fit_decay(resume=True), ValueError, "resume=True needs checkpoint="),
    "checkpoint": (lambda: Checkpoint("a", every=0), ValueError, "must be positive"),
    "integers": (lambda: fit_decay(p0=[1, 1]), TypeError, "write 1.0, not 1"),
    "once": (lambda: fit_decay(iter([(X, Y)]), epochs=1, checkpoint=Checkpoint("a")), ValueError, "resumed fit"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        call()


def test_optax_is_named_with_its_extra(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"optax is needed.*pykernels\[stream\]"):
        fit_decay()


class Stateful:
    """Batches of 9 with grain's protocol."""

    def __init__(self):
        self.at = 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.at >= ROWS:
            raise StopIteration
        self.at += 9
        return X[self.at - 9 : self.at], Y[self.at - 9 : self.at]

    def get_state(self):
        return str(self.at).encode()

    def set_state(self, state):
        self.at = int(state)


NOISY = optax.chain(optax.add_noise(0.01, 0.5, jax.random.key(3)), ADAM)
RESUMED = {
    "arrays": (lambda: (X, Y), {}),
    "shuffled": (lambda: (X, Y), {"shuffle": Shuffle(5, block=10, blocks=2), "evaluate": "epochs"}),
    "factory": (lambda: lambda: iter([(X[:30], Y[:30]), (X[30:], Y[30:])]), {"prefetch": 2}),
    "grain": (Stateful, {}),
    "lbfgs": (lambda: (X, Y), {"updates": "pass", "optimizer": None, "epochs": 4}),
    "noise": (lambda: (X, Y), {"optimizer": NOISY}),
}


@pytest.mark.parametrize("name", RESUMED)
def test_resuming_after_every_batch_gives_the_same_bits(name, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # nobody pulls the plug here
    data, options = RESUMED[name]
    options = {"epochs": 2, "batch_size": 30, **options}
    expected = fit_decay(data(), **options)
    saving = Checkpoint(tmp_path / "all", every=1, keep=100)
    saved = fit_decay(data(), checkpoint=saving, **options)
    np.testing.assert_array_equal(saved.x, expected.x)
    assert len(saving.paths()) == 5 * options["epochs"]  # four batches and the end of each epoch
    for path in saving.paths():
        here = Checkpoint(tmp_path / path.stem)
        Path(here.folder).mkdir()
        path.rename(Path(here.folder) / path.name)
        resumed = fit_decay(data(), checkpoint=here, resume=True, **options)
        np.testing.assert_array_equal(resumed.x, expected.x)
        assert (resumed.fun, resumed.nit, resumed.counts) == (expected.fun, expected.nit, expected.counts)
        np.testing.assert_equal([e[:4] for e in resumed.history], [e[:4] for e in expected.history])
        assert resumed.nfev == expected.nfev


def test_a_stopped_fit_can_be_resumed(tmp_path):
    saving = Checkpoint(tmp_path, every=5)
    stopped = fit_decay(callback=lambda p: p.batch == 4, callback_every=2, checkpoint=saving)
    assert (stopped.status, stopped.nit) == (3, 4)
    np.testing.assert_array_equal(fit_decay(checkpoint=saving, resume=True).x, fit_decay().x)


def test_a_fit_can_be_prolonged(tmp_path):
    saving = Checkpoint(tmp_path)
    fit_decay(epochs=2, checkpoint=saving)
    assert [p.name for p in saving.paths()] == ["fit-000000000001.ckpt", "fit-000000000002.ckpt"]
    np.testing.assert_array_equal(
        fit_decay(epochs=3, checkpoint=saving, resume=True).x, fit_decay(epochs=3).x
    )


def damage(path, how):
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "flipped":
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    elif how == "version":
        path.write_bytes(content.replace(b"checkpoint 1\n", b"checkpoint 2\n", 1))


@pytest.mark.parametrize(
    ("how", "message"),
    [("truncated", "truncated or damaged"), ("empty", "no checkpoint of pykernels"), ("flipped", "damaged"),
     ("version", "has format 2; this version of pykernels reads format 1")],
)  # fmt: skip
def test_damaged_checkpoints_are_refused_and_the_one_before_is_used(how, message, tmp_path):
    saving = Checkpoint(tmp_path)
    expected = fit_decay(epochs=2, checkpoint=saving)
    last = saving.paths()[-1]
    damage(last, how)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(last, {})
    with pytest.warns(CheckpointWarning, match=rf"{message}.*; the checkpoint before it is used"):
        resumed = fit_decay(epochs=2, checkpoint=saving, resume=True)
    np.testing.assert_array_equal(resumed.x, expected.x)
    for path in saving.paths():
        damage(path, how)
    with (
        pytest.warns(CheckpointWarning),
        pytest.raises(CheckpointError, match=r"no checkpoint in.*can be used"),
    ):
        fit_decay(epochs=2, checkpoint=saving, resume=True)


def test_checkpoints_of_other_fits_are_refused(tmp_path):
    saving = Checkpoint(tmp_path)
    fit_decay(epochs=1, checkpoint=saving)
    other = {
        r"other data \(": {"data": (X, Y + 1)},
        "other batch size": {"batch_size": 10},
        "other shuffle": {"shuffle": 3},
        "other parameters or another optimizer": {"optimizer": optax.sgd(0.1)},
        "is of another fit": {"p0": [1.0, 1.0, 1.0]},
    }
    for message, change in other.items():
        with pytest.raises(CheckpointError, match=message):
            fit_decay(**{"epochs": 2, "checkpoint": saving, "resume": True, **change})


def test_checkpoints_are_atomic(tmp_path, monkeypatch):
    """A write that fails, at any point, leaves the old one and no debris."""
    saving = Checkpoint(tmp_path, keep=2)
    tree = {"a": jnp.arange(3.0), "b": (jnp.bfloat16(1.5), jax.random.key(7), jnp.int32(4))}
    saving.save(1, tree, {"n": float("inf")})
    for name in ("replace", "fsync"):
        with monkeypatch.context() as patch:

            def fail(*args):
                raise OSError("no space")

            patch.setattr(os, name, fail)
            with pytest.raises(OSError, match="no space"):
                saving.save(2, tree, {})
        assert [p.name for p in tmp_path.iterdir()] == ["fit-000000000001.ckpt"]
    loaded, data = saving.load_last(tree)
    assert data == {"n": float("inf")}
    assert jax.tree.structure(loaded) == jax.tree.structure(tree)
    assert loaded["b"][0].dtype == jnp.bfloat16 and loaded["b"][0] == 1.5 and loaded["b"][2] == 4
    assert jax.random.uniform(loaded["b"][1]) == jax.random.uniform(tree["b"][1])
    for number in (2, 3):
        saving.save(number, tree, {})
    assert [p.name for p in saving.paths()] == ["fit-000000000002.ckpt", "fit-000000000003.ckpt"]
    assert Checkpoint(tmp_path / "none").load_last(tree) is None


def test_two_models_on_one_object():
    class Models:
        def __init__(self, k):
            self.k = k

        def line(self, x, a):
            return a * x * self.k

        def parabola(self, x, a):
            return a * x**2 * self.k

    models = Models(2.0)
    options = {"updates": "pass", "epochs": 20}
    line = fit(models.line, (X, 6 * X), [1.0], **options)
    parabola = fit(models.parabola, (X, 6 * X**2), [1.0], **options)
    np.testing.assert_allclose([line.x[0], parabola.x[0]], 3.0, rtol=1e-7)
    models.k = 3.0
    np.testing.assert_allclose(fit(models.line, (X, 6 * X), [1.0], **options).x, 2.0, rtol=1e-7)


def test_streams_know_their_passes():
    assert Batches(iter([])).once and not Batches([]).once and not Batches(Stateful()).once
