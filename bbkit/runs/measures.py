"""From item rows to measures: values, intervals, paired changes.

Serves every claim. Questions are clustered by disease (the bootstrap resamples diseases, not
questions); general instructions are independent prompts.
"""

from collections.abc import Mapping, Sequence
from itertools import chain

from bbkit.rewards import MEASURES
from bbkit.runs import elsewhere
from bbkit.runs.statistics import interval


def names(rows: Sequence[Mapping]) -> list[str]:
    """Measures of item rows: the kit's, then own rewards; not those of bbkit.runs.elsewhere.

    >>> names([{"task": "short", "scores": {"brevity": 1.0}}])[-1]
    'brevity'
    """
    asked = (row["scores"] for row in rows if row["task"] != "elsewhere")
    return list(dict.fromkeys((*MEASURES, *chain.from_iterable(asked))))


def cluster(item: Mapping) -> str:
    """What the bootstrap draws: a disease with its questions, an abstract, or a prompt by itself.

    MMLU's entity is its subject: six clusters would make no interval.
    """
    alone = item["task"] in ("instruction", "elsewhere") or item["source"] == "mmlu_medical"
    return item["id"] if alone else item["entity"]


def summary(rows: Sequence[Mapping], draws: int = 2000) -> dict[str, dict]:
    """`{measure: {"value", "n", "interval"}}` over item rows; shares in [0, 1].

    Measures of bbkit.runs.elsewhere are nats a token; of each the worst kind, and which this is.
    """
    out: dict[str, dict] = {}
    nats = elsewhere.names(rows)
    for name in (*names(rows), *nats):
        kept = [r for r in rows if r["scores"].get(name) is not None]
        if kept:
            pairs = [(r["scores"][name], cluster(r)) for r in kept]
            out[name] = mean(pairs, draws, shares=name not in nats)
    for measure, kinds in elsewhere.by_kind(nats).items():
        if kinds:
            kind = max(kinds, key=lambda k: out[kinds[k]]["value"])
            out[measure] = {**out[kinds[kind]], "kind": kind}
    return out


def divergences(rows: Mapping[str, Sequence[Mapping]], draws: int = 2000) -> dict[str, dict]:
    """KL to the base where item rows hold it, as {"sft": …, "sft_instruction": …}: nats per token.

    >>> divergences({"base": []})
    {}
    """
    out = {}
    for stage, found in rows.items():
        for name, general in ((stage, False), (f"{stage}_instruction", True)):
            kept = [r for r in found if "kl" in r and (r["task"] == "instruction") == general]
            if kept:
                out[name] = mean([(r["kl"], cluster(r)) for r in kept], draws, shares=False)
    return out


def mean(pairs: Sequence[tuple[float, str]], draws: int, shares: bool) -> dict:
    """A measure from values and their clusters."""
    values, clusters = [value for value, _ in pairs], [drawn for _, drawn in pairs]
    low, high = interval(values, clusters, draws, shares)
    return {"value": sum(values) / len(values), "n": len(values), "interval": [low, high]}


def difference(
    before: Sequence[Mapping], after: Sequence[Mapping], draws: int = 2000
) -> dict[str, dict]:
    """Paired change `after - before` on the same items, with a clustered bootstrap interval."""
    earlier = {(r["source"], r["id"]): r["scores"] for r in before}
    out = {}
    for name in names(after):
        pairs = [
            (now - then, cluster(r))
            for r in after
            if (now := r["scores"].get(name)) is not None
            and (then := earlier.get((r["source"], r["id"]), {}).get(name)) is not None
        ]
        if pairs:
            out[name] = mean(pairs, draws, shares=False)
    return out


def changes(rows: Mapping[str, Sequence[Mapping]], draws: int = 2000) -> dict[str, dict]:
    """`difference` between the stages that there are item rows of, as {"sft-base": ...}.

    >>> changes({"base": [], "sft": []})
    {'sft-base': {}}
    """
    pairs = (("base", "sft"), ("sft", "grpo"), ("base", "grpo"))
    known = [(a, b) for a, b in pairs if {a, b} <= set(rows)]
    return {f"{b}-{a}": difference(rows[a], rows[b], draws) for a, b in known}
