"""Gradients at a state of a run, looked at closely: noise, and signs of real steps.

Serves the claims of lower gradient variance and of orthogonality. One batch of completions gives
the Gram matrix of single sequences, from which the noise of any advantage scheme follows, at the
same state and on the same completions. What a first-order promise is worth is counted beside it.
"""

import argparse
import math
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from bbkit import CannotRun, InputError, config, exit_code
from bbkit.machine import files, hub

OURS = "capability + dual_cone"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code and prints one line for a known error."""
    p = argparse.ArgumentParser(
        prog="python -m bbkit.probe", description="Gradient noise and first-order promises."
    )
    p.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    p.add_argument("--stage", default="sft", choices=("sft", "grpo"), help="whose adapter")
    p.add_argument("--prompts", type=int, default=64, help="groups of completions")
    p.add_argument("--steps", type=int, default=0, help="count signs of real steps, per metric")
    p.add_argument("--seed", type=int, default=1000, help="of the draw of prompts and completions")
    p.add_argument("--data-dir", type=Path, metavar="DIR", help="as for bbkit.train")
    p.add_argument("--offline", action="store_true", help="as for bbkit.train")
    p.add_argument("--out", type=Path, metavar="FILE", help="JSON with every figure")
    args = p.parse_args(argv)
    return exit_code(lambda: _main(args))


def _main(args: argparse.Namespace) -> int:
    from bbkit.capability import METRICS

    if not (args.run / "run.json").exists():
        raise InputError(f"{args.run}: no run.json; name the folder of a run")
    stored = config.from_dict(files.read_json(args.run / "run.json")["settings"], str(args.run))
    group, size = stored.grpo.generations, stored.grpo.micro_batch_size
    if args.prompts < 4 or args.prompts * group % size:
        wanted = f"4 or more, and {group} times it a multiple of {size}"
        raise InputError(f"--prompts {args.prompts}: {wanted}")
    hub.go_private(args.offline or stored.model.name == "pocket")
    found: dict[str, Any] = {"run": str(args.run), "stage": args.stage, "prompts": args.prompts}
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_at(args, Path(folder), {"steps": 1, "prompts": args.prompts})
        found["noise"] = noise(trainer, samples(trainer))
        print("| noise to signal of one group | all | low entropy | high entropy | / grpo |")
        print("|---|---|---|---|---|")
        for scheme, row in found["noise"].items():
            cells = [f"{row[part]:.1f}" for part in ("all", "low", "high")]
            low, high = row["interval"]
            cells.append(f"{row['ratio']:.2f} [{low:.2f}, {high:.2f}]")
            print(f"| {scheme} | " + " | ".join(cells) + " |")
        for metric in METRICS if args.steps else ():
            changed = {"steps": args.steps, "metric": metric}
            counted = opposed(trainer_at(args, Path(folder), changed))
            found[f"opposed_{metric}"] = counted
            told = (
                f"{k} {v['share']:.0%} of {v['n']} (mean cosine {v['cosine']:+.3f})"
                for k, v in counted.items()
            )
            print(f"{metric} metric, steps that raise a loss to first order: {', '.join(told)}")
    if args.out:
        files.write_json(args.out, found)
    return 0


def trainer_at(args: argparse.Namespace, folder: Path, changed: Mapping[str, Any]):
    """The kit's trainer at the adapter of a stage, before its first step.

    Capability-aware advantages and dual cone; `changed` are other settings of `grpo`.
    """
    import torch

    from bbkit import grpo, models, train

    values = files.read_json(args.run / "run.json")["settings"]
    values["grpo"] |= {
        "advantages": "capability", "combination": "dual_cone", "beta": 0.0,
        "updates_per_generation": 1, "save_steps": 10**9, "optimizer": "adamw_torch",
        "max_grad_norm": 0.0,
    } | dict(changed)  # fmt: skip
    values["retention"] = {"rule": "none"}
    values["run"]["seed"] = args.seed
    settings = config.from_dict(values, str(args.run))
    section = settings.grpo
    rows = train.load_rows(settings, args.data_dir)
    torch.set_num_threads(settings.run.threads or torch.get_num_threads())
    model, tokenizer = models.load(settings.model, offline=args.offline)
    asked, general = ([rows["grpo"][i] for i in part] for part in train.axes(rows["grpo"]))
    model = models.load_adapter(model, args.run / args.stage / "adapter")
    order = grpo.schedule(
        asked, general, section.steps, section.prompts, section.instruction_share, args.seed
    )
    return grpo.build(model, tokenizer, order, settings, folder)


def samples(trainer) -> list[dict[str, Any]]:
    """Completions for all prompts of the trainer, scored: TRL's inputs of a loss, by micro-batch.

    All their raw rewards (N, K) are the trainer's `raw_rewards` then.
    """
    import torch

    trainer.model.train()
    torch.manual_seed(trainer.args.seed)
    rows = [row for row in trainer.train_dataset for _ in range(trainer.num_generations)]
    size, batches, seen = trainer.args.train_batch_size, [], []
    for start in range(0, len(rows), size):
        inputs = trainer._generate_and_score_completions(rows[start : start + size])
        batches.append({k: v for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.dim()})
        seen.append(trainer.raw_rewards)
    trainer.raw_rewards = torch.cat(seen)
    return batches


def terms(trainer, inputs: Mapping[str, Any]):
    """Loss terms at unit advantage (N,) up to one factor for all, and mean entropies (N,)."""
    import torch

    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    kept = inputs["completion_mask"].to(trainer.model.device)
    logps, entropy, *_ = trainer._get_per_token_logps_and_entropies(
        trainer.model, ids, mask, kept.shape[1], compute_entropy=True
    )
    length = kept.sum(1).clamp(min=1)
    total = -(logps * kept).sum(1)
    terms = total / length if trainer.loss_type == "grpo" else total
    return terms, (entropy.detach() * kept).sum(1) / length


def noise(trainer, batches: Sequence[Mapping[str, Any]]) -> dict[str, dict]:
    """Noise to signal of each advantage scheme on the same completions, split by entropy.

    `ratio` is to GRPO's, with its 95 % jackknife interval over the groups; `low` and `high` are the
    halves of the groups by mean token entropy. NaN where a batch shows no signal beyond its noise.
    Raises CannotRun where the gradients of single sequences do not fit into memory.
    """
    import torch

    from bbkit import combination, gradients, weighting
    from bbkit.machine import memory

    count, group = sum(len(part["completion_ids"]) for part in batches), trainer.num_generations
    width = sum(p.numel() for p in trainer.capture.parameters.values())
    device = next(trainer.model.parameters()).device
    if 4 * count * width > memory.free_bytes(device) / 2:  # their parts, and all of them joined
        raise CannotRun(f"{count} gradients of {width:,} numbers do not fit; fewer --prompts")
    entropies, rows = [], []
    for part in batches:
        single = torch.eye(len(part["completion_ids"]))
        with gradients.capability_gradients(trainer.model, single) as capture:
            losses, entropy = terms(trainer, part)
            losses.sum().backward()
        entropies.append(entropy.cpu())
        rows.append(capture.gradients)
    gram = combination.gramian(torch.cat(rows))
    weights = trainer.controller.weights
    wanted = torch.tensor(weights, dtype=torch.float64)
    parts, summed = {}, {}
    for scheme in weighting.SCHEMES:
        columns = weighting.advantages(trainer.raw_rewards, group, weights, scheme).cpu()
        parts[scheme] = group_gram(gram, columns, group)
        summed[scheme] = torch.einsum("k,bckl,l->bc", wanted, parts[scheme], wanted)

    def of(scheme, groups):
        if scheme != OURS:
            return noise_to_signal(summed[scheme][groups][:, groups])
        some = parts["capability"][groups][:, groups]
        found = combination.combine(some.sum((0, 1)), "dual_cone", weights)  # of the same groups
        return noise_to_signal(torch.einsum("k,bckl,l->bc", found, some, found))

    def logged(scheme, groups):
        ratio = of(scheme, groups) / of("grpo", groups)
        return math.log(ratio) if ratio > 0 else math.nan

    by_group = torch.cat(entropies).view(-1, group).mean(1)
    every, upper = torch.arange(len(by_group)), by_group > by_group.median()
    out = {}
    for scheme in (*summed, OURS):
        low, high = _jackknife(partial(logged, scheme), every)
        out[scheme] = {
            "all": of(scheme, every), "low": of(scheme, every[~upper]),
            "high": of(scheme, every[upper]), "ratio": math.exp(logged(scheme, every)),
            "interval": [math.exp(low), math.exp(high)],
        }  # fmt: skip
    return out


def group_gram(gram: Any, advantages: Any, group: int) -> Any:
    """(B, B, K, K) inner products of the parts that B groups, of `group` rows, have in K gradients.

    `gram` (N, N) is that of single sequences, captured with advantages `torch.eye(N)`.
    """
    count, columns = len(gram) // group, advantages.to(gram).unflatten(0, (-1, group))
    single = gram.view(count, group, count, group)
    import torch

    return torch.einsum("bik,bicj,cjl->bckl", columns, single, columns)


def noise_to_signal(parts: Any) -> float:
    """tr Cov of a group's part in the gradient over |the mean part|², from their Gramian (B, B).

    |mean|² is the mean product of two different groups, free of noise; NaN where not above 0.

    >>> import torch
    >>> noise_to_signal(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    1.0
    """
    own = parts.diagonal().sum()
    signal = (parts.sum() - own) / (len(parts) * (len(parts) - 1))
    return ((own / len(parts) - signal) / signal).item() if signal > 0 else math.nan


def _jackknife(statistic, groups) -> tuple[float, float]:
    """95 % interval of a statistic of a tensor of groups, by leaving out one after the other."""
    import torch

    count = len(groups)
    left = [statistic(torch.cat([groups[:i], groups[i + 1 :]])) for i in range(count)]
    mean = sum(left) / count
    error = math.sqrt((count - 1) / count * sum((x - mean) ** 2 for x in left))
    return statistic(groups) - 1.96 * error, statistic(groups) + 1.96 * error


def opposed(trainer) -> dict[str, dict[str, float]]:
    """Train, and count along the steps that were really taken, momentum and all, how often each
    loss rises to first order: ⟨g_k, Δθ⟩ > 0. `cosine` is the mean one of g_k and −Δθ.

    "…, next batch": the same step by the gradient that the following one finds, where it begins, on
    completions that no combination has seen.
    """
    import torch
    from transformers import PrinterCallback, TrainerCallback

    seen: dict[str, list[float]] = {}

    class Count(TrainerCallback):
        last = None  # the step before

        def on_pre_optimizer_step(self, *_, **__):
            self.before = flat()

        def on_step_end(self, *_, **__):
            moves = {"": flat() - self.before, ", next batch": self.last}
            for (name, row), (batch, move) in product(trainer.observed.items(), moves.items()):
                # no step is before the first, and a warm-up's first is of length 0
                if move is not None and row.norm() > 0 and move.norm() > 0:
                    cosine = (row @ move) / (row.norm() * move.norm())
                    seen.setdefault(name + batch, []).append(cosine.item())
            self.last = moves[""]

    def flat():
        return torch.nn.utils.parameters_to_vector(trainer.capture.parameters.values()).detach()

    trainer.observed = {}
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Count())
    trainer.train()
    return {
        name: {"share": fmean(c > 1e-6 for c in some), "cosine": -fmean(some), "n": len(some)}
        for name, some in seen.items()
    }
