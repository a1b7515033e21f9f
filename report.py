"""How evaluate.py shows its findings: intervals and differences of the draws, the Markdown table, the CSV, the figures.
No metric of pairs is made here."""

import csv
import io
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import stage

VOID = 0.05  # the share of resamples that may lack genuine or impostor pairs
TITLES = {"accuracy": "accuracy", "eer": "EER", "auc": "AUC", "rank1": "rank-1", "rank5": "rank-5", "rank20": "rank-20"}
BINS = np.linspace(-1, 1, 81)  # of the similarity histograms
HARDEST = 6  # pairs of each kind in hardest.png
NOTE = ("In percent. In brackets: 95 % intervals by resampling identities, where 95 % of the resamples have pairs of "
        "both kinds; they do not cover the training seed. ±: standard deviation over the folds.")


def summary(value: dict, draws: dict, spread: dict | None = None) -> dict:
    """metric -> {value, ci95: the 95 % percentile interval of its draws, unless VOID of them say nothing, std}."""
    made = {k: {"value": v} for k, v in value.items()}
    for k, x in draws.items():
        if np.isnan(x).mean() <= VOID:
            made[k]["ci95"] = np.nanpercentile(x, [2.5, 97.5]).tolist()
    for k, x in (spread or {}).items():
        made[k]["std"] = x
    return made


def average(lists: list[list[dict]]) -> list[dict]:
    """Mean accuracy of several lists, of each system: the paper's Avg-H for LFW, CFP-FP, AgeDB-30, CALFW and CPLFW."""
    # without an interval: the lists may share people
    values = [(of[0]["name"], float(np.mean([r["metrics"]["accuracy"]["value"] for r in of]))) for of in zip(*lists)]
    return [{"name": name, "benchmark": f"average of {len(lists)} lists", "protocol": "mean accuracy of the lists",
             "counts": {}, "metrics": summary({"accuracy": value}, {})} for name, value in values]


def compare(results: list[dict], draws: dict) -> None:
    """Add to each entry of one test set but the first the difference to it, with its interval where there are draws."""
    for r in results[1:]:
        value = {k: m["value"] - results[0]["metrics"][k]["value"] for k, m in r["metrics"].items()}
        gaps = {k: x - draws[results[0]["name"]][k] for k, x in draws[r["name"]].items()}
        r["difference_to_first"] = summary(value, gaps)


def names_of(models: list[str]) -> list[str]:
    """The run directories' or files' names, or their whole paths where names repeat."""
    paths = [Path(os.path.realpath(m)) for m in models]
    short = [p.parent.name if p.name == "model.pt" else re.sub(r"\.(npz|pth?)$", "", p.name) for p in paths]
    return short if len(set(short)) == len(short) else models


def describe(test, how: str, args, tie: float) -> str:
    """The protocol of a TestSet in words; how: in words, how the embeddings were made."""
    parts = [test.protocol, "cosine", how]
    if test.kind == "templates":
        parts.append("pooled with their norms" if args.keep_norm else "pooled at length 1")
        parts += ["weighed by the detector's score"] if args.detector_scores else []
    if test.kind == "search":
        parts.append(f"ties (within {tie:g}) count against the probe")
    else:
        parts.append("accepted at or above the threshold, FAR does not exceed its target")
    return "; ".join([*parts, "identities are not known: no intervals" if test.group is None else
                      "95 % intervals: identities resampled" + (", the gallery stays" * (test.kind == "search"))])


def cell(text: str) -> str:
    """Text as it may stand in a Markdown table."""
    return text.replace("|", "\\|")


def title(key: str) -> str:
    return TITLES.get(key, f"TAR@FAR={key}")


def percent(metric: dict, digits: int = 1, sign: str = "") -> str:
    """A metric {value, ci95 or std or neither} in percent: 98.1 [97.0, 99.0], 99.80 ± 0.21 or 70.4."""
    numbers = [f"{100 * x:{sign}.{digits}f}" for x in (metric["value"], *metric.get("ci95", ()))]
    if "ci95" in metric:
        return f"{numbers[0]} [{numbers[1]}, {numbers[2]}]"
    return numbers[0] + (f" ± {100 * metric['std']:.{digits}f}" if "std" in metric else "")


def write_table(results: list[dict], columns: list[tuple[str, str]], digits: int) -> str:
    """Markdown: a row for each model, a column for each (test set, metric); then the differences to the first model."""
    models, alone = list(dict.fromkeys(r["name"] for r in results)), len({r["benchmark"] for r in results}) == 1
    heads = [title(m) + " %" if alone else cell(f"{t}: {title(m)} %") for t, m in columns]
    entry = {(r["name"], r["benchmark"]): r for r in results}
    lines = [f"| | {' | '.join(heads)} |", "|---|" + "---|" * len(columns)]
    rows = [(n, [percent(entry[n, t]["metrics"][m], digits) for t, m in columns]) for n in models]
    rows += [(f"{n} - {models[0]} (points)", [percent(entry[n, t]["difference_to_first"][m], digits, "+")
                                              for t, m in columns]) for n in models[1:]]
    return "\n".join([*lines, *(f"| {' | '.join([cell(n), *cells])} |" for n, cells in rows)])


def verdict(name: str, test: str, difference: dict) -> str:
    """One plain sentence about the difference of the EER to the first model."""
    d, (low, high) = difference["eer"]["value"], difference["eer"]["ci95"]
    told = f"{'fewer' if d < 0 else 'more'} errors than the first model on these people"
    if low <= 0 <= high:
        told = "the interval includes zero, so these people cannot tell the two apart"
    return f"{name} on {test}: EER {percent(difference['eer'], 1, '+')} points; {told}."


def sentences(test: str, entries: list[dict]) -> list[str]:
    """What table.md says of a test set: counts, protocol (of each model where they differ), verdicts."""
    counts = ", ".join(f"{n:,} {k}" for k, n in entries[0]["counts"].items())
    counts += " pairs" if "genuine" in entries[0]["counts"] else ""
    told = [f"{test}: {counts}. {entries[0]['protocol']}."]
    if len({e["protocol"] for e in entries}) > 1:
        told = [f"{test}: {counts}.", *(f"{e['name']} on {test}: {e['protocol']}." for e in entries)]
    return told + [verdict(e["name"], test, e["difference_to_first"]) for e in entries[1:]
                   if "ci95" in e["difference_to_first"].get("eer", ())]


def write_csv(results: list[dict]) -> str:
    """A line for each model, test set and metric, as fractions: value, interval, std, difference to the first model."""
    text = io.StringIO(newline="")
    out = csv.writer(text)
    out.writerow(["model", "benchmark", "metric", "value", "low", "high", "std", "difference", "difference_low",
                  "difference_high"])
    for r in results:
        for key, m in r["metrics"].items():
            d = r.get("difference_to_first", {}).get(key, {})
            values = [m["value"], *m.get("ci95", ("", "")), m.get("std", ""), d.get("value", ""),
                      *d.get("ci95", ("", ""))]
            out.writerow([r["name"], r["benchmark"], title(key), *(v if v == "" else f"{v:.6f}" for v in values)])
    return text.getvalue()


def as_json(results: list[dict]) -> list[dict]:
    """The entries with the TARs under one key, FAR -> metric."""
    def nested(metrics: dict) -> dict:
        fars = {k: v for k, v in metrics.items() if k.startswith("1e-")}
        return {k: v for k, v in metrics.items() if k not in fars} | ({"tar_at_far": fars} if fars else {})
    return [r | {k: nested(r[k]) for k in ("metrics", "difference_to_first") if k in r} for r in results]


def write_draws(path: Path, draws: dict) -> None:
    """draws.npz: `draws` (models, metrics, draws) float32 with the names of its first two axes in `models`, `metrics`.

    draws: model -> metric -> (draws,). Those of one test set and seed are the same for every model and command, so that
    results/tables.py can pair models of several commands, and pool folds.
    """
    models, metrics = list(draws), list(next(iter(draws.values())))
    values = np.array([[draws[m][k] for k in metrics] for m in models], np.float32)
    with open(path, "wb") as file:
        np.savez_compressed(file, draws=values, models=models, metrics=metrics)


# ---------------------------------------------------------------------------------------------------------- figures
def pyplot():
    """matplotlib.pyplot without a display."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def save_figure(figure, path: Path, dpi: int = 120) -> None:
    stage.write_atomic(path, lambda p: figure.savefig(p, format="png", dpi=dpi))
    pyplot().close(figure)


@dataclass
class Picture:
    """What the figures need of one model on one test set: points of its ROC, histograms, hardest pairs."""
    far: np.ndarray
    tar: np.ndarray
    impostors: int
    histograms: dict  # genuine, impostor -> (80,) densities
    hardest: dict  # genuine, impostor -> [(score, file, file)]

    @classmethod
    def of(cls, found, files: list, a: np.ndarray, b: np.ndarray, shown: np.ndarray | None = None):
        """Of a Verification whose pair i is that of files[a[i]] and files[b[i]], or files[shown[a[i]]] and so on."""
        far, tar = found.roc()
        if len(far) > 4000:  # no figure has more points: 2,000 along each axis
            ends = np.searchsorted(far, np.geomspace(1 / found.impostors, 1, 2000)).clip(max=len(far) - 1)
            ends = np.concatenate([ends, np.searchsorted(tar, np.linspace(0, 1, 2000)).clip(max=len(far) - 1), [0]])
            far, tar = far[np.unique(ends)], tar[np.unique(ends)]
        histograms, hardest = {}, {}
        for kind, chosen in (("impostor", ~found.same), ("genuine", found.same)):
            histograms[kind] = np.histogram(found.scores[chosen].clip(-1, 1), BINS, density=True)[0]
            hard = np.flatnonzero(chosen)
            hard = hard[:HARDEST] if kind == "impostor" else hard[:-HARDEST - 1:-1]
            sides = [side[found.order[hard]] if shown is None else shown[side[found.order[hard]]] for side in (a, b)]
            hardest[kind] = [(s, files[i], files[j]) for s, i, j in zip(found.scores[hard], *sides)]
        return cls(far, tar, found.impostors, histograms, hardest)


def draw_figures(out: Path, pictures: dict) -> list[str]:
    """roc.png and det.png, all models on a logarithmic FAR axis, a panel for each test set; similarity.png, genuine and
    impostor scores; hardest.png, the worst pairs, where their images exist. pictures: test set -> model -> Picture."""
    plt, made = pyplot(), ["roc.png", "det.png", "similarity.png"]
    for name, miss in (("roc.png", False), ("det.png", True)):
        figure, axes = plt.subplots(1, len(pictures), figsize=(1 + 5 * len(pictures), 4.5), layout="constrained",
                                    squeeze=False)
        for axis, (test, models) in zip(axes[0], pictures.items()):
            for model, p in models.items():
                axis.step(p.far, (1 - p.tar).clip(1e-9) if miss else p.tar, where="post", label=model)
            axis.set(xscale="log", xlim=(1 / p.impostors, 1), xlabel="false accept rate (FAR)", title=test)
            if miss:
                least = min(min((1 - p.tar)[p.tar < 1], default=1) for p in models.values())
                axis.set(yscale="log", ylim=(least / 1.5, 1), ylabel="false reject rate (1 - TAR)")
            else:
                axis.set(ylim=(0, 1.01), ylabel="true accept rate (TAR)")
            axis.grid(alpha=0.3, which="both" if miss else "major")
            axis.legend(loc="lower left" if miss else "lower right")
        save_figure(figure, out / name)
    models = list(next(iter(pictures.values())))
    figure, axes = plt.subplots(len(pictures), len(models), figsize=(4.2 * len(models), 0.6 + 2.8 * len(pictures)),
                                layout="constrained", squeeze=False, sharex=True)
    for row, (test, of_model) in zip(axes, pictures.items()):
        for axis, (model, p) in zip(row, of_model.items()):
            for kind, density in p.histograms.items():
                axis.stairs(density, BINS, fill=True, alpha=0.6, label=kind)
            axis.set(title=f"{model}, {test}", xlabel="cosine similarity", yticks=[])
            axis.legend()
    save_figure(figure, out / "similarity.png")
    rows = [(f"{model}, {test}: {kind}", p.hardest[kind]) for test, of_model in pictures.items()
            for model, p in of_model.items() for kind in ("genuine", "impostor")]
    rows = [(label, pairs) for label, pairs in rows if all(Path(f).exists() for pair in pairs for f in pair[1:])]
    if rows:
        figure, axes = plt.subplots(len(rows), HARDEST, figsize=(2 * HARDEST, 1.5 * len(rows)), layout="constrained",
                                    squeeze=False)
        for row, (label, pairs) in zip(axes, rows):
            for axis in row:
                axis.axis("off")
            for axis, (score, *files) in zip(row, pairs):
                axis.imshow(np.concatenate([stage.decode(Path(f), 112, 3) for f in files], axis=1))
                axis.set_title(f"\n{score:.2f}", fontsize=8)
            row[0].set_title(f"{label} pairs with the worst scores\n", fontsize=8, loc="left")
        save_figure(figure, out / "hardest.png")
        made.append("hardest.png")
    return made
