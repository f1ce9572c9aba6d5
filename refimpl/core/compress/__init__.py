"""One-shot compression: sites, statistics of their inputs, the drivers that visit them, and the base class of methods."""
