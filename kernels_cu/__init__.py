"""CUDA C++ sources, compiled at first use. `kernels_cu.__path__` is where they are."""
