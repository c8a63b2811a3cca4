"""setup.py build_ext --inplace after a change of one file, for the tests of a mutant alone.

    build.py ISA FILE ORIGINAL      in a copy of the tree with its objects; ORIGINAL is what FILE was before

Only objects of this instruction set whose preprocessed text differs are compiled, with -O1: the kernels' vectors are the
source's, not the optimiser's. The others are declared current.
"""

import runpy
import shutil
import sys
import tempfile
from pathlib import Path

import setuptools

isa, changed, original = sys.argv[1:]
install = setuptools.setup


def preprocessed(compiler, source, options):
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "preprocessed.ii"
        compiler.preprocess(source, str(out), **options)
        return out.read_bytes()


def narrowed(build):
    class Narrow(build):
        def build_extensions(self):
            compile_all = self.compiler.compile

            def compile_changed(sources, output_dir, macros, include_dirs, extra_postargs, **rest):
                if dict(macros).get("FASTREG_ISA") not in (None, isa):
                    return None
                options = {"macros": macros, "include_dirs": include_dirs}
                flags = [f for f in extra_postargs if f not in ("-MMD", "-O3")]
                mutant = Path(changed).read_text(encoding="utf-8")
                now = preprocessed(self.compiler, sources[0], {**options, "extra_postargs": flags})
                shutil.copy(original, changed)
                before = preprocessed(self.compiler, sources[0], {**options, "extra_postargs": flags})
                Path(changed).write_text(mutant, encoding="utf-8")
                if now == before:
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
