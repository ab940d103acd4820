"""3-D structures of SMILES: in this process and in others, kept on disk and not."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from rdkit import Chem

from geot_model import conformers
from geot_model.conformers import Structure, default_cache, make_conformers

# More than are worth starting processes for, some of them no molecules.
MANY = [
    *(f"{left}C{right}" for left in ("", "N", "O", "F", "Cl", "S") for right in "CNOFS"),
    *("*C", "C1CC", "[Na+].[Cl-]", "[Pt](Cl)(Cl)(N)N"),
]
DIES_ON_AMMONIA = (
    "import json, os, sys; sys.path[:] = json.loads(sys.argv[1])\n"
    "from geot_model import conformers\n"
    "embed = conformers.embed\n"
    "conformers.embed = lambda smiles: os._exit(1) if smiles == 'N' else embed(smiles)\n"
    "conformers.serve()"
)


def made(smiles: str) -> Structure:
    """The structure, which is there."""
    (answer,), problems = make_conformers([smiles])
    assert isinstance(answer, Structure) and problems == []
    return answer


def assert_same(left: list[Structure | str], right: list[Structure | str]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        if isinstance(one, str) or isinstance(other, str):
            assert one == other
        else:
            np.testing.assert_array_equal(one.numbers, other.numbers, strict=True)
            np.testing.assert_array_equal(one.positions, other.positions, strict=True)


def fake(smiles: str) -> Structure:
    """A structure that costs nothing: as many hydrogens as the SMILES has characters."""
    numbers = np.ones(len(smiles), np.int64)
    return Structure(numbers, np.arange(3 * len(smiles), dtype=np.float32).reshape(-1, 3))


def not_called(smiles: str) -> Structure:
    raise AssertionError(f"{smiles} is made, not taken from the cache")


def test_structure_has_hydrogens_and_lengths_of_bonds() -> None:
    methane = made("C")
    assert methane.numbers.tolist() == [6, 1, 1, 1, 1]
    assert methane.numbers.dtype == np.int64 and methane.positions.dtype == np.float32
    bonds = np.linalg.norm(methane.positions[1:] - methane.positions[0], axis=1)
    np.testing.assert_allclose(bonds, 1.09, atol=0.02)


def test_structure_is_the_same_each_time() -> None:
    first, second = (made("CC(C)Cc1ccc(cc1)C(C)C(=O)O") for _ in range(2))
    assert_same([first], [second])


@pytest.mark.parametrize("smiles", ["O.O", "[Na+].[Cl-]", "CC(=O)[O-].[NH4+]", "[He].[He].[He]"])
def test_fragments_of_a_smiles_do_not_lie_in_each_other(smiles: str) -> None:
    fragments = Chem.GetMolFrags(Chem.AddHs(Chem.MolFromSmiles(smiles)))
    positions = made(smiles).positions
    for k, here in enumerate(fragments):
        for there in fragments[:k]:
            between = positions[list(here)][:, None] - positions[list(there)]
            assert np.linalg.norm(between, axis=-1).min() > 1.4


def test_an_element_without_force_field_still_gets_coordinates() -> None:
    assert [len(made(smiles).numbers) for smiles in ("[Pt](Cl)(Cl)(N)N", "[He]")] == [9, 1]


@pytest.mark.parametrize(
    ("smiles", "problem"),
    [
        ("C1CC", "cannot parse SMILES 'C1CC'"),
        ("C(C)(C)(C)(C)C", "cannot parse SMILES 'C(C)(C)(C)(C)C': Explicit valence"),
        ("C methane", "cannot parse SMILES 'C methane': white space after 'C'"),
        ("*C", "has a dummy atom, which is no element"),
        ("", "has no atoms"),
    ],
)
def test_what_is_no_molecule_is_said(
    smiles: str, problem: str, capfd: pytest.CaptureFixture[str]
) -> None:
    answers, _ = make_conformers(["C", smiles])
    assert isinstance(answers[0], Structure)
    assert isinstance(answers[1], str) and answers[1].startswith(problem)
    assert capfd.readouterr().err == ""


def test_extension_of_a_smiles_is_understood() -> None:
    assert len(made("CO |$a;b$|").numbers) == 6


def test_two_processes_give_the_same_as_none(capfd: pytest.CaptureFixture[str]) -> None:
    alone, _ = make_conformers(MANY, jobs=1)
    assert [isinstance(answer, str) for answer in alone] == [False] * 30 + [True] * 2 + [False] * 2
    together, problems = make_conformers(MANY, jobs=2)
    assert problems == []
    assert_same(together, alone)
    assert capfd.readouterr() == ("", "")


def test_a_crash_costs_one_molecule_and_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smiles = ["N", *MANY]
    with monkeypatch.context() as patched:
        patched.setattr(conformers, "_CHILD", DIES_ON_AMMONIA)
        (ammonia, *others), _ = make_conformers(smiles, jobs=2, cache=tmp_path)
    assert ammonia == "RDKit crashed"
    (ammonia, *again), _ = make_conformers(smiles, jobs=2, cache=tmp_path)
    assert isinstance(ammonia, Structure) and len(ammonia.numbers) == 4
    assert sum(isinstance(answer, Structure) for answer in others) == 32
    assert_same(others, again)


def test_a_process_that_cannot_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conformers, "_CHILD", "raise SystemExit(3)")
    with pytest.raises(RuntimeError, match="ended at its start with 3; jobs=1 needs none"):
        make_conformers(MANY, jobs=2)


def test_processes_end_with_the_one_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    processes = []
    start = conformers._Worker._start

    def recorded() -> subprocess.Popen[bytes]:
        processes.append(start())
        return processes[-1]

    monkeypatch.setattr(conformers._Worker, "_start", staticmethod(recorded))
    answers = conformers._made(MANY * 20, 2)
    assert isinstance(next(answers), Structure)
    answers.close()
    assert processes and all(process.poll() is not None for process in processes)


def test_a_script_may_ask_at_its_top_level_and_processes_are_without_torch(
    tmp_path: Path,
) -> None:
    serve = "conformers.serve()"
    child = conformers._CHILD.replace(serve, f"assert 'torch' not in sys.modules; {serve}")
    assert "torch" in child
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        "from geot_model import conformers\n"
        f"conformers._CHILD = {child!r}\n"
        f"answers, _ = conformers.make_conformers({MANY!r}, jobs=2)\n"
        "print(sum(isinstance(answer, conformers.Structure) for answer in answers))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("32\n", "")


def test_a_molecule_that_is_there_twice_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(conformers, "embed", lambda smiles: asked.append(smiles) or fake(smiles))
    answers, _ = make_conformers(["CO", "C", "CO"])
    assert asked == ["CO", "C"]
    assert_same(answers, [fake("CO"), fake("C"), fake("CO")])


def test_structures_and_failures_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smiles = ["CO", "C1CC", "C", "CO"]
    first, problems = make_conformers(smiles, cache=tmp_path / "new" / "folder")
    assert problems == []
    monkeypatch.setattr(conformers, "embed", not_called)
    again, problems = make_conformers(smiles[::-1], cache=tmp_path / "new" / "folder")
    assert problems == []
    assert_same(again, first[::-1])


def test_a_structure_not_found_in_time_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cage = "C1OC2C3NC12C1OC31"
    with monkeypatch.context() as patched:
        patched.setattr(conformers, "_EMBED_TIMEOUT_S", 0)  # for RDKit: as long as it takes
        assert make_conformers([cage], cache=tmp_path)[0] == ["no 3-D structure found in 60 s"]
    assert make_conformers([cage], cache=tmp_path)[0] == ["no 3-D structure found"]
    monkeypatch.setattr(conformers, "embed", not_called)
    assert make_conformers([cage], cache=tmp_path)[0] == ["no 3-D structure found"]


def test_what_another_method_made_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_conformers(["CO"], cache=tmp_path)
    monkeypatch.setattr(conformers, "embed", fake)
    monkeypatch.setattr(conformers, "_METHOD", "another")
    (answer,), _ = make_conformers(["CO"], cache=tmp_path)
    assert_same([answer], [fake("CO")])


@pytest.mark.parametrize("damage", ["text", "cut", "table", "row"])
def test_a_damaged_cache_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    smiles = ["C" * n for n in range(1, 100)]
    monkeypatch.setattr(conformers, "embed", fake)
    expected, _ = make_conformers(smiles, jobs=1, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    if damage == "text":
        file.write_text("no database")
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:5000])
    else:
        with sqlite3.connect(file) as connection:
            if damage == "row":
                connection.execute("update conformers set positions = x'00'")
            else:
                connection.execute("drop table conformers")
        connection.close()
    answers, problems = make_conformers(smiles, jobs=1, cache=tmp_path)
    assert problems == []
    assert_same(answers, expected)
    monkeypatch.setattr(conformers, "embed", not_called)
    assert_same(make_conformers(smiles, jobs=1, cache=tmp_path)[0], expected)


def test_a_cache_that_cannot_be_is_said_and_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    answers, problems = make_conformers(["C"], cache=tmp_path / "file" / "folder")
    assert_same(answers, [made("C")])
    (problem,) = problems
    assert "file/folder/conformers.sqlite: 3-D structures are not kept: " in problem


def test_runs_at_once_share_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conformers, "embed", fake)
    smiles = ["C" * n for n in range(1, 150)]
    with ThreadPoolExecutor(4) as pool:
        runs = list(
            pool.map(
                lambda start: make_conformers(smiles[start:], jobs=1, cache=tmp_path), range(8)
            )
        )
    for start, (answers, problems) in enumerate(runs):
        assert problems == []
        assert_same(answers, [fake(text) for text in smiles[start:]])
    with sqlite3.connect(tmp_path / "conformers.sqlite") as connection:
        assert connection.execute("pragma integrity_check").fetchone() == ("ok",)
        assert connection.execute("select count(*) from conformers").fetchone() == (149,)
    connection.close()


def test_the_usual_cache_is_where_users_keep_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache() == Path("/somewhere/geot-kernels/conformers")
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")  # to be ignored, says its specification
    assert default_cache() == Path.home() / ".cache/geot-kernels/conformers"


def test_no_processes_are_refused() -> None:
    with pytest.raises(ValueError, match="jobs: expected at least 1, got 0"):
        make_conformers(["C"], jobs=0)
