"""Hashes of source code that ignore what does not run: comments, layout, docstrings, the arguments of `raise`.

A record rests on the functions that ran while it was made. `Sources.digest` gives each function a hash of its own, which
covers its body and whatever that body reads at module level (constants, tables, fields of classes), wherever that is
defined. A better docstring or error message therefore changes no hash, and neither does moving a function to another
file. Standard library only, and the same hash on every supported Python (`ast.dump` and `ast.unparse` differ between them).
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

#: Fields of syntax trees that follow from the rest, or mean nothing at run time.
_IGNORED = {"ctx", "kind", "type_comment", "type_ignores"}
_LENGTH = 16  # hexadecimal digits kept of a function's hash: records hold hundreds of them


def source_hash(source: str) -> str:
    """SHA-256 (hex) of the parts of a module's source that run.

    Example:
        >>> source_hash("x = 1  # one") == source_hash('"The number."\\nx = (1)')
        True
    """
    return hashlib.sha256(_canonical(ast.parse(source)).encode()).hexdigest()


def _canonical(node: object, imports: bool = True) -> str:
    """A text that is equal for two syntax trees that do the same, but for the words of an error.

    Args:
        node: a tree, a list of trees, or a value in one.
        imports: whether import statements count; if not, where a name comes from is for the caller to find out.
    """
    if isinstance(node, list):
        counted = [item for item in node if not is_docstring(item) and (imports or not _is_import(item))]
        return "[" + ",".join(_canonical(item, imports) for item in counted) + "]"
    if not isinstance(node, ast.AST):
        return ascii(node)  # not repr: which characters print depends on the Unicode tables of the Python
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
        return f"Raise({_canonical(node.exc.func, imports)})"
    # Fields without a value are left out: newer Pythons have more of them (type_params since 3.12).
    fields = [
        f"{name}={_canonical(value, imports)}"
        for name, value in sorted(ast.iter_fields(node))
        if name not in _IGNORED and value is not None and value != []
    ]
    if isinstance(node, ast.JoinedStr):  # Python 3.12.0-3.12.3 ends some f-strings with an empty constant
        fields = [f"values={_canonical([p for p in node.values if getattr(p, 'value', None) != ''], imports)}"]
    return f"{type(node).__name__}({','.join(fields)})"


def _is_import(node: object) -> bool:
    return isinstance(node, (ast.Import, ast.ImportFrom))


def is_docstring(node: object) -> bool:
    """Whether a statement is only a string: the docstring of a module, class, function or attribute.

    Example:
        >>> is_docstring(ast.parse('"A module."').body[0])
        True
    """
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def module_hash(name: str) -> str:
    """`source_hash` of an importable module, or of all modules below a package.

    Raises:
        ModuleNotFoundError: no such module, or it has no Python source.

    Example:
        >>> len(module_hash("refimpl.lab.study.sources"))
        64
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise ModuleNotFoundError(f"no Python source found for module {name!r}", name=name)
    if not spec.submodule_search_locations:
        return source_hash(Path(spec.origin).read_text(encoding="utf-8"))
    root = Path(spec.origin).parent
    files = sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix())
    lines = [f"{path.relative_to(root).as_posix()} {source_hash(path.read_text(encoding='utf-8'))}" for path in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


# -- one hash for each function --


@dataclass
class _Module:
    """The top level of one file.

    Attributes:
        defined: statements that bind each name: one function or class, or the assignments of a constant.
        imported: name -> (module, name in it or None for the module itself).
    """

    defined: dict[str, list[ast.stmt]] = field(default_factory=dict)
    imported: dict[str, tuple[str, str | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """The meaning of a name: a definition of the package, a module of it, or something of another library."""

    module: str
    name: str | None


class Sources:
    """The functions of the package, in a working tree or at a commit.

    Args:
        read: text of a file from its path relative to the folder that holds the package, or None if there is none.
        modules: names of all modules, among which a function that moved is looked for.

    Example:
        >>> now = Sources.of_tree()
        >>> len(now.digest("refimpl.lab.study.sources", "source_hash"))
        16
    """

    def __init__(self, read: Callable[[str], str | None], modules: Iterable[str] = ()) -> None:
        self._read = functools.cache(read)
        self.modules = list(modules)
        self._modules: dict[str, _Module | None] = {}
        self._digests: dict[tuple[str, str, bool], str] = {}

    @classmethod
    def of_tree(cls, root: Path | None = None) -> Sources:
        """Those of a folder that holds the package; default: of the package that runs."""
        folder = root or Path(__file__).resolve().parents[3]

        def read(path: str) -> str | None:
            file = folder / path
            return file.read_text(encoding="utf-8") if file.is_file() else None

        files = sorted((folder / "refimpl").rglob("*.py"))
        return cls(read, (".".join(file.relative_to(folder).with_suffix("").parts) for file in files))

    @classmethod
    def at_commit(cls, folder: Path, commit: str) -> Sources:
        """Those of a commit, as they were in a folder of a checkout."""

        def read(path: str) -> str | None:
            command = ["git", "-C", str(folder), "show", f"{commit}:./{path}"]
            done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
            return done.stdout if done.returncode == 0 else None

        return cls(read)

    def path(self, module: str) -> str | None:
        """File of a module, relative; None if there is none."""
        stem = module.replace(".", "/")
        return next((path for path in (f"{stem}.py", f"{stem}/__init__.py") if self._read(path) is not None), None)

    def has(self, module: str, name: str) -> bool:
        """Whether a module defines a function, method ("Class.method") or constant."""
        return self._find(module, name) is not None

    def locate(self, module: str, name: str, digest: str) -> str | None:
        """The module that holds a function with this hash: the one it was in, else one it was moved to; None if none."""
        for where in (module, *self.modules):
            if self.has(where, name) and self.digest(where, name) == digest:
                return where
        return None

    def functions(self, module: str) -> Iterator[str]:
        """Names of a module's functions and methods."""
        for name, (statement, *_) in self._load(module).defined.items() if self.path(module) else ():
            if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield name
            elif isinstance(statement, ast.ClassDef):
                yield from (f"{name}.{method.name}" for method in _methods(statement))

    def function_at(self, module: str, line: int) -> str | None:
        """The function or method whose source holds a line; None outside of any."""
        if self.path(module) is None:
            return None
        for name, statements in self._load(module).defined.items():
            for statement in statements:
                if not _holds(statement, line):
                    continue
                if isinstance(statement, ast.ClassDef):
                    return next((f"{name}.{m.name}" for m in _methods(statement) if _holds(m, line)), None)
                if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    return name
        return None

    def digest(self, module: str, name: str, *, deep: bool = False) -> str:
        """Hash of a function, a method or a constant, and of the constants and class fields it reads.

        Args:
            module: dotted name.
            name: "function", "Class.method" or "CONSTANT".
            deep: also of the functions it names, and of those that they name.

        Raises:
            KeyError: there is no such definition.
        """
        key = (module, name, deep)
        if key not in self._digests:
            parts: list[str] = []
            self._collect(module, name, deep, parts, set())
            self._digests[key] = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:_LENGTH]
        return self._digests[key]

    def _collect(self, module: str, name: str, deep: bool, parts: list[str], seen: set[tuple[str, str]]) -> None:
        if (module, name) in seen:
            return
        seen.add((module, name))
        statements = self._find(module, name)
        if statements is None:
            raise KeyError(f"{module} defines no {name}")
        own = [
            _skeleton(statement, deep) if isinstance(statement, ast.ClassDef) else statement for statement in statements
        ]
        parts.append(_canonical(own, imports=False))
        for target in self._named(module, own):
            inside = self.path(target.module) is not None
            found = self._find(target.module, target.name) if inside and target.name is not None else None
            if found is None:  # another library's, or a module as such
                parts.append(f"from {target.module if not inside else ''} {target.name}")
            elif deep or not isinstance(found[0], (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert target.name is not None
                self._collect(target.module, target.name, deep, parts, seen)
            else:  # it is traced when it runs; that it is this one, and no namesake, counts here
                parts.append(f"calls {target.module.rpartition('.')[2]}.{target.name}")

    def _named(self, module: str, nodes: list[ast.stmt]) -> list[Target]:
        """The module-level names that some statements read, resolved to where they are defined, in a fixed order."""
        targets = set()
        top = self._load(module)
        inner = _Module()  # what functions import themselves
        package = module if (self.path(module) or "").endswith("__init__.py") else module.rpartition(".")[0]
        _top_level((node for node in _running(nodes) if isinstance(node, (ast.Import, ast.ImportFrom))), inner, package)
        known = {*top.defined, *top.imported, *inner.imported}
        for node in _running(nodes):
            if isinstance(node, ast.Name) and node.id in known:
                targets.add(self._resolve(module, node.id, inner))
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in known:
                base = self._resolve(module, node.value.id, inner)
                if base.name is None:
                    targets.add(self._resolve(base.module, node.attr))
        return sorted(targets, key=lambda t: (t.name or "", t.module.rpartition(".")[2], t.module))

    def _resolve(self, module: str, name: str, inner: _Module | None = None) -> Target:
        """Follow imports (first those of `inner`), also re-exports, to a definition."""
        if inner is not None and name in inner.imported:
            source, attribute = inner.imported[name]
            return Target(source, None) if attribute is None else self._resolve(source, attribute)
        for _ in range(10):
            if self.path(module) is None:
                return Target(module, name)
            top = self._load(module)
            if name in top.defined:
                return Target(module, name)
            if name not in top.imported:
                return Target(f"{module}.{name}", None) if self.path(f"{module}.{name}") else Target(module, name)
            source, attribute = top.imported[name]
            if attribute is None:
                return Target(source, None)
            if self.path(f"{source}.{attribute}") is not None:
                return Target(f"{source}.{attribute}", None)
            module, name = source, attribute
        return Target(module, name)

    def _find(self, module: str, name: str) -> list[ast.stmt] | None:
        if self.path(module) is None:
            return None
        outer, _, method = name.partition(".")
        statements = self._load(module).defined.get(outer)
        if statements is None or not method:
            return statements
        found: list[ast.stmt] = [
            m for s in statements if isinstance(s, ast.ClassDef) for m in _methods(s) if m.name == method
        ]
        return found or None

    def _load(self, module: str) -> _Module:
        if module not in self._modules:
            path = self.path(module)
            assert path is not None, module
            text = self._read(path)
            assert text is not None
            loaded, package = _Module(), module if path.endswith("__init__.py") else module.rpartition(".")[0]
            _top_level(ast.parse(text).body, loaded, package)
            self._modules[module] = loaded
        found = self._modules[module]
        assert found is not None
        return found


def _top_level(body: Iterable[ast.AST], into: _Module, package: str) -> None:
    for statement in body:
        if isinstance(statement, ast.Import):
            for alias in statement.names:
                into.imported[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0],
                    None,
                )
        elif isinstance(statement, ast.ImportFrom):
            parents = package.split(".")
            base = ".".join(parents[: len(parents) - statement.level + 1]) + "." if statement.level else ""
            source = (base + (statement.module or "")).rstrip(".")
            into.imported.update({alias.asname or alias.name: (source, alias.name) for alias in statement.names})
        elif isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            into.defined[statement.name] = [statement]
        else:
            for node in ast.walk(statement):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    into.defined.setdefault(node.id, []).append(statement)  # type: ignore[arg-type]
            for nested in ("body", "orelse", "finalbody", "handlers"):
                inner = getattr(statement, nested, None) or []
                _top_level(
                    [s for s in inner if isinstance(s, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef))],
                    into,
                    package,
                )


def _methods(node: ast.ClassDef) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for statement in node.body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield statement


def _skeleton(node: ast.ClassDef, whole: bool) -> ast.ClassDef:
    """A class without its methods, which are traced when they run: its bases, decorators and fields."""
    if whole:
        return node
    kept = [s for s in node.body if not isinstance(s, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return ast.ClassDef(
        name=node.name, bases=node.bases, keywords=node.keywords, body=kept, decorator_list=node.decorator_list
    )


def _running(nodes: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """All nodes below some, but for annotations and the arguments of `raise`."""
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        yield node
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns") or (isinstance(node, ast.Raise) and name == "exc"):
                continue
            waiting += [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, ast.AST)]


def _holds(node: ast.stmt, line: int) -> bool:
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    return first <= line <= (node.end_lineno or node.lineno)
