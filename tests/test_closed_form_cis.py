"""The closed-form cis model against dense ridge regression."""

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.linear_model import Ridge

from cisformer.data.batches import read_modality
from cisformer.data.store import CellStore, find_split
from cisformer.model import closed_form_cis
from cisformer.model.cell_rows import CellRows
from cisformer.model.closed_form import StartOptions, count_features, fit_linear
from cisformer.model.closed_form_cis import Windows, fit_local, weight_variance
from cisformer.model.projection import states
from cisformer.model.target_states import axis_scores, held_out_states
from cisformer.training.closed_form_start import make_layout


@pytest.fixture(scope="module")
def parts(tiny_data):
    store = CellStore.open(find_split(tiny_data["atac2rna"], "train"))
    rows = np.arange(store.n_cells)
    counts = count_features(store, rows, "atac2rna")
    layout = make_layout(counts, "atac2rna", store)
    start = fit_linear(CellRows.of(store, rows), CellRows(()), layout, counts, StartOptions(5, 1.0, 0))
    return store, layout, start, Windows.of(store.reference, layout, 250_000)


def test_windows_list_every_pair_within_reach(parts):
    store, layout, _, windows = parts
    genes = store.reference.genes.iloc[layout.target_index]
    ccres = store.reference.ccres.iloc[layout.input_index]
    expected = {
        (g, p)
        for g, gene in enumerate(genes.itertuples())
        for p, ccre in enumerate(ccres.itertuples())
        if gene.chrom == ccre.chrom and ccre.start < gene.end + 250_000 and ccre.end > gene.start - 250_000
    }
    assert set(zip(windows.gene.tolist(), windows.ccre.tolist(), strict=True)) == expected
    assert len(windows.gene) == len(expected) > 0


@pytest.fixture
def dense_fit(parts, monkeypatch):
    """Fit of all cells with penalty 20, their states, their open cCREs, and these free of mean and components."""
    store, layout, start, windows = parts
    monkeypatch.setattr(closed_form_cis, "PENALTIES", (20.0,))
    rows = np.arange(store.n_cells)
    fit = fit_local(CellRows.of(store, rows), CellRows.of(store, rows), layout, start, windows, 0)
    z = states(start.projection, store, rows, layout).astype(np.float64)
    x = read_modality(store, rows, "atac").toarray()[:, layout.input_index].astype(np.float64)
    centred = x - x.mean(axis=0)
    return fit, z, x, centred - z @ np.linalg.lstsq(z, centred, rcond=None)[0]


def test_weights_equal_dense_ridge_on_what_the_components_leave(parts, dense_fit):
    (store, layout, start, windows), (fit, z, _, x) = parts, dense_fit
    rows = np.arange(store.n_cells)
    y = read_modality(store, rows, "rna").toarray()[:, layout.target_index].astype(np.float64)
    u = axis_scores(sp.csr_matrix(y), start.prior, start.scale, start.target_states.axes)
    known = held_out_states(z, u, start.target_states)
    for gene in np.unique(windows.gene)[:5]:
        pairs = np.flatnonzero(windows.gene == gene)
        root = np.sqrt(weight_variance(windows.distance[pairs]))
        residual = (y[:, gene] - start.prior[gene]) / start.scale[gene] - known @ start.loadings[gene]
        ridge = Ridge(alpha=20.0, fit_intercept=False).fit(x[:, windows.ccre[pairs]] * root, residual)
        np.testing.assert_allclose(fit.weight[pairs], ridge.coef_ * root, atol=1e-3)


def test_weights_do_not_depend_on_how_genes_are_grouped(parts, monkeypatch):
    """Genes alone, in small groups, and all together; products with a sparse and with a dense xᵀx."""
    store, layout, start, windows = parts
    monkeypatch.setattr(closed_form_cis, "PENALTIES", (20.0,))
    cells = CellRows.of(store, np.arange(store.n_cells))
    fits = []
    for genes, ccres, share in ((1, 1, 0.0), (3, 30, 1.0), (10_000, 10_000, 0.0)):
        monkeypatch.setattr(closed_form_cis, "BLOCK_GENES", genes)
        monkeypatch.setattr(closed_form_cis, "BLOCK_CCRES", ccres)
        monkeypatch.setattr(closed_form_cis, "DENSE_SHARE", share)
        fits.append(fit_local(cells, cells, layout, start, windows, 0).weight)
    for weight in fits[1:]:
        np.testing.assert_allclose(weight, fits[0], atol=1e-4 * np.abs(fits[0]).max())


def test_bias_and_loadings_keep_mean_and_linear_path(parts, dense_fit):
    """Adding w·x, bias and loadings must equal adding w·x̃, with x̃ free of mean and components."""
    (_, layout, _, windows), (fit, z, x, free) = parts, dense_fit
    spread = np.zeros((len(layout.target_index), x.shape[1]))
    spread[windows.gene, windows.ccre] = fit.weight
    np.testing.assert_allclose(x @ spread.T + fit.bias + z @ fit.loadings.T, free @ spread.T, atol=1e-3)


def test_cells_that_say_nothing_get_a_strong_penalty(parts):
    store, layout, start, windows = parts
    rng = np.random.default_rng(5)

    class Shuffled:
        reference = store.reference
        order = rng.permutation(store.n_cells)
        atac = staticmethod(store.atac)

        def rna(self, rows):
            return store.rna(self.order[rows])

    rows = rng.permutation(store.n_cells)
    fit = fit_local(
        CellRows.of(Shuffled(), rows[40:]), CellRows.of(Shuffled(), rows[:40]), layout, start, windows, 0
    )
    assert fit.penalty >= 300
