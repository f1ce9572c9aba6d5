"""Training data: which examples to train on, and with what weight; one file per paper."""
