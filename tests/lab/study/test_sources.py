"""Hashes of source that change with the code and with nothing else, on every Python at hand."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import refimpl.lab.study.sources as sources
from refimpl.lab.study.sources import module_hash, source_hash

PROGRAM = '''
"""Module."""
from __future__ import annotations
import math

WIDTH: int = 3
"""What WIDTH is."""

class A(dict, metaclass=type):
    """Class."""
    def f[T](self, x: int = 1, /, *a, k: "str" = u"é\\u0378", **kw) -> float: ...

async def g(y, *, z=None):
    """Function."""
    async with y as q, z:
        pass
    return [i async for i in q if not i], {**z, "a": 1}, {1, 2}, 1e-3, 2j, b"\\xff", ..., -0.0

def h(v, n=None):
    match v:
        case {"k": [1, *rest], **other} if rest:
            return f"{v!r:>{n}} {v=} {{}}" "tail"
        case None | True:
            return lambda *a, **k: (a, k)
    try:
        return (w := v[1:, ...])
    except (ValueError, TypeError) as error:
        raise RuntimeError from error
    finally:
        del w
'''.replace("def f[T]", "def f")  # the brackets are newer than the oldest Python supported


def test_comments_docstrings_and_layout_do_not_count():
    bare = "def f(x):\n    return x + 1\nclass A:\n    y = 2\n"
    dressed = (
        '"""M."""\n\n# why\ndef f(x):\n    "D."\n    return (x\n + 1)  # c\n\n'
        'class A:\n    """C."""\n    y = 2\n    "About y."\n'
    )
    assert source_hash(bare) == source_hash(dressed)


@pytest.mark.parametrize(
    "changed",
    [
        "def f(x): return x + 2",
        "def f(y): return x + 1",
        "def f(x=None): return x + 1",
        "def f(x): return x - 1",
        "def f(x): return x + 1.0",
        "def f(x): return x + '1'",
        "async def f(x): return x + 1",
        "def f(*x): return x + 1",
    ],
)
def test_every_change_of_code_counts(changed):
    assert source_hash("def f(x): return x + 1") != source_hash(changed)


def test_strings_that_are_used_count():
    assert source_hash("x = 'a'") != source_hash("x = 'b'")
    assert source_hash("def f():\n    return 'a'") != source_hash("def f():\n    return 'b'")


def pythons():
    """This interpreter, and those of other versions that happen to be there (plain or under pyenv)."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = {f"{sys.version_info.major}.{sys.version_info.minor}": sys.executable}
    for version in (f"3.{minor}" for minor in range(10, 15)):
        for candidate in [*root.glob(f"versions/{version}.*/bin/python"), shutil.which(f"python{version}")]:
            if candidate and "shims" not in str(candidate):
                found.setdefault(version, str(candidate))
    return found


@pytest.mark.parametrize("python", [pytest.param(path, id=version) for version, path in pythons().items()])
def test_same_hash_on_every_python_with_no_package_installed(python, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    files = [program, *sorted(Path(sources.__file__).parent.glob("*.py"))]
    code = (
        "import runpy, sys, pathlib; h = runpy.run_path(sys.argv[1])['source_hash']\n"
        "for name in sys.argv[2:]: print(h(pathlib.Path(name).read_text(encoding='utf-8')))"
    )
    command = [python, "-I", "-S", "-c", code, sources.__file__, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [source_hash(path.read_text(encoding="utf-8")) for path in files]


def test_a_package_hashes_all_its_modules(tmp_path, monkeypatch):
    package = tmp_path / "somepackage"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "one.py").write_text("x = 1")
    monkeypatch.syspath_prepend(tmp_path)
    first, module = module_hash("somepackage"), module_hash("somepackage.one")
    (package / "one.py").write_text("x = 1  # same")
    assert module_hash("somepackage") == first and module_hash("somepackage.one") == module
    (package / "one.py").write_text("x = 2")
    assert module_hash("somepackage") != first and module_hash("somepackage.one") != module
    (package / "two.py").write_text("")
    assert len({first, module_hash("somepackage")}) == 2


@pytest.mark.parametrize("name", ["no_such_module_here", "math", "sys"])
def test_modules_without_source_are_refused(name):
    with pytest.raises(ModuleNotFoundError, match=name):
        module_hash(name)
