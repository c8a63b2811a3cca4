"""The command line: `fastreg register`, `train`, `apply`, `convert`, `invert`, `demo`, `info`; each is a file in fastreg/commands/.

Exit status: 0; 1 where the demo misses its goals; 2 for bad input, with one line on stderr; 130 for Ctrl-C.
Outputs are complete or absent.
"""

import argparse
import difflib
import logging
import re
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from fastreg import _signals
from fastreg._refusals import Refusal
from fastreg._version import __version__
from fastreg.commands import apply, convert, demo, info, invert, register, train
from fastreg.commands.options import Parser


def _parser() -> Parser:
    parser = Parser(prog="fastreg", description="Deformable image registration.")
    parser.add_argument("--version", action="version", version=f"fastreg {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in (register, train, apply, convert, invert, demo, info):
        command.add(commands)
    for own in commands.choices.values():
        own.set_defaults(parser=own)
    return parser


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    args, unknown = _parser().parse_known_args(argv)
    if unknown:
        # The command's own parser, which knows where its help is.
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}{_meant(args.parser, unknown)}")
    return args


def _meant(parser: Parser, unknown: Sequence[str]) -> str:
    flags = [flag for action in parser._actions for flag in action.option_strings]
    close = [difflib.get_close_matches(text.split("=")[0], flags, 1) for text in unknown if text[:2] == "--"]
    return "".join(f"; did you mean {flag[0]}?" for flag in close if flag)


def _terminate(number: int, _: object) -> NoReturn:
    # As an exception, so that the unfinished output is removed.
    sys.exit(128 + number)


def _line(error: object) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {(error.strerror or 'failed').lower()}"
    return " ".join(str(error).split())


def _typed(error: Refusal, args: argparse.Namespace) -> str:
    """The message, with options in place of the parameters that they set."""
    message = _line(error.brief)
    flags = {a.dest: (a.option_strings[0], a.nargs == 0) for a in args.parser._actions if a.option_strings}
    begin = re.match(r"(?:[A-Z]\w+: )?(?:the )?(\w+)(?=( must be False| must ))", message)
    if begin is not None and begin[1] in flags and getattr(args, begin[1], None) is not None:
        flag, switch = flags[begin[1]]
        message = message[begin.end() :]
        if switch and begin[2] == " must be False":
            message = " does not go" + message.removeprefix(begin[2]).removesuffix(", got True")
        message = flag + message
    elif not error.place.startswith("fastreg::"):  # it may begin with a path
        return message
    # A parameter's name of one word may be that word; what was got may be anything.
    rule, got, value = message.partition(", got ")
    value, begun, hint = value.partition(" (")

    def named(text: str) -> str:
        return re.sub(r"\b[a-z]+_[a-z_]+\b", lambda n: flags[n[0]][0] if n[0] in flags else n[0], text)

    return named(rule) + got + value + begun + named(hint)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    # It announces its font cache on the first run, and complains about unwritable homes.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    args = None
    try:
        args = _parsed(argv)
        # SIGTERM and, but under nohup, SIGHUP end a command as Ctrl-C does.
        ours = [n for n in _signals.named("SIGTERM", "SIGHUP") if signal.getsignal(n) != signal.SIG_IGN]
        with _signals.handled(ours, _terminate):
            return args.run(args)
    except KeyboardInterrupt:
        print("fastreg: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except Refusal as error:
        message = _line(error.brief) if args is None else _typed(error, args)
    except (OSError, ImportError) as error:
        message = _line(error)
    except (ValueError, TypeError) as error:
        # An op names itself; others are bugs and keep their traceback.
        if not str(error).startswith("fastreg::"):
            raise
        message = _line(error)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        message = "not enough memory for images of this size"
    print(f"fastreg: error: {message}", file=sys.stderr)
    return 2
