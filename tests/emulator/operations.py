"""The product's kernels with few threads, and the arguments that its host side would give them."""
