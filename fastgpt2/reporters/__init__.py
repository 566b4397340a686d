"""Reporters, one a file. `fastgpt2.reporter.Reporter` has the events that they receive."""
