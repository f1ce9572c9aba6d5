"""Training data: which examples to train on, and with what weight; one file per paper."""

from refimpl.training_data.loss_reweighting import LossReweighting
from refimpl.training_data.rs2 import RS2

__all__ = ["RS2", "LossReweighting"]
