"""`python -m fastreg.train ...`, what `fastreg train ...` is: for torchrun."""

import sys

from fastreg.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
