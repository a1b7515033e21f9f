"""What could mislead without an error: shared people, numeric range, ties, protocols, mistakes, too few people."""

import csv

import numpy as np
import pytest
from conftest import entries, succeed

import evaluate
import testsets
from evaluate import identification_ranks


def test_people_who_stand_in_several_folds_are_drawn_once(lists):
    """In named.csv every fold has pairs of all four people: they are one group, drawn as often in each fold."""
    shared = testsets.pairs(str(lists / "named.csv"))
    assert shared.group.tolist() == [0] * 4 and "folds share people" in shared.protocol
    rows = list(csv.reader(open(lists / "named.csv")))
    rows = [rows[0], *(r[:3] + [f"{'s1' in r[0] or 's2' in r[0]:d}"] for r in rows[1:] if inner(r))]
    with open(lists / "apart.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    apart = testsets.pairs(str(lists / "apart.csv"))
    assert apart.people == ["s1", "s2", "s3", "s4"] and apart.group.tolist() == [1, 1, 0, 0]
    assert "share" not in apart.protocol


def inner(row):
    """Both people of a pair are among s1, s2, or both among s3, s4."""
    return len({name.split("/")[1] in ("s1", "s2") for name in row[:2]}) == 1


@pytest.mark.parametrize("kind, scale", [("f2", 300), ("f4", 1e20), ("f4", 1e-25), ("f8", 1e200)])
def test_embeddings_of_any_scale(lists, tmp_path, kind, scale):
    """Half precision and huge or tiny numbers neither overflow nor vanish."""
    names = sorted({x for r in list(csv.reader(open(lists / "named.csv")))[1:] for x in r[:2]})
    z = np.random.default_rng(0).normal(size=(len(names), 40)) + np.repeat(np.eye(4, 40) * 4, 4, axis=0)
    found = []
    for factor, dtype in ((1, "f8"), (scale, kind)):
        np.savez(tmp_path / "z.npz", embeddings=(z * factor).astype(dtype), paths=names)
        out = tmp_path / str(factor)
        argv = ["--pairs", lists / "named.csv", "--draws", 100, "--out", out]
        succeed(evaluate, "--embeddings", tmp_path / "z.npz", *argv)
        found.append(entries(out)["z", "named"]["metrics"]["auc"]["value"])
    assert 0.6 < found[0] < 1 and found[1] == pytest.approx(found[0], abs=2e-3)


def test_copies_in_the_gallery_count_against_the_probe():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(1, 512)).astype(np.float32).repeat(40, 0)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    ranks = identification_ranks(z[:7], np.arange(7), z[7:], np.arange(33) % 11)
    assert ranks.tolist() == [1 + 30] * 7


def test_what_cannot_be_a_fair_search_is_refused(model, faces, tmp_path, fails, capsys):
    search = ["--probe", faces / "test", "--gallery", faces / "test", "--out", tmp_path / "out"]
    fails(evaluate.main, ["--model", model, *search], "16 probes are gallery images too")
    assert not (tmp_path / "out").exists()


def test_self_pairs_are_counted_aloud(model, lists, tmp_path, capsys):
    rows = list(csv.reader(open(lists / "named.csv")))
    with open(lists / "self.csv", "w", newline="") as file:
        csv.writer(file).writerows([*rows, [rows[1][0], rows[1][0], "1", " 0 "]])
    argv = ["--model", model, "--pairs", lists / "self.csv", "--draws", 100, "--out", tmp_path / "out"]
    succeed(evaluate, *argv)
    assert "pairs 1 images with themselves" in capsys.readouterr().err
    assert "4 folds" in entries(tmp_path / "out")["model", "self"]["protocol"]  # " 0 " is fold 0


def test_each_model_states_its_own_protocol(model, public, faces, tmp_path):
    path, _ = public
    flags = ["--arch", "ir18", "--bgr", "--mean", 100, "--no-flip"]
    succeed(evaluate, "--model", model, path, *flags, "--data", faces / "test", "--draws", 100, "--out", tmp_path / "r")
    table = (tmp_path / "r/table.md").read_text()
    assert "blue first, (x - 100) / 127.5" in table and table.count("no mirror images") == 2
    assert entries(tmp_path / "r")["backbone", "test"]["protocol"] in table


def test_a_mistake_costs_no_directory_and_a_moved_set_is_the_same(model, lists, faces, tmp_path, fails):
    whole = (lists / "named/s4/2.png").read_bytes()
    (lists / "named/s4/2.png").write_bytes(whole[:100])
    argv = ["--model", model, "--pairs", lists / "flat.csv", lists / "named.csv", "--draws", 100]
    fails(evaluate.main, [*argv, "--out", tmp_path / "out"], "s4/2.png")
    (lists / "named/s4/2.png").write_bytes(whole)
    succeed(evaluate, *argv, "--out", tmp_path / "out")
    for name in ("named", "named.csv", "flat", "flat.csv"):
        (tmp_path / "moved").mkdir(exist_ok=True)
        (lists / name).rename(tmp_path / "moved" / name)
    before = (tmp_path / "out/results.json").read_bytes()
    argv[3:5] = tmp_path / "moved/flat.csv", tmp_path / "moved/named.csv"
    succeed(evaluate, *argv, "--out", tmp_path / "out")
    assert (tmp_path / "out/results.json").read_bytes() == before


def test_few_people_get_no_interval(model, faces, tmp_path):
    for person, images in (("s1", 2), ("s2", 1)):
        (tmp_path / "few" / person).mkdir(parents=True)
        for i in range(1, images + 1):
            (tmp_path / f"few/{person}/{i}.png").write_bytes((faces / f"test/{person}/{i}.png").read_bytes())
    succeed(evaluate, "--model", model, "--data", tmp_path / "few", "--draws", 100, "--out", tmp_path / "out")
    assert "ci95" not in entries(tmp_path / "out")["model", "few"]["metrics"]["eer"]
