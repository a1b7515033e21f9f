"""How quickly do training images come, by stage.Images and by torchvision's ImageFolder behind a DataLoader?

    python benchmarks/reading.py --images 3000 --size 112

Batches of 64 uint8 images (64, 3, S, S) with their labels, in random order, from a folder of PNGs that this script
makes for itself. `first` is everything from the folder to the end of the first epoch, so it includes the decoding (and,
of workers, their start); `later` are epochs after it. The DataLoader has 0 or 2 workers, which stay alive between
epochs; its transform resizes as stage.decode does, and what it gives must be the same images to the last byte.

stage.Images keeps what it has decoded in memory if that fits in a third of it, which here it does. `ours, from disk` is
what it does where it does not fit: every batch is decoded anew, by threads.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from common import arguments, machine, ratio, side_by_side, stage, version, write
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

BATCH, CLASSES = 64, 10


def make_folder(root: Path, images: int, size: int) -> None:
    """ROOT/<class>/<i>.png: smooth colours with some noise, so that they are compressed about as photographs are."""
    rng = np.random.default_rng(0)
    for i in range(images):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((size, size), Image.BICUBIC)
        fine = np.asarray(coarse) + rng.normal(0, 4, (size, size, 3))
        path = root / f"{i % CLASSES}" / f"{i:06}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(fine.clip(0, 255).astype(np.uint8)).save(path)


def our_epoch(images: stage.Images):
    """Batches (images, labels) in random order."""
    for index in torch.randperm(len(images.paths)).split(BATCH):
        yield images[index], images.labels[index]


def loader(root: Path, size: int, workers: int, shuffle: bool = True) -> DataLoader:
    transform = transforms.Compose([
        transforms.Resize((size, size), transforms.InterpolationMode.BICUBIC), transforms.PILToTensor()])
    return DataLoader(ImageFolder(root, transform), BATCH, shuffle, num_workers=workers, persistent_workers=workers > 0)


def through(epoch) -> int:
    """Go through an epoch; the number of its images."""
    return sum(len(x) for x, _ in epoch)


def main(argv=None) -> None:
    parser = arguments(__doc__, repeats=5, device=False)
    parser.add_argument("--images", type=int, default=3000, help="in the folder (default: 3000)")
    parser.add_argument("--size", type=int, default=112, help="pixels a side, in the files and as read")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_folder(root, args.images, args.size)
        kilobytes = sum(p.stat().st_size for p in root.glob("*/*")) / args.images / 1000
        images, from_disk = (stage.Images([root], args.size) for _ in range(2))
        from_disk.pixels = None
        loaders = {f"ImageFolder, {n} workers": loader(root, args.size, n) for n in (0, 2)}
        x, y = map(torch.cat, zip(*loader(root, args.size, 0, shuffle=False)))
        for mine in (images, from_disk):
            everything = torch.arange(args.images)
            assert torch.equal(mine[everything], x) and torch.equal(mine.labels, y)
        first = {"ours": lambda: through(our_epoch(stage.Images([root], args.size)))}
        first |= {f"ImageFolder, {n} workers": lambda n=n: through(loader(root, args.size, n)) for n in (0, 2)}
        later = {"ours": lambda: through(our_epoch(images)), "ours, from disk": lambda: through(our_epoch(from_disk))}
        later |= {name: lambda made=made: through(made) for name, made in loaders.items()}
        assert all(run() == args.images for run in (*first.values(), *later.values()))
        results = {}
        for name, candidates in (("first", first), ("later", later)):
            seconds = side_by_side(candidates, args.repeats)
            results[name] = {"seconds": seconds, "times_ours": {k: ratio(seconds, k, "ours") for k in seconds}}
        write("reading", {"machine": machine(), "versions": version("torchvision", "pillow"), "images": args.images,
                          "size": args.size, "batch": BATCH, "kilobytes_a_file": kilobytes, **results}, args.out)


if __name__ == "__main__":
    main()
