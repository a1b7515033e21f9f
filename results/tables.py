"""Pool the rows of a results folder, and write its table, numbers and figures.

    python results/tables.py results/orl

Reads   FOLDER/rows/, as pooling.py says, with how rows are pooled.
        FOLDER/audit/<unit>-<arm>.json, FOLDER/pairs/<unit>-<arm>.json: what audit.py says of the arm's images and
        mine_pairs.py of its pairs, where there are any; a unit is a fold, or a seed that has its own generator.
        FOLDER/alignment/<unit>.json: what alignment.py says of the unit's generator and mining recogniser, likewise.
        FOLDER/costs/<stage>-<run>.json, FOLDER/configs/<stage>-<run>.json: cost.json and config.json of the runs,
        where there are any.
        FOLDER/settings, which results/arms.sh wrote: whether every fold or every seed has its own generator.
Writes  FOLDER/table.md; FOLDER/results.csv, every number of it and of every row (shares as fractions); FOLDER/gain.png;
        training.png, whether the steps were enough for every arm; distance.png, amount.png and steps.png where arms
        differ by that. A number of steps with two arms or more gets its own table.
"""

import csv
import io
import json
import re
import sys
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import stage  # noqa: E402
from alignment import TITLES as MEASURES  # noqa: E402
from audit import TITLES  # noqa: E402
from costs import ORDER  # noqa: E402
from figures import draw_against, draw_gain, draw_steps, draw_training  # noqa: E402
from pooling import ARMS, FEWEST, Numbers, differ, fars, interval, named_by_steps  # noqa: E402
from pooling import pool, read_logs, read_rows, seeds_alone, several_steps, with_steps  # noqa: E402

PLANNED = {a: 5 if i < 5 else 3 for i, a in enumerate(ARMS)}  # seeds of an arm (plan.md)
CLAIMS = {"ScoreMix > real": ("far", "real"), "far > close": ("far", "close"),
          "ScoreMix > AugGen (equal images)": ("far", "auggen"),
          "ScoreMix > AugGen (equal evaluations)": ("far", "auggen-double"),
          "ScoreMix > deeper backbone on real": ("far", "larger")}  # of the paper
PAIRS = [("far", "random"), ("random", "close"), ("random", "auggen"), ("far", "reproduction"),
         ("far", "mixup"), ("far", "triplet"), ("far", "condition-far"), ("condition-far", "condition-close"),
         ("far", "ddpm25"), ("far", "heun32"), ("far", "dpm6"), ("ddpm8", "real"), ("ddpm8", "far"),
         ("ddpm8", "heun32"), ("dpm6", "ddpm8"), ("dpm6", "heun32"), ("far", "half"), ("double", "far"),
         ("triple", "far"), ("quadruple", "far"), ("many", "far"), ("started", "far"), ("backbone", "far"),
         ("remined", "far"), ("continued", "far")]  # compared as well
METRICS = {"eer": "EER", "miss": "1 - TAR", "auc": "AUC", "rank1": "rank-1"}
FIELDS = ["what", "arm", "against", "steps", "fold", "seed", "metric", "value", "std", "low", "high", "p", "rows"]


def bounds(low: float, high: float) -> str:
    """An interval in hundredths, as [+0.3, +2.1]."""
    return f"[{100 * low:+.1f}, {100 * high:+.1f}]"


def told(x: np.ndarray, unit: str = "") -> str:
    """A difference and its interval, as +1.2 [+0.3, +2.1], of [value, draws], in hundredths."""
    return f"{100 * x[0]:+.1f}{unit} {bounds(*interval(x))}"


def write_csv(path: Path, fields: list[str], lines: list[dict]) -> None:
    """A CSV of these fields, six decimals; of lines that are alike, since tables may share a number, the first."""
    cells = [[line.get(k, "") for k in fields] for line in lines]
    rows = [tuple(f"{v:.6f}" if isinstance(v, float) else v for v in row) for row in cells]
    text = io.StringIO(newline="")
    csv.writer(text).writerows(dict.fromkeys([tuple(fields), *rows]))
    stage.write_text(path, text.getvalue())


def table(rows: dict, far: str, numbers: Numbers, steps: int) -> str:
    """Markdown: a row an arm, in percent; mean and std over the seeds, difference to real with its interval."""
    title = {k: f"{v}@FAR={far} %" if k == "miss" else f"{v} %" for k, v in METRICS.items()}
    lines = ["| trained on | rows | " + " | ".join(
        f"{t} | difference to real | fewer errors" if k in ("eer", "miss") else t for k, t in title.items()) + " |"]
    lines.append("|---" * (lines[0].count("|") - 1) + "|")
    for arm in (a for a in ARMS if any(a == b for _, _, b in rows)):
        keys = [k for k in rows if k[2] == arm]
        cells = [ARMS[arm], str(len(keys))]
        for metric in title:
            of_fold = {f: [rows[k][metric][0] for k in keys if k[0] == f] for f, _, _ in keys}
            mean, std = np.mean([np.mean(v) for v in of_fold.values()]), ""
            if spread := [np.var(v, ddof=1) for v in of_fold.values() if len(v) > 1]:
                std = np.sqrt(np.mean(spread))
            numbers.add("mean", mean, std=std, arm=arm, steps=steps, metric=metric, rows=len(keys))
            cells.append(f"{100 * mean:.1f}" + (f" ± {100 * std:.1f}" if spread else ""))
            if metric in ("eer", "miss"):
                found = differ(rows, metric, arm, "real", numbers, steps) if arm != "real" else None
                cells += [told(found[0]), told(found[1], " %")] if found else ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def by_far(rows: dict, numbers: Numbers, steps: int) -> str:
    """Markdown: 1 - TAR of every arm, and its difference to real, at every FAR down to that of the report."""
    metrics = fars(rows)
    lines = ["| 1 - TAR %, difference to real | " + " | ".join(f"FAR={m[5:]}" for m in metrics) + " |"]
    lines.append("|---" * (len(metrics) + 1) + "|")
    for arm in (a for a in ARMS if any(a == b for _, _, b in rows)):
        cells = []
        for metric in metrics:
            mean = numbers.add("mean", pool(rows, metric, arm)[0, 0], arm=arm, steps=steps, metric=metric)
            found = differ(rows, metric, arm, "real", numbers, steps) if arm != "real" else None
            cells.append(f"{100 * mean:.1f}" + (f", {told(found[0])}" if found else ""))
        lines.append(f"| {' | '.join([ARMS[arm], *cells])} |")
    return "\n".join(lines)


def claims(rows: dict, far: str, numbers: Numbers, steps: int) -> str:
    """Markdown: of each ordering of the paper, whether it holds: whether the interval of the difference lacks zero.

    No verdict on fewer than FEWEST seeds a fold.
    """
    lines = [f"| the paper's order | points of EER | | points of 1 - TAR@FAR={far} | |", "|---" * 5 + "|"]
    for claim, (a, b) in CLAIMS.items():
        cells = []
        common = [k[0] for k in rows if k[2] == a and (*k[:2], b) in rows]
        enough = common and min(map(common.count, common)) >= FEWEST
        for metric in ("eer", "miss"):
            found = differ(rows, metric, a, b, numbers, steps)
            low, high = interval(found[0]) if found and enough else (-1, 1)
            verdict = "**holds**" if high < 0 else "**does not hold**" if low > 0 else "cannot be told"
            verdict = verdict if enough else "too few rows"
            cells += [told(found[0]), verdict] if found else ["", "not run"]
        lines.append(f"| {claim} | {' | '.join(cells)} |")
    return "\n".join(lines)


def compare(rows: dict, a: str, b: str, numbers: Numbers, steps: int) -> list[str] | None:
    """The cells of arm a - arm b: how many of their common rows gain, and the differences; None without such rows."""
    if not (found := differ(rows, "eer", a, b, numbers, steps)):
        return None
    common = sorted(k[:2] for k in rows if k[2] == a and (*k[:2], b) in rows)
    gaps = {k: rows[*k, a]["eer"][0] - rows[*k, b]["eer"][0] for k in common}
    gain = numbers.add("rows that gain", sum(v < 0 for v in gaps.values()), arm=a, against=b, steps=steps,
                       rows=len(common), metric="eer")
    alone = seeds_alone([np.array([v for k, v in gaps.items() if k[0] == f]) for f in sorted({f for f, _ in common})])
    if alone:
        numbers.add("difference, seeds alone", found[0][0], arm=a, against=b, steps=steps, rows=len(common),
                    metric="eer", low=alone[0], high=alone[1])
    cells = [told(differ(rows, m, a, b, numbers, steps)[0]) for m in (*fars(rows), "rank1")]
    return [f"{a} - {b}", f"{gain} of {len(common)}", told(found[0]),
            bounds(*alone) if alone else "", *cells]


def comparisons(rows: dict, numbers: Numbers, steps: int) -> str:
    """Markdown: the arms of the paper's orders against one another, and PAIRS, in points."""
    heads = ["in points", "rows with a lower EER", "EER", "by the seeds alone",
             *(f"1 - TAR@FAR={m[5:]}" for m in fars(rows)), "rank-1 (better above zero)"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    found = [compare(rows, a, b, numbers, steps) for a, b in [*CLAIMS.values(), *PAIRS]]
    if not any(found):
        return "No two of these arms have rows yet."
    return "\n".join(lines + [f"| {' | '.join(cells)} |" for cells in found if cells])


def by_steps(rows: dict, metric: str, title: str, numbers: Numbers, own: int) -> str:
    """Markdown: a metric by steps of the recogniser, of each arm that was run with several.

    Beside them the difference to the same arm with the set's own steps, on the rows of both.
    """
    arms = several_steps(rows, own)
    lines = [f"| steps of the recogniser | {' | '.join(f'{ARMS[a]}: {title} %' for a in arms)} |"]
    lines.append("|---" * (1 + len(arms)) + "|")
    for n in sorted({n for steps in arms.values() for n in steps}):
        cells = []
        for a, steps in arms.items():
            if n not in steps:
                cells.append("")
                continue
            count, usual = (sum(k[2] == name for k in rows) for name in (steps[n], a))
            mean = numbers.add("mean by steps", pool(rows, metric, steps[n])[0, 0], arm=a, steps=n, metric=metric,
                               rows=count)
            gap = differ(rows, metric, steps[n], a, numbers, n) if n != own else None
            few = f" ({count} of {usual} rows)" if count != usual else ""
            cells.append(f"{100 * mean:.1f}{few}" + (f", {told(gap[0])}" if gap else ""))
        lines.append(f"| {n:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def by_steps_of_each(rows: dict, metric: str, numbers: Numbers, own: int) -> str:
    """Markdown: the difference in points of the arms with each of their steps (down) to real with each (across).

    An arm may be best with fewer steps than another, so equal steps are not the only fair comparison.
    """
    named = named_by_steps(rows, own)
    real = named.pop("real", {})
    lines = ["| arm, steps; against real with | " + " | ".join(f"{n:,} steps" for n in real) + " |",
             "|---" * (1 + len(real)) + "|"]
    for arm, n, name in ((arm, n, steps[n]) for arm, steps in named.items() if own in steps for n in steps):
        found = [differ(rows, metric, name, of_real, numbers, n) for of_real in real.values()]
        lines.append(f"| {arm}, {n:,} | {' | '.join(told(x[0]) if x else '' for x in found)} |")
    return "\n".join(lines)


def on_fewer_rows(rows: dict, numbers: Numbers, steps: int) -> list[str]:
    """Markdown: far and random pairs against real on the rows of the arms that have a part of far pairs' alone."""
    names = {a: frozenset(k[:2] for k in rows if k[2] == a) for a in ARMS}
    sets = {}
    for arm in ARMS:
        if names[arm] and names[arm] < names["far"]:
            sets.setdefault(names[arm], []).append(arm)
    lines = []
    for held, arms in sets.items():
        part, cells = {k: v for k, v in rows.items() if k[:2] in held}, []
        for a, m in ((a, m) for a in ("far", "random") for m in ("eer", "miss")):
            found = differ(part, m, a, "real", added := Numbers(), steps)
            cells.append(told(found[0]) if found else "")
            numbers += [x | {"what": f"difference on the rows of {arms[0]}"} for x in added
                        if x["what"] == "difference"]
        lines.append(f"| {', '.join(arms)} | {len(held)} | {' | '.join(cells)} |")
    return lines and ["", "On the rows of arms that have fewer, far and random pairs have, against real:", "",
                      "| arms | rows | far: EER | 1 - TAR | random: EER | 1 - TAR |", "|---" * 6 + "|", *lines]


def other_steps(folder: Path, rows: dict, far: str, numbers: Numbers, own: int) -> list[str]:
    """Markdown: every number of steps but the set's own that has two arms, and the arms over the steps (steps.png)."""
    others = sorted(int(n) for n in {name.partition("@")[2] for *_, name in rows} - {""})
    lines = []
    for n in others:
        some = with_steps(rows, str(n))
        if len({a for *_, a in some}) > 1:
            lines += ["", f"With {n:,} steps of the recogniser:", "", table(some, far, numbers, n), "",
                      comparisons(some, numbers, n), *on_fewer_rows(some, numbers, n)]
    metrics = {"EER": "eer", "1 - TAR@FAR=1e-2": "miss@1e-2", f"1 - TAR@FAR={far}": "miss", "rank-1": "rank1"}
    metrics = {title: m for title, m in metrics.items() if all(m in row for row in rows.values())}
    if several_steps(rows, own):
        for title, metric in metrics.items():
            lines += ["", by_steps(rows, metric, title, numbers, own)]
        lines += ["", "Every number of steps is a training of its own, with its own schedule. Means over all rows; "
                  f"beside them the difference to {own:,} steps, on the rows of both."]
        if draw_steps(folder / "steps.png", rows, own):
            lines[-1] += " [Figure](steps.png)."
    if others and {"real", "far"} <= {*named_by_steps(rows, own)}:
        for title, metric in metrics.items():
            better = ", better above zero" if metric == "rank1" else ""
            lines += ["", f"Each with steps of its own, on the rows of both, points of {title}{better}:", "",
                      by_steps_of_each(rows, metric, numbers, own)]
    return lines


def not_run(rows: dict) -> list[str]:
    """The planned rows that are missing, arm by arm, as "far 0-3, 0-4" (fold-seed), of the arms that have a row.

    With other steps than the set's own an arm should have the first three seeds that it has with those.
    """
    held = {}
    for *key, name in rows:
        held.setdefault(name, set()).add(tuple(key))
    folds, found = {f for f, *_ in rows}, []
    for name in sorted(held, key=lambda name: ([*ARMS].index(name.partition("@")[0]), name)):
        arm, _, other = name.partition("@")
        planned = {(f, s) for f in folds for s in range(PLANNED[arm])}
        if other:
            planned = {(f, s) for f, s in held.get(arm, ()) if s < 3}
        if missing := sorted(planned - held[name]):
            found.append(f"{name} {', '.join(f'{f}-{s}' for f, s in missing)}")
    return found


def read_reports(folder: Path) -> dict:
    """Arm -> the JSON files <unit>-<arm>.json of a folder."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        found.setdefault(path.stem.split("-", 1)[1], []).append(json.loads(path.read_text()))
    return {a: found[a] for a in ARMS if a in found}


def quality(found: dict, numbers: Numbers) -> str:
    """Markdown: what audit.py found in the images of each arm, and in the real images, on the mean of the units."""
    most = max(map(len, found.values()))
    heads = [a if len(found[a]) == most else f"{a} ({len(found[a])} of {most})" for a in found]
    lines = ["| images | real | " + " | ".join(heads) + " |", "|---" * (len(found) + 2) + "|"]
    known = set.intersection(*(set(r) for reports in found.values() for r in reports))  # audits may be of old versions
    for name, title in ((k, v) for k, v in TITLES.items() if k in known):
        columns = {"real": [r[name]["real"] for r in next(iter(found.values()))]}
        columns |= {arm: [r[name]["mixed"] for r in reports] for arm, reports in found.items()}
        cells = ["" if None in values else f"{numbers.add('audit', np.mean(values), arm=arm, metric=name):.3f}"
                 for arm, values in columns.items()]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def alignment(folder: Path, numbers: Numbers) -> str:
    """Markdown: how alike condition and embedding space are (alignment.py): mean, lowest, highest of the units."""
    reports = [json.loads(path.read_text())["measures"] for path in sorted(folder.glob("*.json"))]
    lines = ["| spaces | " + " | ".join(MEASURES.values()) + " |", "|---" * (len(MEASURES) + 1) + "|"]
    for spaces in reports[0]:
        cells = []
        for metric in MEASURES:
            values = [r[spaces][metric] for r in reports]
            low, high = min(values), max(values)
            mean = numbers.add("alignment", np.mean(values), arm=spaces, metric=metric, low=low, high=high,
                               rows=len(values))
            cells.append(f"{mean:.3f}" + (f" ({low:.3f} to {high:.3f})" if len(values) > 1 else ""))
        lines.append(f"| {spaces} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spent(folder: Path, numbers: Numbers) -> str:
    """Markdown: the hours of each stage, of a run on the mean and of all runs; of mining, those in the pairs' files.

    The deeper backbone costs more than the recogniser of all other arms, and has a line of its own, as have other
    numbers of steps.
    """
    runs = []
    for path in sorted(folder.glob("costs/*.json")):
        run, _, steps = path.stem.partition("@")
        name = run.split("-")[0]
        if name == "train_recognizer":
            name += (" --arch medium" if run.endswith("-larger") else "") + (f" --steps {steps}" if steps else "")
        runs.append((name, json.loads(path.read_text())["seconds"]))
    runs += [("mine_pairs", json.loads(p.read_text())["cost"]["seconds"]) for p in sorted(folder.glob("pairs/*.json"))]
    lines = ["| stage | runs | hours a run | hours in all |", "|---" * 4 + "|"]
    for name in sorted({name for name, _ in runs}, key=lambda name: (ORDER.index(name.split()[0]), name)):
        hours = [seconds / 3600 for stage, seconds in runs if stage == name]
        mean = numbers.add("hours a run", np.mean(hours), arm=name, rows=len(hours))
        lines.append(f"| {name} | {len(hours)} | {mean:.3f} | "
                     f"{numbers.add('hours in all', sum(hours), arm=name, rows=len(hours)):.2f} |")
    total = numbers.add("hours in all", sum(seconds for _, seconds in runs) / 3600, arm="all", rows=len(runs))
    return "\n".join([*lines, f"| all | {len(runs)} | | {total:.2f} |"])


def training(logs: dict, numbers: Numbers) -> str:
    """Markdown: how far the recogniser of each arm came with its training images, in its last log line."""
    lines = ["| trained on | steps | loss | accuracy % |", "|---" * 4 + "|"]
    for arm, log in logs.items():
        name, (step, loss, accuracy) = arm.partition("@")[0], log[-1]
        numbers.add("training", loss, arm=name, steps=int(step), metric="loss")
        numbers.add("training", accuracy, arm=name, steps=int(step), metric="accuracy")
        lines.append(f"| {ARMS[name]} | {int(step):,} | {loss:.2f} | {100 * accuracy:.1f} |")
    return "\n".join(lines)


def computed(folder: Path) -> str:
    """In which precision and by which version of PyTorch networks were trained, of the runs whose config is kept."""
    ways = {}
    for path in sorted(folder.glob("configs/train_*.json")):
        config = json.loads(path.read_text())
        versions = [v["torch"].partition("+")[0] for v in (config["versions"], *config.get("resumed", []))]
        way = f"{config['arguments']['precision']}, PyTorch {', then '.join(dict.fromkeys(versions))}"
        ways.setdefault(way, []).append(path.stem.partition("-")[2])
    return "; ".join(f"{way}: " + (f"all {len(names)}" if len(ways) == 1 else ", ".join(names))
                     for way, names in ways.items())


@stage.command
def main(argv=None):
    parser = stage.Parser(__doc__)
    parser.add_argument("folder", type=Path, help="a results folder, with rows/")
    folder = parser.parse_args(argv).folder
    rows, far, steps = read_rows(folder / "rows")
    folds, seeds = sorted({k[0] for k in rows}), sorted({k[1] for k in rows})
    settings = (folder / "settings").read_text() if (folder / "settings").exists() else ""
    owner, development = (re.search(words, settings) for words in ("GENERATORS (fold|seed)", "DEVELOPMENT (.+)"))
    numbers, own = Numbers(), with_steps(rows, "")
    for (fold, seed, arm), row in sorted(rows.items()):
        name, _, n = arm.partition("@")
        for metric in METRICS:
            numbers.add("row", row[metric][0], arm=name, steps=int(n or steps), fold=fold, seed=seed, metric=metric)
    rest = f" (and {len(rows) - len(own)} with other numbers of steps)" if len(rows) > len(own) else ""
    lines = [f"**A development set**: {development[1]}.", ""] if development else []
    lines += [table(own, far, numbers, steps), "", f"{len(own)} rows{rest}, folds {folds}, seeds {seeds}, {steps:,} "
              "steps of the recogniser. In percent: mean over folds ± std over seeds within a fold; in brackets 95 % "
             "intervals that resample identities and seeds (resampling n seeds shows sqrt(1 - 1/n) of their spread, "
             "nothing of one). Means are over all rows of an arm, differences over the rows of both." + (
                 f" Every {owner[1]} has its own generator, mining recogniser and mixes" + (
                     ", one of each for all its seeds: intervals do not cover them." if owner[1] == "fold" else
                     ": intervals cover them.") if owner else ""), "",
             claims(own, far, numbers, steps), "", by_far(own, numbers, steps), "", comparisons(own, numbers, steps),
             *on_fewer_rows(own, numbers, steps)]
    never = [a for a in ARMS if not any(a == b.partition("@")[0] for *_, b in rows)]
    if "VALIDATION" not in settings and (missing := not_run(rows)):
        lines += ["", f"Not run (fold-seed): {'; '.join(missing)}."]
    lines += ["", f"Arms without a row: {', '.join(never)}."] if never else []
    lines += other_steps(folder, rows, far, numbers, steps)
    logs = read_logs(folder / "rows", rows)
    lines += ["", "Were the steps enough? What the recogniser came to on its own training images, mean of an arm's "
              "rows (more images take more steps; [curve](training.png) of those with the set's own):", "",
              training(logs, numbers)]
    draw_training(folder / "training.png", logs)
    if audits := read_reports(folder / "audit"):
        lines += ["", "What the mixed images are like, through the real recogniser (audit.py), on the mean:", "",
                  quality(audits, numbers)]
    if any((folder / "alignment").glob("*.json")):
        lines += ["", "How alike are the generator's condition space and the recogniser's embedding space "
                  "(alignment.py; beside them a recogniser never trained)?", "",
                  alignment(folder / "alignment", numbers)]
    if how := computed(folder):
        lines += ["", f"Networks whose arguments are kept (configs/) were trained in {how}."]
    if (folder / "costs").is_dir():
        lines += ["", "What it cost, without the preparation: hours of a process, measured, mostly two at a time:", "",
                  spent(folder, numbers)]
    if compared := any(a != "real" and (f, s, "real") in rows for f, s, a in rows):
        draw_gain(folder / "gain.png", rows, far)
    pairs = {a: v for a, v in read_reports(folder / "pairs").items() if any(a == b for *_, b in own)}
    distances = {a: np.mean([r["distances"]["chosen_mean"] for r in pairs[a]]) for a in ("close", "random", "far")
                 if a in pairs}
    amounts = {a: np.mean([r["count"] for r in pairs[a]])
               for a in ("half", "far", "double", "triple", "quadruple") if a in pairs}
    for name, places, form, label in (("distance", distances, ".3g", "mean cosine distance of the pairs"),
                                      ("amount", amounts, ",.0f", "number of far pairs")):
        for arm, value in places.items():
            numbers.add(f"pairs: {name}", value, arm=arm)
        if len(places) > 1:
            lines += ["", f"{label.capitalize()}: " + ", ".join(f"{a} {v:{form}}" for a, v in places.items())
                      + f" ([figure]({name}.png))."]
            draw_against(folder / f"{name}.png", own, far, places, label)
    stage.write_text(folder / "table.md", "\n".join(lines) + "\n")
    write_csv(folder / "results.csv", FIELDS, numbers)
    print((folder / "table.md").read_text("utf-8") + f"wrote {folder}/table.md and results.csv"
          + (f"; look at {folder}/gain.png" if compared else ""))


if __name__ == "__main__":
    sys.exit(main())
