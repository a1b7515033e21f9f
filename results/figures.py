"""The figures of tables.py, from the rows that pooling.py reads."""

from pathlib import Path

import numpy as np

from pooling import ARMS, Numbers, differ, interval, named_by_steps, pool, several_steps
from report import pyplot, save_figure


def draw_training(path: Path, logs: dict) -> None:
    """A figure: the loss of the recogniser over its steps, a line an arm with the set's own, each point the mean of a
    fiftieth of them."""
    figure, axis = pyplot().subplots(figsize=(9, 4.5), layout="constrained")
    for i, (arm, log) in enumerate((a, log) for a, log in logs.items() if "@" not in a):
        parts = np.array_split(log, min(50, len(log)))
        steps, losses = np.array([part[:, :2].mean(0) for part in parts]).T
        axis.plot(steps, losses, f"C{i % 10}{'-' if i < 10 else '--'}", label=arm)
    axis.set(yscale="log", xlabel="steps of the recogniser (the margin, and so the loss, rises over the first fifth)",
             ylabel="training loss (ArcFace)")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(figure, path)


def draw_gain(path: Path, rows: dict, far: str) -> None:
    """A figure: the change of the errors against `real`, a point a row, coloured by fold, and the pooled interval."""
    arms = [a for a in ARMS if a != "real" and any(a == b for _, _, b in rows)]
    height = 0.6 + 0.3 * max(len(arms), 8)
    titles = {"eer": "EER", "miss@1e-2": "1 - TAR@FAR=1e-2", f"miss@{far}": f"1 - TAR@FAR={far}"}
    titles = {m: title for m, title in titles.items() if all(m in row for row in rows.values())}
    figure, axes = pyplot().subplots(1, len(titles), figsize=(3 + 3 * len(titles), height), layout="constrained",
                                     sharey=True)
    for axis, (metric, title) in zip(axes, titles.items()):
        for y, arm in enumerate(arms):
            pairs = sorted((f, s) for f, s, a in rows if a == arm and (f, s, "real") in rows)
            gaps = [100 * (rows[f, s, arm][metric][0] - rows[f, s, "real"][metric][0]) for f, s in pairs]
            axis.scatter(gaps, np.linspace(y + 0.2, y + 0.5, len(gaps)), 12, [f"C{f}" for f, _ in pairs])
            if not pairs:
                continue
            gap = np.subtract(*pool(rows, metric, arm, "real"))
            axis.plot(100 * np.array(interval(gap)), [y, y], "k-", 100 * gap[:1], [y], "ks")
        axis.axvline(0, color="gray", lw=1)
        axis.set(title=title, xlabel="points against real; a dot: one row",
                 yticks=range(len(arms)), yticklabels=[ARMS[a] for a in arms])
    axes[0].invert_yaxis()
    save_figure(figure, path)


def draw_against(path: Path, rows: dict, far: str, places: dict, label: str) -> None:
    """A figure: the change of the errors against `real`, with intervals, over a number that each arm of places has."""
    figure, axes = pyplot().subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, metric, title in zip(axes, ("eer", "miss"), ("EER", f"1 - TAR@FAR={far}")):
        for arm, x in places.items():
            gap = 100 * np.subtract(*pool(rows, metric, arm, "real"))
            axis.plot([x, x], interval(gap), "C0-", [x], gap[:1], "C0s")
            n = sum(a == arm for *_, a in rows)
            axis.annotate(f" {arm}, {n} row{'s' * (n > 1)}", (x, gap[0]))
        axis.margins(x=0.3)
        axis.axhline(0, color="gray", lw=1)
        axis.set(title=title, xlabel=label, ylabel="points against real; below: fewer errors")
    save_figure(figure, path)


def draw_steps(path: Path, rows: dict, own: int) -> bool:
    """A figure over the steps: the EER of the arms run with several, and its difference to real with as many, dotted
    to real with the steps at which it is lowest. Whether there is one: it takes rows with all steps.
    """
    every, real = sorted({k[:2] for k in rows}), named_by_steps(rows, own).get("real", {})
    arms = {a: (names, common) for a, names in several_steps(rows, own).items()
            if (common := [k for k in every if all((*k, name) in rows for name in names.values())])}
    if not arms:
        return False
    means = pool(rows, "eer", *real.values())[:, 0] if real else np.array([np.nan])  # on the rows with all steps
    lowest = [*real][means.argmin()] if len(real) > 1 and not np.isnan(means).any() else None
    if own in real:  # with one number of steps it is a point, to see the others beside
        arms = {"real": ({own: "real"}, sorted(k[:2] for k in rows if k[2] == "real"))} | arms
    ticks = sorted({n for steps, _ in arms.values() for n in steps})
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(9, 4), layout="constrained")
    for i, (arm, (steps, common)) in enumerate(arms.items()):
        left.plot([*steps], [100 * np.mean([rows[*k, name]["eer"][0] for k in common]) for name in steps.values()],
                  f"C{i}s-", label=ARMS[arm])
        for key in every:  # a faint line a row, from which one may be missing
            x = [n for n, name in steps.items() if (*key, name) in rows]
            left.plot(x, [100 * rows[*key, steps[n]]["eer"][0] for n in x], f"C{i}.-", alpha=0.3, lw=0.7)
        for j, (style, of) in enumerate((("s-", lambda n: n), ("s:", lambda n: lowest))):
            gaps = {n: differ(rows, "eer", name, real[of(n)], Numbers(), n) for n, name in steps.items()
                    if of(n) in real and arm != "real"}
            gaps = {n: 100 * gap[0] for n, gap in gaps.items() if gap}
            if gaps:
                x = [n * 1.02 ** (2 * i + j) for n in gaps]  # side by side, so that no interval hides another
                right.plot(x, [gap[0] for gap in gaps.values()], f"C{i}{style}", mfc=(f"C{i}", "none")[j])
                right.vlines(x, *np.transpose([interval(gap) for gap in gaps.values()]), color=f"C{i}",
                             ls=("-", ":")[j])
    left.set(ylabel="EER %")
    left.set_title("mean of the rows with all steps; faint: every row", fontsize=9)
    figure.legend(loc="outside upper center", ncols=len(arms) if len(arms) < 4 else 3)
    right.axhline(0, color="gray", lw=1)
    dotted = f" (dotted: {lowest:,}, its lowest)" if lowest else ""
    right.set(ylabel="points of EER")
    right.set_title(f"against real, as many steps{dotted}", fontsize=9)
    for axis in (left, right):
        axis.set(xscale="log", xlabel="steps of the recogniser", xticks=ticks,
                 xlim=(ticks[0] * 0.9, ticks[-1] * 1.02 ** (2 * len(arms) + 2)),
                 xticklabels=[f"{n:,}" for n in ticks])
        axis.minorticks_off()
    save_figure(figure, path)
