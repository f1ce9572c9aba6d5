"""Items: a prompt, the answer that continues it, and wrong answers in its place.

Two of the six tasks are files of text written for this book (data/tasks), two are cut from test documents into the cache, two are
drawn from word lists. None depends on a tokenizer, so every model reads the same text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from refimpl.core.errors import OptionError, nearest
from refimpl.core.files.io import data_path
from refimpl.lab import wheels
from refimpl.lab.data import text
from refimpl.lab.measure.tasks import made
from refimpl.lab.study.sources import module_hash

CARD = {"cloze": 216, "last_word": 64, "retrieval": 72, "summary": 64, "copying": 64, "code": 56}
"""Items of each task on a score card: what SmolLM2 answers within a minute on two cores."""


@dataclass(frozen=True)
class Item:
    """One question. The answer follows the prompt after one space.

    Attributes:
        id: ``topic/name#k``; the topic and ``#k`` may be missing. Items that differ only in ``#k`` are about the same
            text, so intervals resample them together.
        prompt: text up to the answer, without a space at its end.
        answer: the text that continues it.
        distractors: wrong answers.
    """

    id: str
    prompt: str
    answer: str
    distractors: tuple[str, ...]

    @property
    def topic(self) -> str:
        """The part of the task it belongs to (a subject, a length), "" if there is none."""
        return topic(self.id)

    @property
    def chance(self) -> float:
        """Share of right choices among the candidates by guessing."""
        return 1 / (1 + len(self.distractors))


def topic(id: str) -> str:
    """The topic in an item's id.

    Example:
        >>> topic("chemistry/gold"), topic("gold")
        ('chemistry', '')
    """
    return id.partition("/")[0] if "/" in id else ""


def group(id: str) -> str:
    """The group of items that share a text; the unit that intervals resample.

    Example:
        >>> group("ships/marlen#2"), group("ships/marlen")
        ('ships/marlen', 'ships/marlen')
    """
    return id.rpartition("#")[0] if "#" in id else id


def items(task: str, size: str = "full") -> list[Item]:
    """The items of one task.

    Args:
        task: ``"cloze"``, ``"last_word"``, ``"retrieval"``, ``"summary"``, ``"copying"`` or ``"code"``.
        size: ``"full"`` (all), or ``"card"``: a fixed part of them, as many from each topic as it has them.

    Raises:
        OptionError: unknown task or size.

    Example:
        >>> first = items("copying", "card")[0]
        >>> first.answer in first.prompt.split(), first.chance
        (True, 0.25)
    """
    if task not in TASKS:
        raise OptionError(f"task={task!r} must be {nearest(str(task), TASKS)}")
    if size not in ("card", "full"):
        raise OptionError(f"size={size!r} must be {nearest(str(size), ('card', 'full'))}")
    found = _SOURCES[task]()
    return found if size == "full" else _part(found, CARD[task])


def _part(found: Sequence[Item], count: int) -> list[Item]:
    """`count` items, one from each topic in turn; within a topic in the order of a hash."""
    waiting: dict[str, list[Item]] = {}
    for item in sorted(found, key=lambda item: made.number("card", item.id)):
        waiting.setdefault(item.topic, []).append(item)
    queues = [waiting[name] for name in sorted(waiting)]
    chosen: list[Item] = []
    for turn in range(max(map(len, queues))):
        chosen += [queue[turn] for queue in queues if turn < len(queue)]
    ids = {item.id for item in chosen[:count]}
    return [item for item in found if item.id in ids]


_FIELDS = {"id", "prompt", "answer", "distractors", "topic"}


def load(path: str | Path) -> list[Item]:
    """Read your own task: a text file with one JSON object a line.

    ``{"id": "gold", "prompt": "The chemical symbol for gold is", "answer": "Au", "distractors": ["Ag", "Fe"],
    "topic": "chemistry"}``; the topic may be left out. Empty lines are skipped.

    Raises:
        OptionError: no such file, or a line that is not of this form; the message names file and line.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "mine.jsonl"
        >>> _ = file.write_text('{"id": "1", "prompt": "Snow is", "answer": "white", "distractors": ["red"]}')
        >>> load(file)[0].answer
        'white'
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(
            f"path={str(path)!r} cannot be read ({error}); give a UTF-8 file with one JSON object a line"
        ) from error
    found: dict[str, Item] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            item = _parse(json.loads(line))
            if item.id in found:
                raise ValueError(f"the id {item.id!r} is taken by an earlier line")
        except ValueError as error:  # json's own error is one too
            raise OptionError(f"{path}, line {number}: {error}") from error
        found[item.id] = item
    if not found:
        raise OptionError(f"path={str(path)!r} holds no items; give one JSON object a line")
    return list(found.values())


def _parse(fields: object) -> Item:
    if not isinstance(fields, dict):
        raise ValueError(f"{fields!r} is no JSON object")
    missing = sorted(_FIELDS - {"topic"} - set(fields))
    if missing:
        raise ValueError(f"lacks {', '.join(map(repr, missing))}")
    unknown = sorted(set(fields) - _FIELDS)
    if unknown:
        raise ValueError(f"has the unknown field {unknown[0]!r}; it must be {nearest(unknown[0], sorted(_FIELDS))}")
    for name in ("id", "prompt", "answer", "topic"):
        value = fields.get(name, "some")
        if not isinstance(value, str) or not value:
            raise ValueError(f"{name} is {value!r}; it must be a string that is not empty")
    distractors = fields["distractors"]
    if not isinstance(distractors, list) or not distractors or not all(isinstance(d, str) for d in distractors):
        raise ValueError(f"distractors is {distractors!r}; it must be a list of one string or more")
    if fields["prompt"] != fields["prompt"].rstrip():
        raise ValueError("prompt ends with a space; leave it out, the answer is joined with one")
    for candidate in (fields["answer"], *distractors):
        if not candidate or candidate != candidate.strip():
            raise ValueError(f"the candidate {candidate!r} is empty or has a space at an end")
    if len({fields["answer"], *distractors}) <= len(distractors):
        raise ValueError("the answer and the distractors are not all different")
    name, about = fields["id"], fields.get("topic")
    full = f"{about}/{name}" if about and topic(name) != about else name
    return Item(full, fields["prompt"], fields["answer"], tuple(distractors))


def dump(found: Iterable[Item], path: Path) -> None:
    """Write items in the form that `load` reads."""
    with path.open("w", encoding="utf-8") as sink:
        for item in found:
            fields = {
                "id": item.id,
                "prompt": item.prompt,
                "answer": item.answer,
                "distractors": list(item.distractors),
            }
            sink.write(json.dumps(fields, ensure_ascii=False) + "\n")


def items_hash(found: Iterable[Item]) -> str:
    """SHA-256 of items: id, prompt and candidates.

    Example:
        >>> len(items_hash(items("retrieval", "card")))
        64
    """
    digest = hashlib.sha256()
    for item in found:
        digest.update(json.dumps([item.id, item.prompt, item.answer, *item.distractors]).encode())
    return digest.hexdigest()


def _shipped(name: str) -> Callable[[], list[Item]]:
    return lambda: load(data_path("tasks", f"{name}.jsonl"))


def _drawn(make: Callable[[], list[made.Draft]]) -> Callable[[], list[Item]]:
    return lambda: [Item(*draft) for draft in make()]


def _cut(task: str, corpus: str, make: Callable[[list[text.Document]], list[made.Draft]]) -> Callable[[], list[Item]]:
    """Items cut from the test documents of a corpus, kept in the cache."""

    def source() -> list[Item]:
        decisive = text.corpus_hash(corpus) + module_hash(made.__name__)
        key = hashlib.sha256(decisive.encode()).hexdigest()[:12]

        def build(staging: Path) -> None:
            drafts = make(text.documents(corpus, "test"))
            dump([Item(*draft) for draft in drafts], staging / "items.jsonl")

        return load(wheels.build_folder(f"tasks-{task}-{key}", build) / "items.jsonl")

    return source


_SOURCES: dict[str, Callable[[], list[Item]]] = {
    "cloze": _shipped("cloze"),
    "last_word": _cut("last_word", "wikipedia", made.last_word),
    "retrieval": _drawn(made.retrieval),
    "summary": _shipped("summary"),
    "copying": _drawn(made.copying),
    "code": _cut("code", "python", made.code),
}
TASKS = tuple(_SOURCES)
"""Names of the tasks, in the order of a score card."""
