"""What this machine can do: its memory, GPU, processes and files, and how a model answers on it.

Any room and the front may import from here; this room imports settings and prompts alone.
"""
