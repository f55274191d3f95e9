"""Gradients on disk.

In: captured steps. Out: the same gradients, whole or sampled, read back some heads at a time; the cache
survives a kill at any moment.
"""
