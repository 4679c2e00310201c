"""The engine without a GPU: NumPy over any group."""
