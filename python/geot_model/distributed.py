"""Several processes that train together, each with a device of its own.

The process that the user started only watches them: where one fails, it ends the others and says
why. They find each other by a file, not by a port that someone else could take.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

_JOB, _STORE, _RESULT = "job.pickle", "store", "result.pickle"
_PATIENCE = 0.05  # seconds between two looks at the processes
_LAST_LINES = 15


class ProcessError(RuntimeError):
    """One of several processes failed; the message has the end of what it wrote."""


def launch(
    function: Callable[..., Any],
    arguments: dict[str, Any],
    world: int,
    *,
    backend: str,
    console: Console,
) -> Any:
    """Call a function in several processes at once, in which `torch.distributed` is set up.

    Args:
        function: Of a module that can be imported. In the first process it gets a `console`.
        arguments: Its others, by name, such that they can be pickled.
        world: Number of processes.
        backend: Of `torch.distributed`: "nccl" for GPUs, "gloo" for CPUs.
        console: Where what the first one prints is shown.

    Returns:
        What the function returned in the first process.

    Raises:
        ProcessError: A process failed. All have ended by then.
        KeyboardInterrupt: The run was interrupted. All have ended by then.
    """
    with tempfile.TemporaryDirectory(prefix="geot-") as name:
        folder = Path(name)
        (folder / _JOB).write_bytes(pickle.dumps((function, arguments)))
        processes: list[subprocess.Popen[str]] = []
        try:
            for rank in range(world):
                command = [sys.executable, "-m", __name__, name, str(rank), str(world), backend]
                processes.append(_start(command, folder, rank, world, console))
            printer = threading.Thread(target=_print_lines, args=(processes[0], console))
            printer.start()
            _watch(processes, folder)
            printer.join()
        finally:
            _stop(processes)
            console.show_cursor()  # which a progress bar hides
        return pickle.loads((folder / _RESULT).read_bytes())


def _start(
    command: Sequence[str], folder: Path, rank: int, world: int, console: Console
) -> subprocess.Popen[str]:
    """Start a process, which ends when its stdin is closed."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "LOCAL_RANK": str(rank),  # where Lightning looks for it
        "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // world)),
    }
    output = None if console.is_terminal else subprocess.PIPE
    with _errors(folder, rank).open("w") as errors:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL if rank else output,
            stderr=errors,
            text=True,
            start_new_session=True,  # Ctrl-C is for this process alone
        )


def _errors(folder: Path, rank: int) -> Path:
    return folder / f"errors-{rank}.txt"


def _print_lines(process: subprocess.Popen[str], console: Console) -> None:
    for line in process.stdout or ():
        console.print(line.rstrip("\n"), highlight=False, markup=False, soft_wrap=True)


def _watch(processes: Sequence[subprocess.Popen[str]], folder: Path) -> None:
    """Wait until all processes have ended well, or one has not."""
    running = dict(enumerate(processes))
    while running:
        for rank, process in list(running.items()):
            if process.poll() is None:
                continue
            if process.returncode != 0:
                lines = _errors(folder, rank).read_text(errors="replace").strip().splitlines()
                end = "\n".join(lines[-_LAST_LINES:]) or f"exit status {process.returncode}"
                raise ProcessError(f"process {rank + 1} of {len(processes)} failed: {end}")
            del running[rank]
        time.sleep(_PATIENCE)


def _stop(processes: Sequence[subprocess.Popen[str]]) -> None:
    for process in processes:
        process.kill()
        process.wait()
        if process.stdin is not None:
            process.stdin.close()


def _end_with_parent() -> None:
    """End this process when the one that started it is no longer there."""

    def wait() -> None:
        os.read(0, 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main() -> None:
    """Does the work of one process."""
    folder, rank, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    _end_with_parent()
    function, arguments = pickle.loads((folder / _JOB).read_bytes())
    torch.distributed.init_process_group(
        sys.argv[4], init_method=(folder / _STORE).as_uri(), rank=rank, world_size=world
    )
    result = function(**arguments, console=Console(quiet=rank > 0))
    if rank == 0:
        (folder / _RESULT).write_bytes(pickle.dumps(result))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
