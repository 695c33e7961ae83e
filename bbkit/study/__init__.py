"""Above single runs: arms over seeds, verdicts, probe, benchmark, and the notebooks' helps.

Only notebooks and the doors `bbkit.probe` and `bbkit.benchmark` import from here.
"""
