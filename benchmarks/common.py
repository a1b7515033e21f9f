"""What the benchmarks share: flags, runs side by side, one JSON file a question.

A speed here is a ratio of things that took turns in one process on one machine: other programs slow all of them alike.
"""

import argparse
import importlib
import json
import os
import platform
import statistics
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import stage  # noqa: E402


def arguments(doc: str, repeats: int = 0, device: bool = True, out=None) -> argparse.ArgumentParser:
    """A parser with the flags that scripts share: --repeats (if there is a number), --device, --out."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if repeats:
        parser.add_argument("--repeats", type=int, default=repeats, help=f"rounds of turns (default: {repeats})")
    if device:
        parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    parser.add_argument("--out", type=Path, default=out, help="the JSON file (default: results/benchmarks/NAME.json)")
    return parser


def need(module: str):
    """An imported peer; where it is not installed, one line that says so, and exit code 2."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        print(f"{Path(sys.argv[0]).name}: error: {module} cannot be imported ({error}); pip install -r "
              "benchmarks/requirements.txt", file=sys.stderr)
        raise SystemExit(2) from None


def synchronize(device) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def side_by_side(candidates: dict, repeats: int = 5, device="cpu") -> dict[str, list[float]]:
    """Seconds of each call of each candidate (name -> function), by turns: a b c, a b c, ...; one round before warms.

    The order turns round from round to round, so that none always follows the same other one.
    """
    seconds = {name: [] for name in candidates}
    for i in range(-1, repeats):
        for name in list(candidates)[::1 if i % 2 else -1]:
            synchronize(device)
            began = time.perf_counter()
            candidates[name]()
            synchronize(device)
            if i >= 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(seconds: dict, slow: str, fast: str) -> dict:
    """How many times longer `slow` took than `fast`, round by round: median, least and most."""
    each = [a / b for a, b in zip(seconds[slow], seconds[fast])]
    return {"median": statistics.median(each), "min": min(each), "max": max(each)}


def machine(device="cpu") -> dict:
    """Hardware and versions, as they stand in every result."""
    model = next((line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.machine())
    found = {"cpu": model, "threads": torch.get_num_threads(), "cores": os.cpu_count(),
             "python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__}
    if torch.device(device).type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return found


def version(*packages: str) -> dict:
    return {p: metadata.version(p) for p in packages}


def write(name: str, result: dict, out=None) -> None:
    """Write results/benchmarks/NAME.json (or `out`), and show it."""
    path = Path(out or ROOT / "results/benchmarks" / f"{name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    stage.write_json(path, {"command": " ".join(["python", *sys.argv]), **result})
    print(json.dumps(result, indent=2), f"wrote {path}", sep="\n")
