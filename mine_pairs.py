"""Choose which classes to mix, by their distance in the recogniser's embedding space (stage 3 of ScoreMix).

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
from train_recognizer import centres_of, load_recognizer
from training import flops_of

SMALL_COUNT, LARGE_COUNT = 5, 4 / 3  # mixes for every class: few classes of small images need more new ones
MOST_MIXES = 10_000_000  # of more than two classes that are enumerated and sorted at once: all triplets of 390 classes
FEW = 1_000_000  # pairs that are shuffled as a whole; from more, random ones are drawn
TILE = 2048  # rows and columns of the matrix of all cosines that are there at once
BAND = 65_536  # pairs that are ordered at once, after those of classes that are used up are left out
SLACK = 2e-6  # of a cosine: more than float32 rounds


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
                   help="most mixes that a class may be part of (default: one more than an even share, or as few more "
                   "as K mixes take)")
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


def distances(centres: np.ndarray, mixes: np.ndarray) -> np.ndarray:
    """1 - cosine, summed over the pairs of each mix (n, M) of unit rows (K, dim): float64 (n,), rounded to 1e-9."""
    found = np.zeros(len(mixes))
    for part in np.array_split(np.arange(len(mixes)), len(mixes) // 4096 + 1):
        z = centres[mixes[part]]  # (n, M, dim)
        for a, b in itertools.combinations(range(mixes.shape[1]), 2):
            found[part] += 1 - np.einsum("nd,nd->n", z[:, a], z[:, b])
    return found.round(9)


def alike(cosine: float) -> stage.StageError:
    return stage.StageError(f"millions of pairs of classes have the distance {1 - cosine:.6f}: these centres do not "
                            "tell classes apart; train longer")


def largest_products(x: torch.Tensor, sign: int, below: float, want: int) -> tuple[np.ndarray, np.ndarray, float]:
    """The pairs (n, 2) of rows of x (K, dim) with lower <= sign * product < below, n about `want`; falling values (n,).

    One pass over the upper half of x @ x.T, tile by tile: memory for a tile and for the pairs that are found. `lower`
    is guessed from the products of some rows, and raised when too many come; -inf, if none is left out, comes last.
    """
    k, lower = len(x), -math.inf
    if k * (k - 1) // 2 > want:
        some = x[torch.from_numpy(np.random.default_rng(k).choice(k, min(k, 1500), replace=False)).to(x.device)]
        products = sign * (some @ some.T)[torch.ones(len(some), len(some), device=x.device).triu(1).bool()]
        rank = max(1, round(want / (k * (k - 1) / 2) * len(products)))
        products = products[products < below]
        if rank < len(products):
            lower = float(products.topk(rank).values[-1])
    side, pairs, values = min(k, TILE), [], []  # tiles share memory: freed ones, among kept pairs, leave it in pieces
    products, mask = x.new_empty(side * side), torch.empty(side * side, dtype=torch.bool, device=x.device)
    twice = torch.ones(side, side, dtype=torch.bool, device=x.device).tril()  # what comes twice, or is one class
    for i, j in itertools.combinations_with_replacement(range(0, k, TILE), 2):
        a, b = x[i:i + TILE], x[j:j + TILE]
        tile, inside = (v[:len(a) * len(b)].view(len(a), len(b)) for v in (products, mask))
        torch.mm(a, b.T, out=tile).mul_(sign)
        tile.masked_fill_(torch.ge(tile, below, out=inside), -math.inf)
        if i == j:
            tile.masked_fill_(twice[:len(a), :len(a)], -math.inf)
        where = torch.ge(tile, max(lower, -9), out=inside).nonzero()  # (n, 2)
        values.append(tile[where[:, 0], where[:, 1]])
        pairs.append(where + where.new_tensor([i, j]))
        if sum(map(len, values)) > 4 * want:
            pairs, values = torch.cat(pairs), torch.cat(values)
            lower = float(values.topk(want).values[-1])
            pairs, values = [pairs[values >= lower]], [values[values >= lower]]
            if len(values[0]) > max(2 * want, MOST_MIXES):
                raise alike(sign * lower)
    values, rank = torch.cat(values).sort(descending=True)
    return torch.cat(pairs)[rank].cpu().numpy(), values.cpu().numpy(), lower


def ranked_pairs(centres: np.ndarray, strategy: str, usable, count: int, seed: int = 0, device="cpu"):
    """Generator of pairs (n, 2) and their distances (n,) in the order of the strategy (see `mine`), band after band.

    usable() -> bool (K,), asked before every band: which classes still matter. The first pass over all products looks
    for about 4 `count` pairs, later ones for more, up to 64 a class. Pairs are found in float32 and ordered in float64,
    so that the tiles change nothing. Random pairs are drawn, some of them twice, unless few are left to draw from.
    """
    k, want, bound, rng = len(centres), 4 * count + 10_000, math.inf, np.random.default_rng(seed)
    sign = -1 if strategy == "distant" else 1  # the bands fall in sign * cosine
    most, x = max(want, 64 * k), torch.from_numpy(centres).float().to(device)
    while bound > -math.inf and len(left := usable().nonzero()[0]) > 1:
        if strategy == "random":
            n = math.comb(len(left), 2)
            if n > max(FEW, 8 * count):
                pairs = np.sort(left[rng.integers(len(left), size=(want, 2))], axis=1)
                pairs = pairs[pairs[:, 0] < pairs[:, 1]]
            else:
                pairs, bound = left[combinations(len(left), 2)[rng.permutation(n)]], -math.inf
            yield pairs, distances(centres, pairs)
            continue
        some = x if len(left) == k else x[torch.from_numpy(left).to(device)]
        pairs, values, lower = largest_products(some, sign, bound + SLACK, want)
        if lower + SLACK >= bound and want > MOST_MIXES:
            raise alike(sign * bound)
        want = min(4 * want, most) if lower + SLACK < bound else 4 * want  # more ties than were wanted
        for cut in [*(values[BAND::BAND].tolist()), lower]:
            if cut + SLACK >= bound:
                continue
            first, last = np.searchsorted(-values, [-bound - SLACK, -cut], side="right")
            band = left[pairs[first:last]]
            band = band[usable()[band].all(1)]
            distance = distances(centres, band)
            inside = (sign * (1 - distance) >= cut + SLACK) & (sign * (1 - distance) < bound)
            band, distance, bound = band[inside], distance[inside], cut + SLACK
            rank = np.lexsort((band[:, 1], band[:, 0], -sign * (1 - distance)))
            yield band[rank], distance[rank]


def mine(centres: np.ndarray, count: int, order: int = 2, strategy: str = "distant", max_uses: int | None = None,
         seed: int = 0, device="cpu") -> list[tuple[tuple[int, ...], float]]:
    """The `count` best mixes of `order` classes as (class indices, distance), best first.

    centres (K, dim), unit rows. distance = 1 - cosine, summed over the pairs of a mix. Greedy: mixes are taken in the
    order of the strategy (distant: largest distance first, close: smallest, random: by seed; ties by index) while each
    of their classes has fewer than `max_uses` uses (None: no cap). Fewer than `count` come back if the cap leaves no
    more. Order 1 gives every class once, with distance 0. Pairs are exact in memory that is linear in the classes; all
    mixes of more classes are enumerated, or where they are more than MOST_MIXES, grown (see `grow`).
    """
    k = len(centres)
    if order == 1:
        return [((i,), 0.0) for i in range(k)]
    uses, chosen, limit = np.zeros(k, int), {}, np.inf if max_uses is None else max_uses
    if order == 2 or math.comb(k, order) > MOST_MIXES:
        bands = ranked_pairs(centres, strategy, lambda: uses < limit, count, seed, device)
        if order > 2:
            return grow(centres, bands, uses, limit, count, order, strategy, seed)
    else:
        mixes, apart = combinations(k, order), 1 - centres @ centres.T
        distance = sum(apart[mixes[:, i], mixes[:, j]] for i, j in itertools.combinations(range(order), 2)).round(9)
        rank = (np.random.default_rng(seed).permutation(len(mixes)) if strategy == "random" else
                np.argsort(-distance if strategy == "distant" else distance, kind="stable"))
        bands = ((mixes[part], distance[part]) for part in np.array_split(rank, len(rank) // BAND + 1))
    for mixes, distance in bands:
        for mix, d in zip(map(tuple, mixes.tolist()), distance.tolist()):
            if all(uses[i] < limit for i in mix) and mix not in chosen:
                for i in mix:
                    uses[i] += 1
                chosen[mix] = d
                if len(chosen) == count:
                    return list(chosen.items())
    return list(chosen.items())


def grow(centres: np.ndarray, bands, uses: np.ndarray, limit: float, count: int, order: int, strategy: str,
         seed: int = 0) -> list[tuple[tuple[int, ...], float]]:
    """Mixes of many classes without enumeration: each pair in turn, best first, is grown by one class after another.

    bands: see `ranked_pairs`; uses (K,) is counted up to `limit`. The class that joins is the one with uses left whose
    distances to the classes so far add up to the most (close: least; random: any). A mix that is there already is left
    out. Not exact: the best mix of three need not contain the best pair. In order of their sums, as `mine`.
    """
    chosen, rng = {}, np.random.default_rng(seed)
    for pair in itertools.chain.from_iterable(pairs.tolist() for pairs, _ in bands):
        mix = list(pair)
        if (uses[mix] >= limit).any():
            continue
        while len(mix) < order:
            gain = rng.random(len(uses)) if strategy == "random" else -centres @ centres[mix].sum(0)
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
            chosen[key] = float(distances(centres, np.array([key]))[0])
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
    least = args.max_uses or math.ceil(m * count / k) + 1
    most = args.max_uses or max(least, math.comb(k - 1, m - 1))  # a class is part of so many, if all mixes are taken
    cost = {"images": 0, "network_evaluations": 0, "flops": 0}
    if args.space == "embedding":
        centres = centres_of(model, images, saved["config"], device)
        n = len(images.paths) * (1 + saved["config"]["flip"])
        flops = n * flops_of(model, saved["config"], device)
        cost = {"images": len(images.paths), "network_evaluations": n, "flops": flops}
    else:
        centres = model.label.weight[:k].double().cpu().numpy()  # the null class is left out
        centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    for max_uses in range(least, most + 1):  # a small cap may leave only classes that are mixed with each other already
        mixes = mine(centres, count, m, args.strategy, max_uses, args.seed, device)
        capped = len(mixes) < count and np.bincount(np.ravel([mix for mix, _ in mixes])).max() == max_uses
        if not capped:  # more uses of a class would change nothing
            break
    if len(mixes) < count:
        raise stage.StageError(f"only {len(mixes)} of {count} mixes can be had from {k} classes" + (
            f" with each in at most {max_uses}; raise --max-uses or lower --count" if capped else "; lower --count"))
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
    total, squares = (centres.sum(0) ** 2).sum(), ((centres.T @ centres) ** 2).sum()  # of all ordered pairs' cosines
    mean, square = (total - k) / (k * (k - 1)), (squares - k) / (k * (k - 1))  # without a class and itself
    spread = {"mean": 1 - mean, "std": math.sqrt(max(0, square - mean ** 2)),
              "chosen_mean": float(np.mean([d for _, d in mixes])) / max(1, math.comb(m, 2))}  # of a pair
    cost |= {"seconds": time.monotonic() - stage.began, **stage.used(device)}
    stage.write_json(out.with_suffix(".json"), {"arguments": vars(args), "count": count, "max_uses": max_uses,
                                                "distances": spread, "inputs": inputs, "cost": cost})
    stage.write_atomic(out, lambda p: p.write_bytes(content))
    told = f", {args.strategy}, mean distance of their pairs {spread['chosen_mean']:.3f}" if m > 1 else ""
    print(f"wrote {out}: {len(mixes)} mixes{told}; the distances of all pairs: mean {spread['mean']:.3f}, "
          f"std {spread['std']:.3f}")


@stage.command
def main(argv=None):
    run(parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
