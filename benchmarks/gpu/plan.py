"""What every part costs: operations and bytes counted beforehand, beside what was measured.

Full sizes are only traced. Throughput is measured on the rehearsal, an epoch of each part's tiny
network: it says that the programs run and how a CPU does, no more.
"""

import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import report
from benchmarks.gpu import classification, training
from benchmarks.gpu.classification import Part, Setting, Task
from benchmarks.gpu.counting import Cost, cost
from benchmarks.gpu.parts import PARTS
from benchmarks.speed import machine, workloads

RECORD = Path(__file__).parent / "plan.json"
# An NVIDIA H200: measured bf16 products of 8192 x 8192 and a copy, bytes read and written.
DEVICE = {"name": "NVIDIA H200", "flop_per_second": 790e12, "bytes_per_second": 4.3e12}
# What is assumed of it: a fifth of its products, half of its copy, and for every product three
# kernels of 2.5 us, which is what small ones take however little they do.
SHARE = {"flop": 0.2, "bytes": 0.5, "seconds_per_product": 7.5e-6}
SIZES = {"cifar10": (50_000, 10_000, (32, 32, 3)), "mnist": (60_000, 10_000, (28, 28, 1))}
GRID = 21**2  # points of the plane of ``surface``, 10,000 images and 5,000 of BatchNorm at each


def show(measure: bool) -> int:
    """Print the table; count and time it anew where that is wanted."""
    if measure:
        report.write_json(RECORD, record())
    content = json.loads(RECORD.read_text())
    print(table(content))
    return 0


def record() -> dict[str, Any]:
    """The plan of all parts, as JSON."""
    parts = {name: _plan(name) for name in PARTS}
    return {
        "device": DEVICE,
        "assumed": SHARE,
        "rehearsed_on": machine.describe(),
        "versions": report.versions(),
        "parts": parts,
    }


def table(content: dict[str, Any]) -> str:
    """One line a part: what it costs at full size, and what its rehearsal measured."""
    head = ("part", "PFLOP", "TB", "products", "minutes, bound by", "rehearsal: s, GFLOP/s")
    rows = [head]
    for name, of in content["parts"].items():
        full, tiny = of["full"], of["rehearsal"]
        rows.append(
            (
                name,
                f"{full['flop'] / 1e15:.3g}",
                f"{full['bytes'] / 1e12:.3g}",
                f"{full['products']:.2g}",
                f"{full['seconds'] / 60:.1f}, {full['bound']}",
                f"{tiny['seconds']:.2g}, {tiny['flop'] / tiny['seconds'] / 1e9:.3g}",
            )
        )
    wide = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, wide, strict=True)) for row in rows]
    note = (
        f"minutes: of {content['device']['name']} at {SHARE['flop']:.0%} of its bf16 products, "
        f"{SHARE['bytes']:.0%} of its copy, {SHARE['seconds_per_product'] * 1e6:g} us a product; "
        "compiling comes on top"
    )
    return "\n".join([*(line.rstrip() for line in lines), note])


def estimate(found: Cost) -> dict[str, Any]:
    """Seconds on the device, and which of the three bounds them."""
    seconds = {
        "flop": found.flop / (SHARE["flop"] * DEVICE["flop_per_second"]),
        "bytes": found.bytes / (SHARE["bytes"] * DEVICE["bytes_per_second"]),
        "launches": found.products * SHARE["seconds_per_product"],
    }
    bound = max(seconds, key=seconds.__getitem__)
    return {**found._asdict(), "seconds": seconds[bound], "bound": bound}


def _plan(name: str) -> dict[str, Any]:
    print(f"counting {name}", flush=True)
    setting = PARTS[name].setting
    if setting is None:
        return {"full": estimate(_of_check()), "rehearsal": _rehearse_check()}
    full = setting(False)
    costs = training_costs(full)
    total = costs["training"] + costs["predictions"]
    if name == "surface":
        total = costs["training"] + _of_plane(full)
    return {
        "full": estimate(total) | {k: v._asdict() for k, v in costs.items()},
        "rehearsal": _rehearse(setting(True)),
    }


def abstract_task(setting: Setting) -> Task:
    """A task of the size of the real one, of images that are all zero."""
    train, test, shape = SIZES[setting.dataset]
    classes = setting.classes or tuple(range(10))
    kept = train * len(classes) // 10 - setting.held_out

    def part(number: int) -> Part:
        return Part(np.zeros((number, *shape), np.uint8), np.zeros(number, np.int32))

    inside = test * len(classes) // 10
    return Task(part(kept), part(setting.held_out), part(inside), part(test - inside), classes)


def abstract_epoch(setting: Setting, task: Task, collecting: bool = False) -> tuple[Any, ...]:
    """The program of an epoch, and the shapes of its arguments."""
    recipe, steps = classification.recipe_of(setting, task), classification.steps_of(setting, task)
    keys = jax.eval_shape(lambda: classification.seed_keys(0, setting.seeds))

    def network(keys: Any) -> Any:
        return training.initialise(recipe, keys, task.train.images[0])

    tx, axes, begin = training.plain(recipe), 0, jax.eval_shape(network, keys)
    if collecting:
        tx = training.collecting(recipe, steps)
        axes = training.member_axes(recipe, classification.one_of(recipe, begin), steps)
        begin = jax.eval_shape(lambda n: training.begin_collecting(recipe, n, steps), begin)
    program = training.epoch(recipe, tx, steps, axes)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in task.train]
    number, rate = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), jnp.float32)
    return program, (begin, keys, number, rate, *shapes)


def training_costs(setting: Setting) -> dict[str, Cost]:
    """Of both trainings, with the weights that every step moves, and of all predictions."""
    task = abstract_task(setting)
    program, args = abstract_epoch(setting, task)
    steps, rates = (
        classification.steps_of(setting, task),
        classification.schedule(setting, setting.epochs),
    )
    # Every step reads weights, gradients and momenta, and writes all but the gradients.
    moved = 5 * sum(4 * x.size for x in jax.tree.leaves(args[0].params)) * steps
    of_epoch = cost(program, *args) + Cost(0, moved, 0)
    epochs = 2 * setting.epochs - rates.common
    return {
        "epoch": of_epoch,
        "training": of_epoch.times(epochs),
        "predictions": _predicting(setting, task),
    }


def _predicting(setting: Setting, task: Task) -> Cost:
    """One pass for SGD and for SWA, one a sample for SWAG-Diag and SWAG; and their BatchNorm's."""
    images = sum(len(part.labels) for part in (task.held_out, task.test, task.outside))
    passes = 2 + 2 * setting.samples
    total = _pass(setting, task, images).times(passes)
    if _network(setting, task).batch_stats:
        total += _pass(setting, task, len(task.train.labels)).times(passes - 1)
    return total.times(setting.seeds)


def _of_plane(setting: Setting) -> Cost:
    task = abstract_task(setting)
    return _pass(setting, task, 15_000).times(GRID)


def _pass(setting: Setting, task: Task, images: int) -> Cost:
    """So many images through the network, ``chunk`` at a time."""
    recipe, network = classification.recipe_of(setting, task), _network(setting, task)
    x = jax.ShapeDtypeStruct((setting.chunk, *task.train.images.shape[1:]), jnp.uint8)
    stats = network.batch_stats or None

    def probabilities(params: Any, stats: Any, x: Any) -> Any:
        return classification.probabilities(recipe, params, x, stats)

    return cost(probabilities, network.params, stats, x).times(images / setting.chunk)


def _network(setting: Setting, task: Task) -> Any:
    """The shapes of one network."""
    recipe = classification.recipe_of(setting, task)._replace(seeds=1)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(lambda k: training.initialise(recipe, k, task.train.images[0]), key)


def _rehearse(setting: Setting) -> dict[str, float]:
    """An epoch of the tiny network, timed after it was compiled."""
    from benchmarks.gpu import data

    images = data.load(setting.dataset, None, tiny=True)
    task = classification.task_of(setting, images)
    program, shapes = abstract_epoch(setting, task)
    recipe = classification.recipe_of(setting, task)
    keys = classification.seed_keys(0, setting.seeds)
    network = training.initialise(recipe, keys, task.train.images[0])
    network, _ = program(network, keys, 0, np.float32(0.01), *task.train)
    begun = time.perf_counter()
    jax.block_until_ready(program(network, keys, 1, np.float32(0.01), *task.train))
    return {"seconds": time.perf_counter() - begun, "flop": cost(program, *shapes).flop}


def _of_check() -> Cost:
    """One call of each figure of ``check``: samples of ResNet-18, 30 LeNet5s on 2,000 images."""
    from benchmarks.gpu.parts import check

    size = 4 * workloads.parameters(workloads.build("resnet18"))
    K, S = check.RANK, check.SAMPLES
    moved = (9 + (K + 2 + 1) + (K + 2 + S)) * size
    lenet5 = workloads.build("lenet5")
    x = jax.ShapeDtypeStruct((2000, *workloads.IMAGE), jnp.float32)
    return cost(workloads.probabilities(lenet5), lenet5.shapes, x).times(S) + Cost(0, moved, 0)


def _rehearse_check() -> dict[str, float]:
    """A pass of LeNet5 over 64 images."""
    lenet5, x = workloads.build("lenet5"), workloads.images(64)
    params, probs = workloads.random_params(lenet5), jax.jit(workloads.probabilities(lenet5))
    jax.block_until_ready(probs(params, x))
    begun = time.perf_counter()
    jax.block_until_ready(probs(params, x))
    return {"seconds": time.perf_counter() - begun, "flop": cost(probs, params, x).flop}
