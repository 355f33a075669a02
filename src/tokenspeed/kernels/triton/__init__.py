"""Owns the solution `triton`: kernels for NVIDIA and AMD GPUs; never runs unless one is there.

Host code (shapes, grids, schedules) stands in this package, what runs on the device in `device/`,
which is imported when a kernel is first launched: importing Triton takes half a second that an
engine on CPUs need not spend.
"""
