"""Public benchmarks: lm-eval's tasks, IFEval's checkers, the letter a reply commits to, a report.

`evaluate` and study import from here; this room imports runs and what is below.
"""
