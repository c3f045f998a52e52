"""How results are shown: the style of figures, and tables."""
