"""What a process with several devices answers: times and transfers of sharded programs."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import swagjax
from benchmarks.speed import measure, programs, workloads

_TRANSFERS = ("all-gather", "all-to-all", "collective-permute")


def answer(workload: str, rank: int, samples: int, images: int, rounds: int) -> dict[str, Any]:
    """Seconds of each program, bytes of its largest transfer between devices, and of the ring's.

    ``sample``: weights sharded over all devices, one draw. ``predict``: as many samples side by
    side as there are devices, one on each, where images are given.
    """
    mesh = jax.make_mesh(
        (jax.device_count(),), ("devices",), axis_types=(jax.sharding.AxisType.Auto,)
    )
    chosen = workloads.build(workload)
    _, state = workloads.state(chosen, rank, lambda tree: shard(mesh, tree))
    runs = {"sample": (jax.jit(swagjax.sample), jax.random.key(3), state)}
    if images:
        _, whole = workloads.state(chosen, rank, lambda tree: replicate(mesh, tree))
        runs["predict"] = _predict(mesh, chosen, whole, samples, images)
    compiled = {name: run[0].lower(*run[1:]).compile() for name, run in runs.items()}
    return {
        "devices": jax.device_count(),
        "ring_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state.deviations)),
        "moved_bytes": {name: _moved(c) for name, c in compiled.items()},
        "moved_ring_bytes": {name: _moved(c, rank) for name, c in compiled.items()},
        "seconds": measure.interleave(
            {name: measure.timed(*run) for name, run in runs.items()}, rounds
        ),
    }


def shard(mesh: Mesh, tree: Any) -> Any:
    """Split every leaf over the devices along its largest axis that they divide, if one does."""

    def place(x: jax.Array) -> jax.Array:
        axes = sorted(range(x.ndim), key=lambda i: -x.shape[i])
        axis = next((i for i in axes if x.shape[i] % mesh.size == 0), None)
        spec = [mesh.axis_names[0] if i == axis else None for i in range(x.ndim)]
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree.map(place, tree)


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Copy every leaf to all devices."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def _moved(compiled: Any, leading: int | None = None) -> int:
    return max(programs.largest_result(compiled, t, leading) for t in _TRANSFERS)


def _predict(
    mesh: Mesh, workload: workloads.Workload, state: Any, samples: int, images: int
) -> tuple[Any, ...]:
    samples = -(-samples // mesh.size) * mesh.size
    keys = jax.device_put(
        jax.random.split(jax.random.key(5), samples),
        NamedSharding(mesh, PartitionSpec(mesh.axis_names[0])),
    )
    prob_fn = workloads.probabilities(workload)

    def predict(keys: jax.Array, state: Any, x: jax.Array) -> jax.Array:
        return swagjax.predict(keys, state, prob_fn, x, chunk_size=mesh.size)

    return jax.jit(predict), keys, state, replicate(mesh, workloads.images(images))
