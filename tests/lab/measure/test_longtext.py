"""Long contexts hold what they are asked about, and questions are scored as if the model had answered them itself."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from refimpl.baselines.kvcache import H2O, KIVI, Full, SnapKV, StreamingLLM, ThinK
from refimpl.core.cache import CompressedCache, Policy, cache_argument, prefill
from refimpl.core.errors import CalibrationError, OptionError
from refimpl.lab import models
from refimpl.lab.data import text
from refimpl.lab.measure import longtext
from refimpl.lab.measure.longtext import Article, Context, Question, Target
from refimpl.lab.measure.longtext.made import FACTS
from refimpl.lab.measure.metrics import perplexity
from refimpl.lab.measure.tasks.items import group

LENGTH = 768


@pytest.fixture(scope="module")
def tokenizer(smollm2_folder):
    return models.tokenizer()


@pytest.fixture(scope="module")
def documents() -> list[text.Document]:
    return text.documents("wikipedia", "validation")


# -- what is made --


@pytest.mark.parametrize("make", [longtext.passkeys, longtext.key_values, longtext.variables])
def test_contexts_are_of_one_length_and_the_same_every_time(make, documents, tokenizer) -> None:
    contexts = make(documents, tokenizer, 3, LENGTH)
    assert {len(context.ids) for context in contexts} == {LENGTH}
    assert len({context.id for context in contexts}) == 3
    assert contexts == make(list(reversed(documents)), tokenizer, 3, LENGTH)
    for context in contexts:
        ids = [question.id for question in context.questions]
        assert len(set(ids)) == len(ids)
        assert {group(id).removeprefix(f"{id[0]} hops/") for id in ids} == {context.id}


def test_passkeys_stand_where_they_are_said_to_stand(documents, tokenizer) -> None:
    contexts = longtext.passkeys(documents, tokenizer, 6, LENGTH)
    places: dict[int, set[int]] = {}
    for context in contexts:
        whole = tokenizer.decode(context.ids)
        for k, question in enumerate(context.questions):
            fact = tokenizer.decode(question.lead + question.answer).strip() + "."
            assert fact.startswith(FACTS[k][0]) and whole.count(fact) == 1
            assert re.search(r"[a-z0-9)\"][.!?] " + re.escape(fact), whole)  # after a whole sentence
            at = len(tokenizer.encode(whole[: whole.index(fact)])) / LENGTH
            assert question.depth == pytest.approx(at, abs=0.02)
            places.setdefault(k, set()).add(int(6 * question.depth))
            assert set(question.answer) <= set(question.rivals)
    assert all(len(found) >= 5 for found in places.values())  # each fact comes to (nearly) each sixth of the context


def test_lines_tell_their_numbers_once(documents, tokenizer) -> None:
    (context,) = longtext.key_values(documents, tokenizer, 1, LENGTH, lines=16, asked=4)
    whole = tokenizer.decode(context.ids)
    lines = dict(re.findall(r"\nline (\w+): the number is (\d{5})\.", whole))
    assert len(lines) == 16
    for question in context.questions:
        ask, lead = tokenizer.decode(question.ask), tokenizer.decode(question.lead)
        (key,) = re.findall(r"What is the number in line (\w+)\?", ask)
        assert tokenizer.decode(question.answer).strip() == lines[key] and lines[key] not in ask
        assert lead.rstrip(" ") == f"\nline {key}: the number is"
        shown = re.findall(r"\nline (\w+): the number is (\d{5})\.", ask)
        assert len(shown) == 2 and all(lines[other] == value for other, value in shown)
        assert question.chance == pytest.approx(1e-5)


def test_variables_lead_to_their_values(documents, tokenizer) -> None:
    (context,) = longtext.variables(documents, tokenizer, 1, LENGTH)
    said = dict(re.findall(r"VAR ([A-Z]{2}\d\d) = (?:VAR )?(\w+)\.", tokenizer.decode(context.ids)))
    assert len(said) == 6
    for question in context.questions:
        hops, name = 0, re.findall(r"VAR (\w+)\?", tokenizer.decode(question.ask))[0]
        while not said[name].isdigit():
            hops, name = hops + 1, said[name]
        assert tokenizer.decode(question.answer).strip() == said[name]
        assert question.id.startswith(f"{hops} hops/")


def test_a_second_turn_has_the_first_one_before_it(documents, tokenizer) -> None:
    once = longtext.passkeys(documents, tokenizer, 1, LENGTH)
    (context,) = longtext.second_turns(once, documents, tokenizer, words=20)
    assert context.ids == once[0].ids
    firsts = set()
    for question, before in zip(context.questions, once[0].questions, strict=True):
        (first,) = [q for q in once[0].questions if q.ask == question.ask]
        firsts.add(first.id)
        assert first.id != question.id == before.id and question.answer == before.answer
        assert question.lead[: len(first.lead) + len(first.answer)] == first.lead + first.answer
        assert question.lead[-len(before.ask + before.lead) :] == before.ask + before.lead
        assert len(question.lead) > len(first.lead + first.answer + before.ask + before.lead) + 20
    assert len(firsts) == len(FACTS)


def test_words_of_a_continuation_were_read_long_ago(documents, tokenizer) -> None:
    articles = longtext.articles(documents, tokenizer, 4, LENGTH, rest=256, apart=128)
    targets = [(article, target) for article in articles for target in article.targets]
    assert len(targets) >= 4
    for article, target in targets:
        whole = article.ids + article.rest
        at = LENGTH + target.place
        assert whole[at : at + len(target.tokens)] == target.tokens
        word = tokenizer.decode(target.tokens).strip()
        assert re.fullmatch(r"[A-Za-z]{4,}", word)
        assert re.search(rf"\b{word}\b", tokenizer.decode(article.ids))
        assert not re.search(rf"\b{word}\b", tokenizer.decode(whole[at - 127 : at]))
        assert target.rivals[0] == target.tokens[0] and len(set(target.rivals)) == 4


def test_what_cannot_be_made_is_refused(documents, tokenizer) -> None:
    with pytest.raises(CalibrationError, match="only"):
        longtext.passkeys(documents[:2], tokenizer, 3, LENGTH)

    class Words:
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [hash(word) % 1000 for word in text.split()]

    with pytest.raises(OptionError, match="a token for each digit"):
        longtext.passkeys(documents, Words(), 1, LENGTH)  # type: ignore[arg-type]


# -- how it is scored --

POLICIES: list[Policy] = [
    Full(),
    KIVI(bits=2, window=8, group=8, value_group=8),
    SnapKV(capacity=24, window=8),
    ThinK(channels=0.5, window=8, group=8),
    H2O(capacity=24),
    StreamingLLM(sinks=2, window=20),
]
IDS = torch.randint(3, 256, (3, 60), generator=torch.Generator().manual_seed(0))


def name(policy: Policy) -> str:
    return type(policy).__name__


def stepwise(model, cache: CompressedCache, ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(ids[:, k : k + 1], **cache_argument(cache)).logits for k in range(ids.shape[1])], 1)


@pytest.fixture(scope="module")
def model(tiny_llama):
    return tiny_llama()


@pytest.mark.parametrize("policy", POLICIES, ids=name)
@pytest.mark.parametrize("asked", [False, True], ids=["alone", "with question"])
@torch.no_grad()
def test_one_reading_serves_every_cache(model, policy: Policy, asked: bool) -> None:
    ask = torch.randint(3, 256, (3, 5), generator=torch.Generator().manual_seed(1)) if asked else None
    shared = longtext.Reading(model, IDS)
    for _ in range(2):  # making a cache leaves the reading as it was
        cache = shared.cache(lambda model: policy.cache(model), ask)
    own = policy.cache(model)
    prefill(model, own, IDS if ask is None else torch.cat([IDS, ask], 1))
    rest = IDS[:, :10].flip(0)
    assert cache.nbytes == own.nbytes
    for mine, theirs in zip(cache.layers, own.layers, strict=True):
        assert mine.parts.keys() == theirs.parts.keys()
    # the library's attention sums in another order for a longer prompt
    torch.testing.assert_close(longtext.decode(model, cache, rest), stepwise(model, own, rest), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("policy", POLICIES, ids=name)
@torch.no_grad()
def test_free_is_what_greedy_decoding_writes(model, policy: Policy) -> None:
    factory = lambda model: policy.cache(model)  # noqa: E731
    heads = [tuple(range(10 + k, 18 + 2 * k)) for k in range(3)]  # of different lengths
    written = []
    for k, head in enumerate(heads):
        cache = factory(model)
        prefill(model, cache, IDS[k : k + 1])
        logits = stepwise(model, cache, torch.tensor([head]))
        answer: list[int] = []
        for _ in range(4):
            answer.append(int(logits[0, -1].argmax()))
            logits = stepwise(model, cache, torch.tensor([[answer[-1]]]))
        written.append(tuple(answer))

    def contexts(answers: list[tuple[int, ...]]) -> list[Context]:
        return [
            Context(
                str(k), tuple(IDS[k].tolist()), (Question(f"{k}#0", head[:3], head[3:], answer, (*answer, 1, 2), 0.5),)
            )
            for k, (head, answer) in enumerate(zip(heads, answers, strict=True))
        ]

    right = contexts(written)
    reading = longtext.read(model, right)
    cache = reading.cache(factory)
    found = longtext.answer(reading, right, cache)
    assert found.free.tolist() == [1, 1, 1] and found.restricted.tolist() == [1, 1, 1]
    assert found.ids == ["0#0", "1#0", "2#0"] and found.depth.tolist() == [0.5] * 3
    wrong = contexts([(*answer[:3], answer[3] ^ 1) for answer in written])
    assert longtext.answer(reading, wrong, cache).free.tolist() == [0, 0, 0]


@torch.no_grad()
def test_restricted_compares_with_rivals_only(model) -> None:
    with torch.no_grad():
        logits = model(torch.cat([IDS[:1], torch.tensor([[5, 6]])], 1)).logits[0, -1]
    order = logits.argsort(descending=True).tolist()

    def ask(answer: int, rivals: tuple[int, ...]) -> tuple[float, float]:
        context = Context("a", tuple(IDS[0].tolist()), (Question("a#0", (5,), (6,), (answer,), rivals, 0.5),))
        reading = longtext.read(model, [context])
        found = longtext.answer(reading, [context], reading.cache(lambda model: Full().cache(model)))
        assert found.loglik[0] == pytest.approx(float(logits.log_softmax(-1)[answer]), abs=1e-3)
        assert found.chance[0] == pytest.approx(1 / len(rivals))
        return float(found.free[0]), float(found.restricted[0])

    assert ask(order[0], (order[0], order[1])) == (1, 1)
    assert ask(order[2], (order[2], order[5])) == (0, 1)
    assert ask(order[5], (order[2], order[5])) == (0, 0)


@torch.no_grad()
def test_a_question_in_the_prompt_decides_what_snapkv_keeps(model) -> None:
    context = Context("a", tuple(IDS[0].tolist()), (Question("a#0", tuple(range(20, 32)), (6,), (7,), (7, 8), 0.5),))
    reading = longtext.read(model, [context])
    factory = lambda model: SnapKV(capacity=20, window=8).cache(model)  # noqa: E731
    inside = longtext.answer(reading, [context], factory=factory)
    own = factory(model)
    prefill(model, own, torch.cat([IDS[:1], torch.tensor([context.questions[0].ask])], 1))
    expected = stepwise(model, own, torch.tensor([[6]])).log_softmax(-1)[0, -1, 7]
    assert inside.loglik[0] == pytest.approx(float(expected), abs=1e-3)
    later = longtext.answer(reading, [context], reading.cache(factory))
    assert abs(later.loglik[0] - inside.loglik[0]) > 1e-4
    with pytest.raises(OptionError, match="either a cache"):
        longtext.answer(reading, [context])


@torch.no_grad()
def test_reading_on_is_the_perplexity_of_what_follows(model) -> None:
    whole = torch.randint(3, 256, (2, 80), generator=torch.Generator().manual_seed(2))
    articles = [
        Article(
            str(k),
            tuple(row[:60].tolist()),
            tuple(row[60:].tolist()),
            (Target(f"{k}#5", 5, tuple(row[65:67].tolist()), (int(row[65]), 1, 2, 3)),),
        )
        for k, row in enumerate(whole)
    ]
    cache = longtext.read(model, articles).cache(lambda model: Full().cache(model))
    found = longtext.read_on(model, articles, cache)
    logs = model(whole).logits.log_softmax(-1)
    for k in range(2):
        each = logs[k, :-1].gather(1, whole[k, 1:, None])[:, 0]
        assert found.perplexity.nll[k] == pytest.approx(-float(each[60:].sum()), rel=1e-4)
        assert found.words.loglik[k] == pytest.approx(float(each[64:66].sum()), rel=1e-3)
    assert found.perplexity.counts.tolist() == [19, 19] and found.words.ids == ["0#5", "1#5"]


@torch.no_grad()
def test_positions_add_up_and_feel_the_compression(model) -> None:
    tokens = text.TokenSet(IDS, ["a", "b", "b"], "given", "given")
    bins = longtext.by_position(model, lambda model: Full().cache(model, prefill="streamed"), tokens, [1, 20, 60], 2)
    assert list(bins) == ["1-19", "20-59"]
    whole = perplexity(model, IDS, progress=False)
    np.testing.assert_allclose(sum(part.nll for part in bins.values()), whole.nll, rtol=1e-4)
    policy = StreamingLLM(sinks=2, window=6)
    (late,) = longtext.by_position(model, lambda model: policy.cache(model), tokens, [20, 60]).values()
    assert late.units == ["a", "b", "b"] and late.counts.tolist() == [40, 40, 40]
    logs = stepwise(model, policy.cache(model), IDS).log_softmax(-1)[:, :-1].gather(2, IDS[:, 1:, None])[..., 0]
    np.testing.assert_allclose(late.nll, -logs[:, 19:].sum(1).numpy(), rtol=1e-3)
    assert not np.allclose(late.nll, bins["20-59"].nll, rtol=1e-3)
    with pytest.raises(OptionError, match="before it compresses"):
        longtext.by_position(model, lambda model: SnapKV().cache(model), tokens, [20, 60])
    with pytest.raises(OptionError, match="edges"):
        longtext.by_position(model, lambda model: policy.cache(model), tokens, [20, 20])


def test_contexts_of_two_lengths_are_no_batch(model) -> None:
    with pytest.raises(OptionError, match=r"\[1, 2\]"):
        longtext.read(model, [Context("a", (1,), ()), Context("b", (1, 2), ())])
