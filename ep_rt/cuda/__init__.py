"""The engine on GPUs. Importing it needs no CUDA, which is touched inside functions only."""
