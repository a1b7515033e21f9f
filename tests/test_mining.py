"""Mining: against brute force, with caps; the command on a real recogniser."""

import csv
import itertools
import json
import math
import os
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import SMALL_RECOGNIZER, SMALL_UNET, succeed
from hypothesis import given, settings
from hypothesis import strategies as st

import mine_pairs
import stage
import train_diffusion
import train_recognizer
from mine_pairs import mine


def unit(k, dim=6, seed=0):
    x = np.random.default_rng(seed).normal(size=(k, dim))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def brute_force(centres, count, order, strategy, max_uses):
    """Look again and again for the best mix that the cap still allows."""

    def distance(mix):
        return sum(1 - float(np.dot(centres[a], centres[b])) for a, b in itertools.combinations(mix, 2))

    uses, chosen, sign = [0] * len(centres), [], -1 if strategy == "distant" else 1
    left = list(itertools.combinations(range(len(centres)), order))
    while len(chosen) < count:
        allowed = [m for m in left if all(uses[i] < max_uses for i in m)]
        if not allowed:
            break
        best = min(allowed, key=lambda m: (sign * round(distance(m), 9), m))
        left.remove(best)
        chosen.append((best, distance(best)))
        for i in best:
            uses[i] += 1
    return chosen


@settings(deadline=None, max_examples=60)
@given(
    st.integers(4, 9),
    st.integers(2, 4),
    st.sampled_from(["distant", "close"]),
    st.integers(1, 30),
    st.integers(1, 9),
    st.integers(0, 1000),
)
def test_mining_is_exact_under_caps(k, order, strategy, count, max_uses, seed):
    found = mine(unit(k, seed=seed), count, order, strategy, max_uses)
    slow = brute_force(unit(k, seed=seed), count, order, strategy, max_uses)
    assert [m for m, _ in found] == [m for m, _ in slow]
    assert np.allclose([d for _, d in found], [d for _, d in slow])


def test_ties_go_by_index_and_distances_by_cosine():
    centres = np.eye(4)
    assert [m for m, _ in mine(centres, 3)] == [(0, 1), (0, 2), (0, 3)]
    assert [m for m, _ in mine(centres, 3, max_uses=1)] == [(0, 1), (2, 3)]  # the cap leaves no third one
    pairs = dict(mine(np.array([[1.0, 0], [-1, 0], [0, 1]]), 3))
    assert pairs == {(0, 1): 2.0, (0, 2): 1.0, (1, 2): 1.0}


def test_random_goes_by_seed_and_knows_no_distance():
    centres = unit(12)
    every = mine(centres, 66, 2, "random", None, seed=3)
    assert sorted(m for m, _ in every) == list(itertools.combinations(range(12), 2))
    assert every == mine(centres, 66, 2, "random", None, seed=3) != mine(centres, 66, 2, "random", None, seed=4)
    assert [m for m, _ in every] == [m for m, _ in mine(unit(12, seed=9), 66, 2, "random", None, seed=3)]
    capped = mine(centres, 12, 2, "random", 2, seed=3)
    assert max(np.bincount(np.ravel([m for m, _ in capped]))) <= 2


def test_order_one_is_every_class_once():
    assert mine(unit(5), 2, order=1) == [((i,), 0.0) for i in range(5)]


@settings(deadline=None, max_examples=40)
@given(st.integers(8, 12), st.integers(3, 5), st.sampled_from(["distant", "close"]), st.integers(0, 1000))
def test_grown_mixes_against_enumeration(k, order, strategy, seed):
    """Grown, not enumerated: each is the best way to grow its pair, caps hold, and the sums come near the best ones."""
    centres, count, cap = unit(k, seed=seed), 4, 3
    limit, mine_pairs.MOST_MIXES = mine_pairs.MOST_MIXES, math.comb(k, 2)
    try:
        found = mine(centres, count, order, strategy, cap)
        first = mine(centres, 1, order, strategy)[0]
    finally:
        mine_pairs.MOST_MIXES = limit
    exact = mine(centres, count, order, strategy, cap)
    apart, sign = 1 - centres @ centres.T, 1 if strategy == "distant" else -1
    for mix, distance in found:
        assert len(set(mix)) == order and list(mix) == sorted(mix)
        assert distance == pytest.approx(sum(apart[a, b] for a, b in itertools.combinations(mix, 2)))
    assert len({m for m, _ in found}) == len(found)
    assert max(np.bincount(np.ravel([m for m, _ in found]))) <= cap
    assert [d * sign for _, d in found] == sorted((d * sign for _, d in found), reverse=True)
    mix = list(max(itertools.combinations(range(k), 2), key=lambda p: sign * apart[p]))  # the best pair, by hand
    while len(mix) < order:
        mix.append(max(set(range(k)) - set(mix), key=lambda c: sign * apart[mix, c].sum()))
    assert set(first[0]) == set(mix)
    assert sign * (exact[0][1] - first[1]) >= -1e-9  # enumeration is never worse


def test_grown_mixes_come_near_the_best_on_average(monkeypatch):
    lost = []
    for seed in range(40):
        centres = unit(12, seed=seed)
        exact = mine(centres, 5, 4, "distant", 3)
        monkeypatch.setattr(mine_pairs, "MOST_MIXES", 66)
        found = mine(centres, 5, 4, "distant", 3)
        monkeypatch.undo()
        lost.append(1 - sum(d for _, d in found) / sum(d for _, d in exact))
    assert 0 <= np.mean(lost) < 0.05, np.mean(lost)


def test_grown_mixes_of_many_classes():
    found = mine(unit(1000, 16), 50, order=4, max_uses=2)  # 41 billion mixes
    assert len(found) == 50 and max(np.bincount(np.ravel([m for m, _ in found]))) <= 2
    rng = np.random.default_rng(0)
    centres = unit(1000, 16)
    chance = [
        sum(1 - centres[a] @ centres[b] for a, b in itertools.combinations(rng.choice(1000, 4, False), 2))
        for _ in range(2000)
    ]
    assert min(d for _, d in found) > max(chance)
    one, other = (mine(unit(1000, 16), 9, 4, "random", 1, seed=s) for s in (0, 1))
    assert (
        one == mine(unit(1000, 16), 9, 4, "random", 1, seed=0) != other
        and len(set(np.ravel([m for m, _ in one]))) == 36
    )


def hubs(k, dim=16, seed=0):
    """Unit rows of which some are far from nearly all others, so that a cap blocks most of the best pairs."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(k, dim)) * rng.random((k, 1)) + 2 * rng.normal(size=dim)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("strategy", ["distant", "close"])
@pytest.mark.parametrize("max_uses, count", [(1, 150), (3, 440), (4, 500), (None, 20_000)])
def test_many_bands_are_the_whole_list_in_order(strategy, max_uses, count, monkeypatch):
    """Tiles, bands and passes, all made small, against one sort of all pairs."""
    monkeypatch.setattr(mine_pairs, "TILE", 64)
    monkeypatch.setattr(mine_pairs, "BAND", 500)
    passes, whole = [], mine_pairs.largest_products

    def largest_products(x, sign, below, want):
        passes.append(len(x))
        return whole(x, sign, below, want // 50)

    monkeypatch.setattr(mine_pairs, "largest_products", largest_products)
    centres = hubs(300)
    found = mine(centres, count, 2, strategy, max_uses)
    a, b = np.triu_indices(300, 1)
    distance = (1 - np.einsum("nd,nd->n", centres[a], centres[b])).round(9)
    uses, expected = np.zeros(300, int), []
    for r in np.argsort(-distance if strategy == "distant" else distance, kind="stable"):
        if max_uses is None or max(uses[a[r]], uses[b[r]]) < max_uses:
            uses[[a[r], b[r]]] += 1
            expected.append(((int(a[r]), int(b[r])), distance[r]))
    assert found == expected[:count]
    assert len(passes) > 1 and passes == sorted(passes, reverse=True)


def test_too_many_pairs_raise_the_bar(monkeypatch):
    """Far pairs that the sample of rows does not see: 62,500 of them, of which not many more than wanted are kept."""
    monkeypatch.setattr(mine_pairs, "TILE", 64)
    x, k = unit(2000, 64), 2000
    seen = np.random.default_rng(k).choice(k, 1500, replace=False)  # as largest_products draws it
    poles = np.setdiff1d(np.arange(k), seen)
    x[poles, 0] += np.where(np.arange(500) % 2, 5, -5)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    pairs, values, lower = mine_pairs.largest_products(torch.from_numpy(x).float(), -1, math.inf, 100)
    assert 100 <= len(pairs) <= 400 + 64 * 64
    products = -(x @ x.T)[np.triu_indices(k, 1)]
    assert len(pairs) == pytest.approx((products >= lower).sum(), abs=1) and (np.diff(values) <= 0).all()
    assert np.allclose(values, np.sort(products)[::-1][: len(values)], atol=1e-6)


def test_equal_distances_by_the_thousand():
    centres = np.eye(300)  # 44,850 pairs, all of distance 1
    found = mine(centres, 300, max_uses=2)
    assert [m for m, _ in found[:4]] == [(0, 1), (0, 2), (1, 2), (3, 4)] and {d for _, d in found} == {1.0}


def test_centres_that_are_all_alike_are_refused(monkeypatch):
    monkeypatch.setattr(mine_pairs, "MOST_MIXES", 10_000)
    with pytest.raises(stage.StageError, match="have the distance 0.000000: .* train longer"):
        mine(np.ones((1000, 1)), 10, max_uses=1)


def test_random_pairs_of_many_classes_are_drawn(monkeypatch):
    monkeypatch.setattr(mine_pairs, "FEW", 100)
    centres = unit(1000)
    found = [m for m, _ in mine(centres, 1400, 2, "random", 3, seed=0)]
    assert len(set(found)) == 1400 and all(a < b for a, b in found)
    assert max(np.bincount(np.ravel(found))) == 3
    assert np.corrcoef(np.array(found[:1000]).T)[0, 1] == pytest.approx(0.5, abs=0.1)  # of the sorted halves of a pair
    assert found == [m for m, _ in mine(centres, 1400, 2, "random", 3, seed=0)]
    assert found != [m for m, _ in mine(centres, 1400, 2, "random", 3, seed=1)]
    assert len(mine(unit(40), 780, 2, "random", None)) == 780  # all there are


def test_centres_are_normalised_means():
    z = np.array([[1.0, 0], [0, 1], [0, -1]])
    assert np.allclose(train_recognizer.class_centres(z, np.array([0, 0, 1]), 2), [[math.sqrt(0.5)] * 2, [0, -1]])


# ---------------------------------------------------------------------------------------------------- the command
@pytest.fixture(scope="module")
def recognizer(faces, tmp_path_factory):
    out = tmp_path_factory.mktemp("recognizer") / "run"
    succeed(train_recognizer, "--data", faces / "train", "--out", out, "--steps", 5, *SMALL_RECOGNIZER)
    return out


def command(recognizer, faces, out, *more):
    return [str(a) for a in ("--recognizer", recognizer, "--data", faces / "train", "--out", out, *more)]


def test_the_file_agrees_with_embeddings_computed_here(recognizer, faces, tmp_path):
    out = tmp_path / "new" / "pairs.csv"
    assert mine_pairs.main(command(recognizer, faces, out, "--count", 10, "--max-uses", 9)) == 0
    rows = list(csv.DictReader(open(out)))
    model, _ = train_recognizer.load_recognizer(recognizer, "cpu")
    centres = {}
    for person in ("s11", "s12", "s13", "s14", "s15"):
        total = 0
        for path in sorted((faces / "train" / person).iterdir()):
            x = torch.from_numpy(stage.decode(path, 16, 1)).permute(2, 0, 1)[None].float() / 127.5 - 1
            z = model(x) + model(x.flip(3))
            total = total + z / z.norm()
        centres[person] = (total / total.norm()).flatten().numpy()
    expected = sorted(
        ((1 - float(centres[a] @ centres[b]), a, b) for a, b in itertools.combinations(centres, 2)), reverse=True
    )
    assert [(r["class_1"], r["class_2"]) for r in rows] == [(a, b) for _, a, b in expected]
    assert np.allclose([float(r["distance"]) for r in rows], [d for d, _, _ in expected], atol=1e-4)
    info = json.loads(out.with_suffix(".json").read_text())
    assert info["cost"]["device"] == f"{os.uname().machine} CPU" and info["cost"]["peak_memory_bytes"] > 1e7
    apart = [d for d, _, _ in expected]
    assert info["count"] == 10 and info["distances"]["mean"] == pytest.approx(np.mean(apart), abs=1e-4)
    assert info["distances"]["std"] == pytest.approx(np.std(apart), abs=1e-4)
    before = out.read_bytes()
    assert mine_pairs.main(command(recognizer, faces, out, "--count", 10, "--max-uses", 9)) == 0
    assert out.read_bytes() == before


def test_defaults_spread_the_uses(recognizer, faces, tmp_path):
    assert mine_pairs.main(command(recognizer, faces, tmp_path / "pairs.csv")) == 0
    rows = list(csv.DictReader(open(tmp_path / "pairs.csv")))
    names = [r[c] for r in rows for c in ("class_1", "class_2")]
    assert len(rows) == 10 and all(names.count(n) == 4 for n in names)  # 5 a class would be 25: all there are


def test_condition_space_is_the_generators_class_embedding(faces, tmp_path, fails, recognizer):
    gen, out = tmp_path / "gen", tmp_path / "pairs.csv"
    succeed(train_diffusion, "--data", faces / "train", "--out", gen, "--steps", 2, *SMALL_UNET)
    succeed(mine_pairs, "--space", "condition", "--generator", gen, "--out", out, "--count", 10)
    rows = [(r["class_1"], r["class_2"], float(r["distance"])) for r in csv.DictReader(open(out))]
    table = torch.load(gen / "model.pt", weights_only=True)["weights"]["label.weight"].double()
    assert len(table) == 6  # five classes, and the null class, which is nobody
    cosine = torch.nn.functional.cosine_similarity(table[:5, None], table[None, :5], dim=2)
    names = ["s11", "s12", "s13", "s14", "s15"]
    expected = sorted(((1 - float(cosine[i, j]), names[i], names[j]) for i, j in itertools.combinations(range(5), 2)))
    assert [(a, b) for a, b, _ in rows] == [(a, b) for _, a, b in reversed(expected)]
    assert np.allclose([d for *_, d in rows], [d for d, *_ in reversed(expected)], atol=1e-5)
    fails(mine_pairs.main, ["--space", "condition", "--out", out], "--generator")
    fails(mine_pairs.main, command(recognizer, faces, out, "--generator", gen), "--space condition")
    fails(mine_pairs.main, ["--recognizer", recognizer, "--out", out], "--data")
    before = out.read_bytes()  # a recogniser beside the generator is not looked at
    succeed(mine_pairs, *command(recognizer, faces, out, "--generator", gen, "--space", "condition", "--count", 10))
    assert out.read_bytes() == before
    fails(mine_pairs.main, ["--space", "condition", "--generator", recognizer, "--out", out], "is a recognizer")


@pytest.mark.parametrize("more", [(), ("--order", 3)])
def test_the_default_cap_leaves_as_many_mixes_as_asked_for(more, recognizer, faces, tmp_path, monkeypatch):
    """Mined greedily, an even share plus one can leave classes that have only each other, already taken."""
    out, asked, found = tmp_path / "pairs.csv", [], 0

    def clustered(model, images, config, device):
        centres = np.random.default_rng(seed).standard_normal((len(images.classes), 8))
        centres[2:] = centres[2] + 0.05 * centres[2:]  # a dense core, and two others
        return centres / np.linalg.norm(centres, axis=1, keepdims=True)

    def spied(*args):
        asked.append(args[4])
        return mine(*args)

    monkeypatch.setattr(mine_pairs, "centres_of", clustered)
    monkeypatch.setattr(mine_pairs, "mine", spied)
    for i in range(11):
        shutil.copytree(faces / "train/s11", tmp_path / f"more/t{i}")
    for seed in range(12):
        out.unlink(missing_ok=True)
        asked.clear()
        data = ["--recognizer", recognizer, "--data", faces / "train", tmp_path / "more", "--out", out]
        succeed(mine_pairs, *data, "--strategy", "close", *more)
        rows, told = list(csv.DictReader(open(out))), json.loads(out.with_suffix(".json").read_text())
        uses = Counter(v for r in rows for k, v in r.items() if k != "distance")
        assert len(rows) == 16 * 5 and max(uses.values()) <= told["max_uses"] == asked[-1]
        assert asked == [*range(asked[0], asked[-1] + 1)]  # no larger than it has to be
        found += len(asked) > 1
    assert found


def test_a_cap_that_binds_no_class_is_not_raised(recognizer, faces, tmp_path, monkeypatch, fails):
    """Grown mixes are fewer than there are, one a pair at most: every cap up to all mixes of a class would be tried."""
    calls = []
    monkeypatch.setattr(mine_pairs, "MOST_MIXES", 5)
    monkeypatch.setattr(mine_pairs, "mine", lambda *args: calls.append(args[4]) or mine(*args))
    for i in range(11):
        shutil.copytree(faces / "train/s11", tmp_path / f"more/t{i}")
    data = ["--recognizer", recognizer, "--data", faces / "train", tmp_path / "more", "--out", tmp_path / "pairs.csv"]
    fails(mine_pairs.main, [*data, "--order", 5, "--count", 121], "of 121 mixes can be had from 16 classes; lower")
    assert len(calls) < 91  # of the 1,365 mixes that a class is part of


def test_the_distance_that_is_told_is_that_of_a_pair(recognizer, faces, tmp_path):
    """Whatever the order: beside it stands that of all pairs. The CSV has the sum over the pairs of a mix."""
    out = tmp_path / "mixes.csv"
    succeed(mine_pairs, *command(recognizer, faces, out, "--order", 3, "--count", 10))  # all there are
    told, rows = json.loads(out.with_suffix(".json").read_text())["distances"], list(csv.DictReader(open(out)))
    assert told["chosen_mean"] == pytest.approx(told["mean"], abs=1e-6)  # every pair is in three of the triplets
    assert np.mean([float(r["distance"]) for r in rows]) == pytest.approx(3 * told["mean"], abs=1e-5)


def test_order_one_writes_no_distance(recognizer, faces, tmp_path):
    assert mine_pairs.main(command(recognizer, faces, tmp_path / "all.csv", "--order", 1)) == 0
    assert (tmp_path / "all.csv").read_text().split() == ["class_1", "s11", "s12", "s13", "s14", "s15"]


@pytest.mark.parametrize(
    "more, words",
    [
        (["--count", 11], ["only 10 of 11", "classes; lower --count"]),
        (["--count", 5, "--max-uses", 1], ["only 2 of 5", "at most 1; raise --max-uses"]),
        (["--order", 6], ["at least 6"]),
        (["--strategy", "far"], ["--strategy"]),
        (["--count", -1], ["--count"]),
        (["--order", 1, "--count", 3], ["--count"]),
    ],
)
def test_bad_flags(recognizer, faces, tmp_path, fails, more, words):
    fails(mine_pairs.main, command(recognizer, faces, tmp_path / "pairs.csv", *more), *words)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(recognizer, faces, tmp_path, fails):
    out = tmp_path / "pairs.csv"
    out.write_text("years of work")
    fails(mine_pairs.main, command(recognizer, faces, out), out, "delete it")
    fails(mine_pairs.main, command(recognizer, faces, tmp_path), "must be a CSV")
    fails(mine_pairs.main, command(recognizer, faces, tmp_path / "pairs.png"), "must be a CSV")
    assert out.read_text() == "years of work" and [p.name for p in tmp_path.iterdir()] == ["pairs.csv"]


def test_embeddings_that_are_not_finite_are_refused(recognizer, faces, tmp_path, fails):
    saved = torch.load(recognizer / "model.pt", weights_only=True)
    saved["weights"]["fc.bias"][0] = math.nan
    torch.save(saved, tmp_path / "model.pt")
    fails(mine_pairs.main, command(tmp_path / "model.pt", faces, tmp_path / "pairs.csv"), "not finite")
