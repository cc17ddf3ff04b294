"""The benchmarks: data, models, training, report, and the command line as a whole."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import __main__ as command_line
from benchmarks import data, methods, models, options, report, training
from benchmarks.experiments import classify

ROOT = Path(__file__).parent.parent
TFDS = Path(os.environ.get("SWAGJAX_DATA", ROOT.parent / "shared" / "data")) / "tfds"
CLASSES = (0, 1, 2, 8, 9)
TINY = ["--epochs", "4", "--start", "1", "--seeds", "2", "--num-samples", "3", "--rank", "2"]

needs_data = pytest.mark.skipif(
    not TFDS.is_dir(), reason=f"no prepared data sets in {TFDS}: set SWAGJAX_DATA"
)


def tiny_options(**changes):
    chosen = options.complete(classify.Classify(seeds=2, epochs=3, start=1), classify.DIGITS)
    return dataclasses.replace(chosen, **{"augment": ("shift", "noise"), **changes})


# data


def test_digits_are_normalised_split_and_re_indexed():
    task = data.load("digits", None, CLASSES)
    assert task.train.images.shape[1:] == (8, 8, 1)
    assert task.train.images.dtype == np.float32
    np.testing.assert_allclose(task.train.images.mean(), 0, atol=1e-5)
    np.testing.assert_allclose(task.train.images.std(), 1, atol=1e-5)
    for part in (task.train, task.evaluation):
        assert set(part.labels) == set(range(5))
    assert set(task.ood.labels) == {3, 4, 5, 6, 7}


def test_labels_are_positions_in_the_order_given():
    ordered, shuffled = (data.load("digits", None, c).train for c in ((0, 8), (8, 0)))
    np.testing.assert_array_equal(ordered.images, shuffled.images)
    np.testing.assert_array_equal(ordered.labels, 1 - shuffled.labels)


def test_the_split_is_the_same_every_time_and_its_parts_are_disjoint():
    first, second = (data.load("digits", None, CLASSES) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    rows = [{image.tobytes() for image in part.images} for part in first]
    assert not rows[0] & rows[1]


def test_validation_images_come_from_the_training_images_alone():
    test, validation = (data.load("digits", None, CLASSES, e) for e in ("test", "validation"))
    assert len(validation.train.labels) + len(validation.evaluation.labels) == len(
        test.train.labels
    )
    assert len(validation.evaluation.labels) == pytest.approx(0.2 * len(test.train.labels), abs=2)
    assert not set(map(bytes, _raw(validation.ood))) & set(map(bytes, _raw(test.ood)))


def _raw(part):
    """Pixels as integers 0 ... 16 again, whatever they were normalised with."""
    low, high = part.images.min(), part.images.max()
    return np.round((part.images - low) / (high - low) * 16).astype(np.uint8)


@pytest.mark.parametrize("bad", [(), (1,), (1, 1), (1, 77), (-1, 2), tuple(range(10))])
def test_classes_that_cannot_be_split_are_refused(bad):
    with pytest.raises(options.UsageError, match="--in-classes"):
        data.load("digits", None, bad)


@needs_data
@pytest.mark.data
@pytest.mark.parametrize(("name", "shape"), [("mnist", (28, 28, 1)), ("cifar10", (32, 32, 3))])
def test_tfds_sets_come_as_arrays(name, shape):
    task = data.load(name, TFDS, CLASSES)
    assert task.train.images.shape[1:] == shape
    assert len(task.evaluation.labels) + len(task.ood.labels) == 10_000
    np.testing.assert_allclose(task.train.images.mean((0, 1, 2)), 0, atol=1e-3)


# models


@pytest.mark.parametrize(
    ("model", "shape", "count"),
    [
        (models.LeNet5(10), (32, 32, 3), 62_006),
        (models.LeNet5(10), (32, 32, 1), 61_706),
        (models.LeNet5(10), (28, 28, 1), 61_706),
        (models.ConvNet(5), (8, 8, 1), 14_293),
    ],
)
def test_parameter_counts(model, shape, count):
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *shape)))
    assert sum(x.size for x in jax.tree.leaves(variables["params"])) == count


# training


@pytest.fixture(scope="module")
def digits():
    part = data.load("digits", None, CLASSES).train
    return data.Part(part.images[:70], part.labels[:70])


@pytest.mark.slow
def test_members_side_by_side_equal_members_one_by_one(digits):
    chosen, model = tiny_options(), models.ConvNet(5, widths=(4, 4))
    tx = methods.averaged_sgd(chosen, 4)
    init = training.initialiser(model, tx, digits.images[:1])
    step = training._step(model, tx, training._augmentation(("shift", "noise")), 16)
    keys = [jax.random.key(seed) for seed in range(2)]
    ways = []
    for form in (training._one_by_one, training._side_by_side):
        epoch, members = form(step, 4), [init(key) for key in keys]
        for _ in range(3):
            members, losses = epoch(members, keys, digits)
        ways.append((members, np.ravel(losses)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), *ways)
    assert int(methods._swag(ways[1][0][1]).count) == 2


@pytest.mark.slow
def test_a_member_is_the_same_whoever_trains_beside_it(digits, tmp_path):
    model = models.ConvNet(5, widths=(4, 4))
    alone, pair = (
        training.train(
            model, digits, methods.averaged_sgd, tiny_options(seeds=n), tmp_path / str(n)
        )
        for n in (1, 2)
    )
    jax.tree.map(np.testing.assert_array_equal, alone[0], pair[0])
    assert not np.array_equal(
        pair[0].params["Dense_0"]["kernel"], pair[1].params["Dense_0"]["kernel"]
    )


def test_augmentation_changes_images_only_as_asked():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 8, 8, 3)), jnp.float32)

    def augment(*kinds):
        return training._augmentation(kinds)(jax.random.key(0), x)

    np.testing.assert_array_equal(augment(), x)
    flipped = augment("flip")
    same, mirrored = (np.all(flipped == y, (1, 2, 3)) for y in (x, x[:, :, ::-1]))
    assert np.all(same ^ mirrored)
    assert np.all(np.isin(augment("shift"), x))
    assert 0.2 < np.std(augment("noise") - x) < 0.4


def test_regression_statistics_are_refreshed_on_images_without_augmentation(monkeypatch):
    seen = []
    monkeypatch.setattr(
        methods.batch_stats,
        "linen",
        lambda model, stats, x, **_: seen.append(x) or (lambda p: stats),
    )
    task, chosen = data.load("digits", None, CLASSES), tiny_options(seeds=1, epochs=2)
    model = models.MODELS["convnet"](len(CLASSES))
    method = methods.METHODS["SWA"]
    steps = len(task.train.labels) // chosen.batch_size
    tx = method.optimizer(chosen, steps)
    member = training.initialiser(model, tx, task.train.images[:1])(jax.random.key(0))
    params = member.params
    for _ in range(2 * steps):
        opt_state = tx.update(params, member.opt_state, params)[1]
        member = member._replace(opt_state=opt_state)
    predict = methods.predictor(model, task.train.images, 2)
    list(predict(jax.random.key(0), method, member, [task.ood.images[:2]]))
    (used,) = seen
    np.testing.assert_array_equal(used, task.train.images)


# report


def test_table_and_json_hold_mean_and_standard_error():
    results = {"SGD": {"NLL": [1.0, 2.0, 3.0]}}
    summary = report.record(results, experiment="x")["results"]["SGD"]["NLL"]
    assert summary["mean"] == 2.0
    assert summary["standard_error"] == pytest.approx(1 / np.sqrt(3))
    assert summary["values"] == [1.0, 2.0, 3.0]
    column = report.table(results).columns[1]
    assert list(column.cells) == ["2.0000±.5774"]


def test_one_seed_has_no_standard_error():
    results = {"SGD": {"NLL": [1.0]}}
    assert report.summary([1.0])["standard_error"] is None
    assert list(report.table(results).columns[1].cells) == ["1.0000"]


def test_publish_copies_the_small_results_and_no_checkpoint(tmp_path):
    source = tmp_path / "results" / "x"
    (source / "checkpoints").mkdir(parents=True)
    for name in ("a.json", "b.png", "c.txt"):
        (source / name).write_text("1")
    report.publish(tmp_path / "results", "x", tmp_path / "published")
    assert {p.name for p in (tmp_path / "published" / "x").iterdir()} == {"a.json", "b.png"}


def published():
    return sorted(p.parent for p in report.PUBLISHED.rglob("results.json"))


@pytest.mark.parametrize("folder", published(), ids=lambda folder: folder.name)
def test_readme_leads_to_what_is_published_and_its_tables_are_those(folder):
    readme, name = report.README.read_text(), folder.relative_to(report.PUBLISHED).as_posix()
    content = json.loads((folder / "results.json").read_text())
    assert re.search(rf"\]\(benchmarks/results/{re.escape(name)}[/)]", readme)
    assert report.with_table(readme, name, content) == readme


def test_tables_of_readme_are_of_published_results():
    tables = set(re.findall(r"<!-- (.+) -->", report.README.read_text())) - {"end"}
    names = {folder.relative_to(report.PUBLISHED).as_posix() for folder in published()}
    assert {"classify/digits"} <= tables <= names


def test_a_new_table_replaces_the_old_one_alone():
    content = {"results": {"SWAG": {"NLL": {"mean": 0.5, "standard_error": 0.125}}}}
    readme = "a\n<!-- x/y -->\n\nold\n\n<!-- end -->\nb\n<!-- z -->\n\nkept\n\n<!-- end -->\n"
    new = report.with_table(readme, "x/y", content)
    assert "old" not in new
    assert "| SWAG | .5000±.1250 |" in new
    assert new.startswith("a\n<!-- x/y -->")
    assert new.endswith("<!-- end -->\nb\n<!-- z -->\n\nkept\n\n<!-- end -->\n")


def test_publish_refuses_what_is_too_large(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.png").write_bytes(bytes(1_000_001))
    with pytest.raises(options.UsageError, match=r"a\.png: larger"):
        report.publish(tmp_path, "x", tmp_path / "published")


# the command line


def test_help_lists_the_experiments_and_explains_every_option(capsys):
    with pytest.raises(SystemExit, match="0"):
        command_line.main(["--help"])
    said = capsys.readouterr().out
    assert "classify" in said
    assert "publish" in said
    assert all(field.__doc__ for field in command_line.COMMANDS)


def test_help_imports_nothing_heavy():
    code = (
        "import sys, contextlib, benchmarks.__main__ as m\n"
        "with contextlib.suppress(SystemExit): m.main(['classify', '--help'])\n"
        "sys.exit(bool({'jax', 'flax', 'matplotlib', 'orbax', 'sklearn'} & set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0
    )


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "classify"),
        (["nosuch"], "nosuch"),
        (["classify", "--epochs", "many"], "--epochs"),
        (["classify", "--model", "nosuch"], "nosuch"),
        (["classify", "--evaluate", "nosuch"], "nosuch"),
        (["classify", "--dataset", "nosuch"], "nosuch"),
        (["classify", "--dataset", "mnist", "--data-dir", "nosuch"], "nosuch"),
        (["classify", "--epochs", "10", "--start", "10"], "--start"),
        (["classify", "--seeds", "0"], "--seeds"),
        (["classify", "--learning-rate", "-1"], "--learning-rate"),
        (["classify", "--learning-rate", "nan"], "--learning-rate"),
        (["classify", "--batch-size", "5000"], "--batch-size"),
        (["classify", "--rank", "1"], "--rank"),
        (["classify", "--num-samples", "0"], "--num-samples"),
        (["publish", "nosuch"], "nosuch"),
    ],
)
def test_a_wrong_value_ends_in_one_line_and_exit_code_2(args, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command_line.main(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tiny run of the main job: its folder."""
    results = tmp_path_factory.mktemp("results")
    assert command_line.main(["classify", *TINY, "--results", str(results)]) == 0
    return results / "classify" / "digits"


def test_classify_writes_its_results(finished):
    record = json.loads((finished / "results.json").read_text())
    assert list(record["results"]) == ["SGD", "SWA", "SWAG-Diag", "SWAG"]
    assert list(record["results"]["SGD"]) == ["accuracy", "NLL", "ECE", "Brier", "OOD AUROC"]
    for of_method in record["results"].values():
        for summary in of_method.values():
            assert len(summary["values"]) == 2
            assert np.all(np.isfinite(summary["values"]))
    assert record["evaluated_on"] == "test"
    assert record["options"]["epochs"] == 4
    for name in ("reliability.png", "entropy.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")


def test_the_json_names_no_folder_of_this_machine(finished):
    assert str(finished.parents[2]) not in (finished / "results.json").read_text()


@pytest.mark.slow
def test_interrupted_and_its_last_checkpoint_damaged_a_run_resumes_to_the_same_numbers(
    finished, tmp_path, monkeypatch, capsys
):
    args = ["classify", *TINY, "--results", str(tmp_path), "--checkpoint-every", "1"]
    one_by_one, done = training._one_by_one, []

    def interrupted(step, steps):
        epoch = one_by_one(step, steps)

        def run(*inputs):
            done.append(1)
            if len(done) == 7:  # in the third epoch of the second training
                raise KeyboardInterrupt
            return epoch(*inputs)

        return run

    with monkeypatch.context() as patch:
        patch.setattr(training, "_one_by_one", interrupted)
        assert command_line.main(args) == 130
    assert "--resume" in capsys.readouterr().err
    resumed = tmp_path / "classify" / "digits" / "results.json"
    checkpoints = resumed.parent / "checkpoints" / "averaged_sgd"
    assert {path.name for path in checkpoints.iterdir()} == {"1", "2"}
    truncated = checkpoints / "2" / "default" / "manifest.ocdbt"
    truncated.write_bytes(truncated.read_bytes()[:50])
    with pytest.warns(RuntimeWarning, match=r"2 is damaged .* has 50 of .* step 1 is restored"):
        assert command_line.main([*args, "--resume"]) == 0
    assert resumed.read_text() == (finished / "results.json").read_text()


def test_resuming_with_other_options_is_refused(finished, capsys):
    args = ["classify", *TINY, "--results", str(finished.parents[1]), "--resume"]
    assert command_line.main([*args, "--learning-rate", "0.02"]) == 2
    assert "learning_rate = 0.05, not 0.02" in capsys.readouterr().err


def test_where_every_checkpoint_is_damaged_one_line_says_so(tmp_path):
    (tmp_path / "3").mkdir()
    with pytest.raises(options.UsageError, match=r"--resume: .* damaged.*start anew without"):
        training._restore(tmp_path, [])


@pytest.mark.parametrize("left", ["", "{", '{"epochs": 3'])
def test_a_damaged_record_of_the_options_is_refused(left, tmp_path):
    (tmp_path / "options.json").write_text(left)
    with pytest.raises(options.UsageError, match=r"options\.json is damaged"):
        training.open_checkpoints(tmp_path, tiny_options(resume=True))


def test_checkpoints_without_a_record_of_their_options_are_not_resumed(tmp_path):
    (tmp_path / "averaged_sgd" / "3").mkdir(parents=True)
    training.open_checkpoints(tmp_path, tiny_options(resume=True))
    assert [p.name for p in tmp_path.iterdir()] == ["options.json"]


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_numbers(tmp_path):
    rng = np.random.default_rng(4)

    def start(name, *more):
        args = ["classify", *TINY, "--checkpoint-every", "1", "--results", str(tmp_path / name)]
        return subprocess.Popen([sys.executable, "-m", "benchmarks", *args, *more], cwd=ROOT)

    def kill_after(checkpoint, *more):
        with start("killed", *more) as run:
            folder = tmp_path / "killed" / "classify" / "digits" / "checkpoints"
            while not (folder / checkpoint).exists():
                assert run.poll() is None
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.5))
            run.kill()
        assert run.returncode == -signal.SIGKILL

    kill_after("decayed_sgd/2.orbax-checkpoint-tmp")
    kill_after("decayed_sgd/3", "--resume")
    kill_after("averaged_sgd/2", "--resume")
    for name in ("killed", "uninterrupted"):
        with start(name, "--resume") as run:
            assert run.wait() == 0
    killed, uninterrupted = (
        tmp_path / name / "classify" / "digits" / "results.json"
        for name in ("killed", "uninterrupted")
    )
    assert killed.read_text() == uninterrupted.read_text()


def test_an_unfinished_run_is_not_completed_with_checkpoints_of_an_older_one(tmp_path):
    chosen = tiny_options()
    (tmp_path / "averaged_sgd").mkdir(parents=True)
    training.open_checkpoints(tmp_path, chosen)
    assert [p.name for p in tmp_path.iterdir()] == ["options.json"]
    (tmp_path / "averaged_sgd").mkdir()
    training.open_checkpoints(tmp_path, dataclasses.replace(chosen, resume=True))
    assert (tmp_path / "averaged_sgd").is_dir()


@needs_data
@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_classify_runs_on_tfds_sets(name, tmp_path):
    args = ["classify", "--dataset", name, "--data-dir", str(TFDS), "--results", str(tmp_path)]
    tiny = ["--epochs", "2", "--start", "1", "--seeds", "1", "--num-samples", "2"]
    assert command_line.main([*args, *tiny]) == 0
    record = json.loads((tmp_path / "classify" / name / "results.json").read_text())
    assert record["results"]["SGD"]["accuracy"]["mean"] > 0.3
