"""Benchmarks beside the reference implementations: `python -m benchmarks --help`. Nothing imports them."""
