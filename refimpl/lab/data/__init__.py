"""Texts and images to calibrate, train and evaluate on, with fixed splits."""
