"""Our generator and two peers as sampling.py, training_step.py and equal_quality.py need them.

ours        train_diffusion.run and sample_scoremix.run, for --size 32, without their files
diffusers   UNet2DModel; the loop of examples/unconditional_image_generation/train_unconditional.py (AdamW, cosine with
            warm-up, EMAModel with warm-up), whose network takes labels here; DDPMScheduler's steps as in DDPMPipeline
ddp         denoising-diffusion-pytorch: network and sampling of classifier_free_guidance.py and its example, Adam,
            gradient clipping and ema_pytorch as in its Trainer, which knows no labels
Accelerate, which both peers train through and which only hands on the calls of a single process, is left out, and so
are their data loaders and progress bars: all get the same batch of uint8 images from memory. That can only help them.
"""

import copy
import statistics

import torch
import torch.nn.functional as F
from common import need, ratio
from einops import rearrange, reduce, repeat
from torch import nn

from sample_scoremix import SMALL as SAMPLER
from sample_scoremix import draw_images, mixed_denoiser
from train_diffusion import MAX_GRAD_NORM, Schedule, build, diffusion_loss, draw_times_and_noise, parse_args, update_ema
from training import count_flops, learning_rate

ARGS = parse_args("--data . --out . --size 32".split())  # every default of train_diffusion.py --size 32
MODULES = {"diffusers": "diffusers", "ddp": "denoising_diffusion_pytorch.classifier_free_guidance"}
# the structure of their documented networks; widths are divided by 8, so that an evaluation costs what ours costs
WIDTHS = {"documented": ((128, 128, 256, 256, 512, 512), 64), "equal": ((16, 16, 32, 32, 64, 64), 8)}


# --------------------------------------------------------------------------------------------------------- networks
class Plain(nn.Module):
    """A peer's network, to be called as ours: (x_t, t, y) -> prediction. x_t takes the type of its weights."""

    def __init__(self, network: nn.Module, **fixed):
        super().__init__()
        self.network, self.fixed = network, fixed

    def forward(self, x_t, t, y):
        out = self.network(x_t.to(next(self.network.parameters()).dtype), t, y, **self.fixed)
        return (out[0] if isinstance(out, tuple) else out).float()


def networks(widths: str, classes: int, channels: int = 1) -> dict[str, nn.Module]:
    """ours, diffusers, ddp: networks for 32x32 with "documented" or "equal" widths (of ours there is one)."""
    blocks, dim = WIDTHS[widths]
    down = [f"{kind}DownBlock2D" for kind in ("", "", "", "", "Attn", "")]
    unet = need("diffusers").UNet2DModel(
        sample_size=32, in_channels=channels, out_channels=channels, layers_per_block=2, block_out_channels=blocks,
        down_block_types=down, up_block_types=[d.replace("Down", "Up") for d in reversed(down)],
        norm_num_groups=blocks[0] // 4, num_class_embeds=classes)  # 128 // 4 is its default of 32 groups
    ddp = need(MODULES["ddp"]).Unet(dim, classes, dim_mults=(1, 2, 4, 8), channels=channels, cond_drop_prob=0.5)
    return {"ours": build(vars(ARGS) | {"channels": channels}, classes), "diffusers": Plain(unet, return_dict=False),
            "ddp": Plain(ddp, cond_drop_prob=0.0)}


def flops_of(network: nn.Module, channels: int = 1) -> int:
    """FLOPs of one evaluation of one image."""
    one = next(network.parameters()).new_zeros(1, channels, 32, 32)
    label = torch.zeros(1, dtype=torch.long, device=one.device)
    return count_flops(network, one, label, label)


def equal_networks(classes: int, device) -> tuple[dict, dict]:
    """networks("equal") and their FLOPs, within 10 % of ours. Layers that start at zero get values, as if trained."""
    torch.manual_seed(0)
    nets = {name: network.to(device) for name, network in networks("equal", classes).items()}
    for p in (p for network in nets.values() for p in network.parameters() if not p.any()):
        nn.init.normal_(p, std=0.05)
    flops = {name: flops_of(network) for name, network in nets.items()}
    assert all(abs(f / flops["ours"] - 1) < 0.1 for f in flops.values()), flops
    return nets, flops


class ForGaussianDiffusion(nn.Module):
    """A network called as ours, as ddp's GaussianDiffusion wants one. Its sampling mixes: y (B, M), the mean over M."""
    random_or_learned_sinusoidal_cond, cond_drop_prob = False, ARGS.label_dropout

    def __init__(self, network: nn.Module, channels: int = 1):
        super().__init__()
        self.network, self.channels, self.out_dim = network, channels, channels

    def forward(self, x, t, classes, cond_keep_mask=None):
        keep = torch.rand(len(x), device=x.device) >= self.cond_drop_prob if cond_keep_mask is None else cond_keep_mask
        return self.network(x, t, torch.where(keep, classes, self.network.num_classes))

    def forward_with_cond_scale(self, x, t, classes, **unused):
        m = classes.shape[1]
        out = self.network(repeat(x, "b ... -> (m b) ...", m=m), t.repeat(m), rearrange(classes, "b m -> (m b)"))
        return reduce(out, "(m b) ... -> b ...", "mean", m=m), None


# --------------------------------------------------------------------------------------------------------- training
def flip(x: torch.Tensor) -> torch.Tensor:
    return torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(3), x)


class Ours:
    """step(x, y) trains on a batch, x uint8 (B, C, 32, 32), y (B,) -> loss; sample(y) draws such images by the EMA."""
    batch, evaluations = ARGS.batch, SAMPLER["steps"]

    def __init__(self, network: nn.Module, channels: int = 1, steps: int = ARGS.steps):
        self.network = network.to(memory_format=torch.channels_last).train()
        self.ema = copy.deepcopy(network).requires_grad_(False).eval()
        self.trained = list(network.parameters())
        self.optimizer = torch.optim.AdamW(self.trained, ARGS.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        self.schedule, self.shape, self.steps, self.i = Schedule(), (channels, 32, 32), steps, 0

    def step(self, x, y):
        x0 = flip(x.float().div(127.5).sub(1).to(memory_format=torch.channels_last))
        y = torch.where(torch.rand(len(y), device=y.device) < ARGS.label_dropout, self.network.num_classes, y)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.i, self.steps, ARGS.lr)
        drawn = draw_times_and_noise(x0, self.schedule)
        loss = diffusion_loss(self.network, x0, y, *drawn, self.schedule, ARGS.predict)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, MAX_GRAD_NORM)
        self.optimizer.step()
        update_ema(self.ema, self.network, ARGS.ema, self.i)
        self.i += 1
        return loss.detach()

    def sample(self, y):
        keys = [((str(c),), k) for k, c in enumerate(y.tolist())]
        denoise = mixed_denoiser(self.ema, self.schedule, ARGS.predict, y[:, None], [1.0])
        x = draw_images(denoise, keys, self.i, self.shape, y.device, self.schedule, "ddpm", self.evaluations)
        return torch.from_numpy(x).permute(0, 3, 1, 2)


class Diffusers:
    """The same by diffusers. steps: of its learning rate, 100 epochs in the example; draw_steps: 1,000 there."""
    batch = 16

    def __init__(self, network: nn.Module, channels: int = 1, steps: int = 10_000, draw_steps: int = 1000,
                 foreach: bool = False):
        self.scheduler = need("diffusers").DDPMScheduler(num_train_timesteps=1000)
        self.network, self.shape, self.evaluations = network.train(), (channels, 32, 32), draw_steps
        self.optimizer = torch.optim.AdamW(network.parameters(), 1e-4, betas=(0.95, 0.999), weight_decay=1e-6)
        self.lr = need("diffusers.optimization").get_scheduler("cosine", self.optimizer, None, 500, steps)
        self.ema = need("diffusers.training_utils").EMAModel(
            network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75, foreach=foreach)

    def step(self, x, y):
        x0 = flip(x.float().div(127.5).sub(1))
        noise = torch.randn_like(x0)
        t = torch.randint(0, 1000, (len(x0),), device=x0.device)
        loss = F.mse_loss(self.network(self.scheduler.add_noise(x0, noise, t), t, y).float(), noise)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.lr.step()
        self.optimizer.zero_grad()
        self.ema.step(self.network.parameters())
        return loss.item()

    @torch.no_grad()
    def sample(self, y):
        self.ema.store(self.network.parameters())
        self.ema.copy_to(self.network.parameters())
        self.network.eval()
        self.scheduler.set_timesteps(self.evaluations)
        x = torch.randn(len(y), *self.shape, device=y.device)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.network(x, t, y), t, x).prev_sample
        self.network.train()
        self.ema.restore(self.network.parameters())
        return x.add(1).mul(127.5).clamp(0, 255).round().to(torch.uint8)


class Ddp:
    """The same by denoising-diffusion-pytorch. draw_steps: 250 of DDIM in the README, each with two evaluations for the
    guidance (cond_scale 6, the example's). The README gathers the gradients of two batches; here each makes a step.
    """
    batch = 32

    def __init__(self, network: nn.Module, channels: int = 1, draw_steps: int = 250):
        self.evaluations = 2 * draw_steps
        self.network = network.network if isinstance(network, Plain) else ForGaussianDiffusion(network, channels)
        self.diffusion = need(MODULES["ddp"]).GaussianDiffusion(
            self.network, image_size=32, timesteps=1000, sampling_timesteps=draw_steps).train()
        self.diffusion.to(next(network.parameters()).device)
        self.optimizer = torch.optim.Adam(self.diffusion.parameters(), 8e-5, betas=(0.9, 0.99))
        self.ema = need("ema_pytorch").EMA(self.diffusion, beta=0.995, update_every=10)

    def step(self, x, y):
        loss = self.diffusion(flip(x.float().div(255)), classes=y)
        loss.backward()
        nn.utils.clip_grad_norm_(self.diffusion.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update()
        return loss.item()

    def sample(self, y):
        self.ema.ema_model.eval()
        x = self.ema.ema_model.sample(classes=y, cond_scale=6.0)
        return x.mul(255).clamp(0, 255).round().to(torch.uint8)


# ---------------------------------------------------------------------------------------------------------- results
def against_ours(seconds: dict[str, list[float]], flops: dict | None = None) -> dict:
    """How many times longer than ours each took; seconds: "competitor" or "competitor, variant" -> of each round.

    Of several variants the quickest counts. per_flop: that ratio, divided by the ratio of the FLOPs.
    """
    quickest = {}
    for key in sorted(seconds, key=lambda k: statistics.median(seconds[k])):
        quickest.setdefault(key.split(", ")[0], key)
    found = {name: {"as": key, **ratio(seconds, key, quickest["ours"])} for name, key in quickest.items()}
    for name in flops or ():
        found[name]["per_flop"] = found[name]["median"] * flops["ours"] / flops[name]
    return {"seconds": seconds, "times_ours": found}
