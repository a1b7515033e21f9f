"""How far do compiled bf16 images lie from those of fp32 eager? Two folders of sample_scoremix.py, image by image.

    R=runs/demo; S="python sample_scoremix.py --generator $R/generator --pairs $R/pairs.csv"
    $S --out $R/fp32 && $S --precision bf16 --compile --out $R/bf16
    python benchmarks/precision.py $R/fp32 $R/bf16

The PSNR of every pair of images that have one name, in dB (255 grey levels); an image that is the same counts 100.
"""

from pathlib import Path

import numpy as np
from common import arguments, machine, stage, write


def main(argv=None) -> None:
    parser = arguments(__doc__, device=False)
    parser.add_argument("folders", nargs=2, type=Path, help="of sample_scoremix.py, the same mixes")
    args = parser.parse_args(argv)
    sets = [{p.relative_to(d): stage.decode(p, None).astype(float) for p in d.glob("*/*.png")} for d in args.folders]
    if not sets[0] or sets[0].keys() != sets[1].keys():
        raise SystemExit(f"{args.folders[0]} and {args.folders[1]} do not hold images of the same names")
    psnr = [min(100, 10 * np.log10(255 ** 2 / max(np.mean((sets[1][k] - x) ** 2), 1e-9))) for k, x in sets[0].items()]
    write("precision", {"machine": machine(), "images": len(psnr), "psnr": {
        "median": float(np.median(psnr)), "worst": min(psnr), "best": max(psnr)}}, args.out)


if __name__ == "__main__":
    main()
