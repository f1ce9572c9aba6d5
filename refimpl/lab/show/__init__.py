"""Charts, tables and checked exercises for the chapters."""
