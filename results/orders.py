"""The orders of the paper on every set, in one figure.

    python results/orders.py

Reads   results/<set>/results.csv of the four sets, which tables.py writes; --folder DIR instead of results/.
Writes  results/orders.png: the difference in points of EER with its 95 % interval, a line a set and order.
"""

import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import stage  # noqa: E402
from report import pyplot, save_figure  # noqa: E402

SETS = {"omniglot-5": "characters, 5 images", "omniglot": "characters, 20 images", "lfw": "LFW", "orl": "AT&T"}
ORDERS = {"ScoreMix - real": ("far", "real"), "far - random pairs": ("far", "random"),
          "far - close pairs": ("far", "close"), "ScoreMix - AugGen, equal images": ("far", "auggen"),
          "ScoreMix - AugGen, equal evaluations": ("far", "auggen-double")}


def read_gaps(folder: Path) -> dict:
    """(arm, against) -> (value, low, high) of EER, fractions, with the set's own steps, those of the first mean.

    Raises StageError where results.csv is missing.
    """
    path, found = folder / "results.csv", {}
    if not path.exists():
        raise stage.StageError(f"{path} is missing; results/tables.py {folder} writes it")
    with open(path, newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    own = next((x["steps"] for x in lines if x["what"] == "mean"), None)
    for line in lines:
        if (line["what"], line["metric"], line["steps"]) == ("difference", "eer", own):
            found[line["arm"], line["against"]] = tuple(float(line[k]) for k in ("value", "low", "high"))
    return found


@stage.command
def main(argv=None):
    parser = stage.Parser(__doc__)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="the results (default: these)")
    folder = parser.parse_args(argv).folder
    gaps = {name: read_gaps(folder / name) for name in SETS}
    figure, axes = pyplot().subplots(1, len(SETS), figsize=(13, 2.8), layout="constrained", sharey=True)
    for axis, (name, title) in zip(axes, SETS.items()):
        axis.axvline(0, color="gray", lw=1)
        for y, pair in enumerate(ORDERS.values()):
            if pair not in gaps[name]:
                axis.text(0.5, y, "not run", ha="center", va="center", color="gray",
                          transform=axis.get_yaxis_transform())
                continue
            value, low, high = (100 * x for x in gaps[name][pair])
            color = "C0" if high < 0 else "C3" if low > 0 else "gray"
            axis.plot([low, high], [y, y], color=color, lw=2)
            axis.plot(value, y, "s", color=color)
        axis.set(title=title, xlabel="points of EER", yticks=range(len(ORDERS)), yticklabels=list(ORDERS))
        axis.margins(x=0.15)
    axes[0].invert_yaxis()
    figure.suptitle("At equal steps, as planned. Left of zero the first is better; coloured: the interval lacks zero",
                    fontsize=10)
    save_figure(figure, folder / "orders.png")
    print(f"look at {folder}/orders.png")


if __name__ == "__main__":
    sys.exit(main())
