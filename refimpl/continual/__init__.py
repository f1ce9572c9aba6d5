"""Continual learning: new data for a trained model; one file per paper."""
