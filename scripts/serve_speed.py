"""How fast SmolLM2 decodes on this machine's processor, compressed and served, beside the dense model; prints a table.

    python scripts/serve_speed.py            # two minutes on two cores
    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 FBGEMM_ENABLE_INSTRUCTIONS=AVX2 python scripts/serve_speed.py

The second line computes as a processor without AVX-512 would. Speeds are tokens a second of processor time, so that a
busy machine spoils them less; models take turns, and a ratio is taken within a round.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections import Counter
from statistics import median
from typing import Any

import torch
from tqdm.auto import tqdm

from refimpl import RTN, Magnitude, compress, markdown, serve
from refimpl.lab import models

ROUNDS, TOKENS = 5, 8
METHODS = {
    "4 bits, groups of 32": RTN(4, 32),
    "4 bits, groups of 64, symmetric": RTN(4, 64, symmetric=True),
    "3 bits, groups of 64": RTN(3, 64),
    "8 bits, groups of 32, symmetric": RTN(8, 32, symmetric=True),
    "2:4 sparse": Magnitude("2:4"),
}


def speed(model: Any, tokens: int = TOKENS) -> float:
    """Tokens a second of processor time, each a forward pass of one row through the blocks."""
    ids = torch.zeros(1, 1, dtype=torch.long)
    with torch.inference_mode():
        model.model(ids, use_cache=False)
        start = time.process_time()
        for _ in range(tokens):
            model.model(ids, use_cache=False)
    return tokens / (time.process_time() - start)


def measure(dense: Any, method: Any, rounds: int = ROUNDS) -> tuple[dict[str, list[float]], Counter[str]]:
    """Speeds of the dense, the packed and the served model by round, and how many layers are served in which form."""
    packed = copy.deepcopy(dense)
    compress(packed, method, progress=False)
    served = copy.deepcopy(packed)
    chosen = serve(served, progress=False).chosen.values()
    arms = {"dense": dense, "packed": packed, "served": served}
    speeds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, model in arms.items():
            speeds[name].append(speed(model))
    return speeds, Counter(choice.form for choice in chosen)


def row(name: str, speeds: dict[str, list[float]], forms: Counter[str]) -> list[str]:
    """One line of the table: medians of speeds and of ratios within rounds."""
    ratios = {
        arm: median(served / other for served, other in zip(speeds["served"], speeds[arm], strict=True))
        for arm in ("dense", "packed")
    }
    cells = [f"{median(of):.1f}" for of in speeds.values()] + [f"{ratio:.2f}" for ratio in ratios.values()]
    return [name, *cells, ", ".join(f"{count} {form}" for form, count in forms.most_common())]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="what this machine is fast in by default")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--layers", type=int, help="only the first blocks of the model, to try the script")
    given = parser.parse_args()
    dtype = getattr(torch, given.dtype) if given.dtype else models.compute_dtype()
    dense = models.smollm2(dtype, layers=given.layers)
    rows = [row(name, *measure(dense, method, given.rounds)) for name, method in tqdm(METHODS.items(), unit="format")]
    print(f"{torch.backends.cpu.get_cpu_capability()}, {dtype}, {torch.get_num_threads()} threads, tokens a second:\n")
    print(
        markdown.table(
            ["compressed to", "dense", "packed", "served", "served / dense", "served / packed", "forms"],
            rows,
            align="lrrrrrl",
        )
    )


if __name__ == "__main__":
    main()
