"""The loop of the two trainings and what belongs to it: flags, learning rate, order of the images, torch.compile, bf16
and several processes. Nothing of the method.

On one machine a training is one process; `torchrun --nproc-per-node 4 train_diffusion.py ...` makes it four with a GPU
each, which share every batch. Random numbers are those of the whole batch, so a step is the same up to rounding, but
for batch norm, dropout and mixup, which each process has for its own images.
"""

import argparse
import contextlib
import ctypes
import functools
import json
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import stage

WARMUP = 0.05  # share of the steps in which the learning rate rises to --lr


def add_speed_flags(group) -> None:
    """The flags that say where and how a network is computed."""
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    group.add_argument("--precision", choices=["fp32", "bf16"], default="fp32",
                       help="bf16: autocast of the network; for GPUs, and CPUs with bf16 in hardware (default: fp32)")
    group.add_argument("--compile", action="store_true", help="torch.compile the network; pays on long runs")


def add_common_flags(parser: stage.Parser) -> None:
    """The flags that the training of a recogniser and of a generator share."""
    whole = stage.number(int, 1)
    g = parser.add_argument_group("data and output")
    g.add_argument("--data", nargs="+", required=True, metavar="DIR", help="image folders, united by class name")
    g.add_argument("--out", required=True, metavar="RUN", help="run directory; the same command goes on after a stop")
    g.add_argument("--size", type=stage.number(int, 8, 1024), default=112, help="pixels a side (default: %(default)s)")
    g.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True,
                   help="mirror half of the images (default: yes); no for characters, say")
    g = parser.add_argument_group("running")
    add_speed_flags(g)
    g.add_argument("--log-every", type=whole, default=100, metavar="N", help="steps a log line (default: %(default)s)")
    g.add_argument("--save-every", type=whole, default=500, metavar="N", help="steps a checkpoint (default: 500)")
    g.add_argument("--keep-every", type=stage.number(int, 0), default=0, metavar="N",
                   help="keep a model-STEP.pt every N steps (default: none)")


def fill_defaults(args, defaults: dict) -> None:
    """Give the flags that were left out the values that follow from the size or the architecture."""
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Of step 0 ... steps - 1: linear warm-up over the share WARMUP of them, then a cosine from `peak` towards 0."""
    warmup = max(1, round(WARMUP * steps))
    progress = max(0, step - warmup) / max(1, steps - warmup)
    return peak * min(1, (step + 1) / warmup) * (1 + math.cos(math.pi * progress)) / 2


@functools.lru_cache(maxsize=2)
def permutation(n: int, seed: int, epoch: int) -> torch.Tensor:
    """An order (n,) of n images. Kept, since of six million it takes 160 ms, more than a step of a fast GPU."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(stage.seed_of("order", seed, epoch)))


def batch_indices(step: int, n: int, batch: int, seed: int) -> torch.Tensor:
    """The images (batch,) of a step: a piece of an endless chain of permutations of n, from (seed, step) alone."""
    begin, end = step * batch, (step + 1) * batch
    epochs = range(begin // n, (end - 1) // n + 1)
    return torch.cat([permutation(n, seed, e)[max(0, begin - e * n):end - e * n] for e in epochs])


def balanced_indices(step: int, labels: torch.Tensor, batch: int, seed: int) -> torch.Tensor:
    """The images (batch,) of a step in which every class is drawn equally often, from (seed, step) alone.

    labels (N,), ascending. The classes go by endless permutations, each with one of its images at random.
    """
    counts = labels.bincount()
    classes = batch_indices(step, len(counts), batch, seed)
    chance = torch.rand(batch, generator=torch.Generator().manual_seed(stage.seed_of("balance", seed, step)))
    return counts.cumsum(0)[classes] - 1 - (chance * counts[classes]).long()


def keep_freed_memory() -> None:
    """Let glibc keep what one step frees for the next: pages given back must be zeroed again, 4 to 12 % of a step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt:
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its highest
        mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD


def accelerate(model: nn.Module, device, precision: str, compile: bool) -> None:
    """Let a network compute in bf16 (autocast) and compiled, as asked, in place; where compiling fails, it is said."""
    forward = eager = model.forward
    if device.type == "cpu":
        keep_freed_memory()
    if compile:
        compiled, failed = torch.compile(eager), []

        def forward(*inputs):
            if not failed:
                try:
                    return compiled(*inputs)
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:  # of many kinds: no C compiler, an operation it does not know, ...
                    failed.append(error)
                    why = (str(error).strip() or type(error).__name__).splitlines()[0]
                    print(f"torch.compile failed ({why}); going on without it", file=sys.stderr)
            return eager(*inputs)
    model.forward = torch.autocast(device.type, torch.bfloat16)(forward) if precision == "bf16" else forward


def join() -> None:
    """Learn from torchrun which process this is. Call it first: other scripts than the trainings are always alone."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        names = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"
        stage.rank, stage.world, stage.gpu, stage.neighbours = (int(os.environ[k]) for k in names)


def distribute(network: nn.Module, device) -> nn.Module:
    """The network, under torchrun as DistributedDataParallel: gradients are then the means of all processes."""
    if stage.world == 1:
        return network
    if device.type == "cuda":
        if stage.neighbours > 1 and device.index != stage.gpu:
            raise stage.StageError("under torchrun every process has a GPU of its own; leave --device out")
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if stage.rank:
        sys.stdout = open(os.devnull, "w")  # the first process speaks for all
    network = nn.parallel.DistributedDataParallel(network, [device.index] if device.type == "cuda" else None)

    def own_dropout(*_):  # so far, in a step, all processes have drawn the same numbers
        torch.manual_seed(stage.seed_of("dropout", torch.initial_seed(), stage.rank))
    network.register_forward_pre_hook(own_dropout)
    return network


def exchange(network: nn.Module, now: bool):
    """The context of a backward pass after which processes exchange gradients; if not `now`, they add up until then."""
    return contextlib.nullcontext() if now or stage.world == 1 else network.no_sync()


def share(x: torch.Tensor) -> torch.Tensor:
    """This process's rows of a whole batch; under torchrun each has as many. Random numbers are drawn for all rows."""
    return x[stage.rank::stage.world]


def rand(b: int, *shape: int, device) -> torch.Tensor:
    """Uniform numbers (B, *shape) for this process's b rows of a whole batch."""
    return share(torch.rand(b * stage.world, *shape, device=device))


def resident(images: stage.Images, device) -> None:
    """Keep the images on a GPU if they fit in a third of what is free there."""
    if device.type == "cuda" and images.pixels is not None:
        if images.pixels.nbytes < torch.cuda.mem_get_info(device)[0] // 3:
            images.pixels = images.pixels.to(device)


def count_flops(model: nn.Module, *inputs) -> int:
    """FLOPs of one forward pass, two for each multiplication-addition."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    return counter.get_total_flops()


def flops_of(model: nn.Module, config: dict, device) -> int:
    """FLOPs of one evaluation of a recogniser, or of a generator, on one image of its config's size and channels."""
    x = torch.zeros(1, config["channels"], config["size"], config["size"], device=device)
    zero = torch.zeros(1, dtype=torch.long, device=device)  # a time and a class, for a generator
    return count_flops(model, *((x, zero, zero) if hasattr(model, "num_classes") else (x,)))


def agree(flag: str, theirs: dict, ours: dict, keys=("size", "channels")) -> None:
    """StageError unless the config of the network that a flag names has our values of `keys`."""
    for k in keys:
        if theirs[k] != ours[k]:
            raise stage.StageError(f"{flag} has {k} {theirs[k]}, but {k} is {ours[k]} here; train both alike")


@contextlib.contextmanager
def ahead_of_the_network():
    """A pool of one thread that reads the next images, with one OpenMP thread.

    A team of its own would make the network's sleep between operations: 1.6 to 2 times the time of a step on two cores.
    """
    threads = torch.get_num_threads()  # set_num_threads() is of a thread, and of all that are asked for the first time
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            yield pool
        finally:
            torch.set_num_threads(threads)


def train(out: stage.Run, parts: dict, data: stage.Images, step, export, device, order=None, **cost) -> None:
    """The loop of both trainings: step(i, images (B, C, H, W) uint8, labels (B,)) -> {name: scalar} up to --steps.

    parts: name -> object with state_dict and load_state_dict; export(): content of model.pt, written at the end;
    order(i): the images of step i (default: batch_indices); cost: amounts a step. Goes on from last.pt, which is
    written every --save-every steps and at a signal: on a CPU the result is the same to the bit, and so is log.jsonl.
    Raises StageError where a mean or a weight is not finite, KeyboardInterrupt at a signal: the first
    when it has saved, another a second later at once.
    """
    def batch(i):
        index = share(order(i) if order else batch_indices(i, len(data.paths), args.batch, args.seed))
        x, y = data[index], data.labels[index]
        if device.type == "cuda":  # pinned, so that the transfers do not wait
            x, y = x if x.is_cuda else x.pin_memory(), y.pin_memory()
        return x.to(device, non_blocking=True), y.to(device, non_blocking=True)
    args, last, start = out.args, out.dir / "last.pt", 0
    if args.batch % stage.world:
        raise stage.StageError(f"--batch {args.batch} must be a multiple of the {stage.world} processes")
    resident(data, device)
    sums, count = {}, 0  # of what step gave since the last line of the log
    kept = 0  # bytes of the log that stay: lines after the checkpoint come again, one that was cut goes
    if last.exists():
        state = stage.load_model(last, "checkpoint")
        with stage.whole(last):
            start, count = state["step"], state.get("count", 0)
            if type(start) is not int or type(count) is not int:
                raise TypeError("step or count")
            sums = {k: v.to(device) for k, v in state.get("sums", {}).items()}
            kept = (out.dir / "log.jsonl").read_bytes()[:state["log"]].rfind(b"\n") + 1
            for name, part in parts.items():
                part.load_state_dict(state[name])
    out.goes_on()
    log, stage.patient = open(os.devnull if stage.rank else out.dir / "log.jsonl", "ab", buffering=0), True
    if not stage.rank:
        log.seek(log.truncate(kept))  # tell() is where the next line comes, also while none has come
    bar = stage.progress(total=args.steps, initial=start, desc=out.dir.name, disable=stage.rank > 0)
    signalled = None  # how many processes had a signal in the step before: all of them stop after the same step
    with log, ahead_of_the_network() as ahead, bar:
        following = ahead.submit(batch, start)
        for i in range(start, args.steps):
            now, following = following.result(), ahead.submit(batch, i + 1)
            torch.manual_seed(stage.seed_of("step", args.seed, i))
            sums = {k: v.detach() + sums.get(k, 0) for k, v in step(i, *now).items()}
            done, count = i + 1, count + 1
            keep = args.keep_every and done % args.keep_every == 0
            save = keep or done % args.save_every == 0 or done == args.steps
            line = save or done % args.log_every == 0
            stop = bool(stage.signals)
            if stage.world > 1:
                stop, signalled = bool(signalled), torch.tensor(float(stop), device=device)
                torch.distributed.all_reduce(signalled)
            if line or stop:
                if stage.world > 1:
                    values = torch.stack([*sums.values()]) / stage.world
                    torch.distributed.all_reduce(values)
                    sums = dict(zip(sums, values))
                means = {k: float(v) / count for k, v in sums.items()}
                weights = [p for m in parts.values() if isinstance(m, nn.Module) for p in m.parameters()]
                means["weight_norm"] = float(nn.utils.get_total_norm([p.detach() for p in weights]))
                if not np.isfinite(list(means.values())).all():
                    raise stage.StageError(f"not finite by step {done}: {means}; usually --lr is too high, or bf16 "
                                           f"too coarse: try another in a new --out; {last} stays as it was")
            if line:
                log.write((json.dumps({"step": done, **means}) + "\n").encode())
                bar.set_postfix({k: f"{v:.4g}" for k, v in means.items()}, refresh=False)
                out.spend(device, **{k: v * count for k, v in cost.items()})
                sums, count = {}, 0
            if keep:
                stage.write_atomic(out.dir / f"model-{done}.pt", functools.partial(torch.save, export()))
            if save or stop:
                state = {"kind": "checkpoint", "step": done, "log": log.tell(), "count": count,
                         "sums": {k: v.cpu() for k, v in sums.items()}}
                state |= {k: part.state_dict() for k, part in parts.items()}
                stage.write_atomic(last, functools.partial(torch.save, state))
            bar.update()
            if stop:
                out.spend(device)  # the seconds; the amounts come with the next line of the log
                raise KeyboardInterrupt
    stage.patient = False
    if stage.world > 1:
        torch.distributed.destroy_process_group()
    stage.write_atomic(out.dir / "model.pt", functools.partial(torch.save, export()))
