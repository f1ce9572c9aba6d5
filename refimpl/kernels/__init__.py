"""Triton kernels, one to a file: reference, kernel, launcher, op, cost, in that order.

Triton exists for Linux only and is optional; nothing here is imported before a layer needs it.
"""
