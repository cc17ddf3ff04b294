"""Pictures of what metrics, diagnostics and surface return: arrays and an Axes in, the Axes out.

The only room that imports matplotlib (``pip install swagjax[plot]``). Nothing is shown or saved,
and a figure is made only where no Axes is given. Curves differ in colour (the palette of Okabe and
Ito), in line style and in marker, histograms in colour and in hatch, so that they can be told apart
by the colour-blind and in grey print.
"""

import math
from typing import Any, Literal

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import cbook
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation
from numpy.typing import ArrayLike, NDArray

_STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    {"color": "#D55E00", "linestyle": "--", "marker": "s"},
    {"color": "#009E73", "linestyle": "-.", "marker": "^"},
    {"color": "#000000", "linestyle": ":", "marker": "D"},
    {"color": "#CC79A7", "linestyle": (0, (5, 1, 1, 1, 1, 1)), "marker": "v"},
    {"color": "#E69F00", "linestyle": (0, (8, 2)), "marker": "P"},
    {"color": "#56B4E9", "linestyle": (0, (1, 1)), "marker": "X"},
)
_FILLS: tuple[dict[str, Any], ...] = (
    {"facecolor": "#0072B288", "edgecolor": "#0072B2", "hatch": "", "histtype": "stepfilled"},
    {"facecolor": "#E69F0066", "edgecolor": "#D55E00", "hatch": "///", "histtype": "stepfilled"},
)
_REFERENCE: dict[str, Any] = {
    "color": "#666666",
    "linewidth": 1.0,
    "zorder": 1,
    "gid": "reference",
    "label": "perfect calibration",
}

# How finely the stretched axis resolves confidences close to 1.
_FINEST = 1e-3
_ROUNDING = 1e-2  # of entropies, in nats: bfloat16 has no better
_STRETCHED_TICKS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99, 0.999, 1.0)


def reliability_diagram(
    confidence: ArrayLike,
    accuracy: ArrayLike,
    count: ArrayLike | None = None,
    *,
    form: Literal["gap", "classical"] = "gap",
    ax: Axes | None = None,
    label: str | None = None,
    **kwargs: Any,
) -> Axes:
    """Draw how far accuracy is from confidence; call it once per method on one Axes to compare.

    ``form="gap"`` is that of the SWAG paper: accuracy minus confidence against confidence, with the
    line of zero. The horizontal axis is stretched towards 1, where the confidences of a network
    crowd: it is linear in ``-log10(1.001 - confidence)``. ``form="classical"`` draws accuracy
    against confidence, with the diagonal. In both, points below the line are over-confident.

    Args:
      confidence: mean confidence of each bin, shape ``(B,)``, in ``[0, 1]``.
      accuracy: accuracy of each bin, shape ``(B,)``, in ``[0, 1]``. Bins where either is NaN (the
        empty ones of ``metrics.reliability``) are left out.
      count: number of examples of each bin, shape ``(B,)``; if given, a halo around each point
        grows with its bin's share of the examples.
      form: ``"gap"`` or ``"classical"``; the same for all curves on one Axes.
      ax: where to draw; without it a new figure is made.
      label: name of the curve in the legend, which stands below the Axes.
      **kwargs: passed to ``Axes.plot``; they replace the style that is chosen by turns.

    Returns:
      The Axes.

    Raises:
      ValueError: an unknown ``form``; arrays that are not one-dimensional and of one length.

    Example:
      >>> import matplotlib; matplotlib.use("Agg")
      >>> from swagjax import plot
      >>> nan = float("nan")  # an empty bin
      >>> ax = plot.reliability_diagram([0.7, 0.95, nan], [0.6, 0.9, nan], label="SGD")
      >>> ax = plot.reliability_diagram([0.72, 0.94], [0.7, 0.95], label="SWAG", ax=ax)
      >>> [line.get_label() for line in ax.lines]
      ['perfect calibration', 'SGD', 'SWAG']

    Source: Maddox et al. (2019), "A Simple Baseline for Bayesian Uncertainty in Deep Learning",
    figure 3; Guo et al. (2017), "On Calibration of Modern Neural Networks", figure 1; the colours
    of Okabe and Ito (2008), "Color Universal Design".
    """
    if form not in ("gap", "classical"):
        raise ValueError(f"form is {form!r}, but must be 'gap' or 'classical'.")
    conf, acc, share = _read_bins(confidence, accuracy, count)
    ax = _new_axes() if ax is None else ax
    _frame_gap(ax) if form == "gap" else _frame_classical(ax)
    style = _style(ax, kwargs)
    heights = acc - conf if form == "gap" else acc
    (line,) = ax.plot(conf, heights, label=label, gid="curve", **style)
    if share is not None:
        _draw_halos(ax, line, share)
    if label is not None:
        _legend_below(ax)
    return ax


def entropy_histograms(
    entropy_in: ArrayLike,
    entropy_out: ArrayLike,
    *,
    num_bins: int = 30,
    num_classes: int | None = None,
    ax: Axes | None = None,
    labels: tuple[str, str] = ("in distribution", "out of distribution"),
) -> Axes:
    """Draw the densities of predictive entropy in and out of distribution, over common bins.

    The further apart the two are, the better the entropy tells familiar inputs from strange ones.
    Each histogram has area one, whatever its number of examples.

    Args:
      entropy_in: entropies in nats of examples from the training distribution, any shape.
      entropy_out: entropies in nats of examples from elsewhere, any shape.
      num_bins: number of bins, from zero to the greatest entropy.
      num_classes: C; if given, the bins end at ``log C``, the greatest entropy possible, so that
        several pictures have one scale.
      ax: where to draw; without it a new figure is made.
      labels: names of the two in the legend, which stands below the Axes.

    Returns:
      The Axes.

    Raises:
      ValueError: empty or non-finite entropies, negative ones or (with ``num_classes``) ones above
        ``log C``; ``num_bins`` below 1; ``num_classes`` below 2.

    Example:
      >>> import matplotlib; matplotlib.use("Agg")
      >>> from swagjax import plot
      >>> ax = plot.entropy_histograms([0.0, 0.1, 0.2], [0.5, 0.6], num_classes=2)
      >>> ax.get_xlabel()
      'predictive entropy (nats)'

    Source: Maddox et al. (2019), section 5 (out-of-domain images).
    """
    if num_bins < 1:
        raise ValueError(f"num_bins is {num_bins!r}, but must be 1 or more: try 30.")
    inside = _read_entropies("entropy_in", entropy_in, num_classes)
    outside = _read_entropies("entropy_out", entropy_out, num_classes)
    ax = _new_axes() if ax is None else ax
    top = math.log(num_classes) if num_classes else max(inside.max(), outside.max()) or 1.0
    edges = np.linspace(0.0, top, num_bins + 1).tolist()
    for values, label, style in zip((inside, outside), labels, _FILLS, strict=True):
        ax.hist(np.minimum(values, top), edges, density=True, label=label, **style)
    ax.set(xlabel="predictive entropy (nats)", ylabel="density (per nat)", xlim=(0.0, top))
    _title(ax, "Predictive entropy")
    _legend_below(ax)
    return ax


def autocorrelation(
    autocorrelation: ArrayLike, *, ax: Axes | None = None, label: str | None = None, **kwargs: Any
) -> Axes:
    """Draw the autocorrelation of the collected iterates against lag, with the line of zero.

    A curve that drops to the line within a lag or two is of iterates that are nearly independent;
    one that falls straight through it, of a run that still travels. Long lags rest on few pairs of
    iterates. Call it once per run on one Axes to compare.

    Args:
      autocorrelation: that field of ``diagnostics.effective_count``, shape ``(K,)``, from lag 0.
        NaNs (of a ring that is not full) are left out.
      ax: where to draw; without it a new figure is made.
      label: name of the curve in the legend, which stands below the Axes.
      **kwargs: passed to ``Axes.plot``; they replace the style that is chosen by turns.

    Returns:
      The Axes.

    Raises:
      ValueError: for an array that is not one-dimensional, or all NaN.

    Example:
      >>> import matplotlib; matplotlib.use("Agg")
      >>> from swagjax import plot
      >>> ax = plot.autocorrelation([1.0, 0.5, 0.2, 0.1], label="every epoch")
      >>> [line.get_label() for line in ax.lines]
      ['independent', 'every epoch']
    """
    rho = _read_row("autocorrelation", autocorrelation, "diagnostics.effective_count")
    ax = _new_axes() if ax is None else ax
    if not _has_reference(ax):
        ax.axhline(0.0, **{**_REFERENCE, "label": "independent"})
    _draw_curve(ax, np.arange(len(rho)), rho, label, kwargs)
    ax.set(xlabel="lag (collections)", ylabel="autocorrelation, all weights pooled")
    _title(ax, "Autocorrelation of the iterates")
    return ax


def captured_variance(
    cumulative: ArrayLike, *, ax: Axes | None = None, label: str | None = None, **kwargs: Any
) -> Axes:
    """Draw the share of the iterates' variance that their first principal directions hold.

    The straight line is that of iterates that are independent and of equal variance in very many
    directions, k / (h - 1): a curve along it says that the ring shows no subspace, one that is
    high at a few k that so many directions hold the variance. Call it once per run on one Axes to
    compare; each number of directions has a line of its own.

    Args:
      cumulative: that field of ``diagnostics.captured_variance``, shape ``(K - 1,)``, from one
        direction on. NaNs (of a ring that is not full) are left out.
      ax: where to draw; without it a new figure is made.
      label: name of the curve in the legend, which stands below the Axes.
      **kwargs: passed to ``Axes.plot``; they replace the style that is chosen by turns.

    Returns:
      The Axes.

    Raises:
      ValueError: for an array that is not one-dimensional, or all NaN.

    Example:
      >>> import matplotlib; matplotlib.use("Agg")
      >>> from swagjax import plot
      >>> ax = plot.captured_variance([0.7, 0.9, 1.0], label="SWAG")
      >>> [line.get_label() for line in ax.lines]
      ['equal variance in all directions', 'SWAG']
    """
    shares = _read_row("cumulative", cumulative, "diagnostics.captured_variance")
    ax = _new_axes() if ax is None else ax
    lines = [line for line in ax.lines if line.get_gid() == "reference"]
    ends = [np.max(line.get_xdata()) for line in lines]
    if len(shares) not in ends:
        name = "_" if ends else "equal variance in all directions"  # one entry of the legend
        ax.plot([0, len(shares)], [0.0, 1.0], **{**_REFERENCE, "label": name})
    _draw_curve(ax, np.arange(len(shares) + 1), np.append(0.0, shares), label, kwargs)
    ax.set(xlabel="number of principal directions", ylabel="share of the iterates' variance")
    _title(ax, "Variance captured by the first directions")
    return ax


def loss_surface(
    x: ArrayLike,
    y: ArrayLike,
    values: ArrayLike,
    *,
    top: float | None = None,
    num_levels: int = 10,
    decades: float = 3.0,
    ax: Axes | None = None,
    label: str = "loss",
) -> Axes:
    """Draw the loss on a plane through weight space, by contours that are dense near its minimum.

    Their heights above the least value m grow by one ratio, over so many decades:
    ``m + (top - m) 10^(-decades (1 - i / (n - 1)))``, i = 0 ... n - 1, so that the optimum shows
    form where an even spacing would show its walls alone. What is higher than ``top``, or not
    finite, has the last colour.

    Args:
      x: first coordinates, shape ``(H, W)``, as ``surface.grid`` and ``numpy.meshgrid`` make them.
      y: second coordinates, likewise.
      values: the loss, or an error, at these points, shape ``(H, W)``.
      top: the highest contour; by default the greatest value.
      num_levels: n, the number of contours.
      decades: the lowest is ``10^-decades`` of the way up; less for an error of few images.
      ax: where to draw; without it a new figure is made.
      label: what is drawn, with its unit; it stands beside the colours.

    Returns:
      The Axes, of one scale in both directions.

    Raises:
      ValueError: arrays of different shapes or not two-dimensional, values none of which is
        finite or that are all alike, a ``top`` not above the least one, fewer than two contours,
        ``decades`` that are not above zero.

    Example:
      >>> import matplotlib; matplotlib.use("Agg")
      >>> import numpy as np
      >>> from swagjax import plot
      >>> x, y = np.meshgrid(np.linspace(-1, 1, 5), np.linspace(-1, 1, 5))
      >>> ax = plot.loss_surface(x, y, x**2 + y**2, label="train loss (nats)")
      >>> ax = plot.plane_points([[0.0, 0.0]], ax=ax, label="SWA")
      >>> ax = plot.posterior_ellipse([0.0, 0.0], [[0.1, 0.0], [0.0, 0.2]], ax=ax, label="SWAG")
      >>> [text.get_text() for text in ax.get_legend().get_texts()]
      ['SWA', 'SWAG, 1 to 3 standard deviations']

    Source: Garipov et al. (2018), "Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs",
    figure 1; Izmailov et al. (2018), "Averaging Weights Leads to Wider Optima and Better
    Generalization", figure 1.
    """
    heights, levels = _read_surface(x, y, values, top, num_levels, decades)
    ax = _new_axes() if ax is None else ax
    norm = BoundaryNorm(levels, 256, extend="both")
    drawn = ax.contourf(x, y, heights, levels, cmap="viridis", norm=norm, extend="both")
    ax.contour(x, y, heights, levels, colors="black", linewidths=0.4, alpha=0.6)
    bar = ax.figure.colorbar(drawn, ax=ax, label=label, ticks=levels, spacing="uniform")
    bar.ax.set_yticklabels([f"{level:.3g}" for level in levels])
    ax.set(xlabel="distance in weight space", ylabel="distance in weight space", aspect="equal")
    # What is drawn over it may reach further.
    ax.set(xlim=(np.min(x), np.max(x)), ylim=(np.min(y), np.max(y)))
    _title(ax, "Loss surface")
    return ax


def plane_points(
    points: ArrayLike, *, ax: Axes | None = None, label: str | None = None, **kwargs: Any
) -> Axes:
    """Mark weights on a plane: SGD, SWA, or the iterates of a run, joined in their order.

    Args:
      points: coordinates, shape ``(N, 2)``, or ``(2,)`` for a single point: those of
        ``surface.coordinates`` or the ``points`` of a plane. NaNs are left out.
      ax: where to draw; without it a new figure is made.
      label: name in the legend, which stands below the Axes.
      **kwargs: passed to ``Axes.plot``; they replace the style that is chosen by turns.

    Returns:
      The Axes.

    Raises:
      ValueError: for coordinates of another shape.

    Example:
      >>> import matplotlib; matplotlib.use("Agg")
      >>> from swagjax import plot
      >>> ax = plot.plane_points([[0.0, 1.0], [2.0, 3.0]], label="iterates")
      >>> ax.lines[0].get_xydata().tolist()
      [[0.0, 1.0], [2.0, 3.0]]
    """
    xy: NDArray[np.float64] = np.atleast_2d(np.asarray(points, np.float64))
    if xy.ndim != 2 or xy.shape[1] != 2:
        raise ValueError(f"points have shape {np.shape(points)}, but must have (N, 2).")
    ax = _new_axes() if ax is None else ax
    style: dict[str, Any] = {"path_effects": _outline("white"), "zorder": 4} | _style(ax, kwargs)
    ax.plot(*xy[~np.isnan(xy).any(1)].T, label=label, gid="curve", **style)
    if label is not None:
        _legend_below(ax)
    return ax


def posterior_ellipse(
    mean: ArrayLike,
    covariance: ArrayLike,
    *,
    sigmas: tuple[float, ...] = (1.0, 2.0, 3.0),
    ax: Axes | None = None,
    label: str | None = None,
    **kwargs: Any,
) -> Axes:
    """Draw a posterior's shadow on a plane: the ellipses of so many standard deviations.

    Those of k hold ``1 - exp(-k^2 / 2)`` of the projected samples: .39, .86 and .99.

    Args:
      mean: its centre, shape ``(2,)``, that field of ``surface.project``.
      covariance: shape ``(2, 2)``, likewise; may be of rank one or zero.
      sigmas: standard deviations, one ellipse each.
      ax: where to draw; without it a new figure is made.
      label: name in the legend, which stands below the Axes.
      **kwargs: passed to ``Axes.plot``.

    Returns:
      The Axes.

    Raises:
      ValueError: for other shapes, numbers that are not finite, a covariance that is none.

    Example:
      >>> import matplotlib; matplotlib.use("Agg")
      >>> from swagjax import plot
      >>> ax = plot.posterior_ellipse([1.0, 2.0], [[4.0, 0.0], [0.0, 1.0]], sigmas=(2.0,))
      >>> print(ax.lines[0].get_xydata().max(0).round(2))
      [5. 4.]
    """
    centre, root = _read_gaussian(mean, covariance)
    ax = _new_axes() if ax is None else ax
    angle = np.linspace(0.0, 2 * np.pi, 181)
    circle = np.stack([np.cos(angle), np.sin(angle)])
    style: dict[str, Any] = {"color": "white", "linestyle": "--", "linewidth": 1.3, "zorder": 3}
    style["path_effects"] = _outline("black")
    style |= cbook.normalize_kwargs(kwargs, Line2D)
    name = None if label is None else f"{label}, {_span(sigmas)}"
    for i, sigma in enumerate(sigmas):
        edge = centre[:, None] + sigma * root @ circle
        ax.plot(*edge, label="_" if i else name, gid="ellipse", **style)
    if label is not None:
        _legend_below(ax)
    return ax


def loss_profile(
    position: ArrayLike,
    values: ArrayLike,
    *,
    ax: Axes | None = None,
    label: str | None = None,
    **kwargs: Any,
) -> Axes:
    """Draw the loss along a ray or a curve; of several rays the mean, and their range as a band.

    Call it once per ray or curve on one Axes to compare. How wide an optimum is shows along rays,
    whether two are connected along curves.

    Args:
      position: distances along rays, or t along curves, shape ``(N,)``.
      values: the loss there, shape ``(N,)``, or ``(R, N)`` for R rays.
      ax: where to draw; without it a new figure is made.
      label: name of the curve in the legend, which stands below the Axes.
      **kwargs: passed to ``Axes.plot``; they replace the style that is chosen by turns.

    Returns:
      The Axes.

    Raises:
      ValueError: for arrays that do not match.

    Example:
      >>> import matplotlib; matplotlib.use("Agg")
      >>> from swagjax import plot
      >>> ax = plot.loss_profile([0.0, 1.0, 2.0], [[0.1, 0.2, 0.6], [0.1, 0.4, 0.8]], label="SWA")
      >>> print(ax.lines[0].get_ydata().round(2))
      [0.1 0.3 0.7]

    Source: Izmailov et al. (2018), section 4.3; Garipov et al. (2018), figure 2.
    """
    at: NDArray[np.float64] = np.asarray(position, np.float64)
    rows: NDArray[np.float64] = np.atleast_2d(np.asarray(values, np.float64))
    if at.ndim != 1 or rows.ndim != 2 or rows.shape[1:] != at.shape:
        raise ValueError(
            f"position and values have shapes {at.shape} and {np.shape(values)}, but must have "
            "(N,) and (N,) or (R, N)."
        )
    ax = _new_axes() if ax is None else ax
    style: dict[str, Any] = {"markevery": max(1, len(at) // 10)} | _style(ax, kwargs)
    (line,) = ax.plot(at, rows.mean(0), label=label, gid="curve", **style)
    if len(rows) > 1:
        colour = line.get_color()
        ax.fill_between(at, rows.min(0), rows.max(0), color=colour, alpha=0.15, linewidth=0)
    ax.set(xlabel="position along the path", ylabel="loss")
    _title(ax, "Loss along a path")
    if label is not None:
        _legend_below(ax)
    return ax


def _new_axes() -> Axes:
    return plt.subplots(layout="constrained")[1]


def _title(ax: Axes, text: str) -> None:
    """Title the Axes, unless the caller has done so."""
    if not ax.get_title():
        ax.set_title(text)


def _legend_below(ax: Axes) -> None:
    """Put the legend under the axis label, where there are no data to cover."""
    down = ScaledTranslation(0.0, -34 / 72, ax.figure.dpi_scale_trans)  # 34 points
    ax.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        bbox_transform=ax.transAxes + down,
        ncols=min(len(ax.get_legend_handles_labels()[1]), 3),
        frameon=False,
    )


def _read_bins(
    confidence: ArrayLike, accuracy: ArrayLike, count: ArrayLike | None
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64] | None]:
    """The bins that are not empty: confidence, accuracy and share of the examples."""
    conf, acc = np.asarray(confidence, float), np.asarray(accuracy, float)
    number = np.zeros_like(conf) if count is None else np.asarray(count, float)
    if conf.ndim != 1 or not conf.shape == acc.shape == number.shape:
        raise ValueError(
            f"confidence, accuracy and count have shapes {conf.shape}, {acc.shape} and "
            f"{number.shape}, but must be one-dimensional and equally long: pass the fields of one "
            "metrics.reliability."
        )
    full = ~(np.isnan(conf) | np.isnan(acc))
    share = None if count is None else number[full] / max(number.sum(), 1.0)
    return conf[full], acc[full], share


def _style(ax: Axes, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The caller's choice, and else a style that no earlier curve on this Axes has."""
    drawn = sum(line.get_gid() == "curve" for line in ax.lines)
    style = {**_STYLES[drawn % len(_STYLES)], "linewidth": 1.4, "markersize": 5}
    return style | cbook.normalize_kwargs(kwargs, Line2D)


def _read_row(name: str, values: ArrayLike, source: str) -> NDArray[np.float64]:
    """The numbers of one row that are there."""
    row: NDArray[np.float64] = np.asarray(values, np.float64)
    if row.ndim != 1 or np.isnan(row).all():
        raise ValueError(
            f"{name} has shape {row.shape} and {np.isfinite(row).sum()} finite values, but must be "
            f"one-dimensional, with one at least: pass the field of one {source}."
        )
    return row[~np.isnan(row)]


def _draw_curve(
    ax: Axes,
    number: NDArray[Any],
    heights: NDArray[np.float64],
    label: str | None,
    kwargs: dict[str, Any],
) -> None:
    """A curve over whole numbers."""
    ax.plot(number, heights, label=label, gid="curve", **_style(ax, kwargs))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if label is not None:
        _legend_below(ax)


def _draw_halos(ax: Axes, line: Line2D, share: NDArray[np.float64]) -> None:
    x, y = line.get_data()
    color, marker = line.get_color(), line.get_marker()
    ax.scatter(x, y, 30 + 470 * share, color=color, marker=marker, alpha=0.25, linewidths=0)


def _has_reference(ax: Axes) -> bool:
    return any(line.get_gid() == "reference" for line in ax.lines)


def _frame_gap(ax: Axes) -> None:
    if _has_reference(ax):
        return
    ax.axhline(0.0, **_REFERENCE)
    ax.set_xscale("function", functions=(_stretch, _unstretch))
    ax.set_xticks(_STRETCHED_TICKS, [f"{tick:g}" for tick in _STRETCHED_TICKS])
    ax.set_xlim(-0.15, 1.0002)  # room for half a marker at either end
    ax.set_xlabel("confidence (mean per bin, stretched towards 1)")
    ax.set_ylabel("accuracy minus confidence\n(below 0: over-confident)")
    _title(ax, "Reliability diagram")


def _frame_classical(ax: Axes) -> None:
    if _has_reference(ax):
        return
    ax.plot([0.0, 1.0], [0.0, 1.0], **_REFERENCE)
    ax.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
    ax.set_xlabel("confidence (mean per bin)")
    ax.set_ylabel("accuracy\n(below the diagonal: over-confident)")
    _title(ax, "Reliability diagram")


def _stretch(confidence: NDArray[np.float64]) -> NDArray[np.float64]:
    # matplotlib asks for points beyond the axis as well, where there is no logarithm
    return -np.log10(np.maximum(1.0 + _FINEST - confidence, 1e-12))


def _unstretch(position: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1.0 + _FINEST - np.power(10.0, -position)


def _read_entropies(name: str, entropy: ArrayLike, num_classes: int | None) -> NDArray[np.float64]:
    """The entropies in one row, checked; rounding may take them a little out of their range."""
    if num_classes is not None and num_classes < 2:
        raise ValueError(f"num_classes is {num_classes!r}, but must be 2 or more, or None.")
    values: NDArray[np.float64] = np.ravel(np.asarray(entropy, np.float64))
    if values.size == 0 or not np.isfinite(values).all():
        raise ValueError(
            f"{name} is empty or holds values that are not finite (shape {np.shape(entropy)}): "
            "pass metrics.predictive_entropy of finite probabilities."
        )
    top = math.inf if num_classes is None else math.log(num_classes)
    if values.min() < -_ROUNDING or values.max() > top + _ROUNDING:
        raise ValueError(
            f"{name} lies between {values.min():g} and {values.max():g}, but entropies lie between "
            f"0 and {top:g} nats (log num_classes): are they in bits, or is num_classes another?"
        )
    return values.clip(min=0.0)


def _outline(color: str) -> list[Any]:
    """What makes a line show on any colour, and in the legend."""
    return [withStroke(linewidth=3.0, foreground=color)]


def _read_surface(
    x: ArrayLike,
    y: ArrayLike,
    values: ArrayLike,
    top: float | None,
    num_levels: int,
    decades: float,
) -> tuple[NDArray[np.float64], list[float]]:
    """Heights that can be drawn, and the levels of the contours."""
    heights: NDArray[np.float64] = np.asarray(values, np.float64)
    shapes = (np.shape(x), np.shape(y), heights.shape)
    if heights.ndim != 2 or len(set(shapes)) != 1 or min(heights.shape) < 2:
        raise ValueError(
            f"x, y and values have shapes {shapes[0]}, {shapes[1]} and {shapes[2]}, but must have "
            "one of two axes: x, y = surface.grid(plane)."
        )
    if num_levels < 2 or not 0 < decades < math.inf:
        raise ValueError(
            f"num_levels is {num_levels!r} and decades {decades!r}, but they must be 2 or more and "
            "above zero: try 10 and 3."
        )
    known = heights[np.isfinite(heights)]
    least = known.min() if known.size else math.nan
    highest = float(top if top is not None else known.max() if known.size else math.nan)
    if not highest > least:
        raise ValueError(
            f"top is {highest:g} and the least of {known.size} finite values {least:g}, but top "
            "must be above it: contours take values that differ."
        )
    above = np.where(np.isfinite(heights), np.minimum(heights, 2 * highest - least), np.nan)
    drawn = np.where(np.isnan(above), 2 * highest - least, above)
    return drawn, (least + (highest - least) * np.logspace(-decades, 0, num_levels)).tolist()


def _read_gaussian(
    mean: ArrayLike, covariance: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The mean, and a square root of the covariance."""
    centre: NDArray[np.float64] = np.asarray(mean, np.float64)
    spread: NDArray[np.float64] = np.asarray(covariance, np.float64)
    finite = np.isfinite(centre).all() and np.isfinite(spread).all()
    if centre.shape != (2,) or spread.shape != (2, 2) or not finite:
        raise ValueError(
            f"mean {centre.tolist()} and covariance {spread.tolist()} must be finite, of shapes "
            "(2,) and (2, 2): pass the fields of surface.project on a plane."
        )
    sizes, axes = np.linalg.eigh(spread)
    if sizes.min() < -1e-4 * abs(sizes).max() or not np.allclose(spread, spread.T, rtol=1e-3):
        raise ValueError(f"covariance {spread.tolist()} is not symmetric and positive.")
    return centre, axes * np.sqrt(np.maximum(sizes, 0.0))


def _span(sigmas: tuple[float, ...]) -> str:
    many = f"{min(sigmas):g} to {max(sigmas):g}" if len(sigmas) > 1 else f"{sigmas[0]:g}"
    return f"{many} standard deviation{'' if sigmas == (1.0,) else 's'}"
