"""What the method costs: ratios to plain TRL, measured in one process, interleaved.

`python -m bbkit.benchmark` prints a table and writes JSON: of a gradient per capability
(`bbkit.study.variants`), or with `--retention` of what keeping the base costs
(`bbkit.study.retention_cost`).
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bbkit import InputError, exit_code
from bbkit.machine import files
from bbkit.runs import record


def parser() -> argparse.ArgumentParser:
    """The options of `python -m bbkit.benchmark`."""
    p = argparse.ArgumentParser(
        prog="python -m bbkit.benchmark", description=__doc__.split("\n")[0]
    )
    p.add_argument("--preset", default="pocket", help="model and adapter: one of the presets")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one key of it")
    p.add_argument("--capabilities", type=int, nargs="+", default=[2, 4, 8], metavar="K")
    p.add_argument("--rank", type=int, nargs="+", default=[8, 64], help="of the LoRA matrices")
    p.add_argument(
        "--trains", default="lora", choices=["lora", "dora", "all"], help="not with --retention"
    )
    p.add_argument("--sequences", type=int, default=8, help="per micro-batch")
    p.add_argument("--tokens", type=int, default=128, help="per sequence, half of them completion")
    p.add_argument("--prompts", type=int, default=2, help="of a whole step: the kit's questions")
    p.add_argument("--generations", type=int, default=4, help="completions of each of them")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--out", type=Path, metavar="FILE", help="JSON with every figure")
    p.add_argument("--retention", action="store_true", help="steps with it and without, no others")
    p.add_argument("--replies", type=int, nargs="+", default=[8, 32], help="of the base, per step")
    p.add_argument("--data-dir", type=Path, metavar="DIR", help="upstream data files, where needed")
    p.add_argument("--peak", help=argparse.SUPPRESS)  # of what: a process of its own
    p.add_argument("--kept", type=Path, help=argparse.SUPPRESS)  # its file of replies
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parser().parse_args(argv)
    args.words = list(sys.argv[1:] if argv is None else argv)
    return exit_code(lambda: _main(args))


def _main(args: argparse.Namespace) -> int:
    completions = args.prompts * args.generations
    if not args.retention and completions % args.sequences:
        raise InputError(f"--sequences {args.sequences} must divide a step's {completions}")
    from bbkit.study import retention_cost, variants

    measured: Any = retention_cost if args.retention else variants
    if args.peak:
        print(measured.peak(args))
        return 0
    rows = measured.rows(args)
    if not args.retention and backend_beside(args):
        rows += _with_unsloth(args.words, rows)
    if args.out:
        facts = {"rows": rows, "arguments": vars(args), "machine": record.machine()}
        files.write_bytes(args.out, json.dumps(facts, indent=1, default=str).encode())
    return 0


def backend_beside(args: argparse.Namespace) -> bool:
    """Whether unsloth gets rows of its own: it is here, a GPU is, and no backend was asked for."""
    import torch

    asked = any(item.startswith("model.backend") for item in args.set)
    there = importlib.util.find_spec("unsloth") is not None
    return torch.cuda.is_available() and there and not asked


def _with_unsloth(words: list[str], ours: list[dict]) -> list[dict]:
    """The same rows by unsloth, from a process that imports it first; printed, with their ratios
    to `ours`, which are by transformers."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        more = ["--set", "model.backend=unsloth", "--out", str(out)]
        done = subprocess.run([sys.executable, "-m", "bbkit.benchmark", *words, *more])
        if done.returncode:
            print(f"unsloth: no rows, its process ended with exit code {done.returncode}")
            return []
        rows = files.read_json(out)["rows"]
    for a, b in zip(rows, ours, strict=True):
        if "seconds" in a:
            shape = f"K {a['capabilities']}, rank {a['rank']}, {a['variant']}"
            print(f"step by unsloth / by transformers, {shape}: {a['seconds'] / b['seconds']:.3f}")
    return rows
