"""What the decisive study may say: contrasts in families, and a verdict of four kinds on each.

Serves every claim. Committed, with `bbkit.study.arms.DECISIVE`, before the first run of the study.
The unit is a training seed: an arm minus another on the same seed and the same test prompts, by
Student's test over seeds (the bootstrap over seeds and prompts as well covers 90 to 100 % here,
not 95: `bbkit.study.simulation`). In each family p-values are adjusted by Holm, once for a
difference and once for there being none of MARGIN (two one-sided tests, Schuirmann 1987).
"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from bbkit.runs import elsewhere, report, statistics
from bbkit.study import effects
from bbkit.study.recorded import Rows

MARGIN = 0.03  # of accuracy, instructions or their product: less is no difference that matters
NATS = 0.1  # a token of the worst kind of text elsewhere: less above the base's is no loss
LEVEL = 0.05  # of each family
MOST = 200  # seeds that nobody will run


class Contrast(NamedTuple):
    """Arm `after` minus arm `before` in a measure, and what it is asked for."""

    asks: str
    before: str
    after: str
    measure: str = "area"


KEPT, MADE = "penalty_weight_1", "KL penalty on the base's broad replies"
BOTH = f"{KEPT}_replay_half"  # and such replies as half of the rows
FAMILIES: dict[str, tuple[Contrast, ...]] = {
    "SFT": (
        Contrast("SFT costs instruction following", "base", "sft", "general"),
        Contrast(f"{MADE}: better than nothing", "sft", KEPT),
        Contrast("a budget on the step: better than nothing", "sft", "step"),
        Contrast("the penalty against weight averaging", "averaging", KEPT),
        Contrast("the penalty against replayed replies", "replay", KEPT),
        Contrast("the penalty against the cone of gradients", "cone", KEPT),
        Contrast("the penalty against the budget on the step", "step", KEPT),
        Contrast("broad replies against replies to instructions, elsewhere",
                 f"{KEPT}_instructions", KEPT, "elsewhere"),
    ),
    "GRPO on domain questions alone": (
        Contrast("SFT and then such GRPO cost instruction following", "base", "alone", "general"),
        Contrast(f"{MADE}: better than nothing", "alone", f"alone_{KEPT}"),
        Contrast("a budget on the step: better than nothing", "alone", "alone_step"),
        Contrast("the full method: better than nothing", "alone", "alone_full"),
        Contrast("the method's rewards and cone beside the budget", "alone_step", "alone_full"),
        Contrast("the penalty, in SFT too, against TRL's own KL", "alone_kl", f"alone_{KEPT}"),
        Contrast("the penalty against the budget on the step", "alone_step", f"alone_{KEPT}"),
    ),
    "the whole method": (
        Contrast("GRPO with instructions gives back some of what SFT cost", "sft", "grpo",
                 "general"),
        Contrast("the full method against plain GRPO", "grpo", "full"),
        Contrast("the full method against GDPO", "gdpo", "full"),
        Contrast("dynamic weights against static ones", "static", "dynamic"),
        Contrast("orthogonal gradients", "dynamic", "orthogonal"),
        Contrast("orthogonal steps", "dynamic", "orthogonal_step"),
        Contrast("the full method against plain GRPO beside the same budget", "grpo_step", "full"),
        Contrast("the penalty beside plain GRPO", "grpo", f"grpo_{KEPT}"),
        Contrast("the full method against plain GRPO with it", f"grpo_{KEPT}", "full"),
    ),
    "rewards that conflict": (
        Contrast("their sum costs what SFT taught", "sft", "conflict"),
        Contrast("orthogonal gradients", "conflict", "conflict_orthogonal"),
        Contrast("orthogonal steps", "conflict", "conflict_orthogonal_step"),
        Contrast("orthogonal steps against orthogonal gradients",
                 "conflict_orthogonal", "conflict_orthogonal_step"),
    ),
    "rewards that conflict mildly": (
        Contrast("their sum costs what SFT taught", "sft", "mild"),
        Contrast("orthogonal gradients", "mild", "mild_orthogonal"),
        Contrast("orthogonal steps", "mild", "mild_orthogonal_step"),
    ),
    "SFT, both ways at once": (
        Contrast("better than nothing", "sft", BOTH),
        Contrast("against the penalty", KEPT, BOTH),
        Contrast("against replayed replies", "replay_half", BOTH),
    ),
}  # fmt: skip
TITLE = {  # the contrasts that answer the paper's title: README's table
    ("base", "sft"), ("sft", KEPT), ("alone", f"alone_{KEPT}"), ("sft", "grpo"),
    ("static", "dynamic"), ("dynamic", "orthogonal"), ("grpo_step", "full"),
    ("mild", "mild_orthogonal_step"),
}  # fmt: skip
# Arms that claim no tax: general no more than MARGIN below the base's, and the worst kind elsewhere
# no more than NATS above it; both must hold, so that each is tested at LEVEL. Families: the second
# was added when the verdicts on SFT were known.
UNTAXED = (
    ("step", KEPT, "grpo", "alone_step", f"alone_{KEPT}", "alone_full", "full", f"grpo_{KEPT}"),
    (BOTH,),
)


def values(found: Mapping[str, Mapping[int, Rows]], arm: str) -> dict[int, dict[str, float]]:
    """Each seed's value of every measure: `area` is lenient domain x general, a hypervolume.

    `base` is the untrained model, beside which nothing is lost elsewhere. `area_by_tag` takes the
    answer tag of a reply for its answer, where it has one: `area` of the study's runs was read in
    the whole reply, also where its tag said something else.
    """
    known = {}
    for seed, stages in found.get("sft" if arm == "base" else arm, {}).items():
        run = stages["base"] if arm == "base" else effects.last(stages)
        seen = {name: float(drawn[0]) for name, drawn in effects.draws([run], 0).items()}
        seen["area"] = seen["domain_lenient"] * seen["general"]
        seen["area_by_tag"] = fmean(by_tag(run)) * seen["general"]
        known[seed] = seen | (dict.fromkeys(elsewhere.WORST, 0.0) if arm == "base" else {})
    return known


def by_tag(run: Sequence[Mapping[str, Any]]) -> list[float]:
    """Of each question in item rows the strict score where its reply has an answer tag, else the
    lenient one.

    >>> by_tag([{"scores": {"domain": 0, "domain_lenient": 1, "format": f}} for f in (0, 1)])
    [1, 0]
    """
    asked = [row["scores"] for row in run if "domain_lenient" in row["scores"]]
    tagged = (bool(s.get("format")) or not s.get("unparsed", 1) for s in asked)
    return [s["domain" if t else "domain_lenient"] for s, t in zip(asked, tagged, strict=True)]


def differences(
    found: Mapping[str, Mapping[int, Rows]], before: str, after: str, measure: str
) -> list[float]:
    """`after` minus `before` on each seed that both have, in the order of the seeds."""
    return _between(values(found, before), values(found, after), measure)


def _between(one: Mapping[int, Any], other: Mapping[int, Any], measure: str) -> list[float]:
    return [other[s][measure] - one[s][measure] for s in sorted(one.keys() & other.keys())]


def paired(some: Sequence[float], margin: float = MARGIN) -> dict[str, Any]:
    """Student's test of paired differences: their mean, its 95 % interval, and p-values.

    `p` is two-sided for a difference, `p_below` one-sided for less than `margin`, `p_none` the
    larger of two such for less than `margin` either way. ValueError: fewer than two differences.

    >>> found = paired([0.05, 0.06, 0.055, 0.052])
    >>> found["p"] < 0.001, found["p_none"] > 0.99
    (True, True)
    """
    from scipy import stats

    if len(some) < 2:
        raise ValueError(f"{len(some)} differences; Student's test needs two")
    seen, spread = statistics.over_seeds(some), max(float(np.std(some, ddof=1)), 1e-9)
    mean, free, error = seen["value"], seen["n"] - 1, spread / seen["n"] ** 0.5
    return seen | {
        "spread": spread, "margin": margin,
        "p": float(2 * stats.t.sf(abs(mean) / error, free)),
        "p_below": float(stats.t.sf((margin - mean) / error, free)),
        "p_none": float(stats.t.sf((margin - abs(mean)) / error, free)),
    }  # fmt: skip


def needed(found: Mapping[str, Any], level: float = LEVEL) -> str:
    """How many seeds would decide it at `level`, were the difference and its spread as found.

    >>> needed({"value": 0.01, "spread": 0.05, "margin": 0.03})
    '19'
    """
    from scipy import stats

    counts = np.arange(2, MOST + 1)
    error, mean = found["spread"] / counts**0.5, abs(found["value"])
    apart = mean > stats.t.ppf(1 - level / 2, counts - 1) * error
    none = mean + stats.t.ppf(1 - level, counts - 1) * error < found["margin"]
    enough = counts[apart | none]
    return str(enough[0]) if len(enough) else f"over {MOST}"


def verdict(found: Mapping[str, Any], p: float, p_none: float, lower: bool = False) -> str:
    """better, worse, no difference, or undecided; `lower`: less is better.

    `p` and `p_none` are those of `found` adjusted by the family.

    >>> verdict({"value": 0.01, "margin": 0.03}, 0.4, 0.01)
    'no difference of 3 points'
    """
    unit = f"{found['margin']:g} nats" if lower else f"{100 * found['margin']:.0f} points"
    if p < LEVEL:
        said = "better" if (found["value"] > 0) != lower else "worse"
        return f"{said}, by less than {unit}" if p_none < LEVEL else said
    return f"no difference of {unit}" if p_none < LEVEL else "undecided"


def holm(seen: Sequence[Mapping[str, Any] | None], name: str) -> list[float]:
    """A p-value of each contrast of a family, adjusted; one that has not run counts as p = 1."""
    return list(statistics.holm({i: s[name] if s else 1.0 for i, s in enumerate(seen)}).values())


def judged(found: Mapping[str, Mapping[int, Rows]], family: str) -> list[tuple]:
    """Each contrast of a family with what `paired` gives, None before two seeds of it have run, its
    adjusted p-value and its verdict."""
    asked, seen = FAMILIES[family], []
    known = {arm: values(found, arm) for c in asked for arm in (c.before, c.after)}
    for contrast in asked:
        some = _between(known[contrast.before], known[contrast.after], contrast.measure)
        margin = NATS if contrast.measure == "elsewhere" else MARGIN
        seen.append(paired(some, margin) if len(some) > 1 else None)
        if seen[-1] and contrast.measure == "area":
            some = _between(known[contrast.before], known[contrast.after], "area_by_tag")
            seen[-1]["by_tag"] = paired(some)
    rows = []
    for c, s, p, p_none in zip(asked, seen, holm(seen, "p"), holm(seen, "p_none"), strict=True):
        said = verdict(s, p, p_none, c.measure == "elsewhere") if s else "not run"
        if s and not any(v[c.measure] for a in c[1:3] for v in known[a].values()):
            said = "none to see: both are 0"  # a floor, and no equivalence
        if s and said == "undecided":
            said += f"; takes about {needed(s, LEVEL / len(asked))} seeds"
        rows.append((c, s, p, said))
    return rows


def _p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


HEADS = ("compared", "effect", "seeds", "p (Holm)", "verdict", "by the tag")


def lines(kept: Mapping[str, Any], family: str) -> list[list[str]]:
    """What is asked, of which arms, by how much, on how many seeds: a line a contrast."""
    found, asked = [], {arm for c in FAMILIES[family] for arm in (c.before, c.after)}
    for contrast, seen, p, said in judged(effects.by_arm(kept, asked), family):
        cells, by_tag = ["", "", ""], ""
        if seen:
            show = report.nats if contrast.measure == "elsewhere" else report.change_cell
            told = show(seen).strip("*")  # bold is what the whole family allows
            cells = [f"**{told}**" if p < LEVEL else told, str(seen["n"]), _p(p)]
        if seen and "by_tag" in seen:
            by_tag = report.change_cell(seen["by_tag"]).strip("*")
        compared = f"{contrast.measure}: {contrast.after} − {contrast.before}"
        found.append([contrast.asks, compared, *cells, said, by_tag])
    return found


def table(kept: Mapping[str, Any], family: str) -> str:
    """A family as Markdown; last, of contrasts in the area, their effect by the answer tag."""
    return report.markdown(["asked", *HEADS], lines(kept, family))


def title(kept: Mapping[str, Any]) -> str:
    """The contrasts of TITLE as Markdown, each judged in its family."""
    chosen = [
        [family, *line[:-1]]
        for family, asked in FAMILIES.items()
        for c, line in zip(asked, lines(kept, family), strict=True)
        if (c.before, c.after) in TITLE
    ]
    return report.markdown(["after", "asked", *HEADS[:-1]], chosen)


def untaxed(kept: Mapping[str, Any]) -> str:
    """The arms that claim no tax as Markdown: how far each is from the base, and what holds.

    "taxed" is an arm of which one interval of its own, not adjusted, lies beyond its margin.
    """
    found = effects.by_arm(kept, [arm for some in UNTAXED for arm in some])
    rows = [row for arms in UNTAXED for row in _untaxed(found, arms)]
    heads = ["arm", "general − base's", "worst kind elsewhere, nats", "seeds", "p of no tax (Holm)"]
    return report.markdown([*heads, "verdict"], rows)


def _untaxed(found: Mapping[str, Mapping[int, Rows]], arms: Sequence[str]) -> list[list[str]]:
    seen: list[Any] = []
    base = values(found, "base")
    for arm in arms:
        own = values(found, arm)
        lost, worst = _between(own, base, "general"), _between(base, own, "elsewhere")
        seen.append({"lost": paired(lost), "worst": paired(worst, NATS)} if len(lost) > 1 else None)
    for both in filter(None, seen):
        both["p"] = max(both["lost"]["p_below"], both["worst"]["p_below"])
    rows = []
    for arm, both, p in zip(arms, seen, holm(seen, "p"), strict=True):
        if not both:
            rows.append([arm, *[""] * 4, "not run"])
            continue
        lost, worst = both["lost"], both["worst"]
        taxed = any(one["interval"][0] > one["margin"] for one in (lost, worst))
        said = "no tax" if p < LEVEL else "taxed" if taxed else "undecided"
        cells = [report.change_cell(lost, -1).strip("*"), report.nats(worst), str(lost["n"]), _p(p)]
        rows.append([arm, *cells, said])
    return rows


def page(kept: Mapping[str, Any]) -> str:
    """What the command prints of the decisive study: its families, and the arms without tax."""
    parts = [f"{family}:\n{table(kept, family)}" for family in FAMILIES]
    return "\n\n".join([*parts, f"no tax:\n{untaxed(kept)}"])
