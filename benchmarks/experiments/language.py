"""A small language model on bytes of text: Adam with a decayed rate, SWA, SWAG-Diag and SWAG.

Tokens are the bytes of UTF-8, so that no token is unknown. The text is split by position: the first
80 % to train on, 10 % held out to choose settings by, the last 10 % to test on. These two are read
in windows, each predicted from its own beginning.

All methods share the first part of a run. Then the learning rate of the baseline falls to zero in a
straight line; that of the others stays as it is, and their iterates are collected.

The learning rate and the start were chosen on the held-out text alone, by

    python -m benchmarks language --evaluate validation --seeds 2 --learning-rate R --start S

Perplexity, mean ± standard error over 2 seeds:

    S       R          Adam          SWA          SWAG
    2400   0.002   3.884±.027   3.928±.030   3.931±.021
           0.005   3.953±.022   4.032±.009   4.054±.017
    3200   0.001   4.085±.019   4.089±.014   4.096±.016
           0.002   3.871±.027   3.874±.026   3.880±.022
           0.004   3.853±.045   3.858±.040   3.874±.041

The rule: the least perplexity, which all three have in the same row. Averages over the longer part
of the run lag behind: the network still learns. All else was fixed before and not searched.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from benchmarks.options import UsageError, identity

WARMUP = 100  # steps in which the learning rate rises from zero
CHUNK = 50  # steps between two movements of the progress bar
BATCH = 32  # windows predicted at once
INIT, TRAIN, PREDICT = range(3)  # what a seed is used for
METHODS = ("Adam", "SWA", "SWAG-Diag", "SWAG")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Language:
    """Train a small transformer on bytes of text; compare Adam, SWA, SWAG-Diag and SWAG.

    Prints perplexity of the next byte, bits per character, accuracy and ECE; writes results.json
    and reliability.png.
    """

    text: Path | None = None
    """File of UTF-8 text; by default the documentation topics that come with Python."""
    evaluate: Literal["test", "validation"] = "test"
    """validation: report on the held-out tenth before the last, to choose settings by."""
    windows: int = 256
    """Windows that are predicted, spread evenly over the held-out or the test text."""
    length: int = 64
    """Bytes in a window."""
    width: int = 64
    """Units of the residual stream; a multiple of 4, the number of attention heads."""
    blocks: int = 2
    """Blocks of attention and a hidden layer."""
    batch_size: int = 8
    """Windows in a minibatch."""
    steps: int = 4000
    """Steps of training."""
    start: int = 3200
    """Steps before the first collection."""
    every: int = 20
    """Steps from one collection to the next."""
    learning_rate: float = 4e-3
    """Learning rate of Adam, but for the decay of the baseline after start."""
    rank: int = 20
    """Deviations held by SWAG (K in the paper)."""
    num_samples: int = 30
    """Samples averaged by SWAG-Diag and SWAG."""
    seeds: int = 3
    """Networks trained one after another, numbered 0, 1, ..."""
    results: Path = Path("results")
    """Folder under which language/<text>/ is written."""
    resume: bool = False
    """Continue after the last seed that was finished; the numbers are those of one run."""


class Parts(NamedTuple):
    """Bytes uint8 ``(N,)`` to train on, to choose settings by, and to test on."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


class Member(NamedTuple):
    """One network in training."""

    params: Any
    opt_state: Any


def language(chosen: Language) -> None:
    """Train and predict seed by seed; print the table, write the JSON and the picture."""
    import rich  # here, as all that is heavy: --help needs none of it

    from benchmarks import report
    from benchmarks.stages import open_stages

    _check(chosen)
    content = read(chosen.text)
    parts, folder = split(content, chosen.length), _folder(chosen)
    settings = identity(chosen) | {"text": _name(chosen), "crc32 of the text": zlib.crc32(content)}
    of_seeds = _run(chosen, parts, open_stages(folder / "stages", settings, chosen.resume))
    results = {name: _together([of[name]["scores"] for of in of_seeds]) for name in METHODS}
    bins = {name: _mean([of[name]["reliability"] for of in of_seeds]) for name in METHODS}
    rich.print(_title(chosen, parts), report.table(results), sep="\n")
    record = report.record(
        results,
        experiment="language",
        evaluated_on=chosen.evaluate,
        options=settings,
        bytes={name: len(part) for name, part in parts._asdict().items()},
        reliability=bins,
    )
    report.write_json(folder / "results.json", record)
    _draw(folder / "reliability.png", bins)
    print(f"results.json and reliability.png are in {folder}")


def read(path: Path | None) -> bytes:
    """The text of a file, or the documentation topics of this Python, as UTF-8."""
    if path is None:
        return _topics().encode()
    try:
        content = path.read_bytes()
        text = content.decode()
    except OSError as error:
        raise UsageError(f"--text {path}: {error.strerror}; give a file of text") from error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"--text {path}: byte {error.start} is not UTF-8; give a file of text in UTF-8"
        ) from error
    if "\0" in text:
        raise UsageError(f"--text {path}: it has zero bytes; give a file of text, not of data")
    return content


def split(content: bytes, length: int) -> Parts:
    """The first 80 % of the bytes, the next 10 % and the last 10 %, none smaller than a window."""
    n = len(content)
    if n // 10 <= length:
        raise UsageError(
            f"--text: {n} bytes, of which a tenth is no window of {length} bytes and the next one; "
            f"give a text of at least {10 * (length + 1)} bytes, or a smaller --length"
        )
    cuts = 8 * n // 10, 9 * n // 10
    return Parts(*np.split(np.frombuffer(content, np.uint8), cuts))


def windows(part: np.ndarray, length: int, most: int) -> np.ndarray:
    """At most so many windows of ``length`` bytes and the next one, evenly spread, ``(W, T + 1)``.

    Windows begin at multiples of ``length``: no byte is predicted twice.
    """
    count = (len(part) - 1) // length
    chosen = np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int))
    return part[chosen[:, None] * length + np.arange(length + 1)]


def scores(probs: np.ndarray, following: np.ndarray) -> dict[str, float]:
    """How good and how calibrated probabilities ``(N, 256)`` of the following bytes ``(N,)`` are.

    A character begins with each byte that does not continue another one in UTF-8.
    """
    from swagjax import metrics

    nll = float(metrics.nll(probs, following))
    characters = np.mean(following & 0xC0 != 0x80)
    return {
        "perplexity": math.exp(nll),
        "bits per character": nll / math.log(2) / float(characters),
        "accuracy": float(metrics.accuracy(probs, following)),
        "ECE": float(metrics.ece(probs, following, binning="count")),
    }


def _topics() -> str:
    try:
        from pydoc_data import topics
    except ImportError:
        raise UsageError("--text: this Python has no pydoc_data.topics; give a file") from None
    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))


def _run(chosen: Language, parts: Parts, stage: Callable[..., Any]) -> list[dict[str, Any]]:
    """What ``_evaluate`` says of every seed, with a progress bar on stderr."""
    from benchmarks import progress

    each = chosen.start + 2 * (chosen.steps - chosen.start)
    with progress.bar("compiling", each * chosen.seeds, "steps") as shown:

        def show(text: str, done: int) -> None:
            shown(f"seed {seed}, {text}", seed * each + done)

        found, train, evaluate = [], _trainer(chosen, parts.train), _evaluator(chosen, parts)
        for seed in range(chosen.seeds):
            found.append(stage(f"seed {seed}", lambda seed=seed: evaluate(seed, train(seed, show))))
    return found


def _trainer(chosen: Language, part: np.ndarray) -> Callable[..., dict[str, Member]]:
    """A function of a seed that trains the baseline and the network that is averaged."""
    import jax
    import jax.numpy as jnp

    model, data, last = _model(chosen), jnp.asarray(part), chosen.steps
    advance = jax.jit(_stepper(chosen, model))

    @jax.jit
    def init(key: Any) -> Member:
        params = model.init(key, jnp.zeros((1, chosen.length), int))["params"]
        return Member(params, _optimizer(chosen, 1.0).init(params))

    def train(seed: int, show: Callable[[str, int], None]) -> dict[str, Member]:
        key = _key(seed, TRAIN)

        def run(member: Member, first: int, last: int, end: float, shown: int = 0) -> Member:
            for i in range(first, last, CHUNK):
                then = min(i + CHUNK, last)
                member, loss = advance(key, member, data, i, then, end)
                show(f"loss {float(loss):.3f}", then + shown)
            return member

        trunk = run(init(_key(seed, INIT)), 0, chosen.start, 1.0)
        decayed = run(trunk, chosen.start, last, 0.0)
        averaged = run(trunk, chosen.start, last, 1.0, last - chosen.start)
        return {"decayed": decayed, "averaged": averaged}

    return train


def _stepper(chosen: Language, model: Any) -> Callable[..., Any]:
    """Steps ``first`` to ``last`` on windows drawn from anywhere; the last loss, in nats a byte."""
    import jax
    import jax.numpy as jnp
    import optax

    def loss(params: Any, seen: Any) -> Any:
        logits = model.apply({"params": params}, seen[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, seen[:, 1:]).mean()

    def advance(key: Any, member: Member, data: Any, first: Any, last: Any, end: Any) -> Any:
        tx = _optimizer(chosen, end)

        def step(i: Any, carry: Any) -> Any:
            (params, opt_state), _ = carry
            shape = (chosen.batch_size, 1)
            at = jax.random.randint(jax.random.fold_in(key, i), shape, 0, len(data) - chosen.length)
            seen = data[at + jnp.arange(chosen.length + 1)].astype(int)
            value, grads = jax.value_and_grad(loss)(params, seen)
            updates, opt_state = tx.update(grads, opt_state, params)
            return Member(optax.apply_updates(params, updates), opt_state), value

        return jax.lax.fori_loop(first, last, step, (member, jnp.zeros(())))

    return advance


def _optimizer(chosen: Language, end: Any) -> Any:
    """Adam whose rate goes to ``end`` times itself from ``start`` on, and SWAG after it."""
    import jax.numpy as jnp
    import optax

    import swagjax

    def rate(step: Any) -> Any:
        after = jnp.clip((step - chosen.start) / (chosen.steps - chosen.start), 0, 1)
        return chosen.learning_rate * jnp.minimum(1, step / WARMUP) * (1 - (1 - end) * after)

    collect = swagjax.swag(chosen.rank, start=chosen.start, every=chosen.every)
    return optax.chain(optax.adam(rate), collect)


def _evaluator(chosen: Language, parts: Parts) -> Callable[..., dict[str, Any]]:
    """A function of a seed and its networks: scores and reliability of every method."""
    import jax

    import swagjax
    from swagjax import metrics

    model = _model(chosen)
    seen = windows(getattr(parts, chosen.evaluate), chosen.length, chosen.windows).astype(np.int32)
    batches = np.split(seen[:, :-1], range(BATCH, len(seen), BATCH))
    following = seen[:, 1:].ravel()

    def prob_fn(params: Any, x: Any) -> Any:
        return jax.nn.softmax(model.apply({"params": params}, x))

    def evaluate(seed: int, trained: dict[str, Member]) -> dict[str, Any]:
        found = {}
        for name, (posterior, samples) in _posteriors(trained, chosen.num_samples).items():
            of_batches = swagjax.predict_batches(
                _key(seed, PREDICT), posterior, prob_fn, batches, num_samples=samples
            )
            probs = np.concatenate([np.asarray(each) for each in of_batches])
            probs = probs.reshape(-1, probs.shape[-1])
            bins = metrics.reliability(probs, following, binning="count")
            names = ("confidence", "accuracy", "count")
            bins = {key: np.asarray(x).tolist() for key, x in zip(names, bins, strict=True)}
            found[name] = {"scores": scores(probs, following), "reliability": bins}
        return found

    return evaluate


def _posteriors(trained: dict[str, Member], num_samples: int) -> dict[str, tuple[Any, int]]:
    """What every method keeps, and how many samples of it are averaged."""
    import jax

    import swagjax

    # A Partial is a pytree: the networks differ in an argument of one program.
    last = jax.tree_util.Partial(_same, trained["decayed"].params)
    swag = swagjax.get_state(trained["averaged"].opt_state)
    diag = swag._replace(deviations=None)
    kept = (last, 1), (diag._replace(variance=None), 1), (diag, num_samples), (swag, num_samples)
    return dict(zip(METHODS, kept, strict=True))


def _same(params: Any, key: Any) -> Any:
    return params


def _model(chosen: Language) -> Any:
    from benchmarks.text_models import LanguageModel

    return LanguageModel(length=chosen.length, width=chosen.width, blocks=chosen.blocks)


def _key(seed: int, purpose: int) -> Any:
    import jax

    return jax.random.fold_in(jax.random.key(seed), purpose)


def _together(of_seeds: list[dict[str, float]]) -> dict[str, list[float]]:
    return {metric: [of[metric] for of in of_seeds] for metric in of_seeds[0]}


def _mean(of_seeds: list[dict[str, list[float]]]) -> dict[str, list[float]]:
    """Of confidence and accuracy in each bin; the bins of all seeds are of equal count."""
    return {key: np.mean([of[key] for of in of_seeds], axis=0).tolist() for key in of_seeds[0]}


def _title(chosen: Language, parts: Parts) -> str:
    part = getattr(parts, chosen.evaluate)
    used = len(windows(part, chosen.length, chosen.windows)) * chosen.length
    return (
        f"{_name(chosen)}: trained on {len(parts.train):,} bytes; {used:,} {chosen.evaluate} bytes "
        f"in windows of {chosen.length}; mean ± standard error over {chosen.seeds} seeds"
    )


def _name(chosen: Language) -> str:
    return "pydoc-topics" if chosen.text is None else chosen.text.stem


def _folder(chosen: Language) -> Path:
    """Where results go; those on held-out text never overwrite those on test text."""
    name = _name(chosen) + ("" if chosen.evaluate == "test" else f"-{chosen.evaluate}")
    return chosen.results / "language" / name


def _draw(path: Path, bins: dict[str, dict[str, list[float]]]) -> None:
    """Accuracy minus confidence of the next byte, over all seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from swagjax import plot

    figure, ax = plt.subplots(figsize=(7, 5), layout="constrained")
    for name, of in bins.items():
        plot.reliability_diagram(of["confidence"], of["accuracy"], ax=ax, label=name)
    ax.set_title("Next byte: reliability")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _check(chosen: Language) -> None:
    """Refuse values that no experiment can be made of, in one line."""
    least = {"rank": 2, "steps": 2} | dict.fromkeys(
        ("windows", "length", "blocks", "batch_size", "start", "every", "num_samples", "seeds"), 1
    )
    for name, number in least.items():
        if getattr(chosen, name) < number:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} {getattr(chosen, name)}: at least {number}")
    if chosen.width < 4 or chosen.width % 4:
        raise UsageError(f"--width {chosen.width}: a multiple of 4, the number of attention heads")
    if not 0 < chosen.learning_rate < math.inf:
        raise UsageError(f"--learning-rate {chosen.learning_rate}: a number above zero")
    if chosen.start + chosen.every > chosen.steps:
        raise UsageError(
            f"--start {chosen.start}: at most --steps {chosen.steps} less --every {chosen.every}, "
            "or nothing is collected"
        )
