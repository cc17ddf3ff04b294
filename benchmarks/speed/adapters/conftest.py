"""Not collected: these scripts import packages of other environments."""

collect_ignore_glob = ["*.py"]
