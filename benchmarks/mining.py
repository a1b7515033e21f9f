"""How long does mining far pairs take, against the matrix product that it needs at least, and against two plain ways?

    python benchmarks/mining.py --classes 10000

mine_pairs.mine(order 2, distant) on centres in 512 dimensions, half of them isotropic, half in clusters of 50; as many
pairs as it takes by default above 64 pixels, 4/3 a class, each class in at most four. By turns with

product    the product of all centres with all, float32: the arithmetic alone (of which one half would do)
sklearn    scikit-learn's pairwise_distances, an argsort of the upper triangle, the greedy choice. It must give the very
           same pairs. (Distances are rounded to 1e-9, ties go by index, as mine has it.)
faiss      faiss's IndexFlatIP finds the --depth farthest classes of each (nearest to -c), then the greedy choice among
           those. With a cap on uses that is exact only if the lists are deep enough: classes whose partners are used
           up look further down than their list goes. The share of our pairs that it finds is in the result.

Memory is the peak of a fresh process from then on, less what it held once its inputs were made; one process a
candidate.
"""

import argparse
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
from common import arguments, machine, need, ratio, side_by_side, version, write

from mine_pairs import LARGE_COUNT, mine


def make_centres(k: int, dim: int = 512) -> np.ndarray:
    """Unit rows (K, dim), float64: one half isotropic, the other in clusters of 50."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(k, dim))
    half = k - k // 2
    z[half:] = 0.5 * z[half:] + rng.normal(size=(k // 100 + 1, dim)).repeat(50, axis=0)[:k // 2]
    return z / np.linalg.norm(z, axis=1, keepdims=True)


def greedy(pairs, count: int, most: int, k: int) -> list[tuple[int, int]]:
    """The first `count` of the pairs, in their order, that leave every class in at most `most`."""
    uses, chosen = [0] * k, []
    for a, b in pairs:
        if uses[a] < most and uses[b] < most:
            uses[a] += 1
            uses[b] += 1
            chosen.append((a, b))
            if len(chosen) == count:
                break
    return chosen


def ours(c, count, most, depth):
    return [mix for mix, _ in mine(c, count, 2, "distant", most)]


def product(c, count, most, depth):
    x = c.astype(np.float32)
    return x @ x.T


def sklearn(c, count, most, depth):
    i, j = np.triu_indices(len(c), 1)
    apart = need("sklearn.metrics").pairwise_distances(c, metric="cosine")[i, j].round(9)
    order = np.argsort(-apart, kind="stable")
    return greedy(((int(i[n]), int(j[n])) for n in order), count, most, len(c))


def faiss(c, count, most, depth):
    x = c.astype(np.float32)
    index = need("faiss").IndexFlatIP(x.shape[1])
    index.add(x)
    similarity, far = index.search(-x, depth)  # of -c: the largest product is the smallest of c
    first, last = np.sort([np.arange(len(x)).repeat(depth), far.ravel()], axis=0)
    key, rows = np.unique(first * len(x) + last, return_index=True)
    order = np.argsort(-similarity.ravel()[rows], kind="stable")
    return greedy(((int(n) // len(x), int(n) % len(x)) for n in key[order]), count, most, len(x))


CANDIDATES = {f.__name__: f for f in (ours, product, sklearn, faiss)}


def status(name: str) -> int:
    """Bytes of memory of this process: VmRSS, now, or VmHWM, the most since clear_refs was written to."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) << 10


def main(argv=None) -> None:
    parser = arguments(__doc__, repeats=3, device=False)
    parser.add_argument("--classes", type=int, default=10_000, help="how many (default: 10000)")
    parser.add_argument("--depth", type=int, default=128, help="of faiss's lists")
    parser.add_argument("--candidates", nargs="*", choices=[*CANDIDATES][1:], default=[*CANDIDATES][1:],
                        help="that take turns with ours (default: all)")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure memory as well")
    parser.add_argument("--memory-of", choices=[*CANDIDATES], help="only show the bytes that one candidate takes")
    args = parser.parse_args(argv)
    count = math.ceil(LARGE_COUNT * args.classes)
    most = math.ceil(2 * count / args.classes) + 1
    if args.memory_of:
        for module in {"sklearn": ["sklearn.metrics"], "faiss": ["faiss"]}.get(args.memory_of, []):
            need(module)
        c = make_centres(args.classes)
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
        before = status("VmRSS")
        CANDIDATES[args.memory_of](c, count, most, args.depth)
        print(status("VmHWM") - before)
        return
    names, memory = ["ours", *args.candidates], {}
    for name in names if args.memory else ():
        command = [sys.executable, __file__, "--classes", args.classes, "--depth", args.depth, "--memory-of", name]
        memory[name] = int(subprocess.run(map(str, command), check=True, stdout=subprocess.PIPE).stdout)
    c = make_centres(args.classes)
    runs = {name: (lambda f=CANDIDATES[name]: f(c, count, most, args.depth)) for name in names}
    found = {name: set(runs[name]()) for name in names if name != "product"}
    assert len(found["ours"]) == count and found.get("sklearn", found["ours"]) == found["ours"]
    seconds = side_by_side(runs, args.repeats)
    write("mining", {"machine": machine(), "versions": version("scikit-learn", *["faiss-cpu"] * ("faiss" in names)),
                     "classes": args.classes, "pairs": count, "max_uses": most, "depth": args.depth,
                     "share_of_our_pairs": {name: len(of & found["ours"]) / count for name, of in found.items()},
                     "peak_bytes": memory, "seconds": seconds,
                     "times_ours": {name: ratio(seconds, name, "ours") for name in names}}, args.out)


if __name__ == "__main__":
    main()
