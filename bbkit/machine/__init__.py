"""What this machine can do: its memory, GPU, processes and files, and how a model answers on it.

Every room and the front may import from here; this room imports `prompts` alone.
"""
