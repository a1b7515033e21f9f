"""The orders of the paper on every set: one figure, and one table that corrects for their number.

    python results/orders.py

Reads   results/<set>/results.csv of the four sets, which tables.py writes; --folder DIR instead of results/.
Writes  results/orders.png: the difference in points of EER with its 95 % interval, a line a set and order, far - random
        pairs beside those of the paper;
        results/orders.md, orders.csv: the orders of the paper by EER and by 1 - TAR at the report's FAR, the interval
        from the seeds alone, and p with and without the correction of Holm (1979) for as many orders as were asked.
"""

import csv
import sys
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import stage  # noqa: E402
from report import pyplot, save_figure  # noqa: E402
from tables import CLAIMS, bounds, write_csv  # noqa: E402

SETS = {"omniglot-5": "characters, 5 images", "omniglot": "characters, 20 images", "lfw": "LFW",
        "orl": "AT&T (development)"}
ORDERS = CLAIMS | {"far > random": ("far", "random")}
METRICS = {"eer": "EER", "miss": "1 - TAR"}
FIELDS = ["set", "order", "metric", "value", "low", "high", "seeds_low", "seeds_high", "p", "p_holm"]


def read_lines(folder: Path) -> tuple[list[dict], str]:
    """The lines of folder/results.csv, and the steps of the set's own rows, those of the first mean.

    Raises StageError where the file is missing or has no mean.
    """
    path = folder / "results.csv"
    if not path.exists():
        raise stage.StageError(f"{path} is missing; results/tables.py {folder} writes it")
    with open(path, newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    own = next((x["steps"] for x in lines if x["what"] == "mean"), None)
    if own is None or "p" not in lines[0]:
        raise stage.StageError(f"{path} is empty, or of an older tables.py; run results/tables.py {folder} again")
    return lines, own


def read_gaps(folder: Path) -> dict:
    """(arm, against, metric) -> the difference in results.csv, as {"value": -0.01, "low": ..., "p": ...}.

    With the set's own steps; seeds_low, seeds_high: the interval from the seeds alone, where there is one. Fractions.
    """
    lines, own = read_lines(folder)
    lines = [x for x in lines if x["steps"] == own and x["metric"] in METRICS]
    found = {(x["arm"], x["against"], x["metric"]): {k: float(x[k]) for k in ("value", "low", "high", "p")}
             for x in lines if x["what"] == "difference"}
    for x in lines:
        if x["what"] == "difference, seeds alone":
            found[x["arm"], x["against"], x["metric"]] |= {f"seeds_{k}": float(x[k]) for k in ("low", "high")}
    return found


def holm(p: list[float]) -> list[float]:
    """p-values with Holm's correction: one below 0.05 then holds with all of them asked at once."""
    order = np.argsort(p, kind="stable")
    corrected = np.minimum(1, np.maximum.accumulate(np.sort(p) * np.arange(len(p), 0, -1)))
    return corrected[np.argsort(order)].tolist()


def table(gaps: dict) -> tuple[str, list[dict]]:
    """Markdown, and the lines of orders.csv: each order on each set that ran both arms, by both metrics."""
    lines = [{"set": name, "order": order, "metric": m, **gaps[name][*arms, m]}
             for name in SETS for order, arms in CLAIMS.items() for m in METRICS if (*arms, m) in gaps[name]]
    for line, p in zip(lines, holm([line["p"] for line in lines])):
        line["p_holm"] = p
    text = ["The orders of the paper at equal steps, in points, with 95 % intervals; below zero the first is better. "
            "p is two-sided, from the same draws (2,000, so 0.001 is the least); in the last column with Holm's "
            f"correction for these {len(lines)}.",
            "", "| set | order | by | difference | by the seeds alone | p | p, Holm |", "|---" * 7 + "|"]
    for x in lines:
        alone = bounds(x["seeds_low"], x["seeds_high"]) if "seeds_low" in x else ""
        p = f"**{x['p_holm']:.3f}**" if x["p_holm"] < 0.05 else f"{x['p_holm']:.3f}"
        text.append(f"| {SETS[x['set']]} | {x['order']} | {METRICS[x['metric']]} | {100 * x['value']:+.1f} "
                    f"{bounds(x['low'], x['high'])} | {alone} | {x['p']:.3f} | {p} |")
    return "\n".join(text) + "\n", lines


def draw(path: Path, gaps: dict) -> None:
    """The figure, by EER."""
    figure, axes = pyplot().subplots(1, len(SETS), figsize=(13, 3), layout="constrained", sharey=True)
    for axis, (name, title) in zip(axes, SETS.items()):
        axis.axvline(0, color="gray", lw=1)
        for y, arms in enumerate(ORDERS.values()):
            if not (gap := gaps[name].get((*arms, "eer"))):
                axis.text(0.5, y, "not run", ha="center", va="center", color="gray",
                          transform=axis.get_yaxis_transform())
                continue
            value, low, high = (100 * gap[k] for k in ("value", "low", "high"))
            color = "C0" if high < 0 else "C3" if low > 0 else "gray"
            axis.plot([low, high], [y, y], color=color, lw=2)
            axis.plot(value, y, "s", color=color)
        axis.set(title=title, xlabel="points of EER", yticks=range(len(ORDERS)), yticklabels=list(ORDERS))
        axis.margins(x=0.15)
    axes[0].invert_yaxis()
    figure.suptitle("At equal steps. Left of zero the first is better; coloured: the 95 % interval lacks zero",
                    fontsize=10)
    save_figure(figure, path)


def parse_folder(doc: str, argv) -> Path:
    """The folder with the results of all sets, which --folder may name, of a script with this docstring."""
    parser = stage.Parser(doc)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="the results (default: these)")
    return parser.parse_args(argv).folder


@stage.command
def main(argv=None):
    folder = parse_folder(__doc__, argv)
    gaps = {name: read_gaps(folder / name) for name in SETS}
    text, lines = table(gaps)
    draw(folder / "orders.png", gaps)
    stage.write_text(folder / "orders.md", text)
    write_csv(folder / "orders.csv", FIELDS, lines)
    print(f"{text}look at {folder}/orders.png")


if __name__ == "__main__":
    sys.exit(main())
