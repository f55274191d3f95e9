"""From two results to a verdict.

In: a current heatmap and a baseline. Out: a `DriftReport` that passes or fails, for CI.
"""
