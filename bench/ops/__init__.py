"""Benchmarks of one operation: ours beside PyTorch's forms and other packages."""
