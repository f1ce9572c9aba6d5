"""The driver for models without decoder blocks, such as image classifiers.

In parallel order one pass of the original network gives the statistics of all sites. In sequential order the inputs of
each site come from the already compressed sites before it; sites fed by the same tensor (q, k and v, or a convolution
and the shortcut beside it) are one stage and share a pass, which ends where the stage does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from tqdm.auto import tqdm

from refimpl.core.compress.inputs import InputSamples, SampleCollector, collect
from refimpl.core.compress.method import Method
from refimpl.core.compress.sites import Site
from refimpl.core.compress.steps import (
    SiteReport,
    all_or_nothing,
    check_finite,
    check_samples,
    compress_one,
    original_weights,
    reference_of,
)
from refimpl.core.device import read
from refimpl.core.errors import CalibrationError, OptionError

BATCH = 64  # samples per forward pass by default


def sample_batches(model: nn.Module, method: Method, calibration: Any, batch_size: int) -> list[Tensor]:
    """Check calibration samples and cut them into batches of the model's dtype, on its device.

    Args:
        model: the model they are for.
        method: a method without statistics needs no samples: [].
        calibration: floats [n, channels, height, width] (for other modules: [n, ...] as their forward takes
            it), or an object with them as ``.pixels``.
        batch_size: samples per batch.

    Raises:
        CalibrationError: no samples, not floats, NaN, fewer than the method draws at once, or of a shape the model
            does not take.
        OptionError: batch_size below 1.

    Example:
        >>> from refimpl import GPTQ
        >>> model = nn.Sequential(nn.Conv2d(1, 8, 3))
        >>> [batch.shape for batch in sample_batches(model, GPTQ(), torch.zeros(3, 1, 5, 5), 2)]
        [torch.Size([2, 1, 5, 5]), torch.Size([1, 1, 5, 5])]
    """
    if not method.statistics:
        return []
    if batch_size < 1:
        raise OptionError(f"batch_size={batch_size}: use 1 or more")
    wanted = "floating-point samples [n, channels, height, width], scaled as for training"
    if calibration is None:
        raise CalibrationError(f"calibration=None: {type(method).__name__} needs {wanted}")
    samples = getattr(calibration, "pixels", calibration)
    if not isinstance(samples, Tensor) or not samples.is_floating_point() or samples.dim() < 2:
        got = (
            f"{samples.dtype} of shape {tuple(samples.shape)}"
            if isinstance(samples, Tensor)
            else type(samples).__name__
        )
        raise CalibrationError(f"calibration: expected {wanted}, got {got}")
    if samples.numel() == 0:
        raise CalibrationError(f"calibration: shape {tuple(samples.shape)} is empty; pass at least one sample")
    check_samples(method, len(samples))
    if read((~torch.isfinite(samples)).any()):
        raise CalibrationError("calibration: the samples contain NaN or infinity; leave those out")
    if samples.is_inference():
        samples = samples.clone()  # such tensors do not count their changes in place, which the statistics rely on
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    batches = list(samples.to(parameter.device, parameter.dtype).split(batch_size))
    channels = getattr(getattr(model, "config", None), "num_channels", None)
    try:
        if channels is not None and samples.shape[1] != channels:
            raise ValueError(f"its images have {channels} channels")
        run(model, batches[0][:1])
    except (RuntimeError, ValueError, IndexError) as error:
        raise CalibrationError(
            f"calibration: {type(model).__name__} does not take samples of shape {tuple(samples.shape[1:])}: {error}"
        ) from error
    return batches


def run(model: nn.Module, batch: Tensor) -> Any:
    """One forward pass over samples, under the name the model has for them.

    Example:
        >>> run(nn.Flatten(), torch.zeros(2, 1, 4, 4)).shape
        torch.Size([2, 16])
    """
    name = getattr(model, "main_input_name", None)
    return model(batch) if name is None else model(**{name: batch})


@dataclass(frozen=True)
class CallShape:
    """Sizes of one sample at a site.

    Attributes:
        rows: vectors that the weight multiplies: patches of a convolution, tokens.
        inputs, outputs: numbers of input and output values.
    """

    rows: int
    inputs: int
    outputs: int


def call_shapes(model: nn.Module, sites: list[Site], shape: tuple[int, ...] | None) -> dict[str, CallShape]:
    """The `CallShape` of every site, from a forward pass on "meta".

    Args:
        model: a model without blocks.
        sites: where to look; one that is not called has no entry.
        shape: of one sample; None: (num_channels, image_size, image_size) of its configuration.

    Raises:
        OptionError: no shape and none in the configuration, or one that the model does not take.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3))
        >>> call_shapes(model, [Site("0", 0, model, "0")], (3, 6, 6))
        {'0': CallShape(rows=16, inputs=108, outputs=128)}
    """
    if shape is None:
        config = getattr(model, "config", None)
        channels, size = (getattr(config, name, None) for name in ("num_channels", "image_size"))
        if channels is None or size is None:
            raise OptionError("shape=None: the model does not say what it takes; pass (channels, height, width)")
        shape = (channels, *([size, size] if isinstance(size, int) else size))
    found: dict[str, CallShape] = {}

    def record(site: Site) -> Any:
        def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            found[site.name] = CallShape(output.numel() // site.out_features, args[0].numel(), output.numel())

        return after

    handles = [site.placed.register_forward_hook(record(site)) for site in sites]
    tensors = {name: tensor.to("meta") for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    dtype = next(t.dtype for t in tensors.values() if t.is_floating_point())
    name = getattr(model, "main_input_name", None)
    batch = torch.empty(1, *shape, dtype=dtype, device="meta")
    args, named = ((batch,), {}) if name is None else ((), {name: batch})
    try:
        functional_call(model, tensors, args, named)
    except (RuntimeError, ValueError, IndexError) as error:
        raise OptionError(f"shape={shape}: {type(model).__name__} does not take such samples: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    return found


@dataclass
class Stage:
    """Sites fed by the same tensor.

    Attributes:
        sites: in the order in which they are called.
        calls: how often they are called, all together, in one forward pass.
    """

    sites: list[Site]
    calls: int


def find_stages(model: nn.Module, batch: Tensor, sites: list[Site]) -> list[Stage]:
    """The sites in the order in which the model calls them, those with the same input together.

    Raises:
        CalibrationError: a site is not called.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> sites = [Site("0", 0, model, "0"), Site("2", 1, model, "2")]
        >>> [stage.sites[0].name for stage in find_stages(model, torch.zeros(1, 4), sites)]
        ['0', '2']
    """
    stages: dict[tuple[int, int], Stage] = {}
    stage_of: dict[str, Stage] = {}
    alive: list[Tensor] = []  # an input is known by its identity, which must not be given to another

    def record(site: Site) -> Any:
        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            alive.append(x)
            stage = stage_of.get(site.name)
            if stage is None:
                # the version counts changes in place: the same tensor may hold other values by now
                stage = stage_of[site.name] = stages.setdefault((id(x), x._version), Stage([], 0))
                stage.sites.append(site)
            stage.calls += 1

        return before

    handles = [site.placed.register_forward_pre_hook(record(site)) for site in sites]
    try:
        run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    idle = next((site.name for site in sites if site.name not in stage_of), None)
    if idle is not None:
        raise CalibrationError(f"calibration: {idle!r} was never run; leave it out with targets=")
    return list(stages.values())


class _Reached(Exception):
    """A forward pass has come as far as it is needed."""


def _run_to(model: nn.Module, batches: list[Tensor], stage: Stage) -> None:
    """Run all batches, each only until every site of the stage has been called."""
    left = 0

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise _Reached

    handles = [site.placed.register_forward_pre_hook(before) for site in stage.sites]
    try:
        for batch in batches:
            left = stage.calls
            try:
                run(model, batch)
            except _Reached:
                pass
    finally:
        for handle in handles:
            handle.remove()


def check_groups(site: Site, method: Method) -> None:
    """Raise `OptionError` if the method needs one second moment of the inputs and a grouped convolution has several.

    Example:
        >>> from refimpl import GPTQ, RTN
        >>> site = Site("0", 0, nn.Sequential(nn.Conv2d(4, 4, 3, groups=4)), "0")
        >>> check_groups(site, RTN())
    """
    groups = 1 if site.geometry is None else site.geometry.groups
    if groups > 1 and method.statistics & {"gram", "abs"}:
        raise OptionError(
            f"{site.name!r} is a convolution in {groups} groups, each with inputs of its own, and "
            f"{type(method).__name__} takes all rows of a weight to see the same; leave it out with targets=, "
            "or use a method there that needs only the weights"
        )


def compress_whole(
    model: nn.Module,
    method: Method,
    sites: list[Site],
    calibration: Any,
    reference: nn.Module | str | Path | None,
    order: str,
    batch_size: int,
    progress: bool,
) -> list[SiteReport]:
    """Compress `sites` of a model without blocks, in place; everything is put back if it fails.

    See `refimpl.compress` for the arguments and errors.

    Example:
        >>> from refimpl import GPTQ
        >>> from refimpl.core.compress.sites import find_sites
        >>> model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
        >>> images = torch.randn(8, 1, 5, 5)
        >>> _ = compress_whole(model, GPTQ(4, None), find_sites(model), images, None, "sequential", 4, False)
        >>> model[0]
        PackedConv2d(
          1 -> 16, 3 x 3
          (base): PackedLinear(9 -> 16, 4 bits, groups of 9)
        )
    """
    original = reference_of(model, method, reference, sites)
    originals = {site.name: original.weight(site).to(site.weight) for site in sites} if original else {}
    for site in sites:
        method.layer_config(site)
        check_groups(site, method)
    check_finite(model.state_dict().items())
    check_finite(originals.items(), "reference")
    was_training = model.training
    model.eval()
    bar = tqdm(total=len(sites), desc=type(method).__name__, unit="site", disable=not progress, delay=1)
    entries = []
    try:
        batches = sample_batches(model, method, calibration, batch_size)
        with all_or_nothing(sites):
            for site, stats in _with_statistics(model, method, sites, batches, originals, order):
                entries.append(compress_one(site, method, stats, originals.get(site.name)))
                bar.update()
    except KeyboardInterrupt:
        tqdm.write(f"interrupted after {len(entries)} of {len(sites)} sites; the model is as it was before")
        raise
    finally:
        bar.close()
        model.train(was_training)
    return entries


def _with_statistics(
    model: nn.Module, method: Method, sites: list[Site], batches: list[Tensor], originals: dict[str, Tensor], order: str
) -> Iterator[tuple[Site, Any]]:
    """Sites in the order of execution with the statistics of their inputs; each must be replaced before the next."""
    if not batches:
        yield from ((site, None) for site in sites)
        return
    stages = find_stages(model, batches[0][:1], sites)
    if order == "parallel":
        with original_weights(sites, originals), collect(sites, method.statistics) as found:
            for batch in batches:
                run(model, batch)
        for stage in stages:
            yield from ((site, found.pop(site.name)) for site in stage.sites)
        return
    outputs: dict[str, InputSamples] = {}
    if "inputs" in method.statistics:  # the outputs to reproduce do not depend on the sites compressed before
        with original_weights(sites, originals), SampleCollector(sites, inputs=False) as collector:
            for batch in batches:
                run(model, batch)
        outputs = collector.stats
    for stage in stages:
        if outputs:
            with SampleCollector(stage.sites, outputs=False) as collector:
                _run_to(model, batches, stage)
            found = {name: _paired(stats, outputs.pop(name)) for name, stats in collector.stats.items()}
        else:
            with collect(stage.sites, method.statistics) as found:
                _run_to(model, batches, stage)
        yield from ((site, found.pop(site.name)) for site in stage.sites)


def _paired(inputs: InputSamples, outputs: InputSamples) -> InputSamples:
    """Inputs of one pass with the outputs of another."""
    return InputSamples(inputs.x, outputs.y, inputs.low, inputs.high, outputs.rectified)
