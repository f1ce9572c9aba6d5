"""Tasks: the items are what they claim to be, scores do not depend on how they are computed, cards are kept."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from refimpl.core.errors import CalibrationError, OptionError
from refimpl.lab import models
from refimpl.lab.data import text
from refimpl.lab.measure import tasks
from refimpl.lab.measure.tasks import made, scoring
from refimpl.lab.measure.tasks.items import group
from refimpl.lab.models import small

CHANCE = {"cloze": 1 / 4, "last_word": 1 / 4, "summary": 1 / 4, "copying": 1 / 4, "code": 1 / 4}
COUNTS = {"cloze": 320, "last_word": 256, "retrieval": 192, "summary": 75, "copying": 192, "code": 192}


@pytest.fixture(scope="module")
def llama():
    return small.load("llama-small"), small.tokenizer()


# --- items ---


@pytest.mark.parametrize("task", tasks.TASKS)
def test_items_are_well_formed(task):
    found = tasks.items(task)
    assert len(found) >= COUNTS[task]
    assert len({item.id for item in found}) == len({(item.prompt, item.answer) for item in found}) == len(found)
    for item in found:
        candidates = (item.answer, *item.distractors)
        assert len(set(candidates)) == len(candidates) > 1
        assert item.prompt == item.prompt.rstrip() and item.prompt
        assert all(c == c.strip() and c for c in candidates)
        if task != "retrieval":
            assert item.chance == CHANCE[task]


@pytest.mark.parametrize("task", tasks.TASKS)
def test_card_is_a_fixed_part_with_every_topic(task):
    full, card = tasks.items(task), tasks.items(task, "card")
    assert len(card) == tasks.CARD[task] and set(card) <= set(full)
    counts = {name: sum(item.topic == name for item in card) for name in {item.topic for item in full}}
    assert max(counts.values()) - min(counts.values()) <= 1


def test_cloze_asks_each_fact_once_with_distractors_of_the_answers_form():
    found = tasks.items("cloze")
    assert len({re.sub(r"\W+", " ", item.prompt.lower()) for item in found}) == len(found)
    for item in found:
        assert item.prompt.isprintable() and "  " not in item.prompt and item.prompt[0].isupper()
        form = {c[0].isupper() for c in (item.answer, *item.distractors) if c[0].isalpha()}
        assert len(form) <= 1, item
        assert {c.isdigit() for c in (item.answer, *item.distractors)} == {item.answer.isdigit()}, item
        words = item.prompt.lower().split()
        assert item.answer.lower() not in words, item  # nothing to copy from


def test_summary_names_all_candidates_in_the_text():
    for item in tasks.items("summary"):
        summary, *examples, question = item.prompt.split("\n")
        for candidate in (item.answer, *item.distractors):
            assert re.search(rf"\b{candidate}\b", summary), (item, candidate)
        assert item.answer not in question and len(examples) == 2
        assert not any(example.endswith(f" {item.answer}.") for example in examples)
    groups = [group(item.id) for item in tasks.items("summary")]
    assert len(set(groups)) >= 25 and all(groups.count(name) >= 3 for name in groups)


def test_last_word_is_far_back_in_a_test_article():
    articles = {document.title: " ".join(document.text.split()) for document in text.documents("wikipedia", "test")}
    other = {d.title for split in ("calibration", "validation") for d in text.documents("wikipedia", split)}
    for item in tasks.items("last_word"):
        length = int(item.topic.split()[0])
        title = item.id.partition("/")[2].rpartition("#")[0]
        assert title not in other
        assert " ".join(f"{item.prompt} {item.answer}.".split()) in articles[title]
        assert len(item.prompt.split()) == length
        words = re.findall(r"[A-Za-z]+", item.prompt)
        assert item.answer in words and item.answer not in words[-16:]
        assert set(item.distractors) <= set(words)


def test_code_asks_for_a_name_that_the_lines_before_have():
    files = {document.title.replace("/", "."): document.text for document in text.documents("python", "test")}
    for item in tasks.items("code"):
        name, _, place = item.id.rpartition("#")
        row, column = map(int, place.split("."))
        line = files[name].splitlines()[row - 1]
        assert re.match(rf"{item.answer}\b", line[column:]) and line[column - 1] == " "
        assert (item.prompt + " ").endswith(line[:column])
        for candidate in (item.answer, *item.distractors):
            assert candidate.isidentifier() and re.search(rf"(?<![\w.]){candidate}\b", item.prompt)
        assert not any(d.startswith(item.answer) or item.answer.startswith(d) for d in item.distractors)


def test_retrieval_asks_at_all_depths_and_offers_all_values():
    for item in tasks.items("retrieval"):
        pairs = int(item.topic.split()[0])
        lines = [line.split(": ") for line in item.prompt.splitlines()]
        table, asked = dict(lines[:pairs]), lines[-1][0].removesuffix(":")
        assert item.answer == table[asked] and {item.answer, *item.distractors} == set(table.values())
        assert item.chance == 1 / pairs == 1 / len(table)
        shown = dict(lines[pairs:-1])
        assert len(shown) == made.ANSWERED and asked not in shown and shown.items() <= table.items()
    for pairs in made.PAIRS:
        mine = [item for item in tasks.items("retrieval") if item.topic == f"{pairs} pairs"]
        lines = {item.prompt.splitlines().index(f"{item.prompt.splitlines()[-1]} {item.answer}") for item in mine}
        assert lines == set(range(pairs))


def test_copying_follows_what_was_read():
    for item in tasks.items("copying"):
        words = item.prompt.split()
        last = words[-1]
        after = [second for first, second in zip(words, words[1:], strict=False) if first == last]
        times = 1 if item.topic == "repeat" else made.ROUNDS
        assert after == [item.answer] * times
        assert set(item.distractors) <= set(words)
        assert words[-3] != last  # not merely the pair before


def test_nouns_are_different_words():
    assert len(set(made.NOUNS)) == len(made.NOUNS)
    assert all(word.isalpha() and word.islower() for word in made.NOUNS)


@pytest.mark.parametrize("value", ["clozes", "Last_word", None])
def test_unknown_task(value):
    with pytest.raises(OptionError, match=r"task=.*must be one of 'cloze'"):
        tasks.items(value)


def test_unknown_size():
    with pytest.raises(OptionError, match="size='quick' must be one of 'card', 'full'"):
        tasks.items("cloze", "quick")


# --- files ---

GOOD = {"id": "gold", "prompt": "The symbol for gold is", "answer": "Au", "distractors": ["Ag"], "topic": "chemistry"}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"id": "x", "prompt"', "line 3: .*delimiter"),
        ("[1]", "line 3: .*no JSON object"),
        (GOOD | {"id": 3}, "line 3: id is 3"),
        (GOOD | {"prompt": ""}, "line 3: prompt is ''"),
        (GOOD | {"prompt": "The symbol is "}, "line 3: prompt ends with a space"),
        (GOOD | {"distractors": "Ag"}, "line 3: distractors is 'Ag'"),
        (GOOD | {"distractors": []}, "line 3: distractors is"),
        (GOOD | {"distractors": ["Ag", "Au"]}, "line 3: .*not all different"),
        (GOOD | {"distractors": [" Ag"]}, "line 3: .*' Ag'"),
        (GOOD | {"hint": "metal"}, "line 3: .*unknown field 'hint'"),
        ({"id": "x", "prompt": "p"}, "line 3: lacks 'answer', 'distractors'"),
        (GOOD, "line 3: the id 'chemistry/gold' is taken"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, says):
    path = tmp_path / "mine.jsonl"
    broken = line if isinstance(line, str) else json.dumps(line)
    path.write_text(json.dumps(GOOD) + "\n\n" + broken + "\n", encoding="utf-8")
    with pytest.raises(OptionError, match=f"mine.jsonl, {says}"):
        tasks.load(path)


def test_a_file_that_is_missing_or_empty(tmp_path):
    with pytest.raises(OptionError, match="cannot be read"):
        tasks.load(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(OptionError, match="holds no items"):
        tasks.load(tmp_path / "empty.jsonl")


def test_own_file(tmp_path, llama):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD | {"id": "2"}), encoding="utf-8")
    card = tasks.score(*llama, {"mine": tasks.load(path)}, progress=False)
    assert card.scores["mine"].ids == ["chemistry/gold", "chemistry/2"]
    assert card.mean("mine", "chance") == 0.5


# --- scores ---


def naive(model, tokenizer, item):
    """Log-likelihood of each candidate and whether the answer is greedy: one row at a time, no cache, no padding."""
    result = []
    for candidate in (item.answer, *item.distractors):
        prompt = tokenizer.encode(item.prompt)
        ids = tokenizer.encode(f"{item.prompt} {candidate}")[len(prompt) :]
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].double()
        logs = logits.log_softmax(-1)[range(len(ids)), ids]
        result.append((float(logs.sum()), logits.argmax(-1).tolist() == ids))
    return result


def mixed(count=6):
    """Items of several tasks: prompts of unlike length, candidates of one token and of many."""
    return [item for task in ("cloze", "summary", "copying", "code") for item in tasks.items(task, "card")[:count]]


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2", "tiny_qwen3", "tiny_mixtral", "shipped"])
def test_scores_equal_those_of_one_row_at_a_time(family, request, llama):
    # A vocabulary of 1024 cuts most candidates into several tokens.
    changes = {"vocab_size": 1024, "n_positions" if family == "tiny_gpt2" else "max_position_embeddings": 1024}
    model = llama[0] if family == "shipped" else request.getfixturevalue(family)(**changes)
    found = [item for item in mixed() if len(llama[1].encode(item.prompt)) < 240]
    assert len(found) > 12
    scores = scoring.score_items(model, llama[1], found, progress=False)
    for k, item in enumerate(found):
        logs = naive(model, llama[1], item)
        assert scores.loglik[k] == pytest.approx(logs[0][0], abs=2e-4)
        assert scores.free[k] == logs[0][1]
        assert scores.restricted[k] == (logs[0][0] > max(log for log, _ in logs[1:]))


def test_batches_and_order_do_not_change_scores(monkeypatch, llama):
    found = mixed()
    plain = scoring.score_items(*llama, found, progress=False)
    monkeypatch.setattr(scoring, "_TOKENS", 1)
    single = scoring.score_items(*llama, found, progress=False)
    np.testing.assert_allclose(single.loglik, plain.loglik, atol=2e-4)
    assert single.restricted.tolist() == plain.restricted.tolist() and single.free.tolist() == plain.free.tolist()
    turned = [
        tasks.Item(item.id, item.prompt, item.answer, tuple(reversed(item.distractors))) for item in reversed(found)
    ]
    back = scoring.score_items(*llama, turned, progress=False)
    np.testing.assert_allclose(back.loglik[::-1], plain.loglik, atol=2e-4)
    assert back.restricted[::-1].tolist() == plain.restricted.tolist()


def test_a_cache_that_cannot_be_continued_is_not_used(monkeypatch, llama):
    found = mixed()
    plain = scoring.score_items(*llama, found, progress=False)
    monkeypatch.setattr(scoring, "_reusable", lambda cache: False)
    again = scoring.score_items(*llama, found, progress=False)
    np.testing.assert_allclose(again.loglik, plain.loglik, atol=2e-4)
    assert again.restricted.tolist() == plain.restricted.tolist() and again.free.tolist() == plain.free.tolist()


def test_training_flags_stay(llama):
    model = llama[0]
    model.model.layers[0].train()
    try:
        scoring.score_items(*llama, mixed(1), progress=False)
        assert model.model.layers[0].training and not model.model.layers[1].training
    finally:
        model.eval()


class Oracle(torch.nn.Module):
    """Knows the items: after a prompt and a part of its answer it is sure of the next token; or knows nothing."""

    def __init__(self, tokenizer, found, knows=True, seed=0):
        super().__init__()
        self.embedding = torch.nn.Embedding(1024, 1)
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())
        self.knows, self.seed = knows, seed
        encoded = [scoring.encode(item, tokenizer) for item in found]
        self.texts = [(tokens.prompt, tokens.candidates[0]) for tokens in encoded]

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, attention_mask, use_cache=None, past_key_values=None):
        logits = torch.zeros(*input_ids.shape, 1024)
        if not self.knows:
            logits.normal_(generator=torch.Generator().manual_seed(self.seed + input_ids.numel()))
        for k, row in enumerate(input_ids):
            ids = row[attention_mask[k].bool()].tolist()
            for prompt, answer in self.texts if self.knows else ():
                for cut in range(len(answer)):
                    if (prompt + answer)[: len(prompt) + cut] == ids[: len(prompt) + cut]:
                        place = input_ids.shape[1] - len(ids) + len(prompt) + cut - 1
                        logits[k, place, answer[cut]] = 50.0
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_an_oracle_is_right_and_a_random_model_guesses(task):
    tokenizer, found = small.tokenizer(), tasks.items(task, "card")
    few = found[:6]
    right = scoring.score_items(Oracle(tokenizer, few), tokenizer, few, progress=False)
    assert right.free.tolist() == right.restricted.tolist() == [1.0] * len(few)
    assert right.loglik.max() <= 0 and right.loglik.min() > -1e-6


def test_a_random_model_scores_about_chance():
    tokenizer = small.tokenizer()
    # Candidates of one token each, so that none is favoured by being short.
    letters = [chr(ord("a") + k) for k in range(8)]
    found = [tasks.Item(str(k), f"{k}:", letters[k % 8], tuple(set(letters) - {letters[k % 8]})) for k in range(400)]
    scores = scoring.score_items(Oracle(tokenizer, found, knows=False), tokenizer, found, progress=False)
    assert scores.restricted.mean() == pytest.approx(1 / 8, abs=0.06)
    assert scores.free.mean() < 0.02 and set(scores.chance) == {1 / 8}


def test_equal_candidates_share_the_point():
    """A model that says the same of all tokens gets exactly what guessing gives."""
    tokenizer = small.tokenizer()
    found = [tasks.Item("1", "one", "a", ("b", "c", "d")), tasks.Item("2", "two", "a", ("b",))]
    model = Oracle(tokenizer, [])
    scores = scoring.score_items(model, tokenizer, found, progress=False)
    assert scores.restricted.tolist() == scores.chance.tolist() == [0.25, 0.5]


def test_long_prompts_keep_their_end(llama):
    item = tasks.Item("1", "river " * 600 + "the lake and the", "sea", ("dog",))
    tokens = scoring.encode(item, llama[1], limit=256)
    longest = max(map(len, tokens.candidates))
    assert len(tokens.prompt) + longest - 1 == 256
    assert tokens.prompt == llama[1].encode(item.prompt)[-len(tokens.prompt) :]


def test_not_finite(llama):
    model = small.load("llama-small")
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(CalibrationError, match=f"item {tasks.items('copying')[0].id[:4]!r}"[:6]):
        scoring.score_items(model, llama[1], tasks.items("copying")[:2], progress=False)


def test_foreign_tokenizer(llama, smollm2_folder):
    with pytest.raises(OptionError, match="vocabulary of 1024"):
        scoring.score_items(llama[0], models.tokenizer(), tasks.items("cloze")[:8], progress=False)


def test_a_bos_token_of_the_tokenizer_is_kept(llama):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(small.path("llama-small"))
    from tokenizers import processors

    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    item = tasks.items("cloze")[0]
    plain, begun = scoring.encode(item, llama[1]), scoring.encode(item, tokenizer)
    assert begun.prompt == [0, *plain.prompt] and begun.candidates == plain.candidates
