"""Texts to calibrate and to measure on, split by document, and the windows of tokens cut from them.

Four corpora are always there, without a download: ``wikipedia`` (long English articles, CC BY-SA) and ``news``
(300 short articles, for evaluation only) come with gensim's test data; ``python`` (source files) and ``prose``
(documentation) are the standard library of the interpreter that runs, so they differ between Python versions:
keep `corpus_hash` beside a number.

A document belongs to one split, chosen by a hash of its normalised text. Of documents that share many phrases
only one is kept, so what is measured was not seen in calibration under another title. Documentation taken from
a module lies in the split of that module's source, so ``python`` and ``prose`` can be used together.
"""

from __future__ import annotations

import ast
import bz2
import codecs
import functools
import hashlib
import json
import re
import sys
import sysconfig
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from refimpl.core.arguments import checked, shown
from refimpl.core.errors import CalibrationError, OptionError, nearest, require
from refimpl.lab import wheels

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CORPORA = ("wikipedia", "news", "python", "prose")
SPLITS = ("calibration", "validation", "test")

SHARED_PHRASES = 0.2
"""Two documents are near-duplicates if the other has more than this share of the smaller's five-word phrases."""


# what Windows and spreadsheets put first; that of UTF-32 begins like that of UTF-16
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


@dataclass(frozen=True)
class Document:
    """One article, source file or page of documentation; `id` is unique over all corpora."""

    id: str
    title: str
    text: str


@dataclass(frozen=True)
class TokenSet:
    """Windows of tokens, none of which crosses from one document into another.

    Attributes:
        ids: int64, ``[windows, length]``.
        units: the document each window is from; what a paired bootstrap resamples.
        corpus: where the documents are from.
        split: ``"calibration"``, ``"validation"``, ``"test"``, or ``"given"`` for `from_texts`.
    """

    ids: Tensor
    units: list[str]
    corpus: str
    split: str


@checked()
def documents(corpus: str, split: str) -> list[Document]:
    """All documents of one split, in the corpus's order.

    Args:
        corpus: ``"wikipedia"``, ``"news"``, ``"python"`` or ``"prose"``.
        split: ``"calibration"``, ``"validation"`` or ``"test"``.

    Raises:
        OptionError: unknown corpus or split.
        CalibrationError: the calibration split of ``news``, which is for evaluation only.

    Example:
        >>> len(documents("wikipedia", "test")) > 20
        True
    """
    _check_names(corpus, split)
    if corpus == "news" and split == "calibration":
        raise CalibrationError(
            "corpus='news' has no calibration split: its 300 short articles are for evaluation only; calibrate "
            "on 'wikipedia', 'python', 'prose' or your own text (`from_texts`)"
        )
    return list(_read(corpus)[split])


@checked("sequences", "length")
def calibration(
    corpus: str, tokenizer: PreTrainedTokenizerBase | None = None, sequences: int = 32, length: int = 512, seed: int = 0
) -> TokenSet:
    """Windows to calibrate on, drawn from the calibration split.

    Each window lies inside one document and no two overlap. They are spread over the documents: no document gives
    a second window before every one that is long enough gave its first. What starts a window: the BOS token, if
    this tokenizer puts it before every text (Llama, Gemma), and nothing for SmolLM2. After that comes the text,
    usually from the middle of a document; no special token occurs inside it.

    Args:
        corpus: see `documents`; not ``"news"``.
        tokenizer: SmolLM2's if None.
        sequences: number of windows.
        length: tokens in each.
        seed: another seed draws other windows.

    Raises:
        CalibrationError: fewer windows exist than asked for; the message says how many there are.

    Example:
        >>> tuple(calibration("wikipedia", sequences=4, length=64).ids.shape)
        (4, 64)
    """
    found = documents(corpus, "calibration")
    return _windows(found, tokenizer, sequences, length, corpus, "calibration", key=f"calibration {seed}")


@checked("sequences", "length")
def evaluation(
    corpus: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    sequences: int = 32,
    length: int = 512,
    split: str = "test",
) -> TokenSet:
    """Windows to measure on: always the same, from as many documents as possible.

    Windows are cut as in `calibration`, where it is also said what starts one.

    Args:
        corpus: see `documents`. Articles of ``"news"`` are short: use ``length=256`` or less.
        tokenizer: SmolLM2's if None.
        sequences: number of windows.
        length: tokens in each.
        split: ``"test"`` for what is reported, ``"validation"`` for what is chosen by.

    Raises:
        CalibrationError: fewer windows exist than asked for; the message says how many there are.

    Example:
        >>> tokens = evaluation("news", sequences=8, length=128)
        >>> len(set(tokens.units))
        8
    """
    if split == "calibration":
        raise OptionError("split='calibration' cannot be measured on: use 'test' or 'validation'")
    return _windows(documents(corpus, split), tokenizer, sequences, length, corpus, split, key="evaluation")


@checked()
def from_texts(
    texts: Sequence[str] | str | Path, tokenizer: PreTrainedTokenizerBase | None = None, length: int = 512
) -> TokenSet:
    """All whole windows of your own texts.

    Args:
        texts: a list of strings, a text file, or a folder. Files are UTF-8, or have the mark of UTF-16 or UTF-32 (byte order
            mark); of a folder hidden files are left out, and so are those that are no text, with a line on stderr that
            counts them.
        tokenizer: SmolLM2's if None. For what starts a window see `calibration`.
        length: tokens in each window; the rest of a text that fills no window is left out.

    Raises:
        CalibrationError: nothing there, or no text is long enough for one window.
        OptionError: a file that is no text in these encodings, with the place of the first byte that is wrong, or that
            cannot be read.

    Example:
        >>> tokens = from_texts(["one two three " * 20], length=16)
        >>> tokens.ids.shape[1], tokens.units[0]
        (16, 'text 0')
    """
    if isinstance(texts, (str, Path)):
        found, corpus = list(_local(Path(texts).expanduser())), str(texts)
    else:
        found, corpus = [Document(f"text {i}", "", text) for i, text in enumerate(texts)], "given texts"
    if not any(document.text.strip() for document in found):
        raise CalibrationError(f"texts={corpus!r} holds no text: give at least {length} tokens in one document")
    return _windows(found, tokenizer, None, length, corpus, "given", key="given")


@checked()
def corpus_hash(corpus: str) -> str:
    """SHA-256 of the parsed and split documents, for the header of result files.

    Example:
        >>> len(corpus_hash("wikipedia"))
        64
    """
    _check_names(corpus, "test")
    return wheels.sha256(prepare(corpus))


def prepare(corpus: str) -> Path:
    """Parse a corpus into the cache if it is not there, and return its JSONL file.

    A line holds id, title, text and split of one document.

    Example:
        >>> prepare("news").name
        'documents.jsonl'
    """
    _check_names(corpus, "test")
    # The key holds everything that decides the result: this file, and what is parsed.
    if corpus in ("python", "prose"):
        source = sys.version + sysconfig.get_path("stdlib")
    else:
        source = require("gensim", "lab").__version__
    key = hashlib.sha256(Path(__file__).read_bytes() + source.encode()).hexdigest()[:12]

    def build(staging: Path) -> None:
        tqdm = require("tqdm", "lab").tqdm
        parsed = tqdm(_PARSERS[corpus](), desc=f"Parsing {corpus} (once)", unit=" documents", delay=2, leave=False)
        with (staging / "documents.jsonl").open("w", encoding="utf-8") as sink:
            for split, document in _split(parsed, corpus):
                record = {"id": document.id, "title": document.title, "text": document.text, "split": split}
                sink.write(json.dumps(record, ensure_ascii=False) + "\n")

    return wheels.build_folder(f"text-{corpus}-{key}", build) / "documents.jsonl"


def normalised(text: str) -> str:
    """A text reduced to what two spellings of it share: words only, lower case, compatibility forms folded.

    Example:
        >>> normalised("The  Café, (again)!")
        'the café again'
    """
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).lower()))


def phrases(text: str) -> set[tuple[str, ...]]:
    """All runs of five consecutive words of the normalised text.

    Example:
        >>> sorted(phrases("a b c d e f"))
        [('a', 'b', 'c', 'd', 'e'), ('b', 'c', 'd', 'e', 'f')]
    """
    words = normalised(text).split()
    return set(zip(*(words[i:] for i in range(5)), strict=False))


# --- windows ---


def _windows(
    found: list[Document],
    tokenizer: PreTrainedTokenizerBase | None,
    sequences: int | None,
    length: int,
    corpus: str,
    split: str,
    key: str,
) -> TokenSet:
    """Cut windows round by round over the documents; `sequences` None takes all of them, in order."""
    for name, value, least in (("sequences", sequences, 1), ("length", length, 2)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise CalibrationError(f"{name}={value!r} must be an integer of at least {least}")
    if tokenizer is None:
        from refimpl.lab import models

        tokenizer = models.tokenizer()
    if not hasattr(tokenizer, "bos_token_id"):
        raise OptionError(f"tokenizer={shown(tokenizer)}: pass one of transformers, or None for SmolLM2's")
    prefix = _prefix(tokenizer)
    room = length - len(prefix)
    if sequences is not None:
        found = sorted(found, key=lambda document: _number(key, document.id))
    # Documents are tokenised when their first window is wanted: most calls touch a fraction of the corpus.
    waiting: list[tuple[Document, list[list[int]]]] = []
    rows: list[list[int]] = []
    units: list[str] = []
    for document in found:
        if sequences is not None and len(rows) == sequences:
            break
        ids = tokenizer(document.text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
        slots = len(ids) // room
        if not slots:
            continue
        if sequences is None:
            starts = [room * slot for slot in range(slots)]
        else:
            offset = _number(key, document.id, "offset") % (len(ids) - slots * room + 1)
            order = sorted(range(slots), key=lambda slot: _number(key, document.id, slot))
            starts = [offset + room * slot for slot in order]
        cut = [prefix + ids[start : start + room] for start in starts]
        take = len(cut) if sequences is None else 1
        rows += cut[:take]
        units += [document.id] * take
        waiting.append((document, cut[take:]))
    while sequences is not None and len(rows) < sequences and any(rest for _, rest in waiting):
        for document, rest in waiting:
            if rest and len(rows) < sequences:
                rows.append(rest.pop(0))
                units.append(document.id)
    if not rows or (sequences is not None and len(rows) < sequences):
        asked = f"sequences={sequences} windows" if sequences is not None else "one window"
        raise CalibrationError(
            f"corpus {corpus!r}, split {split!r}: asked for {asked} of length={length} tokens, {len(rows)} "
            f"available in {len(found)} documents; ask for a shorter length{' or fewer sequences' if rows else ''}"
        )
    return TokenSet(torch.tensor(rows, dtype=torch.long), units, corpus, split)


def _prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The BOS token, if this tokenizer puts it before every text: such models are far worse without it."""
    with_special, plain = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    begins = bool(with_special) and with_special[0] == tokenizer.bos_token_id and with_special[:1] != plain[:1]
    return with_special[:1] if begins else []


def _number(*parts: object) -> int:
    """A number that depends on the parts only: the same in every process, Python version and machine."""
    return int.from_bytes(hashlib.sha256(" ".join(map(str, parts)).encode()).digest()[:8], "big")


def _local(path: Path) -> Iterator[Document]:
    if path.is_file():
        yield Document(path.name, path.name, _decoded(path))
    elif path.is_dir():
        skipped = []
        for file in sorted(path.rglob("*")):
            name = file.relative_to(path).as_posix()
            if not file.is_file() or any(part.startswith(".") for part in Path(name).parts):
                continue
            try:
                yield Document(name, name, _decoded(file))
            except _NoText as error:  # a picture or a binary beside the texts
                skipped.append(str(error))
        if skipped:
            files = "1 file was" if len(skipped) == 1 else f"{len(skipped)} files were"
            print(f"texts={str(path)!r}: {files} skipped; the first: {skipped[0]}", file=sys.stderr)
    else:
        raise CalibrationError(f"texts={str(path)!r} is no file or folder; for literal text pass a list of strings")


class _NoText(OptionError):
    """A file that is no text in an encoding it declares, or in UTF-8."""


def _decoded(file: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 if it begins with their mark; the mark is left out."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise OptionError(
            f"{file} cannot be read ({error.strerror}); make it readable, or name another file"
        ) from error
    mark, encoding = next(((mark, name) for mark, name in _MARKS if data.startswith(mark)), (b"", "utf-8"))
    try:
        text = data[len(mark) :].decode(encoding)
        place = len(text[: text.index("\0")].encode(encoding)) if "\0" in text else None
        reason = "is 0, which no text holds"
    except UnicodeDecodeError as error:
        place, reason = error.start, f"is 0x{data[len(mark) + error.start]:02x} ({error.reason})"
    if place is not None:
        raise _NoText(
            f"{file}: byte {len(mark) + place} {reason}, so it is no text in {encoding.upper()}; convert it to UTF-8, as "
            "with iconv, or leave it out"
        )
    return text


# --- corpora ---


def _check_names(corpus: str, split: str) -> None:
    if corpus not in CORPORA:
        raise OptionError(f"corpus={corpus!r} must be {nearest(str(corpus), CORPORA)}")
    if split not in SPLITS:
        raise OptionError(f"split={split!r} must be {nearest(str(split), SPLITS)}")


@functools.cache
def _read(corpus: str) -> dict[str, list[Document]]:
    splits: dict[str, list[Document]] = {split: [] for split in SPLITS}
    with prepare(corpus).open(encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            splits[record.pop("split")].append(Document(**record))
    return splits


def _split(parsed: Iterable[tuple[str, Document]], corpus: str) -> list[tuple[str, Document]]:
    """Give each document its split and drop near-duplicates, the earlier and more precious split first.

    `parsed` yields the text that decides the split, and the document.
    """
    # News has no calibration split; its articles go to the other two.
    bounds = (0.0, 1 / 3) if corpus == "news" else (0.4, 0.6)
    placed = []
    for decisive, document in parsed:
        fraction = _number(normalised(decisive)) / 2**64
        split = SPLITS[sum(fraction >= bound for bound in bounds)]
        placed.append((split, document))
    owners: dict[tuple[str, ...], list[int]] = defaultdict(list)
    sizes: list[int] = []
    kept: set[str] = set()
    for _, document in sorted(placed, key=lambda pair: -SPLITS.index(pair[0])):
        own = phrases(document.text)
        shared: dict[int, int] = defaultdict(int)
        for phrase in own:
            for other in owners.get(phrase, ()):
                shared[other] += 1
        if any(count > SHARED_PHRASES * min(len(own), sizes[other]) for other, count in shared.items()):
            continue
        for phrase in own:
            owners[phrase].append(len(sizes))
        sizes.append(len(own))
        kept.add(document.id)
    return [(split, document) for split, document in placed if document.id in kept]


def _gensim_file(name: str) -> Path:
    require("gensim", "lab")
    from gensim.test.utils import datapath

    path = Path(datapath(name))
    if not path.is_file():
        raise CalibrationError(f"{path} is missing: this gensim came without its test data; reinstall it from a wheel")
    return path


def _wikipedia() -> Iterator[tuple[str, Document]]:
    path = _gensim_file("enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2")
    from gensim.corpora.wikicorpus import extract_pages

    with bz2.open(path) as stream:
        for title, markup, _ in extract_pages(stream, filter_namespaces=("0",)):
            if markup.lstrip().lower().startswith("#redirect") or title.startswith("List of"):
                continue
            text = clean_wiki(markup)
            if len(text) > 1000:  # what is shorter is a page of links to other pages
                yield text, Document(f"wikipedia/{title}", title, text)


_LEFT_OUT = {
    *("references", "external links", "see also", "further reading", "notes", "bibliography", "footnotes", "sources"),
    *("notes and references", "references and notes", "citations", "works cited", "selected works", "books"),
    *("filmography", "discography", "selected bibliography", "works", "gallery"),
}


def clean_wiki(markup: str) -> str:
    """The prose of a wiki page: paragraphs and headings, without lists, tables, captions and references.

    Example:
        >>> page = "'''Ada''' is a [[town]] of {{convert|3|km2}} in the north of the country" + ", on a river" * 5
        >>> page += "."
        >>> clean_wiki(page + "\\n* a list item")[:59]
        'Ada is a town of 3 km2 in the north of the country, on a ri'
    """
    from gensim.corpora.wikicorpus import filter_wiki

    # Templates and captions that gensim's filter would turn into holes or glue into sentences.
    for pattern, replacement in (
        (r"\[\[(?:File|Image):(?:[^\[\]]|\[\[[^\[\]]*\]\]|\[[^\[\]]*\])*\]\]", ""),
        (r"<gallery.*?</gallery>", ""),
        (r"\{\{(?:convert|cvt)\|([^|{}]+)\|(to|and|-|–|by)\|([^|{}]+)\|([^|{}]+)[^{}]*\}\}", r"\1 \2 \3 \4"),
        (r"\{\{(?:convert|cvt)\|([^|{}]+)\|([^|{}]+)[^{}]*\}\}", r"\1 \2"),
        (r"\{\{(?:lang|transl)\|[^|{}]+\|(?:[^|{}]+\|)?([^|{}]+)\}\}", r"\1"),
        (r"\{\{(?:lang-\w+|nowrap|small|smaller|angbr|vanchor)\|([^|{}]+)[^{}]*\}\}", r"\1"),
        (r"\{\{(?:quote|cquote|blockquote)\|(?:1=|text=)?([^|{}]+)[^{}]*\}\}", r"\n\1\n"),
        (r"\{\{as of\|(\d+)[^{}]*\}\}", r"As of \1"),
        (r"\{\{(?:nihongo)\|([^|{}]+)[^{}]*\}\}", r"\1"),
        (r"\{\{(?:circa|c\.)\|([^|{}]+)[^{}]*\}\}", r"c. \1"),
        (r"\{\{(?:spaced )?(?:ndash|snd|spnd)\}\}", " – "),
        (r"<sub>(.*?)</sub>|<sup>(.*?)</sup>", r"\1\2"),
    ):
        markup = re.sub(pattern, replacement, markup, flags=re.IGNORECASE | re.DOTALL)
    text = unicodedata.normalize("NFC", filter_wiki(markup)).replace("\xa0", " ")
    text = re.sub(r"'{2,}", "", text)
    for pattern, replacement in (
        (r"\[https?://\S+ ([^\]]*)\]", r"\1"),
        (r"</?[a-zA-Z][^<>\n]*>|__[A-Z]+__", ""),
        (r"\(\s*[,;:–-]+\s*", "("),
        (r"\s*[,;:–-]+\s*\)", ")"),
        (r"\(\s*\)|\"\s*\"|\[\s*\]", ""),
        (r"[ \t]+", " "),
        (r" ([,.;:!?)])", r"\1"),
        (r"\( ", "("),
        (r"([,;:])(?:[,;:])+", r"\1"),
    ):
        text = re.sub(pattern, replacement, text)
    lines: list[str] = []
    skipping = 0
    for line in map(str.strip, text.splitlines()):
        heading = re.fullmatch(r"(={2,6})\s*(.+?)\s*={2,6}", line)
        if heading:
            depth = len(heading[1])
            if skipping and depth > skipping:
                continue
            skipping = depth if heading[2].lower() in _LEFT_OUT else 0
            if lines and lines[-1].startswith("\n"):  # the section before it had no prose
                lines.pop()
            if not skipping:
                lines.append("\n" + heading[2])
        elif not skipping and _is_prose(line):
            lines.append(line)
    if lines and lines[-1].startswith("\n"):
        lines.pop()
    return "\n".join(lines)


def _is_prose(line: str) -> bool:
    """A whole sentence or more: not a list item, a table row, a caption or what is left of a formula."""
    if len(line) < 100 or line[0] in "*#:;|!{}=<" or not re.search(r"[.!?][\"'”’)]*$", line):
        return False
    if re.search(r"\{\||\|\||\|-|[{}]{2}|\[\[|\]\]|\\[a-z]+", line):
        return False
    return sum(char.isalpha() or char.isspace() for char in line) > 0.85 * len(line)


def _news() -> Iterator[tuple[str, Document]]:
    for number, line in enumerate(_gensim_file("lee_background.cor").read_text(encoding="utf-8").splitlines()):
        text = line.strip()
        if text:
            yield text, Document(f"news/{number:03d}", " ".join(text.split()[:8]), text)


_NOT_SOURCE = {
    *("test", "tests", "idlelib", "idle_test", "lib2to3", "site-packages", "dist-packages", "pydoc_data", "encodings"),
    *("turtledemo", "ensurepip", "lib-dynload", "__pycache__", "__phello__"),
}


def _modules() -> Iterator[tuple[str, str]]:
    """Path below the standard library and text of each source file that a person wrote."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if any(part in _NOT_SOURCE or part.startswith(("config-", "_sysconfigdata")) for part in name.parts):
            continue
        try:
            source = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        head = source[:1000].lower()
        if len(source) < 1000 or "generated by" in head or "automatically generated" in head:
            continue
        if sum(char.isalpha() or char.isspace() for char in source) > 0.7 * len(source):  # tables are digits and commas
            yield name.as_posix(), source


def _python() -> Iterator[tuple[str, Document]]:
    for name, source in _modules():
        yield source, Document(f"python/{name}", name, source)


def _prose() -> Iterator[tuple[str, Document]]:
    # The language reference repeats itself: a paragraph stays in the shortest topic that has it.
    seen: set[str] = set()

    def fresh(text: str) -> str:
        paragraphs = []
        for paragraph in _paragraphs(text):
            if normalised(paragraph) not in seen:
                seen.add(normalised(paragraph))
                paragraphs.append(paragraph)
        return "\n\n".join(paragraphs)

    try:
        from pydoc_data import topics
    except ImportError:  # some distributions package the topics apart
        raise CalibrationError(
            "corpus='prose': this Python came without pydoc_data, the text of help(); install the full standard library"
        ) from None
    for name, topic in sorted(topics.topics.items(), key=lambda item: (len(item[1]), item[0])):
        text = fresh(topic)
        if len(text) > 500:
            yield text, Document(f"prose/topic {name}", name, text)
    for name, source in _modules():
        try:
            tree = ast.parse(source)
        except SyntaxError:
            continue
        places = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        strings = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, places)]
        text = fresh("\n\n".join(filter(None, strings)))
        if len(text) > 500:
            yield source, Document(f"prose/{name}", name, text)


def _paragraphs(text: str) -> Iterator[str]:
    """Paragraphs of documentation that are sentences, each unwrapped into one line; no code, grammar, tables."""
    for block in re.split(r"\n\s*\n", text):
        line = " ".join(block.split()).removeprefix("* ")
        if len(line) < 80 or not re.search(r"[.!?:][\"'”’)]*$", line) or re.search(r">>>|::=|\.\. |[*=~-]{4}", line):
            continue
        if sum(char.isalpha() or char.isspace() for char in line) > 0.88 * len(line):
            yield re.sub(r"- (?=[a-z])", "-", line)  # "pseudo-\ncompiled" was broken at the hyphen


_PARSERS: dict[str, Callable[[], Iterator[tuple[str, Document]]]] = {
    "wikipedia": _wikipedia,
    "news": _news,
    "python": _python,
    "prose": _prose,
}
