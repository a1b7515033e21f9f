"""A corpus of bad and odd input, a table for each kind: it is handled as a user would expect, or refused by one line
and code 2 with nothing written. A new case is a new row."""

import csv
import io
import math
import os
import pickle
import shutil
import struct
import threading
import warnings
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    NAMES,
    SCRIPTS,
    command,
    succeed,
    tree,
    with_data,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat

import alignment
import audit
import mine_pairs
import prepare_data
import sample_scoremix
import stage
import train_diffusion
import train_recognizer
import training
from train_diffusion import Schedule

# ----------------------------------------------------------------------------------------------------- good images
GREY = np.add.outer(np.arange(12) * 9, np.arange(16) * 9).astype(np.uint8)  # 12 rows, 16 columns
COLOUR = np.dstack([GREY, 255 - GREY, GREY // 2 + 60])
VEIL = np.where(np.indices(GREY.shape).sum(0) % 3, 0, 90).astype(np.uint8)  # alpha: the colours stand below it
TURNS = {1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: lambda x: x.swapaxes(0, 1)}
TURNS |= {6: lambda x: np.rot90(x, -1), 7: lambda x: np.rot90(x, 2).swapaxes(0, 1), 8: np.rot90}  # stored -> upright


def encode(x, format, **kw):
    file = io.BytesIO()
    (Image.fromarray(x) if isinstance(x, np.ndarray) else x).save(file, format, **kw)
    return file.getvalue()


def png(depth, kind, rows, width=16, height=12, more=b""):
    """A PNG written by hand: depth in bits, colour type `kind`, rows as bytes or as an array."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    data = zlib.compress(b"".join(b"\0" + (r if isinstance(r, bytes) else r.tobytes()) for r in rows))
    return b"\x89PNG\r\n\x1a\n" + header + more + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def packed(x, bits):
    """Rows of x, values below 2 ** bits, as PNG packs them."""
    return [np.packbits((r[:, None] >> np.arange(bits)[::-1]) & 1).tobytes() for r in x]


def deep(x, kind=">u2"):
    return (x.astype(int) * 257).astype(kind)


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


fine = dict(quality=100, subsampling=0)
paletted = Image.fromarray(COLOUR).quantize(8)
expanded = np.asarray(paletted.getpalette()).reshape(-1, 3)[np.asarray(paletted)]
cmyk = np.dstack([255 - COLOUR, GREY * 0 + 20])
from_cmyk = np.round(COLOUR.astype(float) * (255 - 20) / 255)
# fmt: off
GOOD = {  # name -> (ending, bytes, pixels, tolerance)
    "grey of 16 bits": (".png", encode(deep(GREY, np.uint16), "PNG"), GREY, 0),
    "PGM of 16 bits": (".pgm", b"P5 16 12 65535\n" + deep(GREY).tobytes(), GREY, 0),
    "PGM of 12 bits": (".pgm", b"P5 16 12 4095\n" + (GREY * 4095.0 / 255).astype(">u2").tobytes(), GREY, 1),
    "colour of 16 bits": (".png", png(16, 2, deep(COLOUR)), COLOUR, 0),
    "grey and alpha of 16 bits": (".png", png(16, 4, deep(np.dstack([GREY, VEIL]))), np.dstack([GREY] * 3), 0),
    "colour and alpha of 16 bits": (".png", png(16, 6, deep(np.dstack([COLOUR, VEIL]))), COLOUR, 0),
    **{f"grey of {b} bits": (".png", png(b, 0, packed(GREY >> 8 - b, b)), (GREY >> 8 - b) * (255 // (2**b - 1)), 0)
       for b in (1, 2, 4)},
    "black and white PBM": (".ppm", b"P4 16 12\n" + b"".join(packed(1 - GREY // 128, 1)), GREY // 128 * 255, 0),
    "PPM in digits": (".ppm", b"P3 16 12 255\n" + " ".join(map(str, COLOUR.ravel())).encode(), COLOUR, 0),
    "palette": (".png", encode(paletted, "PNG"), expanded, 0),
    "palette with a hole": (".png", encode(paletted, "PNG", transparency=3), expanded, 0),
    "palette with alpha": (".png", encode(paletted, "PNG", transparency=bytes([0, 90, 255, 7])), expanded, 0),
    "colour key": (".png", encode(COLOUR, "PNG", transparency=tuple(map(int, COLOUR[0, 0]))), COLOUR, 0),
    "alpha": (".png", encode(np.dstack([COLOUR, VEIL]), "PNG"), COLOUR, 0),
    "grey and alpha": (".png", encode(np.dstack([GREY, VEIL]), "PNG"), GREY, 0),
    "alpha of WEBP": (".webp", encode(np.dstack([COLOUR, VEIL]), "WEBP", lossless=True, exact=True), COLOUR, 0),
    "BMP of 32 bits": (".bmp", encode(np.dstack([COLOUR, VEIL]), "BMP"), COLOUR, 0),
    "BMP with palette": (".bmp", encode(paletted, "BMP"), expanded, 0),
    "CMYK": (".jpg", encode(Image.frombytes("CMYK", (16, 12), cmyk.tobytes()), "JPEG", **fine), from_cmyk, 6),
    "progressive": (".jpeg", encode(COLOUR, "JPEG", progressive=True, **fine), COLOUR, 6),
    "grey JPEG": (".jpg", encode(GREY, "JPEG", quality=100), GREY, 4),
    "JPEG called PNG": (".png", encode(COLOUR, "JPEG", **fine), COLOUR, 6),
    "PNG called JPEG": (".JPG", encode(COLOUR, "PNG"), COLOUR, 0),
    "WEBP called BMP": (".BMP", encode(COLOUR, "WEBP", lossless=True), COLOUR, 0),
    "several frames": (".png", encode(COLOUR, "PNG", save_all=True, append_images=[paletted]), COLOUR, 0),
    "more after its end": (".png", encode(COLOUR, "PNG") + b"after the end", COLOUR, 0),
    **{f"{f} by EXIF {k}": (f".{f.lower()}", encode(COLOUR, f, exif=exif(k), lossless=True, **fine), turn(COLOUR), off)
       for k, turn in TURNS.items() for f, off in (("JPEG", 6), ("PNG", 0), ("WEBP", 0))},
}
# fmt: on


@pytest.mark.parametrize("name", GOOD)
def test_good_images_come_out_right(name, tmp_path):
    ending, content, expected, tolerance = GOOD[name]
    for folder in ("one", "other"):  # classes of one image
        (tmp_path / "in" / folder).mkdir(parents=True)
        (tmp_path / "in" / folder / f"x{ending}").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        succeed(prepare_data, "folder", tmp_path / "in", "--test-classes", 0, "--out", tmp_path / "out")
    made = np.asarray(Image.open(tmp_path / "out/train/one/x.png")).astype(int)
    assert made.shape == np.shape(expected) and np.abs(made - expected).max() <= tolerance


# ------------------------------------------------------------------------------------------------------ bad images
plain, photo = encode(COLOUR, "PNG"), encode(COLOUR, "JPEG")
# fmt: off
BAD = {  # name -> bytes, or what puts it at a path
    "nothing": b"", "text": b"no image", "zeros": bytes(1000), "pickle": pickle.dumps([1, 2]),
    "PNG cut in its header": plain[:20], "PNG cut in its pixels": plain[: len(plain) // 2],
    "PNG with a flipped byte": plain[:60] + bytes([plain[60] ^ 255]) + plain[61:],
    "JPEG cut in its header": photo[:100], "JPEG cut in its pixels": photo[:-100],
    "WEBP cut": encode(COLOUR, "WEBP")[:-20], "BMP cut": encode(COLOUR, "BMP")[:-20],
    "PGM cut": b"P5 16 12 255\n" + bytes(100), "PGM of no size": b"P5 0 0 255\n",
    "PPM of negative size": b"P6 -16 12 255\n" + bytes(600), "PPM beyond sense": b"P6 " + b"9" * 30 + b" 1 255\n",
    "bomb of 3.6 gigapixels": png(8, 0, [b"\0"], 60_000, 60_000),
    "bomb of 100 megapixels": png(8, 0, [b"\0"], 10_000, 10_000), "bomb in one row": png(8, 0, [b"\0"], 2**31 - 1, 1),
    "broken text chunk": png(8, 0, [b"\0" * 16] * 12, more=b"\0\0\0\5zTXt" + bytes(9)),
    **{format: encode(COLOUR, format) for format in ("GIF", "TIFF", "EPS", "ICO")},
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"/>', "web page": b"<!DOCTYPE html><html>404</html>",
    "folder": lambda p: p.mkdir(), "pipe": os.mkfifo,
    **{f"link to {to}": lambda p, to=to: p.symlink_to(to) for to in ("the bad one.png", "nowhere", "/dev/zero")},
}
# fmt: on


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    content(path) if callable(content) else path.write_bytes(content)


@pytest.mark.parametrize("name", BAD)
def test_bad_images_are_named(name, chain, refused, tmp_path):
    shutil.copytree(chain.data / "s11", tmp_path / "in/s11")
    put(tmp_path / "in/s12/the bad one.png", BAD[name])
    waited = []

    def release():  # whoever waits for a pipe would wait for ever
        waited.append(os.open(tmp_path / "in/s12/the bad one.png", os.O_RDWR | os.O_NONBLOCK))
        os.close(waited[0])

    for script in ("prepare_data", "train_recognizer"):
        timer = threading.Timer(2, release if name == "pipe" else int)
        timer.start()
        refused(script, command(script, with_data(chain, tmp_path / "in"), tmp_path / "out"), "the bad one.png")
        timer.cancel()
        assert not waited


@pytest.mark.parametrize("script", sorted(SCRIPTS.keys() - {"costs", "sample_scoremix"}))
def test_every_script_names_a_bad_image(script, chain, refused, tmp_path):
    source, bad = (chain.test, "s3/3.png") if script == "evaluate" else (chain.data, "s13/3.png")
    shutil.copytree(source, tmp_path / "in")
    put(tmp_path / "in" / bad, plain[:50])
    refused(script, command(script, with_data(chain, tmp_path / "in"), tmp_path / "out.csv"), bad)


# fmt: off
FOLDERS = {  # what lies in a folder of images -> words of the answer, or None: as if it were not there
    "hidden class": (".git/x.png", b"", None), "hidden image": ("s11/._1.png", b"", None),
    "file of a desktop": ("s11/Thumbs.db", b"db", None), "notes": ("readme.txt", b"text", None),
    "loop of links": ("loop", lambda p: p.symlink_to(p), None), "class of other files": ("s99/x.gif", b"GIF", "s99"),
    "link to the folder itself": ("again", lambda p: p.symlink_to(p.parent), "again"),
    "class without images": ("empty", lambda p: p.mkdir(), "empty"),
    "deeper images": ("deep/s99/x.png", plain, "deep"), "no text": (os.fsdecode(b"s\xff/x.png"), plain, ""),
}
# fmt: on


@pytest.mark.parametrize("name", FOLDERS)
def test_what_lies_in_a_folder(name, chain, refused, tmp_path):
    where, content, word = FOLDERS[name]
    shutil.copytree(chain.data, tmp_path / "in")
    put(tmp_path / "in" / where, content)
    if word is None:
        listed = stage.scan([tmp_path / "in"]), stage.fingerprint(tmp_path / "in")
        assert listed[0][0] == stage.scan([chain.data])[0] and listed[1] == stage.fingerprint(chain.data)
        return
    for script in ("prepare_data", "train_recognizer"):
        refused(script, command(script, with_data(chain, tmp_path / "in"), tmp_path / "out"), word)


# ----------------------------------------------------------------------------------------------------------- flags
FLAGS = """
prepare_data --size 0|-1|nan|1e3|7|100000|; --seed -1; --test-classes nan|inf|-1|1e18|0.99|1.5
prepare_data --crop 0 0 0 0|-1 0 4 4|9 9 4 4|0 0 4|0 0 99999999999 4|0 0 nan 4
train_recognizer --steps 0|-1|nan|1e30|2.5; --batch 0|1|1e30; --lr nan|inf|-1; --size 0|17|100000; --margin 9|-1|nan
train_recognizer --scale 0|inf; --mixup -1|nan; --seed -1|1180591620717411303424; --log-every 0; --save-every 0
train_recognizer --keep-every -1; --arch big; --precision fp8; --device cuda:99|meta|; --data |nowhere
train_recognizer --init nowhere; --st 3; --step=3; --steps=; extra; --flip no
train_diffusion --steps 0|nan; --batch 0|-1; --lr nan|-1; --size 17|100000; --width 0|12|-8
train_diffusion --multipliers 0||-1|1 nan|1 1 1 1 1 1 1 1; --blocks 0; --attention 99|-1; --dropout 1|-0.1|nan
train_diffusion --label-dropout 1; --ema 1.5|nan|-1; --patch 0|3; --align nan|-1|1; --conditions frozen
train_diffusion --grid-every 0; --seed -1; --predict x; --device meta; --recognizer nowhere
mine_pairs --count 0|-1|nan|99999999999; --order 0|99|-1|1; --max-uses 0|-1; --seed -1; --space pixel|condition
mine_pairs --strategy nan; --device meta
sample_scoremix --per-class 0|-1|nan; --steps 0|1001|nan; --weights nan nan|inf 0|1e9 -1e9||0.5 0.5 0|0 0
sample_scoremix --dirichlet 0|nan|-1; --guidance nan|-1|1e9; --eta -1|2; --solver ddim --eta nan|euler; --batch 0|-1
sample_scoremix --correlation nan|-0.1|2; --start 0|-1|nan|inf; --data |nowhere
sample_scoremix --seed -1|1e3; --window nan 1|-1 1|9 1|1; --device meta; --pairs nowhere|.; --generator nowhere
evaluate --draws 0|-1|nan; --seed -1; --mean nan|300; --std 0|nan; --bgr; --keep-norm; --arch x; --gallery x
evaluate --probe x; --model; --device meta; --pairs nowhere; --templates nowhere; --embeddings nowhere
alignment --neighbours 0|-1|5|nan; --seed -1; --device meta; --data nowhere
sweep --grid nan||inf|1e9; --mixes 0; --per-class 1; --steps 0|1001; --batch 0; --seed -1; --solver euler
sweep --device meta; --mix none
costs --images 0|-1|nan|1e30; --device meta; --rate 3
audit --device meta; --mixed nowhere; --data nowhere; --recognizer nowhere; --size 3
"""  # script flag value|value; flag value ...
FLAGS = [
    (x.split()[0], [f.split()[0], *v.split()])
    for x in FLAGS.strip().split("\n")
    for f in x.partition(" ")[2].split(";")
    for v in f.strip().partition(" ")[2].split("|")
]


@pytest.mark.parametrize("script, flags", FLAGS, ids=[f"{s} {' '.join(f)}" for s, f in FLAGS])
def test_absurd_flags(script, flags, chain, refused, tmp_path):
    refused(script, command(script, chain, tmp_path / ("out.csv" if script == "mine_pairs" else "out"), *flags))


# fmt: off
JSONS = {"config": ["", "[]", "null", "3", '"text"', "{}", '{"stage": 1}', "[" * 9999], "cost": ["", "[]", '"text"']}
OUTS = {
    "file": lambda p: p.write_text("no folder"), "folder of more": lambda p: put(p / "thesis.txt", b"years"),
    "link to itself": lambda p: p.symlink_to(p), "below a file": lambda p: p.parent.rmdir() or p.parent.write_text("x"),
    **{f"{k}.json {x[:20]}": lambda p, k=k, x=x: [put(p / f"{n}.json", b"{}") for n in JSONS] + [put(p / "x", b"")] and
       put(p / f"{k}.json", x.encode()) for k, of in JSONS.items() for x in of},
}
# fmt: on


@pytest.mark.parametrize("script, name", [(s, n) for s in SCRIPTS for n in [*OUTS][:: 1 if s == "evaluate" else 5]])
def test_outputs_that_cannot_be(name, script, chain, fails, tmp_path):
    out = tmp_path / "place/out.csv"
    out.parent.mkdir()
    OUTS[name](out)
    before = tree(tmp_path)
    fails(SCRIPTS[script].main, command(script, chain, out))
    assert {p: x for p, x in tree(tmp_path).items() if p.name != ".lock"} == before


# ---------------------------------------------------------------------------------------------------------- tables
# fmt: off
MANIFESTS = {  # of audit.py --mixed: what becomes of a good one -> a word of the answer, None: it is as good
    "nothing": (lambda t: b"", "manifest"), "header alone": (lambda t: t[:60], "manifest"),
    "no path": (lambda t: t.replace(b"path", b"file"), "path"), "others": (lambda t: t.replace(b",s1", b",t1"), "t1"),
    "no classes": (lambda t: t.replace(b"class_", b"kind_"), "manifest"), "latin-1": (lambda t: t + b"\xe9", ""),
    "one column": (lambda t: b"\n".join(x.split(b",")[0] for x in t.split()), "manifest"),
    "short rows": (lambda t: t.replace(b",s1", b"\ns1"), "manifest"),
    "long rows": (lambda t: t.replace(b"0\r", b"0,1\r"), ""),
    "huge field": (lambda t: t + b"x" * 200_000, "manifest"), "traversal": (lambda t: t.replace(b"s1", b"../s1"), ""),
    "UTF-16": (lambda t: t.decode().encode("utf-16"), "manifest"), "BOM": (lambda t: b"\xef\xbb\xbf" + t, None),
    "LF": (lambda t: t.replace(b"\r", b""), None), "quotes": (lambda t: t.replace(b"path", b'"path"'), None),
    "a row more": (lambda t: t + b"../x.png,s11,s12,1,0,0\r\n", None),
}
PAIRS = {  # of sample_scoremix.py and sweep.py
    "UTF-16": ("class_1,class_2\ns11,s12\n".encode("utf-16"), "pairs"), "npz": (b"PK\3\4" + bytes(99), "pairs"),
    "latin-1": (b"class_1,class_2\ns11,s\xe9\n", "pairs"), "semicolons": (b"class_1;class_2\ns11;s12\n", "columns"),
    "spaces": (b"class_1,class_2\ns11, s12\n", "line 2"), "huge field": (b"class_1\n" + b"x" * 200_000, "pairs"),
    "open quote": (b'class_1,class_2\n"s11,s12\n', "line 2"), "traversal": (b"class_1\n../../s11\n", "../../s11"),
    "absolute": (b"class_1,class_2\n/etc/passwd,s11\n", "/etc/passwd"), "image": (plain, "pairs"),
    "empty name": (b"class_1,class_2\ns11,\n", "line 2"), "long row": (b"class_1,class_2\ns11,s12,s13\n", "line 2"),
    "class twice": (b"class_1,class_1\ns11,s12\n", "columns"), "blank lines": (b"\n\n\n", "columns"),
    "NUL": (b"class_1,class_2\ns11,s\0\n", "line 2"),
}
MATS = {  # of prepare_data.py tinyface
    "names are numbers": dict(probe_set=[1.0, 2.0]), "ids are text": dict(probe_ids=np.array(["a", "b"], object)),
    "ids are nan": dict(probe_ids=[np.nan, 1]), "ids are infinite": dict(probe_ids=[np.inf, 1]),
    "no ids": dict(probe_ids=[]), "ids are fractions": dict(probe_ids=[1.5, 2]), "ids too few": dict(probe_ids=[1]),
    "table": dict(probe_ids=np.ones((2, 2))),
    "no such image": dict(probe_set=np.array(["a.png", "1.png"], object)),
    "path traversal": dict(probe_set=np.array(["../../secret.png", "1.png"], object)),
}
# fmt: on


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests(name, chain, refused, tmp_path):
    change, words = MANIFESTS[name]
    shutil.copytree(chain.mixed, tmp_path / "mixed")
    put(tmp_path / "mixed/manifest.csv", change((chain.mixed / "manifest.csv").read_bytes()))
    argv = command("audit", chain, tmp_path / "out", "--mixed", tmp_path / "mixed")
    succeed(audit, *argv) if words is None else refused("audit", argv, words)


@pytest.mark.parametrize("script", ["sample_scoremix", "sweep"])
@pytest.mark.parametrize("name", PAIRS)
def test_pairs_files(name, script, chain, refused, tmp_path):
    put(tmp_path / "pairs.csv", PAIRS[name][0])
    refused(script, command(script, chain, tmp_path / "out", "--pairs", tmp_path / "pairs.csv"), PAIRS[name][1])


@pytest.mark.parametrize("name", MATS)
def test_lists_of_tinyface(name, refused, tmp_path):
    for path in ("Probe/1", "Probe/2", "Gallery_Match/1", "Gallery_Match/2", "Gallery_Distractor/3", "../secret"):
        put(tmp_path / "in" / f"{path}.png", plain)
    images = np.array(["1.png", "2.png"], object)
    savemat(tmp_path / "in/gallery_match_img_ID_pairs.mat", {"gallery_set": images, "gallery_ids": [1, 2]})
    savemat(tmp_path / "in/probe_img_ID_pairs.mat", {"probe_set": images, "probe_ids": [1, 2]} | MATS[name])
    refused("prepare_data", ["tinyface", tmp_path / "in", "--out", tmp_path / "out"], "probe_img_ID_pairs.mat")


# ------------------------------------------------------------------------------------------------- names and numbers
def test_names_survive_the_chain(faces, tmp_path):
    """Odd class names, mixed sizes, one class of a single image, from the source to a training on both folders."""
    for k, name in enumerate(NAMES):
        for i in range(1, 2 if k == 1 else 4):
            put(tmp_path / "in" / name / f"{i},+ é.png", b"")
            image = Image.open(faces / "train" / f"s1{k % 5 + 1}" / f"{i}.png")
            image.resize((16 + i, 20 - i)).save(tmp_path / "in" / name / f"{i},+ é.png")
    work = tmp_path / "deep/work"
    c = SimpleNamespace(
        data=work / "data/train", real=work / "real", generator=work / "generator", mixed=work / "mixed"
    )
    c.pairs, c.test = work / "pairs.csv", c.data
    succeed(prepare_data, "folder", tmp_path / "in", "--test-classes", 0, "--out", work / "data")
    assert sorted(p.name for p in c.data.iterdir()) == sorted(NAMES)
    steps = dict(train_recognizer=c.real, train_diffusion=c.generator, mine_pairs=c.pairs, sample_scoremix=c.mixed)
    for script, out in (steps | {s: work / s for s in ("audit", "evaluate", "alignment", "sweep", "costs")}).items():
        succeed(SCRIPTS[script], *command(script, c, out))
    argv = command("train_recognizer", c, work / "both", "--data", c.data, c.mixed)
    succeed(train_recognizer, *argv)
    with open(c.mixed / "manifest.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    mixes = [(r["class_1"], r["class_2"]) for r in rows]
    assert mixes == sample_scoremix.read_pairs(c.pairs, NAMES) and {x for m in mixes for x in m} <= set(NAMES)
    assert all((c.mixed / r["path"]).is_file() and r["path"].count("/") == 1 for r in rows)
    classes = torch.load(work / "both/model.pt", weights_only=True)["classes"]
    assert classes == sorted([*NAMES, *map(sample_scoremix.folder_name, mixes)])
    assert {p for p in tmp_path.glob("*/*")} == {work, *(tmp_path / "in").iterdir()}
    c.pairs.write_bytes(b"class_1\r\n" + b"\r\n".join(b'"' + n.replace('"', '""').encode() + b'"' for n in NAMES))
    succeed(sample_scoremix, *command("sample_scoremix", c, work / "alone"))
    assert sorted(p.name for p in (work / "alone").iterdir() if p.is_dir()) == sorted(NAMES)


@pytest.mark.parametrize("m", [0.0, 0.5, math.pi / 2])
@pytest.mark.parametrize("cosine", [1.0, -1.0, 1 + 1e-6, -1 - 1e-6, 1 - 1e-7, 0.0])
def test_arcface_at_the_ends(cosine, m):
    x, y = torch.full((1, 3), cosine, requires_grad=True), torch.tensor([1])
    loss = torch.nn.functional.cross_entropy(train_recognizer.arcface(x, y, 64.0, m), y)
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()


def test_rows_of_zeros_and_single_images():
    z = np.array([[1.0, 0], [-1, 0], [0, 1], [0, 0]])
    centres = train_recognizer.class_centres(z, np.array([0, 0, 1, 2]), 3)  # opposite images, one image, a zero one
    assert np.array_equal(centres, [[0, 0], [0, 1], [0, 0]])
    assert [m for m, d in mine_pairs.mine(centres, 3)] == [(0, 1), (0, 2), (1, 2)]
    assert np.isfinite(alignment.cosines(centres)).all() and math.isnan(audit.consistency(z[:1], np.array([0])))
    assert train_recognizer.F.normalize(torch.zeros(2, 3)).isfinite().all()
    labels = torch.tensor([0, 1, 1, 1])
    assert all(training.balanced_indices(i, labels, 2, 0).max() < 4 for i in range(9))


def test_batches_of_one_and_a_last_one_that_is_not_full(chain, tmp_path):
    model, saved = train_recognizer.load_recognizer(chain.real, "cpu")
    images = stage.Images([chain.data], 16, saved["config"]["channels"])
    z = [train_recognizer.embed(model, images, saved["config"], "cpu", batch) for batch in (30, 1, 7, 29)]
    assert all(len(x) == 30 and torch.allclose(x, z[0], atol=1e-5) for x in z)
    succeed(train_diffusion, *command("train_diffusion", chain, tmp_path / "one", "--batch", 1))
    succeed(train_recognizer, *command("train_recognizer", chain, tmp_path / "more", "--batch", 31))


# ------------------------------------------------------------------------------------------------------- properties
name = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0/"), min_size=1, max_size=90)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(name, name), min_size=1, max_size=5, unique=True), st.data())
def test_any_names_go_through_a_pairs_file(tmp_path_factory, rows, data):
    rows, path = [r for r in rows if r[0] != r[1]] or [("a", "b")], tmp_path_factory.getbasetemp() / "any.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("class_1", "class_2"), *rows])
    assert sample_scoremix.read_pairs(path, {c for r in rows for c in r}) == rows
    folders = [sample_scoremix.folder_name(r) for r in rows]
    assert len(set(folders)) == len(rows) and all("/" not in f and len(f.encode()) <= 255 for f in folders)
    content = bytearray(path.read_bytes())
    for i in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=4)):
        content[i] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    known = {c for r in rows for c in r}
    try:
        found = sample_scoremix.read_pairs(path, known)
    except stage.StageError as error:
        assert str(path) in str(error)
    else:
        assert found and {c for mix in found for c in mix} <= known


@given(st.sampled_from(sample_scoremix.SOLVERS), st.integers(1, 1000))
def test_times_of_all_solvers_fall(solver, steps):
    schedule = Schedule()
    times = sample_scoremix.timesteps(schedule, solver, steps)
    assert len(times) == steps + 1 and times[-1] == -1 and all(a > b for a, b in zip(times, times[1:]))
    assert all(0 <= t <= 999 and abs(math.hypot(*schedule.coefficients(t)) - 1) < 1e-9 for t in times[:-1])


@given(st.floats(1e-3, 1e6), st.integers(0, 2**63 - 1), st.integers(2, 5))
def test_drawn_weights_are_weights(alpha, seed, order):
    assert sample_scoremix.convex(sample_scoremix.image_weights(seed, tuple("abcde"[:order]), 0, alpha))


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(-1, 1), min_size=3, max_size=3), min_size=2, max_size=8), st.integers(1, 40))
def test_mining_with_ties_and_zeros(rows, count):
    for strategy in ("distant", "close", "random"):
        found = mine_pairs.mine(np.array(rows, float), count, 2, strategy, 2)
        mixes = [m for m, _ in found]
        assert 0 < len(mixes) <= count and len(set(mixes)) == len(mixes) and all(a < b for a, b in mixes)
        assert max(np.bincount(np.array(mixes).ravel())) <= 2


def test_the_corpus_is_large():
    many = len(GOOD), len(BAD), len(FOLDERS), len(OUTS), len(MANIFESTS), len(PAIRS), len(MATS), len(NAMES)
    assert min(many) >= 5 and sum(many) + len(FLAGS) >= 200
    assert {s for s, _ in FLAGS} == set(SCRIPTS)


@pytest.mark.parametrize(
    "script, flags", [("prepare_data", ["--out"]), ("evaluate", ["--model"]), ("evaluate", ["--data"])]
)
def test_links_that_go_in_a_circle(script, flags, chain, tmp_path, refused):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    refused(script, [*command(script, chain, tmp_path / "out"), *flags, tmp_path / "a"], "/a")
