"""Items not written by hand: drawn from word lists, or cut from test documents.

Every choice follows from a hash of what is chosen, so the items are the same in every process and Python version; the
standard library, from which `code` is cut, is not.
"""

from __future__ import annotations

import builtins
import hashlib
import io
import keyword
import re
import tokenize
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice

from refimpl.lab.data.text import Document

Draft = tuple[str, str, str, tuple[str, ...]]
"""id, prompt, answer, distractors of an item."""

# Short, common nouns: most tokenizers have a token for each.
NOUNS = (
    "apple arm army baby bag ball bank bar base bed bell bird block boat body bone book bottle bowl box bread bridge "
    "brother bus cake camera camp card cat chair chest child church circle city clock cloth cloud club coat coffee "
    "corn cow cross crown cup desk doctor dog door dress drum duck dust ear earth egg engine eye face farm field "
    "film finger fire fish flag floor flower foot forest fruit game garden gate gift girl glass gold grass gun hair "
    "hall hand hat head heart hill horse hospital hotel house ice iron island key king kitchen knife lake lamp leg "
    "letter library lion lip market mask meat milk mirror money moon mountain mouth museum nail neck needle night nose "
    "ocean office oil orange page paint paper park path pen phone piano picture pig pilot pipe plane plant plate "
    "pocket poem prison queen radio rain ring river road rock roof room root rope rose salt sand school screen sea "
    "seat seed sheep ship shirt shoe shop silver sister skin sky snake snow soldier song soup spoon square star "
    "station stick stone storm street sugar summer sun table tail teacher tent ticket tiger tooth tower town toy "
    "train tree truck valley village wall watch water wheel wife wind window wine winter wood wool yard"
).split()


def number(*parts: object) -> int:
    """A number that depends on the parts only."""
    return int.from_bytes(hashlib.sha256("\0".join(map(str, parts)).encode()).digest()[:8], "big")


def draw(words: Iterable[str], count: int, *key: object) -> list[str]:
    """`count` different words in an order that depends on the key only."""
    return sorted(dict.fromkeys(words), key=lambda word: number(*key, word))[:count]


# --- retrieval ---

PAIRS = (8, 16, 32)
ANSWERED = 3


def retrieval(each: int = 64) -> list[Draft]:
    """Look up a word in a list of 8, 16 or 32 pairs; the candidates are all values of the list.

    Three other pairs are looked up before, to show what is asked: without them a model of this size does not see it.
    """
    drafts = []
    for pairs in PAIRS:
        for k in range(each):
            key = ("retrieval", pairs, k)
            table = dict(
                zip(draw(NOUNS[::2], pairs, *key, "keys"), draw(NOUNS[1::2], pairs, *key, "values"), strict=True)
            )
            # The questions go through all places of the list, so that none is favoured by being near.
            asked = list(table)[k * pairs // each]
            shown = draw([word for word in table if word != asked], ANSWERED, *key, "shown")
            lines = [f"{word}: {table[word]}" for word in [*table, *shown]]
            prompt = "\n".join([*lines, f"{asked}:"])
            rest = tuple(value for word, value in table.items() if word != asked)
            drafts.append((f"{pairs} pairs/{k:02d}", prompt, table[asked], rest))
    return drafts


# --- copying ---

REPEATED = 24
KNOWN = 4
PAIRED, ROUNDS = 8, 3


def copying(each: int = 96) -> list[Draft]:
    """The next word of a random sequence.

    "repeat": the sequence is read a second time, from its start up to some word. "induction": pairs of words go by in
    changing order, three times each, then comes the first word of one: A B ... A B ... A B ... A -> B.
    """
    drafts = []
    for k in range(each):
        words = draw(NOUNS, REPEATED, "repeat", k)
        at = KNOWN + k * (REPEATED - KNOWN) // each
        prompt = " ".join(words) + "\n" + " ".join(words[:at])
        rest = draw([word for word in words if word != words[at]], 3, "repeat rest", k)
        drafts.append((f"repeat/{k:02d}", prompt, words[at], tuple(rest)))
    for k in range(each):
        words = draw(NOUNS, 2 * PAIRED, "induction", k)
        follows = dict(zip(words[::2], words[1::2], strict=True))
        read: list[str] = []
        for turn in range(ROUNDS):
            for first in draw(follows, PAIRED, "induction order", k, turn):
                read += [first, follows[first]]
        asked = draw([first for first in follows if first != read[-2]], 1, "induction asked", k)[0]
        rest = draw([word for word in words if word not in (asked, follows[asked])], 3, "induction rest", k)
        drafts.append((f"induction/{k:02d}", " ".join([*read, asked]), follows[asked], tuple(rest)))
    return drafts


# --- last word ---

LENGTHS = (64, 192)
_COMMON = frozenset(
    "about above according after again against almost along also although always among another around because been "
    "before being below between both could does done down during each either even ever every first from further have "
    "having here high however into itself just known large last later least less like little long made mainly many "
    "more most much must near never number often once only other others over part people place same second several "
    "should since small some still such than that their them themselves then there these they thing things this those "
    "though three through time times today together under until upon used very well were what when where whether which "
    "while whose will with within without work works would year years".split()
)


def last_word(documents: Sequence[Document], each: int = 160) -> list[Draft]:
    """The last word of a sentence at the end of 64 or 192 words of an article.

    The word has been read before, but not among the last sixteen words: what it is must come from further back.
    Candidates are other words of the passage, first those that have ended a clause or have been read twice.
    """
    drafts = []
    for length in LENGTHS:
        found: list[tuple[int, Draft]] = []
        for document in documents:
            words = list(re.finditer(r"\S+", document.text))
            for at in range(length, len(words)):
                end = re.fullmatch(r"([A-Za-z]{4,})\.", words[at].group())
                if not end or not _ends_sentence(document.text, words[at].end()):
                    continue
                answer = end[1]
                prompt = document.text[words[at - length].start() : words[at - 1].end()]
                before = re.findall(r"[A-Za-z]+", prompt)
                if answer.lower() in _COMMON or answer not in before or answer in before[-16:]:
                    continue
                rest = _rivals(prompt, answer, document.id, at)
                if len(rest) == 3:
                    id = f"{length} words/{document.title}#{at}"
                    found.append((at, (id, prompt, answer, tuple(rest))))
        drafts += _spread(found, each, length)
    return drafts


def _ends_sentence(whole: str, end: int) -> bool:
    return re.match(r"\s*\Z|\s*\n|\s+[A-Z]", whole[end:]) is not None


def _rivals(prompt: str, answer: str, *key: object) -> list[str]:
    """Three other words of the passage that could be mistaken for its last one."""
    seen = Counter(re.findall(r"[A-Za-z]+", prompt))
    ends = set(re.findall(r"([A-Za-z]+)[.,;:)]", prompt))
    alike = [
        word
        for word in seen
        if len(word) >= 4
        and word[0].isupper() == answer[0].isupper()
        and word.lower() not in _COMMON
        and word.lower()[:4] != answer.lower()[:4]  # "market" and "markets": one begins as the other
    ]
    return sorted(alike, key=lambda word: (-(word in ends) - (seen[word] > 1), number(*key, word)))[:3]


def _spread(found: Iterable[tuple[int, Draft]], count: int, apart: int) -> list[Draft]:
    """At most `count` drafts, one from each document in turn, those of one document at least `apart` from another."""
    taken: dict[str, list[tuple[int, Draft]]] = {}
    for at, draft in sorted(found, key=lambda pair: number("spread", pair[1][0])):
        mine = taken.setdefault(draft[0].rpartition("#")[0], [])
        if all(abs(at - other) >= apart for other, _ in mine):
            mine.append((at, draft))
    queues = [taken[name] for name in sorted(taken)]
    turns = (queue[turn] for turn in range(max(map(len, queues), default=0)) for queue in queues if turn < len(queue))
    return sorted((draft for _, draft in islice(turns, count)), key=lambda draft: draft[0])


# --- code ---

CODE_CHARACTERS = 480
_BINDS = {"def", "class", "import", "from", "for", "as", "global", "nonlocal", "lambda"}
_NOT_NAMES = {*keyword.kwlist, *keyword.softkwlist, *dir(builtins), "self", "cls"}


def code(documents: Sequence[Document], each: int = 192) -> list[Draft]:
    """The next identifier in a source file of the standard library.

    It has occurred in the lines shown and follows a space; the candidates are other identifiers in those lines.
    """
    found: list[tuple[int, Draft]] = []
    for document in documents:
        try:
            tokens = list(tokenize.generate_tokens(io.StringIO(document.text).readline))
        except (tokenize.TokenError, SyntaxError):
            continue
        starts = [0]
        for line in document.text.splitlines(keepends=True):
            starts.append(starts[-1] + len(line))
        names: list[tuple[int, str]] = []  # position and spelling of what a bare name could be
        for before, token in zip(tokens, tokens[1:], strict=False):
            if token.type != tokenize.NAME or token.string in _NOT_NAMES or before.string == ".":
                continue
            row, column = token.start
            at, answer = starts[row - 1] + column, token.string
            first = document.text.rfind("\n", 0, max(0, at - CODE_CHARACTERS)) + 1
            seen = [name for place, name in names if place >= first]
            names.append((at, answer))
            prompt = document.text[first:at]
            if (
                before.string in _BINDS
                or before.end[0] != row
                or not re.search(r"\S \Z", prompt)
                or len(answer) < 3
                or answer not in seen[:-1]
                or answer in seen[-1:]
            ):
                continue
            others = [n for n in seen if len(n) >= 3 and not n.startswith(answer) and not answer.startswith(n)]
            rest = draw(others, 3, "code", document.id, at)
            if len(rest) == 3:
                id = f"{document.title}#{row}.{column}"
                found.append((at, (id.replace("/", "."), prompt.rstrip(" "), answer, tuple(rest))))
    return _spread(found, each, CODE_CHARACTERS)
