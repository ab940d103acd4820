"""Do attention maps tell the truth? GeoT learns totals whose pair terms are known.

    python -m bench.simulation                             # three energies, three trainings each
    python -m bench.simulation --energy bonds --seconds 300

Energies are sums over pairs of atoms (`bench.pair_energies`) of molecules of QM9. GeoT sees the
totals alone. Then, for molecules that it never saw, each way to read its attention
(`geot_model.relevance`) is held against the pairs' true energies:

    spearman    rank correlation over the pairs i < j of a molecule, of strength and |energy|; also
                over those alone that have an energy (Lennard-Jones has none within two bonds).
                Where many pairs have none, the truth itself, in an order that ties are broken at
                random for, has less than 1: the most that can be reached
    trainings   rank correlation of strengths from two trainings that differ in their seed alone,
                mean over the other trainings
    deletion    |change of the prediction| when the weights of the strongest pairs are set to 0, by
                the share of pairs; beside it that of pairs chosen at random, and of those that
                truly are the strongest

Results go into `simulation.csv`, and deletion curves into `simulation_curves.csv`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr

from geot_model import relevance
from geot_model.model import GeoT
from geot_model.molecules import Molecules
from geot_model.qm9 import load_qm9
from geot_model.targets import TargetScaler

from . import learning, pair_energies, rows
from .message_passing import call_geot, split, tiny

EXPLAINED = 300  # molecules
SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
RANDOM_ORDERS = 5
SEEDS = 3  # trainings of each energy
TRUTH, RANDOM = "true energies", "random pairs"
WHERE = (*("machine", "processor", "python", "torch", "triton", "cuda", "geot_kernels", "commit"),)
KEY = ("energy", "score", "method", "train_molecules", "budget_s", "seed", "device", "threads")
COLUMNS = (
    *KEY,
    *("spearman_lower_quartile", "spearman_median", "spearman_upper_quartile"),
    *("spearman_with_energy_median", "spearman_between_trainings_median"),
    *("deletion_over_random", "mae_eV", "spread_eV", "molecules"),
    *WHERE,
)
CURVE_KEY = (*KEY, "share")
CURVE_COLUMNS = (*CURVE_KEY, "change_eV", "molecules", *WHERE)


def with_energy(name: str, molecules: Molecules) -> Molecules:
    """The same molecules, with the totals of an energy as their one target."""
    return Molecules(
        numbers=molecules.numbers,
        positions=molecules.positions,
        ptr=molecules.ptr,
        targets={name: pair_energies.totals(name, molecules)},
        names=molecules.names,
        units={name: "eV"},
    )


def kept(strength: NDArray[np.float64], shares: Sequence[float]) -> NDArray[np.bool_]:
    """Which pairs are left, `[shares, n, n]`, when the strongest, shares of them, are not."""
    i, j = np.triu_indices(len(strength), k=1)
    order = np.argsort(-strength[i, j], kind="stable")
    out = np.ones((len(shares), *strength.shape), np.bool_)
    for one, share in zip(out, shares, strict=True):
        gone = order[: max(1, round(share * len(order)))]
        one[i[gone], j[gone]] = one[j[gone], i[gone]] = False
    return out


def changes(
    model: GeoT, molecules: Molecules, index: int, orders: Sequence[NDArray[np.float64]]
) -> NDArray[np.float64]:
    """|Change of the output|, `[orders, shares]`, when the strongest pairs are taken out."""
    sets = [np.ones_like(orders[0], dtype=np.bool_)[None], *(kept(one, SHARES) for one in orders)]
    with torch.no_grad():
        out = relevance.deleted(
            model, molecules.molecule(index), torch.from_numpy(np.concatenate(sets))
        )
    found: NDArray[np.float64] = (out[1:, 0] - out[0, 0]).abs().double().numpy()
    return found.reshape(len(orders), len(SHARES))


def correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Spearman's; NaN of fewer than three pairs, or where all are the same."""
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(spearmanr(a, b)[0])


def most(energies: NDArray[np.float64]) -> float:
    """Rank correlation of energies with their own order, in which none are tied."""
    order = np.lexsort((np.random.RandomState(0).rand(len(energies)), energies))
    return correlation(np.argsort(order).astype(np.float64), energies)


@dataclass
class Explained:
    """What the maps of a trained network are worth.

    Attributes:
        all_pairs: Method, and `TRUTH`, to the rank correlation with the true energies for each
            molecule.
        with_energy: The same over pairs that have an energy; NaN of fewer than three.
        strengths: Method to strengths of the pairs i < j of each molecule.
        curves: Method, `TRUTH` and `RANDOM` to changes of the output, `[molecules, shares]`.
    """

    all_pairs: dict[str, list[float]]
    with_energy: dict[str, list[float]]
    strengths: dict[str, list[NDArray[np.float64]]]
    curves: dict[str, NDArray[np.float64]]


def explain(model: GeoT, energy: str, molecules: Molecules) -> Explained:
    """Hold each way to read attention against the truth, and against what was taken out."""
    random = np.random.RandomState(0)
    all_pairs: dict[str, list[float]] = {name: [] for name in (*relevance.METHODS, TRUTH)}
    with_energy: dict[str, list[float]] = {name: [] for name in relevance.METHODS}
    strengths: dict[str, list[NDArray[np.float64]]] = {name: [] for name in relevance.METHODS}
    curves: dict[str, list[NDArray[np.float64]]] = {
        name: [] for name in (*relevance.METHODS, TRUTH, RANDOM)
    }
    maps = {name: relevance.relevance(model, molecules, name) for name in relevance.METHODS}
    for m in range(len(molecules)):
        truth = np.abs(pair_energies.pairs(energy, molecules, m))
        upper = np.triu_indices(len(truth), k=1)
        if len(upper[0]) < 3 or np.ptp(truth[upper]) == 0:
            continue
        orders = []
        for name in relevance.METHODS:
            aggregate = relevance.aggregate(maps[name][m], name)
            strength = np.asarray(relevance.pair_strength(aggregate), np.float64)
            orders.append(strength)
            ranked, energies = strength[upper], truth[upper]
            some = energies > 0
            all_pairs[name].append(correlation(ranked, energies))
            with_energy[name].append(correlation(ranked[some], energies[some]))
            strengths[name].append(ranked)
        all_pairs[TRUTH].append(most(truth[upper]))
        orders.append(truth)
        orders += [random.rand(*truth.shape) for _ in range(RANDOM_ORDERS)]
        found = changes(model, molecules, m, orders)
        for name, curve in zip((*relevance.METHODS, TRUTH), found, strict=False):
            curves[name].append(curve)
        curves[RANDOM].append(found[-RANDOM_ORDERS:].mean(axis=0))
    arrays = {name: np.array(values) for name, values in curves.items()}
    return Explained(all_pairs, with_energy, strengths, arrays)


def between(trainings: Sequence[Explained], method: str) -> list[float]:
    """Median over molecules of how a training's strengths correlate with those of the others."""
    ranked = zip(*(one.strengths[method] for one in trainings), strict=True)
    pairs = np.array([[[correlation(a, b) for b in every] for a in every] for every in ranked])
    others = ~np.eye(len(trainings), dtype=np.bool_)
    return [float(np.median(pairs[:, n, others[n]].mean(axis=1))) for n in range(len(trainings))]


def network(score: str) -> GeoT:
    """The preset "tiny", with a sum over atoms."""
    graphormer = {"normalizer": "softmax", "attention_scale": False}
    return tiny("sum", score=score, **(graphormer if score == "bias" else {}))


def measure(
    energy: str,
    score: str,
    parts: tuple[Molecules, Molecules, Molecules],
    seconds: float,
    *,
    seeds: int = SEEDS,
    learning_rate: float = 1e-3,
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Trains GeoT on an energy and holds its maps against the truth: rows, and those of curves."""
    train, validation, test = (with_energy(energy, part) for part in parts)
    scaler = TargetScaler.fit(train, (energy,), ("sum",), {energy: "none"})
    key = {
        **{"energy": energy, "score": score, "train_molecules": len(train)},
        **{"budget_s": f"{seconds:.0f}"},
        **{k: v for k, v in rows.where("cpu").items() if k in COLUMNS},
    }
    trainings, errors = [], []
    for seed in range(seeds):
        torch.manual_seed(seed)
        found = learning.learn(
            network(score),
            call_geot,
            scaler,
            train,
            validation,
            seconds=seconds,
            learning_rate=learning_rate,
            seed=seed,
            say=lambda line: print(f"{energy}, {score}: {line}", flush=True),
        )
        trained: Any = found.network
        trained.eval()
        errors.append(learning.mean_absolute_error(trained, call_geot, scaler, test))
        trainings.append(explain(trained, energy, test[:EXPLAINED]))
    eV = float(scaler.std[0])
    agreement = {name: between(trainings, name) for name in relevance.METHODS}
    summary, points = [], []
    for seed, (one, error) in enumerate(zip(trainings, errors, strict=True)):
        chance = one.curves[RANDOM].mean()
        for name, curve in one.curves.items():
            row = {
                **{**key, "seed": seed, "method": name, "molecules": len(curve)},
                **{"mae_eV": f"{error:.4g}", "spread_eV": f"{eV:.4g}"},
                "deletion_over_random": f"{curve.mean() / chance:.4g}",
            }
            if name in one.all_pairs:
                row |= _spearman(one.all_pairs[name])
            if name in agreement:
                some = np.nanmedian(one.with_energy[name])
                row["spearman_with_energy_median"] = f"{some:.4f}"
                row["spearman_between_trainings_median"] = f"{agreement[name][seed]:.4f}"
            summary.append({n: str(v) for n, v in row.items()})
            print(row, flush=True)
            for share, value in zip(SHARES, curve.mean(axis=0) * eV, strict=True):
                point = {**key, "seed": seed, "method": name, "molecules": len(curve)}
                point |= {"share": share, "change_eV": f"{value:.4g}"}
                points.append({n: str(v) for n, v in point.items()})
    return summary, points


def _spearman(values: Sequence[float]) -> dict[str, str]:
    names = ("lower_quartile", "median", "upper_quartile")
    found = zip(names, rows.quartiles(values), strict=True)
    return {f"spearman_{name}": f"{value:.4f}" for name, value in found}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what is asked for, and writes rows as soon as they are there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = list(pair_energies.ENERGIES)
    parser.add_argument("--energy", nargs="+", choices=known, default=known)
    parser.add_argument("--score", nargs="+", choices=("filter", "bias"), default=["filter"])
    parser.add_argument("--seconds", type=float, default=400.0, help="of the processor, each")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    parts = split(load_qm9(full=True))
    for score in asked.score:
        for energy in asked.energy:
            summary, points = measure(energy, score, parts, asked.seconds)
            folder = rows.folder("cpu")
            rows.Rows(folder / "simulation.csv", COLUMNS, KEY).add(summary)
            rows.Rows(folder / "simulation_curves.csv", CURVE_COLUMNS, CURVE_KEY).add(points)


if __name__ == "__main__":
    main()
