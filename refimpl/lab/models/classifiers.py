"""The two classifiers of the book, as plain transformers models: a residual network with batch norm and a small ViT.

Nothing here is ours but the sizes, so what works on these works on the large models of the same classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from refimpl.core.errors import OptionError

if TYPE_CHECKING:
    from transformers import ResNetForImageClassification, ViTForImageClassification

CHANNELS = (16, 32, 64)  # of the three stages of the residual network, at width 1


def resnet(
    width: float = 1.0, image_size: int = 28, num_labels: int = 10, num_channels: int = 1
) -> ResNetForImageClassification:
    """A residual network with batch norm: a 7x7 stem, then three stages of one basic block each (two 3x3 convolutions).

    78,394 parameters at width 1; 20,130 / 5,302 / 1,464 at 0.5 / 0.25 / 0.125, which are the small dense arms of
    pruning studies. Initialised from torch's global random state: seed it first.

    Args:
        width: multiplies the channels 16, 32, 64; each result must be a whole number and, for structured masks, at
            least 2.
        image_size: side of the images it is meant for; kept in the configuration, which `classify` checks.
        num_labels: classes.
        num_channels: of the images.

    Raises:
        OptionError: a width that gives fractions of channels.

    Example:
        >>> sum(p.numel() for p in resnet().parameters())
        78394
    """
    from transformers import ResNetConfig, ResNetForImageClassification

    channels = [width * channel for channel in CHANNELS]
    if not all(channel >= 2 and float(channel).is_integer() for channel in channels):
        raise OptionError(
            f"width={width!r} gives {channels} channels; each must be a whole number of at least 2: use 1, 0.5, 0.25 "
            "or 0.125"
        )
    hidden = [int(channel) for channel in channels]
    config = ResNetConfig(
        num_channels=num_channels,
        embedding_size=hidden[0],
        hidden_sizes=hidden,
        depths=[1] * len(hidden),
        layer_type="basic",
        downsample_in_first_stage=False,
        num_labels=num_labels,  # type: ignore[call-arg]  # goes to the base class
        image_size=image_size,  # type: ignore[call-arg]
    )
    return ResNetForImageClassification(config)


def vit(
    hidden_size: int = 64,
    layers: int = 4,
    heads: int = 4,
    patch_size: int = 4,
    image_size: int = 28,
    num_labels: int = 10,
    num_channels: int = 1,
) -> ViTForImageClassification:
    """A vision transformer: patches of 4x4 pixels, four blocks of width 64 with feed-forward width 128.

    139,018 parameters for images of 28x28. Initialised from torch's global random state (seed it first), with the usual
    0.02 of width 768 scaled to this width: left at 0.02, a ViT of width 64 learns several times more slowly.

    Args:
        hidden_size: width, a multiple of `heads` and of 4; the feed-forward part is twice as wide.
        layers: blocks.
        heads: of the attention.
        patch_size: divides `image_size`.
        image_size, num_labels, num_channels: see `resnet`.

    Raises:
        OptionError: sizes that do not divide one another.

    Example:
        >>> vit(image_size=32).config.hidden_size
        64
    """
    from transformers import ViTConfig, ViTForImageClassification

    if hidden_size % heads or hidden_size % 4:
        raise OptionError(f"hidden_size={hidden_size} must be a multiple of heads={heads} and of 4")
    if image_size % patch_size:
        raise OptionError(f"patch_size={patch_size} does not divide image_size={image_size}")
    config = ViTConfig(
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=2 * hidden_size,
        initializer_range=round(0.02 * (768 / hidden_size) ** 0.5, 4),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        image_size=image_size,
        patch_size=patch_size,
        num_channels=num_channels,
        num_labels=num_labels,  # type: ignore[call-arg]  # goes to the base class
    )
    return ViTForImageClassification(config)
