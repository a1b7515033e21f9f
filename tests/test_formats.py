"""The formats of others: a stranger's file is read right or refused with one line, and nothing in it is executed."""

import copyreg
import csv
import io
import os
import pickle
import struct
import time
import tracemalloc
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from conftest import succeed
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

import formats
import prepare_data
import stage


def photo(seed, kind="JPEG", size=24) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), kind)
    return file.getvalue()


IMAGES, SAME = [photo(i) for i in range(20)], [i % 3 == 0 for i in range(10)]
ARRAYS = [np.frombuffer(x, np.uint8) for x in IMAGES]


def contents(folder) -> dict:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("[!.]*") if p.is_file()}


def pairs_of(out, name) -> list:
    """The rows of a list, with the files' bytes in the places of their paths."""
    head, *rows = csv.reader((out / f"{name}.csv").read_text().splitlines())
    assert head == ["path_a", "path_b", "same", "fold"]
    return [((out / a).read_bytes(), (out / b).read_bytes(), int(same), int(fold)) for a, b, same, fold in rows]


class Run:
    def __init__(self, function=os.system, *args):
        self.made = function, args or ("touch touched",)

    def __reduce__(self):
        return self.made


OPEN, SYSTEM = "open('touched', 'w')", b"cos\nsystem\n(S'touch touched'\ntR"
ENCODE, RECONSTRUCT = b"c_codecs\nencode\n", b"cnumpy.core.multiarray\n_reconstruct\n"
ARRAY = RECONSTRUCT + b"(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I%d\ntcnumpy\ndtype\n(S'u1'\ntRI00\nS'12345'\ntb"
SCALAR, BUFFER = b"cnumpy.core.multiarray\nscalar\n", b"cnumpy._core.numeric\n_frombuffer\n"
ALLOWED = [ENCODE, RECONSTRUCT, SCALAR, BUFFER, b"cnumpy\ndtype\n"]
HELD = Run(eval, OPEN), Run(exec, OPEN), Run(np.load, "evil.npy", None, True), np.array([Run()], object)
HELD += ([*IMAGES[:19], Run()], SAME), (IMAGES, [*SAME[:9], Run()])
EXECUTES = [SYSTEM + b".", *(pickle.dumps(Run(), p) for p in range(6)), *map(pickle.dumps, HELD)]
EXECUTES += [x + b"(" + SYSTEM + b"tR." for x in ALLOWED]
EXECUTES += [RECONSTRUCT + b"(cnumpy\nndarray\n(I0\ntS'b'\ntR" + SYSTEM + b"b."]  # in the state of an array
EXECUTES += (  # by hand: STACK_GLOBAL, Python 2, subprocess, getattr, a dotted name, INST, OBJ, NEWOBJ(_EX), EXT1, 2, 4
    b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0dtouch touched\x85R. || "
    b"c__builtin__\neval\n(S\"open('touched', 'w')\"\ntR. || csubprocess\ncheck_call\n((S'touch'\nS'touched'\nltR. || "
    b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(S'os'\ntRS'system'\ntR(S'touch touched'\ntR. || "
    b"\x80\x04\x8c\x13numpy._core.numeric\x8c\x0dbuiltins.eval\x93(S\"open('touched', 'w')\"\ntR. || "
    b"(S'touch touched'\nios\nsystem\n. || (cos\nsystem\nS'touch touched'\no. || "
    b"\x80\x02cbuiltins\ntuple\n(cbuiltins\nmap\n(cos\nsystem\n(S'touch touched'\nlt\x81t\x81. || "
    b"\x80\x04cbuiltins\ntuple\n(cbuiltins\nmap\n(cos\nsystem\n(S'touch touched'\nlt}\x92t}\x92. || "
    b"\x82q(S'touch touched'\ntR. || \x83q\0(S'touch touched'\ntR. || \x84q\0\0\0(S'touch touched'\ntR."
).split(b" || ")


@pytest.mark.parametrize("evil", EXECUTES, ids=lambda x: ascii(x[-30:]))
def test_nothing_in_a_pickle_is_executed(tmp_path, monkeypatch, fails, evil):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(copyreg._inverted_registry, ord("q"), ("os", "system"))
    np.save("evil.npy", np.array([Run()], object), allow_pickle=True)
    Path("x.bin").write_bytes(evil)
    fails(prepare_data.main, ["bin", "x.bin", "--out", "out"], "x.bin is not read")
    assert not Path("touched").exists() and not Path("out").exists()
    with suppress(Exception):
        pickle.loads(evil)
    copyreg.clear_extension_cache()
    assert Path("touched").exists()  # the standard library does execute this one


def padded(code, n=1_600_000) -> bytes:
    """A pickle that may have many opcodes, as it begins with an image of n bytes, number 0 of the memo."""
    return b"\x80\x02B" + struct.pack("<I", n) + bytes(n) + b"q\x000" + code + b"."


M, DEEP = 200_000, b")" + b"\x85" * 200_000 + b"q\2"
DEEP_NAMES = DEEP + RECONSTRUCT + b")R(Nh\2cnumpy\ndtype\n(S'u1'\ntRNS'a'\ntb", DEEP + ENCODE + b"(X\1\0\0\0ah\2tR"
ONE_MB = b"X" + struct.pack("<I", 10**6) + b"a" * 10**6 + b"X\6\0\0\0latin1\x86q\0" + ENCODE + b"q\1"
FLOODS = [*map(padded, (b"]" * M, b"(" * M, b"N" + b"\x94" * M, DEEP, DEEP + b"h\2\x86", *DEEP_NAMES))]
FLOODS += [padded(b"]" * M + b"a" * (M - 1), 4_000_000), b"]" * 1_000_000, ONE_MB + b"h\1h\0R" * 2000]
FLOODS += [padded(RECONSTRUCT + b"q\1" + b"h\1h\0R0" * 2000, 400_000)]  # 400,000 bytes as arguments, 2000 times
FLOODS += [b"I" + b"9" * 100_000 + b"\n.", b"](lq\0h\0a\x86.", b"B\xff\xff\xff\xffx", b"T\xff\xff\xff\x7fx"]
FLOODS += [b"X\xff\xff\xff\xffx", b"Nr\xff\xff\xff\xff.", b"Np%d\n." % 2**62]
for announced in (2**28, 2**40, 2**63 - 1, 2**64 - 1):
    FLOODS += [b"\x80\x05" + op + struct.pack("<Q", announced) + b"x" for op in (b"\x8d", b"\x8e", b"\x95", b"\x96")]
REFUSED = dict.fromkeys(FLOODS, "is not read") | {
    **dict.fromkeys([pickle.dumps((["text"] * 20, SAME)), pickle.dumps((b"ab" * 10, SAME))], "images"),
    pickle.dumps((IMAGES, [2] * 10)): "booleans",
    **{pickle.dumps((ARRAYS, np.zeros(10, kind))): "other items" for kind in (int, "M8[s]")},
    pickle.dumps((ARRAYS, np.ones((2, 5), bool))): "one row",
    b"(((" + ARRAY % 9 + b"l(I01\nlt.": "one row",
    **{ENCODE + b"(X\2\0\0\0ab" + x + b"tR.": "latin1" for x in (b"X\5\0\0\0rot13", b"X\3\0\0\0zip")},
    ENCODE + b"(X\3\0\0\0\xe2\x82\xacX\6\0\0\0latin1tR.": "latin-1",
    b"cnumpy.core.multiarray\nfromfile\n(S'x.bin'\ntR.": "numpy.core.multiarray.fromfile",
    b"\x80\x04\x8c\x16numpy._core.multiarray\x8c\x18_reconstruct.__globals__\x93.": "__globals__",
    b"cformats\nReader\n(S'N.'\ntR.": "formats.Reader",
}
NO_SUCH = b"cnumpy\ndtype\n(NNtb.|cnumpy\nndarray\n(tR.|Pabc\n.|\x80\x02NQ.|\x82\x70.|\x80\x05\x97.|N.|".split(b"|")
REFUSED |= dict.fromkeys([*NO_SUCH, ENCODE + b"(NNtb.", ENCODE + b"}S'a'\nS'b'\nsb."], "is not read")
REFUSED = [("bin", *x) for x in REFUSED.items()]


def read_or_refuse(path, data) -> bool:
    """Whether it was read; anything but StageError goes through."""
    path.write_bytes(data)
    try:
        images, same = formats.read_bin(path)
    except stage.StageError as error:
        assert str(path) in str(error) and str(error).isprintable()  # nothing for a terminal to obey
        return False
    assert len(images) == 2 * len(same) > 0 and {type(x) for x in images} == {bytes} and {*map(type, same)} == {bool}
    return True


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_truncated_pickle_is_refused(tmp_path, protocol):
    data = pickle.dumps((ARRAYS[:4], list(np.array(SAME[:2]))), protocol)
    for cut in {*range(150), *range(0, len(data), 197), *range(len(data) - 100, len(data))}:
        assert not read_or_refuse(tmp_path / "x.bin", data[:cut]), cut


OPCODES = [bytes([code]) for code in pickle._Unpickler.dispatch]
KNOWN = [*ALLOWED, b"cnumpy\nndarray\n", b"S'u1'\n", b"U\x06latin1", b"C\x03abc", b"K\x01", ARRAY % 5, b"("]
VALID = pickle.dumps((ARRAYS[:2], list(np.array(SAME[:1]))), 2)
PLACES = st.lists(st.tuples(st.integers(0, len(VALID)), st.binary(max_size=3)), max_size=3)


@settings(max_examples=150, deadline=None)
@given(st.binary() | st.lists(st.sampled_from([*OPCODES, *KNOWN]), max_size=40).map(b"".join), PLACES)
@example(b"c\x1b[2K\x1b[31mos\x08\nsystem\n.", [])
def test_random_pickles_provoke_nothing_but_the_one_error(tmp_path_factory, code, places):
    data, path = VALID, tmp_path_factory.getbasetemp() / "x.bin"
    for place, more in places:
        data = data[:place] + more + data[place + len(more) :]
    for made in (code, b"\x80\x05" + code + b".", data):
        read_or_refuse(path, made)


def python2(protocol, images, same) -> bytes:
    """By hand what Python 2 pickles: a list of str and one of bool; known ones come from the memo, from 250 on."""
    memo, items = {}, []
    for x in images:
        known, n = x in memo, memo.setdefault(x, 250 + len(memo))
        item = b"U" + bytes([len(x)]) + x if len(x) < 256 else b"T" + struct.pack("<i", len(x)) + x
        item += b"q" + bytes([n]) if n < 256 else b"r" + struct.pack("<I", n)
        text = b"S" + repr(x)[1:].encode() + b"\np%d\na" % n
        again = b"j" + struct.pack("<I", n) if protocol else b"g%d\na" % n
        items.append(again if known else item if protocol else text)
    flags = [(b"I00\n", b"I01\n", b"\x89", b"\x88")[s + 2 * (protocol == 2)] + b"a" * (not protocol) for s in same]
    begin, end = (b"](", b"e") if protocol else (b"(l", b"")
    lists = begin + b"".join(items) + end + begin + b"".join(flags) + end
    return b"\x80\x02" + lists + b"\x86." if protocol == 2 else b"(" + lists + b"t."


def python3(protocol, images, same) -> bytes:
    data = pickle.dumps((images, same), protocol)
    return data.replace(b"numpy._core", b"numpy.core") if protocol < 3 else data  # as numpy 1 calls it


MIXED = [photo(i % 6, "PNG", 4) if i % 3 else photo(i % 6) for i in range(20)]  # longer and shorter than 256 bytes
MADE = [(IMAGES, SAME), (ARRAYS, list(np.array(SAME))), (tuple(ARRAYS), [*map(int, SAME)]), (MIXED, SAME)]
MADE += [([np.array(x) for x in ARRAYS], np.array(SAME)), ([ARRAYS[i % 7] for i in range(50)], SAME * 2 + SAME[:5])]
RIGHT = [(python3, p, *made) for p in range(6) for made in MADE] + [(python2, p, MIXED, SAME) for p in range(3)]


@pytest.mark.parametrize("write, protocol, images, same", RIGHT)
def test_a_right_bin_is_read(tmp_path, write, protocol, images, same):
    (tmp_path / "lfw.bin").write_bytes(write(protocol, images, same))
    succeed(prepare_data, "bin", tmp_path / "lfw.bin", "--out", tmp_path / "out")
    images = [bytes(x) for x in images]
    expected = [(images[2 * i], images[2 * i + 1], s, i * 10 // len(same)) for i, s in enumerate(same)]
    assert pairs_of(tmp_path / "out", "lfw") == expected
    endings = sorted(p.suffix for p in (tmp_path / "out/lfw").iterdir())
    assert endings == sorted(".png" if x[:4] == b"\x89PNG" else ".jpg" for x in set(images))


MAGIC, LABELS = struct.pack("<I", 0xCED7230A), [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
PARTED = IMAGES[4] + bytes(-len(IMAGES[4]) % 4) + MAGIC + b"abcd" + MAGIC + MAGIC + b"efg" + MAGIC + b"\0" + MAGIC
FACES = [*IMAGES[:4], PARTED, *IMAGES[5:12]]


def record(labels, image=b"") -> bytes:
    """MXNet's: labels a number or a tuple; the magic number inside, at a multiple of 4, parts it."""
    many = isinstance(labels, tuple)
    content = struct.pack("<IfQQ", len(labels) if many else 0, 0 if many else labels, 7, 0)
    content += (struct.pack(f"<{len(labels)}f", *labels) if many else b"") + image
    cuts = [i for i in range(0, len(content) // 4 * 4, 4) if content[i : i + 4] == MAGIC]
    parts = [content[a:b] for a, b in zip([0, *(c + 4 for c in cuts)], [*cuts, len(content)])]
    flags = [1, *[2] * (len(parts) - 2), 3] if cuts else [0]
    return b"".join(MAGIC + struct.pack("<I", f << 29 | len(p)) + p + bytes(-len(p) % 4) for f, p in zip(flags, parts))


def write_rec(folder, end=13.0, labels=LABELS, many=False, faces=FACES) -> Path:
    """12 images of 4 people; with an `end`, the people's records, and record 0 that tells it, as InsightFace does."""
    made = [record((float(x), 0.5) if many else x, image) for x, image in zip(labels, faces)]
    made += [record((3.0 * i + 1, 3.0 * i + 4)) for i in range(4)] + [record((end, 17.0))] if end is not None else []
    keys, offsets = [*range(1, len(made)), 0 if end is not None else 12], np.cumsum([0, *map(len, made)])
    folder.mkdir()
    (folder / "train.rec").write_bytes(b"".join(made))
    (folder / "train.idx").write_text("".join(f"{k}\t{o}\n" for k, o in zip(keys, offsets)))
    (folder / "property").write_text(f"{4 if end is not None else '²'},112,112\n")  # what is no number is ignored
    return folder


@pytest.mark.parametrize("kind", [{}, {"many": True}, {"end": None}], ids=["usual", "many labels", "no record 0"])
def test_rec_is_read_byte_for_byte_and_decoded_to_a_size(tmp_path, kind):
    assert record(1, PARTED).count(MAGIC) == 6
    source, out = write_rec(tmp_path / "rec", **kind), tmp_path / "out"
    succeed(prepare_data, "rec", source, "--out", out)
    found = {k: v for k, v in contents(out).items() if k[:2] in ("tr", "te")}
    assert found == {f"train/{c:07d}/{i + 1:08d}.jpg": FACES[i] for i, c in enumerate(LABELS)}
    succeed(prepare_data, "rec", source, "--size", "16", "--test-classes", "2", "--out", tmp_path / "b")
    for i, c in enumerate(LABELS):
        (path,) = (tmp_path / "b").glob(f"*/{c:07d}/{i + 1:08d}.png")
        assert np.array_equal(np.asarray(Image.open(path)), stage.decode(io.BytesIO(FACES[i]), 16))
    assert len(list((tmp_path / "b/test").iterdir())) == len(list((tmp_path / "b/train").iterdir())) == 2


@pytest.mark.parametrize("many", [False, True])
def test_headers_of_a_rec_are_read_without_the_images(tmp_path, many):
    """The first bytes of a record, or of its parts, say what the whole of it does."""
    faces = [bytes(5000), MAGIC + bytes(5000), MAGIC * 3 + b"ab", *FACES[3:]]
    source = formats.Records(write_rec(tmp_path / "rec", many=many, faces=faces))
    for key, label, face in zip(source.keys, LABELS, faces):
        (start, length), (whole, all_of_it) = source.record(key, 28), source.record(key)
        assert length == all_of_it == len(whole) and whole.startswith(start[:28]) and len(start) < 28 * 5
        assert source.header(key)[:2] == source.header(key, None)[:2] and source.header(key)[1] == label
        assert source.header(key, None)[2] == face


def test_a_truncated_rec_is_refused(tmp_path, fails):
    source = write_rec(tmp_path / "rec", end=None)
    data = (source / "train.rec").read_bytes()
    for cut in [0, 1, 7, 8, 31, 33, 500, len(data) // 2, data.index(b"efg"), len(data) - 4, len(data) - 9]:
        (source / "train.rec").write_bytes(data[:cut])
        fails(prepare_data.main, ["rec", source, "--out", tmp_path / "out"], "train.rec", "truncated")


LABEL = [(13.0, [0, 0, 0, 1, x, *LABELS[5:]]) for x in (float("nan"), float("inf"), 0.5, -1.0)]
HOSTILE = [("rec", (x, LABELS), "lacks") for x in (1e6, 1e30, 0.0, -5.0)] + [("rec", x, "record 5") for x in LABEL]


@pytest.mark.parametrize("kind, evil, word", HOSTILE + REFUSED, ids=lambda x: ascii(x[-30:]))
def test_a_hostile_file_is_refused_in_little_memory_and_time(tmp_path, fails, kind, evil, word):
    source, began = tmp_path / "src", time.process_time()
    source.write_bytes(evil) if kind == "bin" else write_rec(source, *evil)
    tracemalloc.start()
    try:
        fails(prepare_data.main, [kind, source, "--out", tmp_path / "out"], source, word)
        assert tracemalloc.get_traced_memory()[1] < 20 * len(evil) + 2**21
    finally:
        tracemalloc.stop()
    assert time.process_time() - began < 2.5 and not (tmp_path / "out").exists()


LIST = b"2\t1\nAnn_Lee\t1\t2\nAnn_Lee\t3\tBo\t1\nBo\t2\t3\nBo\t1\tAnn_Lee\t2\n"


def write_pairs(folder, kind="JPEG"):
    for seed, name in enumerate(("Ann_Lee", "Bo")):
        (folder / name).mkdir(parents=True)
        for i in (1, 2, 3):
            (folder / name / f"{name}_{i:04d}.{'jpg' if kind == 'JPEG' else 'ppm'}").write_bytes(
                photo(10 * seed + i, kind)
            )
    (folder / "pairs.txt").write_bytes(LIST)
    return folder


@pytest.mark.parametrize("kind", ["JPEG", "PPM"])
def test_pairs_are_read(tmp_path, kind):
    source, out = write_pairs(tmp_path / "lfw", kind), tmp_path / "out"
    succeed(prepare_data, "pairs", source, "--out", out)
    a1, a2, a3, b1, b2, b3 = (photo(i, kind) for i in (1, 2, 3, 11, 12, 13))
    assert pairs_of(out, "lfw") == [(a1, a2, 1, 0), (a3, b1, 0, 0), (b2, b3, 1, 1), (b1, a2, 0, 1)]
    (tmp_path / "dev.txt").write_text("1\nBo 2 3\nBo 1 Ann_Lee 2\n")  # one fold, by spaces
    succeed(prepare_data, "pairs", source, "--list", tmp_path / "dev.txt", "--size", "16", "--out", tmp_path / "b")
    assert [row[2:] for row in pairs_of(tmp_path / "b", "dev")] == [(1, 0), (0, 0)]
    assert np.array_equal(Image.open(tmp_path / "b/dev/Bo/Bo_0002.png"), stage.decode(io.BytesIO(b2), 16))


TEMPLATE = np.array(formats.ARCFACE_TEMPLATE)
POINTS, CROPS = " ".join(map(str, TEMPLATE.ravel())), ("1.jpg", "2.jpg", "3.jpg", "1.png")
META = {"face_tid_mid": "1.jpg 5 1\n2.jpg 5 2\n3.jpg 8 3\n", "template_pair_label": "5 8 0\n5 5 1\n"}
META["name_5pts_score"] = "".join(f"{name} {POINTS} 0.{name[0]}\n" for name in CROPS)


def write_ijb(folder):
    files = {f"loose_crop/{name}": photo(i, size=112) for i, name in enumerate(CROPS)}
    for path, data in (files | {f"meta/x_{name}.txt": text.encode() for name, text in META.items()}).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def test_ijb_is_read(tmp_path):
    succeed(prepare_data, "ijb", write_ijb(tmp_path / "ijb"), "--out", tmp_path / "out")
    rows = (tmp_path / "out/templates.csv").read_text().split()
    assert rows == ["path,template,media,score", *(f"images/{i}.png,{(5, 5, 8)[i - 1]},{i},0.{i}" for i in (1, 2, 3))]
    pairs = {k: v.tolist() for k, v in np.load(tmp_path / "out/pairs.npz").items()}
    assert pairs == {"a": [5, 5], "b": [8, 5], "same": [False, True]}
    made, put = (np.asarray(Image.open(tmp_path / p), int) for p in ("out/images/2.png", "ijb/loose_crop/2.jpg"))
    assert made.shape == (112, 112, 3) and abs(made - put)[1:-1, 1:-1].max() <= 1


GOOD = pickle.dumps((IMAGES, SAME))
WRITE = {"bin": lambda p: p.write_bytes(GOOD) and p, "rec": write_rec, "pairs": write_pairs, "ijb": write_ijb}
FACE, SCORE, PAIR = (f"meta/x_{name}.txt" for name in ("face_tid_mid", "name_5pts_score", "template_pair_label"))
REC, IDX, PAIRS = ("rec", "train.rec"), ("rec", "train.idx"), ("pairs", "pairs.txt")
FAULTS = [  # kind, file, what is there, what comes there instead (None: the file goes), a word of the message
    *(("bin", "", b"", pickle.dumps(((IMAGES * 2)[:n], SAME)), f"{n} images") for n in (0, 19, 21)),
    ("bin", "", b"", pickle.dumps(([b"no", *IMAGES[1:]], SAME)), "src/00000"),
    (*REC, b"", b"\0", "no record starts"),
    (*REC, MAGIC + b"\4\0\0\x40", MAGIC * 2, "record 5"),
    (*REC, b"\0\0\0\0\0\0\0\0\7", b"\xff" * 8 + b"\7", "record 1 is shorter"),
    *((*IDX, b"\n3\t", x, "record 3") for x in (b"\n3\t999", b"\n3\t-")),
    (*IDX, b"\n3\t", b"\n33\t", "lacks the image 3"),
    (*IDX, b"1\t0\n", b"1\t4\n", "no record starts"),
    *((*IDX, b"", x, "") for x in b"garbage\n|17\n|17\t1.5\n|17\t5\t5\n|\xff\xfe\0|3\t0\n".split(b"|")),
    ("rec", "property", b"4,", b"3,", "announces 3 classes"),
    *((*PAIRS, b"2\t1", x.encode(), "first line") for x in ("x\t1", "3\t1", "2\t1\t1", "0\t1", "-2\t1", "²\t1", "")),
    (*PAIRS, b"\t2\n", b"\t4\n", "pair 1 names Ann_Lee/Ann_Lee_0004"),
    (*PAIRS, b"3\tBo", b"3\tBob", "pair 2 names Bob/Bob_0001"),
    *((*PAIRS, b"\t2\n", x, "pair 1: 'Ann_Lee 1") for x in (b"\tx\n", "\t²\n".encode(), b"\t-2\n", b"\n")),
    (*PAIRS, b"Ann", b"\xff", "pairs.txt"),
    (*PAIRS, LIST, b"10\t0\n", "first line"),
    ("ijb", FACE, b"2.jpg", b"4.jpg", "five points for the image 4.jpg"),
    ("ijb", FACE, b"2.jpg", b"1.png", "1.png"),  # which would be the same file as 1.jpg
    *(("ijb", FACE, b"2.jpg 5 2", x, "in line 2") for x in (b"2.jpg 5", b"2.jpg 5 2 2")),
    ("ijb", FACE, META["face_tid_mid"].encode(), b"", "face_tid_mid"),
    ("ijb", FACE, b"5 2", b"five 2", "face_tid_mid"),
    ("ijb", SCORE, f"2.jpg {POINTS}".encode(), b"2.jpg 1 2 3", "in line 2"),
    *(("ijb", SCORE, POINTS.encode(), x * 10, "cannot be aligned") for x in (b"7 ", b"nan ", b"inf ", b"x ")),
    *(("ijb", PAIR, b"5 5 1\n", x, "") for x in (b"5 5\n", b"5 5 x\n", b"5 5 1 1\n")),
    ("ijb", PAIR, META["template_pair_label"].encode(), b"", ""),
    *((k, f, b"", None, "") for k, f in (IDX, PAIRS, ("ijb", "loose_crop/2.jpg"))),
]


@pytest.mark.filterwarnings("error::RuntimeWarning", "error::UserWarning")  # a warning would be a second line
@pytest.mark.parametrize("kind, name, old, new, word", FAULTS)
def test_a_fault_is_told(tmp_path, fails, kind, name, old, new, word):
    path = WRITE[kind](tmp_path / "src") / name
    data = path.read_bytes()
    path.unlink() if new is None else path.write_bytes(data.replace(old, new, 1) if old else new + data)
    fails(prepare_data.main, [kind, tmp_path / "src", "--out", tmp_path / "out"], "src", word)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 24 24\n%%EndComments\n" + b"showpage\n" * 100
BOMB = photo(0, "BMP")[:18] + struct.pack("<ii", 30000, 30000) + photo(0, "BMP")[26:]
UGLY = {"nothing": b"", "half": IMAGES[2][:700], "30000 x 30000": BOMB, "a program for Ghostscript": EPS}


@pytest.mark.parametrize("kind", ["bin", "rec", "ijb"])
@pytest.mark.parametrize("image", UGLY.values(), ids=UGLY)
def test_an_ugly_image_is_told_and_not_executed(tmp_path, monkeypatch, fails, kind, image):
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/touched\necho 10\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", str(tmp_path / "gs"))
    (tmp_path / "src.bin").write_bytes(pickle.dumps(([image, *IMAGES[1:]], SAME)))
    write_rec(tmp_path / "src.rec", faces=[*FACES[:11], image])
    (write_ijb(tmp_path / "src.ijb") / "loose_crop/2.jpg").write_bytes(image)
    fails(prepare_data.main, [kind, tmp_path / f"src.{kind}", "--size", "16", "--out", tmp_path / "out"], "src." + kind)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("kind", WRITE)
def test_the_same_command_completes_what_was_killed(tmp_path, kind):
    argv, out = [kind, WRITE[kind](tmp_path / "src"), "--out", tmp_path / "out"], tmp_path / "out"
    succeed(prepare_data, *argv)
    whole = {k: v for k, v in contents(out).items() if k != "cost.json"}
    image = next(k for k in whole if k[-4:] in (".jpg", ".png"))
    for name in (image, "split.json" if kind == "rec" else "lists.json", *(k for k in whole if k.endswith(".csv"))):
        (out / name).unlink()
    for _ in range(2):
        succeed(prepare_data, *argv)
        assert {k: v for k, v in contents(out).items() if k != "cost.json"} == whole


@pytest.mark.parametrize("size", [112, 56])
def test_a_rotated_scaled_and_shifted_face_is_put_straight(size):
    (v, u), (y, x), turn, shift = np.mgrid[:250, :250], np.mgrid[:size, :size], 1.4 * np.exp(0.5j), 75 + 25j
    pixels, points = np.round(127 + 60 * np.sin(u / 8 + v / 30) + 60 * np.cos(v / 9)), TEMPLATE @ (1, 1j) * turn + shift
    made = formats.align(Image.fromarray(pixels.astype(np.uint8)), np.stack([points.real, points.imag], 1), size)
    source = (x + 1j * y) * turn * 112 / size + shift
    inside = (np.minimum(source.real, source.imag) > 1) & (np.maximum(source.real, source.imag) < 248)
    x, y = source[inside].real, source[inside].imag
    i, j, a, b = y.astype(int), x.astype(int), x % 1, y % 1
    top, bottom = (pixels[k, j] * (1 - a) + pixels[k, j + 1] * a for k in (i, i + 1))
    assert inside.mean() > 0.7 and abs(np.asarray(made)[inside] - top * (1 - b) - bottom * b).max() <= 1


def test_outside_is_black_and_the_identity_changes_nothing():
    pixels = np.random.default_rng(0).integers(1, 256, (112, 112, 3), dtype=np.uint8)
    made, moved = (np.asarray(formats.align(Image.fromarray(pixels), TEMPLATE + (x, 0)), int) for x in (0, 40))
    assert abs(made - pixels)[1:-1, 1:-1].max() <= 1
    assert abs(moved[1:-1, 1:70] - pixels[1:-1, 41:110]).max() <= 1 and not moved[:, 74:].any()


@pytest.mark.parametrize("seed", range(8))
def test_the_least_squares_are_those_of_umeyama(seed):
    rng = np.random.default_rng(seed)
    points = TEMPLATE @ (1, 1j) * rng.uniform(0.5, 2) * np.exp(1j * rng.uniform(-3, 3))
    points = np.stack([points.real, points.imag], 1) * (-1 if seed == 7 else 1, 1)  # one in a mirror
    points += rng.normal(0, 6, (5, 2)) + 200 - points.mean(0)
    a, b = points - points.mean(0), TEMPLATE - TEMPLATE.mean(0)
    u, d, v = np.linalg.svd(b.T @ a / 5)
    sign = np.diag([1, np.sign(np.linalg.det(u) * np.linalg.det(v))])
    linear = np.trace(np.diag(d) @ sign) / a.var(0).sum() * u @ sign @ v
    expected = (np.moveaxis(np.mgrid[:112, :112][::-1], 0, -1) - TEMPLATE.mean(0)) @ np.linalg.inv(
        linear
    ).T + points.mean(0)
    inside = ((expected > 1) & (expected < 398)).all(-1)
    for axis, ramp in enumerate(np.mgrid[:400, :400][::-1]):  # an image that says where its pixels are
        made = np.asarray(formats.align(Image.fromarray(ramp.astype(np.float32)), points))
        assert inside.mean() > 0.1 and abs(made - expected[..., axis])[inside].max() < 1e-3


def test_omniglot_keeps_alphabets_apart(tmp_path):
    rng, bits = np.random.default_rng(0), {}
    for part, alphabet in (("background", "Greek"), ("background", "Latin"), ("evaluation", "Oriya")):
        for character in ("character01", "character02"):
            folder = tmp_path / "src" / f"images_{part}" / alphabet / character
            folder.mkdir(parents=True)
            to = f"{'train' if part == 'background' else 'test'}/{alphabet}.{character}"
            bits[f"{to}/0001.png"] = pixels = rng.random((21, 21)) < 0.5
            Image.fromarray(pixels).save(folder / "0001.png")
    succeed(prepare_data, "omniglot", tmp_path / "src", "--out", tmp_path / "out")
    assert {k for k in contents(tmp_path / "out") if k.endswith(".png")} == set(bits)
    for path, pixels in bits.items():
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / path)), pixels * np.uint8(255))


def test_lfw_is_cropped_and_leaves_out_people_of_few_images(tmp_path):
    for person, images in (("Al", 4), ("Bo", 5), ("Cy", 3)):
        (tmp_path / "src" / person).mkdir(parents=True)
        for i in range(images):
            (tmp_path / "src" / person / f"{person}_{i:04d}.jpg").write_bytes(photo(i, size=250))
    succeed(prepare_data, "lfw", tmp_path / "src", "--test-classes", "0", "--out", tmp_path / "out")
    assert {p.name for p in (tmp_path / "out/train").iterdir()} == {"Al", "Bo"}
    whole = stage.decode(tmp_path / "src/Bo/Bo_0004.jpg", None)
    assert np.array_equal(Image.open(tmp_path / "out/train/Bo/Bo_0004.png"), whole[50:185, 60:195])
