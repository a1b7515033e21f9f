"""The recogniser: InsightFace's IResNet, ArcFace against a slow twin, augmentation, resume to the bit."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SMALL_RECOGNIZER, succeed
from hypothesis import given
from hypothesis import strategies as st

import stage
import train_recognizer
import training
from train_recognizer import IResNet, arcface, augment, preprocess
from training import count_flops


def insightface_keys(depths):
    """The names in a public arcface_torch state dict, written down from its layout."""

    def bn(name):
        return [f"{name}.{k}" for k in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]

    keys = ["conv1.weight", *bn("bn1"), "prelu.weight"]
    for level, depth in enumerate(depths, 1):
        for i in range(depth):
            p = f"layer{level}.{i}"
            keys += [
                *bn(f"{p}.bn1"),
                f"{p}.conv1.weight",
                *bn(f"{p}.bn2"),
                f"{p}.prelu.weight",
                f"{p}.conv2.weight",
                *bn(f"{p}.bn3"),
            ]
            if i == 0:
                keys += [f"{p}.downsample.0.weight", *bn(f"{p}.downsample.1")]
    return set(keys + bn("bn2") + ["fc.weight", "fc.bias"] + bn("features"))


@pytest.mark.parametrize(
    "arch, depths, millions, billions",
    [
        ("ir18", (2, 2, 2, 2), 24.03, 2.61),
        ("ir34", (3, 4, 6, 3), 34.14, 4.46),
        ("ir50", (3, 4, 14, 3), 43.59, 6.31),
        ("ir101", (3, 13, 30, 3), 65.16, 12.09),
    ],
)
def test_real_architectures(arch, depths, millions, billions):
    with torch.device("meta"):  # shapes alone
        model, one = IResNet(arch, 112).eval(), torch.zeros(1, 3, 112, 112)
    state = model.state_dict()
    assert round(count_flops(model, one) / 2e9, 2) == billions  # multiply-adds, as the field counts
    assert set(state) == insightface_keys(depths)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions
    assert state["fc.weight"].shape == (512, 512 * 7 * 7) and state["conv1.weight"].shape == (64, 3, 3, 3)


def test_one_training_step_of_ir50_at_112():
    model = IResNet("ir50", 112)
    head = torch.randn(10, 512)
    x = preprocess(torch.randint(0, 256, (2, 3, 112, 112), dtype=torch.uint8), {"mean": 127.5, "std": 127.5})
    z = model(x)
    assert z.shape == (2, 512)
    cosine = torch.nn.functional.normalize(z) @ torch.nn.functional.normalize(head).T
    before = model.conv1.weight.detach().clone()
    torch.nn.functional.cross_entropy(arcface(cosine, torch.tensor([1, 7]), 64, 0.5), torch.tensor([1, 7])).backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()
    assert (model.conv1.weight - before).abs().max() > 0 and torch.isfinite(model.conv1.weight).all()


@pytest.mark.parametrize("size", [16, 48, 112])
def test_sizes(size):
    model = IResNet("small", size, channels=1).eval()
    assert model(torch.zeros(2, 1, size, size)).shape == (2, 128)


# ------------------------------------------------------------------------------------------------------------ ArcFace
def slow_arcface(cosine, y, s, m):
    rows = []
    for row, label in zip(cosine.tolist(), y.tolist()):
        theta = math.acos(max(-1 + 1e-6, min(1 - 1e-6, row[label])))
        target = math.cos(theta + m) if theta + m < math.pi else math.cos(theta) - m * math.sin(m)
        rows.append([s * (target if j == label else c) for j, c in enumerate(row)])
    return torch.tensor(rows)


@pytest.mark.parametrize("m", [0.0, 0.3, 0.5, 1.0])
def test_arcface_against_a_slow_twin(m):
    torch.manual_seed(0)
    cosine = torch.rand(50, 7) * 2 - 1
    y = torch.randint(0, 7, (50,))
    cosine[0, y[0]], cosine[1, y[1]], cosine[2, y[2]] = 1.0, -1.0, 0.0
    assert (arcface(cosine, y, 64.0, m) - slow_arcface(cosine, y, 64.0, m)).abs().max() < 1e-3


def test_arcface_has_the_gradient_of_its_formula():
    cosine = torch.tensor([[math.cos(1.0), 0.2]], requires_grad=True)
    arcface(cosine, torch.tensor([0]), 64.0, 0.5)[0, 0].backward()
    assert abs(cosine.grad[0, 0].item() - 64 * math.sin(1.5) / math.sin(1.0)) < 1e-2  # 75.9; InsightFace's form: 64.0
    assert cosine.grad[0, 1] == 0


def test_arcface_target_falls_with_the_angle_and_stays_finite():
    theta = torch.linspace(0, math.pi, 2001)
    cosine = torch.cos(theta)[:, None].requires_grad_()
    logits = arcface(cosine, torch.zeros(2001, dtype=torch.long), 64.0, 0.5)
    assert (logits.diff(dim=0)[2:-2] < 0).all()  # beyond pi - m, too
    logits.sum().backward()
    assert torch.isfinite(logits).all() and torch.isfinite(cosine.grad).all()


def test_arcface_is_float32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert arcface(torch.zeros(2, 3, dtype=torch.bfloat16), torch.tensor([0, 1]), 64.0, 0.5).dtype == torch.float32


# ------------------------------------------------------------------------------------------------------- augmentation
def test_augmentation_switched_off_is_the_identity_or_the_mirror(monkeypatch):
    for name in ("SHIFT", "ZOOM", "ROTATION", "LIGHT", "LOW_RESOLUTION"):
        monkeypatch.setattr(train_recognizer, name, 0.0)
    torch.manual_seed(0)
    x = torch.rand(40, 1, 16, 16) * 2 - 1
    assert (augment(x, flip=False) - x).abs().max() < 1e-5
    out = augment(x, flip=True)
    same = [(o - i).abs().max() < 1e-5 for o, i in zip(out, x)]
    mirrored = [(o - i.flip(2)).abs().max() < 1e-5 for o, i in zip(out, x)]
    assert all(a or b for a, b in zip(same, mirrored)) and 5 < sum(mirrored) < 35


def only(monkeypatch, name, value):
    for other in ("SHIFT", "ZOOM", "ROTATION", "LIGHT", "LOW_RESOLUTION"):
        monkeypatch.setattr(train_recognizer, other, value if other == name else 0.0)


def blob(cx, cy, width, size=33):
    """A Gaussian spot on dark ground at (cx, cy), in [-1, 1] coordinates; (64, 1, size, size)."""
    grid = (torch.arange(size) * 2 + 1) / size - 1
    return (2 * torch.exp(-((grid[None] - cx) ** 2 + (grid[:, None] - cy) ** 2) / width**2) - 1).repeat(64, 1, 1, 1)


def centre(x):
    """Centre of mass (n, 2) of light, in [-1, 1]."""
    grid, light = (torch.arange(x.shape[-1]) * 2 + 1) / x.shape[-1] - 1, (x[:, 0] + 1)
    return (
        torch.stack([(light * grid).sum((1, 2)), (light * grid[:, None]).sum((1, 2))], 1) / light.sum((1, 2))[:, None]
    )


def test_each_augmentation_does_what_its_name_says(monkeypatch):
    torch.manual_seed(0)
    only(monkeypatch, "SHIFT", 0.1)  # of the side: 0.2 in these coordinates
    moved = centre(augment(blob(0, 0, 0.2), flip=False))
    assert 0.15 < moved.abs().max() <= 0.21 and moved.min() < -0.1 and moved.max() > 0.1
    only(monkeypatch, "ROTATION", 30.0)
    turned = centre(augment(blob(0.5, 0, 0.15), flip=False))
    angle = torch.atan2(turned[:, 1], turned[:, 0]) * 180 / math.pi
    assert (turned.norm(dim=1) - 0.5).abs().max() < 0.02 and 25 < angle.max() <= 31 and -31 <= angle.min() < -25
    only(monkeypatch, "ZOOM", 0.2)
    radius = centre(augment(blob(0.5, 0, 0.1), flip=False))[:, 0]
    assert 0.5 / 1.2 - 0.02 < radius.min() < 0.44 and 0.58 < radius.max() < 0.5 / 0.8 + 0.02
    only(monkeypatch, "LIGHT", 0.3)
    x = torch.rand(64, 1, 8, 8) - 0.5
    out = augment(x, flip=False)
    assert (out.mean((1, 2, 3)) - x.mean((1, 2, 3))).abs().max() > 0.2
    contrast = out.std((1, 2, 3)) / x.std((1, 2, 3))
    assert 0.69 < contrast.min() < 0.8 and 1.2 < contrast.max() < 1.31
    only(monkeypatch, "LOW_RESOLUTION", 0.5)
    checks = (torch.arange(16) % 2 * 2.0 - 1).repeat(64, 1, 16, 1)
    flat = augment(checks, flip=False).std((1, 2, 3)) < 0.1
    assert 15 < flat.sum() < 49  # half of the images lose the pattern


def test_augmentation_keeps_range_and_side():
    torch.manual_seed(0)
    x = torch.rand(64, 3, 32, 32) * 2 - 1
    out = augment(x, flip=False)
    assert out.shape == x.shape and out.abs().max() <= 1 and (out - x).abs().mean() > 0.05
    ramp = torch.linspace(-1, 1, 32).repeat(64, 1, 32, 1)  # dark on the left; a mirror image would rise leftwards
    assert (augment(ramp, flip=False)[:, 0].diff(dim=-1).mean((1, 2)) > 0).all()


# ----------------------------------------------------------------------------------------------------------- training
def argv(faces, out, *more, data=None):
    return [
        str(a) for a in ("--data", *(data or [faces / "train"]), "--out", out, "--steps", 4, *SMALL_RECOGNIZER, *more)
    ]


def stop_before_step(monkeypatch, module, name, n):
    """Let a training end as by Ctrl-C at its n-th step; returns the function that undoes it."""
    original, calls = getattr(module, name), []

    def stops(*a, **kw):
        calls.append(1)
        if len(calls) == n:
            raise KeyboardInterrupt
        return original(*a, **kw)

    monkeypatch.setattr(module, name, stops)
    return lambda: monkeypatch.setattr(module, name, original)


def assert_equal(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for k in a:
            assert_equal(a[k], b[k])
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def test_resume_is_the_uninterrupted_run_to_the_bit(faces, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train_recognizer.main(argv(faces, whole, "--log-every", 1)) == 0
    undo = stop_before_step(monkeypatch, train_recognizer, "augment", 4)
    assert train_recognizer.main(argv(faces, parts, "--save-every", 2, "--log-every", 1)) == 130
    assert not (parts / "model.pt").exists() and torch.load(parts / "last.pt", weights_only=True)["step"] == 2
    undo()
    assert train_recognizer.main(argv(faces, parts, "--save-every", 2, "--log-every", 1)) == 0
    assert_equal(*(torch.load(p / "model.pt", weights_only=True) for p in (whole, parts)))
    assert (whole / "log.jsonl").read_text() == (parts / "log.jsonl").read_text()
    assert [json.loads(x)["step"] for x in (parts / "log.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    cost = json.loads((parts / "cost.json").read_text())
    assert cost["images"] == 5 * 8 and cost["flops"] > 0 and cost["seconds"] > 0  # one step was done twice


def test_a_finished_run_is_left_alone_and_another_is_refused(faces, tmp_path, fails):
    out = tmp_path / "run"
    assert train_recognizer.main(argv(faces, out, "--keep-every", 2)) == 0
    assert (out / "model-2.pt").exists() and (out / "model-4.pt").exists()
    before = (out / "model.pt").stat().st_mtime_ns
    assert (
        train_recognizer.main(argv(faces, out, "--log-every", 3, "--save-every", 1)) == 0
    )  # these do not change results
    assert (out / "model.pt").stat().st_mtime_ns == before
    fails(train_recognizer.main, argv(faces, out, "--lr", "0.01", "--seed", 1), out, "lr, seed")
    moved = tmp_path / "moved"
    shutil.copytree(faces / "train", moved)
    assert train_recognizer.main(argv(faces, out, data=[moved])) == 0  # an equal folder elsewhere is the same input
    (moved / "s11" / "1.png").unlink()
    fails(train_recognizer.main, argv(faces, out, data=[moved]), "data")


@given(st.lists(st.integers(1, 9), min_size=2, max_size=8), st.integers(1, 40), st.integers(0, 99))
def test_balanced_batches_draw_every_class_equally_often_and_every_image(counts, batch, seed):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    steps = [training.balanced_indices(i, labels, batch, seed) for i in range(600 // batch + 20)]
    assert all(len(s) == batch for s in steps)
    drawn = torch.cat(steps)
    assert drawn.min() >= 0 and drawn.max() < len(labels)
    per_class = labels[drawn].bincount(minlength=len(counts))
    assert per_class.max() - per_class.min() <= 1
    for label, n in enumerate(counts):
        if n < 4:  # drawn about 75 times or more
            assert len(set(drawn[labels[drawn] == label].tolist())) == n
    assert torch.equal(steps[3], training.balanced_indices(3, labels, batch, seed))
    assert not torch.equal(torch.cat(steps[:9]), torch.cat(steps[1:10]))


def test_balance_and_mixup_reach_the_training(faces, tmp_path, monkeypatch):
    seen = []
    original = train_recognizer.arcface
    monkeypatch.setattr(train_recognizer, "arcface", lambda c, y, s, m: seen.append(y.tolist()) or original(c, y, s, m))
    flags = ["--data", faces / "train", "--steps", 3, *SMALL_RECOGNIZER, "--batch", 10]
    for name, more, calls in (("plain", [], 3), ("balance", ["--balance"], 3), ("mixup", ["--mixup", "0.4"], 6)):
        seen.clear()
        succeed(train_recognizer, "--out", tmp_path / name, *flags, *more)
        assert len(seen) == calls
        if name == "balance":
            assert all(sorted(y) == sorted([0, 1, 2, 3, 4] * 2) for y in seen)
        if name == "mixup":  # each batch once with its labels and once with those of the images blended in
            assert all(sorted(a) == sorted(b) for a, b in zip(seen[::2], seen[1::2])) and seen[0] != seen[1]
    losses = [json.loads((tmp_path / n / "log.jsonl").read_text().splitlines()[-1])["loss"] for n in ("plain", "mixup")]
    assert losses[0] != losses[1] and all(map(math.isfinite, losses))


def test_mixup_is_the_blend_of_images_and_of_losses(faces, tmp_path, monkeypatch):
    """One step, with a weight of 0.3 drawn: the network sees the blend, and the loss is blended alike."""
    inputs, losses = [], []
    monkeypatch.setattr(torch.distributions.Beta, "sample", lambda self: torch.tensor(0.3))
    forward, entropy = train_recognizer.IResNet.forward, torch.nn.functional.cross_entropy
    monkeypatch.setattr(train_recognizer.IResNet, "forward", lambda m, x: inputs.append(x) or forward(m, x))
    monkeypatch.setattr(train_recognizer.F, "cross_entropy", lambda *a: losses.append(entropy(*a)) or losses[-1])
    kept = []
    augment = train_recognizer.augment
    monkeypatch.setattr(train_recognizer, "augment", lambda *a: kept.append(augment(*a)) or kept[-1])
    orders = []
    permute = torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *a, **k: orders.append(permute(*a, **k)) or orders[-1])
    flags = ["--data", faces / "train", "--steps", 1, "--mixup", 1, *SMALL_RECOGNIZER]
    succeed(train_recognizer, "--out", tmp_path / "run", *flags)
    x, blend = kept[-1], inputs[-1]
    other = next(o for o in orders if len(o) == len(x) and (0.7 * x + 0.3 * x[o] - blend).abs().max() < 1e-6)
    assert (other != torch.arange(len(x))).any()
    logged = json.loads((tmp_path / "run/log.jsonl").read_text())["loss"]
    assert logged == pytest.approx((0.7 * losses[0] + 0.3 * losses[1]).item(), rel=1e-5)


def test_init_takes_the_backbone_and_the_rows_of_shared_classes(faces, tmp_path):
    first, second, more = tmp_path / "first", tmp_path / "second", tmp_path / "more"
    assert train_recognizer.main(argv(faces, first)) == 0
    shutil.copytree(faces / "train" / "s12", more / "a-new-class")
    shutil.copytree(faces / "train" / "s13", more / "s13")
    argv2 = argv(faces, second, "--init", first, "--lr", "0", data=[faces / "train", more])
    assert train_recognizer.main(argv2) == 0
    old, new = (torch.load(p / "model.pt", weights_only=True) for p in (first, second))
    assert new["classes"] == sorted([*old["classes"], "a-new-class"])  # s13 of both folders is one class
    assert all(torch.equal(v, new["weights"][k]) for k, v in old["weights"].items() if k.endswith("conv1.weight"))
    for i, name in enumerate(old["classes"]):
        assert torch.equal(old["head"][i], new["head"][new["classes"].index(name)])
    derived = json.loads((second / "config.json").read_text())["derived"]
    assert derived["images"] == 5 * 6 + 12 and derived["head_rows_taken_over"] == 5


def test_init_of_another_architecture_is_refused(faces, tmp_path, fails):
    assert train_recognizer.main(argv(faces, tmp_path / "a")) == 0
    fails(
        train_recognizer.main, argv(faces, tmp_path / "b", "--init", tmp_path / "a", "--size", 32), "--init", "size 16"
    )
    assert not (tmp_path / "b").exists()


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(faces, tmp_path, fails, monkeypatch):
    out, original = tmp_path / "run", train_recognizer.arcface

    def breaks(cosine, *a):
        calls.append(1)
        return original(cosine, *a) * (math.nan if len(calls) > 3 else 1)

    monkeypatch.setattr(train_recognizer, "arcface", breaks)
    calls = []
    fails(train_recognizer.main, argv(faces, out, "--save-every", 2), "not finite by step 4", "last.pt")
    last = torch.load(out / "last.pt", weights_only=True)
    assert last["step"] == 2 and all(v.isfinite().all() for v in last["model"].values())
    assert not (out / "model.pt").exists()


@pytest.mark.parametrize("steps", [1, 4])
def test_an_update_that_blows_up_is_never_saved(faces, tmp_path, fails, steps):
    out = tmp_path / "run"
    fails(
        train_recognizer.main,
        argv(faces, out, "--steps", steps, "--save-every", 1, "--lr", "1e38"),
        "not finite",
        "--lr",
    )
    assert not (out / "last.pt").exists() and not (out / "model.pt").exists()
    assert (
        train_recognizer.main(argv(faces, out, "--steps", steps)) == 0
    )  # nothing was made yet, so a mended command may


def test_a_damaged_checkpoint_is_one_line(faces, tmp_path, fails, monkeypatch):
    out = tmp_path / "run"
    undo = stop_before_step(monkeypatch, train_recognizer, "augment", 3)
    assert train_recognizer.main(argv(faces, out, "--save-every", 1)) == 130
    undo()
    (out / "last.pt").write_bytes((out / "last.pt").read_bytes()[:-100])
    fails(train_recognizer.main, argv(faces, out, "--save-every", 1), "last.pt", "truncated")


def test_size_decides_the_architecture(faces, tmp_path):
    assert train_recognizer.parse_args(["--data", "x", "--out", "y"]).arch == "ir50"
    small = train_recognizer.parse_args(["--data", "x", "--out", "y", "--size", "32"])
    assert small.arch == "small" and small.scale == train_recognizer.SMALL["scale"]


def test_it_learns(faces, tmp_path):
    out = tmp_path / "run"
    assert train_recognizer.main(argv(faces, out, "--steps", 60, "--batch", 16, "--margin", 0.1)) == 0
    log = [json.loads(x) for x in (out / "log.jsonl").read_text().splitlines()]
    model, saved = train_recognizer.load_recognizer(out, "cpu")
    images = stage.Images([faces / "train"], 16, 1)
    z = train_recognizer.embed(model, images, saved["config"], torch.device("cpu"), batch=7)
    assert (z.norm(dim=1) - 1).abs().max() < 1e-5
    head = torch.nn.functional.normalize(saved["head"])
    assert ((z @ head.T).argmax(1) == images.labels).float().mean() > 0.9, log[-1]


def test_images_are_read_ahead_by_one_thread_beside_the_networks(faces, tmp_path, monkeypatch):
    """OpenMP gives every thread of Python its own team; two teams wait for one another's cores."""
    seen, before = {}, torch.get_num_threads()

    def spy(module, name):
        original = getattr(module, name)

        def wrapped(*args, **kwargs):
            seen.setdefault(name, set()).add(torch.get_num_threads())
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, wrapped)

    spy(training, "batch_indices")
    spy(train_recognizer, "arcface")
    torch.set_num_threads(3)
    try:
        succeed(train_recognizer, "--data", faces / "train", "--out", tmp_path / "r", "--steps", 3, *SMALL_RECOGNIZER)
        assert seen == {"batch_indices": {1}, "arcface": {3}} and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_bf16_is_near_fp32_and_not_the_same(faces, tmp_path):
    for precision in ("fp32", "bf16"):
        assert train_recognizer.main(argv(faces, tmp_path / precision, "--precision", precision, "--log-every", 1)) == 0
    fp32, bf16 = (
        json.loads((tmp_path / p / "log.jsonl").read_text().splitlines()[0])["loss"] for p in ("fp32", "bf16")
    )
    assert 0 < abs(fp32 - bf16) < 0.05 * fp32


def test_a_killed_training_goes_on_to_the_same_weights(faces, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    steps = ("--steps", 40, "--save-every", 1)
    assert train_recognizer.main(argv(faces, whole, *steps)) == 0
    command = [sys.executable, str(ROOT / "train_recognizer.py"), *argv(faces, killed, *steps)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not (killed / "last.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (killed / "last.pt").exists() and not (killed / "model.pt").exists(), "it ended before it was killed"
    assert train_recognizer.main(argv(faces, killed, *steps)) == 0
    assert_equal(*(torch.load(p / "model.pt", weights_only=True) for p in (whole, killed)))


def test_two_processes_do_not_share_a_directory(faces, tmp_path, fails, monkeypatch):
    out = tmp_path / "run"
    undo = stop_before_step(monkeypatch, train_recognizer, "augment", 2)
    assert train_recognizer.main(argv(faces, out)) == 130
    undo()
    held = open(out / ".lock", "w")
    stage.fcntl.flock(held, stage.fcntl.LOCK_EX | stage.fcntl.LOCK_NB)  # as another process would hold it
    fails(train_recognizer.main, argv(faces, out), "another process")
    held.close()
    assert train_recognizer.main(argv(faces, out)) == 0
