"""The compiled libraries: where they lie, whether they belong to these sources, loading them."""

from __future__ import annotations

import functools
import os
import sys
import sysconfig
import time
from pathlib import Path

import torch

from .. import __version__, build

_REMEDY = "run `python -m geot_kernels build`"


def cache(kind: str) -> Path:
    """The user's folder for libraries compiled from these sources, for this platform."""
    usual = "~/Library/Caches" if sys.platform == "darwin" else "~/.cache"
    root = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser(usual))
    version = f"{__version__}-{build.digest(kind)}-{sysconfig.get_platform()}"
    return root / "geot-kernels" / version


def find_library(kind: str) -> Path | str:
    """Finds the library compiled from these sources: what the user compiled comes first.

    Returns:
        Its path, or in one sentence why there is none.
    """
    sources = build.digest(kind)
    paths = [folder / build.library_name(kind) for folder in (cache(kind), build.PACKAGE)]
    found = [path for path in paths if path.is_file()]
    for path in found:
        if build.compiled_from(path) == sources:
            return path
    if found:
        return f"{found[-1]} was compiled from other sources: {_REMEDY} again"
    return f"the {build.KINDS[kind]} kernels are not compiled: {_REMEDY}"


@functools.cache
def load_library(kind: str) -> str | None:
    """Loads a library, once; says in one sentence why it cannot, None where it did."""
    library = find_library(kind)
    if isinstance(library, str):
        return library
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"{library} cannot be loaded ({error.__cause__ or error}): {_REMEDY} again"
    return None


def compile_library(verbose: bool = False) -> int:
    """Compiles the kernels of each kind and tells what it does; those forbidden are left out.

    In a source tree the libraries go into the package, and only what has changed is compiled;
    else they go into the user's cache.

    Returns:
        An exit code: 0 where all is ready; that of CUDA must be only where GEOT_KERNELS_CUDA=1.
    """
    failed = False
    for kind, name in build.KINDS.items():
        required = True
        try:
            wanted = build.wanted(kind)
            required = kind == "cpu" if wanted is None else wanted
            if wanted is False:
                raise build.BuildError(f"{build.variable(kind)}=0")
            _compile(kind, verbose)
        except (build.BuildError, OSError) as error:
            print(f"geot-kernels: the {name} kernels are not compiled: {error}", file=sys.stderr)
            failed = failed or required
    return int(failed)


def _compile(kind: str, verbose: bool) -> None:
    tree = build.checkout()
    destination = build.PACKAGE if tree else cache(kind)
    tools = build.find_tools(kind)
    print(f"compiling {build.sources() / kind} with {tools} for torch >= 2.10 ...", flush=True)
    start = time.perf_counter()
    work = tree and tree / "build" / kind
    library = build.build(destination, kind, work=work, verbose=verbose)
    print(f"{library} is ready after {time.perf_counter() - start:.0f} s")
