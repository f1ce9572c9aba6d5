"""refimpl: small tested implementations of papers that make neural networks smaller.

The names most people need:

    from refimpl import compress, GPTQ, EoRA, save, load, serve
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

# Hosts and baselines; the names of papers follow below. `make generated` takes over what is added here.
if TYPE_CHECKING:
    from refimpl.baselines import GPTQ, RTN, ActSVD, LoftQ, Magnitude, PlainSVD, SparseGPT, Wanda
    from refimpl.baselines.activations import QuantizeActivations
    from refimpl.baselines.adaround import AdaRound
    from refimpl.baselines.kvcache import H2O, KIVI, SnapKV, StreamingLLM, ThinK
    from refimpl.core.compress.driver import Plan, Report, compress, plan
    from refimpl.core.files.export import export_compressed_tensors, export_dense, export_peft
    from refimpl.core.files.gguf import export_gguf
    from refimpl.core.files.io import load, save
    from refimpl.core.files.serve import serve
    from refimpl.methods import METHODS, POLICIES

__version__ = "0.1.0"

# -- written by `make generated` from papers.toml and the imports above --
if TYPE_CHECKING:
    from refimpl.continual import ContinualPretraining, ReplayBuffer, Reptile
    from refimpl.kvcache import CSKV, MatryoshkaKV
    from refimpl.lowrank import EoRA
    from refimpl.pruning import GradualMagnitude
    from refimpl.quantization import AdaQuant
    from refimpl.training_data import RS2, LossReweighting

_WHERE = {
    "baselines": ("GPTQ", "RTN", "ActSVD", "LoftQ", "Magnitude", "PlainSVD", "SparseGPT", "Wanda"),
    "baselines.activations": ("QuantizeActivations",),
    "baselines.adaround": ("AdaRound",),
    "baselines.kvcache": ("H2O", "KIVI", "SnapKV", "StreamingLLM", "ThinK"),
    "continual": ("ContinualPretraining", "ReplayBuffer", "Reptile"),
    "core.compress.driver": ("Plan", "Report", "compress", "plan"),
    "core.files.export": ("export_compressed_tensors", "export_dense", "export_peft"),
    "core.files.gguf": ("export_gguf",),
    "core.files.io": ("load", "save"),
    "core.files.serve": ("serve",),
    "kvcache": ("CSKV", "MatryoshkaKV"),
    "lowrank": ("EoRA",),
    "methods": ("METHODS", "POLICIES"),
    "pruning": ("GradualMagnitude",),
    "quantization": ("AdaQuant",),
    "training_data": ("RS2", "LossReweighting"),
}

__all__ = [
    "CSKV",
    "GPTQ",
    "H2O",
    "KIVI",
    "METHODS",
    "POLICIES",
    "RS2",
    "RTN",
    "ActSVD",
    "AdaQuant",
    "AdaRound",
    "ContinualPretraining",
    "EoRA",
    "GradualMagnitude",
    "LoftQ",
    "LossReweighting",
    "Magnitude",
    "MatryoshkaKV",
    "PlainSVD",
    "Plan",
    "QuantizeActivations",
    "ReplayBuffer",
    "Report",
    "Reptile",
    "SnapKV",
    "SparseGPT",
    "StreamingLLM",
    "ThinK",
    "Wanda",
    "compress",
    "export_compressed_tensors",
    "export_dense",
    "export_gguf",
    "export_peft",
    "load",
    "plan",
    "save",
    "serve",
]
# -- to here --

# Loaded when first asked for: torch takes a second, and a command line that lists papers does not need it.
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'refimpl' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"refimpl.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _BesideTransformers(MetaPathFinder):
    """Imports `refimpl.core.files.pretrained` once transformers has its models, without importing transformers itself."""

    after = "transformers.modeling_utils"

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.after:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_import(module: ModuleType) -> None:
                run(module)
                importlib.import_module("refimpl.core.files.pretrained")

            spec.loader.exec_module = run_and_import  # type: ignore[method-assign]
        return spec


if _BesideTransformers.after in sys.modules:
    importlib.import_module("refimpl.core.files.pretrained")
else:
    sys.meta_path.insert(0, _BesideTransformers())
