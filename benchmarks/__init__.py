"""Experiments and measurements of swagjax: ``python -m benchmarks --help``."""
