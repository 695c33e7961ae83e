"""The folder of a run: record, callback, measures, figures, report, and the model that leaves it.

`train`, `evaluate`, benchmarks and study import from here; this room imports the method and below.
"""
