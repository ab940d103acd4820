"""The page of maps: what is in the file, and what Chromium makes of it."""

from __future__ import annotations

import base64
import html.parser
import json
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
from browser import open_browser
from rdkit import Chem
from rdkit.Chem import rdDistGeom

from geot_model import page
from geot_model.draw import atom_labels

LAYERS, HEADS = 3, 2
EVIL = "</script><script>alert(1)</script><!-- & \u2028 {{data}}"
METHODS = [
    page.Method("weight", "mean of shares", "Shares.", mean=True, signed=False),
    page.Method("gradient", "sum of slopes", "Slopes.", False, True, (("gap", "eV"), ("mu", "D"))),
]


def make_entry(smiles: str, name: str, layers: int = LAYERS, heads: int = HEADS) -> page.Entry:
    """A molecule with random maps of `METHODS`."""
    graph = Chem.AddHs(Chem.MolFromSmiles(smiles))
    assert rdDistGeom.EmbedMolecule(graph, randomSeed=1) == 0
    n = graph.GetNumAtoms()
    random = np.random.RandomState(n)
    signed = random.standard_normal((2, layers, heads, n, n)).astype(np.float32) ** 3
    shares = random.rand(layers, heads, n, n).astype(np.float32)
    rows = [page.Row("gap", "-6.21", "-6.5", "eV"), page.Row("mu", "1.2", None, "D")]
    labels = atom_labels([atom.GetAtomicNum() for atom in graph.GetAtoms()])
    return page.Entry(name, "sum formula", labels, graph, rows, [shares, *signed])


def write(path: Path, entries: list[page.Entry], **options) -> Path:
    whole = [True] * len(METHODS)
    encoded = [page.encode(entry, METHODS, whole) for entry in entries]
    settings = {"heads": HEADS, "title": "Maps", "method": "gradient", "num_pairs": 4}
    page.write_page(encoded, METHODS, path, **{**settings, **options})
    return path


class Reader(html.parser.HTMLParser):
    """Elements of a page with their attributes, and the text in scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.elements and self.elements[-1][0] == "script" and self.cdata_elem == "script":
            self.scripts.append(data)


def unpacked(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype)


def test_page_asks_for_nothing_else(tmp_path):
    text = write(tmp_path / "maps.html", [make_entry("CO", "methanol")]).read_text("utf-8")
    found = Reader(text).elements
    assert not [tag for tag, _ in found if tag in ("link", "img", "iframe", "object", "base")]
    assert not [attrs for _, attrs in found if {"src", "href", "data", "action"} & attrs.keys()]
    policies = [attrs["content"] for _, attrs in found if attrs.get("http-equiv")]
    assert len(policies) == 1 and policies[0].startswith("default-src 'none'")
    assert "{{" not in text.replace("}}", "").split('<script id="data"')[0]


def test_names_stay_text(tmp_path):
    file = write(tmp_path / "maps.html", [make_entry("CO", EVIL)], title=EVIL, problems=[EVIL])
    found = Reader(file.read_text("utf-8"))
    assert [tag for tag, _ in found.elements].count("script") == 3
    assert len(found.scripts) == 3
    data = json.loads(found.scripts[0])
    assert data["molecules"][0]["name"] == EVIL
    assert data["problems"] == [EVIL]
    assert not set("<>&") & set(found.scripts[0])


def test_numbers_are_there_to_half_a_step():
    entry = make_entry("CCO", "ethanol")
    found = page.encode(entry, METHODS, [True, True])
    n = len(entry.labels)
    assert len(found["maps"]) == 3
    for maps, content in zip(entry.maps, found["maps"], strict=True):
        steps = unpacked(content["packed"], "i1").reshape(LAYERS, HEADS, n, n)
        values = steps * np.array(content["scales"])[..., None, None]
        largest = np.abs(maps).max(axis=(2, 3), keepdims=True)
        assert (np.abs(values - maps) <= largest * (0.5 / 127 + 1e-5)).all()
    total = unpacked(found["maps"][0]["aggregate"], "<f4").reshape(n, n)
    np.testing.assert_allclose(total, entry.maps[0].mean(axis=(0, 1)), rtol=1e-6)
    total = unpacked(found["maps"][2]["aggregate"], "<f4").reshape(n, n)
    np.testing.assert_allclose(total, entry.maps[2].sum(axis=(0, 1)), rtol=1e-5, atol=1e-6)


def test_without_heads_there_is_one_map_for_each_layer():
    entry = make_entry("CO", "methanol")
    entry.maps[0][0] = 0  # a layer that does nothing
    found = page.encode(entry, METHODS, [True, False])
    assert [np.shape(one["scales"]) for one in found["maps"]] == [(3, 2), (3, 1), (3, 1)]
    assert found["maps"][0]["scales"][0] == [0, 0]
    steps = unpacked(found["maps"][1]["packed"], "i1").reshape(LAYERS, -1)
    scales = np.array(found["maps"][1]["scales"])
    expected = entry.maps[1].sum(axis=1).reshape(LAYERS, -1)
    assert (np.abs(steps * scales - expected) <= scales * 0.51).all()


@pytest.mark.parametrize("smiles", ["N[C@@H](C)C(=O)O", "N[C@H](C)C(=O)O"])
def test_molecule_is_turned_and_not_mirrored(smiles):
    entry = make_entry(smiles, "some")
    before = entry.graph.GetConformer().GetPositions()
    after = np.array(page.encode(entry, METHODS, [True, True])["positions"])
    extent = np.square(after).sum(axis=0)
    assert extent[0] > extent[1] > extent[2]

    def apart(x):
        return np.linalg.norm(x[:, None] - x, axis=-1)

    def volume(x):
        return np.linalg.det(x[1:4] - x[0])

    np.testing.assert_allclose(apart(after), apart(before), atol=3e-3)
    assert volume(after) == pytest.approx(volume(before), abs=0.02)


def test_bonds_between_atoms_are_counted():
    found = page.encode(make_entry("O.CO", "two molecules"), METHODS, [True, True])
    apart = np.array(found["apart"]).reshape(9, 9)
    assert apart[1, 2] == 1 and apart[1, 0] == -1 and apart[3, 0] == 1
    assert [1, 2, 1] in found["bonds"]


@pytest.mark.parametrize("num_targets", [1, 12])
def test_fifty_molecules_take_less_than_20_mb(tmp_path, num_targets):
    targets = tuple((f"target {k}", "eV") for k in range(num_targets))
    methods = [METHODS[0], METHODS[0], page.Method("gradient", "", "", False, True, targets)]
    entry = make_entry("CCCCCCCCCO", "nonanol", layers=6, heads=16)
    assert len(entry.labels) == 30
    signed = entry.maps[1]
    maps = [entry.maps[0], entry.maps[0], *[signed] * num_targets]
    entry = page.Entry(entry.name, "", entry.labels, entry.graph, entry.predictions, maps)
    (part,) = page.divide([30] * 50, 6, 16, methods)
    assert part.whole == ((True,) * 3 if num_targets == 1 else (True, True, False))
    encoded = page.encode(entry, methods, part.whole)
    path = tmp_path / "maps.html"
    page.write_page(
        [encoded] * 50, methods, path, heads=16, title="", method="gradient", num_pairs=5
    )
    assert 5e6 < path.stat().st_size < 20e6


def test_pages_have_room_for_their_molecules():
    parts = page.divide([20] * 120, 4, 8, METHODS)
    assert [part.rows for part in parts] == [range(50), range(50, 100), range(100, 120)]
    assert all(part.whole == (True, True) for part in parts)
    large = page.divide([600] * 4, 8, 64, METHODS)  # 3 · 8 · 600² = 8.6 million for layers
    assert [len(part.rows) for part in large] == [1, 1, 1, 1]
    assert large[0].whole == (False, False)
    huge = page.divide([3000, 5], 8, 64, METHODS)  # more than a page should have, still drawn
    assert [part.rows for part in huge] == [range(1), range(1, 2)]
    assert page.divide([], 4, 8, METHODS) == []


def test_what_does_not_fit_is_refused(tmp_path):
    entry = make_entry("CO", "methanol")
    with pytest.raises(ValueError, match=r"method: expected one of weight, gradient, got 'raw'"):
        write(tmp_path / "maps.html", [entry], method="raw")
    with pytest.raises(ValueError, match=r"molecules: expected at least one"):
        write(tmp_path / "maps.html", [])
    with pytest.raises(ValueError, match=r"zip"):
        page.encode(entry, METHODS[:1], [True])
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp("profile"), 500, 400) as browser:
        yield browser


@pytest.fixture(scope="module")
def entries():
    return [make_entry("NCC=O", EVIL), make_entry("O.CO", "two molecules")]


@pytest.fixture(scope="module")
def loaded(browser, entries, tmp_path_factory):
    """A browser with the page of the two molecules."""
    file = write(tmp_path_factory.mktemp("page") / "maps.html", entries)
    browser.open(file)
    wait(browser)
    assert browser.requests == [file.as_uri()]
    return browser


@pytest.fixture
def opened(loaded):
    """The page as it is at first; it has no complaint and asked for nothing in the end."""
    first = {"method": 1, "target": 0, "layer": -1, "head": -1, "count": 4, "among": "all"}
    for name, value in {**first, "molecule": 0}.items():
        if loaded.run(f"document.getElementById({name!r}).value") != str(value):
            choose(loaded, name, value)
    yield loaded
    assert loaded.complaints == []
    assert len(loaded.requests) == 1


def wait(browser):
    """Until what was asked for is drawn."""
    browser.wait("document.querySelector('main').getAttribute('aria-busy') === 'false'")


def choose(browser, name, value):
    browser.run(
        f"(() => {{const one = document.getElementById({name!r}); one.value = {str(value)!r};"
        "one.dispatchEvent(new Event('input')); one.dispatchEvent(new Event('change'));})()"
    )
    wait(browser)


def table(browser, name="pairs"):
    return browser.run(
        f"[...document.querySelectorAll('#{name} tbody tr')]"
        ".map(row => [...row.cells].map(cell => cell.textContent))"
    )


def expected_pairs(entry, number, layers=slice(None), heads=slice(None)):
    """Names of all pairs, the strongest first, and their values."""
    a = entry.maps[number][layers, heads].reshape(-1, *entry.maps[number].shape[2:]).sum(axis=0)
    pairs = [(i, j) for i in range(len(a)) for j in range(i + 1, len(a))]
    pairs.sort(key=lambda pair: -abs(a[pair] + a[pair[::-1]]))
    names = [f"{entry.labels[i]} – {entry.labels[j]}" for i, j in pairs]
    return names, [float(a[i, j] + a[j, i]) / 2 for i, j in pairs]


def read(text):
    return float(text.replace("−", "-"))


def test_browser_shows_the_strongest_pairs(opened, entries):
    names, values = expected_pairs(entries[0], 1)
    found = table(opened)
    assert [row[1] for row in found] == names[:4]
    assert [read(row[2]) for row in found] == pytest.approx(values[:4], rel=5e-3)
    assert [read(row[2]) for row in found] == pytest.approx(
        [(read(row[3]) + read(row[4])) / 2 for row in found], abs=0.02 * abs(values[0])
    )
    assert opened.run("document.querySelector('#molecule').options[0].text").startswith(EVIL[:20])
    assert table(opened, "predictions") == [["gap", "−6.21", "−6.5", "eV"], ["mu", "1.2", "", "D"]]


def test_browser_draws_in_3d_and_the_map(opened):
    structure = opened.picture("#viewer")
    ink = (structure < 0.9).any(axis=-1)
    assert 0.01 < ink.mean() < 0.6
    columns = np.nonzero(ink)[1]
    assert np.ptp(columns) > 0.3 * ink.shape[0]
    red, _, blue = np.moveaxis(structure, -1, 0)
    assert (red - blue > 0.25).sum() > 100 or (blue - red > 0.25).sum() > 100  # relations
    choose(opened, "count", 0)
    bare = opened.picture("#viewer")
    assert np.abs(bare - structure).max(axis=-1).mean() > 0.005
    heat_map = opened.picture("#map")
    assert len(np.unique((heat_map * 255).astype(int).reshape(-1, 3), axis=0)) > 50


def test_browser_follows_layer_head_method_and_property(opened, entries):
    seen = [opened.picture("#viewer"), opened.picture("#map")]
    settings = [
        ("layer", 1, (1, slice(1, 2), slice(None))),
        ("head", 1, (1, slice(1, 2), slice(1, 2))),
        ("layer", -1, (1, slice(None), slice(1, 2))),
        ("target", 1, (2, slice(None), slice(1, 2))),
        ("head", -1, (2, slice(None), slice(None))),
    ]
    before = table(opened)
    for name, value, which in settings:
        choose(opened, name, value)
        names, values = expected_pairs(entries[0], *which)
        found = table(opened)
        assert found != before
        before = found
        assert [row[1] for row in found] == names[:4]
        assert [read(row[2]) for row in found] == pytest.approx(values[:4], rel=0.03)
        # What a screen reader says of the drawing.
        said = opened.run("document.querySelector('#viewer').getAttribute('aria-label')")
        assert names[0].replace(" – ", " and ") in said
        if value == 1 and name == "layer":
            pictures = [opened.picture("#viewer"), opened.picture("#map")]
            for old, new in zip(seen, pictures, strict=True):
                assert np.abs(old - new).max(axis=-1).mean() > 1e-3
    choose(opened, "method", 0)
    names, values = expected_pairs(entries[0], 0)
    found = table(opened)
    assert [row[1] for row in found] == names[:4]
    values = [value / (LAYERS * HEADS) for value in values[:4]]
    assert [read(row[2]) for row in found] == pytest.approx(values, rel=5e-3)
    assert opened.run("document.querySelector('#target').disabled")


def test_browser_follows_the_number_and_kind_of_pairs(opened, entries):
    for count in (1, 7, 0, 999):
        choose(opened, "count", count)
        assert len(table(opened)) == min(count, 36)
    choose(opened, "among", "apart")
    assert len(table(opened)) == 36 - 8
    choose(opened, "among", "heavy")
    assert {row[1][0] for row in table(opened)} <= set("CNO")
    assert len(table(opened)) == 6


def test_browser_shows_another_molecule(opened, entries):
    opened.run("document.querySelector('#next').click()")
    wait(opened)
    names, _ = expected_pairs(entries[1], 1)
    assert [row[1] for row in table(opened)] == names[:4]
    choose(opened, "count", 99)
    bonds = {row[1]: row[6] for row in table(opened)}
    assert bonds["O1 – C1"] == "no path" and bonds["C1 – O2"] == "1"
    assert opened.run("document.querySelector('#next').disabled")


def test_browser_obeys_the_keyboard(opened, entries):
    before = opened.picture("#viewer")
    opened.run("document.querySelector('#viewer').focus()")
    for _ in range(4):
        opened.press("ArrowRight")
    turned = opened.picture("#viewer")
    assert np.abs(turned - before).max(axis=-1).mean() > 0.005
    opened.press("0")
    again = opened.picture("#viewer")
    assert (
        np.abs(again - before).max(axis=-1).mean() < 0.2 * np.abs(turned - before).max(-1).mean()
    )
    opened.run("document.querySelector('#map').focus()")
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):  # the first one goes to the first cell
        opened.press(key)
    total = entries[0].maps[1].sum(axis=(0, 1))
    said = opened.run("document.querySelector('#cell').textContent")
    name, value = re.fullmatch(r"(.+): [+]?(\S+) eV", said).groups()
    assert name == f"{entries[0].labels[1]} from {entries[0].labels[1]}"
    assert read(value) == pytest.approx(total[1, 1], rel=5e-3)
    labelled = "input, select, button, #map, #viewer"
    assert opened.run(
        f"[...document.querySelectorAll('{labelled}')].every(one => one.labels?.length"
        " || one.ariaLabel || one.getAttribute('aria-label') || one.textContent)"
    )


def test_browser_marks_a_pair(opened):
    before = opened.picture("#viewer")
    opened.run("document.querySelector('#pairs button').click()")
    current = "document.querySelectorAll('#pairs tr[aria-current=true]').length"
    assert opened.run(current) == 1
    yellow = np.abs(opened.picture("#viewer") * 255 - (255, 210, 77)).max(axis=-1) < 12
    assert yellow.sum() > (np.abs(before * 255 - (255, 210, 77)).max(axis=-1) < 12).sum() + 50
    opened.run("document.querySelector('#pairs button').click()")
    assert opened.run(current) == 0


def test_missing_browser_skips_or_fails(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("GEOT_BROWSER", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no Chromium"), open_browser(tmp_path):
        pass
    monkeypatch.setenv("GEOT_BROWSER", "1")
    with pytest.raises(pytest.fail.Exception, match="no Chromium"), open_browser(tmp_path):
        pass
