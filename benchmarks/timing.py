"""Alternating measurements on chosen cores, and programs of others beside ours, for the benchmarks."""

import json
import os
import re
import statistics
import subprocess
import time
from typing import NamedTuple

__all__ = ["Seconds", "alternate", "milliseconds", "pin", "ratio", "read_peers", "table_head", "table_row"]

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []  # as the process was started
UNITS = {"s": 1.0, "ms": 1e-3}
SLOW = 60  # seconds: rounds that take longer are run once
LEAST = 1.0  # seconds that a function's calls in a round should take together


class Seconds(NamedTuple):
    median: float
    minimum: float
    rounds: list  # all of them


def pin(threads):
    """Run on the last `threads` of the cores this process may use, with as many threads of torch."""
    import torch

    if CORES:
        os.sched_setaffinity(0, CORES[-threads:])
    torch.set_num_threads(threads)


def alternate(runs, repetitions, peers=None, peer_rounds=0):
    """Seconds that each function of a dict takes, one after the other in every round.

    Two rounds warm up; if the first took more than `SLOW` seconds, it is the measurement. In the others a function that
    takes less than `LEAST` seconds is called several times in a row, as it is in a training: what ran before it has then
    left the cache. Its time is their mean.

    Args:
        runs: dict from name to function without arguments.
        repetitions: rounds, at least 1.
        peers: dict from name to function that returns the seconds to be counted; called after `peer_rounds` of the
            rounds, evenly spread.

    Returns:
        dict from name to `Seconds`.
    """
    times, peers = {name: [] for name in (*runs, *(peers or ()))}, peers or {}
    calls = dict.fromkeys(runs, 1)

    def round_of_ours():
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                run()
            times[name].append((time.perf_counter() - start) / calls[name])
        return sum(times[name][-1] for name in runs)

    first = round_of_ours()
    rounds = repetitions if first < SLOW else 0
    if rounds:
        round_of_ours()  # the first one may have compiled what it called
        for name in runs:
            calls[name] = max(int(LEAST / times[name][-1]), 1)
            times[name].clear()
    after = {round(rounds * (k + 1) / peer_rounds) - 1 for k in range(peer_rounds)} if peers else ()
    for number in range(rounds):
        round_of_ours()
        if number in after:
            for name, run in peers.items():
                times[name].append(run())
    if peers and not rounds:
        for name, run in peers.items():
            times[name].append(run())
    return {name: Seconds(statistics.median(values), min(values), values) for name, values in times.items()}


def ratio(a, b):
    """Median over the rounds of how many times as long one takes as the other: a machine is faster in some than in others."""
    return statistics.median(one / other for one, other in zip(a.rounds, b.rounds, strict=True))


def read_peers(path):
    """A file of programs to measure beside ours: dict from label to dict from case to function that runs it.

    The file is JSON, {label: {case: {"command": [...], "pattern": "...", "unit": "ms"}}} with the cases named as
    "quadratics x16". The command prints its own time, which the group of the regular expression finds; "unit" is "ms"
    or "s". Commands run on our cores, with OMP_NUM_THREADS=1.
    """
    with open(path) as file:
        peers = json.load(file)
    for label, cases in peers.items():
        for case, entry in cases.items():
            if set(entry) != {"command", "pattern", "unit"} or entry["unit"] not in UNITS:
                raise ValueError(
                    f'{path}: {label}, {case} must have "command", "pattern" and "unit" ("s" or "ms"), got {entry}'
                )
            if re.compile(entry["pattern"]).groups != 1:
                raise ValueError(f"{path}: {label}, {case}: the pattern must have one group, got {entry['pattern']!r}")
    return {
        label: {case: lambda entry=entry: peer_seconds(**entry) for case, entry in cases.items()}
        for label, cases in peers.items()
    }


def peer_seconds(command, pattern, unit):
    """Run a program and read the seconds that it prints."""
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    found = re.search(pattern, done.stdout)
    if done.returncode or not found:
        raise RuntimeError(
            f"{' '.join(command)} ended with {done.returncode} and printed no {pattern!r}:\n"
            f"{done.stdout[-1000:]}{done.stderr[-1000:]}"
        )
    return float(found.group(1)) * UNITS[unit]


def milliseconds(seconds):
    """Three digits: of `Seconds` "median (minimum)", of a number itself."""
    if isinstance(seconds, Seconds):
        return f"{milliseconds(seconds.median)} ({milliseconds(seconds.minimum)})"
    return f"{1e3 * seconds:#.3g}".removesuffix(".") if seconds < 1 else f"{1e3 * seconds:.0f}"


def table_row(*cells):
    """A line of a Markdown table, printed at once."""
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def table_head(*names):
    table_row(*names)
    print("|" + " --- |" * len(names), flush=True)
