"""One torchmetrics class per file; every metric takes features, never a network."""
