"""Optimizees of single papers."""
