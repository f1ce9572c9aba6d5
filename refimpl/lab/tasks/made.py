"""Items that nobody wrote by hand: drawn from word lists, or cut from test documents.

Every choice is made by a hash of what is chosen, so the items are the same in every process and Python version; the
standard library, from which `code` is cut, is not.
"""

from __future__ import annotations

import builtins
import hashlib
import io
import keyword
import re
import tokenize
from collections.abc import Iterable, Sequence
from itertools import islice

from refimpl.lab.text import Document

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

NAMES = (
    "Adam Alice Andrew Anna Anthony Arthur Barbara Ben Brian Carl Caroline Charles Chris Claire Daniel David Diana "
    "Edward Elizabeth Emily Emma Eric Frank George Grace Hannah Harry Helen Henry Ian Jack James Jane Jason John "
    "Joseph Julia Karen Kate Kevin Laura Leo Linda Lisa Lucy Marcus Maria Mark Martin Mary Matthew Michael Nancy Nick "
    "Oliver Oscar Paul Peter Philip Rachel Richard Robert Rose Ruth Sam Sarah Simon Sophie Stephen Susan Thomas Tim "
    "Tom Victor William"
).split()


def number(*parts: object) -> int:
    """A number that depends on the parts only."""
    return int.from_bytes(hashlib.sha256("\0".join(map(str, parts)).encode()).digest()[:8], "big")


def draw(words: Iterable[str], count: int, *key: object) -> list[str]:
    """`count` different words in an order that depends on the key only."""
    return sorted(dict.fromkeys(words), key=lambda word: number(*key, word))[:count]


# --- retrieval ---

PAIRS = (8, 16, 32)


def retrieval(each: int = 64) -> list[Draft]:
    """Who has what, for 8, 16 and 32 people; the candidates are all things that were named."""
    drafts = []
    for pairs in PAIRS:
        for k in range(each):
            key = ("retrieval", pairs, k)
            people, things = draw(NAMES, pairs, *key, "people"), draw(NOUNS, pairs, *key, "things")
            # The questions go through all positions, so that none is favoured by being near.
            asked = k * pairs // each
            lines = [f"{person} has the {thing}." for person, thing in zip(people, things, strict=True)]
            prompt = " ".join(lines) + f" {people[asked]} has the"
            rest = tuple(thing for thing in things if thing != things[asked])
            drafts.append((f"{pairs} pairs/{k:02d}", prompt, things[asked], rest))
    return drafts


# --- copying ---

REPEATED = 24
INDUCTION = 48


def copying(each: int = 96) -> list[Draft]:
    """The next word of a random sequence.

    "repeat": the sequence is read a second time, up to some word. "induction": only its last word has been seen
    before, once: after A B ... A comes B.
    """
    drafts = []
    for k in range(each):
        words = draw(NOUNS, REPEATED, "repeat", k)
        at = 1 + k * (REPEATED - 1) // each
        prompt = " ".join(words) + "\n" + " ".join(words[:at])
        drafts.append(
            (
                f"repeat/{k:02d}",
                prompt,
                words[at],
                tuple(draw(words[:at] + words[at + 1 :], 3, "repeat d", k)),
            )
        )
    for k in range(each):
        words = draw(NOUNS, INDUCTION, "induction", k)
        at = 1 + k * (INDUCTION - 4) // each
        prompt = " ".join([*words, words[at - 1]])
        rest = draw(words[: at - 1] + words[at + 1 :], 3, "induction d", k)
        drafts.append((f"induction/{k:02d}", prompt, words[at], tuple(rest)))
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
    Candidates are other words of the passage.
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
                same = [word for word in before if _alike(word, answer)]
                rest = draw(same, 3, "last word", document.id, at)
                if len(rest) == 3:
                    id = f"{length} words/{document.title}#{at}"
                    found.append((at, (id, prompt, answer, tuple(rest))))
        drafts += _spread(found, each, length)
    return drafts


def _ends_sentence(whole: str, end: int) -> bool:
    return re.match(r"\s*\Z|\s*\n|\s+[A-Z]", whole[end:]) is not None


def _alike(word: str, answer: str) -> bool:
    """Could be mistaken for the answer: of its form, no common word, and neither begins with the other."""
    return (
        len(word) >= 4
        and word[0].isupper() == answer[0].isupper()
        and word.lower() not in _COMMON
        and not word.lower().startswith(answer.lower()[:4])
    )


def _spread(found: Iterable[tuple[int, Draft]], count: int, apart: int) -> list[Draft]:
    """At most `count` drafts, one from each document in turn, those of one document at least `apart` from another."""
    taken: dict[str, list[tuple[int, Draft]]] = {}
    for at, draft in sorted(found, key=lambda pair: number("spread", pair[1][0])):
        mine = taken.setdefault(draft[0].rpartition("#")[0], [])
        if all(abs(at - other) >= apart for other, _ in mine):
            mine.append((at, draft))
    queues = [taken[name] for name in sorted(taken)]
    turns = (
        queue[turn]
        for turn in range(max(map(len, queues), default=0))
        for queue in queues
        if turn < len(queue)
    )
    return sorted((draft for _, draft in islice(turns, count)), key=lambda draft: draft[0])


# --- code ---

CODE_CHARACTERS = 480
_BINDS = {"def", "class", "import", "from", "for", "as", "global", "nonlocal", "lambda"}
_NOT_NAMES = {*keyword.kwlist, *keyword.softkwlist, *dir(builtins), "self", "cls"}


def code(documents: Sequence[Document], each: int = 192) -> list[Draft]:
    """The next identifier in a source file of the standard library.

    It has occurred in the lines shown and stands after a space; the candidates are other identifiers in those lines.
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
            others = [
                n for n in seen if len(n) >= 3 and not n.startswith(answer) and not answer.startswith(n)
            ]
            rest = draw(others, 3, "code", document.id, at)
            if len(rest) == 3:
                id = f"{document.title}#{row}.{column}"
                found.append((at, (id.replace("/", "."), prompt.rstrip(" "), answer, tuple(rest))))
    return _spread(found, each, CODE_CHARACTERS)
