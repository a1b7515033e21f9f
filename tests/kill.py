"""kill -9 at random moments of every stage, then the same command again: what comes out must be the bytes of a run that
nothing befell.

    python tests/kill.py --kills 60 --out results/kills.md      # the long form, `make kills`

tests/test_kill.py runs the short form. A stage is killed again and again, each time after a random share of the time
that it takes, until it has been killed as often as asked; then it is let run to its end, and compared.
"""

import argparse
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from conftest import ROOT, SMALL_UNET

import prepare_data


def stages(source: Path, work: Path) -> dict:
    """name -> (command, what it makes below `work`), in order; small, but each takes a second or more of real work."""
    data, real, gen, pairs = work / "data", work / "real", work / "generator", work / "pairs.csv"
    training = "--log-every 10 --save-every 20 --keep-every 50".split()
    made = {
        "prepare": ["prepare_data.py", "orl", source, "--size", 16, "--out", data],
        "recognizer": ["train_recognizer.py", "--data", data / "train", "--size", 16, "--steps", 300, *training],
        "generator": ["train_diffusion.py", "--data", data / "train", *SMALL_UNET, "--steps", 150, *training],
        "mining": ["mine_pairs.py", "--recognizer", real, "--data", data / "train", "--out", pairs],
        "sampling": ["sample_scoremix.py", "--generator", gen, "--pairs", pairs, "--per-class", 4, "--batch", 20],
        "evaluation": ["evaluate.py", "--model", real, "--data", data / "test", "--draws", 300],
    }
    places = {
        "prepare": data,
        "recognizer": real,
        "generator": gen,
        "mining": pairs,
        "sampling": work / "mixed",
        "evaluation": work / "report",
    }
    for name, place in places.items():
        made[name] += [] if "--out" in made[name] else ["--out", place]
    return {name: ([sys.executable, *map(str, argv)], places[name]) for name, argv in made.items()}


def run(command: list, seconds: float | None = None) -> tuple[bool, str]:
    """Run to the end, or kill -9 after some seconds: whether it was killed, and its stderr. Its group dies with it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        error = process.communicate(timeout=seconds)[1]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return True, process.communicate()[1]
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}: {error[-500:]}")
    return False, error


def content(place: Path) -> dict:
    """What must be the same: weights to the bit, every image, table and list to the byte; not the ledger's seconds."""
    files = [place] if place.is_file() else [p for p in sorted(place.rglob("*")) if p.is_file()]
    found = {}
    for path in files:
        name = str(path.relative_to(place.parent))
        if path.suffix == ".pt" and path.name != "last.pt":
            saved = torch.load(path, weights_only=True)
            found[name] = [(k, v.numpy().tobytes()) for k, v in sorted(saved["weights"].items())]
        elif path.suffix in (".png", ".csv", ".jsonl", ".md") or path.name in ("split.json", "results.json"):
            found[name] = path.read_bytes()
        elif path.name.endswith(".tmp"):
            continue  # of a process that was killed; the next one writes it anew
    return found


def torture(source: Path, kills: int, seed: int, folder: Path) -> dict:
    """name -> kills of each stage, after which its output was the same; SystemExit where it was not."""
    rng, counts = random.Random(seed), {}
    whole, hurt = stages(source, folder / "whole"), stages(source, folder / "hurt")
    took = {}
    for name, (command, _) in whole.items():
        begin = time.monotonic()
        run(command)
        took[name] = time.monotonic() - begin
    for i, name in enumerate(hurt):
        wanted, (command, place) = kills // len(hurt) + (i < kills % len(hurt)), hurt[name]
        counts[name] = tries = 0
        while counts[name] < wanted:
            killed, _ = run(command, rng.uniform(0.2, 1.0) * took[name])
            counts[name] += killed
            tries += 1
            if not killed:  # it came to its end; start anew
                same(name, place, whole[name][1])
                shutil.rmtree(place) if place.is_dir() else place.unlink()
            if tries > 20 * wanted + 20:
                raise SystemExit(f"{name} could not be killed in mid-work")
        run(command)
        same(name, place, whole[name][1])
        print(f"{name}: {counts[name]} kills, the same bytes", flush=True)
    return counts


def same(name: str, hurt: Path, whole: Path) -> None:
    a, b = content(hurt), content(whole)
    differ = sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k))
    if differ:
        raise SystemExit(f"{name}: {', '.join(differ[:5])} differ after a kill")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts = torture(prepare_data.find_orl(), args.kills, args.seed, Path(folder))
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    if args.out:
        lines = ["| stage | kill -9 | output afterwards |", "|---|---|---|"]
        lines += [f"| {name} | {n} | the same bytes |" for name, n in counts.items()]
        lines += [
            "",
            f"`python tests/kill.py --kills {args.kills} --seed {args.seed}`: {sum(counts.values())} kills, "
            f"nothing lost. {platform.machine()}, {os.cpu_count()} cores, {versions}.",
            "",
        ]
        args.out.write_text("\n".join(lines))
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
