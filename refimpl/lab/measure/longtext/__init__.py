"""Workloads at two thousand tokens and beyond: what a model can still do with what a compressed cache has kept.

- passkeys: facts hidden in an article, asked by depth.
- key_values: one line of a list of like lines.
- variables: assignments that must be followed.
- second_turns: a question about the context, after another question and some talk.
- articles: what follows in an article: its perplexity, and words last read long ago.
- by_position: perplexity of a text as it gets longer.

    reading = read(model, contexts)
    answers = answer(reading, contexts, reading.cache(lambda model: KIVI(bits=2).cache(model)))
"""

from refimpl.lab.measure.longtext.made import (
    Article,
    Context,
    Question,
    Target,
    articles,
    key_values,
    passkeys,
    second_turns,
    variables,
)
from refimpl.lab.measure.longtext.scoring import (
    Answers,
    Continued,
    Factory,
    Reading,
    answer,
    batches,
    by_position,
    decode,
    read,
    read_on,
)

__all__ = [
    "Answers",
    "Article",
    "Context",
    "Continued",
    "Factory",
    "Question",
    "Reading",
    "Target",
    "answer",
    "articles",
    "batches",
    "by_position",
    "decode",
    "key_values",
    "passkeys",
    "read",
    "read_on",
    "second_turns",
    "variables",
]
