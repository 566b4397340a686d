"""From stored results to docs/benchmarks.md and `auto`: `python -m bench.report`."""
