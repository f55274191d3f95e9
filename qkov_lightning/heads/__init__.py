"""Which features of which module are a head.

In: a model. Out: a `Projection` for each Q, K, V and O of each layer, found by name or declared, and proven
by derivative.
"""
