"""The pictures of README and docs: drawn from stored records by `python -m bench.pictures`."""
