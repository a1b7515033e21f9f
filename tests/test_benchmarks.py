"""The benchmarks that need no peers, tiny: they run, and what they say beside speeds is true."""

import json
import sys

import pytest
from conftest import ROOT
from PIL import Image

sys.path.append(str(ROOT / "benchmarks"))

import common  # noqa: E402
import evaluation  # noqa: E402
import mining  # noqa: E402
import networks  # noqa: E402
import precision  # noqa: E402
import reading  # noqa: E402

from train_recognizer import IResNet  # noqa: E402


@pytest.fixture
def run(tmp_path):
    """run(module, *argv) -> what it wrote."""

    def run(module, *argv):
        module.main([*map(str, argv), "--out", str(tmp_path / "found.json")])
        return json.loads((tmp_path / "found.json").read_text())

    return run


def test_evaluation(run):
    sizes = ["--pairs", 200, "--people", 8, "--templates", 20, "--draws", 20, "--sorted-draws", 20, "--repeats", 1]
    found = run(evaluation, *sizes)
    for name in ("tenfold", "tar_at_far", "pooling", "intervals"):
        assert max(found[name]["largest_difference"].values()) < 1e-9
    loop, ours = (found["intervals"]["seconds"][k][0] for k in ("loop", "ours"))
    assert found["intervals"]["times_ours"]["loop"]["median"] == pytest.approx(loop / ours)


def test_reading(run):
    found = run(reading, "--images", 70, "--size", 16, "--repeats", 1)
    assert found["later"].keys() == found["first"].keys() == {"seconds", "times_ours"}
    assert found["first"]["seconds"].keys() == {"ours", "ImageFolder, 0 workers", "ImageFolder, 2 workers"}
    assert 0 < found["kilobytes_a_file"] < 2


def test_networks(run):
    row = run(networks, "--networks", "ir18", "--batch", 2, "--repeats", 1, "--device", "cpu")["rows"]["ir18"]
    assert row["flops"] == pytest.approx(2 * 2 * 2.61e9, rel=0.01)  # the README's table, two images
    weights = sum(p.nbytes for p in IResNet("ir18", 112).parameters())
    assert row["traffic"] > weights + 2 * 2 * 64 * 112 * 112 * 4  # what the first layer writes, and the next one reads
    seconds, share = row["seconds"], row["share"]["forward, eager"]["product"]["median"]
    assert share == pytest.approx(row["flops"] / (2 * 2048**3) * seconds["product"][0] / seconds["forward, eager"][0])
    assert len(row["dearest"]["training, eager"]) == 5 and 0.5 < sum(row["dearest"]["forward, eager"].values()) <= 1


def test_mining(run, capsys):
    found = run(mining, "--classes", 150, "--candidates", "product", "sklearn", "--repeats", 1, "--no-memory")
    assert found["pairs"] == 200 and found["share_of_our_pairs"] == {"ours": 1, "sklearn": 1}
    capsys.readouterr()
    mining.main(["--classes", "1500", "--memory-of", "product"])
    assert int(capsys.readouterr().out) >= 0


def test_greedy_choice():
    pairs = [(0, 1), (0, 2), (0, 3), (2, 3), (1, 2)]
    assert mining.greedy(pairs, 3, 2, 4) == [(0, 1), (0, 2), (2, 3)]


def test_a_missing_peer_is_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        common.need("a_package_that_nobody_has")
    assert stopped.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_peers_compute_the_same():
    """With one network, noise and times: the same images and the same loss. Only where the peers are installed."""
    pytest.importorskip("diffusers")
    pytest.importorskip("denoising_diffusion_pytorch")
    import peers
    import sampling
    import torch
    import training_step

    network = peers.equal_networks(30, torch.device("cpu"))[0]["ours"].eval()
    y = torch.tensor([[0, 1], [2, 3]])
    drawn = {name: of(network, y, 5)() for name, of in sampling.SAMPLERS.items()}
    assert min(sampling.psnr(x, drawn["ours"]) for x in drawn.values()) > 60
    losses = training_step.losses(network, torch.rand(2, 1, 32, 32) * 2 - 1, torch.tensor([0, 1]))
    assert max(losses.values()) / min(losses.values()) < 1 + 1e-5


def test_precision(run, tmp_path):
    for name, value in (("a", 100), ("b", 101)):
        (tmp_path / name / "s1").mkdir(parents=True)
        Image.new("L", (8, 8), value).save(tmp_path / name / "s1/0.png")
        Image.new("L", (8, 8), 7).save(tmp_path / name / "s1/1.png")
    found = run(precision, tmp_path / "a", tmp_path / "b")
    assert found["images"] == 2 and found["psnr"]["best"] == 100
    assert found["psnr"]["worst"] == pytest.approx(48.13, abs=0.01)  # 20 log10(255)
    (tmp_path / "b/s1/1.png").unlink()
    with pytest.raises(SystemExit, match="same names"):
        run(precision, tmp_path / "a", tmp_path / "b")
