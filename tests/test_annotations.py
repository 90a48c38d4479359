"Annotations name what exists, and nothing is defined over itself"

import ast
import importlib
import inspect
import pkgutil
import typing

import pytest

import llmpapers
from common import root

pytest.importorskip("torch")
MODULES = sorted(
    m.name for m in pkgutil.walk_packages(llmpapers.__path__, "llmpapers.") if not m.ispkg
)


def only_for_checkers(syntax):
    "What a module imports under TYPE_CHECKING, for annotations in quotes"
    found = {}
    for s in syntax.body:
        if isinstance(s, ast.If) and ast.unparse(s.test) == "TYPE_CHECKING":
            for i in s.body:
                for a in i.names:
                    made = importlib.import_module(getattr(i, "module", None) or a.name)
                    found[a.asname or a.name] = getattr(made, a.name, made)
    return found


class Importable(dict):
    "Names of a module; else any package that can be imported under that name"

    def __missing__(self, name):
        if hasattr(__builtins__, name) or name in dir(__builtins__):
            raise KeyError(name)
        try:
            return importlib.import_module(name)
        except ImportError:
            raise KeyError(name) from None


def functions_of(module):
    "Public functions, classes and methods that a module defines"
    for name, f in vars(module).items():
        if getattr(f, "__module__", None) != module.__name__ or name.startswith("_"):
            continue
        if inspect.isfunction(f):
            yield name, f
        elif inspect.isclass(f):
            yield name, type(name, (), dict(__annotations__=vars(f).get("__annotations__", {})))
            for part, m in vars(f).items():
                m = getattr(m, "__func__", getattr(m, "fget", None) or m)
                if inspect.isfunction(m) and not part.startswith("_"):
                    yield f"{name}.{part}", m


def unresolved(module, syntax):
    names = Importable(vars(module) | only_for_checkers(syntax))
    for name, f in functions_of(module):
        try:
            typing.get_type_hints(f, {"__builtins__": __builtins__}, names)
        except Exception as e:
            yield f"{name}: {type(e).__name__}: {e}"


def syntax_of(module):
    return ast.parse(inspect.getsource(module))


@pytest.mark.parametrize("name", MODULES)
def test_annotations_resolve(name):
    importlib.import_module("matplotlib.axes")
    module = importlib.import_module(name)
    faults = list(unresolved(module, syntax_of(module)))
    assert not faults, "\n".join(faults)


def owner_of(f):
    "The class that `@patch` puts a function into, or nothing"
    decorators = " ".join(map(ast.unparse, f.decorator_list))
    if "patch" not in decorators or not f.args.args or f.args.args[0].annotation is None:
        return ""
    return ast.unparse(f.args.args[0].annotation).strip("'\"")


def is_again(f):
    "A setter or an overload is meant to have a name that is there"
    text = " ".join(map(ast.unparse, f.decorator_list))
    return any(word in text for word in (".setter", ".deleter", "overload", ".register"))


def defined_twice(syntax):
    seen = set()
    for node in syntax.body:
        if isinstance(node, ast.ClassDef):
            keys = [("", node.name)]
            keys += [
                (node.name, m.name)
                for m in node.body
                if isinstance(m, ast.FunctionDef) and not is_again(m)
            ]
        elif isinstance(node, ast.FunctionDef) and not is_again(node):
            keys = [(owner_of(node), node.name)]
        else:
            continue
        for key in keys:
            if key in seen:
                yield ".".join(filter(None, key))
            seen.add(key)


@pytest.mark.parametrize("path", sorted((root / "llmpapers").rglob("*.py")), ids=lambda p: p.stem)
def test_nothing_is_defined_twice(path):
    assert not list(defined_twice(ast.parse(path.read_text(encoding="utf-8")))), path.name


def test_the_checks_see(tmp_path):
    source = (
        "from fastcore.basics import patch\nclass A:\n def f(self): pass\n def f(self): pass\n"
        "@patch\ndef g(self: A): pass\n@patch\ndef g(self: A): pass\ndef h(x: 'Nowhere'): pass\n"
        "def k(x: 'torch.device') -> 'list[int]': pass\n"
    )
    assert list(defined_twice(ast.parse(source))) == ["A.f", "A.g"]
    (tmp_path / "sample_of_names.py").write_text(source)
    spec = importlib.util.spec_from_file_location(
        "sample_of_names", tmp_path / "sample_of_names.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (fault,) = unresolved(module, ast.parse(source))
    assert fault.startswith("h: NameError") and "Nowhere" in fault
