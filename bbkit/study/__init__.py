"""Above single runs: arms over seeds, records and verdicts, probe, benchmark, the workshop's helps.

Nothing imports from here but notebooks and the commands bbkit.probe and bbkit.benchmark.
"""
