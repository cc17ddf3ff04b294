"""The experiments ``shift`` and ``rotation``: with a stand-in for the networks, and for real."""

import dataclasses
import json
import types
import typing

import jax
import numpy as np
import pytest
from matplotlib import pyplot as plt
from scipy import special, stats
from sklearn import metrics as sklearn_metrics

from benchmarks import corruptions, data, options
from benchmarks.experiments import classify, rotation, shift

CLASSES = (0, 1, 2, 8, 9)
SHARPNESS = {"SGD": 1.0, "SWAG": 0.1, "MultiSWAG": 0.02}
TINY = {"epochs": 3, "start": 1, "seeds": 2, "num_samples": 4, "members": 2, "rank": 2}


def stand_in(name, seed, task, images):
    """Probabilities by the distance to the mean of every class, and another sharpness a seed."""
    means = np.stack([task.train.inputs[task.train.labels == c].mean(0) for c in range(5)])
    distances = ((images[:, None] - means) ** 2).sum((2, 3, 4))
    return special.softmax(-SHARPNESS[name] / (seed + 1) * distances, axis=-1).astype(np.float32)


@pytest.fixture
def no_networks(monkeypatch):
    """``classify`` with the stand-in; returns the sizes of what it was asked to predict."""
    sizes = []

    def prepare(chosen):
        task = data.load("digits", None, chosen.in_classes)
        methods = chosen.methods or tuple(SHARPNESS)
        chosen = dataclasses.replace(
            chosen, **classify.DIGITS, start=50, augment=(), in_classes=CLASSES, methods=methods
        )
        folder = chosen.results / "classify" / "digits"
        return types.SimpleNamespace(chosen=chosen, task=task, folder=folder)

    def predict(run, name, images):
        sizes.append(len(images))
        return [stand_in(name, seed, run.task, images) for seed in range(run.chosen.seeds)]

    monkeypatch.setattr(classify, "prepare", prepare)
    monkeypatch.setattr(classify, "predict", predict)
    return sizes


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", None, None)


def read(path):
    return json.loads((path / "results.json").read_text())


# shift


def test_the_corruptions_to_choose_from_are_all_there_are():
    assert set(typing.get_args(shift.Kind)) == set(corruptions.STRENGTHS)
    assert shift.Shift().corruptions == typing.get_args(shift.Kind)


def test_shift_scores_every_method_under_every_corruption(tmp_path, no_networks, digits):
    kinds = ("contrast", "brightness")
    shift.shift(shift.Shift(results=tmp_path, seeds=2, corruptions=kinds, test_images=50))
    folder = tmp_path / "shift" / "digits"
    record = read(folder)
    assert no_networks == [11 * 50] * 3  # all conditions at once, for each method
    images, labels = digits.evaluation.inputs[:50], digits.evaluation.labels[:50]
    means = images.mean((1, 2), keepdims=True)
    by_hand = {"none 0": images, "contrast 3": means + 0.35 * (images - means)}
    by_hand["brightness 5"] = images + 2
    for condition, changed in by_hand.items():
        for name, of in record["corruptions"].items():
            for seed in range(2):
                probs = stand_in(name, seed, digits, changed).astype(np.float64)
                probs /= probs.sum(-1, keepdims=True)
                nll = sklearn_metrics.log_loss(labels, probs, labels=range(5))
                accuracy = (probs.argmax(-1) == labels).mean()
                value = of[f"{condition} NLL"]["values"][seed]
                assert value == pytest.approx(nll, rel=1e-3)
                assert of[f"{condition} accuracy"]["values"][seed] == pytest.approx(accuracy)
    assert record["options"]["num_samples"] == 30
    assert record["options"]["members"] == 3
    shown = record["results"]["SWAG"]
    single = record["corruptions"]["SWAG"]
    pair = [np.array(single[f"{kind} 4 ECE"]["values"]) for kind in kinds]
    np.testing.assert_allclose(shown["ECE 4"]["values"], np.mean(pair, 0), rtol=1e-6)
    assert shown["NLL 0"] == single["none 0 NLL"]
    assert shown["NLL 0"]["values"][0] != shown["NLL 0"]["values"][1]
    assert {p.name for p in folder.iterdir()} == {"results.json", "shift.png", "images.png"}
    assert record["strengths"] == {kind: list(corruptions.STRENGTHS[kind]) for kind in kinds}


def test_conditions_go_in_groups_of_as_many_as_there_is_room_for(monkeypatch):
    monkeypatch.setattr(shift, "ROWS", 130)
    assert shift._groups(list("abcd"), 40) == [["a", "b", "c"], ["d"]]
    assert shift._groups(list("ab"), 1000) == [["a"], ["b"]]


@pytest.mark.slow
def test_conditions_are_predicted_as_many_at_a_time_as_there_is_room_for(
    no_networks, digits, monkeypatch
):
    run = classify.prepare(shift.Shift(seeds=1, methods=("SWAG",)))
    images, labels = digits.evaluation.inputs[:40], digits.evaluation.labels[:40]
    conditions = [("none", 0), ("contrast", 1), ("contrast", 5), ("brightness", 1)]
    whole = shift.measure(run, conditions, images, labels)
    monkeypatch.setattr(shift, "ROWS", 130)
    parts = shift.measure(run, conditions, images, labels)
    assert no_networks == [160, 120, 40]
    jax.tree.map(np.testing.assert_array_equal, parts, whole)
    assert whole["SWAG"]["ECE"].shape == (1, 4)


def test_means_over_corruptions_are_by_severity():
    conditions = [("none", 0), *((kind, s) for kind in ("blur", "noise") for s in range(1, 6))]
    values = np.array([[0.0, 1, 2, 3, 4, 5, 11, 12, 13, 14, 15]])
    of = shift.over_corruptions({"SWAG": {"NLL": values}}, conditions)["SWAG"]["NLL"]
    np.testing.assert_array_equal(of, [[0, 6, 7, 8, 9, 10]])
    single = shift.of_corruptions({"SWAG": {"NLL": values}}, conditions)
    assert list(single) == ["blur", "noise"]
    np.testing.assert_array_equal(single["noise"]["SWAG"]["NLL"], [[0, 11, 12, 13, 14, 15]])
    np.testing.assert_array_equal(single["blur"]["SWAG"]["NLL"], [[0, 1, 2, 3, 4, 5]])


def test_the_title_says_what_was_corrupted():
    conditions = [("none", 0), *(("blur", s) for s in range(1, 6))]
    scores = {"SWAG": dict.fromkeys(shift.METRICS, np.ones((2, 6)))}
    figure = shift._figure(plt, "digits, convnet", scores, ("SWAG",), conditions)
    assert figure.get_suptitle().startswith("digits, convnet, test images corrupted")
    assert [ax.get_title() for ax in figure.axes[:2]] == ["mean", "blur"]
    plt.close(figure)


def test_an_image_is_drawn_from_black_to_white_of_the_data():
    ax = types.SimpleNamespace(imshow=lambda x, **how: seen.append(x), set=lambda **_: None)
    seen = []
    like = np.stack([np.zeros((2, 2, 1)), np.full((2, 2, 1), 4.0)])
    shift.show(ax, np.array([[[-1.0], [1.0]], [[4.0], [9.0]]]), like)
    np.testing.assert_array_equal(seen[0], [[0, 0.25], [1, 1]])


@pytest.mark.parametrize(
    ("experiment", "chosen", "said"),
    [
        (shift.shift, shift.Shift(test_images=0), "--test-images 0"),
        (shift.shift, shift.Shift(corruptions=()), "--corruptions : one or more"),
        (shift.shift, shift.Shift(corruptions=("blur", "blur")), "--corruptions blur blur"),
        (rotation.rotation, rotation.Rotation(step=0), "--step 0"),
        (rotation.rotation, rotation.Rotation(step=181), "--step 181"),
        (rotation.rotation, rotation.Rotation(test_images=0), "--test-images 0"),
        (rotation.rotation, rotation.Rotation(digit=3), "--digit 3: trained on are 0, 1, 2, 8, 9"),
        (rotation.rotation, rotation.Rotation(image=91), "--image 91: 0 to 90"),
        (rotation.rotation, rotation.Rotation(image=-1), "--image -1: 0 to 90"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_trained(experiment, chosen, said):
    with pytest.raises(options.UsageError, match=said):
        experiment(chosen)


def test_texts_are_refused(monkeypatch, digits):
    monkeypatch.setattr(data, "load", lambda *_: digits._replace(vocabulary=100))
    for experiment, chosen in (
        (shift.shift, shift.Shift(dataset="trec")),
        (rotation.rotation, rotation.Rotation(dataset="trec")),
    ):
        with pytest.raises(options.UsageError, match="--dataset trec: its inputs are texts"):
            experiment(chosen)


# rotation


def test_angles_end_at_180_whatever_the_step():
    np.testing.assert_array_equal(rotation.angles(45), [0, 45, 90, 135, 180])
    np.testing.assert_array_equal(rotation.angles(50), [0, 50, 100, 150, 180])
    assert len(rotation.angles(5)) == 37


def test_summaries_are_means_over_angles_and_images():
    labels = np.array([0, 1])
    right, wrong = [[0.7, 0.2, 0.1], [0.2, 0.7, 0.1]], [[0.1, 0.9, 0.0], [0.2, 0.0, 0.8]]
    probs = np.array([[right, wrong], [right, right]])
    got = rotation.summaries(probs, labels)
    flat = stats.entropy(probs, axis=-1).mean((1, 2))
    tiny = np.finfo(np.float32).tiny
    expected = {
        "accuracy": [0.5, 1],
        "confidence": [(2 * 0.7 + 0.9 + 0.8) / 4, 0.7],
        "NLL": [-(2 * np.log(0.7) + np.log(0.1) + np.log(tiny)) / 4, -np.log(0.7)],
        "true class": [(2 * 0.7 + 0.1) / 4, 0.7],
        "entropy": flat.tolist(),
    }
    assert got.keys() == expected.keys()
    for name, values in expected.items():
        assert got[name] == pytest.approx(values)


def test_rotation_predicts_the_image_at_every_angle(tmp_path, no_networks, digits):
    rotation.rotation(
        rotation.Rotation(
            results=tmp_path, seeds=2, digit=9, image=2, test_images=30, step=45,
            methods=("SGD", "MultiSWAG"),
        )
    )  # fmt: skip
    folder = tmp_path / "rotation" / "digits"
    record = read(folder)
    assert no_networks == [5 * 31] * 2
    assert record["angles"] == [0, 45, 90, 135, 180]
    images, labels = digits.evaluation.inputs, digits.evaluation.labels
    nine = images[labels == 4][2:3]
    for name, curves in record["curves"].items():
        for seed in range(2):
            for at, turns in ((0, 0), (2, 1), (4, 2)):
                turned = np.rot90(images[:30], turns, axes=(1, 2))
                one = stand_in(name, seed, digits, np.rot90(nine, turns, axes=(1, 2)))[0]
                many = stand_in(name, seed, digits, turned)
                expected = {
                    "one image, true class": one[4],
                    "one image, entropy": stats.entropy(one),
                    "all images, true class": many[np.arange(30), labels[:30]].mean(),
                    "all images, entropy": stats.entropy(many, axis=-1).mean(),
                }
                for curve, value in expected.items():
                    assert curves[curve][seed][at] == pytest.approx(value, rel=1e-3, abs=1e-5)
    assert {p.name for p in folder.iterdir()} == {"results.json", "rotation.png", "classes.png"}


# for real


@pytest.mark.slow
def test_both_predict_with_the_networks_of_classify_and_train_none(tmp_path, capsys):
    chosen = {**TINY, "results": tmp_path, "methods": ("SGD", "SWAG", "deep ensemble")}
    classify.classify(classify.Classify(**chosen))
    of_classify = read(tmp_path / "classify" / "digits")["results"]
    checkpoints = tmp_path / "classify" / "digits" / "checkpoints"

    def stamps():
        return {p: p.stat().st_mtime_ns for p in checkpoints.rglob("*") if p.is_file()}

    before = stamps()
    shift.shift(shift.Shift(**chosen, corruptions=("noise",)))
    rotation.rotation(rotation.Rotation(**chosen, step=90, test_images=20))
    assert stamps() == before
    of_shift = read(tmp_path / "shift" / "digits")["results"]
    for name in chosen["methods"]:
        for metric in shift.METRICS:
            values = of_shift[name][f"{metric} 0"]["values"]
            assert values == pytest.approx(of_classify[name][metric]["values"], rel=1e-4)
    with pytest.raises(options.UsageError, match="--resume: the checkpoint was made with epochs"):
        shift.shift(shift.Shift(**chosen | {"epochs": 4}))
