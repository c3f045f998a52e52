"""Problems, the distributions of functions that are optimized, and tasks on which optimizers race."""
