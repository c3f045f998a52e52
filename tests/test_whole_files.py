"""Files that are there whole or not at all, and what killed processes leave beside them."""

import os
import platform
import subprocess
import sys

from gradbuffer.files import remove_partial_files, write_whole


def a_dead_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_halves_of_killed_processes_are_removed_and_nobody_elses(tmp_path):
    dead, here = a_dead_process(), platform.node()
    killed = [f".run.{dead}@{here}.partial"]
    others = [
        f".run.{os.getpid()}@{here}.partial",
        f".run.{os.getppid()}@{here}.partial",  # alive
        f".run.2.{dead}@{here}.partial",
        f".run.{dead}@elsewhere.partial",
        f"run.{dead}@{here}.partial",
        ".run.partial",
    ]
    for name in (*killed, *others):
        (tmp_path / name).write_bytes(b"half")
    remove_partial_files(tmp_path / "run")
    assert sorted(os.listdir(tmp_path)) == sorted(others)
    remove_partial_files(tmp_path / "run.2")
    assert f".run.2.{dead}@{here}.partial" not in os.listdir(tmp_path)
    remove_partial_files(tmp_path / "no folder" / "run")


def test_written_whole(tmp_path, monkeypatch):
    path, seen = tmp_path / "new" / "file", []
    replace = os.replace
    monkeypatch.setattr(
        "gradbuffer.files.os.replace", lambda *names: seen.extend(os.listdir(path.parent)) or replace(*names)
    )
    write_whole(path, b"content")
    assert path.read_bytes() == b"content" and os.listdir(path.parent) == ["file"]
    assert seen == [f".file.{os.getpid()}@{platform.node()}.partial"]  # what a killed process would leave
