"""The commands of `fastreg`, a file each: `add(commands)` makes its parser, whose `run` does the work."""
