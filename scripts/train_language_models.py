"""Train the small language models of data/models: three Llamas of BPE tokens and an LSTM of bytes.

Everything comes from the calibration split of the offline Wikipedia sample; the best step is chosen on the validation
split, and the test split is read once, by the weights as shipped (rounded to bf16). An interrupted run goes on where it
stopped when the command is repeated; a finished one is only written out again.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from refimpl.core.train.loop import History, Recipe, batches, train
from refimpl.lab.data.text import documents
from refimpl.lab.data.windows import windows
from refimpl.lab.measure.bits import bits_per_byte, language_model_loss
from refimpl.lab.models.lstm import LSTMLanguageModel
from refimpl.markdown import table

ROOT = Path(__file__).resolve().parent.parent
CORPUS = "wikipedia"
CONTEXT = 256
VOCABULARY = 1024
END = "<|endoftext|>"
BATCH = 16
STRIDE = 64  # training windows start every 64 symbols: a symbol is seen with contexts of four lengths
EVALUATE_EVERY = 50
VALIDATION_WINDOWS = 128  # what chooses the best step; the card measures on the whole split


@dataclass(frozen=True)
class Plan:
    """One model: its sizes and its recipe."""

    sizes: dict[str, Any]
    recipe: Recipe
    batch: int = BATCH
    validation_windows: int = VALIDATION_WINDOWS
    evaluate_every: int = EVALUATE_EVERY

    @property
    def bytes_only(self) -> bool:
        return "embedding" in self.sizes


def llama(width: int, layers: int, hidden: int, steps: int, lr: float, decay: float, **options: int) -> Plan:
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "intermediate_size": hidden,
        "num_attention_heads": width // 32,
    }
    return Plan(sizes, _recipe(steps, lr, decay), **options)


def _recipe(steps: int, lr: float, decay: float) -> Recipe:
    return Recipe(
        steps=steps,
        lr=lr,
        betas=(0.9, 0.95),
        weight_decay=decay,
        warmup=max(1, steps // 20),
        final_lr=0.01,
        clip=1.0,
        precision="bf16",
    )


# The larger two could learn the text by heart: they get fewer passes and a decay that pulls on the scale of the run.
PLANS = {
    "llama-small": llama(64, 2, 192, steps=1500, lr=5e-3, decay=0.1),
    "lstm": Plan({"vocabulary": 256, "embedding": 64, "hidden": 256, "layers": 1}, _recipe(3000, lr=4e-3, decay=0.1)),
    "llama-medium": llama(128, 4, 256, steps=1100, lr=3e-3, decay=0.5),
    # Half the batch: 850 steps of 16 windows at 2e-3 left the validation loss at 3.95, above that of the medium one.
    "llama-large": llama(192, 4, 448, steps=1600, lr=2.5e-3, decay=0.5, batch=8, evaluate_every=100),
}


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 1024 tokens from the calibration split: nothing is unknown to it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([document.text for document in documents(CORPUS, "calibration")], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=END, model_max_length=CONTEXT)


def build(plan: Plan) -> nn.Module:
    """The untrained model, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.recipe.seed)
        if plan.bytes_only:
            return LSTMLanguageModel(**plan.sizes)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
            **plan.sizes,
        )
        # At this length plain attention trains a sixth faster in bf16 on a CPU than the fused one.
        config._attn_implementation = "eager"
        return LlamaForCausalLM(config)


def symbol_loss(model: nn.Module, ids: Tensor) -> float:
    """Mean loss in nats of a symbol, over windows of one length."""
    parts = [language_model_loss(model, rows).item() * len(rows) for rows in ids.split(BATCH)]
    return sum(parts) / len(ids)


def run(name: str, plan: Plan, target: Path, runs: Path) -> Path:
    """Train one model (or take up its run in `runs`) and write its folder in `target`."""
    tokenizer = None if plan.bytes_only else train_tokenizer()
    model = build(plan)
    ids, _ = windows(CORPUS, "calibration", CONTEXT, tokenizer, stride=STRIDE)
    held, _ = windows(CORPUS, "validation", CONTEXT, tokenizer)
    chosen = held[torch.linspace(0, len(held) - 1, plan.validation_windows).long()]
    history = train(
        model,
        batches(ids, batch_size=plan.batch, seed=plan.recipe.seed),
        language_model_loss,
        plan.recipe,
        evaluate=lambda model: {"loss": symbol_loss(model, chosen)},
        evaluate_every=plan.evaluate_every,
        keep_best="loss",
        folder=runs / name,
    )
    print(f"{name}: {history}, best at step {history.best}", flush=True)
    return write(name, plan, model.eval(), tokenizer, history, len(ids), target)


def write(
    name: str,
    plan: Plan,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast | None,
    history: History,
    training_windows: int,
    target: Path,
) -> Path:
    """Round to bf16, measure what was rounded, and put the folder in place in one move."""
    state = {key: value.to(torch.bfloat16) for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    scores: dict[str, tuple[float, float]] = {}
    for split in ("calibration", "validation", "test"):
        ids, units = windows(CORPUS, split, CONTEXT, tokenizer)
        result = bits_per_byte(model, ids, units, tokenizer)
        scores[split] = (result.bits.sum() * math.log(2) / ids[:, 1:].numel(), result.value)
        print(f"{name}: {split} {scores[split][1]:.4f} bits per byte", flush=True)
    target.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=target, prefix=f".{name}."))
    try:
        staging.chmod(0o755)
        if tokenizer is None:
            config = {"architectures": [type(model).__name__], **plan.sizes}
            (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            save_file(state, staging / "model.safetensors", metadata={"format": "pt"})
        else:
            model.to(torch.bfloat16).save_pretrained(staging)  # type: ignore[operator]
            tokenizer.save_pretrained(staging)
        (staging / "curve.json").write_text(json.dumps(curve(history), indent=1) + "\n")
        (staging / "README.md").write_text(card(name, plan, model, history, training_windows, scores))
        for path in staging.iterdir():
            path.chmod(0o644)  # safetensors makes files private
        shutil.rmtree(target / name, ignore_errors=True)
        staging.rename(target / name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target / name


def curve(history: History) -> list[dict[str, float]]:
    """Loss in nats of a symbol: training, mean since the entry before; validation, on the windows that choose."""
    entries = []
    before = 0
    for evaluation in history.evaluations:
        step = int(evaluation["step"])
        losses = history.losses[before:step]
        entry = {"step": step, "validation_loss": round(evaluation["loss"], 4)}
        if losses:  # nothing was trained before step 0
            entry["train_loss"] = round(sum(losses) / len(losses), 4)
        entries.append(entry)
        before = step
    return entries


def card(
    name: str,
    plan: Plan,
    model: nn.Module,
    history: History,
    training_windows: int,
    scores: dict[str, tuple[float, float]],
) -> str:
    recipe = plan.recipe
    found = {split: documents(CORPUS, split) for split in scores}
    tokens = f"a byte-level BPE of {VOCABULARY} tokens, trained on the same split; `{END}` never occurred in training"
    symbol = "byte" if plan.bytes_only else "token"
    return CARD.format(
        name=name,
        kind="An LSTM" if plan.bytes_only else "A Llama",
        architecture=type(model).__name__,
        sizes=", ".join(f"{key} {value}" for key, value in plan.sizes.items()),
        tied="" if plan.bytes_only else ", tied embeddings",
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        alphabet="UTF-8 bytes, all 256" if plan.bytes_only else tokens,
        symbol=symbol,
        articles=len(found["calibration"]),
        size=sum(len(document.text.encode()) for document in found["calibration"]),
        corpus=CORPUS,
        context=CONTEXT,
        measured=table(
            ["split", "documents", f"loss (nats per {symbol})", "bits per byte"],
            [[split, len(found[split]), f"{loss:.4f}", f"{bits:.4f}"] for split, (loss, bits) in scores.items()],
        ),
        batch=plan.batch,
        windows=training_windows,
        stride=STRIDE,
        passes=recipe.steps * plan.batch / training_windows * CONTEXT / STRIDE,
        recipe=recipe,
        chosen=plan.validation_windows,
        best=history.best,
        minutes=history.seconds / 60,
        torch=torch.__version__.partition("+")[0],
        transformers=transformers.__version__,
    )


CARD = """# {name}

{kind} language model, trained from scratch for this book, to be compressed, pruned and measured in seconds on a CPU.

- Architecture: `{architecture}`, {sizes}{tied}.
- Parameters: {parameters:,}, stored in bf16.
- Alphabet: {alphabet}. Window: {context} {symbol}s.
- Load: `refimpl.lab.models.small.load("{name}")`.

## Data

The calibration split of the book's English Wikipedia sample ({articles} articles, {size:,} bytes of text), as
`refimpl.lab.data.text.documents("{corpus}", "calibration")` gives it; no window crosses from one article into another.
The text is by the authors of Wikipedia under CC BY-SA; the articles lie in the test data of the gensim package.
The weights are under CC BY-SA 4.0 too, so whether weights are an adaptation of their text need not be settled.

## Measured

Of the weights as shipped, over all whole windows of {context} {symbol}s, each read from an empty context:

{measured}

The validation split chose the step; the test split was read once, at the end.

## Training

`OMP_NUM_THREADS=1 python scripts/train_language_models.py {name}`: {recipe.steps} steps of {batch} windows of
{context} {symbol}s, drawn from {windows:,} that start {stride} {symbol}s apart (each {symbol} of the text is
predicted about {passes:.0f} times), AdamW with betas {recipe.betas[0]} and {recipe.betas[1]}, weight decay
{recipe.weight_decay}, highest rate {recipe.lr:g} after {recipe.warmup} steps of warm-up, cosine down to
{recipe.final_lr:g} of it, gradients clipped at norm {recipe.clip:g}, bf16 autocast, seed {recipe.seed}. The weights are
those of step {best}, where the loss on {chosen} windows of the validation split was lowest. {minutes:.1f} minutes on
one thread of a busy CPU, torch {torch}, transformers {transformers}. The losses over the steps are in `curve.json`,
in nats per {symbol}.

## Not for

Anything but teaching and experiments on methods. What it writes looks like English and means nothing, what it states
is not true, it repeats the slant and the gaps of a few dozen articles, and nothing was done to make it safe. Scores say
how methods compare on this model, not how they compare on large ones.
"""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"what to train, of {', '.join(PLANS)}; all if none")
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "models", help="where models are written")
    parser.add_argument(
        "--runs",
        type=Path,
        default=ROOT / ".cache" / "training",
        help="where checkpoints of unfinished runs are kept; delete a run's folder to train anew",
    )
    chosen: Any = parser.parse_args(arguments)
    unknown = [name for name in chosen.names if name not in PLANS]
    if unknown:
        parser.error(f"name {unknown[0]!r}: choose from {', '.join(PLANS)}")
    for name in chosen.names or PLANS:
        print(run(name, PLANS[name], chosen.out, chosen.runs), flush=True)


if __name__ == "__main__":
    main()
