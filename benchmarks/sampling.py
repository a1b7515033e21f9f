"""How long do mixed images of two classes take, by our sampler, by diffusers and by denoising-diffusion-pytorch (ddp)?

    python benchmarks/sampling.py --batch 16 --steps 25

DDIM with eta 0, one call of the network a step for both classes of every image, the mean of its two predictions. Three
rows, each by turns; how many times longer than ours a peer takes is in times_ours, also for equal FLOPs:

eager    each library's own network, fp32, as the library makes it. Equal FLOPs an evaluation within 10 %: the peers'
         documented structure with narrower levels (peers.WIDTHS). They work at 32x32; ours folds 2x2 pixels and works
         at 16x16 with more channels. This row shows that choice along with the code.
best     the same networks contiguous, with channels_last, and with torch.compile on top of that, on CUDA in bf16
         (diffusers as documented: weights in bf16, mode max-autotune; autocast for the others). The quickest counts,
         for each. We and diffusers document all three, ddp none. Each must draw what it draws as eager: PSNR above
         60 dB, in bf16 above 30.
shared   our network, fp32, in each library's sampling loop: only the loops differ. Same noise, same schedule (diffusers
         as betas; ddp's cosine schedule is the same), same times, eps from the clipped x0 (diffusers:
         use_clipped_model_output; the others always): the images must agree, PSNR above 60 dB.

Networks have random weights. ddp draws noise at every step, and multiplies it by eta = 0; its progress bar is left out.
"""

import copy
import math

import numpy as np
import torch
from common import arguments, machine, need, side_by_side, stage, version, write
from einops import rearrange
from peers import MODULES, ForGaussianDiffusion, against_ours, equal_networks

from sample_scoremix import mixed_denoiser, sample
from train_diffusion import Schedule
from training import accelerate

CLASSES = 30


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """In dB, of images in [-1, 1]; at most 200."""
    return 10 * math.log10(4 / max((a - b).square().mean().item(), 4e-20))


# Three samplers: network, called (x_t, t, y) -> v, the two classes y (B, 2) of each image -> function that draws images
# (B, 1, 32, 32) in [-1, 1], from the same noise at every call.
def noise(y: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(len(y), 1, 32, 32, device=y.device)


def ours(network, y: torch.Tensor, steps: int):
    schedule = Schedule()
    denoise = mixed_denoiser(network, schedule, "v", y, [0.5, 0.5])
    return lambda: sample(denoise, noise(y), schedule, "ddim", steps)


def diffusers(network, y: torch.Tensor, steps: int):
    abar, labels = Schedule().abar, rearrange(y, "b two -> (two b)")
    scheduler = need("diffusers").DDIMScheduler(
        trained_betas=1 - abar / np.append(1, abar[:-1]), prediction_type="v_prediction", timestep_spacing="trailing")

    @torch.no_grad()
    def draw():
        scheduler.set_timesteps(steps)
        x = noise(y)
        for t in scheduler.timesteps:
            first, second = network(torch.cat([x, x]), t.to(x.device).expand(len(labels)), labels).chunk(2)
            x = scheduler.step((first + second) / 2, t, x, use_clipped_model_output=True).prev_sample
        return x
    return draw


def ddp(network, y: torch.Tensor, steps: int):
    library = need(MODULES["ddp"])
    library.tqdm = lambda pairs, **unused: pairs
    diffusion = library.GaussianDiffusion(ForGaussianDiffusion(network), image_size=32, sampling_timesteps=steps,
                                          objective="pred_v", ddim_sampling_eta=0.0).to(y.device)

    def draw():
        torch.manual_seed(0)  # sample() draws the noise itself
        return diffusion.sample(classes=y) * 2 - 1
    return draw


SAMPLERS = {"ours": ours, "diffusers": diffusers, "ddp": ddp}


def fast(name: str, network, how: str, device):
    """A copy of the network, on CUDA in bf16: "contiguous", "channels_last", or "compiled" with channels_last."""
    network, cuda = copy.deepcopy(network), device.type == "cuda"
    if how != "contiguous":
        network.to(memory_format=torch.channels_last)
    if name != "diffusers":
        accelerate(network, device, "bf16" if cuda else "fp32", how == "compiled")
        return network
    if cuda:
        network.bfloat16()
    if how == "compiled":
        network.compile(**dict(mode="max-autotune", fullgraph=True) if cuda else {})
    return network


def main(argv=None) -> None:
    parser = arguments(__doc__, repeats=5)
    parser.add_argument("--batch", type=int, default=16, help="images at once")
    parser.add_argument("--steps", type=int, default=25, help="steps of DDIM, a divisor of 1,000")
    args = parser.parse_args(argv)
    device = stage.pick_device(args.device)
    torch.set_flush_denormal(True)
    nets, flops = equal_networks(CLASSES, device)
    nets = {name: network.eval().requires_grad_(False) for name, network in nets.items()}
    y = torch.randint(0, CLASSES, (args.batch, 2), device=device)
    rows = {"shared": {n: SAMPLERS[n](nets["ours"], y, args.steps) for n in nets},
            "eager": {n: SAMPLERS[n](nets[n], y, args.steps) for n in nets},
            "best": {f"{n}, {how}": SAMPLERS[n](fast(n, nets[n], how, device), y, args.steps)
                     for n in nets for how in ("contiguous", "channels_last", "compiled")}}
    images = {row: {name: draw() for name, draw in draws.items()} for row, draws in rows.items()}
    agreement = {"shared, with ours": {n: psnr(x, images["shared"]["ours"]) for n, x in images["shared"].items()},
                 "best, with eager": {n: psnr(x, images["eager"][n.split(", ")[0]]) for n, x in images["best"].items()}}
    assert min(agreement["shared, with ours"].values()) > 60, agreement
    assert min(agreement["best, with eager"].values()) > (30 if device.type == "cuda" else 60), agreement
    found = {row: against_ours(side_by_side(draws, args.repeats, device), None if row == "shared" else flops)
             for row, draws in rows.items()}
    write("sampling", {"machine": machine(device), "versions": version("diffusers", "denoising-diffusion-pytorch"),
                       "images": args.batch, "steps": args.steps, "flops_per_evaluation": flops,
                       "psnr": agreement, **found}, args.out)


if __name__ == "__main__":
    main()
