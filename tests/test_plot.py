import io

import matplotlib

matplotlib.use("Agg")

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex

import swagjax
from swagjax import metrics, surface
from swagjax.plot import (
    autocorrelation,
    captured_variance,
    entropy_histograms,
    loss_profile,
    loss_surface,
    plane_points,
    posterior_ellipse,
    reliability_diagram,
)

CONFIDENCE = np.array([0.3, np.nan, 0.7, 1.0])
ACCURACY = np.array([0.4, np.nan, 0.6, 0.95])
COUNT = np.array([10, 0, 30, 60])


def curves(ax):
    return [line for line in ax.lines if line.get_gid() == "curve"]


def references(ax):
    return [line for line in ax.lines if line.get_gid() == "reference"]


def png(ax):
    buffer = io.BytesIO()
    ax.figure.savefig(buffer, format="png")
    return buffer.getvalue()


def boxes(ax):
    """Axes, legend and axis label in pixels, after a layout."""
    ax.figure.canvas.draw()
    legend, label = ax.get_legend(), ax.xaxis.label
    return ax.get_window_extent(), legend.get_window_extent(), label.get_window_extent()


@pytest.mark.parametrize(
    ("form", "heights"), [("gap", [0.1, -0.1, -0.05]), ("classical", [0.4, 0.6, 0.95])]
)
def test_draws_the_bins_that_hold_examples(form, heights):
    (curve,) = curves(reliability_diagram(CONFIDENCE, ACCURACY, form=form))
    np.testing.assert_allclose(curve.get_xdata(), [0.3, 0.7, 1.0])
    np.testing.assert_allclose(curve.get_ydata(), heights, atol=1e-12)


def test_a_bin_without_accuracy_is_left_out():
    (curve,) = curves(reliability_diagram([0.3, 0.5], [0.4, np.nan]))
    np.testing.assert_allclose(curve.get_xdata(), [0.3])


def test_the_reference_is_zero_or_the_diagonal():
    (zero,) = references(reliability_diagram(CONFIDENCE, ACCURACY))
    (diagonal,) = references(reliability_diagram(CONFIDENCE, ACCURACY, form="classical"))
    assert list(zero.get_ydata()) == [0, 0]
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == [0, 1]


@pytest.mark.parametrize("form", ["gap", "classical"])
def test_several_methods_share_one_axes(form):
    ax = None
    for name in ("SGD", "SWA", "SWAG-Diag", "SWAG"):
        ax = reliability_diagram(CONFIDENCE, ACCURACY, COUNT, form=form, ax=ax, label=name)
    assert len(plt.get_fignums()) == 1
    assert len(references(ax)) == 1
    drawn = curves(ax)
    assert len({to_hex(line.get_color()) for line in drawn}) == 4
    assert len({str(line._dash_pattern) for line in drawn}) == 4
    assert len({line.get_marker() for line in drawn}) == 4
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts == ["perfect calibration", "SGD", "SWA", "SWAG-Diag", "SWAG"]


def test_more_methods_than_styles_are_still_drawn():
    ax = plt.subplots()[1]
    for _ in range(9):
        reliability_diagram(CONFIDENCE, ACCURACY, ax=ax)
    assert len(curves(ax)) == 9
    assert curves(ax)[7].get_color() == curves(ax)[0].get_color()


@pytest.mark.parametrize("form", ["gap", "classical"])
def test_points_at_both_ends_lie_inside_the_axes(form):
    ax = reliability_diagram([0.0, 0.5, 1.0], [0.0, 0.5, 1.0], form=form)
    ax.figure.canvas.draw()
    pixels = ax.transData.transform(curves(ax)[0].get_xydata())
    box = ax.get_window_extent()
    assert np.isfinite(pixels).all()
    assert box.x0 < pixels[:, 0].min()
    assert pixels[:, 0].max() < box.x1


def test_the_gap_axis_is_stretched_towards_one():
    ax = reliability_diagram(CONFIDENCE, ACCURACY)
    x = ax.transData.transform([(c, 0.0) for c in (0.0, 0.9, 0.99, 1.0)])[:, 0]
    low, middle, high = np.diff(x)
    assert low < 1.2 * middle
    assert middle < 1.2 * high  # equal widths would make this 0.09 against 0.01
    there, back = ax.xaxis.get_transform(), ax.xaxis.get_transform().inverted()
    np.testing.assert_allclose(
        back.transform(there.transform([0.2, 0.9, 0.999])), [0.2, 0.9, 0.999]
    )
    ticks = ax.get_xticks()
    assert [float(tick.get_text()) for tick in ax.get_xticklabels()] == list(ticks)


def test_halos_grow_with_the_share_of_the_examples():
    ax = reliability_diagram(CONFIDENCE, ACCURACY, COUNT)
    (halo,) = ax.collections
    np.testing.assert_allclose(np.diff(halo.get_sizes()) / 470, [0.2, 0.3])
    np.testing.assert_allclose(halo.get_offsets(), curves(ax)[0].get_xydata())
    assert not reliability_diagram(CONFIDENCE, ACCURACY).collections


def test_takes_what_metrics_returns():
    probs = jnp.array([[0.9, 0.1], [0.6, 0.4], [1.0, 0.0]], jnp.bfloat16)
    bins = metrics.reliability(probs, jnp.array([0, 1, 0]), 5)
    ax = reliability_diagram(*bins, label="SWAG")
    expected = np.asarray(bins.accuracy - bins.confidence)
    np.testing.assert_allclose(curves(ax)[0].get_ydata(), expected[np.asarray(bins.count) > 0])
    entropy_histograms(metrics.predictive_entropy(probs), metrics.predictive_entropy(probs))


def test_bins_that_are_all_empty_give_an_empty_picture():
    ax = reliability_diagram([np.nan], [np.nan], [0], label="nothing")
    assert len(curves(ax)[0].get_xdata()) == 0
    assert png(ax)


def test_keywords_replace_the_style():
    ax = reliability_diagram(CONFIDENCE, ACCURACY, c="red", ls=":", marker="*", lw=3)
    (curve,) = curves(ax)
    assert (curve.get_color(), curve.get_linestyle(), curve.get_marker()) == ("red", ":", "*")
    assert curve.get_linewidth() == 3


@pytest.mark.parametrize("form", ["gap", "classical"])
def test_labels_say_what_is_drawn(form):
    ax = reliability_diagram(CONFIDENCE, ACCURACY, form=form)
    assert ax.get_title() == "Reliability diagram"
    assert ax.get_xlabel().startswith("confidence (mean per bin")
    assert ax.get_ylabel().startswith({"gap": "accuracy minus conf", "classical": "accuracy"}[form])
    assert ax.get_legend() is None  # nothing is named


def draw_reliability(ax=None):
    return reliability_diagram(CONFIDENCE, ACCURACY, COUNT, ax=ax, label="SWAG")


def draw_entropies(ax=None):
    return entropy_histograms([0.1, 0.2], [0.6, 0.5], ax=ax)


def draw_autocorrelation(ax=None):
    return autocorrelation([1.0, 0.4, -0.1], ax=ax, label="every epoch")


def draw_captured_variance(ax=None):
    return captured_variance([0.6, 0.9, 1.0], ax=ax, label="SWAG")


def draw_plane(ax=None):
    ax = loss_surface(*bowl(), ax=ax)
    return posterior_ellipse([0.0, 0.0], np.eye(2), ax=plane_points([1, 1], ax=ax), label="SWAG")


def draw_profile(ax=None):
    return loss_profile([0.0, 1.0], [[0.1, 0.2], [0.1, 0.3]], ax=ax, label="SWA")


@pytest.mark.parametrize(
    "draw",
    [
        draw_reliability,
        draw_entropies,
        draw_autocorrelation,
        draw_captured_variance,
        draw_plane,
        draw_profile,
    ],
)
class TestAll:
    def test_the_legend_covers_neither_data_nor_label(self, draw):
        axes, legend, label = boxes(draw())
        assert legend.y1 <= label.y0
        assert legend.y1 < axes.y0
        assert legend.y0 >= 0

    def test_draws_on_the_axes_it_is_given_and_makes_no_figure(self, draw):
        ax = plt.subplots()[1]
        ax.set_title("mine")
        assert draw(ax) is ax
        assert len(plt.get_fignums()) == 1
        assert ax.get_title() == "mine"

    def test_renders_and_is_never_shown(self, draw, monkeypatch):
        monkeypatch.setattr(plt, "show", lambda *_: pytest.fail("shown"))
        ax = draw()
        assert len(plt.get_fignums()) == 1
        assert png(ax).startswith(b"\x89PNG")


def test_an_unknown_form():
    with pytest.raises(ValueError, match="form is 'bars', but must be 'gap' or 'classical'"):
        reliability_diagram(CONFIDENCE, ACCURACY, form="bars")


@pytest.mark.parametrize(
    "arrays",
    [([0.1, 0.2], [0.1]), ([[0.1]], [[0.1]]), ([0.1], [0.1], [1, 2]), (0.1, 0.1)],
)
def test_bins_that_do_not_match(arrays):
    with pytest.raises(ValueError, match=r"confidence, accuracy and count have shapes .*equally"):
        reliability_diagram(*arrays)
    assert not plt.get_fignums()


def bars(ax, index):
    """Edges and heights of one histogram, read off its outline."""
    outline = ax.patches[index].get_xy()
    edges = np.unique(outline[:, 0])
    upper = outline[: 2 * len(edges)]
    return edges, upper[1:-1:2, 1]


def test_histograms_are_densities_over_common_bins():
    rng = np.random.default_rng(0)
    inside, outside = rng.uniform(0, 0.7, 500), rng.uniform(0.2, 2.2, 90)
    ax = entropy_histograms(inside, outside, num_bins=12, num_classes=10)
    edges = np.linspace(0, np.log(10), 13)
    for index, values in enumerate((inside, outside)):
        drawn_edges, heights = bars(ax, index)
        np.testing.assert_allclose(drawn_edges, edges)
        np.testing.assert_allclose(heights, np.histogram(values, edges, density=True)[0])
        np.testing.assert_allclose(np.sum(heights * np.diff(edges)), 1)


def test_without_classes_the_bins_end_at_the_greatest_entropy():
    ax = entropy_histograms([0.1, 0.2], [0.5, 1.5], num_bins=3)
    np.testing.assert_allclose(bars(ax, 0)[0], [0, 0.5, 1.0, 1.5])
    assert ax.get_xlim() == (0, 1.5)


def test_entropies_that_are_all_zero():
    assert bars(entropy_histograms([0.0, 0.0], [0.0]), 1)[0][-1] == 1.0


def test_rounding_beyond_log_c_loses_no_example():
    uniform = np.float32(np.log(10)) + np.float32(3e-7)
    ax = entropy_histograms([-1e-7, 1.0], [uniform, 1.0], num_bins=4, num_classes=10)
    for index, shares in enumerate(([0.5, 0.5, 0, 0], [0, 0.5, 0, 0.5])):
        edges, heights = bars(ax, index)
        np.testing.assert_allclose(heights * np.diff(edges), shares)


def test_the_two_histograms_differ_in_colour_and_hatch_and_have_units():
    ax = entropy_histograms([0.1], [0.2], labels=("digits 0-4", "digits 5-9"))
    inside, outside = ax.patches
    assert inside.get_facecolor() != outside.get_facecolor()
    assert inside.get_hatch() != outside.get_hatch()
    assert ax.get_xlabel() == "predictive entropy (nats)"
    assert ax.get_ylabel() == "density (per nat)"
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts == ["digits 0-4", "digits 5-9"]


@pytest.mark.parametrize("name", ["entropy_in", "entropy_out"])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "is empty"),
        ([np.nan], "not finite"),
        ([np.inf], "not finite"),
        ([-0.5, 0.2], "between -0.5 and 0.2"),
        ([0.2, 3.32], r"between 0.2 and 3.32.*2.30259 nats.*bits"),
    ],
)
def test_bad_entropies(name, values, message):
    arguments = {"entropy_in": [0.1], "entropy_out": [0.1]} | {name: values}
    with pytest.raises(ValueError, match=rf"{name} .*{message}"):
        entropy_histograms(**arguments, num_classes=10)
    assert not plt.get_fignums()


def test_bad_numbers():
    with pytest.raises(ValueError, match="num_bins is 0, but must be 1 or more"):
        entropy_histograms([0.1], [0.1], num_bins=0)
    with pytest.raises(ValueError, match="num_classes is 1, but must be 2 or more"):
        entropy_histograms([0.1], [0.1], num_classes=1)


def test_autocorrelations_stand_at_their_lags_over_the_line_of_zero():
    ax = autocorrelation([1.0, 0.5, -0.2, np.nan])
    (curve,), (zero,) = curves(ax), references(ax)
    np.testing.assert_allclose(curve.get_xydata(), [[0, 1], [1, 0.5], [2, -0.2]])
    assert list(zero.get_ydata()) == [0, 0]
    assert ax.get_xlabel() == "lag (collections)"
    assert ax.get_ylabel().startswith("autocorrelation")
    assert ax.get_title() == "Autocorrelation of the iterates"


def test_captured_variance_starts_from_nothing_beside_the_line_of_equal_variances():
    ax = captured_variance([0.5, 0.8, 1.0, np.nan])
    (curve,), (equal,) = curves(ax), references(ax)
    np.testing.assert_allclose(curve.get_xydata(), [[0, 0], [1, 0.5], [2, 0.8], [3, 1]])
    np.testing.assert_allclose(equal.get_xydata(), [[0, 0], [3, 1]])
    assert ax.get_xlabel() == "number of principal directions"
    assert ax.get_ylabel() == "share of the iterates' variance"
    assert ax.get_title() == "Variance captured by the first directions"
    assert ax.get_legend() is None  # nothing is named


def test_each_number_of_directions_has_one_line_and_all_of_them_one_name():
    ax = None
    for shares in ([0.5, 1.0], [0.9, 1.0], [0.4, 0.8, 1.0]):
        ax = captured_variance(shares, ax=ax, label=str(shares[0]))
    assert [line.get_xdata()[-1] for line in references(ax)] == [2, 3]
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts == ["equal variance in all directions", "0.5", "0.9", "0.4"]


@pytest.mark.parametrize("draw", [autocorrelation, captured_variance])
def test_runs_differ_in_style_and_keywords_replace_it(draw):
    ax = draw([1.0, 1.0], label="first")
    draw([1.0, 1.0], ax=ax, label="second")
    draw([1.0, 1.0], ax=ax, c="red", ls=":")
    first, second, third = curves(ax)
    assert first.get_color() != second.get_color()
    assert first.get_linestyle() != second.get_linestyle()
    assert first.get_marker() != second.get_marker()
    assert (third.get_color(), third.get_linestyle()) == ("red", ":")
    assert len(references(ax)) == 1
    ax.figure.canvas.draw()
    assert all(float(tick).is_integer() for tick in ax.get_xticks())


def test_takes_what_diagnostics_returns():
    ring = jnp.eye(6)[:, :5] * jnp.arange(1.0, 6)[None]
    n, mean = jnp.int32(5), jnp.ones(5)
    state = swagjax.SWAGState(n, n, 0 * n, mean, mean, ring)
    counted = swagjax.diagnostics.effective_count(state)
    held = swagjax.diagnostics.captured_variance(state)
    (curve,) = curves(autocorrelation(counted.autocorrelation))
    np.testing.assert_allclose(curve.get_ydata(), counted.autocorrelation[:5])
    (curve,) = curves(captured_variance(held.cumulative))
    np.testing.assert_allclose(curve.get_ydata()[1:], held.cumulative[:4])


@pytest.mark.parametrize("draw", [autocorrelation, captured_variance])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[1.0]], r"shape \(1, 1\) and 1 finite"),
        (1.0, r"shape \(\)"),
        ([np.nan, np.nan], "0 finite"),
        ([], r"shape \(0,\) and 0 finite"),
    ],
)
def test_rows_that_are_none(draw, values, message):
    with pytest.raises(ValueError, match=message + r".*one-dimensional.*of one diagnostics\."):
        draw(values)
    assert not plt.get_fignums()


def bowl(num=7):
    """A paraboloid of height 1 at the middle, 5.5 at the corners."""
    x, y = np.meshgrid(np.linspace(-3, 3, num), np.linspace(-3, 3, num))
    return x, y, 1 + (x**2 + y**2) / 4


def filled(ax):
    """The filled contours: levels, and what stands at each of them in the colour bar."""
    bands = ax.collections[0]
    bar = next(other for other in ax.figure.axes if other is not ax)
    return bands.levels, [float(tick.get_text()) for tick in bar.get_yticklabels()]


def test_contours_are_dense_near_the_least_loss():
    ax = loss_surface(*bowl(), num_levels=4, decades=3.0, label="train loss (nats)")
    levels, ticks = filled(ax)
    np.testing.assert_allclose(levels, 1 + 4.5 * np.array([1e-3, 1e-2, 1e-1, 1]))
    np.testing.assert_allclose(ticks, levels, rtol=5e-3)
    assert ax.get_aspect() == 1
    assert ax.get_xlabel() == ax.get_ylabel() == "distance in weight space"
    levels, _ = filled(loss_surface(*bowl(), top=2.0, num_levels=2, decades=1.0))
    np.testing.assert_allclose(levels, [1.1, 2.0])


def test_contours_stand_where_the_loss_has_their_height():
    ax = loss_surface(*bowl(61), num_levels=3, decades=0.5)
    lines = ax.collections[1]
    for level, path in zip(lines.levels, lines.get_paths(), strict=True):
        radius = np.hypot(*path.vertices.T)
        np.testing.assert_allclose(radius, 2 * np.sqrt(level - 1), atol=5e-3)


def test_what_is_not_finite_is_drawn_as_high():
    x, y, z = bowl()
    z[0, 0], z[0, 1], z[1, 0] = np.nan, np.inf, 1e30
    ax = loss_surface(x, y, z, top=4.0)
    assert ax.collections[0].zmax <= 2 * 4.0
    assert filled(ax)[0][-1] == 4.0
    assert png(ax)


def test_what_lies_beyond_the_surface_moves_no_limit():
    ax = posterior_ellipse([0.0, 0.0], 100 * np.eye(2), ax=loss_surface(*bowl()))
    assert (ax.get_xlim(), ax.get_ylim()) == ((-3, 3), (-3, 3))


def test_points_are_joined_in_their_order_and_nans_left_out():
    ax = plane_points([[0, 1], [np.nan, np.nan], [3, 2]], label="iterates")
    plane_points([5.0, 6.0], ax=ax, label="SWA", marker="*", color="red")
    first, second = curves(ax)
    np.testing.assert_allclose(first.get_xydata(), [[0, 1], [3, 2]])
    np.testing.assert_allclose(second.get_xydata(), [[5, 6]])
    assert (second.get_marker(), second.get_color()) == ("*", "red")


def test_ellipses_are_those_of_the_gaussian():
    covariance = np.array([[2.0, 1.2], [1.2, 1.0]])
    ax = posterior_ellipse([1.0, -1.0], covariance, label="SWAG")
    edges = [line for line in ax.lines if line.get_gid() == "ellipse"]
    for sigma, edge in zip((1, 2, 3), edges, strict=True):
        away = edge.get_xydata() - [1.0, -1.0]
        squares = np.sum(away * np.linalg.solve(covariance, away.T).T, 1)
        np.testing.assert_allclose(squares, sigma**2)
        spread = np.sqrt(np.diag(covariance))
        np.testing.assert_allclose(away.max(0), sigma * spread, rtol=1e-3)
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts == ["SWAG, 1 to 3 standard deviations"]
    flat = posterior_ellipse([0.0, 0.0], [[4.0, 0.0], [0.0, 0.0]], sigmas=(1.0,), label="one")
    assert flat.get_legend().get_texts()[0].get_text() == "one, 1 standard deviation"
    np.testing.assert_allclose(flat.lines[0].get_xydata().max(0), [2, 0], atol=1e-3)


def test_a_profile_is_the_mean_of_the_rays_with_their_range():
    ax = loss_profile([0, 1, 2], [[1, 2, 3], [1, 4, 9]], label="SWA")
    (curve,), (band,) = curves(ax), ax.collections
    np.testing.assert_allclose(curve.get_xydata(), [[0, 1], [1, 3], [2, 6]])
    corners = {tuple(v) for v in band.get_paths()[0].vertices}
    assert {(1, 2), (1, 4), (2, 3), (2, 9)} <= corners
    loss_profile([0, 1, 2], [5, 6, 7], ax=ax, label="SGD")
    assert len(ax.collections) == 1  # of a single curve there is no range
    assert curves(ax)[1].get_color() != curve.get_color()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: loss_surface([0, 1], [0, 1], [0, 1]), r"shapes \(2,\), \(2,\) and \(2,\)"),
        (lambda: loss_surface(*bowl()[:2], np.ones((7, 6))), r"\(7, 7\) and \(7, 6\)"),
        (lambda: loss_surface(*bowl()[:2], np.ones((7, 7))), "least of 49 finite values 1"),
        (lambda: loss_surface(*bowl()[:2], np.full((7, 7), np.nan)), "least of 0 finite values"),
        (lambda: loss_surface(*bowl(), top=0.5), "top is 0.5 and the least of 49 .* 1,"),
        (lambda: loss_surface(*bowl(), num_levels=1), "num_levels is 1 and decades 3.0"),
        (lambda: loss_surface(*bowl(), decades=0.0), "decades 0.0"),
        (lambda: plane_points([1.0, 2.0, 3.0]), r"points have shape \(3,\), but must have \(N, 2"),
        (lambda: posterior_ellipse([1.0], [[1.0]]), r"of shapes \(2,\) and \(2, 2\)"),
        (lambda: posterior_ellipse([0, np.nan], np.eye(2)), "must be finite"),
        (lambda: posterior_ellipse([0, 0], [[1, 0], [0, -1]]), "not symmetric and positive"),
        (lambda: posterior_ellipse([0, 0], [[1, 0.9], [0, 1]]), "not symmetric and positive"),
        (lambda: loss_profile([0, 1], [1, 2, 3]), r"shapes \(2,\) and \(3,\)"),
    ],
)
def test_surfaces_that_are_none(call, message):
    with pytest.raises(ValueError, match=message):
        call()
    assert not plt.get_fignums()


def test_takes_what_surface_returns():
    plane = surface.plane(*jnp.eye(3))
    x, y = surface.grid(plane, num=5)
    ax = plane_points(plane.points, ax=loss_surface(x, y, x**2 + y**2))
    np.testing.assert_allclose(curves(ax)[0].get_xydata(), plane.points)
