"""What the small learned optimizer is in plain torch and compiled: tensors as matrices, and its constants."""

__all__ = [
    "CONTEXT_FEATURES",
    "CONTEXT_UNITS",
    "ITERATIONS",
    "LARGEST_LOG",
    "NEWTON_SCHULZ",
    "as_matrix",
    "from_matrix",
    "matrix_axes",
]

NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)  # Muon's: towards an orthogonal matrix, to about a quarter
ITERATIONS = 5
CONTEXT_FEATURES, CONTEXT_UNITS, LARGEST_LOG = (
    7,
    8,
    3.0,
)  # of `MLPOptimizer(context=True)`; a step is e^±3 times as long at most


def matrix_axes(shape):
    """The two axes of a tensor, in order, along which it has rows and columns; None where it has fewer than two.

    They are the two largest axes, of equal ones the first. A tensor of four axes or more is a convolution's weight (outputs,
    inputs, *kernel): the first two.
    """
    if len(shape) < 2:
        return None
    if len(shape) > 3:
        return 0, 1
    return tuple(sorted(sorted(range(len(shape)), key=lambda axis: -shape[axis])[:2]))


def as_matrix(tensor, axes):
    """(B, *shape) -> (B, rows, columns, all other axes in one), or (B, n) without axes."""
    if axes is None:
        return tensor.reshape(len(tensor), -1)
    return tensor.movedim((axes[0] + 1, axes[1] + 1), (1, 2)).flatten(3) if tensor.dim() > 3 else tensor[..., None]


def from_matrix(flat, shape, axes):
    """What (B, n) in the order of `as_matrix` is as (B, *shape)."""
    if axes is None or len(shape) == 3:
        return flat.reshape(shape)
    others = [size for axis, size in enumerate(shape[1:]) if axis not in axes]
    moved = flat.reshape(shape[0], shape[1 + axes[0]], shape[1 + axes[1]], *others)
    return moved.movedim((1, 2), (axes[0] + 1, axes[1] + 1))
