"""Public benchmarks: lm-eval's tasks, IFEval's checkers, letter extraction, their report.

evaluate and study import from here; this room imports runs and what is below.
"""
