"""What each preset of `fastreg register` takes and gives, on real scans: the table in docs/settings.md.

    FASTREG_DATA=... python -m bench.presets [--pair NAME] [--no-store]

As bench.settings, whose pairs of one kind these are. Rows go to bench/results/presets.csv.
"""

import argparse
import sys

import torch

import fastreg
from bench import common, real, settings
from bench.experiments.common import Unusable
from bench.markdown import grouped, measured

STORE = "presets.csv"
OF = ("defaults", "preset fast")
PAIRS = [name for name in settings.PAIRS if settings.kind(name) in settings.ALIKE]


def sections(results):
    """The section of docs/results/presets.md."""
    rows = common.newest(common.read_rows(results / STORE), settings.KEY)
    if not rows:
        return {}
    found = {(r["pair"], r["setting"]): r for r in rows}
    text = "CPU time: median over the pairs of the ratio to the defaults."
    about = [text, *(measured(group) for group in grouped(rows, "device_name", "threads").values())]
    return {"": "\n\n".join([settings.section(found, OF, settings.ALIKE), *about])}


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m bench.presets", description=__doc__.splitlines()[0])
    parser.add_argument("--pair", action="append", choices=PAIRS, metavar="NAME", help="may be repeated")
    parser.add_argument("--threads", type=int, default=real.THREADS)
    parser.add_argument("--no-store", action="store_true", help="leave bench/results alone")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    small = torch.rand(1, 1, 16, 16, 16)
    fastreg.register(small, small)  # what torch loads at its first use is no preset's time
    try:
        for name in args.pair or PAIRS:
            scan = settings.PAIRS[name]()
            for preset in OF:
                row = settings.run(name, scan, preset)
                print(
                    "{pair:16} {options:16} {score} {before} -> {after}, {cpu_seconds} CPU s".format(**row),
                    flush=True,
                )
                if not args.no_store:
                    common.append_rows(common.RESULTS / STORE, [row], settings.FIELDS)
    except Unusable as error:
        print(f"bench.presets: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
