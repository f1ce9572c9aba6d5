"""Four kinds of text as windows of tokens, and a small Llama to train on them.

For chapters that mix, weight or select data, or train on one kind after another: ``wikipedia``, ``python`` and ``prose`` are the
corpora of `refimpl.lab.data.text`; ``cpp`` is the C++ headers inside the installed torch, so it differs between versions of
torch (keep `domain_hash` beside a number). Train on the split ``"calibration"``, choose by ``"validation"``, report on
``"test"``; a document is in one split, and near-duplicates are left out.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from refimpl.core.arguments import checked
from refimpl.core.errors import CalibrationError, OptionError, nearest, positive_integer
from refimpl.lab import wheels
from refimpl.lab.data import text
from refimpl.lab.measure.bits import BitsPerByte, bits_per_byte
from refimpl.lab.models import small

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

DOMAINS = ("wikipedia", "python", "prose", "cpp")

_CPP_BYTES = 3_000_000  # of about 12 million: as much as the standard library of Python


# what torch's packaging writes around each of its headers
_PACKED = (
    r"\A#if !defined\(TORCH_STABLE_ONLY\)[^\n]*\n",
    r"\n#else\n#error [^\n]*TORCH_[^\n]*\n#endif[^\n]*TORCH_STABLE_ONLY[^\n]*\n*\Z",
)


@checked()
def documents(domain: str, split: str) -> list[text.Document]:
    """All documents of one split of a domain, in the domain's order.

    Args:
        domain: ``"wikipedia"``, ``"python"``, ``"prose"`` or ``"cpp"``.
        split: ``"calibration"``, ``"validation"`` or ``"test"``.

    Raises:
        OptionError: unknown domain or split.
        CalibrationError: this torch came without its headers.

    Example:
        >>> "#include" in documents("cpp", "validation")[0].text
        True
    """
    _check(domain, split)
    if domain != "cpp":
        return text.documents(domain, split)
    with _cpp().open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    return [text.Document(r["id"], r["title"], r["text"]) for r in records if r["split"] == split]


@checked()
def windows(
    domain: str, split: str, length: int, stride: int | None = None, count: int | None = None
) -> tuple[Tensor, list[str]]:
    """Windows of the small models' tokens, cut as `refimpl.lab.data.windows.windows` cuts them.

    The tokens of a domain are kept in the cache: making them takes seconds, reading them milliseconds.

    Args:
        domain, split: as in `documents`.
        length: predicted tokens in each window; a window holds one more.
        stride: tokens between the starts of two windows; ``length`` if None. Less gives overlapping windows: for
            training only.
        count: that many windows, evenly spaced over the split; all of them if None.

    Returns:
        int64 ``[n, length + 1]``, and the document of each window.

    Raises:
        OptionError: unknown domain or split, a length, stride or count that is not a positive integer.
        CalibrationError: no document is long enough, or there are fewer than ``count`` windows.

    Example:
        >>> ids, units = windows("prose", "validation", 64, count=8)
        >>> ids.shape, len(units)
        (torch.Size([8, 65]), 8)
    """
    _check(domain, split)
    stride = length if stride is None else stride
    for name, value in (("length", length), ("stride", stride), ("count", 1 if count is None else count)):
        positive_integer(name, value)
    rows: list[Tensor] = []
    units: list[str] = []
    ids, documents_tokens = _tokens(domain, split)
    for unit, tokens in zip(documents_tokens, ids, strict=True):
        if len(tokens) > length:
            rows.append(tokens.unfold(0, length + 1, stride))
            units += [unit] * len(rows[-1])
    if len(units) < (count or 1):
        raise CalibrationError(
            f"domain={domain!r}, split={split!r}: {len(units)} windows of length={length}, count={count} asked for; "
            "ask for fewer or for a shorter length"
        )
    found = torch.cat(rows).long()
    if count is None:
        return found, units
    chosen = [i * len(units) // count for i in range(count)]
    return found[chosen], [units[i] for i in chosen]


@checked()
def domain_hash(domain: str) -> str:
    """SHA-256 of the parsed and split documents, for the header of result files.

    Raises:
        OptionError: unknown domain.

    Example:
        >>> len(domain_hash("cpp"))
        64
    """
    _check(domain, "test")
    return wheels.sha256(_cpp()) if domain == "cpp" else text.corpus_hash(domain)


def llama(width: int = 64, layers: int = 2, hidden: int = 192, context: int = 128, seed: int = 0) -> LlamaForCausalLM:
    """A new Llama for the 1024 tokens of `refimpl.lab.models.small.tokenizer`, in fp32; 0.17 million parameters by default.

    Args:
        width: of the residual stream, in heads of 32.
        layers: blocks.
        hidden: width of the feed-forward network.
        context: longest sequence, in tokens.
        seed: of the weights; the global random state is left alone.

    Raises:
        OptionError: ``width`` is not a multiple of 32.

    Example:
        >>> model = llama()
        >>> sum(p.numel() for p in model.parameters()), model.dtype
        (172352, torch.float32)
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    if width < 32 or width % 32:
        raise OptionError(f"width={width}: heads are 32 wide, use a multiple of 32")
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        intermediate_size=hidden,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        attn_implementation="eager",  # type: ignore[call-arg]  # plain products: no kernel is chosen by the machine
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def measured(model: nn.Module, windows: Tensor, units: Sequence[str]) -> BitsPerByte:
    """Bits that a model of the small tokenizer's tokens spends on each byte, by document.

    Args:
        model: `llama`, or a shipped one.
        windows, units: from the function `windows`.

    Raises:
        CalibrationError: as in `refimpl.lab.measure.bits.bits_per_byte`.

    Example:
        >>> found = measured(llama(), *windows("wikipedia", "validation", 64, count=4))
        >>> 3 < found.value < 8
        True
    """
    return bits_per_byte(model, windows, units, _tokenizer(), batch_size=32)


@functools.cache
def _tokenizer() -> PreTrainedTokenizerFast:
    return small.tokenizer()


def _check(domain: str, split: str) -> None:
    if domain not in DOMAINS:
        raise OptionError(f"domain={domain!r} must be {nearest(str(domain), DOMAINS)}")
    if split not in text.SPLITS:
        raise OptionError(f"split={split!r} must be {nearest(str(split), text.SPLITS)}")


@functools.lru_cache(maxsize=4)
def _tokens(domain: str, split: str) -> tuple[list[Tensor], list[str]]:
    """The tokens of every document, int16, and its id."""
    tokenizer_file = small.path("llama-small") / "tokenizer.json"
    key = hashlib.sha256((domain_hash(domain) + wheels.sha256(tokenizer_file)).encode()).hexdigest()[:12]

    def build(staging: Path) -> None:
        found = documents(domain, split)
        ids = _tokenizer()(
            [document.text for document in found], add_special_tokens=False, split_special_tokens=True, verbose=False
        ).input_ids
        tensors = {
            "ids": torch.tensor([token for row in ids for token in row], dtype=torch.int16),
            "lengths": torch.tensor([len(row) for row in ids]),
        }
        units = json.dumps([document.id for document in found])
        save_file(tensors, staging / "tokens.safetensors", metadata={"units": units})

    path = wheels.build_folder(f"tokens-{domain}-{split}-{key}", build) / "tokens.safetensors"
    with safe_open(path, "pt") as file:
        ids = file.get_tensor("ids").split(file.get_tensor("lengths").tolist())
        return list(ids), json.loads(file.metadata()["units"])


def _cpp() -> Path:
    """The parsed and split headers: a line holds id, title, text and split of one file."""
    sources = Path(__file__).read_bytes() + Path(text.__file__).read_bytes()
    key = hashlib.sha256(sources + torch.__version__.encode()).hexdigest()[:12]

    def build(staging: Path) -> None:
        # in an order of no meaning, so that the cap takes a fair sample
        order = sorted(_headers(), key=lambda header: hashlib.sha256(header[0].encode()).digest())
        size = 0
        parsed = []
        for name, source in order:
            size += len(source.encode())
            if size > _CPP_BYTES:
                break
            parsed.append((source, text.Document(f"cpp/{name}", name, source)))
        with (staging / "documents.jsonl").open("w", encoding="utf-8") as sink:
            for split, document in text._split(parsed, "cpp"):
                record = {"id": document.id, "title": document.title, "text": document.text, "split": split}
                sink.write(json.dumps(record, ensure_ascii=False) + "\n")

    return wheels.build_folder(f"text-cpp-{key}", build) / "documents.jsonl"


def _headers() -> Iterator[tuple[str, str]]:
    """Path below torch's include folder and text of each header that a person wrote."""
    root = Path(torch.__file__).parent / "include"
    paths = sorted(path for path in root.rglob("*") if path.suffix in (".h", ".hpp", ".cuh"))
    if not paths:
        raise CalibrationError(f"domain='cpp': {root} holds no headers; reinstall torch from a wheel")
    for path in paths:
        source = path.read_text(encoding="utf-8", errors="replace")
        for packed in _PACKED:
            source = re.sub(packed, "", source)
        source = without_licence(source)
        written = not re.search(r"generated (by|from)|@generated|do not edit", source[:1000], re.IGNORECASE)
        # beyond these sizes lie lists of includes and tables
        if written and 1000 <= len(source) <= 60_000:
            yield path.relative_to(root).as_posix(), source


def without_licence(source: str) -> str:
    """C or C++ source without the comment at its head, if that is a licence: one text in thousands of files.

    Example:
        >>> without_licence("// Copyright Ada\\n// All rights reserved.\\n\\n#pragma once\\n")
        '#pragma once\\n'
        >>> without_licence("// What this is for\\nint a;\\n")
        '// What this is for\\nint a;\\n'
    """
    head = re.match(r"(?:\s*(?:/\*.*?\*/|//[^\n]*(?:\n|$)))+", source, re.DOTALL)
    if head and re.search(r"copyright|licen[cs]e|\(c\)|spdx", head[0], re.IGNORECASE):
        source = source[head.end() :]
    return source.lstrip()
