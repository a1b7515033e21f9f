"""Choose which classes to mix, by their distance in the recogniser's embedding space (stage 4 of ScoreMix).

    python mine_pairs.py --recognizer runs/demo/real --data runs/demo/data/train --out runs/demo/pairs.csv

Reads   a recogniser and the image folders of the classes; with --space condition, a generator alone.
Writes  FILE.csv with class_1,class_2,distance, best first; beside it FILE.json: arguments, inputs, statistics and cost.

Source: ScoreMix (Rahimi & Marcel 2026): classes far apart in the embedding space give the largest gain.
"""

import csv
import io
import itertools
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch

import stage
from train_diffusion import load_generator
from train_recognizer import centres_of, count_flops, load_recognizer

SMALL_COUNT, LARGE_COUNT = 5, 4 / 3  # mixes for every class: few classes of small images need more new ones
MOST_MIXES = 100_000_000  # candidates that are enumerated and sorted at once: all pairs of 14,000 classes


def parse_args(argv=None):
    parser = stage.Parser(__doc__)
    g = parser.add_argument_group("inputs and output")
    g.add_argument("--recognizer", metavar="RUN", help="run of train_recognizer.py, or a model.pt")
    g.add_argument("--data", nargs="+", metavar="DIR", help="image folders of the classes to mix")
    g.add_argument("--generator", metavar="RUN", help="run of train_diffusion.py; all that --space condition "
                   "looks at")
    g.add_argument("--out", required=True, metavar="FILE", help="the pairs file, a CSV")
    g = parser.add_argument_group("mining")
    g.add_argument("--count", type=stage.number(int, 1), metavar="K",
                   help=f"mixes (default: {SMALL_COUNT:g} a class up to 64 pixels, {LARGE_COUNT:.3g} above)")
    g.add_argument("--order", type=stage.number(int, 1), default=2, metavar="M",
                   help="classes a mix; 1 lists every class alone, to reproduce it (default: 2)")
    g.add_argument("--strategy", choices=["distant", "close", "random"], default="distant",
                   help="which mixes come first (default: distant)")
    g.add_argument("--space", choices=["embedding", "condition"], default="embedding",
                   help="where distances are taken: between the classes' centres in the recogniser's space, or between "
                   "the class embeddings that the generator has learned (default: embedding)")
    g.add_argument("--max-uses", type=stage.number(int, 1), metavar="U",
                   help="most mixes that a class may be part of (default: one more than an even share)")
    g.add_argument("--seed", type=stage.number(int, 0), default=0, help="the order of --strategy random (default: 0)")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    args = parser.parse_args(argv)
    if args.space == "embedding" and not (args.recognizer and args.data):
        raise stage.StageError("--space embedding needs --recognizer RUN and --data DIR")
    if (args.space == "condition") != bool(args.generator):
        raise stage.StageError("--space condition and --generator RUN belong together; give both or none")
    return args


# ------------------------------------------------------------------------------------------------------ mathematics
def combinations(k: int, order: int) -> np.ndarray:
    """All sets of `order` numbers below k as int32 (n, order), each row and the rows themselves ascending."""
    mixes = np.arange(k, dtype=np.int32)[:, None]
    for _ in range(order - 1):  # append to every row each number above its last
        more = k - 1 - mixes[:, -1]
        first = np.repeat(mixes[:, -1] + 1 - (np.cumsum(more) - more), more)
        last = (np.arange(len(first)) + first).astype(np.int32)
        mixes = np.column_stack([np.repeat(mixes, more, axis=0), last])
    return mixes


def mine(centres: np.ndarray, count: int, order: int = 2, strategy: str = "distant", max_uses: int | None = None,
         seed: int = 0) -> list[tuple[tuple[int, ...], float]]:
    """The `count` best mixes of `order` classes as (class indices, distance), best first.

    centres (K, dim), unit rows. distance = 1 - cosine, summed over the pairs of a mix. Greedy: mixes are taken in the
    order of the strategy (distant: largest distance first, close: smallest, random: by seed; ties by index) while each
    of their classes has fewer than `max_uses` uses (None: no cap). Fewer than `count` come back if the cap leaves no
    more. Order 1 gives every class once, with distance 0. Where there are more than MOST_MIXES mixes of more than two
    classes, they are not enumerated but grown (see `grow`). Raises StageError for too many pairs.
    """
    k = len(centres)
    if order == 1:
        return [((i,), 0.0) for i in range(k)]
    grown = order > 2 and math.comb(k, order) > MOST_MIXES
    if math.comb(k, 2) > MOST_MIXES:
        raise stage.StageError(f"{math.comb(k, 2):,} pairs of {k} classes are too many to enumerate "
                               f"(limit {MOST_MIXES:,}); use fewer classes")
    mixes = combinations(k, 2 if grown else order)  # (n, order)
    apart = 1 - centres @ centres.T  # (K, K)
    distance = sum(apart[mixes[:, i], mixes[:, j]] for i, j in itertools.combinations(range(mixes.shape[1]), 2))
    if strategy == "random":
        rank = np.random.default_rng(seed).permutation(len(mixes))
    else:
        rank = np.argsort(-distance if strategy == "distant" else distance, kind="stable")
    if grown:
        return grow(apart, mixes[rank], count, order, strategy, max_uses, seed)
    uses, chosen = np.zeros(k, int), []
    for i in rank:
        mix = mixes[i]
        if max_uses is None or (uses[mix] < max_uses).all():
            uses[mix] += 1
            chosen.append((tuple(map(int, mix)), float(distance[i])))
            if len(chosen) == count:
                break
    return chosen


def grow(apart: np.ndarray, pairs: np.ndarray, count: int, order: int, strategy: str, max_uses: int | None = None,
         seed: int = 0) -> list[tuple[tuple[int, ...], float]]:
    """Mixes of many classes without enumeration: each pair in turn, best first, is grown by one class after another.

    apart (K, K) distances, pairs (n, 2) in the order of the strategy. The class that joins is the one with uses left
    whose distances to the classes so far add up to the most (close: least; random: any). A mix that is there already
    is left out. Not exact: the best mix of three need not contain the best pair. In order of their sums, as `mine`.
    """
    uses, chosen, rng = np.zeros(len(apart), int), {}, np.random.default_rng(seed)
    limit = np.inf if max_uses is None else max_uses
    for pair in pairs:
        mix = list(map(int, pair))
        if (uses[mix] >= limit).any():
            continue
        while len(mix) < order:
            gain = rng.random(len(apart)) if strategy == "random" else apart[mix].sum(0)
            gain = -gain if strategy == "close" else gain
            gain[uses >= limit] = -np.inf
            gain[mix] = -np.inf
            best = int(gain.argmax())
            if gain[best] == -np.inf:
                break
            mix.append(best)
        key = tuple(sorted(mix))
        if len(mix) == order and key not in chosen:
            uses[mix] += 1
            chosen[key] = float(sum(apart[i, j] for i, j in itertools.combinations(key, 2)))
            if len(chosen) == count:
                break
    found = list(chosen.items())
    return found if strategy == "random" else sorted(found, key=lambda m: -m[1] if strategy == "distant" else m[1])


# -------------------------------------------------------------------------------------------------------------- run
def run(args) -> None:
    device, out = stage.pick_device(args.device), Path(args.out)
    if out.suffix != ".csv" or out.is_dir():
        raise stage.StageError(f"--out {out} must be a CSV file, such as {out / 'pairs.csv'}")
    if args.order == 1 and args.count:
        raise stage.StageError("--order 1 lists every class; leave --count out")
    if args.space == "embedding":
        model, saved = load_recognizer(args.recognizer, device)
        images = stage.Images(args.data, saved["config"]["size"], saved["config"]["channels"])
        classes, inputs = images.classes, {"recognizer": stage.fingerprint(saved["path"]),
                                           "data": [stage.fingerprint(d) for d in args.data]}
    else:
        model, saved = load_generator(args.generator, device)
        classes, inputs = saved["classes"], {"generator": stage.fingerprint(saved["path"])}
    k, m = len(classes), args.order
    if k < max(2, m):
        raise stage.StageError(f"only {k} class(es) to mix; at least {max(2, m)} are needed")
    per_class = SMALL_COUNT if saved["config"]["size"] <= 64 else LARGE_COUNT
    count = k if m == 1 else args.count or min(math.ceil(per_class * k), math.comb(k, m))
    max_uses = args.max_uses or math.ceil(m * count / k) + 1
    cost = {"device": str(device), "images": 0, "network_evaluations": 0, "flops": 0}
    if args.space == "embedding":
        centres = centres_of(model, images, saved["config"], device)
        n = len(images.paths) * (1 + saved["config"]["flip"])
        one = torch.zeros(1, images.channels, images.size, images.size, device=device)
        cost |= {"images": len(images.paths), "network_evaluations": n, "flops": n * count_flops(model, one)}
    else:
        centres = model.label.weight[:k].double().cpu().numpy()  # the null class is left out
        centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    mixes = mine(centres, count, m, args.strategy, max_uses, args.seed)
    if len(mixes) < count:
        raise stage.StageError(f"only {len(mixes)} of {count} mixes can be had from {k} classes with each in at most "
                               f"{max_uses}; raise --max-uses or lower --count")
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow([f"class_{i + 1}" for i in range(m)] + ["distance"] * (m > 1))
    table.writerows([*(classes[i] for i in mix), *([f"{d:.6f}"] * (m > 1))] for mix, d in mixes)
    content = text.getvalue().encode()
    if out.exists() and out.read_bytes() != content:
        raise stage.StageError(f"{out} exists with another content; delete it, or choose another --out")
    if out.exists():
        print(f"already mined: {out}")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    everything = 1 - (centres @ centres.T)[np.triu_indices(k, 1)]
    distances = {"mean": float(everything.mean()), "min": float(everything.min()), "max": float(everything.max()),
                 "chosen_mean": float(np.mean([d for _, d in mixes]))}
    cost["seconds"] = time.monotonic() - stage.began
    stage.write_json(out.with_suffix(".json"), {"arguments": vars(args), "count": count, "max_uses": max_uses,
                                                "distances": distances, "inputs": inputs, "cost": cost})
    stage.write_atomic(out, lambda p: p.write_bytes(content))
    told = f", {args.strategy}, mean distance {distances['chosen_mean']:.3f}" if m > 1 else ""
    print(f"wrote {out}: {len(mixes)} mixes{told}; the distances of all pairs: mean {distances['mean']:.3f}, "
          f"from {distances['min']:.3f} to {distances['max']:.3f}")


@stage.command
def main(argv=None):
    run(parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
