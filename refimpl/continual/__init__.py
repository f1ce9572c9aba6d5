"""Continual learning: new data for a trained model; one file (or folder) per paper."""

from refimpl.continual.continual_pretraining import ContinualPretraining
from refimpl.continual.meta_experience_replay import ReplayBuffer, Reptile

__all__ = ["ContinualPretraining", "ReplayBuffer", "Reptile"]
