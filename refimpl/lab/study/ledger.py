"""The ledger: every paper's claim, our number with its interval, and a verdict by a rule fixed beforehand.

A study judges its claims (`judge`) and stores the outcome in its results file. The ledger reads those files
and nothing else, and says of each whether it still belongs to the code, and whether its rule came first.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any

from refimpl import markdown as md
from refimpl.core.errors import FetchError, MissingExtra, OptionError
from refimpl.core.files.io import data_path
from refimpl.lab import wheels
from refimpl.lab.measure.statistics import Interval
from refimpl.lab.study.records import Results, differences, git, rule_commit, utc
from refimpl.lab.study.sources import module_hash, source_hash

__all__ = [
    "Claim",
    "Outcome",
    "Verdict",
    "current_data",
    "judge",
    "markdown",
    "rule_commit",
    "rule_problems",
    "stale",
    "table",
]


class Verdict(str, Enum):
    """What a measurement says about a claim."""

    HOLDS = "holds"
    PARTLY = "partly"
    DOES_NOT_HOLD = "does not hold here"
    CANNOT_BE_TESTED = "cannot be tested at this scale"


@dataclass(frozen=True)
class Outcome:
    """What a rule makes of the records.

    Attributes:
        verdict: by the claim's rule.
        estimate, low, high: our number and its 95 % interval.
        mde: smallest effect the study could have seen, as a distance from "no effect".
        scale: what was measured where, against what the paper did: "135M, 4 k tokens; the paper: 8B".
        control: the arm the claim is measured against.
        quantity: what the number is: "perplexity with EoRA / with plain SVD".
    """

    verdict: Verdict
    estimate: float
    low: float
    high: float
    mde: float
    scale: str
    control: str
    quantity: str

    @classmethod
    def of(cls, interval: Interval, verdict: Verdict, *, scale: str, control: str, quantity: str) -> Outcome:
        """An outcome whose numbers are those of an interval.

        Example:
            >>> interval = Interval(0.97, 0.95, 0.99, mde=0.03, n=60)
            >>> Outcome.of(interval, Verdict.HOLDS, scale="135M", control="SVD", quantity="ratio").low
            0.95
        """
        return cls(verdict, interval.estimate, interval.low, interval.high, interval.mde, scale, control, quantity)


@dataclass(frozen=True)
class Claim:
    """A statement of a paper and the rule by which it is judged; written and committed before the study runs.

    Attributes:
        id: unique in the book, e.g. "eora-beats-svd".
        text: the claim in one sentence.
        paper_number: what the paper reports, with its scale.
        rule: the rule in words, complete enough to be applied by hand.
        outcome: the same rule as code.
        paper_effect: the paper's effect as a distance from "no effect", in the unit of `Outcome.mde` (0.1 for a ratio
            of 0.9). If the rule finds nothing and the study could not have seen an effect of that size, the verdict is
            "cannot be tested" instead of "does not hold". None where the paper gives no size.
    """

    id: str
    text: str
    paper_number: str
    rule: str
    outcome: Callable[[Results], Outcome]
    paper_effect: float | None = None


def judge(results: Results, claims: Iterable[Claim]) -> list[dict[str, Any]]:
    """Apply the rules to the records; store the answer with ``results.claims = judge(results, CLAIMS)``.

    Raises:
        OptionError: two claims share an id, a needed arm was not recorded, or an estimate lies outside its interval.

    Example:
        >>> results = Results("demo.json", header={})
        >>> outcome = Outcome(Verdict.DOES_NOT_HOLD, 0.99, 0.96, 1.02, 0.03, "135M; the paper: 8B", "SVD", "ratio")
        >>> claim = Claim("demo", "It helps.", "0.9 at 8B", "holds if high < 1", lambda results: outcome, 0.02)
        >>> judge(results, [claim])[0]["verdict"]
        'cannot be tested at this scale'
    """
    rows: list[dict[str, Any]] = []
    for claim in claims:
        if claim.id in {row["id"] for row in rows}:
            raise OptionError(f"claim id {claim.id!r} is used twice; ids must be unique")
        outcome = claim.outcome(results)
        if not outcome.low <= outcome.estimate <= outcome.high:
            raise OptionError(
                f"claim {claim.id!r}: estimate {outcome.estimate} is outside [{outcome.low}, {outcome.high}]"
            )
        verdict = Verdict(outcome.verdict)
        blind = claim.paper_effect is not None and outcome.mde > abs(claim.paper_effect)
        if blind and verdict is Verdict.DOES_NOT_HOLD:  # an effect that was found could be seen
            verdict = Verdict.CANNOT_BE_TESTED
        numbers = {name: float(f"{getattr(outcome, name):.4g}") for name in ("estimate", "low", "high", "mde")}
        rows.append(
            {
                "id": claim.id,
                "text": claim.text,
                "paper_number": claim.paper_number,
                "paper_effect": claim.paper_effect,
                "rule": claim.rule,
                "verdict": verdict.value,
                **numbers,
                "quantity": outcome.quantity,
                "scale": outcome.scale,
                "control": outcome.control,
            }
        )
    return rows


def stale(results: Results, data: Mapping[str, str] | None = None) -> list[str]:
    """What has changed since the records were made: names of modules and data.

    Args:
        results: a loaded results file.
        data: hashes of data and models as they are now; None compares sources only.

    Example:
        >>> header = {"sources": {"refimpl.lab.study.sources": "an old hash"}, "data": {}}
        >>> stale(Results("demo.json", header))
        ['refimpl.lab.study.sources']
    """
    now = {}
    for name in results.header["sources"]:
        try:
            now[name] = module_hash(name)
        except ModuleNotFoundError:
            continue  # gone or moved: `differences` names it
    changed = differences(results.header["sources"], now)
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

    Checks that the commit is part of this history, is older than the first run, and that the study's code in that
    commit is the code that ran. Outside the book's own checkout, or in a shallow clone that lacks the commit, only
    the date stored in the file is checked.

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
        source = git(root, "show", f"{rule['commit']}:{rule['file']}")
    except subprocess.CalledProcessError:
        return problems if shallow else [*problems, f"the rule's commit {rule['commit'][:9]} is not in this history"]
    if committed > started and not problems:
        problems.append(f"the rule's commit {rule['commit'][:9]} is younger than the run")
    if source_hash(source) != results.header["sources"][results.header["study"]]:
        problems.append(f"the study that ran is not the one in the rule's commit {rule['commit'][:9]}")
    return problems


def table(folder: str | Path | None = None) -> list[dict[str, Any]]:
    """One row for each judged claim of each results file, in the order of file names.

    Each row has the keys of a claim (`judge`) and "paper" (slug), "study", "started", "rule_commit", "stale" (names of
    what changed since: modules, and data and models as far as the cache holds them) and "problems" (of the rule; and a
    profile other than "study").

    Args:
        folder: where the results files are; data/results by default.

    Example:
        >>> all(row["verdict"] in {v.value for v in Verdict} for row in table())
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
