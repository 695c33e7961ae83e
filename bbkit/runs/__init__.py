"""The folder of a run: its record, callback, measures, figures, report, and what leaves it.

train, evaluate, benchmarks and study import from here; this room imports the method and what is below.
"""
