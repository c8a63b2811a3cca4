"""What help() prints of the public functions: examples that are true, the arguments there are, types on all of them."""

import doctest
import inspect
import re

import pytest
import torch

import fastreg
from fastreg import metrics, nn

METRICS = [getattr(metrics, n) for n in metrics.__all__ if inspect.isfunction(getattr(metrics, n))]
FUNCTIONS = [getattr(fastreg, name) for name in fastreg.ops.__all__] + METRICS + [fastreg.register]
MODULES = [getattr(nn, name) for name in nn.__all__]


def name_of(item):
    return item.__qualname__


def arguments(doc):
    """Names that stand in the section Args, in order."""
    _, _, section = doc.partition("Args:\n")
    entries = re.findall(r"^    (\w[\w, ]*) \(.+?\): ", section.split("\n\n")[0], re.M)
    return [name for entry in entries for name in entry.split(", ")]


@pytest.mark.parametrize("function", [*FUNCTIONS, nn.MINDLoss], ids=name_of)
def test_example(function):
    if function in (metrics.assd, metrics.hd95):
        pytest.importorskip("SimpleITK")
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner()
    (test,) = finder.find(function, globs={"torch": torch, "fastreg": fastreg})
    assert any(example.want for example in test.examples)
    log = []
    runner.run(test, out=log.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(log)


@pytest.mark.parametrize("function", FUNCTIONS, ids=name_of)
def test_arguments_and_types(function):
    signature = inspect.signature(function)
    assert sorted(arguments(inspect.getdoc(function))) == sorted(signature.parameters)
    assert signature.return_annotation is not inspect.Signature.empty
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty, parameter
    for section in ("Args:", "Returns:", "Raises:", "Example:"):
        assert re.search(rf"^{section}$", inspect.getdoc(function), re.M), section


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_modules_show_the_arguments_of_their_op(module):
    op = inspect.signature(module.op).parameters
    options, call = inspect.signature(module), inspect.signature(module.forward)
    assert set(arguments(inspect.getdoc(module))) == set(options.parameters)
    assert set(arguments(inspect.getdoc(module.forward))) == set(module.inputs)
    assert {*options.parameters, *module.inputs} == set(op)
    assert ["self", *module.inputs] == list(call.parameters)
    assert all(parameter == op[name] for name, parameter in options.parameters.items())
    assert inspect.getdoc(module).split("\n")[0] == inspect.getdoc(module.op).split("\n")[0]
