"""What share of the machine's arithmetic do the networks reach, forward and in a training step?

    python benchmarks/networks.py --batch 16 --compile

The recognisers ir18 and ir50 at 112x112, the UNet of --size 32 and, on CUDA, that of --size 112; in fp32 on a CPU,
under bf16 autocast on CUDA, with channels_last as the stages have it. Two rates of the same type take turns with them:
of a product of two 2048x2048 (CUDA: 8192x8192) matrices, and of one 3x3 convolution of 256 channels at 56x56. `share`
is (FLOPs of the network / its seconds) / that rate, by rounds, where a training step (forward, backward) counts three
forward passes. It may pass 1 of the product: PyTorch hands products to MKL and convolutions to oneDNN, which on an AMD
EPYC was 2.4 times as quick. --compile adds compiled networks, whose output must agree with the eager one to 1e-3 of its
largest value, in bf16 to 5e-2.

Convolutions are not all that a network does: traffic is the bytes of a forward pass if every layer reads its input and
its weights and writes its output once (the sums of residual blocks are not layers and are not counted), and
share_of_traffic_bound the time that a plain copy of as many bytes takes, over the network's. Whatever is fused moves
fewer bytes, so a compiled network may pass 1. `dearest` are the five operations of most time, by torch.profiler.
"""

import statistics

import torch
from common import arguments, machine, side_by_side, stage, write
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from costs import yardsticks
from train_diffusion import build, parse_args
from train_recognizer import IResNet
from training import count_flops


def network_and_inputs(name: str, batch: int, device):
    """A network by name (ir18, ir50, unet32, unet112), channels_last, and what it takes."""
    torch.manual_seed(0)
    if name.startswith("ir"):
        network, inputs = IResNet(name, 112), [torch.randn(batch, 3, 112, 112)]
    else:
        size, channels, classes = (32, 1, 30) if name == "unet32" else (112, 3, 10_000)
        config = vars(parse_args(f"--data . --out . --size {size}".split())) | {"channels": channels}
        network = build(config, classes)
        inputs = [torch.randn(batch, channels, size, size), torch.randint(0, 1000, (batch,)),
                  torch.randint(0, classes, (batch,))]
    for p in (p for p in network.parameters() if not p.any()):
        torch.nn.init.normal_(p, std=0.05)  # what starts at zero, or nothing would come out
    inputs[0] = inputs[0].contiguous(memory_format=torch.channels_last)
    return network.to(device, memory_format=torch.channels_last), [x.to(device) for x in inputs]


def traffic(network, forward) -> int:
    """Bytes of a forward pass in which every layer reads input and weights and writes its output once."""
    moved = []

    def count(layer, given, out):
        moved.extend(v.nbytes for v in (*given, out, *layer.parameters()))
    hooks = [m.register_forward_hook(count) for m in network.modules() if not list(m.children())]
    forward()
    for hook in hooks:
        hook.remove()
    return sum(moved)


def dearest(run, device) -> dict[str, float]:
    """The five operations, on CUDA kernels, of most time of their own, and their share of all."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as found:
        run()
    times = {e.key: e.self_device_time_total if cuda else e.self_cpu_time_total for e in found.key_averages()
             if not cuda or e.device_type == DeviceType.CUDA}
    whole = sum(times.values())
    return {k: times[k] / whole for k in sorted(times, key=times.get, reverse=True)[:5]}


def shares(seconds: dict, name: str, units: float, unit: str) -> dict:
    """units * seconds of `unit` / seconds of `name`, by rounds: 1 where `name` takes as long as its work in units."""
    each = [units * u / s for s, u in zip(seconds[name], seconds[unit])]
    return {"median": statistics.median(each), "min": min(each), "max": max(each)}


def copying(device) -> tuple:
    """A copy far beyond every cache, 256 MiB, and the bytes that it moves."""
    source = torch.randn(64 * 2 ** 20, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * source.nbytes


def measure(name: str, args, device, units: dict) -> dict:
    """The shares of a network, its work, its dearest operations; units: the yardsticks, to take turns with."""
    network, inputs = network_and_inputs(name, args.batch, device)
    bf16, calls = device.type == "cuda", {"eager": network}
    if args.compile:
        calls["compiled"] = torch.compile(network)

    def forward(call):
        network.eval()
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return call(*inputs)

    def training(call):
        network.train()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            out = call(*inputs)
        out.float().square().mean().backward()
        network.zero_grad(set_to_none=True)
    runs = {f"{run.__name__}, {how}": (lambda run=run, call=call: run(call))
            for run in (forward, training) for how, call in calls.items()}
    expected = forward(network).float()
    for how, call in calls.items():
        error = (forward(call).float() - expected).abs().max() / expected.abs().max()
        assert error < (5e-2 if bf16 else 1e-3), (name, how, float(error))
    flops = count_flops(network.eval(), *inputs)
    seconds = side_by_side({unit: f for unit, (f, _) in units.items()} | runs, args.repeats, device)
    found = {"flops": flops, "seconds": seconds, "share": {}, "dearest": {}}
    for run in runs:
        work = flops * (3 if run.startswith("training") else 1)
        found["share"][run] = {unit: shares(seconds, run, work / units[unit][1], unit)
                               for unit in ("product", "convolution")}
        found["dearest"][run] = dearest(runs[run], device)
    if name.startswith("ir"):
        found["traffic"] = traffic(network, lambda: forward(network))
        found["share_of_traffic_bound"] = {run: shares(seconds, run, found["traffic"] / units["copy"][1], "copy")
                                           for run in runs if run.startswith("forward")}
    return found


def main(argv=None) -> None:
    parser = arguments(__doc__, repeats=7)
    parser.add_argument("--networks", nargs="+", choices=["ir18", "ir50", "unet32", "unet112"],
                        help="default: ir18 ir50 unet32, on CUDA unet112 as well")
    parser.add_argument("--batch", type=stage.number(int, 2), default=16, help="images at once")
    parser.add_argument("--compile", action="store_true", help="compiled networks too")
    args = parser.parse_args(argv)
    device = stage.pick_device(args.device)
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    torch.set_flush_denormal(True)
    units = yardsticks(device, dtype) | {"copy": copying(device)}
    names = args.networks or ["ir18", "ir50", "unet32"] + ["unet112"] * cuda
    rows = {name: measure(name, args, device, units) for name in names}
    write("networks", {"machine": machine(device), "type": str(dtype), "batch": args.batch,
                       "work_of_units": {unit: work for unit, (_, work) in units.items()}, "rows": rows}, args.out)


if __name__ == "__main__":
    main()
