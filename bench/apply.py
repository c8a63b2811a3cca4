"""`fastreg apply --field` against a script of SimpleITK that does the same: time and memory, on a CPU.

step: an int16 volume through a field, both in memory, io.resample and SimpleITK's Resample with a
DisplacementFieldTransform. process: a whole run, in a process of its own: both read the volume and the field (NIfTI), resample
and write. Rounds alternate, ratios are medians over rounds; both on the same number of threads. What they make may differ by the
rounding of whole numbers (SimpleITK cuts). Rows go to bench/results/apply.csv.

    python bench/apply.py --size 512
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import SimpleITK
import torch

from bench import common
from fastreg import io

FIELDS = [
    "date", "commit", "device_name", "threads", "isa", "fastreg", "simpleitk", "torch", "what", "files", "shape", "rounds",
    "provider", "p20_s", "p50_s", "p80_s", "ratio", "peak_mb",
]  # fmt: skip
SCRIPT = """
import sys
import SimpleITK as sitk
moving, field, out, threads = sys.argv[1:]
sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(int(threads))
field = sitk.ReadImage(field, sitk.sitkVectorFloat64)
grid = field.GetSize(), field.GetOrigin(), field.GetSpacing(), field.GetDirection()
transform = sitk.DisplacementFieldTransform(field)
moving = sitk.ReadImage(moving)
size, origin, spacing, direction = grid
moved = sitk.Resample(moving, size, transform, sitk.sitkLinear, origin, spacing, direction, -1000.0)
sitk.WriteImage(moved, out, useCompression=True)
"""
OURS = """
import sys
from fastreg.cli import main
moving, field, out, threads = sys.argv[1:]
assert main(["apply", "--field", field, moving, "-o", out, "--force", "--quiet", "--threads", threads]) == 0
"""
# What getrusage says of a process includes what its parent held when it forked.
PEAK = """
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def inputs(n):
    """A volume as of CT, a smooth field of a few voxels, a grid."""
    shape = (1, 1, n, n, n)
    image = common.image(shape, 0, "cpu", torch.float32).mul_(2000).sub_(1000).to(torch.int16)
    return image, common.displacement(shape, 1, "cpu", torch.float32), io.Geometry.of((n,) * 3, (1.0,) * 3)


def step(n, rounds, threads):
    """provider -> seconds of each round."""
    image, u, grid = inputs(n)
    vectors = u[0].flip(0).movedim(0, -1).numpy().astype(np.float64)
    transform = SimpleITK.DisplacementFieldTransform(SimpleITK.GetImageFromArray(vectors, isVector=True))
    del vectors
    itk = SimpleITK.GetImageFromArray(image[0, 0].numpy())
    torch.set_num_threads(threads)
    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
    calls = {
        "fastreg": lambda: io.resample(image, grid, grid, u, outside=-1000.0)[0][0, 0].numpy(),
        "simpleitk": lambda: SimpleITK.Resample(itk, itk, transform, SimpleITK.sitkLinear, -1000.0),
    }
    ours, theirs = calls["fastreg"](), SimpleITK.GetArrayFromImage(calls["simpleitk"]())
    apart = max(
        int(np.abs(np.subtract(a, b, dtype=np.int32)).max()) for a, b in zip(ours, theirs, strict=True)
    )
    if apart > 1:
        raise SystemExit(f"the results differ by {apart}: no row is stored")
    times = {name: [] for name in calls}
    for r in range(rounds):
        for name in sorted(calls, reverse=r % 2 == 1):
            begin = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - begin)
    return times


def run(code, arguments, threads):
    """(seconds, peak MB) of a Python process."""
    begin = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-c", code + PEAK, *map(str, arguments)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit("a process failed")
    return time.perf_counter() - begin, int(done.stdout.split()[-2]) / 1024


def process(n, rounds, threads, suffix):
    """provider -> seconds of each round, peak MB."""
    image, u, grid = inputs(n)
    with tempfile.TemporaryDirectory() as folder:
        moving, field = (str(Path(folder, f"{name}{suffix}")) for name in ("moving", "field"))
        io.write_image(moving, image[0, 0].numpy(), grid)
        io.write_displacement(field, u, grid)
        del image, u
        commands = {
            "fastreg": (OURS, [moving, field, f"{folder}/out", threads]),
            "simpleitk": (SCRIPT, [moving, field, f"{folder}/moved.nii.gz", threads]),
        }
        times, peaks = {name: [] for name in commands}, dict.fromkeys(commands, 0.0)
        for r in range(rounds):
            for name in sorted(commands, reverse=r % 2 == 1):
                seconds, peak = run(*commands[name], threads)
                times[name].append(seconds)
                peaks[name] = max(peaks[name], peak)
    return times, peaks


def rows(what, files, n, threads, times, peaks):
    about = common.environment("cpu")
    ours = times["fastreg"]
    for name, seconds in times.items():
        yield {
            **{key: about.get(key, "") for key in FIELDS},
            "fastreg": common.version("fastreg"),
            "simpleitk": SimpleITK.Version.VersionString(),
            "threads": threads,
            "what": what,
            "files": files,
            "shape": "x".join([str(n)] * 3),
            "rounds": len(seconds),
            "provider": name,
            **{f"p{q}_s": round(common.quantile(seconds, q / 100), 4) for q in (20, 50, 80)},
            "ratio": round(statistics.median(t / o for t, o in zip(seconds, ours, strict=True)), 3),
            "peak_mb": round(peaks[name]) if peaks else "",
        }


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=192, help="voxels along each axis")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--suffix", default=".nii.gz", help="of the volume and the field, .nii.gz or .nii")
    parser.add_argument("--only", choices=("step", "process"))
    parser.add_argument("--results", type=Path, default=common.RESULTS, help="folder of the stored rows")
    args = parser.parse_args(argv)
    found = []
    if args.only != "process":
        times = step(args.size, args.rounds, args.threads)
        found += rows("step", "", args.size, args.threads, times, {})
    if args.only != "step":
        times, peaks = process(args.size, args.rounds, args.threads, args.suffix)
        found += rows("process", args.suffix, args.size, args.threads, times, peaks)
    for row in found:
        print(
            *(f"{key} {row[key]}" for key in ("what", "provider", "shape", "p50_s", "ratio", "peak_mb")),
            sep="  ",
        )
    common.append_rows(args.results / "apply.csv", found, FIELDS)


if __name__ == "__main__":
    main()
