"""Tables of what GeoT learns: beside SchNet, of pair energies, and how fast it predicts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from .ratios import Device, Row, digits, grouped, markdown, ordered

GEOT, SCHNET = "GeoT", "SchNet"
TARGETS = ("gap", "homo", "U0", "mu")
ENERGIES = {"coulomb": "Coulomb", "lennard_jones": "Lennard-Jones", "bonds": "bonds alone"}
METHODS = ("weight", "weight x value", "gradient x weight")
TRUTH = "true energies"
SETTING = ("target", "train_molecules", "budget_s", "device", "threads")
COMPARED = ("train_molecules_per_s", "inference_molecules_per_s", "parameters")
SHARES = {
    "attention": "attention",
    "matrix_products": "matrix products",
    "normalization": "norms",
    "other_operators": "other operators",
}


def message_passing(device: Device) -> str:
    """Errors and speeds of two networks after the same time."""
    lines = []
    for group in grouped(by_target(device.others["message_passing"]), SETTING):
        found = {row["network"]: row for row in group}
        if not {GEOT, SCHNET} <= set(found):
            continue
        ours, other = found[GEOT], found[SCHNET]
        errors = [float(row["mae"]) for row in (ours, other)]
        lines.append(
            [
                f"{ours['target']}, {ours['unit']}",
                *(digits(error) for error in errors),
                f"{errors[0] / errors[1]:.2f}",
                *(
                    _pair(ours, other, f"{what}_molecules_per_s")
                    for what in ("train", "inference")
                ),
                _pair(ours, other, "parameters"),
            ]
        )
    if not lines:
        return ""
    head = ["mean absolute error", GEOT, SCHNET, "ratio", "molecules/s, training"]
    head += ["molecules/s, inference", "parameters"]
    row = device.others["message_passing"][0]
    said = (
        f"{int(row['train_molecules']):,} training molecules, {row['budget_s']} s of one core for "
        f"each network and target, {int(row['test_molecules']):,} test molecules"
    )
    return f"{said}; GeoT / SchNet:\n\n{markdown(head, lines)}"


def _pair(ours: Row, other: Row, column: str) -> str:
    return " / ".join(f"{float(row[column]):,.0f}" for row in (ours, other))


def by_target(rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: TARGETS.index(row["target"]))


def simulation(device: Device) -> str:
    """How well each way to read attention finds the true pair energies."""
    rows = device.others["simulation"]
    lines = []
    for energy in ordered((row["energy"] for row in rows), ENERGIES):
        trainings = grouped((row for row in rows if row["energy"] == energy), ("method",))
        found = {group[0]["method"]: group for group in trainings}
        error = _median(found[TRUTH], "mae_eV")
        name = f"{ENERGIES[energy]} (error {error:.2g} of {found[TRUTH][0]['spread_eV']} eV)"
        truth = f"{_median(found[TRUTH], 'spearman_median'):.2f} · {_deletion(found[TRUTH])}"
        lines.append([name, *(_judged(found[method]) for method in METHODS), truth])
    if not lines:
        return ""
    seeds = {row["seed"] for row in rows}
    said = (
        "Rank correlation of a pair's strength with its true energy, and of strengths with those "
        f"of another training, medians over {rows[0]['molecules']} molecules · change of the "
        "prediction without the strongest pairs, over that without random ones. Median of "
        f"{len(seeds)} trainings and, in brackets, the least and the greatest:"
    )
    return f"{said}\n\n{markdown(['energy', *METHODS, 'the truth itself'], lines)}"


def _judged(rows: Sequence[Row]) -> str:
    everywhere, some = (
        [float(row[f"spearman_{name}median"]) for row in rows] for name in ("", "with_energy_")
    )
    spread = f"({min(everywhere):.2f} to {max(everywhere):.2f})"
    found = f"{statistics.median(everywhere):.2f} {spread}"
    if some != everywhere:
        found += f", {statistics.median(some):.2f} among those with an energy"
    between = _median(rows, "spearman_between_trainings_median")
    return f"{found}; between trainings {between:.2f} · {_deletion(rows)}"


def _deletion(rows: Sequence[Row]) -> str:
    return f"{_median(rows, 'deletion_over_random'):.1f}×"


def _median(rows: Sequence[Row], column: str) -> float:
    return statistics.median(float(row[column]) for row in rows)


def inference(device: Device) -> str:
    """Molecules a second, and where the time goes."""
    lines = [
        [
            row["preset"],
            f"{int(row['molecules']):,}",
            f"{float(row['seconds']):.1f}",
            f"{int(row['molecules_per_s']):,}",
            *(f"{100 * float(row[f'share_of_{name}']):.0f} %" for name in SHARES),
            f"{100 * float(row['share_of_batches']):.0f} %",
        ]
        for row in device.others["inference"]
    ]
    if not lines:
        return ""
    head = ["preset", "molecules", "s", "molecules/s", *SHARES.values(), "making batches"]
    return markdown(head, lines)
