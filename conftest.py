"""For all tests and doctests: eight virtual CPU devices, and no picture left over from another."""

from collections.abc import Iterator

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
