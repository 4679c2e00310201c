"""The kernels of `kernels_cu` on the CPU, under random schedules and weak memory. See README.md."""
