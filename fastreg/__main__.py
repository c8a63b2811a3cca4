import os
import signal
import sys


def _early(*_):
    # Imports of a second have nothing to clean up, and their traceback tells nobody anything.
    os.write(2, b"fastreg: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not ignored, as by nohup and &
    if ours:
        signal.signal(signal.SIGINT, _early)
    from fastreg.cli import main

    if ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
