"""Memory: of the state, of compiled programs, of whole processes; and what sharding does to it."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

import swagjax
from benchmarks.speed import child, machine, programs, workloads
from benchmarks.speed.figures import predicting
from benchmarks.speed.figures.setting import Setting
from benchmarks.speed.results import Figure

DEVICES = (1, 2, 4, 8)
_FEW = 16  # images, where memory is what counts


def memory(setting: Setting) -> Iterator[Figure]:
    """Bytes of the state, temporary bytes of the programs, peaks of processes of their own."""
    floats = machine.FLOAT * workloads.parameters(setting.workload)
    state = jax.eval_shape(swagjax.swag(setting.rank).init, setting.workload.shapes)
    held = sum(leaf.dtype.itemsize * int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(state))
    yield Figure(
        name="state",
        workload=setting.name,
        unit="B",
        ours=[float(held)],
        floor=[float((setting.rank + 2) * floats)],
        floor_is="(K + 2) P floats",
        target=1.001,
    )
    ring = setting.rank * floats
    longer = _temporary(setting._replace(rank=2 * setting.rank))
    for name, temporary in _temporary(setting).items():
        copied = (longer[name] - temporary) / ring  # by how much a ring twice as long needs more
        yield Figure(
            name=f"temporary of {name}",
            workload=setting.name,
            unit="B",
            ours=[float(temporary)],
            floor=[float(floats)],
            floor_is="P floats, one sample",
            checks={f"no copy of the ring, nor of a part of it ({copied:.0%})": copied < 0.01},
            details={"share_of_the_ring_that_is_copied": copied},
        )
    yield from _peaks(setting, held)


def scaling(setting: Setting) -> Iterator[Figure]:
    """Samples of sharded weights and predictions spread over devices, in processes of their own."""
    answers = {}
    for devices in DEVICES:
        environment = {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
        with child.running(child.OURS, setting.threads, environment) as ask:
            answers[devices] = ask(
                "scaling",
                workload=setting.name,
                rank=setting.rank,
                samples=setting.samples,
                images=_FEW if setting.name == "lenet5" else 0,
                rounds=min(3, setting.rounds),
            )
    for name, alone in answers[1]["seconds"].items():
        for devices in DEVICES[1:]:
            answer = answers[devices]
            moved = {key: answer[key][name] for key in ("moved_bytes", "moved_ring_bytes")}
            yield Figure(
                name=f"{name} on {devices} virtual devices",
                workload=setting.name,
                ours=answer["seconds"][name],
                floor=alone,
                floor_is="the same on one device, which has the same cores",
                checks={"no transfer of the ring": moved["moved_ring_bytes"] == 0},
                details={**moved, "ring_bytes": answer["ring_bytes"]},
            )


def _temporary(setting: Setting) -> dict[str, int]:
    """Temporary bytes of a collection, of samples and of a prediction."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), setting.samples))
    shapes, tx = setting.workload.shapes, swagjax.swag(setting.rank)
    state, many = jax.eval_shape(tx.init, shapes), jax.vmap(swagjax.sample, (0, None))
    lowered = {
        "collect": workloads.collector(tx).lower((shapes, state), shapes),
        "sample 1": jax.jit(swagjax.sample).lower(key, state),
        f"sample {setting.samples}": jax.jit(many).lower(keys, state),
    }
    if setting.workload.model is not None:
        prob_fn, how = workloads.probabilities(setting.workload), predicting.refreshing(setting)
        x = workloads.images(_FEW)

        def predict(key: Any, state: Any) -> jax.Array:
            return swagjax.predict(key, state, prob_fn, x, num_samples=setting.samples, **how)

        lowered["predict"] = jax.jit(predict).lower(key, state)
    return {name: programs.temporary_bytes(program.compile()) for name, program in lowered.items()}


def _peaks(setting: Setting, held: int) -> Iterator[Figure]:
    """Peak of a fresh process above its idle self: to collect, to sample, to predict."""
    refresh = _FEW if setting.workload.batch_stats else 0
    sizes = {"samples": 1, "images": _FEW, "refresh": refresh, "batch": _FEW}
    request = {
        "workload": setting.name,
        "rank": setting.rank,
        "steps": [["sample", {"samples": 1}], ["predict", sizes]],
    }
    peaks: dict[str, dict[str, int]] = {}
    for name, command in {"ours": child.OURS, **setting.commands}.items():
        with contextlib.suppress(child.ChildError), child.running(command, setting.threads) as ask:
            peaks[name] = ask("memory", **request)["peaks"]
    for step in ("collect", "sample", "predict"):
        yield Figure(
            name=f"peak above idle, {step}",
            workload=setting.name,
            unit="B",
            ours=[float(peaks["ours"][step])],
            floor=[float(held)],
            floor_is="the state",
            peers={name: [float(p[step])] for name, p in peaks.items() if name != "ours"},
            ahead=1.0,
        )
