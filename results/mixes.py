"""What the added images of every set are like, beside what they do to the errors: one table and one figure.

    python results/mixes.py

Reads   results/<set>/results.csv of the four sets and of LFW's first experiment, which tables.py writes; --folder DIR
        instead of results/.
Writes  results/mixes.md: a line a set and arm, what audit.py found in its images;
        results/mixes.png: the difference to real data alone in points of EER, with its 95 % interval, over how like
        their sources the mixes are, and over how alike the images of a mix are.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import stage  # noqa: E402
from orders import SETS, parse_folder, read_lines  # noqa: E402
from pooling import ARMS  # noqa: E402
from report import pyplot, save_figure  # noqa: E402
from tables import bounds  # noqa: E402

FOLDERS = SETS | {"lfw/steps-10000": "LFW, 10,000 steps"}
COLUMNS = {"sources_are_nearest": ("taken for their sources", "{:.2f}"),
           "similarity_to_sources": ("cosine to the sources", "{:.2f}"), "loss": ("loss", "{:.1f}"),
           "consistency": ("consistency", "{:.2f}"), "frechet_distance": ("Frechet distance", "{:.3f}"),
           "contrast": ("contrast", "{:.0f}"), "nearer_than_classmates_embedding": ("copies, %", "{:.1%}")}
MARKERS = {"far": "v", "random": "o", "close": "^", "auggen": "s", "auggen-double": "D"}
AXES = {"similarity_to_sources": "cosine of a mix to the centres of its sources",
        "consistency": "consistency of a mix, as a share of that of real images"}
HEAD = """By `audit.py`, on the mean of an arm's sets of images, through the recogniser of real images of that set, so
compare distances within a set only. *Taken for their sources*: the share of images whose two nearest centres are those
of the classes mixed (of reproductions: whose nearest is their own). *Loss*: cross-entropy at scale 32, the sources in
equal shares. *Consistency*: the mean cosine of two images of a class. *Contrast*: the standard deviation of the pixels,
in grey levels. *Copies*: images nearer to a training image than its class-mates are, by embedding. EER: points against
real data alone. LFW's first experiment has another generator and another mining recogniser.

![the difference in EER over what the images are like](mixes.png)

"""


def read(folder: Path) -> dict:
    """arm -> {"gap": (value, low, high) in points of EER against real (none of real itself), and each of COLUMNS that
    was measured}, of the arms whose images were audited, in the order of ARMS."""
    lines, own = read_lines(folder)
    found = {}
    for line in lines:
        if line["what"] == "audit" and line["metric"] in COLUMNS:
            found.setdefault(line["arm"], {})[line["metric"]] = float(line["value"])
    for line in lines:
        if (line["what"], line["against"], line["metric"], line["steps"]) == ("difference", "real", "eer", own):
            if line["arm"] in found:
                found[line["arm"]]["gap"] = tuple(100 * float(line[k]) for k in ("value", "low", "high"))
    return {arm: found[arm] for arm in ARMS if arm in found}


def table(sets: dict) -> str:
    """Markdown: sets is name -> what read() returns."""
    heads = ["images", "EER", *(title for title, _ in COLUMNS.values())]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, arms in sets.items():
        for arm, x in arms.items():
            gap = f"{x['gap'][0]:+.1f} {bounds(*(g / 100 for g in x['gap'][1:]))}" if "gap" in x else ""
            cells = [form.format(x[k]).rstrip("%") if k in x else "" for k, (_, form) in COLUMNS.items()]
            title = "the real images" if arm == "real" else ARMS[arm].removeprefix("real + ")
            lines.append(f"| {FOLDERS[name]}: {title} | {gap} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(path: Path, sets: dict) -> None:
    """The figure, of the mixes of the four sets; reproductions are not mixes, and left out."""
    figure, axes = pyplot().subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    for axis, (metric, label) in zip(axes, AXES.items()):
        for i, name in enumerate(SETS):
            unit = sets[name]["real"]["consistency"] if metric == "consistency" else 1
            points = {arm: (x[metric] / unit, *x["gap"]) for arm, x in sets[name].items()
                      if arm in MARKERS and "gap" in x}
            for arm, (place, value, low, high) in points.items():
                axis.plot([place, place], [low, high], f"C{i}", lw=1, alpha=0.4)
                axis.plot(place, value, f"C{i}{MARKERS[arm]}")
            axis.plot(*list(zip(*sorted(points.values())))[:2], f"C{i}:", lw=1)
        axis.axhline(0, color="gray", lw=1)
        axis.set(xlabel=label)
    axes[0].set(ylabel="points of EER against real")
    sets_of = [axes[0].plot([], [], f"C{i}:", label=title)[0] for i, title in enumerate(SETS.values())]
    arms_of = [axes[0].plot([], [], f"k{m}", ls="", label=arm)[0] for arm, m in MARKERS.items()]
    figure.legend(handles=sets_of + arms_of, loc="outside upper center", ncols=5, fontsize=9)
    save_figure(figure, path)


@stage.command
def main(argv=None):
    folder = parse_folder(__doc__, argv)
    sets = {name: read(folder / name) for name in FOLDERS}
    draw(folder / "mixes.png", sets)
    text = "# What the added images of each set are like\n\n" + HEAD + table(sets)
    stage.write_text(folder / "mixes.md", text)
    print(f"{text}look at {folder}/mixes.png")


if __name__ == "__main__":
    sys.exit(main())
