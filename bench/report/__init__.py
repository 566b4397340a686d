"""From stored results to README.md, the figures and `auto`: `python -m bench.report`; its gate: `bench.report.gate`."""
