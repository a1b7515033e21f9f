"""The test sets of evaluate.py as arrays: folders, pair lists, galleries with probes, IJB's templates; embedding files.

Only files are read here, and a mistake in one is named before any network runs; what is done with the arrays, the
protocols, stands in evaluate.py.
"""

import csv
import hashlib
import os
import sys
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import stage

MOST_IMAGES = 6000  # of a folder: 18 million pairs, which are sorted at once, in 2 GB


@dataclass
class TestSet:
    """kind: folder, pairs, search or templates. names: the images as an embeddings file calls them; files: where they
    are. group (identities,): within which they are resampled, None where identities are not known; people: their names.
    The arrays that the protocol of its kind takes are in `arrays`."""
    __test__ = False  # no class of tests, whatever pytest thinks of the name
    kind: str
    name: str
    protocol: str
    names: list[str]
    files: list[Path]
    counts: dict
    group: np.ndarray | None = None
    arrays: dict = field(default_factory=dict)
    people: list[str] = field(default_factory=list)

    def digest(self) -> str:
        """SHA-256 of the names and sizes of the images that are there: other images make another test set."""
        sizes = (f"{n}\0{p.stat().st_size if p.exists() else -1}\n" for n, p in zip(self.names, self.files))
        return hashlib.sha256("".join(sizes).encode()).hexdigest()


def both_kinds(same: np.ndarray, source) -> None:
    """StageError unless there are genuine and impostor pairs."""
    if same.all() or not same.any():
        raise stage.StageError(f"{source} has no {'impostor' if same.any() else 'genuine'} pairs; both are needed")


def read_columns(path: Path, needed: tuple) -> dict:
    """column -> values, all text, of a CSV file with a line of titles; StageError for missing columns or no lines."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            titles, rows = next(reader, []), [r for r in reader if r]
    except (csv.Error, UnicodeError) as error:
        raise stage.StageError(f"{path} is no CSV file: {error}") from None
    missing = [c for c in needed if c not in titles]
    if missing or not rows:
        raise stage.StageError(f"{path} has {'no column ' + missing[0] if missing else 'no lines'}; "
                               f"its first line must name {','.join(needed)}, and a line must follow")
    wrong = next((i for i, r in enumerate(rows) if len(r) != len(titles)), None)
    if wrong is not None:
        raise stage.StageError(f"{path} has {len(rows[wrong])} values in entry {wrong + 1}, not {len(titles)}")
    return dict(zip(titles, zip(*rows)))


def read_npz(path, needed: tuple) -> dict:
    """The arrays of an npz file, without unpickling; StageError if it is none or lacks one."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {k: file[k] for k in needed}
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, AttributeError, TypeError, MemoryError) as error:
        raise stage.StageError(f"{path} is no npz file with the arrays {', '.join(needed)} ({error})") from None


def folder(folders: list) -> TestSet:
    """All pairs of image folders; the identities are the classes."""
    classes, files, labels = stage.scan([Path(os.path.realpath(f)) for f in folders])
    labels = np.array(labels)
    if len(files) > MOST_IMAGES:
        raise stage.StageError(f"all pairs of {len(files):,} images are too many; give at most {MOST_IMAGES:,}")
    if len(classes) < 2 or np.bincount(labels).max() < 2:
        raise stage.StageError(f"{' '.join(folders)} has no genuine or no impostor pairs; "
                               "give at least two classes, and one of them two images")
    names = [f"{p.parent.name}/{p.name}" for p in files]
    return TestSet("folder", os.path.basename(os.path.realpath(folders[0])), "all pairs", names, files,
                   {"identities": len(classes), "images": len(files)}, np.zeros(len(classes), np.int64),
                   {"labels": labels}, classes)


def pairs(path: str) -> TestSet:
    """A list path_a,path_b,same[,fold], paths relative to the list: fold by fold if it has folds.

    The identity of an image is its folder's name if that agrees with every `same`; else identities are not known. The
    people of a fold are resampled among themselves where no fold has people of another, all of them together elsewhere.
    """
    columns = read_columns(Path(path), ("path_a", "path_b", "same"))
    truth = {"1": True, "true": True, "0": False, "false": False}
    same = np.array([truth.get(s.strip().lower(), -1) for s in columns["same"]])
    if (same < 0).any():
        raise stage.StageError(f"{path} has {columns['same'][np.argmax(same < 0)]!r} for `same`; 1 or 0 is expected")
    same = same.astype(bool)
    both_kinds(same, path)
    names, index = np.unique(np.concatenate([columns["path_a"], columns["path_b"]]), return_inverse=True)
    sides = index[:len(same)], index[len(same):]
    if (sides[0] == sides[1]).any():
        print(f"warning: {path} pairs {np.sum(sides[0] == sides[1])} images with themselves", file=sys.stderr)
    files = [Path(path).parent / n for n in names.tolist()]
    folds, fold = np.unique([f.strip() for f in columns.get("fold", ["0"] * len(same))], return_inverse=True)
    for f, called in enumerate(folds):
        both_kinds(same[fold == f], f"fold {called} of {path}")
    made = TestSet("pairs", Path(path).stem, "listed pairs", names.tolist(), files, {"images": len(names)})
    made.arrays = {"a": sides[0], "b": sides[1], "same": same, "fold": None, "first": None, "second": None}
    if len(folds) > 1:
        made.arrays["fold"] = fold
        made.protocol = f"{len(folds)} folds, threshold of each from the others (middle of the widest best gap)"
    people, person = np.unique([p.parent.name for p in files], return_inverse=True)
    first, second = person[sides[0]], person[sides[1]]
    if ((first == second) == same).all():
        made.arrays |= {"first": first, "second": second}
        made.counts, made.people = {"identities": len(people), **made.counts}, people.tolist()
        made.group = np.zeros(len(people), np.int64)
        made.group[first] = made.group[second] = fold
        if (made.group[first] != fold).any() or (made.group[second] != fold).any():
            made.group[:] = 0
            made.protocol += ", folds share people"
    return made


def search(probes: list, gallery: list) -> TestSet:
    """Probes against a gallery, both image folders; classes of the gallery without a probe are distractors."""
    (classes, files, labels), (others, more, gallery_labels) = (
        stage.scan([Path(os.path.realpath(f)) for f in folders]) for folders in (probes, gallery))
    both = set(map(os.path.realpath, files)) & set(map(os.path.realpath, more))
    if both:
        raise stage.StageError(f"{len(both)} probes are gallery images too, such as {min(both)}; leave them out of one")
    missing = sorted(set(classes) - set(others))
    if missing:
        raise stage.StageError(f"{' '.join(probes)} has {len(missing)} classes without an image in the gallery, such "
                               f"as {missing[0]}; the search is over a closed set, so leave them out")
    number, folder = {c: i for i, c in enumerate(classes)}, Path(os.path.realpath(probes[0]))
    name = folder.parent.name if folder.name == "probe" else folder.name
    y_gallery = np.array([number.get(others[i], -1) for i in gallery_labels])
    return TestSet("search", name, "closed-set search of each probe among all gallery images",
                   [f"{p.parent.parent.name}/{p.parent.name}/{p.name}" for p in files + more], files + more,
                   {"identities": len(classes), "probes": len(files), "gallery": len(more),
                    "distractors": int((y_gallery < 0).sum())}, np.zeros(len(classes), np.int64),
                   {"y": np.array(labels), "y_gallery": y_gallery}, classes)


def templates(directory: str) -> TestSet:
    """What `prepare_data.py ijb` writes: templates.csv (path,template,media,score) and pairs.npz (a, b, same)."""
    listing, pairs_file = (Path(directory) / f for f in ("templates.csv", "pairs.npz"))
    columns = read_columns(listing, ("path", "template", "media", "score"))
    try:
        template, media = (np.array(columns[k], np.int64) for k in ("template", "media"))
        score = np.array(columns["score"], np.float32)
    except ValueError as error:
        raise stage.StageError(f"{listing} has a bad number: {error}") from None
    if not (np.isfinite(score) & (score >= 0)).all():
        raise stage.StageError(f"{listing} has scores that are negative or no numbers")
    file = read_npz(pairs_file, ("a", "b", "same"))
    known, same, sides = np.unique(template), file["same"].astype(bool), []
    for side in (file["a"], file["b"]):
        index = np.searchsorted(known, side).clip(0, len(known) - 1).astype(np.int32)
        if len(side) != len(same) or (known[index] != side).any():
            raise stage.StageError(f"{pairs_file} does not fit {listing}: it pairs a template that is not there")
        sides.append(index)
    both_kinds(same, pairs_file)
    names = list(columns["path"])
    return TestSet("templates", os.path.basename(os.path.realpath(directory)),
                   "templates: mean over a medium, sum over media", names, [Path(directory) / n for n in names],
                   {"templates": len(known), "media": len(np.unique(media)), "images": len(names)}, None,
                   {"template": template, "media": media, "score": score, "a": sides[0], "b": sides[1], "same": same})


def read(args) -> list[TestSet]:
    """Every test set that evaluate.py was asked for.

    StageError where two have one name, or where embeddings go by names and one image name stands for two files.
    """
    tests = [folder(args.data)] if args.data else []
    tests += map(pairs, args.pairs)
    tests += [search(args.probe, args.gallery)] if args.probe else []
    tests += map(templates, args.templates)
    names, where = [t.name for t in tests], {}
    if len(set(names)) < len(names):
        raise stage.StageError(f"two test sets are called {max(names, key=names.count)}; rename one, or leave it out")
    for test in tests if args.embeddings or args.save_embeddings else []:
        for name, file in zip(test.names, test.files):
            if os.path.realpath(where.setdefault(name, file)) != os.path.realpath(file):
                raise stage.StageError(f"{name} is both {where[name]} and {file}, and embeddings know an image by this "
                                       "name; evaluate them by separate commands")
    return tests


class Embeddings:
    """An npz file `embeddings` (N, D) and `paths` (N,), the images as the lists call them. Nothing is unpickled."""

    def __init__(self, path: str):
        file, self.path = read_npz(path, ("embeddings", "paths")), path
        self.z, paths = file["embeddings"], file["paths"]
        self.z = self.z.astype(np.float32) if self.z.dtype == np.float16 else self.z
        kinds = self.z.dtype.kind, paths.dtype.kind
        if self.z.ndim != 2 or paths.shape != self.z.shape[:1] or kinds not in (("f", "U"), ("f", "S")):
            raise stage.StageError(f"{path} needs embeddings (N, D) of floats and paths (N,) of text; it has "
                                   f"{self.z.dtype} {self.z.shape} and {paths.dtype} {paths.shape}")
        paths = [p.decode() for p in paths.tolist()] if paths.dtype.kind == "S" else paths.tolist()
        self.row = {p: i for i, p in enumerate(paths)}
        if len(self.row) < len(paths):
            twice = next(p for i, p in enumerate(paths) if self.row[p] != i)
            raise stage.StageError(f"{path} has the path {twice} more than once; leave one of them")
        self.bad = ~np.isfinite(self.z).all(axis=1) | ~self.z.any(axis=1)

    def rows_of(self, test: TestSet) -> np.ndarray:
        """The rows of a test set's images, in its order; StageError if some are missing, zero or not finite."""
        missing = [n for n in test.names if n not in self.row]
        if missing:
            raise stage.StageError(f"{self.path} lacks {len(missing)} of the {len(test.names)} images of {test.name}, "
                                   f"such as {missing[0]}; `paths` must name them as this one is written")
        rows = np.array([self.row[n] for n in test.names])
        if self.bad[rows].any():
            raise stage.StageError(f"{self.path} has {self.bad[rows].sum()} embeddings that are zero or not finite, "
                                   f"such as that of {test.names[int(np.argmax(self.bad[rows]))]}")
        return rows


def write_embeddings(folder: Path, kept: dict) -> list[str]:
    """Such a file for each model, of model -> image name -> embedding (D,); the files' names."""
    made = [(f"embeddings-{model.replace('/', '_')}.npz", z) for model, z in kept.items() if z]
    for name, z in made:
        def write(path):
            with open(path, "wb") as file:
                np.savez(file, embeddings=np.stack(list(z.values())), paths=np.array(list(z)))
        stage.write_atomic(folder / name, write)
    return [name for name, _ in made]
