"""A decode step on a few rows: plain in PyTorch, and in Triton kernels. Light: importing it loads nothing."""
