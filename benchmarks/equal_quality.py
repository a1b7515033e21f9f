"""How long do we, diffusers and denoising-diffusion-pytorch (ddp) train until their images are equally near the data?

    R=runs/demo
    python benchmarks/equal_quality.py --data $R/data/train --recognizer $R/real --images 100 --peer-steps 10

takes some 20 minutes on two CPU cores; on a GPU without the last two flags, as documented throughout.

Near: the Frechet distance between embeddings, by our recogniser, of --images drawn images (as many of each class) and
all real ones. Each library trains as its documentation says, in turns of a few seconds in one process, from the same
images in memory. It is measured at --every seconds of its own training, and at 2, 4, 8, ... times as many, up to
--budget; measurements do not count as training. Batches, optimisers and averages are those in peers.py.

ours        train_diffusion.py --size 32 with its defaults, which end after 4,500 steps; sample_scoremix.py's 25 of DDPM
diffusers   train_unconditional.py of its examples, --resolution=32: six levels of 128 to 512 channels, batches of 16,
            lr 1e-4. Changed: channels as in the data; labels (num_class_embeds), since mixing needs them. Its
            DDPMPipeline draws with 1,000 steps.
ddp         the class-conditional example of classifier_free_guidance.py: dim 64, dim_mults 1 2 4 8, cond_drop_prob 0.5,
            cond_scale 6; batches of 32, lr 8e-5, ema_decay 0.995 and 250 steps of DDIM from the README. Changed: image
            size and channels; no flash_attn, which that network lacks; no amp; no gathering of gradients.

An evaluation of the peers' networks costs 62 and 30 times what ours costs, so on a CPU --peer-steps must shorten their
drawing; its seconds are also given for the documented number of steps, in proportion. An evaluation is one call of the
network for one image: guidance makes two of each step of ddp. `equal` says what the peers take, relative to us, for the
least distance that all have come to, and that each peer and we have; at_least: we were there when first measured. A
distance near that of white noise is no image yet.
"""

import itertools
import math
import time
from pathlib import Path

import torch
from common import ROOT, arguments, machine, stage, synchronize, version, write
from peers import Ddp, Diffusers, Ours, flops_of, networks

from audit import frechet_distance
from report import pyplot, save_figure
from train_recognizer import embed, embed_batch, load_recognizer
from training import batch_indices

TURN = 5  # seconds
DRAW = 100  # images drawn at once


class Competitor:
    """A library at work: its trainer, what it has spent, what was measured."""

    def __init__(self, trainer, images: stage.Images, flops: int, documented: int, device):
        self.trainer, self.images, self.flops, self.documented, self.device = trainer, images, flops, documented, device
        self.seconds, self.steps, self.curve = 0.0, 0, []

    def ended(self) -> bool:
        return isinstance(self.trainer, Ours) and self.steps == self.trainer.steps

    def train(self, until: float) -> None:
        """A turn, which goes no further than `until` seconds of its training in all."""
        began = time.perf_counter()
        while not self.ended() and time.perf_counter() - began < min(TURN, until - self.seconds):
            index = batch_indices(self.steps, len(self.images.paths), self.trainer.batch, 0)
            self.trainer.step(self.images[index].to(self.device), self.images.labels[index].to(self.device))
            self.steps += 1
        synchronize(self.device)
        self.seconds += time.perf_counter() - began

    def measure(self, count: int, distance) -> None:
        """Add a point to the curve. distance(images uint8 (N, C, 32, 32)) -> Frechet distance."""
        synchronize(self.device)
        began = time.perf_counter()
        y = torch.arange(count, device=self.device) % len(self.images.classes)
        drawn = torch.cat([self.trainer.sample(part) for part in y.split(DRAW)])
        synchronize(self.device)
        seconds, evaluations = (time.perf_counter() - began) / count, self.trainer.evaluations
        seen = self.steps * self.trainer.batch
        self.curve.append({"training_seconds": self.seconds, "steps": self.steps, "images": seen,
                           "flops": 3 * self.flops * seen, "frechet_distance": distance(drawn),
                           "draw_seconds": seconds, "draw_evaluations": evaluations,
                           "draw_seconds_as_documented": seconds * self.documented / evaluations})
        print(self.trainer.__class__.__name__, self.curve[-1], flush=True)


def compare(curves: dict) -> dict:
    """What each takes, relative to us, for the least distance that all have come to."""
    reached = max(min(p["frechet_distance"] for p in curve) for curve in curves.values())
    at = {name: next(i for i, p in enumerate(curve) if p["frechet_distance"] <= reached)
          for name, curve in curves.items()}
    points = {name: curves[name][i] for name, i in at.items()}
    keys = ("training_seconds", "images", "flops", "draw_seconds", "draw_seconds_as_documented")
    return {"frechet_distance": reached, "at_least": at["ours"] == 0,
            "times_ours": {name: {k: p[k] / points["ours"][k] for k in keys} for name, p in points.items()}}


def draw_figure(path: Path, curves: dict, noise: float) -> None:
    """Distance against seconds of training, both on logarithmic axes; that of noise as a line."""
    figure, axis = pyplot().subplots(figsize=(6, 4), layout="constrained")
    for name, curve in curves.items():
        axis.loglog([p["training_seconds"] for p in curve], [p["frechet_distance"] for p in curve], "o-", label=name)
    axis.axhline(noise, color="grey", linestyle=":", label="white noise")
    axis.set(xlabel="seconds of training", ylabel="Frechet distance to the real images")
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    save_figure(figure, path)


def main(argv=None) -> None:
    parser = arguments(__doc__, out=ROOT / "results/benchmarks/equal_quality.json")
    parser.add_argument("--data", nargs="+", required=True, help="image folders to train on")
    parser.add_argument("--recognizer", required=True, help="run of train_recognizer.py that measures")
    parser.add_argument("--budget", type=float, default=320, help="seconds of training for each")
    parser.add_argument("--every", type=float, default=5, help="seconds of training at the first measurement")
    parser.add_argument("--images", type=int, default=300, help="to draw in a measurement")
    parser.add_argument("--peer-steps", type=int, help="of the peers' drawing (default: as documented, 1,000 and 250)")
    args = parser.parse_args(argv)
    device = stage.pick_device(args.device)
    torch.set_flush_denormal(True)
    recognizer, saved = load_recognizer(args.recognizer, device)
    images = stage.Images(args.data, 32, channels := saved["config"]["channels"])
    real = embed(recognizer, images, saved["config"], device).double().numpy()

    def distance(drawn):
        z = [embed_batch(recognizer, part.to(device), saved["config"]).double().cpu() for part in drawn.split(256)]
        return frechet_distance(real, torch.cat(z).numpy())
    torch.manual_seed(0)
    noise = distance(torch.randint(0, 256, (args.images, channels, 32, 32), dtype=torch.uint8))
    nets = {name: net.to(device) for name, net in networks("documented", len(images.classes), channels).items()}
    flops = {name: flops_of(net, channels) for name, net in nets.items()}
    epochs = 100 * math.ceil(len(images.paths) / Diffusers.batch)
    trainers = {"ours": (Ours(nets["ours"], channels), Ours.evaluations),
                "diffusers": (Diffusers(nets["diffusers"], channels, epochs, args.peer_steps or 1000), 1000),
                "ddp": (Ddp(nets["ddp"], channels, args.peer_steps or 250), 2 * 250)}
    rivals = {n: Competitor(made, images, flops[n], documented, device) for n, (made, documented) in trainers.items()}
    for until in itertools.takewhile(lambda s: s <= args.budget, (args.every * 2 ** k for k in itertools.count())):
        at_work = [r for r in rivals.values() if not r.ended()]
        while training := [r for r in at_work if r.seconds < until and not r.ended()]:
            for rival in training:
                rival.train(until)
        for rival in at_work:
            rival.measure(args.images, distance)
    curves = {name: rival.curve for name, rival in rivals.items()}
    equal = {"all": compare(curves)} | {name: compare({k: curves[k] for k in ("ours", name)})
                                        for name in ("diffusers", "ddp")}
    write("equal_quality", {"machine": machine(device), "flops_per_evaluation": flops, "real_images": len(real),
                            "drawn_images": args.images, "peer_steps": args.peer_steps or "as documented",
                            "versions": version("diffusers", "denoising-diffusion-pytorch", "ema-pytorch"),
                            "distance_of_noise": noise, "equal": equal, "curves": curves}, args.out)
    draw_figure(args.out.with_suffix(".png"), curves, noise)


if __name__ == "__main__":
    main()
