"""Simulated cells: reproducible, real-looking, and driven by the links that the truth table names."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from cisformer.data.genome import parse_regions, signed_distance
from cisformer.errors import InputError
from cisformer.simulation import SimulatedCells, simulate


@pytest.fixture(scope="module")
def cells() -> SimulatedCells:
    return simulate(n_cells=300, n_genes=200, n_ccres=1500, n_types=4, seed=3)


def test_sizes_and_form(cells):
    assert cells.rna.shape == (300, 200)
    assert cells.atac.shape == (300, 1500)
    assert cells.rna.obs_names.equals(cells.atac.obs_names)
    assert cells.rna.obs_names.is_unique
    assert cells.rna.var_names.is_unique
    assert set(np.unique(cells.atac.X.data)) == {1}
    assert np.array_equal(cells.rna.X.data, np.round(cells.rna.X.data))
    assert cells.rna.obs["cell_type"].nunique() == 4


def test_same_seed_same_cells_other_seed_others(cells):
    again = simulate(n_cells=300, n_genes=200, n_ccres=1500, n_types=4, seed=3)
    other = simulate(n_cells=300, n_genes=200, n_ccres=1500, n_types=4, seed=4)
    assert (again.rna.X != cells.rna.X).nnz == 0
    assert (again.atac.X != cells.atac.X).nnz == 0
    pd.testing.assert_frame_equal(again.links, cells.links)
    assert not other.rna.var_names.equals(cells.rna.var_names)


def test_truth_table_names_pairs_in_reach(cells):
    genes = cells.rna.var.reset_index(names="gene_name")
    links = cells.links
    gene = pd.Index(genes["gene_id"]).get_indexer(links["gene_id"])
    ccre = cells.atac.var_names.get_indexer(links["ccre"])
    assert (gene >= 0).all()
    assert (ccre >= 0).all()
    regions = parse_regions(cells.atac.var_names)
    assert np.array_equal(links["distance"], signed_distance(genes, regions, gene, ccre))
    assert links["distance"].abs().max() <= 250_000
    assert (links["distance"].abs()[links["promoter"]] <= 500).all()
    assert (links["effect"] > 0).all()
    distal = links[~links["promoter"]].drop_duplicates(["gene_id", "ccre"])
    assert distal.groupby("gene_id").size().max() <= 6
    assert distal["distance"].abs().median() < 125_000  # near links are likelier than uniform in the window


def test_linked_ccres_drive_their_genes():
    """Across cells of one type, a gene follows its linked cCREs more than its other neighbours."""
    cells = simulate(n_cells=1500, n_genes=150, n_ccres=1500, n_types=1, seed=5)
    counts = cells.rna.X.toarray()
    expression = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)
    accessible = cells.atac.X.toarray().astype(float)
    correlation = np.nan_to_num(_correlations(expression, accessible))
    linked = np.zeros(correlation.shape, dtype=bool)
    linked[
        cells.rna.var_names.get_indexer(cells.links["gene_name"]),
        cells.atac.var_names.get_indexer(cells.links["ccre"]),
    ] = True
    expressed = (counts > 0).mean(0) > 0.2
    opened = accessible.mean(0) > 0.1
    seen = expressed[:, None] & opened[None]
    true, false = correlation[linked & seen], correlation[~linked & seen]
    assert len(true) > 50
    assert true.mean() > false.mean() + 5 * false.std() / np.sqrt(len(true))


def _correlations(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        left = (left - left.mean(0)) / left.std(0)
        right = (right - right.mean(0)) / right.std(0)
    return left.T @ right / len(left)


def test_written_files_read_back(cells, tmp_path):
    folder = cells.write(tmp_path / "sim")
    rna, atac = ad.read_h5ad(folder / "rna.h5ad"), ad.read_h5ad(folder / "atac.h5ad")
    assert (rna.X != cells.rna.X).nnz == 0
    assert (atac.X != cells.atac.X).nnz == 0
    info = pd.read_csv(folder / "celltype_info.tsv", sep="\t", header=None, index_col=0)[1]
    assert (info == cells.rna.obs["cell_type"].astype(str)).all()
    truth = pd.read_csv(folder / "true_links.tsv", sep="\t")
    assert list(truth.columns) == [
        "gene_id",
        "gene_name",
        "ccre",
        "cell_type",
        "effect",
        "distance",
        "promoter",
    ]
    assert len(truth) == len(cells.links)


@pytest.mark.parametrize("sizes", [{"n_genes": 0}, {"n_cells": 3, "n_types": 4}, {"n_genes": 10**6}])
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(InputError):
        simulate(**sizes)
