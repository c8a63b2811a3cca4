"""setup.py build_ext --inplace after a change of one line, for the tests of a mutant alone.

Only objects of this machine's instruction set that the line can be in are compiled, with -O1: the kernels' vectors are the
source's, not the optimiser's. The others are declared current.
"""

import importlib.util
import re
import sys

import setuptools


def passes(lines, line):
    """Whether the bindings compile a line of a source, and whether its kernels do: FASTREG_ISA decides."""
    inside = []
    for text in lines[:line]:
        if found := re.match(r"#\s*(ifdef|ifndef|if|else|endif)\b(.*)", text):
            if found[1] == "endif":
                inside.pop()
            elif found[1] == "else":
                inside[-1] = inside[-1] and {"bindings": "kernels", "kernels": "bindings"}[inside[-1]]
            elif found[2].strip() == "FASTREG_ISA":
                inside.append("kernels" if found[1] == "ifdef" else "bindings")
            else:
                inside.append(None)
    only = [i for i in inside if i]
    return "kernels" not in only, "bindings" not in only


def build(isa, path, line):
    """In a copy of the tree with its objects: it is the working directory."""
    wanted = passes(path.read_text(encoding="utf-8").splitlines(), line)
    arguments, install = {}, setuptools.setup
    setuptools.setup = lambda **given: arguments.update(given)
    spec = importlib.util.spec_from_file_location("setup_of_fastreg", path.cwd() / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    compiled = setup.compiled

    def compiled_where_changed(command, done, made_with, read=""):
        of_isa = [f.removeprefix("-DFASTREG_ISA=") for f in command if f.startswith("-DFASTREG_ISA=")]
        if of_isa not in ([], [isa]) or not wanted[bool(of_isa)]:
            setup.note_key(done, made_with)
            return ""
        print("compiles", done.stem, *of_isa or ["bindings"], flush=True)
        command = ["-O1" if of_isa and f == "-O3" else f for f in command]
        return compiled(command, done, made_with, read)

    setup.compiled = compiled_where_changed
    sys.argv = ["setup.py", "--quiet", "build_ext", "--inplace"]
    install(**arguments)
    return 0
