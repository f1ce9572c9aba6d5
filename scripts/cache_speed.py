"""How fast SmolLM2 decodes on this machine's processor with each compressed cache; writes data/cache_speed.json.

Run it on a quiet machine (6 minutes on two cores, fits included):

    python scripts/cache_speed.py

Every cache reads the same article text, then decodes the same tokens that follow, one at a time. Rounds go through all
caches in turn, and a ratio is taken within its round: a machine that slows down slows all of them. The forward pass
around attention (the weights) is the same for all, so a ratio says what a reader would notice, not what a kernel gains.

Fitting is counted in processor time, in units of one forward pass over the same tokens.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DynamicCache

from refimpl import markdown
from refimpl.baselines.kvcache import KIVI, Full, SnapKV
from refimpl.core.cache import NAME, CompressedCache, cache_argument
from refimpl.core.files.io import data_path, write_json
from refimpl.core.stored import stored_dtype
from refimpl.kvcache.cskv import factorise, moments
from refimpl.kvcache.matryoshka_kv import calibrate, pca
from refimpl.lab import models
from refimpl.lab.data import text
from refimpl.studies import cskv, matryoshka_kv

LIBRARY, OURS = "full, transformers", "full"
CONTEXTS = (512, 2048, 4096)
LONGEST = 8192
ROUNDS, NEW, WARM = 5, 12, 2  # tokens timed in a round, and before the clock starts


def caches(model: Any, profile: str) -> dict[str, Callable[[int], Any]]:
    """How each cache is made for a context of so many tokens."""
    with tempfile.TemporaryDirectory() as folder:
        low_rank = cskv.fitted(model, profile, folder, "closed form")
        nested = matryoshka_kv.fitted(model, profile, folder, "PCA")
    four_bits = replace(low_rank, bits=4)
    return {
        LIBRARY: lambda length: DynamicCache(config=model.config),
        OURS: lambda length: Full().cache(model),
        "KIVI, 4 bits": lambda length: KIVI(bits=4).cache(model),
        "SnapKV, 20 %": lambda length: SnapKV().cache(model, budget=0.2, length=length),
        "CSKV, density 0.2": lambda length: low_rank.cache(model),
        "CSKV, density 0.2, 4 bits": lambda length: four_bits.cache(model),
        "MatryoshkaKV, 50 %": lambda length: nested.cache(model, budget=0.5, length=length),
    }


def filled(model: Any, make: Callable[[int], Any], ids: Tensor) -> Any:
    """A cache that has read the tokens, compressed."""
    cache = make(ids.shape[1])
    use(model, cache)
    model(ids, **cache_argument(cache), logits_to_keep=1)
    if isinstance(cache, CompressedCache):
        cache.finish()
    return cache


def use(model: Any, cache: Any) -> None:
    """The attention that a user of this cache has."""
    wanted = NAME if isinstance(cache, CompressedCache) else "sdpa"
    if model.config._attn_implementation != wanted:
        model.set_attn_implementation(wanted)


def milliseconds(model: Any, cache: Any, ids: Tensor) -> float:
    """A token, decoded with a copy of the cache."""
    use(model, cache)
    own = cache.copy() if isinstance(cache, CompressedCache) else copy.deepcopy(cache)
    start = 0.0
    for index, token in enumerate(ids[0].split(1)):
        if index == WARM:
            start = time.perf_counter()
        model(token.view(1, 1), **cache_argument(own))
    return 1e3 * (time.perf_counter() - start) / (ids.shape[1] - WARM)


def measure(model: Any, profile: str, contexts: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """Milliseconds a token and bytes as stored, by context and cache."""
    stored = stored_dtype(model).itemsize
    windows = text.evaluation("wikipedia", sequences=-(-(max(contexts) + NEW + WARM) // 512), length=512)
    ids = windows.ids.reshape(1, -1)
    found: dict[str, Any] = {}
    makers = caches(model, profile)
    for context in contexts:
        bar = tqdm(makers.items(), desc=f"{context} tokens read", unit="cache")
        ready = {name: filled(model, make, ids[:, :context]) for name, make in bar}
        times: dict[str, list[float]] = {name: [] for name in ready}
        for _ in tqdm(range(rounds), desc=f"{context} tokens decoded", unit="round"):
            for name, cache in ready.items():
                times[name].append(milliseconds(model, cache, ids[:, context : context + WARM + NEW]))
        found[str(context)] = {
            name: {
                "milliseconds": times[name],
                "ratio": [full / own for full, own in zip(times[OURS], times[name], strict=True)],
                "bytes": sum(layer.nbytes for layer in cache.layers)
                if isinstance(cache, CompressedCache)
                else stored * sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers),
            }
            for name, cache in ready.items()
        }
    return found


def fits(model: Any, sequences: int) -> dict[str, float]:
    """Processor time of each fit without training, in forward passes over the same tokens."""
    ids = text.calibration("wikipedia", sequences=sequences, length=512, seed=0).ids
    model.set_attn_implementation("sdpa")

    def seconds(run: Callable[[], Any]) -> float:
        start = time.process_time()
        run()
        return time.process_time() - start

    def forward() -> None:
        for batch in ids.split(4):
            model.model(batch, use_cache=False)

    forward()
    plain = seconds(forward)
    return {
        "tokens": float(ids.numel()),
        "CSKV, moments": seconds(lambda: moments(model, ids)) / plain,
        "CSKV, moments and closed form": seconds(lambda: factorise(moments(model, ids), "closed_form")) / plain,
        "MatryoshkaKV, PCA": seconds(lambda: pca(calibrate(model, ids))) / plain,
    }


def crossover(found: dict[str, Any], name: str) -> int | None:
    """The first context from which on a cache is faster than the full one in every round."""
    slower = [int(context) for context, rows in found.items() if min(rows[name]["ratio"]) <= 1]
    faster = [int(context) for context in found if int(context) > max(slower, default=0)]
    return min(faster, default=None)


def table(found: dict[str, Any]) -> str:
    """Tokens a second, and how many times the full cache's (the median of the rounds)."""
    rows = []
    for name in next(iter(found.values())):
        here = [row[name] for row in found.values()]
        cells = [f"{1e3 / median(row['milliseconds']):.1f}/s, {median(row['ratio']):.2f}x" for row in here]
        rows.append([name, *cells, crossover(found, name) or ""])
    header = ["cache", *(f"{context} tokens" for context in found), "faster from"]
    return markdown.table(header, rows, align="l" + "r" * (len(found) + 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--out", type=Path, default=data_path("cache_speed.json"))
    parser.add_argument("--contexts", type=int, nargs="+", default=list(CONTEXTS))
    parser.add_argument("--long", action="store_true", help=f"also {LONGEST} tokens (three minutes more)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="what this machine is fast in by default")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--layers", type=int, help="only the first blocks of the model, to try the script")
    given = parser.parse_args()
    contexts = tuple(sorted({*given.contexts, *([LONGEST] if given.long else [])}))
    dtype = getattr(torch, given.dtype) if given.dtype else models.compute_dtype()
    model = models.smollm2(dtype, layers=given.layers)
    profile = "study" if given.layers is None else "quick"
    with torch.no_grad():
        found = measure(model, profile, contexts, given.rounds)
        cost = fits(model, 8 if given.layers is None else 2)
    result = {
        "model": "SmolLM2-135M-Instruct",
        "layers": model.config.num_hidden_layers,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "contexts": found,
        "fits": cost,
    }
    write_json(given.out, result)
    print(table(found))
    for name, value in list(cost.items())[1:]:
        print(f"{name}: {value:.2f} forward passes over the same {cost['tokens']:.0f} tokens")
    print(f"Written: {given.out}")


if __name__ == "__main__":
    main()
