"""What every stage shares about running, and nothing of the method: image folders, the run directory (config with
fingerprints, lock, atomic checkpoints, resume, log, cost), one-line errors, the choice of a device."""

import argparse
import contextlib
import fcntl
import functools
import hashlib
import json
import os
import signal
import sys
import threading
import time
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from resource import RLIMIT_DATA, RUSAGE_SELF, getrlimit, getrusage

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

EXTENSIONS = {".png", ".jpg", ".jpeg", ".bmp", ".pgm", ".ppm", ".webp"}  # and what they may hold: a .png that is an EPS
FORMATS = ("PNG", "JPEG", "BMP", "PPM", "WEBP")  # would make PIL start another program
# arguments that do not change a result: where images lie does not, what lies there is compared as an input
FREE = {"out", "device", "data", "log_every", "save_every", "keep_every", "grid_every"}
# when this command began, directory -> its lock file, signal -> when it came, whether one waits for the end of a step
began, locks, signals, patient, tty = time.monotonic(), {}, {}, False, sys.stderr.isatty()
# of torchrun (training.join): which process this is (0 alone writes), of how many; its GPU, how many on this machine
rank, world, gpu, neighbours = 0, 1, 0, 1
progress = functools.partial(tqdm, mininterval=1 if tty else 15, leave=tty)

class StageError(Exception):
    """Bad input: its message is the one line the user reads, and says what to do. The exit code is 2."""

class Parser(argparse.ArgumentParser):
    """argparse that shows a module's docstring as it stands, and answers an error with one line, not the usage."""
    def __init__(self, doc: str, **k):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **k)

    def error(self, message):
        raise StageError(f"{message}; see --help")

def number(kind: type, low: float, high: float = 2 ** 63 - 1):
    """An argparse type: a `kind` (int or float) in [low, high], neither infinite nor nan."""
    def number(text: str):  # argparse shows this name: invalid number value: 'x'
        if not low <= (x := kind(text)) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not within {low} to {high}")
        return x
    return number

def interrupt(number: int, frame=None) -> None:
    """SIGINT, SIGTERM: a training ends its step and saves; other work stops here, and all does a second later."""
    signals.setdefault(number, time.monotonic())
    if not patient or time.monotonic() - min(signals.values()) > 1:  # a launcher may pass one request on twice
        raise KeyboardInterrupt

def memory_is_full(error: Exception) -> bool:
    """Whether an error says that a device's or the main memory is full; torch has a name for the former alone."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)

def command(body):
    """Turn `body(argv)` into `main(argv=None) -> int`: 0, or one line on stderr and 2 (128 + n for signal n)."""
    @functools.wraps(body)
    def main(argv=None) -> int:
        global began, patient
        began, patient, here = time.monotonic(), False, threading.current_thread() is threading.main_thread()
        signals.clear()
        before = {n: signal.signal(n, interrupt) for n in (signal.SIGINT, signal.SIGTERM) if here}
        try:
            torch.set_flush_denormal(True)  # denormals slow a CPU down several times and carry nothing here
            torch.set_float32_matmul_precision("highest")  # whatever the environment says: mining is exact, and fp32
            torch.backends.cudnn.allow_tf32 = False  # is fp32 in convolutions as well, where PyTorch takes TF32
            warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
            body(argv)
            return 0
        except KeyboardInterrupt:
            message, code = "interrupted; the same command goes on, or starts again", 128 + next(iter(signals), 2)
        except (RuntimeError, MemoryError) as error:
            if not memory_is_full(error):
                raise
            message, code = "out of memory; lower --micro-batch or --batch where there is one, in a new --out", 2
            message += ", or take --device cpu" * isinstance(error, torch.OutOfMemoryError)
        except (StageError, OSError, UnicodeError) as error:
            message, code = str(error), 2
        finally:
            while locks:
                locks.popitem()[1].close()
            for number, handler in before.items():
                signal.signal(number, handler)
        print(f"{Path(body.__code__.co_filename).name}: error: {' '.join(message.split())}", file=sys.stderr)
        return code
    return main

def pick_device(name: str) -> torch.device:
    """`auto` is the GPU if there is one (under torchrun, each process has its own), else the CPU."""
    try:
        name = f"cuda:{gpu}" if name in ("auto", "cuda") and torch.cuda.is_available() else name.replace("auto", "cpu")
        return torch.ones(1, device=name).cpu().to(name).device  # not `meta`, which has no values to copy
    except (RuntimeError, AssertionError) as error:
        raise StageError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from None

def seed_of(*parts) -> int:
    """A 63-bit seed from anything printable, by SHA-256: neighbouring keys give unrelated random numbers."""
    return int.from_bytes(hashlib.sha256("\0".join(map(str, parts)).encode()).digest()[:8], "big") >> 1

def unfinished(folder: Path) -> bool:
    """Whether the stage that makes these images was stopped: the last file of prepare_data or sampler is missing."""
    try:
        maker = json.loads((folder / "config.json").read_text())["stage"]
    except (OSError, ValueError, LookupError, TypeError):
        return False
    last = {"prepare_data": ("split.json", "lists.json"), "sample_scoremix": ("manifest.csv",)}.get(maker)
    return last is not None and not any((folder / name).exists() for name in last)

def scan(folders: list) -> tuple[list[str], list[Path], list[int]]:
    """List ROOT/<class>/<image> of every folder: sorted class names (one NAME is one class), paths, labels. StageError
    where a folder is no such thing, is given twice, is not finished, or has a class without images."""
    found = {}
    if len({os.path.realpath(f) for f in folders}) < len(folders):
        raise StageError(f"a folder is given twice: {' '.join(map(str, folders))}")
    for root in map(Path, folders):
        for folder in (root, root.parent):
            if unfinished(folder):
                raise StageError(f"{folder} is not finished; give the command that writes it again, and let it end")
        inner = sorted(d for d in root.iterdir() if d.is_dir() and d.name[0] != ".") if root.is_dir() else []
        if not inner:
            raise StageError(f"{root} is not a folder with class folders; expected {root}/<class>/<image>")
        for folder in inner:
            files = sorted(f for f in folder.iterdir() if f.suffix.lower() in EXTENSIONS and f.name[0] != ".")
            if not files:
                raise StageError(f"no images ({' '.join(sorted(EXTENSIONS))}) in the class folder {folder}; delete it?")
            found.setdefault(folder.name, []).extend(files)
    classes = sorted(found)
    return classes, [p for c in classes for p in found[c]], [i for i, c in enumerate(classes) for _ in found[c]]

def fingerprint(path) -> str:
    """SHA-256 of a file, or of the names and sizes of an image folder's files."""
    files = [] if Path(path).is_file() else scan([path])[1]
    listing = "".join(f"{p.relative_to(path)}\0{p.stat().st_size}\n" for p in files).encode()
    return hashlib.sha256(listing if files else Path(path).read_bytes()).hexdigest()

def decode(path: Path, size: int | None, channels: int | None = None, crop: tuple | None = None) -> np.ndarray:
    """uint8 (H, W, C): EXIF rotation, crop box, stretched to size x size; C = 1 for grey unless `channels` rules.
    StageError where the file is no image, or the box lies outside."""
    try:
        pipe = isinstance(path, Path) and not path.is_file()  # or a folder, or nothing
        with Image.open(os.devnull if pipe else path, formats=FORMATS) as file:
            image = ImageOps.exif_transpose(file)
            channels = channels or (1 if image.mode[0] in "1LIF" else 3)  # grey modes: 1, L, LA, I, I;16, F
            image = image.convert("RGBA") if image.mode == "P" and "transparency" in image.info else image
            if image.mode[0] == "I":  # 16-bit grey, which PIL would clip at 255
                image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
            image = image.convert("L" if channels == 1 else "RGB")
    except Exception as error:  # PIL raises many kinds
        raise StageError(f"cannot read the image {path} ({type(error).__name__}); replace or delete it") from None
    box = tuple(crop or (0, 0, *image.size))  # left, top, right, bottom
    if not (0 <= box[0] < box[2] <= image.width and 0 <= box[1] < box[3] <= image.height):
        raise StageError(f"the crop box {box} does not lie inside {path} of {image.width}x{image.height} pixels")
    target = (size, size) if size else (box[2] - box[0], box[3] - box[1])  # antialiased; a copy if nothing changes
    return np.array(image.resize(target, Image.BICUBIC, box=box)).reshape(target[1], target[0], channels)

class Images:
    """The images of folders (or a listing): classes, paths, labels (N,) long; images[index], uint8 (B, C, S, S). All
    are decoded first, to name broken ones early, and stay if a third of memory holds them and those of others that do.
    C = 1 only if all are grey.
    """
    alive = weakref.WeakSet()
    def __init__(self, folders: list, size: int, channels: int | None = None, listing: tuple | None = None):
        self.classes, self.paths, labels = listing or scan(folders)
        self.labels, self.size, self.channels = torch.tensor(labels), size, channels
        limits = [int(p.read_text().replace("max", "-1")) for p in Path("/sys/fs/cgroup").glob("memory.max")]
        limits += os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), getrlimit(RLIMIT_DATA)[0]
        room = min(n for n in limits if n > 0) // 3 // neighbours  # -1 is none
        room -= sum(x.pixels.nbytes for x in Images.alive if x.pixels is not None)
        fits = len(labels) * (channels or 3) * size * size < room
        with ThreadPoolExecutor() as pool:
            read = progress(pool.map(self._read, self.paths), "reading images", len(labels), disable=rank > 0 or None)
            pixels = [(len(x), x if fits else None) for x in read]  # x (C, size, size)
        self.channels = channels or max(c for c, _ in pixels)
        self.pixels = torch.stack([x.expand(self.channels, -1, -1) for _, x in pixels]) if fits else None
        Images.alive.add(self)

    def _read(self, path: Path) -> torch.Tensor:
        return torch.from_numpy(decode(path, self.size, self.channels)).permute(2, 0, 1)

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        if self.pixels is not None:
            index = index.pin_memory() if self.pixels.is_cuda else index  # then nobody waits for the transfer
            return self.pixels[index.to(self.pixels.device, non_blocking=True)]
        with ThreadPoolExecutor() as pool:
            return torch.stack(list(pool.map(self._read, [self.paths[i] for i in index.tolist()])))

def write_atomic(path: Path, write, sync: bool = True) -> None:
    """Call `write(temporary_path)`, then rename: no kill, full disk or (if sync) loss of power leaves half a file."""
    if rank:
        return
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        if sync:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except RuntimeError as error:  # torch.save's way to say that the disk is full
        raise OSError(f"{path} could not be written; is there space left? ({str(error)[:80]})") from None
    finally:
        temporary.unlink(missing_ok=True)

def write_text(path: Path, text: str) -> None:
    write_atomic(path, lambda p: p.write_text(text, encoding="utf-8"))

def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")

def load_model(path, kind: str) -> dict:
    """The dict in a model.pt (or a run directory's) of this `kind`, and its path; on the CPU, no code executed.
    StageError where it is missing, damaged, of another kind or not finite."""
    path = Path(path) / "model.pt" if Path(path).is_dir() else Path(path)
    try:
        model = torch.load(path, map_location="cpu", weights_only=True)
        found, model["path"] = model["kind"] if isinstance(model, dict) else None, str(path)
    except Exception as error:
        why = "is missing" if isinstance(error, FileNotFoundError) else "is no file of this project, or is truncated"
        raise StageError(f"{path} {why}; let the training of that {kind} finish, or start it again") from None
    if found != kind:
        raise StageError(f"{path} is a {str(found)[:40]}, but a {kind} is needed here")
    with whole(path):
        names = model["classes"] if kind != "checkpoint" else []
        odd = {"", ".", ".."} & set(names) or {"/", "\0"} & set("".join(names))
        if type(names) is not list or odd or len(set(names)) < len(names):
            raise ValueError("the classes are no names of folders")
        if not all(torch.isfinite(v).all() for v in model.get("weights", {}).values()):
            raise ValueError("weights that are not finite")
    return model

@contextlib.contextmanager
def whole(path):
    """Turn what a damaged file, or another version's, provokes in the body into the one line that names it."""
    try:
        yield
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        if memory_is_full(error):
            raise
        told = str(error)[:80] or type(error).__name__
        raise StageError(f"{path} is damaged, or of another version ({told}); make it again") from None

def used(device: torch.device) -> dict:
    """The name of the device, and the most memory that this process has had there."""
    name, peak = f"{os.uname().machine} CPU", getrusage(RUSAGE_SELF).ru_maxrss << 10
    if device.type == "cuda":
        name, peak = torch.cuda.get_device_name(device), torch.cuda.max_memory_allocated(device)
    return {"device": name, "peak_memory_bytes": peak}

class Run:
    """A stage's output directory, for one process at a time; StageError if `args.out` holds anything but this very run.
    inputs: flag -> path(s), compared by fingerprint: a moved folder is the same input. derived: worth reading."""
    def __init__(self, stage: str, args: argparse.Namespace, inputs: dict, derived: dict | None = None):
        self.args, self.dir, self._since = args, Path(args.out), began
        self.versions = {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__,
                         "threads": torch.get_num_threads()}
        held, ledger = self.dir / "config.json", self.dir / "cost.json"
        prints = {k: [fingerprint(p) for p in np.atleast_1d(v)] for k, v in inputs.items()}
        config = {"stage": stage, "arguments": vars(args), "derived": derived, "inputs": prints,
                  "versions": self.versions}
        files = {p.name for p in self.dir.glob("[!.]*")}
        if files and not held.exists():
            raise StageError(f"{self.dir} exists and is no run of this project; choose another --out")
        self.dir.mkdir(parents=True, exist_ok=True)
        locks[os.path.realpath(self.dir)] = lock = open(self.dir / f".lock{rank or ''}", "w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process, whatever kills it
            self.cost = json.loads(ledger.read_text()) if ledger.exists() else {}
            kept = json.loads(held.read_text()) if held.exists() else {"arguments": {}, "inputs": {}}
            old, new = [{"stage": c.get("stage"), **{k: v for k, v in c["arguments"].items() if k not in FREE},
                         **c["inputs"]} for c in (kept, json.loads(json.dumps(config)))]
        except BlockingIOError:
            raise StageError(f"another process is at work in {self.dir}; wait for it, or change --out") from None
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise StageError(f"{held} or {ledger} is damaged or not ours; choose another --out") from None
        differ = sorted(k for k in old | new if old.get(k) != new.get(k))
        if differ and files - {"config.json", "log.jsonl"}:  # else nothing is lost, and a corrected command may come
            raise StageError(f"{self.dir} holds another run: {', '.join(differ)} differ; delete it or change --out")
        if differ:
            write_json(held, config)

    def goes_on(self) -> None:
        """Note in config.json with which versions and threads a stopped run goes on, if not the last ones there."""
        if rank:
            return
        held = self.dir / "config.json"
        config = json.loads(held.read_text())
        noted = config.get("resumed", [])
        if self.versions != [config.get("versions"), *noted][-1]:
            write_json(held, config | {"resumed": [*noted, self.versions]})

    def spend(self, device: torch.device, **amounts) -> None:
        """Add to cost.json the seconds since the last call, times processes, and e.g. images=64, flops=1e9."""
        amounts["seconds"], self._since = world * (time.monotonic() - self._since), time.monotonic()
        peak = self.cost.get("peak_memory_bytes", 0)
        self.cost |= {k: self.cost.get(k, 0) + v for k, v in amounts.items()} | used(device)
        self.cost["peak_memory_bytes"] = max(peak, self.cost["peak_memory_bytes"])
        write_json(self.dir / "cost.json", self.cost)
