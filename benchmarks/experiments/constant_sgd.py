"""Constant SGD as a sampler, on linear regression, where the posterior is known.

Targets are linear in the standardised inputs and an intercept, with noise of known variance (that
of the residuals of least squares) and a normal prior of the weights: the posterior is a Gaussian in
closed form, and the loss, divided by N, has it for exp(-N loss). Chains of SGD start at its mean;
what is kept begins after some relaxation times of the slowest direction.

Every method is compared with the posterior by the KL of the normal with the moments of its draws,
and by the one that theory predicts. D parameters and n independent draws make the first too large
by about D (D + 1) / (4 n). Theory takes the covariance of the gradients as that at the mean; where
N is only some ten times D they vary more, and so do the iterates.

SGLD takes a part of the best step of SGD, and so as many more steps: its own noise is then the
greater part. Averages need windows longer than the relaxation time: they are shown of plain SGD,
where windows are too short for the directions that the data hardly determine, and of the full
preconditioner at several times its best step, where all directions relax alike.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import options
from benchmarks.stages import Stage

STEPS = 200  # an epoch, by default: few enough to be quick, steps small enough for theory
LEAST = 50  # epochs to keep draws of
WIDTH = 100  # characters that the table asks for
# Of Okabe and Ito, with a marker each.
STYLES = {
    "SGD": ("#0072B2", "o"),
    "SGD, momentum": ("#56B4E9", "v"),
    "SGD, reshuffled": ("#000000", "x"),
    "SGD, diagonal": ("#E69F00", "s"),
    "SGD, full": ("#D55E00", "D"),
    "averages": ("#009E73", "^"),
    "averages, full": ("#009E73", ">"),
    "SGLD": ("#CC79A7", "P"),
    "mean-field VI": ("#999999", "*"),
}
VI = "mean-field VI"
SOURCES = {"averages": "SGD"}  # whose run they are of


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConstantSgd:
    """Compare SGD with a constant step to the exact posterior of linear regression.

    Prints the KL to the posterior of plain, preconditioned and averaged SGD, of SGLD and mean-field
    VI; writes results.json, step.png (the KL over step sizes) and spread.png.
    """

    name: tuple[str, ...] = ()
    """Folder names of data sets; by default all that are found in --data-dir."""
    data_dir: Path | None = None
    """Folder of data sets, in the layout of the MC-dropout experiments or of uci_datasets; without
    one, scikit-learn's diabetes."""
    methods: tuple[str, ...] = ()
    """Methods to compare; by default all."""
    splits: int = 1
    """How many of the splits, the first ones; pictures are of the first."""
    seed: int = 0
    """Of all chains."""
    batch_size: options.ByDataset[int | None] = None
    """Rows in a minibatch; by default a 200th of the train rows."""
    prior: float = 1.0
    """Standard deviation of the weights, of standardised inputs and targets."""
    momentum: float = 0.9
    """Of the runs that have one."""
    chains: int = 64
    """Independent runs of every method."""
    burn_in: float = 2.0
    """Relaxation times of the slowest direction before draws are kept."""
    length: float = 4.0
    """Relaxation times in which they are, one at the end of every epoch."""
    sweep: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
    """Multiples of the best step to run SGD with."""
    langevin: float = 0.25
    """Step of SGLD, as a part of the best step of SGD."""
    averaged: float = 5.0
    """Step of the run of the full preconditioner whose averages are taken, as a multiple of the
    best."""
    vi_steps: int = 5000
    """Steps of Adam by mean-field VI."""
    resume: bool = False
    """Continue an interrupted run after the last method that it finished."""
    results: Path = Path("results")
    """Folder under which constant_sgd/<name>/ is written."""


class Problem(NamedTuple):
    """Rows of one split, and what follows from them; A, C and N as in swagjax.constant_sgd."""

    x: np.ndarray
    y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    noise: float
    precision: float
    mean: np.ndarray
    A: np.ndarray
    C: np.ndarray
    variance: Any
    batch_size: int

    @property
    def rows(self) -> int:
        """N."""
        return len(self.y)

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return self.rows // self.batch_size

    @property
    def covariance(self) -> np.ndarray:
        """Of the posterior."""
        return np.linalg.inv(self.rows * self.A)


class Sampler(NamedTuple):
    """How one chain moves, and what theory says of it."""

    init: Callable[[Any], Any]
    step: Callable[[Any, Any, Any], Any]  # key, state, batch -> state
    draw: Callable[[Any], Any]  # state -> iterate and average of the last epoch
    covariance: np.ndarray
    averaged: np.ndarray
    epochs: float  # relaxation time of the slowest direction
    reshuffled: bool = False


class Moments(NamedTuple):
    """Of draws, or of a Gaussian approximation."""

    mean: np.ndarray
    covariance: np.ndarray


class Sampled(NamedTuple):
    """Of every method: what was drawn, what theory says, and the relaxation time in epochs."""

    found: dict[str, Moments]
    theory: dict[str, Moments]
    epochs: dict[str, float]


def constant_sgd(chosen: ConstantSgd) -> None:
    """Compare the methods on one data set after the other."""
    from benchmarks.regression import data

    _check(chosen)
    for dataset in data.load(chosen.name, chosen.data_dir):
        _compare(chosen, dataset)


def _compare(chosen: ConstantSgd, dataset: Any) -> None:
    """Sample, score; print the table, write the JSON and the pictures."""
    from rich.console import Console

    from benchmarks import report, stages

    folder = chosen.results / "constant_sgd" / dataset.name
    kept = stages.open_stages(folder / "stages", _identity(chosen, dataset), chosen.resume)
    splits = range(min(chosen.splits, len(dataset.splits)))
    problems = [problem(chosen, dataset, split) for split in splits]
    first, total = problems[0], len(splits) * len(_methods(chosen)) + len(chosen.sweep)
    with stages.with_bar(kept, total) as stage:
        sampled = [_sampled(chosen, p, stage, split) for split, p in enumerate(problems)]
        swept = _sweep(chosen, first, stage)
    scored = [_scores(p, of) for p, of in zip(problems, sampled, strict=True)]
    results = {
        method: {metric: [of[method][metric] for of in scored] for metric in scored[0][method]}
        for method in scored[0]
    }
    least = least_kl(first)
    console = Console(width=max(WIDTH, Console().width))
    console.print(_title(dataset.name, first), report.table(results), _said(least), sep="\n")
    context = _context(chosen, first, dataset) | {"least_kl": least, "sweep": swept}
    context["relaxation_epochs"] = sampled[0].epochs
    report.write_json(folder / "results.json", report.record(results, **context))
    _draw_step(folder / "step.png", dataset.name, first, least, swept)
    _draw_spread(folder / "spread.png", dataset.name, first, sampled[0].found)
    print(f"results.json and the pictures are in {folder}\n")


def problem(chosen: ConstantSgd, dataset: Any, split: int) -> Problem:
    """The posterior of one split, by least squares in float64."""
    from benchmarks.regression import data
    from swagjax import constant_sgd

    parts = data.parts(dataset, [dataset.splits[split]])
    inputs = parts.x, parts.test_x
    x, test_x = (np.pad(of[0], [(0, 0), (0, 1)], constant_values=1) for of in inputs)
    y, test_y = parts.y[0], parts.test_y[0]
    gram, moment = x.astype(float).T @ x, x.astype(float).T @ y
    residual = y - x @ np.linalg.lstsq(gram, moment)[0]
    noise = float(residual @ residual) / (len(y) - x.shape[1])
    precision = chosen.prior**-2 / len(y)
    A = gram / len(y) / noise + precision * np.eye(x.shape[1])
    mean = np.linalg.solve(A, moment / len(y) / noise)
    batches = [(x[i : i + 1000], y[i : i + 1000]) for i in range(0, len(y), 1000)]
    each = loss(noise, precision)
    center = mean.astype(np.float32)
    variance = constant_sgd.gradient_noise(each, center, batches)
    C = np.asarray(constant_sgd.gradient_covariance(each, center, batches), float)
    size = chosen.batch_size or max(1, len(y) // STEPS)
    rows = x, y, test_x, test_y
    return Problem(*rows, noise, precision, mean, A, C, variance, min(size, len(y)))


def loss(noise: float, precision: float) -> Callable[[Any, Any], Any]:
    """Of one row: minus its log-likelihood, and its part of minus the log-prior, in nats."""

    def of_row(params: Any, row: Any) -> Any:
        x, y = row
        return ((x @ params - y) ** 2 / noise + precision * (params @ params)) / 2

    return of_row


def samplers(chosen: ConstantSgd, of: Problem) -> dict[str, Callable[[], Sampler]]:
    """All that runs chains, at the step or with the preconditioner of the formulas, when called."""
    import optax

    from swagjax import constant_sgd as room

    sizes, m, unit = (of.rows, of.batch_size), chosen.momentum, np.eye(len(of.mean))
    step = float(room.optimal_step_size(of.variance, *sizes))
    slow = float(room.optimal_step_size(of.variance, *sizes, m))
    by_variance = room.scale_by_variance(of.variance, *sizes)
    by_covariance = room.scale_by_covariance(of.C.astype(np.float32), *sizes)
    diagonal, full = preconditioners(of)

    def plain() -> Sampler:
        return _sgd(of, optax.sgd(step), step * unit)

    def scaled(by: Any, H: np.ndarray, rate: float = 1.0) -> Sampler:
        return _sgd(of, optax.chain(by, optax.sgd(rate)), rate * H)

    return {
        "SGD": plain,
        "SGD, momentum": lambda: _sgd(of, optax.sgd(slow, momentum=m), slow * unit, m),
        "SGD, reshuffled": lambda: plain()._replace(reshuffled=True),
        "SGD, diagonal": lambda: scaled(by_variance, diagonal),
        "SGD, full": lambda: scaled(by_covariance, full),
        "averages, full": lambda: scaled(by_covariance, full, chosen.averaged),
        "SGLD": lambda: _sgld(of, chosen.langevin * step),
    }


def preconditioners(of: Problem) -> tuple[np.ndarray, np.ndarray]:
    """The diagonal and the full one of the formulas, (D, D) both."""
    factor = 2 * of.batch_size / of.rows
    return factor * np.diag(1 / np.diag(of.C)), factor * np.linalg.inv(of.C)


def _sgd(of: Problem, optimizer: Any, H: np.ndarray, momentum: float = 0.0) -> Sampler:
    """SGD whose steps, without their momentum, are H times the gradient."""
    import jax
    import optax

    import swagjax
    from swagjax import constant_sgd as room

    rates = np.linalg.eigvals(H @ of.A).real / (1 - momentum)
    if rates.max() >= 2:
        raise _diverged(of)
    tx = optax.chain(optimizer, room.iterate_average(of.steps))
    each = jax.vmap(loss(of.noise, of.precision), (None, 0))

    def step(key: Any, state: Any, batch: Any) -> Any:
        params, opt_state = state
        gradient = jax.grad(lambda p: each(p, batch).mean())(params)
        updates, opt_state = tx.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def init(params: Any) -> Any:
        return params, tx.init(params)

    def draw(state: Any) -> Any:
        return state[0], swagjax.get_state(state[1]).mean

    with jax.enable_x64(True):
        means = room.averaged_covariance(
            of.A, of.C, 1.0, of.batch_size, of.steps, preconditioner=H / (1 - momentum)
        )
    relaxed = 1 / rates.min() / of.steps
    sigma = predicted(of, of.C, H, momentum)
    return Sampler(init, step, draw, sigma, np.asarray(means), relaxed)


def _diverged(of: Problem) -> options.UsageError:
    return options.UsageError(
        f"--batch-size {of.batch_size}: SGD diverges at the best step, or at --averaged times it; "
        "give a smaller one"
    )


def _sgld(of: Problem, step_size: float) -> Sampler:
    """Langevin dynamics of steps ``step_size / N`` on the log posterior: the drift of SGD.

    Its own noise adds ``2 S / (N step_size)`` to C.
    """
    import blackjax
    import jax

    each = jax.vmap(loss(of.noise, of.precision), (None, 0))

    def gradient(params: Any, batch: Any) -> Any:
        return -of.rows * jax.grad(lambda p: each(p, batch).mean())(params)

    def step(key: Any, params: Any, batch: Any) -> Any:
        return blackjax.sgld(gradient).step(key, params, batch, step_size / of.rows)

    unit = np.eye(len(of.mean))
    own = 2 * of.batch_size / (of.rows * step_size) * unit
    sigma = predicted(of, of.C + own, step_size * unit)
    relaxed = 1 / (step_size * np.linalg.eigvalsh(of.A).min()) / of.steps
    return Sampler(lambda p: p, step, lambda p: (p, p), sigma, sigma, relaxed)


def predicted(of: Problem, C: np.ndarray, H: np.ndarray, momentum: float = 0.0) -> np.ndarray:
    """Stationary covariance of SGD with these steps; in float64, for a wide range of A."""
    import jax

    from swagjax import constant_sgd as room

    with jax.enable_x64(True):
        found = room.stationary_covariance(
            of.A, C, 1.0, of.batch_size, momentum=momentum, preconditioner=H
        )
    return np.asarray(found)


def run(chosen: ConstantSgd, of: Problem, sampler: Sampler) -> tuple[np.ndarray, np.ndarray]:
    """Draws after burn-in: iterates and averages at the end of every epoch, ``(draws, D)`` each."""
    import jax
    import jax.numpy as jnp

    burnt = math.ceil(chosen.burn_in * sampler.epochs)
    kept = max(LEAST, math.ceil(chosen.length * sampler.epochs))
    x, y = jnp.asarray(of.x), jnp.asarray(of.y)

    def move(states: Any, at: Any) -> Any:
        rows, key = at
        keys = jax.random.split(key, chosen.chains)
        return jax.vmap(sampler.step)(keys, states, (x[rows], y[rows])), None

    def epoch(states: Any, key: Any) -> Any:
        k1, k2 = jax.random.split(key)
        rows = _minibatches(k1, of, chosen.chains, sampler.reshuffled)
        states, _ = jax.lax.scan(move, states, (rows, jax.random.split(k2, of.steps)))
        return states, jax.vmap(sampler.draw)(states)

    @jax.jit
    def chains(key: Any) -> Any:
        first = jnp.broadcast_to(jnp.float32(of.mean), (chosen.chains, len(of.mean)))
        k1, k2 = jax.random.split(key)
        states, _ = jax.lax.scan(
            lambda states, key: (epoch(states, key)[0], None),
            jax.vmap(sampler.init)(first),
            jax.random.split(k1, burnt),
        )
        return jax.lax.scan(epoch, states, jax.random.split(k2, kept))[1]

    # Random numbers take most of the time on CPU, and this generator the least.
    draws = chains(jax.random.key(chosen.seed, impl="rbg"))
    iterates, averages = (np.asarray(d, float).reshape(-1, len(of.mean)) for d in draws)
    return iterates, averages


def _minibatches(key: Any, of: Problem, chains: int, reshuffled: bool) -> Any:
    """Rows of every step of an epoch, shape (steps, chains, S)."""
    import jax
    import jax.numpy as jnp

    shape = (of.steps, chains, of.batch_size)
    if not reshuffled:
        return (jax.random.uniform(key, shape) * of.rows).astype(jnp.int32)
    rows = jnp.broadcast_to(jnp.arange(of.rows)[:, None], (of.rows, chains))
    order = jax.random.permutation(key, rows, independent=True)
    return order[: of.steps * of.batch_size].reshape(of.steps, of.batch_size, chains).swapaxes(1, 2)


def _sampled(chosen: ConstantSgd, of: Problem, stage: Stage, split: int) -> Sampled:
    """Run the chosen methods; averages of plain SGD come from its own run."""
    sampled, runs = Sampled({}, {}, {}), samplers(chosen, of)
    for name in _methods(chosen):
        source, averaged = SOURCES.get(name, name), name.startswith("averages")
        if name == VI:
            theory, compute = np.diag(1 / np.diag(of.rows * of.A)), partial(_mean_field, chosen, of)
        else:
            sampler = runs[source]()
            theory = sampler.averaged if averaged else sampler.covariance
            sampled.epochs[name] = float(sampler.epochs)
            compute = partial(_moments, chosen, of, sampler)
        found = Moments(*map(np.array, stage(_run_name(split, source), compute)[averaged]))
        if not np.isfinite(found.covariance).all():
            raise _diverged(of)
        sampled.found[name], sampled.theory[name] = found, Moments(of.mean, theory)
    return sampled


def _run_name(split: int, source: str) -> str:
    return f"split {split + 1}, {source}"


def _moments(chosen: ConstantSgd, of: Problem, sampler: Sampler) -> list[Any]:
    """Mean and covariance of the iterates and of the averages, as JSON can hold them."""
    with np.errstate(all="ignore"):  # where it diverged
        return [[d.mean(0).tolist(), np.cov(d.T).tolist()] for d in run(chosen, of, sampler)]


def _methods(chosen: ConstantSgd) -> list[str]:
    return [name for name in STYLES if name in (chosen.methods or STYLES)]


def _mean_field(chosen: ConstantSgd, of: Problem) -> list[Any]:
    """Mean-field VI by Adam with a step that decays to zero, on all rows at once."""
    import blackjax
    import jax
    import jax.numpy as jnp
    import optax

    precision, center = jnp.float32(of.rows * of.A), jnp.float32(of.mean)
    scale = 1 / jnp.sqrt(jnp.diag(precision))

    def log_density(z: Any) -> Any:  # of the weights less their mean, in units of this scale
        return -(z * scale) @ precision @ (z * scale) / 2

    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, chosen.vi_steps))
    vi = blackjax.meanfield_vi(log_density, optimizer, num_samples=20)

    def step(state: Any, key: Any) -> Any:
        return vi.step(key, state)[0], None

    keys = jax.random.split(jax.random.key(chosen.seed), chosen.vi_steps)
    state, _ = jax.jit(lambda keys: jax.lax.scan(step, vi.init(jnp.ones_like(center)), keys))(keys)
    mean, sd = center + scale * state.mu, scale * jnp.exp(state.rho)
    return [[np.asarray(mean, float).tolist(), np.diag(np.asarray(sd, float) ** 2).tolist()]]


def _scores(of: Problem, sampled: Sampled) -> dict[str, dict[str, float]]:
    """Of every method, and of the posterior itself."""
    posterior = Moments(of.mean, of.covariance)
    pairs = {name: (moments, sampled.theory[name]) for name, moments in sampled.found.items()}
    pairs["posterior"] = posterior, posterior
    return {name: scores(of, *pair) for name, pair in pairs.items()}


def scores(of: Problem, moments: Moments, theory: Moments) -> dict[str, float]:
    """KL to the posterior in nats; extremes of sd over that of the posterior; NLL of a test row."""
    from scipy import stats

    ratio = np.sqrt(np.diag(moments.covariance) / np.diag(of.covariance))
    variance = of.noise + np.einsum("ni,ij,nj->n", of.test_x, moments.covariance, of.test_x)
    logs = stats.norm.logpdf(of.test_y, of.test_x @ moments.mean, np.sqrt(variance))
    return {
        "KL": kl(of, moments),
        "KL, theory": kl(of, theory),
        "least sd": float(ratio.min()),
        "largest sd": float(ratio.max()),
        "test NLL": float(-logs.mean()),
    }


def kl(of: Problem, moments: Moments) -> float:
    """KL of the normal with these moments to the posterior, in nats."""
    precision, shift = of.rows * of.A, moments.mean - of.mean
    product = precision @ moments.covariance
    squares = np.trace(product) + shift @ precision @ shift - len(shift)
    return abs(float(squares - np.linalg.slogdet(product)[1])) / 2  # negative by rounding alone


def least_kl(of: Problem) -> dict[str, dict[str, float]]:
    """KL by theory: with the formulas, and minimised over all steps and all diagonals."""
    import jax
    import jax.numpy as jnp
    from scipy import optimize

    from swagjax import constant_sgd as room

    sizes, D = (of.rows, of.batch_size), len(of.mean)
    step = float(room.optimal_step_size(of.variance, *sizes))
    diagonal, full = preconditioners(of)

    def least(start: np.ndarray, parameters: int) -> dict[str, float]:
        def divergence(x: Any) -> Any:
            H = start * jnp.exp(x)
            sigma = room.stationary_covariance(of.A, of.C, 1.0, of.batch_size, preconditioner=H)
            # Beyond the stable steps there is none: a value that no search takes.
            return jnp.nan_to_num(room.kl_to_posterior(sigma, of.A, of.rows), nan=1e6)

        found = optimize.minimize(
            jax.jit(jax.value_and_grad(divergence)), np.zeros(parameters), jac=True, method="BFGS"
        )
        return {"formula": float(divergence(np.zeros(parameters))), "least": float(found.fun)} | (
            {"multiple": float(np.exp(found.x[0]))} if parameters == 1 else {}
        )

    with jax.enable_x64(True):
        scalar = least(np.full(D, step), 1)
        by_rows = least(np.diag(diagonal), D)
    exact = kl(of, Moments(of.mean, predicted(of, of.C, full)))
    return {"scalar": scalar | {"step": step}, "diagonal": by_rows, "full": {"formula": exact}}


def _sweep(chosen: ConstantSgd, of: Problem, stage: Stage) -> list[dict[str, float]]:
    """KL of plain SGD, of its draws, at multiples of the best step; that of the best is known."""
    import optax

    from swagjax import constant_sgd as room

    best = float(room.optimal_step_size(of.variance, of.rows, of.batch_size))
    swept = []
    for multiple in chosen.sweep:
        step = multiple * best
        if step * np.linalg.eigvalsh(of.A).max() >= 2:
            continue  # it diverges
        sampler = _sgd(of, optax.sgd(step), step * np.eye(len(of.mean)))
        name = _run_name(0, "SGD" if multiple == 1 else f"SGD at {multiple:g} times the best step")
        moments = Moments(*map(np.array, stage(name, partial(_moments, chosen, of, sampler))[0]))
        if np.isfinite(moments.covariance).all():
            swept.append({"multiple": multiple, "step": step, "KL": kl(of, moments)})
    return swept


def _identity(chosen: ConstantSgd, dataset: Any) -> dict[str, Any]:
    """The options that determine the numbers of one data set."""
    return options.identity(chosen) | {"dataset": dataset.name}


def _context(chosen: ConstantSgd, of: Problem, dataset: Any) -> dict[str, Any]:
    sandwich = np.linalg.solve(of.A, np.linalg.solve(of.A, of.C).T) / of.rows
    return {
        "experiment": "constant_sgd",
        "options": _identity(chosen, dataset) | {"batch_size": of.batch_size},
        "data": {"rows": of.rows, "parameters": len(of.mean), "noise_variance": of.noise},
        "hessian_eigenvalues": np.linalg.eigvalsh(of.A).tolist(),
        "noise_in_units_of_hessian": np.sort(
            np.linalg.eigvals(np.linalg.solve(of.A, of.C)).real
        ).tolist(),
        "kl_of_sandwich": kl(of, Moments(of.mean, sandwich)),
    }


def _title(name: str, of: Problem) -> str:
    return (
        f"{name}: N = {of.rows}, D = {len(of.mean)}, minibatches of {of.batch_size}; KL to the "
        "posterior in nats, standard deviations over the posterior's"
    )


def _said(least: dict[str, dict[str, float]]) -> str:
    scalar, diagonal, full = least.values()
    return (
        f"by theory: scalar {scalar['formula']:.3g}, and the least {scalar['least']:.3g} at "
        f"{scalar['multiple']:.2f} of the step; diagonal {diagonal['formula']:.3g}, and the least "
        f"{diagonal['least']:.3g}; full {full['formula']:.3g}"
    )


def _draw_step(path: Path, name: str, of: Problem, least: Any, swept: list[Any]) -> None:
    """KL against the step, by theory and of draws."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    best, unit = least["scalar"]["step"], np.eye(len(of.mean))
    low, high = (f(point["multiple"] for point in [*swept, {"multiple": 1}]) for f in (min, max))
    end = min(1.5 * high * best, 1.98 / np.linalg.eigvalsh(of.A).max())
    steps = np.geomspace(low / 1.5 * best, end, 80)
    curve = [kl(of, Moments(of.mean, predicted(of, of.C, step * unit))) for step in steps]
    figure, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    ax.plot(steps / best, curve, color="#0072B2", label="theory, discrete Lyapunov equation")
    points = [(point["multiple"], point["KL"]) for point in swept]
    if points:
        ax.plot(*zip(*points, strict=True), "o", color="#D55E00", label="draws of SGD")
    ax.axvline(1, color="black", linestyle="--", label="best step by the formula")
    diagonal = least["diagonal"]["formula"]
    ax.axhline(
        diagonal, color="#009E73", linestyle="-.", label="diagonal preconditioner, by theory"
    )
    ax.set(xscale="log", yscale="log", ylabel="KL to the posterior (nats)")
    full = least["full"]["formula"]
    multiples = sorted({1.0, *(point["multiple"] for point in swept)})
    ax.set_xticks(multiples, [f"{multiple:g}" for multiple in multiples])
    ax.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    ax.set_xlabel(f"step size, in units of the best by the formula, {best:.3g}")
    ax.set_title(f"{name}: plain SGD\n(full preconditioner, by theory: {full:.1g} nats)")
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_spread(path: Path, name: str, of: Problem, found: dict[str, Moments]) -> None:
    """Standard deviations over those of the posterior, by weight and by eigenvector of A."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    values, vectors = np.linalg.eigh(of.A)
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), layout="constrained", sharey=True)
    directions = (np.eye(len(values)), vectors[:, ::-1])
    for ax, B in zip(axes, directions, strict=True):
        wanted = np.sqrt(np.diag(B.T @ of.covariance @ B))
        for i, (method, moments) in enumerate(found.items()):
            (color, marker), size = STYLES[method], 11 - i  # some lie on one another
            ratio = np.sqrt(np.diag(B.T @ moments.covariance @ B)) / wanted
            at = np.arange(1, len(ratio) + 1)
            style = {"marker": marker, "markersize": size, "markerfacecolor": "none"}
            ax.plot(at, ratio, color=color, linewidth=0.8, label=method, **style)
        ax.axhline(1, color="black", linestyle="--", linewidth=1, label="posterior")
        ax.set_yscale("log")
        ax.set_xticks(at)
    axes[0].set(xlabel="weight (the last is the intercept)", ylabel="sd over posterior sd")
    axes[1].set(xlabel="eigenvector of the Hessian, the best determined first")
    figure.suptitle(f"{name}: standard deviations of the draws")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _check(chosen: ConstantSgd) -> None:
    """Refuse values that no comparison can be made of, in one line."""
    least = {"splits": 1, "seed": 0, "batch_size": 1, "chains": 2, "vi_steps": 1}
    for name, number in least.items():
        value = getattr(chosen, name)
        if value is not None and value < number:
            raise options.UsageError(f"--{name.replace('_', '-')} {value}: at least {number}")
    for name in ("prior", "burn_in", "length", "langevin", "averaged"):
        if not 0 < getattr(chosen, name) < math.inf:
            raise options.UsageError(
                f"--{name.replace('_', '-')} {getattr(chosen, name)}: a number above zero"
            )
    if not 0 <= chosen.momentum < 1:
        raise options.UsageError(f"--momentum {chosen.momentum}: at least 0, below 1")
    if not all(0 < multiple < math.inf for multiple in chosen.sweep):
        raise options.UsageError(f"--sweep {chosen.sweep}: numbers above zero")
    for name in set(chosen.methods) - set(STYLES):
        raise options.UsageError(f"--methods {name!r}: choose of {', '.join(STYLES)}")
