"""LightningModules for the training stages, and their callbacks."""
