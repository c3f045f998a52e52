"""How a learned optimizer is trained: the meta-gradient of a window, and what strings windows to a run that can be resumed."""
