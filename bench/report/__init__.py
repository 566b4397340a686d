"""From stored results to README.md and `auto`: `python -m bench.report`."""
