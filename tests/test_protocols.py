"""The protocols of the field, each against an independent slow twin: 10-fold verification, templates, closed-set
search; lists and embedding files through the command."""

import csv
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, entries, succeed
from hypothesis import given, settings
from hypothesis import strategies as st

import evaluate
import stage
import train_recognizer
from evaluate import Identification, Verification, identification_ranks, pool_templates, tar_at_far, tenfold


# ------------------------------------------------------------------------------------------------------ slow twins
def slow_threshold(scores, same):
    """Count the right decisions at every cut between distinct scores; of the best ones take the middle of the widest
    run of neighbouring cuts. Exact rational numbers are not needed: the scores of the tests are small integers."""
    levels = sorted(set(scores))
    edges = [(levels[0], levels[0]), *zip(levels, levels[1:]), (levels[-1], np.nextafter(levels[-1], np.inf))]
    right = [sum((x >= high) == s for x, s in zip(scores, same)) for _, high in edges]
    runs, previous = [], False
    for (low, high), r in zip(edges, right):
        if r == max(right):
            runs = [*runs[:-1], (runs[-1][0], high)] if previous else [*runs, (low, high)]
        previous = r == max(right)
    low, high = max(runs, key=lambda e: e[1] - e[0])
    return high if (low + high) / 2 <= low else (low + high) / 2


def slow_tenfold(scores, same, fold):
    accuracies = []
    for f in sorted(set(fold)):
        rest = [(x, s) for x, s, g in zip(scores, same, fold) if g != f]
        threshold = slow_threshold([x for x, _ in rest], [s for _, s in rest])
        mine = [(x >= threshold) == s for x, s, g in zip(scores, same, fold) if g == f]
        accuracies.append(sum(mine) / len(mine))
    return accuracies


cases = st.lists(st.tuples(st.integers(0, 9), st.booleans(), st.integers(0, 3), st.integers(0, 3)), min_size=3)


@settings(deadline=None, max_examples=300)
@given(cases)
def test_tenfold_against_a_slow_twin(case):
    """Also with weights: each pair written out as often as it weighs."""
    scores, same, fold, weight = (np.array(x) for x in zip(*case))
    scores = scores.astype(float)
    found = tenfold(scores, same, fold)[0]
    if len(set(fold)) > 1:
        assert np.abs(found - slow_tenfold(scores, same, fold)).max() < 1e-12
    else:
        assert np.isnan(found).all()  # no other fold to choose a threshold on
    written = np.repeat(np.arange(len(scores)), weight)
    if len(set(fold[written])) > 1:
        weighted = tenfold(scores, same, fold, weight)[0]
        weighted = weighted[~np.isnan(weighted)]
        assert np.abs(weighted - slow_tenfold(scores[written], same[written], fold[written])).max() < 1e-12


def test_known_thresholds():
    best = evaluate.best_threshold
    assert best(np.array([0.0, 0.2, 0.6, 1.0]), np.array([-1, -1, 1, 1])) == 0.4
    assert best(np.array([0.0, 1.0]), np.array([1, 1])) == 0.0  # accept all
    assert best(np.array([0.0, 1.0]), np.array([-1, -1])) > 1  # accept none
    assert best(np.array([np.nextafter(1.0, 0), 1.0]), np.array([-1, 1])) == 1.0  # no number lies between
    assert best(np.array([0.0, 0.1, 0.5, 0.6, 1.0]), np.array([-1, 1, -1, -1, 1])) == 0.8  # 4 of 5 right
    assert best(np.array([0.0, 0.1, 0.5, 0.5, 1.0]), np.array([-1, 1, -1, 1, 1])) == 0.05  # a run is one: (0, 0.1)
    assert best(np.array([0.0, 0.1, 0.1, 0.9]), np.array([-1, -1, 1, 1])) == 0.45  # cuts at 0.05 and 0.5, a run of both


def test_the_threshold_never_comes_from_the_tested_fold():
    """In fold 1 the classes lie the other way round: its own best threshold would give 1, that of fold 0 gives 0."""
    scores = np.array([0.0, 1.0, 0.0, 1.0])
    accuracies, thresholds = tenfold(scores, np.array([False, True, True, False]), np.array([0, 0, 1, 1]))
    assert accuracies[1] == 0 and thresholds[1] == 0.5


def clouds(people=8, images=3, dim=5, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(people), images)
    z = rng.normal(size=(people, dim))[labels] + rng.normal(size=(len(labels), dim))
    return z / np.linalg.norm(z, axis=1, keepdims=True), labels


@pytest.mark.parametrize("seed", range(4))
def test_weights_of_a_list_are_the_resample_written_out(seed):
    z, labels = clouds(seed=seed)
    rng = np.random.default_rng(seed)
    a, b = np.triu_indices(len(z), 1)
    fold = labels % 2
    kept = fold[a] == fold[b]  # the folds have no person in common
    a, b = a[kept], b[kept]
    w = evaluate.draw_identities(np.arange(8) % 2, 1, seed)[0]
    assert w[::2].sum() == w[1::2].sum() == 4  # people are drawn within their fold
    scores, same = (z[a] * z[b]).sum(1), labels[a] == labels[b]
    found = Verification(scores, same, fold[a], labels[a], labels[b]).metrics(w)
    out = np.repeat(np.arange(len(a)), np.where(same, w[labels[a]], w[labels[a]] * w[labels[b]]))
    out = rng.permutation(out)
    assert found["accuracy"] == pytest.approx(np.mean(slow_tenfold(scores[out], same[out], fold[a][out])), abs=1e-12)
    assert found["1e-1"] == pytest.approx(tar_at_far(scores[out], same[out], 0.1), abs=1e-12)


def test_templates_against_loops():
    rng = np.random.default_rng(0)
    z, template, media = rng.normal(size=(40, 6)), rng.integers(5, 12, 40), rng.integers(0, 4, 40)
    names, pooled = pool_templates(z, template, media)
    assert names.tolist() == sorted(set(template.tolist()))
    for name, row in zip(names, pooled):
        total = sum(z[(template == name) & (media == m)].mean(axis=0) for m in set(media[template == name].tolist()))
        assert np.abs(row - total / np.linalg.norm(total)).max() < 1e-12


@pytest.mark.parametrize("chunk", [1, 7, 256])
def test_search_against_loops(chunk):
    z, labels = clouds(6, 4)
    z = np.round(z, 1)  # ties
    gallery, probes = np.arange(24) % 4 > 0, np.arange(24) % 4 == 0
    y_gallery = np.where(labels[gallery] < 5, labels[gallery], -1)
    probes &= labels < 5  # the sixth person is a distractor
    found = identification_ranks(z[probes], labels[probes], z[gallery], y_gallery, chunk)
    for x, y, rank in zip(z[probes], labels[probes], found):
        best = max(x @ g for g, k in zip(z[gallery], y_gallery) if k == y)
        above = sum(1 for g, k in zip(z[gallery], y_gallery) if k != y and x @ g > best - 1e-12)
        assert rank == 1 + above
    shares = Identification(found, labels[probes]).metrics()
    assert shares == {f"rank{k}": pytest.approx(np.mean(found <= k)) for k in (1, 5, 20)}
    twice = np.array([2, 0, 1, 1, 1])
    assert Identification(found, labels[probes]).metrics(twice)["rank1"] == pytest.approx(
        np.mean(np.repeat(found <= 1, twice[labels[probes]]))
    )


def test_search_over_an_open_set_is_refused():
    z, labels = clouds(3, 2)
    with pytest.raises(stage.StageError, match="closed set"):
        identification_ranks(z, labels, z[:2], labels[:2])


# ------------------------------------------------------------------------------------------------------------ speed
def plain_accuracy(threshold, scores, same):
    """As the field's scripts count: true and false accepts and rejects, each by itself."""
    accepted = np.greater_equal(scores, threshold)
    true_accepts = np.sum(np.logical_and(accepted, same))
    true_rejects = np.sum(np.logical_and(np.logical_not(accepted), np.logical_not(same)))
    false_accepts = np.sum(np.logical_and(accepted, np.logical_not(same)))
    false_rejects = np.sum(np.logical_and(np.logical_not(accepted), same))
    return (true_accepts + true_rejects) / (true_accepts + true_rejects + false_accepts + false_rejects)


def plain_tenfold(scores, same, fold):
    """The loop that they run: 400 thresholds for each of 10 folds."""
    thresholds, accuracies = np.arange(-1, 1, 0.005), []
    for f in range(10):
        train, test = np.flatnonzero(fold != f), np.flatnonzero(fold == f)
        right = [plain_accuracy(t, scores[train], same[train]) for t in thresholds]
        accuracies.append(plain_accuracy(thresholds[int(np.argmax(right))], scores[test], same[test]))
    return np.array(accuracies)


def test_tenfold_is_50_times_as_fast_as_the_plain_loop():
    rng = np.random.default_rng(0)
    same = np.arange(6000) // 300 % 2 == 0
    scores, fold = (rng.normal(size=6000) * 0.2 + 0.3 * same).clip(-1, 1), np.arange(6000) // 600

    def seconds(function):
        begin = time.perf_counter()
        value = function(scores, same, fold)
        return time.perf_counter() - begin, value

    slow, by_steps = min((seconds(plain_tenfold) for _ in range(3)), key=lambda x: x[0])
    fast, exact = min((seconds(lambda *a: tenfold(*a)[0]) for _ in range(10)), key=lambda x: x[0])
    assert np.abs(by_steps - exact).max() < 0.02  # thresholds in steps are not the same, but near
    assert slow / fast >= 50


BIG = """
import resource, sys, time
sys.path.insert(0, {root!r})
import numpy as np
from evaluate import Verification, pair_scores, pool_templates
T, P, D = 23_124, 15_700_000, 512
rng = np.random.default_rng(0)
who = rng.integers(0, 3531, T)
z = rng.standard_normal((3 * T, D), dtype=np.float32) + rng.standard_normal((3531, D), dtype=np.float32)[who.repeat(3)]
a, b = rng.integers(0, T, (2, P), dtype=np.int32)
b[:20_000] = a[:20_000]
same = who[a] == who[b]
begin = time.perf_counter()
pooled = pool_templates(z, np.arange(T).repeat(3), np.arange(3 * T) // 2)[1]
scores = pair_scores(pooled, a, b)
metrics = Verification(scores, same).metrics()
ours = time.perf_counter() - begin
begin, products = time.perf_counter(), np.empty(P, np.float32)
for i in range(0, P, 4096):
    products[i:i + 4096] = np.einsum("nd,nd->n", pooled[a[i:i + 4096]], pooled[b[i:i + 4096]])
products.sort()
bare = time.perf_counter() - begin
assert list(metrics)[1:-1] == ["1e-1", "1e-2", "1e-3", "1e-4", "1e-5", "1e-6"] and metrics["1e-6"] <= metrics["1e-1"]
print(ours / bare, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def test_a_set_of_the_size_of_ijb_c():
    """15.7 million pairs of 23,124 templates: below 6 GiB, and less than 3 times the gathered products and one sort."""
    done = subprocess.run(
        [sys.executable, "-c", BIG.format(root=str(ROOT))], capture_output=True, text=True, check=True
    )
    ratio, memory = map(float, done.stdout.split())
    assert memory < 6 * 2**30
    assert ratio < 3


# ---------------------------------------------------------------------------------------------------- the command
def test_lists_with_and_without_identities(model, lists, tmp_path, capsys):
    """The same pairs: the same numbers, equal to the slow twin's to 1e-12; identities alone give intervals."""
    lists_of = ["--pairs", lists / "named.csv", lists / "flat.csv", "--draws", 100, "--save-embeddings"]
    succeed(evaluate, "--model", model, *lists_of, "--out", tmp_path / "report")
    found = entries(tmp_path / "report")
    named, flat = found["model", "named"], found["model", "flat"]
    assert {k: v["value"] for k, v in named["metrics"].items() if k != "tar_at_far"} == {
        k: v["value"] for k, v in flat["metrics"].items() if k != "tar_at_far"
    }
    assert named["counts"] == {"identities": 4, "images": 16, "genuine": 24, "impostor": 96}
    assert "identities are not known" in flat["protocol"] and "identities resampled" in named["protocol"]
    low, high = named["metrics"]["accuracy"]["ci95"]
    assert low < named["metrics"]["accuracy"]["value"] < high and "ci95" not in flat["metrics"]["accuracy"]
    network, saved = train_recognizer.load_recognizer(model, "cpu")
    rows = list(csv.DictReader(open(lists / "named.csv")))
    scores = []
    for row in rows:
        z = []
        for side in ("path_a", "path_b"):
            x = torch.from_numpy(stage.decode(lists / row[side], 16, 1)).permute(2, 0, 1)[None]
            z.append(train_recognizer.embed_batch(network, x, saved["config"])[0].double().numpy())
        scores.append(round(float(z[0] @ z[1] / np.linalg.norm(z[0]) / np.linalg.norm(z[1])), 9))
    twin = slow_tenfold(scores, [r["same"] == "1" for r in rows], [r["fold"] for r in rows])
    assert named["metrics"]["accuracy"]["value"] == pytest.approx(np.mean(twin), abs=1e-12)
    assert named["metrics"]["accuracy"]["std"] == pytest.approx(np.std(twin, ddof=1), abs=1e-12)
    average = found["model", "average of 2 lists"]["metrics"]["accuracy"]  # no interval: lists may share people
    assert average == {"value": pytest.approx(named["metrics"]["accuracy"]["value"])}
    table = (tmp_path / "report/table.md").read_text()
    assert "| named: accuracy % | flat: accuracy % | average of 2 lists: accuracy % |" in table
    lines = list(csv.DictReader(open(tmp_path / "report/results.csv")))
    assert {r["benchmark"] for r in lines} == {"named", "flat", "average of 2 lists"}
    assert all(0 <= float(r["value"]) <= 1 for r in lines)
    for picture in ("roc.png", "det.png", "similarity.png", "hardest.png"):
        assert (tmp_path / "report" / picture).stat().st_size > 5000
    # the file of embeddings gives the same numbers without a model, an image, or the order of the lists
    archive = tmp_path / "report/embeddings-model.npz"
    with np.load(archive) as file:
        z, paths = file["embeddings"], file["paths"]
    order = np.random.default_rng(1).permutation(len(z))
    np.savez(tmp_path / "other.npz", embeddings=z[order] * 2, paths=paths[order].astype("S"))
    for image in lists.glob("*/**/*.png"):
        image.unlink()
    again = ["--embeddings", archive, tmp_path / "other.npz", *lists_of[:-1], "--out", tmp_path / "again"]
    succeed(evaluate, *again)
    for (name, benchmark), entry in entries(tmp_path / "again").items():
        value = found["model", benchmark]["metrics"]["accuracy"]["value"]
        assert entry["metrics"]["accuracy"]["value"] == pytest.approx(value, abs=1e-12)
    assert "embeddings as given" in entry["protocol"] or benchmark.startswith("average")
    assert not (tmp_path / "again/hardest.png").exists()  # its images are gone


def test_a_list_without_folds(model, lists, tmp_path):
    rows = list(csv.reader(open(lists / "named.csv")))
    with open(lists / "own.csv", "w", newline="") as file:
        csv.writer(file).writerows(r[:3] for r in rows)
    succeed(evaluate, "--model", model, "--pairs", lists / "own.csv", "--draws", 100, "--out", tmp_path / "report")
    assert list(entries(tmp_path / "report")["model", "own"]["metrics"]) == ["eer", "auc", "tar_at_far"]


def test_search_and_folder_by_the_command(model, faces, tmp_path):
    for person in ("s1", "s2"):
        for i, part in ((1, "probe"), (2, "gallery"), (3, "gallery")):
            (tmp_path / part / person).mkdir(parents=True, exist_ok=True)
            (tmp_path / part / person / f"{i}.png").write_bytes((faces / "test" / person / f"{i}.png").read_bytes())
    argv = ["--model", model, "--probe", tmp_path / "probe", "--data", faces / "test", "--draws", 100]
    argv += ["--gallery", tmp_path / "gallery", faces / "train", "--out", tmp_path / "report"]
    succeed(evaluate, *argv)
    found = entries(tmp_path / "report")
    search = found["model", tmp_path.name]
    assert search["counts"] == {"identities": 2, "probes": 2, "gallery": 4 + 30, "distractors": 30}
    shares = search["metrics"]
    assert 0 <= shares["rank1"]["value"] <= shares["rank5"]["value"] <= shares["rank20"]["value"] <= 1
    assert "rank1" in found["model", "test"]["metrics"] and (tmp_path / "report/draws.npz").exists()


def test_templates_by_the_command(model, faces, tmp_path):
    images = sorted((faces / "test").glob("*/*.png"))
    (tmp_path / "ijb/images").mkdir(parents=True)
    rows = []
    for i, path in enumerate(images):  # a template of each person's first two images (one medium), one of the others
        (tmp_path / f"ijb/images/{i}.png").write_bytes(path.read_bytes())
        rows.append((f"images/{i}.png", i // 2 * 10, i // 2 if i % 4 < 2 else 100 + i, 0.5 + i / 40))
    with open(tmp_path / "ijb/templates.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "template", "media", "score"), *rows])
    a, b = np.array([(i * 10, j * 10) for i in range(8) for j in range(i)]).T
    np.savez(tmp_path / "ijb/pairs.npz", a=a, b=b, same=a // 20 == b // 20)
    network, saved = train_recognizer.load_recognizer(model, "cpu")
    x = torch.stack([torch.from_numpy(stage.decode(p, 16, 1)).permute(2, 0, 1) for p in images])
    raw = train_recognizer.embed_batch(network, x, saved["config"], unit=False).double().numpy()
    for flags in ([], ["--keep-norm"], ["--keep-norm", "--detector-scores"]):
        out = tmp_path / "-".join(["report", *flags])
        succeed(evaluate, "--model", model, "--templates", tmp_path / "ijb", *flags, "--out", out)
        z = raw if flags else raw / np.linalg.norm(raw, axis=1, keepdims=True)
        z = z * np.array([r[3] for r in rows])[:, None] if len(flags) == 2 else z
        pooled = []
        for t in range(8):
            pair = z[2 * t : 2 * t + 2]
            pooled.append(pair.mean(0) if t % 2 == 0 else pair.sum(0))
        pooled = [p / np.linalg.norm(p) for p in pooled]
        scores = np.array([pooled[i] @ pooled[j] for i in range(8) for j in range(i)])
        entry = entries(out)["model", "ijb"]
        assert entry["metrics"]["auc"]["value"] == pytest.approx(
            evaluate.area_under_curve(*evaluate.roc_curve(np.round(scores, 6), a // 20 == b // 20)), abs=1e-12
        )
        assert entry["counts"] == {"templates": 8, "media": 12, "images": 16, "genuine": 4, "impostor": 24}
        assert ("with their norms" in entry["protocol"]) == bool(flags) and "no intervals" in entry["protocol"]


# ---------------------------------------------------------------------------------------------------------- bad input
def test_bad_lists(model, lists, tmp_path, fails):
    rows = list(csv.reader(open(lists / "named.csv")))

    def bad(name, changed, *words):
        with open(lists / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows(changed)
        fails(evaluate.main, ["--model", model, "--pairs", lists / f"{name}.csv", "--out", tmp_path / "out"], *words)

    bad("missing", [*rows, ("named/s1/77.png", rows[1][1], 1, 0)], "1 images that are not there", "s1/77.png")
    bad("columns", [r[1:] for r in rows], "no column path_a", "path_a,path_b,same")
    bad("same", [rows[0], (*rows[1][:2], "yes", 0)], "'yes'", "1 or 0")
    bad("fold", [r for r in rows if r[2:] != ["0", "2"]], "fold 2", "no impostor pairs")
    bad("short", [*rows[:5], rows[5][:2]], "entry 5", "not 4")
    bad("empty", rows[:1], "no lines")
    bad("genuine", [r for r in rows if r[2] != "0"], "no impostor pairs")
    fails(evaluate.main, ["--model", model, "--pairs", lists / "none.csv", "--out", tmp_path / "out"], "none.csv")
    same = [lists / "named.csv", lists / "named.csv"]
    fails(evaluate.main, ["--model", model, "--pairs", *same, "--out", tmp_path / "out"], "two test sets", "named")
    assert not (tmp_path / "out").exists()


def test_bad_embeddings(lists, tmp_path, fails):
    names = sorted({x for r in list(csv.reader(open(lists / "named.csv")))[1:] for x in r[:2]})
    z = np.random.default_rng(0).normal(size=(len(names), 4)).astype(np.float32)

    def bad(words, **arrays):
        np.savez(tmp_path / "z.npz", **({"embeddings": z, "paths": names} | arrays))
        argv = ["--embeddings", tmp_path / "z.npz", "--pairs", lists / "named.csv", "--out", tmp_path / "out"]
        fails(evaluate.main, argv, "z.npz", *words)

    for value in (np.nan, np.inf, 0):
        wrong = z.copy()
        wrong[3] = value
        bad(["1 embeddings", names[3]], embeddings=wrong)
    bad(["more than once", names[0]], embeddings=z[[0, *range(len(z))]], paths=[names[0], *names])
    bad([f"lacks 1 of the {len(names)}", names[2]], embeddings=np.delete(z, 2, 0), paths=np.delete(names, 2))
    bad(["(N, D)"], embeddings=z[:-1])
    bad(["(N, D)"], embeddings=z.astype(int))
    bad(["npz file"], paths=np.array(names, object))
    (tmp_path / "z.txt").write_text("no archive")
    argv = ["--embeddings", tmp_path / "z.txt", "--pairs", lists / "named.csv", "--out", tmp_path / "out"]
    fails(evaluate.main, argv, "npz file")
    assert not (tmp_path / "out").exists()


def test_bad_templates(model, tmp_path, fails):
    (tmp_path / "ijb").mkdir()
    listing = "path,template,media,score\nimages/0.png,1,1,0.5\nimages/1.png,2,1,0.5\n"

    def bad(words, text=listing, **arrays):
        (tmp_path / "ijb/templates.csv").write_text(text)
        arrays = {"a": [1, 1], "b": [1, 2], "same": [True, False]} | arrays
        np.savez(tmp_path / "ijb/pairs.npz", **{k: np.array(v) for k, v in arrays.items()})
        argv = ["--model", model, "--templates", tmp_path / "ijb", "--out", tmp_path / "out"]
        fails(evaluate.main, argv, *words)

    bad(["a template that is not there"], b=[1, 3])
    bad(["no impostor pairs"], same=[True, True])
    bad(["bad number", "x"], text=listing.replace("2,1", "x,1"))
    bad(["images that are not there"])
    bad(["npz file"], same=np.array([None, None], object))
    assert not (tmp_path / "out").exists()


def test_flags_that_do_not_go_together(model, faces, tmp_path, fails):
    out = ["--out", tmp_path / "out"]
    fails(evaluate.main, ["--data", faces / "test", *out], "--model or --embeddings")
    fails(evaluate.main, ["--model", model, *out], "nothing to measure it on")
    fails(evaluate.main, ["--model", model, "--probe", faces / "test", *out], "--gallery and --probe")
    search = ["--probe", faces / "test", "--gallery", faces / "train"]
    fails(evaluate.main, ["--model", model, *search, *out], "4 classes without an image in the gallery", "s1")
    assert not (tmp_path / "out").exists()
