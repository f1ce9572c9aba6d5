"""One study: arms under conditions, seeds, one function that measures an arm, and claims that are data.

A study module declares a `Study` called STUDY. Everything that is the same for all studies lives here: tuning on validation
data with a seed that is not used again, running what the results file lacks, whole seeds first, processes, saving, judging,
and noting which functions of the package ran.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm.auto import tqdm

from refimpl.core.errors import OptionError, TrainingError, nearest
from refimpl.lab import wheels
from refimpl.lab.models.dtypes import computing_in
from refimpl.lab.study.claims import Claim, judge
from refimpl.lab.study.jobs import in_processes
from refimpl.lab.study.precision import study_dtype
from refimpl.lab.study.records import Record, Results, curve_points, perplexity_points
from refimpl.lab.study.replay import restamp
from refimpl.lab.study.sources import module_hash
from refimpl.lab.study.trace import traced

if TYPE_CHECKING:
    from refimpl.core.train.loop import History
    from refimpl.lab.measure.metrics import Perplexity

#: Seed of all tuning; no arm is measured with it.
TUNING_SEED = 0
PROFILES = ("study", "quick")
_SAVE_EVERY = 5.0  # seconds: with its curves a file takes as long to write as the shortest trainings take


class Row(NamedTuple):
    """One number that `measure` yields.

    Attributes:
        metric, value: what was measured.
        unit: document, item, image or step; "" for the arm as a whole.
        suffix: extends the arm's condition, as in " curve".
        condition, arm: instead of the job's, where one job measures several.
        cost: bits per weight, or whatever the x axis of the study is.
    """

    metric: str
    value: float
    unit: str = ""
    suffix: str = ""
    condition: str | None = None
    arm: str | None = None
    cost: float | None = None


def curves(history: History, suffix: str = " curve", every: int = 1, condition: str | None = None) -> Iterator[Row]:
    """The loss, the rate and the evaluations of a training as rows whose units are steps.

    Args:
        history: what `refimpl.core.train.loop.train` returned.
        suffix, condition: where the rows go, apart from what is measured afterwards.
        every: see `refimpl.lab.study.records.curve_points`.

    Example:
        >>> from refimpl.core.train.loop import History
        >>> next(curves(History([{"step": 1, "loss": 2.0, "lr": 0.1}])))[:4]
        ('train loss', 2.0, '1', ' curve')
    """
    for step, metric, value in curve_points(history, every):
        yield Row(metric, value, step, suffix, condition)


def documents(
    found: Perplexity, cost: float | None = None, suffix: str = "", condition: str | None = None
) -> Iterator[Row]:
    """A perplexity as rows: for each document "nll" (sum, nats) and "tokens".

    Args:
        found: of windows or documents; `Results.perplexity` gives it back by document.
        cost: in bits per weight.
        suffix, condition: as in a `Row`.

    Example:
        >>> import numpy as np
        >>> from refimpl.lab.measure.metrics import Perplexity
        >>> [row[:3] for row in documents(Perplexity(2.0, np.array([6.9]), np.array([10]), ["Alan Turing"]))]
        [('nll', 6.9, 'Alan Turing'), ('tokens', 10.0, 'Alan Turing')]
    """
    for unit, metric, value in perplexity_points(found):
        yield Row(metric, value, unit, suffix, condition, cost=cost)


@dataclass(frozen=True)
class Job:
    """One call of `measure`.

    Attributes:
        study: module that declares it.
        arm: what is measured.
        seed: of calibration draw or training.
        profile: "study" or "quick".
        rate: learning rate; None where nothing is tuned.
        split: "test", or "validation" while a rate is chosen.
        dtype: of the computation: "float32" or "bfloat16".
        folder: for work that several jobs share; deleted when the study has ended.
        options: what the study's stages found out earlier, by name.
    """

    study: str
    arm: Any
    seed: int
    profile: str
    rate: float | None = None
    split: str = "test"
    dtype: str = "float32"
    folder: str = ""
    options: tuple[tuple[str, Any], ...] = ()

    def option(self, name: str) -> Any:
        """One of `options`.

        Example:
            >>> Job("demo", None, 1, "quick", options=(("share", 0.5),)).option("share")
            0.5
        """
        return dict(self.options)[name]


Stages = Generator[Sequence[Job], None, None]


@dataclass(frozen=True)
class Study:
    """The declaration of an experiment.

    Attributes:
        slug: of the paper.
        claims: judged when everything is recorded.
        measure: ``measure(job)`` yields rows; importable by name, because it runs in another process.
        arms: of a profile; frozen dataclasses with a name and a condition. One whose tuning runs are kept under another
            condition than its own gives that as ``validation``, under another name than "... at RATE" as ``trial(rate)``.
        seeds: of an arm at a profile.
        data: hashes of the data and models that are read, by name.
        rates: learning rates to choose from, or a function that gives those of an arm; () where nothing is tuned. The
            middle one serves the quick size.
        tuned_as: the arm whose rate an arm has.
        score: of the rows of a validation run, by metric; the largest wins.
        stages: where one list of jobs does not do: a generator that yields lists of jobs. Each list is measured before the
            generator goes on, so it can read the records. Default: `Run.tuning`, then every arm with every seed.
        before: shared work for jobs that are about to run, such as proxies or compressed models in ``job.folder``.
        kind: sort of an arm; the cheapest job of each kind is repeated when a record is checked. Default: the arm's name.
        workers: processes; None takes one for each core, 1 leaves all cores to each job.
        dtype: of the computation at the study's size; the record keeps it.
    """

    slug: str
    claims: Sequence[Claim]
    measure: Callable[[Job], Iterable[Row]]
    arms: Callable[[str], Sequence[Any]]
    seeds: Callable[[Any, str], Sequence[int]]
    data: Callable[[], Mapping[str, str]]
    rates: Sequence[float] | Callable[[Any], Sequence[float]] = ()
    tuned_as: Callable[[Any], Any] = lambda arm: arm
    score: Callable[[Mapping[str, float]], Any] = lambda values: -values["loss"]
    stages: Callable[[Run], Stages] | None = None
    before: Callable[[Run, Sequence[Job]], None] = lambda run, jobs: None
    kind: Callable[[Any], str] = lambda arm: arm.name
    workers: int | None = None
    dtype: str = "float32"


@dataclass
class Run:
    """One run of a study: what its stages and its shared work need.

    Attributes:
        study, module: the declaration and where it stands.
        results: what is recorded so far.
        profile, dtype, folder, workers: of the jobs.
    """

    study: Study
    module: str
    results: Results
    profile: str
    dtype: str
    folder: str
    workers: int | None
    _middle: dict[Any, float] = field(default_factory=dict)

    def job(self, arm: Any, seed: int, rate: float | None = None, split: str = "test", **options: Any) -> Job:
        """A job of this run."""
        told = tuple(sorted(options.items()))
        return Job(self.module, arm, seed, self.profile, rate, split, self.dtype, self.folder, told)

    def tuning(self, arms: Iterable[Any]) -> Generator[Sequence[Job], None, dict[Any, float | None]]:
        """Choose the learning rate of every arm: ``rates = yield from run.tuning(arms)``.

        The middle of the grid at the quick size; None for an arm that has no grid.
        """
        arms = list(arms)
        grids = {arm: self.grid(self.study.tuned_as(arm)) for arm in arms}
        if self.profile != "study":
            return {arm: grid[len(grid) // 2] if grid else None for arm, grid in grids.items()}
        own = {self.study.tuned_as(arm): grid for arm, grid in grids.items() if grid}
        if own:
            yield [self.job(arm, TUNING_SEED, rate, "validation") for arm, grid in own.items() for rate in grid]
        best = {arm: self.best(arm, grid) for arm, grid in own.items()}
        return {arm: best.get(self.study.tuned_as(arm)) for arm in arms}

    def grid(self, arm: Any) -> Sequence[float]:
        """The learning rates an arm can choose from."""
        rates = self.study.rates
        return rates(arm) if callable(rates) else rates

    def best(self, arm: Any, rates: Sequence[float]) -> float:
        """The rate with the best validation run. One whose training diverged loses."""

        def score(rate: float) -> tuple[bool, Any]:
            name, condition, seed = place(self.job(arm, TUNING_SEED, rate, "validation"))
            values = self.results.whole(name, condition, seed)
            return ("diverged" not in values, None) if "diverged" in values else (True, self.study.score(values))

        fine = [rate for rate in rates if score(rate)[0]]
        if not fine:
            raise TrainingError(f"{arm.name} diverged at every rate of {list(rates)}; add lower ones to rates=")
        return max(fine, key=lambda rate: score(rate)[1])

    def each(self, function: Callable[[Any], Any], items: Sequence[Any], what: str) -> list[Any]:
        """Shared work in processes, with a progress bar: the answers of ``function(item)``, in the order of `items`.

        Args:
            function, items: importable by name, and picklable.
            what: for the bar.
        """
        answers: dict[int, Any] = {}
        calls = [_Call(function, item, index) for index, item in enumerate(items)]
        with tqdm(total=len(calls), desc=f"{self.study.slug}: {what}", unit="item", delay=2) as bar:
            for call, (answer, ran) in in_processes(_called, calls, self.workers):
                answers[call.number] = answer
                self.results.note("shared work", None, 0.0, ran)
                bar.update()
        return [answers[index] for index in range(len(calls))]


def place(job: Job) -> tuple[str, str, int]:
    """Arm, condition and seed under which a job is recorded; a tuning run carries its rate.

    Example:
        >>> from refimpl.lab.study.claims import Place
        >>> place(Job("demo", Place("dense", "mnist"), 0, "study", 0.01, "validation"))
        ('dense at 0.01', 'mnist', 0)
    """
    arm = job.arm
    if job.split == "test":
        return arm.name, arm.condition, job.seed
    name = arm.trial(job.rate) if hasattr(arm, "trial") else f"{arm.name} at {job.rate:g}"
    return name, getattr(arm, "validation", arm.condition), job.seed


def run(module: str, out: Path, profile: str = "study", again: Sequence[str] = ()) -> Results:
    """Measure every arm that the results file lacks, and judge the claims.

    Where functions have changed since the file was recorded, `again` first shows by a replay that the other arms stand.

    Args:
        module: importable name of a module with a `Study` called STUDY.
        out: results file; an interrupted run goes on where it stopped, job by job.
        profile: "study" (recorded; the rules must be committed) or "quick".
        again: names of arms whose records are dropped first.

    Raises:
        OptionError: an unknown profile or arm.
        RuleNotCommitted, ResultsError: see `Results.start`.
        NotStanding: of the arms that are not measured again, see `refimpl.lab.study.replay.restamp`.
    """
    if profile not in PROFILES:
        raise OptionError(f"profile={profile!r}: use {nearest(profile, PROFILES)}")
    study = load(module)
    dtype = study_dtype(out, profile, study.dtype)
    with computing_in(dtype):
        if again:
            _drop(Results.load(out), again)
        return _run(study, module, Path(out), profile, str(dtype).removeprefix("torch."))


def _drop(results: Results, arms: Sequence[str]) -> None:
    """Take arms out of a results file, if the others stand."""
    for arm in arms:
        results.drop(arm)
    restamp(results, minutes=0, say=lambda words: print(f"{words} ...", file=sys.stderr), without=arms)
    results.save()


def _run(study: Study, module: str, out: Path, profile: str, dtype: str) -> Results:
    results = Results.start(
        out,
        paper=study.slug,
        study=module,
        data=dict(study.data()),
        profile=profile,
        dtype=dtype,
        provisional=profile != "study",
    )
    folder = work_folder(study, profile, results.header["data"])
    this = Run(study, module, results, profile, dtype, str(folder), 1 if profile == "quick" else study.workers)
    for number, jobs in enumerate(stages(this), start=1):
        _measure(this, jobs, f"{profile}, stage {number}")
    if profile == "study":
        results.claims = judge(results, study.claims)
    results.save()
    shutil.rmtree(folder, ignore_errors=True)
    return results


def load(module: str) -> Study:
    """The declaration in a module."""
    study = importlib.import_module(module).STUDY
    assert isinstance(study, Study), module
    return study


def stages(this: Run) -> Stages:
    """Lists of jobs, one after the other."""
    if this.study.stages is not None:
        yield from this.study.stages(this)
        return
    arms = this.study.arms(this.profile)
    rates = yield from this.tuning(arms)
    yield [this.job(arm, seed, rates[arm]) for arm in arms for seed in this.study.seeds(arm, this.profile)]


def work_folder(study: Study, profile: str, data: Mapping[str, str]) -> Path:
    """For work that jobs share. Other code or data have another folder, so nothing outdated is found there."""
    told = json.dumps([module_hash("refimpl"), dict(data)], sort_keys=True)
    return (
        wheels.cache_folder() / "studies" / study.slug / f"{profile}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"
    )


def measured(job: Job) -> tuple[list[Row], set[tuple[str, str]], float]:
    """The rows of a job, the functions that ran, and seconds. Of a tuning run that diverges the only row says so."""
    start = time.perf_counter()
    with traced() as ran:
        try:
            rows = list(load(job.study).measure(job))
        except TrainingError:
            if job.split == "test":
                raise
            rows = [Row("diverged", 1)]
    return rows, ran, time.perf_counter() - start


def records(job: Job, rows: Iterable[Row], paper: str) -> Iterator[Record]:
    """The rows of a job as records."""
    name, condition, seed = place(job)
    for row in rows:
        where = (condition if row.condition is None else row.condition) + row.suffix
        yield Record(paper, row.arm or name, where, seed, row.unit, row.metric, float(row.value), row.cost)


def _measure(this: Run, jobs: Sequence[Job], what: str) -> None:
    results, slug = this.results, this.study.slug
    todo = [job for job in dict.fromkeys(jobs) if not results.has(*place(job))]
    todo.sort(key=lambda job: job.seed)  # whole seeds first: an interrupted study is a small one
    if todo:
        this.study.before(this, todo)
    saved = time.monotonic()
    with tqdm(total=len(todo), desc=f"{slug} ({what})", unit="job") as bar:
        for job, (rows, ran, seconds) in in_processes(measured, todo, this.workers):
            results.add(*records(job, rows, slug))
            results.note(this.study.kind(job.arm), place(job) if job.split == "test" else None, seconds, ran)
            if time.monotonic() - saved > _SAVE_EVERY:
                results.save()
                saved = time.monotonic()
            bar.set_postfix_str(job.arm.name, refresh=False)
            bar.update()
    results.save()


@dataclass(frozen=True)
class _Call:
    function: Callable[[Any], Any]
    item: Any
    number: int


def _called(call: _Call) -> tuple[Any, set[tuple[str, str]]]:
    with traced() as ran:
        answer = call.function(call.item)
    return answer, ran
