"""Log-likelihoods of candidates after a prompt, each prompt read once.

Prompts are padded on the left, so all end in one column: a single pass gives the scores of one-token
candidates, and longer candidates continue from its cache. Text is cut into tokens as in EleutherAI's lm-eval (prompt and
candidate encoded together, then cut where the prompt's own tokens end), so that its scores agree.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from refimpl.core.errors import CalibrationError, OptionError
from refimpl.lab.measure.tasks.items import Item

_TOKENS = 4096  # of a batch, its candidates' copies of the prompt included
_POSITIONS = 512  # of a batch whose logits are held: 100 MB in fp32 for 49 thousand words


@dataclass(frozen=True)
class Encoded:
    """Token ids of a prompt and of its candidates, the answer first."""

    prompt: list[int]
    candidates: list[list[int]]

    @property
    def longer(self) -> list[list[int]]:
        """The candidates that need a pass of their own."""
        return [ids for ids in self.candidates if len(ids) > 1]


@dataclass(frozen=True)
class Scores:
    """Scores of a model on each item of one task.

    Attributes:
        ids: of the items.
        free: float64 [n], 1 where each token of the answer is the likeliest, given those before it.
        restricted: float64 [n], 1 where the answer is likelier than every distractor (sums over tokens, not divided by
            their number: lm-eval's acc, not acc_norm); 1/k where k candidates are equally likely, as happens in bf16.
        loglik: float64 [n], log-likelihood of the answer in nats.
        chance: float64 [n], what guessing among the candidates gives.
    """

    ids: list[str]
    free: np.ndarray
    restricted: np.ndarray
    loglik: np.ndarray
    chance: np.ndarray


def encode(item: Item, tokenizer: PreTrainedTokenizerBase, limit: int | None = None) -> Encoded:
    """Tokens of an item.

    Args:
        item: to encode.
        tokenizer: of the model; what it puts before every text (Llama's BOS) is kept.
        limit: longest sequence the model reads; of a longer prompt only the end is kept.

    Raises:
        OptionError: a candidate without tokens of its own.

    Example:
        >>> from refimpl.lab.models import small
        >>> item = Item("1", "the river", "and", ("the sea",))
        >>> [small.tokenizer().decode(ids) for ids in encode(item, small.tokenizer()).candidates]
        [' and', ' the sea']
    """
    prompt = tokenizer.encode(item.prompt)
    candidates = []
    for candidate in (item.answer, *item.distractors):
        ids = tokenizer.encode(f"{item.prompt} {candidate}")[len(prompt) :]
        if not ids:
            raise OptionError(f"item {item.id!r}: the tokenizer has no token for the candidate {candidate!r}")
        candidates.append(ids)
    if limit is not None:
        # The last token of a candidate is predicted, never read.
        prompt = prompt[-max(1, limit + 1 - max(map(len, candidates))) :]
    return Encoded(prompt, candidates)


def score_items(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    found: Sequence[Item],
    progress: bool = True,
    label: str = "tasks",
) -> Scores:
    """Score a model on items.

    Args:
        model: a Hugging Face causal LM on any device, compressed or not. Training flags are left as found.
        tokenizer: that belongs to it.
        found: the items.
        progress: show a bar if this takes longer than two seconds.
        label: of the bar.

    Raises:
        OptionError: no items, or a tokenizer that does not belong to the model.
        CalibrationError: log-likelihoods that are not finite; the message names the item.

    Example:
        >>> from refimpl.lab.models import small
        >>> item = Item("1", "a b c d e f a b c d e", "f", ("q",))
        >>> score_items(small.load("llama-small"), small.tokenizer(), [item]).restricted
        array([1.])
    """
    if not found:
        raise OptionError("there are no items to score")
    config = cast(Any, model).config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    encoded = [encode(item, tokenizer, limit) for item in found]
    vocabulary = cast(Any, model).get_input_embeddings().num_embeddings
    for item, tokens in zip(found, encoded, strict=True):
        most = max(max(tokens.prompt), *map(max, tokens.candidates))
        if most >= vocabulary:
            raise OptionError(
                f"item {item.id!r} has the token {most}, outside the model's vocabulary of {vocabulary}; "
                "use the tokenizer that belongs to the model"
            )
    loglik: list[list[float]] = [[] for _ in found]
    greedy = np.zeros(len(found))
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with (
            torch.inference_mode(),
            tqdm(total=len(found), desc=label, unit="item", delay=2, leave=False, disable=not progress) as bar,
        ):
            for batch in _batches(encoded):
                for k, (logs, hit) in zip(batch, _score(model, [encoded[k] for k in batch]), strict=True):
                    if not all(map(math.isfinite, logs)):
                        raise CalibrationError(
                            f"the log-likelihoods of item {found[k].id!r} are not finite; look for NaN in the weights "
                            "or use a wider dtype"
                        )
                    loglik[k], greedy[k] = logs, hit
                bar.update(len(batch))
    finally:
        for module in training:
            module.training = True
    return Scores(
        ids=[item.id for item in found],
        free=greedy,
        restricted=np.array([_first_is_best(logs) for logs in loglik]),
        loglik=np.array([logs[0] for logs in loglik]),
        chance=np.array([item.chance for item in found]),
    )


def _first_is_best(logs: list[float]) -> float:
    best = max(logs)
    return 1 / logs.count(best) if logs[0] == best else 0.0


def _batches(encoded: list[Encoded]) -> Iterator[list[int]]:
    """Numbers of items of like length, the longest first, so that a batch too large for the memory shows at once."""
    batch: list[int] = []
    copies = positions = width = 0
    for k in sorted(range(len(encoded)), key=lambda k: -len(encoded[k].prompt)):
        mine = max(1, len(encoded[k].longer))
        logits = 1 + sum(len(ids) - 1 for ids in encoded[k].longer)
        full = (copies + mine) * width > _TOKENS or positions + logits > _POSITIONS
        # Padding costs as much as text; very small batches cost more, as packed layers are unpacked for each.
        uneven = len(encoded[k].prompt) < 0.8 * width and 4 * copies * width > _TOKENS
        if batch and (full or uneven):
            yield batch
            batch, copies, positions = [], 0, 0
        width = len(encoded[batch[0] if batch else k].prompt)
        batch.append(k)
        copies += mine
        positions += logits
    if batch:
        yield batch


def _score(model: nn.Module, batch: list[Encoded]) -> list[tuple[list[float], bool]]:
    """Log-likelihood of each candidate, and whether greedy decoding writes the first one."""
    prompts, mask = _pad([tokens.prompt for tokens in batch], left=True)
    logits, cache = _forward(model, prompts, mask, keep=1, cache=True)
    first = _log_softmax(logits[:, -1])
    rows = [k for k, tokens in enumerate(batch) for _ in tokens.longer]
    rest = iter(_continue(model, batch, rows, mask, cache) if rows else ())
    results = []
    for k, tokens in enumerate(batch):
        logs = []
        for n, ids in enumerate(tokens.candidates):
            log = float(first[k, ids[0]])
            hit = int(first[k].argmax()) == ids[0]
            if len(ids) > 1:
                more, same = next(rest)
                log, hit = log + more, hit and same
            logs.append(log)
            if n == 0:
                greedy = hit
        results.append((logs, greedy))
    return results


def _continue(
    model: nn.Module, batch: list[Encoded], rows: list[int], mask: Tensor, cache: Any
) -> list[tuple[float, bool]]:
    """Log-likelihood of all tokens but the first of the longer candidates; `rows` says whose each is."""
    candidates = [ids for tokens in batch for ids in tokens.longer]
    read, here = _pad([ids[:-1] for ids in candidates], left=False)
    index = torch.tensor(rows)
    if _reusable(cache):
        cache.batch_select_indices(index.to(cache.layers[0].keys.device))
        logits, _ = _forward(model, read, torch.cat([mask[index], here], 1), keep=read.shape[1], cache=cache)
    else:  # a recurrent state, or no cache at all: read the prompts again
        whole = [batch[k].prompt + ids[:-1] for k, ids in zip(rows, candidates, strict=True)]
        padded, mask = _pad(whole, left=True)
        logits, _ = _forward(model, padded, mask, keep=read.shape[1], cache=False)
        shift = read.shape[1] - here.sum(1, keepdim=True) + torch.arange(read.shape[1])
        logits = logits.gather(1, (shift % read.shape[1])[..., None].expand_as(logits).to(logits.device))
    results = []
    for k, ids in enumerate(candidates):
        logs, target = _log_softmax(logits[k, : len(ids) - 1]), torch.tensor(ids[1:])
        found = logs.gather(1, target.to(logs.device)[:, None])
        results.append((float(found.double().sum()), bool((logs.argmax(1).cpu() == target).all())))
    return results


def _reusable(cache: Any) -> bool:
    """Whether rows of the cache can be copied and continued: keys and values by position, nothing else."""
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    return isinstance(cache, DynamicCache) and all(type(layer) in kinds for layer in cache.layers)


def _log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits.float(), dim=-1)


def _pad(rows: list[list[int]], left: bool) -> tuple[Tensor, Tensor]:
    """Ids and mask, both int64 [rows, longest]."""
    width = max(map(len, rows))
    ids, mask = (torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long))
    for k, row in enumerate(rows):
        part = slice(width - len(row), width) if left else slice(len(row))
        ids[k, part], mask[k, part] = torch.tensor(row), 1
    return ids, mask


def _forward(model: nn.Module, ids: Tensor, mask: Tensor, keep: int, cache: Any) -> tuple[Tensor, Any]:
    """Logits of the last `keep` positions, and the cache; `cache` is one to go on from, or whether to make one."""
    device = cast(Any, model).get_input_embeddings().weight.device
    taken = inspect.signature(model.forward).parameters
    arguments: dict[str, Any] = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    if "position_ids" in taken:
        arguments["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :].to(device)
    if "logits_to_keep" in taken:
        arguments["logits_to_keep"] = keep
    if isinstance(cache, bool):
        arguments["use_cache"] = cache
    else:
        arguments |= {"past_key_values": cache, "use_cache": True}
    out = model(**arguments)
    return out.logits[:, -keep:], getattr(out, "past_key_values", None)
