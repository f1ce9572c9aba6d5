"""Windows stay inside documents and cover them."""

from __future__ import annotations

import pytest
import torch

from refimpl.core.errors import CalibrationError, OptionError
from refimpl.lab.data import text
from refimpl.lab.data.windows import windows
from refimpl.lab.models import small


def test_windows_cover_each_document_once():
    """The windows of a document, put end to end, are its text; what is left out is shorter than a window."""
    length = 100
    ids, units = windows("wikipedia", "test", length)
    for document in text.documents("wikipedia", "test")[:10]:
        own = ids[[unit == document.id for unit in units]]
        assert torch.equal(own[:-1, -1], own[1:, 0])
        joined = bytes([*own[0, :1].tolist(), *own[:, 1:].flatten().tolist()])
        data = document.text.encode()
        assert data.startswith(joined) and len(data) - len(joined) < length


def test_overlapping_windows():
    plain, _ = windows("wikipedia", "validation", 128)
    dense, units = windows("wikipedia", "validation", 128, stride=32)
    assert torch.equal(dense[1, :97], dense[0, 32:])
    assert 3.9 < len(dense) / len(plain) <= 4.0 and len(units) == len(dense)


def test_windows_of_tokens_decode_to_the_text():
    tokenizer = small.tokenizer()
    ids, units = windows("wikipedia", "test", 50, tokenizer)
    first = text.documents("wikipedia", "test")[0]
    assert units[0] == first.id and first.text.startswith(tokenizer.decode(ids[0, :40]))
    assert not (ids == tokenizer.eos_token_id).any()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("wikipedia", "test", 0), OptionError, "length=0"),
        (("wikipedia", "tset", 8), OptionError, "did you mean 'test'"),
        (("wikipedia", "test", 10**7), CalibrationError, r"length=10000000: no document .* more than \d+ bytes"),
        (("news", "calibration", 8), CalibrationError, "evaluation only"),
        (("wikipedia", "test", 8, None, 0), OptionError, "stride=0"),
    ],
)
def test_impossible_windows(arguments, error, message):
    with pytest.raises(error, match=message):
        windows(*arguments)
