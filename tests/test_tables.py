"""The pooled tables of results/: means, paired differences and their resampling against a slow twin."""

import csv
import importlib.util
import json
import re

import numpy as np
import pytest
from conftest import ROOT, SMALL_RECOGNIZER, succeed
from scipy import stats

import alignment
import evaluate
import train_recognizer



def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"results/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tables, orders, mixes, pooling = map(script, ("tables", "orders", "mixes", "pooling"))
METRICS = ["eer", "1e-1", "1e-2", "1e-3", "auc", "rank1"]


def write_row(folder, name, rng, level, impostors=4500):
    """A row whose errors lie about `level`, with 50 draws; the value and the draws of eer and of TAR at 1e-2."""
    draws = {k: level + 0.01 * rng.normal(size=50) for k in METRICS}
    values = {k: {"value": float(level + i / 1000), "ci95": [0, 1]} for i, k in enumerate(METRICS)}
    fars = {k: values.pop(k) for k in METRICS if k.startswith("1e-")}
    model = {"name": "x", "counts": {"impostor": impostors}, "metrics": values | {"tar_at_far": fars}}
    (folder / f"{name}.json").write_text(json.dumps({"models": [model]}))
    array = np.array([[draws[k] for k in METRICS]], np.float32)
    np.savez_compressed(folder / f"{name}.npz", draws=array, models=["x"], metrics=METRICS)
    last = int(name.partition("@")[2] or 5000)
    lines = [{"step": last // 2, "loss": 8 * level, "accuracy": 0.4}, {"step": last, "loss": level, "accuracy": 0.9}]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return np.append(level, array[0, 0]), np.append(level + 0.002, array[0, 2])


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "rows").mkdir()
    rng, kept = np.random.default_rng(0), {}
    for fold in (0, 1):
        for seed in range(3 - fold):  # fold 1 has fewer seeds
            for arm, level in (("real", 0.1 + fold / 10), ("far", 0.08 + seed / 100), ("close", 0.12)):
                if (fold, seed, arm) != (0, 2, "close"):
                    kept[fold, seed, arm] = write_row(tmp_path / "rows", f"{fold}-{seed}-{arm}", rng, level)
    return tmp_path, kept


def test_rows_are_read_and_pooled_as_a_slow_twin_does(folder):
    path, kept = folder
    rows, far, steps = tables.read_rows(path / "rows")
    assert steps == 5000
    assert far == "1e-2" and rows.keys() == kept.keys()  # 4,500 impostors: 10 of them above 1e-2, not above 1e-3
    for key, (eer, tar) in kept.items():
        assert np.abs(rows[key]["eer"] - eer).max() < 1e-7 and np.abs(rows[key]["miss"] - (1 - tar)).max() < 1e-7
    both = tables.pool(rows, "eer", "close", "real")
    rng, expected = np.random.default_rng(0), np.zeros((2, 51))
    for seeds, fold in (((0, 1), 0), ((0, 1), 1)):  # the seeds that both arms have
        order = np.append(0, 1 + rng.permutation(50))
        drawn = rng.integers(2, size=(2, 51))
        for a, arm in enumerate(("close", "real")):
            for b in range(51):
                chosen = [kept[fold, seeds[i if b == 0 else drawn[i, b]], arm][0][order[b]] for i in range(2)]
                expected[a, b] += np.mean(chosen) / 2
    assert np.abs(both - expected).max() < 1e-7
    assert both[:, 0] == pytest.approx([0.12, 0.15])


def test_the_table_says_what_the_rows_hold(folder, capsys):
    path, _ = folder
    succeed(tables, path)
    text = (path / "table.md").read_text()
    lines = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:]] for line in text.splitlines()[:5]}
    real, ours = lines["real"], lines["real + far pairs (ScoreMix)"]
    assert real[:4] == ["5", "15.0 ± 0.0", "", ""]
    assert ours[1] == "8.8 ± 0.9" and ours[2].startswith("-6.") and ours[3].startswith("+41.7 % [")
    assert "| far - close | 4 of 4 | -3." in text and "14 rows, folds [0, 1], seeds [0, 1, 2]" in text
    assert "\nNot run (fold-seed): real 0-3, 0-4, 1-2, 1-3, 1-4; far 0-3, 0-4, 1-2, 1-3, 1-4; close 0-2, " in text
    assert "5,000 steps" in text and "Arms without a row: random, reproduction, auggen" in text
    lines = list(csv.DictReader(open(path / "results.csv", newline="")))
    rows = {(x["fold"], x["seed"], x["arm"], x["metric"]): float(x["value"]) for x in lines if x["what"] == "row"}
    assert len(rows) == 14 * 4 and rows["0", "0", "close", "eer"] == 0.12 and rows["0", "0", "close", "miss"] == 0.878
    assert (path / "gain.png").stat().st_size > 5000 and "gain.png" in capsys.readouterr().out


def test_one_arm_alone_has_a_table_and_no_empty_figure(tmp_path, capsys):
    (tmp_path / "rows").mkdir()
    rng = np.random.default_rng(0)
    for seed in range(2):
        write_row(tmp_path / "rows", f"0-{seed}-real", rng, 0.1)
    succeed(tables, tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert "| real | 2 | 10.0 ± 0.0 |" in text and "No two of these arms have rows yet." in text
    assert "rows with a lower EER" not in text and "gain.png" not in capsys.readouterr().out
    assert not (tmp_path / "gain.png").exists()


def test_every_number_of_the_table_is_in_the_csv(folder):
    path, _ = folder
    (path / "pairs").mkdir()
    (path / "audit").mkdir()
    rng = np.random.default_rng(1)
    for arm in ("half", "random"):
        write_row(path / "rows", f"0-0-{arm}", rng, 0.05)
    for arm in ("real@100", "far@100", "close@100"):
        write_row(path / "rows", f"1-0-{arm}", rng, 0.3)
    for arm, count, distance in (("half", 5, 1.5), ("far", 10, 1.2), ("random", 10, 0.9)):
        report = {"count": count, "distances": {"chosen_mean": distance}}
        (path / f"pairs/0-{arm}.json").write_text(json.dumps(report))
    report = {name: {"mixed": i / 7, "real": i / 9} for i, name in enumerate(tables.TITLES)}
    (path / "audit/0-far.json").write_text(json.dumps(report))
    succeed(tables, path)
    text, lines = (path / "table.md").read_text(), csv.DictReader(open(path / "results.csv", newline=""))
    known = np.array([float(x[k]) for x in lines for k in ("value", "std", "low", "high") if x[k]])
    keyed = {(x["what"], x["arm"], x["steps"], x["metric"]): x for x in csv.DictReader(open(path / "results.csv"))}
    far = next(line for line in text.splitlines() if line.startswith(f"| {tables.ARMS['far']} |")).split("|")
    mean = keyed["mean", "far", "5000", "eer"]
    assert (
        far[3].strip() == f"{100 * float(mean['value']):.1f} ± {100 * float(mean['std']):.1f}" and mean["rows"] == "5"
    )
    assert float(keyed["mean by steps", "far", "100", "eer"]["value"]) == pytest.approx(0.3)
    assert float(keyed["audit", "far", "", "contrast"]["value"]) == pytest.approx(report["contrast"]["mixed"], abs=1e-6)
    percent, _, rest = text.split("Mean cosine distance")[0].partition("Were the steps enough")
    training, _, fractions = rest.partition("What the mixed images")
    losses = re.sub(r"\S+ \|\n", "\n", training)  # without the last column, the accuracies
    for part, scale, step, least in ((percent, 100, 0.1, 100), (losses, 1, 0.01, 7), (fractions, 1, 0.001, 15)):
        shown = re.findall(r"(?<![\w.@-])[+-]?\d+\.\d+", part)
        assert len(shown) > least and max(min(abs(float(v) - scale * known)) for v in shown) < 0.502 * step
    assert "Mean cosine distance of the pairs: random 0.9, far 1.2 ([figure](distance.png))." in text
    fewer = next(line for line in text.splitlines() if line.startswith("| random, half | 1 |"))  # real 0.1, far 0.08
    cells = [re.sub(r" \[.*", "", c).strip() for c in fewer.split("|")[3:-1]]
    assert cells == ["-2.0", "+2.0", "-5.0", "+5.0"]
    assert "Number of far pairs: half 5, far 10 ([figure](amount.png))." in text
    assert all((path / name).stat().st_size > 5000 for name in ("distance.png", "amount.png"))


def test_the_training_of_every_arm_is_told_and_drawn(folder):
    path, _ = folder
    write_row(path / "rows", "0-0-far@100", np.random.default_rng(1), 0.3)
    (path / "rows/1-1-far.jsonl").write_text('{"step": 5000, "loss": 0.9, "accuracy": 0.4}\n')  # logged less often
    (path / "rows/9-9-close.jsonl").write_text('{"step": 5000, "loss": 9, "accuracy": 0.1}\n')  # of no row
    succeed(tables, path)
    text = (path / "table.md").read_text().split("Were the steps enough?")[1].split("\n\n")[1]
    assert text.splitlines()[2:] == [
        "| real | 5,000 | 0.14 | 90.0 |",  # 0.1 three times and 0.2 twice
        "| real + far pairs (ScoreMix) | 5,000 | 0.25 | 80.0 |",  # 0.08, 0.09, 0.1, 0.08 and 0.9
        "| real + far pairs (ScoreMix) | 100 | 0.30 | 90.0 |",
        "| real + close pairs | 5,000 | 0.12 | 90.0 |",
    ]
    logs = tables.read_logs(path / "rows", tables.read_rows(path / "rows")[0])
    assert [log[:, 0].tolist() for log in logs.values()] == [[2500, 5000], [5000], [50, 100], [2500, 5000]]
    assert logs["real"][0, 1:].tolist() == pytest.approx([8 * 0.14, 0.4])
    assert (path / "training.png").stat().st_size > 5000


@pytest.mark.parametrize("level, verdict", [(0.02, "**holds**"), (0.3, "**does not hold**"), (0.1, "cannot be told")])
def test_an_ordering_holds_where_its_interval_lacks_zero(tmp_path, level, verdict):
    (tmp_path / "rows").mkdir()
    rng = np.random.default_rng(0)
    for seed in range(3):
        write_row(tmp_path / "rows", f"0-{seed}-real", rng, 0.1)
        write_row(tmp_path / "rows", f"0-{seed}-far", rng, level)
    succeed(tables, tmp_path)
    lines = (tmp_path / "table.md").read_text().splitlines()
    ours = next(line for line in lines if line.startswith("| ScoreMix > real |")).split("|")
    assert ours[2].strip().startswith(f"{100 * (level - 0.1):+.1f} [") and ours[3].strip() == verdict
    opposite = {"**holds**": "**does not hold**", "**does not hold**": "**holds**"}.get(verdict, verdict)
    assert ours[5].strip() == opposite  # write_row gives TAR the same level, so 1 - TAR goes the other way
    assert "| far > close |  | not run |  | not run |" in lines


def test_other_numbers_of_steps_have_a_table_of_their_own(folder):
    path, kept = folder
    rng = np.random.default_rng(1)
    longer, _ = write_row(path / "rows", "0-0-real@100", rng, 0.3)
    write_row(path / "rows", "0-0-far@100", rng, 0.2)
    write_row(path / "rows", "1-0-far@100", rng, 0.9)
    succeed(tables, path)
    text = (path / "table.md").read_text()
    lines = [re.sub(r" \[.*?\]", "", x) for x in text.splitlines() if x.startswith("| 100 |")]
    assert lines == [  # by EER, 1 - TAR, rank-1; of real data alone in fold 0 only
        "| 100 | 30.0 (1 of 5 rows), +20.0 | 55.0 (2 of 5 rows), +47.0 |",
        "| 100 | 69.8 (1 of 5 rows), -20.0 | 44.8 (2 of 5 rows), -47.0 |",
        "| 100 | 30.5 (1 of 5 rows), +20.0 | 55.5 (2 of 5 rows), +47.0 |",
    ]
    assert "| 5,000 | 15.0 | 8.8 |" in text and "| 5,000 | 84.8 | 91.1 |" in text and "| real | 5 |" in text  # all rows
    assert (path / "steps.png").stat().st_size > 5000
    each = [line.split("|")[1:4] for line in text.split("Each with steps of its own")[1].split("\n\n")[1].splitlines()]
    assert [c.strip() for c in each[0]] == ["arm, steps; against real with", "100 steps", "5,000 steps"]
    assert [c.split(" [")[0].strip() for c in each[2]] == ["far, 100", "-10.0", "+40.0"]  # fold 0: 20 - 30; 55 - 15
    assert [c.split(" [")[0].strip() for c in each[3]] == ["far, 5,000", "-22.0", "-6.3"]  # 8 - 30; 8.75 - 15
    gap = longer - kept[0, 0, "real"][0]
    found = [x for x in csv.DictReader(open(path / "results.csv", newline="")) if x["what"] == "difference"]
    ours = next(x for x in found if (x["arm"], x["against"], x["metric"]) == ("real@100", "real", "eer"))
    expected = [gap[0], *tables.interval(gap)]
    assert [float(ours[k]) for k in ("value", "low", "high")] == pytest.approx(expected, abs=1e-6)
    text = text.split("With 100 steps of the recogniser:")[1]
    assert "| real | 1 | 30.0 |" in text and "| real + far pairs (ScoreMix) | 2 | 55.0 | -10.0 [" in text
    assert "| far - real | 1 of 1 | -10.0 [" in text
    write_row(path / "rows", "0-0-close@100", rng, 0.4)
    write_row(path / "rows", "0-0-close@200", rng, 0.2)
    succeed(tables, path)
    line = next(x for x in (path / "table.md").read_text().splitlines() if x.startswith("| 200 |"))
    assert re.sub(r" \[.*?\]", "", line).startswith("| 200 |  |  | 20.0 (1 of 4 rows), ")  # the others not with 200
    text = (path / "table.md").read_text().split("With 100 steps of the recogniser:")[1]
    assert "| real | 1 | 30.0 |" in text and "| real + close pairs | 1 | 40.0 | +10.0" in text
    for arm in ("real@100", "close@100", "close@200"):
        (path / f"rows/0-0-{arm}.json").unlink()
    succeed(tables, path)
    assert "With 100 steps" not in (path / "table.md").read_text()  # one arm is no table


def test_arms_without_a_row_in_common_with_real(tmp_path):
    (tmp_path / "rows").mkdir()
    for name in ("0-1-far", "0-0-close", "0-0-far@100"):
        write_row(tmp_path / "rows", name, np.random.default_rng(0), 0.1)
    succeed(tables, tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert "| real + close pairs | 1 | 10.0 |  |  |" in text and "nan" not in text
    assert "| 100 | 10.0 |" in text and "against real with" not in text
    assert "steps.png" not in text and not (tmp_path / "steps.png").exists()  # no row has all steps


def test_hours_are_told_by_stage(folder):
    path, _ = folder
    (path / "costs").mkdir()
    (path / "pairs").mkdir()
    report = {"count": 40, "distances": {"chosen_mean": 1.2}, "cost": {"seconds": 900}}
    (path / "pairs/0-far.json").write_text(json.dumps(report))
    for name, hours in (
        ("train_diffusion-0-generator", 1.5),
        ("train_diffusion-1-generator", 2.5),
        ("train_recognizer-0-0-real", 0.25),
        ("train_recognizer-1-1-far", 0.5),
        ("train_recognizer-1-1-real", 0.75),
        ("train_recognizer-1-1-larger", 3),
        ("train_recognizer-1-1-far@9000", 2),
    ):
        (path / f"costs/{name}.json").write_text(json.dumps({"seconds": 3600 * hours}))
    succeed(tables, path)
    lines = (path / "table.md").read_text().splitlines()
    at = lines.index("| train_recognizer | 3 | 0.500 | 1.50 |")
    assert lines[at + 1 : at + 6] == [
        "| train_recognizer --arch medium | 1 | 3.000 | 3.00 |",
        "| train_recognizer --steps 9000 | 1 | 2.000 | 2.00 |",
        "| train_diffusion | 2 | 2.000 | 4.00 |",
        "| mine_pairs | 1 | 0.250 | 0.25 |",
        "| all | 8 | | 10.75 |",
    ]
    found = {(x["what"], x["arm"]): float(x["value"]) for x in csv.DictReader(open(path / "results.csv", newline=""))}
    assert found["hours a run", "train_diffusion"] == 2 and found["hours in all", "all"] == 10.75


def test_the_way_of_computing_is_told_by_run_where_it_differs(folder):
    path, _ = folder
    (path / "configs").mkdir()
    for name, precision in (("train_diffusion-0-generator", "bf16"), ("train_recognizer-0-1-far", "bf16")):
        config = {"arguments": {"precision": precision}, "versions": {"torch": "2.14.1+cu130"}}
        (path / f"configs/{name}.json").write_text(json.dumps(config))
    succeed(tables, path)
    assert "(configs/) were trained in bf16, PyTorch 2.14.1: all 2." in (path / "table.md").read_text()
    config = {"arguments": {"precision": "fp32"}, "versions": {"torch": "2.15.0"}}
    (path / "configs/train_recognizer-0-1-real.json").write_text(json.dumps(config))
    (path / "configs/evaluate-0-1-real.json").write_text("{}")
    succeed(tables, path)
    told = "bf16, PyTorch 2.14.1: 0-generator, 0-1-far; fp32, PyTorch 2.15.0: 0-1-real."
    assert f"(configs/) were trained in {told}" in (path / "table.md").read_text()


def test_the_audits_are_averaged_over_folds(folder):
    path, _ = folder
    (path / "audit").mkdir()
    for fold, arm, mixed in ((0, "far", 0.5), (1, "far", 0.7), (0, "close", 0.8)):
        report = {name: {"mixed": mixed, "real": 0.9 + fold / 10} for name in tables.TITLES}
        report["nearer_than_classmates_pixels"]["real"] = None
        (path / f"audit/{fold}-{arm}.json").write_text(json.dumps(report))
    succeed(tables, path)
    lines = (path / "table.md").read_text().splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("| images | real | far | close (1 of 2) |"))
    assert "| 0.950 | 0.600 | 0.800 |" in lines[head + 2] and len(lines[head + 2 :]) == len(tables.TITLES)
    assert lines[-1].endswith("|  | 0.600 | 0.800 |")
    report["consistency"]["mixed"] = None  # of mixes of one image
    (path / "audit/0-close.json").write_text(json.dumps(report))
    succeed(tables, path)
    assert "| 0.950 | 0.600 |  |" in (path / "table.md").read_text()


def test_the_alignment_of_each_unit_is_pooled(folder):
    path, _ = folder
    (path / "alignment").mkdir()
    for unit, value in ((0, 0.1), (1, 0.4)):
        measures = {"condition, recogniser": dict.fromkeys(tables.MEASURES, value)}
        (path / f"alignment/{unit}.json").write_text(json.dumps({"measures": measures}))
        succeed(tables, path)
        cell = "0.100" if unit == 0 else "0.250 (0.100 to 0.400)"
        assert f"| condition, recogniser |{f' {cell} |' * 4}" in (path / "table.md").read_text().splitlines()
    found = [x for x in csv.DictReader(open(path / "results.csv", newline="")) if x["what"] == "alignment"]
    measured = alignment.measures(*np.random.default_rng(0).normal(size=(2, 9, 3)), 2)
    assert {x["metric"] for x in found} == set(measured) and len(found) == 4
    assert {(float(x["value"]), float(x["low"]), float(x["high"]), x["rows"]) for x in found} == {(0.25, 0.1, 0.4, "2")}


def test_folders_without_rows_or_with_unlike_rows(folder, tmp_path, fails):
    path, _ = folder
    write_row(path / "rows", "0-9-real", np.random.default_rng(0), 0.1, impostors=450)
    fails(tables.main, [path], "unlike reports")
    (path / "rows/0-9-real.json").rename(path / "rows/notes.json")
    fails(tables.main, [path], "notes.json is no row")
    for name, words in (("0-0-nearby", "no title"), ("1-1-far@100", "1-1-far@100.json has 90 steps, not 100")):
        write_row(path / "rows", name, np.random.default_rng(0), 0.1)
        (path / f"rows/{name}.jsonl").write_text('{"step": 90}\n')
        (path / "rows/notes.json").rename(path / "kept")
        fails(tables.main, [path], words)
        (path / f"rows/{name}.json").unlink()
        (path / "kept").rename(path / "rows/notes.json")
    write_row(path / "rows", "0-9-real", np.random.default_rng(0), 0.1, impostors=99)
    (path / "rows/notes.json").unlink()
    fails(tables.main, [path], "99 impostor pairs")
    (tmp_path / "empty/rows").mkdir(parents=True)
    fails(tables.main, [tmp_path / "empty"], "no rows")
    write_row(tmp_path / "empty/rows", "0-0-far@100", np.random.default_rng(0), 0.1)
    (tmp_path / "empty/rows/0-0-far@100.jsonl").write_text('{"step": 100}\n')
    fails(tables.main, [tmp_path / "empty"], "other numbers of steps alone (far@100)")
    for name in ("0-0-real", "0-0-far@5000"):  # the set's own steps are known by the last file alone
        write_row(tmp_path / "empty/rows", name, np.random.default_rng(0), 0.1)
    fails(tables.main, [tmp_path / "empty"], "0-0-far@5000.json has the set's own steps; call it 0-0-far.json")


def test_rows_with_other_steps_are_missing_where_the_arm_has_its_own():
    rows = dict.fromkeys([(0, s, "larger") for s in range(3)] + [(0, s, "far") for s in range(5)])
    assert tables.not_run(rows) == []
    rows |= dict.fromkeys([(0, 1, "far@100"), (0, 0, "larger@100"), (0, 1, "larger@100")])
    assert tables.not_run(rows) == ["far@100 0-0, 0-2", "larger@100 0-2"]


def test_evaluate_writes_the_draws_that_its_intervals_come_from(faces, tmp_path):
    real, out = tmp_path / "real", tmp_path / "out"
    succeed(train_recognizer, "--data", faces / "train", "--out", real, "--steps", 5, *SMALL_RECOGNIZER)
    succeed(evaluate, "--model", real, "--data", faces / "test", "--out", out, "--draws", 100)
    metrics = json.loads((out / "results.json").read_text())["models"][0]["metrics"]
    with np.load(out / "draws.npz") as file:
        draws = dict(zip(file["metrics"].tolist(), file["draws"][0]))
        assert file["models"].tolist() == ["real"] and file["draws"].dtype == np.float32
    assert np.percentile(draws["eer"], [2.5, 97.5]) == pytest.approx(metrics["eer"]["ci95"], abs=1e-6)
    tar = metrics["tar_at_far"]["1e-1"]
    assert np.percentile(draws["1e-1"], [2.5, 97.5]) == pytest.approx(tar["ci95"], abs=1e-6)


def test_the_interval_of_seeds_alone_is_students(tmp_path):
    rng, gaps = np.random.default_rng(2), np.array([-0.02, -0.03, 0.01])
    for seed, gap in enumerate(gaps):
        for arm, level in (("real", 0.1), ("far", 0.1 + gap)):
            write_row(tmp_path, f"0-{seed}-{arm}", rng, level)
    rows, numbers = tables.read_rows(tmp_path)[0], tables.Numbers()
    name, gain, _, alone, *rest = tables.compare(rows, "far", "real", numbers, 5000)
    line = next(x for x in numbers if x["what"] == "difference, seeds alone")
    expected = stats.ttest_1samp(gaps, 0).confidence_interval(0.95)
    assert [line["low"], line["high"]] == pytest.approx([expected.low, expected.high])
    assert alone == f"[{100 * expected.low:+.1f}, {100 * expected.high:+.1f}]"
    assert (name, gain, len(rest)) == ("far - real", "2 of 3", len(tables.fars(rows)) + 1)
    assert tables.compare(rows, "far", "close", numbers, 5000) is None


def test_folds_of_unlike_spread_have_welchs_degrees_of_freedom():
    x, y = np.array([-0.02, -0.03, 0.01]), np.array([0.001, 0.003, 0.002, 0.0])
    twice = stats.ttest_ind(x, -y, equal_var=False).confidence_interval(0.95)  # mean of x + mean of y
    assert tables.seeds_alone([x, y]) == pytest.approx([twice.low / 2, twice.high / 2])
    assert tables.seeds_alone([x, y[:2]]) is None
    assert tables.seeds_alone([np.full(3, 0.5)]) == pytest.approx((0.5, 0.5))


def test_p_is_twice_the_share_of_draws_beyond_zero():
    draws = np.concatenate([np.full(97, -0.01), [0.02, 0.03]])
    assert pooling.chance(np.append(-0.01, draws)) == pooling.chance(np.append(0.01, -draws)) == pytest.approx(6 / 100)
    assert pooling.chance(np.append(-0.01, np.full(99, -0.01))) == pytest.approx(2 / 100)  # never none at all
    assert pooling.chance(np.array([0.0, -1, 1, np.nan])) == 1
    normal = np.append(-2, np.random.default_rng(0).normal(-2, 1, 200_000))
    assert pooling.chance(normal) == pytest.approx(2 * stats.norm.sf(2), rel=0.05)


def test_holms_correction_is_what_the_definition_says():
    p = [0.04, 0.001, 0.03, 0.2, 0.03]
    ranks = sorted(range(5), key=lambda i: p[i])
    slow = {i: min(1, max((5 - k) * p[j] for k, j in enumerate(ranks[: ranks.index(i) + 1]))) for i in ranks}
    assert orders.holm(p) == pytest.approx([slow[i] for i in range(5)])
    assert orders.holm(p)[1] == pytest.approx(0.005) and orders.holm([0.4, 0.9]) == pytest.approx([0.8, 0.9])


def line(what, arm, against, steps, metric, value, low="", high="", p=""):
    """A line of results.csv."""
    return {"what": what, "arm": arm, "against": against, "steps": steps, "metric": metric, "value": value,
            "low": low, "high": high, "p": p, "rows": 3}


def write_results(folder, lines):
    folder.mkdir(parents=True)
    with open(folder / "results.csv", "w", newline="") as file:
        out = csv.DictWriter(file, tables.FIELDS)
        out.writeheader()
        out.writerows(lines)


def test_the_orders_of_all_sets_are_drawn_with_their_own_steps(tmp_path, fails):
    lines = [line("difference", "far", "real", 20, "eer", -0.01, -0.02, 0.01, 0.3),
             line("difference, seeds alone", "far", "real", 20, "eer", -0.01, -0.03, 0.02, ""),
             line("difference", "far", "real", 20, "auc", 9, 9, 9, 0.5),
             line("mean", "real", "", 20, "eer", 0.1, "", "", ""),
             line("difference", "far", "real", 10, "eer", 0.5, 0.4, 0.6, 0.001),
             line("difference", "far", "close", 20, "miss", -0.03, -0.04, -0.02, 0.002),
             line("difference", "far", "random", 10, "eer", 0, 0, 0, 1)]
    for name in orders.SETS:
        write_results(tmp_path / name, lines)
    gaps = orders.read_gaps(tmp_path / "lfw")
    assert gaps == {
        ("far", "real", "eer"): {"value": -0.01, "low": -0.02, "high": 0.01, "p": 0.3, "seeds_low": -0.03,
                                 "seeds_high": 0.02},
        ("far", "close", "miss"): {"value": -0.03, "low": -0.04, "high": -0.02, "p": 0.002},
    }
    succeed(orders, "--folder", tmp_path)
    assert (tmp_path / "orders.png").stat().st_size > 5000
    text = (tmp_path / "orders.md").read_text()
    assert "| LFW | ScoreMix > real | EER | -1.0 [-2.0, +1.0] | [-3.0, +2.0] | 0.300 | 1.000 |" in text
    assert "| LFW | far > close | 1 - TAR | -3.0 [-4.0, -2.0] |  | 0.002 | **0.016** |" in text
    found = list(csv.DictReader(open(tmp_path / "orders.csv", newline="")))
    assert len(found) == 8 and {x["p_holm"] for x in found} == {"0.016000", "1.000000"}
    (tmp_path / "omniglot/results.csv").write_text(",".join(tables.FIELDS) + "\n")
    fails(orders.main, ["--folder", str(tmp_path)], "is empty, or of an older tables.py")
    (tmp_path / "orl/results.csv").unlink()
    (tmp_path / "omniglot/results.csv").unlink()
    fails(orders.main, ["--folder", str(tmp_path)], "results.csv is missing")


def test_the_images_of_all_sets_stand_in_one_table(tmp_path, fails):
    """Beside the difference in EER with the set's own steps; an arm that was not audited has no line."""
    lines = [line("mean", "real", "", 20, "eer", 0.1), line("audit", "close", "", "", "consistency", 0.8),
             line("audit", "close", "", "", "similarity_to_sources", 0.6), line("audit", "real", "", "", "loss", 0.04),
             line("audit", "real", "", "", "consistency", 0.9), line("audit", "far", "", "", "consistency", 0.45),
             line("audit", "far", "", "", "similarity_to_sources", 0.15), line("audit", "far", "", "", "layout", 7),
             line("audit", "far", "", "", "nearer_than_classmates_embedding", 0.0123),
             line("difference", "far", "real", 20, "eer", -0.01, -0.02, 0.01),
             line("difference", "far", "real", 10, "eer", 9, 9, 9), line("difference", "far", "close", 20, "eer", 9),
             line("difference", "far", "real", 20, "miss", 9), line("difference", "larger", "real", 20, "eer", 9)]
    for name in mixes.FOLDERS:
        write_results(tmp_path / name, lines)
    found = mixes.read(tmp_path / "lfw")
    assert found == {"real": {"loss": 0.04, "consistency": 0.9},
                     "far": {"consistency": 0.45, "similarity_to_sources": 0.15, "gap": (-1, -2, 1),
                             "nearer_than_classmates_embedding": 0.0123},
                     "close": {"consistency": 0.8, "similarity_to_sources": 0.6}}
    assert list(found) == ["real", "far", "close"]  # the order of the tables
    succeed(mixes, "--folder", tmp_path)
    assert (tmp_path / "mixes.png").stat().st_size > 5000
    text = (tmp_path / "mixes.md").read_text()
    assert "| LFW: far pairs (ScoreMix) | -1.0 [-2.0, +1.0] |  | 0.15 |  | 0.45 |  |  | 1.2 |" in text
    assert "| LFW, 10,000 steps: the real images |  |  |  | 0.0 | 0.90 |" in text
    assert text.count("\n| ") == 1 + 3 * len(mixes.FOLDERS)
    (tmp_path / "lfw/results.csv").unlink()
    fails(mixes.main, ["--folder", str(tmp_path)], "results.csv is missing")
