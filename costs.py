"""What did every stage cost, and what would 0.2 million mixed images cost? From the ledgers of run directories.

    python costs.py runs/demo --out runs/demo/costs

Reads   cost.json and config.json of run directories, the .json beside a pairs file; or all those inside a folder.
Writes  OUT/table.md, OUT/costs.png, OUT/costs.json.

Hours, images, evaluations and FLOPs are MEASURED: the ledgers'. The share is of the best rate that this machine shows
(see matrix_rate), in the precision of the run, where device and number of threads are those of this command. The
hours of --images mixed images are ESTIMATED: the evaluations of a recipe, at a run's seconds an evaluation.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch

import stage
from report import pyplot, save_figure
from sample_scoremix import evaluations
from training import count_flops

AMOUNTS = {"images": 0, "network_evaluations": 0, "flops": 0}  # where a ledger has none: preparing draws nothing
ORDER = ["prepare_data", "train_recognizer", "train_diffusion", "mine_pairs", "sample_scoremix", "evaluate", "audit",
         "alignment", "sweep"]


def parse_args(argv=None):
    parser = stage.Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories, pairs' .json files, folders of these")
    parser.add_argument("--images", type=stage.number(int, 1), default=200_000, metavar="N",
                        help="mixed images to estimate (default: 200000, the paper's)")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the report goes, a run directory")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    return parser.parse_args(argv)


def yardsticks(device="cpu", dtype=torch.float32) -> dict:
    """Work of known size, enough to keep a device busy: name -> (function, FLOPs).

    Both are products of matrices to the hardware; on some CPUs PyTorch's libraries for the two differ by a factor.
    """
    n, batch = (8192, 64) if torch.device(device).type == "cuda" else (2048, 4)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    layer = torch.nn.Conv2d(256, 256, 3, padding=1, bias=False, device=device, dtype=dtype).requires_grad_(False)
    layer.to(memory_format=torch.channels_last)
    x = torch.randn(batch, 256, 56, 56, device=device).to(dtype, memory_format=torch.channels_last)
    return {"product": (lambda: a @ b, 2 * n ** 3), "convolution": (lambda: layer(x), count_flops(layer, x))}


def matrix_rate(device="cpu", dtype=torch.float32, repeats: int = 7) -> float:
    """FLOP/s of a device at its best: the quicker of its yardsticks, medians."""
    rates = []
    for work, flops in yardsticks(device, dtype).values():
        seconds = []
        for _ in range(repeats + 1):  # the first one warms up
            began = time.perf_counter()
            work().flatten()[0].item()  # waits for a GPU
            seconds.append(time.perf_counter() - began)
        rates.append(flops / statistics.median(seconds[1:]))
    return max(rates)


def read_runs(paths: list[str]) -> list[dict]:
    """A dict (stage, name, file, arguments, threads, cost) for each run in `paths`, in the stages' order."""
    found, files = [], []
    for path in map(Path, paths):
        if path.is_dir() and not (path / "config.json").exists():  # a folder of runs, then
            files += sorted(path.glob("*/cost.json")) + [p for p in sorted(path.glob("*.json")) if p.name[0] != "."]
        else:
            files.append(path / "cost.json" if path.is_dir() else path)
    for file in dict.fromkeys(files):
        try:
            cost = json.loads(file.read_text())
            if file.name == "cost.json":
                config, name = json.loads((file.parent / "config.json").read_text()), file.parent
                run = {"stage": config["stage"], "arguments": config["arguments"],
                       "threads": config["versions"].get("threads")}
            else:
                run, name = {"stage": "mine_pairs", "arguments": cost["arguments"], "threads": None}, file
                cost = cost["cost"]
            found.append(run | {"name": str(name), "file": str(file), "cost": dict(AMOUNTS, **cost)})
            if not cost["seconds"] > 0 or not isinstance(cost["device"], str):
                raise ValueError("seconds or device")
        except FileNotFoundError:
            raise stage.StageError(f"{file} or the config.json beside it is missing; name run directories") from None
        except (ValueError, LookupError, TypeError) as error:
            raise stage.StageError(f"{file} is no ledger of a run ({error}); leave it out") from None
    if not found:
        raise stage.StageError(f"no run directories in {' '.join(paths)}")
    return sorted(found, key=lambda r: (ORDER.index(r["stage"]) if r["stage"] in ORDER else len(ORDER), r["name"]))


def recipes(run: dict, images: int) -> list[dict]:
    """The estimated hours of ways to draw that many images, at the seconds an evaluation of a run of the sampler."""
    cost = run["cost"]
    per_evaluation = cost["seconds"] / cost["network_evaluations"]
    args, told = run["arguments"], f"{run['arguments']['solver']}, {run['arguments']['steps']} steps"
    calls, heun = evaluations(args["solver"], args["steps"]), evaluations("heun", 32)
    ways = [(f"as this run: {told}", cost["network_evaluations"] / cost["images"]), (f"ScoreMix: {told}", 2 * calls),
            ("ScoreMix: heun, 32 steps", 2 * heun), (f"AugGen: {told}", calls), ("AugGen: heun, 32 steps", heun)]
    return [{"recipe": name, "evaluations": n, "hours": n * images * per_evaluation / 3600} for name, n in ways]


def draw(path: Path, rows: list[dict], ways: list[dict], images: int) -> None:
    """A figure: the hours of every run; the hours of every way to draw the images."""
    figure, axes = pyplot().subplots(1, 2, figsize=(12, 0.35 * max(len(rows), len(ways)) + 1.6), layout="constrained")
    for axis, names, hours, title in (
            (axes[0], [f"{r['stage']}: {Path(r['run']).name}" for r in rows], [r["hours"] for r in rows], "measured"),
            (axes[1], [w["recipe"] for w in ways], [w["hours"] for w in ways], f"estimated for {images:,} images")):
        axis.barh(range(len(names)), hours)
        axis.set(yticks=range(len(names)), yticklabels=names, xlabel="hours", title=title)
        axis.invert_yaxis()
    save_figure(figure, path, 110)


def run(args) -> None:
    device = stage.pick_device(args.device)
    runs = read_runs(args.runs)
    out = stage.Run("costs", args, {"runs": [r["file"] for r in runs]})
    if (out.dir / "costs.json").exists():
        print((out.dir / "table.md").read_text("utf-8") + f"already reported: {out.dir}")
        return
    here = stage.used(device)["device"]
    precisions = {r["arguments"].get("precision", "fp32") for r in runs}
    rates = {p: matrix_rate(device, torch.bfloat16 if p == "bf16" else torch.float32) for p in sorted(precisions)}
    rows = []
    for r in runs:
        cost, precision = r["cost"], r["arguments"].get("precision", "fp32")
        rate = cost["flops"] / cost["seconds"]
        comparable = cost["device"] == here and (device.type == "cuda" or r["threads"] == torch.get_num_threads())
        rows.append({"stage": r["stage"], "run": r["name"], "device": cost["device"],
                     "hours": cost["seconds"] / 3600, "images": cost["images"],
                     "network_evaluations": cost["network_evaluations"], "flops": cost["flops"],
                     "flops_per_second": rate, "precision": precision,
                     "share_of_matrix_rate": rate / rates[precision] if comparable else None,
                     "peak_memory_bytes": cost.get("peak_memory_bytes")})
    lines = ["| stage | run | device | hours | images | evaluations | TFLOP | GFLOP/s | of the best rate | GiB |",
             "|---|---|---|---|---|---|---|---|---|---|"]
    for r in rows:
        share = "" if r["share_of_matrix_rate"] is None else f"{100 * r['share_of_matrix_rate']:.0f} %"
        memory = "" if r["peak_memory_bytes"] is None else f"{r['peak_memory_bytes'] / 2 ** 30:.1f}"
        lines.append(f"| {r['stage']} | {r['run']} | {r['device']} | {r['hours']:.4f} | {r['images']:,} | "
                     f"{r['network_evaluations']:,} | {r['flops'] / 1e12:.2f} | {r['flops_per_second'] / 1e9:.1f} | "
                     f"{share} | {memory} |")
    lines += ["", "Measured. Hours are those of one device, summed over processes. " + " ".join(
        f"{here} does {v / 1e9:.0f} GFLOP/s in {k} at best" +
        ("." if device.type == "cuda" else f" with {torch.get_num_threads()} threads.") for k, v in rates.items())]
    ways = []
    for r in (r for r in runs if r["stage"] == "sample_scoremix" and r["cost"]["images"]):
        ways += (found := recipes(r, args.images))
        lines += ["", f"{args.images:,} mixed images, ESTIMATED from the seconds an evaluation of {r['name']}:", "",
                  "| recipe | evaluations an image | hours |", "|---|---|---|"]
        lines += [f"| {w['recipe']} | {w['evaluations']:g} | {w['hours']:.3g} |" for w in found]
    stage.write_text(out.dir / "table.md", "\n".join(lines) + "\n")
    draw(out.dir / "costs.png", rows, ways, args.images)
    stage.write_json(out.dir / "costs.json", {"matrix_rate": rates, "device": here, "runs": rows, "recipes": ways})
    print(*lines, f"wrote {out.dir}/table.md and costs.json; look at {out.dir}/costs.png", sep="\n")


@stage.command
def main(argv=None):
    run(parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
