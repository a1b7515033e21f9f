"""How long is a training step of the generator, by us, by diffusers and by denoising-diffusion-pytorch (ddp)?

    python benchmarks/training_step.py --batch 32

Forward, loss, backward, clipping, the optimiser, the moving average, as peers.py has them from each library's training
script, on the same images in memory. Every candidate makes 10 steps at a time, since ddp averages every tenth step.
Three rows, each by turns; how many times longer than ours a peer takes is in times_ours, also for equal FLOPs:

eager    each library's own network of equal FLOPs (see sampling.py), fp32, as the library makes it
best     contiguous, with channels_last, and with torch.compile on top of that, on CUDA under bf16 autocast; the
         quickest counts. Ours always has channels_last, and compiles by --compile; diffusers documents both, and its
         EMAModel gets foreach; ddp documents neither.
shared   our network, fp32, in each library's training: only what is around the network differs.

That they do the same work is checked with our network, the same images, times and noise, eps-prediction: each library's
loss agrees with ours to 1e-5 of it. Peers read every loss, as their scripts do, to log it; ours reads one in a hundred.
"""

import copy

import numpy as np
import torch
import torch.nn.functional as F
from common import arguments, machine, need, side_by_side, stage, version, write
from peers import MODULES, Ddp, Diffusers, ForGaussianDiffusion, Ours, against_ours, equal_networks

from train_diffusion import Schedule, diffusion_loss, draw_times_and_noise
from training import accelerate

CLASSES, STEPS = 30, 10
TRAINERS = {"ours": Ours, "diffusers": Diffusers, "ddp": Ddp}


@torch.no_grad()
def losses(network, x0: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
    """Each library's loss of eps, for the same network, images (B, 1, 32, 32) in [-1, 1], times and noise."""
    abar, times = Schedule().abar, []

    def watched(x_t, t, y):
        times.append(t)
        return network(x_t, t, y)
    torch.manual_seed(0)
    found = {"ours": diffusion_loss(watched, x0, y, *draw_times_and_noise(x0, Schedule()), Schedule(), "eps").item()}
    torch.manual_seed(0)
    torch.rand(1, device=x0.device)  # what draw_times_and_noise draws before the noise
    noise = torch.randn(x0.shape, device=x0.device)
    scheduler = need("diffusers").DDPMScheduler(trained_betas=1 - abar / np.append(1, abar[:-1]))
    found["diffusers"] = F.mse_loss(network(scheduler.add_noise(x0, noise, times[0]), times[0], y), noise).item()
    diffusion = need(MODULES["ddp"]).GaussianDiffusion(ForGaussianDiffusion(network), image_size=32).to(x0.device)
    keep = torch.ones_like(y, dtype=torch.bool)
    found["ddp"] = diffusion.p_losses(x0, times[0], classes=y, noise=noise, cond_keep_mask=keep).item()
    return found


def trainer(name: str, network, how: str, device):
    """A library's training of a copy of the network: "eager", and fast "contiguous", "channels_last" or "compiled"."""
    network, fast = copy.deepcopy(network), how != "eager"
    if how in ("channels_last", "compiled"):
        network.to(memory_format=torch.channels_last)
    made = TRAINERS[name](network, **{"foreach": True} if fast and name == "diffusers" else {})
    accelerate(made.network, device, "fp32", how == "compiled")
    whole = made.diffusion if name == "ddp" else made.network  # ddp's Trainer has its loss under autocast as well
    accelerate(whole, device, "bf16" if fast and device.type == "cuda" else "fp32", False)
    return made


def main(argv=None) -> None:
    parser = arguments(__doc__, repeats=5)
    parser.add_argument("--batch", type=int, default=32, help="images a step")
    args = parser.parse_args(argv)
    device = stage.pick_device(args.device)
    torch.set_flush_denormal(True)
    nets, flops = equal_networks(CLASSES, device)
    x = torch.randint(0, 256, (args.batch, 1, 32, 32), dtype=torch.uint8, device=device)
    y = torch.randint(0, CLASSES, (args.batch,), device=device)
    check = losses(nets["ours"].eval(), x.float() / 127.5 - 1, y)
    assert all(abs(loss / check["ours"] - 1) < 1e-5 for loss in check.values()), check
    rows = {"shared": {n: trainer(n, nets["ours"], "eager", device) for n in nets},
            "eager": {n: trainer(n, nets[n], "eager", device) for n in nets},
            "best": {f"{n}, {how}": trainer(n, nets[n], how, device)
                     for n in nets for how in ("contiguous", "channels_last", "compiled")
                     if (n, how) != ("ours", "contiguous")}}  # ours always has channels_last

    def ten(made):
        return lambda: [made.step(x, y) for _ in range(STEPS)]
    found = {row: against_ours(side_by_side({n: ten(made) for n, made in of.items()}, args.repeats, device),
                               None if row == "shared" else flops) for row, of in rows.items()}
    last = {row: {n: float(made.step(x, y)) for n, made in of.items()} for row, of in rows.items()}
    assert np.isfinite([v for of in last.values() for v in of.values()]).all(), last
    write("training_step", {"machine": machine(device), "batch": args.batch, "steps_a_round": STEPS,
                       "versions": version("diffusers", "denoising-diffusion-pytorch", "ema-pytorch"),
                       "flops_per_evaluation": flops, "same_loss": check, "last_losses": last, **found}, args.out)


if __name__ == "__main__":
    main()
