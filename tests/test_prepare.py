"""Stage 0: the AT&T faces and anyone's folder."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

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


@pytest.mark.parametrize("size", [[], ["--size", "16"]])
def test_grey(photos, tmp_path, size):
    """Of a folder, and of a list of pairs, whose files would be copied otherwise."""
    for i in (0, 1):
        (photos / f"person {i}/0.jpg").rename(photos / f"person {i}/person {i}_0001.jpg")
    (photos / "person 1/1.jpg").rename(photos / "person 1/person 1_0002.jpg")
    (photos / "pairs.txt").write_text("1\t1\nperson 1\t1\t2\nperson 0\t1\tperson 1\t1\n")
    for kind, count in (("folder", 15), ("pairs", 3)):
        assert prepare_data.main([kind, str(photos), "--grey", *size, "--out", str(tmp_path / kind)]) == 0
        images = [Image.open(p) for p in (tmp_path / kind).rglob("*.png")]
        assert len(images) == count
        assert {(i.mode, i.height) for i in images} == {("L", 16 if size else 40)}
    source = photos / "person 2/1.jpg"
    red, green, blue = np.asarray(Image.open(source)).astype(float).transpose(2, 0, 1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue  # ITU-R BT.601
    assert np.abs(stage.decode(source, None, 1).squeeze() - luma).max() < 1


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


def test_lfw_and_omniglot_where_the_libraries_keep_them(photos, tmp_path, monkeypatch, fails):
    """Without SRC: the folders that scikit-learn and torchvision fetched; one line where they cannot fetch."""
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path / "sklearn"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(prepare_data, "LFW_PEOPLE", len(list(photos.iterdir())))
    monkeypatch.setattr(prepare_data, "OMNIGLOT_CHARACTERS", {"images_background": 3, "images_evaluation": 2})
    shutil.copytree(photos, tmp_path / "sklearn/lfw_home/lfw_funneled")
    (tmp_path / "sklearn/lfw_home/lfw_funneled/person 4/2.jpg").unlink()
    argv = ["--min-images", "3", "--crop", "0", "0", "30", "30", "--test-classes", "1", "--out", str(tmp_path / "lfw")]
    assert prepare_data.main(["lfw", *argv]) == 0
    split = json.loads((tmp_path / "lfw/split.json").read_text())
    assert len(split["train"]) == 3 and len(split["test"]) == 1 and "person 4" not in split["train"] | split["test"]
    capped = [*argv[:-1], str(tmp_path / "capped"), "--per-class", "1"]
    assert prepare_data.main(["lfw", *capped]) == 0  # people with three images, of whom one is kept
    few = json.loads((tmp_path / "capped/split.json").read_text())
    assert few["train"] == dict.fromkeys(split["train"], 1) and few["test"] == dict.fromkeys(split["test"], 1)
    assert {p.name for p in (tmp_path / "capped").glob("*/*/*")} == {"0.png"}
    for part, classes in (("background", 3), ("evaluation", 2)):
        for i in range(classes):
            folder = tmp_path / f"cache/scoremix/omniglot-py/images_{part}/{part}/character{i}"
            shutil.copytree(photos / "person 0", folder)
    assert prepare_data.main(["omniglot", "--out", str(tmp_path / "omniglot")]) == 0
    split = json.loads((tmp_path / "omniglot/split.json").read_text())
    assert split["test"] == {"evaluation.character0": 3, "evaluation.character1": 3}
    assert prepare_data.main(["omniglot", "--per-class", "2", "--out", str(tmp_path / "few")]) == 0
    assert set(json.loads((tmp_path / "few/split.json").read_text())["train"].values()) == {2}
    assert {p.name for p in (tmp_path / "few/test").glob("*/*")} == {"0.png", "1.png"}
    shutil.rmtree(tmp_path / "cache/scoremix/omniglot-py/images_evaluation/evaluation/character1")
    fails(prepare_data.main, ["omniglot", "--out", tmp_path / "a"], "images_evaluation has 1 of 2", "delete it")
    shutil.rmtree(tmp_path / "sklearn/lfw_home/lfw_funneled/person 4")
    fails(prepare_data.main, ["lfw", "--out", tmp_path / "a"], "lfw_funneled has", "delete it")
    monkeypatch.setattr("torchvision.datasets.Omniglot", refuse)
    monkeypatch.setattr("sklearn.datasets.fetch_lfw_people", refuse)
    shutil.rmtree(tmp_path / "cache")
    shutil.rmtree(tmp_path / "sklearn")
    fails(prepare_data.main, ["omniglot", "--out", tmp_path / "a"], "cannot fetch Omniglot (no network)", "SRC")
    fails(prepare_data.main, ["lfw", "--out", tmp_path / "a"], "cannot fetch LFW (no network)", "SRC/<name>")


def refuse(*args, **kwargs):
    raise OSError("no network")


def test_tinyface(photos, tmp_path, fails):
    """Probes and gallery by person, the rest as distractors; the lists as MATLAB writes them, cells of names."""
    images, source = sorted(photos.glob("*/*.jpg")), tmp_path / "Testing_Set"
    for folder, names in (
        ("Probe", ["p1.jpg", "p2.jpg"]),
        ("Gallery_Match", ["a.jpg", "b.jpg", "c.jpg"]),
        ("Gallery_Distractor", ["x.jpg", "y.jpg"]),
    ):
        (source / folder).mkdir(parents=True)
        for name in names:
            shutil.copy(images.pop(), source / folder / name)

    def cells(*names):
        made = np.empty((len(names), 1), object)
        made[:, 0] = names
        return made

    probes = {"probe_set": cells("p1.jpg", "p2.jpg"), "probe_ids": np.array([[7], [8]], np.uint16)}
    savemat(source / "probe_img_ID_pairs.mat", probes)
    gallery = {"gallery_set": cells("a.jpg", "b.jpg", "c.jpg"), "gallery_ids": np.array([[7], [8], [8]], np.uint16)}
    savemat(source / "gallery_match_img_ID_pairs.mat", gallery)
    out = tmp_path / "out"
    assert prepare_data.main(["tinyface", str(source), "--out", str(out)]) == 0
    made = {str(p.relative_to(out)) for p in out.glob("*/*/*")}
    assert made == {"probe/7/p1.jpg", "probe/8/p2.jpg", "gallery/7/a.jpg", "gallery/8/b.jpg", "gallery/8/c.jpg"} | {
        "gallery/distractor/x.jpg",
        "gallery/distractor/y.jpg",
    }
    assert (out / "gallery/8/c.jpg").read_bytes() == (source / "Gallery_Match/c.jpg").read_bytes()
    (source / "Gallery_Match/c.jpg").unlink()
    fails(prepare_data.main, ["tinyface", source, "--out", tmp_path / "b"], "names c.jpg", "Gallery_Match")
    (source / "probe_img_ID_pairs.mat").write_bytes(b"no list")
    fails(prepare_data.main, ["tinyface", source, "--out", tmp_path / "b"], "probe_img_ID_pairs.mat is no list")
    assert not (tmp_path / "b").exists()
