"""For all tests and doctests: eight virtual CPU devices, and no picture left over from another."""

import os
from collections.abc import Iterator

# Compiling takes most of the time of the quick tests, and LLVM's optimisations a quarter of that.
# Slow tests are run with them: XLA_FLAGS= pytest -m slow.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import matplotlib
import pytest
from matplotlib import pyplot as plt

jax.config.update("jax_num_cpu_devices", 8)  # so that sharding is tested on any machine
matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def close_figures() -> Iterator[None]:
    """Close what a test or an example drew."""
    yield
    plt.close("all")
