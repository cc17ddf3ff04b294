"""Scripts that a peer's own Python runs: each builds a SWAG and answers requests for its times."""
