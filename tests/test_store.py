"""Shards written from unsorted cells, read back by row."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from formats import damage
from hypothesis import given, settings
from hypothesis import strategies as st

from cisformer.config import Direction
from cisformer.data import shards
from cisformer.data.preprocess import preprocess
from cisformer.data.reference import Reference, load_reference
from cisformer.data.shards import RowFile, UnsortedCells, write_shard
from cisformer.data.store import CellStore, Split, SplitName, find_split, write_splits
from cisformer.errors import OutputExistsError, ReferenceMismatchError, StoreError
from cisformer.runtime.files import atomic_folder

N_CELLS, N_GENES, N_CCRES = 50, 30, 80


class PairedCells(NamedTuple):
    """Counts [n_cells, n_genes], open cCREs [n_cells, n_ccres], and what is known of the cells."""

    rna: sp.csr_matrix
    atac: sp.csr_matrix
    obs: pd.DataFrame


def write_store(
    folder: Path,
    blocks: Iterable[PairedCells],
    reference: Reference,
    *,
    direction: Direction,
    cnt: int = 10_000,
    cell_info: bool = True,
    split: SplitName = "all",
    force: bool = False,
) -> CellStore:
    """Park cells and write them as one split, in the order given, as preprocessing writes several."""
    folder.parent.mkdir(exist_ok=True)
    with (
        atomic_folder(folder, force=force) as new,
        RowFile(folder.parent, with_values=True) as rna,
        RowFile(folder.parent, with_values=False) as atac,
    ):
        obs = []
        for block in blocks:
            rna.append(block.rna)
            atac.append(block.atac)
            obs.append(block.obs)
        info = pd.concat(obs)
        rows = np.arange(len(info))
        cells = UnsortedCells(rna, atac, rows, rows, info)
        about = {"split": split, "shuffle": not cell_info}
        write_splits([Split(new, cells, about, cnt)], reference, direction)
    return CellStore.open(folder)


def random_cells(seed: int = 0, largest: int = 60) -> PairedCells:
    rng = np.random.default_rng(seed)
    rna = sp.csr_matrix(rng.integers(1, largest, (N_CELLS, N_GENES)) * (rng.random((N_CELLS, N_GENES)) < 0.3))
    atac = sp.csr_matrix(rng.random((N_CELLS, N_CCRES)) < 0.2)
    obs = pd.DataFrame(
        {"type_rna": ["T cell", "NA", None, "B"] * 12 + ["x", "y"], "n_atac": range(N_CELLS)},
        index=[f"cell{i}" for i in range(N_CELLS)],
    )
    return PairedCells(rna.astype(np.float32), atac.astype(np.float32), obs)


@pytest.fixture(scope="module")
def reference() -> Reference:
    human = load_reference("human")
    return Reference("dataset", "hg38", human.genes.iloc[:N_GENES], human.ccres.iloc[:N_CCRES])


def blocks(cells: PairedCells, size: int = 17) -> list[PairedCells]:
    parts = [slice(start, start + size) for start in range(0, len(cells.obs), size)]
    return [PairedCells(cells.rna[part], cells.atac[part], cells.obs.iloc[part]) for part in parts]


@pytest.fixture
def store(reference: Reference, tmp_path: Path) -> CellStore:
    folder = tmp_path / "rna2atac_train"
    return write_store(folder, blocks(random_cells()), reference, direction="rna2atac", cnt=20, split="train")


def test_rows_come_back_in_any_order(store: CellStore):
    cells = random_cells()
    rows = np.random.default_rng(1).integers(0, N_CELLS, 200)
    assert (store.rna(rows) != cells.rna[rows]).nnz == 0
    assert (store.atac(rows) != cells.atac[rows]).nnz == 0
    assert store.rna(rows).dtype == store.atac(rows).dtype == np.float32
    assert store.rna(rows[:0]).shape == (0, N_GENES)
    assert store.rna(np.array([7])).has_sorted_indices
    with pytest.raises(IndexError):
        store.rna(np.array([N_CELLS]))


def test_what_is_known_of_the_cells(store: CellStore, reference: Reference):
    assert store.n_cells == N_CELLS
    assert store.barcodes.tolist() == [f"cell{i}" for i in range(N_CELLS)]
    assert store.cell_info["type_rna"].iloc[:2].tolist() == ["T cell", "NA"]
    assert pd.isna(store.cell_info["type_rna"].iloc[2])
    assert store.cell_info["n_atac"].tolist() == list(range(N_CELLS))
    assert store.reference.fingerprint == reference.fingerprint
    assert [shard["n_cells"] for shard in store.manifest["shards"]] == [20, 20, 10]
    store.verify()


def test_one_shard_opens_as_its_own_cells(store: CellStore):
    part = CellStore.open(store.path / "rna2atac_1.pt")
    assert part.barcodes.tolist() == [f"cell{i}" for i in range(20, 40)]
    assert part.cell_info.index.tolist() == part.barcodes.tolist()
    assert (part.rna(np.arange(20)) != random_cells().rna[20:40]).nnz == 0


@pytest.mark.parametrize("name", ["", "manifest.json", "rna2atac_2.pt"])
def test_stores_travel_to_other_processes(store: CellStore, name: str):
    opened = CellStore.open(store.path / name)
    sent = pickle.loads(pickle.dumps(opened))
    rows = np.arange(opened.n_cells)
    assert (sent.atac(rows) != opened.atac(rows)).nnz == 0
    assert sent.barcodes.tolist() == opened.barcodes.tolist()


def test_shards_are_what_torch_loads(store: CellStore):
    tensors = torch.load(store.path / "rna2atac_0.pt", weights_only=True)
    kinds = {
        name: (str(tensor.dtype).removeprefix("torch."), len(tensor)) for name, tensor in tensors.items()
    }
    cells = random_cells()
    assert kinds == {
        "rna_indptr": ("int64", 21),
        "rna_indices": ("int32", cells.rna[:20].nnz),
        "rna_values": ("int16", cells.rna[:20].nnz),
        "atac_indptr": ("int64", 21),
        "atac_indices": ("int32", cells.atac[:20].nnz),
        "atac_values": ("uint8", cells.atac[:20].nnz),
    }
    assert tensors["atac_values"].eq(1).all()


def test_counts_beyond_16_bits_are_kept(reference: Reference, tmp_path: Path):
    cells = random_cells(largest=100_000)
    wide = write_store(tmp_path / "atac2rna_all", [cells], reference, direction="atac2rna")
    assert (wide.rna(np.arange(N_CELLS)) != cells.rna).nnz == 0


def test_the_same_cells_give_the_same_bytes(reference: Reference, tmp_path: Path):
    for name, size in (("a", 50), ("b", 7)):
        write_store(
            tmp_path / name / "x", blocks(random_cells(), size), reference, direction="rna2atac", cnt=30
        )
    for shard in ("rna2atac_0.pt", "rna2atac_1.pt"):
        assert (tmp_path / "a/x" / shard).read_bytes() == (tmp_path / "b/x" / shard).read_bytes()


def test_built_in_references_are_not_copied(tmp_path: Path):
    human = load_reference("human")
    cells = PairedCells(
        sp.csr_matrix((2, human.n_genes), dtype=np.float32),
        sp.csr_matrix((2, human.n_ccres), dtype=np.float32),
        pd.DataFrame(index=["a", "b"]),
    )
    written = write_store(tmp_path / "x", [cells], human, direction="rna2atac", cell_info=False)
    assert not (written.path / "reference").exists()
    assert written.reference.name == "human"
    assert written.cell_info.shape == (2, 0)


def test_existing_data_is_not_overwritten_unasked(store: CellStore, reference: Reference):
    with pytest.raises(OutputExistsError):
        write_store(store.path, [random_cells(1)], reference, direction="rna2atac")
    assert (CellStore.open(store.path).rna(np.arange(N_CELLS)) != random_cells().rna).nnz == 0
    forced = write_store(store.path, [random_cells(1)], reference, direction="rna2atac", force=True)
    assert (forced.rna(np.arange(N_CELLS)) != random_cells(1).rna).nnz == 0
    assert not (store.path / "rna2atac_1.pt").exists()


def test_an_interrupted_write_leaves_nothing(reference: Reference, tmp_path: Path):
    def interrupted():
        yield random_cells()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_store(tmp_path / "x", interrupted(), reference, direction="rna2atac")
    assert list(tmp_path.iterdir()) == []


def test_damage_is_noticed(store: CellStore):
    shard = store.path / "rna2atac_1.pt"
    whole = shard.read_bytes()
    damage(shard)
    with pytest.raises(StoreError, match=r"rna2atac_1.pt is damaged: it has .* bytes, the manifest says"):
        CellStore.open(store.path)
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 0xFF  # among the indices, where no structure gives it away
    shard.write_bytes(flipped)
    with pytest.raises(StoreError, match=r"rna2atac_1.pt is damaged: its checksum differs"):
        CellStore.open(store.path).verify()
    shard.unlink()
    with pytest.raises(StoreError, match=r"rna2atac_1.pt is missing"):
        CellStore.open(store.path)


def test_features_out_of_range_are_noticed(store: CellStore):
    manifest = json.loads((store.path / "manifest.json").read_text())
    manifest["reference"]["n_genes"] = 10
    (store.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match="features outside 0 to 9"):
        CellStore.open(store.path).rna(np.arange(N_CELLS))


def test_what_is_not_a_store(store: CellStore, tmp_path: Path):
    with pytest.raises(StoreError, match=r"no manifest.json") as caught:
        CellStore.open(tmp_path)
    assert "rna2atac_train" in caught.value.hint
    with pytest.raises(StoreError, match="not among the shards"):
        CellStore.open(store.path / "rna2atac_9.pt")
    manifest = json.loads((store.path / "manifest.json").read_text())
    for change, message in (
        ({"format": "x"}, "does not describe"),
        ({"format_version": 99}, "format version 99"),
    ):
        (store.path / "manifest.json").write_text(json.dumps(manifest | change))
        with pytest.raises(StoreError, match=message):
            CellStore.open(store.path)


def test_a_reference_that_changed_is_refused(store: CellStore):
    manifest = json.loads((store.path / "manifest.json").read_text())
    manifest["reference"] |= {"fingerprint": "0" * 64}
    (store.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ReferenceMismatchError, match="aligned to another dataset reference"):
        _ = CellStore.open(store.path).reference


def test_splits_are_found_from_anywhere(store: CellStore):
    base = store.path.parent
    shutil.copytree(store.path, base / "rna2atac_val")
    shutil.copytree(store.path, base / "atac2rna_val")
    assert find_split(base, "train") == store.path
    assert find_split(store.path / "rna2atac_0.pt", "val") == base / "rna2atac_val"
    assert find_split(base, "val", "atac2rna") == base / "atac2rna_val"
    assert find_split(base / "atac2rna_val", "val") == base / "atac2rna_val"
    assert find_split(base, "test") is None


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, N_CELLS - 1), max_size=80), st.integers(1, 200), st.integers(1, N_CELLS))
def test_unsorted_cells_come_back_in_any_order(rows: list[int], chunk: int, block: int):
    cells, wanted = random_cells(), np.array(rows, np.int64)
    with pytest.MonkeyPatch.context() as patch, RowFile(Path("."), with_values=True) as row_file:
        patch.setattr(shards, "_CHUNK", chunk)
        for part in blocks(cells, block):
            row_file.append(part.rna)
        expected = cells.rna[wanted]
        assert np.array_equal(np.concatenate([*row_file.indices(wanted), []]), expected.indices)
        assert np.array_equal(np.concatenate([*row_file.values(wanted), []]), expected.data)


def test_a_wrong_number_of_bytes_is_an_error(tmp_path: Path):
    with pytest.raises(ValueError, match="8 bytes for a storage of 16"):
        shards.write_tensors(
            tmp_path / "x_0.pt", {"a": torch.empty(2, dtype=torch.int64)}, [iter([np.zeros(1)])]
        )


def test_a_shard_of_no_cells(tmp_path: Path):
    with RowFile(tmp_path, with_values=True) as rna, RowFile(tmp_path, with_values=False) as atac:
        none = np.zeros(0, np.int64)
        assert write_shard(tmp_path / "x_0.pt", rna, atac, none, none) == {
            "n_cells": 0,
            "rna_nnz": 0,
            "atac_nnz": 0,
        }
    assert len(torch.load(tmp_path / "x_0.pt", weights_only=True)["rna_indptr"]) == 1


def test_splits_made_by_hand_are_not_compared(tiny_data, tiny_files, tmp_path):
    """`data_preprocess --manually` splits nothing: folders that a user names after splits are of several runs."""
    for name in ("train", "val"):
        made = preprocess(
            tiny_files / "rna.h5ad", tiny_files / "atac.h5ad", tmp_path / name, direction="atac2rna",
            reference="dataset", manually=True,
        )  # fmt: skip
        made["all"].path.rename(tmp_path / f"atac2rna_{name}")
    assert find_split(tmp_path, "train", "atac2rna") == tmp_path / "atac2rna_train"
    shutil.copytree(tiny_data["atac2rna"] / "atac2rna_test", tmp_path / "atac2rna_test")
    assert find_split(tmp_path, "test", "atac2rna") == tmp_path / "atac2rna_test"


def test_a_split_of_the_other_direction_stands_in_only_where_there_is_none(tiny_data, tmp_path):
    shutil.copytree(tiny_data["rna2atac"] / "rna2atac_test", tmp_path / "rna2atac_test")
    assert find_split(tmp_path, "test", "atac2rna") == tmp_path / "rna2atac_test"
    shutil.copytree(tiny_data["atac2rna"] / "atac2rna_train", tmp_path / "atac2rna_train")
    assert find_split(tmp_path, "test", "atac2rna") is None


def test_shards_are_whole_zip_archives(tiny_data):
    """Their checksums are right, so that any program that unpacks them agrees."""
    import zipfile

    shards = [path for folder in tiny_data.values() for path in folder.rglob("*.pt")]
    assert shards
    for path in shards:
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
