"""The classroom: models, texts, metrics and records that the chapters measure with.

Nothing in `refimpl.core` or in a method imports this package; it is the `lab` extra.
"""
