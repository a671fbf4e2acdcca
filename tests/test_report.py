"""What `explain` says of kernels on a GPU: registers, instructions per attempt, occupancy, modelled time. No GPU is needed;
what is counted is held against the instructions that `shared/ptxrun` executes (`--ptxrun=PATH`)."""

from __future__ import annotations

import importlib.util
from typing import Any

import arithmetic
import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from gpu_matrix import cost, kernels

import pykernels as pk
from pykernels.kernels import cuda, report
from pykernels.kernels.disk import DiskCache
from pykernels.kernels.ir import Program
from pykernels.kernels.launch import Image
from pykernels.kernels.report import Instructions

pytestmark = pytest.mark.skipif(
    cuda.unavailable() is not None or importlib.util.find_spec("triton") is None, reason="needs triton"
)

TSIT5 = {"method": pk.tsit5, "step": pk.Adaptive(1e-3, 1e-6)}


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test compiles anew."""
    monkeypatch.setattr(cuda, "cache", DiskCache(None))


def images(dtype: Any, capability: int = 90, **settings: Any) -> list[Image]:
    """Lorenz forward, forward with milestones, and backward by state and arguments."""
    made = kernels(problems.LORENZ, dtype, **(TSIT5 | settings))
    return [cuda.compiled(cuda.lifted(kernel), capability) for kernel in made]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_lorenz(dtype: Any, capability: int) -> None:
    size = np.dtype(dtype).itemsize
    made = images(dtype, capability)
    forward, recorded, backward = (report.report(image, 4096) for image in made)
    for image, found in zip(made, (forward, recorded, backward), strict=True):
        assert (found.registers, found.spilled) == cost(image, 0.0)[:2]
        assert (found.shared, found.inner_loops, found.threads) == (0, 0, 32 * image.warps)
        floats = found.attempt.single if size == 4 else found.attempt.double
        assert floats > found.attempt.total / 3 and found.attempt.special >= 3
        assert 0.1 < found.occupancy < 1 and 0.01 < found.microseconds < 10
    assert [r.attempt_loops for r in (forward, recorded, backward)] == [1, 1, 2]
    # Nothing is read or written in an attempt, but in a segment. Backwards: time, step and state are noted and read (of an
    # autonomous field the time is not), and the word of decisions is.
    assert forward.attempt.bytes == recorded.attempt.bytes == 0
    assert backward.attempt.bytes == (5 + 4) * size + 4
    assert forward.attempt.total <= recorded.attempt.total < backward.attempt.total
    assert "pykernels_backward on sm_" in str(backward) and f"{backward.attempt.total} instr" in str(backward)


PTX = """
.version 8.0
.target sm_90
.address_size 64
.visible .entry toy(.param .u64 toy_param_0, .param .u32 toy_param_1)
{
    .reg .b32 %r<9>;
    mov.u32 %r1, 0;
$outer:
    st.global.v2.b32 [%rd1], {%r1, %r2};
    mov.u32 %r2, 0; // one more; than
$attempt:
    fma.rn.f32 %r3, %r3, %r4, %r5;
    fma.rn.f64 %rd3, %rd3, %rd4, %rd5;
    { .reg .b32 %t; mov.b64 {%t, %r6}, %rd6; }
    @%p1 bra $plain;
    sin.approx.f32 %r3, %r3;
$reduce:
    mul.rn.f32 %r3, %r3, %r4;
    @%p2 bra $reduce;
    bra.uni $joined;
$plain:
    add.f32 %r3, %r3, %r3;
    ld.global.nc.v4.f32 {%r5, %r6, %r7, %r8}, [%rd2];
$joined:
    @%p3 bra $after;
    { // callseq 0
    .param .b32 param0;
    st.param.b32 [param0], %r3;
    call.uni (retval0), helper, (param0);
    }
$after:
    add.s32 %r2, %r2, 1;
    @%p4 bra $attempt;
    @%p5 bra $outer;
    ret;
}
.visible .entry other() { ret; }
"""


def test_what_is_counted() -> None:
    """Rare loops and calls are avoided; inner loops that can not be are counted once."""
    found = report.attempts(report.ptx_code(PTX, "toy"))
    assert (found.loops, found.inner) == (1, 0)
    # fma, fma, mov, bra; add, ld; bra; add, bra.
    assert found.instructions == Instructions(single=2, double=1, memory=1, other=5, bytes=16)
    always = report.attempts(report.ptx_code(PTX.replace("@%p1 bra $plain;", ""), "toy"))
    # fma, fma, mov; sin; mul, bra; bra; bra; add, bra.
    assert always.inner == 1
    assert always.instructions == Instructions(single=2, double=1, special=1, other=6)
    straight = report.attempts(report.ptx_code(PTX, "other"))
    assert straight.loops == 0 and straight.instructions.total == 1


def test_unrolled_loops_are_counted_once() -> None:
    """ptxas unrolls the loop of a system this small four times."""

    def decay(t: Any, y: Any, args: Any) -> Any:
        return -args * y

    problem = problems.Problem(
        "decay", decay, lambda dtype: np.ones(2, dtype), lambda dtype: np.ones((), dtype), 0.0, 1.0
    )
    backward = kernels(problem, np.float32, method=pk.euler, step=pk.Fixed(100))[2]
    found = report.report(cuda.compiled(cuda.lifted(backward), 90), 64)
    # y is noted once and read once.
    assert found.attempt_loops == 2 and found.attempt.bytes == 16 and found.attempt.total < 60


def test_spills_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = cuda.lifted(kernels(problems.LORENZ, np.float32, **TSIT5)[2])
    program = cuda.program_of(kernel)
    assert isinstance(program, Program)
    monkeypatch.setattr(cuda, "REGISTERS", {4: 32})
    found = report.report(Image("pykernels_backward", cuda.compile_ptx(program, kernel, 90), 90, 2), 64)
    assert found.registers <= 32 and found.spilled > 0 and f"{found.spilled} bytes spilled" in str(found)


def test_occupancy() -> None:
    """By hand, with NVIDIA's rules: registers in units of 256 per warp, a KiB of shared memory per block besides its own."""
    h100 = report.GPUS["sm_90"]
    for registers, shared, warps, blocks in [
        (32, 0, 2, 32), (32, 0, 1, 32), (48, 0, 2, 20), (56, 0, 2, 18), (57, 0, 2, 16), (255, 0, 2, 4), (255, 0, 8, 1),
        (32, 47 << 10, 2, 4), (32, 49 << 10, 2, 4), (32, 100 << 10, 2, 2),
    ]:  # fmt: skip
        assert report.blocks_per_processor(h100, registers, shared, warps) == blocks, (registers, shared)


def test_the_model_of_time() -> None:
    h100 = report.GPUS["sm_90"]
    schedulers = 4 * h100.processors
    issue = Instructions(single=100, other=100)
    assert report.attempt_seconds(h100, issue, 3 * schedulers) == pytest.approx(3 * 200 / h100.clock)
    # What does not fill the GPU takes as long as one warp.
    assert report.attempt_seconds(h100, issue, 1) == pytest.approx(200 / h100.clock)
    # Half as many float64 units as lanes a scheduler could feed, an eighth as many special ones.
    for slow, clocks in [(Instructions(double=100), 200), (Instructions(special=100), 800)]:
        assert report.attempt_seconds(h100, slow, 1) == pytest.approx(clocks / h100.clock)
    moving = Instructions(memory=1, bytes=16)
    assert report.attempt_seconds(h100, moving, 10**6) == pytest.approx(16 * 32e6 / h100.bandwidth)


def explained(field: Any = problems.LORENZ.field, target: Any = "sm_90", **settings: Any) -> pk.Explanation:
    y0s, args = jnp.ones((8192, 3), np.float32), (10.0, 28.0, 2.5)
    return pk.explain(field, y0s, 0.0, 1.0, args, in_axes=(0, None), target=target, **settings)


def test_an_attempt_takes_little_more_than_its_arithmetic() -> None:
    """Lorenz, tsit5, float32."""
    kernel = kernels(problems.LORENZ, np.float32, **TSIT5)[0]
    parts = arithmetic.least(cuda.lifted(kernel).solve)
    # By hand: 21 weights, 6 stages, 7 errors; the field is 2 differences, 2 products, 2 fused multiply-adds.
    assert parts["stages"] == (21 + 6) * 3 and parts["field"] == 6 * 6 and parts["error"] == 8 * 3
    forward, recorded, backward = (report.report(image, 4096) for image in images(np.float32))
    least = sum(parts.values())
    # What is more: logarithm and exponential, checks and branches of divisions, states that are not finite, constants and
    # copies.
    assert forward.attempt.total <= 1.25 * least and forward.ptx_instructions <= 1.25 * least
    assert recorded.attempt.total <= 1.3 * least
    assert backward.attempt.total <= 4.5 * forward.attempt.total


def test_explain() -> None:
    plain = explained(target=None)
    assert (plain.target, plain.gpu, plain.gpu_reason) == (None, (), "") and "sm_" not in str(plain)
    for target in ("sm_80", "sm_90"):
        found = explained(target=target)
        forward, backward = found.gpu
        assert (forward.name, backward.name) == ("pykernels_forward", "pykernels_backward")
        assert {(r.target, r.runner, r.lanes) for r in found.gpu} == {(target, "native", 8192)}
        assert str(found) == "\n".join(map(str, (plain, *found.gpu)))
    (alone,) = explained(adjoint=pk.ForwardOnly()).gpu
    assert alone.attempt.total < forward.attempt.total
    # One that is newer than what there is a model of, and than the PTX that older ones get.
    newer = explained(target="sm_120", adjoint=pk.ForwardOnly())
    assert newer.gpu[0].registers > 0 and newer.gpu[0].microseconds is None and "no model" in str(newer)


def test_kernels_of_the_pallas_runner() -> None:
    """Triton's PTX has the same loops: counts of the same size."""
    settings: Any = {"step": pk.Adaptive(1e-3, 1e-6), "dt0": 0.01}
    native = explained(config=pk.Config(runner="native"), **settings).gpu
    for mine, other in zip(explained(config=pk.Config(runner="pallas"), **settings).gpu, native, strict=True):
        assert (mine.runner, mine.attempt_loops) == ("pallas", other.attempt_loops)
        assert 0.6 * other.attempt.single < mine.attempt.single < 1.6 * other.attempt.single


def test_explain_where_there_is_no_kernel() -> None:
    def calling(t: Any, y: Any, args: Any) -> Any:
        return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(y.shape, y.dtype), y, vmap_method="expand_dims")

    outside = explained(calling)
    assert outside.gpu == () and "array plan" in outside.gpu_reason and "pure_callback" in outside.gpu_reason
    assert f"sm_90: runner xla ({outside.gpu_reason})" in str(outside)
    sorting = explained(lambda t, y, args: -jnp.sort(y))
    assert sorting.gpu == () and "sort" in sorting.gpu_reason
    assert "config" in explained(config=pk.Config(runner="xla")).gpu_reason
    assert "plain JAX" in explained(adjoint=pk.BoundedTree()).gpu_reason


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    for target in ("h100", "sm_9", "sm_90; ls", "sm_900", "compute_90", 90):
        with pytest.raises(ValueError, match=r"sm_80.*sm_90.*not"):
            explained(target=target)
    with pytest.raises(RuntimeError, match="ptxas failed"):
        report.report(Image("broken", PTX.replace("mov.u32", "move.u32"), 90, 2), 64)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else found(name))
    report.tool.cache_clear()
    with pytest.raises(ImportError, match=r"pykernels\[cuda\]"):
        explained()


@pytest.fixture(scope="module")
def executed(ptxrun: Any) -> Any:
    """Runs a function whose CUDA kernels are executed from their PTX; returns its value and the launches."""

    def run(function: Any, *args: Any) -> Any:
        launches: list[Any] = []
        return ptxrun.run_on_ptx(function, *args, report=launches), launches

    return run


@pytest.mark.parametrize(("dtype", "off"), [(np.float32, 0.02), (np.float64, 0.1)])
def test_instructions_are_those_executed(executed: Any, dtype: Any, off: float) -> None:
    """Twenty attempts more execute so many instructions more; those in rare paths (of logarithms) are counted on top."""
    y0s = problems.spread(problems.LORENZ.y0(dtype=dtype), 64)
    args = problems.LORENZ.args(dtype=dtype)
    totals = {}
    for attempts in (10, 30):

        def run(y0s: Any, most: int = attempts) -> Any:
            return pk.solve_ensemble(
                problems.LORENZ.field, y0s, 0.0, 1e6, args, adjoint=pk.ForwardOnly(), max_steps=most, throw=False,
                dt0=0.01, **TSIT5,
            ).stats.attempts  # fmt: skip

        made, (launch,) = executed(run, y0s)
        assert np.all(made == attempts)
        totals[attempts] = sum(launch.result.thread_counts.values())
    each = (totals[30] - totals[10]) / (20 * 64)
    image = Image(launch.kernel.name, launch.kernel.ptx, 90, 2)
    counted = report.report(image, 64).ptx_instructions
    assert each <= counted <= (1 + off) * each, (each, counted)


def test_warps_wait_for_their_slowest_lane_only(executed: Any) -> None:
    """Trajectories from 2 to 68 attempts, at random in 8 warps: a warp executes what its slowest lane does."""
    lanes, warps = 256, 8
    y0s = problems.spread(problems.LORENZ.y0(dtype=np.float32), lanes)
    args = problems.LORENZ.args(dtype=np.float32)

    def run(y0s: Any, t1: Any) -> Any:
        return pk.solve_ensemble(
            problems.LORENZ.field, y0s, 0.0, t1, args, adjoint=pk.ForwardOnly(), dt0=0.01, **TSIT5
        ).stats.attempts

    ends = np.exp(np.random.default_rng(0).uniform(np.log(0.05), np.log(4.0), lanes)).astype(np.float32)
    _, (nothing,) = executed(run, y0s, np.zeros_like(ends))
    attempts, (launch,) = executed(run, y0s, ends)
    assert max(attempts) >= 20 * min(attempts)
    image = Image(launch.kernel.name, launch.kernel.ptx, 90, 2)
    slowest = int(np.sum(np.max(np.asarray(attempts).reshape(warps, 32), axis=1)))
    expected = (
        sum(nothing.result.warp_counts.values()) + report.report(image, lanes).ptx_instructions * slowest
    )
    assert sum(launch.result.warp_counts.values()) <= 1.1 * expected


def test_gradients_keep_warps_in_step(executed: Any) -> None:
    """Forward with milestones and backward, with step counts that differ twentyfold: a warp executes what its slowest lane
    does; and where lanes are sorted by work, little more than its average one."""
    lanes = 1024
    frequencies = np.exp(np.random.default_rng(0).uniform(0, np.log(40), lanes)).astype(np.float32)
    y0s = np.tile(np.asarray([1, 0], np.float32), (lanes, 1))

    def gradient(y0s: Any, frequencies: Any, order: Any) -> Any:
        def loss(frequencies: Any) -> Any:
            sols = pk.solve_ensemble(
                lambda t, y, w: jnp.stack([w * y[1], -w * y[0]]), y0s, 0.0, 2.0, frequencies, in_axes=(0, 0),
                max_steps=512, step=pk.Adaptive(1e-3, 1e-6), dt0=0.05, order=order,
            )  # fmt: skip
            return jnp.sum(sols.ys**2), sols.stats.attempts

        return jax.grad(loss, has_aux=True)(frequencies)

    (_, attempts), launches = executed(gradient, y0s, frequencies, np.zeros(lanes, np.int32))
    attempts = np.asarray(attempts)
    assert max(attempts) >= 15 * min(attempts) and len(launches) == 2
    slowest = np.sum(np.max(attempts.reshape(-1, 32), axis=1)) / np.sum(attempts)
    for launch in launches:
        one_lane = sum(launch.result.thread_counts.values())
        assert sum(launch.result.warp_counts.values()) <= 1.1 * one_lane * slowest
    (_, again), launches = executed(gradient, y0s, frequencies, attempts)
    np.testing.assert_array_equal(again, attempts)
    for launch in launches:
        one_lane = sum(launch.result.thread_counts.values())
        assert sum(launch.result.warp_counts.values()) <= 1.15 * one_lane / 32
