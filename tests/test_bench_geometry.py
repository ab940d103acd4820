"""The molecules of the benchmarks are real, are chosen the same way each time, and are padded."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch

from bench.geometry import DENSITY, FILES, ROOT, lattice_molecules, load

# Molecules, atoms on average, of the smallest and of the largest; the same of heavy atoms.
CLAIMED = {
    "qm9": (3000, (18.1, 6, 27), (8.8, 4, 9)),
    "drug_like": (128, (45.6, 20, 91), (24.7, 10, 48)),
    "pcqm_like": (256, (26.8, 12, 54), (14.2, 8, 22)),
    "aspirin": (64, (21.0, 21, 21), (13.0, 13, 13)),
    "protein": (1, (2030.0, 2030, 2030), (2030.0, 2030, 2030)),
}
NAMES = list(CLAIMED)
HALOGENS = (9, 17, 35, 53)


def read(name: str) -> dict[str, np.ndarray]:
    with np.load(FILES[name], allow_pickle=False) as file:
        return dict(file)


def nearest(positions: np.ndarray) -> np.ndarray:
    """Distance of each atom to the nearest other one, Å, [N]."""
    distances = torch.cdist(*2 * [torch.from_numpy(positions).double()])
    return distances.fill_diagonal_(torch.inf).min(1).values.numpy()


def gaps_of(name: str) -> np.ndarray:
    """Distance of each atom of a file to the nearest one of its molecule, Å, [T]."""
    file = read(name)
    return np.concatenate([nearest(file["positions"][slice(*x)]) for x in pairwise(file["ptr"])])


def test_every_file_is_known_and_described():
    assert set(FILES) == set(CLAIMED)
    folder = FILES["protein"].parent
    assert {path.stem for path in folder.glob("*.npz")} == set(FILES) - {"qm9"}
    lines = (folder / "README.md").read_text(encoding="utf-8").splitlines()
    for name in NAMES[1:]:
        count, *claims = CLAIMED[name]
        (line,) = [line for line in lines if line.startswith(f"| `{name}.npz`")]
        cells = [cell.strip() for cell in line.split("|")]
        sizes = [f"{b:,}" if a == b else f"{mean}, {a} to {b}" for mean, a, b in claims]
        assert cells[2:6] == [str(count), *sizes, f"{gaps_of(name).min():.2f} Å"]


@pytest.mark.parametrize("name", NAMES)
def test_files_hold_what_they_claim(name):
    file = read(name)
    count, *claims = CLAIMED[name]
    numbers, positions, ptr = file["numbers"], file["positions"], file["ptr"]
    assert (numbers.dtype, positions.dtype, ptr.dtype) == (np.uint8, np.float32, np.int64)
    assert len(ptr) == count + 1 and ptr[0] == 0
    assert positions.shape == (ptr[-1], 3) == (len(numbers), 3)
    for counted, (mean, low, high) in zip((numbers > 0, numbers > 1), claims, strict=True):
        sizes = np.add.reduceat(counted.astype(int), ptr[:-1])
        assert (sizes.min(), sizes.max()) == (low, high)
        assert sizes.mean() == pytest.approx(mean, abs=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_atoms_are_as_far_apart_as_in_molecules(name):
    numbers, gap = read(name)["numbers"], gaps_of(name)
    assert gap.min() > 0.7
    assert (gap < 2.2).mean() > 0.999
    # Hydrogens and halogens have one neighbour, at the length of a bond.
    hydrogens = gap[numbers == 1]
    assert np.all((hydrogens > 0.85) & (hydrogens < 1.6))
    halogens = gap[np.isin(numbers, HALOGENS)]
    assert np.all((halogens > 1.25) & (halogens < 2.3))


@pytest.mark.parametrize("name", NAMES)
def test_molecules_are_in_one_piece(name):
    file = read(name)
    for start, end in list(pairwise(file["ptr"]))[:256]:
        reach = 3.0 if name == "protein" else 2.3  # Å; its peptide only touches its chain
        positions = torch.from_numpy(file["positions"][start:end]).double()
        near = torch.cdist(positions, positions) < reach
        reached = near[0]
        while (more := near[reached].any(0)).sum() > reached.sum():
            reached = more
        assert reached.all()


def test_aspirin_is_aspirin_and_moves():
    geometry = load("aspirin")
    assert geometry.num_types == 3 and geometry.mask.all()
    assert (geometry.atom_types == geometry.atom_types[0]).all()
    assert torch.bincount(geometry.atom_types[0]).tolist() == [8, 9, 4]
    assert np.unique(read("aspirin")["numbers"]).tolist() == [1, 6, 8]
    distances = torch.cdist(geometry.positions, geometry.positions)  # [B, N, N]
    bonded = (distances.mean(0) < 1.65).triu(1)
    assert bonded.sum() == 21  # as many as atoms: one ring
    moved = distances.std(0)
    # What thermal motion does at 500 K to a bond (0.03 to 0.05 Å), and to the shape.
    assert 0.02 < moved[bonded].mean() < 0.06
    assert moved.max() > 0.5


def test_protein_is_made_of_amino_acids():
    numbers = read("protein")["numbers"]
    assert set(np.unique(numbers).tolist()) == {6, 7, 8, 16}
    density = (load("protein").positions[0].norm(dim=-1) < 12).sum() / (4 / 3 * np.pi * 12**3)
    assert 0.04 < density < 0.07  # heavy atoms/Å³ inside


def test_sources_are_named_and_are_no_paths_of_a_machine():
    for name in NAMES:
        source = str(read(name)["source"])
        assert len(source) > 40
        assert not any(word.startswith(("/", "~")) or ":\\" in word for word in source.split())
        assert "://" not in source
    assert "not PCQM4Mv2" in str(read("pcqm_like")["source"])
    assert "not MD17" in str(read("aspirin")["source"])
    assert "4ZHL (CC0)" in str(read("protein")["source"])


def test_files_are_small():
    assert sum(path.stat().st_size for path in FILES["protein"].parent.iterdir()) < 1_000_000


@pytest.mark.parametrize("name", NAMES)
def test_all_molecules_come_in_order_and_padded_with_zeros(name):
    file = read(name)
    types, positions, mask, num_types = load(name)
    sizes = np.diff(file["ptr"])
    assert types.shape == mask.shape == (len(sizes), sizes.max())
    assert positions.shape == (*mask.shape, 3)
    assert (types.dtype, positions.dtype, mask.dtype) == (torch.int64, torch.float32, torch.bool)
    assert torch.equal(mask.sum(1), torch.from_numpy(sizes))
    assert torch.equal(mask, mask.sort(1, descending=True).values)  # atoms before padding
    np.testing.assert_array_equal(positions[mask].numpy(), file["positions"])
    elements = np.unique(file["numbers"])
    assert num_types == len(elements)
    np.testing.assert_array_equal(elements[types[mask].numpy()], file["numbers"])
    assert not types[~mask].any() and not positions[~mask].any()


def test_the_choice_is_frozen():
    # The permutation of RandomState(2): computed once, and the same with every version of numpy.
    first = [53, 205, 35]
    assert np.random.RandomState(2).permutation(256)[:3].tolist() == first
    file, chosen = read("pcqm_like"), load("pcqm_like", 3)
    for i, index in enumerate(first):
        expected = file["positions"][file["ptr"][index] : file["ptr"][index + 1]]
        np.testing.assert_array_equal(chosen.positions[i, chosen.mask[i]].numpy(), expected)
    assert chosen.mask.shape[1] == chosen.mask.sum(1).max()  # padded to the largest chosen
    state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    again = load("pcqm_like", 3)
    assert all(torch.equal(x, y) for x, y in zip(chosen[:3], again[:3], strict=True))
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1] == np.random.get_state()[1].tolist()


def test_more_molecules_than_there_are_start_over():
    once, more = load("aspirin", 64), load("aspirin", 150)
    assert more.mask.shape == (150, 21)
    repeated = torch.cat([once.positions, once.positions, once.positions])[:150]
    assert torch.equal(more.positions, repeated)
    assert len(once.positions.unique(dim=0)) == 64
    assert load("protein", 4).mask.shape == (4, 2030)


def test_larger_molecules_are_left_out_before_the_choice():
    geometry = load("drug_like", 32, max_atoms=48)
    assert geometry.mask.shape == (32, 48)
    sizes = np.diff(read("drug_like")["ptr"])
    assert len(load("drug_like", max_atoms=48).mask) == (sizes <= 48).sum() < 128
    assert len(geometry.positions.unique(dim=0)) == 32
    assert load("drug_like", 2, max_atoms=128).mask.shape == (2, 128)


@pytest.mark.parametrize("name", NAMES)
def test_heavy_leaves_out_hydrogens_and_keeps_types(name):
    everything, heavy = load(name), load(name, heavy=True)
    assert heavy.num_types == everything.num_types
    assert heavy.mask.shape[1] == CLAIMED[name][2][2]
    elements = np.unique(read(name)["numbers"])
    kept = everything.mask & torch.from_numpy(elements > 1)[everything.atom_types]
    assert torch.equal(heavy.mask.sum(1), kept.sum(1))
    assert torch.equal(heavy.positions[heavy.mask], everything.positions[kept])
    assert torch.equal(heavy.atom_types[heavy.mask], everything.atom_types[kept])


def test_hydrogens_do_not_count_towards_the_size_of_heavy_molecules():
    assert load("aspirin", 5, max_atoms=13, heavy=True).mask.all()
    with pytest.raises(ValueError, match="max_atoms: no molecule of aspirin"):
        load("aspirin", 5, max_atoms=13)


@pytest.mark.parametrize("atoms", [1, 128, 1000])
def test_a_ball_is_cut_out_of_the_protein(atoms):
    whole, ball = load("protein"), load("protein", max_atoms=atoms)
    assert ball.mask.shape == (1, atoms) and ball.mask.all()
    radius = (whole.positions - whole.positions.mean(1)).norm(dim=-1)[0]  # [N]
    inside = radius <= radius.sort().values[atoms - 1]
    assert torch.equal(ball.positions[0], whole.positions[0, inside])  # in the order of the chain
    assert torch.equal(ball.atom_types[0], whole.atom_types[0, inside])


def test_a_ball_larger_than_the_protein_is_padded():
    ball = load("protein", 2, max_atoms=2048)
    assert ball.mask.shape == (2, 2048) and ball.mask.sum() == 2 * 2030


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("md17", {}, r"name: expected one of qm9, .*protein, got 'md17'"),
        ("qm9", {"molecules": 0}, "molecules: expected at least 1, got 0"),
        ("qm9", {"max_atoms": 0}, "max_atoms: expected at least 1, got 0"),
        ("drug_like", {"max_atoms": 19}, "max_atoms: no molecule of drug_like has 19 atoms"),
    ],
)
def test_wrong_arguments_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        load(name, **options)


def test_lattice_is_as_dense_as_it_says():
    torch.manual_seed(0)
    positions = lattice_molecules(3, 500)
    assert positions.shape == (3, 500, 3)
    assert min(nearest(x.numpy()).min() for x in positions) > 0.9
    inside = (positions - positions.mean(1, keepdim=True)).norm(dim=-1) < 8
    density = inside.sum(1) / (4 / 3 * np.pi * 8**3)
    assert density.mean() == pytest.approx(DENSITY, rel=0.1)


def test_neither_rdkit_nor_the_model_is_needed():
    code = (
        "import sys; sys.modules['rdkit'] = sys.modules['geot_model'] = None\n"
        "from bench.geometry import FILES, load\n"
        "print([len(load(name).mask) for name in FILES])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == str([count for count, *_ in CLAIMED.values()]), done.stderr
