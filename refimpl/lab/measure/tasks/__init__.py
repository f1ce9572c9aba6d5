"""Abilities of a compressed model beyond perplexity: six tasks for models of a hundred million weights.

- cloze: facts of general knowledge.
- last_word: the last word of a passage, which occurred in it far back.
- retrieval: who has what, among 8, 16 or 32 statements.
- summary: facts of a short invented text.
- copying: repeating a random sequence, and A B ... A -> B.
- code: the next identifier in a file of the standard library.

Each item is scored free (does greedy decoding write the answer) and restricted (is the answer the likeliest of the
candidates): much of what a compressed model loses is the form of an answer, not the answer. The same items run in
EleutherAI's lm-eval, see `export_lm_eval`.
"""

from refimpl.lab.measure.tasks.card import ScoreCard, card_from, ceiling, score, score_rows
from refimpl.lab.measure.tasks.harness import export_lm_eval
from refimpl.lab.measure.tasks.items import CARD, TASKS, Item, items, items_hash, load
from refimpl.lab.measure.tasks.scoring import Scores

__all__ = [
    "CARD",
    "TASKS",
    "Item",
    "ScoreCard",
    "Scores",
    "card_from",
    "ceiling",
    "export_lm_eval",
    "items",
    "items_hash",
    "load",
    "score",
    "score_rows",
]
