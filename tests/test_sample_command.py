"""sample_scoremix.py as a command: the same images after a loss, folder names, costs, pictures, bad input."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL_UNET, loud, succeed
from PIL import Image

import sample_scoremix
import train_diffusion


@pytest.fixture(scope="module")
def generator(faces, tmp_path_factory):
    out = tmp_path_factory.mktemp("generator") / "run"
    succeed(train_diffusion, "--data", faces / "train", "--out", out, "--steps", 3, *SMALL_UNET)
    return out


def write_pairs(path, text):
    path.write_text(text)
    return path


def command(generator, pairs, out, *more):
    return [
        str(a)
        for a in ("--generator", generator, "--pairs", pairs, "--out", out, "--per-class", 5, "--steps", 3, *more)
    ]


def pixels(folder):
    return {p.relative_to(folder): np.asarray(Image.open(p)).astype(int) for p in folder.glob("*/*.png")}


def test_same_images_after_a_loss_and_in_other_batches(generator, tmp_path):
    pairs = write_pairs(tmp_path / "pairs.csv", "class_1,class_2,distance\ns11,s12,1.2\ns13,s14,1.1\n")
    out, noisy = tmp_path / "mixed", ("--solver", "ddim", "--eta", "0.5")
    assert sample_scoremix.main(command(generator, pairs, out, "--batch", "4", *noisy)) == 0
    first = {p: p.read_bytes() for p in sorted(out.glob("*/*.png"))}
    assert len(first) == 10 and {p.parent.name for p in first} == {"s11+s12", "s13+s14"}
    rows = list(csv.DictReader(open(out / "manifest.csv")))
    assert {r["path"] for r in rows} == {str(p.relative_to(out)) for p in first}
    assert rows[0]["class_2"] == "s12" and float(rows[0]["weight_1"]) == 0.5 and (out / "preview.png").exists()
    lost = [out / "s11+s12/2.png", out / "s13+s14/4.png"]
    for p in lost:
        p.unlink()
    untouched = (out / "s13+s14/0.png").stat().st_mtime_ns  # in a batch that is whole
    assert sample_scoremix.main(command(generator, pairs, out, "--batch", "4", *noisy)) == 0
    assert {p: p.read_bytes() for p in sorted(out.glob("*/*.png"))} == first
    assert (out / "s11+s12/4.png").exists() and (out / "s13+s14/0.png").stat().st_mtime_ns == untouched
    other = tmp_path / "other"
    assert sample_scoremix.main(command(generator, pairs, other, "--batch", "10", *noisy)) == 0
    a, b = pixels(out), pixels(other)
    assert a.keys() == b.keys() and max(np.abs(a[k] - b[k]).max() for k in a) <= 1


def test_one_column_reproduces_the_class_under_its_own_name(generator, tmp_path):
    pairs = write_pairs(tmp_path / "pairs.csv", "class_1\ns11\ns13\n")
    assert sample_scoremix.main(command(generator, pairs, tmp_path / "out")) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_dir()) == ["s11", "s13"]


def test_correlated_noise_makes_the_images_of_a_class_alike(generator, tmp_path):
    pairs = write_pairs(tmp_path / "pairs.csv", "class_1,class_2,distance\ns11,s12,1.2\ns13,s14,1.1\n")
    apart = []  # mean difference of two images of a class, for each correlation
    for rho in ("0", "0.9", "1"):
        assert sample_scoremix.main(command(generator, pairs, tmp_path / rho, "--correlation", rho)) == 0
        drawn = pixels(tmp_path / rho)
        classes = [np.stack([v for p, v in drawn.items() if p.parent.name == c]) for c in ("s11+s12", "s13+s14")]
        apart.append(np.mean([np.abs(x[1:] - x[0]).mean() for x in classes]))
        assert np.abs(classes[0][0] - classes[1][0]).mean() > 10  # classes stay apart
    assert apart[0] > 2 * apart[1] > 0 and apart[2] <= 1


def test_starts_from_training_images_pass_their_light_on(generator, faces, tmp_path, capsys):
    """At a low level the image comes through: image i of a mix is near the file that it started from, flags and all."""
    pairs = write_pairs(tmp_path / "pairs.csv", "class_1,class_2,distance\ns11,s12,1.2\n")
    assert sample_scoremix.main(command(generator, pairs, tmp_path / "out", "--start", "0.05")) == 0
    files = [sorted((faces / f"train/{c}").iterdir()) for c in ("s11", "s12")]
    for path, image in pixels(tmp_path / "out").items():
        own = sample_scoremix.start_image(0, ("s11", "s12"), int(path.stem), files)
        apart = {p: np.abs(np.asarray(Image.open(p)).astype(int) - image).mean() for f in files for p in f}
        assert min(apart, key=apart.get) == own
    again = command(generator, pairs, tmp_path / "out", "--start", "0.06")
    assert sample_scoremix.main(again) == 2 and "start" in capsys.readouterr().err
    few = command(generator, pairs, tmp_path / "new", "--start", "0.02", "--steps", "50")
    assert sample_scoremix.main(few) == 2 and "lower --steps" in capsys.readouterr().err
    moved = tmp_path / "moved"  # a generator whose images are gone
    saved = torch.load(generator / "model.pt", weights_only=True)
    torch.save(saved | {"data": [str(tmp_path / "gone")]}, moved)
    assert sample_scoremix.main(command(moved, pairs, tmp_path / "new", "--start", "3")) == 2
    assert "--data says where" in capsys.readouterr().err and not (tmp_path / "new").exists()
    part = tmp_path / "part"  # another folder, without one of its classes
    (part / "s11").mkdir(parents=True)
    shutil.copy(files[0][0], part / "s11")
    for data in (part, tmp_path / "nowhere"):
        wrong = command(moved, pairs, tmp_path / "new", "--data", str(data))  # for the preview alone
        assert sample_scoremix.main(wrong) == 2 and not (tmp_path / "new").exists()
        assert "--data says where" in capsys.readouterr().err
    found = command(moved, pairs, tmp_path / "new", "--start", "0.05", "--data", str(faces / "train"))
    assert sample_scoremix.main(found) == 0 and "without real images" not in capsys.readouterr().out
    assert json.loads((tmp_path / "new/config.json").read_text())["arguments"]["data"] == [str(faces / "train")]
    assert sample_scoremix.main(command(moved, pairs, tmp_path / "plain")) == 0
    assert "without real images" in capsys.readouterr().out
    (tmp_path / "plain/manifest.csv").unlink()  # the preview once more: for it alone, the folder is no other setting
    assert sample_scoremix.main(command(moved, pairs, tmp_path / "plain", "--data", str(faces / "train"))) == 0
    assert "without real images" not in capsys.readouterr().out
    old, new = pixels(tmp_path / "out"), pixels(tmp_path / "new")
    assert [(p.name, v.tolist()) for p, v in old.items()] == [(p.name, v.tolist()) for p, v in new.items()]


def test_three_columns_and_given_weights(generator, tmp_path):
    pairs = write_pairs(tmp_path / "pairs.csv", "class_1,class_2,class_3,distance\ns11,s12,s13,3\n")
    assert sample_scoremix.main(command(generator, pairs, tmp_path / "out", "--weights", "0.5", "0.25", "0.25")) == 0
    assert len(list((tmp_path / "out/s11+s12+s13").iterdir())) == 5


@pytest.mark.parametrize(
    "text, words",
    [
        ("", ["columns"]),
        ("class_1,class_2,distance\n", ["no rows"]),
        ("a,b\ns11,s12\n", ["columns a,b", "class_1"]),
        ("class_1,class_3\ns11,s12\n", ["columns"]),
        ("class_1,class_2\ns11,s99\n", ["line 2", "s99"]),
        ("class_1,class_2\ns11\n", ["line 2", "1 columns"]),
        ("class_1,class_2\ns11,s11\n", ["repeats"]),
        ("class_1,class_2\ns11,s12\ns11,s12\n", ["line 3", "repeats"]),
    ],
)
def test_bad_pairs_files(generator, tmp_path, fails, text, words):
    pairs = write_pairs(tmp_path / "pairs.csv", text)
    fails(sample_scoremix.main, command(generator, pairs, tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()


def test_pairs_files_of_a_spreadsheet_are_read(generator, tmp_path):
    pairs = tmp_path / "pairs.csv"
    pairs.write_bytes('class_1,class_2\r\n"s11",s12\r\n'.encode("utf-8-sig"))
    assert sample_scoremix.main(command(generator, pairs, tmp_path / "out")) == 0


@pytest.mark.parametrize(
    "more, words",
    [
        (["--weights", "0.5", "0.3"], ["sum must be 1", "--nonconvex"]),
        (["--weights", "1.5", "-0.5"], ["negative"]),
        (["--weights", "1"], ["1 numbers"]),
        (["--weights", "nan", "1"], ["nan"]),
        (["--steps", "0"], ["--steps"]),
        (["--solver", "ddpm", "--eta", "0.5"], ["--eta"]),
        (["--solver", "heun", "--eta", "0.5"], ["--eta"]),
        (["--weights", "0.5", "0.5", "--dirichlet", "1"], ["--dirichlet", "one of the two"]),
        (["--window", "0.1", "10", "--mix", "condition"], ["--window", "--mix score"]),
        (["--window", "0.1"], ["--window"]),
        (["--autoguidance", "2"], ["--guide", "belong together"]),
        (["--guide", "x"], ["--autoguidance", "belong together"]),
        (["--guide", "nowhere", "--autoguidance", "2"], ["nowhere", "missing"]),
        (["--device", "nowhere"], ["nowhere"]),
        (["--colour", "1"], ["--colour"]),
    ],
)
def test_bad_flags(generator, tmp_path, fails, more, words):
    pairs = write_pairs(tmp_path / "pairs.csv", "class_1,class_2\ns11,s12\n")
    fails(sample_scoremix.main, command(generator, pairs, tmp_path / "out", *more), *words)
    assert not (tmp_path / "out").exists()


def test_nonconvex_weights_when_asked_for(generator, tmp_path):
    pairs = write_pairs(tmp_path / "pairs.csv", "class_1,class_2\ns11,s12\n")
    assert (
        sample_scoremix.main(command(generator, pairs, tmp_path / "out", "--weights", "0.8", "0.8", "--nonconvex")) == 0
    )


def test_weights_drawn_anew_stand_in_the_manifest(generator, tmp_path):
    pairs = write_pairs(tmp_path / "pairs.csv", "class_1,class_2\ns11,s12\n")
    model = Path(shutil.copy(generator / "model.pt", tmp_path))
    loud(model)
    succeed(sample_scoremix, *command(model, pairs, tmp_path / "out", "--dirichlet", "0.5"))
    rows = list(csv.DictReader(open(tmp_path / "out/manifest.csv")))
    found = [[float(r["weight_1"]), float(r["weight_2"])] for r in rows]
    assert found == [sample_scoremix.image_weights(0, ("s11", "s12"), i, 0.5) for i in range(5)]
    own, other = tmp_path / "own", tmp_path / "other"  # image 3 is the one that its weights give, and no other image
    for out, lam in ((own, found[3]), (other, found[3][::-1])):
        flags = ["--weights", *map(str, lam), "--seed", 0, "--per-class", 4]
        succeed(sample_scoremix, *command(model, pairs, out), *flags)
    a, b, c = (pixels(d)[Path("s11+s12/3.png")] for d in (tmp_path / "out", own, other))
    assert np.abs(a - b).max() <= 1 and np.abs(a - c).max() > 3


def test_autoguidance_by_an_earlier_checkpoint(generator, faces, tmp_path, fails):
    pairs = write_pairs(tmp_path / "pairs.csv", "class_1,class_2\ns11,s12\n")
    run = tmp_path / "run"
    succeed(train_diffusion, "--data", faces / "train", "--out", run, "--steps", 30, "--keep-every", 10, *SMALL_UNET)
    plain, none, strong = (tmp_path / n for n in ("plain", "none", "strong"))
    succeed(sample_scoremix, *command(run, pairs, plain))
    for out, w in ((none, 1), (strong, 3)):
        succeed(sample_scoremix, *command(run, pairs, out, "--guide", run / "model-10.pt", "--autoguidance", w))
    a, b, c = map(pixels, (plain, none, strong))
    assert max(np.abs(a[k] - b[k]).max() for k in a) <= 1 < max(np.abs(a[k] - c[k]).max() for k in a)
    costs = [json.loads((d / "cost.json").read_text()) for d in (plain, strong)]
    assert costs[1]["network_evaluations"] == 2 * costs[0]["network_evaluations"]
    assert costs[1]["flops"] == 2 * costs[0]["flops"]  # of the same size here
    others = tmp_path / "others"
    succeed(train_diffusion, "--data", faces / "test", "--out", others, "--steps", 1, *SMALL_UNET)
    flags = ["--guide", others, "--autoguidance", 2]
    fails(sample_scoremix.main, command(run, pairs, tmp_path / "out", *flags), "other classes")


def test_guidance_needs_a_null_class(faces, tmp_path, fails):
    gen = tmp_path / "gen"
    succeed(train_diffusion, "--data", faces / "train", "--out", gen, "--steps", 1, "--label-dropout", 0, *SMALL_UNET)
    pairs = write_pairs(tmp_path / "pairs.csv", "class_1,class_2\ns11,s12\n")
    fails(sample_scoremix.main, command(gen, pairs, tmp_path / "out", "--guidance", "2"), "no null class")
    succeed(sample_scoremix, *command(gen, pairs, tmp_path / "out", "--window", 0.1, 10))


def test_condition_mixing_costs_half(generator, tmp_path):
    pairs = write_pairs(tmp_path / "pairs.csv", "class_1,class_2\ns11,s12\n")
    for name, flags in (("score", []), ("condition", ["--mix", "condition", "--weights", "0.7", "0.7"])):
        succeed(sample_scoremix, *command(generator, pairs, tmp_path / name, *flags))
    a, b = (json.loads((tmp_path / n / "cost.json").read_text())["network_evaluations"] for n in ("score", "condition"))
    preview = 3 * 2  # two reproductions of 3 steps each
    assert (a - preview, b - preview) == (5 * 3 * 2, 5 * 3)


def test_heun_is_charged_for_both_its_evaluations(generator, tmp_path):
    pairs = write_pairs(tmp_path / "pairs.csv", "class_1\ns11\n")
    for solver, calls in (("heun", 5), ("dpm++", 3)):
        succeed(sample_scoremix, *command(generator, pairs, tmp_path / solver, "--solver", solver))
        cost = json.loads((tmp_path / solver / "cost.json").read_text())
        assert cost["network_evaluations"] == calls * (5 + 1) and cost["images"] == 5  # those of the preview are none


def test_ddpm_is_ddim_with_eta_one(generator, tmp_path):
    pairs = write_pairs(tmp_path / "pairs.csv", "class_1,class_2\ns11,s12\n")
    assert sample_scoremix.main(command(generator, pairs, tmp_path / "a", "--solver", "ddpm")) == 0
    assert sample_scoremix.main(command(generator, pairs, tmp_path / "b", "--solver", "ddim", "--eta", "1")) == 0
    a, b = pixels(tmp_path / "a"), pixels(tmp_path / "b")
    assert a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)
    assert json.loads((tmp_path / "a/config.json").read_text())["arguments"]["eta"] == 1


def test_costs_of_a_mix(generator, tmp_path):
    pairs = write_pairs(tmp_path / "pairs.csv", "class_1,class_2\ns11,s12\n")
    assert sample_scoremix.main(command(generator, pairs, tmp_path / "out", "--guidance", "2")) == 0
    cost = json.loads((tmp_path / "out/cost.json").read_text())
    preview = 2 * 3 * (1 + 1)  # two reproductions, 3 steps, the class and the null class
    assert cost["images"] == 5 and cost["network_evaluations"] == 5 * 3 * (2 + 1) + preview and cost["flops"] > 0


def test_a_mix_that_would_join_an_existing_class_is_refused(generator, tmp_path, fails):
    saved = torch.load(generator / "model.pt", weights_only=True)
    saved["classes"][2] = "s11+s12"
    torch.save(saved, tmp_path / "model.pt")
    pairs = write_pairs(tmp_path / "pairs.csv", "class_1,class_2\ns11,s12\n")
    fails(sample_scoremix.main, command(tmp_path / "model.pt", pairs, tmp_path / "out"), "s11+s12")


def test_the_preview_does_without_the_training_images(generator, tmp_path, capsys):
    saved = torch.load(generator / "model.pt", weights_only=True)
    (tmp_path / "elsewhere/hollow").mkdir(parents=True)
    saved["data"] = [str(tmp_path / "elsewhere")]
    torch.save(saved, tmp_path / "model.pt")
    pairs = write_pairs(tmp_path / "pairs.csv", "class_1,class_2\ns11,s12\n")
    assert sample_scoremix.main(command(tmp_path / "model.pt", pairs, tmp_path / "out")) == 0
    assert "without real images" in capsys.readouterr().out and (tmp_path / "out/preview.png").exists()


def test_the_preview_does_without_a_folder_that_may_not_be_read(generator, tmp_path, capsys, monkeypatch):
    def scan(folders):
        raise PermissionError(13, "Permission denied", str(folders[0]))

    pairs = write_pairs(tmp_path / "pairs.csv", "class_1,class_2\ns11,s12\n")
    monkeypatch.setattr(sample_scoremix.stage, "scan", scan)
    assert sample_scoremix.main(command(generator, pairs, tmp_path / "out")) == 0
    assert "without real images" in capsys.readouterr().out and (tmp_path / "out/manifest.csv").exists()


def test_a_mix_in_two_orders_is_one_class_if_the_weights_are_equal(generator, tmp_path, fails):
    pairs = write_pairs(tmp_path / "pairs.csv", "class_1,class_2\ns11,s12\ns12,s11\n")
    fails(sample_scoremix.main, command(generator, pairs, tmp_path / "out"), "in two orders")
    fails(sample_scoremix.main, [*command(generator, pairs, tmp_path / "out"), "--shard", "1/2"], "in two orders")
    assert not (tmp_path / "out").exists()
    uneven = [*command(generator, pairs, tmp_path / "out"), "--weights", "0.7", "0.3"]
    assert sample_scoremix.main(uneven) == 0 and len(list((tmp_path / "out").glob("*+*"))) == 2


def test_shards_draw_the_same_images_in_folders_of_their_own(generator, tmp_path, fails):
    text = "class_1,class_2\ns11,s12\ns13,s14\ns11,s15\ns12,s13\ns14,s15\n"
    pairs = write_pairs(tmp_path / "pairs.csv", text)
    assert sample_scoremix.main(command(generator, pairs, tmp_path / "whole", "--batch", 10)) == 0
    whole = pixels(tmp_path / "whole")
    for n in (2, 3):
        found = {}
        for i in range(1, n + 1):
            out = tmp_path / f"{i}-of-{n}"
            assert sample_scoremix.main(command(generator, pairs, out, "--batch", 10, "--shard", f"{i}/{n}")) == 0
            part = pixels(out)
            assert part and not found.keys() & part.keys() and (out / "preview.png").exists()
            assert len((out / "manifest.csv").read_text().splitlines()) == 1 + len(part)
            found |= part
        assert found.keys() == whole.keys()
        assert max(np.abs(found[k] - whole[k]).max() for k in whole) <= 1  # another batch: the last bit of rounding
    for wrong in ("0/2", "3/2", "1", "a/b", "1/0"):
        fails(sample_scoremix.main, command(generator, pairs, tmp_path / "wrong", "--shard", wrong), "--shard")
    fails(sample_scoremix.main, command(generator, pairs, tmp_path / "wrong", "--shard", "6/6"), "has only 5 mixes")
    fails(sample_scoremix.main, command(generator, pairs, tmp_path / "1-of-2", "--shard", "2/2"), "shard differ")
    assert not (tmp_path / "wrong").exists()


def test_bf16_draws_nearly_the_same_images(generator, tmp_path):
    pairs = write_pairs(tmp_path / "pairs.csv", "class_1,class_2\ns11,s12\ns13,s14\n")
    for precision in ("fp32", "bf16"):
        argv = command(generator, pairs, tmp_path / precision, "--steps", 8, "--precision", precision)
        assert sample_scoremix.main(argv) == 0
    a, b = pixels(tmp_path / "fp32"), pixels(tmp_path / "bf16")
    psnr = [20 * np.log10(255 / max(0.1, np.sqrt(np.mean((a[k] - b[k]) ** 2)))) for k in a]
    assert any((a[k] != b[k]).any() for k in a)  # bf16 it was
    assert np.median(psnr) >= 35 and min(psnr) >= 25, psnr
