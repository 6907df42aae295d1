"""Measurements of what beit_jax costs; see `python -m beit_jax.benchmark --help`."""
