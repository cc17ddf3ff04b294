"""The main job: SGD, SWA, SWAG-Diag and SWAG on image classification, in and out of distribution.

The defaults for digits were chosen on validation images alone, by

    python -m benchmarks classify --evaluate validation --swa-learning-rate R --weight-decay W

NLL of SWAG, mean ± standard error over 5 seeds of 90 images:

    R         W = 1e-4        W = 5e-4
    0.02   .0449±.0056     .0491±.0118
    0.05   .0473±.0049     .0519±.0060
    0.1    .0593±.0154     .0580±.0054

The differences are of the size of their errors. The rule: of the settings within one standard error
of the best, the one whose iterates move most. Those of 0.02 hardly do, and there all methods agree.
Epochs, batch size and the first learning rate were fixed before and not searched.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import options

DIGITS = {
    "model": "convnet",
    "epochs": 100,
    "start": 50,
    "batch_size": 16,
    "learning_rate": 0.05,
    "swa_learning_rate": 0.05,
    "weight_decay": 1e-4,
}
# Those of the paper for a network without BatchNorm (VGG16) on CIFAR-10, in a fifth of its epochs.
OTHERS = {
    "model": "lenet5",
    "epochs": 60,
    "start": 32,
    "batch_size": 128,
    "learning_rate": 0.05,
    "swa_learning_rate": 0.01,
    "weight_decay": 5e-4,
}
BATCH = 1000  # images predicted at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classify(options.Training, options.Data):
    """Train on some classes, compare SGD, SWA, SWAG-Diag and SWAG, tell other classes apart.

    Prints accuracy, NLL, ECE, Brier score and the AUROC by which predictive entropy tells the
    other classes apart; writes results.json, reliability.png and entropy.png.
    """

    num_samples: int = 30
    """Samples averaged by SWAG-Diag and SWAG."""
    results: Path = Path("results")
    """Folder under which classify/<dataset>/ is written."""


class Prediction(NamedTuple):
    """Probabilities that one member gives to the images in and out of distribution."""

    inside: np.ndarray
    outside: np.ndarray


Predictions = dict[str, list[Prediction]]  # method -> one a seed


def classify(chosen: Classify) -> None:
    """Train, predict, print the table, write the JSON and the pictures."""
    import rich  # here, as all that is heavy: --help needs none of it

    from benchmarks import data, models, report, training

    chosen = options.complete(chosen, DIGITS if chosen.dataset == "digits" else OTHERS)
    task = data.load(chosen.dataset, chosen.data_dir, chosen.in_classes, chosen.evaluate)
    chosen = options.complete(chosen, {"augment": training.usual_augmentation(task.train.images)})
    training.check(chosen, len(task.train.labels))
    if chosen.num_samples < 1:
        raise options.UsageError(f"--num-samples {chosen.num_samples}: at least 1")
    model = models.MODELS[chosen.model](len(chosen.in_classes))
    folder = _folder(chosen)
    trained = _train(model, task, chosen, folder / "checkpoints")
    predictions = _predict(model, task, trained, chosen.num_samples)
    results = _scores(predictions, task.evaluation.labels)
    rich.print(_title(chosen, task), report.table(results))
    report.write_json(folder / "results.json", _record(chosen, task, results))
    _draw(folder, predictions, task.evaluation.labels)
    print(f"results.json, reliability.png and entropy.png are in {folder}")


def _folder(chosen: Classify) -> Path:
    """Where results go; those on validation data never overwrite those on test data."""
    name = re.sub(r"[^\w.-]+", "-", chosen.dataset)
    name += "" if chosen.evaluate == "test" else f"-{chosen.evaluate}"
    return chosen.results / "classify" / name


def _train(model: Any, task: Any, chosen: Classify, folder: Path) -> dict[Any, list[Any]]:
    """The members trained by each optimizer that a method needs."""
    from benchmarks import methods, training

    training.open_checkpoints(folder, chosen)
    optimizers = dict.fromkeys(method.optimizer for method in methods.METHODS.values())
    return {
        optimizer: training.train(model, task.train, optimizer, chosen, folder / optimizer.__name__)
        for optimizer in optimizers
    }


def _predict(model: Any, task: Any, trained: dict[Any, list[Any]], samples: int) -> Predictions:
    """What every method's members say to the images in and out of distribution."""
    from benchmarks import methods, training

    predict = methods.predictor(model, task.train.images, samples)
    images = np.concatenate([task.evaluation.images, task.ood.images])
    batches = np.split(images, range(BATCH, len(images), BATCH))
    inside = len(task.evaluation.images)

    def of_member(seed: int, method: Any) -> Prediction:
        key = training.key(seed, training.PREDICT)
        probs = np.concatenate(list(predict(key, method, trained[method.optimizer][seed], batches)))
        return Prediction(probs[:inside], probs[inside:])

    return {
        name: [of_member(seed, method) for seed in range(len(trained[method.optimizer]))]
        for name, method in methods.METHODS.items()
    }


def _scores(predictions: Predictions, labels: np.ndarray) -> dict[str, dict[str, list[float]]]:
    """Every metric of every method, one value a seed."""
    from swagjax import metrics

    def auroc(p: Prediction) -> Any:
        return metrics.auroc(*map(metrics.predictive_entropy, p))

    of = {
        "accuracy": lambda p: metrics.accuracy(p.inside, labels),
        "NLL": lambda p: metrics.nll(p.inside, labels),
        "ECE": lambda p: metrics.ece(p.inside, labels, binning="count"),
        "Brier": lambda p: metrics.brier(p.inside, labels),
        "OOD AUROC": auroc,
    }
    return {
        name: {metric: [float(score(p)) for p in members] for metric, score in of.items()}
        for name, members in predictions.items()
    }


def _title(chosen: Classify, task: Any) -> str:
    return (
        f"{chosen.dataset}: trained on {len(task.train.labels)} images; {chosen.evaluate} images, "
        f"{len(task.evaluation.labels)} in and {len(task.ood.labels)} out of distribution; "
        f"mean ± standard error over {chosen.seeds} seeds"
    )


def _record(chosen: Classify, task: Any, results: Any) -> dict[str, Any]:
    from benchmarks import report, training

    images = {part: len(getattr(task, part).labels) for part in task._fields}
    return report.record(
        results,
        experiment="classify",
        evaluated_on=chosen.evaluate,
        options=training.identity(chosen),
        images=images,
    )


def _draw(folder: Path, predictions: Predictions, labels: np.ndarray) -> None:
    """The reliability diagram and the entropy histograms, over the images of all seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from swagjax import metrics, plot

    pooled = {
        n: Prediction(*map(np.concatenate, zip(*m, strict=True))) for n, m in predictions.items()
    }
    figure, ax = plt.subplots(figsize=(7, 5), layout="constrained")
    for name, p in pooled.items():
        bins = metrics.reliability(
            p.inside, np.tile(labels, len(predictions[name])), binning="count"
        )
        plot.reliability_diagram(*bins, ax=ax, label=name)
    figure.savefig(folder / "reliability.png", dpi=120)
    figure, axes = plt.subplots(2, 2, figsize=(10, 8), layout="constrained", sharey=True)
    for ax, (name, p) in zip(axes.flat, pooled.items(), strict=True):
        entropies = map(metrics.predictive_entropy, p)
        plot.entropy_histograms(*entropies, num_classes=p.inside.shape[-1], ax=ax)
        ax.set(title=name, yscale="log")
        ax.label_outer()
    for ax in axes[0]:
        ax.get_legend().remove()
    figure.savefig(folder / "entropy.png", dpi=120)
    plt.close("all")
