"""Regression in a subspace of few dimensions: the directions in which the iterates of SGD vary.

One training a split gives everything that is compared: the average of the iterates (SWA), the
Gaussian of SWAG, and the posterior of the subspace of their first principal components, drawn from
by elliptical slice sampling (ESS) and by NUTS. A subspace of random directions of length one is the
control. Networks, data and training are those of ``uci`` under the authors' protocol.

The temperature of the likelihood is chosen split by split on a held-out fifth of the train part,
after a training of its own, by the NLL of ESS; NUTS draws from the posterior that ESS chose, so
that the two differ in the sampler alone. "SWAG scaled" chooses its scale on the same rows: it is
the one to compare with, for it looks as often.
"""

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import options
from benchmarks.experiments.uci import LARGE, MEDIUM, SMALL

METHODS = ("SWA", "SWAG", "SWAG scaled", "PCA+ESS", "PCA+NUTS", "random+ESS")
SAMPLERS = METHODS[3:]
KINDS = ("PCA", "random")
METRICS = ("RMSE", "NLL", "CRPS", "coverage", "width")
TESTED = ("RMSE", "NLL", "CRPS")
COMPARED = ("SWA", "SWAG", "SWAG scaled", "random+ESS")  # with PCA+ESS, by a paired test
SEARCH = 100  # draws and steps before them of each chain while a temperature is chosen
BLUE, ORANGE, GREEN, BLACK = "#0072B2", "#D55E00", "#009E73", "#000000"  # of Okabe and Ito


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subspace:
    """Regression: SWA and SWAG beside ESS and NUTS in the subspace of the iterates.

    Prints RMSE, NLL, CRPS, coverage and width of 95 % intervals beside published figures; writes
    results.json and posterior.png, the posterior in the first two directions.
    """

    name: tuple[str, ...] = ()
    """Folder names of data sets; by default all that are found in --data-dir."""
    data_dir: Path | None = None
    """Folder of data sets, as of uci; without one, scikit-learn's diabetes."""
    splits: int = 5
    """How many of the splits, the first ones."""
    dim: int = 5
    """Directions of the subspaces, at most --rank less one."""
    temperatures: tuple[float, ...] = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)
    """Temperatures of the likelihood that held-out rows choose from; 1 is Bayes' own."""
    scales: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0)
    """Scales of the covariance that they choose from for SWAG scaled."""
    hidden: options.ByDataset[tuple[int, ...] | None] = None
    """Units of the hidden layers."""
    epochs: options.ByDataset[int | None] = None
    """Passes over the train rows."""
    start: options.ByDataset[int | None] = None
    """Epochs before the first collection; from then on one iterate is collected every epoch."""
    batch_size: options.ByDataset[int | None] = None
    """Rows in a minibatch."""
    learning_rate: float = 1e-3
    """Step size, with a momentum of 0.9."""
    weight_decay: options.ByDataset[float | None] = None
    """L2 penalty that is added to the gradient."""
    rank: int = 20
    """Deviations that span the subspace."""
    chains: int = 4
    """Chains of each sampler, from draws of the prior."""
    warmup: int = 200
    """Steps of each chain that are left out; NUTS adapts in them."""
    draws: int = 300
    """Steps of each chain after them."""
    num_samples: int = 30
    """Networks averaged by every method that samples, of a chain at even distances."""
    resume: bool = False
    """Continue an interrupted run after its search, and with the data set it was at."""
    results: Path = Path("results")
    """Folder under which subspace/<name>/ is written."""


class Rows(NamedTuple):
    """The train rows of a split: inputs, targets, and how many of them are no padding."""

    x: Any
    y: Any
    rows: Any


class Found(NamedTuple):
    """What the chosen settings give on every split, as NumPy arrays with an axis of splits.

    Attributes:
      outputs: of every method means and variances ``(splits, S, M)``.
      draws: of every sampler z ``(splits, chains, draws, dim)``.
      divergent: share of NUTS's steps, ``(splits,)``.
    """

    outputs: dict[str, tuple[np.ndarray, np.ndarray]]
    draws: dict[str, np.ndarray]
    divergent: np.ndarray


def subspace(chosen: Subspace) -> None:
    """Compare the methods on one data set after the other."""
    from benchmarks.regression import data

    _check(chosen)
    for dataset in data.load(chosen.name, chosen.data_dir):
        _compare(_complete(chosen, len(dataset.targets)), dataset)


def _compare(chosen: Subspace, dataset: Any) -> None:
    """Train, choose, sample, score; print the table, write the JSON and the picture."""
    from rich.console import Console

    from benchmarks import report, stages
    from benchmarks.regression import data

    folder = chosen.results / "subspace" / dataset.name
    stage = stages.open_stages(folder / "stages", _identity(chosen, dataset), chosen.resume)
    splits = dataset.splits[: chosen.splits]
    held_out, parts = (data.parts(dataset, s) for s in (data.held_out(splits), splits))
    tables = _arrays(stage("search", lambda: _lists(_search(chosen, held_out))))
    content, shown = stage("final", lambda: _final(chosen, dataset, parts, tables))
    report.write_json(folder / "results.json", content)
    console = Console(width=max(100, Console().width))
    console.print(_title(content), report.beside(content), sep="\n")
    print("\n".join(_remarks(content)))
    _draw(folder / "posterior.png", _arrays(shown), content)
    print(f"results.json and posterior.png are in {folder}\n")


def _final(
    chosen: Subspace, dataset: Any, parts: Any, tables: dict[str, np.ndarray]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The record of all splits with the settings that held-out rows chose, and the picture's."""
    import jax

    settings = {name: _least(nll) for name, nll in tables.items()}
    states = _train(chosen, parts, "final")
    found = _sample(chosen, parts, states, settings)
    content = _record(chosen, dataset, parts, tables, settings, found)
    first = jax.tree.map(lambda leaf: jax.numpy.asarray(leaf)[0], (states, _rows(parts)))
    temperature = chosen.temperatures[settings["PCA"][0]]
    draws = {name: found.draws[name][0].reshape(-1, chosen.dim) for name in SAMPLERS}
    return content, _lists(_map(chosen, *first, temperature, draws["PCA+ESS"]) | draws)


def _lists(arrays: dict[str, Any]) -> dict[str, Any]:
    """As JSON can hold them."""
    return {name: np.asarray(values, float).tolist() for name, values in arrays.items()}


def _arrays(lists: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.array(values) for name, values in lists.items()}


def _check(chosen: Subspace) -> None:
    """Refuse values that no comparison can be made of, in one line."""
    least = {"splits": 1, "dim": 2, "rank": 3, "chains": 2, "warmup": 20, "draws": 4}
    for name, number in (least | {"num_samples": 1}).items():
        if getattr(chosen, name) < number:
            option = f"--{name.replace('_', '-')}"
            raise options.UsageError(f"{option} {getattr(chosen, name)}: at least {number}")
    if chosen.dim >= chosen.rank:
        raise options.UsageError(f"--dim {chosen.dim}: less than --rank {chosen.rank}")
    if chosen.num_samples > chosen.chains * chosen.draws:
        raise options.UsageError(
            f"--num-samples {chosen.num_samples}: at most --chains times --draws, "
            f"{chosen.chains * chosen.draws}"
        )
    for name in ("temperatures", "scales"):
        values = getattr(chosen, name)
        if not values or not all(0 < value < math.inf for value in values):
            raise options.UsageError(f"--{name} {' '.join(map(str, values))}: numbers above zero")
    for name in ("learning_rate", "weight_decay"):
        value = getattr(chosen, name)
        if value is not None and not 0 <= value < math.inf:
            option = f"--{name.replace('_', '-')}"
            raise options.UsageError(f"{option} {value}: a number of at least 0")


def _complete(chosen: Subspace, rows: int) -> Subspace:
    """Fill in the defaults for a data set of this many rows: those of ``uci``."""
    defaults = SMALL if rows <= 600 else MEDIUM if rows <= 2000 else LARGE
    full = options.complete(chosen, defaults | {"weight_decay": defaults["weight_decay"][0]})
    if full.epochs - full.start <= full.dim:
        raise options.UsageError(
            f"--start {full.start}: more than --dim {full.dim} less than --epochs {full.epochs}, "
            "or too few iterates span the subspace"
        )
    return full


def _train(chosen: Subspace, parts: Any, label: str) -> Any:
    """The states of SWAG of all splits, stacked."""
    import swagjax
    from benchmarks.regression import algorithms, training, tuning

    lengths = (chosen.hidden, chosen.batch_size, chosen.epochs, chosen.start)
    plan = training.Plan(*lengths, 0, chosen.rank, chosen.num_samples)
    plan = tuning.shortened(plan, parts, chosen.epochs)
    hyper = training.Hyper(chosen.learning_rate, chosen.weight_decay, 0.0)
    runs = training.runs([(i, hyper) for i in range(len(parts.rows))], members=1)
    algorithm = algorithms.averaged_sgd(plan)
    trained = training.train(f"{label}: averaged sgd", algorithm, plan, parts, runs)
    return swagjax.get_state(trained.state.opt_state)


def spaces(key: Any, state: Any, dim: int) -> Any:
    """The two subspaces of a split, KINDS, stacked: what is done in both is compiled once."""
    import jax
    import jax.numpy as jnp

    import swagjax
    from swagjax import subspace

    control = subspace.random(key, swagjax.mean(state), dim)
    return jax.tree.map(lambda *x: jnp.stack(x), subspace.pca(state, dim), control)


def log_likelihood(data: Rows, params: Any) -> Any:
    """Of all train rows together."""
    import jax.numpy as jnp

    from benchmarks.regression import network

    densities = network.log_density(params, data.x, data.y)
    return jnp.where(jnp.arange(len(data.y)) < data.rows, densities, 0).sum()


def ess(space: Any, data: Rows, temperature: Any, warmup: int, draws: int, key: Any) -> Any:
    """A chain of elliptical slice sampling: z ``(draws, dim)``.

    It mixes slowly where the posterior lies far out in the prior, as it does where the iterates
    travel. So after the warm-up its ellipses are about m, the mean of the second half of it, and
    the prior over N(z; m, I) goes into the likelihood: the posterior stays what it is.
    """
    import blackjax
    import jax
    import jax.numpy as jnp

    from swagjax import subspace

    dim = len(space.variances)
    of_rows = partial(log_likelihood, data)

    def step(carry: Any, of_step: Any) -> Any:
        (z, total), (i, key) = carry, of_step
        m = jnp.where(i < warmup, 0, total / (warmup - warmup // 2))

        def likelihood(z: Any) -> Any:
            at_z = subspace.log_likelihood(space, z, function=of_rows, temperature=temperature)
            return at_z - z @ m

        kernel = blackjax.elliptical_slice(likelihood, mean=m, cov=jnp.ones(dim))
        z = kernel.step(key, kernel.init(z))[0].position
        averaged = (warmup // 2 <= i) & (i < warmup)
        return (z, total + jnp.where(averaged, z, 0)), z

    first, rest = jax.random.split(key)
    start = jax.random.normal(first, (dim,)), jnp.zeros(dim)
    steps = jnp.arange(warmup + draws), jax.random.split(rest, warmup + draws)
    return jax.lax.scan(step, start, steps)[1][warmup:]


def nuts(space: Any, data: Rows, temperature: Any, warmup: int, draws: int, key: Any) -> Any:
    """A chain of NUTS: z ``(draws, dim)``, and whether each step diverged."""
    import blackjax
    import jax

    from swagjax import subspace

    density = partial(
        subspace.log_prob, space, function=partial(log_likelihood, data), temperature=temperature
    )
    first, adapting, rest = jax.random.split(key, 3)
    start = jax.random.normal(first, space.variances.shape)
    adapted, _ = blackjax.window_adaptation(blackjax.nuts, density).run(adapting, start, warmup)
    kernel = blackjax.nuts(density, **adapted.parameters)

    def step(chain: Any, key: Any) -> Any:
        chain, info = kernel.step(key, chain)
        return chain, (chain.position, info.is_divergent)

    return jax.lax.scan(step, adapted.state, jax.random.split(rest, draws))[1]


def thinned(space: Any, zs: Any, number: int) -> Any:
    """Networks, stacked, of draws ``(chains, draws, dim)`` at even distances."""
    import jax

    from swagjax import subspace

    flat = zs.reshape(-1, zs.shape[-1])
    kept = ((np.arange(number) + 0.5) * len(flat) / number).astype(int)
    return jax.vmap(subspace.point, (None, 0))(space, flat[kept])


def _swag(key: Any, state: Any, scale: Any, number: int) -> Any:
    """Networks, stacked, drawn from SWAG; with the same key the same noise at every scale."""
    import jax

    import swagjax

    keys = jax.random.split(key, number)
    return jax.vmap(lambda one: swagjax.sample(one, state, scale=scale))(keys)


def _predict(networks: Any, x: Any) -> Any:
    """Means and variances ``(S, M)`` of the standardised targets, of stacked networks."""
    import jax

    import swagjax
    from benchmarks.regression import network

    points = swagjax.ensemble.Points(networks)
    size = swagjax.ensemble.size(points)
    key = jax.random.key(0)  # of no use: points are all there is
    return swagjax.predict_samples(key, points, network.apply, x, chunk_size=size)


def _search(chosen: Subspace, parts: Any) -> dict[str, np.ndarray]:
    """NLL ``(splits, settings)`` on the held-out rows, of every temperature or scale."""
    import jax
    import jax.numpy as jnp

    from swagjax import metrics

    states, number = _train(chosen, parts, "search"), chosen.num_samples
    steps = min(SEARCH, chosen.warmup), min(SEARCH, chosen.draws)

    def of_split(state: Any, data: Rows, x: Any, y: Any, split: Any) -> Any:
        key = _key(split)

        def nll(networks: Any) -> Any:
            return metrics.gaussian_nll(*metrics.moment_match(*_predict(networks, x)), y)

        def of_space(space: Any) -> Any:
            def at(temperature: Any) -> Any:
                draw = partial(ess, space, data, temperature, *steps)
                zs = jax.vmap(draw)(jax.random.split(key, chosen.chains))
                return nll(thinned(space, zs, number))

            return jax.lax.map(at, jnp.array(chosen.temperatures))

        def at_scale(scale: Any) -> Any:
            return nll(_swag(key, state, scale, number))

        tables = jax.lax.map(of_space, spaces(key, state, chosen.dim))
        scaled = jax.lax.map(at_scale, jnp.array(chosen.scales))
        return dict(zip(KINDS, tables, strict=True)) | {"SWAG scaled": scaled}

    arguments = (states, _rows(parts), parts.test_x, parts.test_y, np.arange(len(parts.rows)))
    return jax.device_get(jax.jit(jax.vmap(of_split))(*arguments))


def _least(nll: np.ndarray) -> np.ndarray:
    """The setting of least NLL of every split."""
    return np.argmin(np.where(np.isfinite(nll), nll, np.inf), axis=1)


def _sample(chosen: Subspace, parts: Any, states: Any, settings: dict[str, np.ndarray]) -> Found:
    """Draw with the chosen settings, and predict the test rows."""
    import jax
    import jax.numpy as jnp

    import swagjax

    number, steps = chosen.num_samples, (chosen.warmup, chosen.draws)
    values = {name: np.array(_tried(chosen, name))[i] for name, i in settings.items()}

    def of_split(state: Any, data: Rows, x: Any, setting: Any, split: Any) -> Any:
        key = _key(split)
        keys = jax.random.split(key, chosen.chains)
        both, temperatures = spaces(key, state, chosen.dim), [setting[name] for name in KINDS]

        def of_space(one: Any) -> Any:
            return jax.vmap(partial(ess, one[0], data, one[1], *steps))(keys)

        first, control = jax.lax.map(of_space, (both, jnp.stack(temperatures)))
        pca = jax.tree.map(lambda leaf: leaf[0], both)
        second, divergent = jax.vmap(partial(nuts, pca, data, setting["PCA"], *steps))(keys)
        zs = dict(zip(SAMPLERS, (first, second, control), strict=True))
        scales = jnp.stack([jnp.ones_like(setting["SWAG scaled"]), setting["SWAG scaled"]])
        swag = jax.lax.map(lambda scale: _swag(key, state, scale, number), scales)
        of = [jax.tree.map(lambda leaf, i=i: leaf[i], both) for i in (0, 0, 1)]
        drawn = [thinned(*pair, number) for pair in zip(of, zs.values(), strict=True)]
        swa = jax.tree.map(lambda leaf: leaf[None, None], swagjax.mean(state))
        together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *drawn)
        networks = jax.tree.map(
            lambda *leaves: jnp.concatenate([x.reshape(-1, *x.shape[2:]) for x in leaves]),
            *(swa, swag, together),
        )
        return _predict(networks, x), zs, divergent.mean()

    arguments = (states, _rows(parts), parts.test_x, values, np.arange(len(parts.rows)))
    outputs, zs, divergent = jax.device_get(jax.jit(jax.vmap(of_split))(*arguments))
    return Found(_by_method(outputs, number), zs, divergent)


def _by_method(outputs: Any, number: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Cut what all networks predict, one of SWA and then as many of each method, into methods."""
    ends = np.cumsum([1, *[number] * (len(METHODS) - 1)])
    means, variances = (np.split(values, ends[:-1], axis=1) for values in outputs)
    return dict(zip(METHODS, zip(means, variances, strict=True), strict=True))


def _tried(chosen: Subspace, name: str) -> tuple[float, ...]:
    return chosen.scales if name == "SWAG scaled" else chosen.temperatures


def _key(split: Any) -> Any:
    from benchmarks.regression import training

    return training.key(0, split, training.PREDICT)


def _rows(parts: Any) -> Rows:
    return Rows(parts.x, parts.y, parts.rows)


def swag_covariance(space: Any, state: Any) -> np.ndarray:
    """Covariance of SWAG in the coordinates z of a subspace of orthogonal directions.

    Of its low-rank part it is 1/2 in every direction: the directions are as long as that is wide.
    """
    import jax

    v, d = (_matrix(tree) for tree in (space.directions, state.deviations))
    variance = np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.variance)])
    held = min(int(state.num_collected), len(d))
    inverse = np.linalg.pinv(v.T)  # from weights to z
    low_rank = (inverse @ d.T) / math.sqrt(held - 1)
    return ((inverse * variance) @ inverse.T + low_rank @ low_rank.T) / 2


def _matrix(tree: Any) -> np.ndarray:
    import jax

    leaves = [np.reshape(x, (len(x), -1)) for x in jax.tree.leaves(jax.device_get(tree))]
    return np.concatenate(leaves, axis=1).astype(np.float64)


def _map(
    chosen: Subspace, state: Any, data: Rows, temperature: float, draws: np.ndarray
) -> dict[str, np.ndarray]:
    """Log-density over the first two directions, the others at the mean of the draws."""
    import jax
    import jax.numpy as jnp

    from swagjax import subspace

    space = subspace.pca(state, chosen.dim)
    covariance = swag_covariance(space, state)
    reach = 2 * np.sqrt(np.diag(covariance)[:2])
    low, high = np.minimum(draws[:, :2].min(0), -reach), np.maximum(draws[:, :2].max(0), reach)
    margin = 0.1 * (high - low)
    axes = np.linspace(low - margin, high + margin, 61).T
    first, second = np.meshgrid(*axes)
    grid = np.tile(draws.mean(0), (first.size, 1))
    grid[:, 0], grid[:, 1] = first.ravel(), second.ravel()
    density = partial(
        subspace.log_prob, space, function=partial(log_likelihood, data), temperature=temperature
    )
    values = jax.jit(partial(jax.lax.map, density, batch_size=64))(jnp.asarray(grid, jnp.float32))
    return {
        "x": axes[0],
        "y": axes[1],
        "density": np.asarray(values).reshape(first.shape),
        "covariance": covariance,
        "temperature": np.asarray(temperature),
    }


def _record(
    chosen: Subspace,
    dataset: Any,
    parts: Any,
    tables: dict[str, np.ndarray],
    settings: dict[str, np.ndarray],
    found: Found,
) -> dict[str, Any]:
    from benchmarks import report

    ratio = float((parts.test_rows / parts.rows).mean())
    scores = {name: _scores(*found.outputs[name], parts) for name in METHODS}
    rows = _published(dataset.name)
    standardised = any(row["standardised"] for row in rows)
    return report.record(
        scores,
        experiment="subspace",
        options=_identity(chosen, dataset),
        data={
            "rows": len(dataset.targets),
            "inputs": dataset.inputs.shape[1],
            "splits": len(parts.rows),
            "layout": dataset.layout,
            "test_to_train": ratio,
        },
        shown=[_in_units(name, standardised) for name in METRICS],
        published=rows,
        chosen={
            name: [float(_tried(chosen, name)[i]) for i in of] for name, of in settings.items()
        },
        held_out_nll={name: np.round(nll, 4).tolist() for name, nll in tables.items()},
        samplers=_mixing(found),
        paired_tests={m: report.paired_tests(scores, m, ratio) for m in TESTED},
    )


def _identity(chosen: Subspace, dataset: Any) -> dict[str, Any]:
    """The options that determine the numbers of one data set."""
    return options.identity(chosen) | {"dataset": dataset.name}


def _scores(means: np.ndarray, variances: np.ndarray, parts: Any) -> dict[str, list[float]]:
    """One value a split of every metric, in the units of the targets."""
    each = [
        _metrics(m[:, :n], v[:, :n], y[:n], float(std))
        for m, v, y, n, std in zip(
            means, variances, parts.test_y, parts.test_rows, parts.y_std, strict=True
        )
    ]
    return {name: [of[name] for of in each] for name in each[0]}


def _metrics(means: np.ndarray, variances: np.ndarray, y: np.ndarray, std: float) -> dict[str, Any]:
    from swagjax import metrics

    mean, variance = metrics.moment_match(means, variances)
    nll = float(metrics.gaussian_nll(mean, variance, y))
    return {
        "RMSE": std * float(metrics.rmse(mean, y)),
        "NLL": nll + math.log(std),
        "CRPS": std * float(metrics.mixture_crps(means, variances, y)),
        "coverage": float(metrics.coverage(mean, variance, y)),
        "width": std * float(metrics.interval_width(variance)),
        "standardised NLL": nll,
    }


def _in_units(metric: str, standardised: bool) -> str:
    """NLL of standardised targets where the published one is."""
    return "standardised NLL" if standardised and metric == "NLL" else metric


def _published(name: str) -> list[dict[str, Any]]:
    from benchmarks.regression import published

    return [
        {
            "label": f"{row.method} *",
            "RMSE": row.rmse,
            "standardised NLL" if row.standardised else "NLL": row.nll,
            "standardised": row.standardised,
            **published.SOURCES[row.source]._asdict(),
        }
        for row in published.authors(name)
    ]


def _mixing(found: Found) -> dict[str, Any]:
    """Whether the chains can be trusted: the worst R-hat and effective sample size of any z."""
    from blackjax import diagnostics

    about: dict[str, Any] = {}
    for name, zs in found.draws.items():
        worst = [(diagnostics.rhat(z).max(), diagnostics.ess_bulk(z).min()) for z in zs]
        r_hat, size = (np.array(column, float) for column in zip(*worst, strict=True))
        about[name] = {
            "r_hat": _finite(r_hat),
            "effective_sample_size": _finite(size),
            "mean": np.round(zs.mean((1, 2)), 4).tolist(),
            "sd": np.round(zs.std((1, 2)), 4).tolist(),
        }
    about["PCA+NUTS"]["divergent"] = _finite(found.divergent)
    about["disagreement"] = _finite(_disagreement(found))
    return about


def _disagreement(found: Found) -> np.ndarray:
    """Largest difference of the means of z by the two samplers, in standard deviations."""
    ess, nuts = found.draws["PCA+ESS"], found.draws["PCA+NUTS"]
    apart = np.abs(ess.mean((1, 2)) - nuts.mean((1, 2))) / nuts.std((1, 2))
    return apart.max(1)


def _finite(values: np.ndarray) -> list[float | None]:
    return [round(float(x), 4) if np.isfinite(x) else None for x in values]


def _title(content: dict[str, Any]) -> str:
    o, d = content["options"], content["data"]
    return (
        f"{o['dataset']}: {d['rows']} rows, {d['inputs']} inputs; {o['dim']} directions of "
        f"{o['rank']} deviations; mean ± standard error over {d['splits']} splits; 95 % intervals"
    )


def _remarks(content: dict[str, Any]) -> list[str]:
    """What was chosen, whether the chains mix, and how PCA+ESS compares."""
    chosen, samplers = content["chosen"], content["samplers"]
    lines = [
        f"chosen on held-out rows, split by split: temperature of PCA {_list(chosen['PCA'])}; of "
        f"random {_list(chosen['random'])}; scale of SWAG scaled {_list(chosen['SWAG scaled'])}"
    ]
    for name in (method for method in METHODS if method in samplers):
        of = samplers[name]
        r_hat = [x for x in of["r_hat"] if x is not None]
        size = [x for x in of["effective_sample_size"] if x is not None]
        lines.append(
            f"{name}: R-hat at worst {max(r_hat, default=math.nan):.3f}, effective sample size at "
            f"least {min(size, default=math.nan):.0f} of "
            f"{content['options']['chains'] * content['options']['draws']}"
        )
    away = np.linalg.norm(samplers["PCA+NUTS"]["mean"], axis=1)
    lines.append(
        f"the mean of PCA+NUTS lies {np.median(away):.1f} standard deviations of the prior from "
        f"SWA, the median split; {away.max():.1f} at most"
    )
    return lines + _compared(content) + _sources(content)


def _list(values: list[float]) -> str:
    return " ".join(f"{value:g}" for value in values)


def _compared(content: dict[str, Any]) -> list[str]:
    """PCA+ESS against each other method, by the paired test."""
    tests, lines = content["paired_tests"]["NLL"], []
    for name in COMPARED:
        sign, test = 1, tests.get("PCA+ESS", {}).get(name)
        if test is None:
            sign, test = -1, tests[name]["PCA+ESS"]
        error = "" if test["p"] is None else f" ± {test['standard_error']:.4f}, p = {test['p']:.2g}"
        lines.append(f"NLL of PCA+ESS - {name}: {sign * test['difference']:+.4f}{error}")
    return lines


def _sources(content: dict[str, Any]) -> list[str]:
    sources = dict.fromkeys((row["paper"], row["caveat"]) for row in content["published"])
    return [f"* {paper}: {caveat}" for paper, caveat in sources]


def _draw(path: Path, shown: dict[str, np.ndarray], content: dict[str, Any]) -> None:
    """The posterior of the first split: a slice of it, and how wide it is in every direction."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 5), layout="constrained", width_ratios=(6, 5))
    _draw_map(axes[0], shown)
    _draw_widths(axes[1], shown)
    temperature = f"{float(shown['temperature']):g}"
    figure.suptitle(
        f"{content['options']['dataset']}, first split: posterior in the subspace of the iterates, "
        f"temperature {temperature}"
    )
    for ax in axes:
        handles, labels = ax.get_legend_handles_labels()
        ax.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_map(ax: Any, shown: dict[str, np.ndarray]) -> None:
    zs = shown["PCA+ESS"]
    below = shown["density"] - shown["density"].max()
    levels = [-0.5 * k**2 for k in (4, 3, 2, 1)]
    lines = {"colors": "0.45", "linewidths": 1, "linestyles": "solid"}
    ax.contour(shown["x"], shown["y"], below, levels, **lines)
    ax.plot([], [], color="0.45", label="log density 1/2, 2, 9/2, 8 below its highest")
    kept = zs[:: max(1, len(zs) // 300)]
    ax.plot(kept[:, 0], kept[:, 1], ".", color=BLUE, markersize=4, alpha=0.6, label="draws of ESS")
    angle = np.linspace(0, 2 * np.pi, 200)
    circle = np.stack([np.cos(angle), np.sin(angle)])
    root = np.linalg.cholesky(shown["covariance"][:2, :2])
    for k in (1, 2):
        label = "SWAG, 1 and 2 standard deviations" if k == 1 else None
        ax.plot(*(k * root @ circle), color=ORANGE, linestyle="--", label=label)
    ax.plot(0, 0, "P", color=BLACK, markersize=8, label="SWA")
    ax.set(xlabel="z of the first direction", ylabel="z of the second direction")


def _draw_widths(ax: Any, shown: dict[str, np.ndarray]) -> None:
    covariance = shown["covariance"]
    index = np.arange(1, len(covariance) + 1)
    drawn = (("PCA+ESS", BLUE, "o", "ESS"), ("PCA+NUTS", GREEN, "x", "NUTS"))
    for (name, color, marker, label), shift in zip(drawn, (-0.1, 0.1), strict=True):
        zs = shown[name]
        ax.errorbar(
            index + shift, zs.mean(0), zs.std(0), fmt=marker, color=color, capsize=3, label=label
        )
    ax.errorbar(
        index + 0.3,
        0 * index,
        np.sqrt(np.diag(covariance)),
        fmt="s",
        markersize=4,
        color=ORANGE,
        linestyle="none",
        capsize=3,
        label="SWAG",
    )
    for edge in (-1, 1):
        label = "prior" if edge == 1 else None
        ax.axhline(edge, color="0.45", linestyle=":", label=label)
    ax.set(xlabel="direction", ylabel="z: mean ± standard deviation", xticks=index)
