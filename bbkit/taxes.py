"""What ways of paying less alignment tax score: the table of two regimes, their fronts and knobs.

Serves the claim of no alignment tax, which here means two things at once: instructions of unseen
kinds followed as by the base, and nothing lost on texts that no reward and no reply looks at
(bbkit.elsewhere). Made from a record of bbkit.study, like all tables (bbkit.comparison).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bbkit import effects, elsewhere, report
from bbkit.plots import captioned, color, new_figure, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = {"domain": "domain", "domain_lenient": "leniently", "general": "general"}
# A knob's arms are those whose names end in its value; beside it the value of the arm they change.
KNOBS = {"weight": ("penalty", 0.2), "budget": ("step", 0.01), "replies": ("penalty", 512)}
COLORS = "000000 0072B2 D55E00 009E73 CC79A7 E69F00 56B4E9 882255 44AA99 999933 777777".split()
MARKERS = "osD^vP*Xph<>d"  # as many pairs with COLORS as the product: no two arms look alike
MEASURED = (("general", 100), ("elsewhere", 1))  # in per cent, and in nats


def models(kept: Mapping[str, Any], regime: str) -> dict[str, tuple[effects.Draws, int]]:
    """Draws and number of seeds of a regime's last models, "sft" or "grpo" (alone); base first."""
    found = {}
    for arm, rows in effects.models(effects.arms(kept)).items():
        alone = arm == "alone" or arm.startswith("alone_")
        if arm == "base" or alone == (regime == "grpo"):
            found[arm] = (effects.draws(rows), len(rows))
    return found


def table(kept: Mapping[str, Any], regime: str) -> str:
    """Every arm of a regime as Markdown: %, then nats a token, then seconds a step.

    Of each kind elsewhere: its loss above the base's, and the KL to the base along it.
    """
    known = models(kept, regime)
    by_kind = elsewhere.by_kind(known["base"][0])
    kinds = by_kind["elsewhere"]
    heads = ["%", "seeds", *SHOWN.values(), *(f"{k}: loss, KL" for k in kinds), "worst loss"]
    heads += ["worst KL", *effects.KL.values(), "s a step"]
    lines = []
    for arm, (drawn, seeds) in known.items():
        told = {name: effects.told(values) for name, values in drawn.items()}
        cells = [report.cell(told.get(name)) for name in SHOWN]
        for kind in kinds:
            both = (told[names[kind]]["value"] for names in by_kind.values())
            cells.append(", ".join(f"{value:.3f}" for value in both))
        cells += [report.nats(told.get(name)) for name in elsewhere.WORST]
        cells += [f"{told[name]['value']:.3f}" if name in told else "" for name in effects.KL]
        lines.append([arm, str(seeds), *cells, _seconds(kept, arm)])
    return report.markdown(heads, lines)


def _seconds(kept: Mapping[str, Any], arm: str) -> str:
    took = [run["seconds"] for name, run in kept["runs"].items() if name.rpartition("-")[0] == arm]
    return f"{sum(took) / len(took):.2f}" if took and all(took) else ""


def front(kept: Mapping[str, Any]) -> Figure:
    """Domain accuracy against general, and against the worst kind elsewhere, for both regimes."""
    figure, axes = new_figure(10.2, 8.8, 2, 2, sharey="row")
    joined = False
    found = {regime: models(kept, regime) for regime in ("sft", "grpo")}
    ways = (arm.removeprefix("alone_") for known in found.values() for arm in known)
    order = [way for way in dict.fromkeys(ways) if way != "base" and not _knob(way)]
    for pair, (regime, known) in zip(axes, found.items(), strict=True):
        base = known.pop("base")[0]
        most = max(seeds for _, seeds in known.values())
        for arm, (drawn, seeds) in known.items():
            if _knob(arm):
                continue
            i = order.index(arm.removeprefix("alone_"))
            label = arm if seeds == most else f"{arm} ({seeds} of {most} seeds)"
            shade = {"color": f"#{COLORS[i % len(COLORS)]}"}
            y, *ys = percent(effects.told(drawn["domain_lenient"]))
            for axis, (name, unit) in zip(pair, MEASURED, strict=True):
                told = effects.told(drawn[name])
                x, bounds = unit * told["value"], [unit * v for v in told["interval"]]
                axis.plot(bounds, [y, y], alpha=0.3, lw=1, **shade)
                axis.plot([x, x], ys, alpha=0.3, lw=1, **shade)
                axis.plot(x, y, ls="", marker=MARKERS[i % len(MARKERS)], ms=8, label=label, **shade)
        row = _varied(kept, "" if regime == "sft" else "alone_").get("weight", ())
        joined = joined or bool(row)
        for axis, (name, unit) in zip(pair, MEASURED, strict=True):
            at = [unit * drawn[name][0] for _, drawn in row]
            high = [100 * drawn["domain_lenient"][0] for _, drawn in row]
            axis.plot(at, high, "-", color="#555555", lw=0.8, alpha=0.7)
            for x, y, (value, _) in zip(at, high, row, strict=True):
                axis.annotate(f"{value:g}", (x, y), (3, 3), textcoords="offset points", fontsize=7)
        whole, room = 100 * base["general"][0], 0.1 if regime == "sft" else 0.15
        pair[0].axvspan(whole - 3, whole, color="#009E73", alpha=0.12)
        pair[1].axvspan(0, room, color="#009E73", alpha=0.12)
        pair[1].invert_xaxis()
        said = "after SFT" if regime == "sft" else "after GRPO alone"
        pair[0].set(title=f"{said}: what is asked", ylabel="domain, read leniently (%)")
        pair[0].set(xlabel="general: instructions of unseen kinds (%)")
        pair[1].set(title="what nobody asks", xlabel="elsewhere, worst kind: nats above the base")
        pair[1].legend(fontsize=7.5, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return captioned(
        figure,
        "Up is more domain, right is less tax; lines are 95 % intervals over seeds and prompts. "
        "Green: within 3 points of the base, and within 0.1 nat (0.15 after GRPO) of it in the "
        "worst kind of text. "
        + "Joined, with numbers: other weights of the penalty, fewer seeds. " * joined
        + "Notice what replies to instructions alone protect: the left side, which is asked.",
    )


def _knob(arm: str) -> str:
    """The knob of which an arm is another value, "" for none."""
    way = arm.removeprefix("alone_")
    return next((k for k, (base, _) in KNOBS.items() if way.startswith(f"{base}_{k}_")), "")


def _varied(
    kept: Mapping[str, Any], before: str = ""
) -> dict[str, list[tuple[float, effects.Draws]]]:
    """The values of each knob with what they score, over the seeds that all values have."""
    found, points = effects.arms(kept), {}
    for knob, (way, usual) in KNOBS.items():
        arm = f"{before}{way}"
        names = {usual: arm} | {
            float(name.rpartition("_")[2]): name
            for name in found
            if name.startswith(f"{arm}_{knob}_")
        }
        seeds = set.intersection(*(set(found.get(name, {})) for name in names.values()))
        if len(names) > 1 and seeds:
            points[knob] = [
                (v, effects.draws([effects.last(found[names[v]][s]) for s in sorted(seeds)], 0))
                for v in sorted(names)
            ]
    return points


def knobs(kept: Mapping[str, Any]) -> Figure | None:
    """General, the worst kind elsewhere and lenient domain over each knob of retention."""
    points = _varied(kept)
    if not points:
        return None
    base = models(kept, "sft")["base"][0]
    figure, axes = new_figure(9.6, 6.0, 2, len(points), sharex="col", sharey="row", squeeze=False)
    for (above, below), (knob, row) in zip(axes.T, points.items(), strict=True):
        at = [value for value, _ in row]
        for name, label in (("general", "general"), ("domain_lenient", "domain, leniently")):
            share = [100 * drawn[name][0] for _, drawn in row]
            shade = color("instruction" if name == "general" else name)
            above.plot(at, share, "o-", color=shade, label=label)
        above.axhline(100 * base["general"][0], color=color("instruction"), ls=":", lw=1)
        for name, style in (("elsewhere", "o-"), ("elsewhere_kl", "s--")):
            nats = [drawn[name][0] for _, drawn in row]
            label = name.replace("_kl", ", KL")
            below.plot(at, nats, style, color=color("retention"), label=label)
        below.axhline(0.1, color="#999999", ls=":", lw=1)
        below.set(xscale="log", xlabel=f"retention.{knob}")
        below.set_xticks(at, [f"{value:g}" for value in at])
        below.set_xticks([], minor=True)
    axes[0, 0].set(ylabel="held out (%)")
    axes[1, 0].set(ylabel="worst kind (nats a token)", ylim=(0, None))
    axes[0, 0].legend(fontsize=8, frameon=False)
    axes[1, 0].legend(fontsize=8, frameon=False)
    return captioned(
        figure,
        "SFT with one knob of the arms penalty (weight 0.2) or step changed at a time. Dotted: the "
        "base's general, and 0.1 nat a token. Notice how wide the plateau of each knob is.",
    )


FIGURES = {"front": front, "knobs": knobs}
