"""Loss on the plane through SGD, SWA and where they part, of a PreResNet-20."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.tree_util import Partial

import swagjax
from benchmarks.gpu import classification
from benchmarks.gpu.classification import Predictor, Setting
from benchmarks.gpu.job import Job
from benchmarks.gpu.parts import preresnet
from swagjax import plot, surface

POINTS = 21  # along either axis
IMAGES = 5000  # of training, and as many of testing, that the plane is evaluated on
DEPTH20 = 3  # blocks a stage
COLORS = {"start": ("#CC79A7", "D"), "SGD": ("#D55E00", "s"), "SWA": ("#56B4E9", "*")}


def setting(tiny: bool) -> Setting:
    """What is trained: a single seed."""
    return dataclasses.replace(
        preresnet.setting(tiny, DEPTH20), seeds=1, reserve=150.0 * (not tiny)
    )


def run(job: Job) -> None:
    """Train, evaluate on the plane, draw, write."""
    chosen = setting(job.tiny)
    task = classification.load(job, chosen)
    trained = classification.train(job, chosen, task)
    predictor = Predictor(chosen, task, trained, job.seed)
    state = swagjax.get_state(trained.averaged.opt_state)
    weights = {"SWA": swagjax.mean(state), "SGD": trained.decayed.params}
    weights["start"] = trained.common.params
    plane = surface.plane(*weights.values())
    number = 5 if job.tiny else POINTS
    x, y = surface.grid(plane, number, margin=0.5)
    found = _evaluate(job, predictor, task, plane, (x, y))
    shadow = jax.device_get(surface.project(plane, state))
    points = dict(zip(weights, np.asarray(plane.points).tolist(), strict=True))
    _draw(job, np.asarray(x), np.asarray(y), found, points, shadow)
    job.finish(
        points=points,
        swag={"mean": shadow.mean.tolist(), "covariance": shadow.covariance.tolist()},
        grid={"x": np.asarray(x).tolist(), "y": np.asarray(y).tolist()},
        results={name: values.tolist() for name, values in found.items()},
    )


def _evaluate(job: Job, predictor: Predictor, task: Any, plane: Any, at: Any) -> dict[str, Any]:
    """Loss and error of both parts at every point, BatchNorm refreshed at each."""
    seen = {
        name: tuple(jax.device_put(x[:IMAGES]) for x in part)
        for name, part in (("train", task.train), ("test", task.test))
    }
    names = sorted(f"{name} {what}" for name in seen for what in ("loss", "error"))

    def compute() -> np.ndarray:
        refresh = predictor.refresh(seen["train"][0])
        path = Partial(surface.point, plane)
        found = surface.evaluate(predictor.scores, path, at, seen, refresh=refresh)
        return np.stack([np.asarray(found[name]) for name in names])

    job.say("the plane")
    return dict(zip(names, job.array("plane", compute), strict=True))


def _draw(job: Job, x: Any, y: Any, found: dict[str, Any], points: Any, shadow: Any) -> None:
    plt = classification.pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(13, 6.4), layout="constrained")
    for ax, name in zip(axes, ("train loss", "test error"), strict=True):
        values = found[name]
        top = max(float(np.nanquantile(values, 0.9)), float(np.nanmin(values)) + 1e-3)
        plot.loss_surface(x, y, values, top=top, ax=ax, label=name)
        plot.posterior_ellipse(shadow.mean, shadow.covariance, ax=ax, label="SWAG")
        for which, (color, marker) in COLORS.items():
            style = {"color": color, "marker": marker, "linestyle": "none", "ms": 9}
            plot.plane_points(points[which], ax=ax, label=which, **style)
        ax.set_title(f"{name} on the plane through start, SGD and SWA")
    job.picture(figure)
    plt.close(figure)
