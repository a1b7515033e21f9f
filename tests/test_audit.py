"""The audit: its figures against slow twins, and planted copies that it must find."""

import csv
import itertools
import json
import shutil

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import SMALL_RECOGNIZER, SMALL_UNET, succeed
from PIL import Image

import audit
import mine_pairs
import sample_scoremix
import stage
import train_diffusion
import train_recognizer


def unit(rng, *shape):
    z = rng.normal(size=shape)
    return z / np.linalg.norm(z, axis=-1, keepdims=True)


def test_frechet_distance_against_the_matrix_square_root():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(60, 5)), rng.normal(size=(50, 5)) @ rng.normal(size=(5, 5)) + 1
    A, B = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(A @ B).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(A + B - 2 * root)
    assert audit.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert audit.frechet_distance(a, a + 2) == pytest.approx(4 * 5, rel=1e-6)  # a shift alone, of 2 in 5 dimensions
    few = rng.normal(size=(4, 20))  # fewer samples than dimensions: singular covariances
    assert audit.frechet_distance(few, few) == pytest.approx(0, abs=1e-6)


def test_consistency_against_all_pairs():
    rng = np.random.default_rng(1)
    z, labels = unit(rng, 12, 4), np.array([0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 0, 2])
    means = []
    for label in range(4):
        rows = z[labels == label]
        means.append(np.mean([x @ y for x, y in itertools.combinations(rows, 2)]))
    assert audit.consistency(z, labels) == pytest.approx(np.mean(means), abs=1e-12)
    lone = np.append(labels, 4), np.concatenate([z, unit(rng, 1, 4)])
    assert audit.consistency(lone[1], lone[0]) == pytest.approx(np.mean(means), abs=1e-12)  # no pair, no say
    assert np.isnan(audit.consistency(z[:2], np.array([0, 1])))


def test_the_loss_on_mixes_against_a_loop():
    rng = np.random.default_rng(2)
    z, centres, sources = unit(rng, 7, 3), unit(rng, 4, 3), np.array([[0, 1], [2, 3], [1, 0], [3, 0]] + [[1, 2]] * 3)
    expected = 0.0
    for row, (a, b) in zip(z, sources):
        p = np.exp(32 * centres @ row)
        p /= p.sum()
        expected -= (np.log(p[a]) + np.log(p[b])) / 2 / 7
    tensors = [torch.from_numpy(v) for v in (z, centres)]
    assert audit.source_loss(tensors[0], sources, tensors[1], block=3) == pytest.approx(expected, rel=1e-9)
    midway = torch.eye(2)[[0, 0]] + torch.eye(2)[[1, 1]]
    best = audit.source_loss(midway / 2**0.5, np.array([[0, 1], [1, 0]]), torch.eye(2))
    assert best == pytest.approx(np.log(2), abs=1e-6)


def test_variance_between_classes_against_loops_and_a_known_share():
    rng = np.random.default_rng(3)
    x, labels = rng.normal(size=(12, 3)), np.array([5, 5, 5, 1, 1, 2, 3, 3, 3, 3, 5, 2])
    groups = [x[labels == label] for label in (1, 2, 3, 5)]
    within = sum(((row - g.mean(0)) ** 2).sum() for g in groups for row in g) / (12 - 4)
    between = sum(len(g) * ((g.mean(0) - x.mean(0)) ** 2).sum() for g in groups) / (4 - 1)
    size = (12 - sum(len(g) ** 2 for g in groups) / 12) / (4 - 1)
    expected = (between - within) / (between + (size - 1) * within)
    assert audit.between_classes(x, labels) == pytest.approx(expected, abs=1e-12)
    labels = np.repeat(np.arange(2000), 5)  # of variance 1 between classes and 3 within
    x = rng.normal(size=(2000, 1))[labels] + 3**0.5 * rng.normal(size=(len(labels), 1))
    assert audit.between_classes(x, labels) == pytest.approx(0.25, abs=0.02)
    assert audit.between_classes(x[labels], labels) == pytest.approx(1)  # the images of a class are equal
    for few in (labels[:5], np.arange(5)):
        assert np.isnan(audit.between_classes(x[:5], few))


def test_nearest_and_classmates_against_loops():
    torch.manual_seed(0)
    x, mirrored, labels = torch.randn(9, 6), torch.randn(9, 6), torch.tensor([0, 0, 1, 1, 1, 2, 0, 1, 0])
    distance, index = audit.nearest(mirrored, x, block=4)
    for i, q in enumerate(mirrored):
        each = [(q - r).norm().item() for r in x]
        assert index[i] == np.argmin(each) and distance[i].item() == pytest.approx(min(each), abs=1e-5)
    mates = audit.nearest_classmate(x, labels, mirrored)
    for i in range(9):
        others = [j for j in range(9) if j != i and labels[j] == labels[i]]
        each = [(x[i] - y[j]).norm().item() for j in others for y in (x, mirrored)]
        assert mates[i].item() == pytest.approx(min(each), abs=1e-5) if each else mates[i] == torch.inf
    assert mates[5] == torch.inf  # alone in its class


@pytest.fixture(scope="module")
def chain(faces, tmp_path_factory):
    """A recogniser of a few steps, and a mixed folder made by hand: `copy` holds training images, `flat` holds grey."""
    out = tmp_path_factory.mktemp("audit")
    succeed(train_recognizer, "--data", faces / "train", "--out", out / "real", "--steps", 20, *SMALL_RECOGNIZER)
    mixed = out / "mixed"
    rows = []
    for name, sources in (("s11+s12", ["s11", "s12"]), ("s13+s14", ["s13", "s14"])):
        (mixed / name).mkdir(parents=True)
        for i in range(4):
            image = Image.open(faces / f"train/{sources[0]}/{i + 1}.png")
            image = image.transpose(Image.FLIP_LEFT_RIGHT) if name == "s11+s12" else Image.new("L", (16, 16), 120 + i)
            image.save(mixed / name / f"{i}.png")
            rows.append([f"{name}/{i}.png", *sources, 0.5, 0.5, 0])
    with open(mixed / "manifest.csv", "w", newline="") as file:
        csv.writer(file).writerows([["path", "class_1", "class_2", "weight_1", "weight_2", "seed"], *rows])
    return out


def arguments(chain, faces, out):
    return ["--recognizer", chain / "real", "--data", faces / "train", "--mixed", chain / "mixed", "--out", out]


def test_what_one_image_a_class_cannot_say_is_null_and_the_file_is_json(chain, faces, tmp_path):
    mixed = tmp_path / "single"
    shutil.copytree(chain / "mixed", mixed)
    for path in mixed.glob("*/[1-9].png"):
        path.unlink()
    rows = list(csv.reader(open(mixed / "manifest.csv", newline="")))
    with open(mixed / "manifest.csv", "w", newline="") as file:
        csv.writer(file).writerows(r for r in rows if r[0] == "path" or r[0].endswith("/0.png"))
    argv = arguments(chain, faces, tmp_path / "audit")
    argv[argv.index("--mixed") + 1] = mixed
    succeed(audit, *argv)
    text = (tmp_path / "audit/audit.json").read_text()
    figures = json.loads(text)
    assert "NaN" not in text and figures["consistency"]["mixed"] is None and figures["consistency"]["real"] > 0


def test_planted_copies_are_found_and_shown(chain, faces, tmp_path, capsys):
    out = tmp_path / "audit"
    succeed(audit, *arguments(chain, faces, out))
    figures = json.loads((out / "audit.json").read_text())
    assert figures["nearer_than_classmates_pixels"]["mixed"] == 0.5  # the mirrored copies, not the grey ones
    assert figures["nearer_than_classmates_embedding"]["mixed"] >= 0.5  # equal embeddings: a flip changes nothing
    assert figures["frechet_distance"]["mixed"] > figures["frechet_distance"]["real"] > 0
    assert figures["contrast"]["mixed"] < figures["contrast"]["real"]
    real = [np.asarray(Image.open(p)).mean() for p in sorted((faces / "train").glob("*/*"))]
    people = [p.parent.name for p in sorted((faces / "train").glob("*/*"))]
    share = audit.between_classes(np.array(real)[:, None], np.array(people))
    assert figures["brightness"]["real"] == pytest.approx(share, abs=1e-6)
    assert -0.4 < figures["layout"]["real"] < 1 and figures["layout"]["mixed"] != figures["brightness"]["mixed"]
    picture = np.asarray(Image.open(out / "nearest.png"))[::6, ::6]
    row = [(picture[r * 16 : r * 16 + 16, :64]) for r in (2, 3)]  # pixels: the four copies, above their originals
    assert row[0].shape == (16, 64)
    for i in range(4):
        made, real = (r[:, i * 16 : i * 16 + 16] for r in row)
        assert np.array_equal(made[:, ::-1], real)
    rows = list(csv.DictReader(open(out / "nearest.csv")))
    assert [r["path"] for r in rows] == [f"{c}/{i}.png" for c in ("s11+s12", "s13+s14") for i in range(4)]
    for i in range(4):  # the mirrored copies, in both spaces
        original = str(faces / f"train/s11/{i + 1}.png")
        assert rows[i]["nearest_pixels"] == rows[i]["nearest_embedding"] == original
        assert float(rows[i]["distance_pixels"]) < 0.01 and float(rows[i]["times_classmates_embedding"]) < 0.05
        assert float(rows[4 + i]["times_classmates_pixels"]) > 1
    table = (out / "table.md").read_text()
    assert "8 mixed images of 2 classes, 30 real ones of 5" in table and table in capsys.readouterr().out
    succeed(audit, *arguments(chain, faces, out))
    assert "already audited" in capsys.readouterr().out


def test_reproductions_are_measured_against_their_own_class(chain, faces, tmp_path):
    succeed(train_diffusion, "--data", faces / "train", "--out", tmp_path / "gen", "--steps", 2, *SMALL_UNET)
    pairs, mixed = tmp_path / "one.csv", tmp_path / "one"
    succeed(mine_pairs, "--recognizer", chain / "real", "--data", faces / "train", "--order", 1, "--out", pairs)
    flags = ["--generator", tmp_path / "gen", "--pairs", pairs, "--per-class", 2, "--steps", 2]
    succeed(sample_scoremix, *flags, "--out", mixed)
    succeed(audit, *arguments(chain, faces, tmp_path / "out")[:4], "--mixed", mixed, "--out", tmp_path / "out")
    figures = json.loads((tmp_path / "out/audit.json").read_text())
    model, saved = train_recognizer.load_recognizer(chain / "real", "cpu")
    real, made = (stage.Images([d], 16, 1) for d in (faces / "train", mixed))
    z = [train_recognizer.embed(model, i, saved["config"], "cpu").double().numpy() for i in (real, made)]
    centres = train_recognizer.class_centres(z[0], real.labels.numpy(), 5)
    own = [z[1][i] @ centres[real.classes.index(p.parent.name)] for i, p in enumerate(made.paths)]
    assert figures["similarity_to_sources"]["mixed"] == pytest.approx(np.mean(own), abs=1e-6)
    found = [real.classes[int((centres @ z[1][i]).argmax())] == p.parent.name for i, p in enumerate(made.paths)]
    assert figures["sources_are_nearest"]["mixed"] == pytest.approx(np.mean(found))


def test_folders_that_do_not_belong_together(chain, faces, tmp_path, fails):
    out = tmp_path / "out"
    good = arguments(chain, faces, out)
    fails(audit.main, [*good[:4], "--mixed", faces / "test", "--out", out], "no manifest.csv")
    fails(audit.main, [*good[:2], "--data", faces / "test", *good[4:]], "manifest.csv", "'s11' is missing")
    fails(audit.main, ["--recognizer", faces, *good[2:]], "is missing")
    assert not out.exists()
