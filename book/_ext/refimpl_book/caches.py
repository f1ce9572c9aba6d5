"""What the page on caches says, made from data/results/caches.json and data/cache_speed.json."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np

from refimpl.core.files.io import data_path
from refimpl.lab.measure.statistics import compare
from refimpl.lab.show import plots
from refimpl.lab.study import ledger
from refimpl.lab.study.ledger import markdown
from refimpl.lab.study.records import Results
from refimpl.markdown import table
from refimpl.studies import caches as study

Chart = Callable[[dict, str], str]

NOTHING = "*No results are recorded yet.*"
#: What the page calls a workload.
NAMES = {
    "passkeys": "facts",
    "key_values": "lines",
    "last_word": "last word",
    "second_turns": "second turn",
    "variables": "variables",
}
#: One method of each kind, for charts: eight curves can be told apart.
SHOWN = (
    "full",
    "KIVI",
    "StreamingLLM",
    "SnapKV",
    "SnapKV+question",
    "CSKV-trained",
    "CSKV-trained-4bit",
    "MKV-trained",
)
#: Budgets in the order of the tables, and how they are written.
BUDGETS = {budget: f"{100 * budget:.0f} %" for budget in study.BUDGETS}


def results() -> Results | None:
    path = data_path("results", "caches.json")
    return Results.load(path) if path.exists() else None


def methods(found: Results) -> list[str]:
    """All methods, in the order in which the study names them."""
    return [name for name in study.METHODS if name != "full" and any(cell(found, name, b) for b in BUDGETS)]


def cell(found: Results, method: str, budget: float | None) -> str:
    """The arm, if it was measured or is known to be impossible; else nothing."""
    name = study.Arm(method, budget).name
    return name if any(found.has(name, c) for c in ("task passkeys", "cannot")) else ""


def grid(found: Results, say: Callable[[str], str]) -> str:
    """A row for each method, a column for each budget; `say` writes what was measured for an arm."""
    rows = [["full", say("full"), *[""] * len(BUDGETS)]]
    for method in methods(found):
        row = [method, ""]
        for budget in BUDGETS:
            name = cell(found, method, budget)
            if not name:
                row.append("")
            elif found.has(name, "cannot"):
                (least,) = found.values(name, "cannot", metric="least bytes per token").values()
                full = found.cost("full", "wikipedia", metric="nll") or 1.0
                row.append(f"at least {100 * least / full:.0f} %")
            else:
                row.append(say(name))
        rows.append(row)
    for method in study.AS_THEY_COME:
        if found.has(method, "task passkeys"):
            rows.append([f"{method}, {share(found, method):.0f} % of the bytes", say(method), *[""] * len(BUDGETS)])
    rows = [row for row in rows if any(row[1:])]
    return table(["Kept", "As it comes", *BUDGETS.values()], rows)


def share(found: Results, arm: str) -> float:
    """Measured bytes per token in per cent of the full cache's."""
    full, own = (found.cost(name, "task passkeys", metric="free") or 0.0 for name in ("full", arm))
    return 100 * own / full


def score(found: Results, arm: str, workload: str, metric: str = "free") -> float:
    """Per cent right."""
    return 100 * float(np.mean(list(found.values(arm, f"task {workload}", metric=metric).values())))


def bytes_table(chart: Chart) -> str:
    found = results()
    if found is None:
        return NOTHING

    def say(arm: str) -> str:
        return f"{found.cost(arm, 'task passkeys', metric='free'):,.0f}"

    return grid(found, say)


def perplexity_table(chart: Chart) -> str:
    found = results()
    if found is None:
        return NOTHING
    full = found.perplexity("full", "wikipedia")
    widest = [0.0]

    def say(arm: str) -> str:
        if not found.has(arm, "wikipedia"):
            return ""
        one = found.perplexity(arm, "wikipedia")
        if arm != "full":
            gap = compare(one, full)
            widest.append(max(gap.high / gap.estimate, gap.estimate / gap.low) - 1)
        return f"{one.value:.2f}" if one.value < 1000 else f"{one.value:,.0f}"

    drawn = grid(found, say)
    typical, most = 100 * float(np.median(widest)), 100 * max(widest)
    note = f"{len(full.units)} articles. 95 % intervals of the ratio to the full cache, over articles: "
    note += f"half of them within ±{typical:.1f} %, all within ±{most:.0f} %."
    return f"{drawn}\n\n{note}"


def retrieval_table(chart: Chart) -> str:
    """Per cent right: hidden facts / lines."""
    found = results()
    if found is None:
        return NOTHING
    widest = [0.0]
    whole = study.retrieval(found, "full")

    def say(arm: str) -> str:
        if arm != "full":
            gap = study._gap(study.retrieval(found, arm), whole)
            widest.append(50 * (gap.high - gap.low))
        return f"{score(found, arm, 'passkeys'):.0f} / {score(found, arm, 'key_values'):.0f}"

    drawn = grid(found, say)
    most = max(widest)
    asked = [len(found.values("full", f"task {name}", metric="free")) for name in ("passkeys", "key_values")]
    note = f"{asked[0]} facts and {asked[1]} lines in {len(whole)} articles. 95 % intervals of the difference from the "
    note += "full cache, of "
    note += f"both together and over articles: at most ±{most:.0f} points."
    return f"{drawn}\n\n{note}"


def choosing_table(chart: Chart) -> str:
    """At the main budget, the methods that no other beats in perplexity and in retrieval at once."""
    found = results()
    if found is None:
        return NOTHING
    scored = []
    for arm in (study.Arm(method, study.MAIN).name for method in methods(found)):
        if found.has(arm, "wikipedia") and found.has(arm, "task passkeys"):
            right = score(found, arm, "passkeys") + score(found, arm, "key_values")
            scored.append((found.perplexity(arm, "wikipedia").value, -right, arm))
    best = [a for a in sorted(scored) if not any(b != a and b[0] <= a[0] and b[1] <= a[1] for b in scored)]
    rows = []
    for arm in ["full", *(arm for _, _, arm in best)]:
        ratio = found.perplexity(arm, "wikipedia").value / found.perplexity("full", "wikipedia").value
        asked = [f"{score(found, arm, workload):.0f} %" for workload in ("passkeys", "key_values")]
        rows.append([arm, f"{share(found, arm):.0f} %", f"{ratio:.2f}", *asked])
    return table(["Cache", "Bytes", "Perplexity, times the full cache's", "Facts found", "Lines found"], rows)


def workload_table(chart: Chart) -> str:
    """The workloads at the main budget, free and among candidates."""
    found = results()
    if found is None:
        return NOTHING
    arms = ["full", *(study.Arm(method, study.MAIN).name for method in study.METHODS)]
    arms = [arm for arm in dict.fromkeys(arms) if found.has(arm, "task passkeys")]
    rows = []
    for arm in arms:
        row = [arm]
        for workload in NAMES:
            if workload == "variables":
                continue
            there = found.has(arm, f"task {workload}")
            row.append(
                f"{score(found, arm, workload):.0f} / {score(found, arm, workload, 'restricted'):.0f}" if there else ""
            )
        for hops in range(3):
            there = found.has(arm, "task variables")
            values = [
                value
                for id, value in (found.values(arm, "task variables", metric="free") if there else {}).items()
                if id.startswith(f"{hops} hops/")
            ]
            row.append(f"{100 * float(np.mean(values)):.0f}" if values else "")
        rows.append(row)
    shown = [name for workload, name in NAMES.items() if workload != "variables"]
    return table(["Cache", *shown, *(f"variables, {hops} hops" for hops in range(3))], rows)


def depth_chart(chart: Chart) -> str:
    """Where in the context what was asked for stood, and how often it was found."""
    found = results()
    if found is None:
        return NOTHING
    points = []
    for method in SHOWN:
        arm = "full" if method == "full" else study.Arm(method, study.MAIN).name
        if not found.has(arm, "task passkeys"):
            continue
        right: dict[int, list[float]] = defaultdict(list)
        depths = found.values(arm, "task passkeys", metric="depth")
        for id, value in found.values(arm, "task passkeys", metric="free").items():
            right[int(6 * depths[id])].append(value)
        for place, values in sorted(right.items()):
            points.append(plots.CurvePoint(method, 100 * (place + 0.5) / 6, 100 * float(np.mean(values))))
    x = "where the fact stands in the context (%, 100 is its end)"
    drawing = plots.curve_chart(points, x, "answered right (%)").to_dict()
    return chart(drawing, drawing["description"])


def budget_points(found: Results) -> dict[str, list[plots.CurvePoint]]:
    """Perplexity and retrieval, one method of each kind, at their measured bytes."""
    full, whole = found.perplexity("full", "wikipedia"), study.retrieval(found, "full")
    total = sum(right for right, _ in whole.values()) / sum(asked for _, asked in whole.values())
    drawn: dict[str, list[plots.CurvePoint]] = {"perplexity": [], "retrieval": []}
    for method in SHOWN:
        for budget in (None,) if method == "full" else BUDGETS:
            arm = "full" if method == "full" else study.Arm(method, budget).name
            if not found.has(arm, "task passkeys"):
                continue
            x = share(found, arm)
            gap = study._gap(study.retrieval(found, arm), whole)
            low, right, high = (
                float(np.clip(100 * (total + end), 0, 100)) for end in (gap.low, gap.estimate, gap.high)
            )
            drawn["retrieval"].append(plots.CurvePoint(method, x, right, low, high))
            if found.has(arm, "wikipedia"):  # a question in the prompt changes nothing there
                ratio = compare(found.perplexity(arm, "wikipedia"), full)
                low, value, high = (full.value * end for end in (ratio.low, ratio.estimate, ratio.high))
                drawn["perplexity"].append(plots.CurvePoint(method, x, value, low, high))
    return drawn


def budget_charts(chart: Chart) -> str:
    """Perplexity and retrieval against bytes, one method of each kind."""
    found = results()
    if found is None:
        return NOTHING
    points = budget_points(found)
    x = "bytes kept (% of the full cache)"
    parts = []
    for quantity, y, log in (
        ("perplexity", "perplexity of what follows", "xy"),
        ("retrieval", "hidden facts and lines answered right (%)", "x"),
    ):
        drawing = plots.curve_chart(points[quantity], x, y, log=log).to_dict()
        parts.append(chart(drawing, drawing["description"]))
    return "\n\n".join(parts)


def position_chart(chart: Chart) -> str:
    """Perplexity by position, every query feeling the compression."""
    found = results()
    if found is None:
        return NOTHING
    points = []
    for method in SHOWN:
        arm = "full" if method == "full" else study.Arm(method, study.MAIN).name
        bins = sorted(
            {r.condition for r in found.records() if r.arm == arm and r.condition.startswith("positions ")},
            key=lambda name: int(name.split()[1].split("-")[0]),
        )
        for name in bins:
            first, last = map(int, name.removeprefix("positions ").split("-"))
            one, full = (found.perplexity(each, name) for each in (arm, "full"))
            gap = compare(one, full)
            ends = (None, None) if arm == "full" else (gap.low * full.value, gap.high * full.value)
            points.append(plots.CurvePoint(method, (first + last) / 2, one.value, *ends))
    drawing = plots.curve_chart(points, "position (tokens read before)", "perplexity", log="y").to_dict()
    return chart(drawing, drawing["description"])


def verdicts(chart: Chart) -> str:
    """The study's claims and what came of them, with whatever has changed since."""
    rows = ledger.table(paper="caches")
    return markdown(rows) if rows else NOTHING


def speed(chart: Chart) -> str:
    """Tokens per second against the length of the context, as scripts/cache_speed.py measured them."""
    path = data_path("cache_speed.json")
    if not path.exists():
        return NOTHING
    measured = json.loads(path.read_text(encoding="utf8"))
    contexts: dict[str, dict[str, Any]] = measured["contexts"]
    points, rows = [], []
    for name in next(iter(contexts.values())):
        row = [name]
        faster = ""  # the first context from which on every round was faster than with the full cache
        for context, caches in contexts.items():
            each, ratio = caches[name]["milliseconds"], caches[name]["ratio"]
            points.append(plots.CurvePoint(name, int(context), 1e3 / median(each)))
            row.append(f"{1e3 / median(each):.1f} ({median(ratio):.2f}x)")
            faster = (faster or context) if min(ratio) > 1 else ""
        rows.append([*row, faster])
    x, y = "tokens in the cache", "tokens per second"
    drawing = plots.curve_chart(points, x, y, log="x").to_dict()
    about = f"A processor with {measured['processor']}, threads: {measured['threads']}, {measured['dtype']}; "
    about += "in brackets, how many times as fast as the full cache in the same round (medians)."
    header = ["Cache", *(f"{context} tokens" for context in contexts), "faster from"]
    fits = [[name, f"{cost:.2f}"] for name, cost in measured["fits"].items() if name != "tokens"]
    return "\n\n".join(
        [
            chart(drawing, drawing["description"]),
            about,
            table(header, rows),
            "What a fit costs, in forward passes over the same tokens:",
            table(["Fit", "Forward passes"], fits),
        ]
    )


GENERATED: dict[str, Callable[[Chart], str]] = {
    "choosing_caches": choosing_table,
    "cache_bytes": bytes_table,
    "cache_perplexity": perplexity_table,
    "cache_retrieval": retrieval_table,
    "cache_workloads": workload_table,
    "cache_depth": depth_chart,
    "cache_budgets": budget_charts,
    "cache_positions": position_chart,
    "cache_speed": speed,
    "cache_verdicts": verdicts,
}
