"""What computes a slot in PyTorch: the plain forms, one oracle a slot, and PyTorch's own kernels."""
