"""How much quicker is the evaluation than plain loops written from the definitions, and does it say the same?

    python benchmarks/evaluation.py

Each of evaluate.py's computations against a loop that follows its definition step by step, on invented scores and
embeddings, by turns; the results must agree to 1e-9:

tenfold      accuracy of each fold at the best threshold of the others: every threshold of every fold is tried
tar_at_far   TAR at a FAR, on all pairs: every threshold is tried
pooling      templates: a dict of media, means and sums in Python
intervals    Verification.metrics of 2,000 resamples of identities, all pairs: here the pairs of a resample are written
             out with their multiplicity and every threshold is tried. The loop runs --plain-draws resamples and its
             seconds are scaled to --draws. scikit-learn's roc_curve, which sorts at every resample, is the other peer.
"""

import math

import numpy as np
from common import arguments, machine, ratio, side_by_side, version, write
from sklearn.metrics import auc, roc_curve

import evaluate

TOLERANCE = 1e-9


# -------------------------------------------------------------------------------------------------- the definitions
def plain_tenfold(scores, same, fold):
    """Accuracies and thresholds, each (folds,). Of equally good thresholds the middle of the widest run of gaps."""
    accuracies, thresholds = [], []
    for f in np.unique(fold):
        train, genuine, test = scores[fold != f], same[fold != f], fold == f
        values = np.unique(train)
        # the gaps between neighbouring scores, and the ends: accept all, accept none
        gaps = [(values[0], values[0]), *zip(values, values[1:]), (values[-1], np.nextafter(values[-1], np.inf))]
        right = [np.count_nonzero((train >= high) == genuine) for _, high in gaps]
        best, runs = max(right), []
        for k, (low, high) in enumerate(gaps):
            if right[k] == best and k and right[k - 1] == best:
                runs[-1][1] = high
            elif right[k] == best:
                runs.append([low, high])
        low, high = max(runs, key=lambda run: run[1] - run[0])
        middle = (low + high) / 2
        thresholds.append(middle if middle > low else high)
        accuracies.append(np.mean((scores[test] >= thresholds[-1]) == same[test]))
    return np.array(accuracies), np.array(thresholds)


def plain_curve(scores, same):
    """FAR and TAR at every distinct threshold, from the strictest on."""
    far, tar = [], []
    impostors, genuine = scores[~same], scores[same]
    for threshold in np.unique(scores)[::-1]:
        far.append(np.mean(impostors >= threshold))
        tar.append(np.mean(genuine >= threshold))
    return far, tar


def plain_tar_at_far(far, tar, target):
    return max((t for f, t in zip(far, tar) if f <= target * (1 + 1e-9)), default=0.0)


def plain_eer(far, tar):
    """Where FAR meets 1 - TAR, on straight lines between the points of the curve, which starts at (0, 0)."""
    points = [(0.0, 1.0), *((f, 1 - t) for f, t in zip(far, tar))]
    for (f0, m0), (f1, m1) in zip(points, points[1:]):
        if f1 >= m1:
            share = (m0 - f0) / (m0 - f0 + f1 - m1)
            return f0 + share * (f1 - f0)


def people_of(found: evaluate.Verification):
    """Identities of the two sides, and whether they are the same, of every pair."""
    return (of_kind[found.kind] for of_kind in found.kinds)


def plain_metrics(found: evaluate.Verification, w) -> dict:
    """Of the pairs of a resample: genuine ones of i as often as i was drawn, impostor ones of i and j, times j."""
    times = [int(w[i] if same else w[i] * w[j]) for i, j, same in zip(*people_of(found))]
    far, tar = plain_curve(np.repeat(found.scores, times), np.repeat(found.same, times))
    area = sum((f1 - f0) * (t0 + t1) / 2 for f0, f1, t0, t1 in zip([0.0, *far], far, [0.0, *tar], tar))
    return {"eer": plain_eer(far, tar), "auc": area} | {k: plain_tar_at_far(far, tar, f) for k, f in found.fars.items()}


def sorted_metrics(found: evaluate.Verification, w) -> dict:
    """The same by scikit-learn's curve, which takes weights of pairs."""
    first, second, same = people_of(found)
    weight = np.where(same, w[first], w[first] * w[second])
    far, tar, _ = roc_curve(found.same, found.scores, sample_weight=weight, drop_intermediate=False)
    at = {k: tar[np.searchsorted(far, f * (1 + 1e-9), side="right") - 1] for k, f in found.fars.items()}
    i = np.argmax(far >= 1 - tar)
    gap = 1 - tar[i - 1] - far[i - 1]
    eer = far[i - 1] + gap / (gap + far[i] - 1 + tar[i]) * (far[i] - far[i - 1])
    return {"eer": eer, "auc": auc(far, tar)} | at


def plain_templates(z, template, media):
    """Unit embeddings (T, dim): the mean over each medium, the sum over media."""
    pooled = []
    for t in sorted(set(template.tolist())):
        groups = {}
        for row in np.flatnonzero(template == t):
            groups.setdefault(int(media[row]), []).append(z[row])
        total = sum(sum(rows) / len(rows) for rows in groups.values())
        pooled.append(total / math.sqrt(sum(v * v for v in total)))
    return np.array(pooled)


# -------------------------------------------------------------------------------------------------------------- run
def error(ours, theirs) -> float:
    """The largest difference of two results (arrays, numbers, dicts of numbers); it must be below the tolerance."""
    if isinstance(ours, dict):
        ours, theirs = (np.array([found[k] for k in sorted(theirs)]) for found in (ours, theirs))
    found = float(np.abs(np.asarray(ours) - np.asarray(theirs)).max())
    assert found < TOLERANCE, found
    return found


def main(argv=None) -> None:
    parser = arguments(__doc__, repeats=3, device=False)
    parser.add_argument("--pairs", type=int, default=6000, help="of the list with ten folds")
    parser.add_argument("--people", type=int, default=40, help="of ten images each, all pairs of which are compared")
    parser.add_argument("--templates", type=int, default=2000, help="of about ten images each")
    parser.add_argument("--draws", type=int, default=2000, help="resamples of people")
    parser.add_argument("--plain-draws", type=int, default=2, help="of them by the loop, whose seconds are scaled")
    parser.add_argument("--sorted-draws", type=int, default=100, help="of them by scikit-learn, likewise")
    args = parser.parse_args(argv)
    rng = np.random.default_rng(0)
    same = rng.random(args.pairs) < 0.5
    scores = rng.normal(0.4 * same, 0.12).round(4)  # rounded: with ties
    fold = np.arange(args.pairs) % 10
    labels = np.repeat(np.arange(args.people), 10)
    z = evaluate.unit(rng.normal(size=(args.people, 128))[labels] + 1.5 * rng.normal(size=(len(labels), 128)))
    a, b = np.triu_indices(len(labels), 1)
    of_pairs, genuine = evaluate.pair_scores(z, a, b), labels[a] == labels[b]
    found = evaluate.Verification(of_pairs, genuine, None, labels[a], labels[b])
    drawn = evaluate.draw_identities(np.zeros(args.people), args.draws, 0)
    rows = rng.normal(size=(10 * args.templates, 128))
    template, media = rng.integers(args.templates, size=len(rows)), rng.integers(5, size=len(rows))

    def resamples(metrics, count=args.draws):
        return {i: metrics(found, w) for i, w in enumerate(drawn[:count])}
    whole = evaluate.Verification.metrics
    far = evaluate.report_far(found.impostors)
    questions = {  # computation -> candidate -> function
        "tenfold": {"ours": lambda: np.concatenate(evaluate.tenfold(scores, same, fold)),
                    "loop": lambda: np.concatenate(plain_tenfold(scores, same, fold))},
        "tar_at_far": {"ours": lambda: evaluate.tar_at_far(of_pairs, genuine, far),
                       "loop": lambda: plain_tar_at_far(*plain_curve(of_pairs, genuine), far)},
        "pooling": {"ours": lambda: evaluate.pool_templates(rows, template, media)[1],
                    "loop": lambda: plain_templates(rows, template, media)},
        "intervals": {"ours": lambda: resamples(whole), "loop": lambda: resamples(plain_metrics, args.plain_draws),
                      "scikit-learn": lambda: resamples(sorted_metrics, args.sorted_draws)}}
    scale = {"loop": args.draws / args.plain_draws, "scikit-learn": args.draws / args.sorted_draws}
    results = {}
    for name, candidates in questions.items():
        results[name] = {"largest_difference": {}, "times_ours": {}}
        ours = candidates["ours"]()
        for other in list(candidates)[1:]:
            theirs = candidates[other]()
            pairs = [(ours[i], theirs[i]) for i in theirs] if name == "intervals" else [(ours, theirs)]
            results[name]["largest_difference"][other] = max(error(*pair) for pair in pairs)
        seconds = side_by_side(candidates, args.repeats)
        if name == "intervals":
            seconds = {k: [s * scale.get(k, 1) for s in v] for k, v in seconds.items()}
        results[name] |= {"seconds": seconds, "times_ours": {k: ratio(seconds, k, "ours") for k in seconds}}
    write("evaluation", {"machine": machine(), "versions": version("scikit-learn"), "pairs": args.pairs,
                         "pairs_of_all": len(a), "templates": args.templates, "tolerance": TOLERANCE,
                         "draws": {"ours": args.draws, "loop": args.plain_draws, "scikit-learn": args.sorted_draws,
                                   "seconds": "scaled to those of ours"}, **results}, args.out)


if __name__ == "__main__":
    main()
