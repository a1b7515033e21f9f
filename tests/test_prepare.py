"""Stage 0: the AT&T faces and anyone's folder."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

import prepare_data
import stage


def test_orl_folds_are_disjoint_and_cover_everyone(tmp_path):
    tested = []
    for fold in range(4):
        out = tmp_path / str(fold)
        assert prepare_data.main(["orl", "--fold", str(fold), "--size", "16", "--out", str(out)]) == 0
        train, test = (set(p.name for p in (out / part).iterdir()) for part in ("train", "test"))
        assert len(train) == 30 and len(test) == 10 and not train & test
        assert all(len(list(d.iterdir())) == 10 for part in ("train", "test") for d in (out / part).iterdir())
        tested += test
        split = json.loads((out / "split.json").read_text())
        assert set(split["test"]) == test and sum(split["train"].values()) == 300
    assert len(set(tested)) == 40


def test_orl_keeps_the_pictures_as_they_are(tmp_path):
    source = prepare_data.find_orl()
    assert prepare_data.main(["orl", "--out", str(tmp_path / "out")]) == 0
    image = Image.open(tmp_path / "out/test/s1/3.png")
    assert image.mode == "L" and image.size == (92, 112)
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(source / "s1/3.pgm")))


def test_orl_from_a_folder(tmp_path, fails):
    source = tmp_path / "faces"
    shutil.copytree(prepare_data.find_orl(), source)
    assert prepare_data.main(["orl", str(source), "--fold", "2", "--size", "16", "--out", str(tmp_path / "out")]) == 0
    shutil.rmtree(source / "s7")
    fails(prepare_data.main, ["orl", source, "--out", tmp_path / "other"], "not the AT&T set", "39 folders")
    assert not (tmp_path / "other").exists()


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for person in range(5):
        for i in range(3):
            path = tmp_path / "photos" / f"person {person}" / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(path)
    return tmp_path / "photos"


def test_folder_is_split_by_class(photos, tmp_path):
    out = tmp_path / "out"
    argv = [
        "folder",
        str(photos),
        "--out",
        str(out),
        "--test-classes",
        "0.4",
        "--crop",
        "5",
        "10",
        "25",
        "30",
        "--size",
        "16",
    ]
    assert prepare_data.main(argv) == 0
    train, test = (sorted(p.name for p in (out / part).iterdir()) for part in ("train", "test"))
    assert len(train) == 3 and len(test) == 2 and not set(train) & set(test)
    made = np.asarray(Image.open(out / "train" / train[0] / "1.png"))
    assert made.shape == (16, 16, 3)
    assert np.array_equal(made, stage.decode(photos / train[0] / "1.jpg", 16, 3, (5, 10, 25, 30)))


def test_the_seed_draws_the_test_classes():
    names = [f"n{i}" for i in range(20)]
    draws = [prepare_data.split_by_class(names, 0.25, seed) for seed in range(5)]
    assert all(len(d) == 5 and d < set(names) for d in draws) and len(set(map(frozenset, draws))) == 5
    assert prepare_data.split_by_class(names, 5, 3) == draws[3] and prepare_data.split_by_class(names, 0, 3) == set()


def test_the_output_may_not_lie_in_the_source(photos, fails):
    fails(prepare_data.main, ["folder", photos, "--out", photos / "prepared"], "inside the source")
    assert not (photos / "prepared").exists()


def test_equal_stems_do_not_overwrite_each_other(photos, tmp_path):
    Image.open(photos / "person 0/1.jpg").save(photos / "person 0/1.png")
    assert prepare_data.main(["folder", str(photos), "--out", str(tmp_path / "out"), "--test-classes", "0"]) == 0
    names = sorted(p.name for p in (tmp_path / "out/train/person 0").iterdir())
    assert names == ["0.png", "1.jpg.png", "1.png.png", "2.png"] and not (tmp_path / "out/test").exists()


def test_the_same_command_goes_on_and_another_is_refused(photos, tmp_path, fails):
    out = tmp_path / "out"
    argv = ["folder", str(photos), "--out", str(out), "--size", "16"]
    assert prepare_data.main(argv) == 0
    (out / "split.json").unlink()  # as a kill before the end leaves it
    lost = next((out / "train").glob("*/*.png"))
    lost.unlink()
    assert prepare_data.main(argv) == 0 and lost.exists() and (out / "split.json").exists()
    fails(prepare_data.main, [*argv[:-1], "32"], "size differ")
    assert Image.open(lost).size == (16, 16)


@pytest.mark.parametrize(
    "more, words",
    [
        (["--crop", "0", "0", "31", "40"], ["crop box", "30x40"]),
        (["--test-classes", "4"], ["fewer than 2"]),
        (["--test-classes", "0.9"], ["fewer than 2"]),
        (["--test-classes", "1.7"], ["1.7"]),
        (["--size", "0"], ["--size"]),
        (["--fold", "1"], ["--fold"]),
    ],
)
def test_bad_flags(photos, tmp_path, fails, more, words):
    fails(prepare_data.main, ["folder", photos, "--out", tmp_path / "out", *more], *words)
    assert not (tmp_path / "out").exists()


def test_bad_sources(photos, tmp_path, fails):
    fails(prepare_data.main, ["folder", tmp_path / "none", "--out", tmp_path / "out"], "none", "expected")
    (photos / "person 3/2.jpg").write_bytes(b"\xff\xd8broken")
    fails(prepare_data.main, ["folder", photos, "--out", tmp_path / "out"], "person 3/2.jpg")
    fails(prepare_data.main, ["mxnet", photos, "--out", tmp_path / "out"], "mxnet")
    assert not (tmp_path / "out").exists()
