"""A reward that opposes the kit's own, for the arms `conflict` of bbkit.study.arms.

Serves the claim on gradient orthogonality: the kit's three rewards hardly oppose one another, so
that nothing can be seen there of what a combination of gradients is for.
"""


def brevity(example, reply):
    """From 1 for a reply without a word down to 0 at 40 words; None for instructions.

    >>> from bbkit.prompts import Example
    >>> brevity(Example("1", "short", "Cause?", answer="virus"), "a virus")
    0.95
    """
    if example.task == "instruction":
        return None  # how long that should be, it says itself
    return max(0.0, 1 - len(reply.split()) / 40)
