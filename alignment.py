"""How alike are the generator's condition space and the recogniser's embedding space? (ScoreMix's analysis of spaces.)

    R=runs/demo
    python alignment.py --generator $R/generator --recognizer $R/real --data $R/data/train --out $R/alignment

Reads   a generator (also its model-STEP.pt of --keep-every, for the curve), a recogniser, the images of the classes.
Writes  OUT/table.md, OUT/alignment.json, OUT/cka.png (the measures over the generator's training).

A class is a row in each space: the class embedding of the generator, and the normalised mean embedding of its images.
Measures: linear CKA (Kornblith et al. 2019), the same with the unbiased HSIC (Song et al. 2012), CKNNA (Huh et al.
2024), the Spearman correlation of the cosine distances. The control is a recogniser of the same shape, never trained.
"""

import re
import sys
from pathlib import Path

import numpy as np
import torch

import stage
from report import pyplot, save_figure
from train_diffusion import load_generator
from train_recognizer import IResNet, centres_of, load_recognizer, preprocess

TITLES = {"cka": "CKA", "cka_unbiased": "CKA, unbiased", "cknna": "CKNNA", "spearman": "Spearman"}


def parse_args(argv=None):
    parser = stage.Parser(__doc__)
    g = parser.add_argument_group("inputs and output")
    g.add_argument("--generator", required=True, metavar="RUN", help="run of train_diffusion.py, or a model.pt")
    g.add_argument("--recognizer", required=True, metavar="RUN", help="run of train_recognizer.py, or a model.pt")
    g.add_argument("--data", nargs="+", required=True, metavar="DIR", help="image folders of the generator's classes")
    g.add_argument("--out", required=True, metavar="DIR", help="where the report goes, a run directory")
    g = parser.add_argument_group("measures")
    g.add_argument("--neighbours", type=stage.number(int, 1), default=10, metavar="K",
                   help="nearest classes that CKNNA looks at (default: %(default)s)")
    g.add_argument("--seed", type=stage.number(int, 0), default=0, help="of the untrained recogniser (default: 0)")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------------ mathematics
def centred(x: np.ndarray) -> np.ndarray:
    """The linear kernel (n, n) of x (n, dim), centred: H x x^T H."""
    x = x - x.mean(0)
    return x @ x.T


def cka(x: np.ndarray, y: np.ndarray) -> float:
    """Linear CKA of x (n, p) and y (n, q), in [0, 1]: tr(KHLH) over the root of its values for (K, K) and (L, L)."""
    K, L = centred(x), centred(y)
    return float((K * L).sum() / np.sqrt((K * K).sum() * (L * L).sum()))


def unbiased_hsic(K: np.ndarray, L: np.ndarray) -> float:
    """HSIC of two kernels (n, n), symmetric, n > 3, without the bias of few samples (Song et al. 2012, Eq. 5)."""
    n = len(K)
    K, L = K - np.diag(np.diag(K)), L - np.diag(np.diag(L))
    row_k, row_l = K.sum(0), L.sum(0)  # with these, and tr(KL) as a sum of products, no K @ L: n^2, not n^3
    middle = row_k.sum() * row_l.sum() / ((n - 1) * (n - 2))
    return float(((K * L).sum() + middle - 2 / (n - 2) * (row_k @ row_l)) / (n * (n - 3)))


def unbiased_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Linear CKA with the unbiased HSIC: about 0, of either sign, for unrelated spaces, however few the samples."""
    K, L = x @ x.T, y @ y.T
    return unbiased_hsic(K, L) / np.sqrt(unbiased_hsic(K, K) * unbiased_hsic(L, L))


def cosines(x: np.ndarray) -> np.ndarray:
    """The cosines (n, n) of all pairs of rows of x (n, dim)."""
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return x @ x.T


def nearest_mask(x: np.ndarray, k: int) -> np.ndarray:
    """(n, n) bool: is j among the k nearest of i by cosine, i itself left out?"""
    similarity = cosines(x)
    np.fill_diagonal(similarity, -np.inf)
    mask = np.zeros(similarity.shape, bool)
    np.put_along_axis(mask, np.argsort(-similarity, axis=1, kind="stable")[:, :k], True, axis=1)
    return mask


def cknna(x: np.ndarray, y: np.ndarray, k: int) -> float:
    """CKA in which j counts for i only when it is among i's k nearest in BOTH spaces, after Huh et al. 2024.

    The kernels are centred first and masked then, neighbours go by cosine, and the two terms under the root each use
    their own space's; other implementations differ in these choices, so compare values of one implementation only.
    """
    K, L, near_x, near_y = centred(x), centred(y), nearest_mask(x, k), nearest_mask(y, k)
    own = (K * K)[near_x].sum() * (L * L)[near_y].sum()
    return float((K * L)[near_x & near_y].sum() / np.sqrt(own))


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, equal values sharing their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse]


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman correlation of the cosine similarities of all pairs of rows of x (n, p) and of y (n, q)."""
    pairs = np.triu_indices(len(x), 1)
    return float(np.corrcoef(*(ranks(cosines(v)[pairs]) for v in (x, y)))[0, 1])


def measures(x: np.ndarray, y: np.ndarray, k: int) -> dict:
    """All four measures of x (n, p) and y (n, q), whose rows belong together; k neighbours for CKNNA."""
    return {"cka": cka(x, y), "cka_unbiased": unbiased_cka(x, y), "cknna": cknna(x, y, k), "spearman": spearman(x, y)}


# -------------------------------------------------------------------------------------------------------------- run
@torch.no_grad()
def random_recogniser(config: dict, images: stage.Images, seed: int) -> IResNet:
    """A recogniser of this config with random weights; its batch norms know the statistics of a batch of the images."""
    torch.manual_seed(seed)
    model = IResNet(config["arch"], config["size"], config["channels"])
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    model.train()(preprocess(images[torch.randperm(len(images.paths))[:64]], config))
    return model.eval().requires_grad_(False)


def conditions(path, device) -> tuple[np.ndarray, list[str]]:
    """The learned class embeddings (K, dim) of a generator, without the null class, and the classes' names."""
    model, saved = load_generator(path, device)
    return model.label.weight[:model.num_classes].double().cpu().numpy(), saved["classes"]


def draw_curve(path: Path, curve: dict) -> None:
    """The measures of each checkpoint, {step: measures}, over the steps."""
    figure, axis = pyplot().subplots(figsize=(5.5, 3.5), layout="constrained")
    for name in TITLES:
        axis.plot(list(curve), [m[name] for m in curve.values()], "o-", ms=3, label=name)
    axis.set(xlabel="training step of the generator", title="Condition space against the recogniser's centres")
    axis.grid(alpha=0.3)
    axis.legend()
    save_figure(figure, path)


def run(args) -> None:
    device = stage.pick_device(args.device)
    x, classes = conditions(args.generator, device)
    model, saved = load_recognizer(args.recognizer, device)
    config = saved["config"]
    images = stage.Images(args.data, config["size"], config["channels"])
    absent = sorted(set(classes) - set(images.classes))
    if absent:
        raise stage.StageError(f"{' '.join(args.data)} lacks the generator's class {absent[0]}; give all its classes")
    if len(classes) < 4 or args.neighbours >= len(classes):
        raise stage.StageError(f"{len(classes)} classes are too few for --neighbours {args.neighbours}; at least 4 are "
                               "needed, and more classes than neighbours")
    home = Path(args.generator) if Path(args.generator).is_dir() else Path(args.generator).parent
    kept = {int(m[1]): p for p in home.iterdir() if (m := re.fullmatch(r"model-(\d+)\.pt", p.name))}
    inputs = {"generator": home / "model.pt" if Path(args.generator).is_dir() else args.generator,
              "checkpoints": [kept[step] for step in sorted(kept)], "recognizer": saved["path"], "data": args.data}
    out = stage.Run("alignment", args, inputs, {"classes": len(classes)})
    if (out.dir / "alignment.json").exists():
        print((out.dir / "table.md").read_text("utf-8") + f"already measured: {out.dir}")
        return
    untrained = random_recogniser(config, images, args.seed)
    rows = [images.classes.index(c) for c in classes]
    centres = [centres_of(m.to(device), images, config, device)[rows] for m in (model, untrained)]
    k = args.neighbours
    found = {"condition, recogniser": measures(x, centres[0], k), "condition, untrained": measures(x, centres[1], k),
             "recogniser, untrained": measures(*centres, k)}
    curve = {step: measures(conditions(kept[step], device)[0], centres[0], k) for step in sorted(kept)}
    lines = ["| spaces | " + " | ".join(TITLES.values()) + " |", "|---|---|---|---|---|"]
    lines += [f"| {name} | {' | '.join(f'{v:.3f}' for v in m.values())} |" for name, m in found.items()]
    lines += ["", f"{len(classes)} classes; CKNNA with {k} neighbours; untrained: a recogniser with random weights."]
    if curve:
        draw_curve(out.dir / "cka.png", curve)
        lines.append(f"look at {out.dir}/cka.png, which ends with the checkpoint of step {max(curve)}")
    else:
        lines.append("no curve: train the generator with --keep-every to have one")
    stage.write_text(out.dir / "table.md", "\n".join(lines) + "\n")
    out.spend(device, images=2 * len(images.paths))
    report = {"neighbours": k, "classes": len(classes), "measures": found, "curve": curve}
    stage.write_json(out.dir / "alignment.json", report)
    print(*lines, f"wrote {out.dir}/table.md and alignment.json", sep="\n")


@stage.command
def main(argv=None):
    run(parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
