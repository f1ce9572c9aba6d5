"""The byte LSTM learns real text, sees no future, and has the parameters it says."""

from __future__ import annotations

import math

import pytest
import torch

from refimpl.core.errors import OptionError
from refimpl.core.train.loop import Recipe, batches, train
from refimpl.lab.data.windows import windows
from refimpl.lab.measure.bits import bits_per_byte, language_model_loss
from refimpl.lab.models.lstm import LSTMLanguageModel


@pytest.fixture(scope="module")
def test_bytes():
    return windows("wikipedia", "test", 64)


def test_learns_more_than_the_frequency_of_bytes():
    """After 150 steps the loss on held-out text is below the entropy of single bytes (the best a model can do
    that sees no context), which a wrong shift of the targets or a cut gradient would not reach."""
    torch.manual_seed(0)
    model = LSTMLanguageModel(embedding=32, hidden=64)
    ids, _ = windows("wikipedia", "calibration", 64)
    held, units = windows("wikipedia", "validation", 64)
    counts = torch.bincount(held.flatten(), minlength=256).double()
    entropy = -(counts / counts.sum()).xlogy(counts / counts.sum()).sum().item() / math.log(2)
    start = bits_per_byte(model, held[::40], units[::40]).value
    recipe = Recipe(steps=150, lr=1e-2, warmup=10, clip=1.0)
    history = train(model, batches(ids, batch_size=32), language_model_loss, recipe, progress=False)
    end = bits_per_byte(model, held[::40], units[::40]).value
    assert 7.8 < start < 8.2
    assert 4.0 < entropy < 5.0
    assert end < entropy - 0.5
    assert history.losses[-1] < history.losses[0]


def test_no_symbol_sees_the_future(test_bytes):
    torch.manual_seed(0)
    model = LSTMLanguageModel(embedding=16, hidden=32, layers=2)
    ids = test_bytes[0][:2].clone()
    before = model(ids)
    ids[:, 40] = (ids[:, 40] + 1) % 256
    after = model(ids)
    assert torch.equal(before[:, :40], after[:, :40])
    assert not torch.equal(before[:, 40:], after[:, 40:])


@pytest.mark.parametrize(("embedding", "hidden", "layers"), [(64, 256, 1), (8, 17, 2), (5, 3, 3)])
def test_parameter_count(embedding, hidden, layers):
    model = LSTMLanguageModel(256, embedding, hidden, layers)
    first = 4 * hidden * (embedding + hidden + 2)
    rest = (layers - 1) * 4 * hidden * (2 * hidden + 2)
    expected = 256 * embedding + first + rest + 256 * (hidden + 1)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_tied_head_is_the_embedding():
    model = LSTMLanguageModel(embedding=24, hidden=24, tied=True)
    assert model.head.weight is model.embedding.weight
    free = LSTMLanguageModel(embedding=24, hidden=24)
    shared = sum(p.numel() for p in free.parameters()) - sum(p.numel() for p in model.parameters())
    assert shared == 256 * 24
    language_model_loss(model, torch.zeros(1, 4, dtype=torch.long)).backward()
    assert model.embedding.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_dtype(dtype, test_bytes):
    torch.manual_seed(0)
    model = LSTMLanguageModel(embedding=16, hidden=32)
    expected = language_model_loss(model, test_bytes[0][:4])
    loss = language_model_loss(model.to(dtype), test_bytes[0][:4])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden": 0}, "hidden=0"),
        ({"embedding": 2.5}, "embedding=2.5"),
        ({"layers": True}, "layers=True"),
        ({"embedding": 8, "hidden": 16, "tied": True}, "tied=True needs embedding == hidden, got 8 and 16"),
    ],
)
def test_impossible_sizes(arguments, message):
    with pytest.raises(OptionError, match=message):
        LSTMLanguageModel(**arguments)


def test_a_processor_without_an_lstm_in_bf16_computes_it_in_fp32(monkeypatch):
    """The recipe says bf16; the products get it, and the LSTM where there is one."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    model, seen = LSTMLanguageModel(embedding=8, hidden=16), []
    model.lstm.register_forward_hook(lambda module, inputs, outputs: seen.append(outputs[0].dtype))
    ids = torch.arange(12)[None]
    with torch.autocast("cpu", torch.bfloat16):
        loss = language_model_loss(model, ids)
        assert model(ids).dtype == torch.bfloat16
    assert seen == [torch.float32, torch.float32]
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert loss.item() == pytest.approx(language_model_loss(model, ids).item(), rel=1e-2)
