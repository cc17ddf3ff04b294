"""Regression with a gap in the inputs: SWAG and mean-field VI beside NUTS on one small network.

The network has one hidden layer of tanh units, every weight the prior N(0, 1), and the noise is
known, so that the posterior of all methods is the same one. NUTS stands for the truth as far as its
diagnostics allow: they are of the functions, for weights of equal function are many.

The step size and the scale of SWAG come from validation points, which lie beside the gap like the
training points: nothing in the gap or outside the data is ever looked at. There the NLL is nearly
flat at small scales, and least for the smallest, so that the rule is that of ``classify``: of the
settings within one standard error of the least NLL, the one with the most spread.

The noise of SGD lies in the directions that the data determine, so that SWAG's bands hardly widen
in the gap, and at these steps all members find the same function. At smaller ones
(``--learning-rates 0.0001``) what the data leave open stays where it began, a draw of the prior for
each member, and the bands of MultiSWAG widen.

The step and the number of steps of mean-field VI are usual ones, and its objective is reported.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.options import UsageError, identity

NOISE = 0.1  # standard deviation of the observations, known to all methods
GAIN = 4.0  # of the hidden units: how fast functions of the prior change with x
EDGE, GAP, END = 1.0, 0.4, 1.5  # data in GAP < |x| < EDGE; drawn and scored up to END
SHOWN = ("NLL inside", "NLL gap", "NLL outside", "distance gap", "sd ratio gap")  # in the table
WIDTH = 100  # characters that it asks for
REGIONS = ("inside", "gap", "outside")
BLUE, ORANGE = "#0072B2", "#D55E00"  # of Okabe and Ito, as in swagjax.plot


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gap:
    """Draw the bands of SWAG, MultiSWAG and mean-field VI beside those of NUTS.

    Prints the NLL on held-out points inside the data, in the gap and outside, and how far the bands
    are from those of NUTS; writes results.json and bands.png.
    """

    points: int = 60
    """Training points, half on either side of the gap."""
    hidden: int = 50
    """Hidden units."""
    seed: int = 0
    """Of the data, and of all methods."""
    chains: int = 4
    """Chains of NUTS."""
    warmup: int = 300
    """Steps of window adaptation of each chain."""
    draws: int = 500
    """Draws of each chain after them."""
    vi_steps: int = 10_000
    """Steps of Adam by mean-field VI."""
    steps: int = 40_000
    """Steps of SGD; the second half is collected from."""
    every: int = 20
    """Steps from one collection to the next."""
    batch_size: int = 10
    """Points in a minibatch."""
    learning_rates: tuple[float, ...] = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    """Step sizes that validation points choose from."""
    scales: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
    """Scales of the covariance that validation points choose from."""
    rank: int = 20
    """Deviations held by SWAG (K in the paper)."""
    members: int = 5
    """Networks of MultiSWAG. Figures of SWAG are means over them, its picture is of the first."""
    num_samples: int = 2000
    """Functions drawn from every posterior."""
    results: Path = Path("results")
    """Folder under which gap/ is written."""


class Points(NamedTuple):
    """Inputs and noisy observations, both of shape (N,)."""

    x: np.ndarray
    y: np.ndarray


class Bands(NamedTuple):
    """Mean and standard deviation of the functions of a posterior at every x, shape (N,)."""

    mean: np.ndarray
    sd: np.ndarray


def gap(chosen: Gap) -> None:
    """Sample, train, score; print the table, write the JSON and the picture."""
    import jax  # here, as all that is heavy: --help needs none of it
    from rich.console import Console

    from benchmarks import progress, report

    _check(chosen)
    train, validation, held_out, grid = problem(chosen)
    keys = iter(jax.random.split(jax.random.key(chosen.seed), 5))
    with progress.bar("NUTS", 3, "methods") as show:
        nuts, about_nuts = _timed(_nuts, next(keys), train, chosen)
        show("mean-field VI", 1)
        vi, about_vi = _timed(_vi, next(keys), train, chosen)
        show("SWAG and MultiSWAG", 2)
        (swag, multiswag), about_swag = _timed(_swag, next(keys), train, validation, chosen)
    posteriors = {"NUTS": [nuts], "Mean-field VI": [vi], "SWAG": swag, "MultiSWAG": [multiswag]}
    about = {"NUTS": about_nuts, "Mean-field VI": about_vi, "SWAG": about_swag}
    key, x = next(keys), np.concatenate([grid, held_out.x])
    values = {name: [_values(key, p, x, chosen) for p in of] for name, of in posteriors.items()}
    bands = {name: [_bands(f[:, : len(grid)]) for f in of] for name, of in values.items()}
    results = {
        name: _together(
            nll(f[:, len(grid) :], held_out) | distances(b, bands["NUTS"][0], grid)
            for f, b in zip(values[name], bands[name], strict=True)
        )
        for name in posteriors
    }
    shown = {name: {metric: of[metric] for metric in SHOWN} for name, of in results.items()}
    console = Console(width=max(WIDTH, Console().width))
    console.print(_title(about_nuts, about_swag), report.table(shown), sep="\n")
    folder = chosen.results / "gap"
    settings = identity(chosen)
    record = report.record(results, experiment="gap", options=settings, noise=NOISE, methods=about)
    report.write_json(folder / "results.json", record)
    _draw(folder / "bands.png", train, grid, {name: of[0] for name, of in bands.items()})
    print(f"results.json and bands.png are in {folder}")


def problem(chosen: Gap) -> tuple[Points, Points, Points, np.ndarray]:
    """Training points, validation points, test points of each region, inputs of the picture."""
    rng = np.random.default_rng(chosen.seed)

    def observed(low: float, high: float, n: int) -> Points:
        x = rng.uniform(low, high, n) * np.where(np.arange(n) % 2, 1, -1)
        return Points(x, truth(x) + NOISE * rng.normal(size=n))

    train, validation = (observed(GAP, EDGE, n) for n in (chosen.points, 500))
    held_out = [observed(*bounds, 1000) for bounds in ((GAP, EDGE), (0, GAP), (EDGE, END))]
    held_out = Points(*map(np.concatenate, zip(*held_out, strict=True)))
    return train, validation, held_out, np.linspace(-END, END, 301)


def regions(x: np.ndarray) -> dict[str, np.ndarray]:
    """Which inputs lie among the data, in the gap between them, and outside."""
    size = np.abs(x)
    return dict(
        zip(REGIONS, [(size > GAP) & (size < EDGE), size <= GAP, size >= EDGE], strict=True)
    )


def truth(x: np.ndarray) -> np.ndarray:
    """The function that is observed."""
    return np.asarray(np.sin(4 * x) * 0.7 + 0.4 * x)


def network(params: Any, x: Any) -> Any:
    """The function of some weights at x; of weights from the prior, about N(0, 2) at any x."""
    import jax.numpy as jnp

    hidden = jnp.tanh(GAIN * (jnp.multiply.outer(x, params["w1"]) + params["b1"]))
    return hidden @ params["w2"] / jnp.sqrt(len(params["w2"])) + params["b2"]


def log_likelihood(params: Any, points: Any) -> Any:
    """Log-density of every observation, shape (N,)."""
    from jax.scipy import stats

    return stats.norm.logpdf(points.y, network(params, points.x), NOISE)


def log_prior(params: Any) -> Any:
    """Log-density of the weights, each N(0, 1)."""
    import jax
    from jax.scipy import stats

    return sum(stats.norm.logpdf(leaf).sum() for leaf in jax.tree.leaves(params))


def _prior_draw(key: Any, hidden: int) -> Any:
    import jax

    k1, k2, k3 = jax.random.split(key, 3)
    normal = jax.random.normal
    return {
        "w1": normal(k1, (hidden,)),
        "b1": normal(k2, (hidden,)),
        "w2": normal(k3, (hidden,)),
        "b2": jax.numpy.zeros(()),
    }


def _nuts(key: Any, train: Points, chosen: Gap) -> tuple[Any, dict[str, Any]]:
    """Draws of NUTS, chains side by side, and whether they can be trusted."""
    import blackjax
    import jax
    from jax.tree_util import Partial

    def log_density(params: Any) -> Any:
        return log_likelihood(params, train).sum() + log_prior(params)

    warmup = blackjax.window_adaptation(blackjax.nuts, log_density)

    def chain(key: Any) -> Any:
        k1, k2, k3 = jax.random.split(key, 3)
        found, _ = warmup.run(k2, _prior_draw(k1, chosen.hidden), chosen.warmup)
        kernel = blackjax.nuts(log_density, **found.parameters)

        def step(state: Any, key: Any) -> Any:
            state, info = kernel.step(key, state)
            return state, (state.position, info.is_divergent, info.num_integration_steps)

        return jax.lax.scan(step, found.state, jax.random.split(k3, chosen.draws))[1]

    draws, divergent, leapfrogs = jax.jit(jax.vmap(chain))(jax.random.split(key, chosen.chains))
    pooled = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), draws)
    about = {
        "divergences": int(divergent.sum()),
        "leapfrog_steps_per_draw": float(leapfrogs.mean()),
        **mixing(draws),
    }
    about["converged"] = about["divergences"] == 0 and (about["r_hat"] or np.inf) < 1.01
    return Partial(_pick, pooled), about


def mixing(draws: Any) -> dict[str, Any]:
    """The worst split R-hat and effective sample size over functions at points all over the plot.

    Of weights they would say nothing: a network has the same function under many permutations and
    signs of its units, and no chain visits them all.
    """
    import jax
    from blackjax import diagnostics

    x = np.linspace(-END, END, 31)

    @jax.jit
    def diagnose(draws: Any) -> Any:
        values = jax.vmap(jax.vmap(lambda params: network(params, x)))(draws)
        return diagnostics.rhat(values), diagnostics.ess_bulk(values)

    r_hat, ess = diagnose(draws)
    return {
        "r_hat": _number(r_hat.max()),
        "effective_sample_size": _number(ess.min()),
        "r_hat_at_x": {f"{at:.1f}": _number(r) for at, r in zip(x, r_hat, strict=True)},
    }


def _number(x: Any) -> float | None:
    """A number that JSON can hold."""
    return round(float(x), 4) if np.isfinite(x) else None


def _pick(draws: Any, key: Any) -> Any:
    import jax

    index = jax.random.randint(key, (), 0, len(draws["b2"]))
    return jax.tree.map(lambda x: x[index], draws)


def _vi(key: Any, train: Points, chosen: Gap) -> tuple[Any, dict[str, Any]]:
    """Mean-field VI from a draw of the prior, Adam with a step that decays to zero."""
    import blackjax
    import jax
    import optax
    from jax.tree_util import Partial

    def log_density(params: Any) -> Any:
        return log_likelihood(params, train).sum() + log_prior(params)

    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, chosen.vi_steps))
    vi = blackjax.meanfield_vi(log_density, optimizer, num_samples=10)
    k1, k2 = jax.random.split(key)
    position = _prior_draw(k1, chosen.hidden)

    def step(state: Any, key: Any) -> Any:
        state, info = vi.step(key, state)
        return state, -info.elbo  # blackjax returns the loss

    first = vi.init(position)._replace(mu=position)
    keys = jax.random.split(k2, chosen.vi_steps)
    state, elbo = jax.jit(lambda first, keys: jax.lax.scan(step, first, keys))(first, keys)
    tenth = max(1, chosen.vi_steps // 10)
    about = {"elbo_of_last_tenth": float(elbo[-tenth:].mean()), "elbo_of_the_one_before": None}
    if chosen.vi_steps >= 2 * tenth:
        about["elbo_of_the_one_before"] = float(elbo[-2 * tenth : -tenth].mean())
    return Partial(_draw_vi, state), about


def _draw_vi(state: Any, key: Any) -> Any:
    import jax
    from blackjax.vi import meanfield_vi

    return jax.tree.map(lambda x: x[0], meanfield_vi.sample(key, state, 1))


def _swag(key: Any, train: Points, validation: Points, chosen: Gap) -> Any:
    """SWAG and MultiSWAG, with the step size and the scale that suit the validation points."""
    import jax
    import jax.numpy as jnp
    from jax.tree_util import Partial

    import swagjax
    from swagjax import ensemble

    keys = jax.random.split(key, chosen.members)
    members = jax.vmap(_trainer(train, chosen), (0, None))
    states = jax.jit(jax.vmap(members, (None, 0)))(keys, jnp.array(chosen.learning_rates))
    scores, spread = _validate(key, states, validation, chosen.scales)
    i, j = choose(scores, spread)
    mixture = ensemble.mix(jax.tree.map(lambda x: x[i], states))
    about = {
        "learning_rate": chosen.learning_rates[i],
        "scale": chosen.scales[j],
        "validation": [
            {
                "learning_rate": rate,
                "scale": scale,
                "nll": _number(scores[a, b].mean()),
                "spread": _number(spread[a, b]),
            }
            for a, rate in enumerate(chosen.learning_rates)
            for b, scale in enumerate(chosen.scales)
        ],
        "standard_error": _number(_standard_error(scores)),
    }
    each = [ensemble.member(mixture, m) for m in range(chosen.members)]
    alone = [Partial(swagjax.sample, state=state, scale=chosen.scales[j]) for state in each]
    return (alone, Partial(ensemble.sample, mixture=mixture, scale=chosen.scales[j])), about


def choose(nll: np.ndarray, spread: np.ndarray) -> tuple[int, int]:
    """The setting of the most spread among those within one standard error of the least NLL.

    Args:
      nll: of every validation point, shape (learning rates, scales, N); NaN where SGD diverged.
      spread: mean standard deviation of the functions at them, shape (learning rates, scales).
    """
    means = nll.mean(-1)
    if not np.isfinite(means).any():
        raise UsageError("--learning-rates: SGD diverged with each of them; give lower ones")
    good = means <= np.nanmin(means) + _standard_error(nll)
    i, j = np.unravel_index(np.argmax(np.where(good, spread, -np.inf)), spread.shape)
    return int(i), int(j)


def _standard_error(nll: np.ndarray) -> float:
    """Of the least mean, over points."""
    settings = nll.reshape(-1, nll.shape[-1])
    best = settings[np.nanargmin(settings.mean(-1))]
    return float(best.std(ddof=1) / math.sqrt(len(best)))


def _trainer(train: Points, chosen: Gap) -> Callable[[Any, Any], Any]:
    """SGD from a draw of the prior, with a constant step, on the log posterior."""
    import jax
    import jax.numpy as jnp
    import optax

    import swagjax

    points = jax.tree.map(jnp.asarray, train)
    start = chosen.steps // 2

    def fit(key: Any, rate: Any) -> Any:
        tx = optax.chain(
            optax.sgd(rate), swagjax.swag(chosen.rank, start=start, every=chosen.every)
        )

        def loss(params: Any, batch: Any) -> Any:
            seen = jax.tree.map(lambda x: x[batch], points)
            return -log_likelihood(params, seen).mean() - log_prior(params) / len(points.x)

        def step(carry: Any, key: Any) -> Any:
            params, opt_state = carry
            batch = jax.random.randint(key, (chosen.batch_size,), 0, len(points.x))
            updates, opt_state = tx.update(jax.grad(loss)(params, batch), opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        k1, k2 = jax.random.split(key)
        params = _prior_draw(k1, chosen.hidden)
        keys = jax.random.split(k2, chosen.steps)
        (_, opt_state), _ = jax.lax.scan(step, (params, tx.init(params)), keys)
        return swagjax.get_state(opt_state)

    return fit


def _validate(
    key: Any, states: Any, points: Points, scales: tuple[float, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """What ``choose`` reads, averaged over members."""
    import jax
    import jax.numpy as jnp
    from jax.scipy import stats

    import swagjax

    def score(state: Any) -> Any:
        def at(scale: Any) -> Any:
            posterior = jax.tree_util.Partial(swagjax.sample, state=state, scale=scale)
            values = swagjax.predict_samples(key, posterior, network, points.x, num_samples=50)
            logs = stats.norm.logpdf(points.y, values, NOISE)
            nll = math.log(len(values)) - jax.nn.logsumexp(logs, axis=0)
            return nll, values.std(0).mean()

        return jax.lax.map(at, jnp.array(scales))

    nll, spread = jax.jit(jax.vmap(jax.vmap(score)))(states)
    return np.asarray(nll.mean(1), np.float64), np.asarray(spread.mean(1), np.float64)


def _values(key: Any, posterior: Any, x: np.ndarray, chosen: Gap) -> np.ndarray:
    """Functions drawn from a posterior, at every x, shape (samples, N)."""
    import swagjax

    draws = chosen.num_samples
    return np.asarray(swagjax.predict_samples(key, posterior, network, x, num_samples=draws))


def _bands(values: np.ndarray) -> Bands:
    return Bands(values.mean(0), values.std(0))


def nll(values: np.ndarray, points: Points) -> dict[str, float]:
    """Mean negative log-density of noisy observations in each region, in nats.

    The density is averaged over functions, ``values`` of shape (samples, N).
    """
    from scipy import special, stats

    logs = stats.norm.logpdf(points.y, values, NOISE)
    each = math.log(len(values)) - special.logsumexp(logs, axis=0)
    return {f"NLL {name}": float(each[where].mean()) for name, where in regions(points.x).items()}


def distances(bands: Bands, wanted: Bands, x: np.ndarray) -> dict[str, float]:
    """How far bands are from others, averaged over the inputs of each region.

    ``distance`` is the 2-Wasserstein distance of normals with these means and standard deviations,
    in units of y; ``sd ratio`` the geometric mean of the ratios of standard deviations.
    """
    apart = np.hypot(bands.mean - wanted.mean, bands.sd - wanted.sd)
    ratio = np.log(bands.sd / wanted.sd)
    parts = regions(x).items()
    far = {f"distance {name}": float(apart[where].mean()) for name, where in parts}
    return far | {f"sd ratio {name}": float(np.exp(ratio[where].mean())) for name, where in parts}


def _together(members: Iterable[dict[str, float]]) -> dict[str, list[float]]:
    scores = list(members)
    return {metric: [of[metric] for of in scores] for metric in scores[0]}


def _timed(function: Callable[..., Any], *args: Any) -> tuple[Any, dict[str, Any]]:
    import jax

    start = time.perf_counter()
    posterior, about = jax.block_until_ready(function(*args))
    return posterior, {"seconds": round(time.perf_counter() - start, 1), **about}


def _title(nuts: dict[str, Any], swag: dict[str, Any]) -> str:
    verdict = "converged" if nuts["converged"] else "NOT converged"
    return (
        f"NUTS {verdict}: R-hat {nuts['r_hat']}, {nuts['divergences']} divergences, effective "
        f"sample size {nuts['effective_sample_size']}; SWAG with learning rate "
        f"{swag['learning_rate']:g} and scale {swag['scale']:g} by validation"
    )


def _draw(path: Path, train: Points, x: np.ndarray, bands: dict[str, Bands]) -> None:
    """A panel a method, on common axes, with the truth and the data."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import colors
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        2, 2, figsize=(10, 7), layout="constrained", sharex=True, sharey=True
    )
    for ax, (name, of) in zip(axes.flat, bands.items(), strict=True):
        # Opaque, the widest below: so the legend has the colours of the picture.
        for k, share in ((3, 0.15), (2, 0.3), (1, 0.5)):
            tint = 1 - share * (1 - np.array(colors.to_rgb(BLUE)))
            label = f"±{k} standard deviation{'s' if k > 1 else ''}"
            low, high = of.mean - k * of.sd, of.mean + k * of.sd
            ax.fill_between(x, low, high, color=tint, linewidth=0, label=label)
        ax.plot(x, of.mean, color=BLUE, label="mean")
        ax.plot(x, truth(x), color="black", linestyle="--", linewidth=1, label="truth")
        ax.plot(*train, "o", color=ORANGE, markersize=3.5, label="training points")
        ax.set(title=name, xlim=(-END, END))
    for ax in axes[1]:
        ax.set_xlabel("x")
    for ax in axes[:, 0]:
        ax.set_ylabel("y")
    figure.suptitle("Functions of the posterior, without the noise of the observations")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _check(chosen: Gap) -> None:
    """Refuse values that no experiment can be made of, in one line."""
    least = {
        "points": 2,
        "hidden": 1,
        "seed": 0,
        "chains": 2,  # of one there is no R-hat between chains
        "warmup": 20,
        "draws": 4,
        "vi_steps": 1,
        "steps": 2,
        "every": 1,
        "batch_size": 1,
        "rank": 2,
        "members": 1,
        "num_samples": 2,
    }
    for name, number in least.items():
        if getattr(chosen, name) < number:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} {getattr(chosen, name)}: at least {number}")
    for name in ("learning_rates", "scales"):
        values = getattr(chosen, name)
        if not values or not all(0 < value < float("inf") for value in values):
            raise UsageError(f"--{name.replace('_', '-')} {values}: numbers above zero")
    if chosen.every > (chosen.steps + 1) // 2:
        raise UsageError(
            f"--every {chosen.every}: at most half of --steps {chosen.steps}, or no iterate is kept"
        )
