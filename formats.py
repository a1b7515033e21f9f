"""The packed formats of the field, read without the libraries that wrote them, for prepare_data.py: InsightFace's .rec
and .bin, and the alignment of a face by five points. Files from strangers: nothing in them is executed."""

import collections
import io
import math
import mmap
import pickle
import struct
from pathlib import Path

import numpy as np
from PIL import Image

import stage

MAGIC = 0xCED7230A  # before every part of a record of RecordIO
# the five points (eyes, nose, corners of the mouth) of a face aligned to 112x112, as ArcFace's authors have it
ARCFACE_TEMPLATE = ((38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041))


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, with or without its mark; StageError where it is none."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeError:
        raise stage.StageError(f"{path} is no text in UTF-8; fetch it again, or store it so") from None


# ------------------------------------------------------------------------------------------------------------- .rec
class Records:
    """InsightFace's train.rec, train.idx and property (MXNet's RecordIO): keys (N,), labels (N,), image(i) -> bytes.

    The header of every record is read at once, so that a truncated or damaged file is told before any work starts.
    """

    def __init__(self, folder: Path):
        self.path, index = folder / "train.rec", folder / "train.idx"
        with open(self.path, "rb") as file:
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.path.stat().st_size else b""
        try:
            rows = [tuple(map(int, x.split("\t"))) for x in read_text(index).splitlines() if x.strip()]
            self.offsets = dict(rows)
            if any(len(r) != 2 for r in rows) or len(self.offsets) < len(rows):
                raise ValueError("a key stands twice, or a line is not key<TAB>offset")
        except ValueError as error:
            raise stage.StageError(f"{index} is no index of key<TAB>offset lines: {error}") from None
        keys = sorted(self.offsets)
        if keys and keys[0] == 0:  # InsightFace's record 0 tells one past the last image; the people's records follow
            flag, label, _ = self.header(0)
            keys = range(1, int(label)) if flag and math.isfinite(label) else keys
        missing = next((k for k in keys if k not in self.offsets), None)
        if missing is not None or not keys:
            raise stage.StageError(f"{index} lacks {f'the image {missing}' if keys else 'images'}, "
                                   f"which {self.path} announces; fetch both again")
        self.keys, self.labels = list(keys), []
        for k in stage.progress(keys, "reading the headers", disable=None):
            label = self.header(k)[1]
            if not label.is_integer() or label < 0:
                raise stage.StageError(f"{self.path}, record {k} has the label {label}, not a whole number")
            self.labels.append(int(label))
        announced = read_text(folder / "property").split(",")[0] if (folder / "property").exists() else ""
        if announced.isdecimal() and int(announced) < len(set(self.labels)):
            raise stage.StageError(f"{folder / 'property'} announces {announced} classes, but {self.path} has "
                                   f"{len(set(self.labels))}; they do not belong together")

    def record(self, key: int, most: int | None = None) -> tuple[bytes, int]:
        """The content of a record (its first `most` bytes at least) and its length; the parts of one that held the
        magic number are joined with it."""
        offset, parts, whole, expected = self.offsets[key], [], -4, (0, 1)
        while True:
            end = offset + 8
            if not 0 <= offset <= end <= len(self.data):
                raise stage.StageError(f"{self.path}, record {key}: offset {offset:,} lies past the end of "
                                       f"{len(self.data):,} bytes; the file is truncated, or the index is another's")
            magic, word = struct.unpack_from("<II", self.data, offset)
            part, length = word >> 29, word & (1 << 29) - 1
            if magic != MAGIC or part not in expected:
                raise stage.StageError(f"{self.path}, record {key}: no record starts at {offset:,}; "
                                       "the file is damaged, or the index is another's")
            if end + length > len(self.data):
                raise stage.StageError(f"{self.path} is truncated: record {key} needs {end + length:,} bytes, the file "
                                       f"has {len(self.data):,}; fetch it again")
            parts.append(self.data[end:end + (length if most is None else min(length, most))])
            whole += 4 + length
            if part in (0, 3):  # whole, or the last part
                return struct.pack("<I", MAGIC).join(parts), whole
            offset, expected = end + -(-length // 4) * 4, (2, 3)

    def header(self, key: int, most: int | None = 28) -> tuple[int, float, bytes]:
        """flag and label of a record, and its content from the image file on, if `most` is None: the content is a
        header IfQQ (flag, label, two ids), `flag` labels of which the first counts, the file."""
        content, length = self.record(key, most)
        flag, label = struct.unpack_from("<If", content.ljust(24, b"\0"))
        start = 24 + 4 * flag
        if length < start:
            raise stage.StageError(f"{self.path}, record {key} is shorter than its header says; the file is damaged")
        return flag, struct.unpack_from("<f", content, 24)[0] if flag else label, content[start:]

    def image(self, i: int) -> bytes:
        return self.header(self.keys[i], None)[2]


# ------------------------------------------------------------------------------------------------------------- .bin
class Array:
    """What a pickled numpy array or scalar becomes: bytes, one for each item. Only one-byte kinds are let in."""

    def __init__(self, *made):
        self.data = None

    def __setstate__(self, state):
        _, shape, kind, _, data = state  # version, shape, dtype, Fortran order, content
        if not isinstance(kind, Kind) or not isinstance(data, bytes) or shape not in ((), (len(data),)):
            raise pickle.UnpicklingError("an array that is not one row of bytes or booleans")
        self.data = data


class Kind:
    """A numpy dtype of one byte: u1 or b1."""

    def __init__(self, code, *flags):
        if code not in ("u1", "b1", b"u1", b"b1"):
            raise pickle.UnpicklingError("a numpy array of other items than bytes or booleans")

    def __setstate__(self, state):
        pass  # byte order and the like, of one byte


class Reader(pickle._Unpickler):
    """The unpickler of the standard library, in Python, with the few opcodes that a .bin needs and no way to a function
    of anybody's: each global name it knows stands for one of ours. Memory is bounded by the size of the file."""
    OPCODES = """PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG1 STRING
        BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 UNICODE BINUNICODE SHORT_BINUNICODE EMPTY_LIST LIST
        APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE
        GLOBAL STACK_GLOBAL REDUCE BUILD""".split()

    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data), encoding="bytes")
        self.allowed, self.copied = len(data), 0
        self.steps = 1000 + len(data) // 8  # an honest file has more image than opcodes
        self.dispatch = collections.defaultdict(lambda: Reader.unknown)
        for name in self.OPCODES:
            code = getattr(pickle, name)[0]
            self.dispatch[code] = self.counted(pickle._Unpickler.dispatch[code])
        self.dispatch[pickle.REDUCE[0]] = self.counted(Reader.load_call)
        self.dispatch[pickle.BYTEARRAY8[0]] = self.counted(Reader.load_bytes)  # the original reserves what is announced

    def counted(self, load):
        def step(unpickler):
            self.steps -= 1
            if self.steps < 0:
                raise pickle.UnpicklingError("more opcodes than such a file needs")
            load(unpickler)
        return step

    def unknown(self):
        raise pickle.UnpicklingError("an opcode that no such file needs")

    def load_call(self):
        if type(self.stack[-1]) is not tuple or len(self.stack[-1]) > 5:  # unpacking others costs time and memory
            raise pickle.UnpicklingError("arguments that no such file needs")
        self.load_reduce()

    def load_bytes(self):
        self.append(self.read(int.from_bytes(self.read(8), "little")))

    def latin1(self, text, encoding):
        """_codecs.encode(text, 'latin1'): how Python 3 writes bytes for Python 2."""
        if not isinstance(text, str) or encoding not in ("latin1", "latin-1", b"latin1"):
            raise pickle.UnpicklingError("text in another encoding than latin1")
        self.copied += len(text)
        if self.copied > self.allowed:
            raise pickle.UnpicklingError("more bytes than the file has")
        return text.encode("latin1")

    def scalar(self, kind, data):
        """numpy's scalar(dtype, bytes): a numpy bool."""
        if not isinstance(kind, Kind) or not isinstance(data, bytes) or len(data) != 1:
            raise pickle.UnpicklingError("a numpy scalar that is no boolean")
        return data != b"\0"

    def from_buffer(self, data, kind, shape, order):
        """numpy's _frombuffer, in pickles of protocol 5: an array."""
        array = Array()
        array.__setstate__((1, shape, kind, False, data))
        return array

    def find_class(self, module, name):
        module, name = (x.decode() if isinstance(x, bytes) else x for x in (module, name))
        if module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            known = {"_reconstruct": Array, "scalar": self.scalar}
        elif module in ("numpy.core.numeric", "numpy._core.numeric"):
            known = {"_frombuffer": self.from_buffer}
        else:
            known = {("_codecs", "encode"): {"encode": self.latin1}, ("numpy", "dtype"): {"dtype": Kind},
                     ("numpy", "ndarray"): {"ndarray": "ndarray"}}.get((module, name), {})
        if name not in known:
            raise pickle.UnpicklingError(f"it names {f'{module}.{name}'[:150]!a}, which no such file needs")
        return known[name]


def read_bin(path: Path) -> tuple[list[bytes], list[bool]]:
    """InsightFace's verification set: a pickle of (2N encoded images, N booleans) -> images 2i and 2i + 1 of pair i.

    Images that are the same bytes object in the file stay one object here. StageError for anything else; no code in the
    file is run, and no more bytes than it has are made of it.
    """
    data = path.read_bytes()
    try:
        images, same = Reader(data).load()
        images, same = ([x.data if isinstance(x, Array) else x for x in y] for y in (
            images, same.data if isinstance(same, Array) else same))
        if not all(type(x) is bytes for x in images) or not all(type(x) in (bool, int) and x in (0, 1) for x in same):
            raise pickle.UnpicklingError("items that are not encoded images and booleans")
    except Exception as error:  # whatever a hostile file provokes in the unpickler
        told = "it ends too early" if isinstance(error, EOFError) else f"{type(error).__name__}: {str(error)[:200]}"
        raise stage.StageError(f"{path} is not read: it is no pickle of encoded images and booleans alone ({told})"
                               ) from None
    if not same or len(images) != 2 * len(same):
        raise stage.StageError(f"{path} has {len(images):,} images for {len(same):,} pairs; two for each are needed")
    return images, [bool(x) for x in same]


# -------------------------------------------------------------------------------------------------------- alignment
def align(image: Image.Image, points, size: int = 112) -> Image.Image:
    """The face of an image, size x size, bilinear, black outside: the similarity transform (rotation, scale, shift)
    that takes the five points (5, 2), x and y in pixels, nearest to the ArcFace template (Umeyama 1991).

    Pixel centres have whole coordinates, as in OpenCV, by which the published crops were made.
    """
    if not (np.abs(points) < 1e6).all():  # nan is not either
        raise stage.StageError("the five points are no numbers of pixels")
    face = np.array(points, np.float64) @ (1, 1j)  # points as complex numbers: a rotation and scale is a product
    goal = np.array(ARCFACE_TEMPLATE) @ (1, 1j) * size / 112
    centred = face - face.mean()
    turn = np.vdot(centred, goal - goal.mean()) / max(np.vdot(centred, centred).real, 1e-12)
    if abs(turn) < 1e-6:
        raise stage.StageError("the five points coincide")
    back = 1 / turn  # source = back * target + shift
    shift = face.mean() - back * goal.mean()
    shift += (1 + 1j) / 2 - back * (1 + 1j) / 2  # PIL counts from the corners of the pixels
    matrix = (back.real, -back.imag, shift.real, back.imag, back.real, shift.imag)
    return image.transform((size, size), Image.AFFINE, matrix, Image.BILINEAR)
