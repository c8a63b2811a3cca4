"""setup.py build_ext --inplace after a change of one line, for the tests of a mutant alone.

Only objects of this machine's instruction set that the line can be in are compiled, with -O1: the kernels' vectors are the
source's, not the optimiser's. The others are declared current.
"""

import re
import runpy
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


def narrowed(build, isa, wanted):
    class Narrow(build):
        def build_extensions(self):
            compile_all = self.compiler.compile

            def compile_changed(sources, macros, extra_postargs, **rest):
                of_isa = dict(macros).get("FASTREG_ISA")
                if of_isa not in (None, isa) or not wanted[of_isa is not None]:
                    return None
                print("compiles", sources[0], of_isa or "bindings", flush=True)
                flags = ["-O1" if of_isa and f == "-O3" else f for f in extra_postargs]
                return compile_all(sources, macros=macros, extra_postargs=flags, **rest)

            self.compiler.compile = compile_changed
            super().build_extensions()

    return Narrow


def build(isa, path, line):
    """In a copy of the tree with its objects: it is the working directory."""
    wanted = passes(path.read_text(encoding="utf-8").splitlines(), line)
    install = setuptools.setup

    def setup(**arguments):
        commands = arguments["cmdclass"]
        mine = {**commands, "build_ext": narrowed(commands["build_ext"], isa, wanted)}
        install(**{**arguments, "cmdclass": mine})

    setuptools.setup = setup
    sys.argv = ["setup.py", "--quiet", "build_ext", "--inplace"]
    runpy.run_path("setup.py", run_name="__main__")
    return 0
