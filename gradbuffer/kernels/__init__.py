"""Compiled arithmetic of learned optimizers, beside the plain torch that it is tested against."""
