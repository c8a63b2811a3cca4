"""R2N2 at the paper's size beside the B-spline registration that it compares with: seconds of a pair, numbers of its transform.

    FASTREG_DATA=... python -m bench.experiments.r2n2_speed

The claims under test: 15 times as fast (0.3 against 4.5 s, GTX 1080), with 7.6 % of the numbers.

A pair of bench.experiments.r2n2, resized to the paper's 256 x 256, of the first tested person. Both take turns; seconds are the median
of the rounds, CPU time over threads (GPU: wall clock). R2N2: the "paper" preset, T = 25. Its weights are those it starts with:
they change nothing in its time. B-spline: three levels of 250 iterations, each of a warp, MSE, TV and their gradients, all by this package's
kernels; the paper's, AirLab, composes them of PyTorch's ops.
"""

import statistics
import sys

import torch
import torch.nn.functional as F

from bench.common import quantile
from bench.experiments import common, r2n2
from fastreg import models

METHODS = {"bspline": "B-spline", "r2n2": "R2N2, T = 25"}
PAPER = {
    "bspline": {"paper_seconds": 4.5, "paper_numbers": 2303},
    "r2n2": {"paper_seconds": 0.3, "paper_numbers": 175, "paper_faster": 15, "paper_share": 7.6},
}


def pair(data, size):
    """Fixed and moving image (1, 1, *size)."""
    person, spacing = r2n2.TESTED[0], float(data["spacing"][1])
    image, lung = data[f"img_{person}"].astype("float32"), data[f"lung_{person}"] > 0
    s = int(lung.sum((1, 2)).argmax())
    first = r2n2.series(person, image[s], lung[s], spacing, (0, int(person), s, 0))[0]
    return [F.interpolate(t, size=size, mode="bilinear") for t in (first.fixed, first.moving)]


def experiment(argv):
    p = common.Parser(__doc__, {"small": 0}, METHODS)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--size", type=int, nargs=2, default=models.R2N2.paper_input.size)
    args = p.parse_args(argv)
    images = [t.to(args.device) for t in pair(common.scans("lungmr_proton"), tuple(args.size))]
    torch.manual_seed(0)
    net = models.R2N2().to(args.device).eval()

    @torch.no_grad()
    def predict(fixed, moving):
        u = net(fixed, moving).displacement
        return u, 7 * net.steps

    run = {"bspline": r2n2.bspline, "r2n2": predict}
    times, numbers = {m: [] for m in METHODS}, {}
    predict(*images)
    for _ in range(args.rounds):
        for method in METHODS:
            begin = common.clock(args.device)
            _, numbers[method] = run[method](*images)
            times[method].append(common.clock(args.device) - begin)
    seconds = {m: statistics.median(t) for m, t in times.items()}
    rows = [
        {
            "method": m,
            "label": label,
            "size": "x".join(map(str, args.size)),
            "rounds": args.rounds,
            "seconds": seconds[m],
            "p20": quantile(times[m], 0.2),
            "p80": quantile(times[m], 0.8),
            "numbers": numbers[m],
            "faster": seconds["bspline"] / seconds[m],
            "share": 100 * numbers[m] / numbers["bspline"],
            **PAPER[m],
        }
        for m, label in METHODS.items()
    ]
    for row in rows:
        print(f"{row['label']:12} {row['seconds']:.2f} s, {row['numbers']} numbers")
    common.store(args, "r2n2_speed", rows)


def main(argv=None):
    return common.run(experiment, argv)


if __name__ == "__main__":
    sys.exit(main())
