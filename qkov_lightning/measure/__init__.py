"""One measurement, from beginning to end.

In: a store of gradients, or the batches of a probe. Out: an `InterferenceHeatmap`.
"""
