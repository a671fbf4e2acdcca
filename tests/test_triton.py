"""The Triton step kernels, without a GPU: they compile, lowered programs hold them, and their PTX, executed on the CPU by
`shared/ptxrun` (`--ptxrun=PATH`), gives the reference's numbers."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_matrix import cost, ptxas
from test_step_kernels import PASSES, SLOTS, Inputs, operands_of, pass_objects

import pykernels as pk
from pykernels import primitives
from pykernels.kernels import launch, triton
from pykernels.kernels.passes import Accept, Combine, Finish, Save

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(params=["own launcher", "jax-triton"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways into a program, where there are both."""
    if request.param == "own launcher":
        monkeypatch.setattr(triton, "jax_triton", lambda: None)
    elif triton.jax_triton() is None:
        pytest.skip("no jax-triton that works with this JAX: it needs a CUDA plugin, and JAX before 0.11")
    return request.param


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_kernel_compiles(dtype: Any, capability: int) -> None:
    """Nothing spills, registers leave room for full occupancy's half, parameters are the arrays and the null pointers that
    the plugin appends."""
    if not ptxas().exists():
        pytest.skip("no ptxas: it comes with triton")
    tsit5 = Combine(
        np.dtype(dtype), ((1.0, *[0.0] * 6), (0.0,) * 7), ((0.0, *pk.tsit5.b[:6]), (0.0, *pk.tsit5.error[:6]))
    )
    whole = Finish(
        np.dtype(dtype), pk.tsit5.b, pk.tsit5.error, 1e-3, 1e-6, given=False, partial=False, slots=8
    )
    for pass_ in [*pass_objects(dtype), tsit5, whole]:
        image = triton.compiled(pass_, 3, 100_000, capability)
        entry = re.search(r"\.entry\s+\w+\s*\((.*?)\)", image.ptx, re.DOTALL)
        assert entry is not None
        arrays = len(pass_.operands) + len(pass_.results)
        assert entry[1].count(".param") == arrays + launch.SCRATCH_POINTERS
        assert f".target sm_{capability}\n" in image.ptx and ".version 8.0" in image.ptx
        found = cost(image, 0.0)
        assert found.spilled == 0 and found.registers <= 64 * np.dtype(dtype).itemsize // 4


def test_vectors_of_sixteen_bytes() -> None:
    """Rows that begin at multiples of them are read and written so."""
    pass_ = Combine(np.dtype(np.float32), ((1.0, 0.0),), ((0.0, 0.5),))
    whole, odd = (triton.compiled(pass_, 2, columns, 90).ptx for columns in (1 << 20, (1 << 20) + 1))
    assert "ld.global.v4.b32" in whole and "st.global.v4.b32" in whole
    assert "ld.global.v4.b32" not in odd


@pytest.mark.parametrize("name", PASSES)
def test_ptx_gives_the_references_numbers(name: str, route: str, ptxrun: Any) -> None:
    """On sizes with and without whole blocks; results begin as NaN, and races would be seen."""
    dtypes: list[Any] = [np.float32, np.float64] if route == "own launcher" else [np.float32]
    for shape, dtype in [((1, 1), np.float32), ((3, 7), np.float32), *[((5, 1030), d) for d in dtypes]]:
        inputs = Inputs(*shape, dtype)
        leaves, structure = jax.tree.flatten(vars(inputs))

        def run(*leaves: Any, structure: Any = structure) -> Any:
            instance = object.__new__(Inputs)
            vars(instance).update(jax.tree.unflatten(structure, leaves))
            return PASSES[name](instance, "triton")

        report: list[Any] = []
        outs = ptxrun.run_on_ptx(run, *leaves, report=report, poison=True, check_races=True)
        (launched,) = report
        assert not launched.result.warnings
        eps = np.finfo(dtype).eps
        for out, plain in zip(
            jax.tree.leaves(outs), jax.tree.leaves(PASSES[name](inputs, "xla")), strict=True
        ):
            size = np.max(abs(plain), initial=1.0)
            np.testing.assert_allclose(out, plain, rtol=0, atol=30 * eps * size)


def test_weights_are_of_the_arrays_precision(ptxrun: Any) -> None:
    """A third in float64 is not a third in float32."""
    inputs = Inputs(1, 50, np.float64)

    def run(y: Any, k: Any) -> Any:
        return primitives.rk_stage(y, [k], jnp.float64(1 / 7), [1 / 3], runner="triton")

    wanted = inputs.y + 1 / 7 * (1 / 3 * inputs.new)
    np.testing.assert_allclose(ptxrun.run_on_ptx(run, inputs.y, inputs.new), wanted, rtol=1e-15, atol=1e-15)


def test_a_bad_row_fails_alone(ptxrun: Any) -> None:
    inputs = Inputs(4, 1100, np.float32)

    def run(y: Any, new: Any) -> Any:
        return primitives.rk_finish(y, [y], inputs.h, None, [0.1], 1e-3, 1e-6, new=new, runner="triton")[1]

    good = ptxrun.run_on_ptx(run, inputs.y, inputs.new)
    for bad in (np.nan, np.inf):
        found = ptxrun.run_on_ptx(run, inputs.y, inputs.new.at[2, 1050].set(bad))
        assert not np.isfinite(found[2])
        np.testing.assert_array_equal(np.delete(found, 2), np.delete(good, 2))


def test_a_loop_in_place(ptxrun: Any) -> None:
    """Stages, milestones and acceptance in the memory of what they replace."""

    def run(y: Any, buffer: Any) -> Any:
        def attempt(i: Any, carry: Any) -> Any:
            y, buffer = carry
            h = jnp.float32(0.1)
            new = primitives.rk_stage(y, [y], h, [1.0], runner="triton")
            buffer = primitives.milestone_save(buffer, i, y, runner="triton")
            (y,) = primitives.rk_accept([y], [new], jnp.arange(2) < 1, runner="triton")
            return primitives.rk_stage(y, [y], h, [-0.5], in_place=True, runner="triton"), buffer

        return jax.lax.fori_loop(0, 3, attempt, (y, buffer))

    y, buffer = Inputs(2, 70, np.float32).y, jnp.zeros((3, 2, 70), np.float32)
    out, saved = ptxrun.run_on_ptx(run, y, buffer)
    factors = np.array([[1.1 * 0.95], [0.95]], np.float32)
    np.testing.assert_allclose(out, y * factors**3, rtol=1e-5)
    np.testing.assert_allclose(saved[2], y * factors**2, rtol=1e-5)


def lowered(run: Any, *operands: Any, platforms: tuple[str, ...] = ("cuda",)) -> str:
    return jax.jit(run).trace(*operands).lower(lowering_platforms=platforms).as_text()


def test_the_lowered_program_holds_the_kernels(route: str) -> None:
    """By default, for CUDA only, one launch per pass, in place where the pass is."""
    inputs = Inputs(2, 300, np.float32)

    def step(y: Any, k: Any) -> Any:
        new = primitives.rk_stage(y, [k], inputs.h, [1.0])
        return primitives.rk_accept([y], [new], inputs.accepted)[0]

    text = lowered(step, inputs.y, inputs.new)
    assert text.count("@triton_kernel_call") == 2
    assert len(re.findall(r"output_operand_aliases = \[#stablehlo.output_operand_alias", text)) == 1
    for platform in ("cpu", "tpu"):
        assert "triton_kernel_call" not in lowered(step, inputs.y, inputs.new, platforms=(platform,))


def test_what_has_no_kernel_is_plain_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(pass_: Any, rows: int = 2, columns: int = 300) -> tuple[str, str]:
        return primitives.pass_runner_of("cuda", pass_, rows, columns)

    single = np.dtype(np.float32)
    assert chosen(Accept(single, 1)) == ("triton", "the default")
    assert chosen(Accept(np.dtype(np.float16), 1)) == ("xla", "no step kernels for float16")
    assert chosen(Accept(single, 1), columns=0) == chosen(Save(single, 0)) == ("xla", "nothing to do")
    assert chosen(Accept(single, 7)) == ("xla", "more than 20 arrays in one pass")
    assert chosen(Accept(single, 1), 1 << 31) == ("xla", "more blocks than a GPU can count")
    assert chosen(Accept(single, 1, runner="xla")) == ("xla", "asked for by config")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "triton" else find(n, *a))
    assert chosen(Accept(single, 1)) == ("xla", "triton is not installed: install pykernels[cuda]")
    inputs = Inputs(2, 30, np.float32)

    def asked(y: Any) -> Any:
        return primitives.rk_accept([y], [y], inputs.accepted, runner="triton")

    with pytest.raises(ValueError, match="install pykernels"):
        lowered(asked, inputs.y)


@pytest.fixture
def fake_jax_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """A module in the place of jax-triton, which empties Triton's cache variable as that does; and how it was called."""
    called: list[dict[str, Any]] = []

    def triton_call(*operands: Any, **settings: Any) -> list[Any]:
        called.append({"operands": operands, **settings})
        return [jnp.zeros(s.shape, s.dtype) for s in settings["out_shape"]]

    class Finder:
        def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
            return importlib.util.spec_from_loader(name, self) if name == "jax_triton" else None

        def create_module(self, spec: Any) -> None:
            return None

        def exec_module(self, module: ModuleType) -> None:
            os.environ["TRITON_CACHE_DIR"] = ""
            vars(module).update(triton_call=triton_call)

    monkeypatch.delitem(sys.modules, "jax_triton", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    triton.jax_triton.cache_clear()
    yield called
    sys.modules.pop("jax_triton", None)
    triton.jax_triton.cache_clear()


def test_how_jax_triton_is_called(
    fake_jax_triton: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the pass's arrays, everything else as constants that the kernel has; and the environment is as before."""
    monkeypatch.setattr(triton.importlib.metadata, "version", lambda name: "0.10.2")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/somewhere")
    for pass_ in pass_objects(np.float32):
        operands = operands_of(pass_, 2, 1030)
        outs = triton.run(pass_, operands)
        call = fake_jax_triton.pop()
        assert [o.shape for o in outs] == [b.shape(2, 1030) for b in pass_.results]
        assert len(call["operands"]) == len(operands) and call["grid"] == 4
        assert call["input_output_aliases"] == pass_.in_place and call["compute_capability"] == 90
        arrays = len(operands) + len(pass_.results)
        names = call["kernel"].arg_names
        constants = set(call) & set(names)
        assert set(names) - constants == {f"p{i}" for i in range(arrays)}
        assert names[:arrays] == [f"p{i}" for i in range(arrays)]  # jax-triton counts
    assert os.environ["TRITON_CACHE_DIR"] == "/somewhere"
    monkeypatch.setattr(triton.importlib.metadata, "version", lambda name: "0.12.0")
    triton.jax_triton.cache_clear()
    assert triton.jax_triton() is None


def test_slots_of_a_large_buffer() -> None:
    """Their addresses need 64 bits."""
    ptx = triton.compiled(Save(np.dtype(np.float32), SLOTS), 1, 1 << 30, 90).ptx
    assert re.search(r"mul\.wide\.s32|shl\.b64|mul\.lo\.s64", ptx)
