"""Models on disk: checkpoints read block by block, save and load, serving, exports for other libraries."""
