"""Benchmarks of the training step: every candidate in a process of its own."""
