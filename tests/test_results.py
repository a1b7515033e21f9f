"""results/*/run.sh: every arm of every set, by a stand-in for Python that records commands and touches their files."""

import csv
import importlib.util
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import testsets
import train_diffusion
import train_recognizer

spec = importlib.util.spec_from_file_location("tables", ROOT / "results/tables.py")
tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tables)
RECORDER = """#!/usr/bin/env python3
import json, os, sys
from pathlib import Path
argv = sys.argv[1:]
out = Path(argv[argv.index("--out") + 1]) if "--out" in argv else None
if out and out.name in os.environ.get("FAIL", "").split():
    sys.exit(1)
if argv[0] == "train_recognizer.py" and not all(map(os.path.isdir, argv[2 : argv.index("--size")])):
    sys.exit(2)  # an image folder is missing
with open(os.environ["LOG"], "a") as file:
    file.write(json.dumps(argv) + "\\n")

def touch(*names):
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("")

touched = {
    "prepare_data.py": [f"{p}/{c}/1.png" for p in ("train", "test") for c in "abcd"] + ["split.json"],
    "train_recognizer.py": ["config.json", "cost.json", "log.jsonl", "model.pt"],
    "train_diffusion.py": ["config.json", "cost.json", "samples-20.png", "samples-100.png", "model-500.pt", "model.pt"],
    "sample_scoremix.py": ["config.json", "cost.json", "preview.png", "manifest.csv"],
    "audit.py": ["config.json", "cost.json", "nearest.png", "audit.json"],
    "alignment.py": ["config.json", "cost.json", "alignment.json"],
    "evaluate.py": ["config.json", "cost.json", "draws.npz", "roc.png", "results.json"],
}
if argv[0] in touched:
    touch(*touched[argv[0]])
elif argv[0] == "mine_pairs.py":
    out.write_text("")
    out.with_suffix(".json").write_text("")
"""
MAIN = ["real", "far", "random", "close", "reproduction"]
# what is particular to the mining, the sampling and the generator of an arm; everything else is as in `far`
MINED = {
    "random": {"strategy": "random"},
    "close": {"strategy": "close"},
    "reproduction": {"order": 1},
    "auggen": {"strategy": "random"},
    "auggen-double": {"strategy": "random"},
    "triplet": {"order": 3},
    "condition-far": {"space": "condition"},
    "condition-close": {"space": "condition", "strategy": "close"},
}
AMOUNT = {"half": 0.5, "double": 2, "triple": 3, "quadruple": 4}
CLASSES = 4  # that the stand-in for prepare_data.py writes
SAMPLED = {
    "auggen": {"mix": "condition", "weights": [0.7, 0.7]},
    "auggen-double": {"mix": "condition", "weights": [0.7, 0.7]},
    "ddpm25": {"steps": 25},
    "dpm6": {"solver": "dpm++", "steps": 6},
    "heun32": {"solver": "heun", "steps": 32},
    "dirichlet": {"dirichlet": 2},
    "many": {"per_class": 20},
    "started": {"guidance": 3, "start": 3, "correlation": 0},
    "unstarted": {"guidance": 2, "start": None, "correlation": 0},
    "window": {"window": [0.5, 1e9]},
    "autoguided": {"autoguidance": 1.5},
}
TRAINED = {"larger": {"arch": "medium"}, "mixup": {"mixup": 0.2}}
OWN_GENERATOR = {"frozen": {"conditions": "frozen"}, "aligned": {"align": 0.1}}


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
    patterns = re.findall(r"^    ([^\s#][^)\n]*)\)", cases, re.MULTILINE)
    return {a.strip() for p in patterns for a in p.split("|")} - {"*"}


@pytest.mark.parametrize("name, unit", [("orl", "0"), ("lfw", "0"), ("omniglot", "0"), ("omniglot-5", "1")])
def test_every_command_of_every_arm_is_one_that_its_script_takes(results, tmp_path, name, unit):
    arms = sorted(arms_of_run_sh() | {"far@100"})
    assert {*MAIN, *MINED, *SAMPLED, *TRAINED, *OWN_GENERATOR, "continued", "remined"} < set(arms)
    assert {a.partition("@")[0] for a in arms} <= set(tables.ARMS)
    code, commands = results(name, ARMS=" ".join(arms), SEEDS="1", FOLDS="0")
    assert code == 0 and commands[-1] == ["results/tables.py", f"results/{name}"]
    for command in commands[:-1]:
        parsed(command)
    costs, configs = ({p.stem for p in (tmp_path / f"results/{name}" / n).iterdir()} for n in ("costs", "configs"))
    assert configs == costs
    kept = {f"train_recognizer-{unit}-1-{a}" for a in arms} | {f"evaluate-0-1-{a}" for a in arms}
    assert kept | {f"train_diffusion-{unit}-generator", f"sample_scoremix-{unit}-far", f"audit-{unit}-far"} < costs
    assert [p.name for p in (tmp_path / f"results/{name}/alignment").iterdir()] == [f"{unit}.json"]
    rows = {p.name for p in (tmp_path / f"results/{name}/rows").iterdir()}
    assert rows == {f"0-1-{a}.{ending}" for a in arms for ending in ("json", "jsonl", "npz")}
    seed = int(unit)
    assert {a.seed for a in of(commands, "train_diffusion.py")} == {seed}
    assert {a.seed for a in of(commands, "sample_scoremix.py")} == {seed}
    sizes = {a.size for a in of(commands, "train_recognizer.py") + of(commands, "train_diffusion.py")}
    flips = {a.flip for a in of(commands, "train_recognizer.py") + of(commands, "train_diffusion.py")}
    assert sizes == {64 if name == "lfw" else 32} and flips == {"omniglot" not in name}
    D = f"runs/{name}/{unit}"
    by = {s: {Path(a.out).stem: a for a in of(commands, s)} for s in ("mine_pairs.py", "sample_scoremix.py")}
    mined, sampled = by.values()
    plain = {n: getattr(mined["far"], n) for n in ("order", "strategy", "space", "max_uses", "seed")}
    assert plain["strategy"] == "distant"
    own = re.search(r"MIXES=\$\{MIXES-(\d+)\}", (tmp_path / f"results/{name}/run.sh").read_text())
    mixes = int(own[1]) if own else 5  # for every class; 5 is what mine_pairs.py does without --count
    for arm, a in mined.items():
        assert {n: getattr(a, n) for n in plain} == plain | MINED.get(arm, {}), arm
        count = CLASSES * mixes * AMOUNT.get(arm, 1)
        assert a.count == (count if arm in AMOUNT or own and arm != "reproduction" else None), arm
        miner = {"backbone": f"{D}/larger-{seed}", "remined": f"{D}/far-{seed}"}.get(arm, f"{D}/real-{seed}")
        expected = (None, None) if arm.startswith("condition") else (miner, [f"{D}/data/train"])
        assert (a.recognizer, a.data) == expected, arm
    names = (
        "mix",
        "weights",
        "solver",
        "steps",
        "per_class",
        "dirichlet",
        "window",
        "autoguidance",
        "guidance",
        "correlation",
        "start",
        "seed",
    )
    plain = {n: getattr(sampled["far"], n) for n in names}
    for arm, a in sampled.items():
        expected = SAMPLED.get(arm, {})
        if arm == "reproduction":
            expected = {"per_class": 5 * mixes, "correlation": 0}
        elif arm == "auggen-double":  # as many evaluations as the pairs: of 5 images, each of 2 calls a step, or 3
            expected = expected | {"per_class": 10 if plain["guidance"] == 1 else 8}
        assert {n: getattr(a, n) for n in plain} == plain | expected, arm
        assert a.data == [f"{D}/data/train"], arm
        assert a.pairs == f"{D}/{arm}.csv" and a.generator == f"{D}/generator" + f"-{arm}" * (arm in OWN_GENERATOR)
    measured = [(a.generator, a.recognizer, a.data) for a in of(commands, "alignment.py")]
    assert measured == [(f"{D}/generator", f"{D}/real-{seed}", [f"{D}/data/train"])]
    for a in of(commands, "train_diffusion.py"):
        arm = Path(a.out).name.partition("-")[2]
        assert a.data == [f"{D}/data/train"] and all(getattr(a, k) == v for k, v in OWN_GENERATOR.get(arm, {}).items())
    steps = set()
    for a in of(commands, "train_recognizer.py"):
        arm, number = Path(a.out).name.rsplit("-", 1)
        arm, _, at = arm.partition("@")
        images = [] if arm in ("real", "larger", "mixup") else [f"{D}/{'far' if arm == 'continued' else arm}"]
        assert a.data == [f"{D}/data/train", *images] and a.seed == int(number), arm
        assert a.arch == TRAINED.get(arm, {}).get("arch", "small") and a.mixup == TRAINED.get(arm, {}).get("mixup", 0)
        assert a.init == (f"{D}/real-{seed}" if arm == "continued" else None)
        steps |= {a.steps} if not at else set()
        assert not at or a.steps == int(at)
    assert len(steps) == 1  # equal for all
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
    code, commands = results("orl", ARMS="nearby half", SEEDS="0", FOLDS="0")
    assert code != 0 and {p.name for p in tmp_path.glob("results/orl/rows/0-*.json")} == {"0-0-half.json"}


def test_without_seeds_and_arms_the_rows_are_those_of_the_plan_in_its_order(results, tmp_path):
    text = " ".join((ROOT / "results/plan.md").read_text().split())
    plan = re.search(r"first ([\w, -]+) \(5 seeds\); then ([\w, -]+); then ([\w, -]+) \(3 seeds\)", text)
    seeds = {name: n for name, n in zip(plan.groups(), (5, 3, 3), strict=True)}
    code, commands = results("lfw")
    assert code == 0
    scored = [Path(a.model[0]).name for a in of(commands, "evaluate.py") if len(a.model) == 1]
    for names, n in seeds.items():
        expected = [f"{arm}-{seed}" for seed in range(n) for arm in names.split(", ")]
        now, scored = scored[: len(expected)], scored[len(expected) :]
        assert sorted(now) == sorted(expected)  # two at a time, so in their order but for neighbours
    assert not scored
    code, commands = results("lfw")
    assert code == 0 and commands == [["results/tables.py", "results/lfw"]]
    (tmp_path / "results/lfw/rows/0-1-mixup.json").unlink()
    shutil.rmtree(tmp_path / "runs/lfw")
    code, commands = results("lfw")
    needed = ["prepare_data.py", "train_recognizer.py", "evaluate.py", "results/tables.py"]
    assert code == 0 and [c[0] for c in commands] == needed  # mixup, without a generator or a recogniser to mine with


def test_records_of_rows_that_stand_are_not_written_over(results, tmp_path):
    """Other steps of an arm may come with images of another generator; its audit stays that of its rows."""
    assert results("lfw", ARMS="far", SEEDS="0")[0] == 0
    folder = tmp_path / "results/lfw"
    records = [folder / "audit/0-far.json", folder / "pairs/0-far.json", folder / "alignment/0.json"]
    records += [p for s in ("train_diffusion-0-generator", "sample_scoremix-0-far", "audit-0-far", "alignment-0")
                for p in (folder / f"configs/{s}.json", folder / f"costs/{s}.json")]
    for path in records:
        assert path.read_text() != "as it was"
        path.write_text("as it was")
    assert results("lfw", ARMS="far@100", SEEDS="0")[0] == 0
    assert [p.read_text() for p in records] == ["as it was"] * len(records)
    assert (folder / "rows/0-0-far@100.json").exists()


def test_models_that_are_kept_are_not_trained_again(results, tmp_path):
    kept = tmp_path / "results/lfw/models/0"
    for run, names in {"generator": ["model.pt", "samples-7.png"], "real-0": ["model.pt", "log.jsonl"]}.items():
        (kept / run).mkdir(parents=True)
        for name in [*names, "config.json", "cost.json"]:
            (kept / run / name).write_text(run)
    (tmp_path / "runs/lfw/0/real-0").mkdir(parents=True)  # begun here: it stays and goes on
    code, commands = results("lfw", ARMS="far", SEEDS="0")
    assert code == 0 and not of(commands, "train_diffusion.py")
    assert [Path(a.out).name for a in of(commands, "train_recognizer.py")] == ["real-0", "far-0"]
    assert (tmp_path / "runs/lfw/0/generator/model.pt").read_text() == "generator"
    shutil.rmtree(tmp_path / "runs")
    code, commands = results("lfw", ARMS="close", SEEDS="0", SPEED="--precision bf16")
    assert [a.precision for a in of(commands, "train_recognizer.py")] == ["bf16"]
    assert code == 0 and [Path(a.out).name for a in of(commands, "train_recognizer.py")] == ["close-0"]
    code, commands = results("lfw", ARMS="far", SEEDS="0", VALIDATION="x")
    assert code == 0 and len(of(commands, "train_diffusion.py")) == 1  # the models are not those of other classes
    (sampled,) = of(commands, "sample_scoremix.py")
    assert sampled.data == ["runs/lfw/validation/x/0/data/train"]  # all training classes, for a generator of all


def test_a_mining_recogniser_leaves_the_cost_of_a_finished_row_alone(results, tmp_path):
    """The row real of seed 0 may have been run elsewhere, its images by a recogniser of another day."""
    records = [tmp_path / f"results/lfw/{n}/train_recognizer-0-0-real.json" for n in ("costs", "configs")]
    assert results("lfw", ARMS="far", SEEDS="0")[0] == 0  # no row of its own yet, so its own are kept
    assert [path.read_text() for path in records] == ["", ""]
    assert results("lfw", ARMS="real", SEEDS="0")[0] == 0
    records[0].write_text("the row's")
    records[1].unlink()  # it may be older than configs
    shutil.rmtree(tmp_path / "runs")
    code, commands = results("lfw", ARMS="close remined", SEEDS="0")
    assert code == 0 and "real-0" in [Path(a.out).name for a in of(commands, "train_recognizer.py")]
    assert records[0].read_text() == "the row's" and not records[1].exists()
    (tmp_path / "results/lfw/rows/0-0-real.json").unlink()
    assert results("lfw", ARMS="real", SEEDS="0")[0] == 0  # run again: its records are the new run's
    assert [path.read_text() for path in records] == ["", ""]


@pytest.mark.parametrize("unit", sorted(ROOT.glob("results/*/models/*")), ids=str)
def test_committed_models_are_those_that_their_set_would_train(unit):
    """Read by the scripts of today, of the set's own settings, and of one image set."""
    settings = dict(line.split(" ", 1) for line in (unit / "../../settings").read_text().splitlines())
    real = f"real-{unit.name if settings['GENERATORS'] == 'seed' else 0}"
    generator = train_diffusion.load_generator(unit / "generator", "cpu")[1]
    recognizer = train_recognizer.load_recognizer(unit / real, "cpu")[1]
    assert generator["classes"] == recognizer["classes"] and len(generator["classes"]) > 100
    names = {"generator": ("train_diffusion", "GENERATOR"), real: ("train_recognizer", "RECOGNIZER")}
    for run, (script, setting) in names.items():
        config = json.loads((unit / run / "config.json").read_text())
        argv = f"--data {config['arguments']['data'][0]} --out {config['arguments']['out']} {settings[setting]}".split()
        asked = vars(importlib.import_module(script).parse_args(argv))
        free = {"precision", "compile", "seed"}  # SPEED, and what arms.sh gives
        assert {k: v for k, v in config["arguments"].items() if k not in free} == {
            k: asked[k] for k in config["arguments"] if k not in free
        }
        assert json.loads((unit / run / "log.jsonl").read_text().splitlines()[-1])["step"] == asked["steps"]


def test_rows_of_other_settings_are_refused(results, tmp_path):
    assert results("orl", ARMS="real", SEEDS="0", FOLDS="0")[0] == 0
    for other in ({"GENERATOR": "--size 32 --steps 9"}, {"SAMPLER": "--guidance 2"}):
        code, commands = results("orl", ARMS="real", SEEDS="1", FOLDS="0", **other)
        assert code == 2 and not commands
    other = {"GENERATOR": "--size 32 --steps 9", "SAMPLER": "--guidance 2", "MIXES": "2", "VALIDATION": "nine"}
    code, commands = results("orl", ARMS="far double reproduction heun32", SEEDS="0", FOLDS="0", **other)
    assert code == 0 and {a.steps for a in of(commands, "train_diffusion.py")} == {9}
    assert [a.guidance for a in of(commands, "sample_scoremix.py")] == [2] * 4
    counts = {Path(a.out).stem: a.count for a in of(commands, "mine_pairs.py")}
    assert counts == {"far": 2 * CLASSES, "double": 4 * CLASSES, "reproduction": None, "heun32": 2 * CLASSES}
    assert {Path(a.out).stem: a.per_class for a in of(commands, "sample_scoremix.py")}["reproduction"] == 10


def test_the_test_sets_are_as_large_as_evaluate_takes(results):
    """Of Omniglot's 659 test characters."""
    for name in ("omniglot", "omniglot-5"):
        code, commands = results(name, ARMS="real", SEEDS="0")
        made = {a.out: a for a in of(commands, "prepare_data.py")}
        assert code == 0 and made[f"runs/{name}/five"].per_class * 659 <= testsets.MOST_IMAGES


def test_validation_never_sees_the_test_classes(results, tmp_path):
    environment = {"VALIDATION": "long", "GENERATOR": "--size 64 --steps 7", "SEEDS": "0", "ARMS": "real far"}
    code, commands = results("lfw", **environment)
    assert code == 0 and commands[-1] == ["results/tables.py", "results/lfw/validation/long"]
    split = of(commands, "prepare_data.py")[1]
    assert split.src.endswith("0/data/train") and split.test_classes == 0.2
    scripts = ("train_recognizer.py", "train_diffusion.py", "mine_pairs.py", "audit.py", "evaluate.py")
    used = {s: {d for a in of(commands, s) for d in a.data} - {"runs/lfw/validation/long/0/far"} for s in scripts}
    folder = "runs/lfw/validation/long/0/validation"
    assert used.pop("evaluate.py") == {f"{folder}/test"} and set.union(*used.values()) == {f"{folder}/train"}
    assert all(used.values())
    assert {a.steps for a in of(commands, "train_diffusion.py")} == {7}
    assert (tmp_path / "results/lfw/validation/long/rows/0-0-far.json").exists()
    assert not (tmp_path / "results/lfw/rows").exists()


@pytest.mark.parametrize("folder", sorted(p.parent.relative_to(ROOT) for p in ROOT.glob("results/**/rows")), ids=str)
def test_the_committed_tables_are_those_of_the_committed_rows(folder, tmp_path):
    if (ROOT / folder / "settings").exists():
        shutil.copy(ROOT / folder / "settings", tmp_path)
    for part in ("rows", "audit", "pairs", "alignment", "costs", "configs"):
        if (ROOT / folder / part).is_dir():
            shutil.copytree(ROOT / folder / part, tmp_path / part)
    done = subprocess.run([sys.executable, ROOT / "results/tables.py", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("table.md", "results.csv"):
        assert (tmp_path / name).read_text() == (ROOT / folder / name).read_text(), f"run results/tables.py {folder}"


@pytest.mark.parametrize("script, names", [("orders", ["orders.md", "orders.csv"]), ("mixes", ["mixes.md"])])
def test_the_committed_comparisons_of_sets_are_those_of_the_committed_results(script, names, tmp_path):
    for name in ("omniglot-5", "omniglot", "lfw", "lfw/steps-10000", "orl"):
        (tmp_path / name).mkdir()
        shutil.copy(ROOT / "results" / name / "results.csv", tmp_path / name)
    argv = [sys.executable, ROOT / f"results/{script}.py", "--folder", tmp_path]
    subprocess.run(argv, check=True, capture_output=True)
    for name in names:
        assert (tmp_path / name).read_text() == (ROOT / "results" / name).read_text(), f"run results/{script}.py"


def tables_of(text):
    """The Markdown tables of a text: (its heads, {the first cell of a line: the others})."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        head, _, *lines = ([c.strip() for c in line.split("|")[1:-1]] for line in block.splitlines())
        found.append((head, {line[0]: line[1:] for line in lines}))
    return found


def test_the_readme_quotes_the_committed_tables():
    """READMEs quote each table.md: EER of every arm of any set, the best steps, every order of the paper, hours."""
    section = (ROOT / "README.md").read_text().split("## Does it help?")[1].split("\n## ")[0]
    (sets, eer), (_, best) = tables_of(section)
    (head, orders), (_, fewer), (_, curve), (_, faces), (_, costs) = tables_of(
        (ROOT / "results/README.md").read_text()
    )
    quoted = set()
    for i, folder in enumerate(("omniglot-5", "omniglot", "lfw", "orl")):
        text = (ROOT / "results" / folder / "table.md").read_text()
        (main, arms), (claims, told) = tables_of(text)[:2]
        assert main[2:4] == ["EER %", "difference to real"] and claims[1] == "points of EER", folder
        name, title = sets[2 * i + 1].split(": ")
        assert title == "EER %" and sets[2 * i + 2] == main[3] and set(told) == set(head[1:]), folder
        quoted |= set(arms)
        for arm in eer:
            assert eer[arm][2 * i : 2 * i + 2] == (arms[arm][1:3] if arm in arms else ["not run", ""]), (folder, arm)
        for j in (0, 2):  # the gap and the verdict by each metric
            row = [" ".join(told[order][j : j + 2]).strip() for order in head[1:]]
            assert orders.pop(f"{name}: {claims[j + 1].removeprefix('points of ')}") == row, folder
        ours = arms["real + far pairs (ScoreMix)"]
        assert main[4] == main[7] == "fewer errors" and fewer.pop(name) == [ours[3], ours[6]], folder
        if folder != "orl":
            hours = next(lines for head_of, lines in tables_of(text) if head_of[:3] == ["stage", "runs", "hours a run"])
            stages = ("train_recognizer", "train_diffusion", "mine_pairs", "sample_scoremix")
            assert {k: v[i] for k, v in costs.items()} == {f"`{k}.py`": hours[k][1] for k in stages}, folder
    assert quoted == set(eer) and not orders and not fewer
    for name, cells in best.items():
        folder = ROOT / "results" / {"LFW": "lfw"}.get(name, "omniglot-5")
        with open(folder / "results.csv", newline="") as file:
            rows = [x for x in csv.DictReader(file) if (x["what"], x["metric"]) == ("row", "eer")]
        steps = [re.fullmatch(r"([\d.]+) \(([\d,]+) steps\)", c).groups() for c in cells[1:3]]
        for arm, (mean, n) in zip(("real", "far"), steps):
            values = [float(x["value"]) for x in rows if (x["arm"], x["steps"]) == (arm, n.replace(",", ""))]
            assert f"{100 * sum(values) / len(values):.1f}" == mean, (name, arm)
        each = [(title, lines) for title, lines in tables_of((folder / "table.md").read_text())
                if title[0] == "arm, steps; against real with"]
        told = [lines[f"far, {steps[1][1]}"][title.index(f"{steps[0][1]} steps") - 1] for title, lines in each]
        assert told == cells[3:], name  # by EER, 1 - TAR at 1e-2 and at the planned FAR, rank-1
    for folder, quoted in (("omniglot-5", curve), ("lfw", faces)):
        found = tables_of((ROOT / "results" / folder / "table.md").read_text())
        title, steps = next(x for x in found if x[0][0] == "steps of the recogniser")
        assert title[1:3] == ["real: EER %", "real + far pairs (ScoreMix): EER %"]
        title, each = next(x for x in found if x[0][0] == "arm, steps; against real with")
        gaps = {far: dict(zip(title[1:], cells)) for far, cells in each.items()}
        for n, cells in quoted.items():
            known = [re.split(r" \(|,", c)[0] or "not run" for c in steps[n][:2]]
            assert cells[-3:] == [*known, gaps.get(f"far, {n}", {}).get(f"{n} steps", "")], n
    found = tables_of((ROOT / "results/lfw/validation/steps/table.md").read_text())
    steps = next(lines for title, lines in found if title[0] == "steps of the recogniser")
    assert {n: cells[:2] for n, cells in faces.items()} == {
        n: [c.split(",")[0] or "not run" for c in cells[:2]] for n, cells in steps.items()
    }
