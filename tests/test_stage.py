"""Image folders, run directories, one-line errors: what every stage stands on."""

import argparse
import gc
import json
import pickle
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import stage
import training


def save(path, array, **kw):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **kw)


GREY = np.tile(np.arange(0, 160, 10, dtype=np.uint8), (16, 1))


# ------------------------------------------------------------------------------------------------------ image folders
def test_folders_are_united_by_class_name(tmp_path):
    save(tmp_path / "a/zoe/1.png", GREY)
    save(tmp_path / "a/ann/1.png", GREY)
    save(tmp_path / "b/zoe/2.jpg", GREY)
    save(tmp_path / "b/zoe/.hidden.png", GREY)
    (tmp_path / "b/zoe/notes.txt").write_text("not an image")
    (tmp_path / "b/.cache").mkdir()
    images = stage.Images([tmp_path / "a", tmp_path / "b"], 16)
    assert images.classes == ["ann", "zoe"] and images.labels.tolist() == [0, 1, 1]
    assert [p.name for p in images.paths] == ["1.png", "1.png", "2.jpg"]
    assert images.channels == 1 and images[torch.tensor([1])].shape == (1, 1, 16, 16)
    assert images[torch.tensor([0])].flatten().tolist() == GREY.flatten().tolist()


def test_one_colour_image_makes_the_set_colour(tmp_path):
    save(tmp_path / "a/1.png", GREY)
    save(tmp_path / "b/1.png", np.stack([GREY, GREY // 2, 0 * GREY], axis=2))
    images = stage.Images([tmp_path], 16)
    x = images[torch.tensor([0, 1])]
    assert images.channels == 3 and x.shape == (2, 3, 16, 16)
    assert (x[0] == x[0, :1]).all() and not (x[1] == x[1, :1]).all()
    assert stage.Images([tmp_path], 16, channels=1)[torch.tensor([1])].shape == (
        1,
        1,
        16,
        16,
    )  # a model's channels rule


def test_images_that_do_not_fit_are_read_as_needed(tmp_path, monkeypatch):
    for i in range(6):
        save(tmp_path / f"c{i % 2}" / f"{i}.png", GREY + np.uint8(i))
    save(tmp_path / "c0/colour.png", np.stack([GREY] * 3, axis=2))
    index = torch.tensor([3, 0, 6])
    held = stage.Images([tmp_path], 12)
    monkeypatch.setattr(stage.os, "sysconf", lambda name: 1)
    read = stage.Images([tmp_path], 12)
    assert held.pixels is not None and read.pixels is None
    assert read.channels == held.channels == 3 and torch.equal(read[index], held[index])


def test_sixteen_bit_exif_palette_and_alpha(tmp_path):
    deep = GREY.astype(np.uint16) * 257
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert stage.decode(tmp_path / "deep.png", None)[..., 0].tolist() == GREY.tolist()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side
    Image.fromarray(GREY[:8]).save(tmp_path / "turned.jpg", exif=exif, quality=100)
    turned = stage.decode(tmp_path / "turned.jpg", None)
    assert turned.shape == (16, 8, 1) and np.abs(turned[..., 0].astype(int) - np.rot90(GREY[:8], -1)).max() <= 3
    colour = np.dstack([GREY, 255 - GREY, GREY * 0 + 7])
    Image.fromarray(colour).convert("P", palette=Image.ADAPTIVE).save(tmp_path / "palette.png")
    assert stage.decode(tmp_path / "palette.png", 16).shape == (16, 16, 3)
    Image.fromarray(np.dstack([colour, 0 * GREY + 255])).save(tmp_path / "alpha.png")
    assert np.array_equal(stage.decode(tmp_path / "alpha.png", None), colour)


def test_crop_and_size(tmp_path):
    save(tmp_path / "x.png", GREY)
    assert np.array_equal(stage.decode(tmp_path / "x.png", None, crop=(2, 4, 10, 16))[..., 0], GREY[4:16, 2:10])
    assert np.array_equal(stage.decode(tmp_path / "x.png", 8, crop=(0, 0, 8, 8))[..., 0], GREY[:8, :8])
    assert stage.decode(tmp_path / "x.png", 32, channels=3).shape == (32, 32, 3)
    save(tmp_path / "checks.png", (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8))
    assert abs(stage.decode(tmp_path / "checks.png", 16).astype(int) - 128).max() < 20  # antialiased
    with pytest.raises(stage.StageError, match="does not lie inside"):
        stage.decode(tmp_path / "x.png", 8, crop=(0, 0, 17, 16))


def bomb():
    """A PNG of a few bytes that claims 60,000 x 60,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


@pytest.mark.parametrize("content", [b"", b"not an image", bomb(), None])
def test_a_broken_image_is_named(tmp_path, content):
    save(tmp_path / "a/good.png", GREY)
    bad = tmp_path / "b" / "bad one.png"
    save(bad, np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8))
    bad.write_bytes(bad.read_bytes()[:150] if content is None else content)  # None: truncated
    with pytest.raises(stage.StageError, match="bad one.png"):
        stage.Images([tmp_path], 16)


def test_empty_and_missing_folders(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "hollow/class").mkdir(parents=True)
    for path, word in ((tmp_path / "none", "none"), (tmp_path / "empty", "expected"), (tmp_path / "hollow", "class")):
        with pytest.raises(stage.StageError, match=word):
            stage.scan([path])


def test_batches_walk_through_every_image_and_follow_from_seed_and_step():
    steps = [training.batch_indices(i, 10, 4, seed=1) for i in range(15)]  # 60 draws: six times ten images
    chain = torch.cat(steps)
    assert all(sorted(chain[10 * e : 10 * e + 10].tolist()) == list(range(10)) for e in range(6))
    assert not torch.equal(chain[:10], chain[10:20])
    assert torch.equal(training.batch_indices(7, 10, 4, seed=1), steps[7])
    assert not torch.equal(torch.cat([training.batch_indices(i, 10, 4, seed=2) for i in range(15)]), chain)
    assert len(training.batch_indices(3, 5, 64, seed=0)) == 64  # a batch larger than the set
    for n, batch in ((10, 4), (5, 5), (5, 64), (7, 1), (12, 6)):
        parts = [training.batch_indices(i, n, batch, seed=3) for i in range(9)]
        orders = torch.cat([training.permutation(n, 3, e) for e in range(9 * batch // n + 1)])
        assert torch.equal(torch.cat(parts), orders[:9 * batch]) and {len(p) for p in parts} == {batch}


def test_folders_that_are_not_finished_or_given_twice_are_refused(faces, tmp_path):
    """Half of the mixes, of a sampler that was stopped, would pass for a smaller set."""
    for maker, inner, last in (("sample_scoremix", ".", "manifest.csv"), ("prepare_data", "train", "split.json"),
                               ("prepare_data", "probe", "lists.json")):
        out = tmp_path / f"{maker}-{inner}"
        shutil.copytree(faces / "test", out / inner)
        assert stage.scan([out / inner])[0]
        (out / "config.json").write_text(json.dumps({"stage": maker}))
        with pytest.raises(stage.StageError, match="is not finished"):
            stage.scan([faces / "test", out / inner])
        (out / last).write_text("")
        assert stage.scan([out / inner])[0]
    with pytest.raises(stage.StageError, match="given twice"):
        stage.scan([faces / "test", f"{faces}/./test"])


# ------------------------------------------------------------------------------------------------------ run directory
def arguments(out, **kw):
    return argparse.Namespace(out=str(out), device="cpu", seed=0, log_every=1, **kw)


def test_config_says_how_the_run_was_made(tmp_path):
    save(tmp_path / "data/a/1.png", GREY)
    run = stage.Run(
        "some_stage",
        arguments(tmp_path / "run", data=str(tmp_path / "data")),
        {"data": str(tmp_path / "data")},
        {"n": 1},
    )
    config = json.loads((run.dir / "config.json").read_text())
    assert config["stage"] == "some_stage" and config["arguments"]["seed"] == 0 and config["derived"] == {"n": 1}
    assert (
        config["inputs"]["data"] == [stage.fingerprint(tmp_path / "data")]
        and config["versions"]["torch"] == torch.__version__
    )


def test_another_run_is_refused_by_the_names_of_what_differs(tmp_path):
    stage.Run("a", arguments(tmp_path / "run", lr=0.1), {})
    again = arguments(tmp_path / "run", lr=0.1)
    again.device, again.log_every = "cuda", 7
    stage.Run("a", again, {})  # neither the device nor the log interval changes the result
    (tmp_path / "run/model.pt").write_text("")  # from here on there is something to lose
    with pytest.raises(stage.StageError, match="holds another run: lr differ"):
        stage.Run("a", arguments(tmp_path / "run", lr=0.2), {})
    with pytest.raises(stage.StageError, match="stage differ"):
        stage.Run("b", arguments(tmp_path / "run", lr=0.1), {})
    for text in ('{"model_type": "vit"}', "", "[1]"):
        (tmp_path / "foreign").mkdir(exist_ok=True)
        (tmp_path / "foreign/config.json").write_text(text)
        with pytest.raises(stage.StageError, match="damaged or not ours"):
            stage.Run("a", arguments(tmp_path / "foreign"), {})
        assert (tmp_path / "foreign/config.json").read_text() == text
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("years of work")
    with pytest.raises(stage.StageError, match="no run of this project"):
        stage.Run("a", arguments(tmp_path / "mine"), {})
    with pytest.raises(FileExistsError):
        stage.Run("a", arguments(tmp_path / "mine/thesis.tex"), {})
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_costs_add_up_over_the_life_of_a_run(tmp_path):
    for _ in range(2):
        run = stage.Run("a", arguments(tmp_path / "run"), {})
        run.spend(torch.device("cpu"), images=3, flops=10)
    cost = json.loads((tmp_path / "run/cost.json").read_text())
    assert cost["images"] == 6 and cost["flops"] == 20 and cost["seconds"] > 0 and cost["peak_memory_bytes"] > 1e7


def test_fingerprints_see_names_and_sizes(tmp_path):
    save(tmp_path / "a/x/1.png", GREY)
    first = stage.fingerprint(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    assert stage.fingerprint(tmp_path / "b") == first
    save(tmp_path / "b/x/2.png", GREY)
    assert stage.fingerprint(tmp_path / "b") != first


def test_writing_is_all_or_nothing(tmp_path):
    path = tmp_path / "file"
    stage.write_atomic(path, lambda p: p.write_text("old"))

    def fails_half_way(p):
        p.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError):
        stage.write_atomic(path, fails_half_way)
    assert path.read_text() == "old"


class Hostile:
    def __reduce__(self):
        return exec, ("raise SystemExit('code was run')",)


def test_checkpoints_of_other_kinds_truncated_and_hostile(tmp_path):
    good = tmp_path / "model.pt"
    torch.save({"kind": "generator", "classes": ["a"], "x": torch.zeros(1000)}, good)
    assert stage.load_model(tmp_path, "generator")["path"] == str(good)
    with pytest.raises(stage.StageError, match="is a generator, but a recognizer is needed"):
        stage.load_model(good, "recognizer")
    for content in (good.read_bytes()[:500], b"", pickle.dumps(Hostile(), protocol=2), b"text"):
        (tmp_path / "bad.pt").write_bytes(content)
        with pytest.raises(stage.StageError, match="truncated"):
            stage.load_model(tmp_path / "bad.pt", "generator")
    torch.save({"kind": "generator", "x": Hostile()}, tmp_path / "bad.pt")
    with pytest.raises(stage.StageError, match="no file of this project"):
        stage.load_model(tmp_path / "bad.pt", "generator")
    with pytest.raises(stage.StageError, match="is missing"):
        stage.load_model(tmp_path / "none", "generator")


def test_every_bad_end_is_one_line_and_a_code(capsys):
    def ends(error):
        def body(argv):
            raise error

        return stage.command(body)(), capsys.readouterr().err

    assert ends(stage.StageError("two\nlines")) == (2, "test_stage.py: error: two lines\n")
    assert ends(OSError(28, "No space left on device")) == (
        2,
        "test_stage.py: error: [Errno 28] No space left on device\n",
    )
    assert ends(KeyboardInterrupt())[0] == 130
    code, line = ends(torch.OutOfMemoryError("CUDA out of memory"))
    assert code == 2 and "--batch" in line and "--device cpu" in line
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")):
        code, line = ends(error)
        assert code == 2 and "out of memory" in line and "--device" not in line
    with pytest.raises(RuntimeError, match="another fault"):
        ends(RuntimeError("another fault"))
    with pytest.raises(ZeroDivisionError):  # a fault of the program is not dressed up as bad input
        ends(ZeroDivisionError())


def test_products_and_convolutions_are_in_float32_whatever_the_environment_says():
    """TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1, which some containers set, makes the default of products "high"; that of
    convolutions is TF32 everywhere."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    assert stage.command(lambda argv: None)() == 0
    assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32


def test_what_fits_counts_the_sets_that_are_kept(tmp_path, monkeypatch):
    """Of memory for four and a half of the set, a third is one and a half: one is kept, a second beside it is not."""
    (tmp_path / "a").mkdir()
    for i in range(4):
        Image.new("L", (8, 8), 10 * i).save(tmp_path / f"a/{i}.png")
    gc.collect()
    held = sum(x.pixels.nbytes for x in stage.Images.alive if x.pixels is not None)  # by other tests
    monkeypatch.setattr(stage, "getrlimit", lambda _: (3 * (held + 4 * 3 * 64 * 3 // 2), -1))
    one, two = (stage.Images([tmp_path], 8, 3) for _ in range(2))
    assert one.pixels is not None and two.pixels is None
    assert torch.equal(one[torch.tensor([3, 1])], two[torch.tensor([3, 1])])
    del one
    gc.collect()
    assert stage.Images([tmp_path], 8, 3).pixels is not None


def test_a_main_memory_that_is_full_does_not_make_a_file_damaged():
    with pytest.raises(RuntimeError, match="can't allocate memory"), stage.whole("last.pt"):
        torch.empty(10**15)
