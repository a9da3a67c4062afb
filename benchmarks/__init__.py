"""Benchmarks against the reference implementations; nothing imports them."""
