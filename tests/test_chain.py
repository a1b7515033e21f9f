"""All stages in order on a tiny real set; the files as a newcomer meets them."""

import argparse
import importlib
import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, SCRIPTS, SMALL_RECOGNIZER, SMALL_UNET, succeed
from PIL import Image

import evaluate
import mine_pairs
import sample_scoremix
import stage
import train_diffusion
import train_recognizer


def test_the_whole_chain(faces, tmp_path, capsys):
    train, real, gen, pairs, mixed, both, report = (
        faces / "train",
        *(tmp_path / n for n in ("real", "generator", "pairs.csv", "mixed", "scoremix", "report")),
    )

    def everything():
        succeed(train_recognizer, "--data", train, "--out", real, "--steps", 5, *SMALL_RECOGNIZER)
        succeed(train_diffusion, "--data", train, "--out", gen, "--steps", 5, *SMALL_UNET)
        succeed(mine_pairs, "--recognizer", real, "--data", train, "--out", pairs, "--count", 3)
        succeed(sample_scoremix, "--generator", gen, "--pairs", pairs, "--out", mixed, "--per-class", 4, "--steps", 3)
        succeed(train_recognizer, "--data", train, mixed, "--out", both, "--steps", 5, *SMALL_RECOGNIZER)
        succeed(evaluate, "--model", real, both, "--data", faces / "test", "--out", report, "--draws", 100)

    everything()
    config = json.loads((both / "config.json").read_text())
    assert config["derived"]["classes"] == 5 + 3 and config["derived"]["images"] == 30 + 12
    mixes = {p.name for p in mixed.iterdir() if p.is_dir()}
    assert len(mixes) == 3 and set(train_recognizer.load_recognizer(both, "cpu")[1]["classes"]) > mixes
    preview = Image.open(mixed / "preview.png")
    assert preview.size == ((2 + 4 + 2) * 96, 3 * 96)
    firsts = [np.asarray(Image.open(train / line.split(",")[0] / "1.png")) for line in pairs.read_text().split()[1:]]
    column = np.asarray(preview)[::6, ::6][:, :16].reshape(3, 16, 16)  # unzoomed: a real face of each mix's first class
    assert np.array_equal(column, np.stack(firsts))
    stamp = {
        p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file() and p.name not in (".lock", "log.jsonl")
    }
    first = capsys.readouterr().out
    everything()  # the same commands again: nothing is trained, sampled or written anew, and the table is shown again
    assert {p: p.stat().st_mtime_ns for p in stamp} == stamp
    table = (report / "table.md").read_text()
    assert "scoremix - real" in table and table in first and table in capsys.readouterr().out
    for path in (real, gen, mixed, both, report):
        assert json.loads((path / "cost.json").read_text())["seconds"] > 0


def test_importing_a_script_does_nothing(tmp_path):
    code = f"""
import sys, random, numpy, torch
sys.path.insert(0, sys.argv.pop(1))
sys.argv[1:] = ["--nonsense"]
def state():
    return torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist()
before = state()
import {", ".join(SCRIPTS)}, stage
assert state() == before
"""
    done = subprocess.run(
        [sys.executable, "-B", "-c", code, str(ROOT)], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_has_help_and_the_docstring_shows_the_command(name, capsys, monkeypatch):
    parsers, original = [], argparse.ArgumentParser.__init__

    def remember(self, *a, **kw):
        parsers.append(self)
        original(self, *a, **kw)

    monkeypatch.setattr(argparse.ArgumentParser, "__init__", remember)
    module = importlib.import_module(name)
    with pytest.raises(SystemExit) as end:
        module.main(["--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0 and f"python {name}.py" in shown and "Writes" in shown
    actions = [a for p in parsers for a in p._actions]
    assert len(actions) > (4 if name == "costs" else 5)
    assert all(a.help for a in actions), [a.dest for a in actions if not a.help]


def test_scripts_run_as_programs_and_fail_with_one_line(tmp_path):
    for name in SCRIPTS:
        done = subprocess.run(
            [sys.executable, str(ROOT / f"{name}.py"), "--nonsense"], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.count("\n") == 1 and done.stderr.startswith(f"{name}.py: error: "), done.stderr
    assert not list(tmp_path.iterdir())


def test_bad_input_over_the_stages(faces, tmp_path, fails):
    train, out = faces / "train", tmp_path / "out"
    unet, small = [*SMALL_UNET, "--steps", 1], [*SMALL_RECOGNIZER, "--steps", 1]
    lone = tmp_path / "lone"
    (lone / "s11").mkdir(parents=True)
    broken = tmp_path / "broken"
    for person in ("s11", "s12"):
        (broken / person).mkdir(parents=True)
        (broken / person / "1.png").write_bytes((train / person / "1.png").read_bytes())
    (lone / "s11/1.png").write_bytes((train / "s11/1.png").read_bytes())
    (broken / "s12/1.png").write_bytes(b"\x89PNG")
    for module, flags in ((train_diffusion, unet), (train_recognizer, small)):
        fails(module.main, ["--data", tmp_path / "none", "--out", out, *flags], "none", "expected")
        fails(module.main, ["--data", lone, "--out", out, *flags], "only the class s11")
        fails(module.main, ["--data", broken, "--out", out, *flags], broken / "s12/1.png")
    fails(train_recognizer.main, ["--data", train, "--out", out, *small, "--size", 20], "--size 20", "multiple of 16")
    assert not out.exists()
    succeed(train_recognizer, "--data", train, "--out", tmp_path / "real", *small)
    succeed(train_diffusion, "--data", train, "--out", tmp_path / "gen", *unet)
    (tmp_path / "pairs.csv").write_text("class_1,class_2\ns11,s12\n")
    fails(
        sample_scoremix.main,
        ["--generator", tmp_path / "real", "--pairs", tmp_path / "pairs.csv", "--out", out],
        "is a recognizer",
    )
    fails(
        mine_pairs.main,
        ["--recognizer", tmp_path / "gen", "--data", train, "--out", tmp_path / "p.csv"],
        "is a generator",
    )
    fails(evaluate.main, ["--model", tmp_path / "gen", "--data", faces / "test", "--out", out], "is a generator")
    model = tmp_path / "real/model.pt"
    model.write_bytes(model.read_bytes()[:-1000])
    fails(evaluate.main, ["--model", tmp_path / "real", "--data", faces / "test", "--out", out], "truncated")
    fails(train_diffusion.main, ["--data", train, "--out", tmp_path / "real", *unet], "holds another run", "stage")
    fails(
        mine_pairs.main, ["--recognizer", tmp_path / "real", "--data", train, "--out", tmp_path / "p.csv"], "truncated"
    )
    assert not out.exists() and stage.scan([train])[0] == ["s11", "s12", "s13", "s14", "s15"]
