"""Hostile, hollow and damaged models, by every flag that takes one: one line, nothing written, nothing executed."""

import math
import os
import pickle
import shutil

import pytest
import torch
from conftest import SCRIPTS, command, succeed


# ---------------------------------------------------------------------------------------------------------- models
class Hostile:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


# fmt: off
TAKERS = {  # script and flag that takes a model -> its kind, the flags
    **{f"{s} --recognizer": ("recognizer", "--recognizer") for s in ("mine_pairs", "audit", "alignment", "sweep")},
    **{f"{s} --generator": ("generator", "--generator") for s in ("sample_scoremix", "alignment", "sweep")},
    **{f"{s} {f.split()[-1]}": ("recognizer", f) for s, f in (("train_diffusion", "--conditions frozen --recognizer"),
       ("train_recognizer", "--init"), ("evaluate", "--model"), ("evaluate --arch", "--arch ir18 --model"))},
    "mine_pairs --generator": ("generator", "--space condition --generator"),
    "sample_scoremix --guide": ("generator", "--autoguidance 2 --guide"),
}
# fmt: on


def hollow(saved, change):
    """Apply a change: None takes a key away, a function changes all weights, a dict goes into config."""
    for k, v in change.items():
        if callable(v):
            v = {name: v(w) if w.is_floating_point() else w for name, w in saved[k].items()}
        saved[k] = hollow(saved[k], v) if k == "config" and isinstance(v, dict) else v
    return {k: v for k, v in saved.items() if v is not None}


# fmt: off
BOTH = {
    "no config": dict(config=None), "no weights": dict(weights=None), "no classes": dict(classes=None),
    "other shapes": dict(weights=lambda v: v[:1]), "config is text": dict(config="small"),
    "weights are a list": dict(weights=[1]), "no weights in it": dict(weights={}), "classes a number": dict(classes=5),
    "classes of numbers": dict(classes=[1, 2, 3, 4, 5]), "a class twice": dict(classes=["s11"] * 5),
    "weights nan": dict(weights=lambda v: v * math.nan), "size is text": dict(config=dict(size="16")),
    "no size": dict(config=dict(size=None)), "size 0": dict(config=dict(size=0)), "size 17": dict(config=dict(size=17)),
    "channels nan": dict(config=dict(channels=math.nan)), "classes are paths": dict(classes=["..", "/a", "", "b", "c"]),
}
HOLLOW = {
    "recognizer": BOTH | {
        "no flip": dict(config=dict(flip=None)), "no mean": dict(config=dict(mean=None)),
        "std 0": dict(config=dict(std=0.0)), "unknown arch": dict(config=dict(arch="big")),
        "size beyond sense": dict(config=dict(size=2**40)), "other size": dict(config=dict(size=32)),
    },
    "generator": BOTH | {
        "classes too few": dict(classes=["s11", "s12"]), "width 0": dict(config=dict(width=0)),
        "width 12": dict(config=dict(width=12)), "no predict": dict(config=dict(predict=None)),
        "predict x": dict(config=dict(predict="x")), "other T": dict(config=dict(T=10)),
    },
}
FILES = {
    "hostile pickle": lambda p, c: p.write_bytes(pickle.dumps({"kind": Hostile(p.parent / "touched")}, protocol=2)),
    "hostile zip": lambda p, c: torch.save({"kind": "recognizer", "x": Hostile(p.parent / "touched")}, p),
    "hostile legacy": lambda p, c: torch.save([Hostile(p.parent / "touched")], p, _use_new_zipfile_serialization=False),
    "tensor": lambda p, c: torch.save(torch.zeros(3), p), "text": lambda p, c: p.write_text("no model"),
    "nothing": lambda p, c: p.write_bytes(b""), "image": lambda p, c: p.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99)),
    "cut": lambda p, c: p.write_bytes((c.real / "model.pt").read_bytes()[:-1000]),
    "list": lambda p, c: torch.save([1], p), "another kind": lambda p, c: torch.save({"kind": "statue"}, p),
    "kind of many lines": lambda p, c: torch.save({"kind": "a\nb\nc"}, p), "folder": lambda p, c: p.mkdir(),
    "checkpoint": lambda p, c: shutil.copy(c.real / "last.pt", p),
}
# fmt: on
FULL = "mine_pairs --recognizer", "train_recognizer --init", "sample_scoremix --generator"  # the others get the first 4


def with_model(taker, chain, path):
    script, out = taker.split()[0], path.parent / "out.csv"
    return script, command(script, chain, out, *TAKERS[taker][1].split(), path)


@pytest.mark.parametrize("taker, name", [(t, n) for t in TAKERS for n in [*FILES][: None if t in FULL else 4]])
def test_files_that_are_no_models(taker, name, chain, refused, tmp_path):
    FILES[name](tmp_path / "bad.pt", chain)
    refused(*with_model(taker, chain, tmp_path / "bad.pt"), "bad.pt")


@pytest.mark.parametrize(
    "taker, name", [(t, n) for t in TAKERS for n in [*HOLLOW[TAKERS[t][0]]][: None if t in FULL else 4]]
)
def test_hollow_models(taker, name, chain, refused, tmp_path):
    kind = TAKERS[taker][0]
    saved = torch.load((chain.real if kind == "recognizer" else chain.generator) / "model.pt", weights_only=True)
    torch.save(hollow(saved, HOLLOW[kind][name]), tmp_path / "bad.pt")
    refused(*with_model(taker, chain, tmp_path / "bad.pt"))


@pytest.mark.parametrize("name", ["../../escape", "{}/escape", "..", ".", "", "a/b", "nul\0"])
def test_classes_of_a_model_are_no_paths(name, chain, refused, tmp_path):
    saved, name = torch.load(chain.generator / "model.pt", weights_only=True), name.format(tmp_path)
    torch.save(saved | {"classes": [name, "s12", "s13", "s14", "s15"]}, tmp_path / "bad.pt")
    (tmp_path / "pairs.csv").write_bytes(f'class_1\n"{name}"\n'.encode())
    argv = command("sample_scoremix", chain, tmp_path / "some/out", "--generator", tmp_path / "bad.pt")
    refused("sample_scoremix", [*argv, "--pairs", tmp_path / "pairs.csv"])


@pytest.mark.parametrize("script", ["train_recognizer", "train_diffusion"])
@pytest.mark.parametrize("change", [dict(step=None), dict(log=None), dict(model=None), dict(step="1"), dict(model=[])])
def test_hollow_checkpoints(script, change, chain, fails, tmp_path):
    argv = command(script, chain, tmp_path / "run")
    succeed(SCRIPTS[script], *argv)
    (tmp_path / "run/model.pt").unlink()
    torch.save(hollow(torch.load(tmp_path / "run/last.pt", weights_only=True), change), tmp_path / "run/last.pt")
    fails(SCRIPTS[script].main, argv, "last.pt")


@pytest.mark.parametrize("script", ["train_recognizer", "train_diffusion"])
def test_a_device_too_full_for_a_checkpoint_does_not_make_it_damaged(script, chain, fails, tmp_path, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("no memory left")

    argv = command(script, chain, tmp_path / "run")
    succeed(SCRIPTS[script], *argv)
    (tmp_path / "run/model.pt").unlink()
    monkeypatch.setattr(torch.optim.Optimizer, "load_state_dict", full)
    fails(SCRIPTS[script].main, argv, "out of memory; lower --micro-batch")
