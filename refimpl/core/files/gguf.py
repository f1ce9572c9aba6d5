"""Export to GGUF, the file format of llama.cpp: one file with weights, architecture, tokenizer and chat template.

GGUF quantises in blocks of 32 weights: Q4_0 has a scale d and codes q for ``d (q - 8)``, Q4_1 adds an offset m for
``d q + m``, Q8_0 is ``d q`` with signed bytes. d and m are float16. A packed layer whose groups are multiples of 32
inputs fits one of them without loss: at most 3 bits and symmetric 4 bits are Q4_0, other 4 bits Q4_1, up to 8 bits whose
steps from zero fit a signed byte Q8_0. Whether it does is checked by decoding what is written.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from refimpl.core.errors import CheckpointError, OptionError, require
from refimpl.core.files.export import _in_files, _Source
from refimpl.core.files.io import atomic_write
from refimpl.core.layers import CompressedLayer, PackedLinear

# the architecture of each class in llama.cpp, and whether it takes queries and keys in another order than transformers
_ARCHITECTURES = {
    "LlamaForCausalLM": ("llama", True),
    "MistralForCausalLM": ("llama", True),
    "Qwen2ForCausalLM": ("qwen2", False),
    "Qwen3ForCausalLM": ("qwen3", False),
}
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {_CONTRACTIONS + r"\p{N}{1,3}" + _REST: "llama-bpe", _CONTRACTIONS + r"\p{N}" + _REST: "qwen2"}
_BLOCK = 32
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7}
_RAW = ".weight_packed"  # a name that `_Source.pieces` lets pass with the shape of packed bytes


@dataclass(frozen=True)
class GGUFReport:
    """The result of `export_gguf`.

    Attributes:
        path: the file.
        types: how many tensors have each type of GGUF.
        remarks: what is not stored as it was in the model, by reason, with the names of the layers.
    """

    path: Path
    types: dict[str, int]
    remarks: dict[str, list[str]]

    def __str__(self) -> str:
        text = f"{self.path}: " + ", ".join(f"{count} {kind}" for kind, count in self.types.items())
        for reason, names in self.remarks.items():
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            text += f"\n{names[0]}{others}: {reason}"
        return text


@torch.no_grad()
def export_gguf(model: nn.Module, path: str | Path, tokenizer: Any) -> GGUFReport:
    """Write a Llama, Mistral, Qwen2 or Qwen3 for llama.cpp and what is built on it.

    Quantised layers keep their weights to the last bit where a type of GGUF holds them, as the first lines of this
    module say; what none holds goes to the nearest, with a remark: Q8_0 for quantised weights, float16 (float32 beyond
    its range) for others. Low-rank paths are multiplied out. Norms and biases are float32.

    Args:
        model: a language model of transformers.
        path: the file, ``*.gguf``; an earlier one is replaced.
        tokenizer: the fast tokenizer of the model, a byte-level BPE; its chat template goes with it.

    Returns:
        The types that were written, and the remarks.

    Raises:
        OptionError: an architecture, activation, rotation or tokenizer that is not supported, by name; quantised
            inputs; a path that does not end in .gguf.
        CheckpointError: the path holds something else, or the model is not one of transformers.
        MissingExtra: gguf is not installed.

    Example:
        >>> import tempfile
        >>> from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        >>> from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
        >>> from refimpl import RTN, compress
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1,
        ...     intermediate_size=64, vocab_size=256)).eval()
        >>> _ = compress(model, RTN(bits=4, group_size=32, symmetric=True), progress=False)
        >>> alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        >>> backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
        >>> backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
        >>> export_gguf(model, tempfile.mkdtemp() + "/tiny.gguf", tokenizer).types
        {'F16': 2, 'F32': 3, 'Q4_0': 7}
    """
    path = Path(path)
    check_gguf(model)
    if path.suffix != ".gguf":
        raise OptionError(f"path={str(path)!r}: name a file that ends in .gguf")
    if path.is_dir() or (path.exists() and not _is_gguf(path)):
        raise CheckpointError(f"path={str(path)!r} holds something that is no GGUF; choose another path")
    config: Any = model.config
    vocabulary = _vocabulary(tokenizer, config.vocab_size)
    gguf = require("gguf", "export")
    source = _Source(model)
    architecture, permuted = _ARCHITECTURES[type(model).__name__]
    names = gguf.get_tensor_name_map(
        next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), config.num_hidden_layers
    )
    types: Counter[str] = Counter()
    remarks: dict[str, list[str]] = {}
    written: dict[str, str] = {}  # type of each packed layer

    def tensors(name: str, layer: CompressedLayer) -> dict[str, Tensor]:
        found = source.dense(name, layer, bases=False)
        packed = _in_files(layer)
        if isinstance(packed, PackedLinear) and packed.bits is not None:
            kind, raw, remark = _quantised(packed, gguf)
        else:
            kind, raw, remark = "", None, None
            if any(isinstance(part, PackedLinear) and part.bits is not None for part in packed.modules()):
                remark = "quantised weights and a low-rank path, multiplied out to ordinary weights"
        if remark is not None:
            remarks.setdefault(remark, []).append(name)
        if raw is not None:
            del found[f"{name}.weight"]
            found[name + _RAW], written[name] = raw, kind
        return found

    with atomic_write(path) as temporary:
        # the writer keeps tensors in a temporary file until it knows all of them: beside the model, one block is in memory
        writer = gguf.GGUFWriter(temporary, architecture, use_temp_file=True)
        _add_architecture(writer, config)
        _add_vocabulary(writer, vocabulary, tokenizer)
        tied = getattr(model.get_output_embeddings(), "weight", None) is model.get_input_embeddings().weight  # type: ignore[operator]
        for piece in source.pieces(tensors, source.fused):
            for key, tensor in piece.items():
                if key == "lm_head.weight" and tied:
                    continue  # llama.cpp takes the embedding
                layer = key.removesuffix(_RAW)
                kind = written[layer] if key.endswith(_RAW) else _plain_type(tensor)
                if permuted and (heads := _heads(layer, config)) is not None:
                    tensor = _interleave(tensor, heads)
                target = names.get_name(layer + ".weight" if key.endswith(_RAW) else key, (".weight", ".bias"))
                if target is None:
                    raise CheckpointError(f"model: {key!r} has no name in GGUF; keep the model with save()")
                writer.add_tensor(target, _array(tensor, kind), raw_dtype=gguf.GGMLQuantizationType[kind])
                types[kind] += 1
        if (frequencies := _frequency_factors(model)) is not None:
            writer.add_tensor("rope_freqs.weight", frequencies)
            types["F32"] += 1
        usual = Counter(written.values()).most_common(1)
        writer.add_file_type(_FILE_TYPES[usual[0][0] if usual else "F16"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        remarks["a sliding window, which llama.cpp does not apply to this architecture"] = [type(model).__name__]
    return GGUFReport(path, dict(sorted(types.items())), remarks)


def check_gguf(model: nn.Module) -> None:
    """Raise `OptionError` for a model that GGUF, or we, have no place for.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> check_gguf(GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=9)))
        Traceback (most recent call last):
        ...
        refimpl.core.errors.OptionError: model=GPT2LMHeadModel: export_gguf writes LlamaForCausalLM, MistralForCausalLM, \
Qwen2ForCausalLM, Qwen3ForCausalLM; use export_dense and the converter of llama.cpp
    """
    source = _Source(model)
    kind = type(model).__name__
    if kind not in _ARCHITECTURES:
        raise OptionError(
            f"model={kind}: export_gguf writes {', '.join(_ARCHITECTURES)}; use export_dense and the converter of "
            "llama.cpp"
        )
    source.check_dense()
    config: Any = model.config
    rotation = config.rope_parameters["rope_type"]
    for name, value, known in (
        ("hidden_act", config.hidden_act, ("silu",)),
        ("rope_type", rotation, ("default", "linear", "llama3")),
    ):
        if value not in known:
            raise OptionError(
                f"model: its {name} is {value!r}, and export_gguf knows {' and '.join(map(repr, known))}; use "
                "export_dense and the converter of llama.cpp"
            )


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


# ---- weights


def _quantised(layer: PackedLinear, gguf: Any) -> tuple[str, Tensor | None, str | None]:
    """Type, rows of bytes [out, bytes] and a remark, for a quantised layer; no bytes: as ordinary weights."""
    weight = layer.to_dense().float()
    if layer.group_size % _BLOCK == 0:
        steps, scale, zero = _steps(layer)
        low, high = int(steps.min()), int(steps.max())
        kinds = [
            kind for kind, fits in (("Q4_0", -8 <= low and high <= 7), ("Q8_0", -128 <= low and high <= 127)) if fits
        ]
        if layer.bits == 4 and kinds[0] != "Q4_0":
            kinds[0] = "Q4_1"
        if kinds:
            raw = _blocks(kinds[0], steps, scale, zero)
            decoded = gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType[kinds[0]])
            if np.array_equal(decoded, _exact(layer).numpy()):
                return kinds[0], raw, None
    if layer.in_features % _BLOCK:
        return "", None, "its inputs are no multiple of 32, so its quantised weights are ordinary ones"
    raw = torch.from_numpy(gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q8_0))
    return "Q8_0", raw, "no type of GGUF has this grid; quantised again, to the nearest of Q8_0"


def _exact(layer: PackedLinear) -> Tensor:
    """The weights in float32, before they are rounded to the dtype of the layer."""
    return _in_dtype(layer, layer.scale)


def _in_dtype(layer: PackedLinear, scale: Tensor) -> Tensor:
    other = copy.copy(layer)
    other._buffers = {**layer._buffers, "scale": scale}
    other.dtype = torch.float32
    return other.to_dense()


def _steps(layer: PackedLinear) -> tuple[Tensor, Tensor, Tensor]:
    """Steps from zero [out, blocks, 32] (0 where a weight is pruned), scales and zero points [out, blocks, 1]."""
    blocks = layer.group_size // _BLOCK
    steps = _in_dtype(layer, torch.ones_like(layer.scale)).to(torch.int16).unflatten(1, (-1, _BLOCK))
    scale, zero = layer._grid()
    zero = torch.as_tensor(zero).expand(scale.shape).to(torch.int16)
    return (steps, *(tensor.repeat_interleave(blocks, 1).unsqueeze(-1) for tensor in (scale, zero)))


def _blocks(kind: str, steps: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Blocks of 32 weights ``steps * scale`` as bytes, uint8 [out, bytes]."""
    if kind == "Q8_0":
        return torch.cat([_half(scale), steps.to(torch.int8).view(torch.uint8)], -1).flatten(1)
    head = [scale]
    if kind == "Q4_0":
        codes = steps + 8
    else:
        # w = s (code - z) is also -s (15 - code) + s (15 - z): with the smaller product of the two, the offset has at
        # most the 11 significant bits of float16
        turned = zero > 7
        codes = torch.where(turned, 15 - (steps + zero), steps + zero)
        head = [torch.where(turned, -scale, scale), torch.where(turned, 15 - zero, -zero) * scale]
    low, high = codes.to(torch.uint8).split(_BLOCK // 2, -1)
    return torch.cat([*map(_half, head), low | high << 4], -1).flatten(1)


def _half(numbers: Tensor) -> Tensor:
    """float16 as bytes."""
    return numbers.to(torch.float16).view(torch.uint8)


def _plain_type(tensor: Tensor) -> str:
    """float16 for matrices it has the range for; all else in float32."""
    if tensor.dim() < 2:
        return "F32"
    wide = tensor.float()
    return "F16" if (wide.half().float() - wide).norm() <= 2**-10 * wide.norm() else "F32"


def _array(tensor: Tensor, kind: str) -> np.ndarray:
    dtype = {"F16": torch.float16, "F32": torch.float32}.get(kind, torch.uint8)
    return tensor.detach().to("cpu", dtype).contiguous().numpy()


def _heads(name: str, config: Any) -> int | None:
    """How many heads the rows of a tensor belong to; None for others than queries and keys."""
    parts = name.split(".")
    if "q_proj" in parts:
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if "k_proj" in parts else None


def _interleave(tensor: Tensor, heads: int) -> Tensor:
    """The order of llama.cpp's rotation, which turns neighbouring rows of a head; transformers turns the halves."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _frequency_factors(model: nn.Module) -> Tensor | None:
    """What divides each frequency of the rotation, float32 [head width / 2]; None if nothing does."""
    config: Any = model.config
    if config.rope_parameters["rope_type"] == "default":
        return None
    inverse: Tensor = model.model.rotary_emb.inv_freq.float().cpu()  # type: ignore[union-attr, operator, assignment]
    places = torch.arange(len(inverse), dtype=torch.float32) / len(inverse)
    return (config.rope_parameters["rope_theta"] ** -places / inverse).numpy()


def _add_architecture(writer: Any, config: Any) -> None:
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(getattr(config, "_name_or_path", "") or type(config).__name__.removesuffix("Config"))
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


# ---- tokenizer


@dataclass(frozen=True)
class _Vocabulary:
    pre: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str]


def _vocabulary(tokenizer: Any, size: int) -> _Vocabulary:
    """Tokens, their kinds as GGUF numbers them, and merges; raises `OptionError` for another kind of tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise OptionError(f"tokenizer={type(tokenizer).__name__}: pass the fast tokenizer of the model")
    description = json.loads(backend.to_str())
    pre = _pre_tokenizer(description)
    if pre is None or description["model"]["type"] != "BPE":
        raise OptionError(
            f"tokenizer={type(tokenizer).__name__}: its splitting is not that of SmolLM2, Llama 3, Qwen or GPT-2, which "
            "export_gguf knows; use export_dense and the converter of llama.cpp"
        )
    added = {token["id"]: token["special"] for token in description["added_tokens"]}
    known = {number: token for token, number in tokenizer.get_vocab().items()}
    if max(known) >= size:
        raise OptionError(f"tokenizer: it has a token {max(known)}, and the model knows {size} tokens; pass its own")
    normal, control, user, unused = 1, 3, 4, 5
    tokens = [known.get(number, f"[PAD{number}]") for number in range(size)]
    kinds = [
        (control if added[number] else user) if number in added else normal if number in known else unused
        for number in range(size)
    ]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in description["model"]["merges"]]
    return _Vocabulary(pre, tokens, kinds, merges)


def _pre_tokenizer(description: dict[str, Any]) -> str | None:
    """llama.cpp's name for the way a tokenizer splits text before it merges; None if we do not know it."""
    first = description["pre_tokenizer"] or {}
    steps = first.get("pretokenizers", [first])
    kinds = [step.get("type") for step in steps]
    if not kinds or kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        return _SPLITS.get(steps[0]["pattern"].get("Regex", ""))
    return None


def _add_vocabulary(writer: Any, vocabulary: _Vocabulary, tokenizer: Any) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    writer.add_token_merges(vocabulary.merges)
    for kind, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("unk", writer.add_unk_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        number = getattr(tokenizer, f"{kind}_token_id")
        if number is not None:
            add(number)
    ids = tokenizer("a").input_ids
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
