"""The tasks as files for EleutherAI's lm-eval, which then runs them without a network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from refimpl.core.errors import OptionError
from refimpl.core.files.io import atomic_write
from refimpl.lab.measure.tasks.card import chosen_items
from refimpl.lab.measure.tasks.items import Item
from refimpl.lab.measure.tasks.made import number

_YAML = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
num_fewshot: 0
output_type: {output}
doc_to_text: prompt
target_delimiter: " "
{rest}
metadata:
  version: 1
"""
_RESTRICTED = """\
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true"""
_FREE = """\
doc_to_target: continuation
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true"""


def export_lm_eval(
    folder: str | Path, tasks: Sequence[str] | Mapping[str, Sequence[Item]] | None = None, size: str = "full"
) -> list[str]:
    """Write tasks as YAML and JSON for lm-eval: ``TaskManager(include_path=folder, include_defaults=False)``.

    A task becomes two: ``refimpl_<name>_restricted`` (multiple choice, acc) and ``refimpl_<name>_free`` (loglikelihood,
    acc is whether greedy decoding writes the answer). On a tie, which bf16 logits have now and then, lm-eval takes the
    first candidate where our score is 1/k. Of a prompt longer than the model reads, both keep the end; ours keeps the
    same end for all candidates of an item.

    Args:
        folder: to write into; it is made if need be. The YAML names it by its absolute path.
        tasks, size: as for `score`.

    Returns:
        The names for ``lm_eval.simple_evaluate(tasks=...)``.

    Example:
        >>> import tempfile
        >>> export_lm_eval(tempfile.mkdtemp(), ["copying"], size="card")
        ['refimpl_copying_restricted', 'refimpl_copying_free']
    """
    folder = Path(folder).resolve()
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"folder={str(folder)!r} is a file; name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for task, found in chosen_items(tasks, size).items():
        data = folder / f"{task}.json"
        with atomic_write(data) as temporary:
            temporary.write_text("".join(json.dumps(_document(item)) + "\n" for item in found), encoding="utf-8")
        for kind, output, rest in (("restricted", "multiple_choice", _RESTRICTED), ("free", "loglikelihood", _FREE)):
            name = f"refimpl_{task}_{kind}"
            content = _YAML.format(name=name, data=json.dumps(str(data)), output=output, rest=rest)
            with atomic_write(folder / f"{name}.yaml") as temporary:
                temporary.write_text(content, encoding="utf-8")
            names.append(name)
    return names


def _document(item: Item) -> dict[str, object]:
    # The answer's place must say nothing, and a harness that breaks ties by place must not favour it.
    choices = sorted((item.answer, *item.distractors), key=lambda choice: number("place", item.id, choice))
    return {
        "id": item.id,
        "prompt": item.prompt,
        "answer": item.answer,
        "continuation": f" {item.answer}",  # lm-eval's loglikelihood joins nothing itself
        "choices": choices,
        "gold": choices.index(item.answer),
    }
