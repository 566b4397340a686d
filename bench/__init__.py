"""Benchmarks: `pytest bench/` here, `python -m bench.gpu` on a machine with a GPU and little time."""
