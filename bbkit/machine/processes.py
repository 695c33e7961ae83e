"""One run in several processes: which of them writes, and what all must decide alike.

Serves no claim. `accelerate launch --multi_gpu --num_processes 2 -m bbkit.train …` starts them; the
trainers share the work, and the first process alone evaluates, prints and writes the run folder.
"""

import os
import sys
from datetime import timedelta

from bbkit import InputError


def count() -> int:
    """How many processes the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first() -> bool:
    """Whether this is the process that writes."""
    return int(os.environ.get("RANK", 0)) == 0


def join() -> None:
    """Meet the other processes, and silence all but the first; nothing to do for one alone.

    They talk over gloo where there is no GPU, and wait up to a day while the first evaluates.
    """
    if count() > 1:
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))
        # transformers reads a checkpoint's optimiser to the process' device, by accelerate "cpu:0"
        # on gloo, a name that torch.load alone does not know.
        torch.serialization.register_package(
            50, lambda storage: None, lambda storage, at: storage if at == "cpu:0" else None
        )
        if not is_first():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115, as long as the process lives


def share(sequences: int, micro_batch: int, key: str) -> int:
    """Micro-batches of each process in a step of so many sequences; InputError if it is no whole.

    >>> share(32, 8, "sft")
    4
    """
    passes, left = divmod(sequences, micro_batch * count())
    if left:
        said = f"must divide the {sequences} sequences of a step"
        raise InputError(f"{key}.micro_batch_size={micro_batch} in {count()} processes {said}")
    return passes


def wait() -> None:
    """Go on when every process is here."""
    if count() > 1:
        import torch

        torch.distributed.barrier()


def in_any(*flags: bool) -> list[bool]:
    """Each flag, true if it is true in any process: a signal or a clock must not part them.

    >>> in_any(True, False)
    [True, False]
    """
    if count() == 1:
        return list(flags)
    import torch
    from accelerate import PartialState

    seen = torch.tensor(flags, dtype=torch.int32, device=PartialState().device)
    torch.distributed.all_reduce(seen, op=torch.distributed.ReduceOp.MAX)
    return [bool(flag) for flag in seen.tolist()]
