"""The result, for people to read.

In: an `InterferenceHeatmap`. Out: tables, figures, the report, the terminal, and what the trainer's loggers
receive.
"""
