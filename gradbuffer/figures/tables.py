"""Tables of comparisons in Markdown, and the statistics in them: means and medians, paired differences, win rates, divergence."""

import math

import torch

from gradbuffer.evaluation import BASELINES, TunedBaseline

__all__ = ["check_sizes", "diverged", "mean_and_error", "sizes_table", "stretches_table", "summary_table"]

BEYOND, AT_THE_END = (
    1000.0,
    2.0,
)  # so many times its first loss, and a function has diverged, though it may come back; at the end


def diverged(losses: torch.Tensor) -> torch.Tensor:
    """Which functions an optimizer diverged on: a loss is not finite or over 1,000 times the first, or the last over twice the first.

    Args:
        losses: (functions, steps), as `evaluate` returns them.

    Returns:
        (functions,) of bool.

    Example:
        >>> diverged(torch.tensor([[1.0, 0.5, 0.1], [1.0, 2.0, 4.0], [1.0, torch.inf, 0.5]]))
        tensor([False,  True,  True])
    """
    first = losses[:, 0].abs()
    return ~losses.isfinite().all(1) | (losses.amax(1) > BEYOND * first) | (losses[:, -1] > AT_THE_END * first)


def mean_and_error(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean over the functions, the first dimension, and its standard error (0 for a single function)."""
    error = numbers.std(0) / len(numbers) ** 0.5 if len(numbers) > 1 else torch.zeros_like(numbers[0])
    return numbers.mean(0), error


def summary_table(
    curves: dict[str, torch.Tensor], steps: int = 100, tuned: dict[str, TunedBaseline] | None = None
) -> str:
    """Markdown table: the sum of the loss over the first `steps` steps and the loss at the last one.

    Of both the mean ± its standard error and the median over functions, and the difference from the best tuned baseline on
    the same functions, with the share of functions on which it is lower. Functions on which an optimizer `diverged` are
    counted beside its name and left out of its means; its medians and shares count them as infinite losses.

    Args:
        curves: dict from name to losses (functions, steps).
        steps: how many of the first steps to add up; all if there are fewer.
        tuned: dict from name to `TunedBaseline`: the best is one of these, and a line below says by what they were tuned.
            Default: those of `BASELINES`, by their names.

    Returns:
        Text, for `IPython.display.Markdown`.

    Example:
        >>> print(summary_table({"LSTM": torch.tensor([[3.0, 1.0], [5.0, 1.0]])}))
        | optimizer | sum over 2 steps | median | loss at step 1 | median |
        | --- | --- | --- | --- | --- |
        | LSTM | 5.0 ± 1.0 | 5.000 | 1.000 | 1.000 |
    """
    columns = min(losses.shape[1] for losses in curves.values())
    steps = min(steps, columns)
    what = f"sum over {steps} steps" if steps == columns else f"sum over the first {steps} steps"
    measures = {
        what: {name: all_or_infinite(losses, losses[:, :steps].double().sum(1)) for name, losses in curves.items()},
        f"loss at step {columns - 1}": {
            name: all_or_infinite(losses, losses[:, columns - 1].double()) for name, losses in curves.items()
        },
    }
    baselines = [name for name in curves if name in (BASELINES if tuned is None else tuned)]
    heads, cells = ["optimizer"], {name: [with_divergence(name, losses)] for name, losses in curves.items()}
    for what, numbers in measures.items():
        best = min(baselines, key=lambda name: numbers[name].mean().item(), default=None)
        heads += [what, "median", *([f"less that of {best}"] if best else [])]
        for name, row in cells.items():
            row += [in_words(numbers[name]), number(middle(numbers[name]))]
            if best:
                row.append("" if name == best else paired(numbers[name], numbers[best]))
    text = markdown(heads, cells.values())
    judged = sorted({tuned[name].judged_by for name in curves if tuned and name in tuned} - {""})
    if judged:
        text += f"\n\nLearning rates of {', '.join(baselines)}: {'; '.join(judged)}."
    if any(diverged(losses).any() for losses in curves.values()):
        text += (
            f"\n\nDiverged: a loss is not finite or over {BEYOND:g} times the first, or the last over {AT_THE_END:g} times the first. "
            "Such functions are left out of the means; medians and shares count them as infinite."
        )
    return text


def stretches_table(
    curves: dict[str, torch.Tensor],
    stretches: dict[str, slice],
    tuned: dict[str, TunedBaseline] | None = None,
    more: dict[str, dict[str, torch.Tensor]] | None = None,
) -> str:
    """Markdown table: mean loss over stretches of steps; of several functions ± standard error, and the median beside it.

    Args:
        curves: dict from name to losses (functions, steps).
        stretches: dict from heading to the slice of steps that the mean is over.
        tuned: dict from name to `TunedBaseline`, for a column of learning rates. Default: no such column.
        more: dict from heading to a dict from name to numbers (functions,), for further columns.

    Returns:
        Text, for `IPython.display.Markdown`. Functions that `diverged` are counted, left out of means and infinite in medians, as in
        `summary_table`.

    Example:
        >>> print(stretches_table({"LSTM": torch.tensor([[3.0, 1.0]])}, {"all": slice(None)}))
        | optimizer | all |
        | --- | --- |
        | LSTM | 2.000 |
    """
    more, judged = more or {}, sorted({baseline.judged_by for baseline in (tuned or {}).values()} - {""})
    rows, several = [], any(len(losses) > 1 for losses in curves.values())
    for name, losses in curves.items():
        cells = [with_divergence(name, losses)]
        if tuned is not None:
            cells.append(f"{tuned[name].options['lr']:.3g}" if name in tuned else "")
        for stretch in stretches.values():
            numbers = all_or_infinite(losses, losses[:, stretch].double().mean(1))
            cells += [in_words(numbers), *([number(middle(numbers))] if several else [])]
        rows.append(cells + [in_words(column[name]) for column in more.values()])
    heads = ["optimizer", *(["learning rate"] if tuned is not None else [])]
    for what in stretches:
        heads += [what, *(["median"] if several else [])]
    heads += more
    return markdown(heads, rows) + (f"\n\nLearning rates: {'; '.join(judged)}." if judged else "")


def sizes_table(finals: dict[tuple, dict[str, torch.Tensor]]) -> str:
    """Markdown table of mean final losses ± standard error: a row for each network, a column for each optimizer, the lowest in bold.

    Args:
        finals: as `plot_sizes` takes them.

    Returns:
        Text, for `IPython.display.Markdown`.

    Raises:
        ValueError: the sizes are not as `plot_sizes` takes them.
    """
    check_sizes(finals)
    names = list(next(iter(finals.values())))
    rows = []
    for hidden in sorted(finals, key=lambda hidden: (len(hidden), hidden)):
        means = {name: finals[hidden][name].double().mean().item() for name in names}
        lowest = min(means, key=lambda name: means[name] if math.isfinite(means[name]) else math.inf)
        cells = [in_words(finals[hidden][name].double()) for name in names]
        cells = [f"**{cell}**" if name == lowest else cell for name, cell in zip(names, cells)]
        rows.append([f"{len(hidden)} × {hidden[0]}", *cells])
    return markdown(["layers × units", *names], rows)


def check_sizes(finals: dict) -> None:
    """Raise unless the keys are tuples of equal sizes, as `plot_sizes` and `sizes_table` take them."""
    if not finals:
        raise ValueError("finals must hold at least one network")
    for hidden in finals:
        if not (isinstance(hidden, tuple) and len(set(hidden)) == 1):
            raise ValueError(f"keys of finals must be tuples of one or more equal sizes, as (20, 20), got {hidden!r}")


# Internals ------------------------------------------------------------------------------------------------------------


def all_or_infinite(losses, numbers):
    """Numbers (functions,) of losses (functions, steps), infinite where the function diverged."""
    return numbers.masked_fill(diverged(losses), math.inf)


def with_divergence(name, losses):
    count = int(diverged(losses).sum())
    return f"{name} (diverged: {count} of {len(losses)})" if count else name


def in_words(numbers):
    """Mean ± standard error of the finite ones."""
    finite = numbers[numbers.isfinite()].double()
    if not len(finite):
        return "diverged"
    mean, error = (value.item() for value in mean_and_error(finite))
    return with_error(mean, error)


def middle(numbers):
    """Their median; of two in the middle the mean, which may be infinite."""
    ordered, half = numbers.sort().values, len(numbers) // 2
    return (ordered[half].item() + ordered[-half - 1].item()) / 2


def with_error(mean, error):
    """The error with two digits, the mean with as many decimals."""
    if error == 0:
        return number(mean)
    if max(abs(mean), error) < 1e-4:
        return f"{mean:.1e} ± {error:.1e}"
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{mean:.{decimals}f} ± {error:.{decimals}f}"


def number(value):
    """Four digits, trailing zeros among them."""
    if not math.isfinite(value):
        return "diverged"
    if value and abs(value) < 1e-4:
        return f"{value:.1e}"
    return f"{value:.{max(0, 3 - math.floor(math.log10(abs(value))) if value else 3)}f}"


def paired(numbers, others):
    """Mean difference on the same functions ± standard error, and the share of functions where it is negative."""
    difference, lower = numbers - others, (numbers < others).double().mean().item()
    sign = "+" if difference.isfinite().any() and difference[difference.isfinite()].mean() > 0 else ""
    return f"{sign}{in_words(difference)} (lower on {lower:.0%})"


def markdown(heads, rows):
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows))
