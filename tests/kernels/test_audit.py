"""What is read from machine code, on samples, and the committed audit of every kernel."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from refimpl.core.files.io import data_path
from refimpl.kernels import audit

pytest.importorskip("triton")

COMMITTED = data_path("kernels", "audit.json")

# what the compiler makes of an address: a parameter, offsets from 32-bit registers, a loop that moves on
PTX = """
	ld.param.b64 	%rd1, [kernel_param_0];
	ld.param.b64 	%rd2, [kernel_param_1];
	ld.param.b32 	%r1, [kernel_param_2];
	mul.wide.s32 	%rd3, %r1, 2;
	add.s64 	%rd4, %rd1, %rd3;
	mov.b64 	%rd9, %rd4;
	@%p1 ld.global.L1::evict_last.v4.b32 { %r2, %r3, %r4, %r5 }, [ %rd9 + 0 ];
	@!%p1 add.s64 	%rd9, %rd9, 64;
	add.s64 	%rd5, %rd2, %rd3;
	ld.global.b16 { %rs1 }, [ %rd5 + 32 ];
	cp.async.cg.shared.global [ %r9 + 0 ], [ %rd5 + 0 ], 0x10, %r10;
	st.global.v4.b32 	[%rd5], {%r2, %r3, %r4, %r5};
"""


def test_loads_are_told_apart_by_parameter() -> None:
    assert audit.loads_by_parameter(PTX) == {0: Counter({128: 1}), 1: Counter({16: 1, 128: 1})}


def test_instructions_leave_predicates_and_padding_out() -> None:
    sass = (
        "        /*0000*/                   MOV R1, c[0x0][0x28] ;   /* 0x00000a0000017a02 */\n"
        "                                                            /* 0x000fe20000000f00 */\n"
        "        /*0010*/              @!P0 LDG.E.128 R4, [R2.64] ;  /* 0x0000000402049981 */\n"
        "        /*0020*/                   EXIT ;\n"
        "        /*0030*/                   NOP ;\n"
    )
    code = [(0, "MOV", "R1, c[0x0][0x28]"), (16, "LDG.E.128", "R4, [R2.64]"), (32, "EXIT", "")]
    assert audit.instructions(sass) == code


def test_instructions_of_the_innermost_loop_with_wide_loads() -> None:
    inner = [(64, "LDG.E.128", "R4"), (80, "LDG.E.128", "R8"), (96, "FFMA", ""), (112, "BRA", "0x40")]
    outer = [(32, "LDG.E.128", "R0"), (48, "IADD3", ""), *inner, (128, "BRA", "0x20")]
    others = [(160, "FADD", ""), (176, "BRA", "0xa0"), (192, "EXIT", ""), (208, "BRA", "0xd0")]
    epilogue = [(224, "LDG.E.128", "R0"), (240, "FADD", ""), (256, "BRA", "0xe0")]  # a shorter one
    assert audit.per_load([*outer, *others, *epilogue]) == 2.0
    assert audit.per_load(others) is None
    assert audit.per_load([(0, "LDG.E.128", "R0"), (16, "BRA", "0x20")]) is None  # forward: no loop


def test_unknown_kernel_is_named() -> None:
    with pytest.raises(RuntimeError, match="'sparse_matmul': there is none of this name; choose among .*sparse_matvec"):
        audit.run(["sparse_matmul"])


def test_fingerprint_is_of_jitted_functions_and_launches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = audit.launches("sparse_matvec")
    monkeypatch.setattr(audit, "launches", lambda kernel: launches)
    monkeypatch.setattr(audit.refimpl.kernels, "__path__", [str(tmp_path)])
    base, top = tmp_path / "base.py", tmp_path / "top.py"
    kernel = '@jit\ndef k(x):\n    """{words}"""\n    return x + {number}  # {words}\n'
    base.write_text(kernel.format(words="One.", number=1) + "def reference(x):\n    return x\n")
    top.write_text("from refimpl.kernels import base\n@triton.jit\ndef t(x):\n    return base.k(x)\n")
    first = audit.fingerprint("top")
    base.write_text(kernel.format(words="Another.", number="(1)") + "def reference(x):\n    return -x\n")
    assert audit.fingerprint("top") == first
    base.write_text(kernel.format(words="One.", number=2))
    assert audit.fingerprint("top") != first
    base.write_text(kernel.format(words="One.", number=1))
    name = next(iter(launches))
    launches[name] = dataclasses.replace(launches[name], num_warps=8)
    assert audit.fingerprint("top") != first


def test_rows_of_other_kernels_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def row(kernel: str, registers: int) -> audit.Row:
        return audit.Row(kernel, "v", "sm_90", registers, 0, 0, 4, {"w": {128: 2}}, "w", 0, 9, 3.5)

    registers = 10
    launch = audit.launches("sparse_matvec")["fp16 576->192"]
    monkeypatch.setattr(audit, "launches", lambda kernel: {"v": launch})
    monkeypatch.setattr(audit, "audit", lambda jobs, progress: [row(kernel, registers) for kernel, _ in jobs])
    out = tmp_path / "audit.json"
    audit.run(["sparse_matvec", "quant_matmul"], out, progress=False)
    registers = 20
    audit.run(["sparse_matvec"], out, progress=False)
    assert audit.load(out)["rows"] == [row("quant_matmul", 10), row("sparse_matvec", 20)]
    assert set(audit.stale(out)) == set(audit.all_kernels()) - {"sparse_matvec", "quant_matmul"}
    value = json.loads(out.read_text())
    value["fingerprints"]["quant_matmul"] = "older"
    out.write_text(json.dumps(value))
    assert "quant_matmul" in audit.stale(out)


# ---- committed


def test_committed_audit_belongs_to_these_kernels() -> None:
    assert audit.stale(COMMITTED) == [], "refimpl kernels audit <kernels> --out data/kernels/audit.json redoes them"
    rows = audit.load(COMMITTED)["rows"]
    launches = {(kernel, name) for kernel in audit.all_kernels() for name in audit.launches(kernel)}
    for target in ("sm_80", "sm_90", "gfx942"):
        found = {(row.kernel, row.variant) for row in rows if row.target == target}
        assert found == {launch for launch in launches if target in audit.targets(launch[0])}
    assert {row.kernel for row in rows if row.target == "sm_75"} == set(audit.all_kernels())


def test_no_kernel_spills() -> None:
    rows = audit.load(COMMITTED)["rows"]
    assert rows and not [(row.kernel, row.variant, row.target) for row in rows if row.spills]


def test_weights_are_loaded_128_bits_at_a_time() -> None:
    rows = [
        row
        for row in audit.load(COMMITTED)["rows"]
        if row.target != "gfx942"
        and not row.tensor_core
        and "pass" not in row.variant  # those merge results
        and row.kernel != "cross_entropy"  # has no weights, and looks up one logit: a test of its own
    ]
    assert rows and not [(row.kernel, row.variant, row.target) for row in rows if row.main_width != 128]


def test_products_of_many_rows_run_on_tensor_cores() -> None:
    rows = [row for row in audit.load(COMMITTED)["rows"] if "512 rows" in row.variant]
    assert rows and all(row.tensor_core for row in rows)


def test_one_launch_is_compiled_again() -> None:
    """In a process of its own: here kernels are interpreted."""
    assert os.environ["TRITON_INTERPRET"] == "1"
    rows = audit.audit([("sparse_matvec", "fp16 576->192")], progress=False)
    assert [row.target for row in rows] == ["sm_75", "sm_80", "sm_90", "gfx942"]
    assert not any(row.spills for row in rows)
    for row in rows[:3]:
        assert row.loads["values"] == {128: 8} and row.loads["positions"] == {128: 2} and row.registers <= 96
    committed = audit.load(COMMITTED)
    if committed["versions"] == audit.versions():
        assert rows == [r for r in committed["rows"] if (r.kernel, r.variant) == (rows[0].kernel, rows[0].variant)]


def test_sums_are_written_before_they_are_announced_and_read_after() -> None:
    """Only on a GPU do programs run at once; what keeps them apart is the order of these instructions."""
    code = (
        "from refimpl.kernels import audit\n"
        "launch = audit.launches('sparse_matvec')['fp16 576->192']\n"
        "print(audit._compile(launch, 'sm_80').asm['ptx'])"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    ptx = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    ).stdout
    lines = [line.strip() for line in ptx.splitlines()]
    count = next(i for i, line in enumerate(lines) if "atom.global" in line)
    assert "acq_rel" in lines[count] and ".gpu" in lines[count]
    stores = [i for i, line in enumerate(lines) if "st.global" in line]
    barriers = [i for i, line in enumerate(lines) if line.startswith("bar.sync")]
    written = max(i for i in stores if i < count)
    assert any(written < i < count for i in barriers)
    answered = min(i for i in barriers if i > count)  # all threads learn the count of the one that asked
    reads = [i for i, line in enumerate(lines) if "ld.global.b32" in line and i > count]
    assert reads and min(reads) > answered and max(stores) > answered
