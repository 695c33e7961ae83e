"""What is trained and tested on: cards, rows, questions, instructions, the base's own replies.

The rooms above and the front may import from here; this room imports config, machine, prompts.
"""

from bbkit.data.catalogue import card, cards, checksums, load, role, there, verify
from bbkit.data.own import halved, is_own, refuse_shared

__all__ = [
    "card", "cards", "checksums", "halved", "is_own", "load", "refuse_shared", "role", "there",
    "verify",
]  # fmt: skip
