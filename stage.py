"""What every stage shares about running, and nothing of the method: image folders, the run directory (config with
fingerprints, lock, atomic checkpoints, resume, log, cost), one-line errors, the choice of a device."""

import argparse
import fcntl
import functools
import hashlib
import json
import math
import os
import platform
import resource
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

EXTENSIONS = {".png", ".jpg", ".jpeg", ".bmp", ".pgm", ".ppm", ".webp"}
FREE = {"out", "device", "log_every", "save_every", "keep_every", "grid_every"}  # arguments that do not change a result


class StageError(Exception):
    """Bad input: its message is the one line the user reads, and says what to do. The exit code is 2."""


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):  # show a default only where it is a value
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse that shows a module's docstring as it stands, and answers an error with one line, not with the usage."""
    def __init__(self, doc: str, **kw):
        super().__init__(description=doc, formatter_class=Help, allow_abbrev=False, **kw)

    def error(self, message):
        raise StageError(f"{message}; see --help")


def number(kind: type, low: float, high: float = math.inf):
    """An argparse type: a finite `kind` (int or float) in [low, high]."""
    def parse(text: str):
        if not (low <= (value := kind(text)) <= high and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text} is not within {low} to {high}")
        return value
    parse.__name__ = kind.__name__  # argparse says: invalid int value: 'x'
    return parse


def command(body):
    """Turn `body(argv) -> None` into `main(argv=None) -> int`: 0, or one line on stderr and 2 (130 for an interrupt)."""
    @functools.wraps(body)
    def main(argv=None) -> int:
        try:
            torch.set_flush_denormal(True)  # denormals slow a CPU down several times and carry nothing here
            return body(argv) or 0
        except SystemExit as end:  # --help
            return int(end.code or 0)
        except KeyboardInterrupt:
            message, code = "interrupted; the same command goes on from the last checkpoint", 130
        except torch.OutOfMemoryError:
            message, code = "out of device memory; lower --batch", 2
        except (StageError, OSError) as error:
            message, code = str(error), 2
        print(f"{Path(body.__code__.co_filename).name}: error: {' '.join(message.split())}", file=sys.stderr)
        return code
    return main


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU if there is one, else the CPU."""
    try:
        return torch.empty(1, device=("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name).device
    except (RuntimeError, AssertionError) as error:
        raise StageError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from None


def seed_of(*parts) -> int:
    """A 63-bit seed from anything printable, by SHA-256: neighbouring keys give unrelated random numbers."""
    return int.from_bytes(hashlib.sha256("\0".join(map(str, parts)).encode()).digest()[:8], "big") >> 1


def count_flops(model: torch.nn.Module, *inputs) -> int:
    """FLOPs of one forward pass, two for each multiplication-addition."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    return counter.get_total_flops()


# ---------------------------------------------------------------------------------------------------- image folders
def scan(folders: list) -> tuple[list[str], list[Path], list[int]]:
    """List ROOT/<class>/<image> of every folder: sorted class names (one NAME is one class), paths, labels."""
    found = {}
    for root in map(Path, folders):
        inner = sorted(d for d in root.iterdir() if d.is_dir() and d.name[0] != ".") if root.is_dir() else []
        if not inner:
            what = "is empty of class folders" if root.is_dir() else "is not a folder"
            raise StageError(f"{root} {what}; expected {root}/<class>/<image>")
        for folder in inner:
            files = sorted(f for f in folder.iterdir() if f.suffix.lower() in EXTENSIONS and f.name[0] != ".")
            if not files:
                raise StageError(f"no images ({' '.join(sorted(EXTENSIONS))}) in the class folder {folder}; delete it?")
            found.setdefault(folder.name, []).extend(files)
    classes = sorted(found)
    return classes, [p for c in classes for p in found[c]], [i for i, c in enumerate(classes) for _ in found[c]]


def fingerprint(path) -> str:
    """SHA-256 of a file, or of the names and sizes of an image folder's files."""
    if not Path(path).is_dir():
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    listing = [f"{p.relative_to(path)}\0{p.stat().st_size}\n" for p in scan([path])[1]]
    return hashlib.sha256("".join(listing).encode()).hexdigest()


def open_image(path: Path, use):
    """`use(PIL image)`, or a StageError that names the file: PIL raises many kinds of errors for a broken one."""
    try:
        with Image.open(path) as image:
            return use(image)
    except Exception as error:
        raise StageError(f"cannot read the image {path} ({type(error).__name__}); replace or delete it") from None


def decode(path: Path, size: int | None, channels: int, crop: tuple | None = None) -> np.ndarray:
    """One image as uint8 (C, H, W): EXIF rotation, crop box (left, top, right, bottom), stretched to size, antialiased."""
    def upright(file):
        image = ImageOps.exif_transpose(file)
        if image.mode[0] == "I":  # 16-bit grey, which PIL would clip at 255
            image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
        return image.convert("L" if channels == 1 else "RGB")
    image = open_image(path, upright)
    box = tuple(crop or (0, 0, *image.size))
    if not (0 <= box[0] < box[2] <= image.width and 0 <= box[1] < box[3] <= image.height):
        raise StageError(f"the crop box {box} does not lie inside {path} of {image.width}x{image.height} pixels")
    target = (size, size) if size else (box[2] - box[0], box[3] - box[1])
    if box != (0, 0, *target) or image.size != target:
        image = image.resize(target, Image.BICUBIC, box=box)
    return np.asarray(image).reshape(*target[::-1], channels).transpose(2, 0, 1)


def count_channels(paths: list[Path]) -> int:
    """1 if every image is grey (PIL modes 1, L, LA, I, I;16, F), else 3; reads the headers only."""
    with ThreadPoolExecutor() as pool:
        return 1 if set(pool.map(lambda p: open_image(p, lambda image: image.mode[0]), paths)) <= set("1LIF") else 3


class Images:
    """The labelled images of some folders: `images[index]` is uint8 (B, C, size, size), `labels` long (N,), `classes`, `paths`.

    Every image is decoded once, in parallel, so that a broken one is named before any work starts. Pixels stay in memory
    where they fit in half of it, else they are read as needed. C = 1 only if all are grey, unless `channels` rules.
    """
    def __init__(self, folders: list, size: int, channels: int | None = None):
        self.classes, self.paths, labels = scan(folders)
        self.labels, self.size = torch.tensor(labels), size
        self.channels = channels or count_channels(self.paths)
        shape = (len(labels), self.channels, size, size)
        fits = math.prod(shape) <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
        self.pixels = torch.empty(shape, dtype=torch.uint8) if fits else None
        with ThreadPoolExecutor() as pool:
            every = pool.map(self._read, range(len(labels)))
            for i, image in enumerate(tqdm(every, "reading images", len(labels), disable=None, leave=False)):
                if fits:
                    self.pixels[i] = image

    def _read(self, i: int) -> torch.Tensor:
        return torch.from_numpy(decode(self.paths[i], self.size, self.channels).copy())

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        if self.pixels is not None:
            return self.pixels[index]
        with ThreadPoolExecutor() as pool:
            return torch.stack(list(pool.map(self._read, index.tolist())))


def batch_order(n: int, batch: int, seed: int):
    """step -> (batch,) indices: an endless chain of permutations of n images, a function of (seed, step) alone."""
    @functools.lru_cache(maxsize=4)
    def epoch(e):
        return torch.randperm(n, generator=torch.Generator().manual_seed(seed_of("order", seed, e)))

    def indices(step):
        first, end = step * batch, (step + 1) * batch
        return torch.cat([epoch(e) for e in range(first // n, (end - 1) // n + 1)])[first % n:][:batch]
    return indices


# ---------------------------------------------------------------------------------------------------- run directory
def write_atomic(path: Path, write) -> None:
    """Call `write(temporary_path)`, then rename: no reader and no kill ever finds half a file under `path`."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    os.replace(temporary, path)


def write_json(path: Path, value) -> None:
    write_atomic(path, lambda p: p.write_text(json.dumps(value, indent=2) + "\n"))


def model_path(path) -> Path:
    """A model file, or the model.pt of a run directory."""
    return Path(path) / "model.pt" if Path(path).is_dir() else Path(path)


def load_model(path, kind: str) -> dict:
    """The dict in a model.pt (or in a run directory's), checked to be of `kind`; on the CPU, no code executed."""
    path = model_path(path)
    if not path.is_file():
        raise StageError(f"no {kind} at {path}; train it, or let its training finish")
    try:
        model = torch.load(path, map_location="cpu", weights_only=True)
        found = model["kind"]
    except Exception:
        raise StageError(f"{path} is no model of this project, or is truncated; train it again") from None
    if found != kind:
        raise StageError(f"{path} is a {found}, but a {kind} is needed here")
    return model


class Run:
    """A stage's output directory: config.json, log.jsonl, cost.json, checkpoints; one process at a time.

    inputs: flag -> path(s), compared by fingerprint, so that a moved folder is the same input. derived: what follows from
    the arguments and is worth reading. Raises StageError if `args.out` holds anything but this very run.
    """
    def __init__(self, stage: str, args: argparse.Namespace, inputs: dict, derived: dict | None = None):
        self.args, self.dir, self._since = args, Path(args.out), time.monotonic()
        prints = {k: [fingerprint(p) for p in (v if isinstance(v, list) else [v])] for k, v in inputs.items() if v}
        versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
        config = {"stage": stage, "arguments": vars(args), "derived": derived, "inputs": prints, "versions": versions}
        held, ledger = self.dir / "config.json", self.dir / "cost.json"
        if held.exists():
            old, new = json.loads(held.read_text()), json.loads(json.dumps(config))
            parts = [(a.get(k) != b.get(k), k) for a, b in ((old["arguments"], new["arguments"]), (old["inputs"], prints))
                     for k in a | b if k not in FREE and (a is old["inputs"] or k not in inputs)]
            differ = sorted(k for changed, k in parts if changed) + ["the stage"] * (old["stage"] != stage)
            if differ:
                raise StageError(f"{self.dir} holds another run: {', '.join(differ)} differ; delete it or change --out")
        elif self.dir.exists() and (not self.dir.is_dir() or any(p.name[0] != "." for p in self.dir.iterdir())):
            raise StageError(f"{self.dir} exists and is no run of this project; choose another --out")
        self.dir.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.dir / ".lock", "w")  # flock: gone with the process, whatever kills it
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StageError(f"another process is at work in {self.dir}; wait for it, or change --out") from None
        if not held.exists():
            write_json(held, config)
        self.cost = json.loads(ledger.read_text()) if ledger.exists() else {}

    def spend(self, device: torch.device, **amounts) -> None:
        """Add to cost.json the seconds since the last call, and e.g. images=64, network_evaluations=128, flops=1e9."""
        amounts["seconds"], self._since = time.monotonic() - self._since, time.monotonic()
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        peak = torch.cuda.max_memory_allocated(device) if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        self.cost |= {k: self.cost.get(k, 0) + v for k, v in amounts.items()}
        self.cost["peak_memory_bytes"] = max(peak, self.cost.get("peak_memory_bytes", 0))
        write_json(self.dir / "cost.json", self.cost | {"device": gpu or f"{platform.machine()} CPU"})

    def save(self, name: str, value: dict) -> None:
        write_atomic(self.dir / name, lambda p: torch.save(value, p))

    def resume(self, parts: dict) -> int:
        """Load last.pt into the parts, if there is one; the number of steps done. Later lines of the log are dropped."""
        log, last = self.dir / "log.jsonl", self.dir / "last.pt"
        state = torch.load(last, map_location="cpu", weights_only=True) if last.exists() else {"step": 0}
        for name, part in parts.items() if last.exists() else ():
            part.load_state_dict(state[name])
        lines = [x for x in (log.read_text().splitlines() if log.exists() else ()) if x.endswith("}")]  # not one cut short
        write_atomic(log, lambda p: p.write_text("".join(f"{x}\n" for x in lines if json.loads(x)["step"] <= state["step"])))
        return state["step"]

    def train(self, parts: dict, batch, step, export, device: torch.device, **cost) -> None:
        """Call `step(i, batch(i)) -> {name: scalar tensor}` up to args.steps; log, count, save; at the end write model.pt.

        parts: name -> object with state_dict and load_state_dict; export() is what model.pt holds; cost: amounts a step.
        The global generators are seeded by (seed, i) before step i: a resumed run repeats an uninterrupted one, to the bit
        on a CPU. The next batch is read while this one is computed.
        """
        args, start, sums, count = self.args, self.resume(parts), {}, 0
        with ThreadPoolExecutor(1) as ahead, tqdm(total=args.steps, initial=start, desc=self.dir.name, mininterval=1) as bar:
            following = ahead.submit(batch, start)
            for i in range(start, args.steps):
                now, following = following.result(), ahead.submit(batch, i + 1)
                torch.manual_seed(seed_of("step", args.seed, i))
                sums = {k: v.detach() + sums.get(k, 0) for k, v in step(i, now).items()}
                done, count, keep = i + 1, count + 1, args.keep_every and (i + 1) % args.keep_every == 0
                save = keep or done % args.save_every == 0 or done == args.steps
                if save or done % args.log_every == 0:
                    means = {k: float(v) / count for k, v in sums.items()}
                    if not all(map(math.isfinite, means.values())):
                        raise StageError(f"not finite by step {done}: {means}; lower --lr or look for broken data; "
                                         f"the last good checkpoint stays in {self.dir}")
                    with open(self.dir / "log.jsonl", "a") as log:
                        log.write(json.dumps({"step": done, **means}) + "\n")
                    bar.set_postfix({k: f"{v:.4g}" for k, v in means.items()}, refresh=False)
                    self.spend(device, **{k: v * count for k, v in cost.items()})
                    sums, count = {}, 0
                if save:
                    self.save("last.pt", {"step": done, **{name: part.state_dict() for name, part in parts.items()}})
                if keep:
                    self.save(f"model-{done}.pt", export())
                bar.update()
        self.save("model.pt", export())
