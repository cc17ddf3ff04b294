"""The speed suite: its workloads, floors, checks and children; never how fast anything is."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import swagjax
from benchmarks import __main__ as command_line
from benchmarks.models import ConvNet
from benchmarks.speed import child, command, figures, machine, measure, programs, results, workloads
from benchmarks.speed.figures import setting as settings

ROOT = Path(__file__).parent.parent

FAKE = """
import sys, time
sys.path.insert(0, {adapters!r})
from serve import serve, threads

def build(workload, rank):
    if workload == "unknown":
        raise KeyError(workload)
    block = bytearray(30_000_000)
    for i in range(0, len(block), 1000):
        block[i] = 1
    print("a library prints")
    def sample(samples):
        time.sleep(0.01 * samples)
    return {{"parameters": 10 * rank, "collect": lambda: time.sleep(0.002), "sample": sample}}

serve(build, {{"fake": str(threads())}})
"""


@pytest.fixture
def fake(tmp_path):
    """The command of a peer of which all is known."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE.format(adapters=str(child.ADAPTERS)))
    return (sys.executable, script)


# workloads


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("lenet5", 62_006),
        ("preresnet20", 272_282),  # "0.27 M" in He et al. 2016
        ("resnet18", 11_173_962),
        ("wrn28x10", 36_479_194),  # "36.5 M" in Zagoruyko, Komodakis 2016
        ("transformer", 124_439_808),  # GPT-2, "124 M"
    ],
)
def test_parameter_counts_are_those_of_the_papers(name, count):
    assert workloads.parameters(workloads.build(name)) == count


def test_the_tree_of_many_leaves_has_300_leaves_in_85_shapes_on_both_sides_of_pooling():
    leaves = jax.tree.leaves(workloads.build("leaves300").shapes)
    assert len(leaves) == 300
    assert len({leaf.shape for leaf in leaves}) == 85
    assert min(leaf.size for leaf in leaves) < 1 << 14 < max(leaf.size for leaf in leaves)


class Dense(nn.Module):
    """One dense layer."""

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(10)(x.mean((1, 2)))


@pytest.fixture
def tiny(monkeypatch):
    """Networks of a few weights in the places of LeNet5 and PreResNet-20, short floors."""
    builders = {
        "lenet5": lambda: workloads._network(Dense(), 4),
        "preresnet20": lambda: workloads._network(ConvNet(10, (4,)), 4),
    }
    monkeypatch.setattr(workloads, "_BUILDERS", workloads._BUILDERS | builders)
    monkeypatch.setattr(machine, "_MOST", 1 << 12)
    monkeypatch.setattr(measure, "BLOCK", 1e-4)
    monkeypatch.setattr(measure, "PAUSE", 0.0)


def test_the_state_of_a_workload_is_full_and_scattered(tiny):
    params, state = workloads.state(workloads.build("lenet5"), 3)
    assert int(state.num_collected) == 4
    assert int(state.num_skipped) == 0
    for leaf in jax.tree.leaves(state.deviations):
        assert np.all(np.abs(leaf).max(tuple(range(1, leaf.ndim))) > 0)
    assert jax.tree.structure(params) == jax.tree.structure(state.mean)


# measuring


def test_actions_are_interleaved_and_the_order_turns(monkeypatch):
    monkeypatch.setattr(measure, "PAUSE", 0.0)
    order = []

    def action(name, seconds):
        return lambda: order.append(name) or seconds

    seconds = measure.interleave({"a": action("a", 1.0), "b": action("b", 2.0)}, 3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert seconds == {"a": [1.0] * 3, "b": [2.0] * 3}


def test_times_are_seconds_of_one_call():
    assert 0.01 <= measure.timed(time.sleep, 0.01)() < 0.1
    calls = []
    action = measure.timed(lambda: calls.append(1) or time.sleep(0.001))
    before = len(calls)
    assert 0.001 <= action() < 0.01
    assert len(calls) - before > 1  # short ones many times


def test_a_carried_step_goes_on_from_its_last_result():
    seen = []
    action = measure.carried(lambda carry, x: seen.append(carry) or carry + x, 0, 2)
    action()
    assert seen == list(range(0, 2 * len(seen), 2))


def test_ratios_are_taken_within_a_round():
    assert measure.ratio([2.0, 30.0, 4.0], of=[1.0, 10.0, 1.0]) == {
        "median": 3.0,
        "quartiles": [2.5, 3.5],
        "values": [2.0, 3.0, 4.0],
    }


def test_floors_are_scaled_to_what_is_to_be_moved_and_drawn(monkeypatch):
    monkeypatch.setattr(machine, "_MOST", 1000)
    monkeypatch.setattr(machine, "_EVEN", 100)
    sizes = []
    monkeypatch.setattr(measure, "carried", lambda step, x: lambda: sizes.append(x.size) or 1.0)
    monkeypatch.setattr(measure, "timed", lambda draw, key: lambda: float(draw(key).size))
    assert machine.moving(600)() == 1.0
    assert machine.moving(6000)() == 3.0
    assert machine.moving(590)() == pytest.approx(590 / 600)
    assert sizes == [300, 1000, 300]  # each number of the array is read and written
    assert machine.drawing(600)() == 600
    assert machine.drawing(6000)() == 6000


def test_the_floor_moves_numbers_in_place(monkeypatch):
    steps = []
    monkeypatch.setattr(measure, "carried", lambda step, x: steps.append((step, x)) or (lambda: 1))
    machine.moving(2048)
    (step, x) = steps[0]
    analysis = step.lower(x).compile().memory_analysis()
    assert analysis.alias_size_in_bytes == analysis.argument_size_in_bytes == 4096
    assert analysis.temp_size_in_bytes < 100


def test_rates_are_positive_and_finite(tiny):
    for rate in machine.rates(2).values():
        assert all(0 < value < math.inf for value in rate["values"])


def test_the_machine_is_described_by_what_it_is_not_by_its_name():
    about = machine.describe()
    assert {"processor", "cores", "memory_bytes", "backend", "device"} <= set(about)
    assert about["memory_bytes"] > 1 << 28
    assert 0 < machine.available_bytes() <= about["memory_bytes"]
    import platform

    assert platform.node() not in json.dumps(about).split('"')


# what programs say of themselves


class Text:
    """A program of which the text alone is known."""

    def __init__(self, text):
        self.as_text = lambda: text


def test_results_of_an_operation_are_found_in_the_text_of_a_program():
    program = Text(
        "%a = f32[20,3]{1,0} all-gather(%b), dimensions={0}\n"
        "%c = (f32[5]{0}, bf16[20,100]{1,0}) all-gather-start(%d)\n"
        "%e = f32[1000]{0} fusion(%all-gather.1), calls=%f\n"
        "ROOT %s = pred[7]{0} select(%p, %q, %r)\n"
    )
    assert programs.largest_result(program, "all-gather") == 4000
    assert programs.largest_result(program, "all-gather", leading=5) == 20
    assert programs.largest_result(program, "select") == 7
    assert programs.largest_result(program, "all-to-all") == 0


def test_a_selection_over_the_ring_is_seen(tiny):
    """Mapped over its step, a state selects where it should branch."""
    tx = swagjax.swag(5, every=2)
    carry = workloads.state(workloads.build("lenet5"), 5)
    ring = max(x.nbytes for x in jax.tree.leaves(carry[1].deviations))
    pair = jax.tree.map(lambda x: jnp.stack([x] * 2), carry)
    step = jax.jit(jax.vmap(workloads.collector(tx))).lower(pair, pair[0])
    assert programs.largest_result(step.compile(), "select") >= 2 * ring


def test_members_that_share_their_step_select_nothing(tiny):
    (result,) = figures.KINDS["members"].measure(_setting(rank=100))
    assert result.checks == {"no selection over the ring": True, "no copy of the ring": True}
    assert min(result.ours + result.floor) > 0


# children


def test_a_child_answers_requests(fake):
    with child.running(fake, 3) as ask:
        assert ask("versions") == {"versions": {"fake": "3"}}
        assert ask("prepare", workload="lenet5", rank=4) == {"parameters": 40}
        assert 0.002 <= ask("seconds", of="collect")["seconds"] < 0.02
        assert 0.03 <= ask("seconds", of="sample", samples=3)["seconds"] < 0.2


def test_the_memory_of_a_child_is_its_peak_above_idle(fake):
    with child.running(fake, 1) as ask:
        answer = ask("memory", workload="lenet5", rank=2, steps=[["sample", {"samples": 0}]])
    assert 25e6 < answer["peaks"]["collect"] < 60e6
    assert answer["peaks"]["sample"] < 25e6  # the block was given back before


def test_a_failed_request_says_why_and_the_child_lives_on(fake):
    with child.running(fake, 1) as ask:
        with pytest.raises(child.ChildError, match=r"fake\.py: KeyError: 'unknown'"):
            ask("prepare", workload="unknown", rank=2)
        ask("prepare", workload="lenet5", rank=2)
        with pytest.raises(child.ChildError, match="predict"):
            ask("seconds", of="predict", samples=1)


def test_a_peer_that_cannot_do_it_is_left_out(fake):
    with child.running(fake, 1) as ask:
        ask("prepare", workload="lenet5", rank=2)
        with_peer = _setting(peers={"fake": ask})
        assert list(settings.peer_actions(with_peer, "sample", samples=1)) == ["fake"]
        assert settings.peer_actions(with_peer, "predict", samples=1) == {}


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("/nosuch/python", "x.py"), "/nosuch/python"),
        ((sys.executable, "/nosuch/x.py"), "x.py: ended with code 2"),
        ((sys.executable, child.ADAPTERS / "torch_plain.py"), "torch_plain.py: ended with code 1"),
    ],
)
def test_a_child_that_does_not_start_says_so(command, said):
    with pytest.raises(child.ChildError, match=said), child.running(command, 1):
        pass


# results


def figure(**changes):
    filled = {"name": "collect", "workload": "lenet5", "ours": [1.0, 2.0, 3.0]}
    return results.Figure(**filled | changes)


def test_targets_are_met_by_the_median_ratio():
    assert results.target_met(figure(floor=[1.0, 1.0, 1.0], target=2.0)) is True
    assert results.target_met(figure(floor=[1.0, 1.0, 1.0], target=1.9)) is False
    assert results.target_met(figure(floor=[1.0, 1.0, 1.0])) is None
    assert results.target_met(figure(target=1.0)) is None


def test_ahead_is_ahead_of_the_best_peer():
    peers = {"fast": [10.0, 20.0, 30.0], "slow": [90.0, 90.0, 90.0]}
    assert results.ahead_met(figure(peers=peers, ahead=10.0)) is True
    assert results.ahead_met(figure(peers=peers, ahead=11.0)) is False
    assert results.ahead_met(figure(ahead=11.0)) is None


def test_what_is_missed_is_named():
    missed = figure(
        floor=[1.0] * 3,
        target=1.5,
        peers={"a": [1.0] * 3},
        ahead=5.0,
        checks={"no copy": False, "fine": True},
    )
    assert results.failures([figure(), missed]) == [
        "collect, lenet5: 2 times its floor, target 1.5",
        "collect, lenet5: not 5 times ahead of every peer",
        "collect, lenet5: not so: no copy",
    ]
    (row,) = zip(*(column.cells for column in results.table([missed]).columns), strict=True)
    assert row == (
        *("collect", "lenet5", "2 s", "2 (1.5-2.5)", "<= 1.5 MISSED"),
        *("a 0.5", ">= 5 MISSED"),
    )


def test_a_record_is_json_with_medians_and_quartiles():
    record = json.loads(json.dumps(results.record(figure(floor=[1.0] * 3, target=2.0))))
    assert record["ours"] == {"median": 2.0, "quartiles": [1.5, 2.5], "values": [1.0, 2.0, 3.0]}
    assert record["ratio_to_floor"]["median"] == 2.0
    assert record["target_met"] is True
    assert results.record(figure())["ratio_to_floor"] is None


# the command


def test_every_kind_of_figure_and_workload_can_be_asked_for():
    assert set(figures.KINDS) == set(command.get_args(command.Kind))
    assert set(workloads._BUILDERS) == set(command.get_args(command.Workload))
    for kind in figures.KINDS.values():
        assert set(kind.workloads) <= set(workloads._BUILDERS)
    assert {child.ADAPTERS / name for name in command.ADAPTERS.values()} <= set(
        child.ADAPTERS.iterdir()
    )


TINY = ["--rank", "2", "--num-samples", "2", "--repeats", "2", "--images", "4", "--refresh", "250"]


@pytest.mark.slow
def test_the_suite_prints_and_writes_every_figure(tiny, fake, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(command.ADAPTERS, "torch_plain", fake[1])
    kinds = ["collect", "sample", "predict"]
    args = ["speed", "--figures", *kinds, "--workloads", "lenet5", *TINY]
    args += ["--torch-plain", sys.executable, "--results", str(tmp_path), "--threads", "1"]
    assert command_line.main(args) == 0
    (path,) = (tmp_path / "speed").iterdir()
    record = json.loads(path.read_text())
    assert {"machine", "versions", "options", "rates", "date"} <= set(record)
    assert record["peers"] == {"torch_plain": {"fake": "1"}}
    assert record["skipped"] == []
    names = [f["name"] for f in record["figures"]]
    assert names == ["collect", "collect, in a loop", "sample 1", "predict 2"]
    for f in record["figures"]:
        assert len(f["ours"]["values"]) >= 2
        assert min(f["ours"]["values"]) > 0
        assert min(f["floor"]["values"]) > 0
        assert f["floor_is"]
        assert f["ratio_to_floor"]["median"] > 0
    compared = {f["name"] for f in record["figures"] if f["peers"]}
    assert compared == {"collect", "collect, in a loop", "sample 1"}  # the fake one cannot predict
    assert str(tmp_path) not in path.read_text()
    out = capsys.readouterr().out
    assert all(name in out for name in names)
    assert record["machine"]["processor"] in out


@pytest.mark.slow
def test_an_epoch_of_training_is_set_beside_a_bare_loop(tiny):
    augmented, plain = figures.KINDS["training"].measure(_setting())
    assert augmented.floor == plain.floor
    images = 8 * 4
    for f in (augmented, plain):
        assert f.details["images_per_second"] == pytest.approx(images / np.median(f.ours))
        assert f.details["bare_images_per_second"] == pytest.approx(images / np.median(f.floor))


@pytest.mark.slow
def test_statistics_are_refreshed_beside_as_many_passes(tiny):
    (result,) = figures.KINDS["predict"].measure(_setting("preresnet20"))
    assert result.name == "predict 2, statistics refreshed"
    assert result.details == {"images": 4, "refresh": 250}
    assert min(result.ours + result.floor) > 0


@pytest.mark.slow
def test_first_calls_are_compiled_anew_each_time(tiny):
    found = {f.name: f for f in figures.KINDS["compile"].measure(_setting(rounds=1))}
    assert set(found) >= {"compile step", "compile sample", "compile sample 2", "compile predict"}
    for f in found.values():
        assert min(f.ours) > 0.005  # what is cached takes a fraction of a millisecond


def test_what_does_not_fit_into_memory_is_skipped_with_a_reason(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(machine, "available_bytes", lambda: 10**9)
    args = ["speed", "--figures", "collect", "--workloads", "transformer", *TINY]
    assert command_line.main([*args, "--results", str(tmp_path)]) == 0
    (path,) = (tmp_path / "speed").iterdir()
    record = json.loads(path.read_text())
    assert record["figures"] == []
    (skipped,) = record["skipped"]
    assert skipped["workload"] == "transformer"
    assert "5.0 GB of memory, 1.0 GB are available" in skipped["why"]  # (2 + 8) x 124 M x 4 bytes


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--rank", "1"], "--rank 1"),
        (["--num-samples", "0"], "--num-samples 0"),
        (["--repeats", "0"], "--repeats 0"),
        (["--refresh", "100"], "--refresh 100"),
        (["--figures", "nosuch"], "nosuch"),
        (["--figures", "idle", "--workloads", "transformer"], "transformer"),
        (["--torch-plain", "/nosuch/python"], "/nosuch/python"),
        (["--torch-plain", sys.executable], "--torch-plain: torch_plain.py: ended with code 1"),
    ],
)
def test_a_wrong_value_ends_in_one_line(args, said, capsys, tmp_path):
    assert command_line.main(["speed", *args, "--results", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err
    assert not list(tmp_path.iterdir())


def test_help_imports_nothing_heavy():
    code = (
        "import sys, contextlib, benchmarks.__main__ as m\n"
        "with contextlib.suppress(SystemExit): m.main(['speed', '--help'])\n"
        "sys.exit(bool({'jax', 'flax', 'optax', 'rich.table'} & set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["memory", "scaling"])
def test_figures_of_processes_of_their_own(kind):
    found = list(figures.KINDS[kind].measure(_setting()))
    for f in found:
        assert min(f.ours) > 0
        assert min(f.floor) > 0
    if kind == "memory":
        assert found[0].ours[0] == 4 * 4 * 62_006 + 12  # (K + 2) P floats and three counters
    else:
        assert {f.name for f in found} >= {"sample on 8 virtual devices"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["idle", "samples", "low-rank", "generators", "averaging", "axes"])
def test_other_figures_have_floors_of_their_own(kind, tiny, monkeypatch):
    monkeypatch.setattr(figures.choosing, "_NORMALS", 100)
    found = list(figures.KINDS[kind].measure(_setting()))
    assert len({f.name + f.workload for f in found}) == len(found) > 0
    for f in found:
        assert len(f.ours) == len(f.floor)
        assert min(f.ours + f.floor) > 0
        assert f.floor_is


def _setting(name="lenet5", **changes):
    filled = {
        "name": name,
        "workload": workloads.build(name),
        "rank": 2,
        "samples": 2,
        "images": 4,
        "refresh": 250,
        "rounds": 2,
        "threads": 1,
        "peers": {},
        "commands": {},
    }
    return settings.Setting(**filled | changes)
