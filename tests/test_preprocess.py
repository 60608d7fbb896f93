"""From a user's files to data sets: what is promised of the whole path."""

from __future__ import annotations

import json
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from formats import damage, write_10x, write_h5mu

from cisformer.config import parse_config
from cisformer.data import sources
from cisformer.data.preprocess import preprocess
from cisformer.data.reference import load_reference
from cisformer.data.store import CellStore
from cisformer.errors import InputError, OutputExistsError

N_CELLS = 60


@pytest.fixture(scope="module")
def pair() -> tuple[ad.AnnData, ad.AnnData]:
    """Cells on real genes and cCREs of chr1; ATAC in another order, some of each without a partner."""
    rng = np.random.default_rng(5)
    human = load_reference("human")
    genes, ccres = human.genes.iloc[:80], human.ccres.iloc[:200]
    counts = rng.poisson(0.6, (N_CELLS, 80)) * (rng.random((N_CELLS, 80)) < 0.6)
    peaks = [f"{c.chrom}:{max(c.start - 40, 0)}-{c.end + 30}" for c in ccres.itertuples()]
    opened = rng.random((N_CELLS, 200)) < 0.15
    barcodes = [f"{''.join(rng.choice(list('ACGT'), 12))}-1" for _ in range(N_CELLS)]
    obs = pd.DataFrame(
        {"cell_type": rng.choice(["T", "B"], N_CELLS), "donor": np.repeat(["d1", "d2", "d3"], 20)},
        index=barcodes,
    )
    rna = ad.AnnData(
        sp.csr_matrix(counts.astype(np.float32)), obs, pd.DataFrame(index=genes["gene_name"].tolist())
    )
    atac = ad.AnnData(
        sp.csr_matrix(opened.astype(np.float32)), obs.drop(columns="donor"), pd.DataFrame(index=peaks)
    )
    return rna[:57].copy(), atac[rng.permutation(N_CELLS)][:58].copy()


@pytest.fixture(scope="module")
def done(
    pair: tuple[ad.AnnData, ad.AnnData], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, CellStore]:
    return preprocess(*pair, tmp_path_factory.mktemp("done"))


def shards(folder: Path) -> dict[str, bytes]:
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in sorted(folder.rglob("*.pt"))}


def all_cells(stores: dict[str, CellStore]) -> dict[str, tuple[bytes, bytes]]:
    """Barcode → (rna, atac) of every cell."""
    return {
        barcode: (store.rna([i]).toarray().tobytes(), store.atac([i]).indices.tobytes())
        for store in stores.values()
        for i, barcode in enumerate(store.barcodes)
    }


def test_folders_files_and_shares_are_those_of_the_spec(done: dict[str, CellStore]):
    assert list(done) == ["train", "val", "test"]
    assert {name: store.path.name for name, store in done.items()} == {
        "train": "rna2atac_train", "val": "rna2atac_val", "test": "rna2atac_test",
    }  # fmt: skip
    for store in done.values():
        names = sorted(path.name for path in store.path.iterdir())
        assert names == ["barcodes.txt", "cell_info.tsv", "manifest.json", "rna2atac_0.pt"]
    n = sum(store.n_cells for store in done.values())
    assert done["test"].n_cells == round(0.2 * n)
    assert not set(done["test"].barcodes) & {*done["train"].barcodes, *done["val"].barcodes}
    assert done["train"].cell_info.columns.tolist() == ["cell_type_rna", "donor_rna", "cell_type_atac"]


def test_every_paired_cell_arrives_with_its_own_values(
    done: dict[str, CellStore], pair: tuple[ad.AnnData, ad.AnnData]
):
    rna, atac = pair
    human = load_reference("human")
    paired = set(rna.obs_names) & set(atac.obs_names)
    seen = set()
    for store in done.values():
        for i, barcode in enumerate(store.barcodes):
            seen.add(barcode)
            counts = pd.Series(store.rna([i]).toarray()[0], human.gene_labels)
            expected = pd.Series(rna[barcode].X.toarray()[0], rna.var_names)
            assert counts[expected.index].equals(expected)
            assert counts.sum() == expected.sum()
            opened = set(store.atac([i]).indices)
            peaks = np.flatnonzero(atac[barcode].X.toarray()[0])
            assert set(peaks) <= opened  # each peak covers the cCRE of its number, and perhaps a neighbour
            assert store.cell_info.loc[barcode, "cell_type_rna"] == rna.obs.loc[barcode, "cell_type"]
    assert seen == paired


def test_permuted_input_gives_the_same_bytes(
    done: dict[str, CellStore], pair: tuple[ad.AnnData, ad.AnnData], tmp_path: Path
):
    rng = np.random.default_rng(0)
    permuted = [
        adata[rng.permutation(adata.n_obs)][:, rng.permutation(adata.n_vars)].copy() for adata in pair
    ]
    preprocess(*permuted, tmp_path, batch_size=1, num_workers=3)
    assert shards(tmp_path) == shards(done["train"].path.parent)


def test_all_formats_give_the_same_bytes(pair: tuple[ad.AnnData, ad.AnnData], tmp_path: Path):
    paired = pair[0].obs_names.intersection(pair[1].obs_names)
    rna, atac = (adata[paired].copy() for adata in pair)
    rna.write_h5ad(tmp_path / "rna.h5ad")
    sp_atac = atac.copy()
    sp_atac.X = sp.csc_matrix(sp_atac.X)
    sp_atac.write_h5ad(tmp_path / "atac.h5ad")
    write_h5mu(tmp_path / "both.h5mu", rna, atac)
    write_10x(tmp_path / "filtered_feature_bc_matrix.h5", rna, atac)
    inputs = {
        "h5ad": (tmp_path / "rna.h5ad", tmp_path / "atac.h5ad"),
        "h5mu": (tmp_path / "both.h5mu",) * 2,
        "10x": (tmp_path / "filtered_feature_bc_matrix.h5",) * 2,
    }
    for name, files in inputs.items():
        preprocess(*files, tmp_path / name, direction="atac2rna")
    assert len(shards(tmp_path / "h5ad")) == 3
    assert shards(tmp_path / "h5ad") == shards(tmp_path / "h5mu") == shards(tmp_path / "10x")


def test_manually_keeps_all_cells_together(
    done: dict[str, CellStore], pair: tuple[ad.AnnData, ad.AnnData], tmp_path: Path
):
    stores = preprocess(*pair, tmp_path, direction="atac2rna", manually=True, cnt=25)
    assert list(stores) == ["all"]
    assert stores["all"].path == tmp_path / "atac2rna_all"
    assert stores["all"].barcodes.tolist() == sorted(stores["all"].barcodes)
    assert all_cells(stores) == all_cells(done)
    assert len(list(tmp_path.rglob("*.pt"))) == 3


def test_shuffled_cells_are_the_same_cells(
    done: dict[str, CellStore], pair: tuple[ad.AnnData, ad.AnnData], tmp_path: Path
):
    stores = preprocess(*pair, tmp_path, shuffle=True)
    assert all_cells(stores) == all_cells(done)
    assert stores["train"].barcodes.tolist() != done["train"].barcodes.tolist()
    assert not (stores["train"].path / "cell_info.tsv").exists()
    for split, store in stores.items():
        assert set(store.barcodes) == set(done[split].barcodes)


def test_shards_are_bounded_in_training_only(pair: tuple[ad.AnnData, ad.AnnData], tmp_path: Path):
    stores = preprocess(*pair, tmp_path, cnt=3)
    sizes = {
        split: [shard["n_cells"] for shard in store.manifest["shards"]] for split, store in stores.items()
    }
    assert max(sizes["train"]) == 3
    assert len(sizes["test"]) == len(sizes["val"]) == 1
    assert stores["test"].n_cells > 3


def test_groups_stay_together(pair: tuple[ad.AnnData, ad.AnnData], tmp_path: Path):
    stores = preprocess(*pair, tmp_path, split_by="donor")
    donors = [set(store.cell_info["donor_rna"]) for store in stores.values()]
    assert sorted(map(len, donors)) == [1, 1, 1]
    assert set.union(*donors) == {"d1", "d2", "d3"}
    assert stores["test"].manifest["split_by"] == "donor"
    with pytest.raises(InputError, match="obs has no column 'sample' to split by") as caught:
        preprocess(*pair, tmp_path / "x", split_by="sample")
    assert "cell_type, donor" in caught.value.hint


def test_seed_changes_the_split(
    done: dict[str, CellStore], pair: tuple[ad.AnnData, ad.AnnData], tmp_path: Path
):
    other = preprocess(*pair, tmp_path, seed=1)
    assert set(other["test"].barcodes) != set(done["test"].barcodes)
    assert other["test"].manifest["seed"] == 1


def test_config_is_noted_with_one_sample_for_validation_and_test(
    pair: tuple[ad.AnnData, ad.AnnData], tmp_path: Path
):
    config = parse_config({"datapreprocess": {"multiple": 7}}, "rna2atac")
    stores = preprocess(*pair, tmp_path, config=config)
    assert {s: store.manifest["datapreprocess"]["multiple"] for s, store in stores.items()} == {
        "train": 7, "val": 1, "test": 1,
    }  # fmt: skip
    manual = preprocess(*pair, tmp_path / "m", config=config, manually=True)
    assert manual["all"].manifest["datapreprocess"]["multiple"] == 7


def test_empty_cells_are_left_out_counted_and_named(
    pair: tuple[ad.AnnData, ad.AnnData], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    rna, atac = (adata.copy() for adata in pair)
    paired = sorted(set(rna.obs_names) & set(atac.obs_names))
    silent, closed = paired[3], paired[8]
    rna.X = sp.csr_matrix(rna.X.toarray() * (rna.obs_names != silent)[:, None])
    atac.X = sp.csr_matrix(atac.X.toarray() * (atac.obs_names != closed)[:, None])
    stores = preprocess(rna, atac, tmp_path)
    barcodes = {barcode for store in stores.values() for barcode in store.barcodes}
    assert barcodes == set(paired) - {silent, closed}
    assert f"2 of {len(paired)} cells have no gene or no cCRE" in caplog.text
    assert silent in caplog.text
    assert stores["val"].manifest["empty_cells"] == [silent, closed]


def test_mapped_cells_are_the_test_cells(pair: tuple[ad.AnnData, ad.AnnData], tmp_path: Path):
    stores = preprocess(*pair, tmp_path, reference="dataset", write_h5ad=True)
    test = stores["test"]
    rna, atac = (ad.read_h5ad(test.path / f"mapped_{name}.h5ad") for name in ("rna", "atac"))
    assert rna.obs_names.tolist() == atac.obs_names.tolist() == test.barcodes.tolist()
    assert rna.var_names.tolist() == pair[0].var_names.tolist()
    assert atac.var_names.tolist() == pair[1].var_names.tolist()
    assert np.array_equal(rna.X.toarray(), pair[0][rna.obs_names].X.toarray())
    assert np.array_equal(atac.X.toarray(), pair[1][atac.obs_names].X.toarray())


def test_mouse_runs_the_whole_path(tmp_path: Path):
    rng = np.random.default_rng(2)
    mouse = load_reference("mouse")
    names = [f"c{i}" for i in range(20)]
    genes = pd.DataFrame(index=(mouse.genes["gene_id"].iloc[:50] + ".2").tolist())
    rna = ad.AnnData(
        sp.csr_matrix(rng.poisson(1, (20, 50)).astype(np.float32)), pd.DataFrame(index=names), genes
    )
    peaks = pd.DataFrame(index=[name.removeprefix("chr") for name in mouse.ccre_labels[:90]])
    atac = ad.AnnData(
        sp.csr_matrix((rng.random((20, 90)) < 0.5).astype(np.float32)), pd.DataFrame(index=names), peaks
    )
    stores = preprocess(rna, atac, tmp_path, reference="mouse")
    store = stores["train"]
    assert store.reference.genome == "mm39"
    rows = np.arange(store.n_cells)
    assert np.array_equal(store.rna(rows)[:, :50].toarray(), rna[store.barcodes].X.toarray())
    assert np.array_equal(store.atac(rows)[:, :90].toarray(), atac[store.barcodes].X.toarray())


def test_only_blocks_of_cells_are_read(
    pair: tuple[ad.AnnData, ad.AnnData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sizes = []
    rows = sources.Source.rows
    monkeypatch.setattr(
        sources.Source, "rows", lambda self, start, end: sizes.append(end - start) or rows(self, start, end)
    )
    preprocess(*pair, tmp_path, batch_size=2, num_workers=4)
    assert max(sizes) == 8
    assert sum(sizes) == pair[0].n_obs + pair[1].n_obs


def test_existing_output_is_kept_unless_forced(pair: tuple[ad.AnnData, ad.AnnData], tmp_path: Path):
    preprocess(*pair, tmp_path)
    before = shards(tmp_path)
    with pytest.raises(OutputExistsError, match="rna2atac_train exists already"):
        preprocess(*pair, tmp_path, seed=1)
    assert shards(tmp_path) == before
    preprocess(*pair, tmp_path, direction="atac2rna")  # the other direction has folders of its own
    assert before.items() <= shards(tmp_path).items()
    preprocess(*pair, tmp_path, seed=1, force=True)
    assert shards(tmp_path).keys() > before.keys()
    assert not before.items() <= shards(tmp_path).items()


def test_failure_half_way_leaves_nothing(pair: tuple[ad.AnnData, ad.AnnData], tmp_path: Path):
    rna, atac = (adata.copy() for adata in pair)
    rna.X.data[-1] = -1
    with pytest.raises(InputError, match="negative"):
        preprocess(rna, atac, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_file_damaged_inside_is_refused(pair: tuple[ad.AnnData, ad.AnnData], tmp_path: Path):
    path = tmp_path / "rna.h5ad"
    pair[0].write_h5ad(path, compression="gzip")
    with h5py.File(path) as file:
        chunk = file["X/data"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset : chunk.byte_offset + chunk.size] = b"\xff" * chunk.size
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"rna\.h5ad is cut short or damaged"):
        preprocess(path, pair[1], tmp_path / "out")
    pair[1].write_h5ad(tmp_path / "atac.h5ad")
    damage(tmp_path / "atac.h5ad")
    with pytest.raises(InputError, match=r"atac\.h5ad is cut short or damaged"):
        preprocess(pair[0], tmp_path / "atac.h5ad", tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference": "nowhere"}, "there is no reference 'nowhere'"),
        ({"gtf": "x.gtf"}, "a GTF cannot be used with reference 'human'"),
        ({"reference": "mouse"}, "genes are in the mouse reference"),
        ({"cnt": 0}, "must be at least 1"),
        ({"manually": True, "split_by": "donor"}, "--manually makes no split"),
    ],
)
def test_unfit_arguments(change: dict, message: str, pair: tuple[ad.AnnData, ad.AnnData], tmp_path: Path):
    with pytest.raises(InputError, match=message):
        preprocess(*pair, tmp_path / "out", **change)
    assert not (tmp_path / "out").exists()


def test_full_size_data_goes_through_with_the_human_reference(shared: Path, tmp_path: Path):
    data = shared / "data" / "pbmc10k_full_40"
    stores = preprocess(data / "rna.h5ad", data / "atac.h5ad", tmp_path)
    assert [store.n_cells for store in stores.values()] == [29, 3, 8]
    store = stores["train"]
    assert store.manifest["reference"]["n_ccres"] == 1_033_239
    source = ad.read_h5ad(data / "rna.h5ad")[store.barcodes]
    shared_genes = pd.Index(store.reference.gene_labels).intersection(source.var_names)
    aligned = pd.DataFrame.sparse.from_spmatrix(store.rna(np.arange(29)), columns=store.reference.gene_labels)
    assert np.array_equal(aligned[shared_genes].to_numpy(), source[:, shared_genes].X.toarray())
    assert json.loads((store.path / "manifest.json").read_text())["input"]["rna"]["n_found"] == len(
        shared_genes
    )


def test_donors_of_real_data_stay_apart(shared: Path, tmp_path: Path):
    data = shared / "data" / "bmmc_starter_A"
    stores = preprocess(
        data / "rna.h5ad", data / "atac.h5ad", tmp_path, split_by="batch", reference="dataset"
    )
    donors = {split: set(store.cell_info["batch_rna"]) for split, store in stores.items()}
    assert donors["train"] == donors["val"] != donors["test"]
