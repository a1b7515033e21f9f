"""The protocols: against slow twins that loop, scikit-learn, and resamples written out in full."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import SMALL_RECOGNIZER, succeed
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

import evaluate
import stage
import train_recognizer
from evaluate import AllPairs, area_under_curve, equal_error_rate, report_far, roc_curve, tar_at_far


def slow_tar(scores, same, far):
    """Try every threshold."""
    best, impostors, genuine = 0.0, sum(not s for s in same), sum(same)
    for threshold in set(scores):
        accepted = [s for x, s in zip(scores, same) if x >= threshold]
        if sum(not s for s in accepted) <= far * impostors + 1e-9:
            best = max(best, sum(accepted) / genuine)
    return best


pairs = st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=4, max_size=80).filter(
    lambda p: 0 < sum(s for _, s in p) < len(p)
)  # few distinct scores: many ties


@settings(deadline=None, max_examples=200)
@given(pairs, st.sampled_from([0.5, 0.2, 0.1, 0.05]))
def test_tar_at_far_against_a_slow_twin(p, far):
    scores, same = np.array([x for x, _ in p], float), np.array([s for _, s in p])
    if (~same).sum() * far < 1 - 1e-9:
        with pytest.raises(stage.StageError, match="cannot be measured"):
            tar_at_far(scores, same, far)
    else:
        assert tar_at_far(scores, same, far) == pytest.approx(slow_tar(scores.tolist(), same.tolist(), far), abs=1e-12)


@settings(deadline=None, max_examples=200)
@given(pairs)
def test_auc_and_eer(p):
    scores, same = np.array([x for x, _ in p], float), np.array([s for _, s in p])
    far, tar = roc_curve(scores, same)
    assert area_under_curve(far, tar) == pytest.approx(roc_auc_score(same, scores), abs=1e-12)
    eer = equal_error_rate(far, tar)
    far, miss = np.concatenate([[0], far]), 1 - np.concatenate([[0], tar])
    i = next(i for i in range(len(far)) if far[i] >= miss[i])  # between this point and the one before, on a line
    assert min(far[i - 1], miss[i]) - 1e-12 <= eer <= max(far[i], miss[i - 1]) + 1e-12
    assert (
        np.interp(eer, far[i - 1 : i + 1], miss[i - 1 : i + 1]) == pytest.approx(eer, abs=1e-9) or far[i - 1] == far[i]
    )


def test_known_cases():
    same = np.array([True, True, False, False])
    assert equal_error_rate(*roc_curve(np.array([4.0, 3, 2, 1]), same)) == 0
    assert equal_error_rate(*roc_curve(np.array([1.0, 2, 3, 4]), same)) == 1
    assert equal_error_rate(*roc_curve(np.array([4.0, 2, 3, 1]), same)) == 0.5
    assert equal_error_rate(*roc_curve(np.array([1.0, 1, 1, 1]), same)) == 0.5
    scores, same = np.arange(100.0), np.arange(100) >= 90  # the 10 best are genuine, 90 impostors
    assert tar_at_far(scores, same, 0.1) == 1
    scores[50] = 98.5  # one impostor above all but the best
    assert tar_at_far(scores, same, 1 / 90) == 1 and roc_curve(scores, same)[1][0] == 0.1


def test_the_far_of_a_report_follows_from_the_counts():
    assert [report_far(n) for n in (99, 100, 999, 1000, 4500, 10_000_000)] == [math.inf, 0.1, 0.1, 0.01, 0.01, 1e-6]


def clouds(seed=0, people=7, dim=4):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(people), rng.integers(1, 6, people))
    z = rng.normal(size=(people, dim))[labels] + rng.normal(size=(len(labels), dim))
    return z / np.linalg.norm(z, axis=1, keepdims=True), labels


def test_all_pairs_against_loops():
    z, labels = clouds()
    p = AllPairs(z, labels)
    scores, same = zip(*((float(z[i] @ z[j]), labels[i] == labels[j]) for i in range(len(z)) for j in range(i)))
    found = p.metrics(np.ones(7, int))
    assert (p.genuine, p.impostors) == (sum(same), len(same) - sum(same))
    assert found["eer"] == pytest.approx(equal_error_rate(*roc_curve(np.array(scores), np.array(same))), abs=1e-12)
    assert found["auc"] == pytest.approx(roc_auc_score(same, scores), abs=1e-12)
    assert found["1e-1"] == pytest.approx(slow_tar(scores, same, 0.1), abs=1e-12)
    right = [
        labels[max((j for j in range(len(z)) if j != i), key=lambda j: z[i] @ z[j])] == labels[i]
        for i in range(len(z))
        if (labels == labels[i]).sum() > 1
    ]
    assert found["rank1"] == pytest.approx(np.mean(right))


@pytest.mark.parametrize("seed", range(8))
def test_weights_are_the_resample_written_out(seed):
    """Draw identities with replacement, list every copy's pairs, leave out pairs between copies: the same numbers."""
    z, labels = clouds(seed)
    z = z if seed % 2 else z.round()  # half of the seeds with many equal scores
    w = np.random.default_rng(seed).multinomial(7, np.full(7, 1 / 7))
    copies = [(i, copy) for i in range(len(z)) for copy in range(w[labels[i]])]
    scores, same, right = [], [], []
    for a, (i, x) in enumerate(copies):
        for j, y in copies[:a]:
            if labels[i] == labels[j] and (x != y or i == j):
                continue  # another copy of the same identity
            scores.append(float(z[i] @ z[j]))
            same.append(bool(labels[i] == labels[j]))
        others = [(float(z[i] @ z[j]), labels[j] == labels[i]) for j in range(len(z)) if j != i]
        if (labels == labels[i]).sum() > 1:
            right.append(max(others, key=lambda o: (o[0], not o[1]))[1])  # a tie counts against the probe
    found = AllPairs(z, labels).metrics(w)
    scores, same = np.array(scores), np.array(same)
    if 0 < same.sum() < len(same):
        assert found["auc"] == pytest.approx(roc_auc_score(same, scores), abs=1e-9)
        assert found["eer"] == pytest.approx(equal_error_rate(*roc_curve(scores, same)), abs=1e-9)
        assert found["1e-1"] == pytest.approx(slow_tar(scores.tolist(), same.tolist(), 0.1), abs=1e-9)
        assert found["rank1"] == pytest.approx(np.mean(right))
    else:
        assert math.isnan(found["auc"]) and math.isnan(found["eer"])


def test_a_resample_of_one_identity_says_nothing():
    """Of verification: there are no impostors. Its probes search among all images as before."""
    z, labels = clouds()
    found = AllPairs(z, labels).metrics(np.array([0, 0, 7, 0, 0, 0, 0]))
    assert 0 <= found.pop("rank1") <= 1 and all(math.isnan(v) for v in found.values())


# ---------------------------------------------------------------------------------------------------- the command
@pytest.fixture(scope="module")
def models(faces, tmp_path_factory):
    root, made = tmp_path_factory.mktemp("models"), []
    for name, steps in (("long", 40), ("short", 2)):
        succeed(train_recognizer, "--data", faces / "train", "--out", root / name, "--steps", steps, *SMALL_RECOGNIZER)
        made.append(root / name)
    return made


def command(models, faces, out, *more):
    return [str(a) for a in ("--model", *models, "--data", faces / "test", "--out", out, "--draws", 200, *more)]


def test_report_of_two_models(models, faces, tmp_path, capsys):
    out = tmp_path / "report"
    assert evaluate.main(command(models, faces, out)) == 0
    printed = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())["models"]
    assert [m["name"] for m in results] == ["long", "short"]
    assert results[0]["counts"] == {"identities": 4, "images": 16, "genuine": 4 * 6, "impostor": 6 * 16}
    model, saved = train_recognizer.load_recognizer(models[0], "cpu")
    images = stage.Images([faces / "test"], 16, 1)
    z = train_recognizer.embed(model, images, saved["config"], torch.device("cpu")).double().numpy()
    a, b = np.triu_indices(16, 1)
    auc = roc_auc_score((images.labels[a] == images.labels[b]).numpy(), (z[a] * z[b]).sum(1))
    assert results[0]["metrics"]["auc"]["value"] == pytest.approx(auc, abs=1e-6)
    for m in results:
        for metric in (*(m["metrics"][k] for k in ("eer", "auc", "rank1")), *m["metrics"]["tar_at_far"].values()):
            assert 0 <= metric["ci95"][0] <= metric["ci95"][1] <= 1
    assert list(results[0]["metrics"]["tar_at_far"]) == ["1e-1"]  # 96 impostor pairs cannot measure 1e-2
    gap = results[1]["metrics"]["eer"]["value"] - results[0]["metrics"]["eer"]["value"]
    assert (
        results[1]["difference_to_first"]["eer"]["value"] == pytest.approx(gap)
        and "difference_to_first" not in results[0]
    )
    table = (out / "table.md").read_text()
    assert table in printed and table.count("\n|") == 4 and "short - long" in table and "points" in table
    assert all((out / p).stat().st_size > 5000 for p in ("roc.png", "similarity.png"))
    before = (out / "results.json").read_bytes()
    assert evaluate.main(command(models, faces, out)) == 0 and (out / "results.json").read_bytes() == before


def test_a_model_against_itself_has_no_difference(models, faces, tmp_path):
    twin = tmp_path / "twin.pt"
    twin.write_bytes((models[0] / "model.pt").read_bytes())
    assert evaluate.main(command([models[0], twin], faces, tmp_path / "report")) == 0
    second = json.loads((tmp_path / "report/results.json").read_text())["models"][1]["difference_to_first"]
    assert second["eer"] == {"value": 0.0, "ci95": [0.0, 0.0]}


def test_test_classes_that_were_trained_on_are_named(models, faces, tmp_path, capsys):
    argv = [
        a if a != str(faces / "test") else str(faces / "train") for a in command(models[:1], faces, tmp_path / "report")
    ]
    assert evaluate.main(argv) == 0
    assert "warning: long was trained on 5" in capsys.readouterr().err


def test_bad_input(models, faces, tmp_path, fails):
    lonely = tmp_path / "lonely"
    for person in ("s1", "s2"):
        (lonely / person).mkdir(parents=True)
        (lonely / person / "1.png").write_bytes((faces / "test" / person / "1.png").read_bytes())
    fails(evaluate.main, ["--model", models[0], "--data", lonely, "--out", tmp_path / "a"], "no genuine")
    fails(evaluate.main, ["--model", models[0], models[0], "--data", faces / "test", "--out", tmp_path / "a"], "twice")
    fails(evaluate.main, ["--model", tmp_path / "none", "--data", faces / "test", "--out", tmp_path / "a"], "none")
    assert not (tmp_path / "a").exists()
