"""Registers, spills and load widths of every kernel, read from machine code; no GPU is needed.

Each launch that a kernel file names in `variants` is compiled as the JIT would compile it for a GPU that is not here
(NVIDIA sm_75, sm_80 and sm_90; AMD gfx942), and the machine code is read: registers, spills, shared memory, how wide
each tensor is loaded, tensor-core instructions, instructions in the main loop. A spill, or a load of the weights
narrower than it could be, shows here long before a measured time on a GPU is surprising.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

import refimpl.kernels
from refimpl import markdown
from refimpl.kernels.launch import Launch

NVIDIA = {"sm_75": 75, "sm_80": 80, "sm_90": 90}
AMD = ("gfx942",)


@dataclass(frozen=True)
class Row:
    """One launch compiled for one GPU.

    Attributes:
        kernel, variant, target: "sparse_matvec", "bf16 4096->4096", "sm_90".
        registers: 32-bit registers of a thread.
        spills: bytes a thread keeps in memory for want of registers (AMD: registers spilled).
        shared: bytes of shared memory of a program, as Triton allocates it.
        warps: of a program.
        loads: width in bits of the global loads of each tensor, with how many there are in the code, as
            ``{"planes": {128: 4}}``. On AMD tensors are not distinguished ("all").
        main: the weights: the largest argument but activations, result and scratch space.
        tensor_core: tensor-core instructions in the code (HMMA, HGMMA, IMMA, MFMA).
        instructions: in the whole kernel.
        per_load: instructions of the main loop for each 128-bit load in it; None if no loop has one. While a warp loads
            512 bytes it has to issue so many instructions.
    """

    kernel: str
    variant: str
    target: str
    registers: int
    spills: int
    shared: int
    warps: int
    loads: dict[str, dict[int, int]]
    main: str
    tensor_core: int
    instructions: int
    per_load: float | None = None

    @property
    def main_width(self) -> int | None:
        """Bits of the narrowest load of `main`; None where loads are not distinguished."""
        return min(self.loads[self.main]) if self.main in self.loads else None


# --- what there is -----------------------------------------------------------------------------------------------


def all_kernels() -> list[str]:
    """Names of the kernel files: the modules of refimpl.kernels that list `variants`.

    Example:
        >>> "sparse_matvec" in all_kernels()
        True
    """
    names = [info.name for info in pkgutil.iter_modules(refimpl.kernels.__path__)]
    return [name for name in names if hasattr(importlib.import_module(f"refimpl.kernels.{name}"), "variants")]


def launches(kernel: str) -> dict[str, Launch]:
    """The launches of a kernel file, by name.

    Raises:
        RuntimeError: no such kernel; the message lists them.

    Example:
        >>> "bf16 4096->4096" in launches("sparse_matvec")
        True
    """
    if kernel not in all_kernels():
        raise RuntimeError(f"kernel {kernel!r}: there is none of this name; choose among {', '.join(all_kernels())}")
    found: dict[str, Launch] = importlib.import_module(f"refimpl.kernels.{kernel}").variants()
    return found


def fingerprint(kernel: str) -> str:
    """SHA-256 of what the machine code of a kernel file depends on, and nothing else.

    That is the source of its ``@jit`` functions and of those in the kernel files it imports, without comments and
    docstrings, and the launches it lists: types and shapes of arguments, constants, warps, stages.

    Example:
        >>> len(fingerprint("sparse_matvec"))
        64
    """
    functions: dict[str, list[str]] = {}
    _collect(kernel, functions)
    described = [[name, *_described(launch)] for name, launch in launches(kernel).items()]
    return hashlib.sha256(json.dumps([sorted(functions.items()), described]).encode()).hexdigest()


def _collect(kernel: str, functions: dict[str, list[str]]) -> None:
    tree = ast.parse(Path(refimpl.kernels.__path__[0], f"{kernel}.py").read_text(encoding="utf-8"))
    functions[kernel] = [
        _canonical(node)
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.dump(mark) for mark in node.decorator_list)
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("refimpl.kernels"):
            package = node.module == "refimpl.kernels"
            for name in [alias.name for alias in node.names] if package else [str(node.module).rpartition(".")[2]]:
                if name not in functions:
                    _collect(name, functions)


def _described(launch: Launch) -> list[object]:
    arguments = [
        [name, str(value.dtype), *value.shape] if isinstance(value, Tensor) else [name, value]
        for name, value in launch.arguments.items()
    ]
    constants = sorted(launch.constants.items())
    return [launch.kernel.__name__, launch.grid, arguments, constants, launch.num_warps, launch.num_stages]


def _canonical(node: object) -> str:
    """The syntax tree as text, the same on every Python (`ast.dump` is not)."""
    if isinstance(node, list):
        return f"[{','.join(_canonical(item) for item in node if not _is_docstring(item))}]"
    if not isinstance(node, ast.AST):
        return ascii(node)
    if isinstance(node, ast.JoinedStr):  # Python 3.12.0 to 3.12.3 end some f-strings with an empty constant
        node.values = [part for part in node.values if getattr(part, "value", None) != ""]
    fields = [
        f"{name}={_canonical(value)}"
        for name, value in sorted(ast.iter_fields(node))
        if name not in ("ctx", "kind", "type_comment", "type_ignores") and value is not None and value != []
    ]
    return f"{type(node).__name__}({','.join(fields)})"


def _is_docstring(node: object) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


# --- compile -----------------------------------------------------------------------------------------------------


class _AbsentGPU:
    """A driver that answers the JIT's questions for a GPU that is not there."""

    def __init__(self, target: str) -> None:
        from triton.backends.compiler import GPUTarget

        self.name = target
        self.target = GPUTarget("hip", target, 64) if target in AMD else GPUTarget("cuda", NVIDIA[target], 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        return self.name  # the JIT keeps one cache for each

    def get_current_stream(self, device: str) -> int:
        return 0


def _compile(launch: Launch, target: str) -> Any:
    """The JIT's result for this launch on that GPU; ``.asm`` holds every stage. Permanently replaces Triton's driver."""
    from triton.runtime import driver

    driver.set_active(_AbsentGPU(target))
    return launch.kernel.warmup(
        grid=launch.grid,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        **launch.arguments,
        **launch.constants,
    )


# --- read the machine code ---------------------------------------------------------------------------------------

_LOAD = re.compile(r"\bld\.global\S*?(?:\.v(?P<vector>[248]))?\.[bsuf](?P<bits>\d+)\s+[^\[]*\[\s*(?P<address>%\w+)")
_COPY = re.compile(r"\bcp\.async\.\w+\.shared\.global\s+\[[^\]]*\],\s*\[\s*(?P<address>%\w+)[^\]]*\],\s*(?P<bytes>\w+)")
_PARAMETER = re.compile(r"ld\.param\.\w+\s+(%\w+), \[\w+_param_(\d+)\]")


def loads_by_parameter(ptx: str) -> dict[int, Counter[int]]:
    """Widths in bits of the global loads in PTX, by the position of the parameter that their address derives from.

    An address is followed back through 64-bit registers only: offsets come in from 32-bit ones.

    Example:
        >>> loads_by_parameter('''
        ...     ld.param.b64 %rd1, [kernel_param_2];
        ...     add.s64 %rd3, %rd1, %rd2;
        ...     ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd3 + 0 ];''')
        {2: Counter({128: 1})}
    """
    parameters = {register: int(index) for register, index in _PARAMETER.findall(ptx)}
    sources: dict[str, set[str]] = {}
    for line in ptx.splitlines():
        written = re.match(r"\s*(?:@!?%\w+ )?[a-z][\w.]*\s+(%rd\d+), (.*)", line)
        if written:
            sources.setdefault(written[1], set()).update(re.findall(r"%rd\d+", written[2]))
    found: dict[int, Counter[int]] = {}
    for pattern in (_LOAD, _COPY):
        for match in pattern.finditer(ptx):
            if pattern is _LOAD:
                width = int(match["bits"]) * int(match["vector"] or 1)
            else:
                width = 8 * int(match["bytes"], 0)
            for index in _origins(match["address"], sources, parameters):
                found.setdefault(index, Counter())[width] += 1
    return found


def _origins(register: str, sources: dict[str, set[str]], parameters: dict[str, int]) -> set[int]:
    seen, waiting, origins = {register}, [register], set()
    while waiting:
        at = waiting.pop()
        if at in parameters:
            origins.add(parameters[at])
        new = sources.get(at, set()) - seen
        seen |= new
        waiting += new
    return origins


_SASS = re.compile(r"^\s*/\*(?P<address>[0-9a-f]{4,})\*/\s+(?P<text>[^;]*);", re.MULTILINE)


def instructions(sass: str) -> list[tuple[int, str, str]]:
    """Address, opcode and operands of each instruction, without the padding after the last one.

    Example:
        >>> instructions("        /*0010*/              @!P0 LDG.E.128 R4, [R2.64] ;")
        [(16, 'LDG.E.128', 'R4, [R2.64]')]
    """
    found = []
    for match in _SASS.finditer(sass):
        words = match["text"].split(maxsplit=1)
        if words and words[0].startswith("@"):
            words = words[1].split(maxsplit=1) if len(words) > 1 else []
        if words and words[0] != "NOP":
            found.append((int(match["address"], 16), words[0], words[1].strip() if len(words) > 1 else ""))
    return found


def per_load(code: list[tuple[int, str, str]]) -> float | None:
    """Instructions for each 128-bit load in the main loop: of the innermost loops with such loads, the longest.

    Example:
        >>> per_load([(0, "MOV", ""), (16, "LDG.E.128", "R4"), (32, "FFMA", ""), (48, "BRA", "0x10")])
        3.0
    """
    loops: list[tuple[int, int, int, int]] = []  # first and last address, instructions, wide loads
    for last, opcode, operands in code:
        target = re.search(r"0x([0-9a-f]+)", operands) if opcode.startswith("BRA") else None
        if target is None or int(target[1], 16) >= last:
            continue
        first = int(target[1], 16)
        body = [op for at, op, _ in code if first <= at <= last]
        wide = sum(op.startswith("LDG") and ".128" in op for op in body)  # LDGSTS among them
        if wide:
            loops.append((first, last, len(body), wide))
    innermost = [
        (length, wide)
        for first, last, length, wide in loops
        if not any(first <= f and end <= last and (f, end) != (first, last) for f, end, _, _ in loops)
    ]
    return None if not innermost else max(innermost)[0] / max(innermost)[1]


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _read_nvidia(compiled: Any, names: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage, sass = (
            subprocess.run([_tool("cuobjdump"), option, str(cubin)], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    code = instructions(sass)
    return {
        "registers": used["REG"],
        "spills": used["STACK"] + used["LOCAL"],
        "loads": {
            names[index]: dict(sorted(widths.items()))
            for index, widths in sorted(loads_by_parameter(compiled.asm["ptx"]).items())
        },
        "tensor_core": sum(op.startswith(("HMMA", "HGMMA", "IMMA", "IGMMA")) for _, op, _ in code),
        "instructions": len(code),
        "per_load": per_load(code),
    }


def _read_amd(compiled: Any) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]
    values = {key: int(value) for key, value in re.findall(r"\.(\w+_count):\s+(\d+)", text)}
    code = re.findall(r"^\t([sv]_\w+|ds_\w+|global_\w+|buffer_\w+|flat_\w+)", text, re.MULTILINE)
    bits = {
        "ubyte": 8,
        "sbyte": 8,
        "ushort": 16,
        "sshort": 16,
        "short": 16,
        "dword": 32,
        "dwordx2": 64,
        "dwordx3": 96,
        "dwordx4": 128,
    }
    widths: Counter[int] = Counter()
    for op in code:
        kind = re.match(r"(?:global|buffer|flat)_load_(\w+?)(?:_d16\w*)?$", op)
        if kind:
            widths[bits[kind[1]]] += 1
    return {
        "registers": values["vgpr_count"],
        "spills": values.get("vgpr_spill_count", 0) + values.get("sgpr_spill_count", 0),
        "loads": {"all": dict(sorted(widths.items()))},
        "tensor_core": sum(op.startswith("v_mfma") for op in code),
        "instructions": len(code),
    }


def _read(kernel: str, variant: str, launch: Launch, target: str) -> Row:
    compiled = _compile(launch, target)
    # the parameters that are left: None and the integer 1 become constants
    names = [
        name
        for name in launch.kernel.arg_names
        if isinstance(launch.arguments.get(name), Tensor) or launch.arguments.get(name) not in (None, 1)
    ]
    read = _read_amd(compiled) if target in AMD else _read_nvidia(compiled, names)
    tensors = {
        name: value
        for name, value in launch.arguments.items()
        if isinstance(value, Tensor) and name not in ("x", "u", "query", "y", "partials", "sums", "arrived")
    }
    return Row(
        kernel=kernel,
        variant=variant,
        target=target,
        shared=compiled.metadata.shared,
        warps=launch.num_warps,
        main=max(tensors, key=lambda name: tensors[name].nbytes),
        **read,
    )


def targets(kernel: str) -> tuple[str, ...]:
    """The GPUs that a kernel file is compiled for: those it names in `TARGETS`, or the usual three.

    sm_75 is added to these, see `_read_all`.

    Example:
        >>> targets("sparse_matvec"), targets("lowrank_decode")
        (('sm_80', 'sm_90', 'gfx942'), ('sm_80', 'sm_90'))
    """
    module = importlib.import_module(f"refimpl.kernels.{kernel}")
    found: tuple[str, ...] = getattr(module, "TARGETS", ("sm_80", "sm_90", *AMD))
    return found


def _read_all(kernel: str, variant: str) -> list[Row]:
    launch = launches(kernel)[variant]
    rows = [_read(kernel, variant, launch, target) for target in targets(kernel)]
    # sm_75 has no bfloat16, and Triton no tensor-core code for it: there PyTorch computes products of many rows
    if variant.startswith("fp16") and not rows[0].tensor_core:
        rows.insert(0, _read(kernel, variant, launch, "sm_75"))
    return rows


# --- run ---------------------------------------------------------------------------------------------------------


def audit(launches: Iterable[tuple[str, str]], progress: bool = True) -> list[Row]:
    """Compile launches for every GPU and read the machine code.

    This happens in a separate process: in the current one kernels may be interpreted (``TRITON_INTERPRET=1``), and the
    driver of a GPU must not be replaced.

    Args:
        launches: kernel and variant of each, as ("sparse_matvec", "bf16 4096->4096").
        progress: show a bar.

    Raises:
        RuntimeError: Triton is not installed, or a kernel does not compile.
    """
    found = elsewhere("audit", list(launches), progress, interpret=False)
    return [_row(value) for value in found]


def elsewhere(module: str, jobs: list[tuple[str, str]], progress: bool, interpret: bool) -> Any:
    """The answer of ``_child`` of a module of this package, run in a process with or without interpreted kernels.

    Raises:
        RuntimeError: Triton is not installed, or the process fails.
    """
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("triton is not installed: pip install 'refimpl[kernels]' (Linux only)")
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0"}
    environment.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton warns where nobody has said
    command = [sys.executable, "-c", f"from refimpl.kernels.{module} import _child; _child()"]
    done = subprocess.run(
        command,
        input=json.dumps([jobs, progress]),
        text=True,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=None if progress else subprocess.PIPE,
    )
    if done.returncode:
        raise RuntimeError(f"refimpl.kernels.{module} fails: {(done.stderr or 'see above')[-2000:]}")
    return json.loads(done.stdout)


def _child() -> None:
    jobs, progress = json.load(sys.stdin)
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a compiler prints must not end up in the answer
    bar = tqdm(jobs, desc="kernels", unit="launch", disable=not progress)
    json.dump([asdict(row) for kernel, variant in bar for row in _read_all(kernel, variant)], answer)
    answer.close()


def _row(value: dict[str, Any]) -> Row:
    loads = {name: {int(width): n for width, n in widths.items()} for name, widths in value["loads"].items()}
    return Row(**{**value, "loads": loads})


def run(kernels: list[str] | None = None, out: Path | None = None, progress: bool = True) -> list[Row]:
    """Audit kernel files, and keep the result.

    Args:
        kernels: names of kernel files; None is all.
        out: JSON file to write. Rows of other kernels that are in it stay.
        progress: show a bar.

    Raises:
        RuntimeError: no kernel of that name, or as `audit`.
    """
    names = kernels if kernels is not None else all_kernels()
    jobs = [(kernel, variant) for kernel in names for variant in launches(kernel)]
    prints = {name: fingerprint(name) for name in names}  # before: they may be edited meanwhile
    rows = audit(jobs, progress)
    if out is not None:
        keep(out, prints, rows, load(out)["rows"] if out.exists() else [])
    return rows


def keep(out: Path, prints: dict[str, str], rows: list[Any], before: list[Any]) -> None:
    """Write rows with the fingerprints of the kernels they are of; rows of other kernels in the file stay."""
    known = json.loads(out.read_text())["fingerprints"] if out.exists() else {}
    every = [*(row for row in before if row.kernel not in prints), *rows]
    write_json(
        out,
        {
            "versions": versions(),
            "fingerprints": {**known, **prints},
            "rows": [asdict(row) for row in sorted(every, key=lambda row: row.kernel)],
        },
    )


def load(path: Path) -> dict[str, Any]:
    """A file of `run`: its "versions", "fingerprints" and "rows" (of `Row`)."""
    value: dict[str, Any] = json.loads(path.read_text())
    return {**value, "rows": [_row(row) for row in value["rows"]]}


def stale(path: Path) -> list[str]:
    """Kernels that have changed since they were audited, or were never audited; by `fingerprint`.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp(), "audit.json")
        >>> _ = file.write_text('{"fingerprints": {}, "rows": []}')
        >>> stale(file) == all_kernels()
        True
    """
    known = json.loads(path.read_text())["fingerprints"]
    return [kernel for kernel in all_kernels() if known.get(kernel) != fingerprint(kernel)]


def versions() -> dict[str, str]:
    """Of what a figure depends on."""
    import triton

    return {"triton": triton.__version__, "torch": torch.__version__}


def write_json(path: Path, value: Any) -> None:
    """Write under a temporary name and rename, so that no reader gets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)


_HEAD = (
    "kernel",
    "launch",
    "GPU",
    "registers",
    "spills",
    "shared",
    "load of",
    "bits",
    "tensor core",
    "instructions",
    "per load",
)


def table(rows: Iterable[Row]) -> str:
    """The rows as a Markdown table.

    Example:
        >>> row = Row("demo", "fp16 64->64", "sm_80", 32, 0, 512, 4, {"w": {128: 4}}, "w", 0, 200, 70.0)
        >>> print(table([row]).splitlines()[2])
        | demo | fp16 64->64 | sm_80 | 32 | 0 | 512 | w | 128 | 0 | 200 | 70 |
    """
    cells = [
        (
            row.kernel,
            row.variant,
            row.target,
            row.registers,
            row.spills,
            row.shared,
            row.main,
            row.main_width or "",
            row.tensor_core,
            row.instructions,
            "" if row.per_load is None else f"{row.per_load:.0f}",
        )
        for row in rows
    ]
    return markdown.table(_HEAD, cells, align="lllrrrlrrrr")
