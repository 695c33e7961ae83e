"""Why the decisive study came out as it did: what arms score, and what their steps did.

Serves the claims on orthogonality and on the tax. Values are of seeds, with Student's 95 % interval
over them as in `bbkit.study.verdicts`; shares of steps are over all seeds of an arm.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bbkit.runs import elsewhere, report, statistics
from bbkit.study import effects, verdicts

REGIMES = tuple(verdicts.FAMILIES)[:5]  # the last two: rewards that conflict
SCORES = {"domain": "domain, %", "domain_lenient": "domain, leniently, %", "general": "general, %",
          "area": "area, %", "brevity": "brevity, %"}  # fmt: skip
SMALL = 0.01  # of a cosine, of a coefficient by its weight, of a slope by the step's largest
DEAD = 1e-3  # of the longest gradient
KEPT = "retention/slope_kept"  # how the step that is taken changes the kept KL, to first order


def arms_of(kept: Mapping[str, Any], regime: str) -> list[str]:
    """The arms of a regime that a record has, in the order in which they ran.

    >>> runs = {"sft-0": {"scores": {"sft": {}}}, "grpo-0": {"scores": {"grpo": {}}}}
    >>> arms_of({"runs": runs}, "the whole method")
    ['grpo']
    """
    known = {name.rpartition("-")[0]: run["scores"] for name, run in kept["runs"].items()}

    def of(arm: str) -> str:
        if "grpo" not in known[arm]:
            return REGIMES[0]
        return REGIMES[{"alone": 1, "conflict": 3, "mild": 4}.get(arm.partition("_")[0], 2)]

    return [arm for arm in known if of(arm) == regime]


def scores(kept: Mapping[str, Any], regime: str) -> str:
    """What the arms of a regime score as Markdown, the base first: in %, then in nats a token.

    Of each kind of text elsewhere the KL to the base along it; of the worst the loss above it too.
    """
    shown, lines = ("base", *arms_of(kept, regime)), []
    found = effects.by_arm(kept, shown)
    seen = {arm: [*verdicts.values(found, arm).values()] for arm in shown}
    kinds = elsewhere.by_kind(seen["base"][0])["elsewhere_kl"]
    asked = [name for name in SCORES if any(name in some[0] for some in seen.values())]
    for arm, some in seen.items():
        mean = {k: statistics.over_seeds([one[k] for one in some]) for k in some[0]}
        cells = [report.cell(mean[name]) if name in mean else "" for name in asked]
        worst = mean["elsewhere"]
        cells.append(report.nats(worst) if worst["interval"] else f"{worst['value']:.3f}")
        names = (*kinds.values(), *effects.KL)
        cells += [f"{mean[name]['value']:.3f}" if name in mean else "" for name in names]
        lines.append([arm, str(len(some)), *cells])
    heads = ["arm", "seeds", *(SCORES[name] for name in asked), "worst kind: loss, nats"]
    heads += [f"KL on texts: {kind}" for kind in kinds]
    heads += [name.replace("KL,", "KL on replies:") for name in effects.KL.values()]
    return report.markdown(heads, lines)


def steps(kept: Mapping[str, Any]) -> str:
    """What the steps of each arm with GRPO or a limit did, as Markdown; empty where not logged.

    In % of steps: two rewards' gradients oppose one another; the weighted sum opposes a reward; the
    combination changed a weight; the step that was made, with momentum and Adam's moments, raised a
    reward's loss, and the KL along the kept replies; and both after what was cut away from it. The
    last is by how much the step that was taken raised that KL in the mean, to first order.
    """
    lines = []
    for regime in REGIMES:
        for arm in arms_of(kept, regime):
            logs = [run["log"] for n, run in kept["runs"].items() if n.rpartition("-")[0] == arm]
            rows = [row for log in logs for row in by_step(log)]
            told = [share(rows, asks) for asks in ASKED.values()]
            if any(told):
                cosines = [c for row in rows for c in cosines_of(row).values()]
                mean = f"{sum(cosines) / len(cosines):.2f}" if cosines else ""
                rises = [row[KEPT] for row in rows if KEPT in row]
                mean_rise = f"{1000 * sum(rises) / len(rises):+.1f}" if rises else ""
                lines.append([arm, str(len(rows)), mean, *told, most_opposed(rows), mean_rise])
    heads = ["arm", "steps", "mean cosine", *ASKED, "the sum opposes most often, % of steps",
             "mean rise of kept KL, 0.001 nats"]  # fmt: skip
    return report.markdown(heads, lines)


def by_step(log: Mapping[str, Sequence[Any]]) -> list[dict[str, float]]:
    """What was logged, step by step, without what was not known.

    >>> by_step({"a": [1, None], "b": [2, 3]})
    [{'a': 1, 'b': 2}, {'b': 3}]
    """
    count = max(map(len, log.values()), default=0)
    return [
        {k: v[i] for k, v in log.items() if i < len(v) and v[i] is not None} for i in range(count)
    ]


def share(rows: Sequence[Mapping], asks: Callable[[Mapping], bool | list | None]) -> str:
    """In how many per cent of the steps of which it is known something holds; "" of none."""
    known = [bool(found) for found in map(asks, rows) if found is not None]
    return f"{100 * sum(known) / len(known):.0f}" if known else ""


def most_opposed(rows: Sequence[Mapping]) -> str:
    """The reward that the sum goes against most often, and in how many per cent of the steps."""
    counts = Counter(name for row in rows for name in opposed(row) or ())
    return "".join(f"{name}, {100 * n / len(rows):.0f}" for name, n in counts.most_common(1))


def sizes(row: Mapping[str, float]) -> dict[str, float]:
    """The length of each reward's gradient by its weight, of a step that logged cosines.

    Without those under DEAD of the longest: a reward that every reply earns has a gradient of
    rounding errors, which opposes the others every second step.

    >>> row = {"cosine/a/b": -0.5, "weight/a": 0.9, "weight/b": 0.1}
    >>> sizes(row | {"gradient_norm/a": 1.0, "gradient_norm/b": 1e-6})
    {'a': 0.9}
    """
    names = {n for k in row if k.startswith("cosine/") for n in k.split("/")[1:]}
    norms = {n: row[f"gradient_norm/{n}"] for n in sorted(names)}
    alive = (n for n, norm in norms.items() if norm > DEAD * max(norms.values()))
    return {n: norms[n] * row[f"weight/{n}"] for n in alive}


def cosines_of(row: Mapping[str, float]) -> dict[tuple[str, str], float]:
    """The cosine of each two rewards' gradients of a step, neither of them dead."""
    alive = sizes(row).keys()
    parts = ((k.split("/"), v) for k, v in row.items())
    return {(k[1], k[2]): v for k, v in parts if k[0] == "cosine" and alive >= {k[1], k[2]}}


def oppose(row: Mapping[str, float]) -> bool | None:
    """Whether two rewards' gradients have a negative inner product."""
    return any(c < -SMALL for c in cosines_of(row).values()) if sizes(row) else None


def opposed(row: Mapping[str, float]) -> list[str] | None:
    """The rewards whose gradients the sum by their weights goes against.

    >>> row = {"cosine/a/b": -0.5, "weight/a": 0.9, "weight/b": 0.1}
    >>> opposed(row | {"gradient_norm/a": 1.0, "gradient_norm/b": 1.0})
    ['b']
    """
    size = sizes(row)
    total = dict(size)  # of each, the sum's part along it
    for (a, b), cosine in cosines_of(row).items():
        total[a] += size[b] * cosine
        total[b] += size[a] * cosine
    least = -SMALL * max(size.values(), default=0.0)
    return [n for n, part in total.items() if part < least] if size else None


def changed(row: Mapping[str, float]) -> bool | None:
    """Whether a gradient entered by another coefficient than its weight, rounding apart.

    >>> changed({"weight/a": 0.5, "coefficient/a": 0.6}), changed({"weight/a": 0.5})
    (True, None)
    """
    names = [k.partition("/")[2] for k in row if k.startswith("coefficient/")]
    pairs = [(row[f"coefficient/{n}"], row[f"weight/{n}"]) for n in names if f"weight/{n}" in row]
    return any(abs(c - w) > 2 * SMALL * w for c, w in pairs) if pairs else None


def raised(prefix: str, end: str) -> Callable[[Mapping[str, float]], bool | None]:
    """Whether the step raises a loss to first order: slopes that begin and end so, rounding apart.

    >>> row = {"step/a/slope": 0.5, "step/a/slope_kept": 1e-8}
    >>> raised("step/", "/slope")(row), raised("step/", "/slope_kept")(row)
    (True, False)
    """

    def asks(row: Mapping[str, float]) -> bool | None:
        known = {k: v for k, v in row.items() if k.startswith(prefix) and "/slope" in k}
        found = [v for k, v in known.items() if k.endswith(end)]
        return any(v > SMALL * max(map(abs, known.values())) for v in found) if found else None

    return asks


ASKED: dict[str, Callable[[Mapping], bool | list | None]] = {
    "two rewards oppose, % of steps": oppose,
    "the sum opposes one": opposed,
    "combination changed a weight": changed,
    "a reward's loss rises, Adam's step": raised("step/", "/slope"),
    "the same, step taken": raised("step/", "/slope_kept"),
    "kept KL rises, Adam's step": raised("retention/", "/slope"),
    "kept KL rises, step taken": raised("retention/", "/slope_kept"),
}
