"""Public backbones load, and ours leave: bare state dicts with InsightFace's key names."""

import json

import torch
from conftest import succeed

import evaluate
import train_recognizer


def metrics(out):
    return [m["metrics"] for m in json.loads((out / "results.json").read_text())["models"]]


def test_public_weights_load_and_ours_export_the_same(public, tmp_path):
    path, network = public
    x = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    model, saved = train_recognizer.load_recognizer(path, "cpu", "ir18")
    assert saved["config"]["size"] == 32 and saved["config"]["channels"] == 3
    ours = train_recognizer.embed_batch(model, x, saved["config"])
    ready = network.eval()
    with torch.no_grad():
        z = [ready((y.float() - 127.5) / 127.5) for y in (x, x.flip(3))]
    assert (ours - torch.nn.functional.normalize(z[0] + z[1])).abs().max() < 1e-5
    bgr, other = train_recognizer.load_recognizer(path, "cpu", "ir18", bgr=True, mean=100.0, std=50.0)
    with torch.no_grad():
        z = [ready((y.flip(1).float() - 100) / 50) for y in (x, x.flip(3))]
    blue_first = train_recognizer.embed_batch(bgr, x, other["config"])
    assert (blue_first - torch.nn.functional.normalize(z[0] + z[1])).abs().max() < 1e-5
    assert (blue_first - ours).abs().max() > 1e-3
    wrapped = {f"module.{k}": v.half() for k, v in network.state_dict().items() if "num_batches" not in k}
    torch.save(wrapped, tmp_path / "half.pth")  # as DataParallel and old versions leave it
    half, _ = train_recognizer.load_recognizer(tmp_path / "half.pth", "cpu", "ir18")
    assert (train_recognizer.embed_batch(half, x, saved["config"]) - ours).abs().max() < 0.05


def test_our_weights_as_a_bare_state_dict(faces, tmp_path):
    argv = ["--data", faces / "train", "--size", 16, "--arch", "ir18", "--steps", 1, "--batch", 4, "--out"]
    succeed(train_recognizer, *argv, tmp_path / "run")
    model = torch.load(tmp_path / "run/model.pt", weights_only=True)
    torch.save(model["weights"], tmp_path / "exported.pth")
    reports = []
    for path, more in ((tmp_path / "run", []), (tmp_path / "exported.pth", ["--arch", "ir18"])):
        out = tmp_path / f"report-{path.stem}"
        succeed(evaluate, "--model", path, *more, "--data", faces / "test", "--draws", 100, "--out", out)
        reports.append(metrics(out))
    assert reports[0] == reports[1]


def test_weights_that_do_not_fit(public, faces, tmp_path, fails):
    path, network = public
    weights = network.state_dict()
    (tmp_path / "broken.pth").write_bytes(path.read_bytes()[:1000])
    torch.save({k: v for k, v in weights.items() if k != "layer2.1.conv1.weight"}, tmp_path / "lacks.pth")
    torch.save({"input_layer.0.weight": weights["conv1.weight"]}, tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    for name, arch, words in (
        ("broken.pth", "ir18", ["broken.pth", "no state dict"]),
        ("lacks.pth", "ir18", ["does not fit --arch ir18", "layer2.1.conv1.weight"]),
        ("other.pth", "ir18", ["keys and shapes"]),
        ("list.pth", "ir18", ["no state dict"]),
        (path, "ir50", ["does not fit --arch ir50", "such as layer"]),
        (path, None, ["no file of this project"]),
    ):
        more = ["--arch", arch] if arch else []
        argv = ["--model", tmp_path / name, *more, "--data", faces / "test", "--out", tmp_path / "out"]
        fails(evaluate.main, argv, *words)
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_whole_model(public, faces, tmp_path, fails):
    weights = public[1].state_dict()
    torch.save({**weights, "fc.weight": torch.zeros(3)}, tmp_path / "flat.pth")
    torch.save({"epoch": 3, "state_dict_backbone": weights}, tmp_path / "training.pth")
    torch.save({"kind": "recognizer"}, tmp_path / "hollow.pt")
    data = ["--data", faces / "test", "--out", tmp_path / "out"]
    for name, words in (
        ("flat.pth", ["keys and shapes", "conv1.weight"]),
        ("training.pth", ["no state dict"]),
        ("none.pth", ["none.pth is missing"]),
        ("hollow.pt", ["hollow.pt is damaged"]),
    ):
        fails(evaluate.main, ["--model", tmp_path / name, "--arch", "ir18", *data], *words)
    fails(evaluate.main, ["--model", tmp_path / "hollow.pt", *data], "hollow.pt is damaged")
    fails(evaluate.main, ["--model", tmp_path / "flat.pth", "--bgr", *data], "changes nothing without --arch")
    fails(evaluate.main, ["--model", tmp_path / "flat.pth", "--arch", "ir18", "--mean", "nan", *data], "--mean")
    fails(evaluate.main, ["--model", tmp_path / "flat.pth", "--keep-norm", *data], "without --templates")
    assert not (tmp_path / "out").exists()
