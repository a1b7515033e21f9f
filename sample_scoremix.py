"""Sample new classes by mixing the scores of existing ones at every step of the reverse diffusion (ScoreMix, stage 4).

    python sample_scoremix.py --generator runs/demo/generator --pairs runs/demo/pairs.csv --out runs/demo/mixed

Reads   a generator, and a CSV with the columns class_1, class_2, ... (one column: the class is reproduced, not mixed);
        with --start the images as well that the generator was trained on, from --data if they have moved.
Writes  OUT/<class_1>+<class_2>/<index>.png, OUT/manifest.csv, OUT/preview.png (real, reproduced, mixed).

The same command goes on after a stop, and gives the same images on a CPU. Sources: ScoreMix (Rahimi & Marcel 2026,
Sec. 3); DDPM (Ho et al. 2020); DDIM (Song et al. 2021); Heun's method on EDM's noise levels (Karras et al. 2022), which
the authors used; DPM-Solver++(2M) (Lu et al. 2022); classifier-free guidance (Ho & Salimans 2022); autoguidance
(Karras et al. 2024); the condition mix of AugGen (Rahimi et al. 2025); starts from noised images (SDEdit, Meng et al.
2022).
"""

import argparse
import csv
import hashlib
import itertools
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, repeat
from PIL import Image

import stage
from train_diffusion import Schedule, UNet, load_generator, save_grid, to_uint8, to_x0
from training import accelerate, add_speed_flags, agree, fill_defaults, flops_of

SOLVERS = ["ddim", "ddpm", "heun", "dpm++"]
SMALL, LARGE = dict(per_class=5, steps=8), dict(per_class=15, steps=50)  # defaults by the generator's size


def shard(text: str) -> tuple[int, int]:
    """An argparse type: I/N with 1 <= I <= N."""
    i, n = map(int, text.split("/"))
    if not 1 <= i <= n:
        raise argparse.ArgumentTypeError(f"{text} is not I/N with I from 1 to N")
    return i, n


def parse_args(argv=None):
    parser = stage.Parser(__doc__)
    g = parser.add_argument_group("inputs and output")
    g.add_argument("--generator", required=True, metavar="RUN", help="run of train_diffusion.py, or a model.pt")
    g.add_argument("--pairs", required=True, metavar="FILE", help="CSV of mine_pairs.py: which classes to mix")
    g.add_argument("--data", nargs="+", metavar="DIR", help="the generator's training images, if they have moved")
    g.add_argument("--out", required=True, metavar="DIR", help="the mixed image folder, a run directory as well")
    g = parser.add_argument_group("mixing")
    g.add_argument("--per-class", type=stage.number(int, 1), metavar="N", help="images of each new class "
                   f"(default: {SMALL['per_class']} up to 64 pixels, {LARGE['per_class']} above)")
    g.add_argument("--weights", type=stage.number(float, -100, 100), nargs="+", metavar="LAM",
                   help="weight of each class column, with sum 1 (default: equal)")
    g.add_argument("--dirichlet", type=stage.number(float, 1e-3, 1e6), metavar="A",
                   help="draw the weights of every image anew, from a symmetric Dirichlet distribution")
    g.add_argument("--nonconvex", action="store_true", help="allow weights below 0 or with another sum; mixed as x0")
    g.add_argument("--mix", choices=["score", "condition"], default="score",
                   help="condition: AugGen's, one evaluation under the weighted sum of the class embeddings, with any "
                   "weights, such as 0.7 0.7 (default: score)")
    g.add_argument("--window", type=stage.number(float, 0, 1e9), nargs=2, metavar=("LOW", "HIGH"),
                   help="mix only at noise levels s/a from LOW to HIGH, elsewhere class_1 alone (default: everywhere)")
    g.add_argument("--correlation", type=stage.number(float, 0, 1), default=0.0, metavar="RHO",
                   help="of the noise of a class's images: the higher, the more they are alike (default: 0)")
    g.add_argument("--start", type=stage.number(float, 0.01, 1e4), metavar="SIGMA",
                   help="start from training images of the mixed classes, in turn, noised to the level s/a = SIGMA, "
                   "instead of from noise alone: brightness and layout then vary as theirs do")
    g.add_argument("--guidance", type=stage.number(float, 0, 100), default=1.0, metavar="G",
                   help="classifier-free guidance; 1 is none and costs no evaluation (default: 1)")
    g.add_argument("--guide", metavar="RUN", help="a weaker generator of the same classes, such as a model-STEP.pt of "
                   "--keep-every; needs --autoguidance")
    g.add_argument("--autoguidance", type=stage.number(float, 0, 100), metavar="W",
                   help="autoguidance away from --guide; 1 is none")
    g = parser.add_argument_group("solver")
    g.add_argument("--solver", choices=SOLVERS, default="ddpm",
                   help="ddpm is ddim with --eta 1; heun and dpm++ (2M) are of second order (default: ddpm)")
    g.add_argument("--steps", type=stage.number(int, 1, 1000), help="each evaluates every class of the mix once, with "
                   f"heun twice (default: {SMALL['steps']} up to 64 pixels, {LARGE['steps']} above)")
    g.add_argument("--eta", type=stage.number(float, 0, 1),
                   help="of ddim: the share of fresh noise a step (default: 0, deterministic)")
    g = parser.add_argument_group("running")
    g.add_argument("--batch", type=stage.number(int, 1), default=50, metavar="B",
                   help="images sampled at once; changes nothing but rounding (default: %(default)s)")
    g.add_argument("--seed", type=stage.number(int, 0), default=0,
                   help="the noise of an image follows from seed, classes and index alone (default: 0)")
    g.add_argument("--shard", type=shard, default=(1, 1), metavar="I/N",
                   help="the I-th of N parts of the mixes, for N machines or GPUs, each with its own --out, which "
                   "--data of the training takes together (default: 1/1)")
    add_speed_flags(g)
    args = parser.parse_args(argv)
    if args.solver != "ddim" and args.eta not in (None, float(args.solver == "ddpm")):
        raise stage.StageError("--eta belongs to --solver ddim; ddpm is ddim with --eta 1, the others add no noise")
    if (args.guide is None) != (args.autoguidance is None):
        raise stage.StageError("--guide RUN and --autoguidance W belong together; give both or none")
    if args.dirichlet and args.weights:
        raise stage.StageError("--weights fixes the weights and --dirichlet draws them; give one of the two")
    if args.window and args.window[0] > args.window[1]:
        raise stage.StageError(f"--window {args.window[0]:g} {args.window[1]:g} is empty; give LOW before HIGH")
    if args.window and args.mix == "condition":
        raise stage.StageError("--window belongs to --mix score; a mix of conditions has no scores to switch")
    if args.eta is None:
        args.eta = float(args.solver == "ddpm")
    return args


# ---------------------------------------------------------------------------------------------- mixing and sampling
def mixed_denoiser(model: UNet, schedule: Schedule, predict: str, y: torch.Tensor, weights, guidance: float = 1.0,
                   clip: bool = True, mix: str = "score", window: tuple[float, float] | None = None):
    """The closure `denoise(x_t, t) -> x0` of the mixed score, ScoreMix Sec. 3: one network call for all classes.

    y (B, M) long, the M classes of every image; weights (M,), or (B, M) for each image its own. For weights that sum
    to 1, mixing x0, eps, v or the scores is the same thing, since x0 = (x_t + s^2 score) / a is affine in the score;
    for others (--nonconvex) it is not, and x0 is mixed. Guidance: x0_null + g (x0_mixed - x0_null). The clip, not
    linear, comes after the mix. Outside `window`, noise levels (low, high) of s/a, the first class stands alone.
    mix = "condition" is AugGen's: one evaluation under the weighted sum of the class embeddings (Rahimi et al. 2025).
    The closure takes x_t (B, C, H, W) float32 and times t (B,), long but for heun, and gives x0 of x_t's shape, within
    [-1, 1] if `clip`.
    """
    lam = torch.as_tensor(weights, dtype=torch.float32, device=y.device).expand(y.shape)  # (B, M)
    null = torch.full_like(y[:, :1], model.num_classes)
    guided = guidance != 1
    if mix == "condition":
        c = torch.einsum("bm,bmd->bd", lam, model.label(y))[:, None]
        conditions, lam = torch.cat([c, model.label(null)] if guided else [c], dim=1), torch.ones_like(lam[:, :1])
    else:
        conditions = torch.cat([y, null], dim=1) if guided else y
    m, k = lam.shape[1], conditions.shape[1]
    conditions = rearrange(conditions, "b k ... -> (k b) ...")
    first = torch.eye(m, device=lam.device)[0]  # (m,)

    def denoise(x_t, t):
        x, times = repeat(x_t, "b c h w -> (k b) c h w", k=k), t.repeat(k)
        a, s = schedule.at(times)
        x0 = to_x0(predict, model(x, times, conditions).float(), x, a, s)
        x0 = rearrange(x0, "(k b) c h w -> k b c h w", k=k)
        shares = lam
        if window:
            sigma = (s / a)[:len(x_t), 0, 0]  # (B, 1)
            shares = torch.where((window[0] <= sigma) & (sigma <= window[1]), lam, first)
        mixed = torch.einsum("bm,mbchw->bchw", shares, x0[:m])  # s(x,t) = sum_i lam_i s(x,t|y_i)
        if guided:
            mixed = torch.lerp(x0[m], mixed, guidance)
        return mixed.clamp(-1, 1) if clip else mixed
    return denoise


def autoguided(denoise, weak, w: float, clip: bool = True):
    """The closure of x0_weak + w (x0 - x0_weak), Karras et al. 2024: two unclipped denoisers of the same mix.

    As those of `mixed_denoiser` it takes x_t (B, C, H, W) and t (B,), and gives x0, within [-1, 1] if `clip`.
    """
    def guided(x_t, t):
        x0 = torch.lerp(weak(x_t, t), denoise(x_t, t), w)
        return x0.clamp(-1, 1) if clip else x0
    return guided


def timesteps(schedule: Schedule, solver: str, steps: int, start: float | None = None) -> list:
    """Falling times that end at -1, the clean image.

    ddim, ddpm, dpm++: from the last training step T-1, evenly spaced (trailing spacing, Lin et al. 2024). heun: EDM's
    noise levels sigma = s/a (Karras et al. 2022, Eq. 5, rho = 7), from min(80, sigma at T-1) down to sigma at t = 0.
    start: a noise level s/a to begin at instead, if it is below the first one; that of the next training step.
    """
    last = schedule.T - 1 if start is None else math.ceil(schedule.time(start))
    if solver != "heun":
        return [round(last + 1 - i * (last + 1) / steps) - 1 for i in range(steps)] + [-1]
    highest = min(math.log(80), schedule.log_sigma[last])
    high, low = (math.exp(v) ** (1 / 7) for v in (highest, schedule.log_sigma[0]))
    return [schedule.time((high + i / max(1, steps - 1) * (low - high)) ** 7) for i in range(steps)] + [-1]


def evaluations(solver: str, steps: int) -> int:
    """How often a solver calls `denoise`: once a step, but Heun's twice in every step but the last."""
    return 2 * steps - 1 if solver == "heun" else steps


def draw_noise(sources: list, shape, device) -> torch.Tensor:
    """Standard normal (B, *shape), each image from a source of its own (see image_noise), whatever its batch is."""
    noise = torch.stack([draw(shape) for draw in sources])
    if torch.device(device).type == "cuda":
        noise = noise.pin_memory()  # then neither side waits for the transfer
    return noise.to(device, non_blocking=True)


@torch.no_grad()
def sample(denoise, x_T: torch.Tensor, schedule: Schedule, solver: str = "ddim", steps: int = 50, eta: float = 0.0,
           sources: list | None = None, times: list | None = None) -> torch.Tensor:
    """Run the reverse diffusion from x_T (B, C, H, W) to images of the same shape.

    denoise(x_t, t) -> x0 with t (B,), long but for heun; mixing, guidance and clipping are its affair, each time it is
    called. eps is derived from the x0 it returns, so a clipped x0 stays consistent. sources: of noise, one an image
    (see image_noise), needed where noise is added (eta > 0, ddpm), else ValueError. times: falling times to follow
    instead of the solver's own `timesteps`.
    """
    eta = 1.0 if solver == "ddpm" else eta  # DDPM's ancestral step is DDIM's with eta = 1 (Song et al. 2021, Sec. 4.1)
    if eta > 0 and solver in ("ddim", "ddpm") and sources is None:
        raise ValueError("noise is added at every step; give a source of it for each image")

    def x0_at(x, t):
        return denoise(x, torch.full((len(x),), t, device=x.device))
    x, before = x_T, None  # before: log(a/s) and the (mixed) x0 of the last step, for dpm++
    for t, t_next in itertools.pairwise(times or timesteps(schedule, solver, steps)):
        a, s = schedule.coefficients(t)
        a_next, s_next = schedule.coefficients(t_next)
        x0 = x0_at(x, t)
        if solver == "dpm++":  # DPM-Solver++(2M), Lu et al. 2022, Algorithm 2
            slope = x0
            if before and s_next > 0:  # at the clean image the step is infinite in log(a/s), and first order exact
                h, h_before = math.log(a_next / s_next * s / a), math.log(a / s) - before[0]
                slope = x0 + (x0 - before[1]) * (h / h_before / 2)
            x = s_next / s * x + (a_next - a * s_next / s) * slope
            before = math.log(a / s), x0
        elif solver == "heun":  # Karras et al. 2022, Algorithm 1: of x / a, in sigma = s / a
            sigma, sigma_next = s / a, s_next / a_next
            d = (x / a - x0) / sigma
            x_next = x / a + (sigma_next - sigma) * d
            if sigma_next > 0:
                d_next = (x_next - x0_at(a_next * x_next, t_next)) / sigma_next
                x_next = x / a + (sigma_next - sigma) * (d + d_next) / 2
            x = a_next * x_next
        else:
            eps = (x - a * x0) / s
            sigma = eta * s_next / s * math.sqrt(1 - (a / a_next) ** 2)  # Song et al. 2021, Eq. 16
            x = a_next * x0 + math.sqrt(s_next ** 2 - sigma ** 2) * eps  # Song et al. 2021, Eq. 12
            if sigma > 0:
                x = x + sigma * draw_noise(sources, x.shape[1:], x.device)
    return x


# ------------------------------------------------------------------------------------------------------------ files
def read_pairs(path, classes: list[str]) -> list[tuple[str, ...]]:
    """The class names in each row of a pairs file, checked against the generator's classes; StageError says which line
    is wrong."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = [(i, row) for i, row in enumerate(csv.reader(file), 1) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise stage.StageError(f"cannot read the pairs file {path}: {error}") from None
    header, rows = (lines[0][1], lines[1:]) if lines else ([], [])
    columns = [c for c in header if c.startswith("class_")]
    if not columns or columns != [f"class_{i + 1}" for i in range(len(columns))] or header[:len(columns)] != columns:
        raise stage.StageError(f"{path} has the columns {','.join(header)}; expected class_1,class_2,...,distance")
    known, mixes = set(classes), {}  # a dict: a set in the order of the file
    for line, row in rows:
        if len(row) != len(header):
            raise stage.StageError(f"line {line} of {path} has {len(row)} columns instead of {len(header)}")
        mix = tuple(row[:len(columns)])
        unknown = [c for c in mix if c not in known]
        if unknown:
            raise stage.StageError(f"line {line} of {path}: the generator has no class {unknown[0]!r}")
        if len(set(mix)) < len(mix) or mix in mixes:
            raise stage.StageError(f"line {line} of {path} repeats a class or a mix: {' + '.join(mix)}")
        mixes[mix] = None
    if not mixes:
        raise stage.StageError(f"the pairs file {path} has no rows")
    return list(mixes)


def folder_name(mix: tuple[str, ...]) -> str:
    """The class name of a mix; a single class keeps its own, and so joins it. Nobody parses it: the manifest tells."""
    if len(mix) == 1:
        return mix[0]
    name = "+".join(c.replace("%", "%25").replace("+", "%2B").replace("/", "%2F") for c in mix)
    if len(name.encode()) > 200:  # file systems allow 255 bytes
        name = f"{name.encode()[:180].decode(errors='ignore')}~{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    return name


def image_noise(seed: int, mix: tuple[str, ...], index: int, correlation: float = 0.0):
    """The closure `draw(shape)` of one image's noise: a function of the arguments alone.

    mix: the class names in order; index: the image's number. With a correlation rho the noise is sqrt(rho) n_class +
    sqrt(1 - rho) n_image, still standard normal: the images of a class share a part of it (as the frames of a video do
    in Ge et al. 2023), and look more alike.
    """
    def source(*key):
        generator = torch.Generator().manual_seed(stage.seed_of(*key))
        return lambda shape: torch.randn(shape, generator=generator)
    own = source("image", seed, *mix, index)
    if correlation == 0:
        return own
    shared = source("class", seed, *mix)
    return lambda shape: correlation ** 0.5 * shared(shape) + (1 - correlation) ** 0.5 * own(shape)


def start_image(seed: int, mix: tuple[str, ...], index: int, files: list[list]):
    """Which training image the image (mix, index) starts from: the M classes take turns, each goes through its files,
    files (M, ...), in an order of the mix's own."""
    m, turn = index % len(files), index // len(files)
    order = np.random.default_rng(stage.seed_of("start", seed, *mix, m)).permutation(len(files[m]))
    return files[m][order[turn % len(order)]]


def draw_images(denoise, keys: list, seed: int, shape, device, schedule: Schedule, solver: str, steps: int,
                eta: float = 0.0, times: list | None = None, correlation: float = 0.0,
                start: torch.Tensor | None = None) -> np.ndarray:
    """uint8 images (B, H, W, C) by `sample`, each from the noise of its key, (class names, index). shape: (C, H, W).

    start (B, C, H, W) in -1 ... 1: images that, with noise of the level at times[0], stand in the place of pure noise.
    """
    sources = [image_noise(seed, mix, index, correlation) for mix, index in keys]
    x_T = draw_noise(sources, shape, device)
    if start is not None:
        a, s = schedule.coefficients(times[0])
        x_T = a * start + s * x_T
    x_T = x_T.contiguous(memory_format=torch.channels_last)
    return to_uint8(sample(denoise, x_T, schedule, solver, steps, eta, sources, times))


def convex(weights) -> bool:
    """Whether weights, a list of numbers, are none negative and sum to 1."""
    return min(weights) >= 0 and abs(sum(weights) - 1) <= 1e-6


def image_weights(seed: int, mix: tuple[str, ...], index: int, alpha: float) -> list[float]:
    """The weights of one image, from Dirichlet(alpha, ...): like its noise a function of (seed, names, index) alone."""
    rng = np.random.default_rng(stage.seed_of("weights", seed, *mix, index))
    return rng.dirichlet([alpha] * len(mix)).tolist()


def wait(writing: list) -> None:
    """Let the files of a batch be written; an error in one of them is raised here."""
    for future in writing:
        future.result()


def write_png(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    stage.write_atomic(path, lambda p: Image.fromarray(image.squeeze()).save(p, "PNG"), sync=False)  # (H, W, C)


def is_complete(path: Path) -> bool:
    """Whether a PNG is there to its last byte: a loss of power may cut files."""
    try:
        with open(path, "rb") as file:
            file.seek(-12, os.SEEK_END)
            return file.read() == b"\0\0\0\0IEND\xaeB`\x82"
    except OSError:
        return False


# -------------------------------------------------------------------------------------------------------------- run
def load_guide(path, saved: dict, device) -> tuple[UNet, dict]:
    """The weaker generator of autoguidance; it must know the same classes and draw images of the same shape."""
    weak, guide = load_generator(path, device)
    if guide["classes"] != saved["classes"]:
        raise stage.StageError(f"--guide {path} has other classes than the generator; train both on the same data")
    agree(f"--guide {path}", guide["config"], saved["config"])
    return weak, guide


def read_files(saved: dict, mixes: list) -> dict[str, list]:
    """Class -> the files of its images, those that the generator was trained on; at least of all that are mixed."""
    try:
        classes, paths, labels = stage.scan(saved["data"])
        if missing := {c for mix in mixes for c in mix} - set(classes):
            raise stage.StageError(f"{' '.join(map(str, saved['data']))} holds no class {min(missing)!r}")
    except stage.StageError as error:
        raise stage.StageError(f"needs the generator's training images: {error}; --data says where they are") from None
    files = {c: [] for c in classes}
    for path, label in zip(paths, labels):
        files[classes[label]].append(path)
    return files


def write_preview(path: Path, mixes: list, reproduce, saved: dict, files: dict | None, per_class: int) -> None:
    """A picture, a row for each of up to 8 mixes: real a, reproduced a, mixes, reproduced b, real b."""
    size, channels = saved["config"]["size"], saved["config"]["channels"]
    mixes = [mixes[i] for i in np.unique(np.linspace(0, len(mixes) - 1, 8).round().astype(int))]
    try:
        files = files or read_files(saved, mixes)
        real = {c: stage.decode(files[c][0], size, channels) for mix in mixes for c in mix}
    except (stage.StageError, OSError) as error:  # no picture is worth the images that are drawn
        print(f"the preview is without real images: {error}")
        real = {}
    alone, rows = iter(reproduce([(mix, c) for mix in mixes for c in mix])), []
    for mix in mixes:
        made = [stage.decode(path.parent / folder_name(mix) / f"{i}.png", size, channels)
                for i in range(min(5, per_class))]
        left, *right = [(real.get(c), next(alone)) for c in mix]
        rows.append([*left, *made, *itertools.chain.from_iterable(pair[::-1] for pair in right)])
    save_grid(path, rows)


def run(args) -> None:
    device, schedule = stage.pick_device(args.device), Schedule()
    model, saved = load_generator(args.generator, device)
    if args.guidance != 1 and not saved["config"].get("label_dropout", True):
        raise stage.StageError(f"{args.generator} has no null class (--label-dropout 0), which --guidance needs; use 1")
    fill_defaults(args, SMALL if saved["config"]["size"] <= 64 else LARGE)
    mixes, (part, parts) = read_pairs(args.pairs, saved["classes"]), args.shard
    if parts > len(mixes):
        raise stage.StageError(f"--shard {part}/{parts}: {args.pairs} has only {len(mixes)} mixes")
    order = len(mixes[0])
    weights = args.weights or [1 / order] * order
    if len(weights) != order:
        raise stage.StageError(f"--weights has {len(weights)} numbers for mixes of {order} classes")
    if not args.window and len({frozenset(zip(mix, weights)) for mix in mixes}) < len(mixes):
        raise stage.StageError(f"{args.pairs} has a mix in two orders, which with these weights are one class under "
                               "two names; leave one of them")
    mixes = mixes[part - 1::parts]
    if args.mix == "score" and not args.nonconvex and not convex(weights):
        raise stage.StageError(f"--weights {' '.join(map(str, weights))}: none may be negative and their sum must be "
                               f"1, not {sum(weights):g}; --nonconvex allows it")
    folder = {mix: folder_name(mix) for mix in mixes}
    clash = set(folder.values()) & set(saved["classes"]) if order > 1 else ()
    if clash:
        raise stage.StageError(f"the mix {min(clash)} would carry the name of an existing class; rename that class")
    config, ids = saved["config"], {c: i for i, c in enumerate(saved["classes"])}
    shape = config["channels"], config["size"], config["size"]
    flops = flops_of(model, config, device)
    inputs, weak_flops = {"generator": saved["path"], "pairs": args.pairs}, 0
    times, saved["data"] = timesteps(schedule, args.solver, args.steps, args.start), args.data or saved["data"]
    if args.start:
        if len(set(times)) < len(times):
            raise stage.StageError(f"--start {args.start}: {args.steps} steps do not fit; raise it or lower --steps")
        inputs["data"] = saved["data"]
    files = read_files(saved, mixes) if args.start or args.data else None
    if args.guide:
        weak, guide = load_guide(args.guide, saved, device)
        inputs["guide"] = guide["path"]
        weak_flops = flops_of(weak, config, device)
        accelerate(weak, device, args.precision, args.compile)
    accelerate(model, device, args.precision, args.compile)
    derived = {"weights": None if args.dirichlet else weights, "images": len(mixes) * args.per_class}
    out = stage.Run("sample_scoremix", args, inputs, derived | {"flops_per_evaluation": flops})
    work = [(mix, index) for mix in mixes for index in range(args.per_class)]
    lam = {item: image_weights(args.seed, *item, args.dirichlet) if args.dirichlet else weights for item in work}
    target = {item: out.dir / folder[item[0]] / f"{item[1]}.png" for item in work}

    def draw(keys, names, shares, counted=True):
        """Images (B, H, W, C) of the classes in `names`, mixed by `shares`, from the noise of `keys` (mix, index)."""
        y = torch.tensor([[ids[c] for c in mix] for mix in names], device=device)
        denoise = mixed_denoiser(model, schedule, config["predict"], y, shares, args.guidance, not args.guide, args.mix,
                                 args.window)
        if args.guide:
            predict = guide["config"]["predict"]
            weak_denoise = mixed_denoiser(weak, schedule, predict, y, shares, 1.0, False, args.mix, args.window)
            denoise = autoguided(denoise, weak_denoise, args.autoguidance)
        start = None
        if args.start:
            chosen = [start_image(args.seed, *key, [files[c] for c in mix]) for key, mix in zip(keys, names)]
            start = np.stack([stage.decode(p, config["size"], config["channels"]) for p in chosen])  # (B, H, W, C)
            start = rearrange(torch.from_numpy(start).to(device), "b h w c -> b c h w") / 127.5 - 1
        images = draw_images(denoise, keys, args.seed, shape, device, schedule, args.solver, args.steps, args.eta,
                             times, args.correlation, start)
        calls = evaluations(args.solver, args.steps) * len(keys)
        m = 1 if args.mix == "condition" else len(names[0])
        strong, soft = calls * (m + (args.guidance != 1)), calls * m * bool(args.guide)
        out.spend(device, images=counted * len(keys), network_evaluations=strong + soft,
                  flops=strong * flops + soft * weak_flops)
        return images
    there = {item: is_complete(path) for item, path in target.items()}
    if (out.dir / "manifest.csv").exists() and all(there.values()):
        print(f"already sampled: {out.dir}")
        return
    batches = [work[i:i + args.batch] for i in range(0, len(work), args.batch)]
    missing = [b for b in batches if not all(there[item] for item in b)]
    done = len(work) - sum(map(len, missing))
    out.goes_on()
    bar = stage.progress(total=len(work), initial=done, desc=out.dir.name, unit="img")
    with ThreadPoolExecutor(4) as writers, bar:
        writing = []
        for batch in missing:  # always whole: a batch decides its images' last bit of rounding
            images = draw(batch, [mix for mix, _ in batch], [lam[item] for item in batch])
            wait(writing)
            writing = [writers.submit(write_png, target[item], image) for item, image in zip(batch, images)]
            bar.update(len(batch))
        wait(writing)

    def reproduce(rows):  # each class alone, from the noise of the first image of its mix
        parts = [rows[i:i + args.batch] for i in range(0, len(rows), args.batch)]
        return np.concatenate([draw([(mix, 0) for mix, _ in p], [(c,) for _, c in p], [[1.0]] * len(p), False)
                               for p in parts])
    write_preview(out.dir / "preview.png", mixes, reproduce, saved, files, args.per_class)

    def write_manifest(path):
        with open(path, "w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            columns = range(1, order + 1)
            table.writerow(["path", *(f"class_{i}" for i in columns), *(f"weight_{i}" for i in columns), "seed"])
            table.writerows([target[item].relative_to(out.dir), *item[0], *lam[item], args.seed] for item in work)
    os.sync()  # the images, which were not written out one by one
    stage.write_atomic(out.dir / "manifest.csv", write_manifest)
    print(f"wrote {len(work)} images of {len(mixes)} classes to {out.dir}; look at {out.dir / 'preview.png'}")


@stage.command
def main(argv=None):
    run(parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
