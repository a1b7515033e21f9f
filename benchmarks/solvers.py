"""Which solver needs the fewest network evaluations for the quality of Heun's method with 32 steps?

    R=runs/demo
    python benchmarks/solvers.py --generator $R/generator --recognizer $R/real --data $R/data/train --pairs $R/pairs.csv

Every setting draws the same reproductions and the same mixes from the same noise. What is measured in the recogniser's
embedding space: the Frechet distance of the reproductions to the real images, and the consistency of reproductions and
of mixes (mean cosine of two images of a class). Downstream recognition is measured by results/orl/run.sh.
"""

from pathlib import Path

import numpy as np
import torch
from common import ROOT, arguments, machine, stage, write

from audit import consistency, frechet_distance
from report import pyplot, save_figure
from sample_scoremix import draw_images, evaluations, mixed_denoiser, read_pairs, timesteps
from train_diffusion import Schedule, load_generator
from train_recognizer import class_centres, embed, embed_batch, load_recognizer

MEASURES = {"frechet_distance": "Frechet distance, reproductions to real",
            "consistency": "consistency of reproductions", "consistency_of_mixes": "consistency of far mixes"}
# solver -> numbers of steps; dpm++/edm is dpm++ on the noise levels of Heun's method
SETTINGS = {"heun": (5, 8, 12, 32), "ddpm": (8, 12, 16, 25, 50), "ddim": (8, 12, 25),
            "dpm++": (5, 6, 8, 10, 15, 25), "dpm++/edm": (6, 8, 10, 15)}


def draw_figure(path: Path, rows: list[dict]) -> None:
    """Each measure against the evaluations of an image, a line a solver."""
    figure, axes = pyplot().subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    for axis, (name, title) in zip(axes, MEASURES.items()):
        for solver in SETTINGS:
            some = [r for r in rows if r["solver"] == solver]
            axis.plot([r["evaluations"] for r in some], [r[name] for r in some], "o-", label=solver, markersize=4)
        axis.set(xscale="log", xlabel="evaluations a class", title=title)
        axis.set_xticks(ticks := [5, 8, 12, 25, 63], ticks, minor=False)
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[0].legend()
    save_figure(figure, path)


def main() -> None:
    parser = arguments(__doc__, out=ROOT / "results/benchmarks/solvers.json")
    parser.add_argument("--generator", required=True, help="run of train_diffusion.py")
    parser.add_argument("--recognizer", required=True, help="run of train_recognizer.py that measures")
    parser.add_argument("--pairs", required=True, help="CSV of mine_pairs.py")
    parser.add_argument("--data", nargs="+", required=True, help="the real training images")
    parser.add_argument("--mixes", type=int, default=75, help="first pairs of the file")
    parser.add_argument("--per-class", type=int, default=10, help="reproductions of a class; mixes of a pair: 4")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    args = parser.parse_args()
    device, schedule = stage.pick_device(args.device), Schedule()
    torch.set_flush_denormal(True)
    generator, saved = load_generator(args.generator, device)
    model, of_model = load_recognizer(args.recognizer, device)
    config, ids = saved["config"], {c: i for i, c in enumerate(saved["classes"])}
    images = stage.Images(args.data, config["size"], config["channels"])
    z_real = embed(model, images, of_model["config"], device).double().numpy()
    centres = class_centres(z_real, images.labels.numpy(), len(images.classes))
    mixes = read_pairs(args.pairs, saved["classes"])[:args.mixes]
    shape = config["channels"], config["size"], config["size"]
    sets = {"reproductions": [((c,), i) for c in saved["classes"] for i in range(args.per_class)],
            "mixes": [(mix, i) for mix in mixes for i in range(4)]}

    def draw(work, solver, steps):
        """Embeddings (N, dim) of the images of `work`, made by a solver."""
        z, (solver, _, levels) = [], solver.partition("/")
        times = timesteps(schedule, "heun", steps) if levels else None
        for part in (work[i:i + 100] for i in range(0, len(work), 100)):
            y = torch.tensor([[ids[c] for c in mix] for mix, _ in part], device=device)
            denoise = mixed_denoiser(generator, schedule, config["predict"], y, [1 / y.shape[1]] * y.shape[1])
            x = draw_images(denoise, part, args.seed, shape, device, schedule, solver, steps, times=times)
            x = torch.from_numpy(x).permute(0, 3, 1, 2).to(device)
            z.append(embed_batch(model, x, of_model["config"]).double().cpu().numpy())
        return np.concatenate(z)
    rows = []
    for solver, counts in SETTINGS.items():
        for steps in counts:
            made, mixed = (draw(work, solver, steps) for work in sets.values())
            own = centres[[images.classes.index(mix[0]) for mix, _ in sets["reproductions"]]]
            rows.append({"solver": solver, "steps": steps, "evaluations": evaluations(solver, steps),
                         "frechet_distance": frechet_distance(z_real, made),
                         "cosine_to_own_centre": float((made * own).sum(1).mean()),
                         "consistency": consistency(made, np.repeat(np.arange(len(centres)), args.per_class)),
                         "consistency_of_mixes": consistency(mixed, np.repeat(np.arange(len(mixes)), 4))})
            print(rows[-1], flush=True)
    real = consistency(z_real, images.labels.numpy())
    write("solvers", {"machine": machine(device), "images": {k: len(v) for k, v in sets.items()},
                      "consistency_of_real_images": real, "rows": rows}, args.out)
    draw_figure(args.out.with_suffix(".png"), rows)


if __name__ == "__main__":
    main()
