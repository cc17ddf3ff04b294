"""One module an experiment: a dataclass of options and one function."""
