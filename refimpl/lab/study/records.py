"""Results of a study: tidy records in one small JSON file, with everything needed to tell whether they still hold.

A record is one number about one *unit* (a document, an item, an image), because intervals resample units. The file
keeps the records by column (an arm's values over a shared list of units), so twenty thousand rows stay below 1 MB
and an added arm is one added line.
"""

from __future__ import annotations

import difflib
import functools
import importlib.metadata
import importlib.util
import json
import math
import platform
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from refimpl.core.errors import OptionError, RefimplError, nearest
from refimpl.core.files.io import atomic_write
from refimpl.lab.measure.metrics import Perplexity
from refimpl.lab.study.sources import Sources

if TYPE_CHECKING:
    from refimpl.core.train.loop import History

_FORMAT = 2
_GONE = ("", "", "")  # a function that no longer exists
_PACKAGES = ("torch", "transformers", "refimpl")
#: Name in a study's module that holds the rule.
RULE = "CLAIMS"
_LOOK_BACK = 30  # commits of a study's file that are searched for the oldest with the same rule
_SMALLER = "a smaller size with `--profile quick` (the ledger does not take such results)"


class ResultsError(RefimplError):
    """A results file cannot be read, or must not be appended to."""


class RuleNotCommitted(RefimplError):
    """The rule of a verdict is not in the history yet, so it could still be bent to the numbers."""


@dataclass(frozen=True)
class Record:
    """One number.

    Attributes:
        paper: slug of the paper, e.g. "eora".
        arm: what was done, e.g. "gptq-3bit+eora".
        condition: the point of a curve, or the data it was measured on, e.g. "rank=64 python".
        seed: of calibration draw or training.
        unit: document, item or image the number belongs to; "" for the arm as a whole (seconds, bytes).
        metric: e.g. "nll" (nats, summed over the unit's tokens), "tokens", "seconds", "bytes".
        value: kept to six significant digits.
        cost: what the arm spends, in bits per weight; the x axis.
    """

    paper: str
    arm: str
    condition: str
    seed: int
    unit: str
    metric: str
    value: float
    cost: float | None = None


class Results:
    """The records of one study and their header.

    Attributes:
        path: where `save` writes.
        header: paper, study, profile, rule commit, hashes of data, "functions" (module, name and hash of every function
            of the package that ran), "kinds" (for each kind of arm the cheapest job, and which functions ran), one entry
            for each run that added to the file (start, git HEAD and whether the package was modified, versions, CPU,
            threads, dtype), and "stamps" (see `refimpl.lab.study.replay`).
        claims: judged claims, filled from `refimpl.lab.study.ledger.judge`.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "demo.json"
        >>> results = Results.start(path, paper="demo", study="refimpl.lab.study.records", provisional=True)
        >>> results.add(Record("demo", "dense", "", 0, "doc 1", "nll", 12.3456789))
        >>> results.save()
        >>> again = Results.load(path)
        >>> again.has("dense"), again.values("dense", metric="nll")
        (True, {'doc 1': 12.3457})
    """

    def __init__(self, path: str | Path, header: dict[str, Any]) -> None:
        self.path = Path(path)
        self.header = header
        self.claims: list[dict[str, Any]] = []
        self._series: dict[tuple[str, str, int, str], tuple[float | None, dict[str, float]]] = {}

    @classmethod
    def start(
        cls,
        path: str | Path,
        *,
        paper: str,
        study: str,
        data: Mapping[str, str] | None = None,
        profile: str = "study",
        dtype: str = "float32",
        provisional: bool = False,
    ) -> Results:
        """Begin a results file, or go on with the one that is there.

        Args:
            path: the JSON file.
            paper: slug of the paper; every record carries it.
            study: importable name of the module that holds the rules and runs the arms.
            data: hashes of data and models by name.
            profile: "quick" or "study".
            dtype: dtype of the computation.
            provisional: go on although the rule is not committed. The file says so and the ledger refuses it.

        Raises:
            RuleNotCommitted: the claims have changes that are not committed (unless provisional).
            ResultsError: the file was made from other data or rules, for another profile, its last run computed in
                another dtype, or functions it rests on have changed since.

        Example:
            >>> results = Results.start("demo.json", paper="demo", study="refimpl.lab.study.records", provisional=True)
            >>> results.header["rule"] is None, results.header["functions"]
            (True, [])
        """
        path = Path(path)
        origin = getattr(importlib.util.find_spec(study), "origin", None)
        if origin is None:
            raise OptionError(f"study is {study!r}, which is no importable module")
        header: dict[str, Any] = {
            "format": _FORMAT,
            "paper": paper,
            "study": study,
            "profile": profile,
            "rule": None if provisional else rule_commit(study),
            "data": dict(data or {}),
            "functions": [],
            "kinds": {},
            "runs": [],
            "stamps": [],
        }
        results = cls(path, header)
        if path.exists():
            results = cls.load(path)
            results._must_match(header, dtype)
        results.header["runs"].append(environment(dtype))
        return results

    def _must_match(self, header: dict[str, Any], dtype: str) -> None:
        changed = differences(self.header["data"], header["data"])
        changed += [key for key in ("paper", "study", "profile") if self.header[key] != header[key]]
        if (self.header["rule"] is None) != (header["rule"] is None):
            changed.append("whether the rule is committed")
        elif header["rule"] and header["rule"]["hash"] != self.rule_hash():
            changed.append("the rule")  # or it could be bent to the numbers that are there
        recorded = self.header["runs"][-1]["dtype"]
        if recorded != dtype:  # rounding differs by more than some of the effects that are looked for
            changed.append(f"dtype: {recorded} then, {dtype} now")
        if changed:
            raise ResultsError(
                f"{self.path} was recorded with something else than now ({', '.join(changed)}), and rows of both must "
                "not be mixed; delete the file to start again, or write to another one (`--out`). `refimpl restamp "
                f"{self.header['paper']}` shows whether code that only looks otherwise judges as it did"
            )
        moved = self.changed_functions()
        if moved:
            kinds = [kind for kind, names in self.kinds_resting_on(moved).items() if names]
            raise ResultsError(
                f"{self.path} rests on functions that have changed since ({', '.join(moved)}; used by "
                f"{', '.join(kinds)}). `refimpl restamp {self.header['paper']}` shows whether its numbers stand; "
                "`refimpl study ... --again ARM` measures an arm anew"
            )

    def note(
        self, kind: str, place: tuple[str, str, int] | None, seconds: float, ran: Iterable[tuple[str, str]]
    ) -> None:
        """Add functions that ran to what a kind of arm rests on, and remember its cheapest job.

        Args:
            kind: of arm.
            place: arm, condition and seed of the job; None for tuning and shared work.
            seconds: the job took.
            ran: (module, name) of functions, from `refimpl.lab.study.trace.traced`.
        """
        index = {(module, name): i for i, (module, name, _) in enumerate(self.functions())}
        entry = self.header["kinds"].setdefault(kind, {"functions": []})
        used = set(entry["functions"])
        for module, name in sorted(ran):
            if (module, name) not in index:
                index[module, name] = len(self.header["functions"])
                self.header["functions"].append([module, name, _tree().digest(module, name)])
            used.add(index[module, name])
        entry["functions"] = sorted(used)
        if place is not None and not seconds >= entry.get("seconds", math.inf):
            entry |= {"arm": place[0], "condition": place[1], "seed": place[2], "seconds": round(seconds, 2)}

    def functions(self) -> list[tuple[str, str, str]]:
        """Module, name and hash of the functions that these records rest on, as the last stamp has them."""
        rows = [tuple(row) for row in self.header["functions"]]
        for stamp in self.header["stamps"]:
            for index, row in stamp["functions"].items():
                rows[int(index)] = _GONE if row is None else tuple(row)
        return rows

    def rule_hash(self) -> str:
        """Hash of the claims that judge these records, as of the last stamp that has one."""
        stamped = [stamp["compared"]["rule"] for stamp in self.header["stamps"] if "rule" in stamp["compared"]]
        return stamped[-1] if stamped else self.header["rule"]["hash"]

    def perturbed(self, rng: np.random.Generator, spread: float) -> Results:
        """A copy whose values are multiplied by random factors around 1, one for each arm and one for each value.

        Args:
            rng: draws the factors.
            spread: standard deviation of their logarithms.
        """
        copy = Results(self.path, self.header)
        arms = {arm: math.exp(rng.normal(0.0, spread)) for arm in dict.fromkeys(key[0] for key in self._series)}
        for key, (cost, values) in self._series.items():
            fixed = key[3] == "tokens"  # a size, which all arms share
            factors = (
                np.ones(len(values)) if fixed else arms[key[0]] * np.exp(rng.normal(0.0, spread / 10, len(values)))
            )
            copy._series[key] = (
                cost,
                {unit: _rounded(v * f) for (unit, v), f in zip(values.items(), factors, strict=True)},
            )
        return copy

    def changed_functions(self, now: Sources | None = None) -> list[str]:
        """Names of the functions that differ from those of the last stamp; a moved function is followed.

        Args:
            now: the sources to compare with; those that run by default.
        """
        now = now or _tree()
        rows = [row for row in self.functions() if row != _GONE]
        return [f"{module}.{name}" for module, name, digest in rows if now.locate(module, name, digest) is None]

    def kinds_resting_on(self, names: Iterable[str]) -> dict[str, list[str]]:
        """For each kind of arm, which of some functions ("module.name") it used."""
        wanted, table = set(names), [f"{module}.{name}" for module, name, _ in self.functions()]
        return {
            kind: [table[i] for i in entry["functions"] if table[i] in wanted]
            for kind, entry in self.header["kinds"].items()
        }

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Read a results file.

        Raises:
            ResultsError: it is missing, cut off, or of another format.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content["header"]["format"] != _FORMAT:
                raise ResultsError(f"{path} has format {content['header']['format']}; this version reads {_FORMAT}")
            results = cls(path, content["header"])
            results.claims = content["claims"]
            for line in content["series"]:
                key = (line["arm"], line["condition"], line["seed"], line["metric"])
                units = content["units"][line["units"]]
                results._series[key] = line["cost"], dict(zip(units, line["values"], strict=True))
        except FileNotFoundError as error:
            raise ResultsError(f"{path} does not exist; run the study first") from error
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ResultsError(f"{path} is not a results file ({error!r}); restore or delete it") from error
        return results

    def add(self, *records: Record) -> None:
        """Add records; `save` writes them.

        Raises:
            OptionError: a record of another paper, a value that is not finite, a record that is already there, or
                a second cost for one arm, condition, seed and metric.
        """
        for record in records:
            if record.paper != self.header["paper"]:
                raise OptionError(f"record.paper is {record.paper!r}; this file is about {self.header['paper']!r}")
            if not math.isfinite(record.value):
                raise OptionError(f"record.value is {record.value} in {record}; record why the arm failed instead")
            key = (record.arm, record.condition, record.seed, record.metric)
            cost = None if record.cost is None else _rounded(record.cost)
            known, values = self._series.setdefault(key, (cost, {}))
            if record.unit in values:
                raise OptionError(f"{record} is already there; ask `has` before running an arm")
            if known != cost:
                raise OptionError(f"record.cost is {cost} in {record}, but {known} in its earlier units")
            values[record.unit] = _rounded(record.value)

    def add_perplexity(
        self, arm: str, condition: str, seed: int, result: Perplexity, cost: float | None = None
    ) -> None:
        """Add a perplexity as two metrics for each document: "nll" (sum, nats) and "tokens"."""
        paper = self.header["paper"]
        self.add(*(Record(paper, arm, condition, seed, *point, cost) for point in perplexity_points(result)))

    def add_history(self, arm: str, condition: str, seed: int, history: History, every: int = 1) -> None:
        """Add the curves of a training: each unit is a step, each metric a curve.

        Args:
            arm, condition, seed: as for a record; a condition of its own (such as "training") keeps curves apart from
                what was measured afterwards.
            history: what `refimpl.core.train.loop.train` returned.
            every: means over this many steps are kept, under the last of them ("train loss", and "lr" at that step);
                the evaluations are kept all, under their own names.

        Example:
            >>> from refimpl.core.train.loop import History
            >>> steps = [{"step": s, "loss": 1.0 / s, "lr": 0.1} for s in (1, 2, 3, 4)]
            >>> results = Results("demo.json", {"paper": "demo"})
            >>> results.add_history("dense", "training", 0, History(steps), every=2)
            >>> results.values("dense", "training", metric="train loss")
            {'2': 0.75, '4': 0.291667}
        """
        paper = self.header["paper"]
        self.add(*(Record(paper, arm, condition, seed, *point) for point in curve_points(history, every)))

    def has(self, arm: str, condition: str = "", seed: int = 0) -> bool:
        """Whether an arm has been recorded, so that a resumed study can skip it."""
        return any(key[:3] == (arm, condition, seed) for key in self._series)

    def whole(self, arm: str, condition: str = "", seed: int = 0) -> dict[str, float]:
        """The numbers about an arm as a whole, by metric."""
        return {
            metric: values[""]
            for (*place, metric), (_, values) in self._series.items()
            if tuple(place) == (arm, condition, seed) and "" in values
        }

    def drop(self, arm: str) -> None:
        """Remove the records of an arm.

        Raises:
            OptionError: it has none.
        """
        keys = [key for key in self._series if key[0] == arm]
        if not keys:
            raise OptionError(
                f"{self.path.name} has no arm {arm!r}; it has {nearest(arm, dict.fromkeys(k[0] for k in self._series))}"
            )
        for key in keys:
            del self._series[key]

    def values(self, arm: str, condition: str = "", seed: int = 0, *, metric: str) -> dict[str, float]:
        """Value of each unit.

        Raises:
            OptionError: nothing of that kind was recorded.
        """
        return self._get(arm, condition, seed, metric)[1]

    def cost(self, arm: str, condition: str = "", seed: int = 0, *, metric: str) -> float | None:
        """Cost of an arm, in bits per weight."""
        return self._get(arm, condition, seed, metric)[0]

    def perplexity(self, arm: str, condition: str = "", seed: int = 0) -> Perplexity:
        """A perplexity as recorded by `add_perplexity`, one entry per document."""
        nll = self.values(arm, condition, seed, metric="nll")
        counts = np.array([self.values(arm, condition, seed, metric="tokens")[u] for u in nll], dtype=np.int64)
        sums = np.array(list(nll.values()))
        return Perplexity(math.exp(sums.sum() / counts.sum()), sums, counts, list(nll))

    def _get(self, *key: Any) -> tuple[float | None, dict[str, float]]:
        if key not in self._series:
            arm, condition, seed, metric = key
            there = dict.fromkeys(other[0] for other in self._series)
            if arm in there:
                there = dict.fromkeys(f"{other[1:]}" for other in self._series if other[0] == arm)
                raise OptionError(
                    f"{self.path.name} has no rows for condition, seed, metric = {(condition, seed, metric)} of arm "
                    f"{arm!r}; it has {', '.join(there)}"
                )
            close = difflib.get_close_matches(arm, there, n=3, cutoff=0.4)
            raise OptionError(f"{self.path.name} has no arm {arm!r}; it has {', '.join(close or there) or 'none'}")
        return self._series[key]

    def records(self) -> Iterator[Record]:
        """All records, in the order in which their series began."""
        for (arm, condition, seed, metric), (cost, values) in self._series.items():
            for unit, value in values.items():
                yield Record(self.header["paper"], arm, condition, seed, unit, metric, value, cost)

    def frame(self) -> Any:
        """The records as a pandas DataFrame, or as a list of dicts where pandas is not installed."""
        rows = [asdict(record) for record in self.records()]
        try:
            import pandas as pd  # optional: a second's import that a study does not need
        except ModuleNotFoundError:
            return rows
        return pd.DataFrame(rows, columns=list(Record.__dataclass_fields__))

    def save(self) -> None:
        """Write the file; an interruption leaves the old one untouched."""
        lists: dict[tuple[str, ...], int] = {}
        series = []
        for (arm, condition, seed, metric), (cost, values) in self._series.items():
            series.append(
                {
                    "arm": arm,
                    "condition": condition,
                    "seed": seed,
                    "metric": metric,
                    "cost": cost,
                    "units": lists.setdefault(tuple(values), len(lists)),
                    "values": list(values.values()),
                }
            )
        text = "{{\n{}\n}}\n".format(
            ",\n".join(
                [
                    f'"header": {_dumps(self.header)}',
                    f'"claims": {_lines(self.claims)}',
                    f'"units": {_lines(lists)}',
                    f'"series": {_lines(series)}',
                ]
            )
        )
        with atomic_write(self.path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def curve_points(history: History, every: int = 1) -> Iterator[tuple[str, str, float]]:
    """The curves of a training as (step, metric, value).

    Args:
        history: what `refimpl.core.train.loop.train` returned.
        every: means over this many steps are kept, under the last of them ("train loss", and "lr" at that step);
            the evaluations are kept all, under their own names.

    Example:
        >>> from refimpl.core.train.loop import History
        >>> list(curve_points(History([{"step": 1, "loss": 2.0, "lr": 0.1}])))
        [('1', 'train loss', 2.0), ('1', 'lr', 0.1)]
    """
    for start in range(0, len(history.steps) - every + 1, every):
        chunk = history.steps[start : start + every]
        step = str(int(chunk[-1]["step"]))
        yield step, "train loss", sum(entry["loss"] for entry in chunk) / every
        yield step, "lr", chunk[-1]["lr"]
    for entry in history.evaluations:
        yield from ((str(int(entry["step"])), name, value) for name, value in entry.items() if name != "step")


def perplexity_points(result: Perplexity) -> Iterator[tuple[str, str, float]]:
    """A perplexity as (document, metric, value): "nll" (sum, nats) and "tokens" of every document.

    Example:
        >>> list(perplexity_points(Perplexity(2.0, np.array([3.0, 4.0]), np.array([5, 5]), ["a", "a"])))
        [('a', 'nll', 7.0), ('a', 'tokens', 10.0)]
    """
    result = result.by_unit()
    for metric, values in (("nll", result.nll), ("tokens", result.counts)):
        for unit, value in zip(result.units, values, strict=True):
            yield unit, metric, float(value)


def _dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _lines(items: Iterable[object]) -> str:
    """A JSON list with one item a line, so that version control shows which arm was added."""
    return "[\n" + ",\n".join(map(_dumps, items)) + "\n]"


def _rounded(value: float) -> float:
    """Six significant digits; whole numbers as int, which JSON writes shorter."""
    value = float(f"{value:.6g}")
    return int(value) if value.is_integer() and abs(value) < 1e9 else value


def differences(recorded: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Names whose hashes differ, or that only one side has.

    Example:
        >>> differences({"a": "1", "b": "2"}, {"a": "1", "b": "3", "c": "4"})
        ['b', 'c']
    """
    return sorted(name for name in {*recorded, *now} if recorded.get(name) != now.get(name))


@functools.cache
def _tree() -> Sources:
    """The functions that run in this process."""
    return Sources.of_tree()


def environment(dtype: str) -> dict[str, Any]:
    """Time, commit, versions and processor of a run, as the header keeps them."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"  # refimpl imported from a checkout
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **_checkout(),
        "python": platform.python_version(),
        **versions,
        "cpu": _cpu_name(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "dtype": dtype,
    }


def _checkout() -> dict[str, Any]:
    """The commit that ran, and whether any file of the package differed from it; None outside a checkout."""
    package = Path(__file__).resolve().parents[2]
    try:
        git(package, "ls-files", "--error-unmatch", "--", __file__)  # not some repository around a wheel
        head, changes = git(package, "rev-parse", "HEAD"), git(package, "status", "--porcelain", "--", ".")
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "modified": None}
    return {"commit": head, "modified": bool(changes)}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def rule_commit(study: str) -> dict[str, str]:
    """The oldest commit since which the rule of a study is what it is: ``{"file", "commit", "committed", "hash"}``.

    The rule is ``CLAIMS`` of the module with all functions that it names: mending anything else in the file leaves it as it
    is. A verdict means something only if its rule was fixed before the numbers were seen.

    Args:
        study: importable name of the module; its file must be inside a git checkout.

    Raises:
        RuleNotCommitted: no checkout, the file is not committed, or the rule in it is not.

    Example:
        >>> try:
        ...     rule_commit("json")
        ... except RuleNotCommitted as error:
        ...     print("no CLAIMS" in str(error))
        True
    """
    origin = Path(str(getattr(importlib.util.find_spec(study), "origin", None))).resolve()
    root = origin.parents[len(study.split(".")) - (origin.name != "__init__.py")]
    path, remedy = origin.relative_to(root).as_posix(), f"commit it before the run, or run {_SMALLER}"
    now = Sources.of_tree(root)
    if not now.has(study, RULE):
        raise RuleNotCommitted(f"{study} has no {RULE}, so there is no rule; add the claims with their rules")
    digest = now.digest(study, RULE, deep=True)
    try:
        commits = git(root, "log", "-n", str(_LOOK_BACK), "--format=%H %ct", "--", path).split("\n")
        inside = git(root, "ls-files", "--full-name", "--", path)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", "") or str(error)).strip()
        raise RuleNotCommitted(
            f"{path} holds the rule and is in no git checkout ({reason}); clone the repository, or run {_SMALLER}"
        ) from error
    found = ""
    for line in filter(None, ["HEAD -1", *commits]):  # HEAD: functions of other files may be younger than this one
        commit = line.split()[0]
        before = Sources.at_commit(root, commit)
        if not before.has(study, RULE) or before.digest(study, RULE, deep=True) != digest:
            break
        found = line
    if not found:
        raise RuleNotCommitted(f"the rule in {path} has changes that are not committed; {remedy}")
    if found.startswith("HEAD"):
        found = git(root, "log", "-1", "--format=%H %ct")
    commit, seconds = found.split()
    return {"file": inside, "commit": commit, "committed": utc(int(seconds)).isoformat(), "hash": digest}


def utc(seconds: int) -> datetime:
    """Seconds since 1970 as a time with its zone.

    Example:
        >>> utc(0).isoformat()
        '1970-01-01T00:00:00+00:00'
    """
    return datetime.fromtimestamp(seconds, timezone.utc)


def git(folder: Path, *arguments: str) -> str:
    """Output of a git command run in `folder`, without the final newline.

    Example:
        >>> git(Path(), "--version").startswith("git version")
        True
    """
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8").stdout.rstrip("\n")
