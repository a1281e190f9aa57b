"""LightningModules for the two training stages, and their callbacks."""
