"""Every script on a GPU that is not there (pretend.py): none forgets its device, and all come to what the CPU does."""

import re

import numpy as np
import pytest
import torch
from conftest import SCRIPTS, command
from PIL import Image
from pretend import gpu

TRAININGS = [  # what is in braces is of the fixture `chain`
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
    "sample_scoremix --start 3 --guide {generator} --autoguidance 1.5",
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
        refused = [
            lambda: x + c,
            lambda: c.add_(x),
            lambda: torch.cat([x, c]),
            lambda: c[i.cuda()],
            lambda: x.index_put_((i,), c[i]),
            lambda: x.numpy(),
            lambda: np.asarray(x),
            lambda: x.pin_memory(),
            lambda: torch.nn.Linear(4, 2)(x),
            lambda: torch.randn(3, device="cuda", generator=torch.Generator()),
            lambda: x.normal_(generator=torch.Generator()),
        ]
        for wrong in refused:
            with pytest.raises((RuntimeError, TypeError), match="same device|can't convert|for generator"):
                wrong()


def numbers(text: str) -> np.ndarray:
    return np.array([float(x) for x in re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?(?![\w.])", text)])


def products(run) -> dict:
    """What a run came to, {name: numbers}: weights, images, tables; of mine_pairs.py the list."""
    found = {}
    for path in sorted(run.rglob("*.*")) if run.is_dir() else [run]:
        name = str(path.relative_to(run.parent))
        if path.suffix == ".pt" and "weights" in (saved := torch.load(path, weights_only=True)):
            found |= {f"{name}/{k}": v.double().numpy() for k, v in saved["weights"].items()}
        elif path.suffix == ".png" and path.parent != run:
            found[name] = np.array(Image.open(path), float) / 255
        elif path.suffix in (".csv", ".jsonl", ".json") and path.name not in ("cost.json", "config.json"):
            found[name] = numbers(path.read_text())
    return found


def check(words, memory, chain, tmp_path):
    script, *flags = words.split()
    flags = [f.format(**vars(chain)) for f in flags]
    cpu, cuda = (tmp_path / d / ("pairs.csv" if script == "mine_pairs" else "run") for d in ("cpu", "cuda"))
    main = SCRIPTS[script].main
    assert main([str(a) for a in command(script, chain, cpu, *flags, "--device", "cpu")]) == 0
    with gpu(memory):
        assert main([str(a) for a in command(script, chain, cuda, *flags, "--device", "cuda")]) == 0
    one, two = products(cpu), products(cuda)
    assert one.keys() == two.keys() and sum(v.size for v in one.values()) >= 3
    for name in one:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("memory", [80 << 30, 1000])  # bytes: there is room for the images, or there is not
@pytest.mark.parametrize("words", TRAININGS)
def test_trains_on_a_gpu_as_on_the_cpu(words, memory, chain, tmp_path):
    check(words, memory, chain, tmp_path)


@pytest.mark.parametrize("words", OTHERS)
def test_runs_on_a_gpu_as_on_the_cpu(words, chain, tmp_path):
    check(words, 80 << 30, chain, tmp_path)
