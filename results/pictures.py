"""The pictures of the sampler on one generator: solvers and steps, numbers of classes, strengths of guidance.

    R=runs/orl/0; python results/pictures.py --generator $R/generator --guide $R/generator/model-500.pt \\
                                             --pairs $R/far.csv --out results/orl

Writes  OUT/solvers.png, OUT/classes.png, OUT/guidance.png. The images of a column start from the same noise.
"""

import itertools
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import stage  # noqa: E402
from report import pyplot, save_figure  # noqa: E402
from sample_scoremix import autoguided, draw_images, load_guide, mixed_denoiser, read_pairs  # noqa: E402
from train_diffusion import Schedule, load_generator  # noqa: E402


def show(path: Path, title: str, rows: dict, columns: list[str]) -> None:
    """A labelled picture: rows is label -> images (H, W, C), one for each column."""
    figure, axes = pyplot().subplots(len(rows), len(columns), figsize=(1.1 * len(columns) + 1, 1.15 * len(rows) + 0.5),
                                     layout="constrained", squeeze=False)
    for line, (label, images) in zip(axes, rows.items()):
        for axis, image in zip(line, images):
            axis.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(label, rotation=0, ha="right", va="center")
    for axis, column in zip(axes[0], columns):
        axis.set_title(column, fontsize=9)
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path, 100)


@stage.command
def main(argv=None):
    parser = stage.Parser(__doc__)
    parser.add_argument("--generator", required=True, metavar="RUN", help="run of train_diffusion.py, or a model.pt")
    parser.add_argument("--guide", required=True, metavar="MODEL", help="a weaker one, for autoguidance")
    parser.add_argument("--pairs", required=True, metavar="FILE", help="CSV of mine_pairs.py, two classes a row")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where the pictures go")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    args = parser.parse_args(argv)
    device, schedule = stage.pick_device(args.device), Schedule()
    model, saved = load_generator(args.generator, device)
    weak, guide = load_guide(args.guide, saved, device)
    if len(saved["classes"]) < 4:
        raise stage.StageError(f"{args.generator} has {len(saved['classes'])} classes; mixes of four need four")
    config, pairs = saved["config"], read_pairs(args.pairs, saved["classes"])
    args.out.mkdir(parents=True, exist_ok=True)
    ids = {c: i for i, c in enumerate(saved["classes"])}

    def draw(mixes, solver="ddpm", steps=25, guidance=1.0, auto=None):
        """One image of each mix, a tuple of class names, (B, H, W, C); its noise follows from its first class."""
        y = torch.tensor([[ids[c] for c in mix] for mix in mixes], device=device)
        lam = [1 / y.shape[1]] * y.shape[1]
        denoise = mixed_denoiser(model, schedule, config["predict"], y, lam, guidance, clip=auto is None)
        if auto is not None:
            weak_denoise = mixed_denoiser(weak, schedule, guide["config"]["predict"], y, lam, clip=False)
            denoise = autoguided(denoise, weak_denoise, auto)
        keys, shape = [(mix[:1], 0) for mix in mixes], (config["channels"], config["size"], config["size"])
        return draw_images(denoise, keys, 0, shape, device, schedule, solver, steps)
    some = [pairs[i] for i in np.linspace(0, len(pairs) - 1, 8).round().astype(int)]
    names = [" + ".join(mix) for mix in some]
    rows = {f"{solver} {steps}": draw(some, solver, steps)
            for solver, steps in itertools.product(("ddim", "ddpm", "dpm++", "heun"), (5, 10, 20, 40))}
    show(args.out / "solvers.png", "solver and steps (heun: twice the evaluations)", rows, names)
    classes = list(dict.fromkeys(itertools.chain(*pairs)))  # from the farthest pair on
    groups = [[classes[(len(classes) // 4 * j + i) % len(classes)] for j in range(4)] for i in range(8)]
    rows = {f"{m} class{'es' if m > 1 else ''}": draw([tuple(g[:m]) for g in groups]) for m in (1, 2, 3, 4)}
    show(args.out / "classes.png", "mixes of 1 to 4 classes, equal weights", rows, [" ".join(g) for g in groups])
    rows = {f"guidance {g:g}": draw(some, guidance=g) for g in (1, 1.5, 2, 3)}
    rows |= {f"autoguidance {w:g}": draw(some, auto=w) for w in (1.5, 2, 3)}
    show(args.out / "guidance.png", "classifier-free guidance, and autoguidance by an early checkpoint", rows, names)
    print(f"look at {args.out}/solvers.png, classes.png and guidance.png")


if __name__ == "__main__":
    sys.exit(main())
