"""costs.py: the arithmetic on ledgers written by hand, and what it says to files that are none."""

import json
import os

import pytest
import torch

import costs


def ledger(folder, stage, **cost):
    arguments = {"solver": "ddpm", "steps": 10, "precision": "fp32"}
    config = {"stage": stage, "arguments": arguments, "derived": None}
    config["versions"] = {"threads": torch.get_num_threads()}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "cost.json").write_text(json.dumps({"device": f"{os.uname().machine} CPU", **cost}))


@pytest.fixture
def runs(tmp_path):
    amounts = {"images": 500, "network_evaluations": 10_000, "flops": 1e12, "peak_memory_bytes": 2**31}
    ledger(tmp_path / "runs/mixed", "sample_scoremix", seconds=72.0, **amounts)
    ledger(tmp_path / "runs/generator", "train_diffusion", seconds=3600.0, **amounts | {"flops": 1e15})
    ledger(tmp_path / "runs/data", "prepare_data", seconds=1.0, images=9)
    mining = {"seconds": 36.0, "device": f"{os.uname().machine} CPU"}
    mining |= {"images": 3, "network_evaluations": 6, "flops": 60}
    (tmp_path / "runs/pairs.json").write_text(json.dumps({"arguments": {}, "cost": mining}))
    (tmp_path / "runs/notes.txt").write_text("not a run")
    return tmp_path / "runs"


def test_hours_rates_and_estimates(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "matrix_rate", lambda device, dtype: 1e11)
    out = tmp_path / "out"
    assert costs.main([str(runs), "--device", "cpu", "--out", str(out)]) == 0
    found = json.loads((out / "costs.json").read_text())
    rows = {r["stage"]: r for r in found["runs"]}
    assert list(rows) == ["prepare_data", "train_diffusion", "mine_pairs", "sample_scoremix"]  # in the stages' order
    assert rows["train_diffusion"]["hours"] == 1.0 and rows["mine_pairs"]["hours"] == 0.01
    assert rows["train_diffusion"]["share_of_matrix_rate"] == pytest.approx(1e15 / 3600 / 1e11)
    assert rows["sample_scoremix"]["flops_per_second"] == pytest.approx(1e12 / 72)
    assert rows["mine_pairs"]["share_of_matrix_rate"] is None  # its ledger does not tell the threads
    hours = {r["recipe"]: r["hours"] for r in found["recipes"]}  # 7.2 ms an evaluation
    assert hours["as this run: ddpm, 10 steps"] == pytest.approx(20 * 200_000 * 0.0072 / 3600)
    assert hours["ScoreMix: heun, 32 steps"] == pytest.approx(126 * 200_000 * 0.0072 / 3600)
    assert hours["AugGen: ddpm, 10 steps"] == pytest.approx(10 * 200_000 * 0.0072 / 3600)
    table = (out / "table.md").read_text()
    assert "ESTIMATED" in table and "| 20 | 8 |" in table and (out / "costs.png").stat().st_size
    assert costs.main([str(runs), "--device", "cpu", "--out", str(out)]) == 0  # again: shown, not made
    assert json.loads((out / "costs.json").read_text()) == found


def test_the_matrix_rate_is_one_of_this_earth():
    assert 1e8 < costs.matrix_rate(repeats=2) < 1e16


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "is missing"),
        ("{", "is no ledger"),
        ("[]", "is no ledger"),
        ('{"seconds": 0, "device": "x"}', "is no ledger"),
        ('{"seconds": "a", "device": "x"}', "is no ledger"),
        ('{"seconds": 1, "device": 3}', "is no ledger"),
    ],
)
def test_what_is_no_ledger(runs, tmp_path, fails, content, words):
    path = runs / "mixed/cost.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    fails(costs.main, [str(runs / "mixed"), "--out", str(tmp_path / "out")], words)
    (tmp_path / "empty").mkdir()
    fails(costs.main, [str(tmp_path / "empty"), "--out", str(tmp_path / "out")], "no run directories")
    assert not (tmp_path / "out").exists()
