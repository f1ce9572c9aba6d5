"""Forms for a processor: each computes what the packed layer computes, to the rounding of its operator."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from refimpl.core.layers import PackedLinear, ProcessorLinear, empty_layer
from refimpl.core.layers.processor import FORMS, PACKED, Dense, Half, Int4, Int8, measure

N_IN, N_OUT = 192, 48


def quantised(
    bits: int,
    group: int = 64,
    symmetric: bool = False,
    n_in: int = N_IN,
    n_out: int = N_OUT,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
) -> PackedLinear:
    generator = torch.Generator().manual_seed(0)
    shape = (n_out, n_in // group)
    return PackedLinear(
        codes=torch.randint(0, 2**bits, (n_out, n_in), dtype=torch.uint8, generator=generator),
        scale=(torch.rand(shape, generator=generator) + 0.1) / 2**bits,
        zero=None if symmetric else torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=generator),
        bits=bits,
        dtype=dtype,
        bias=torch.randn(n_out, generator=generator).to(dtype) if bias else None,
    )


def pruned(pattern: str, n_in: int = N_IN, n_out: int = N_OUT, scale: float = 1.0) -> PackedLinear:
    weight = scale * torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(0))
    kept = weight.unflatten(1, (-1, 4)).argsort(-1).argsort(-1).flatten(1) >= 2
    return PackedLinear(values=weight * kept, mask=kept, pattern=pattern)


def sparse_codes() -> PackedLinear:
    codes = torch.randint(1, 16, (N_OUT, N_IN), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    kept = pruned("2:4").nonzero_mask()
    return PackedLinear(codes=codes, scale=torch.ones(N_OUT, 3), bits=4, mask=kept, pattern="2:4")


BOTH = {Half.name, Dense.name}
LAYERS = {
    "4 bits": (quantised(4), BOTH | {Int4.name}),
    "4 bits, symmetric": (quantised(4, symmetric=True, bias=False), BOTH | {Int4.name}),
    "3 bits, groups of 32": (quantised(3, 32), BOTH | {Int4.name}),
    "2 bits, groups of 96": (quantised(2, 96), BOTH | {Int4.name}),
    "4 bits, a group a row": (quantised(4, N_IN), BOTH | {Int4.name, Int8.name}),
    "4 bits, groups of 256": (quantised(4, 512, n_in=512), BOTH | {Int4.name, Int8.name}),
    "8 bits": (quantised(8), BOTH),
    "8 bits, a group a row": (quantised(8, N_IN, symmetric=True), BOTH | {Int8.name}),
    "8 bits, a group a row, asymmetric": (quantised(8, N_IN), BOTH),  # up to 255 steps from zero
    "5 bits, a group a row": (quantised(5, N_IN), BOTH | {Int8.name}),
    "groups of 16": (quantised(4, 16), BOTH),
    "40 outputs": (quantised(4, n_out=40), BOTH),
    "48 inputs": (quantised(7, 48, n_in=48), BOTH),
    "2:4": (pruned("2:4"), BOTH),
    "unstructured": (pruned("unstructured"), BOTH),
    "2:4 of 4 bits": (sparse_codes(), BOTH),
    "beyond float16": (pruned("2:4", scale=1e5), {Dense.name}),
    "below float16": (pruned("2:4", scale=1e-8), {Dense.name}),
}


def cast(layer: PackedLinear, dtype: torch.dtype) -> PackedLinear:
    """The layer as a model of that dtype holds it."""
    new = copy.deepcopy(layer).to(dtype)
    new.dtype = dtype
    if layer.bits is not None:
        new.scale = layer.scale.clone()  # a part of the format
    return new


def here() -> set[str]:
    """Forms whose operators this PyTorch has on this processor."""
    small = quantised(4, 32, symmetric=True, n_in=32, n_out=16)
    return {name for name, form in FORMS.items() if form.fits(small)}


def inputs(n_in: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Positive, so that a wrong zero point adds up over the inputs, and without rounding in bfloat16."""
    x = torch.rand(*shape, n_in, generator=torch.Generator().manual_seed(1)) + 0.5
    return x.to(torch.bfloat16).to(dtype)


def test_torch_has_the_operators() -> None:
    assert here() == set(FORMS) or torch.__version__ < "2.13" or torch.backends.cpu.get_cpu_capability() == "DEFAULT"


@pytest.mark.parametrize(
    "name, dtype",
    [
        (name, dtype)
        for name in LAYERS
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        if not ("float16" in name and dtype == torch.float16)  # such weights are none there
    ],
)
def test_every_form_of_every_layer(name: str, dtype: torch.dtype) -> None:
    layer, expected = cast(LAYERS[name][0], dtype), LAYERS[name][1]
    forms = {form for form, kind in FORMS.items() if kind.fits(layer)}
    assert forms == expected & here()
    weight = layer.to_dense().float()
    step = layer.scale.float().amax() if layer.bits else 0
    bias = 0 if layer.bias is None else layer.bias.float()
    for form in forms:
        new = ProcessorLinear.of(layer, form)
        for x in (inputs(layer.in_features, dtype=dtype), inputs(layer.in_features, 2, 3, dtype=dtype)):
            y, exact = new(x), x.float() @ weight.T + bias
            assert y.dtype == dtype and y.shape == (*x.shape[:-1], layer.out_features)
            # the weights, the offsets of the int4 operator and the sum are rounded, each to half a unit
            size = x.float() @ (weight.abs() + 8 * step).T + exact.abs()
            rounding = 2**-8 if "bfloat16" in form or dtype == torch.bfloat16 else 2**-10
            assert ((y.float() - exact).abs() <= rounding * size).all(), form
            assert new(x[..., None, :]).shape == (*x.shape[:-1], 1, layer.out_features)
        if form == Dense.name:
            assert torch.equal(y, layer(x))


def test_int4_is_exact_but_for_its_sums() -> None:
    """Up to 3 bits, and on symmetric grids, the operator's own zero point serves: nothing but the sum is rounded."""
    for layer in (quantised(4, symmetric=True, bias=False), quantised(3, bias=False), quantised(2, bias=False)):
        x = torch.eye(N_IN)
        new = ProcessorLinear.of(layer, Int4.name)
        rows = torch.cat([new(part) for part in x.split(64)])
        assert torch.equal(rows, layer(x).to(torch.bfloat16).float())


def test_many_rows_gradients_and_other_devices_use_the_packed_weights(fake_cuda) -> None:
    layer = quantised(4)
    new = ProcessorLinear.of(layer, Int4.name)
    many = inputs(N_IN, 3, 100)
    assert torch.equal(new(many), layer(many)) and not torch.equal(new(many[:1]), layer(many[:1]))
    x = inputs(N_IN, 2).requires_grad_()
    (gradient,) = torch.autograd.grad(new(x).sum(), x)
    assert torch.allclose(gradient, layer.to_dense().sum(0).expand(2, -1), rtol=1e-5)
    with torch.no_grad():
        assert not torch.equal(new(x), layer(x))
    with fake_cuda() as place:
        place(new)
        assert new(torch.empty(2, N_IN, device="cuda")).device.type == "cuda"


def test_the_copy_is_dropped_with_the_weights_it_was_made_of() -> None:
    new, other = ProcessorLinear.of(quantised(4), Int4.name), quantised(4)
    other.scale *= 2
    again = copy.deepcopy(new)
    model = nn.Sequential(new)
    model.load_state_dict({f"0.{name}": tensor for name, tensor in other.state_dict().items()})
    x = inputs(N_IN, 2)
    assert new.form is None and torch.equal(new(x), other(x)) and PACKED in repr(new)
    assert again.form is not None and not torch.equal(again(x), new(x))


@pytest.mark.parametrize("form", list(FORMS))
def test_copies_and_files(form: str) -> None:
    layer = quantised(4, N_IN)
    if not FORMS[form].fits(layer):
        pytest.skip(f"{form} is not on this processor")
    new = ProcessorLinear.of(layer, form)
    x = inputs(N_IN, 2)
    assert torch.equal(copy.deepcopy(new)(x), new(x))
    buffer = io.BytesIO()
    torch.save(new, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), new(x))
    assert new.config() == layer.config() and new.parts() == layer.parts() and new.nbytes == layer.nbytes
    plain = empty_layer(new.config(), torch.float32, "cpu")
    plain.load_state_dict(new.state_dict())
    assert type(plain) is PackedLinear and torch.equal(plain(x), layer(x))
    assert type(new.packed()) is PackedLinear and torch.equal(new.packed()(x), layer(x)) and form in repr(new)
    new.train()
    assert not layer.training or new.packed() is not layer


def test_measuring_names_what_it_timed() -> None:
    layer = quantised(4, N_IN)
    found = measure(layer)
    assert set(found) == {PACKED} | {form for form, kind in FORMS.items() if kind.fits(layer)}
    assert all(0 < taken < 1000 for taken in found.values())
    # what comes from memory cannot be faster than memory, whatever a call with full caches takes
    assert 0 < measure(layer, lambda call: 0.0)[Dense.name] > 3 * measure(layer, lambda call: 0.0)[Int4.name]
