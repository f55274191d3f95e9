"""From a backward pass to per-sample gradients.

In: the heads of a model, and an ordinary training step. Out: the factors of each sample's gradient, with its
task and its id, exact to the last scale.
"""
