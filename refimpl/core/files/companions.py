"""What lies beside the weights of a saved model: its tokenizer, and a README.md that says what it is."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import nn

from refimpl.core.files.folders import writing
from refimpl.core.layers import empty_layer
from refimpl.core.stored import stored_dtype

TOKENIZER = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab.*", "merges.txt"),
    *("spiece.model", "sentencepiece*", "preprocessor_config.json", "processor_config.json"),
)
CARD = "<!-- written by refimpl.save -->"
_METHODS = "_refimpl_methods"


def methods_of(model: nn.Module) -> list[str]:
    """The methods that `refimpl.compress` has applied to a model, with their options, the first one first.

    Example:
        >>> from refimpl import RTN, compress
        >>> model = nn.Sequential(nn.Linear(32, 16))
        >>> _ = compress(model, RTN(bits=4, group_size=32), progress=False)
        >>> methods_of(model)
        ['RTN(bits=4, group_size=32, symmetric=False)']
    """
    return list(getattr(model, _METHODS, []))


def note_methods(model: nn.Module, methods: list[str]) -> None:
    """Remember what was applied to a model, for `methods_of`.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> note_methods(model, ["RTN(bits=4)"]); methods_of(model)
        ['RTN(bits=4)']
    """
    setattr(model, _METHODS, list(methods))


def copy_files(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    """Copy the files of `source` that match one of the patterns.

    Example:
        >>> import tempfile
        >>> source, target = Path(tempfile.mkdtemp()), Path(tempfile.mkdtemp())
        >>> (source / "tokenizer.json").touch()
        >>> copy_files(source, target, TOKENIZER); [path.name for path in target.iterdir()]
        ['tokenizer.json']
    """
    with writing(target):
        for file in {file for pattern in patterns for file in source.glob(pattern) if file.is_file()}:
            shutil.copy(file, target)


def copy_tokenizer(model: nn.Module, folder: Path) -> None:
    """Copy the tokenizer of the checkpoint that a model was read from, if it is on this machine.

    Example:
        >>> import tempfile
        >>> copy_tokenizer(nn.Linear(2, 2), Path(tempfile.mkdtemp()))   # it was read from nowhere
    """
    source = _origin(model)
    place = Path(source) if source else None
    if place is not None and not place.is_dir():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            found = try_to_load_from_cache(source, "config.json")
        except HFValidationError:  # a folder that is gone
            found = None
        place = Path(found).parent if isinstance(found, str) else None
    if place is not None:
        copy_files(place, folder, TOKENIZER)


def _origin(model: nn.Module) -> str:
    """The folder or the Hub id a model was read from; empty if it was made here."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", None) or "")


def front_matter(library: str, base: str | Path | None = None) -> str:
    """The head of a model card.

    Example:
        >>> print(front_matter("peft", "me/model"), end="")
        ---
        library_name: peft
        base_model: me/model
        ---
    """
    return f"---\nlibrary_name: {library}\n" + (f"base_model: {base}\n" if base is not None else "") + "---\n"


def model_card(model: nn.Module, layers: dict[str, Any], methods: list[str], tokenizer: bool) -> str:
    """The README.md of a folder in the format of `refimpl.save`.

    Args:
        model: the saved model.
        layers: configurations of its compressed layers, by name.
        methods: what was applied, from `methods_of`.
        tokenizer: whether a tokenizer lies beside it.

    Example:
        >>> print(model_card(nn.Linear(2, 2), {}, [], False).splitlines()[5])
        # A model saved with refimpl
    """
    name, dtype = type(model).__name__, str(stored_dtype(model)).removeprefix("torch.")
    origin = _origin(model)
    base = (
        origin if origin.count("/") == 1 and not Path(origin).exists() and not origin.startswith((".", "/")) else None
    )
    made = f"A {name}, {dtype}"
    if layers:
        empty = [empty_layer(config, stored_dtype(model), "meta") for config in layers.values()]
        size = 8 * sum(layer.nbytes - layer.parts().get("bias", 0) for layer in empty)
        bits = size / sum(layer.in_features * layer.out_features for layer in empty)
        made += (
            f", of which {len(layers)} layers are compressed. They take {bits:.2f} bits per weight, with scales, masks and "
            "low-rank paths"
        )
    steps = "\n".join(f"{number}. `{method}`" for number, method in enumerate(methods, 1))
    what = f"{made}.\n" + (f"\nWhat was done, in this order:\n\n{steps}\n" if steps else "")
    note = (
        'The tokenizer lies beside it: `AutoTokenizer.from_pretrained("THIS FOLDER")`.'
        if tokenizer
        else "There is no tokenizer here: save that of the original model beside it with its own `save_pretrained`."
    )
    return f"""{front_matter("refimpl", base)}{CARD}

# A {"compressed model" if layers else "model saved with refimpl"}

{what}
Load it:

```python
from refimpl import load

model = load("THIS FOLDER")
```

Once refimpl is imported, `from_pretrained` of transformers reads it too. {note}

Other programs do not read this format: `refimpl.export_dense` and `refimpl.export_compressed_tensors` write what they
read.
"""
