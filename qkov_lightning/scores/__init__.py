"""From per-sample gradients to numbers.

In: blocks of per-sample gradients, with their tasks, and the Fisher. Out: scores with standard errors.
"""
