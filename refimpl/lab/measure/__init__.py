"""Perplexity, accuracy, question sets and long texts; intervals for what was measured."""
