"""Two minutes: is what the CPU's tests prove so on this device too, and what does it cost here.

Right: contractions in full float32, the numbers of the CPU, a ring that is updated in place,
samples in chunks and one by one. Fast: the figures of the speed suite that matter on a GPU, each
beside its floor measured in the same run.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

import swagjax
from benchmarks.gpu.job import Job
from benchmarks.speed import figures, machine, programs, results, workloads

RANK, SAMPLES = 20, 30
CLOSE = 1e-5  # relative: of TF32, which has 10 bits, the error is some 3e-4
# (figure, workload): of ``benchmarks.speed``
FIGURES = (
    ("idle", "resnet18"),
    ("collect", "resnet18"),
    ("sample", "resnet18"),
    ("samples", "resnet18"),
    ("averaging", "lenet5"),
    ("predict", "lenet5"),
)


def run(job: Job) -> None:
    """Check, then measure; each is remembered, so that a run that ends in time can go on."""
    job.note(dtype="float32", batch=workloads.build(_network(job)).batch)
    checks = {
        name: job.stage(name, lambda f=check: _timed(job, f)) for name, check in CHECKS.items()
    }
    job.note(results=checks)
    measured = {}
    for kind, workload in FIGURES:
        name = f"{kind}, {'lenet5' if job.tiny else workload}"
        job.say(f"measuring {name}")
        measured[name] = job.stage(name, lambda k=kind, w=workload: _measure(job, k, w))
        job.note(figures=measured)
    measured["compile, leaves300"] = job.stage("compile", lambda: _compile(job))
    job.note(figures=measured)
    failed = [name for name, of in checks.items() if not of["holds"]]
    job.finish(failed=failed, rates=job.stage("rates", lambda: _rates(job)))
    for name in failed:
        job.say(f"DOES NOT HOLD: {name}: {checks[name]}")


def full_precision(job: Job) -> dict[str, Any]:
    """The low-rank part of a sample beside float64: TF32 would get it wrong by some 3e-4."""
    state, exact = _random_state(_size(job))
    z2 = np.random.default_rng(1).standard_normal(RANK).astype(np.float32)
    draw = jax.jit(swagjax.from_noise)
    found = draw(state._replace(variance=None), jnp.zeros_like(state.mean), jnp.asarray(z2))
    shift = z2.astype(np.float64) @ exact["deviations"] / np.sqrt(2 * (RANK - 1))
    return _within(CLOSE, _error(found, exact["mean"] + shift, exact["mean"]))


def density(job: Job) -> dict[str, Any]:
    """The difference of two log-densities beside float64 with the whole covariance."""
    state, exact = _random_state(1000)
    low_rank = exact["deviations"].T @ exact["deviations"] / (RANK - 1)
    covariance = 0.5 * (np.diag(exact["variance"]) + low_rank)
    step = 1e-2 * np.random.default_rng(1).standard_normal(1000)
    point = (exact["mean"] + step).astype(np.float32)
    away = point.astype(np.float64) - exact["mean"]
    wanted = -0.5 * away @ np.linalg.solve(covariance, away)
    found = float(swagjax.log_prob_difference(state, jnp.asarray(point), state.mean))
    return _within(CLOSE, abs(found / wanted - 1)) | {"found": found, "wanted": float(wanted)}


def same_samples(job: Job) -> dict[str, Any]:
    """A sample by a key, here and on the CPU: the same normals, the same arithmetic."""
    state, exact = _random_state(_size(job))
    draw, key = jax.jit(swagjax.sample), jax.random.key(3)
    return _within(CLOSE, _error(draw(key, state), _on_cpu(draw, key, state), exact["mean"]))


def same_updates(job: Job) -> dict[str, Any]:
    """Collections, here and on the CPU: mean, variance and ring."""
    tx = swagjax.swag(4)
    params = {"bias": np.zeros(7, np.float32), "kernel": np.ones((5, 7), np.float32)}

    @jax.jit
    def collect(params: Any, updates: Any) -> Any:
        state = tx.init(params)
        for update in updates:
            _, state = tx.update(update, state, params)
        return state._asdict()

    rng = np.random.default_rng(2)
    updates = [
        jax.tree.map(lambda p: rng.normal(0, 0.1, p.shape).astype(np.float32), params)
        for _ in range(6)
    ]
    found, wanted = collect(params, updates), _on_cpu(collect, params, updates)
    zeros, parts = jax.tree.map(np.zeros_like, wanted), ("mean", "variance", "deviations")
    return _within(CLOSE, max(_error(found[p], wanted[p], zeros[p]) for p in parts))


def same_predictions(job: Job) -> dict[str, Any]:
    """Averaged probabilities, here and on the CPU: of products in full float32, and by default."""
    workload = workloads.build("lenet5")
    _, state = workloads.state(workload, 3)
    probs, x = workloads.probabilities(workload), workloads.images(64)
    args = jax.random.key(5), state

    def predict(key: Any, state: Any, x: Any) -> jax.Array:
        return swagjax.predict(key, state, probs, x, num_samples=4)

    with jax.default_matmul_precision("highest"):
        exact = np.asarray(jax.jit(predict)(*args, x))
        wanted = np.asarray(_on_cpu(jax.jit(predict), *args, x))
    default = np.asarray(jax.jit(predict)(*args, x))
    found = _within(CLOSE, float(np.abs(exact - wanted).max()))
    return found | {"error_at_default_precision": float(np.abs(default - wanted).max())}


def in_place(job: Job) -> dict[str, Any]:
    """A collection whose state is donated: aliased buffers, no copy of the ring, by the program."""
    workload = workloads.build(_network(job))
    step = workloads.collector(swagjax.swag(RANK))
    params = workload.shapes
    state = jax.eval_shape(swagjax.swag(RANK).init, params)
    compiled = step.lower((params, state), params).compile()
    memory, size = compiled.memory_analysis(), 4 * workloads.parameters(workload)
    found = {
        "aliased_bytes": int(memory.alias_size_in_bytes),
        "temporary_bytes": int(memory.temp_size_in_bytes),
        "copied_bytes_of_the_ring": programs.largest_result(compiled, "copy", RANK),
        "parameter_bytes": size,
    }
    aliased = found["aliased_bytes"] >= (RANK + 3) * size
    holds = aliased and found["temporary_bytes"] < size / 2
    return {"holds": bool(holds and not found["copied_bytes_of_the_ring"]), **found}


def chunks(job: Job) -> dict[str, Any]:
    """Samples side by side and one by one: the same prediction."""
    workload = workloads.build("lenet5")
    _, state = workloads.state(workload, 3)
    probs, x, key = workloads.probabilities(workload), workloads.images(64), jax.random.key(6)
    sizes = (1, 3, 6)
    with jax.default_matmul_precision("highest"):
        found = [
            np.asarray(swagjax.predict(key, state, probs, x, num_samples=6, chunk_size=size))
            for size in sizes
        ]
    return _within(CLOSE, max(float(np.abs(each - found[0]).max()) for each in found))


CHECKS: dict[str, Callable[[Job], dict[str, Any]]] = {
    "contractions in full float32": full_precision,
    "log-density as on the CPU": density,
    "samples as on the CPU": same_samples,
    "updates as on the CPU": same_updates,
    "predictions as on the CPU": same_predictions,
    "collected in place": in_place,
    "chunks as one by one": chunks,
}


def _timed(job: Job, check: Callable[[Job], dict[str, Any]]) -> dict[str, Any]:
    job.check_time()
    job.say(f"checking {check.__name__}")
    begun = time.perf_counter()
    return check(job) | {"seconds": round(time.perf_counter() - begun, 2)}


def _measure(job: Job, kind: str, workload: str) -> list[dict[str, Any]]:
    """The figures of a kind, as the speed suite's JSON has them."""
    job.check_time()
    name = "lenet5" if job.tiny else workload
    sizes = {"rank": 3, "samples": 4, "images": 64} if job.tiny else {}
    setting = figures.Setting(
        name=name,
        workload=workloads.build(name)._replace(batch=8 if job.tiny else 128),
        **{"rank": RANK, "samples": SAMPLES, "images": 2000, **sizes},
        refresh=250,
        rounds=1 if job.tiny else 5,
        threads=1,
        peers={},
        commands={},
    )
    return [results.record(figure) for figure in figures.KINDS[kind].measure(setting)]


def _rates(job: Job) -> dict[str, Any]:
    job.check_time()
    return {} if job.tiny else machine.rates(5)


def _compile(job: Job) -> dict[str, Any]:
    """Seconds to compile a sample of a tree of 300 leaves, whatever was compiled before."""
    job.check_time()
    shapes = workloads.build("leaves300").shapes
    shapes = dict(list(shapes.items())[:20]) if job.tiny else shapes
    state = jax.eval_shape(swagjax.swag(RANK).init, shapes)
    key = jax.eval_shape(lambda: jax.random.key(0))
    cached = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # which remembers whether it is used
    begun = time.perf_counter()
    jax.jit(swagjax.sample).lower(key, state).compile()
    seconds = time.perf_counter() - begun
    jax.config.update("jax_enable_compilation_cache", cached)
    compilation_cache.reset_cache()
    return {"leaves": len(shapes), "seconds": seconds}


def _network(job: Job) -> str:
    return "lenet5" if job.tiny else "resnet18"


def _random_state(size: int) -> tuple[swagjax.SWAGState, dict[str, np.ndarray]]:
    """A state with a full ring, and the same numbers in float64."""
    rng = np.random.default_rng(0)
    exact = {
        "mean": 0.05 * rng.standard_normal(size),
        "variance": 1e-4 * rng.uniform(0.5, 2.0, size),
        "deviations": 1e-2 * rng.standard_normal((RANK, size)),
    }
    held = {name: x.astype(np.float32) for name, x in exact.items()}
    state = swagjax.swag(RANK).init(jnp.zeros(size))
    state = state._replace(num_collected=jnp.int32(RANK + 1), **jax.device_put(held))
    return state, {name: x.astype(np.float64) for name, x in held.items()}


def _size(job: Job) -> int:
    return 10_000 if job.tiny else 1_000_000


def _on_cpu(function: Any, *args: Any) -> Any:
    """The same function on the same numbers, on the CPU of the same machine."""
    cpu = jax.devices("cpu")[0]
    return jax.device_get(function(*jax.device_put(jax.device_get(args), cpu)))


def _error(found: Any, wanted: Any, origin: Any) -> float:
    """``|found - wanted| / |wanted - origin|``, in float64."""
    found, wanted, origin = (
        np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])
        for tree in (found, wanted, origin)
    )
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted - origin))


def _within(limit: float, error: float) -> dict[str, Any]:
    return {"holds": bool(error <= limit), "error": error, "limit": limit}
