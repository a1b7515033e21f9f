"""Pool the rows of a results folder.

    python results/tables.py results/orl

Reads   FOLDER/rows/<fold>-<seed>-<arm>.json and .npz: the results.json and draws.npz of evaluate.py, of one recogniser.
        FOLDER/audit/<fold>-<arm>.json: the audit.json of audit.py of the arm's images, where there are any.
Writes  FOLDER/table.md, FOLDER/results.csv (a line a row), FOLDER/gain.png. An arm called far@2500 is `far` with 2,500
        steps of the recogniser instead of the default; a number of steps with three arms or more gets its own table.

Arms are compared on the folds and seeds that both have. The 95 % intervals resample identities and the seeds of the
retraining: within a fold the draws of evaluate.py, which all its rows share, each with the seeds drawn anew, the same
for both arms; then the mean over the folds, whose draws are shuffled, since one seed made them all.
"""

import csv
import io
import json
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import stage  # noqa: E402
from audit import TITLES  # noqa: E402
from evaluate import measurable  # noqa: E402
from report import pyplot, save_figure  # noqa: E402
from train_recognizer import SMALL  # noqa: E402

ARMS = {"real": "real", "far": "real + far pairs (ScoreMix)", "random": "real + random pairs",
        "close": "real + close pairs", "reproduction": "real + reproductions",
        "auggen": "real + AugGen (random pairs, condition mix)", "triplet": "real + far triplets",
        "condition-far": "real + pairs far in the condition space",
        "condition-close": "real + pairs close in the condition space",
        "continued": "real + far pairs, continued from real (twice the steps)",
        "mixup": "real with mixup", "dirichlet": "real + far pairs, weights from Dirichlet(2)",
        "window": "real + far pairs, mixed at noise levels above 0.5 alone",
        "autoguided": "real + far pairs, autoguidance 1.5",
        "frozen": "real + far pairs, generator with frozen conditions",
        "aligned": "real + far pairs, generator with alignment loss",
        "ddpm8": "real + far pairs, DDPM with 8 steps (the default)",
        "dpm6": "real + far pairs, DPM-Solver++ with 6 steps",
        "heun32": "real + far pairs, Heun with 32 steps"}  # in the order of the table

PAIRS = [("far", "real"), ("far", "close"), ("far", "random"), ("far", "reproduction"), ("ddpm8", "heun32"),
         ("ddpm8", "far"), ("ddpm8", "real"), ("dpm6", "ddpm8")]  # compared below the table
MAIN = list(ARMS)[:5]  # the arms that every fold and seed should have


def read_rows(folder: Path) -> tuple[dict, str]:
    """(fold, seed, arm) -> {metric: [value, draw 1, draw 2, ...]} of every row, and the FAR of the report, like 1e-2.

    The metrics, all fractions: eer, miss (1 - TAR at that FAR), auc, rank1.
    """
    rows, fars = {}, set()
    for path in sorted(folder.glob("*.json")):
        if not (name := re.fullmatch(r"(\d+)-(\d+)-(.+)", path.stem)):
            raise stage.StageError(f"{path} is no row; rows are called <fold>-<seed>-<arm>.json")
        entry = json.loads(path.read_text())["models"][0]
        tars, impostors = entry["metrics"].pop("tar_at_far"), entry["counts"]["impostor"]
        far = min(measurable(impostors, 10), key=float, default=None)
        if far is None:
            raise stage.StageError(f"{path} has {impostors} impostor pairs, too few for a report; 100 are needed")
        with np.load(path.with_suffix(".npz")) as file:
            draws = dict(zip(file["metrics"].tolist(), file["draws"][0].astype(np.float64)))
        row = {k: np.append(v["value"], draws[k]) for k, v in (entry["metrics"] | {far: tars[far]}).items()}
        rows[int(name[1]), int(name[2]), name[3]] = row | {"miss": 1 - row.pop(far)}
        fars.add(far)
    if len(fars) != 1:
        raise stage.StageError(f"{folder} holds {'rows of unlike reports' if fars else 'no rows'}; expected one set's")
    return rows, fars.pop()


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


def told(x: np.ndarray, unit: str = "") -> str:
    """A difference and its interval, as +1.2 [+0.3, +2.1], of [value, draws], in hundredths."""
    if np.isnan(x[0]):
        return ""  # nothing to compare
    low, high = np.nanpercentile(x[1:], [2.5, 97.5])
    return f"{100 * x[0]:+.1f}{unit} [{100 * low:+.1f}, {100 * high:+.1f}]"


def table(rows: dict, far: str) -> str:
    """Markdown: a row an arm, in percent; mean and std over the seeds, difference to real with its interval."""
    title = {"eer": "EER %", "miss": f"1 - TAR@FAR={far} %", "auc": "AUC %", "rank1": "rank-1 %"}
    lines = ["| trained on | rows | " + " | ".join(
        f"{t} | difference to real | fewer errors" if k in ("eer", "miss") else t for k, t in title.items()) + " |"]
    lines.append("|---" * (lines[0].count("|") - 1) + "|")
    for arm in (a for a in ARMS if any(a == b for _, _, b in rows)):
        keys = [k for k in rows if k[2] == arm]
        cells = [ARMS[arm], str(len(keys))]
        for metric in title:
            of_fold = {f: [rows[k][metric][0] for k in keys if k[0] == f] for f, _, _ in keys}
            mean = np.mean([np.mean(v) for v in of_fold.values()])
            spread = [np.var(v, ddof=1) for v in of_fold.values() if len(v) > 1]
            cells.append(f"{100 * mean:.1f}" + (f" ± {100 * np.sqrt(np.mean(spread)):.1f}" if spread else ""))
            if metric in ("eer", "miss"):
                ours, real = pool(rows, metric, arm, "real")
                cells += ["", ""] if arm == "real" else [told(ours - real), told(1 - ours / real, " %")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def compare(rows: dict, a: str, b: str) -> str:
    """Markdown: arm a - arm b on the rows of both; how many gain; the interval of seeds alone, for the same people."""
    common = sorted(k[:2] for k in rows if k[2] == a and (*k[:2], b) in rows)
    gaps = {k: rows[*k, a]["eer"][0] - rows[*k, b]["eer"][0] for k in common}
    folds = [np.array([v for k, v in gaps.items() if k[0] == f]) for f in sorted({f for f, _ in common})]
    rng = np.random.default_rng(0)
    seeds = np.mean([rng.choice(v, (4000, len(v))).mean(1) for v in folds], axis=0)
    told_of = [(title, pool(rows, metric, a, b)) for title, metric in (("EER", "eer"), ("1 - TAR", "miss"))]
    parts = [f"{title} {told(x - y)} ({100 * x[0]:.1f} and {100 * y[0]:.1f})" for title, (x, y) in told_of]
    low, high = 100 * np.percentile(seeds, [2.5, 97.5])
    return (f"- {a} - {b}: {', '.join(parts)} points; {sum(v < 0 for v in gaps.values())} of {len(common)} rows have a "
            f"lower EER; seeds alone leave EER [{low:+.1f}, {high:+.1f}]")


def with_steps(rows: dict, steps: str) -> dict:
    """The rows of the arms that were run with so many steps ("": the default), under the names of the arms."""
    parts = {k: k[2].partition("@") for k in rows}
    return {(*k[:2], arm): rows[k] for k, (arm, _, n) in parts.items() if n == steps}


def by_steps(rows: dict, far: str) -> str:
    """Markdown: EER and 1 - TAR by steps of the recogniser, of the arms that were run with several, on common rows."""
    tables = {int(n or SMALL["steps"]): with_steps(rows, n) for n in {b.partition("@")[2] for *_, b in rows} | {""}}
    arms = [a for a in ARMS if all(any(a == b for *_, b in some) for some in tables.values())]  # run with all of them
    common = [k for k in {k[:2] for k in rows} if all((*k, a) in some for a in arms for some in tables.values())]
    lines = [f"| steps of the recogniser | {' | '.join(f'{ARMS[a]}: EER % | 1 - TAR@FAR={far} %' for a in arms)} |"]
    lines.append("|---" * (1 + 2 * len(arms)) + "|")
    if not arms or not common:
        return "No fold and seed has every number of steps yet."
    for n, some in sorted(tables.items()):
        cells = [f"{100 * np.mean([some[*k, a][m][0] for k in common]):.1f}" for a in arms for m in ("eer", "miss")]
        lines.append(f"| {n:,} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Mean of {len(common)} rows each: folds and seeds {sorted(common)}."])


def quality(folder: Path) -> str:
    """Markdown: what audit.py found in the images of each arm, and in the real images, on the mean of the folds."""
    found = {}  # arm -> the folds' reports
    for path in sorted(folder.glob("*.json")):
        found.setdefault(path.stem.split("-", 1)[1], []).append(json.loads(path.read_text()))
    arms = [a for a in ARMS if a in found]
    if not arms:
        raise stage.StageError(f"{folder} holds no audits of known arms; delete it, or run results/orl/run.sh")
    heads = [a if len(found[a]) == max(map(len, found.values())) else f"{a} ({len(found[a])} fold)" for a in arms]
    lines = ["| images | real | " + " | ".join(heads) + " |", "|---" * (len(arms) + 2) + "|"]
    for name, title in TITLES.items():
        real = [r[name]["real"] for r in found[arms[0]]]
        cells = ["" if None in real else f"{np.mean(real):.3f}"]
        cells += [f"{np.mean([r[name]['mixed'] for r in found[a]]):.3f}" for a in arms]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_gain(path: Path, rows: dict, far: str) -> None:
    """A figure: the change of the errors against `real`, a point a row, coloured by fold, and the pooled interval."""
    arms = [a for a in ARMS if a != "real" and any(a == b for _, _, b in rows)]
    figure, axes = pyplot().subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    for axis, metric, title in zip(axes, ("eer", "miss"), ("EER", f"1 - TAR@FAR={far}")):
        for y, arm in enumerate(arms):
            pairs = sorted((f, s) for f, s, a in rows if a == arm and (f, s, "real") in rows)
            gaps = [100 * (rows[f, s, arm][metric][0] - rows[f, s, "real"][metric][0]) for f, s in pairs]
            axis.scatter(gaps, np.linspace(y + 0.1, y + 0.4, len(gaps)), 12, [f"C{f}" for f, _ in pairs])
            if not pairs:
                continue
            ours, real = pool(rows, metric, arm, "real")
            low, high = 100 * np.nanpercentile((ours - real)[1:], [2.5, 97.5])
            axis.plot([low, high], [y, y], "k-", [100 * (ours - real)[0]], [y], "ks")
        axis.axvline(0, color="gray", lw=1)
        axis.set(title=title, xlabel="points; left: fewer errors",
                 yticks=range(len(arms)), yticklabels=[ARMS[a] for a in arms])
    save_figure(figure, path)


@stage.command
def main(argv=None):
    parser = stage.Parser(__doc__)
    parser.add_argument("folder", type=Path, help="a results folder, with rows/")
    folder = parser.parse_args(argv).folder
    rows, far = read_rows(folder / "rows")
    folds, seeds = sorted({k[0] for k in rows}), sorted({k[1] for k in rows})
    missing = [f"{f}-{s}-{a}" for a in MAIN for f in folds for s in seeds if (f, s, a) not in rows]
    lines = [table(rows, far), "", f"{len(rows)} rows, folds {folds}, seeds {seeds}. In percent: mean over folds ± std "
             "over seeds within a fold; in brackets 95 % intervals that resample identities and seeds (with one seed a "
             "fold, identities alone). A seed is one of the retraining: the recogniser for mining, the generator and "
             "the images are one of each a fold."]
    pairs = [(a, b) for a, b in PAIRS if any({(*k[:2], a), (*k[:2], b)} <= rows.keys() for k in rows)]
    lines += ["", *(compare(rows, a, b) for a, b in pairs)]
    lines += ["", f"Not run: {', '.join(missing)}."] if missing else []
    others = {a.partition("@")[2] for *_, a in rows} - {""}
    for n in sorted(others, key=int):
        some = with_steps(rows, n)
        if len({a for *_, a in some}) > 2:
            lines += ["", f"With {int(n):,} steps of the recogniser:", "", table(some, far)]
    if others:
        lines += ["", by_steps(rows, far)]
    if (folder / "audit").is_dir():
        lines += ["", "What the mixed images are like, through the real recogniser (audit.py), mean of the folds:", "",
                  quality(folder / "audit")]
    stage.write_atomic(folder / "table.md", lambda p: p.write_text("\n".join(lines) + "\n"))
    text = io.StringIO(newline="")
    out = csv.writer(text)
    out.writerow(["fold", "seed", "arm", "eer", f"tar_at_far_{far}", "auc", "rank1"])
    for (fold, seed, arm), row in sorted(rows.items()):
        values = [row["eer"][0], 1 - row["miss"][0], row["auc"][0], row["rank1"][0]]
        out.writerow([fold, seed, arm, *(f"{v:.6f}" for v in values)])
    stage.write_atomic(folder / "results.csv", lambda p: p.write_text(text.getvalue()))
    draw_gain(folder / "gain.png", rows, far)
    print(*lines, f"wrote {folder}/table.md and results.csv; look at {folder}/gain.png", sep="\n")


if __name__ == "__main__":
    sys.exit(main())
