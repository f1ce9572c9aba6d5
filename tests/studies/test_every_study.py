"""The same for every study: verdicts follow from records, a quick run records its arms once, a finished file has no work left."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from refimpl.cli.book import studies
from refimpl.core.files.io import data_path
from refimpl.lab import wheels
from refimpl.lab.study import study as engine
from refimpl.lab.study.claims import judge
from refimpl.lab.study.records import RULE, Results
from refimpl.papers import papers

STUDIES = studies()
#: Recorded before no seed of a tuning was used again: draw 0 chose rates on validation images and is measured on test images.
SHOWN_WITH_THE_TUNING_SEED = {"layerwise_calibration"}


def declared(slug: str) -> engine.Study:
    return engine.load(f"refimpl.studies.{slug}")


def jobs_of(slug: str, results: Results, profile: str = "study") -> list[engine.Job]:
    """All jobs of a study, as its stages make them from what is recorded."""
    run = engine.Run(declared(slug), f"refimpl.studies.{slug}", results, profile, "float32", "", 1)
    return [job for jobs in engine.stages(run) for job in jobs]


@pytest.fixture
def recorded(request: pytest.FixtureRequest) -> Results:
    return Results.load(data_path("results", f"{request.getfixturevalue('slug')}.json"))


@pytest.fixture
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache with its models and texts, without what an earlier run of a study kept."""
    cache = tmp_path / "cache"
    cache.mkdir()
    for item in wheels.cache_folder().iterdir():
        if item.is_dir() and item.name not in ("studies", "downloads"):
            (cache / item.name).symlink_to(item.resolve())
    monkeypatch.setenv("REFIMPL_CACHE", str(cache))


@pytest.mark.parametrize("slug", STUDIES)
class TestStudy:
    def test_the_stored_verdicts_follow_from_the_stored_records(self, slug: str, recorded: Results) -> None:
        assert recorded.claims, f"the study is not finished: `refimpl study {slug}` goes on where it stopped"
        assert recorded.claims == judge(recorded, declared(slug).claims)

    def test_a_finished_file_has_no_work_left(self, slug: str, recorded: Results) -> None:
        jobs = jobs_of(slug, recorded)
        missing = [engine.place(job) for job in jobs if not recorded.has(*engine.place(job))]
        assert jobs and not missing
        seen = {split: {(job.arm, job.seed) for job in jobs if job.split == split} for split in ("test", "validation")}
        if slug not in SHOWN_WITH_THE_TUNING_SEED:
            assert seen["test"].isdisjoint(seen["validation"]), "no arm is measured with the seed that chose its rate"

    def test_jobs_are_told_apart_by_the_place_of_their_records(self, slug: str, recorded: Results) -> None:
        jobs = list(dict.fromkeys(jobs_of(slug, recorded)))
        places = [engine.place(job) for job in jobs]
        assert len(set(places)) == len(places)

    def test_the_declaration_fits(self, slug: str) -> None:
        study, module = declared(slug), importlib.import_module(f"refimpl.studies.{slug}")
        assert study.slug == slug and list(study.claims) == list(getattr(module, RULE))
        assert study.dtype == Results.load(data_path("results", f"{slug}.json")).header["runs"][-1]["dtype"]
        arms = study.arms("study")
        if study.rates and study.stages is None:
            assert {study.tuned_as(arm) for arm in arms} <= set(arms)
        ids = [claim.id for claim in study.claims]
        assert len(set(ids)) == len(ids)
        for claim in study.claims:
            words = claim.words or str(claim.rule)
            assert len(words) > 40 and ("holds" in words.lower() or words.startswith("As before")), claim.id

    @pytest.mark.slow
    def test_a_quick_run_records_its_arms_once(
        self, slug: str, tmp_path: Path, private_cache: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / f"{slug}.json"
        first = engine.run(f"refimpl.studies.{slug}", out, "quick")
        assert first.header["rule"] is None and not first.claims
        jobs = [job for job in jobs_of(slug, first, "quick") if job.split == "test"]
        assert jobs and all(first.has(*engine.place(job)) for job in jobs)
        kinds = {declared(slug).kind(job.arm) for job in jobs}
        assert kinds <= set(first.header["kinds"])
        assert all(first.header["kinds"][kind]["functions"] for kind in kinds), "what ran was noted"
        monkeypatch.setattr(engine, "measured", lambda job: pytest.fail(f"{job} runs again"))
        again = engine.run(f"refimpl.studies.{slug}", out, "quick")
        assert list(again.records()) == list(first.records()) and len(again.header["runs"]) == 2


def test_every_chapter_has_a_study() -> None:
    assert {paper.slug for paper in papers() if paper.status == "chapter"} <= set(STUDIES)
