"""3-D structures of SMILES: made in several processes, kept on disk.

Hydrogens are added, then ETKDGv3 with a fixed seed finds a structure and MMFF94 (UFF where that
lacks parameters) relaxes it. How the parts of a SMILES with a dot lie to each other is not known:
they are set side by side and relaxed.

Each process is a new Python that has only RDKit and this module, so that one molecule on which
RDKit crashes costs that molecule alone, and a script needs no `if __name__ == "__main__"`.

Sources:
    ETKDGv3: Wang, Witek, Landrum, Riniker, J. Chem. Inf. Model. 60, 2044 (2020),
    doi:10.1021/acs.jcim.0c00025. MMFF94: Halgren, J. Comput. Chem. 17, 490 (1996),
    doi:10.1002/(SICI)1096-987X(199604)17:5/6<490::AID-JCC1>3.0.CO;2-P.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pickle
import queue
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem, rdBase
from rdkit.Chem import rdDistGeom, rdForceFieldHelpers
from rdkit.Geometry import Point3D

_EMBED_SEED = 2024
_EMBED_TIMEOUT_S = 60
_RELAX_STEPS = 2000
_FRAGMENT_GAP = 2.5  # Å between fragments of one SMILES before they are relaxed
# What is on disk is made anew when this changes: raise it with anything that changes structures.
_METHOD = f"ETKDGv3 MMFF94 1, seed {_EMBED_SEED}, RDKit {rdBase.rdkitVersion}"

_FEW = 32  # molecules that are not worth starting processes for
_CRASHED = "RDKit crashed"
_TIMED_OUT = f"no 3-D structure found in {_EMBED_TIMEOUT_S} s"
_PASSING = (_CRASHED, _TIMED_OUT)  # what may go well another time, and is not kept
_CACHE_FILE = "conformers.sqlite"
_CACHE_WAIT_S = 30  # for another process that writes
_CACHE_BATCH = 64  # structures between two writes
_CACHE_QUERY = 500  # SMILES in one query; SQLite allows 999 and more
_TABLE = """create table if not exists conformers (
    smiles text, method text, numbers blob, positions blob, problem text,
    primary key (smiles, method)) without rowid"""
# A new Python, with the paths that this one has: where they are is its last argument.
_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from geot_model import conformers; conformers.serve()"
)


@dataclass(frozen=True, eq=False)
class Structure:
    """Where the atoms of a molecule are.

    Attributes:
        numbers: Atomic numbers, int64 [n], in the order of the SMILES, then hydrogens.
        positions: Å, float32 [n, 3].
    """

    numbers: NDArray[np.int64]
    positions: NDArray[np.float32]


def make_conformers(
    smiles: Sequence[str],
    *,
    jobs: int | None = None,
    cache: str | Path | None = None,
) -> tuple[list[Structure | str], list[str]]:
    """3-D structures of molecules, each the same in every run.

    Args:
        smiles: M SMILES.
        jobs: Processes; None: as many as there are processors. Fewer than 32 structures that are
            not in the cache are made in this process.
        cache: Folder in which structures and failures are kept; made if missing; None for none.
            Any number of runs may share it. A damaged file there is made anew.

    Returns:
        For each SMILES its structure, or why there is none; and what is wrong with the cache if
        it cannot be used, which costs time and nothing else.

    Raises:
        ValueError: `jobs` is less than 1.
    """
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs: expected at least 1, got {jobs}")
    distinct = list(dict.fromkeys(smiles))
    store = _Cache(cache)
    known = store.load(distinct)
    missing = [text for text in distinct if text not in known]
    workers = min(jobs or _processors(), len(missing))
    few = workers < 2 or len(missing) < _FEW
    with contextlib.closing(_made_here(missing) if few else _made(missing, workers)) as answers:
        fresh = zip(missing, answers, strict=True)
        while batch := dict(itertools.islice(fresh, _CACHE_BATCH)):
            known |= batch
            store.save({text: made for text, made in batch.items() if made not in _PASSING})
    return [known[text] for text in smiles], store.problems


def default_cache() -> Path:
    """Folder in which structures are kept: `$XDG_CACHE_HOME/geot-kernels/conformers`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    home = Path(base) if os.path.isabs(base) else Path("~/.cache").expanduser()
    return home / "geot-kernels" / "conformers"


def embed(smiles: str) -> Structure:
    """Make the 3-D structure of a molecule.

    Raises:
        ValueError: It is no SMILES, has an atom that is no element, or no structure is found.
    """
    text, *extension = smiles.split(maxsplit=1) or [""]
    with rdBase.BlockLogs():
        # RDKit would take what follows for a name, unless it is an extension (CXSMILES).
        if extension and not extension[0].startswith("|"):
            raise ValueError(f"cannot parse SMILES '{smiles}': white space after '{text}'")
        mol = Chem.MolFromSmiles(smiles)
        if mol is None:
            why = chemistry_problem(Chem.MolFromSmiles(smiles, sanitize=False))
            raise ValueError(f"cannot parse SMILES '{smiles}'{why}")
        if mol.GetNumAtoms() == 0:
            raise ValueError("has no atoms")
        refuse_dummies(mol)
        return structure_of(_embedded(Chem.AddHs(mol)))


def chemistry_problem(unsanitized: Chem.Mol | None) -> str:
    """What RDKit objects to in a molecule whose syntax it can read, ready to be appended."""
    problems = Chem.DetectChemistryProblems(unsanitized) if unsanitized is not None else ()
    return f": {problems[0].Message()}" if problems else ""


def refuse_dummies(mol: Chem.Mol) -> None:
    """Raise ValueError if an atom is no element (`*`, an R group)."""
    if any(atom.GetAtomicNum() == 0 for atom in mol.GetAtoms()):
        raise ValueError("has a dummy atom, which is no element")


def structure_of(mol: Chem.Mol) -> Structure:
    """Elements and coordinates of a molecule; ValueError if a coordinate is not finite."""
    positions = mol.GetConformer().GetPositions().astype(np.float32)
    if not np.isfinite(positions).all():
        raise ValueError("has coordinates that are not finite")
    numbers = np.array([atom.GetAtomicNum() for atom in mol.GetAtoms()], dtype=np.int64)
    return Structure(numbers, positions)


def _embedded(mol: Chem.Mol) -> Chem.Mol:
    """The same molecule with a relaxed 3-D structure."""
    parameters: Any = rdDistGeom.ETKDGv3()  # its stubs forbid assignment
    parameters.randomSeed = _EMBED_SEED
    parameters.timeout = _EMBED_TIMEOUT_S
    start = time.monotonic()
    if rdDistGeom.EmbedMolecule(mol, parameters) < 0:
        parameters.useRandomCoords = True
        if rdDistGeom.EmbedMolecule(mol, parameters) < 0:
            late = time.monotonic() - start >= _EMBED_TIMEOUT_S
            raise ValueError(_TIMED_OUT if late else "no 3-D structure found")
    _set_fragments_apart(mol)
    if rdForceFieldHelpers.MMFFHasAllMoleculeParams(mol):
        rdForceFieldHelpers.MMFFOptimizeMolecule(mol, maxIters=_RELAX_STEPS)
    elif rdForceFieldHelpers.UFFHasAllMoleculeParams(mol):
        rdForceFieldHelpers.UFFOptimizeMolecule(mol, maxIters=_RELAX_STEPS)
    return mol


def _set_fragments_apart(mol: Chem.Mol) -> None:
    """Shift fragments along x: RDKit embeds each around the origin, one on top of the other."""
    conformer = mol.GetConformer()
    xyz = conformer.GetPositions()
    edge = -np.inf
    for fragment in Chem.GetMolFrags(mol):
        atoms = list(fragment)
        shift = max(0.0, edge + _FRAGMENT_GAP - xyz[atoms, 0].min())
        xyz[atoms, 0] += shift
        edge = xyz[atoms, 0].max()
    for i, point in enumerate(xyz):
        conformer.SetAtomPosition(i, Point3D(*map(float, point)))


def _answer(smiles: str) -> Structure | str:
    """The structure, or why there is none."""
    try:
        return embed(smiles)
    except (ValueError, RuntimeError) as problem:  # RuntimeError: RDKit's broken invariants
        return str(problem).strip().split("\n")[0]


def _processors() -> int:
    """Number of processors that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _made_here(smiles: Sequence[str]) -> Generator[Structure | str, None, None]:
    """Structures, or why there are none, one after the other."""
    yield from map(_answer, smiles)


def _made(smiles: Sequence[str], workers: int) -> Generator[Structure | str, None, None]:
    """The same, made by as many processes; if left early, those are ended."""
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()

    def ask(text: str) -> Structure | str:
        worker = idle.get()
        try:
            return worker.ask(text)
        finally:
            idle.put(worker)

    with contextlib.ExitStack() as processes, ThreadPoolExecutor(workers) as pool:
        started = [_Worker() for _ in range(workers)]
        for worker in started:
            processes.callback(worker.close)
            idle.put(worker)
        try:
            yield from pool.map(ask, smiles)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in started:
                worker.close()  # its thread waits for an answer no longer
            raise


class _Worker:
    """A process that makes structures; started when first asked, and again after a crash."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, smiles: str) -> Structure | str:
        """Have a structure made."""
        if self._process is None:
            self._process = self._start()
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            pickle.dump(smiles, process.stdin)
            process.stdin.flush()
            answer: Structure | str = pickle.load(process.stdout)
        except (EOFError, OSError, ValueError, pickle.UnpicklingError):
            self.close()
            return _CRASHED
        return answer

    @staticmethod
    def _start() -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        assert process.stdout is not None
        if not process.stdout.read(1):
            raise RuntimeError(
                f"a process for conformers ended at its start with {process.wait()}; "
                "jobs=1 needs none"
            )
        return process

    def close(self) -> None:
        """End the process, whatever it is doing."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def serve() -> None:
    """Answer SMILES on stdin by structures on stdout, as pickles, until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asks handles Ctrl-C
    questions = sys.stdin.buffer
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)  # what a library prints must not get between the answers
        answers.write(b"!")
        answers.flush()
        with contextlib.suppress(EOFError, BrokenPipeError):
            while True:
                pickle.dump(_answer(pickle.load(questions)), answers)
                answers.flush()


class _Cache:
    """Structures on disk, by SMILES and method. What cannot be read or written is done without."""

    def __init__(self, folder: str | Path | None) -> None:
        self.problems: list[str] = []
        self._path = None if folder is None else Path(folder) / _CACHE_FILE

    def load(self, smiles: Sequence[str]) -> dict[str, Structure | str]:
        """What is known of some molecules."""
        found: dict[str, Structure | str] = {}
        for start in range(0, len(smiles), _CACHE_QUERY):
            some = smiles[start : start + _CACHE_QUERY]
            marks = ",".join("?" * len(some))
            rows = self._run(
                "select smiles, numbers, positions, problem from conformers "
                f"where method = ? and smiles in ({marks})",
                [(_METHOD, *some)],
            )
            for text, *stored in rows:
                answer = _unpacked(*stored)
                if answer is not None:
                    found[text] = answer
        return found

    def save(self, answers: dict[str, Structure | str]) -> None:
        """Keep answers."""
        rows = [(text, _METHOD, *_packed(answer)) for text, answer in answers.items()]
        self._run("insert or replace into conformers values (?, ?, ?, ?, ?)", rows)

    def _run(self, statement: str, rows: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """Run a statement for each row in one transaction; once more on a new file if damaged."""
        for _ in range(2):
            if self._path is None:
                break
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                connection = sqlite3.connect(self._path, timeout=_CACHE_WAIT_S)
                with contextlib.closing(connection), connection:
                    connection.execute(_TABLE)
                    return [found for row in rows for found in connection.execute(statement, row)]
            except (OSError, sqlite3.OperationalError) as error:  # locked, read-only, full
                self._give_up(error)
            except sqlite3.DatabaseError:  # not a database, or a damaged one
                try:
                    self._path.unlink(missing_ok=True)
                except OSError as error:
                    self._give_up(error)
        return []

    def _give_up(self, error: Exception) -> None:
        self.problems.append(f"{self._path}: 3-D structures are not kept: {error}")
        self._path = None


def _packed(answer: Structure | str) -> tuple[bytes | None, bytes | None, str | None]:
    if isinstance(answer, str):
        return None, None, answer
    numbers = answer.numbers.astype(np.uint8).tobytes()
    return numbers, answer.positions.astype("<f4").tobytes(), None


def _unpacked(numbers: Any, positions: Any, problem: Any) -> Structure | str | None:
    """What `_packed` was given; None if it is not of its making."""
    if isinstance(problem, str):
        return problem
    if not isinstance(numbers, bytes) or not isinstance(positions, bytes):
        return None
    if not numbers or len(positions) != 12 * len(numbers):
        return None
    return Structure(
        np.frombuffer(numbers, np.uint8).astype(np.int64),
        np.frombuffer(positions, "<f4").reshape(-1, 3).astype(np.float32),
    )
