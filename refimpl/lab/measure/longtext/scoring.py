"""Read a long context once, compress its cache in any way, and measure which questions can still be answered.

A cache is made by a function of the model, ``lambda model: SnapKV().cache(model, budget=0.2, length=2048)``, so any
way of compressing can be measured. Caches that read a prompt exactly get the same keys, values and queries, whatever
they keep of them: the model reads a context once (`Reading`), and each cache takes what it needs from that.

Everything after the prompt counts as decoded: each token is compressed as it arrives, as in ``generate``. Answers come
from the task, not from the model, so an answer costs one short pass: greedy decoding would write it if and only if each
of its tokens is the likeliest.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from refimpl.core.cache import CompressedCache, Incoming, KVLayer, cache_argument, prefill
from refimpl.core.cache.tap import Recording, RecordingLayer
from refimpl.core.errors import CalibrationError, OptionError
from refimpl.lab.measure.longtext.made import Article, Context
from refimpl.lab.measure.metrics import Perplexity, Tokens

Factory = Callable[[PreTrainedModel], CompressedCache]


class Reading:
    """A batch of contexts that the model has read, uncompressed; caches are made from it.

    Args:
        model: a decoder of transformers.
        ids: int64 [B, T], without padding.

    Attributes:
        ids: as given.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from refimpl.baselines.kvcache import SnapKV
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, num_attention_heads=2, hidden_size=16,
        ...     intermediate_size=16, vocab_size=50))
        >>> reading = Reading(model, torch.arange(40).unsqueeze(0))
        >>> cache = reading.cache(lambda model: SnapKV(capacity=12, window=4).cache(model))
        >>> cache.get_seq_length(), cache.layers[0].parts["kept_keys"].shape[2]
        (40, 8)
    """

    def __init__(self, model: PreTrainedModel, ids: Tensor) -> None:
        self.model, self.ids = model, ids.to(model.device)

    @cached_property
    def _exact(self) -> CompressedCache:
        """Read when a cache first needs it: those that compress a prompt as it comes read it themselves."""
        cache = Recording().cache(self.model)
        prefill(self.model, cache, self.ids, chunk=self.ids.shape[1])
        return cache

    @cached_property
    def _shown(self) -> list[list[Incoming]]:
        return self._take(self._exact)

    @staticmethod
    def _take(cache: CompressedCache) -> list[list[Incoming]]:
        return [layer.take() if isinstance(layer, RecordingLayer) else [] for layer in cache.layers]

    def cache(self, factory: Factory, ask: Tensor | None = None) -> CompressedCache:
        """A cache that has taken the contexts in and compressed them.

        Args:
            factory: makes the empty cache.
            ask: int64 [B, n], a question at the end of the prompt; None compresses the contexts alone.
        """
        cache = factory(self.model)
        if cache.streamed:
            prompt = self.ids if ask is None else torch.cat([self.ids, ask.to(self.ids.device)], 1)
            prefill(self.model, cache, prompt, chunk=prompt.shape[1])
            return cache
        shown, exact = self._shown, self._exact
        if ask is not None:
            exact = _fork(self._exact)
            prefill(self.model, exact, ask.to(self.ids.device), chunk=ask.shape[1])
            shown = [a + b for a, b in zip(shown, self._take(exact), strict=True)]
        for place, (layer, pieces) in enumerate(zip(cache.layers, shown, strict=True)):
            if isinstance(layer, KVLayer):
                for incoming in pieces:
                    layer.replay(incoming)
            else:  # a sliding window is the library's, and the same in every cache
                cache.layers[place] = copy.copy(exact.layers[place])
        cache.finish()
        return cache


def _fork(cache: CompressedCache) -> CompressedCache:
    other = cache.copy()
    for layer in other.layers:
        if isinstance(layer, RecordingLayer):
            layer.shown = []
    return other


@torch.inference_mode()
def decode(model: PreTrainedModel, cache: CompressedCache, ids: Tensor, keep: int = 0) -> Tensor:
    """Feed tokens as if the model had written them, one after the other, to a copy of a cache.

    Args:
        model: of the cache.
        cache: stays as it is.
        ids: int64 [B, n].
        keep: how many of the last tokens' logits are wanted; 0 for all.

    Returns:
        Logits [B, keep or n, vocabulary].
    """
    fork = cache.copy()
    fork.activate_past_recording()  # or several tokens would count as one prompt
    return cast(Tensor, model(ids.to(model.device), logits_to_keep=keep, **cache_argument(fork)).logits)


@dataclass(frozen=True)
class Answers:
    """Scores of the answers to the questions of some contexts; every array is [questions].

    Attributes:
        ids: of the questions.
        depth: float64, place of the answer in its context, 0 to 1.
        free: float64, 1 where greedy decoding writes the answer.
        restricted: float64, 1 where each token of the answer is likelier than its rivals.
        loglik: float64, of the answer, in nats.
        chance: float64, what guessing among the rivals gives.
    """

    ids: list[str]
    depth: np.ndarray
    free: np.ndarray
    restricted: np.ndarray
    loglik: np.ndarray
    chance: np.ndarray


def batches(contexts: Sequence[Any], size: int) -> list[list[Any]]:
    """Contexts in groups that are read together.

    Raises:
        OptionError: they are not equally long.

    Example:
        >>> batches([Context("a", (1, 2), ()), Context("b", (3, 4), ()), Context("c", (5, 6), ())], 2)[1][0].id
        'c'
    """
    lengths = {len(context.ids) for context in contexts}
    if len(lengths) != 1:
        raise OptionError(f"contexts have {sorted(lengths)} tokens; give some, and all of one length")
    return [list(contexts[first : first + size]) for first in range(0, len(contexts), size)]


def read(model: PreTrainedModel, contexts: Sequence[Context] | Sequence[Article]) -> Reading:
    """Read a batch of contexts of one length."""
    (batch,) = batches(contexts, len(contexts))
    return Reading(model, torch.tensor([context.ids for context in batch]))


@torch.inference_mode()
def answer(
    reading: Reading, contexts: Sequence[Context], cache: CompressedCache | None = None, factory: Factory | None = None
) -> Answers:
    """Ask every question of some contexts.

    Args:
        reading: of these contexts.
        contexts: all with the same number of questions.
        cache: prepared from the reading, without any question: each question continues a copy of it.
        factory: instead of a cache: `Question.ask` becomes the end of the prompt, and each question gets a cache of its
            own, whose method could use the question when it chose what to keep.

    Raises:
        OptionError: both or none of cache and factory; or a factory, and questions that are not equally long.
    """
    if (cache is None) == (factory is None):
        raise OptionError("give either a cache (questions come later) or a factory (each is in its prompt)")
    found: list[tuple[Any, ...]] = []
    for asked in zip(*(context.questions for context in contexts), strict=True):
        if factory is not None:
            if len({len(question.ask) for question in asked}) > 1:
                raise OptionError(
                    f"contexts: the questions {[question.id for question in asked]} differ in length; give one context "
                    "at a time"
                )
            prompt = torch.tensor([question.ask for question in asked])
            logits = _answers(
                reading.model, reading.cache(factory, prompt), [q.lead for q in asked], [q.answer for q in asked]
            )
        else:
            assert cache is not None
            heads = [question.ask + question.lead for question in asked]
            logits = _answers(reading.model, cache, heads, [question.answer for question in asked])
        for question, rows in zip(asked, logits, strict=True):
            judged = _judge(rows, question.answer, question.rivals)
            found.append((question.id, question.depth, *judged, question.chance))
    ids, *columns = zip(*found, strict=True)
    return Answers(list(ids), *(np.array(column, dtype=np.float64) for column in columns))


def _answers(
    model: PreTrainedModel, cache: CompressedCache, heads: Sequence[tuple[int, ...]], answers: Sequence[tuple[int, ...]]
) -> list[Tensor]:
    """Logits of each answer's tokens after its head, [tokens, vocabulary] each; rows are padded at their ends."""
    rows = [head + answer[:-1] for head, answer in zip(heads, answers, strict=True)]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for k, row in enumerate(rows):
        ids[k, : len(row)] = torch.tensor(row)
    first = min(map(len, heads)) - 1  # logits before it are not wanted, and cost more than the layers
    logits = decode(model, cache, ids, keep=ids.shape[1] - first)
    return [
        logits[k, len(head) - 1 - first : len(head) - 1 - first + len(answer)]
        for k, (head, answer) in enumerate(zip(heads, answers, strict=True))
    ]


def _judge(logits: Tensor, answer: tuple[int, ...], rivals: tuple[int, ...]) -> tuple[float, float, float]:
    """Free, restricted and log-likelihood of an answer from the logits at its tokens."""
    logs = logits.float().log_softmax(-1)
    target = torch.tensor(answer, device=logs.device)
    among = torch.tensor(rivals, device=logs.device)
    free = bool((logs.argmax(-1) == target).all())
    best = among[logs[:, among].argmax(-1)]
    restricted = bool((best == target).all())
    loglik = float(logs.gather(1, target.unsqueeze(1)).sum())
    if loglik != loglik:
        raise CalibrationError("the logits of an answer are not numbers; look for NaN in the weights")
    return float(free), float(restricted), loglik


@dataclass(frozen=True)
class Continued:
    """How well the continuations of some articles were predicted.

    Attributes:
        perplexity: of their tokens, the article as unit. The first token is left out: it is predicted by the last token
            of the prompt, which was read uncompressed.
        words: `Answers` to `Article.targets`; restricted compares the first token of a word with its rivals.
    """

    perplexity: Perplexity
    words: Answers


@torch.inference_mode()
def read_on(model: PreTrainedModel, articles: Sequence[Article], cache: CompressedCache) -> Continued:
    """Predict what follows in some articles.

    Args:
        model: of the cache.
        articles: whose contexts the cache has taken in, with continuations of one length.
        cache: stays as it is.
    """
    rest = torch.tensor([article.rest for article in articles])
    logits = decode(model, cache, rest[:, :-1])
    nll = np.array([float(_nll(logits[k], rest[k, 1:]).sum()) for k in range(len(articles))])
    counts = np.full(len(articles), rest.shape[1] - 1)
    value = float(np.exp(nll.sum() / counts.sum()))
    found: list[tuple[Any, ...]] = []
    for k, article in enumerate(articles):
        for target in article.targets:
            rows = logits[k, target.place - 1 : target.place - 1 + len(target.tokens)]
            free, _, loglik = _judge(rows, target.tokens, target.rivals)
            _, restricted, _ = _judge(rows[:1], target.tokens[:1], target.rivals)
            depth = 1 + target.place / len(article.ids)
            found.append((target.id, depth, free, restricted, loglik, 1 / len(target.rivals)))
    columns = list(zip(*found, strict=True)) if found else [()] * 6
    words = Answers(list(columns[0]), *(np.array(column, dtype=np.float64) for column in columns[1:]))
    return Continued(Perplexity(value, nll, counts, [article.id for article in articles]), words)


def _nll(logits: Tensor, target: Tensor) -> Tensor:
    """-log p of each token, fp64 [n]; logits [n, vocabulary]."""
    pieces = zip(logits.split(256), target.to(logits.device).split(256), strict=True)
    return torch.cat([F.cross_entropy(a.float(), b, reduction="none").double().cpu() for a, b in pieces])


@torch.inference_mode()
def by_position(
    model: PreTrainedModel, factory: Factory, tokens: Tokens, edges: Sequence[int], batch_size: int = 4
) -> dict[str, Perplexity]:
    """Perplexity of tokens at different distances from the beginning, with every query reading the compressed cache.

    The cache reads the text as it would read decoded tokens ("streamed"). One exact reading would show no loss at all,
    because tokens would be dropped only after they had been attended to.

    Args:
        model: a decoder.
        factory: makes a streamed cache.
        tokens: rows of one length, all from the beginning of a document or all from anywhere.
        edges: positions where bins begin and end, ascending; position p is predicted from the p tokens before it.
        batch_size: rows at a time.

    Returns:
        Perplexity of each bin, by the name "first-last" of its positions.

    Raises:
        OptionError: a cache that attends to its prompt exactly; edges that are not positions in order.
    """
    length = tokens.ids.shape[1]
    if list(edges) != sorted(set(edges)) or len(edges) < 2 or edges[0] < 1 or edges[-1] > length:
        raise OptionError(f"edges={list(edges)}: give ascending positions from 1 to {length}")
    rows = []
    for ids in tokens.ids.split(batch_size):
        cache = factory(model)
        if not cache.streamed:
            raise OptionError(
                f"factory: {type(cache.policy).__name__} attends to its prompt before it compresses; make the cache "
                "with prefill='streamed', or score a continuation (`read_on`)"
            )
        with cache.prompt():
            logits = model(ids.to(model.device), **cache_argument(cache)).logits
        rows += [_nll(logits[k, :-1], ids[k, 1:]).numpy() for k in range(len(ids))]
    losses = np.stack(rows)  # column p - 1 is position p
    found = {}
    for first, stop in zip(edges, edges[1:], strict=False):
        nll = losses[:, first - 1 : stop - 1].sum(1)
        counts = np.full(len(nll), stop - first)
        value = float(np.exp(nll.sum() / counts.sum()))
        found[f"{first}-{stop - 1}"] = Perplexity(value, nll, counts, list(tokens.units))
    return found
