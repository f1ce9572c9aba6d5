"""A script that runs part of a study in some checkout and writes down, unrounded, everything that came out.

`refimpl.lab.study.replay` starts it twice, with the code at the recorded commit and with the code as it is now. It must
therefore run with either: it is started by its path, imports the package from the folder it is given, and takes notes by
wrapping the two places all numbers pass through, `Results.add` and the training loop.

    python probe.py request.json answer.json
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Run what is asked for.

    Args:
        request: "root" (folder that holds the package), "module" (of the study), "quick" (whether to run its quick size) and
            "jobs" (list of [arm, condition, seed] to run at full size, with the rates of the results file "recorded") and
            "judge" (results files to judge).

    Returns:
        "values" ([arm, condition, seed, unit, metric, hexadecimal float] each), "trainings" (loss, rate and gradient norm of
        every step and a hash of the final weights), "functions" ([module, name] of what ran), "kinds" (the same for each
        kind of arm) and "judged" (for each file the verdict and numbers of each claim).
    """
    sys.path[:] = [request["root"], *(entry for entry in sys.path if Path(entry).resolve() != Path(__file__).parent)]
    notes = _Notes()
    notes.install()
    out = Path(tempfile.mkdtemp()) / "results.json"
    if request["quick"]:
        module = importlib.import_module(request["module"])
        if hasattr(module, "STUDY"):
            importlib.import_module("refimpl.lab.study.study").run(request["module"], out, "quick")
        else:  # before studies were declared
            module.run(out, "quick")
    for job in request["jobs"]:
        notes.prefix = "full size: "
        _full(request["module"], request["recorded"], tuple(job), notes)
    judged = [_judged(request["module"], file) for file in request.get("judge", ())]
    functions, kinds = sorted(notes.functions), {kind: sorted(ran) for kind, ran in notes.kinds.items()}
    return {
        "values": notes.values,
        "trainings": notes.trainings,
        "functions": functions,
        "kinds": kinds,
        "judged": judged,
    }


class _Notes:
    """Everything that was recorded or trained."""

    def __init__(self) -> None:
        self.values: list[list[Any]] = []
        self.trainings: list[dict[str, Any]] = []
        self.functions: set[tuple[str, str]] = set()
        self.kinds: dict[str, set[tuple[str, str]]] = {}
        self.prefix = ""

    def install(self) -> None:
        records = _either("refimpl.lab.study.records", "refimpl.lab.records")
        loop = _either("refimpl.core.train.loop", "refimpl.core.loop", optional=True)  # the oldest records had none
        add, go = records.Results.add, None if loop is None else loop._Run.go
        note: Any = getattr(records.Results, "note", None)

        def added(results: Any, *rows: Any) -> None:
            add(results, *rows)
            self.values += [self.row(row) for row in rows]

        def went(run: Any, *arguments: Any) -> None:
            assert go is not None
            try:
                go(run, *arguments)
            finally:  # a run that a hook breaks off has a history as well
                self.trainings.append(_training(run))

        def noted(results: Any, kind: str, place: Any, seconds: float, ran: Any) -> None:
            note(results, kind, place, seconds, ran)
            self.functions |= set(ran)
            self.kinds.setdefault(kind, set()).update(ran)

        records.Results.add = added
        if loop is not None:
            loop._Run.go = went
        if note is not None:
            records.Results.note = noted

    def row(self, row: Any) -> list[Any]:
        return [self.prefix + row.arm, row.condition, row.seed, row.unit, row.metric, float(row.value).hex()]


def _training(run: Any) -> dict[str, Any]:
    digest = hashlib.sha256()
    for name, tensor in sorted(run.model.state_dict().items()):
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(flat.view(importlib.import_module("torch").uint8).numpy().tobytes())
    steps = [[float(entry.get(name, 0.0)).hex() for name in ("loss", "lr", "grad_norm")] for entry in run.history.steps]
    return {"steps": steps, "weights": digest.hexdigest()}


def _full(module: str, recorded: str, wanted: tuple[Any, ...], notes: _Notes) -> None:
    """One job at full size, as the study's stages make it from what is recorded."""
    engine = importlib.import_module("refimpl.lab.study.study")
    records = importlib.import_module("refimpl.lab.study.records")
    study, results = engine.load(module), records.Results.load(recorded)
    dtype = results.header["runs"][-1]["dtype"]
    folder = engine.work_folder(study, "study", results.header["data"])
    run = engine.Run(study, module, results, "study", dtype, str(folder), 1)
    for jobs in engine.stages(run):
        chosen = [job for job in jobs if engine.place(job) == wanted]
        if chosen:
            study.before(run, chosen)
            rows, ran, _ = engine.measured(chosen[0])
            notes.functions |= ran
            notes.kinds.setdefault(study.kind(chosen[0].arm), set()).update(ran)
            notes.values += [notes.row(record) for record in engine.records(chosen[0], rows, study.slug)]
            return
    raise SystemExit(f"{module} has no job {wanted}")


def _judged(module: str, file: str) -> dict[str, Any]:
    """Verdict and numbers of each claim; of a rule that cannot be applied the kind of error."""
    claims = importlib.import_module(module).CLAIMS
    judge = _either("refimpl.lab.study.claims", "refimpl.lab.ledger").judge
    results = _either("refimpl.lab.study.records", "refimpl.lab.records").Results.load(file)
    answer: dict[str, Any] = {}
    for claim in claims:
        try:
            (row,) = judge(results, [claim])
            answer[claim.id] = [row[key] for key in ("verdict", "estimate", "low", "high", "mde", "control", "scale")]
        except Exception as error:  # whatever it is, both sides must meet it
            answer[claim.id] = type(error).__name__
    return answer


def _either(*names: str, optional: bool = False) -> Any:
    for name in names:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    if optional:
        return None
    raise SystemExit(f"none of {names} is there")


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps(main(asked)))
