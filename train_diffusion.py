"""Train a class-conditional diffusion model on an image folder (stage 2 of ScoreMix).

    python train_diffusion.py --data runs/demo/data/train --out runs/demo/generator --size 32

Reads   DATA/<class>/<image>; the classes are the folders' names.
Writes  OUT/model.pt (EMA weights, classes), OUT/samples-STEP.png (real above, reproduced below), log.jsonl, cost.json.

The same command goes on after a stop. Sources: DDPM (Ho et al. 2020), cosine schedule (Nichol & Dhariwal 2021),
adaptive group norm (Dhariwal & Nichol 2021), v-prediction (Salimans & Ho 2022), null class (Ho & Salimans 2022).
"""

import copy
import math
import sys

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import nn

import stage
from train_recognizer import centres_of, load_recognizer, preprocess
from training import (accelerate, add_common_flags, agree, distribute, exchange, fill_defaults, flops_of, join,
                      learning_rate, rand, share, train)

# Defaults by size: up to 64 pixels everything trains on a CPU in minutes; above, a network of the size of EDM2-S.
SMALL = dict(steps=4500, batch=32, lr=1e-3, ema=0.999, dropout=0.05,
             width=32, multipliers=[1, 2, 2], blocks=1, attention=[2], patch=2)
LARGE = dict(steps=180_000, batch=256, lr=2e-4, ema=0.9999, dropout=0.1,
             width=192, multipliers=[1, 2, 3, 4], blocks=3, attention=[2, 3], patch=1)
MAX_EMBEDDING = 512  # 1,024 have the loss of 512 for 771 classes
MAX_GRAD_NORM = 1.0
MIN_S = 0.05  # of the loss of x0: without it the last, all but clean times would weigh most


def parse_args(argv=None):
    parser = stage.Parser(__doc__)
    add_common_flags(parser)
    g = parser.add_argument_group("training (defaults: up to 64 pixels | above)")

    def add(name, kind, low, high, text, **kw):
        small, large = (" ".join(map(str, v)) if isinstance(v, list) else v for v in (SMALL[name], LARGE[name]))
        g.add_argument(f"--{name}", type=stage.number(kind, low, high), help=f"{text} ({small} | {large})", **kw)
    add("steps", int, 1, 1e12, "optimiser steps")
    add("batch", int, 1, 1e6, "images a step")
    add("lr", float, 0, 1e38, "peak learning rate of AdamW")
    add("ema", float, 0, 1, "decay of the averaged weights, the ones that are kept")
    add("dropout", float, 0, 0.9, "dropout in the residual blocks")
    g.add_argument("--micro-batch", type=stage.number(int, 1), default=32, metavar="N", help="images a backward pass: "
                   "gradients of a larger batch are added up, so that it fits the memory (default: %(default)s)")
    g.add_argument("--label-dropout", type=stage.number(float, 0, 0.9), default=0.1, metavar="P",
                   help="share of the images trained as the null class, for classifier-free guidance (default: 0.1)")
    g.add_argument("--predict", choices=["v", "eps", "x0"], default="v", help="what the network predicts; x0 has "
                   "the loss of v, and is for patches of more values than the network has channels (default: v)")
    g.add_argument("--align", type=stage.number(float, 0, 1e6), default=0.0, metavar="W",
                   help="weight of a loss that pulls denoised images to the recogniser's class centres (default: 0)")
    g.add_argument("--seed", type=stage.number(int, 0), default=0, help="weights, batches and noise (default: 0)")
    g.add_argument("--grid-every", type=stage.number(int, 1), default=2000, metavar="N",
                   help="steps a sample grid (default: %(default)s)")
    g = parser.add_argument_group("network (defaults: up to 64 pixels | above)")
    g.add_argument("--conditions", choices=["learned", "frozen"], default="learned",
                   help="class embeddings: learned, or the recogniser's class centres, frozen (default: learned)")
    g.add_argument("--recognizer", metavar="RUN", help="run of train_recognizer.py, for frozen conditions and --align")
    add("width", int, 8, 4096, "channels of the first level")
    add("multipliers", int, 1, 64, "width of each level; every level halves the resolution", nargs="+")
    add("blocks", int, 1, 64, "residual blocks a level")
    add("attention", int, 0, 64, "levels with self-attention, 0 the finest", nargs="*")
    add("patch", int, 1, 64, "space-to-depth at the input: 2 quarters the work")
    args = parser.parse_args(argv)
    fill_defaults(args, SMALL if args.size <= 64 else LARGE)
    levels = len(args.multipliers)
    step = args.patch * 2 ** (levels - 1)
    if bool(args.recognizer) != (args.conditions == "frozen" or args.align > 0):
        raise stage.StageError("--recognizer RUN goes with --conditions frozen or --align W; give both or none")
    if args.size % step:
        raise stage.StageError(f"--size {args.size} must be a multiple of {step}: patch {args.patch}, {levels} levels")
    if args.width % 8:
        raise stage.StageError(f"--width {args.width} must be a multiple of 8")
    if any(level >= levels for level in args.attention):
        raise stage.StageError(f"--attention {args.attention} names a level beyond the {levels} of --multipliers")
    return args


# ---------------------------------------------------------------------------------------------------------- network
def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(32, channels // 4), channels)


def zero(layer):
    """A layer that starts at zero, so that its residual branch starts as the identity."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


class ResBlock(nn.Module):
    """norm-SiLU-conv, then adaptive norm-SiLU-dropout-conv: the condition scales and shifts the second norm."""

    def __init__(self, c_in: int, c_out: int, c_emb: int, dropout: float):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = norm(c_out), zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.condition = zero(nn.Linear(c_emb, 2 * c_out))
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.condition(emb)[:, :, None, None].chunk(2, dim=1)
        h = torch.addcmul(shift, self.norm2(h), 1 + scale)  # AdaGN, Dhariwal & Nichol 2021, Sec. 3.1
        return self.skip(x) + self.conv2(self.dropout(F.silu(h)))


class Attention(nn.Module):
    """Self-attention over all positions, heads of about 64 channels."""

    def __init__(self, channels: int):
        super().__init__()
        self.heads = next(n for n in range(max(1, channels // 64), 0, -1) if channels % n == 0)
        self.norm, self.qkv = norm(channels), nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x):
        q, k, v = rearrange(self.qkv(self.norm(x)), "b (three n d) h w -> three b n (h w) d", three=3, n=self.heads)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(rearrange(h, "b n (h w) d -> b (n d) h w", h=x.shape[2]))


class UNet(nn.Module):
    """Noisy images, times and labels -> v, eps or x0, of the images' shape.

    The label `num_classes` is the null class (no condition). Resolution halves from level to level; `patch` folds
    pixels into channels before the first and back after the last one. Embeddings have 4 width dimensions, and no fewer
    than there are classes up to MAX_EMBEDDING: only a linear map of them conditions a block, which in few dimensions
    learns late to tell many classes apart. With `frozen_dim` the class embeddings are given vectors of that dimension,
    which are not trained, and a linear map of them takes their place.
    """

    def __init__(self, num_classes: int, channels: int, width: int, multipliers: list, blocks: int, attention: list,
                 patch: int, dropout: float = 0.0, frozen_dim: int = 0):
        super().__init__()
        self.num_classes, self.patch, c_emb = num_classes, patch, max(4 * width, min(num_classes, MAX_EMBEDDING))
        self.time = nn.Sequential(nn.Linear(width, c_emb), nn.SiLU(), nn.Linear(c_emb, c_emb))
        self.label = nn.Embedding(num_classes + 1, frozen_dim or c_emb)  # the last row is the null class
        self.label.weight.requires_grad_(not frozen_dim)
        self.project = nn.Linear(frozen_dim, c_emb) if frozen_dim else nn.Identity()
        widths = [width * m for m in multipliers]

        def block(c_in, c_out, level):
            parts = [ResBlock(c_in, c_out, c_emb, dropout)] + [Attention(c_out)] * (level in attention)
            return nn.ModuleList(parts)
        self.conv_in = nn.Conv2d(channels * patch ** 2, width, 3, padding=1)
        self.down, self.up, skips, c = nn.ModuleList(), nn.ModuleList(), [width], width
        for level, w in enumerate(widths):
            for _ in range(blocks):
                self.down.append(block(c, w, level))
                skips.append(c := w)
            if level < len(widths) - 1:
                self.down.append(nn.Conv2d(c, c, 3, stride=2, padding=1))
                skips.append(c)
        self.middle = nn.ModuleList([ResBlock(c, c, c_emb, dropout), Attention(c), ResBlock(c, c, c_emb, dropout)])
        for level, w in reversed(list(enumerate(widths))):
            for _ in range(blocks + 1):
                self.up.append(block(c + skips.pop(), w, level))
                c = w
            if level:
                self.up.append(nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(c, c, 3, padding=1)))
        self.norm_out, self.conv_out = norm(c), zero(nn.Conv2d(c, channels * patch ** 2, 3, padding=1))

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x_t (B, C, H, W), t (B,) in training steps (fractions allowed), y -> v, eps or x0 (B, C, H, W).

        y: labels (B,) long, or in their place conditions (B, dim) float, such as a mix of rows of `label.weight`.
        """
        half = self.time[0].in_features // 2
        frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=x_t.device) / half)
        angles = t.float()[:, None] * frequencies  # (B, half)
        condition = self.project(y if y.is_floating_point() else self.label(y))
        emb = F.silu(self.time(torch.cat([angles.cos(), angles.sin()], dim=1)) + condition)  # (B, c_emb)

        def apply(module, h):
            if isinstance(module, ResBlock):
                return module(h, emb)
            for part in module if isinstance(module, nn.ModuleList) else ():
                h = apply(part, h)
            return h if isinstance(module, nn.ModuleList) else module(h)
        h = self.conv_in(rearrange(x_t, "b c (h p) (w q) -> b (c p q) h w", p=self.patch, q=self.patch))
        skips = [h]
        for module in self.down:
            h = apply(module, h)
            skips.append(h)
        h = apply(self.middle, h)
        for module in self.up:
            h = apply(module, torch.cat([h, skips.pop()], dim=1) if isinstance(module, nn.ModuleList) else h)
        h = self.conv_out(F.silu(self.norm_out(h)))
        return rearrange(h, "b (c p q) h w -> b c (h p) (w q)", p=self.patch, q=self.patch)


# ------------------------------------------------------------------------------------------------------ mathematics
class Schedule:
    """Cosine schedule: x_t = a_t x0 + s_t eps with a^2 + s^2 = 1, t = 0 ... T-1 (Nichol & Dhariwal 2021, Eq. 17).

    `abar` (T,) is float64, and float32 only in products with images. t = -1 stands for the clean image, abar = 1.
    """

    def __init__(self, T: int = 1000):
        f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
        self.T, self.abar = T, np.cumprod(np.maximum(f[1:] / f[:-1], 0.001))  # beta <= 0.999: s / a ends near 20,000
        self.log_sigma = np.log((1 - self.abar) / self.abar) / 2  # (T,), rising
        self._tables = {}  # device -> a, s and log(s/a), each (T,), there

    def coefficients(self, t: float) -> tuple[float, float]:
        """a_t and s_t as Python floats; (1, 0) for t = -1. Between two steps, log(s/a) is interpolated linearly."""
        if t < 0:
            return 1.0, 0.0
        if t == int(t):
            abar = float(self.abar[int(t)])
        else:
            abar = 1 / (1 + math.exp(2 * np.interp(t, np.arange(self.T), self.log_sigma)))
        return math.sqrt(abar), math.sqrt(1 - abar)

    def time(self, sigma: float) -> float:
        """The t, a fraction as a rule, at which s_t / a_t = sigma: between the steps, as in `coefficients`."""
        return float(np.interp(math.log(sigma), self.log_sigma, np.arange(self.T)))

    def at(self, t: torch.Tensor) -> list[torch.Tensor]:
        """a_t and s_t of the times t (B,) as float32 (B, 1, 1, 1) on t's device; t between two steps as above."""
        if t.device not in self._tables:
            tables = np.sqrt(self.abar), np.sqrt(1 - self.abar), self.log_sigma
            self._tables[t.device] = [torch.from_numpy(v).float().to(t.device) for v in tables]
        a, s, log_sigma = self._tables[t.device]
        if t.is_floating_point():
            low = t.long().clamp(max=self.T - 2)
            sigma = torch.lerp(log_sigma[low], log_sigma[low + 1], t.float() - low).exp()
            a_t = torch.rsqrt(1 + sigma ** 2)
            return [v[:, None, None, None] for v in (a_t, sigma * a_t)]
        return [table[t][:, None, None, None] for table in (a, s)]


def to_x0(predict: str, out: torch.Tensor, x_t: torch.Tensor, a, s) -> torch.Tensor:
    """The clean image that a prediction stands for: x0 = a x_t - s v (Salimans & Ho 2022), (x_t - s eps) / a, or x0."""
    if predict == "x0":
        return out
    return a * x_t - s * out if predict == "v" else (x_t - s * out) / a


def draw_times_and_noise(x0: torch.Tensor, schedule: Schedule) -> tuple[torch.Tensor, torch.Tensor]:
    """A time t (B,), stratified over the batch for a calmer loss, and noise eps of x0's shape (B, C, H, W)."""
    b = len(x0) * stage.world  # numbers are drawn for the rows of all processes
    u = (torch.rand(1, device=x0.device) + torch.arange(b, device=x0.device) / b) % 1
    t = (share(u) * schedule.T).long().clamp(max=schedule.T - 1)
    return t, share(torch.randn(b, *x0.shape[1:], device=x0.device)).contiguous(memory_format=torch.channels_last)


def diffusion_loss(model, x0: torch.Tensor, y: torch.Tensor, t: torch.Tensor, eps: torch.Tensor, schedule: Schedule,
                   predict: str, more=None) -> torch.Tensor:
    """Mean squared error of v, eps or x0: x0, eps (B, C, H, W), x0 in [-1, 1], labels y and times t (B,) -> scalar.

    A prediction of x0 has the error of the v it stands for, (x0 - out) / s, with s no lower than MIN_S (Li & He 2025).
    more(x0, y, a): another loss of the denoised images, to be added.
    """
    a, s = schedule.at(t)
    x_t = a * x0 + s * eps
    out = model(x_t, t, y).float()
    target = {"v": a * eps - s * x0, "eps": eps, "x0": x0}[predict]
    scale = s.clamp(min=MIN_S) if predict == "x0" else 1
    loss = F.mse_loss(out / scale, target / scale)
    return loss if more is None else loss + more(to_x0(predict, out, x_t, a, s), y, a)


def alignment_loss(recognizer: nn.Module, config: dict, centres: torch.Tensor, weight: float):
    """The closure of W E[abar (1 - cos(f(x0), centre_y))]: denoised images are pulled to their class in f's space.

    centres (K, dim), unit rows. An ablation of the authors (it cost them 9 points of IJB-C). abar = a^2 quiets the
    blurred x0 of high noise; images of the null class are left out.
    """
    def loss(x0, y, a):
        z = F.normalize(recognizer(preprocess(x0.clamp(-1, 1) * 127.5 + 127.5, config)))
        known = y < len(centres)
        cosine = (z * centres[torch.where(known, y, 0)]).sum(1)
        return weight * (a.flatten() ** 2 * known * (1 - cosine)).mean()
    return loss


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """ema <- d ema + (1 - d) model, with d rising to `decay` so that the first steps are soon forgotten."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - min(decay, (1 + step) / (10 + step)))
    for old, new in zip(ema.buffers(), model.buffers()):
        old.copy_(new)


# -------------------------------------------------------------------------------------------------------------- run
def build(config: dict, num_classes: int) -> UNet:
    """The network of a model.pt's config."""
    keys = ("channels", "width", "multipliers", "blocks", "attention", "patch", "dropout", "frozen_dim")
    return UNet(num_classes, **{k: config[k] for k in keys if k in config})


def load_generator(path, device) -> tuple[UNet, dict]:
    """The network with its EMA weights, ready to sample, and the dict of its model.pt (config, classes).

    Raises StageError where the file is missing, damaged or something else.
    """
    saved = stage.load_model(path, "generator")
    with stage.whole(path):
        config = saved["config"]
        predict, channels = config["predict"], config["channels"]
        if config["T"] != Schedule().T or predict not in ("v", "eps", "x0") or channels not in (1, 3):
            raise ValueError("T, predict or channels")
        size, width, patch = config["size"], config["width"], config["patch"]
        if type(size) is not int or not 0 < size <= 1024 or width < 1 or size % patch:
            raise ValueError("size, width or patch")
        model = build(config, len(saved["classes"]))
        model.load_state_dict(saved["weights"])
    return model.eval().requires_grad_(False).to(device, memory_format=torch.channels_last), saved


def to_uint8(x: torch.Tensor) -> np.ndarray:
    """Images in [-1, 1], (B, C, H, W) -> uint8 (B, H, W, C) on the CPU."""
    return x.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def save_grid(path, rows: list) -> None:
    """Write a picture: a list of rows, each a list of uint8 (H, W, C) images or None; enlarged if they are small."""
    blank = np.full_like(next(i for row in rows for i in row if i is not None), 255)
    picture = np.concatenate([np.concatenate([blank if i is None else i for i in row], axis=1) for row in rows])
    zoom = max(1, 96 // blank.shape[0])
    image = Image.fromarray(picture.squeeze()).resize((picture.shape[1] * zoom, picture.shape[0] * zoom), Image.NEAREST)
    stage.write_atomic(path, lambda p: image.save(p, "PNG"))


def sample_grid(model, schedule, predict: str, images: stage.Images, path, device, columns: int = 10) -> None:
    """Real images of some classes above; below, three images reproduced from each class alone by 50 steps of DDIM."""
    from sample_scoremix import mixed_denoiser, sample  # the sampler's file imports this one
    chosen = np.linspace(0, len(images.classes) - 1, min(columns, len(images.classes))).round().astype(int)
    first = torch.tensor([int((images.labels == int(c)).nonzero()[0]) for c in chosen])
    rows = [list(images[first].cpu().permute(0, 2, 3, 1).numpy())]
    y = torch.from_numpy(chosen).to(device).repeat(3)[:, None]  # (3 * columns, 1): one class an image
    noise = torch.randn(len(y), images.channels, images.size, images.size, generator=torch.Generator().manual_seed(0))
    denoise = mixed_denoiser(model, schedule, predict, y, [1.0])
    x = to_uint8(sample(denoise, noise.to(device), schedule, "ddim", 50))
    save_grid(path, rows + [list(r) for r in np.split(x, 3)])


def run(args) -> None:
    join()
    device, schedule = stage.pick_device(args.device), Schedule()
    images = stage.Images(args.data, args.size)
    if len(images.classes) < 2:
        raise stage.StageError(f"only the class {images.classes[0]} in {args.data[0]}; ScoreMix needs at least two")
    keys = "size width multipliers blocks attention patch dropout predict flip label_dropout".split()
    config = {k: getattr(args, k) for k in keys} | {"channels": images.channels, "T": schedule.T}
    inputs, more, more_flops = {"data": args.data}, None, 0
    if args.recognizer:
        recognizer, saved = load_recognizer(args.recognizer, device)
        agree(f"--recognizer {args.recognizer}", saved["config"], config)
        inputs["recognizer"] = saved["path"]
        centres = torch.from_numpy(centres_of(recognizer, images, saved["config"], device)).float()
        if args.align:
            more = alignment_loss(recognizer, saved["config"], centres.to(device), args.align)
            more_flops = flops_of(recognizer, config, device)
        if args.conditions == "frozen":
            config["frozen_dim"] = centres.shape[1]
    values = images.channels * args.patch ** 2
    if values > args.width and args.predict != "x0":  # noise has no redundancy that could save channels
        print(f"warning: a patch of {values} values is more than {args.width} channels can carry, so samples will stay "
              f"noisy; take --predict x0, a lower --patch, or --width {8 * -(-values // 8)} or more", file=sys.stderr)
    torch.manual_seed(args.seed)
    model = build(config, len(images.classes))
    if args.conditions == "frozen":  # scaled to the unit variance of learned embeddings at the start; the null class: 0
        rows = torch.cat([centres, torch.zeros_like(centres[:1])]) * centres.shape[1] ** 0.5
        model.label.weight.data.copy_(rows)
    model = model.to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(model).requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, args.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    flops = flops_of(ema, config, device)
    derived = {"classes": len(images.classes), "images": len(images.paths), "channels": images.channels,
               "parameters": sum(p.numel() for p in model.parameters()), "flops_per_evaluation": flops}
    out = stage.Run("train_diffusion", args, inputs, derived)
    if (out.dir / "model.pt").exists():
        print(f"already trained: {out.dir / 'model.pt'}")
        return
    accelerate(model, device, args.precision, args.compile)
    network = distribute(model, device)
    print(", ".join(f"{k} {v:,}" for k, v in derived.items()), f"on {device}")

    def step(i, x, y):
        x0 = x.float().div(127.5).sub(1).to(memory_format=torch.channels_last)
        if args.flip:
            x0 = torch.where(rand(len(x), 1, 1, 1, device=device) < 0.5, x0.flip(3), x0)
        y = torch.where(rand(len(y), device=device) < args.label_dropout, model.num_classes, y)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(i, args.steps, args.lr)
        optimizer.zero_grad(set_to_none=True)
        loss, parts = 0, [*zip(*(v.split(args.micro_batch) for v in (x0, y, *draw_times_and_noise(x0, schedule))))]
        for part in parts:  # only the activations of one part are kept at a time
            with exchange(network, now=part is parts[-1]):
                term = diffusion_loss(network, *part, schedule, args.predict, more) * (len(part[0]) / len(x))
                term.backward()
            loss += term.detach()
        grad_norm = nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        update_ema(ema, model, args.ema, i)
        if (i + 1) % args.grid_every == 0 or i + 1 == args.steps:
            sample_grid(ema.eval(), schedule, args.predict, images, out.dir / f"samples-{i + 1}.png", device)
        return {"loss": loss, "grad_norm": grad_norm}

    def export():
        return {"kind": "generator", "config": config, "classes": images.classes, "data": [str(d) for d in args.data],
                "weights": {k: v.cpu() for k, v in ema.state_dict().items()}}
    model.train()
    train(out, {"model": model, "ema": ema, "optimizer": optimizer}, images, step, export, device, images=args.batch,
          network_evaluations=args.batch,  # backward costs about two forwards, one for a frozen network
          flops=(3 * flops + 2 * more_flops) * args.batch)
    print(f"wrote {out.dir / 'model.pt'}; look at {out.dir / f'samples-{args.steps}.png'}")


@stage.command
def main(argv=None):
    run(parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
