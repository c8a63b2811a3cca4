"""setup.py build_ext --inplace after a change of one line, for the tests of a mutant alone.

    build.py ISA FILE LINE      in a copy of the tree with its objects

Only objects of this instruction set in which the line is not left out by the preprocessor are compiled, with -O1: the
kernels' vectors are the source's, not the optimiser's. The others are declared current.
"""

import runpy
import sys
import tempfile
from pathlib import Path

import setuptools

isa, changed, line = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
install = setuptools.setup


def holds_the_line(compiler, source, options):
    mutant = changed.read_text(encoding="utf-8")
    lines = mutant.splitlines(keepends=True)
    changed.write_text("".join([*lines[:line], "#pragma mutant\n", *lines[line:]]), encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "preprocessed.ii"
        compiler.preprocess(source, str(out), **options)
        found = "#pragma mutant" in out.read_text(encoding="utf-8")
    changed.write_text(mutant, encoding="utf-8")
    return found


def narrowed(build):
    class Narrow(build):
        def build_extensions(self):
            compile_all = self.compiler.compile

            def compile_changed(sources, output_dir, macros, include_dirs, extra_postargs, **rest):
                if dict(macros).get("FASTREG_ISA") not in (None, isa):
                    return None
                options = {"macros": macros, "include_dirs": include_dirs}
                flags = [f for f in extra_postargs if f not in ("-MMD", "-O3")]
                if not holds_the_line(self.compiler, sources[0], {**options, "extra_postargs": flags}):
                    return None
                print("compiles", sources[0], dict(macros).get("FASTREG_ISA", "bindings"))
                flags = [*flags, "-MMD", "-O1"]
                return compile_all(sources, output_dir, extra_postargs=flags, **options, **rest)

            self.compiler.compile = compile_changed
            super().build_extensions()

    return Narrow


def setup(**arguments):
    commands = arguments["cmdclass"]
    install(**{**arguments, "cmdclass": {**commands, "build_ext": narrowed(commands["build_ext"])}})


setuptools.setup = setup
sys.argv = ["setup.py", "--quiet", "build_ext", "--inplace"]
runpy.run_path("setup.py", run_name="__main__")
