import json

import numpy as np
import pytest
from flax import linen as nn

from benchmarks import models
from benchmarks.experiments import surface as experiment
from benchmarks.experiments.surface import Surface, surface
from benchmarks.options import UsageError

TINY = {
    "epochs": 4,
    "curve_epochs": 2,
    "batch_size": 200,
    "rank": 2,
    "resolution": 5,
    "rays": 2,
    "images": 50,
}
PICTURES = ("plane.png", "width.png", "curves.png", "curve-plane.png")


class Small(nn.Module):
    """A network with BatchNorm that compiles soon."""

    classes: int

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(4)(x.reshape(len(x), -1))
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.Dense(self.classes)(nn.relu(x))


def check_run(folder):
    record = json.loads((folder / "surface" / "digits" / "results.json").read_text())
    assert list(record["results"]) == ["start", "SGD", "SWA"]
    plane, curves = record["plane"], record["curves"]
    assert plane["points"]["SWA"] == [0.0, 0.0]
    assert plane["points"]["SGD"][1] == 0.0
    np.testing.assert_allclose(plane["swag_mean"], 0, atol=1e-5)
    # The iterates are those that SWAG collected: their mean is SWA.
    np.testing.assert_allclose(np.mean(plane["iterates"], 0), 0, atol=1e-4)
    for of in curves.values():
        ends = of["train loss"][0], of["train loss"][-1]
        np.testing.assert_allclose(ends[0], record["results"]["SGD"]["train loss"]["mean"], 1e-4)
        np.testing.assert_allclose(of["barrier"], max(of["train loss"]) - max(ends))
    rays = record["width"]["random rays from SWA"]
    assert np.shape(rays["train loss"]) == (2, 5)
    centre = record["results"]["SWA"]["train loss"]["mean"]
    np.testing.assert_allclose(np.array(rays["train loss"])[:, 0], centre, rtol=1e-4)
    middle = np.array(record["width"]["principal rays from SWA"]["train loss"])[:, 2]
    np.testing.assert_allclose(middle, centre, rtol=1e-4)
    for name in PICTURES:
        assert (folder / "surface" / "digits" / name).stat().st_size > 10_000


@pytest.mark.slow
def test_one_command_writes_figures_and_pictures(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(models.MODELS, "small", Small)
    surface(Surface(**TINY, model="small", results=tmp_path))
    check_run(tmp_path)
    assert "barrier" in capsys.readouterr().out


@pytest.mark.slow
def test_pictures_of_figures(tmp_path):
    """Drawn of made-up figures."""
    x, y = np.meshgrid(np.linspace(-1, 2, 5), np.linspace(-1, 2, 5))
    losses = {"train loss": 0.01 + x**2 + y**2, "test error": 0.1 + 0.01 * (x**2 + y**2)}
    about = {
        "iterates": [[0.0, 0.1], [0.2, 0.3]],
        "swag_mean": [0.0, 0.0],
        "swag_covariance": [[0.1, 0.0], [0.0, 0.2]],
        "points": {"SWA": [0.0, 0.0], "SGD": [1.0, 0.0], "start": [0.5, 1.0]},
    }
    experiment._draw_plane(tmp_path / "plane.png", {"x": x, "y": y, **losses}, about)
    ray = {"distance": x[0], **losses}
    kinds = ("random", "principal")
    profiles = {(kind, name): ray for kind in kinds for name in ("SGD", "SWA")}
    experiment._draw_width(tmp_path / "width.png", profiles)
    way = {"t": np.linspace(0, 1, 5), **{metric: v[0] for metric, v in losses.items()}}
    of_plane = {"x": x, "y": y, "curve": np.eye(2), "points": np.eye(3)[:, :2], **losses}
    curves = dict.fromkeys(experiment.WAYS, way) | {"plane": of_plane}
    experiment._draw_curves(tmp_path, curves, dict.fromkeys(experiment.WAYS))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(PICTURES)


def test_the_width_is_where_the_loss_has_risen():
    t = np.linspace(-2, 2, 401)
    assert experiment.width(t, 0.3 + t**2) == pytest.approx(np.sqrt(0.1), rel=1e-3)
    wider_right = 0.3 + np.where(t > 0, t**2 / 4, t**2)
    assert experiment.width(t, wider_right) == pytest.approx(1.5 * np.sqrt(0.1), rel=1e-3)
    assert experiment.width(t[t >= 0], 0.1 * t[t >= 0] / 2.5) is None
    infinite = np.where(np.abs(t) < 0.995, 0.0, np.inf)
    assert experiment.width(t, infinite) == pytest.approx(1.0)


def test_the_centre_is_that_of_the_low_region():
    x, y = np.meshgrid(np.arange(-3.0, 4.0), np.arange(-3.0, 3.5, 0.5))
    loss = 0.01 * (x - 1) ** 2 + (y + 0.5) ** 2
    loss = np.where(loss < 0.05, loss, 9.0)
    np.testing.assert_allclose(experiment.low_centre(x, y, loss), [1, -0.5], atol=1e-12)


def test_a_barrier_is_measured_from_the_higher_end():
    assert experiment.barrier(np.array([0.1, 0.9, 0.4])) == pytest.approx(0.5)
    assert experiment.barrier(np.array([0.1, 0.2, 0.4])) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 3}, "--epochs 3: at least 4"),
        ({"rays": 0}, "--rays 0: at least 1"),
        ({"curve_learning_rate": 0.0}, "--curve-learning-rate 0.0: a number above zero"),
        ({"weight_decay": -1.0}, "--weight-decay -1.0: a number above zero"),
        ({"model": "resnet"}, "--model resnet: one of convnet"),
        pytest.param(
            {"batch_size": 2000},
            "--batch-size 2000: there are .* training images",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_bad_options_end_in_one_line(options, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        surface(Surface(**options, results=tmp_path))
    assert not list(tmp_path.iterdir())
