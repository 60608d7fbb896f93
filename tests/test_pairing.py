"""Barcodes matched, cells split."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cisformer.data.pairing import pair_barcodes, split_cells
from cisformer.errors import InputError


def test_shared_barcodes_come_sorted(caplog: pytest.LogCaptureFixture):
    rna, atac = pd.Index(["d", "a", "c", "b"]), pd.Index(["b", "x", "d", "a"])
    rna_rows, atac_rows = pair_barcodes(rna, atac)
    assert rna[rna_rows].tolist() == atac[atac_rows].tolist() == ["a", "b", "d"]
    assert "1 of 4 RNA cells have no partner" in caplog.text
    assert "1 of 4 ATAC cells have no partner" in caplog.text


@pytest.mark.parametrize(
    ("rna", "atac", "hint"),
    [
        (["AA-1", "CC-1"], ["AA", "CC"], "without a suffix such as -1 2 barcodes agree"),
        (["AA-1", "CC-1"], ["AA-2", "CC-2"], "without a suffix such as -1 2 barcodes agree"),
        (["s1#AA", "s1#CC"], ["AA", "CC"], "without a prefix such as sample# 2 barcodes agree"),
        (
            ["AA_rna", "CC_rna"],
            ["AA_atac", "CC_atac"],
            "without what follows the last - or _ 2 barcodes agree",
        ),
        (["AA", "CC"], ["GG", "TT"], "two files of the same cells"),
    ],
)
def test_no_shared_barcode_is_explained(rna: list[str], atac: list[str], hint: str):
    with pytest.raises(InputError) as caught:
        pair_barcodes(pd.Index(rna), pd.Index(atac))
    assert rna[0] in caught.value.message
    assert atac[1] in caught.value.message
    assert hint in caught.value.hint


@settings(deadline=None)
@given(st.integers(3, 500), st.integers(0, 5))
def test_splits_cover_all_cells_once_in_the_documented_shares(n_cells: int, seed: int):
    split = split_cells(n_cells, seed)
    together = np.concatenate([split.train, split.val, split.test])
    assert np.array_equal(np.sort(together), np.arange(n_cells))
    assert len(split.test) == max(1, round(0.2 * n_cells))
    assert len(split.val) == max(1, round(0.1 * (n_cells - len(split.test))))
    again = split_cells(n_cells, seed)
    assert np.array_equal(split.val, again.val)
    assert np.array_equal(split.test, again.test)


def test_another_seed_gives_another_split():
    assert not np.array_equal(split_cells(100, 0).test, split_cells(100, 1).test)


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=3, max_size=12), st.integers(0, 3))
def test_groups_are_kept_whole(sizes: list[int], seed: int):
    groups = np.repeat([f"donor{i}" for i in range(len(sizes))], sizes).astype(object)
    split = split_cells(len(groups), seed, groups)
    parts = [set(groups[part]) for part in (split.train, split.val, split.test)]
    assert all(parts)
    assert not parts[2] & (parts[0] | parts[1])
    assert len(parts[0] | parts[1]) == 1 or not parts[0] & parts[1]
    assert len(split.train) + len(split.val) + len(split.test) == len(groups)


def test_two_groups_leave_validation_within_the_training_group(caplog: pytest.LogCaptureFixture):
    split = split_cells(100, 0, np.repeat(["a", "b"], 50).astype(object))
    assert len(split.test) == 50
    assert len(split.val) == 5
    assert "taken from it too" in caplog.text


def test_what_cannot_be_split():
    with pytest.raises(InputError, match="2 paired cells cannot be split") as caught:
        split_cells(2, 0)
    assert "--manually" in caught.value.hint
    with pytest.raises(InputError, match="all cells are in one group, 'a'"):
        split_cells(10, 0, np.repeat("a", 10).astype(object))
