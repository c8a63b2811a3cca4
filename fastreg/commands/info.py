"""`fastreg info`: versions, devices, implementations."""

import argparse
import os
import platform

import torch

from fastreg import _ext
from fastreg._console import telling
from fastreg._version import __version__

from .options import Parser


def add(commands: "argparse._SubParsersAction[Parser]") -> None:
    command = commands.add_parser(
        "info",
        help="versions, devices, which implementation each op has",
        description="Prints versions, devices, and which implementation answers for each op on each device.",
    )
    command.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    with telling():
        _tell()
    return 0


def _tell() -> None:
    build = _ext.build_info()
    print(f"fastreg     {__version__}")
    print(f"torch       {torch.__version__}")
    print(f"python      {platform.python_version()}, {platform.system()} {platform.machine()}")
    print(f"cpu         {os.cpu_count()} logical cores, {torch.get_num_threads()} threads")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"gpu         {', '.join(gpus) if gpus else 'none'}")
    print(f"extension   {_ext._state['extension']}")
    if build:
        available = build.get("isa_available")
        available = ", ".join(available) if isinstance(available, (list, tuple)) else available
        print(f"isa         {build.get('isa')} in use; available: {available}")
    table = _ext.backends()
    devices = sorted({device for row in table.values() for device in row})
    width = max((len(op) for op in table), default=2) + 2
    columns = {d: max(len(d), *(len(row.get(d, "")) for row in table.values())) + 2 for d in devices}
    print("\n" + "op".ljust(width) + "".join(d.ljust(columns[d]) for d in devices).rstrip())
    for op, row in table.items():
        print(op.ljust(width) + "".join(row.get(d, "").ljust(columns[d]) for d in devices).rstrip())
