"""Shallow simulated cells: the model of `simulate`, drawn another way."""

from dataclasses import replace

import anndata as ad
import numpy as np
import pytest

from cisformer.errors import InputError
from cisformer.simulation import simulate
from cisformer.sparse_cells import _counts, _early, _fragments, _Sampler, simulate_sparse
from cisformer.tissue import SimulationOptions, Tissue

SMALL = SimulationOptions(n_cells=600, n_genes=100, n_ccres=800, n_types=3, seed=5)


@pytest.mark.parametrize("more", [1.0, 3.0])
def test_counts_are_gamma_poisson(more):
    """Zeros, mean and variance of 40,000 counts of each mean, to 5 standard errors; also where means may be larger."""
    mean = np.array([0.02, 0.5, 3.0, 40.0], np.float32)
    n, rng = 40_000, np.random.default_rng(0)
    gene, cell, first = _early(np.repeat(more * mean[:, None], n, axis=1), rng)
    counts = np.zeros((n, len(mean)))
    counts[cell, gene] = _counts(mean[gene], first, rng)
    variance = mean + 0.3 * mean**2
    zero = (1 + 0.3 * mean) ** (-1 / 0.3)
    assert (np.abs((counts == 0).mean(axis=0) - zero) < 5 * np.sqrt(zero * (1 - zero) / n) + 1e-12).all()
    assert (np.abs(counts.mean(axis=0) - mean) < 5 * np.sqrt(variance / n)).all()
    assert np.allclose(counts.var(axis=0), variance, rtol=0.15)


def test_fragments_fall_anywhere_once_counted():
    rate = np.repeat([0.05, 0.7], 200)
    cell, ccre = _fragments(rate, 500, np.random.default_rng(0))
    key = cell.astype(np.int64) * 500 + ccre
    assert (np.diff(key) > 0).all()
    assert ccre.min() == 0
    assert ccre.max() == 499
    touched = np.bincount(cell, minlength=len(rate)) / 500
    for each in np.unique(rate):
        assert touched[rate == each].mean() == pytest.approx(1 - np.exp(-each), rel=0.02)
    assert np.bincount(ccre, minlength=500).std() < 1.3 * np.sqrt(len(ccre) / 500)


def test_cells_are_those_of_the_dense_generator_at_the_same_depth(tmp_path):
    """The same landscape and cells; what is drawn of them agrees in every gene and cCRE as two draws do."""
    dense = simulate(n_cells=600, n_genes=100, n_ccres=800, n_types=3, seed=5)
    folder = simulate_sparse(tmp_path, SMALL, depth=1.0)
    rna, atac = ad.read_h5ad(folder / "rna.h5ad"), ad.read_h5ad(folder / "atac.h5ad")
    assert rna.obs_names.equals(dense.rna.obs_names)
    assert rna.var_names.equals(dense.rna.var_names)
    assert atac.var_names.equals(dense.atac.var_names)
    assert (rna.obs["cell_type"].astype(str) == dense.rna.obs["cell_type"].astype(str)).all()
    for ours, theirs in ((atac.X, dense.atac.X), (rna.X > 0, dense.rna.X > 0)):
        for of_type in (rna.obs["cell_type"] == name for name in rna.obs["cell_type"].cat.categories):
            rows = np.flatnonzero(of_type)
            share = (np.asarray(part[rows].mean(axis=0)).ravel() for part in (ours, theirs))
            one, other = share
            error = np.sqrt((one * (1 - one) + other * (1 - other) + 1 / len(rows)) / len(rows))
            assert 0.75 < np.std((one - other) / error) < 1.25
    assert rna.X.sum() == pytest.approx(dense.rna.X.sum(), rel=0.03)


def test_a_gene_follows_the_open_state_of_its_own_cell():
    """All of a cCRE's activity being its open state, expression and accessibility of a cell go together."""
    tissue = replace(Tissue.draw(SMALL, np.random.default_rng(5)), snapshot_share=1.0)
    rna, atac = _Sampler.of(tissue, 1.0, 0).block(0)
    gene, ccre = tissue.links.gene, tissue.links.ccre
    one_type = np.flatnonzero(tissue.cells.type_of == np.bincount(tissue.cells.type_of).argmax())
    with np.errstate(invalid="ignore"):
        expression, accessible = (part[one_type].toarray() for part in (rna, atac))
        r = np.corrcoef(np.log1p(expression), accessible, rowvar=False)[: rna.shape[1], rna.shape[1] :]
    assert np.nanmean(r[gene, ccre]) > np.nanmean(r) + 0.05


def test_same_options_same_cells_and_few_are_seen(tmp_path):
    first, again = (
        ad.read_h5ad(simulate_sparse(tmp_path / name, SMALL, depth=0.05) / "atac.h5ad") for name in "ab"
    )
    assert (first.X != again.X).nnz == 0
    assert first.X.has_canonical_format
    assert 0.005 < first.X.mean() < 0.02


def test_a_gene_without_links_is_drawn_too(tmp_path):
    lonely = SimulationOptions(n_cells=3, n_genes=1, n_ccres=2, n_types=1, window_bp=1)
    assert ad.read_h5ad(simulate_sparse(tmp_path, lonely, 0.5) / "rna.h5ad").shape == (3, 1)


@pytest.mark.parametrize("depth", [0.0, -1.0, 1.5, float("nan")])
def test_impossible_depths_are_refused(depth, tmp_path):
    with pytest.raises(InputError, match="the depth is"):
        simulate_sparse(tmp_path, SMALL, depth)
    assert not list(tmp_path.iterdir())
