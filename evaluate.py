"""Measure recognisers, side by side, by the protocols of the field (stage 6 of ScoreMix).

    python evaluate.py --model runs/demo/real runs/demo/scoremix --data runs/demo/data/test --out runs/demo/report
    python evaluate.py --model backbone.pth --arch ir50 --pairs runs/bins/*.csv --templates runs/ijbc --out runs/report

Reads   recognisers (or --embeddings of any other system), and benchmarks, as many as wished:
        --data        image folders of unseen classes: verification of all pairs, leave-one-out rank-1
        --pairs       lists path_a,path_b,same,fold: accuracy over the folds, EER, TAR at FAR, and their average
        --gallery, --probe   image folders: closed-set identification at ranks 1, 5, 20
        --templates   a folder of `prepare_data.py ijb`: 1:1 verification of templates
Writes  OUT/table.md, OUT/results.csv, OUT/results.json, figures; of --data also OUT/draws.npz (every resample).

Images of one person are not independent, so where identities are known the intervals resample identities; models share
every draw, so their difference has an interval of its own. Elsewhere there is the std over the folds, or nothing.
"""

import argparse
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np

import report
import stage
import testsets
from testsets import Embeddings, TestSet
from train_recognizer import ARCHS, OURS, embed, load_recognizer
from training import flops_of

RANKS = 1, 5, 20
TIE = 1e-6  # similarities this near are equal: a matrix product rounds even copies apart


def parse_args(argv=None):
    parser = stage.Parser(__doc__)
    g = parser.add_argument_group("models; all are compared with the first one")
    g.add_argument("--model", nargs="+", default=[], metavar="RUN", help="recognisers: runs, or files of weights")
    g.add_argument("--embeddings", nargs="+", default=[], metavar="NPZ",
                   help="other systems: `embeddings` (N, D) and `paths` (N,) as the lists have them; of folders "
                   "<class>/<image>, probe/<class>/<image>, gallery/<class>/<image>")
    g.add_argument("--save-embeddings", action="store_true", help="write OUT/embeddings-<model>.npz, such a file")
    g.add_argument("--arch", choices=[a for a in ARCHS if a not in OURS],
                   help="for public weights, a state dict with InsightFace's key names: its backbone")
    g.add_argument("--bgr", action="store_true", help="public weights that take blue first (default: red first)")
    g.add_argument("--mean", type=stage.number(float, 0, 255), default=127.5,
                   help="of public weights, what is taken from the grey levels 0 ... 255 (default: 127.5)")
    g.add_argument("--std", type=stage.number(float, 1, 255), default=127.5, help="what divides them (default: 127.5)")
    g = parser.add_argument_group("benchmarks")
    g.add_argument("--data", nargs="+", metavar="DIR", help="image folders of the test classes, united by class name")
    g.add_argument("--pairs", nargs="+", default=[], metavar="CSV", help="lists of pairs, each a benchmark")
    g.add_argument("--gallery", nargs="+", metavar="DIR", help="image folders; classes without a probe are distractors")
    g.add_argument("--probe", nargs="+", metavar="DIR", help="image folders of the probes")
    g.add_argument("--templates", nargs="+", default=[], metavar="DIR", help="folders of `prepare_data.py ijb`")
    g.add_argument("--keep-norm", action="store_true", help="templates: pool features with their norms, not unit ones")
    g.add_argument("--detector-scores", action="store_true", help="templates: weigh features by the detector's score")
    g.add_argument("--flip", action=argparse.BooleanOptionalAction,
                   help="sum the embeddings of image and mirror image (default: as the model was trained; public: yes)")
    g = parser.add_argument_group("report")
    g.add_argument("--out", required=True, metavar="DIR", help="where the report goes, a run directory")
    g.add_argument("--draws", type=stage.number(int, 100), default=2000, help="resamplings (default: 2000)")
    g.add_argument("--seed", type=stage.number(int, 0), default=0, help="seed of the resamples (default: 0)")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    args = parser.parse_args(argv)
    if not args.model and not args.embeddings:
        raise stage.StageError("nothing to measure; give --model or --embeddings")
    for flags, needs in ((args.bgr or (args.mean, args.std) != (127.5, 127.5), "arch"),
                         (args.keep_norm or args.detector_scores, "templates"), (args.save_embeddings, "model")):
        if flags and not getattr(args, needs):
            raise stage.StageError(f"a flag was given that changes nothing without --{needs}; leave it out")
    if bool(args.gallery) != bool(args.probe):
        raise stage.StageError("--gallery and --probe belong together; give both")
    if not (args.data or args.pairs or args.probe or args.templates):
        raise stage.StageError("nothing to measure it on; give --data, --pairs, --gallery and --probe, or --templates")
    return args


# -------------------------------------------------------------------------------------------------------- protocols
def roc_curve(scores: np.ndarray, same: np.ndarray):
    """FAR and TAR at every distinct threshold, from the strictest on: accept = score >= threshold.

    scores (n,), same (n,) bool -> far, tar, each (number of distinct scores,).
    """
    order = np.argsort(-scores)
    return rates(distinct(scores[order]), np.flatnonzero(same[order]))


def distinct(scores: np.ndarray) -> np.ndarray:
    """Where each threshold cuts falling scores (n,): the last of every run of equal ones, which go together."""
    return np.flatnonzero(np.diff(scores, append=-np.inf))


def corners(cuts: np.ndarray, genuine: np.ndarray) -> np.ndarray:
    """Of the cuts those where the curve turns: between two genuine pairs it is level, however the pairs weigh."""
    true = np.searchsorted(genuine, cuts, side="right")
    turns = np.diff(true) > 0
    return cuts[np.append(True, turns) | np.append(turns, True)]


def rates(cuts: np.ndarray, genuine: np.ndarray, weight: np.ndarray | None = None):
    """FAR and TAR (C,) of n pairs in the order of falling scores, accepted up to each of the cuts (C,), indices.

    genuine: where among them the genuine pairs are, ascending; weight (n,): whole numbers, or all weigh 1.
    """
    true = np.searchsorted(genuine, cuts, side="right")
    if weight is None:
        accepted = cuts + 1
    else:
        true, accepted = np.append(0, np.cumsum(weight[genuine]))[true], np.cumsum(weight)[cuts]
    false = accepted - true
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
    if np.isnan(far[-1] + tar[-1]):
        return math.nan
    i = int(np.argmax(far >= 1 - tar))
    far_0, miss_0 = (far[i - 1], 1 - tar[i - 1]) if i else (0.0, 1.0)  # the curve starts at (0, 1)
    gap = miss_0 - far_0
    share = gap / (gap + far[i] - (1 - tar[i]))
    return float(far_0 + share * (far[i] - far_0))


def area_under_curve(far: np.ndarray, tar: np.ndarray) -> float:
    """Area under the ROC curve; equal scores of both kinds count one half."""
    return float(far[0] * tar[0] / 2 + np.trapezoid(tar, far))


def report_far(impostors: int) -> float:
    """The FAR of a report, fixed by the counts before any scoring: the smallest of 1e-1, 1e-2, ... with n * FAR >= 10.

    inf where there are fewer than 100 impostor pairs: then no TAR is reported.
    """
    return min(measurable(impostors, 10).values(), default=math.inf)


def best_threshold(scores: np.ndarray, gain: np.ndarray) -> float:
    """The threshold with the most correct decisions, accept = score >= threshold. scores (n,) rise; gain (n,): what
    accepting the pair changes, the weight of a genuine one, minus the weight of an impostor.

    Candidates lie midway between neighbouring distinct scores, at the lowest score (accept all) and just above the
    highest (accept none). Of equally good ones the middle of the widest run of neighbours, the lowest of such runs.
    """
    lost = np.zeros(len(scores) + 1, gain.dtype)
    np.cumsum(gain, out=lost[1:])  # cut k rejects the scores before k
    cuts = np.flatnonzero(np.concatenate([[True], scores[1:] > scores[:-1], [True]]))  # equal scores stay together
    best = np.flatnonzero((at := lost[cuts]) == at.min())
    ends = np.flatnonzero(np.diff(best, append=-1) != 1)  # neighbouring cuts that are equally good are one run
    first, last = cuts[best[np.append(0, ends[:-1] + 1)]], cuts[best[ends]]
    below = np.where(first > 0, scores[first - 1], scores[0])
    above = np.where(last < len(scores), scores[np.minimum(last, len(scores) - 1)], np.nextafter(scores[-1], np.inf))
    widest = np.argmax(above - below)
    middle = (below[widest] + above[widest]) / 2
    return float(middle if middle > below[widest] else above[widest])  # no number lies between neighbouring floats


def tenfold(scores: np.ndarray, same: np.ndarray, fold: np.ndarray, weight: np.ndarray | None = None):
    """Verification by folds (LFW's View 2): accuracy of each fold with the best threshold of all the others.

    scores, same, fold, whole weight (default 1), all (n,) -> accuracies, thresholds, each (folds,), folds ascending.
    nan for a fold whose pairs all weigh 0. Never a threshold from the tested fold.
    """
    names, fold = np.unique(fold, return_inverse=True)
    order = np.argsort(scores)
    order = order if weight is None else order[weight[order] > 0]
    scores, same, fold = scores[order], same[order], fold[order]
    weight = np.ones(len(order), np.int64) if weight is None else weight[order]
    gain, (accuracies, thresholds) = np.where(same, weight, -weight), np.full((2, len(names)), np.nan)
    for f in range(len(names)):
        test = fold == f
        if test.any() and not test.all():
            thresholds[f] = best_threshold(scores[~test], gain[~test])
            right = (scores[test] >= thresholds[f]) == same[test]
            accuracies[f] = weight[test] @ right / weight[test].sum()
    return accuracies, thresholds


def pair_scores(z: np.ndarray, a: np.ndarray, b: np.ndarray, chunk: int = 4096) -> np.ndarray:
    """Inner products (n,) of the rows a and b, each (n,), of z (N, dim); in pieces that fit a cache."""
    pieces = [slice(i, i + chunk) for i in range(0, len(a), chunk)]
    return np.concatenate([np.einsum("nd,nd->n", z[a[p]], z[b[p]]) for p in pieces])


def unit(z: np.ndarray) -> np.ndarray:
    """The rows of z (N, dim), of any float type, at length 1; zero stays zero."""
    peak = np.maximum(z.max(axis=1, keepdims=True), -z.min(axis=1, keepdims=True))
    z = np.ldexp(z, -np.frexp(peak)[1])  # by a power of two, which is exact: the squares of 1e20 would overflow
    return z / np.sqrt(np.einsum("nd,nd->n", z, z)).clip(0.1)[:, None]


def pool_templates(z: np.ndarray, template: np.ndarray, media: np.ndarray):
    """IJB's media-aware templates: the mean over each medium, the sum over media, normalised.

    z (N, dim), template and media (N,) whole numbers -> names (T,) ascending, unit embeddings (T, dim).
    """
    order = np.lexsort((media, template))
    template, media = template[order], media[order]
    new_template = np.append(True, template[1:] != template[:-1])
    first = np.flatnonzero(new_template | np.append(True, media[1:] != media[:-1]))  # of each medium of each template
    means = np.add.reduceat(z[order], first, axis=0)
    means /= np.diff(first, append=len(z))[:, None].astype(z.dtype)
    starts = np.flatnonzero(new_template[first])
    return template[new_template], unit(np.add.reduceat(means, starts, axis=0))


def identification_ranks(probes, y_probes, gallery, y_gallery, chunk: int = 256) -> np.ndarray:
    """Rank (P,) of each probe's identity in a closed-set search: 1 + the gallery images of others that are at least as
    similar as the most similar one of its own, up to TIE. probes (P, dim), gallery (G, dim), labels (P,) and (G,).

    Raises StageError where a probe's identity has no gallery image.
    """
    ranks = []
    for i in range(0, len(probes), chunk):
        similarity = probes[i:i + chunk] @ gallery.T
        own = y_probes[i:i + chunk, None] == y_gallery
        if not own.any(axis=1).all():
            raise stage.StageError("a probe's identity has no image in the gallery: the search is over a closed set")
        best = np.where(own, similarity, -np.inf).max(axis=1, keepdims=True)
        ranks.append(1 + ((similarity >= best - TIE) & ~own).sum(axis=1))
    return np.concatenate(ranks)


class Verification:
    """Scored pairs of one model, sorted once for all resamples of their identities.

    scores (n,), same (n,) bool; fold (n,) if the list has folds; first and second (n,), whole numbers, the identities
    of the two sides if they are known. metrics(w) takes the multiplicity w_i of each identity in a resample: genuine
    pairs of i weigh w_i and impostor pairs (i, j) weigh w_i w_j, so that copies are never paired. None: the set itself.
    """

    def __init__(self, scores, same, fold=None, first=None, second=None):
        self.order = np.argsort(-scores)
        self.scores, self.same = scores[self.order], same[self.order]
        self.fold = fold if fold is None else fold[self.order]
        self.where = np.flatnonzero(self.same)
        self.cuts = corners(distinct(self.scores), self.where)
        if first is not None:  # pairs of the same two identities weigh the same
            count = max(first.max(), second.max()) + 1
            kinds, self.kind = np.unique((first * count + second)[self.order] * 2 + self.same, return_inverse=True)
            self.kinds = kinds // 2 // count, kinds // 2 % count, kinds % 2 == 1
        self.genuine = int(np.count_nonzero(same))
        self.impostors = len(same) - self.genuine
        self.fars = measurable(self.impostors)
        self.accuracies = None if fold is None else tenfold(scores, same, fold)[0]

    def weight(self, w):
        """Weights (n,) of the pairs, by falling score, from the multiplicities of the identities; None for None."""
        if w is None:
            return None
        first, second, same = self.kinds
        return np.where(same, w[first], w[first] * w[second])[self.kind]

    def roc(self, w=None):
        """FAR and TAR, each (corners,): the curve's corners alone, whatever the pairs weigh."""
        return rates(self.cuts, self.where, self.weight(w))

    def metrics(self, w=None) -> dict:
        """Accuracy if there are folds, EER, TAR at each measurable FAR (keys 1e-1, 1e-2, ...), AUC; nan if a resample
        lacks such pairs."""
        found, (far, tar) = {}, self.roc(w)
        if self.fold is not None:
            each = self.accuracies if w is None else tenfold(self.scores, self.same, self.fold, self.weight(w))[0]
            found["accuracy"] = float(np.nanmean(each))
        found["eer"] = equal_error_rate(far, tar)
        empty = np.isnan(far[-1] + tar[-1])
        found |= {name: math.nan if empty else tar_at(far, tar, f) for name, f in self.fars.items()}
        return found | {"auc": area_under_curve(far, tar)}


class AllPairs(Verification):
    """Verification of all image pairs, and leave-one-out rank-1: z (N, dim) unit embeddings, labels (N,).

    In a resample the probes of identity i weigh w_i and search among all images, whose number a rank depends on.
    """

    def __init__(self, z: np.ndarray, labels: np.ndarray):
        z = z.astype(np.float64)
        similarity = z @ z.T
        self.a, self.b = np.triu_indices(len(labels), 1)
        first, second = labels[self.a], labels[self.b]
        super().__init__(similarity[self.a, self.b], first == second, None, first, second)
        np.fill_diagonal(similarity, -np.inf)
        own = labels[:, None] == labels
        best, other = (np.where(k, similarity, -np.inf).max(axis=1) for k in (own, ~own))
        probe = best > -np.inf  # an image alone in its class is none
        self.found, self.probes = (best > other + TIE)[probe], labels[probe]

    def metrics(self, w=None) -> dict:
        """Those of Verification, and rank-1."""
        weight = np.ones(len(self.probes)) if w is None else w[self.probes]
        return super().metrics(w) | {"rank1": float(weight @ self.found / weight.sum()) if weight.any() else math.nan}


class Identification:
    """Shares of the probes (ranks, labels, both (P,)) whose rank is at most 1, 5, 20. In a resample the probes of
    identity i weigh w_i, the gallery stays."""
    def __init__(self, ranks: np.ndarray, labels: np.ndarray):
        self.ranks, self.labels = ranks, labels

    def metrics(self, w=None) -> dict:
        weight = np.ones(len(self.ranks)) if w is None else w[self.labels]
        return {f"rank{k}": float(weight @ (self.ranks <= k) / weight.sum()) for k in RANKS}


def draw_identities(group: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """Multiplicities (draws, identities) of resamples with replacement, within each group of identities by itself.

    group (identities,): the fold of each, or all 0."""
    rng, w = np.random.default_rng(seed), np.zeros((draws, len(group)), np.int64)
    for g in np.unique(group):
        n = np.count_nonzero(group == g)
        w[:, group == g] = rng.multinomial(n, np.full(n, 1 / n), size=draws)
    return w


# -------------------------------------------------------------------------------------------------------------- run
def raw_embeddings(test: TestSet, system, device, read: dict, cost: Counter) -> tuple[np.ndarray, str]:
    """Embeddings (N, dim) of a test set's images, with their norms; how they were made. read: its images by size."""
    if isinstance(system, Embeddings):
        return system.z[system.rows_of(test)], "embeddings as given"
    model, config = system
    z = embed(model, read[test.name, config["size"], config["channels"]], config, device, unit=False).numpy()
    n = len(z) * (1 + config["flip"])
    cost.update(images=len(z), network_evaluations=n, flops=n * flops_of(model, config, device))
    how = "embeddings of image and mirror image summed" if config["flip"] else "no mirror images"
    if "bgr" in config:  # public weights
        how += f", {'blue' if config['bgr'] else 'red'} first, (x - {config['mean']:g}) / {config['std']:g}"
    return z, how


def read_inputs(args, device) -> tuple[dict, list[TestSet], dict, list[str]]:
    """name -> (model, config) or Embeddings; test sets; their images by size; the models' files. What is wrong with any
    of them is said here."""
    names, systems, files, warnings = report.names_of([*args.model, *args.embeddings]), {}, [], []
    tests = testsets.read(args)
    if len(set(names)) < len(names):
        raise stage.StageError("--model or --embeddings names the same system twice; leave one out")
    for name, path in zip(names, args.model):
        model, saved = load_recognizer(path, device, args.arch, args.bgr, args.mean, args.std)
        systems[name] = model, saved["config"] | ({} if args.flip is None else {"flip": args.flip})
        files.append(saved["path"])
        seen = set(saved["classes"]) & {c for t in tests for c in t.people}
        if seen:
            warnings.append(f"warning: {name} was trained on {len(seen)} classes that bear the names of test classes, "
                            f"such as {min(seen)}; a fair test has none")
    systems |= dict(zip(names[len(args.model):], map(Embeddings, args.embeddings)))
    for test in tests:
        missing = [f for f in test.files if not f.exists()] if args.model else []
        if missing:
            raise stage.StageError(f"{test.name} names {len(missing)} images that are not there, such as {missing[0]}")
        for system in systems.values():
            if isinstance(system, Embeddings):
                system.rows_of(test)
    sizes = {(s[1]["size"], s[1]["channels"]) for s in systems.values() if not isinstance(s, Embeddings)}
    read = {(t.name, *size): stage.Images(None, *size, listing=([t.name], t.files, [0] * len(t.files)))
            for t in tests for size in sizes}  # a broken image is named before anything is written
    print(*warnings, sep="\n", end="\n" * bool(warnings), file=sys.stderr)
    return systems, tests, read, files


def measure(test: TestSet, z: np.ndarray, args):
    """The protocol of a test set on embeddings z (N, dim), which are of length 1 but where --keep-norm says no."""
    a = test.arrays
    if test.kind == "folder":
        return AllPairs(z, a["labels"])
    if test.kind == "search":
        n = len(a["y"])
        return Identification(identification_ranks(z[:n], a["y"], z[n:], a["y_gallery"]), a["y"])
    if test.kind == "pairs":
        scores = pair_scores(z.astype(np.float64), a["a"], a["b"])
        return Verification(scores, a["same"], a["fold"], a["first"], a["second"])
    z = pool_templates(z * a["score"][:, None] if args.detector_scores else z, a["template"], a["media"])[1]
    return Verification(pair_scores(z, a["a"], a["b"]), a["same"])


def assess(test: TestSet, systems: dict, args, device, read: dict, cost: Counter, kept: dict) -> tuple:
    """Results, draws and pictures of every system on one test set; kept: name -> image -> embedding, to be saved."""
    results, draws, pictures = [], {}, {}
    drawn = [] if test.group is None else draw_identities(test.group, args.draws, args.seed)
    for name, system in systems.items():
        z, how = raw_embeddings(test, system, device, read, cost)
        if args.save_embeddings and not isinstance(system, Embeddings):
            kept[name] |= dict(zip(test.names, z))
        z = z if args.keep_norm and test.kind == "templates" else unit(z)
        found = measure(test, z, args)
        value, counts, spread = found.metrics(), dict(test.counts), {}
        each = [found.metrics(w) for w in stage.progress(drawn, f"resampling {name}", disable=None)]
        draws[name] = {k: np.array([m[k] for m in each]) for k in value if each}
        if isinstance(found, Verification):
            a, b = (found.a, found.b) if test.kind == "folder" else (test.arrays["a"], test.arrays["b"])
            shown = np.unique(test.arrays["template"], return_index=True)[1] if test.kind == "templates" else None
            pictures[name] = report.Picture.of(found, test.files, a, b, shown)  # a template is shown by its first image
            counts |= {"genuine": found.genuine, "impostor": found.impostors}
            if found.accuracies is not None:
                spread["accuracy"] = float(np.std(found.accuracies, ddof=1))
        results.append({"name": name, "benchmark": test.name, "protocol": report.describe(test, how, args, TIE),
                        "counts": counts, "metrics": report.summary(value, draws[name], spread)})
    return results, draws, pictures


def columns_of(test: TestSet, impostors: int, alone: bool) -> list[str]:
    """The metrics of a test set that table.md shows, fewer where it is not alone; results.csv has them all."""
    if test.kind == "search":
        return [f"rank{k}" for k in RANKS]
    if test.kind == "templates":
        return [*measurable(impostors)][::-1] or ["eer", "auc"]
    fars = [k for k, f in measurable(impostors).items() if f >= report_far(impostors)]
    if test.kind == "folder":
        return ["eer", *fars, "auc", "rank1"]
    with_folds = ["accuracy"] if test.arrays["fold"] is not None else []
    return [*with_folds, "eer", *fars[-1:], "auc"] if alone else with_folds or ["eer"]


def run(args) -> None:
    device = stage.pick_device(args.device)
    systems, tests, read, models = read_inputs(args, device)
    args.images = {t.name: t.digest() for t in tests} if args.model else None
    templates = [str(Path(d) / f) for d in args.templates for f in ("templates.csv", "pairs.npz")]
    out = stage.Run("evaluate", args, {
        "model": models, "embeddings": args.embeddings, "data": args.data or [], "pairs": args.pairs,
        "probe": args.probe or [], "gallery": args.gallery or [], "templates": templates})
    if (out.dir / "results.json").exists():
        print((out.dir / "table.md").read_text("utf-8") + f"already evaluated: {out.dir}")
        return
    results, columns, pictures, lines, lists, folder_draws = [], [], {}, [], [], None
    cost, kept = Counter(), {name: {} for name in systems}
    for test in tests:
        entries, draws, of_models = assess(test, systems, args, device, read, cost, kept)
        report.compare(entries, draws)
        results += entries
        columns += [(test.name, k) for k in columns_of(test, entries[0]["counts"].get("impostor", 0), len(tests) == 1)]
        lines += report.sentences(test.name, entries)
        pictures |= {test.name: of_models} if of_models else {}
        lists += [entries] if "accuracy" in entries[0]["metrics"] else []
        folder_draws = draws if test.kind == "folder" else folder_draws
    if len(lists) > 1:
        results += (averages := report.average(lists))
        report.compare(averages, {e["name"]: {} for e in averages})
        columns.append((averages[0]["benchmark"], "accuracy"))
    digits = 1 if all(t.kind == "folder" for t in tests) else 2
    table = [report.write_table(results, columns, digits), "", *lines, report.NOTE]
    made = report.draw_figures(out.dir, pictures) if pictures else []
    made += testsets.write_embeddings(out.dir, kept)
    if folder_draws:
        stage.write_atomic(out.dir / "draws.npz", lambda p: report.write_draws(p, folder_draws))
    stage.write_text(out.dir / "results.csv", report.write_csv(results))
    stage.write_text(out.dir / "table.md", "\n".join(table) + "\n")
    out.spend(device, **cost)
    stage.write_json(out.dir / "results.json", {"models": report.as_json(results)})
    print(*table, f"wrote {', '.join(['table.md', 'results.csv', 'results.json', *made])} in {out.dir}", sep="\n")


@stage.command
def main(argv=None):
    run(parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
