"""Pictures of attention maps and of molecules with their strongest pairs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text
from rdkit import Chem

from geot_model import draw
from geot_model.draw import atom_labels, draw_heatmap, draw_pairs, strongest_pairs
from geot_model.molecules import Molecule


def picture(path: Path) -> np.ndarray:
    """The PNG's colours [height, width, 3]; fails if it is blank."""
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    colours = imread(path)[..., :3]
    assert colours.std() > 0.02
    return colours


def weights(n: int, seed: int = 0) -> np.ndarray:
    """Signed weights [n, n]."""
    return np.random.default_rng(seed).normal(size=(n, n))


def share_of(colours: np.ndarray, colour: tuple[int, int, int]) -> float:
    """Share of pixels within a few units of a colour."""
    return float((np.abs(colours * 255 - colour).max(axis=-1) < 6).mean())


def test_labels_count_each_element_by_itself() -> None:
    assert atom_labels([6, 8, 1, 6, 1, 17]) == ["C1", "O1", "H1", "C2", "H2", "Cl1"]
    assert atom_labels(np.array([], dtype=np.int64)) == []


@pytest.mark.parametrize("n", [1, 2, 3, 17])
@pytest.mark.parametrize("num_pairs", [0, 1, 5, 1000])
def test_strongest_pairs_are_those_of_a_loop(n: int, num_pairs: int) -> None:
    w = weights(n)
    pairs = [(i, j, (w[i, j] + w[j, i]) / 2) for i in range(n) for j in range(i + 1, n)]
    expected = sorted(pairs, key=lambda pair: -abs(pair[2]))[:num_pairs]
    got = strongest_pairs(w, num_pairs)
    assert [pair[:2] for pair in got] == [pair[:2] for pair in expected]
    np.testing.assert_allclose([p[2] for p in got], [p[2] for p in expected])


def test_equal_pairs_come_by_index_and_zero_pairs_not_at_all() -> None:
    w = np.ones((3, 3))
    assert strongest_pairs(w, 2) == [(0, 1, 1.0), (0, 2, 1.0)]
    w[0, 1], w[1, 0] = 2.0, -2.0
    assert strongest_pairs(w, 9) == [(0, 2, 1.0), (1, 2, 1.0)]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((2, 3)), r"weights: expected \[n, n\] with n >= 1, got \[2, 3\]"),
        (np.zeros((0, 0)), r"weights: expected \[n, n\] with n >= 1, got \[0, 0\]"),
        (np.full((2, 2), np.nan), "weights: expected finite values"),
    ],
)
def test_weights_that_are_no_map_are_refused(
    tmp_path: Path, bad: np.ndarray, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        strongest_pairs(bad, 1)
    with pytest.raises(ValueError, match=message):
        draw_heatmap(bad, ["C1", "C2"], tmp_path / "map.png")
    with pytest.raises(ValueError, match=message):
        draw_pairs(Chem.MolFromSmiles("CC"), bad, tmp_path / "pairs.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("n", [1, 2, 5, 40])
@pytest.mark.parametrize("signed", [True, False])
def test_heatmap_is_written(tmp_path: Path, n: int, signed: bool) -> None:
    w = weights(n) if signed else np.abs(weights(n))
    path = tmp_path / "map.png"
    draw_heatmap(w, atom_labels([6] * n), path, title=f"$C_{n}, a title{' that is long' * 9}")
    picture(path)


def test_heatmap_grows_with_the_number_of_atoms(tmp_path: Path) -> None:
    sides = []
    for n in (5, 20, 40):
        draw_heatmap(weights(n), atom_labels([6] * n), tmp_path / "map.png")
        sides.append(picture(tmp_path / "map.png").shape[0])
    assert sides[0] < sides[1] < sides[2]
    assert sides[2] / 40 > 22  # pixels for a label of 8 points at 150 dpi, with room


def test_heatmap_of_signed_weights_is_white_at_zero_and_others_are_not(tmp_path: Path) -> None:
    path = tmp_path / "map.png"
    labels = atom_labels([6] * 6)
    w = np.zeros((6, 6))
    w[0, 0] = 1.0
    draw_heatmap(w, labels, path)
    dark_ground = picture(path).mean()
    draw_heatmap(w, labels, path, signed=True)
    assert picture(path).mean() > dark_ground + 0.2
    w[1, 1] = -0.01
    draw_heatmap(w, labels, path)
    assert picture(path).mean() > dark_ground + 0.2


def test_heatmaps_with_one_limit_show_one_value_in_one_colour(tmp_path: Path) -> None:
    colours = []
    for largest in (1.0, 4.0):
        w = np.full((5, 5), 0.5)
        w[0, 0], w[1, 1] = largest, -largest
        draw_heatmap(w, atom_labels([6] * 5), tmp_path / "map.png", limit=2.0)
        image = picture(tmp_path / "map.png")
        values, counts = np.unique(image.reshape(-1, 3), axis=0, return_counts=True)
        colours.append(values[counts.argsort()[-2]])  # after white, the 23 cells of 0.5
    np.testing.assert_array_equal(colours[0], colours[1])


def test_heatmap_refuses_labels_and_limits_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="labels: expected n=3, got 2"):
        draw_heatmap(np.eye(3), ["C1", "C2"], tmp_path / "map.png")
    with pytest.raises(ValueError, match="limit: expected a number > 0, got 0"):
        draw_heatmap(np.eye(1), ["C1"], tmp_path / "map.png", limit=0.0)


CAFFEINE = Chem.AddHs(Chem.MolFromSmiles("Cn1c(=O)c2c(ncn2C)n(C)c1=O"))
WATER = np.array([[0, 0, 0], [0.757, 0.586, 0], [-0.757, 0.586, 0]], dtype=np.float32)


def molecule(numbers: list[int], positions: object) -> Molecule:
    """A molecule without name or SMILES."""
    return Molecule(np.array(numbers), np.array(positions, dtype=np.float32), "")


MOLECULES: dict[str, Chem.Mol | Molecule] = {
    "one atom": molecule([2], [[0, 0, 0]]),
    "two atoms": molecule([1, 1], [[0, 0, 0], [0.74, 0, 0]]),
    "two atoms at one point": molecule([6, 6], np.zeros((2, 3))),
    "many atoms at one point": molecule([6] * 9, np.ones((9, 3))),
    "water": molecule([8, 1, 1], WATER),
    "two waters": molecule([8, 1, 1] * 2, np.concatenate([WATER, WATER + 3])),
    "atoms without bonds": molecule([2] * 7, 6 * np.random.default_rng(0).random((7, 3))),
    "atoms on a line": molecule([18] * 5, np.arange(5)[:, None] * [5, 0, 0]),
    "no chemistry": molecule([6, 1, 9, 26] * 5, np.random.default_rng(1).random((20, 3))),
    "far apart": molecule([10, 10], [[0, 0, 0], [1e4, 0, 0]]),
    "caffeine": CAFFEINE,
    "ions": Chem.MolFromSmiles("[Na+].[Cl-]"),
}


@pytest.mark.parametrize("name", MOLECULES)
@pytest.mark.parametrize("sign", [1.0, 0.0, -1.0])
def test_any_molecule_is_drawn(tmp_path: Path, name: str, sign: float) -> None:
    mol = MOLECULES[name]
    n = mol.GetNumAtoms() if isinstance(mol, Chem.Mol) else len(mol.numbers)
    path = tmp_path / "pairs.png"
    draw_pairs(mol, sign * np.abs(weights(n)), path, title="a title with $ in it")
    picture(path)


STRONGEST = (245, 176, 65)  # colour of the atom with the largest sum


def test_marks_are_red_for_positive_and_blue_for_negative_pairs(tmp_path: Path) -> None:
    red, blue, marked = (217, 136, 128), (122, 163, 205), STRONGEST
    n = CAFFEINE.GetNumAtoms()
    path = tmp_path / "pairs.png"
    shares = {}
    for value in (1.0, 0.0, -1.0):
        w = np.zeros((n, n))
        w[0, 8] = value
        draw_pairs(CAFFEINE, w, path, num_pairs=3)
        image = picture(path)
        shares[value] = [share_of(image, colour) > 1e-3 for colour in (red, blue, marked)]
    assert shares == {
        1.0: [True, False, True],
        0.0: [False, False, False],
        -1.0: [False, True, True],
    }


@pytest.mark.parametrize(
    "positions",
    [
        np.zeros((6, 3)),
        [[0, 0, -2], [0, 0, 2], [9, 0, 0], [-9, 0, 0], [0, 9, 0], [0, -9, 0]],
    ],
    ids=["at one point", "one behind the other"],
)
def test_no_atom_hides_another(tmp_path: Path, positions: object) -> None:
    draw_pairs(molecule([2] * 6, positions), np.ones((6, 6)), tmp_path / "pairs.png")
    close = np.abs(picture(tmp_path / "pairs.png") * 255 - STRONGEST).max(axis=-1) < 6
    assert close.sum() > 6 * 0.6 * np.pi * 19**2  # six discs, less names, rings and ranks on them


def test_atoms_are_darker_the_larger_their_sum(tmp_path: Path) -> None:
    w = np.diag([9.0, 9.0, 9.0, 9.0])  # what atoms are to themselves does not count
    w[0, 1], w[1, 0], w[0, 2] = 3.0, 1.0, -2.0  # strengths 2 and 1: sums 3, 2, 1, 0
    carbons = [[0, 0, 0], [9, 0, 0], [0, 9, 0], [9, 9, 0]]
    draw_pairs(molecule([6] * 4, carbons), w, tmp_path / "pairs.png", num_pairs=0)
    image = picture(tmp_path / "pairs.png")
    for share, is_there in [(1, True), (2 / 3, True), (1 / 3, True), (0.5, False)]:
        colour = tuple(255 - share * (255 - part) for part in STRONGEST)
        assert (share_of(image, colour) > 2e-4) == is_there


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """What would have been written."""
    found: list[Figure] = []
    monkeypatch.setattr(draw, "_write", lambda figure, _: found.append(figure))
    return found


def overlapping(texts: Iterable[Text]) -> list[tuple[str, str]]:
    """Which texts cover each other."""
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    return [
        (one, two)
        for k, (one, box) in enumerate(boxes)
        for two, other in boxes[k + 1 :]
        if box.overlaps(other)
    ]


@pytest.mark.parametrize(
    "smiles",
    [
        "C",
        "CCO",
        "[NH3+]CC(=O)[O-]",
        "O.CO.CC(=O)O",
        "Cn1c(=O)c2c(ncn2C)n(C)c1=O",
        "CC12CCC3C(CCC4=CC(=O)CCC34C)C1CCC2O",
        "C" * 20,
    ],
)
def test_names_ranks_and_charges_do_not_cover_each_other(
    figures: list[Figure], tmp_path: Path, smiles: str
) -> None:
    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    for seed in range(3):
        draw_pairs(mol, weights(mol.GetNumAtoms(), seed), tmp_path / "no", num_pairs=8)
        FigureCanvasAgg(figures[-1]).draw()
        texts = figures[-1].axes[0].texts
        assert overlapping(texts) == []
        ranks, names = (
            np.array([text.get_position() for text in texts if kind(text.get_text())])
            for kind in (str.isdigit, lambda shown: shown[0].isalpha())
        )
        assert len(ranks) == 8 and len(names) >= mol.GetNumHeavyAtoms()
        for others, nearest in ((names, 0), (ranks, 1)):  # each rank is at its own place
            far = np.sort(np.linalg.norm(ranks[:, None] - others, axis=-1), axis=1)
            assert far[:, nearest].min() > 30  # pixels: radii of an atom and of a rank


def test_formal_charges_are_shown(figures: list[Figure], tmp_path: Path) -> None:
    for smiles in ("[NH3+]CC(=O)[O-]", "[Ca+2].[O-2]", "CCO"):
        mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
        draw_pairs(mol, np.ones([mol.GetNumAtoms()] * 2), tmp_path / "no", num_pairs=0)
    shown = [[text.get_text() for text in figure.axes[0].texts] for figure in figures]
    names = [[text for text in texts if text[0].isalpha()] for texts in shown]
    assert names == [["N1", "C1", "C2", "O1", "O2"], ["Ca1", "O1"], ["C1", "C2", "O1"]]
    charges = [[text for text in texts if not text[0].isalpha()] for texts in shown]
    assert charges == [["+", "−"], ["2+", "2−"], []]


@pytest.mark.parametrize("n", [6, 7, 59])
def test_names_at_a_heat_map_do_not_cover_each_other(
    figures: list[Figure], tmp_path: Path, n: int
) -> None:
    draw_heatmap(weights(n), [f"Cl{100 + i}" for i in range(n)], tmp_path / "no")
    FigureCanvasAgg(figures[0]).draw()
    axes = figures[0].axes[0]
    for axis in (axes.xaxis, axes.yaxis):
        assert overlapping(tick.label1 for tick in axis.get_major_ticks()) == []


def test_hydrogens_are_drawn_only_where_they_take_part(tmp_path: Path) -> None:
    n = CAFFEINE.GetNumAtoms()
    sizes = {}
    for row in (1, n - 1):
        w = np.zeros((n, n))
        w[0, row] = 1.0
        draw_pairs(CAFFEINE, w, tmp_path / "pairs.png")
        image = picture(tmp_path / "pairs.png")
        sizes[row] = (image < 0.3).all(axis=-1).sum()  # black: bonds and names
    assert sizes[1] < sizes[n - 1] < 1.3 * sizes[1]


def test_drawing_leaves_the_molecule_as_it_was(tmp_path: Path) -> None:
    mol = Chem.Mol(CAFFEINE)
    before = Chem.MolToMolBlock(mol, confId=-1)
    draw_pairs(mol, weights(mol.GetNumAtoms()), tmp_path / "pairs.png")
    assert Chem.MolToMolBlock(mol, confId=-1) == before
    assert not any(atom.GetAtomMapNum() or atom.HasProp("_row") for atom in mol.GetAtoms())


def test_pairs_refuse_weights_and_molecules_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "pairs.png"
    with pytest.raises(ValueError, match=r"weights: expected \[n=3, n=3\], got \[2, 2\]"):
        draw_pairs(MOLECULES["water"], np.eye(2), path)
    with pytest.raises(ValueError, match="num_pairs: expected at least 0, got -1"):
        draw_pairs(MOLECULES["water"], np.eye(3), path, num_pairs=-1)
    with pytest.raises(ValueError, match="molecule: expected at least one atom, known elements"):
        draw_pairs(molecule([6], [[np.nan, 0, 0]]), np.eye(1), path)
