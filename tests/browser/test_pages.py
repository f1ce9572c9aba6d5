"""Every page of the book as readers meet it: wide and narrow, light and dark, on paper, by mouse and by keyboard."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml
from playwright.sync_api import Page, expect

ROOT = Path(__file__).resolve().parents[2]
CONTRAST = (Path(__file__).parent / "contrast.js").read_text(encoding="utf8")

OVERFLOW = "() => document.scrollingElement.scrollWidth - document.scrollingElement.clientWidth"
# Which elements reach beyond the window without a scrolling box around them.
CULPRITS = """() => {
  const boxed = (e) => { for (let p = e.parentElement; p; p = p.parentElement) {
    if (["auto", "scroll", "hidden"].includes(getComputedStyle(p).overflowX)) return true; } return false; };
  return [...document.querySelectorAll("body *")]
    .filter((e) => e.getBoundingClientRect().right > innerWidth + 1 && !boxed(e))
    .slice(0, 3).map((e) => e.tagName + "." + e.className); }"""
# TeX that nobody typeset: outside code, a backslash and a word between dollar signs or \\( \\).
RAW_TEX = r"""() => [...document.querySelectorAll("article .math, article p, article td, article li")]
  .filter((e) => !e.querySelector("mjx-container") && e.matches(".math") || /\$[^$]*\\[a-z]+/.test(
    [...e.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data).join("")))
  .map((e) => e.textContent.slice(0, 60))"""


def listed(entries: list[dict]) -> list[str]:
    return [name for entry in entries for name in (entry["file"], *listed(entry.get("sections", [])))]


def contents() -> list[str]:
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf8"))
    return [toc["root"], *(name for part in toc["parts"] for name in listed(part["chapters"]))]


@pytest.mark.parametrize("name", [*contents(), "search", "genindex"])
def test_page(name: str, visit) -> None:
    seen = visit(name, color_scheme="light", reduced_motion="reduce")  # colours do not fade
    page: Page = seen.page
    seen.drawn("light")
    found = [f"TeX not typeset: {text}" for text in page.evaluate(RAW_TEX)]
    light = page.evaluate(CONTRAST)
    assert light["texts"] > 10, "the check sees no text"
    found += [f"light, contrast {text}" for text in light["low"]]

    page.emulate_media(color_scheme="dark")
    page.wait_for_function("() => document.documentElement.dataset.theme === 'dark'")
    seen.drawn("dark")
    found += [f"dark, contrast {text}" for text in page.evaluate(CONTRAST)["low"]]

    page.set_viewport_size({"width": 400, "height": 800})
    page.wait_for_timeout(300)
    seen.drawn("dark")
    if page.evaluate(OVERFLOW) > 1:
        found.append(f"at 400 px the page scrolls sideways: {page.evaluate(CULPRITS)}")
    empty = page.locator(".vega-chart:not(:has(svg))").count()
    found += [f"{empty} chart(s) not drawn"] if empty else []
    assert not seen.problems + found, "\n".join(seen.problems + found)


def test_no_link_anchor_or_image_is_broken(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    sys.modules.pop("check_book", None)
    import check_book

    assert check_book.problems(site) == []


@pytest.mark.parametrize("width", [1280, 400])
def test_first_page_says_it_in_one_screen(width: int, visit) -> None:
    seen = visit("book/welcome", width=width, height=800)
    seen.drawn()
    for part in (".welcome-what", ".vega-chart svg", ".totals", "ul.doors"):
        box = seen.page.locator(part).first.bounding_box()
        assert box is not None and box["y"] >= 0 and box["y"] + box["height"] <= 800, (part, box)
    assert seen.page.locator("ul.doors a").count() == 4
    assert not seen.problems


def test_chart_answers_the_mouse_and_follows_the_mode(visit) -> None:
    seen = visit("book/language_models", color_scheme="light")
    page: Page = seen.page
    seen.drawn("light")
    chart = page.locator(".vega-chart").first
    chart.scroll_into_view_if_needed()
    chart.locator('svg g.mark-symbol.role-mark path[aria-roledescription="point"]').first.hover()
    tooltip = page.locator("#vg-tooltip-element.visible")
    expect(tooltip).to_contain_text("perplexity")

    labels = chart.locator("svg g.role-axis-label text")
    before = labels.all_text_contents()
    box = chart.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 100)
    page.mouse.wheel(0, -300)
    page.wait_for_timeout(200)
    assert labels.all_text_contents() == before, "a wheel that passes over a chart scrolls the page"
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 100)
    page.keyboard.down("Control")
    page.mouse.wheel(0, -300)
    page.keyboard.up("Control")
    expect(labels).not_to_have_text(before)

    ink = labels.first.evaluate("e => getComputedStyle(e).fill")
    page.emulate_media(color_scheme="dark")
    seen.drawn("dark")
    assert labels.first.evaluate("e => getComputedStyle(e).fill") != ink
    assert not seen.problems


def test_charts_are_drawn_from_disk(visit, site: Path) -> None:
    seen = visit("book/classifiers", address=f"file://{site}/")
    seen.drawn()
    assert seen.page.locator(".vega-chart svg").count() == seen.page.locator(".vega-chart").count() > 1
    assert not seen.problems


def test_reader_switches_the_mode(visit) -> None:
    page: Page = visit("book/how_we_measure", color_scheme="light").page
    shown = set()
    for _ in range(3):
        page.locator(".theme-switch-button:visible").first.click()
        shown.add((page.locator("html").get_attribute("data-mode"), page.locator("html").get_attribute("data-theme")))
    assert {theme for _, theme in shown} == {"light", "dark"}, shown
    page.evaluate("localStorage.setItem('mode', 'dark'); localStorage.setItem('theme', 'dark')")
    page.reload()
    assert page.locator("html").get_attribute("data-theme") == "dark", "the choice is kept"


@pytest.mark.parametrize(
    "word, target", [("EoRA", "lowrank/eora"), ("SparseGPT", "api/methods"), ("bootstrap", "how_we_measure")]
)
@pytest.mark.parametrize("from_disk", [False, True])
def test_search_finds_a_method(word: str, target: str, from_disk: bool, visit, site: Path) -> None:
    seen = visit(f"search?q={word}", address=f"file://{site}/" if from_disk else "")
    expect(seen.page.locator(f'#search-results ul.search li a[href*="{target}"]').first).to_be_visible(timeout=10_000)
    seen.page.wait_for_timeout(300)
    assert not seen.problems


def test_search_from_the_keyboard(visit) -> None:
    seen = visit("book/lowrank")
    seen.page.keyboard.press("Control+k")
    seen.page.keyboard.type("SparseGPT")
    seen.page.keyboard.press("Enter")
    seen.page.wait_for_url(re.compile(r"search\.html\?q=SparseGPT"))
    expect(seen.page.locator("#search-results ul.search li a").first).to_be_visible(timeout=10_000)
    assert not seen.problems


@pytest.mark.parametrize("from_disk", [False, True])
def test_ledger_filter(from_disk: bool, visit, site: Path) -> None:
    seen = visit("book/ledger", address=f"file://{site}/" if from_disk else "")
    page: Page = seen.page
    claims = page.locator(".claim")
    shown = page.locator(".claim:visible")
    everything = claims.count()
    assert everything > 10 and shown.count() == everything
    page.locator('select[name="part"]').select_option("lowrank")
    lowrank = shown.count()
    assert 0 < lowrank < everything
    assert {c.get_attribute("data-part") for c in shown.all()} == {"lowrank"}
    page.locator('select[name="part"]').focus()
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")  # the first verdict
    assert {c.get_attribute("data-verdict") for c in shown.all()} == {"holds"} and shown.count() < lowrank
    expect(page.locator(".ledger-filter output")).to_have_text(f"{shown.count()} of {everything} claims")
    if not from_disk:
        assert page.url.endswith("?part=lowrank&verdict=holds")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # Show all
    expect(shown).to_have_count(everything)
    assert not seen.problems


def test_ledger_links_lead_to_filtered_claims_and_to_single_ones(visit) -> None:
    page: Page = visit("book/welcome").page
    page.locator("ul.totals a").first.click()
    page.wait_for_url(re.compile("verdict=holds"))
    expect(page.locator(".claim:visible").first).to_be_visible()
    assert {c.get_attribute("data-verdict") for c in page.locator(".claim:visible").all()} == {"holds"}
    hidden = page.locator(".claim[hidden]").first.get_attribute("id")
    page.evaluate(f"location.hash = '{hidden}'")
    expect(page.locator(f"#{hidden}")).to_be_visible()


def test_ledger_without_scripts_shows_everything(visit) -> None:
    page: Page = visit("book/ledger", java_script_enabled=False).page
    assert page.locator(".claim:visible").count() == page.locator(".claim").count() > 10
    assert not page.locator(".ledger-filter").is_visible()


@pytest.mark.parametrize("name", ["book/ledger", "notebooks/lowrank/eora", "book/language_models"])
def test_paper(name: str, visit, tmp_path: Path) -> None:
    seen = visit(name, color_scheme="dark")
    page: Page = seen.page
    seen.drawn("dark")
    pdf = page.pdf(path=tmp_path / "page.pdf", format="A4")
    assert pdf.startswith(b"%PDF") and len(re.findall(rb"/Type\s*/Page\b", pdf)) >= 2
    page.set_viewport_size({"width": 700, "height": 1000})
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    seen.drawn("light")
    for part in (
        ".bd-sidebar-primary",
        ".bd-sidebar-secondary",
        ".bd-header-article",
        ".ledger-filter",
        ".prev-next-footer",
    ):
        assert page.locator(f"{part}:visible").count() == 0, part
    assert page.evaluate(OVERFLOW) <= 1, page.evaluate(CULPRITS)
    assert page.evaluate(CONTRAST)["low"] == [], "paper is white, whatever the mode on the screen"
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("html").get_attribute("data-theme") == "dark"
    assert not seen.problems


def test_figures_and_outputs_of_a_chapter(visit) -> None:
    seen = visit("notebooks/lowrank/eora")
    seen.drawn()
    page: Page = seen.page
    assert page.locator("mjx-container").count() > 20
    pictures = page.locator("article img")
    assert pictures.count() >= 2
    for picture in pictures.all():
        picture.scroll_into_view_if_needed()
        assert picture.evaluate("e => e.complete && e.naturalWidth > 100")
        assert len(picture.get_attribute("alt") or "") > 20, picture.get_attribute("src")
    assert page.locator("article .cell_output").count() > 5
    assert page.locator("article .output.stderr, article .output.error").count() == 0
