"""Long contexts with questions, made from real articles: every choice follows from a hash, nothing is drawn at random.

A context has exactly as many tokens as asked for, so contexts can be read in one batch without padding, and a budget of
bytes per token means the same for each. The fact asked about is a sentence in it, between two sentences of the
article, at a known place (the depth).
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from refimpl.core.errors import CalibrationError, OptionError
from refimpl.lab.data.text import Document
from refimpl.lab.measure.tasks.made import _COMMON, NOUNS, draw, number


@dataclass(frozen=True)
class Question:
    """A question about a context, in tokens.

    Attributes:
        id: ``article#name``; questions of one article differ in what follows the ``#``.
        ask: the question. It may be part of the prompt, or come after the prompt has been compressed.
        lead: the beginning of the sentence that the answer continues. It is read after compression in either case, so that
            no token of the answer can be predicted from the uncompressed prompt.
        answer: the right continuation.
        rivals: possible tokens at each place of the answer, including the right one.
        depth: place of the answer in the context, from 0 (its start) to 1 (its end).
    """

    id: str
    ask: tuple[int, ...]
    lead: tuple[int, ...]
    answer: tuple[int, ...]
    rivals: tuple[int, ...]
    depth: float

    @property
    def chance(self) -> float:
        """Share of right answers by guessing among the rivals."""
        return float(len(self.rivals)) ** -len(self.answer)


@dataclass(frozen=True)
class Context:
    """Tokens that are read once, and questions about them; `id` is the article's."""

    id: str
    ids: tuple[int, ...]
    questions: tuple[Question, ...]


class _Writer:
    """Text to tokens, with the few things that depend on the tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.digits = tuple(self(str(digit))[0] for digit in range(10))
        self.nouns = {noun: self(f" {noun}")[0] for noun in NOUNS if len(self(f" {noun}")) == 1}
        if self("12345") != [self.digits[k] for k in range(1, 6)] or len(self.nouns) < 100:
            raise OptionError(
                "tokenizer: these workloads need one that has a token for each digit and for common nouns, as "
                "SmolLM2's has"
            )

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def article(self, document: Document) -> tuple[list[int], list[int]]:
        """Tokens of an article, and the places where a sentence begins."""
        found = self.tokenizer(
            document.text,
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=True,
            verbose=False,
        )
        starts = [start for start, _ in found["offset_mapping"]]
        ends = (match.end() for match in re.finditer(r"[a-z0-9)\"][.!?](?=\s)", document.text))
        return found["input_ids"], [bisect_left(starts, end) for end in ends]

    def question(self, id: str, ask: str, lead: str, answer: str, depth: float) -> Question:
        """A question whose answer is a number or a noun."""
        rivals = self.digits if answer.isdigit() else tuple(self.nouns.values())
        whole, asked = self(f"{ask}{lead} {answer}"), len(self(ask))
        begin = len(self(ask + lead))
        while whole[begin] not in rivals:  # a space before the digits is no part of the answer
            begin += 1
        return Question(id, tuple(whole[:asked]), tuple(whole[asked:begin]), tuple(whole[begin:]), rivals, depth)


def _articles(
    documents: Sequence[Document], count: int, least: int, writer: _Writer, key: str
) -> list[tuple[Document, list[int], list[int]]]:
    """`count` articles of at least so many tokens, in an order that depends on the key."""
    found: list[tuple[Document, list[int], list[int]]] = []
    for document in sorted(documents, key=lambda document: number(key, document.id)):
        if len(found) == count:
            break
        ids, sentences = writer.article(document)
        if len(ids) >= least:
            found.append((document, ids, sentences))
    if len(found) < count:
        raise CalibrationError(
            f"count={count}: only {len(found)} of the {len(documents)} documents have {least} tokens; ask for fewer or "
            "shorter contexts"
        )
    return found


def _insert(
    ids: Sequence[int], sentences: Sequence[int], facts: Sequence[Sequence[int]], length: int
) -> tuple[list[int], list[float]]:
    """Facts spread evenly over an article, each before the sentence that begins next to its place.

    Returns:
        Exactly ``length`` tokens, and the depth of each fact.
    """
    room = length - sum(map(len, facts))
    inside = [place for place in sentences if place < room] or [0]
    out: list[int] = []
    depths = []
    last = 0
    for k, fact in enumerate(facts):
        wanted = room * (k + 0.5) / len(facts)
        at = max(last, min(inside, key=lambda place: abs(place - wanted)))
        out += ids[last:at]
        depths.append(len(out) / length)
        out += fact
        last = at
    return [*out, *ids[last:room]], depths


# -- passkeys: one fact of each kind in an article --

#: What is hidden in an article: the beginning of a sentence that a number or a noun completes, and its question.
FACTS = (
    ("The pass key is", "What is the pass key?", "number"),
    ("The magic word is", "What is the magic word?", "noun"),
    ("The phone number of the hotel is", "What is the phone number of the hotel?", "number"),
    ("The best thing to take to the island is the", "What is the best thing to take to the island?", "noun"),
    ("The red door opens with the code", "With which code does the red door open?", "number"),
    ("The secret name of the ship is", "What is the secret name of the ship?", "noun"),
)


def _value(kind: str, *key: object) -> str:
    return str(10_000 + number(*key) % 90_000) if kind == "number" else draw(NOUNS, 1, *key)[0]


def passkeys(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, count: int, length: int = 2048
) -> list[Context]:
    """Six unlike facts in each article, at six depths; over the contexts each fact comes to each depth.

    One fact is what papers call a passkey. Six of one kind would be a harder task; six unlike ones are not, and need
    one reading instead of six.

    Args:
        documents: to hide the facts in.
        tokenizer: of the model.
        count: contexts, one article each.
        length: tokens of each.

    Raises:
        CalibrationError: fewer articles are long enough.
        OptionError: a tokenizer without a token for each digit.

    Example:
        >>> from refimpl.lab import models
        >>> from refimpl.lab.data import text
        >>> documents = text.documents("wikipedia", "validation")
        >>> (context,) = passkeys(documents, models.tokenizer(), count=1, length=512)
        >>> len(context.ids), models.tokenizer().decode(context.questions[1].ask).strip()
        (512, 'What is the magic word?')
    """
    writer = _Writer(tokenizer)
    contexts = []
    for k, (document, ids, sentences) in enumerate(_articles(documents, count, length, writer, "passkeys")):
        order = [FACTS[(k + place) % len(FACTS)] for place in range(len(FACTS))]
        values = [_value(kind, "passkeys", document.id, start) for start, _, kind in order]
        said = [writer(f" {start} {value}.") for (start, _, _), value in zip(order, values, strict=True)]
        whole, depths = _insert(ids, sentences, said, length)
        questions = {
            fact: writer.question(f"{document.title}#{place}", f"\n\n{fact[1]}", f"\n{fact[0]}", value, depth)
            for place, (fact, value, depth) in enumerate(zip(order, values, depths, strict=True))
        }
        # questions about the same fact are next to each other in a batch: they are equally long
        contexts.append(Context(document.title, tuple(whole), tuple(questions[fact] for fact in FACTS)))
    return contexts


# -- key-value lines --

SHOWN = 2


def key_values(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    length: int = 2048,
    lines: int = 32,
    asked: int = 8,
) -> list[Context]:
    """A list of lines "line apple: the number is 48213.", in the middle of an article, and some of its numbers asked.

    The lines are as in LongEval, and as there all alike: what tells them apart is one word. Two other lines are said
    again before the question, to show what is wanted.

    Args:
        documents, tokenizer, count, length: as for `passkeys`.
        lines: of the list.
        asked: lines that are asked about, spread over the list.

    Raises:
        As `passkeys`.

    Example:
        >>> from refimpl.lab import models
        >>> from refimpl.lab.data import text
        >>> documents = text.documents("wikipedia", "validation")
        >>> (context,) = key_values(documents, models.tokenizer(), count=1, length=512, lines=16, asked=4)
        >>> [round(question.depth, 1) for question in context.questions]   # the list is in the middle
        [0.4, 0.5, 0.6, 0.7]
    """
    writer = _Writer(tokenizer)
    contexts = []
    for document, ids, sentences in _articles(documents, count, length, writer, "key_values"):
        keys = draw(writer.nouns, lines, "key_values", document.id)
        values = [_value("number", "key_values", document.id, key) for key in keys]
        said = [writer(f"\nline {key}: the number is {value}.") for key, value in zip(keys, values, strict=True)]
        whole, (start,) = _insert(ids, sentences, [sum(said, [])], length)
        questions = []
        for k in range(asked):
            place = (2 * k + 1) * lines // (2 * asked)
            depth = start + sum(map(len, said[:place])) / length
            shown = [n for n in range(lines) if n != place]
            shown = sorted(shown, key=lambda n: number("shown", document.id, place, n))[:SHOWN]
            ask = "".join(f"\nline {keys[n]}: the number is {values[n]}." for n in shown)
            ask += f"\n\nWhat is the number in line {keys[place]}?"
            lead = f"\nline {keys[place]}: the number is"
            questions.append(writer.question(f"{document.title}#{place}", ask, lead, values[place], depth))
        contexts.append(Context(document.title, tuple(whole), tuple(questions)))
    return contexts


# -- variables --

CHAINS, HOPS = 2, 2


def variables(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, count: int, length: int = 2048
) -> list[Context]:
    """Assignments spread over an article (RULER): "VAR A = 48213.", "VAR B = VAR A.", "VAR C = VAR B."

    Two chains run side by side, and each variable's value is asked. How many assignments must be followed is the name
    of the question: "0 hops" is retrieval.

    Args:
        documents, tokenizer, count, length: as for `passkeys`.

    Raises:
        As `passkeys`.

    Example:
        >>> from refimpl.lab import models
        >>> from refimpl.lab.data import text
        >>> documents = text.documents("wikipedia", "validation")
        >>> (context,) = variables(documents, models.tokenizer(), count=1, length=512)
        >>> [question.id.partition("/")[0] for question in context.questions]
        ['0 hops', '0 hops', '1 hops', '1 hops', '2 hops', '2 hops']
    """
    writer = _Writer(tokenizer)
    letters = [a + b for a in "BCDFGHJKLMNPQRSTVWXZ" for b in "BCDFGHJKLMNPQRSTVWXZ"]
    contexts = []
    for document, ids, sentences in _articles(documents, count, length, writer, "variables"):
        key = ("variables", document.id)
        values = [_value("number", *key, chain) for chain in range(CHAINS)]
        names = [f"{pair}{number(*key, pair) % 90 + 10}" for pair in draw(letters, CHAINS * (HOPS + 1), *key)]
        said = []
        for k, name in enumerate(names):  # all chains get their first variable, then all their second
            value = values[k] if k < CHAINS else f"VAR {names[k - CHAINS]}"
            said.append(writer(f" VAR {name} = {value}."))
        whole, depths = _insert(ids, sentences, said, length)
        questions = []
        for k, name in enumerate(names):
            hop, chain = divmod(k, CHAINS)
            ask, lead = f"\n\nWhat is the value of VAR {name}?", f"\nVAR {name} ="
            id = f"{hop} hops/{document.title}#{chain}"
            questions.append(writer.question(id, ask, lead, values[chain], depths[chain]))
        contexts.append(Context(document.title, tuple(whole), tuple(questions)))
    return contexts


# -- the second turn --


def second_turns(
    contexts: Sequence[Context], documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, words: int = 60
) -> list[Context]:
    """Two turns about one context: what another question asks and answers comes first, then something else is said.

    The question of the first turn takes the place of `Question.ask` and all that follows it that of `Question.lead`: a
    method that compresses with a question in sight sees that of the first turn, and is asked the second.

    Args:
        contexts: with two questions or more.
        documents: what is said between is the beginning of one of these.
        tokenizer: of the model.
        words: of what is said between.

    Returns:
        The contexts, with as many questions: each is asked second once, after the one half a round on.

    Example:
        >>> from refimpl.lab import models
        >>> from refimpl.lab.data import text
        >>> documents = text.documents("wikipedia", "validation")
        >>> (context,) = second_turns(passkeys(documents, models.tokenizer(), 1, 512), documents, models.tokenizer())
        >>> models.tokenizer().decode(context.questions[0].ask).strip()   # the first turn's
        'What is the best thing to take to the island?'
    """
    writer = _Writer(tokenizer)
    texts = [" ".join(document.text.split()[:words]) for document in documents]
    turned = []
    for context in contexts:
        questions = []
        for k, second in enumerate(context.questions):
            first = context.questions[(k + len(context.questions) // 2) % len(context.questions)]
            between = writer(f".\n\n{texts[number('between', second.id) % len(texts)]}")
            lead = (*first.lead, *first.answer, *between, *second.ask, *second.lead)
            questions.append(Question(second.id, first.ask, lead, second.answer, second.rivals, second.depth))
        turned.append(Context(context.id, context.ids, tuple(questions)))
    return turned


# -- articles that go on --


@dataclass(frozen=True)
class Target:
    """A word of a continuation that the context has, but the text just before it has not.

    Attributes:
        id: ``article#place``.
        place: of its first token in the continuation.
        tokens: of the word.
        rivals: first tokens of three other words of the context, and its own.
    """

    id: str
    place: int
    tokens: tuple[int, ...]
    rivals: tuple[int, ...]


@dataclass(frozen=True)
class Article:
    """A context, what follows it in the article, and the words of that which are to be predicted."""

    id: str
    ids: tuple[int, ...]
    rest: tuple[int, ...]
    targets: tuple[Target, ...]


def articles(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    length: int = 2048,
    rest: int = 512,
    apart: int = 256,
) -> list[Article]:
    """The beginning of an article and what follows, with the words at ends of clauses that must be remembered.

    Such a word has at least four letters, is not among the commonest, is followed by a full stop, a comma or the like,
    occurs in the context, and has not occurred within the last ``apart`` tokens.

    Args:
        documents, tokenizer, count, length: as for `passkeys`.
        rest: tokens of the continuation.
        apart: number of preceding tokens among which the word must not occur.

    Raises:
        As `passkeys`.

    Example:
        >>> from refimpl.lab import models
        >>> from refimpl.lab.data import text
        >>> documents = text.documents("wikipedia", "validation")
        >>> (article,) = articles(documents, models.tokenizer(), count=1, length=512, rest=128, apart=64)
        >>> len(article.ids), len(article.rest)
        (512, 128)
    """
    writer = _Writer(tokenizer)
    found = []
    for document, ids, _ in _articles(documents, count, length + rest, writer, "articles"):
        found.append(
            Article(
                document.title,
                tuple(ids[:length]),
                tuple(ids[length : length + rest]),
                tuple(_targets(document, ids, length, rest, apart, writer)),
            )
        )
    return found


def _targets(document: Document, ids: list[int], length: int, rest: int, apart: int, writer: _Writer) -> list[Target]:
    offsets = writer.tokenizer(
        document.text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
    )["offset_mapping"]
    starts = [start for start, _ in offsets]
    words = list(re.finditer(r"[A-Za-z]+", document.text[: offsets[length + rest - 1][1]]))
    last: dict[str, int] = {}
    targets = []
    first_tokens: dict[str, int] = {}
    for match in words:
        word, begin = match.group(), match.start()
        at = bisect_left(starts, begin - 1 if document.text[begin - 1 : begin] == " " else begin)
        stop = bisect_left(starts, match.end())
        whole = at < len(ids) and stop < len(starts) and starts[stop] == match.end()
        before = last.get(word)
        if (
            at > length  # what follows the last token of the context is had from the uncompressed prompt
            and whole
            and before is not None
            and before < length
            and at - before > apart
            and len(word) >= 4
            and word.lower() not in _COMMON
            and re.match(r"[.,;:!?)]", document.text[match.end() : match.end() + 1])
        ):
            alike = [w for w in first_tokens if w[0].isupper() == word[0].isupper() and w != word]
            others = [first_tokens[w] for w in draw(alike, len(alike), "rivals", document.id, at)]
            rivals = [token for token in dict.fromkeys(others) if token != ids[at]][:3]
            if len(rivals) == 3:
                id = f"{document.title}#{at}"
                targets.append(Target(id, at - length, tuple(ids[at:stop]), (ids[at], *rivals)))
        if whole:
            last[word] = at
            if at < length and len(word) >= 4 and word.lower() not in _COMMON:
                first_tokens[word] = ids[at]
    return targets
