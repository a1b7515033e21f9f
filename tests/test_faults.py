"""Faults in mid-work: signals, a full disk, files cut or gone. Nothing is lost, and the same command ends the work with
the same bytes as one that nothing befell."""

import json
import resource
import shutil
import signal
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL_RECOGNIZER, SMALL_UNET, succeed

import evaluate
import mine_pairs
import prepare_data
import sample_scoremix
import stage
import train_diffusion
import train_recognizer

TRAININGS = {"recognizer": (train_recognizer, SMALL_RECOGNIZER), "generator": (train_diffusion, SMALL_UNET)}


def training(kind, faces, out):
    module, flags = TRAININGS[kind]
    argv = ["--data", faces / "train", "--out", out, *flags, "--steps", 12, "--log-every", 4, "--save-every", 8]
    return module, [str(a) for a in argv]


@pytest.fixture(scope="module")
def whole(faces, tmp_path_factory):
    """The trainings, the pairs and the mixed folder as they are when nothing happens."""
    root = tmp_path_factory.mktemp("whole")
    for kind in TRAININGS:
        module, argv = training(kind, faces, root / kind)
        succeed(module, *argv)
    mine = ["--recognizer", root / "recognizer", "--data", faces / "train", "--count", 3, "--out", root / "pairs.csv"]
    succeed(mine_pairs, *mine)
    succeed(sample_scoremix, *sampling(root, root / "mixed"))
    return root


def sampling(root, out):
    argv = ["--generator", root / "generator", "--pairs", root / "pairs.csv", "--out", out]
    return [*argv, "--per-class", 4, "--steps", 2, "--batch", 4]


@contextmanager
def at_call(monkeypatch, module, name, number, happens):
    """Let something happen at the n-th call of a function."""
    original, calls = getattr(module, name), []

    def wrapped(*args, **kwargs):
        calls.append(None)
        if len(calls) == number:
            happens()
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, wrapped)
        yield calls


@contextmanager
def full_disk(bytes_left):
    """No file may grow beyond so many bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def same_training(a, b):
    models = [torch.load(p / "model.pt", weights_only=True)["weights"] for p in (a, b)]
    assert models[0].keys() == models[1].keys() and all(torch.equal(models[0][k], models[1][k]) for k in models[0])
    assert (a / "log.jsonl").read_bytes() == (b / "log.jsonl").read_bytes()


def contents(folder):
    made = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.suffix in (".png", ".csv")}
    assert made and not list(folder.rglob("*.tmp"))
    return made


# --------------------------------------------------------------------------------------------------------- signals
@pytest.mark.parametrize("kind", TRAININGS)
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_step_and_saves_it(kind, number, code, whole, faces, tmp_path, monkeypatch, capsys):
    """Between two lines of the log: also the sums of the next line go on."""
    module, argv = training(kind, faces, tmp_path / "run")
    with at_call(monkeypatch, module, "learning_rate", 6, lambda: signal.raise_signal(number)) as calls:
        assert module.main(argv) == code
    assert len(calls) == 6
    error = capsys.readouterr().err
    assert "interrupted; the same command goes on" in error and "Traceback" not in error
    assert stage.load_model(tmp_path / "run/last.pt", "checkpoint")["step"] == 6
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # as it was
    assert module.main(argv) == 0
    same_training(tmp_path / "run", whole / kind)
    cost, expected = (json.loads((p / "cost.json").read_text()) for p in (tmp_path / "run", whole / kind))
    assert cost["images"] == expected["images"] and cost["flops"] == expected["flops"]


def test_a_run_that_goes_on_with_other_versions_says_so(whole, faces, tmp_path, monkeypatch):
    """Their bits may differ from those of the first; the same versions again are no news."""

    def pretend(folder):  # that another version of torch began it
        config = json.loads((folder / "config.json").read_text())
        now = config["versions"]
        (folder / "config.json").write_text(json.dumps(config | {"versions": now | {"torch": "2.0"}}))
        return now

    module, argv = training("recognizer", faces, tmp_path / "run")
    with at_call(monkeypatch, module, "learning_rate", 6, lambda: signal.raise_signal(signal.SIGTERM)):
        assert module.main(argv) == 143
    assert "resumed" not in json.loads((tmp_path / "run/config.json").read_text())
    now = pretend(tmp_path / "run")
    with at_call(monkeypatch, module, "learning_rate", 2, lambda: signal.raise_signal(signal.SIGTERM)):
        assert module.main(argv) == 143
    assert module.main(argv) == 0
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["versions"]["torch"] == "2.0" and config["resumed"] == [now]
    (tmp_path / "early").mkdir()
    shutil.copy(tmp_path / "run/config.json", tmp_path / "early")  # killed before the first checkpoint
    config = config | {"arguments": config["arguments"] | {"out": str(tmp_path / "early")}}
    (tmp_path / "early/config.json").write_text(json.dumps(config | {"resumed": []}))
    assert module.main([str(tmp_path / "early") if a == str(tmp_path / "run") else a for a in argv]) == 0
    assert json.loads((tmp_path / "early/config.json").read_text())["resumed"] == [now]
    shutil.copytree(whole / "mixed", tmp_path / "mixed")
    now = pretend(tmp_path / "mixed")
    succeed(sample_scoremix, *sampling(whole, tmp_path / "mixed"))  # nothing is missing
    assert "resumed" not in json.loads((tmp_path / "mixed/config.json").read_text())
    next((tmp_path / "mixed").glob("*/*.png")).unlink()
    succeed(sample_scoremix, *sampling(whole, tmp_path / "mixed"))
    assert json.loads((tmp_path / "mixed/config.json").read_text())["resumed"] == [now]


@pytest.mark.parametrize("seconds, saved", [(2, False), (0, True)])
def test_a_second_signal_stops_at_once_unless_it_is_the_first_passed_on(seconds, saved, faces, tmp_path, monkeypatch):
    """Slurm and systemd signal all processes of a job, and torchrun passes on what it got to those that have it."""
    module, argv = training("recognizer", faces, tmp_path / "run")

    def twice():
        signal.raise_signal(signal.SIGTERM)
        stage.signals[signal.SIGTERM] -= seconds
        signal.raise_signal(signal.SIGTERM)

    with at_call(monkeypatch, module, "learning_rate", 6, twice):
        assert module.main(argv) == 143
    assert (tmp_path / "run/last.pt").exists() == saved


def test_lines_of_a_killed_run_go_although_a_signal_came_between(whole, faces, tmp_path, monkeypatch):
    """The checkpoint of a signal, before any new line, must not count the lines that a run killed before had left."""
    module, argv = training("recognizer", faces, tmp_path / "run")
    for first_call in (6, 1):
        with at_call(monkeypatch, module, "learning_rate", first_call, lambda: signal.raise_signal(signal.SIGTERM)):
            assert module.main(argv) == 143
        with open(tmp_path / "run/log.jsonl", "a") as log:
            log.write('{"step": 8, "loss": 9.0}\n')  # and killed before its checkpoint
    assert module.main(argv) == 0
    same_training(tmp_path / "run", whole / "recognizer")


def test_a_signal_stops_sampling_and_preparing(whole, faces, tmp_path, monkeypatch):
    argv = [str(a) for a in sampling(whole, tmp_path / "mixed")]
    with at_call(monkeypatch, sample_scoremix, "to_uint8", 3, lambda: signal.raise_signal(signal.SIGTERM)):
        assert sample_scoremix.main(argv) == 143
    assert 0 < len(list((tmp_path / "mixed").glob("*/*.png"))) < 12
    assert sample_scoremix.main(argv) == 0
    assert contents(tmp_path / "mixed") == contents(whole / "mixed")
    argv = ["folder", str(faces / "train"), "--test-classes", "0", "--out"]
    assert prepare_data.main([*argv, str(tmp_path / "whole")]) == 0
    with at_call(monkeypatch, stage, "write_atomic", 9, lambda: signal.raise_signal(signal.SIGINT)):
        here = nullcontext(SimpleNamespace(map=map))  # an executor in this thread, where signals arrive
        monkeypatch.setattr(prepare_data, "ThreadPoolExecutor", lambda: here)
        assert prepare_data.main([*argv, str(tmp_path / "cut")]) == 130
    assert not (tmp_path / "cut/split.json").exists()
    assert prepare_data.main([*argv, str(tmp_path / "cut")]) == 0
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


# --------------------------------------------------------------------------------------------- disks, files, folders
@pytest.mark.parametrize("kind", TRAININGS)
def test_a_full_disk_leaves_the_checkpoint_before(kind, whole, faces, tmp_path, monkeypatch, fails):
    module, argv = training(kind, faces, tmp_path / "run")
    with at_call(monkeypatch, module, "learning_rate", 6, lambda: signal.raise_signal(signal.SIGTERM)):
        assert module.main(argv) == 143
    before = (tmp_path / "run/last.pt").read_bytes()
    with full_disk(len(before) // 2):
        fails(module.main, argv, "last.pt could not be written")
    assert (tmp_path / "run/last.pt").read_bytes() == before and not list((tmp_path / "run").glob(".*.tmp"))
    assert not (tmp_path / "run/model.pt").exists()
    assert module.main(argv) == 0
    same_training(tmp_path / "run", whole / kind)


def test_a_full_disk_leaves_no_half_image_and_no_half_table(whole, faces, tmp_path, fails):
    argv = sampling(whole, tmp_path / "mixed")
    least = min(p.stat().st_size for p in (whole / "mixed").glob("*/*.png"))
    with full_disk(5000):  # the images fit, the preview does not
        fails(sample_scoremix.main, argv, "File too large")
    with full_disk(least - 1):  # nothing fits
        fails(sample_scoremix.main, sampling(whole, tmp_path / "other"), "File too large")
    assert not list((tmp_path / "other").glob("*/*.png")) and not list((tmp_path / "mixed").rglob(".*.tmp"))
    for out in ("mixed", "other"):
        succeed(sample_scoremix, *sampling(whole, tmp_path / out))
        assert contents(tmp_path / out) == contents(whole / "mixed")
    report = ["--model", whole / "recognizer", "--data", faces / "test", "--draws", 100, "--out", tmp_path / "report"]
    with full_disk(5000):
        fails(evaluate.main, report, "File too large")
    assert not (tmp_path / "report/results.json").exists()
    succeed(evaluate, *report)
    mine = ["--recognizer", whole / "recognizer", "--data", faces / "train", "--count", 3, "--out"]
    with full_disk(20):
        fails(mine_pairs.main, [*mine, tmp_path / "pairs.csv"], "File too large")
    succeed(mine_pairs, *mine, tmp_path / "pairs.csv")
    assert (tmp_path / "pairs.csv").read_bytes() == (whole / "pairs.csv").read_bytes()
    prepare = ["folder", faces / "train", "--test-classes", 0, "--out", tmp_path / "data"]
    with full_disk(5000):
        succeed(prepare_data, *prepare)
    with full_disk(100):
        fails(prepare_data.main, [*prepare[:-1], tmp_path / "data2"], "File too large")
    succeed(prepare_data, *prepare[:-1], tmp_path / "data2")
    assert contents(tmp_path / "data") == contents(tmp_path / "data2")


@pytest.mark.parametrize("manifest", [True, False])
def test_an_image_that_was_cut_is_made_again(manifest, whole, tmp_path):
    shutil.copytree(whole / "mixed", tmp_path / "mixed")
    victims = sorted((tmp_path / "mixed").glob("*/*.png"))
    victims[1].write_bytes(victims[1].read_bytes()[:-5])
    victims[6].write_bytes(b"")
    if not manifest:
        (tmp_path / "mixed/manifest.csv").unlink()
    succeed(sample_scoremix, *sampling(whole, tmp_path / "mixed"))
    assert contents(tmp_path / "mixed") == contents(whole / "mixed")


def test_an_output_folder_that_goes_or_cannot_be(faces, tmp_path, monkeypatch, fails):
    module, argv = training("recognizer", faces, tmp_path / "run")
    with at_call(monkeypatch, module, "learning_rate", 6, lambda: shutil.rmtree(tmp_path / "run")):
        fails(module.main, argv, tmp_path / "run")
    (tmp_path / "file").write_text("no folder")
    fails(module.main, training("recognizer", faces, tmp_path / "file/run")[1], "file")


def test_a_line_of_the_log_that_was_cut(whole, faces, tmp_path, monkeypatch):
    module, argv = training("recognizer", faces, tmp_path / "run")
    with at_call(monkeypatch, module, "learning_rate", 9, lambda: signal.raise_signal(signal.SIGTERM)):
        assert module.main(argv) == 143
    log = tmp_path / "run/log.jsonl"
    log.write_bytes(log.read_bytes()[:-20])  # the line of step 8
    assert module.main(argv) == 0
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == [4, 12]  # whole lines alone; that of step 8 is lost
