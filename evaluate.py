"""Measure recognisers on a folder of people they have never seen, side by side (stage 7 of ScoreMix).

    python evaluate.py --model runs/demo/real runs/demo/scoremix --data runs/demo/data/test --out runs/demo/report

Reads   recognisers and an image folder whose classes none of them was trained on.
Writes  OUT/table.md, OUT/results.json, OUT/draws.npz (every resample), OUT/roc.png, OUT/similarity.png.

Protocols: verification of all image pairs (AUC, EER, TAR at the FARs that the number of impostor pairs can measure) and
leave-one-out identification (rank-1). The images of one person are not independent, so the 95 % intervals resample
identities; the models share every draw, so their difference has an interval of its own.
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch

import stage
from train_recognizer import count_flops, embed, load_recognizer

MOST_IMAGES = 6000  # 18 million pairs, which are sorted at once, in 2 GB


def parse_args(argv=None):
    parser = stage.Parser(__doc__)
    g = parser.add_argument_group("inputs and output")
    g.add_argument("--model", nargs="+", required=True, metavar="RUN", help="recognisers; compared with the first one")
    g.add_argument("--data", nargs="+", required=True, metavar="DIR", help="image folders of the test classes")
    g.add_argument("--out", required=True, metavar="DIR", help="where the report goes, a run directory")
    g = parser.add_argument_group("intervals")
    g.add_argument("--draws", type=stage.number(int, 100), default=2000, help="resamplings (default: 2000)")
    g.add_argument("--seed", type=stage.number(int, 0), default=0, help="seed of the resamples (default: 0)")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    return parser.parse_args(argv)


# -------------------------------------------------------------------------------------------------------- protocols
def roc_curve(scores: np.ndarray, same: np.ndarray, weight: np.ndarray | None = None):
    """FAR and TAR at every distinct threshold, from the strictest on: accept = score >= threshold.

    scores (n,), same (n,) bool, weight (n,) of the pairs (default 1) -> far, tar, each (number of distinct scores,).
    """
    order = np.argsort(-scores, kind="stable")
    return sorted_roc(scores[order], same[order], np.ones(len(order)) if weight is None else weight[order])


def sorted_roc(scores: np.ndarray, same: np.ndarray, weight: np.ndarray):
    """roc_curve of pairs whose scores fall already."""
    last = np.flatnonzero(np.diff(scores, append=-np.inf))  # equal scores are accepted together
    true, false = np.cumsum(weight * same)[last], np.cumsum(weight * ~same)[last]
    with np.errstate(invalid="ignore"):  # a resample may lack genuine or impostor pairs: nan
        return false / false[-1], true / true[-1]


def measurable(impostors: int, least: int = 1) -> dict:
    """The FARs 1e-1 ... 1e-6 that leave at least `least` of so many impostor pairs above the threshold: name -> FAR."""
    return {f"1e-{k}": 10.0 ** -k for k in range(1, 7) if impostors * 10.0 ** -k >= least - 1e-9}


def tar_at(far: np.ndarray, tar: np.ndarray, target: float) -> float:
    """The largest TAR on the curve whose FAR does not exceed the target; 0 if even the strictest threshold's does."""
    i = np.searchsorted(far, target * (1 + 1e-9), side="right") - 1
    return float(tar[i]) if i >= 0 else 0.0


def tar_at_far(scores: np.ndarray, same: np.ndarray, far: float) -> float:
    """TAR at the lowest threshold whose FAR does not exceed `far`. scores (n,), same (n,) bool.

    Raises StageError where the number of impostor pairs cannot measure such a FAR (below 1/n).
    """
    impostors = int((~same).sum())
    if impostors * far < 1 - 1e-9:
        raise stage.StageError(f"a FAR of {far:g} cannot be measured with {impostors} impostor pairs")
    return tar_at(*roc_curve(scores, same), far)


def equal_error_rate(far: np.ndarray, tar: np.ndarray) -> float:
    """The rate at which FAR = 1 - TAR, on straight lines between the points of the curve."""
    far, miss = np.concatenate([[0.0], far]), 1 - np.concatenate([[0.0], tar])
    if np.isnan(far[-1] + miss[-1]):
        return math.nan
    i = int(np.argmax(far >= miss))  # i >= 1: the curve starts at (0, 1)
    gap = miss[i - 1] - far[i - 1]
    share = gap / (gap + far[i] - miss[i])
    return float(far[i - 1] + share * (far[i] - far[i - 1]))


def area_under_curve(far: np.ndarray, tar: np.ndarray) -> float:
    """Area under the ROC curve; equal scores of both kinds count one half."""
    return float(np.trapezoid(np.concatenate([[0.0], tar]), np.concatenate([[0.0], far])))


def report_far(impostors: int) -> float:
    """The FAR of a report, fixed by the counts before any scoring: the smallest of 1e-1, 1e-2, ... with n * FAR >= 10.

    inf where there are fewer than 100 impostor pairs: then no TAR is reported.
    """
    return min(measurable(impostors, 10).values(), default=math.inf)


class AllPairs:
    """All-pairs verification and leave-one-out rank-1 of one model, for the whole set and for resampled identities.

    z (N, dim) unit embeddings, labels (N,). metrics(w) takes the multiplicity w_i of each identity in a resample:
    genuine pairs of i weigh w_i and impostor pairs (i, j) weigh w_i w_j, so that copies are never paired; probes of i
    weigh w_i and search among the images of the drawn identities. w = 1 is the set itself.
    """

    def __init__(self, z: np.ndarray, labels: np.ndarray):
        z, n = z.astype(np.float64), len(labels)
        similarity = z @ z.T
        a, b = np.triu_indices(n, 1)
        order = np.argsort(-similarity[a, b], kind="stable")  # sorted once, for every resample
        self.first, self.second = labels[a][order], labels[b][order]  # identities
        self.scores, self.same = similarity[a, b][order], self.first == self.second
        self.genuine, self.impostors = int(self.same.sum()), int((~self.same).sum())
        np.fill_diagonal(similarity, -np.inf)
        columns = [similarity[:, labels == i].max(axis=1) for i in range(labels.max() + 1)]
        to_class = np.stack(columns, axis=1)  # (N, identities): the most similar other image of each identity
        self.labels, rows = labels, np.arange(n)
        self.best_same = to_class[rows, labels].copy()
        to_class[rows, labels] = -np.inf
        self.to_class, self.probes = to_class, np.isfinite(self.best_same)  # an image alone in its class is no probe
        self.fars = measurable(self.impostors)

    def roc(self, w: np.ndarray):
        weight = np.where(self.same, w[self.first], w[self.first] * w[self.second]).astype(np.float64)
        return sorted_roc(self.scores, self.same, weight)

    def metrics(self, w: np.ndarray) -> dict:
        """EER, TAR at each measurable FAR (keys 1e-1, 1e-2, ...), AUC, rank-1; nan if a resample lacks such pairs."""
        far, tar = self.roc(w)
        found = self.best_same > self.to_class[:, w > 0].max(axis=1)
        probes = w[self.labels] * self.probes
        tars = {name: math.nan if np.isnan(far[-1] + tar[-1]) else tar_at(far, tar, f) for name, f in self.fars.items()}
        alone = (w > 0).sum() < 2 or not probes.any()  # nobody to be mistaken for, or no probe
        return {"eer": equal_error_rate(far, tar), **tars, "auc": area_under_curve(far, tar),
                "rank1": math.nan if alone else float((found * probes).sum() / probes.sum())}


def summary(value: dict, draws: dict) -> dict:
    """name -> (value, [low, high]), the 95 % percentile interval of the draws; those without a value are left out."""
    return {k: (v, np.nanpercentile(draws[k], [2.5, 97.5]).tolist()) for k, v in value.items()}


# ----------------------------------------------------------------------------------------------------------- report
def percent(value: float, ci: list[float], sign: str = "") -> str:
    return f"{100 * value:{sign}.1f} [{100 * ci[0]:{sign}.1f}, {100 * ci[1]:{sign}.1f}]"


def write_table(rows: list[tuple[str, dict, str]], keys: list[str]) -> str:
    """Markdown, a row for each (name, summary, sign): percent, with the 95 % interval."""
    title = {"eer": "EER", "auc": "AUC", "rank1": "rank-1"}
    heads = [f"{title.get(k, f'TAR@FAR={k}')} %" for k in keys]
    lines = [f"| | {' | '.join(heads)} |", "|---|" + "---|" * len(keys)]
    lines += [f"| {name} | {' | '.join(percent(*m[k], sign) for k in keys)} |" for name, m, sign in rows]
    return "\n".join(lines)


def verdict(name: str, difference: dict) -> str:
    """One plain sentence about the difference of the EER to the first model."""
    d, (low, high) = difference["eer"]
    told = f"{'fewer' if d < 0 else 'more'} errors than the first model on these people"
    if low <= 0 <= high:
        told = "the interval includes zero, so these people cannot tell the two apart"
    return f"{name}: EER {percent(d, [low, high], '+')} points; {told}."


def as_json(metrics: dict) -> dict:
    entries = {k: {"value": v, "ci95": ci} for k, (v, ci) in metrics.items()}
    fars = {k: entries.pop(k) for k in list(entries) if k.startswith("1e-")}
    return entries | {"tar_at_far": fars}


def write_draws(path: Path, models: list[str], resamples: list[dict]) -> None:
    """draws.npz: `draws` (models, metrics, draws) float32 with the names of its first two axes in `models`, `metrics`.

    The draws of one test set and seed are the same for every model and command, so that results/tables.py can pair
    models of several commands, and pool folds.
    """
    metrics = list(resamples[0])
    values = np.array([[m[k] for k in metrics] for m in resamples], np.float32)
    with open(path, "wb") as file:
        np.savez_compressed(file, draws=values, models=models, metrics=metrics)


def draw_figures(out: Path, pairs: dict) -> None:
    """roc.png, all models on a logarithmic FAR axis, and similarity.png, genuine and impostor scores of each."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(figsize=(6, 4.5), layout="constrained")
    for name, p in pairs.items():
        axis.step(*p.roc(np.ones(p.labels.max() + 1)), where="post", label=name)
        axis.set_xlim(1 / p.impostors, 1)
    axis.set(xscale="log", ylim=(0, 1.01), xlabel="false accept rate (FAR)", ylabel="true accept rate (TAR)",
             title="Verification of unseen classes, all pairs")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
    stage.write_atomic(out / "roc.png", lambda p: figure.savefig(p, format="png", dpi=130))
    figure, axes = plt.subplots(1, len(pairs), figsize=(4.5 * len(pairs), 3.5), sharex=True, squeeze=False,
                                layout="constrained")
    for axis, (name, p) in zip(axes[0], pairs.items()):
        for kind, chosen in (("impostor", ~p.same), ("genuine", p.same)):
            label = f"{kind} ({chosen.sum():,})"
            axis.hist(p.scores[chosen], np.linspace(-1, 1, 81), density=True, alpha=0.6, label=label)
        axis.set(title=name, xlabel="cosine similarity", yticks=[])
        axis.legend()
    stage.write_atomic(out / "similarity.png", lambda p: figure.savefig(p, format="png", dpi=130))
    plt.close("all")


# -------------------------------------------------------------------------------------------------------------- run
def names_of(models: list[str]) -> list[str]:
    """The run directories' names, or their whole paths where names repeat."""
    short = [Path(m).parent.name if Path(m).suffix == ".pt" else Path(m).name for m in models]
    return short if len(set(short)) == len(short) else models


def run(args) -> None:
    device, names = stage.pick_device(args.device), names_of(args.model)
    if len(set(names)) < len(names):
        raise stage.StageError("--model names the same recogniser twice; leave one out")
    loaded, read, pairs = dict(zip(names, (load_recognizer(m, device) for m in args.model))), {}, {}
    for name, (model, saved) in loaded.items():
        key = saved["config"]["size"], saved["config"]["channels"]
        images = read[key] = read.get(key) or stage.Images(args.data, *key)
        seen = set(images.classes) & set(saved["classes"])
        if seen:
            print(f"warning: {name} was trained on {len(seen)} classes that bear the names of test classes, such as "
                  f"{min(seen)}; a fair test has none", file=sys.stderr)
        n = len(images.paths)
        if len(images.classes) < 2 or images.labels.bincount().max() < 2:
            raise stage.StageError(f"{' '.join(args.data)} has no genuine or no impostor pairs; "
                                   "give at least two classes, and one of them two images")
        if n > MOST_IMAGES:
            raise stage.StageError(f"all pairs of {n:,} images are too many; give at most {MOST_IMAGES:,}")
    out = stage.Run("evaluate", args, {"model": [saved["path"] for _, saved in loaded.values()], "data": args.data})
    if (out.dir / "results.json").exists():
        print((out.dir / "table.md").read_text() + f"already evaluated: {out.dir}")
        return
    for name, (model, saved) in loaded.items():
        config = saved["config"]
        images = read[config["size"], config["channels"]]
        pairs[name] = AllPairs(embed(model, images, config, device).numpy(), images.labels.numpy())
        one = torch.zeros(1, images.channels, images.size, images.size, device=device)
        evaluations = n * (1 + config["flip"])
        out.spend(device, images=n, network_evaluations=evaluations, flops=evaluations * count_flops(model, one))
    people, rng = len(images.classes), np.random.default_rng(args.seed)
    draws = rng.multinomial(people, np.full(people, 1 / people), size=args.draws)  # (draws, identities), for all models
    rows, differences, results, resamples, first = [], [], [], [], None
    for name, p in pairs.items():
        value = p.metrics(np.ones(people, int))
        each = [p.metrics(w) for w in stage.progress(draws, f"resampling {name}", disable=None)]
        resampled = {k: np.array([m[k] for m in each]) for k in value}
        first = first or (value, resampled)
        resamples.append(resampled)
        rows.append((name, summary(value, resampled), ""))
        config = loaded[name][1]["config"]
        flip = "embeddings of image and mirror image summed" if config["flip"] else "no mirror images"
        protocol = f"all pairs, cosine, {flip}; FAR does not exceed its target; 95 % intervals: identities resampled"
        counts = {"identities": people, "images": len(p.labels), "genuine": p.genuine, "impostor": p.impostors}
        results.append({"name": name, "protocol": protocol, "counts": counts, "metrics": as_json(rows[-1][1])})
        if len(rows) > 1:
            differences.append((f"{name} - {names[0]}", summary({k: v - first[0][k] for k, v in value.items()}, {
                k: v - first[1][k] for k, v in resampled.items()}), "+"))
            results[-1]["difference_to_first"] = as_json(differences[-1][1])
    shown = ["eer"] + [k for k, f in p.fars.items() if f >= report_far(p.impostors)] + ["auc", "rank1"]
    lines = [write_table(rows + differences, shown), "",
             f"{people} test classes, {n} images, {p.genuine:,} genuine and {p.impostors:,} impostor pairs.",
             "In brackets: 95 % intervals by resampling the classes; they do not cover the training seed.",
             *(verdict(name, m) for name, m, _ in differences)]
    draw_figures(out.dir, pairs)
    stage.write_atomic(out.dir / "draws.npz", lambda p: write_draws(p, names, resamples))
    stage.write_atomic(out.dir / "table.md", lambda p: p.write_text("\n".join(lines) + "\n"))
    out.spend(device)
    stage.write_json(out.dir / "results.json", {"models": results})
    print(*lines, f"wrote {out.dir}/table.md and results.json; look at {out.dir}/roc.png and similarity.png", sep="\n")


@stage.command
def main(argv=None):
    run(parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
