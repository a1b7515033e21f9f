"""Measure recognisers on a folder of people they have never seen, side by side (stage 7 of ScoreMix).

    python evaluate.py --model runs/demo/real runs/demo/scoremix --data runs/demo/data/test --out runs/demo/report

Reads   recognisers and an image folder whose classes none of them was trained on.
Writes  OUT/table.md, OUT/results.json, OUT/roc.png, OUT/similarity.png.

Protocols: verification of all image pairs (AUC, EER, TAR at the FARs that the number of impostor pairs can measure) and
leave-one-out identification (rank-1). The images of one person are not independent, so the 95 % intervals resample
identities; the models share every draw, so their difference has an interval of its own.
"""

import math
import sys
from pathlib import Path

import numpy as np

import stage
from train_recognizer import embed, load_recognizer

FARS = [10.0 ** -k for k in range(1, 7)]


def parse_args(argv=None):
    parser = stage.Parser(__doc__)
    g = parser.add_argument_group("inputs and output")
    g.add_argument("--model", nargs="+", required=True, metavar="RUN", help="recognisers; the others are compared with the first")
    g.add_argument("--data", nargs="+", required=True, metavar="DIR", help="image folders of the test classes")
    g.add_argument("--out", required=True, metavar="DIR", help="where the report goes, a run directory")
    g = parser.add_argument_group("intervals")
    g.add_argument("--draws", type=stage.number(int, 100), default=2000, help="resamples of the identities")
    g.add_argument("--seed", type=stage.number(int, 0), default=0, help="seed of the resamples")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    return parser.parse_args(argv)


# -------------------------------------------------------------------------------------------------------- protocols
def roc_curve(scores: np.ndarray, same: np.ndarray, weight: np.ndarray | None = None):
    """FAR and TAR at every distinct threshold, from the strictest on: accept = score >= threshold.

    scores (n,), same (n,) bool, weight (n,) of each pair (default 1) -> thresholds, far, tar, each (number of distinct scores,).
    """
    order = np.argsort(-scores, kind="stable")
    return _weighted_roc(scores[order], same[order], np.ones(len(order)) if weight is None else weight[order])


def _weighted_roc(scores, same, weight):  # scores fall
    last = np.flatnonzero(np.diff(scores, append=-np.inf))  # equal scores are accepted together
    true, false = np.cumsum(weight * same)[last], np.cumsum(weight * ~same)[last]
    with np.errstate(invalid="ignore"):  # a resample may lack genuine or impostor pairs: nan
        return scores[last], false / false[-1], true / true[-1]


def tar_at(far: np.ndarray, tar: np.ndarray, target: float) -> float:
    """The largest TAR on the curve whose FAR does not exceed the target."""
    i = np.searchsorted(far, target * (1 + 1e-9), side="right") - 1
    return float(tar[i]) if i >= 0 else 0.0


def tar_at_far(scores: np.ndarray, same: np.ndarray, far: float) -> float:
    """TAR at the lowest threshold whose FAR does not exceed `far`. scores (n,), same (n,) bool.

    Raises StageError where the number of impostor pairs cannot measure such a FAR (below 1/n).
    """
    impostors = int((~same).sum())
    if impostors * far < 1 - 1e-9:
        raise stage.StageError(f"a FAR of {far:g} cannot be measured with {impostors} impostor pairs")
    return tar_at(*roc_curve(scores, same)[1:], far)


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


def report_far(impostors: int) -> float | None:
    """The FAR of a report, fixed by the counts before any scoring: the smallest of 1e-1, 1e-2, ... with n * FAR >= 10."""
    return min((f for f in FARS if impostors * f >= 10 - 1e-9), default=None)


class AllPairs:
    """All-pairs verification and leave-one-out rank-1 of one model, for the whole set and for resampled identities.

    z (N, dim) unit embeddings, labels (N,). metrics(w), with the multiplicity w_i of every identity: genuine pairs of i weigh
    w_i, impostor pairs (i, j) weigh w_i w_j, so copies of an image are never paired; probes of i weigh w_i and search
    among the images of the drawn identities only. w = 1 is the set itself.
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
        self.fars = [f for f in FARS if self.impostors * f >= 1 - 1e-9]

    def metrics(self, w: np.ndarray) -> dict:
        weight = np.where(self.same, w[self.first], w[self.first] * w[self.second]).astype(np.float64)
        _, far, tar = _weighted_roc(self.scores, self.same, weight)
        found = self.best_same > self.to_class[:, w > 0].max(axis=1)
        probes = w[self.labels] * self.probes
        values = {"eer": equal_error_rate(far, tar), "auc": area_under_curve(far, tar),
                  "rank1": float((found * probes).sum() / probes.sum()) if probes.any() else math.nan}
        usable = not np.isnan(far[-1] + tar[-1])
        return values | {f"tar@{f:.0e}".replace("e-0", "e-"): tar_at(far, tar, f) if usable else math.nan for f in self.fars}


def interval(draws: np.ndarray) -> list[float]:
    """The 95 % percentile interval of resampled values; draws without a value are left out."""
    return [float(v) for v in np.nanpercentile(draws, [2.5, 97.5])]


# ----------------------------------------------------------------------------------------------------------- report
def percent(value: float, ci: list[float], sign: str = "") -> str:
    return f"{100 * value:{sign}.1f} [{100 * ci[0]:{sign}.1f}, {100 * ci[1]:{sign}.1f}]"


def write_table(results: dict, keys: list[str]) -> str:
    """Markdown: a row a model, in percent with its 95 % interval, then the differences to the first model in points."""
    title = {"eer": "EER", "auc": "AUC", "rank1": "rank-1"}
    lines = ["| model | " + " | ".join(title.get(k, k.replace("tar@", "TAR@FAR=")) + " %" for k in keys) + " |",
             "|---|" + "---|" * len(keys)]
    models = results["models"]
    for m in models:
        lines.append(f"| {m['name']} | " + " | ".join(percent(*m["flat"][k]) for k in keys) + " |")
    for m in models[1:]:
        lines.append(f"| {m['name']} - {models[0]['name']} | " + " | ".join(percent(*m["flat_difference"][k], "+") for k in keys) + " |")
    return "\n".join(lines) + "\n"


def verdict(results: dict) -> list[str]:
    """A plain sentence for each difference to the first model."""
    lines, people = [], results["models"][0]["counts"]["identities"]
    for m in results["models"][1:]:
        d, (low, high) = m["flat_difference"]["eer"]
        told = "the interval includes zero, so this test set cannot tell the two apart" if low <= 0 <= high else \
            f"{m['name']} makes {'fewer' if d < 0 else 'more'} errors"
        lines.append(f"{people} people: EER of {m['name']} minus {results['models'][0]['name']} is {percent(d, [low, high], '+')} points; {told}.")
    return lines


def draw_figures(out: Path, curves: list, pairs: list[tuple[str, AllPairs]]) -> None:
    """roc.png, all models on a logarithmic FAR axis, and similarity.png, genuine and impostor scores of each."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(figsize=(6, 4.5), layout="constrained")
    for name, far, tar in curves:
        axis.step(far, tar, where="post", label=name)
    axis.set(xscale="log", xlim=(1 / min(p.impostors for _, p in pairs), 1), ylim=(0, 1.01), xlabel="false accept rate (FAR)",
             ylabel="true accept rate (TAR)", title="Verification of unseen people, all pairs")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
    stage.write_atomic(out / "roc.png", lambda p: figure.savefig(p, format="png", dpi=130))
    figure, axes = plt.subplots(1, len(pairs), figsize=(4.5 * len(pairs), 3.5), sharex=True, squeeze=False, layout="constrained")
    for axis, (name, p) in zip(axes[0], pairs):
        for kind, chosen in (("impostor", ~p.same), ("genuine", p.same)):
            axis.hist(p.scores[chosen], bins=np.linspace(-1, 1, 81), density=True, alpha=0.6, label=f"{kind} ({chosen.sum():,})")
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
    args.model = [str(stage.model_path(m)) for m in args.model]
    loaded = [load_recognizer(m, device) for m in args.model]
    read, pairs = {}, []
    for name, (model, saved) in zip(names, loaded):
        key = (saved["config"]["size"], saved["config"]["channels"])
        images = read[key] = read.get(key) or stage.Images(args.data, *key)
        seen = set(images.classes) & set(saved["classes"])
        if seen:
            print(f"warning: {name} was trained on {len(seen)} of the test classes, {min(seen)} among them", file=sys.stderr)
        labels = images.labels.numpy()
        if len(images.classes) < 2 or np.bincount(labels).max() < 2:
            raise stage.StageError(f"{' '.join(args.data)} has no genuine or no impostor pairs; at least two classes are needed, "
                                   "one of them with two images")
        pairs.append((name, AllPairs(embed(model, images, saved["config"]["flip"], device).numpy(), labels)))
    out = stage.Run("evaluate", args, {"model": args.model, "data": args.data})
    people, rng = len(images.classes), np.random.default_rng(args.seed)
    draws = rng.multinomial(people, np.full(people, 1 / people), size=args.draws)  # (draws, identities), shared by all models
    drawn, results, curves = [], {"models": []}, []
    for (name, p), (model, saved) in zip(pairs, loaded):
        value, resampled = p.metrics(np.ones(people, int)), [p.metrics(w) for w in draws]
        drawn.append({k: np.array([r[k] for r in resampled]) for k in value})
        flat = {k: [v, interval(drawn[-1][k])] for k, v in value.items()}
        flat_difference = {k: [v - results["models"][0]["flat"][k][0], interval(drawn[-1][k] - drawn[0][k])]
                           for k, v in value.items()} if results["models"] else None
        flip = "embeddings of image and mirror image summed" if saved["config"]["flip"] else "no flip"
        results["models"].append({"name": name, "protocol": f"all pairs of the folder, cosine, {flip}, then normalised; TAR at the "
                                  "largest FAR not above the target; 95 % intervals by resampling identities",
                                  "counts": {"identities": people, "images": len(p.labels), "genuine": p.genuine,
                                             "impostor": p.impostors}, "flat": flat, "flat_difference": flat_difference})
        curves.append((name, *roc_curve(p.scores, p.same)[1:]))
        far = report_far(p.impostors)
    keys = ["eer"] + [k for k in flat if k.startswith("tar@") and far and float(k[4:]) >= far * 0.99] + ["auc", "rank1"]
    table = write_table(results, keys)
    draw_figures(out.dir, curves, pairs)
    lines = verdict(results)
    counts = results["models"][0]["counts"]
    note = f"{counts['identities']} unseen people, {counts['genuine']:,} genuine and {counts['impostor']:,} impostor pairs; 95 % intervals resample people."
    stage.write_atomic(out.dir / "table.md", lambda p: p.write_text("\n".join([table, note, *lines, ""])))

    def nested(flat):
        return flat and {k: {"value": v, "ci95": ci} for k, (v, ci) in flat.items() if not k.startswith("tar@")} | {
            "tar_at_far": {k[4:]: {"value": v, "ci95": ci} for k, (v, ci) in flat.items() if k.startswith("tar@")}}
    for m in results["models"]:
        m["metrics"], m["difference_to_first"] = nested(m.pop("flat")), nested(m.pop("flat_difference"))
    out.spend(device, images=sum(len(p.labels) for _, p in pairs))
    stage.write_json(out.dir / "results.json", results)
    print("\n".join([table, note, *lines, f"wrote {out.dir}/table.md, results.json; look at {out.dir}/roc.png and {out.dir}/similarity.png"]))


@stage.command
def main(argv=None):
    run(parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
