"""Do recorded numbers still stand? Run part of a study at the recorded commit and now, and compare everything unrounded.

A record rests on functions, each with a hash (`refimpl.lab.study.sources`). When one of them changes, its study is replayed:
the quick size, and the cheapest full-size job of each kind of arm within a time limit, once with the code of the last stamp
(a git worktree) and once with the code as it is, on one machine and in one environment. Values other than clocks, every
step's loss, rate and gradient norm, and the bytes of the final weights must be equal. Then the record gets a stamp that says
so. Records themselves are never touched.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.core.errors import RefimplError
from refimpl.lab import wheels
from refimpl.lab.study.ledger import current_data
from refimpl.lab.study.records import RULE, Results, differences, environment, git
from refimpl.lab.study.sources import Sources

#: Metrics that measure time or memory: no two runs agree on them.
CLOCK = re.compile(r"second|cpu|wall|clock|forward_passes|peak_bytes|time")
_ROOT = Path(__file__).resolve().parents[3]
#: In the answer of a probe, before the arm of a job at full size.
FULL_SIZE = "full size: "
_SETS = 24  # perturbed copies of the records that an old and a new rule must judge alike
_SHOWN = 5  # differences in a message


class NotStanding(RefimplError):
    """A record cannot be stamped: what it rests on has changed, or the replay could not show that it has not."""


@dataclass
class Comparison:
    """Outcome of a replay.

    Attributes:
        values, trainings, steps: how many were compared.
        jobs: full-size jobs that ran, as "arm, condition, seed".
        left_out: kinds of arms whose cheapest job did not fit into the time limit.
        differences: what differs, in words; empty if the record stands.
        digest: of all that was compared.
        functions: (module, name) of what ran now.
    """

    values: int = 0
    trainings: int = 0
    steps: int = 0
    jobs: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    digest: str = ""
    functions: set[tuple[str, str]] = field(default_factory=set)


def compare(then: dict[str, Any], now: dict[str, Any], without: Sequence[str] = ()) -> Comparison:
    """Differences between two answers of the probe.

    Args:
        then, now: "values", "trainings" and "functions", as `refimpl.lab.study.probe` writes them.
        without: arms whose values are not compared, because they are measured again. Trainings carry no arm: all are compared.

    Example:
        >>> row = ["short", "mnist", 1, "", "accuracy", "0x1p-1"]
        >>> run = {"steps": [["0x1p-1", "0x1p-3", "0x0p+0"]], "weights": "a"}
        >>> before = {"values": [row], "trainings": [run], "functions": []}
        >>> after = {"values": [row], "trainings": [{**run, "weights": "b"}], "functions": []}
        >>> compare(before, before).differences, compare(before, after).differences
        ([], ['training 1 of 1: final weights'])
        >>> third, rounded = ([*row[:5], value.hex()] for value in (1 / 3, 0.333333))
        >>> compare({**before, "values": [third, rounded]}, {**before, "values": [third]}).differences
        []
    """
    old, new = (_unrounded(side["values"], without) for side in (then, now))
    found = [f"{_said(key)}: gone" for key in old if key not in new]
    found += [f"{_said(key)}: new" for key in new if key not in old]
    for key in old.keys() & new.keys():
        if old[key] != new[key]:
            found.append(f"{_said(key)}: {float.fromhex(old[key])!r}, now {float.fromhex(new[key])!r}")
    before, after = (_ordered(side["trainings"]) for side in (then, now))
    if len(before) != len(after):
        found.append(f"{len(before)} trainings, now {len(after)}")
    for number, (a, b) in enumerate(zip(before, after, strict=False), start=1):
        if a != b:
            found.append(f"training {number} of {len(before)}: {_first_difference(a, b)}")
    told = json.dumps([sorted(map(list, new.items()), key=str), after], sort_keys=True, default=str)
    return Comparison(
        values=len(old),
        trainings=len(before),
        steps=sum(len(training["steps"]) for training in before),
        differences=found,
        digest=hashlib.sha256(told.encode()).hexdigest()[:16],
        functions={(module, name) for module, name in now["functions"]},
    )


def _unrounded(values: Sequence[Sequence[Any]], without: Sequence[str]) -> dict[tuple[Any, ...], str]:
    """By what was measured. Studies once gathered records in one `Results` for another, which rounds: the first counts."""
    return {
        tuple(row[:5]): row[5]
        for row in reversed(values)
        if not CLOCK.search(row[4]) and row[0].removeprefix(FULL_SIZE) not in without
    }


def _said(key: tuple[Any, ...]) -> str:
    arm, condition, seed, unit, metric = key
    return f"{metric} of {arm}, {condition or 'no condition'}, seed {seed}" + (f", {unit}" if unit else "")


def _ordered(trainings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """In an order that does not depend on which was run first."""
    return sorted(trainings, key=lambda t: (len(t["steps"]), t["steps"][:1], t["weights"]))


def _first_difference(a: dict[str, Any], b: dict[str, Any]) -> str:
    if len(a["steps"]) != len(b["steps"]):
        return f"{len(a['steps'])} steps, now {len(b['steps'])}"
    for step, (one, two) in enumerate(zip(a["steps"], b["steps"], strict=True), start=1):
        for name, x, y in zip(("loss", "rate", "gradient norm"), one, two, strict=True):
            if x != y:
                return f"{name} of step {step} is {float.fromhex(x)!r}, now {float.fromhex(y)!r}"
    return "final weights"


# -- running both sides --


def replay(
    results: Results,
    minutes: float = 10.0,
    say: Callable[[str], None] = lambda words: None,
    without: Sequence[str] = (),
) -> Comparison:
    """Run part of a study at the commit that its record stands for, and now.

    Args:
        results: a recorded study.
        minutes: for the full-size jobs of both sides together; the quick size always runs.
        say: told what is happening.
        without: arms that are measured again, see `compare`.

    Raises:
        NotStanding: the commit is not in this history, or one side does not run.
    """
    base = base_commit(results)
    chosen, left_out = _cheapest(results, minutes * 60, without)
    request = {
        "module": results.header["study"],
        "quick": True,
        "jobs": [[entry["arm"], entry["condition"], entry["seed"]] for entry in chosen],
        "recorded": str(results.path.resolve()),
    }
    with checkout(base) as then:
        say(f"{results.header['paper']}: as of {base[:9]}")
        before = run_probe(then, request)
        say(f"{results.header['paper']}: now")
        after = run_probe(_ROOT, request)
    found = compare(before, after, without)
    found.jobs = [f"{entry['arm']}, {entry['condition']}, seed {entry['seed']}" for entry in chosen]
    found.left_out = left_out
    return found


def base_commit(results: Results) -> str:
    """The commit whose code a record stands for: of its last stamp, or of its last run if that is younger."""
    run = results.header["runs"][-1]
    stamps = results.header["stamps"]
    return run["commit"] if not stamps or run["started"] > stamps[-1]["when"] else stamps[-1]["commit"]


def _cheapest(results: Results, seconds: float, without: Sequence[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """The cheapest job of each kind, cheapest first, as far as the time goes for both sides; kinds that are left out."""
    kinds = [
        (kind, entry) for kind, entry in results.header["kinds"].items() if entry.get("arm") not in (None, *without)
    ]
    chosen, left_out = [], []
    for kind, entry in sorted(kinds, key=lambda pair: pair[1]["seconds"]):
        if 2 * entry["seconds"] <= seconds:
            seconds -= 2 * entry["seconds"]
            chosen.append(entry)
        else:
            left_out.append(kind)
    return chosen, left_out


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """A folder with the package as it was at a commit, for the length of the block.

    Raises:
        NotStanding: no checkout, or no such commit.
    """
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "then"
        try:
            git(_ROOT, "worktree", "add", "--detach", "--quiet", str(target), commit)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = (getattr(error, "stderr", "") or str(error)).strip()
            raise NotStanding(
                f"commit {commit[:9]} cannot be checked out ({reason}); fetch the whole history"
            ) from error
        try:
            yield target
        finally:
            git(_ROOT, "worktree", "remove", "--force", str(target))


def run_probe(root: Path, request: dict[str, Any]) -> dict[str, Any]:
    """The answer of `refimpl.lab.study.probe` for the package in a folder.

    Raises:
        NotStanding: it ended with an error; the last lines are shown.
    """
    with tempfile.TemporaryDirectory() as folder:
        ask, answer, cache = (Path(folder) / name for name in ("ask.json", "answer.json", "cache"))
        cache.mkdir()  # models and texts, without what an earlier run of a study kept there
        for item in wheels.cache_folder().iterdir():
            if item.name not in ("studies", "downloads"):
                (cache / item.name).symlink_to(item.resolve())
        ask.write_text(json.dumps({**request, "root": str(root)}))
        environ = {**os.environ, "REFIMPL_CACHE": str(cache), "REFIMPL_PROFILE": "quick", "PYTHONPATH": str(root)}
        script = Path(__file__).with_name("probe.py")
        command = [sys.executable, str(script), str(ask), str(answer)]
        done = subprocess.run(command, cwd=root, env=environ, capture_output=True, text=True, check=False)
        if done.returncode or not answer.exists():
            lines = "\n".join(done.stderr.strip().splitlines()[-_SHOWN:])
            raise NotStanding(f"{request['module']} does not run with the package in {root}:\n{lines}")
        return json.loads(answer.read_text())


# -- rules --


def rules_agree(results: Results, then: Path, seed: int = 0) -> list[str]:
    """Claims that the rules of another checkout judge otherwise than those of now; empty if they are the same function.

    The records are judged as they are, and in copies whose values were moved at random, so that all verdicts occur.

    Args:
        results: the records.
        then: folder that holds the package of the other rules.
        seed: of the copies.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for number in range(_SETS + 1):
            copy = results.perturbed(
                np.random.default_rng([seed, number]), 0.0 if number == 0 else 0.3 * number / _SETS
            )
            copy.path = Path(folder) / f"{number}.json"
            copy.save()
            files.append(str(copy.path))
        request = {"module": results.header["study"], "quick": False, "jobs": [], "recorded": "", "judge": files}
        before, after = (run_probe(root, request)["judged"] for root in (then, _ROOT))
    wrong = Counter(
        claim
        for one, two in zip(before, after, strict=True)
        for claim in {*one, *two}
        if one.get(claim) != two.get(claim)
    )
    return [f"{claim} (in {count} of {_SETS + 1} sets of records)" for claim, count in wrong.items()]


# -- stamps --


def problems(results: Results) -> list[str]:
    """Obstacles to a stamp: data or models that changed, a package with uncommitted changes."""
    found = []
    data = differences(results.header["data"], current_data(results.header["data"]))
    if data:
        found.append(f"data or models changed: {', '.join(data)}")
    if git(_ROOT, "status", "--porcelain", "--", "refimpl"):
        found.append("the package has changes that are not committed; commit them first")
    return found


def restamp(
    results: Results,
    minutes: float = 10.0,
    say: Callable[[str], None] = lambda words: None,
    without: Sequence[str] = (),
) -> bool:
    """Show that a record stands with the code as it is, and say so in its header.

    Args:
        results: a recorded study; saved with the stamp.
        minutes: for full-size jobs, see `replay`.
        say: told what is happening.
        without: arms that need not stand, because they are measured again.

    Returns:
        False if nothing it rests on has changed, so that no stamp was needed.

    Raises:
        NotStanding: data or rule changed, a value or a training differs, or a changed function that the record used was
            not executed by the replay; names the arms to run again.
    """
    now = Sources.of_tree(_ROOT)
    changed, study = results.changed_functions(now), results.header["study"]
    rule = now.digest(study, RULE, deep=True)
    other_rule = rule != results.rule_hash()
    if not changed and not other_rule:
        return False
    slug, found = results.header["paper"], problems(results)
    if found:
        raise NotStanding(f"{slug}: {'; '.join(found)}")
    if other_rule:
        with checkout(base_commit(results)) as then:
            unlike = rules_agree(results, then)
        if unlike:
            raise NotStanding(
                f"{slug}: the rule is another one: it judges otherwise {', '.join(unlike)}; run the study again"
            )
    outcome = replay(results, minutes, say, without) if changed else Comparison()
    if outcome.differences:
        more = f" (+{len(outcome.differences) - _SHOWN} more)" if len(outcome.differences) > _SHOWN else ""
        raise NotStanding(
            f"{slug}: {'; '.join(outcome.differences[:_SHOWN])}{more}; `refimpl study {slug} --again ARM` runs the arms that "
            "moved again"
        )
    ran = {f"{module}.{name}" for module, name in outcome.functions}
    unseen = [name for name in changed if name not in ran and now.has(*_split(name))]
    if unseen:
        arms = [kind for kind, names in results.kinds_resting_on(unseen).items() if names]
        raise NotStanding(
            f"{slug}: {', '.join(unseen)} changed and did not run in the replay; give it more --minutes, or run again what "
            f"used it: {', '.join(arms)}"
        )
    told: dict[str, Any] = {"rule": rule, "sets": _SETS + 1} if other_rule else {}
    if without:
        told["without"] = list(without)
    stamp(results, outcome, now, told)
    results.save()
    return True


def stamp(results: Results, outcome: Comparison, now: Sources, more: dict[str, Any]) -> None:
    """Append a stamp: what was compared, where and when, and the functions as they are now."""
    rows = results.functions()
    moved: dict[str, list[str] | None] = {}
    known = {(module, name) for module, name, _ in rows}
    affected = [kind for kind, names in results.kinds_resting_on(results.changed_functions(now)).items() if names]
    for index, (module, name, digest) in enumerate(rows):
        where = now.locate(module, name, digest)
        if where is None and now.has(module, name):
            moved[str(index)] = [module, name, now.digest(module, name)]
        elif where is None:  # it no longer exists: what replaced it ran in the replay
            moved[str(index)] = None
        elif where != module:
            moved[str(index)] = [where, name, digest]
            known.add((where, name))
    added = [[m, n, now.digest(m, n)] for m, n in sorted(outcome.functions - known)]
    first = len(results.header["functions"])
    results.header["functions"] += added
    for kind in affected or results.header["kinds"]:
        entry = results.header["kinds"][kind]
        entry["functions"] = sorted({*entry["functions"], *range(first, first + len(added))})
    counted = {"values": outcome.values, "trainings": outcome.trainings, "steps": outcome.steps, "jobs": outcome.jobs}
    here = environment(results.header["runs"][-1]["dtype"])
    results.header["stamps"].append(
        {
            "base": base_commit(results),
            "commit": here["commit"],
            "when": here["started"],
            **{key: here[key] for key in ("python", "torch", "transformers", "cpu")},
            "compared": {**counted, "left_out": outcome.left_out, **more},
            "digest": outcome.digest,
            "functions": moved,
        }
    )


def _split(name: str) -> tuple[str, str]:
    """ "package.module.Class.method" as module and name: a module is spelled in lower case up to a name it defines."""
    sources, parts = Sources.of_tree(_ROOT), name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:end])
        if sources.path(module) is not None:
            return module, ".".join(parts[end:])
    return name, ""
