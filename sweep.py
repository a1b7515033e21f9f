"""Mix pairs of classes with every combination of two weights: the picture, and AugGen's search for the best ones.

    R=runs/demo
    python sweep.py --generator $R/generator --recognizer $R/real --data $R/data/train --pairs $R/pairs.csv \\
                    --mix condition --out $R/sweep

Reads   a generator, a recogniser, the training images, a pairs file of two classes a row.
Writes  OUT/sweep.png (the first pair, one noise, all weights), OUT/grid.png (the three measures), OUT/sweep.json.

AugGen (Rahimi et al. 2025) takes the weights (alpha, beta) whose mixes are unlike their sources and like one another:
they maximise dissimilarity to the sources + similarity within a mix; combinations without one of the sources are shown
but do not compete. ScoreMix needs no search, its weights are 1/2.
With --mix score, weights that do not sum to 1 mix x0 (the authors' page shows mid-grey at weights 0 0, as x0 does).
"""

import itertools
import sys
from pathlib import Path

import numpy as np
import torch

import stage
from audit import consistency
from report import pyplot, save_figure
from sample_scoremix import SOLVERS, convex, draw_images, evaluations, mixed_denoiser, read_pairs
from train_diffusion import Schedule, load_generator, save_grid
from train_recognizer import centres_of, embed_batch, load_recognizer
from training import agree, flops_of


def parse_args(argv=None):
    parser = stage.Parser(__doc__)
    g = parser.add_argument_group("inputs and output")
    g.add_argument("--generator", required=True, metavar="RUN", help="run of train_diffusion.py, or a model.pt")
    g.add_argument("--recognizer", required=True, metavar="RUN", help="run of train_recognizer.py, or a model.pt")
    g.add_argument("--data", nargs="+", required=True, metavar="DIR", help="the real training images of the classes")
    g.add_argument("--pairs", required=True, metavar="FILE", help="CSV of mine_pairs.py, two classes a row")
    g.add_argument("--out", required=True, metavar="DIR", help="where the report goes, a run directory")
    g = parser.add_argument_group("sweep")
    g.add_argument("--mix", choices=["score", "condition"], default="score",
                   help="what is mixed: the scores, or AugGen's class embeddings (default: score)")
    g.add_argument("--grid", type=stage.number(float, -100, 100), nargs="+", metavar="W",
                   default=[0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0], help="weights (default: 0 0.2 0.4 0.5 ... 0.8 1)")
    g.add_argument("--mixes", type=stage.number(int, 1), default=8, help="first pairs of the file (default: 8)")
    g.add_argument("--per-class", type=stage.number(int, 2), default=4, metavar="N",
                   help="images of each mix and combination (default: %(default)s)")
    g.add_argument("--solver", choices=SOLVERS, default="ddpm", help="(default: ddpm)")
    g.add_argument("--steps", type=stage.number(int, 1, 1000), default=25, help="of the solver (default: 25)")
    g.add_argument("--batch", type=stage.number(int, 1), default=50, metavar="B", help="images at once (default: 50)")
    g.add_argument("--seed", type=stage.number(int, 0), default=0, help="of the noise (default: 0)")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    return parser.parse_args(argv)


def objective(z: np.ndarray, labels: np.ndarray, sources: np.ndarray) -> tuple[float, float]:
    """AugGen's two terms: 1 - mean cosine to the sources' centres, and mean cosine of two images of the same mix.

    z (N, dim) unit embeddings of mixed images, labels (N,) their mixes, sources (N, M, dim) centres of their classes.
    """
    return 1 - float(np.einsum("nd,nmd->nm", z, sources).mean()), consistency(z, labels)


def draw_grids(path: Path, grid: list[float], cells: dict) -> None:
    """Three maps over the two weights: dissimilarity to the sources, similarity within a mix, their sum."""
    figure, axes = pyplot().subplots(1, 3, figsize=(13, 4), layout="constrained")
    titles = "dissimilarity to the sources", "similarity within a mix", "sum"
    for axis, title, index in zip(axes, titles, range(3)):
        values = np.array([[(*cells[a, b], sum(cells[a, b]))[index] for b in grid] for a in grid])
        figure.colorbar(axis.imshow(values, cmap="viridis"), ax=axis)
        axis.set(title=title, xticks=range(len(grid)), yticks=range(len(grid)), xticklabels=grid, yticklabels=grid,
                 xlabel="weight of class 2", ylabel="weight of class 1")
    save_figure(figure, path, 110)


def run(args) -> None:
    device, schedule, grid = stage.pick_device(args.device), Schedule(), sorted(set(args.grid))
    generator, saved = load_generator(args.generator, device)
    model, of_model = load_recognizer(args.recognizer, device)
    config, ids = saved["config"], {c: i for i, c in enumerate(saved["classes"])}
    agree(f"--recognizer {args.recognizer}", of_model["config"], config)
    mixes = read_pairs(args.pairs, saved["classes"])[:args.mixes]
    if len(mixes[0]) != 2:
        raise stage.StageError(f"a sweep is over two weights, but {args.pairs} mixes {len(mixes[0])} classes")
    images = stage.Images(args.data, config["size"], config["channels"])
    absent = {c for mix in mixes for c in mix} - set(images.classes)
    if absent:
        raise stage.StageError(f"{' '.join(args.data)} lacks the class {min(absent)}; give the training images")
    out = stage.Run("sweep", args, {"generator": saved["path"], "recognizer": of_model["path"], "pairs": args.pairs,
                                    "data": args.data})
    if (out.dir / "sweep.json").exists():
        print(f"already swept: {out.dir}")
        return
    of_class = dict(zip(images.classes, centres_of(model, images, of_model["config"], device)))
    work = [(mix, i) for mix in mixes for i in range(args.per_class)]
    sources = np.array([[of_class[c] for c in mix] for mix, _ in work])  # (N, 2, dim)
    labels = np.repeat(np.arange(len(mixes)), args.per_class)
    y = torch.tensor([[ids[c] for c in mix] for mix, _ in work], device=device)
    shape, flops = (config["channels"], config["size"], config["size"]), flops_of(generator, config, device)
    calls = evaluations(args.solver, args.steps) * len(work) * (2 if args.mix == "score" else 1)
    cells, pictures = {}, []
    for a, b in stage.progress(list(itertools.product(grid, grid)), out.dir.name):
        found = []
        for part in (slice(i, i + args.batch) for i in range(0, len(work), args.batch)):
            denoise = mixed_denoiser(generator, schedule, config["predict"], y[part], [a, b], mix=args.mix)
            found.append(draw_images(denoise, work[part], args.seed, shape, device, schedule, args.solver, args.steps))
        parts = [torch.from_numpy(x).permute(0, 3, 1, 2) for x in found]
        z = torch.cat([embed_batch(model, x.to(device), of_model["config"]).cpu() for x in parts])
        cells[a, b] = objective(z.double().numpy(), labels, sources)
        pictures.append(found[0][0])
        out.spend(device, images=len(work), network_evaluations=calls, flops=calls * flops)
    n = len(grid)
    save_grid(out.dir / "sweep.png", [pictures[i * n:(i + 1) * n] for i in range(n)])
    draw_grids(out.dir / "grid.png", grid, cells)
    mixes_of_both = [c for c in cells if 0 not in c] or list(cells)  # without a source, images are alike for no merit
    best = max(mixes_of_both, key=lambda c: sum(cells[c]))
    rows = [{"weights": list(c), "dissimilarity": v[0], "similarity": v[1], "sum": sum(v)} for c, v in cells.items()]
    stage.write_json(out.dir / "sweep.json", {"best": list(best), "cells": rows})
    lines = ["| weights | dissimilarity to the sources | similarity within a mix | sum |", "|---|---|---|---|"]
    for c in sorted(mixes_of_both, key=lambda c: -sum(cells[c]))[:8]:
        lines.append(f"| {c[0]:g} {c[1]:g} | {cells[c][0]:.3f} | {cells[c][1]:.3f} | {sum(cells[c]):.3f} |")
    more = "" if args.mix == "condition" or convex(best) else " --nonconvex"
    lines.append(f"best: --mix {args.mix} --weights {best[0]:g} {best[1]:g}{more}; wrote "
                 f"{out.dir}/sweep.json; look at {out.dir}/sweep.png and grid.png")
    print(*lines, sep="\n")


@stage.command
def main(argv=None):
    run(parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
