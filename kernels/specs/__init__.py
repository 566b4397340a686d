"""What the tools know of each kernel: work, candidates, examples. Nothing here runs in training."""
