"""Leaving with a model: `python -m bbkit.runs.export RUN` writes adapter, merged model and card.

The merged model is safetensors in transformers' layout, which llama.cpp's converter reads too. The
card is filled from the run folder: data and licences, measures with intervals, limits.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bbkit import InputError, config, data, exit_code
from bbkit.machine import files, hub
from bbkit.runs import record, report

ASKED = "Name one cause of fever."  # the prompt on which the merged model is held to the adapter


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code and prints one line for a known error."""
    p = argparse.ArgumentParser(
        prog="python -m bbkit.runs.export", description="Adapter, merged model and card of a run."
    )
    p.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    p.add_argument("--out", type=Path, metavar="DIR", help="default: RUN/export")
    kinds = ("auto", "float32", "bfloat16", "float16")
    p.add_argument("--dtype", default="auto", choices=kinds, help="auto: what the base loads as")
    p.add_argument("--offline", action="store_true", help="as for bbkit.train")
    args = p.parse_args(argv)
    return exit_code(lambda: _main(args))


def _main(args: argparse.Namespace) -> int:
    manifest = record.manifest_of(args.run)
    out = args.out or args.run / "export"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: not an empty folder; use another --out, or remove it")
    settings = config.from_dict(manifest["settings"], str(args.run))
    hub.go_private(args.offline or settings.model.name == "pocket")
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside the place where it will stand, and moved there whole.
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        made = Path(folder) / "export"
        apart, dtype = write(settings, args.run, made, args.dtype, args.offline)
        text = card(manifest, report.results_of(args.run), dtype, apart)
        files.write_bytes(made / "README.md", text.encode(errors="replace"))
        if out.exists():
            out.rmdir()
        shutil.move(made, out)
    print(f"logits of merged and adapter model differ by at most {apart:.2g}")
    print(f"exported: {out} (adapter/, model/, README.md); for llama.cpp: "
          f"convert_hf_to_gguf.py {out / 'model'}")  # fmt: skip
    return 0


def write(
    settings: Any, run: Path, out: Path, dtype: str, offline: bool = False
) -> tuple[float, str]:
    """Write adapter/ and model/; the largest difference of their logits on one prompt, the dtype.

    The merged model is made in the memory of the CPU, once in its dtype (7B in bfloat16: 15 GB).
    """
    import torch

    from bbkit import models

    base, tokenizer = models.load(settings.model, lambda line: None, offline)
    model = models.load_adapter(base, run / "adapter", trainable=False).eval()
    dtype = str(base.dtype).removeprefix("torch.") if dtype == "auto" else dtype
    merged = models.merge(model, getattr(torch, dtype)).eval()
    turns = [{"role": "user", "content": ASKED}]
    asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")
    with torch.no_grad():
        ours, theirs = (m(**asked.to(m.device)).logits.float().cpu() for m in (model, merged))
    (out / "model").mkdir(parents=True)
    with files.guarded(out / "model"):
        merged.save_pretrained(out / "model", safe_serialization=True)
        tokenizer.save_pretrained(out / "model")
    models.save_adapter(model, out / "adapter")
    return (ours - theirs).abs().max().item(), dtype


def card(manifest: Mapping[str, Any], results: Mapping[str, Any], dtype: str, apart: float) -> str:
    """The model card: front matter as the Hub reads it, then what a reader must know."""
    settings = manifest["settings"]
    name = settings["model"]["name"]
    used = dict.fromkeys(settings["data"]["sft"] + settings["data"]["grpo"])
    rows = []
    for source in used:
        front = data.card(source)
        licence = front["license"] if isinstance(front["license"], list) else [front["license"]]
        rows.append(f"| {front['pretty_name']} | {', '.join(licence)} | {front['homepage']} |")
    base = [] if name == "pocket" or name.endswith(".gguf") else [f"base_model: {name}"]
    tags = ["library_name: transformers", "tags: [biology, medical, lora, grpo]"]
    parts = [
        "\n".join(["---", *base, *tags, "---"]),
        f"# {name}, tuned by BalancedBio Kit",
        "**Not for clinical use.** A research model of a method; its answers are often wrong, and "
        "nobody has checked them for patients.",
        "## Measured",
        *report.headline(results),
        "## Training data",
        "\n".join(["| data | licence | source |", "|---|---|---|", *rows]),
        "The licence of the base model holds for this model too; see its own card.",
        "## Limits",
        "Multiple-choice accuracy is not clinical skill. Held-out figures are of the data named "
        "above and of greedy replies; elsewhere they do not hold. "
        f"`model/` is the base with the adapter added, in {dtype}: its logits differ from those of "
        f"base and adapter by at most {apart:.2g} on one prompt.",
        "## How it was made",
        f"```\n{manifest['command']}\n```",
        "\n".join(f"- {key}: {value}" for key, value in report.facts(manifest).items()),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(main())
