"""Look at a mixed (or reproduced) folder through a recogniser: are its classes consistent, new, and not copies?

    R=runs/demo; python audit.py --recognizer $R/real --data $R/data/train --mixed $R/mixed --out $R/audit

Reads   a recogniser, the images that it and the generator were trained on, and a folder of sample_scoremix.py.
Writes  OUT/table.md, OUT/audit.json, OUT/nearest.csv (the nearest training image of every mixed one, in both spaces),
        OUT/nearest.png (the mixed images nearest to a training image, above that image: by embedding, by pixels).

Nothing from outside is used: the Frechet distance (Heusel et al. 2017) is taken in the embedding space of the project's
own recogniser, so it compares mixes of one data set, and says nothing across data sets.
"""

import csv
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import stage
from train_diffusion import save_grid
from train_recognizer import class_centres, embed, load_recognizer
from training import flops_of

TITLES = {"consistency": "consistency: mean cosine within a class",
        "similarity_to_sources": "mean cosine to the centres of the sources",
        "sources_are_nearest": "share whose nearest centres are the sources",
        "loss": "cross-entropy over the centres at scale 32, the sources in equal shares",
        "frechet_distance": "Frechet distance to half of the real images (real: of the other half)",
        "contrast": "contrast: standard deviation of the pixels, grey levels",
        "brightness": "share of the variance of brightness that lies between classes",
        "layout": "the same of the images in 8x8 pixels: light and layout",
        "distance_to_nearest_embedding": "distance to the nearest training image, embedding, median (real: class-mate)",
        "nearer_than_classmates_embedding": "share nearer to it than its class-mates are, embedding",
        "distance_to_nearest_pixels": "distance to the nearest training image, pixels, median (real: class-mate)",
        "nearer_than_classmates_pixels": "share nearer to it than its class-mates are, pixels"}
SCALE = 32  # of the cosines in the loss, that of our small recognisers
THUMBNAIL, LAYOUT = 32, 8  # pixels a side in which images are compared pixel by pixel; in which they are all but layout


def parse_args(argv=None):
    parser = stage.Parser(__doc__)
    g = parser.add_argument_group("inputs and output")
    g.add_argument("--recognizer", required=True, metavar="RUN", help="run of train_recognizer.py on the real images")
    g.add_argument("--data", nargs="+", required=True, metavar="DIR", help="the real training images")
    g.add_argument("--mixed", nargs="+", required=True, metavar="DIR",
                   help="folders of sample_scoremix.py, with their manifests")
    g.add_argument("--out", required=True, metavar="DIR", help="where the report goes, a run directory")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------------ mathematics
def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance |mu_a - mu_b|^2 + tr(A + B - 2 (AB)^1/2) of Gaussians fitted to a (N, dim) and b (M, dim).

    Its expectation for two samples of one distribution is above 0 and grows as they get fewer: compare equal counts.
    """
    mu = a.mean(0) - b.mean(0)
    A, B = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(A)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T  # A^1/2; (AB)^1/2 has the eigenvalues of (A^1/2 B A^1/2)^1/2
    cross = np.sqrt(np.linalg.eigvalsh(root @ B @ root).clip(0)).sum()
    return float(mu @ mu + np.trace(A) + np.trace(B) - 2 * cross)


def consistency(z: np.ndarray, labels: np.ndarray) -> float:
    """Mean cosine of two different images of a class, averaged over the classes of two images or more; nan without.

    z (N, dim) unit rows, labels (N,). The n (n - 1) ordered pairs of a class with the sum S add up to |S|^2 - n.
    """
    counts = np.bincount(labels)
    sums = np.zeros((len(counts), z.shape[1]))
    np.add.at(sums, labels, z)
    many = counts > 1
    pairs = (sums[many] ** 2).sum(1) - counts[many]
    return float((pairs / (counts[many] * (counts[many] - 1))).mean()) if many.any() else float("nan")


def nearest(queries: torch.Tensor, references: torch.Tensor, block: int = 512) -> tuple[torch.Tensor, torch.Tensor]:
    """The Euclidean distance (Q,) of each query (Q, D) to its nearest reference (R, D), and that reference's index."""
    best = [torch.cdist(q, references).min(1) for q in queries.split(block)]
    return torch.cat([b.values for b in best]), torch.cat([b.indices for b in best])


def nearest_classmate(x: torch.Tensor, labels: torch.Tensor, mirrored: torch.Tensor | None = None) -> torch.Tensor:
    """The distance (N,) of each row of x (N, D) to the nearest other image of its class; inf for a class of one.

    mirrored (N, D): the same images mirrored, which count as images of the class too.
    """
    found = torch.full((len(x),), torch.inf)
    for label in labels.unique():
        rows = (labels == label).nonzero()[:, 0]
        for other in (x, mirrored) if mirrored is not None else (x,):
            distance = torch.cdist(x[rows], other[rows]).fill_diagonal_(torch.inf)
            found[rows] = torch.minimum(found[rows], distance.min(1).values)
    return found


def sources_nearest(z: torch.Tensor, sources: np.ndarray, centres: torch.Tensor, block: int = 4096) -> float:
    """The share of the images z (N, dim) whose M nearest centres (K, dim) are those of their sources (N, M)."""
    order = sources.shape[1]
    best = torch.cat([(part @ centres.T).topk(order).indices for part in z.split(block)])
    return float((best.sort().values == torch.from_numpy(sources).sort().values).all(1).float().mean())


def source_loss(z: torch.Tensor, sources: np.ndarray, centres: torch.Tensor, block: int = 4096) -> float:
    """The loss of a recogniser whose classifier are the centres (K, dim), on images z (N, dim) of sources (N, M).

    Mean cross-entropy of softmax(SCALE cos) to the M sources, 1/M each; at best log M, for an image midway of them.
    """
    total = 0.0
    for part, source in zip(z.split(block), torch.from_numpy(sources).split(block)):
        total -= F.log_softmax(SCALE * part @ centres.T, 1).gather(1, source).mean(1).sum().item()
    return total / len(z)


def each(images: stage.Images, f) -> torch.Tensor:
    """f of all images, float (B, C, H, W) in grey levels, a few at a time; joined."""
    return torch.cat([f(images[index].float()) for index in torch.arange(len(images.paths)).split(256)])


def thumbnails(images: stage.Images) -> torch.Tensor:
    """The images (N, C, H, W) at most 32x32, scaled so that Euclidean distance is RMS in grey levels."""
    size = min(images.size, THUMBNAIL)
    small = each(images, lambda x: F.interpolate(x, size=size, mode="area"))
    return small / small[0].numel() ** 0.5


def layouts(images: stage.Images) -> np.ndarray:
    """The images (N, LAYOUT^2) in so few pixels, grey levels: brightness, light and pose, and no features of a face."""
    small = each(images, lambda x: F.interpolate(x.mean(1, keepdim=True), size=LAYOUT, mode="area"))
    return small.flatten(1).double().numpy()


def contrast(images: stage.Images) -> float:
    """Mean standard deviation of the pixels of an image, in grey levels."""
    return float(each(images, lambda x: x.std((1, 2, 3))).mean())


def between_classes(x: np.ndarray, labels: np.ndarray) -> float:
    """The share of the variance of x (N, dim) that is between classes: the intraclass correlation of all its columns.

    1 where the images of a class are equal, 0 or a little less where classes do not matter; nan without variance, of
    one class, or of classes of one image each. ICC(1,1) of Shrout & Fleiss 1979, for classes of unequal counts; labels
    (N,).
    """
    names, y, counts = np.unique(labels, return_inverse=True, return_counts=True)
    sums = np.zeros((len(names), x.shape[1]))
    np.add.at(sums, y, x)
    means = sums / counts[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):  # one class, or one image each
        within = ((x - means[y]) ** 2).sum() / (len(x) - len(names))
        between = (counts[:, None] * (means - x.mean(0)) ** 2).sum() / (len(names) - 1)
        size = (len(x) - (counts ** 2).sum() / len(x)) / (len(names) - 1)  # of a class, were they equal
        return float((between - within) / (between + (size - 1) * within))


# -------------------------------------------------------------------------------------------------------------- run
def picture(images: stage.Images, index: torch.Tensor) -> list[np.ndarray]:
    """Some images as a row of a grid."""
    return list(images[index].permute(0, 2, 3, 1).numpy())


def write_nearest(path: Path, columns: dict) -> None:
    """A CSV, a row a mixed image; times_classmates: its distance over that of the training image to its class-mate."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(columns)
        for row in zip(*columns.values()):
            table.writerow([f"{v:.6f}" if isinstance(v, float) else v for v in row])


def read_sources(folders: list[Path], images: stage.Images, classes: list[str]) -> np.ndarray:
    """The source classes (N, M) of each image, as indices into `classes`, from the folders' manifests."""
    ids, rows = {c: i for i, c in enumerate(classes)}, {}
    try:
        for mixed in folders:
            with open(mixed / "manifest.csv", newline="", encoding="utf-8-sig") as file:
                rows |= {mixed / row["path"]: [ids[v] for k, v in row.items() if k.startswith("class_")]
                         for row in csv.DictReader(file)}
        sources = np.array([rows[p] for p in images.paths])
        if sources.ndim != 2 or not sources.shape[1]:
            raise KeyError("class_1")
        return sources
    except FileNotFoundError:
        raise stage.StageError(f"{mixed} has no manifest.csv; name a folder of sample_scoremix.py") from None
    except (KeyError, ValueError, TypeError, AttributeError, csv.Error) as error:
        raise stage.StageError("the manifest.csv, the images and the classes of --data do not belong together in "
                               f"{' '.join(map(str, folders))}: {error} is missing") from None


def run(args) -> None:
    device, folders = stage.pick_device(args.device), list(map(Path, args.mixed))
    model, saved = load_recognizer(args.recognizer, device)
    config = saved["config"]
    real, made = (stage.Images(d, config["size"], config["channels"]) for d in (args.data, folders))
    k, sources = len(real.classes), read_sources(folders, made, real.classes)
    if len(real.paths) < 4 or len(made.paths) < 2 or real.labels.bincount().max() < 2:
        raise stage.StageError("too few images to compare; at least two mixed ones are needed, and four real ones, "
                               "two of them of one class")
    out = stage.Run("audit", args, {"recognizer": saved["path"], "data": args.data, "mixed": args.mixed})
    if (out.dir / "audit.json").exists():
        print((out.dir / "table.md").read_text("utf-8") + f"already audited: {out.dir}")
        return
    z_real, z_made = (embed(model, images, config, device) for images in (real, made))
    n, flips = len(real.paths) + len(made.paths), 1 + config["flip"]
    out.spend(device, images=n, network_evaluations=n * flips, flops=n * flips * flops_of(model, config, device))
    za, zb, y_real, y_made = z_real.double().numpy(), z_made.double().numpy(), real.labels.numpy(), made.labels.numpy()
    centres = class_centres(za, y_real, k)
    shuffle = np.random.default_rng(0).permutation
    mine, other = np.array_split(za[shuffle(len(za))], 2)  # three samples of equal counts, for equal bias
    count = min(len(mine), len(other), len(zb))
    sample = zb[shuffle(len(zb))[:count]]
    middles = torch.from_numpy(centres).float()
    report = {  # name -> (the mixed folder, the same for the real images)
        "consistency": (consistency(zb, y_made), consistency(za, y_real)),
        "similarity_to_sources": (float(np.einsum("nd,nmd->nm", zb, centres[sources]).mean()), None),
        "sources_are_nearest": (sources_nearest(z_made, sources, middles), None),
        "loss": (source_loss(z_made, sources, middles), source_loss(z_real, y_real[:, None], middles)),
        "frechet_distance": (frechet_distance(mine[:count], sample), frechet_distance(mine[:count], other[:count])),
        "contrast": (contrast(made), contrast(real))}
    coarse = [(layouts(images), y) for images, y in ((made, y_made), (real, y_real))]
    report["brightness"] = tuple(between_classes(x.mean(1, keepdims=True), y) for x, y in coarse)
    report["layout"] = tuple(between_classes(x, y) for x, y in coarse)
    small = thumbnails(real)
    mirrored = small.flip(3).flatten(1) if config["flip"] else None
    spaces = {"embedding": (z_made, z_real, None), "pixels": (thumbnails(made).flatten(1), small.flatten(1), mirrored)}
    rows, columns = [], {"path": ["/".join(p.parts[-2:]) for p in made.paths]}
    for space, (queries, references, mirrored) in spaces.items():
        distance, index = nearest(queries, references if mirrored is None else torch.cat([references, mirrored]))
        index %= len(references)
        mates = nearest_classmate(references, real.labels, mirrored)
        known = mates.isfinite()
        report[f"distance_to_nearest_{space}"] = float(distance.median()), float(mates[known].median())
        known = known[index]  # a class of one image has no distance to compare with
        ratio = torch.where(known, distance / mates[index].clamp_min(1e-6), torch.inf)
        report[f"nearer_than_classmates_{space}"] = float((ratio[known] < 1).float().mean()), None
        worst = ratio.argsort()[:10]
        columns |= {f"nearest_{space}": [str(real.paths[i]) for i in index], f"distance_{space}": distance.tolist(),
                    f"times_classmates_{space}": ratio.tolist()}
        rows += [picture(made, worst), picture(real, index[worst])]
    save_grid(out.dir / "nearest.png", rows)
    stage.write_atomic(out.dir / "nearest.csv", lambda p: write_nearest(p, columns))
    lines = ["| | mixed | real |", "|---|---|---|"]
    lines += [f"| {TITLES[name]} | {made_is:.3f} | {'' if real_is is None else f'{real_is:.3f}'} |"
              for name, (made_is, real_is) in report.items()]
    lines += ["", f"{len(made.paths)} mixed images of {len(made.classes)} classes, {len(real.paths)} real ones of {k}."]
    stage.write_text(out.dir / "table.md", "\n".join(lines) + "\n")
    out.spend(device)
    # JSON has no nan
    known = {name: [None if x is None or math.isnan(x) else x for x in pair] for name, pair in report.items()}
    stage.write_json(out.dir / "audit.json", {name: {"mixed": a, "real": b} for name, (a, b) in known.items()})
    print(*lines, f"wrote {out.dir}/table.md and audit.json; look at {out.dir}/nearest.png", sep="\n")


@stage.command
def main(argv=None):
    run(parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
