"""The sweep over two weights: its objective against loops, its corners, and the pictures."""

import importlib.util
import json

import numpy as np
import pytest
from conftest import ROOT, SMALL_RECOGNIZER, SMALL_UNET, loud, succeed
from PIL import Image

import mine_pairs
import sweep
import train_diffusion
import train_recognizer


def test_the_objective_against_loops():
    rng = np.random.default_rng(0)
    z, sources = rng.normal(size=(6, 4)), rng.normal(size=(6, 2, 4))
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    sources /= np.linalg.norm(sources, axis=2, keepdims=True)
    labels = np.array([0, 0, 0, 1, 1, 1])
    unlike = np.mean([1 - z[i] @ sources[i, m] for i in range(6) for m in range(2)])
    alike = np.mean([z[i] @ z[j] for i in range(6) for j in range(6) if i != j and labels[i] == labels[j]])
    assert sweep.objective(z, labels, sources) == pytest.approx((unlike, alike), abs=1e-12)


@pytest.fixture(scope="module")
def chain(faces, tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep")
    succeed(train_recognizer, "--data", faces / "train", "--out", out / "real", "--steps", 5, *SMALL_RECOGNIZER)
    succeed(train_diffusion, "--data", faces / "train", "--out", out / "gen", "--steps", 5, *SMALL_UNET)
    loud(out / "gen/model.pt")
    flags = ["--recognizer", out / "real", "--data", faces / "train"]
    succeed(mine_pairs, *flags, "--count", 3, "--out", out / "pairs.csv")
    succeed(mine_pairs, *flags, "--count", 3, "--order", 3, "--out", out / "three.csv")
    return out


def command(chain, faces, out, *more):
    inputs = ["--generator", chain / "gen", "--recognizer", chain / "real", "--data", faces / "train"]
    return [*inputs, "--pairs", chain / "pairs.csv", "--out", out, "--mixes", 2, "--per-class", 2, "--steps", 2, *more]


@pytest.mark.parametrize("mix", ["score", "condition"])
def test_the_script(chain, faces, tmp_path, capsys, mix):
    out = tmp_path / "out"
    succeed(sweep, *command(chain, faces, out, "--mix", mix, "--grid", 0, 0.5, 1))
    report = json.loads((out / "sweep.json").read_text())
    sums = {tuple(c["weights"]): c["dissimilarity"] + c["similarity"] for c in report["cells"]}
    both = {w: v for w, v in sums.items() if 0 not in w}  # nothing mixed with nothing does not compete
    assert len(sums) == 9 and len(both) == 4 and tuple(report["best"]) == max(both, key=both.get)
    assert len(set(sums.values())) > 5  # the weights do reach the images
    assert all(c["sum"] == pytest.approx(sums[tuple(c["weights"])]) for c in report["cells"])
    told = f"--mix {mix} --weights {report['best'][0]:g} {report['best'][1]:g}"
    assert (
        told + (" --nonconvex" if mix == "score" and sum(report["best"]) != 1 else "") + ";" in capsys.readouterr().out
    )
    picture = np.asarray(Image.open(out / "sweep.png"))[::6, ::6]
    assert picture.shape == (48, 48) and (out / "grid.png").stat().st_size > 5000
    if mix == "score":  # no class at all: x0 is 0 at every step, and ddpm adds no noise to the last one
        assert (picture[:16, :16] == 128).all() and picture[16:32, 16:32].std() > 0
    cost = json.loads((out / "cost.json").read_text())
    assert cost["images"] == 9 * 4 and cost["network_evaluations"] == 9 * 4 * 2 * (2 if mix == "score" else 1)
    succeed(sweep, *command(chain, faces, out, "--mix", mix, "--grid", 0, 0.5, 1))
    assert "already swept" in capsys.readouterr().out


def test_bad_combinations(chain, faces, tmp_path, fails):
    out = tmp_path / "out"
    fails(sweep.main, [*command(chain, faces, out), "--pairs", chain / "three.csv"], "mixes 3 classes")
    fails(sweep.main, [*command(chain, faces, out), "--data", faces / "test"], "lacks the class")
    fails(sweep.main, [*command(chain, faces, out), "--per-class", "1"], "--per-class")
    fails(sweep.main, [*command(chain, faces, out), "--recognizer", chain / "gen"], "is a generator")
    assert not out.exists()


def test_the_pictures_of_the_sampler(chain, tmp_path):
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "results/pictures.py")
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    flags = ["--generator", chain / "gen", "--guide", chain / "gen/model.pt", "--pairs", chain / "pairs.csv"]
    succeed(pictures, *flags, "--out", tmp_path / "new")
    sizes = [Image.open(tmp_path / "new" / n).size for n in ("solvers.png", "classes.png", "guidance.png")]
    assert sizes[0][1] > sizes[2][1] > sizes[1][1]  # 16, 7 and 4 rows
