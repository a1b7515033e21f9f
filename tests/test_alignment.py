"""Alignment of two spaces: against loops, known values, and the invariances that the measures promise."""

import itertools
import json

import numpy as np
import pytest
from conftest import SMALL_RECOGNIZER, SMALL_UNET, succeed
from scipy.stats import spearmanr

import alignment
import stage
import train_diffusion
import train_recognizer


@pytest.fixture
def spaces():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(12, 5))
    return x, x @ rng.normal(size=(5, 7)) + 0.3 * rng.normal(size=(12, 7))


def slow_hsic(x, y):
    """tr(KHLH), term by term."""
    n = len(x)
    H = np.eye(n) - 1 / n
    return np.trace(x @ x.T @ H @ y @ y.T @ H)


def slow_unbiased_hsic(K, L):
    """The sum over four different indices that the unbiased estimator stands for (Song et al. 2012, Eq. 4)."""
    n, total = len(K), 0.0
    for i, j, q, r in itertools.permutations(range(n), 4):
        total += K[i, j] * (L[i, j] + L[q, r] - 2 * L[i, q])
    return total / (n * (n - 1) * (n - 2) * (n - 3))


def test_cka_against_its_definition_and_its_invariances(spaces):
    x, y = spaces
    expected = slow_hsic(x, y) / np.sqrt(slow_hsic(x, x) * slow_hsic(y, y))
    assert alignment.cka(x, y) == pytest.approx(expected, abs=1e-12)
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(5, 5)))[0]
    assert alignment.cka(x, 3 * x @ turn + 1) == pytest.approx(1, abs=1e-12)  # rotation, scale and shift change nothing
    assert alignment.unbiased_cka(x, 3 * x @ turn + 1) == pytest.approx(1, abs=1e-12)
    assert alignment.cka(x, y) == alignment.cka(y, x)


def test_unbiased_hsic_is_the_sum_over_four_different_rows(spaces):
    K, L = (v[:7] @ v[:7].T for v in spaces)
    assert alignment.unbiased_hsic(K, L) == pytest.approx(slow_unbiased_hsic(K, L), rel=1e-10)


def test_few_samples_of_unrelated_spaces_look_alike_only_to_the_biased_measure():
    rng, biased, unbiased = np.random.default_rng(2), [], []
    for _ in range(200):
        x, y = rng.normal(size=(30, 128)), rng.normal(size=(30, 128))
        biased.append(alignment.cka(x, y))
        unbiased.append(alignment.unbiased_cka(x, y))
    assert np.mean(biased) > 0.7 and abs(np.mean(unbiased)) < 0.02


def test_cknna_against_loops(spaces):
    x, y = spaces
    n, k = len(x), 3

    def kernel(v):
        v = v - v.mean(0)
        return v @ v.T

    def near(v, i):
        cosine = [(v[i] @ v[j]) / np.linalg.norm(v[i]) / np.linalg.norm(v[j]) if j != i else -9 for j in range(n)]
        return set(np.argsort(cosine)[-k:])

    K, L = kernel(x), kernel(y)
    sums = dict.fromkeys(("both", "x", "y"), 0.0)
    for i, j in itertools.product(range(n), repeat=2):
        sums["both"] += K[i, j] * L[i, j] * (j in near(x, i) and j in near(y, i))
        sums["x"] += K[i, j] ** 2 * (j in near(x, i))
        sums["y"] += L[i, j] ** 2 * (j in near(y, i))
    assert alignment.cknna(x, y, k) == pytest.approx(sums["both"] / np.sqrt(sums["x"] * sums["y"]), abs=1e-12)
    assert alignment.cknna(x, x, k) == pytest.approx(1, abs=1e-12)


def test_spearman_against_scipy(spaces):
    def similarities(v):
        v = v / np.linalg.norm(v, axis=1, keepdims=True)
        return [v[i] @ v[j] for i, j in itertools.combinations(range(len(v)), 2)]

    x, y = spaces
    assert alignment.spearman(x, y) == pytest.approx(spearmanr(*map(similarities, spaces))[0], abs=1e-12)
    tied = np.array([3.0, 1, 3, 2, 1, 1])
    assert alignment.ranks(tied).tolist() == [4.5, 1, 4.5, 3, 1, 1]


@pytest.mark.parametrize("arch", ["small", "ir50"])
def test_the_untrained_control_is_finite_however_deep(faces, arch):
    images = stage.Images([faces / "train"], 16)
    config = {"arch": arch, "size": 16, "channels": 1, "flip": True, "mean": 127.5, "std": 127.5}
    model = alignment.random_recogniser(config, images, 0)
    z = train_recognizer.embed(model, images, config, "cpu").numpy()
    centres = train_recognizer.class_centres(z, images.labels.numpy(), 5)
    found = alignment.measures(centres, np.random.default_rng(0).normal(size=(5, 8)), 2)
    assert all(map(np.isfinite, found.values())) and np.std(centres, axis=0).max() > 1e-3  # nor all the same


def test_the_script(faces, tmp_path, fails, capsys):
    train, real, gen = faces / "train", tmp_path / "real", tmp_path / "gen"
    succeed(train_recognizer, "--data", train, "--out", real, "--steps", 5, *SMALL_RECOGNIZER)
    succeed(train_diffusion, "--data", train, "--out", gen, "--steps", 4, "--keep-every", 2, *SMALL_UNET)
    command = ["--generator", gen, "--recognizer", real, "--data", train, "--out", tmp_path / "out"]
    succeed(alignment, *command, "--neighbours", 3)
    report = json.loads((tmp_path / "out/alignment.json").read_text())
    assert set(report["curve"]) == {"2", "4"} and (tmp_path / "out/cka.png").stat().st_size > 5000
    x, classes = alignment.conditions(gen, "cpu")
    assert x.shape == (5, 32) and classes == ["s11", "s12", "s13", "s14", "s15"]
    assert report["curve"]["4"] == report["measures"]["condition, recogniser"]  # the last checkpoint is the model
    assert "| condition, untrained |" in capsys.readouterr().out
    succeed(alignment, *command, "--neighbours", 3)
    assert "already measured" in capsys.readouterr().out
    fails(alignment.main, [*command, "--neighbours", 2], "holds another run: neighbours differ")
    (gen / "model-2.pt").write_bytes((gen / "model-4.pt").read_bytes())
    fails(alignment.main, [*command, "--neighbours", 3], "checkpoints differ")
    fails(alignment.main, command, "5 classes are too few for --neighbours 10")
    fails(alignment.main, [*command[:4], "--data", faces / "test", *command[6:]], "lacks", "s11")
