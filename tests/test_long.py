"""Long runs: memory and open files stay flat over 2,000 training steps and 2,000 sampled images."""

import os
from pathlib import Path

from conftest import SMALL_UNET, loud, succeed

import mine_pairs
import sample_scoremix
import train_diffusion
import train_recognizer


def usage():
    """Resident memory in MiB, number of open files."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir("/proc/self/fd"))


def watch(monkeypatch, module, name):
    """The usage at every call of a function."""
    original, seen = getattr(module, name), []

    def wrapped(*args, **kwargs):
        seen.append(usage())
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, wrapped)
    return seen


def flat(seen, warm):
    """From the warm-up on: in the second half less than 16 MiB more than in the first, and no file that stays open (the
    threads that write images open some for a moment, hence the least number of each half)."""
    memory, files = zip(*seen[warm:])
    half = len(files) // 2
    assert max(memory[half:]) - max(memory[:half]) < 16
    assert min(files[half:]) <= min(files[:half])


def test_2000_steps(faces, tmp_path, monkeypatch):
    seen = watch(monkeypatch, train_recognizer, "learning_rate")
    argv = ["--data", faces / "train", "--out", tmp_path / "run", "--size", 16, "--batch", 2, "--steps", 2000]
    succeed(train_recognizer, *argv, "--save-every", 50, "--log-every", 10)
    assert len(seen) == 2000
    flat(seen, 200)


def test_2000_images(faces, tmp_path, monkeypatch):
    train = faces / "train"
    succeed(train_diffusion, "--data", train, "--out", tmp_path / "generator", "--steps", 2, *SMALL_UNET)
    loud(tmp_path / "generator/model.pt")
    mine = ["--space", "condition", "--generator", tmp_path / "generator", "--count", 4]
    succeed(mine_pairs, *mine, "--out", tmp_path / "pairs.csv")
    seen = watch(monkeypatch, sample_scoremix, "to_uint8")
    argv = ["--generator", tmp_path / "generator", "--pairs", tmp_path / "pairs.csv", "--out", tmp_path / "mixed"]
    succeed(sample_scoremix, *argv, "--per-class", 500, "--steps", 1, "--batch", 20)
    assert len(list((tmp_path / "mixed").glob("*/*.png"))) == 2000 and len(seen) > 100
    flat(seen, 20)
