"""Studies: many runs of a method, compared honestly. `scripts/study.py` runs them."""
