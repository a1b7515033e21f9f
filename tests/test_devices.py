"""Several processes, compiled networks, sets larger than memory: the same results by other ways of computing."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL_RECOGNIZER, SMALL_UNET, succeed
from PIL import Image

import stage
import train_diffusion
import train_recognizer
import training


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def alone():
    """The environment, with one thread and no GPU."""
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def torchrun(processes, script, *argv):
    """Run a script in several processes on this machine's CPU: exit code, standard output, standard error."""
    command = [*TORCHRUN, str(processes), ROOT / script, *map(str, argv)]
    done = subprocess.run(command, env=alone(), capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def weights(run):
    return torch.load(run / "model.pt", weights_only=True)["weights"]


def test_two_processes_take_the_generators_step_of_one(faces, tmp_path):
    argv = ["--data", faces / "train", *SMALL_UNET, "--dropout", 0, "--steps", 5, "--log-every", 1, "--lr", 1e-4]
    succeed(train_diffusion, *argv, "--device", "cpu", "--out", tmp_path / "one")
    parts = ["--micro-batch", 3]  # of the four images of a process
    code, out, error = torchrun(2, "train_diffusion.py", *argv, *parts, "--out", tmp_path / "two")
    assert code == 0, error
    assert out.count("wrote") == 1  # the second process says nothing
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    start = train_diffusion.build(torch.load(tmp_path / "one/model.pt", weights_only=True)["config"], 5).state_dict()
    assert max((one[k] - start[k]).abs().max() for k in one) > 1e-4  # it went somewhere
    assert max((one[k] - two[k]).abs().max() for k in one) < 1e-6
    logs = [[json.loads(line) for line in open(tmp_path / n / "log.jsonl")] for n in ("one", "two")]
    assert [x["step"] for x in logs[1]] == [1, 2, 3, 4, 5]
    for a, b in zip(*logs):
        assert a == pytest.approx(b, rel=1e-4)
    ledgers = [json.loads((tmp_path / n / "cost.json").read_text()) for n in ("one", "two")]
    assert ledgers[0]["images"] == ledgers[1]["images"] and ledgers[0]["flops"] == ledgers[1]["flops"]


RECOGNISER = """
import sys
import torch
sys.path.insert(0, sys.argv.pop(1))
import stage, train_recognizer
networks, distribute = [], train_recognizer.distribute
train_recognizer.distribute = lambda *a: networks.append(distribute(*a)) or networks[0]
kept = sys.argv.pop(1)
assert train_recognizer.main() == 0
torch.save({k: v.detach() for k, v in networks[0].module.named_parameters()}, f"{kept}{stage.rank}.pt")
"""


def test_two_processes_train_one_recogniser(faces, tmp_path):
    """Each sees its own half of the images; gradients are shared, so both end with the same weights."""
    (tmp_path / "run.py").write_text(RECOGNISER)
    argv = ["--data", faces / "train", *SMALL_RECOGNIZER, "--steps", 4, "--log-every", 1, "--out", tmp_path / "run"]
    code, out, error = torchrun(2, tmp_path / "run.py", ROOT, tmp_path / "kept", *argv)
    assert code == 0, error
    lines = [json.loads(line) for line in open(tmp_path / "run/log.jsonl")]
    assert [x["step"] for x in lines] == [1, 2, 3, 4] and np.isfinite([x["loss"] for x in lines]).all()
    first, second = (torch.load(tmp_path / f"kept{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first.keys() == second.keys() and "head" in first
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert torch.equal(weights(tmp_path / "run")["fc.weight"], first["backbone.fc.weight"])
    code, out, error = torchrun(3, "train_recognizer.py", *argv[:-1], tmp_path / "three", "--batch", 8)
    assert code != 0 and "must be a multiple of the 3 processes" in error
    code, out, error = torchrun(2, "train_recognizer.py", *argv[:-1], tmp_path / "two", "--batch", 2)
    assert code != 0 and "fewer than two images to each of 2 processes" in error


def test_a_signal_stops_two_processes_at_one_step_and_one_goes_on(faces, tmp_path):
    argv = ["--data", faces / "train", *SMALL_UNET, "--dropout", 0, "--steps", 400, "--lr", 1e-4]
    argv += ["--log-every", 1000, "--save-every", 1000, "--grid-every", 1000, "--out", tmp_path / "run"]
    process = subprocess.Popen(
        [*TORCHRUN, "2", ROOT / "train_diffusion.py", *map(str, argv)],
        env=alone(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "run/log.jsonl").exists() and process.poll() is None:
        time.sleep(0.1)
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    step = torch.load(tmp_path / "run/last.pt", weights_only=True)["step"]
    assert 0 < step < 400 and not (tmp_path / "run/model.pt").exists()
    succeed(train_diffusion, *argv, "--device", "cpu")
    succeed(train_diffusion, *argv[:-1], tmp_path / "whole", "--device", "cpu")
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert max((one[k] - two[k]).abs().max() for k in one) < 1e-3  # 400 steps of rounding


def test_processes_drop_out_and_augment_each_in_its_own_way(monkeypatch):
    x = torch.rand(6, 1, 16, 16) * 2 - 1
    torch.manual_seed(3)
    whole = train_recognizer.augment(x, True)
    for rank in range(2):
        monkeypatch.setattr(stage, "rank", rank)
        monkeypatch.setattr(stage, "world", 2)
        torch.manual_seed(3)
        assert torch.equal(train_recognizer.augment(training.share(x), True), training.share(whole))


def test_only_the_trainings_look_at_torchrun(faces, tmp_path, monkeypatch):
    """RANK and WORLD_SIZE may stand in anybody's environment; nothing is left unwritten for it."""
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    succeed(train_recognizer, "--data", faces / "train", *SMALL_RECOGNIZER, "--steps", 1, "--out", tmp_path / "run")
    assert (tmp_path / "run/model.pt").exists() and stage.world == 1


class Away(torch.Tensor):
    """A tensor on a device whose memory NumPy cannot read."""

    def numpy(self):
        raise TypeError("can't convert device type tensor to numpy")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_the_sample_grid_takes_images_that_live_on_a_gpu(faces, tmp_path):
    images = stage.Images([faces / "train"], 16)
    images.pixels = images.pixels.as_subclass(Away)
    with pytest.raises(TypeError):
        images[torch.arange(2)].permute(0, 2, 3, 1).numpy()
    config = vars(train_diffusion.parse_args(["--data", ".", "--out", ".", *SMALL_UNET])) | {"channels": 1}
    model, schedule = train_diffusion.build(config, 5).eval(), train_diffusion.Schedule()
    train_diffusion.sample_grid(model, schedule, "v", images, tmp_path / "grid.png", torch.device("cpu"))
    assert Image.open(tmp_path / "grid.png").width == 5 * 16 * 6


def test_shares_of_a_batch_are_its_rows(monkeypatch):
    rows = torch.arange(12).view(6, 2)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(stage, "rank", rank)
        monkeypatch.setattr(stage, "world", 3)
        parts.append(training.share(rows))
    assert sorted(torch.cat(parts).tolist()) == rows.tolist() and all(len(p) == 2 for p in parts)


def test_where_compiling_fails_training_goes_on_and_says_so(faces, tmp_path, monkeypatch, capfd):
    def no_compiler(forward):
        def compiled(*inputs):
            raise RuntimeError("no C++ compiler\nmore of it")

        return compiled

    argv = ["--data", faces / "train", *SMALL_RECOGNIZER, "--steps", 3]
    succeed(train_recognizer, *argv, "--out", tmp_path / "eager")
    monkeypatch.setattr(torch, "compile", no_compiler)
    succeed(train_recognizer, *argv, "--compile", "--out", tmp_path / "failed")
    told = capfd.readouterr().err
    assert told.count("torch.compile failed (no C++ compiler); going on without it") == 1
    one, two = weights(tmp_path / "eager"), weights(tmp_path / "failed")
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_out_of_memory_is_not_taken_for_a_failed_compilation(monkeypatch):
    def full(*inputs):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(torch, "compile", lambda forward: full)
    model = torch.nn.Linear(2, 2)
    training.accelerate(model, torch.device("cpu"), "fp32", True)
    with pytest.raises(torch.OutOfMemoryError):
        model(torch.zeros(1, 2))


def test_bf16_is_of_the_network_alone():
    seen, model = [], torch.nn.Linear(4, 4)
    model.register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    training.accelerate(model, torch.device("cpu"), "bf16", False)
    x = torch.randn(2, 4)
    assert (model(x).float() @ x.T).dtype == torch.float32 and seen == [torch.bfloat16]


HEAP = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
import training
if sys.argv[2] == "kept":
    training.accelerate(torch.nn.Linear(1, 1), torch.device("cpu"), "fp32", False)

def in_heap(address):
    heap = next(line for line in open("/proc/self/maps") if line.endswith("[heap]\\n"))
    low, high = (int(x, 16) for x in heap.split()[0].split("-"))
    return low <= address < high
x = torch.ones(7_500_000)
address = x.data_ptr() + 4 * len(x) - 1
before = in_heap(address)
del x
print(before, in_heap(address))
"""


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="what is kept is glibc's business")
def test_what_a_step_on_a_cpu_frees_stays_with_the_process():
    plain = {k: v for k, v in alone().items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    told = {}
    for how in ("plain", "kept"):
        command = [sys.executable, "-c", HEAP, ROOT, how]
        told[how] = subprocess.run(command, env=plain, capture_output=True, check=True, text=True).stdout.split()
    assert told == {"plain": ["False", "False"], "kept": ["True", "True"]}  # 30 MB: mapped and given back, or kept


STREAM = """
import resource, sys
import torch
sys.path.insert(0, sys.argv[1])
import stage

def used():
    line = next(x for x in open("/proc/self/status") if x.startswith("VmData"))
    return int(line.split()[1]) << 10
torch.randn(200, 200) @ torch.randn(200, 200)
limit = used() + (320 << 20)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
images = stage.Images([sys.argv[2]], 512, 3)
whole = len(images.paths) * 3 * 512 * 512
assert whole >= 450 << 20 and images.pixels is None
fits = True
try:
    torch.zeros(whole, dtype=torch.uint8)
except RuntimeError:
    fits = False
assert not fits, "the whole set would fit: this is no test"
for i in range(20):
    batch = images[torch.arange(32) * 17 % len(images.paths)]
assert batch.shape == (32, 3, 512, 512)
print("streamed", int(batch[20].float().mean()))
"""


def test_a_set_larger_than_memory_is_read_as_needed(tmp_path):
    """600 images of 512x512 (472 MB) in a process that may take 336 MB more than PyTorch itself."""
    for c in range(6):
        (tmp_path / f"data/{c}").mkdir(parents=True)
        Image.new("RGB", (16, 16), (40 * c, 40 * c, 40 * c)).save(tmp_path / f"data/{c}/0.png")
        for i in range(1, 100):
            os.link(tmp_path / f"data/{c}/0.png", tmp_path / f"data/{c}/{i}.png")
    command = [sys.executable, "-c", STREAM, str(ROOT), str(tmp_path / "data")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["streamed", "120"]  # the 341st image is of the fourth class
