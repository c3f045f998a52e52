"""Learned optimizers and learning to learn, in PyTorch: what lies behind the modules at the root."""
