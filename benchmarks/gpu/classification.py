"""SGD, SWA and SWAG trained by the authors' schedule, and how good their predictions are.

Two trainings: SGD whose step decays to the end, and SGD that settles at a constant step, from where
SWA and SWAG collect. Both begin with the same epochs at the same step, which are trained once.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

import swagjax
from benchmarks import report
from benchmarks.gpu import data, training
from benchmarks.gpu.job import Job
from benchmarks.gpu.training import Network, Recipe
from swagjax import batch_stats, calibration, metrics, plot, schedules

METHODS = ("SGD", "SWA", "SWAG-Diag", "SWAG")  # and SWA-Temp, which needs no other prediction
SAMPLED = ("SWAG-Diag", "SWAG")
BINS = 30  # of predictive entropy
SETTLED = 0.5  # share of the epochs before the first collection at the first learning rate

# method -> of each seed the probabilities of the test images and of those outside
Predictions = dict[str, list[tuple[np.ndarray, ...]]]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is trained, by default as the authors did.

    Attributes:
      network: ``(classes=, dtype=) -> module``.
      learning_rate: of the first epochs.
      swa_learning_rate: while iterates are collected.
      weight_decay: L2 penalty that is added to the gradient.
      dataset: of ``benchmarks.gpu.data``.
      classes: those trained on, all others out of distribution; None for all.
      seeds: networks side by side.
      epochs: of the full schedule.
      start: epochs before the first collection.
      batch: images in a minibatch.
      augment: changes of the training images.
      rank: deviations that SWAG holds.
      samples: averaged by the methods that draw.
      held_out: training images that nothing is trained on, to fit the temperature.
      dtype: that the hidden layers compute in; weights are float32.
      chunk: images predicted at once.
      refresh: training images of a batch over which BatchNorm's moments are taken.
      reserve: seconds of the time box that predictions, pictures and the second compilation take.
    """

    network: Callable[..., Any]
    learning_rate: float
    swa_learning_rate: float
    weight_decay: float
    dataset: str = "cifar10"
    classes: tuple[int, ...] | None = None
    seeds: int = 1
    epochs: int = 300
    start: int = 161
    batch: int = 128
    augment: tuple[str, ...] = ("crop", "flip")
    rank: int = 20
    samples: int = 30
    held_out: int = 5000
    dtype: str = "bfloat16"
    chunk: int = 5000
    refresh: int = 2500
    reserve: float = 110.0

    def tiny(self, **changes: Any) -> "Setting":
        """The same at a size that a CPU does in seconds."""
        small = {"epochs": 4, "start": 2, "batch": 32, "rank": 2, "samples": 2, "held_out": 88}
        small |= {"chunk": 400, "refresh": 128, "reserve": 0.0, "seeds": min(2, self.seeds)}
        return dataclasses.replace(self, **(small | changes))


class Part(NamedTuple):
    """Images as bytes ``(N, H, W, C)``, and labels as positions in the classes."""

    images: np.ndarray
    labels: np.ndarray


class Task(NamedTuple):
    """What is trained on and judged on; ``outside`` is empty where all classes are trained on."""

    train: Part
    held_out: Part
    test: Part
    outside: Part
    classes: tuple[int, ...]


class Schedule(NamedTuple):
    """How long each training is, in epochs, and its learning rate in each of them.

    Attributes:
      common: epochs that both trainings begin with.
      start: epochs before the first collection.
      decayed: rates of SGD.
      averaged: rates of SWA and SWAG.
    """

    common: int
    start: int
    decayed: np.ndarray
    averaged: np.ndarray


class Trained(NamedTuple):
    """Networks at the end of each training, and at the end of what they have in common."""

    recipe: Recipe
    axes: Any  # of the seeds of ``averaged``
    common: Network
    decayed: Network
    averaged: Network


def run(job: Job, setting: Setting, published: dict[str, float] | None = None) -> None:
    """Train, predict, score, draw, write."""
    task = load(job, setting)
    trained = train(job, setting, task)
    predictions, temperatures = with_temperature(task, predict(job, setting, task, trained))
    draw(job, task, predictions)
    job.finish(
        **report.record(score(task, predictions)),
        published_nll=published or {},
        temperatures=temperatures,
    )


def load(job: Job, setting: Setting) -> Task:
    """The data, and a note of what is trained on it."""
    images = data.load(setting.dataset, job.data, job.tiny)
    task = task_of(setting, images)
    job.note(
        source=images.source,
        setting=_recorded(setting),
        dtype=setting.dtype,
        batch=setting.batch,
        images={name: len(getattr(task, name).labels) for name in task._fields[:4]},
    )
    return task


def task_of(setting: Setting, images: data.Images) -> Task:
    """The images by classes, some training images held out: the same ones always."""
    every = tuple(range(int(images.train_labels.max()) + 1))
    classes = setting.classes or every
    train = _of_classes(images.train, images.train_labels, classes)
    order = np.random.default_rng(0).permutation(len(train.labels))
    kept, held_out = order[setting.held_out :], order[: setting.held_out]
    others = tuple(c for c in every if c not in classes)
    return Task(
        Part(train.images[kept], train.labels[kept]),
        Part(train.images[held_out], train.labels[held_out]),
        _of_classes(images.test, images.test_labels, classes),
        _of_classes(images.test, images.test_labels, others),
        classes,
    )


def train(job: Job, setting: Setting, task: Task) -> Trained:
    """Both trainings, as long as fits the time box; what an earlier run did is not done again."""
    recipe, steps = recipe_of(setting, task), steps_of(setting, task)
    keys = seed_keys(job.seed, setting.seeds)
    on_device = jax.device_put((task.train.images, task.train.labels))
    fresh = functools.partial(training.initialise, recipe, keys, task.train.images[0])
    program = training.epoch(recipe, training.plain(recipe), steps)
    chosen = job.stage("epochs", lambda: _choose(job, setting, program, fresh(), keys, on_device))
    rates = schedule(setting, chosen["epochs"])
    job.note(training=chosen | {"start": rates.start, "steps_per_epoch": steps})

    def fit(name: str, program: Any, begin: Network, of: np.ndarray, first: int) -> Any:
        found, history = training.fit(job, name, program, recipe, begin, of, first, keys, on_device)
        losses[name] = [round(float(np.mean(of_epoch)), 5) for of_epoch in history]
        job.note(losses=losses)
        return found

    losses: dict[str, list[float]] = {}
    common, start = rates.common, rates.start
    first = fit("common", program, fresh(), rates.decayed[:common], 0)
    decayed = fit("sgd", program, _copy(first), rates.decayed[common:], common)
    settled = fit("settling", program, _copy(first), rates.averaged[common:start], common)
    axes = training.member_axes(recipe, one_of(recipe, settled), steps)
    collecting = training.epoch(recipe, training.collecting(recipe, steps), steps, axes)
    begin = training.begin_collecting(recipe, settled, steps)
    averaged = fit("swag", collecting, begin, rates.averaged[start:], start)
    return Trained(recipe, axes, first, decayed, averaged)


def recipe_of(setting: Setting, task: Task) -> Recipe:
    """How the networks train, with the moments of the training images."""
    mean, std = _moments(task.train.images)
    model = setting.network(classes=len(task.classes), dtype=jnp.dtype(setting.dtype))
    return Recipe(
        model,
        setting.batch,
        setting.weight_decay,
        setting.augment,
        setting.rank,
        mean,
        std,
        setting.seeds,
    )


def steps_of(setting: Setting, task: Task) -> int:
    """Full batches in an epoch; the images left over wait for the next."""
    return len(task.train.labels) // setting.batch


def schedule(setting: Setting, epochs: int) -> Schedule:
    """The authors' schedule, in as many epochs.

    Example:
      >>> from benchmarks.gpu.classification import Setting, schedule
      >>> found = schedule(Setting(None, 0.05, 0.01, 5e-4), 300)
      >>> found.common, found.start, found.decayed.shape
      (81, 161, (300,))
      >>> print(found.averaged[[0, 80, 161, 299]], found.decayed[[150, 299]])
      [0.05 0.05 0.01 0.01] [0.05   0.0005]
    """
    start = max(1, round(setting.start * epochs / setting.epochs))
    rate, settled = setting.learning_rate, setting.swa_learning_rate
    numbers = np.arange(epochs)
    with jax.default_device(jax.devices("cpu")[0]):
        decayed = np.asarray(schedules.swa_schedule(rate, 0.01 * rate, epochs)(numbers))
        averaged = np.asarray(schedules.swa_schedule(rate, settled, start)(numbers))
    common = int(np.argmin(np.append(np.isclose(decayed, averaged, rtol=1e-6), False)))
    return Schedule(common, start, decayed.astype(np.float32), averaged.astype(np.float32))


def predict(job: Job, setting: Setting, task: Task, trained: Trained) -> dict[str, list[Any]]:
    """Of each method and seed, probabilities of the held-out, test and outside images."""
    parts = (task.held_out, task.test, task.outside)
    images = np.concatenate([part.images for part in parts])
    cuts = np.cumsum([len(part.labels) for part in parts])[:-1]
    predictor = Predictor(setting, task, trained, job.seed)

    def of(method: str, seed: int) -> list[np.ndarray]:
        name = f"predicted-{method}-{seed}"
        job.say(f"predicting by {method}, seed {seed}")
        return np.split(
            job.array(name, lambda: predictor.probabilities(method, seed, images)), cuts
        )

    return {method: [of(method, seed) for seed in range(setting.seeds)] for method in METHODS}


def with_temperature(task: Task, raw: dict[str, list[Any]]) -> tuple[Predictions, list[float]]:
    """Predictions of the test and outside images, SWA-Temp among them, and its temperatures."""
    found = {method: [tuple(p[1:]) for p in of_seeds] for method, of_seeds in raw.items()}
    temperatures = [_temperature(held_out, task) for held_out, *_ in raw["SWA"]]
    found["SWA-Temp"] = [
        tuple(_tempered(probs, t) for probs in two)
        for two, t in zip(found["SWA"], temperatures, strict=True)
    ]
    return found, temperatures


class Predictor:
    """What the posteriors of the networks say of images."""

    def __init__(self, setting: Setting, task: Task, trained: Trained, seed: int):
        self.setting, self.trained, self.seed = setting, trained, seed
        self._seen = jax.device_put(task.train.images)

    def probabilities(self, method: str, seed: int, images: np.ndarray) -> np.ndarray:
        """Averaged over samples, shape (N, classes)."""
        network = self.network(method, seed)
        number = self.setting.samples if method in SAMPLED else 1
        kept = network.batch_stats if method == "SGD" else None
        return self.of(self.posterior(method, network), images, number, kept)

    def network(self, method: str, seed: int) -> Network:
        """That of a seed."""
        trained = self.trained
        if method == "SGD":
            axes = jax.tree.map(lambda _: 0, trained.decayed)
            return training.of_seed(trained.recipe, trained.decayed, axes, seed)
        return training.of_seed(trained.recipe, trained.averaged, trained.axes, seed)

    def posterior(self, method: str, network: Network) -> Any:
        """A state, or a function of a key."""
        # A Partial is a pytree: networks differ in an argument of one program, which compiles once.
        if method == "SGD":
            return Partial(_point, network.params)
        state = swagjax.get_state(network.opt_state)
        if method == "SWA":
            return Partial(_point, swagjax.mean(state))
        return state._replace(deviations=None) if method == "SWAG-Diag" else state

    def of(self, posterior: Any, images: np.ndarray, number: int, kept: Any = None) -> np.ndarray:
        """The same of a given posterior; BatchNorm refreshed per sample, unless it is kept."""
        chunk = self.setting.chunk
        batches = [jax.device_put(b) for b in np.split(images, range(chunk, len(images), chunk))]
        how = {}
        if self.trained.common.batch_stats:
            how["refresh"] = batch_stats.keep(kept) if kept else self.refresh(self._seen)
        probs = swagjax.predict_batches(
            jax.random.fold_in(jax.random.key(self.seed), 1),
            posterior,
            self._probs,
            batches,
            num_samples=number,
            chunk_size=1,  # several under vmap would make convolutions grouped ones
            **how,
        )
        return np.concatenate(jax.device_get(list(probs)))

    def scores(self, params: Any, parts: Any, stats: Any = None) -> dict[str, jax.Array]:
        """Mean loss and error of some weights on each of several parts (images, labels)."""
        found = {}
        for name, (images, labels) in parts.items():
            probs = self._probs(params, images, stats)
            found[f"{name} loss"] = metrics.nll(probs, labels)
            found[f"{name} error"] = 1 - metrics.accuracy(probs, labels)
        return found

    def refresh(self, images: Any) -> Any:
        """A function from weights to BatchNorm statistics over these images."""
        stats = self.trained.common.batch_stats
        one = jax.tree.map(lambda x: x[0], stats) if self.setting.seeds > 1 else stats
        size = self.setting.refresh
        return batch_stats.refresher(self._train_pass, one, images, batch_size=size)

    @functools.cached_property
    def _probs(self) -> Callable[..., jax.Array]:
        return functools.partial(probabilities, self.trained.recipe)

    @functools.cached_property
    def _train_pass(self) -> Callable[..., Any]:
        return functools.partial(_pass, self.trained.recipe)


def score(task: Task, predictions: Predictions) -> dict[str, dict[str, list[float]]]:
    """Every metric of every method, one value a seed."""

    def of_seeds(seeds: list[Any]) -> dict[str, list[float]]:
        found = [_scores(*two, task.test.labels) for two in seeds]
        return {metric: [float(of[metric]) for of in found] for metric in found[0]}

    return {method: of_seeds(seeds) for method, seeds in predictions.items()}


def draw(job: Job, task: Task, predictions: Predictions) -> None:
    """Reliability of all methods, and the predictive entropy of each, all seeds together."""
    plt = pyplot()
    figure = plt.figure(figsize=(14, 8), layout="constrained")
    grid = figure.add_gridspec(2, len(predictions))
    ax = figure.add_subplot(grid[0, :])
    for i, (method, of_seeds) in enumerate(predictions.items()):
        test, outside = (np.concatenate(of) for of in zip(*of_seeds, strict=True))
        labels = np.tile(task.test.labels, len(of_seeds))
        bins = metrics.reliability(test, labels, binning="count")
        plot.reliability_diagram(*bins, ax=ax, label=method)
        below = figure.add_subplot(grid[1, i])
        _draw_entropies(below, test, outside, labels)
        below.set(title=method, yscale="log", ylabel=below.get_ylabel() if i == 0 else "")
    handles, names = below.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False)
    ax.set_title(f"{job.part}: 20 bins of equal count; below, predictive entropy")
    job.picture(figure)
    plt.close(figure)


def _draw_entropies(ax: Any, test: np.ndarray, outside: np.ndarray, labels: np.ndarray) -> None:
    """In and out of distribution, or of right and of wrong predictions."""
    right = test.argmax(-1) == labels
    two, names = (test, outside), ("in distribution", "out of distribution")
    if not len(outside):
        two, names = (test[right], test[~right]), ("right", "wrong")
    if len(two[0]) and len(two[1]):
        entropies = map(metrics.predictive_entropy, two)
        classes = test.shape[-1]
        plot.entropy_histograms(*entropies, num_classes=classes, num_bins=BINS, ax=ax, labels=names)
        ax.get_legend().remove()  # one below all


def pyplot() -> Any:
    """Matplotlib's, without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def _choose(
    job: Job, setting: Setting, program: Any, network: Network, keys: Any, on_device: Any
) -> dict[str, Any]:
    """How many epochs fit what is left of the time box, by the first ones."""
    rate = np.float32(setting.learning_rate)
    begun = time.perf_counter()
    network, loss = program(network, keys, 0, rate, *on_device)
    jax.block_until_ready(loss)
    first = time.perf_counter() - begun
    for number in (1, 2):
        network, loss = program(network, keys, number, rate, *on_device)
    jax.block_until_ready(loss)
    seconds = max((time.perf_counter() - begun - first) / 2, 1e-6)
    trained = len(on_device[1]) // setting.batch * setting.batch * setting.seeds
    return {
        "epochs": epochs_that_fit(setting, job.left(), seconds, job.epochs),
        "of_full_schedule": setting.epochs,
        "seconds_per_epoch": seconds,
        "first_epoch_seconds": first,
        "images_per_second": trained / seconds,
    }


def epochs_that_fit(setting: Setting, left: float, seconds: float, wanted: int | None) -> int:
    """As many as wanted; or the full schedule, or as much of it as fits, four at the least.

    Example:
      >>> from benchmarks.gpu.classification import Setting, epochs_that_fit
      >>> setting = Setting(None, 0.05, 0.01, 5e-4, reserve=100.0)
      >>> [epochs_that_fit(setting, 480.0, seconds, None) for seconds in (0.5, 1.0, 10.0)]
      [300, 208, 20]
    """
    if wanted is not None:
        return wanted
    share = (
        2 - SETTLED * setting.start / setting.epochs
    )  # of two trainings, without what they share
    fit = int(0.95 * (left - setting.reserve) / (seconds * share))  # the rest is for saves
    return max(4, min(setting.epochs, fit))


def _moments(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the pixels, per channel, by counting them."""
    shares = np.stack(
        [np.bincount(images[..., c].ravel(), minlength=256) for c in range(images.shape[-1])]
    ) / (images.size / images.shape[-1])
    values = np.arange(256)
    mean = shares @ values
    std = np.sqrt(np.maximum(shares @ values**2 - mean**2, 1.0))  # 1: of images all alike
    return tuple(mean.tolist()), tuple(std.tolist())


def _of_classes(images: np.ndarray, labels: np.ndarray, classes: tuple[int, ...]) -> Part:
    found = np.isin(labels, classes)
    position = {c: i for i, c in enumerate(classes)}
    return Part(images[found], np.array([position[c] for c in labels[found].tolist()], np.int32))


def seed_keys(seed: int, seeds: int) -> jax.Array:
    """One key, or one a seed."""
    keys = [jax.random.key(seed + i) for i in range(seeds)]
    return keys[0] if seeds == 1 else jnp.stack(keys)


def one_of(recipe: Recipe, network: Network) -> Network:
    """The shapes of one of the networks side by side."""
    axes = jax.tree.map(lambda _: 0, network)
    return jax.eval_shape(lambda n: training.of_seed(recipe, n, axes, 0), network)


def _copy(network: Network) -> Network:
    return jax.tree.map(jnp.copy, network)


def _recorded(setting: Setting) -> dict[str, Any]:
    content = dataclasses.asdict(setting)
    network = setting.network
    name = getattr(network, "func", network).__name__
    return content | {"network": name, **getattr(network, "keywords", {})}


def _point(params: Any, key: jax.Array) -> Any:
    return params


def probabilities(recipe: Recipe, params: Any, images: Any, stats: Any = None) -> jax.Array:
    """What a network says of images of bytes, shape (N, classes)."""
    variables = {"params": params} | ({} if stats is None else {"batch_stats": stats})
    return jax.nn.softmax(recipe.model.apply(variables, training.normalise(recipe, images)))


def _pass(recipe: Recipe, params: Any, stats: Any, images: Any) -> Any:
    variables = {"params": params, "batch_stats": stats}
    inputs = training.normalise(recipe, images)
    return recipe.model.apply(variables, inputs, train=True, mutable=["batch_stats"])[1][
        "batch_stats"
    ]


def _temperature(held_out: np.ndarray, task: Task) -> float:
    try:
        return float(calibration.fit_temperature(_log(held_out), task.held_out.labels))
    except ValueError:  # all are right, so that none is best; or no better than a guess
        return 1.0


def _log(probs: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(probs, np.finfo(np.float32).tiny))


def _tempered(probs: np.ndarray, temperature: float) -> np.ndarray:
    return np.asarray(jax.nn.softmax(_log(probs) / np.float32(temperature), axis=-1))


def _scores(test: np.ndarray, outside: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    found = {
        "accuracy": metrics.accuracy(test, labels),
        "NLL": metrics.nll(test, labels),
        "ECE": metrics.ece(test, labels, binning="count"),
        "Brier": metrics.brier(test, labels),
    }
    if len(outside):
        entropies = [metrics.predictive_entropy(probs) for probs in (test, outside)]
        found["OOD AUROC"] = metrics.auroc(*entropies)
        found["FPR95"] = metrics.fpr95(*entropies)
        found["sym. KL"] = metrics.symmetrised_kl(*entropies, test.shape[-1], BINS)
    return found
