"""The ledger: every paper's claim, our number with its interval, and a verdict by a rule fixed beforehand.

A study judges its claims (`judge`) and stores the outcome in its results file. The ledger reads those files
and nothing else, and says of each whether it still belongs to the code, and whether its rule came first.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from refimpl import markdown as md
from refimpl.core.errors import FetchError, MissingExtra
from refimpl.core.files.io import data_path
from refimpl.lab import wheels
from refimpl.lab.study.records import RULE, Results, differences, git, rule_commit, utc
from refimpl.lab.study.sources import Sources

__all__ = ["current_data", "markdown", "rule_commit", "rule_problems", "stale", "table"]


def stale(results: Results, data: Mapping[str, str] | None = None) -> list[str]:
    """Functions and data that have changed since the last stamp, or since the records were made.

    Args:
        results: a loaded results file.
        data: hashes of data and models as they are now; None compares functions only.

    Example:
        >>> header = {"functions": [["refimpl.lab.study.sources", "source_hash", "an old hash"]], "stamps": [], "data": {}}
        >>> stale(Results("demo.json", header))
        ['refimpl.lab.study.sources.source_hash']
    """
    changed = results.changed_functions()
    return changed if data is None else changed + differences(results.header["data"], data)


def current_data(recorded: Mapping[str, str]) -> dict[str, str]:
    """Hashes, as they are now, of those data and models in `recorded` that can be compared; the others as recorded.

    Compared is what the cache holds: nothing is fetched or parsed for this. The corpora ``python`` and ``prose``
    are the standard library of the interpreter that runs, so a difference would say nothing about the result.

    Args:
        recorded: hashes by name, from the header of a results file.

    Example:
        >>> current_data({"python": "another interpreter's", "my own text": "12"})
        {'python': "another interpreter's", 'my own text': '12'}
    """
    now = dict(recorded)
    for name in {"smollm2", "wikipedia", "news", "tasks"} & set(recorded):
        try:
            with wheels.cached_only():
                now[name] = _data_hash(name)
        except (FetchError, MissingExtra):
            continue
    return now


def _data_hash(name: str) -> str:
    if name == "smollm2":
        from refimpl.lab.models.language import smollm2_hash  # transformers: seconds that a ledger without it saves

        return smollm2_hash()
    if name == "tasks":
        from refimpl.lab.measure.tasks import items, items_hash

        return items_hash([*items("cloze"), *items("summary")])
    from refimpl.lab.data.text import corpus_hash

    return corpus_hash(name)


def rule_problems(results: Results, repository: str | Path | None = None) -> list[str]:
    """Why the rule of these results cannot be trusted to have come first; empty if it can.

    Checks that the commit is part of this history and older than the first run, and that the claims in that commit, with
    all functions they name, are those that judged. Outside the book's own checkout, or in a shallow clone that lacks the
    commit, only the date stored in the file is checked.

    Args:
        results: a loaded results file.
        repository: the checkout; the one this package lies in by default.

    Example:
        >>> rule_problems(Results("demo.json", {"rule": None}))
        ['provisional: the rule was not committed before the run']
    """
    rule = results.header["rule"]
    if rule is None:
        return ["provisional: the rule was not committed before the run"]
    started = datetime.fromisoformat(results.header["runs"][0]["started"])
    problems = []
    if datetime.fromisoformat(rule["committed"]) > started:
        problems.append(f"the rule's commit {rule['commit'][:9]} is younger than the run")
    root = Path(repository) if repository is not None else Path(__file__).resolve().parents[3]
    try:
        git(root, "ls-files", "--error-unmatch", "--", f":/{rule['file']}")  # not some repository around a wheel
        shallow = git(root, "rev-parse", "--is-shallow-repository") == "true"
    except (OSError, subprocess.CalledProcessError):
        return problems
    try:
        git(root, "merge-base", "--is-ancestor", rule["commit"], "HEAD")
        committed = utc(int(git(root, "show", "-s", "--format=%ct", rule["commit"])))
    except subprocess.CalledProcessError:
        return problems if shallow else [*problems, f"the rule's commit {rule['commit'][:9]} is not in this history"]
    if committed > started and not problems:
        problems.append(f"the rule's commit {rule['commit'][:9]} is younger than the run")
    then = Sources.at_commit(root, rule["commit"])
    study = results.header["study"]
    if not then.has(study, RULE) or then.digest(study, RULE, deep=True) != rule["hash"]:
        problems.append(f"the rule that judged is not the one in the rule's commit {rule['commit'][:9]}")
    return problems


def table(folder: str | Path | None = None) -> list[dict[str, Any]]:
    """One row for each judged claim of each results file, in the order of file names.

    Each row has the keys of a claim (`judge`) and "paper" (slug), "study", "started", "rule_commit", "stands_as_of" (time
    of the last stamp, or None), "stale" (functions that changed since, and data and models as far as the cache holds
    them) and "problems" (of the rule; and a profile other than "study").

    Args:
        folder: where the results files are; data/results by default.

    Example:
        >>> all(row["low"] <= row["estimate"] <= row["high"] for row in table())
        True
    """
    rows = []
    for path in sorted(Path(folder if folder is not None else data_path("results")).glob("*.json")):
        results = Results.load(path)
        header = results.header
        problems = rule_problems(results)
        if header["profile"] != "study":
            problems.append(f"run at size {header['profile']!r}, not 'study'")
        shared = {
            "paper": header["paper"],
            "study": header["study"],
            "started": header["runs"][0]["started"],
            "rule_commit": (header["rule"] or {}).get("commit"),
            "stands_as_of": header["stamps"][-1]["when"] if header["stamps"] else None,
            "stale": stale(results, current_data(header["data"])),
            "problems": problems,
        }
        rows += [{**claim, **shared} for claim in results.claims]
    return rows


def markdown(rows: Iterable[Mapping[str, Any]]) -> str:
    """The ledger as a Markdown table.

    Example:
        >>> print(markdown([]).splitlines()[0])
        | Claim | Paper | Ours, 95 % interval | Verdict | Control, scale, smallest visible effect |
    """
    lines = []
    for row in rows:
        verdict = f"**{row['verdict']}**"
        if row["stale"]:
            verdict += f" (stale: {', '.join(row['stale'])} changed since)"
        if row["problems"]:
            verdict += f" ({'; '.join(row['problems'])})"
        cells = [
            f"{row['text']} (`{row['paper']}`)",
            row["paper_number"],
            f"{row['quantity']}: {row['estimate']:.4g} [{row['low']:.4g}, {row['high']:.4g}]",
            verdict,
            f"{row['control']}; {row['scale']}; {row['mde']:.2g}",
        ]
        lines.append(cells)
    header = ["Claim", "Paper", "Ours, 95 % interval", "Verdict", "Control, scale, smallest visible effect"]
    return md.table(header, lines) + "\n"
