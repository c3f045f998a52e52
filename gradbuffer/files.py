"""Files that are there whole or not at all: written beside their place, then renamed."""

import contextlib
import os
import platform
import re
from pathlib import Path

__all__ = ["remove_partial_files", "write_whole"]


def write_whole(path: str | Path, content: bytes) -> None:
    """Write a file so that a crash, a kill or a full disk at any moment leaves the older file there as it was.

    Args:
        path: where to; the folder is made if it is not there.
        content: bytes.

    Raises:
        OSError: the file cannot be written; names it and the cause.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}@{platform.node()}.partial")
    try:
        if not path.parent.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # on the disk before its name is: a power cut may come between
        os.replace(partial, path)
        with contextlib.suppress(OSError):  # not every system can open a folder
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        reason = f"could not be written: {error.strerror or error}; a file that was there before is as it was"
        raise OSError(error.errno, reason, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def remove_partial_files(path: str | Path) -> None:
    """Remove what killed processes of this machine left beside `path` while they wrote it.

    What a living process is writing stays, and so do other files' halves and those of other machines.
    """
    path = Path(path)
    form = re.compile(rf"\.{re.escape(path.name)}\.(\d+)@{re.escape(platform.node())}\.partial")
    with contextlib.suppress(OSError):
        for file in path.parent.iterdir():
            match = form.fullmatch(file.name)
            if match and not is_running(int(match[1])):
                file.unlink(missing_ok=True)


def is_running(process):
    """Whether this machine has a process of that number. Elsewhere than on POSIX: no, an open file cannot be removed there."""
    if os.name != "posix":
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
