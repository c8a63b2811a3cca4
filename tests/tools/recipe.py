"""What the recipes share: their command line, and running programs."""

import subprocess
import sys
from pathlib import Path


def run(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return done.stdout


def main(make, use=None):
    """make(scene, out), use(scene, out, files): pathlib.Path each."""
    what, scene, out, *files = sys.argv[1:]
    scene, out = Path(scene), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if what == "make":
        make(scene, out)
    else:
        use(scene, out, [Path(f) for f in files])
