"""The generator: schedule, network, loss, training that resumes to the bit, and the paper's scale."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL_RECOGNIZER, SMALL_UNET, succeed
from PIL import Image
from test_recognizer import assert_equal, stop_before_step

import mine_pairs
import sample_scoremix
import stage
import train_diffusion
import train_recognizer
import training
from train_diffusion import LARGE, Schedule, UNet, diffusion_loss, draw_times_and_noise, to_x0, update_ema


def test_schedule():
    schedule = Schedule()
    abar = schedule.abar
    sigma = np.sqrt((1 - abar) / abar)
    assert abar.dtype == np.float64 and (np.diff(abar) < 0).all() and 0 < abar[-1] and abar[0] < 1
    assert 0.005 < sigma[0] < 0.007 and 15_000 < sigma[-1] < 25_000
    for t in (0, 500, 999):
        a, s = schedule.coefficients(t)
        assert abs(a * a + s * s - 1) < 1e-12 and abs(a * a - abar[t]) < 1e-12
    assert schedule.coefficients(-1) == (1.0, 0.0)
    expected = np.cos((500 / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    assert abs(abar[499] - expected) < 1e-9  # Nichol & Dhariwal 2021, Eq. 17, after 500 steps


@pytest.mark.parametrize(
    "kw, size",
    [
        (dict(width=8, multipliers=[1, 2], blocks=1, attention=[1], patch=2), 16),
        (dict(width=16, multipliers=[1], blocks=2, attention=[], patch=1), 8),
        (dict(width=8, multipliers=[1, 2, 3], blocks=2, attention=[0, 2], patch=1), 8),
        (dict(width=32, multipliers=[1, 2, 2], blocks=1, attention=[2], patch=4), 32),
    ],
)
def test_network_shapes(kw, size):
    model = UNet(5, 3, **kw)
    x = torch.randn(2, 3, size, size)
    out = model(x, torch.tensor([0, 999]), torch.tensor([0, 5]))  # 5 is the null class
    assert out.shape == x.shape and (out == 0).all()  # the last layer starts at zero
    with pytest.raises(IndexError):
        model(x, torch.tensor([0, 999]), torch.tensor([0, 6]))
    for p in model.parameters():
        torch.nn.init.normal_(p, 0, 0.2)
    base = model(x, torch.tensor([10, 10]), torch.tensor([0, 0]))
    assert not torch.allclose(base, model(x, torch.tensor([10, 10]), torch.tensor([1, 5])))
    assert not torch.allclose(base, model(x, torch.tensor([500, 500]), torch.tensor([0, 0])))


def loss_at_random_times(model, x0, y, schedule, predict):
    return diffusion_loss(model, x0, y, *draw_times_and_noise(x0, schedule), schedule, predict)


def test_every_parameter_is_trained():
    model = UNet(2, 1, 8, [1, 2], 1, [0, 1], 2)
    for p in model.parameters():
        torch.nn.init.normal_(p, 0, 0.2)
    loss_at_random_times(model, torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 2]), Schedule(), "v").backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


@pytest.mark.parametrize("classes, dimensions", [(30, 32), (100, 100), (600, 512)])
def test_the_embedding_has_room_for_the_classes(classes, dimensions):
    model = UNet(classes, 1, 8, [1, 2], 1, [1], 2)
    assert model.label.weight.shape == (classes + 1, dimensions)
    assert model(torch.randn(2, 1, 8, 8), torch.tensor([0, 999]), torch.tensor([0, classes])).shape == (2, 1, 8, 8)


@pytest.mark.parametrize("predict", ["v", "eps", "x0"])
def test_the_loss_vanishes_for_the_perfect_prediction_alone(predict):
    schedule, x0 = Schedule(), torch.randn(64, 1, 4, 4).clamp(-1, 1)
    seen = []

    def perfect(x_t, t, y, off=0.0):
        a, s = (
            torch.from_numpy(np.sqrt(v)).float()[t][:, None, None, None] for v in (schedule.abar, 1 - schedule.abar)
        )
        eps = (x_t - a * x0) / s
        out = {"v": a * eps - s * x0, "eps": eps, "x0": x0}[predict]
        assert (to_x0(predict, out, x_t, a, s) - x0)[a.flatten() > 0.01].abs().max() < 1e-3
        seen.extend(t.tolist())
        if predict == "x0":
            off = off * s.clamp(min=train_diffusion.MIN_S)  # as an error of v
        return out + off

    y = torch.zeros(64, dtype=torch.long)
    assert loss_at_random_times(perfect, x0, y, schedule, predict) < 1e-6
    off = loss_at_random_times(lambda *a: perfect(*a, off=0.5), x0, y, schedule, predict)
    assert abs(off - 0.25) < 1e-3
    assert min(seen) < 40 and max(seen) > 960 and max(seen) < 1000  # the whole range of times


def test_ema():
    torch.manual_seed(0)
    model, ema = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    expected = 0.9 * ema.weight.detach() + 0.1 * model.weight.detach()
    update_ema(ema, model, 0.9, step=10_000)
    assert (ema.weight - expected).abs().max() < 1e-6
    update_ema(ema, model, 0.9999, step=0)  # the first update: decay 1/10
    assert (ema.weight - (0.1 * expected + 0.9 * model.weight)).abs().max() < 1e-6


def argv(faces, out, *more):
    return [str(a) for a in ("--data", faces / "train", "--out", out, "--steps", 4, *SMALL_UNET, *more)]


def test_micro_batches_add_up_to_the_step_of_the_whole_batch(faces, tmp_path, monkeypatch):
    seen, loss_of = [], train_diffusion.diffusion_loss
    monkeypatch.setattr(train_diffusion, "diffusion_loss", lambda *a: seen.append(len(a[1])) or loss_of(*a))
    runs = {}
    for name, more in (("whole", []), ("parts", ["--micro-batch", "3"])):
        more = [*more, "--batch", 8, "--dropout", 0, "--lr", 1e-4, "--log-every", 1]
        assert train_diffusion.main(argv(faces, tmp_path / name, *more)) == 0
        log = [json.loads(line)["loss"] for line in open(tmp_path / name / "log.jsonl")]
        runs[name] = log, torch.load(tmp_path / name / "model.pt", weights_only=True)["weights"]
    assert seen == [8] * 4 + [3, 3, 2] * 4
    assert runs["parts"][0] == pytest.approx(runs["whole"][0], rel=1e-5)
    assert max((runs["parts"][1][k] - v).abs().max() for k, v in runs["whole"][1].items()) < 1e-6


def test_resume_is_the_uninterrupted_run_to_the_bit(faces, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = ("--dropout", 0.2, "--grid-every", 2)
    assert train_diffusion.main(argv(faces, whole, *more)) == 0
    undo = stop_before_step(monkeypatch, train_diffusion, "diffusion_loss", 4)
    assert train_diffusion.main(argv(faces, parts, "--save-every", 2, *more)) == 130
    assert torch.load(parts / "last.pt", weights_only=True)["step"] == 2
    undo()
    assert train_diffusion.main(argv(faces, parts, "--save-every", 2, *more)) == 0
    assert_equal(*(torch.load(p / "model.pt", weights_only=True) for p in (whole, parts)))
    assert (whole / "samples-4.png").read_bytes() == (parts / "samples-4.png").read_bytes()
    grid = Image.open(whole / "samples-4.png")
    assert grid.size == (5 * 96, 4 * 96)  # five classes; real above, three rows reproduced below


def test_the_model_file_says_all_that_later_stages_need(faces, tmp_path):
    assert train_diffusion.main(argv(faces, tmp_path / "run", "--no-flip", "--predict", "eps")) == 0
    model, saved = train_diffusion.load_generator(tmp_path / "run", "cpu")
    assert saved["classes"] == ["s11", "s12", "s13", "s14", "s15"] and model.num_classes == 5
    assert saved["config"]["predict"] == "eps" and saved["config"]["flip"] is False and saved["config"]["channels"] == 1
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["derived"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert json.loads((tmp_path / "run/cost.json").read_text())["network_evaluations"] == 4 * 8


@pytest.mark.parametrize(
    "more, words",
    [
        (["--size", 20, "--multipliers", 1, 2, 2], ["--size 20", "multiple of 8"]),
        (["--width", 12], ["--width"]),
        (["--attention", 2], ["--attention"]),
        (["--steps", 0], ["--steps"]),
        (["--lr", "nan"], ["--lr"]),
        (["--batch", "x"], ["--batch"]),
    ],
)
def test_bad_flags(faces, tmp_path, fails, more, words):
    fails(train_diffusion.main, argv(faces, tmp_path / "run", *more), *words)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def recognizer(faces, tmp_path_factory):
    out = tmp_path_factory.mktemp("recognizer") / "run"
    succeed(train_recognizer, "--data", faces / "train", "--out", out, "--steps", 5, *SMALL_RECOGNIZER)
    return out


def test_the_loss_of_x0_is_that_of_the_v_it_stands_for():
    """One denoiser, asked for v and for x0: the same loss, but for times at which s is below MIN_S."""
    schedule, x0, y = Schedule(), torch.randn(256, 1, 4, 4).clamp(-1, 1), torch.zeros(256, dtype=torch.long)
    losses = []
    for predict in ("v", "x0"):

        def half(x_t, t, y):
            a, s = schedule.at(t)
            clean = x_t * 0.5
            return (a * x_t - clean) / s if predict == "v" else clean

        torch.manual_seed(0)
        schedule.at = lambda t: Schedule.at(schedule, t.clamp(min=40))  # s > MIN_S from here on
        losses.append(loss_at_random_times(half, x0, y, schedule, predict))
    assert losses[0] > 0.1 and abs(losses[0] / losses[1] - 1) < 1e-4


@pytest.mark.parametrize(
    "patch, predict, words",
    [(2, "v", ""), (4, "x0", ""), (4, "v", "a patch of 16 values is more than 8 channels can carry")],
)
def test_a_patch_that_the_channels_cannot_carry_is_told(faces, tmp_path, capsys, patch, predict, words):
    flags = ["--patch", patch, "--predict", predict, "--steps", 1, "--out", tmp_path]
    succeed(train_diffusion, "--data", faces / "train", *SMALL_UNET, *flags)
    error = capsys.readouterr().err
    assert ("warning" in error) == bool(words) and words in error
    assert not words or ("--width 16" in error and "--predict x0" in error)


def test_frozen_conditions_are_the_recognisers_centres(faces, recognizer, tmp_path):
    flags = ["--conditions", "frozen", "--recognizer", recognizer]
    succeed(train_diffusion, *argv(faces, tmp_path / "run", *flags))
    model, saved = train_diffusion.load_generator(tmp_path / "run", "cpu")
    f, of_f = train_recognizer.load_recognizer(recognizer, "cpu")
    images = stage.Images([faces / "train"], 16, 1)
    z = train_recognizer.embed(f, images, of_f["config"], "cpu")
    for i in range(5):
        mean = z[images.labels == i].mean(0)
        centre = mean / mean.norm() * 128**0.5
        assert (model.label.weight[i] - centre).abs().max() < 1e-4  # after training as before
    assert (model.label.weight[5] == 0).all() and saved["config"]["frozen_dim"] == 128
    moved = [n for n, p in model.named_parameters() if n.startswith("project") and p.abs().max() > 0]
    assert len(moved) == 2
    (tmp_path / "pairs.csv").write_text("class_1,class_2\ns11,s12\n")
    for mix in ("score", "condition"):  # the later stages meet such a generator as any other
        sampled = ["--generator", tmp_path / "run", "--pairs", tmp_path / "pairs.csv", "--steps", 2, "--mix", mix]
        succeed(sample_scoremix, *sampled, "--out", tmp_path / mix)
    space = ["--space", "condition", "--generator", tmp_path / "run", "--out", tmp_path / "near.csv"]
    succeed(mine_pairs, *space, "--count", 10)
    real = ["--recognizer", recognizer, "--data", faces / "train", "--out", tmp_path / "real.csv"]
    succeed(mine_pairs, *real, "--count", 10)
    near, far = ((tmp_path / n).read_text().splitlines()[1:] for n in ("near.csv", "real.csv"))
    assert [r.rsplit(",", 1)[0] for r in near] == [r.rsplit(",", 1)[0] for r in far]  # the two spaces are one
    assert [float(r.rsplit(",", 1)[1]) for r in near] == pytest.approx(
        [float(r.rsplit(",", 1)[1]) for r in far], abs=1e-5
    )


def test_alignment_loss_against_its_formula_and_its_gradient(recognizer):
    f, saved = train_recognizer.load_recognizer(recognizer, "cpu")
    torch.manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(5, 128))
    x0, y, a = torch.rand(4, 1, 16, 16) * 2 - 1, torch.tensor([2, 5, 0, 4]), torch.rand(4, 1, 1, 1)
    x0.requires_grad_()
    loss = train_diffusion.alignment_loss(f, saved["config"], centres, 3.0)(x0, y, a)
    terms = []
    for i, c in ((0, 2), (2, 0), (3, 4)):  # the second image has no class
        z = f(x0[i : i + 1].detach())[0]
        terms.append(float(a[i]) ** 2 * (1 - float(z @ centres[c] / z.norm())))
    assert loss.item() == pytest.approx(3.0 * sum(terms) / 4, rel=1e-5)
    loss.backward()
    assert x0.grad[1].abs().max() == 0 and all(x0.grad[i].abs().max() > 0 for i in (0, 2, 3))
    with torch.no_grad():  # a small step against the gradient brings the images nearer to their centres
        better = train_diffusion.alignment_loss(f, saved["config"], centres, 3.0)(x0 - 1e-3 * x0.grad, y, a)
    assert better < loss


def test_alignment_joins_the_training(faces, recognizer, tmp_path):
    losses = []
    for w in (0, 5):
        more = ["--align", w, "--recognizer", recognizer] if w else []
        succeed(train_diffusion, *argv(faces, tmp_path / str(w), *more))
        losses.append(json.loads((tmp_path / str(w) / "log.jsonl").read_text().splitlines()[0])["loss"])
    assert losses[1] > losses[0]  # the same first step, and what alignment adds to it


def test_recognisers_that_do_not_fit_the_generator(faces, recognizer, tmp_path, fails):
    out = tmp_path / "out"
    fails(train_diffusion.main, argv(faces, out, "--conditions", "frozen"), "--recognizer")
    fails(train_diffusion.main, argv(faces, out, "--recognizer", recognizer), "--conditions frozen or --align")
    small = argv(faces, out, "--align", 1, "--recognizer", recognizer, "--size", 32)
    fails(train_diffusion.main, small, "size 16", "32 here")
    assert not out.exists()


def test_a_loss_that_is_not_finite_ends_the_run(faces, tmp_path, fails):
    fails(train_diffusion.main, argv(faces, tmp_path / "run", "--lr", "1e30", "--save-every", 1), "not finite", "--lr")
    assert not (tmp_path / "run/model.pt").exists() and not (tmp_path / "run/last.pt").exists()


def test_attention_heads_divide_any_width():
    assert [train_diffusion.Attention(c).heads for c in (8, 64, 128, 192, 200, 320)] == [1, 1, 2, 3, 2, 5]


def test_it_learns_what_classes_look_like(tmp_path):
    """Two classes of flat images: after a few hundred steps each is reproduced, and the even mix lies between."""
    for name, value in (("dark", 64), ("light", 192)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(np.full((8, 8), value + i, np.uint8)).save(tmp_path / "data" / name / f"{i}.png")
    out = tmp_path / "run"
    args = [
        "--size",
        8,
        "--width",
        16,
        "--multipliers",
        1,
        "--attention",
        "--patch",
        2,
        "--blocks",
        1,
        "--batch",
        32,
        "--steps",
        400,
        "--dropout",
        0,
        "--ema",
        0.98,
        "--lr",
        3e-3,
    ]
    assert train_diffusion.main([str(a) for a in ("--data", tmp_path / "data", "--out", out, *args)]) == 0
    means = {}
    for text in ("class_1\ndark\nlight\n", "class_1,class_2\ndark,light\n"):
        (tmp_path / "pairs.csv").write_text(text)
        mixed = tmp_path / f"mixed{len(means)}"
        assert (
            sample_scoremix.main(["--generator", str(out), "--pairs", str(tmp_path / "pairs.csv"), "--out", str(mixed)])
            == 0
        )
        means |= {
            d.name: np.mean([np.asarray(Image.open(p)) for p in d.iterdir()]) for d in mixed.iterdir() if d.is_dir()
        }
    assert (
        abs(means["dark"] - 65.5) < 12 and abs(means["light"] - 193.5) < 12 and abs(means["dark+light"] - 129.5) < 25
    ), means


def test_the_papers_scale_counts_276_billion_multiply_adds():
    with torch.device("meta"):  # shapes alone
        model = UNet(10_000, 3, **{k: LARGE[k] for k in ("width", "multipliers", "blocks", "attention", "patch")})
        inputs = torch.zeros(1, 3, 112, 112), torch.zeros(1), torch.zeros(1, dtype=torch.long)
    assert round(training.count_flops(model, *inputs) / 2e9) == 276


def test_what_an_image_keeps_for_the_way_back_at_112():
    """The README's figure of the memory of a training step, counted on shapes alone."""
    with torch.device("meta"):
        shape = {k: LARGE[k] for k in ("width", "multipliers", "blocks", "attention", "patch", "dropout")}
        model = UNet(10, 3, **shape)
        inputs = torch.zeros(2, 3, 112, 112), torch.zeros(2), torch.zeros(2, dtype=torch.long)
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = {}

    def keep(v):
        kept[v.untyped_storage()._cdata] = v
        return v

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda v: v):
        model(*inputs)
    gigabytes = sum(v.untyped_storage().nbytes() for k, v in kept.items() if k not in weights) / 2 / 1e9
    assert round(gigabytes, 1) == 1.5
    assert f"{gigabytes:.1f} GB an image" in " ".join((ROOT / "README.md").read_text().split())


def test_the_papers_scale_trains_and_samples_at_112():
    """One training step and one sampling step of the default network at 112x112, batch 1, on the CPU."""
    model = UNet(
        10_000, 3, **{k: LARGE[k] for k in ("width", "multipliers", "blocks", "attention", "patch")}, dropout=0.1
    )
    assert 275e6 < sum(p.numel() for p in model.parameters()) < 285e6
    schedule, x0 = Schedule(), torch.rand(1, 3, 112, 112) * 2 - 1
    loss = loss_at_random_times(model, x0, torch.tensor([3]), schedule, "v")
    loss.backward()
    before = model.conv_out.weight.detach().clone()
    torch.optim.SGD(model.parameters(), 1e-3).step()
    assert torch.isfinite(loss) and (model.conv_out.weight - before).abs().max() > 0
    denoise = sample_scoremix.mixed_denoiser(model.eval(), schedule, "v", torch.tensor([[3, 7]]), [0.5, 0.5])
    x = sample_scoremix.sample(denoise, torch.randn(1, 3, 112, 112), schedule, "ddim", steps=1)
    assert x.shape == (1, 3, 112, 112) and x.abs().max() <= 1
