"""Who is told of a run, a file each. `fastgpt2.reporter.Reporter` says what they can be told."""
