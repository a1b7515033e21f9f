"""results/*/run.sh: every arm of every set, by a stand-in for Python that records commands and touches their files."""

import importlib
import json
import os
import shutil
import stat
import subprocess

import pytest
from conftest import ROOT

RECORDER = """#!/usr/bin/env python3
import json, os, sys
from pathlib import Path
argv = sys.argv[1:]
out = Path(argv[argv.index("--out") + 1]) if "--out" in argv else None
if out and out.name in os.environ.get("FAIL", "").split():
    sys.exit(1)
with open(os.environ["LOG"], "a") as file:
    file.write(json.dumps(argv) + "\\n")

def touch(*names):
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("")

touched = {
    "prepare_data.py": [f"{p}/{c}/1.png" for p in ("train", "test") for c in "abcd"] + ["split.json"],
    "train_recognizer.py": ["log.jsonl", "model.pt"],
    "train_diffusion.py": ["samples-20.png", "samples-100.png", "model-500.pt", "model.pt"],
    "sample_scoremix.py": ["preview.png", "manifest.csv"],
    "audit.py": ["nearest.png", "audit.json"],
    "evaluate.py": ["draws.npz", "roc.png", "results.json"],
}
if argv[0] in touched:
    touch(*touched[argv[0]])
elif argv[0] == "mine_pairs.py":
    out.write_text("")
    out.with_suffix(".json").write_text("")
"""
MAIN = ["real", "far", "random", "close", "reproduction"]


@pytest.fixture
def results(tmp_path):
    """run(set, **environment) -> (exit code, the commands of this run) in a copy of results/ without any row."""
    (tmp_path / "results").mkdir()
    shutil.copy(ROOT / "results/arms.sh", tmp_path / "results")
    for script in ROOT.glob("results/*/run.sh"):
        (tmp_path / "results" / script.parent.name).mkdir()
        shutil.copy(script, tmp_path / "results" / script.parent.name)
    recorder = tmp_path / "recorder"
    recorder.write_text(RECORDER)
    recorder.chmod(recorder.stat().st_mode | stat.S_IXUSR)

    def run(name, **environment):
        log = tmp_path / "log"
        log.write_text("")
        environment = {"PATH": os.environ["PATH"], "PY": str(recorder), "LOG": str(log)} | environment
        done = subprocess.run(["bash", f"results/{name}/run.sh"], cwd=tmp_path, env=environment, capture_output=True)
        return done.returncode, [json.loads(line) for line in log.read_text().splitlines()]

    return run


def parsed(command):
    """The arguments of a recorded command, as its script understands them."""
    return importlib.import_module(command[0].removesuffix(".py")).parse_args(command[1:])


def of(commands, script):
    return [parsed(c) for c in commands if c[0] == script]


def arms_of_run_sh():
    """Every arm that arms.sh knows, from the patterns of its two `case`s."""
    text = (ROOT / "results/arms.sh").read_text()
    cases = "".join(part.split("esac")[0] for part in text.split("case $arm in")[1:])
    patterns = [line.split(")")[0] for line in cases.splitlines() if line.startswith("    ") and ")" in line]
    return {a.strip() for p in patterns for a in p.split("|")} - {"*"}


@pytest.mark.parametrize("name, unit", [("orl", "0"), ("lfw", "0"), ("omniglot", "0"), ("omniglot-5", "1")])
def test_every_command_of_every_arm_is_one_that_its_script_takes(results, tmp_path, name, unit):
    arms = sorted(arms_of_run_sh() | {"far@100"})
    assert {*MAIN, "auggen", "larger", "quadruple", "continued", "remined"} < set(arms)
    code, commands = results(name, ARMS=" ".join(arms), SEEDS="1", FOLDS="0")
    assert code == 0 and commands[-1] == ["results/tables.py", f"results/{name}"]
    for command in commands[:-1]:
        parsed(command)
    rows = {p.name for p in (tmp_path / f"results/{name}/rows").iterdir()}
    assert rows == {f"0-1-{a}.{ending}" for a in arms for ending in ("json", "jsonl", "npz")}
    seed = int(unit)
    assert {a.seed for a in of(commands, "train_diffusion.py")} == {seed}
    assert {a.seed for a in of(commands, "sample_scoremix.py")} == {seed}
    sizes = {a.size for a in of(commands, "train_recognizer.py") + of(commands, "train_diffusion.py")}
    flips = {a.flip for a in of(commands, "train_recognizer.py") + of(commands, "train_diffusion.py")}
    assert sizes == {64 if name == "lfw" else 32} and flips == {"omniglot" not in name}
    steps = {a.out.rpartition("/")[2]: a.steps for a in of(commands, "train_recognizer.py")}
    assert steps.pop("far@100-1") == 100 and len(set(steps.values())) == 1  # equal steps for all
    counts = {a.out.rpartition("/")[2]: a.count for a in of(commands, "mine_pairs.py")}
    assert [counts[f"{a}.csv"] for a in ("half", "far", "double", "quadruple")] == [10, None, 40, 80]  # of four classes
    tested = {d for a in of(commands, "evaluate.py") for d in a.data}
    trained = {d for a in of(commands, "train_recognizer.py") + of(commands, "train_diffusion.py") for d in a.data}
    assert tested == {f"runs/{name}/{unit}/data/test"} and not any("test" in d.split("/") for d in trained)


def test_a_second_run_does_what_is_missing_and_no_more(results, tmp_path):
    code, commands = results("orl", SEEDS="0 1", FOLDS="2 3", FAIL="far-1")
    assert code != 0 and not list(tmp_path.glob("results/orl/rows/*-1-far.json"))
    assert len(list(tmp_path.glob("results/orl/rows/*-far.json"))) == 2  # a failure does not take others with it
    code, commands = results("orl", SEEDS="0 1", FOLDS="2 3")
    assert code == 0 and {a.out for a in of(commands, "train_recognizer.py")} == {
        "runs/orl/2/far-1",
        "runs/orl/3/far-1",
    }
    assert not of(commands, "train_diffusion.py") and not of(commands, "sample_scoremix.py")
    rows = {p.stem for p in tmp_path.glob("results/orl/rows/*.json")}
    assert rows == {f"{f}-{s}-{a}" for f in (2, 3) for s in (0, 1) for a in MAIN}
    assert {p.name for p in (tmp_path / "results/orl").glob("*.png")} == {
        "roc.png",
        "mixes.png",
        "nearest.png",
        "samples.png",
    }
    code, commands = results("orl", SEEDS="0 1", FOLDS="2 3")
    assert code == 0 and commands == [["results/tables.py", "results/orl"]]
    code, commands = results("orl", ARMS="nearby", SEEDS="0", FOLDS="0")
    assert code != 0 and not list(tmp_path.glob("results/orl/rows/*nearby*"))


def test_validation_never_sees_the_test_classes(results, tmp_path):
    environment = {"VALIDATION": "long", "GENERATOR": "--size 64 --steps 7", "SEEDS": "0", "ARMS": "real far"}
    code, commands = results("lfw", **environment)
    assert code == 0 and commands[-1] == ["results/tables.py", "results/lfw/validation/long"]
    split = of(commands, "prepare_data.py")[1]
    assert split.src.endswith("0/data/train") and split.test_classes == 0.2
    used = of(commands, "train_recognizer.py") + of(commands, "train_diffusion.py") + of(commands, "evaluate.py")
    assert {d.split("/")[-2] for a in used for d in a.data if "far" not in d.split("/")[-1]} == {"validation"}
    assert {a.steps for a in of(commands, "train_diffusion.py")} == {7}
    assert (tmp_path / "results/lfw/validation/long/rows/0-0-far.json").exists()
    assert not (tmp_path / "results/lfw/rows").exists()
