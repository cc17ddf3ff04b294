"""Regression: data sets in the layouts of the UCI benchmarks, networks, trainings and methods."""
