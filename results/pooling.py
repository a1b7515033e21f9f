"""The rows of a results folder, and how they are pooled: tables.py and figures.py show what comes out.

A row is one recogniser, its report and the log of its training: ROWS/<fold>-<seed>-<arm>.json and .npz, the
results.json and draws.npz of evaluate.py, and .jsonl, the log.jsonl of train_recognizer.py. An arm called far@2500 is
`far` with 2,500 steps of the recogniser instead of the set's own.

Arms are compared on the folds and seeds that both have. The 95 % intervals resample identities and the seeds of the
retraining: within a fold the draws of evaluate.py, which all its rows share, each with the seeds drawn anew, the same
for both arms; then the mean over the folds, whose draws are shuffled, since one seed made them all.
"""

import json
import re
from pathlib import Path

import numpy as np
from scipy import stats

import stage
from evaluate import measurable

ARMS = {"real": "real", "far": "real + far pairs (ScoreMix)", "random": "real + random pairs",
        "close": "real + close pairs", "reproduction": "real + reproductions",
        "auggen": "real + AugGen (random pairs, condition mix)",
        "auggen-double": "real + AugGen, more images (ScoreMix's evaluations)",
        "larger": "real, backbone of twice the depth", "mixup": "real with mixup",
        "condition-far": "real + pairs far in the condition space",
        "condition-close": "real + pairs close in the condition space",
        "triplet": "real + far triplets", "half": "real + half as many far pairs",
        "double": "real + twice as many far pairs", "triple": "real + three times as many far pairs",
        "quadruple": "real + four times as many far pairs", "many": "real + far pairs, 20 images of each",
        "backbone": "real + far pairs, mined by the deeper backbone",
        "remined": "real + far pairs, mined by the recogniser of real + far pairs",
        "continued": "real + far pairs, continued from the recogniser that mined (its steps come on top)",
        "dirichlet": "real + far pairs, weights from Dirichlet(2)",
        "window": "real + far pairs, mixed at noise levels above 0.5 alone",
        "started": "real + far pairs, from noised images, guidance 3, no shared noise",
        "unstarted": "real + far pairs, sampled from noise alone, guidance 2",
        "autoguided": "real + far pairs, autoguidance 1.5",
        "frozen": "real + far pairs, generator with frozen conditions",
        "aligned": "real + far pairs, generator with alignment loss",
        "ddpm8": "real + far pairs, DDPM with 8 steps", "ddpm25": "real + far pairs, DDPM with 25 steps",
        "dpm6": "real + far pairs, DPM-Solver++ with 6 steps",
        "heun32": "real + far pairs, Heun with 32 steps"}  # in the order of the table

FEWEST = 3  # seeds a fold for a verdict, or for an interval of seeds alone


class Numbers(list):
    """The lines of results.csv, fractions: every number that a table shows was put here."""

    def add(self, what: str, value: float, **fields) -> float:
        self.append({"what": what, "value": value} | fields)
        return value


def read_rows(folder: Path) -> tuple[dict, str, int]:
    """(fold, seed, arm) -> {metric: [value, draw 1, draw 2, ...]} of every row; the FAR of the report, like 1e-2; the
    steps of the arms that do not say theirs.

    The metrics, all fractions: eer, miss (1 - TAR at that FAR), auc, rank1, and 1 - TAR at each FAR, as miss@1e-1.
    """
    rows, fars, steps = {}, set(), {}
    for path in sorted(folder.glob("*.json")):
        if not (name := re.fullmatch(r"(\d+)-(\d+)-(.+)", path.stem)):
            raise stage.StageError(f"{path} is no row; rows are called <fold>-<seed>-<arm>.json")
        arm, _, n = name[3].partition("@")
        if arm not in ARMS:
            raise stage.StageError(f"{path} is of the arm {arm}, which pooling.py has no title for")
        trained = json.loads(path.with_suffix(".jsonl").read_text().splitlines()[-1])["step"]
        if trained != steps.setdefault(n, int(n or trained)):
            raise stage.StageError(f"{path} has {trained:,} steps, not {steps[n]:,} as others: rows of unlike settings")
        entry = json.loads(path.read_text())["models"][0]
        tars, impostors = entry["metrics"].pop("tar_at_far"), entry["counts"]["impostor"]
        can = measurable(impostors, 10)
        far = min(can, key=float, default=None)
        if far is None:
            raise stage.StageError(f"{path} has {impostors} impostor pairs, too few for a report; 100 are needed")
        with np.load(path.with_suffix(".npz")) as file:
            draws = dict(zip(file["metrics"].tolist(), file["draws"][0].astype(np.float64)))
        row = {k: np.append(v["value"], draws[k]) for k, v in entry["metrics"].items()}
        row |= {f"miss@{k}": 1 - np.append(tars[k]["value"], draws[k]) for k in can}
        rows[int(name[1]), int(name[2]), name[3]] = row | {"miss": row[f"miss@{far}"]}
        fars.add(far)
    if len(fars) != 1:
        raise stage.StageError(f"{folder} holds {'rows of unlike reports' if fars else 'no rows'}; expected one set's")
    if "" not in steps:
        names = ", ".join(sorted({name for *_, name in rows}))
        raise stage.StageError(f"{folder} holds other numbers of steps alone ({names}); "
                               "these rows stay, and are compared when there is one with the set's own")
    for fold, seed, name in rows:
        arm, _, n = name.partition("@")
        if n and int(n) == steps[""]:
            raise stage.StageError(f"{folder}/{fold}-{seed}-{name}.json has the set's own steps; call it "
                                   f"{fold}-{seed}-{arm}.json")
    return rows, fars.pop(), steps[""]


def read_logs(folder: Path, rows: dict) -> dict:
    """Arm -> (lines, 3): the step of every log line, the loss and the accuracy, on the mean of the arm's rows."""
    found = {}
    for fold, seed, arm in sorted(rows):
        lines = [json.loads(line) for line in (folder / f"{fold}-{seed}-{arm}.jsonl").read_text().splitlines()]
        found.setdefault(arm, []).append({x["step"]: (x["step"], x["loss"], x["accuracy"]) for x in lines})
    return {b: np.array([np.mean([log[step] for log in found[b]], axis=0) for step in found[b][0]
                         if all(step in log for log in found[b])])
            for a in ARMS for b in sorted(found) if b.partition("@")[0] == a}


def pool(rows: dict, metric: str, *arms: str) -> np.ndarray:
    """(arms, 1 + draws): a metric of some arms, on the folds and seeds that all of them have; first the values.

    All nan where the arms have no row in common.
    """
    folds, rng = [], np.random.default_rng(0)
    for fold in sorted({f for f, _, _ in rows}):
        seeds = sorted({s for f, s, _ in rows if all((fold, s, a) in rows for a in arms)})
        if seeds:
            each = np.array([[rows[fold, s, a][metric] for s in seeds] for a in arms])  # (arms, seeds, 1 + draws)
            each[:, :, 1:] = each[:, :, 1 + rng.permutation(each.shape[2] - 1)]  # the same for all arms and seeds
            drawn = rng.integers(len(seeds), size=each.shape[1:])
            drawn[:, 0] = np.arange(len(seeds))  # the values themselves: every seed once
            folds.append(np.take_along_axis(each, drawn[None], axis=1).mean(1))
    return np.mean(folds, axis=0) if folds else np.full((len(arms), 2), np.nan)


def interval(x: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of [value, draws]."""
    return tuple(np.nanpercentile(x[1:], [2.5, 97.5]).tolist())


def chance(x: np.ndarray) -> float:
    """Two-sided p of [value, draws] against zero: twice the share of draws beyond it, with one more than were drawn."""
    draws = x[1:][np.isfinite(x[1:])]
    return float(min(1, 2 * (1 + min((draws <= 0).sum(), (draws >= 0).sum())) / (1 + len(draws))))


def differ(rows: dict, metric: str, a: str, b: str, numbers: Numbers, steps: int) -> list[np.ndarray] | None:
    """[a - b, the share of b's errors that a has fewer], each [value, draws], on the rows of both; None without any.

    Of a rank-1 rate, which counts no errors, the first alone.
    """
    x, y = pool(rows, metric, a, b)
    if np.isnan(x[0]):
        return None
    found = [x - y]
    if metric != "rank1":
        with np.errstate(divide="ignore", invalid="ignore"):  # a draw of few people may have no error
            found.append(1 - x / y)
    count = sum((*k[:2], b) in rows for k in rows if k[2] == a)
    for what, v in zip(("difference", "fewer errors"), found):
        low, high = interval(v)
        numbers.add(what, v[0], arm=a, against=b, steps=steps, metric=metric, low=low, high=high, rows=count,
                    p=chance(v))
    return found


def seeds_alone(folds: list[np.ndarray]) -> tuple[float, float] | None:
    """Student's interval of the mean of the folds' means, from the seeds of each: the same people and generators.

    Welch's degrees of freedom, since folds differ in spread. None with fewer than FEWEST seeds in a fold.
    """
    if min(map(len, folds)) < FEWEST:
        return None
    errors = [v.var(ddof=1) / len(v) for v in folds]  # variances; a few seeds are too few for a bootstrap
    freedom = sum(errors) ** 2 / max(sum(e * e / (len(v) - 1) for e, v in zip(errors, folds)), 1e-300)
    reach = stats.t.ppf(0.975, max(freedom, 1)) * np.sqrt(sum(errors)) / len(folds)
    gap = np.mean([v.mean() for v in folds])
    return float(gap - reach), float(gap + reach)


def fars(rows: dict) -> list[str]:
    """The metrics miss@FAR, from the largest FAR down to that of the report."""
    return sorted((m for m in next(iter(rows.values())) if m.startswith("miss@")), key=lambda m: -float(m[5:]))


def with_steps(rows: dict, steps: str) -> dict:
    """The rows of the arms that were run with so many steps ("": the set's own), under the names of the arms."""
    parts = {k: k[2].partition("@") for k in rows}
    return {(*k[:2], parts[k][0]): row for k, row in rows.items() if parts[k][2] == steps}


def named_by_steps(rows: dict, own: int) -> dict:
    """Arm -> {steps: its name with so many}, ascending, as {"far": {100: "far@100", 5000: "far"}}."""
    found = {}
    for name in {name for *_, name in rows}:
        arm, _, n = name.partition("@")
        found.setdefault(arm, {})[int(n or own)] = name
    return {a: dict(sorted(found[a].items())) for a in ARMS if a in found}


def several_steps(rows: dict, own: int) -> dict:
    """Arm -> its names by steps, of the arms that were run with other steps beside their own."""
    return {a: names for a, names in named_by_steps(rows, own).items() if len(names) > 1 and own in names}
