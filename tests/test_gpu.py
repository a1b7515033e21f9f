"""The scripts on a GPU that is not there (pretend.py): none forgets its device, and all come to what the CPU does."""

import re
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SCRIPTS, command, loud, succeed
from PIL import Image
from pretend import gpu

import stage

TRAININGS = [  # what is in braces is of the fixture `louder`
    "train_diffusion",
    "train_diffusion --micro-batch 3 --label-dropout 0.1 --no-flip --predict eps",
    "train_diffusion --conditions frozen --align 0.1 --recognizer {real} --dropout 0.1 --grid-every 1 --keep-every 1",
    "train_recognizer",
    "train_recognizer --mixup 0.2 --balance --no-flip",
    "train_recognizer --init {real} --data {data} {mixed}",
    "train_recognizer --arch ir18 --size 32",
]
OTHERS = [
    "mine_pairs",
    "mine_pairs --strategy close --order 3",
    "mine_pairs --strategy random",
    "mine_pairs --space condition --generator {generator}",
    *(f"sample_scoremix --steps 3 --solver {s}" for s in ("ddim", "ddpm", "heun", "dpm++")),
    "sample_scoremix --guidance 2 --correlation 0.9 --per-class 2",
    "sample_scoremix --start 3 --guide {guide} --autoguidance 1.5",
    "sample_scoremix --mix condition --weights 0.7 0.7",
    "sample_scoremix --solver ddim --eta 0.5 --dirichlet 2 --window 0.5 1e9",
    "audit",
    "alignment",
    "sweep",
    "evaluate",
]


def test_the_gpu_that_is_not_there_refuses_what_cuda_refuses():
    with gpu():
        x, c, i = torch.randn(3, 4, device="cuda"), torch.randn(3, 4), torch.tensor([0, 2])
        x[i] = 0.0
        x[i.cuda()] += torch.ones(4, device="cuda")
        assert x.device.type == "cuda" and (2 * x[i] - torch.tensor(1)).cpu().tolist() == [[1.0] * 4] * 2
        assert torch.equal(c.copy_(x), x.cpu()) and (x * c.cuda()).sum().item() == pytest.approx(float((c * c).sum()))
        assert (x + c[0, 0]).device.type == "cuda" == c.to(x).device.type and c.to(c.double()).dtype == torch.float64
        assert all(y.device.type == "cpu" for y in (x.new_zeros(2, device="cpu"), torch.as_tensor(x, device="cpu")))
        w = torch.ones(3, 4, requires_grad=True)
        (w.cuda() * x).cpu().sum().backward()
        assert torch.equal(w.grad, x.cpu()) and not w.cuda().is_leaf
        torch.as_tensor(c, device="cuda").zero_()
        assert c.abs().sum() > 0  # a copy
        refused = [
            lambda: x + c,
            lambda: c.add_(x),
            lambda: torch.cat([x, c]),
            lambda: torch.stack([x[0, 0], c[0, 0]]),
            lambda: c[0, 0].add_(x[0, 0]),
            lambda: torch.add(x, 1, out=c),
            lambda: c[i.cuda()],
            lambda: x.index_put_((i,), c[i]),
            lambda: x.numpy(),
            lambda: np.asarray(x),
            lambda: x.pin_memory(),
            lambda: torch.nn.Linear(4, 2)(x),
            lambda: torch.randn(3, device="cuda", generator=torch.Generator()),
            lambda: x.normal_(generator=torch.Generator()),
            lambda: x.clone().unsqueeze_(0),  # CUDA can, pretend.py cannot
        ]
        for wrong in refused:
            with pytest.raises((RuntimeError, TypeError), match="same device|can't convert|for generator|in place"):
                wrong()


@pytest.fixture(scope="module")
def louder(chain, tmp_path_factory):
    """The chain with a generator whose images depend on classes and weights, another one to guide it, and its mixes."""
    root = tmp_path_factory.mktemp("louder")
    made = SimpleNamespace(**vars(chain) | {"generator": root / "generator", "mixed": root / "mixed"})
    made.guide = chain.generator
    shutil.copytree(chain.generator, made.generator)
    loud(made.generator / "model.pt")
    succeed(SCRIPTS["sample_scoremix"], *command("sample_scoremix", made, made.mixed, "--per-class", 3))
    return made


NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?(?![\w.])")


def products(run) -> tuple[dict, dict]:
    """What a run came to, {name: numbers} and {name: the words between them}: weights, images, tables, lists."""
    numbers, words = {}, {}
    for path in sorted(run.rglob("*.*")) if run.is_dir() else [run]:
        name = str(path.relative_to(run.parent))
        if path.suffix == ".pt" and "weights" in (saved := torch.load(path, weights_only=True)):
            numbers |= {f"{name}/{k}": v.double().numpy() for k, v in saved["weights"].items()}
        elif path.suffix == ".png" and path.parent != run:
            numbers[name] = np.array(Image.open(path), float) / 255
        elif path.suffix in (".csv", ".jsonl", ".json") and path.name not in ("cost.json", "config.json"):
            text = path.read_text().replace(str(run.parent), "")
            numbers[name], words[name] = np.array([float(x) for x in NUMBER.findall(text)]), NUMBER.sub("", text)
    return numbers, words


def check(words, c, tmp_path, stops=False):
    script, *flags = words.split()
    flags = [f.format(**vars(c)) for f in flags]
    cpu, cuda = (tmp_path / d / ("pairs.csv" if script == "mine_pairs" else "run") for d in ("cpu", "cuda"))
    main = SCRIPTS[script].main
    assert main([str(a) for a in command(script, c, cpu, *flags, "--device", "cpu")]) == 0
    with gpu(memory=1000) if stops else gpu():  # bytes: no room for the images, or enough
        argv = [str(a) for a in command(script, c, cuda, *flags, "--device", "cuda")]
        if stops:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(stage, "progress", stopping)
                assert main(argv) == 128 + signal.SIGINT and (cuda / "last.pt").exists()
        assert main(argv) == 0
    (one, ours), (two, theirs) = products(cpu), products(cuda)
    assert ours == theirs and one.keys() == two.keys() and sum(v.size for v in one.values()) >= 3
    for name in one:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-3, atol=1e-4, err_msg=name)


def stopping(*what, progress=stage.progress, **flags):
    """The progress bar of a training that is stopped in its second step."""
    bar = progress(*what, **flags)
    if not what:  # else it is of images that are read
        bar.update = lambda: stage.signals.update({signal.SIGINT: 0})
    return bar


@pytest.mark.parametrize("stops", [False, True])
@pytest.mark.parametrize("words", TRAININGS)
def test_trains_on_a_gpu_as_on_the_cpu(words, stops, louder, tmp_path):
    check(f"{words} --steps 3", louder, tmp_path, stops)


@pytest.mark.parametrize("words", OTHERS)
def test_runs_on_a_gpu_as_on_the_cpu(words, louder, tmp_path):
    check(words, louder, tmp_path)
