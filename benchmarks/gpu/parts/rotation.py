"""A digit that is turned from 0 to 180 degrees, as five LeNet5s and their ensembles see it."""

from typing import Any

import jax
import numpy as np

import swagjax
from benchmarks import corruptions
from benchmarks.gpu import classification
from benchmarks.gpu.classification import Predictor, Setting
from benchmarks.gpu.job import Job
from benchmarks.models import LeNet5
from swagjax import ensemble, metrics

SETTING = Setting(
    LeNet5,
    learning_rate=0.02,
    swa_learning_rate=0.01,
    weight_decay=5e-4,
    dataset="mnist",
    seeds=5,
    epochs=60,
    start=32,
    augment=("shift",),
    reserve=60.0,
)
DIGIT = 1
IMAGES = 100  # test images that means are over; the digit is drawn alone as well
STYLES = {
    "SGD": ("#000000", ":"),
    "SWAG": ("#0072B2", "-"),
    "deep ensemble": ("#D55E00", "--"),
    "MultiSWAG": ("#CC79A7", "-."),
}


def setting(tiny: bool) -> Setting:
    """What is trained."""
    return SETTING.tiny(dtype="float32") if tiny else SETTING


def run(job: Job) -> None:
    """Train, turn, predict, draw, write."""
    chosen = setting(job.tiny)
    task = classification.load(job, chosen)
    trained = classification.train(job, chosen, task)
    predictor = Predictor(chosen, task, trained, job.seed)
    digit = task.test.images[task.test.labels == DIGIT][0]
    images = np.concatenate([digit[None], task.test.images[:IMAGES]])
    labels = np.append(DIGIT, task.test.labels[:IMAGES])
    angles = np.linspace(0, 180, 7 if job.tiny else 37)
    turn = jax.jit(corruptions.rotate)
    turned = np.stack([np.asarray(turn(images.astype(np.float32), angle)) for angle in angles])
    curves = {}
    for method in STYLES:
        job.say(f"predicting by {method}")
        probs = job.array(method.replace(" ", "-"), lambda m=method: _predict(predictor, m, turned))
        curves[method] = _curves(probs.reshape(*turned.shape[:2], -1), labels)
    _draw(job, angles, curves)
    job.finish(digit=DIGIT, angles=angles.tolist(), results=curves)


def _predict(predictor: Predictor, method: str, turned: np.ndarray) -> np.ndarray:
    """Probabilities of all turned images, by the first seed or by all."""
    images = turned.reshape(-1, *turned.shape[2:])
    if method in ("SGD", "SWAG"):
        return predictor.probabilities(method, 0, images)
    trained, setting = predictor.trained, predictor.setting
    if method == "deep ensemble":
        return predictor.of(ensemble.Points(trained.decayed.params), images, setting.seeds)
    mixture = ensemble.mix(swagjax.get_state(trained.averaged.opt_state))
    of_each = max(1, setting.samples // setting.seeds)
    return predictor.of(mixture, images, of_each * setting.seeds)


def _curves(probs: np.ndarray, labels: np.ndarray) -> dict[str, list[float]]:
    """Probability of the true class and entropy at every angle: the digit, and the mean of all."""
    true = np.take_along_axis(probs, labels[None, :, None], -1)[..., 0]
    entropy = np.asarray(metrics.predictive_entropy(probs))
    return {
        "one digit, true class": true[:, 0].tolist(),
        "one digit, entropy": entropy[:, 0].tolist(),
        "all images, true class": true[:, 1:].mean(-1).tolist(),
        "all images, entropy": entropy[:, 1:].mean(-1).tolist(),
    }


def _draw(job: Job, angles: np.ndarray, curves: dict[str, Any]) -> None:
    plt = classification.pyplot()
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained", sharex=True)
    for ax, name in zip(axes.T.flat, next(iter(curves.values())), strict=True):
        for method, of in curves.items():
            color, line = STYLES[method]
            ax.plot(angles, of[name], color=color, linestyle=line, label=method)
        ax.set_title(name)
    for ax in axes[1]:
        ax.set_xlabel("rotation (degrees)")
    axes[0, 0].legend(frameon=False)
    figure.suptitle("A digit that is turned: LeNet5 on MNIST")
    job.picture(figure)
    plt.close(figure)
