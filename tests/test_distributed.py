"""The same program on two machines, here two processes over loopback, and on one."""

import os
import pathlib
import socket
import subprocess
import sys
import time

import distributed_program
import jax
import numpy as np
import pytest

SECONDS = 120  # for both processes together, before they are killed


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(folder, process, port):
    root = pathlib.Path(__file__).parents[1]
    # A proxy would be asked for 127.0.0.1; flags of the parent may set another number of devices.
    kept = {k: v for k, v in os.environ.items() if "proxy" not in k.lower() and k != "XLA_FLAGS"}
    arguments = (folder, process, distributed_program.MACHINES, port)
    with open(folder / f"log{process}", "w") as log:
        return subprocess.Popen(
            [sys.executable, distributed_program.__file__, *map(str, arguments)],
            env=kept | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def finish(processes):
    """Wait until all have ended, or one has failed, or the time is up; let none live on."""
    deadline = time.monotonic() + SECONDS
    try:
        while time.monotonic() < deadline:
            codes = [process.poll() for process in processes]
            if None not in codes or any(codes):
                return codes
            time.sleep(0.1)
        return [process.poll() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def on_two_machines(folder):
    port = free_port()
    processes = [start(folder, i, port) for i in range(distributed_program.MACHINES)]
    codes = finish(processes)
    if any(code != 0 for code in codes):
        logs = [(folder / f"log{i}").read_text()[-6000:] for i in range(len(processes))]
        pytest.fail(f"exit codes {codes}, None of one that was killed\n" + "\n---\n".join(logs))
    with np.load(folder / "results.npz") as results:
        return dict(results)


@pytest.mark.slow
def test_two_machines_do_what_one_does(tmp_path):
    """Train, collect, checkpoint, sample and predict. One test, for one start of the processes."""
    (tmp_path / "two").mkdir()
    (tmp_path / "one").mkdir()
    two = on_two_machines(tmp_path / "two")
    devices = jax.devices()[: distributed_program.MACHINES * distributed_program.DEVICES]
    one = distributed_program.run(tmp_path / "one", devices)
    assert two.keys() == one.keys()
    # Gradients, densities and averages over samples are sums over the network: in another order.
    for name, wanted in one.items():
        tolerance = 1e-5 * np.abs(wanted).max()
        np.testing.assert_allclose(two[name], wanted, 0, tolerance, err_msg=name)
    # Collecting and sampling add no numbers of different coordinates: the same bit for bit.
    exact = [name for name in one if name.startswith("['exact']")]
    assert len(exact) == 3 + 3 * 3 + 3
    for name in exact:
        np.testing.assert_array_equal(two[name], one[name], err_msg=name)
    # So is a checkpoint, restored into other shards than those it was saved from.
    same = [name for name in two if name.startswith("['same']")]
    assert len(same) == 3 + 3 * 3
    assert all(two[name] for name in same)
    # And none of it is trivial.
    assert two["['state'].num_collected"] == distributed_program.STEPS
    assert np.ptp(two["['exact'][0].deviations['hidden']"]) > 0.1
    assert np.ptp(two["['probs']"][:, 0]) > 0.1
    np.testing.assert_allclose(two["['probs']"].sum(1), 1, rtol=1e-5)
