"""Batches: all molecules once, packed as they are, shared among processes."""

import numpy as np
import pytest
import torch

from geot_model.batches import Batches, pack
from geot_model.molecules import Molecules, pointers


def molecules(count=103, seed=0):
    random = np.random.RandomState(seed)
    sizes = random.randint(1, 9, count)
    atoms = int(sizes.sum())
    return Molecules(
        numbers=random.randint(1, 119, atoms).astype(np.uint8),
        positions=random.randn(atoms, 3).astype(np.float32),
        ptr=pointers(sizes),
        targets={"y": random.randn(count)},
        names=np.array([f"m{i}" for i in range(count)]),
    )


def targets(data):
    y = torch.from_numpy(data.targets["y"]).float()[:, None]
    y[::10] = torch.nan
    return y


@pytest.mark.parametrize("bucket", [1, 4])
def test_batches_hold_each_molecule_once_as_it_is(bucket):
    data = molecules()
    y = targets(data)
    batches = Batches(data, y, 10, seed=3, bucket=bucket)
    rows = batches.rows()
    assert sorted(np.concatenate(rows).tolist()) == list(range(len(data)))
    assert len(batches) == len(rows) == 11 and sorted(map(len, rows)) == [3] + 10 * [10]
    for chosen, batch in zip(rows, batches, strict=True):
        expected = data[chosen]
        assert np.array_equal(batch.numbers.numpy(), expected.numbers)
        assert np.array_equal(batch.positions.numpy(), expected.positions)
        assert np.array_equal(batch.ptr.numpy(), expected.ptr)
        assert batch.max_atoms == expected.max_atoms
        assert torch.equal(batch.targets.nan_to_num(9), y[chosen].nan_to_num(9))
        assert batch.known == int(batch.targets.isfinite().sum())
    assert batch.numbers.dtype == torch.int64 and batch.positions.dtype == torch.float32


def test_seed_and_epoch_choose_the_batches():
    def rows(seed, epoch):
        batches = Batches(molecules(), None, 10, seed)
        batches.epoch = epoch
        return np.concatenate(batches.rows()).tolist()

    assert rows(1, 0) == rows(1, 0)
    assert len({tuple(rows(1, 0)), tuple(rows(2, 0)), tuple(rows(1, 1))}) == 3


def test_sizes_within_a_batch_are_alike_where_asked_for():
    data = molecules(2000)

    def spread(**options):
        batches = Batches(data, None, 10, 0, **options).rows()
        return np.mean([np.ptp(np.diff(data.ptr)[rows]) for rows in batches])

    assert spread(bucket=8) < 2 and spread() > 5 and np.ptp(np.diff(data.ptr)) == 7
    ordered = np.concatenate(Batches(data, None, 10).rows())
    assert (np.diff(np.diff(data.ptr)[ordered]) >= 0).all()


@pytest.mark.parametrize("seed", [None, 0])
def test_processes_share_each_batch(seed):
    data = molecules()
    y = targets(data)
    whole = Batches(data, y, 10, seed)
    parts = [Batches(data, y, 10, seed, rank=rank, world=2) for rank in range(2)]
    assert all(len(part) == len(whole) for part in parts)
    for batch, *shares in zip(whole, *parts, strict=True):
        assert {share.known for share in shares} == {batch.known}
        values = torch.cat([share.targets for share in shares]).flatten().nan_to_num(9)
        assert sorted(values.tolist()) == sorted(batch.targets.flatten().nan_to_num(9).tolist())
        assert abs(len(shares[0].ptr) - len(shares[1].ptr)) <= 1


@pytest.mark.parametrize("seed", [None, 0])
def test_no_molecules_are_no_batches(seed):
    batches = Batches(molecules()[:0], None, 10, seed)
    assert len(batches) == 0 and list(batches) == []


def test_an_empty_share_is_an_empty_batch():
    (*_, last) = Batches(molecules(11), None, 10, rank=1, world=2)
    assert last.ptr.tolist() == [0] and last.numbers.shape == (0,) and last.max_atoms == 0


def test_packing_without_targets():
    batch = pack(molecules(), np.array([4, 2]))
    assert batch.targets.shape == (2, 0)
