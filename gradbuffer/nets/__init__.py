"""Networks that are learned optimizers."""
