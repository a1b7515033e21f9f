"""Train a recogniser, an IResNet under the ArcFace loss, on one or more image folders (stages 1 and 5 of ScoreMix).

    python train_recognizer.py --data runs/demo/data/train --size 32 --out runs/demo/real
    python train_recognizer.py --data runs/demo/data/train runs/demo/mixed --size 32 --out runs/demo/scoremix

Reads   DATA/<class>/<image>; folders are united by class name, so mixed classes come in as new classes.
Writes  OUT/model.pt (backbone with InsightFace's key names, head, classes), OUT/log.jsonl, OUT/cost.json.

The same command goes on after a stop. Sources: ArcFace (Deng et al. 2019); IResNet as in InsightFace's arcface_torch.
"""

import math
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import stage
from training import (accelerate, add_common_flags, agree, balanced_indices, distribute, fill_defaults, flops_of,
                      join, learning_rate, rand, train)

# arch -> blocks of the four levels, width of the first level, embedding dimension
ARCHS = {"small": ((1, 1, 1, 1), 16, 128), "medium": ((2, 2, 2, 2), 16, 128),
         "ir18": ((2, 2, 2, 2), 64, 512), "ir34": ((3, 4, 6, 3), 64, 512),
         "ir50": ((3, 4, 14, 3), 64, 512), "ir101": ((3, 13, 30, 3), 64, 512)}
OURS = ("small", "medium")  # for small images, on a CPU; the others are InsightFace's
SMALL = dict(steps=5000, batch=32, lr=0.1, margin=0.3, scale=32.0)  # defaults of those
LARGE = dict(steps=30_000, batch=256, lr=0.1, margin=0.5, scale=64.0)  # defaults of the others
MARGIN_WARMUP = 0.2  # share of the steps in which the margin rises to --margin
MOMENTUM, WEIGHT_DECAY, MAX_GRAD_NORM = 0.9, 5e-4, 5.0
SHIFT, ZOOM, ROTATION = 0.06, 0.08, 8.0  # augmentation: up to this share of the side, this factor, these degrees
LIGHT, LOW_RESOLUTION = 0.25, 0.2  # contrast by up to this share, brightness by this on -1 ... 1; images made coarse


def parse_args(argv=None):
    parser = stage.Parser(__doc__)
    add_common_flags(parser)
    g = parser.add_argument_group("model and loss (defaults: small, medium | others)")
    g.add_argument("--arch", choices=list(ARCHS), help="backbone (default: small up to 64 pixels, ir50 above)")
    g.add_argument("--init", metavar="MODEL", help="start from this recogniser, backbone and shared head rows")

    def add(name, kind, low, high, text):
        g.add_argument(f"--{name}", type=stage.number(kind, low, high), help=f"{text} ({SMALL[name]} | {LARGE[name]})")
    add("margin", float, 0, math.pi / 2, "angular margin m in radians")
    add("scale", float, 1, 1e4, "scale s of the cosines")
    g = parser.add_argument_group("training (defaults: small, medium | others)")
    add("steps", int, 1, 1e12, "SGD steps")
    add("batch", int, 2, 1e6, "images a step")
    add("lr", float, 0, 1e38, "peak learning rate")
    g.add_argument("--balance", action="store_true", help="draw every class equally often, for long tails")
    g.add_argument("--mixup", type=stage.number(float, 0, 1e3), default=0.0, metavar="A",
                   help="blend images and labels of a batch with weights from Beta(A, A), a control (default: 0, none)")
    g.add_argument("--seed", type=stage.number(int, 0), default=0, help="weights, batches, augmentation (default: 0)")
    args = parser.parse_args(argv)
    args.arch = args.arch or ("small" if args.size <= 64 else "ir50")
    fill_defaults(args, SMALL if args.arch in OURS else LARGE)
    if args.size % 16:
        raise stage.StageError(f"--size {args.size} must be a multiple of 16: the backbone halves it four times")
    return args


# ---------------------------------------------------------------------------------------------------------- network
class IBasicBlock(nn.Module):
    """The improved residual block, BN-conv-BN-PReLU-conv-BN, no activation after the sum (Deng et al. 2019, Sec. 3)."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.prelu = nn.PReLU(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(c_out)
        self.downsample = None
        if stride > 1 or c_in != c_out:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x):
        h = self.conv1(self.bn1(x))
        h = self.bn3(self.conv2(self.prelu(self.bn2(h))))
        return h + (x if self.downsample is None else self.downsample(x))


class IResNet(nn.Module):
    """Images (B, C, size, size) in [-1, 1] -> embeddings (B, dim), not normalised. Four levels halve the resolution.

    Modules carry InsightFace's names, so that state dicts load in both directions.
    """

    def __init__(self, arch: str, size: int, channels: int = 3):
        super().__init__()
        depths, width, dim = ARCHS[arch]
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1, self.prelu = nn.BatchNorm2d(width), nn.PReLU(width)
        c = width
        for level, depth in enumerate(depths):
            blocks = []
            for i in range(depth):
                blocks.append(IBasicBlock(c, width << level, stride=1 if i else 2))
                c = width << level
            setattr(self, f"layer{level + 1}", nn.Sequential(*blocks))
        self.bn2 = nn.BatchNorm2d(c)
        self.fc = nn.Linear(c * (size // 16) ** 2, dim)
        self.features = nn.BatchNorm1d(dim)
        self.features.weight.requires_grad_(False)  # fixed at 1, as InsightFace has it
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.prelu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.features(self.fc(self.bn2(x).flatten(1)))


class Classifier(nn.Module):
    """Images -> the cosines (B, K) of their embeddings to the rows of a head (K, dim)."""

    def __init__(self, backbone: IResNet, head: nn.Parameter):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.backbone(x).float()) @ F.normalize(self.head).T


# ------------------------------------------------------------------------------------------------------ mathematics
def arcface(cosine: torch.Tensor, y: torch.Tensor, s: float, m: float) -> torch.Tensor:
    """Logits of ArcFace (Deng et al. 2019, Eq. 3): s cos(theta_y + m) for the label, s cos(theta_j) for the others.

    cosine (B, K), y (B,) long -> (B, K) float32, with the gradient of this very formula by autograd. Where theta + m
    would pass pi, cos turns upward again; there the logit goes on falling as s (cos(theta) - m sin(m)).
    """
    cosine = cosine.float()
    target = cosine.gather(1, y[:, None]).clamp(-1 + 1e-6, 1 - 1e-6)  # (B, 1); acos has no gradient at the ends
    theta = torch.acos(target)
    with_margin = torch.where(theta + m < math.pi, torch.cos(theta + m), target - m * math.sin(m))
    return s * cosine.scatter(1, y[:, None], with_margin)


def preprocess(images: torch.Tensor, config: dict) -> torch.Tensor:
    """uint8 (B, C, H, W) -> float, by default in [-1, 1]: the one preprocessing of training, mining and evaluation."""
    images = images.flip(1) if config.get("bgr") else images  # public weights alone may want blue first
    return images.float().sub(config["mean"]).div(config["std"]).contiguous(memory_format=torch.channels_last)


def augment(x: torch.Tensor, flip: bool) -> torch.Tensor:
    """Random flip, shift, zoom, rotation, light and low resolution of a batch (B, C, H, W) in [-1, 1]."""
    b, size = len(x), x.shape[-1]

    def uniform(limit, *shape):  # (B, *shape) in [-limit, limit]
        return (2 * rand(b, *shape, device=x.device) - 1) * limit
    angle, zoom = uniform(ROTATION * math.pi / 180), 1 + uniform(ZOOM)
    mirror = torch.where(uniform(1) < 0, -1.0, 1.0) if flip else torch.ones_like(zoom)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    shift = uniform(2 * SHIFT, 2)  # affine_grid's coordinates span 2
    rows = [cos * mirror, -sin, shift[:, 0], sin * mirror, cos, shift[:, 1]]
    grid = F.affine_grid(torch.stack(rows, dim=1).view(b, 2, 3), list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    mean = x.mean((1, 2, 3), keepdim=True)
    x = (x - mean) * (1 + uniform(LIGHT, 1, 1, 1)) + mean + uniform(LIGHT, 1, 1, 1)  # contrast, then brightness
    coarse = F.interpolate(x, size=size // 2, mode="area")
    coarse = F.interpolate(coarse, size=size, mode="bilinear", align_corners=False)
    x = torch.where(rand(b, 1, 1, 1, device=x.device) < LOW_RESOLUTION, coarse, x)
    return x.clamp(-1, 1).contiguous(memory_format=torch.channels_last)


# -------------------------------------------------------------------------------------------------------------- run
def public_weights(path: str, arch: str, bgr: bool, mean: float, std: float) -> dict:
    """What load_model would give for a file that holds a bare state dict with InsightFace's key names.

    Size and channels follow from the shapes. StageError names what does not fit the backbone `arch`. A model.pt of
    this project knows all this itself.
    """
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        if "kind" in weights:
            return stage.load_model(path, "recognizer")
        weights = {k.removeprefix("module."): v.float() if v.is_floating_point() else v for k, v in weights.items()}
    except stage.StageError:
        raise
    except FileNotFoundError:
        raise stage.StageError(f"{path} is missing") from None
    except Exception as error:
        raise stage.StageError(f"{path} is no state dict of tensors ({type(error).__name__})") from None
    shapes = [tuple(weights[k].shape) if k in weights else () for k in ("conv1.weight", "fc.weight")]
    _, width, dim = ARCHS[arch]
    if [len(x) for x in shapes] != [4, 2] or shapes[0][1] not in (1, 3) or shapes[1][0] != dim:
        raise stage.StageError(f"{path} has not the keys and shapes of an InsightFace IResNet (conv1.weight, fc.weight "
                               f"with {dim} rows) but {', '.join(list(weights)[:2])}, ...; only those can be read")
    channels, size = shapes[0][1], 16 * max(1, math.isqrt(shapes[1][1] // (width * 8)))
    config = {"arch": arch, "size": size, "channels": channels, "flip": True, "bgr": bgr, "mean": mean, "std": std}
    expected = IResNet(arch, size, channels).state_dict()
    weights |= {k: v for k, v in expected.items() if k.endswith("num_batches_tracked")}  # old files lack these counters
    wrong = [k for k in expected | weights if k not in expected or k not in weights or
             expected[k].shape != weights[k].shape]
    if wrong:
        raise stage.StageError(f"{path} does not fit --arch {arch}: {len(wrong)} weights differ, such as {wrong[0]}")
    return {"kind": "recognizer", "config": config, "classes": [], "weights": weights, "path": str(path)}


def load_recognizer(path, device, arch=None, bgr=False, mean=127.5, std=127.5) -> tuple[IResNet, dict]:
    """The backbone, ready to embed, and the dict of its model.pt (config, classes, head).

    With `arch`, a file may also hold public weights: channel order, mean and std are then as given. Raises StageError
    where the file is missing, damaged or something else.
    """
    public = arch and not os.path.isdir(path)
    saved = public_weights(path, arch, bgr, mean, std) if public else stage.load_model(path, "recognizer")
    with stage.whole(path):
        config = saved["config"]
        if type(config["flip"]) is not bool or not (math.isfinite(config["mean"]) and 0 < config["std"] < math.inf):
            raise ValueError("flip, mean or std")
        if type(config["size"]) is not int or config["size"] % 16 or not 0 < config["size"] <= 1024:
            raise ValueError("size")
        model = IResNet(*(config[k] for k in ("arch", "size", "channels")))
        model.load_state_dict(saved["weights"])
    return model.eval().requires_grad_(False).to(device, memory_format=torch.channels_last), saved


@torch.no_grad()
def embed_batch(model: IResNet, images: torch.Tensor, config: dict, unit: bool = True) -> torch.Tensor:
    """Embeddings z (B, dim), of length 1 if `unit`, of uint8 images (B, C, H, W) on the model's device.

    The model's config rules: its normalisation, and with `flip` the embeddings of image and mirror image are summed.
    """
    x = preprocess(images, config)
    z = (model(x) + model(x.flip(3)) if config["flip"] else model(x)).float()
    return F.normalize(z) if unit else z


def embed(model: IResNet, images: stage.Images, config: dict, device, batch: int = 256, unit=True) -> torch.Tensor:
    """Embeddings z (N, dim) of an image set, on the CPU, of length 1 if `unit`; StageError if any is not finite."""
    batches = torch.arange(len(images.paths)).split(batch)
    z = torch.cat([embed_batch(model, images[index].to(device), config, unit).cpu() for index in batches])
    if not z.isfinite().all():
        raise stage.StageError("the recogniser gives embeddings that are not finite; train it again, with a lower --lr")
    return z


def class_centres(z: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Normalised means (K, dim), float64, of the unit embeddings z (N, dim) of each class."""
    sums = np.zeros((num_classes, z.shape[1]))
    np.add.at(sums, labels, z)
    return sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)


def centres_of(model: IResNet, images: stage.Images, config: dict, device) -> np.ndarray:
    """The centres (K, dim), float64, of the classes of an image set in a recogniser's embedding space."""
    z = embed(model, images, config, device)
    return class_centres(z.numpy(), images.labels.numpy(), len(images.classes))


def take_over(model: nn.Module, head: nn.Parameter, classes: list[str], saved: dict, config: dict) -> int:
    """Copy a saved recogniser's backbone, and its head rows for classes of the same name; the number of those rows."""
    agree(f"--init {saved['path']}", saved["config"], config, ("arch", "size", "channels"))
    model.load_state_dict(saved["weights"])
    rows = {c: i for i, c in enumerate(saved["classes"])}
    shared = [(i, rows[c]) for i, c in enumerate(classes) if c in rows]
    if shared:
        new, old = map(list, zip(*shared))
        with stage.whole(saved["path"]):
            head.data[new] = saved["head"][old]
    return len(shared)


def run(args) -> None:
    join()
    if args.batch < 2 * stage.world:  # batch norm wants two
        raise stage.StageError(f"--batch {args.batch} leaves fewer than two images to each of {stage.world} processes")
    device = stage.pick_device(args.device)
    images = stage.Images(args.data, args.size)
    if len(images.classes) < 2:
        raise stage.StageError(f"only the class {images.classes[0]} in {' '.join(args.data)}; at least two are needed")
    config = {"arch": args.arch, "size": args.size, "channels": images.channels, "flip": args.flip,
              "mean": 127.5, "std": 127.5}
    torch.manual_seed(args.seed)
    model = IResNet(args.arch, args.size, images.channels)
    head = nn.Parameter(torch.randn(len(images.classes), ARCHS[args.arch][2]) * 0.01)
    inputs = {"data": args.data}
    derived = {"classes": len(images.classes), "images": len(images.paths), "channels": images.channels}
    if args.init:
        saved = load_recognizer(args.init, "cpu")[1]
        inputs["init"] = saved["path"]
        derived["head_rows_taken_over"] = take_over(model, head, images.classes, saved, config)
    model = model.to(device, memory_format=torch.channels_last)
    head = nn.Parameter(head.to(device))
    flops = flops_of(model.eval(), config, device)
    derived |= {"parameters": sum(p.numel() for p in model.parameters()), "flops_per_evaluation": flops}
    out = stage.Run("train_recognizer", args, inputs, derived)
    if (out.dir / "model.pt").exists():
        print(f"already trained: {out.dir / 'model.pt'}")
        return
    trained = [p for p in model.parameters() if p.requires_grad] + [head]
    optimizer = torch.optim.SGD(trained, args.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True)
    accelerate(model, device, args.precision, args.compile)
    network = distribute(Classifier(model, head), device)
    print(", ".join(f"{k} {v:,}" for k, v in derived.items()), f"on {device}")

    def step(i, x, y):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(i, args.steps, args.lr)
        margin = args.margin * min(1, (i + 1) / (MARGIN_WARMUP * args.steps))
        x = augment(preprocess(x, config), args.flip)
        if args.mixup:  # Zhang et al. 2018, one weight a batch, the larger one for the image that y labels
            lam = torch.distributions.Beta(args.mixup, args.mixup).sample().item()
            lam = max(lam, 1 - lam)
            other = torch.randperm(len(x), device=device)
            x = torch.lerp(x[other], x, lam)
        cosine = network(x)  # (B, K)
        loss = F.cross_entropy(arcface(cosine, y, args.scale, margin), y)
        if args.mixup:
            loss = torch.lerp(F.cross_entropy(arcface(cosine, y[other], args.scale, margin), y[other]), loss, lam)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        return {"loss": loss, "accuracy": (cosine.argmax(1) == y).float().mean()}

    def export():
        return {"kind": "recognizer", "config": config, "classes": images.classes, "head": head.detach().cpu().clone(),
                "weights": {k: v.cpu() for k, v in model.state_dict().items()}}
    model.train()
    parts = {"model": model, "head": nn.ParameterList([head]), "optimizer": optimizer}

    def balanced(i):
        return balanced_indices(i, images.labels, args.batch, args.seed)
    train(out, parts, images, step, export, device, balanced if args.balance else None, images=args.batch,
          network_evaluations=args.batch, flops=3 * flops * args.batch)  # backward costs about two forward passes
    print(f"wrote {out.dir / 'model.pt'}")


@stage.command
def main(argv=None):
    run(parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
