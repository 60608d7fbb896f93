"""Links of a tiny trained model: joined by barcode, exact effects, whole files."""

import copy
import dataclasses
import logging

import numpy as np
import pandas as pd
import pytest
import torch

from cisformer.data.batches import encode_input, read_modality
from cisformer.data.store import CellStore
from cisformer.errors import CheckpointError, InputError, OutputExistsError, ReferenceMismatchError
from cisformer.links.evidence import state_profiles
from cisformer.links.inputs import choose_cells
from cisformer.links.score import link, score_links


@pytest.fixture(scope="module")
def store(tiny_data) -> CellStore:
    return CellStore.open(tiny_data["atac2rna"] / "atac2rna_train")


@pytest.fixture(scope="module")
def types(tiny) -> pd.Series:
    return tiny.rna.obs["cell_type"].astype(str)


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoints):
    """The tiny model with attention and weights of single cCREs that are far from their start."""
    model = copy.deepcopy(tiny_checkpoints["atac2rna"].model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.cis.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return dataclasses.replace(tiny_checkpoints["atac2rna"], model=model.eval())


@pytest.fixture(scope="module")
def links(checkpoint, store, types):
    return score_links(checkpoint, store, types)


def test_links_are_of_pairs_in_the_window(links):
    table = links.table
    assert set(table["cell_type"]) == set(links.cell_num)
    assert table["score"].between(0, 1).all()
    assert table["attention"].between(0, 1).all()
    assert (table["n_open"] >= 1).all()
    assert not table.duplicated(["cell_type", "gene_id", "ccre"]).any()
    tested = table["p_value"].notna()
    assert tested.any()
    assert (table["fdr"][tested] >= table["p_value"][tested] - 1e-6).all()


def test_n_open_and_shares_by_hand(links, store, types):
    part = links.types[0]
    rows = np.flatnonzero(types.reindex(store.barcodes).to_numpy() == part.cell_type)
    assert part.n_cells == len(rows)
    n_open = np.asarray(store.atac(rows).sum(axis=0)).ravel()
    assert np.array_equal(part.evidence["n_open"], n_open[part.ccre])
    total = np.bincount(part.gene, part.evidence["activity_contact"])
    assert np.allclose(total[total > 0], 1, atol=1e-5)


def test_order_of_cell_types_changes_nothing(checkpoint, store, types, links):
    again = score_links(checkpoint, store, types.sample(frac=1, random_state=3))
    pd.testing.assert_frame_equal(again.table, links.table)


def test_swapped_labels_swap_the_links(checkpoint, store, types, links):
    first, second = links.types[0].cell_type, links.types[1].cell_type
    swapped = score_links(checkpoint, store, types.replace({first: second, second: first}), max_cells=20)
    straight = score_links(checkpoint, store, types, max_cells=20)
    for one, other in ((first, second), (second, first)):
        left, right = swapped[one], straight[other]
        assert np.array_equal(left.gene, right.gene)
        assert np.array_equal(left.ccre, right.ccre)
        for name, values in left.evidence.items():
            np.testing.assert_allclose(values, right.evidence[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert not np.array_equal(straight[first].ccre, straight[second].ccre)


def test_effect_equals_running_the_model_without_the_ccre(checkpoint, store, types, links):
    """Close one cCRE in the cis path of each cell, everything else as it was: expression changes by the effect."""
    model, layout = checkpoint.model, checkpoint.layout
    part = links.types[0]
    rows = np.flatnonzero(types.reindex(store.barcodes).to_numpy() == part.cell_type)
    cells = read_modality(store, rows, "atac")
    batch = encode_input(cells, layout, None, None)
    with torch.no_grad():
        _, h, tokens = model.encode(batch)
        cis = model.cis(batch, h, tokens, None)
        for at in np.argsort(-np.abs(part.evidence["effect"]))[[0, 5, 50]]:
            gene = np.searchsorted(layout.target_index, part.gene[at])
            ccre = np.searchsorted(layout.input_index, part.ccre[at])
            open_cells = np.asarray(cells[:, part.ccre[at]].todense()).ravel() > 0
            changes = model.cis(close(batch, ccre), h, tokens, None) - cis
            change = changes[open_cells, gene].mean() * model.scale[gene] * model.pace[gene]
            assert float(change) == pytest.approx(part.evidence["effect"][at], rel=1e-3, abs=1e-7)
    assert np.abs(part.evidence["effect"]).max() > 1e-4


def close(batch, ccre):
    """Return the batch with one cCRE closed in all cells."""
    keep = batch.index != ccre
    counts = torch.cat([torch.zeros(1, dtype=torch.int64), torch.cumsum(keep, 0)])
    return dataclasses.replace(
        batch, index=batch.index[keep], value=batch.value[keep], indptr=counts[batch.indptr]
    )


def test_ccre_profiles_are_slopes_on_the_states(tiny_checkpoints, store):
    """The profiles read off the projection are the regression of accessibility on the cells' states."""
    model = tiny_checkpoints["atac2rna"].model
    batch = encode_input(read_modality(store, np.arange(store.n_cells), "atac"), model.layout, None, None)
    with torch.no_grad():
        z = model.cell_states(batch)[:, model.projection.principal].double().numpy()
        x = np.zeros((store.n_cells, len(model.layout.input_index)))
        cell = np.repeat(np.arange(batch.n_cells), np.diff(batch.indptr.numpy()))
        n_open = np.diff(batch.indptr.numpy())
        x[cell, batch.index.numpy()] = 1.0
        x *= model.projection.weight.numpy()
        x /= np.linalg.norm(x, axis=1, keepdims=True)
    _, ccre = state_profiles(model, float(np.median(n_open)))
    slope = (x - x.mean(0)).T @ (z - z.mean(0)) / len(z)
    length = np.linalg.norm(slope, axis=1) * np.linalg.norm(ccre, axis=1)
    cosine = (slope[:, : ccre.shape[1]] * ccre).sum(1)[length > 0] / length[length > 0]
    assert np.median(cosine) > 0.9


def test_capped_cells_are_drawn_by_seed(store, types):
    given = choose_cells(store.barcodes, types, "x", 10, 1)
    assert {len(rows) for rows in given.values()} == {10}
    assert all(np.array_equal(a, b) for a, b in zip(
        given.values(), choose_cells(store.barcodes, types[::-1], "x", 10, 1).values(), strict=True))  # fmt: skip
    other = choose_cells(store.barcodes, types, "x", 10, 2)
    assert any(not np.array_equal(a, b) for a, b in zip(given.values(), other.values(), strict=True))


def test_files(checkpoint, store, types, links, tmp_path):
    import json

    import anndata as ad

    named = types.replace({links.types[0].cell_type: "../a/b 🧬" + "x" * 300})
    folder = link(checkpoint, store, named, tmp_path, formats=["bedpe", "interact", "longrange"])
    assert folder == tmp_path / "cisformer_link"
    matrices = {}
    for path in folder.glob("*_250kbp_correlation_matrix.h5ad"):
        adata = ad.read_h5ad(path)
        matrices[adata.uns["cisformer"]["cell_type"]] = adata
    assert set(matrices) == set(named)
    assert json.loads((folder / "cell_num.json").read_text()) == links_by(named, store)
    reference = store.reference
    name, part = links.types[1].cell_type, links.types[1]
    adata = matrices[name]
    assert adata.shape == (reference.n_genes, reference.n_ccres)
    assert list(adata.obs_names) == list(reference.gene_labels)
    assert list(adata.var_names) == list(reference.ccre_labels)
    assert np.allclose(adata.X[part.gene, part.ccre], part.evidence["score"])
    assert adata.X.nnz == len(part.gene)
    for component, values in part.evidence.items():
        if component != "score":
            found = np.asarray(adata.layers[component][part.gene, part.ccre]).ravel()
            np.testing.assert_allclose(found, values)
    table = pd.read_csv(folder / "links.tsv.gz", sep="\t")
    assert len(table) == sum(m.X.nnz for m in matrices.values())
    assert list(table.columns) == list(links.table.columns)
    with pytest.raises(OutputExistsError):
        link(checkpoint, store, named, tmp_path)


def links_by(types: pd.Series, store: CellStore) -> dict[str, int]:
    present = types.reindex(store.barcodes)
    return {name: int((present == name).sum()) for name in sorted(types.unique())}


def test_absent_type_is_named_and_counted(checkpoint, store, types, caplog):
    more = pd.concat([types, pd.Series({"NOT-HERE-1": "ghost"})])
    with caplog.at_level(logging.WARNING):
        found = score_links(checkpoint, store, more, max_cells=5)
    assert found.cell_num["ghost"] == 0
    assert "ghost" in caplog.text
    assert [part.cell_type for part in found.types] == sorted(types.unique())


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        ("barcode\tcell_type\n{known}\tB\n{other}\tB\n", "looks like a header"),
        ("nope\tB\nnada\tT\n", "none of the 2 barcodes"),
        ("{known}\tB\n{known}\tT\n", "two cell types"),
        ("{known},B\n", "one column"),
        ("{known}\t\n", "has no cell type"),
        ("", "cannot read cell types"),
    ],
)
def test_bad_cell_types(checkpoint, store, tmp_path, lines, wanted):
    path = tmp_path / "types.tsv"
    path.write_text(lines.format(known=store.barcodes[0], other=store.barcodes[1]))
    with pytest.raises(InputError, match=wanted) as error:
        score_links(checkpoint, store, path)
    assert error.value.hint


def test_missing_cell_types(checkpoint, store, tmp_path):
    with pytest.raises(InputError, match="cannot read"):
        score_links(checkpoint, store, tmp_path / "none.tsv")


def test_covariates(checkpoint, store, types, links):
    adjusted = score_links(checkpoint, store, types, covariates=["donor", "state_1_rna"])
    assert np.array_equal(adjusted.types[0].gene, links.types[0].gene)
    assert not np.allclose(
        adjusted.types[0].evidence["p_value"], links.types[0].evidence["p_value"], equal_nan=True
    )
    with pytest.raises(InputError, match="no column 'age'"):
        score_links(checkpoint, store, types, covariates=["age"])


def test_narrow_window(checkpoint, store, types, links):
    near = score_links(checkpoint, store, types, window_bp=20_000)
    assert 0 < len(near.table) < len(links.table)
    wide = links.table.set_index(["cell_type", "gene_id", "ccre"])
    joined = near.table.set_index(["cell_type", "gene_id", "ccre"]).join(wide, rsuffix="_wide")
    assert np.allclose(joined["effect"], joined["effect_wide"])
    assert np.allclose(joined["p_value"], joined["p_value_wide"], equal_nan=True)


def test_parts_that_do_not_belong_together(tiny_checkpoints, tiny_data, types, checkpoint, store, tmp_path):
    with pytest.raises(CheckpointError):
        score_links(tiny_checkpoints["rna2atac"], store, types)
    from cisformer.data.preprocess import preprocess
    from cisformer.simulation import simulate

    other = simulate(n_cells=40, n_genes=50, n_ccres=300, n_types=2, seed=2)
    stores = preprocess(
        other.rna, other.atac, tmp_path, direction="atac2rna", reference="dataset", manually=True
    )
    with pytest.raises(ReferenceMismatchError):
        score_links(checkpoint, stores["all"], types)
    with pytest.raises(InputError, match="distance"):
        score_links(checkpoint, store, types, window_bp=0)


def test_score_is_that_of_its_columns(links, checkpoint, store, types):
    """Prior, association, coupling and expression, each with its weight, give the score of each row."""
    from cisformer.links.inputs import LinkOptions
    from cisformer.links.scorer import prepare

    scorer = prepare(checkpoint, store, types, LinkOptions(), "cpu")
    weights, table = scorer.shared.weights, links.table
    prior = table["prior"].to_numpy(np.float64)
    by_association = weights.association_gain / np.interp(
        table["power"], weights.power, weights.null_variance
    )
    log_odds = (
        np.log(prior / (1 - prior))
        + by_association * table["association"]
        + 2 * weights.coupling_gain * table["power"] * table["coupling"].clip(-6, 6)
        + np.log((1 + np.exp(-1.7)) / (1 + np.exp(-1.7 - 1.5 * table["expression"])))
        - scorer.shared.less
    )
    np.testing.assert_allclose(table["score"], 1 / (1 + np.exp(-log_odds)), rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def strong():
    """Cells, a store of them and a closed-form model, large enough for planted links to be found."""
    from cisformer.simulation import simulate

    return simulate(n_cells=1000, n_genes=800, n_ccres=6000, n_types=4, seed=21)


@pytest.fixture(scope="module")
def strong_links(strong, tmp_path_factory):
    from cisformer.config import default_config
    from cisformer.data.preprocess import preprocess
    from cisformer.training.loop import train

    folder = tmp_path_factory.mktemp("strong")
    options = {"direction": "atac2rna", "reference": "dataset"}
    preprocess(strong.rna, strong.atac, folder, **options)
    stores = preprocess(strong.rna, strong.atac, folder, manually=True, **options)
    config = default_config("atac2rna", "small")
    config = config.model_copy(update={"training": config.training.model_copy(update={"epoch": 0})})
    checkpoint = train(folder, "x", direction="atac2rna", save=folder / "save", cpu=True, config=config)
    return score_links(checkpoint, stores["all"], strong.rna.obs["cell_type"].astype(str), device="cpu")


def judged(strong, strong_links) -> pd.DataFrame:
    """Distal pairs that all cells show often enough, and whether they are planted in any type."""
    table = strong_links.table
    n_open = table.groupby(["gene_id", "ccre"])["n_open"].transform("sum") / 1000
    table = table[(n_open >= 0.05) & (table["power"] >= 5) & (table["distance"].abs().between(500, 250_000))]
    best = table.groupby(["gene_id", "ccre"])[
        ["score", "prior", "association", "coupling", "power", "distance"]
    ].max()
    planted = pd.MultiIndex.from_frame(strong.links[["gene_id", "ccre"]])
    return best.assign(is_link=best.index.isin(planted))


def test_score_finds_planted_links(strong, strong_links):
    """A floor, so that a score without one of its parts, or with a wrong sign, is seen."""
    from cisformer.links.precision import average_precision

    pairs = judged(strong, strong_links)
    area = {
        name: average_precision(pairs["is_link"].to_numpy(), pairs[name].to_numpy())
        for name in pairs.columns[:4]
    }
    assert area["score"] > 1.15 * area["prior"], area
    assert area["score"] > 1.2 * max(area["association"], area["coupling"]), area
    assert area["association"] > 1.5 * pairs["is_link"].mean()
    links = pairs["is_link"]
    assert pairs["coupling"][links].mean() > pairs["coupling"][~links].mean() + 0.15


def test_type_specific_links_are_told(strong, strong_links):
    """Where a cCRE is open in several types, and the link works in some, specificity is higher there."""
    table = strong_links.table
    share = table["n_open"] / table["cell_type"].map(strong_links.cell_num)
    distal = strong.links[~strong.links["promoter"]]
    table = table[(share >= 0.05) & (table["power"] >= 5)].merge(
        distal[["gene_id", "ccre"]].drop_duplicates(), on=["gene_id", "ccre"]
    )
    planted = pd.MultiIndex.from_frame(distal[["gene_id", "ccre", "cell_type"]])
    table = table.assign(
        works=pd.MultiIndex.from_frame(table[["gene_id", "ccre", "cell_type"]]).isin(planted)
    )
    spread = table.groupby(["gene_id", "ccre"])["works"].transform("nunique")
    table = table[spread == 2]
    assert len(table) > 100
    assert table["specificity"][table["works"]].mean() > table["specificity"][~table["works"]].mean() + 0.2
    assert (table["specificity_se"] > 0).all()


def test_genes_and_region(checkpoint, store, types, links):
    names = links.table["gene_name"].unique()[[3, 7]]
    some = score_links(checkpoint, store, types, genes=list(names))
    assert set(some.table["gene_name"]) == set(names)
    wide = links.table.set_index(["cell_type", "gene_id", "ccre"])
    joined = some.table.set_index(["cell_type", "gene_id", "ccre"]).join(wide, rsuffix="_all")
    assert joined["score_all"].notna().all()
    np.testing.assert_allclose(joined["prior"], joined["prior_all"], rtol=1e-4)
    np.testing.assert_allclose(joined["p_value"], joined["p_value_all"], rtol=1e-3)
    row = links.table[links.table["gene_name"] == names[0]].iloc[0]
    gene = store.reference.genes.set_index("gene_id").loc[row["gene_id"]]
    near = score_links(checkpoint, store, types, region=f"{gene['chrom']}:{row['tss']}-{row['tss'] + 1}")
    assert names[0] in set(near.table["gene_name"])
    assert (near.table["tss"] == row["tss"]).all()
    with pytest.raises(InputError, match="no gene 'NOPE'"):
        score_links(checkpoint, store, types, genes=["NOPE"])
    with pytest.raises(InputError, match="not a region"):
        score_links(checkpoint, store, types, region="chr1")
    with pytest.raises(InputError, match="no gene to link"):
        score_links(checkpoint, store, types, region="chr1:1-2")


def test_a_model_that_attends_to_nothing_has_no_attention(checkpoint, store, types):
    """Before training all values are 0, and queries and keys are random."""
    model = copy.deepcopy(checkpoint.model)
    with torch.no_grad():
        model.cis.pair_value.weight.zero_()
    found = score_links(dataclasses.replace(checkpoint, model=model), store, types).table
    assert found["attention"].isna().all()
    assert found["effect"].notna().all()


def test_beyond_the_models_window_nothing_is_known(checkpoint, store, types):
    model = copy.deepcopy(checkpoint.model)
    windows = model.cis
    near = score_links(checkpoint, store, types, window_bp=20_000).table
    far = score_links(checkpoint, store, types, window_bp=400_000).table
    assert windows is not None
    assert near["attention"].notna().all()
    beyond = far["attention"].isna()
    assert beyond.any()
    assert far["effect"][beyond].isna().all()
    assert far["score"].notna().all()


@pytest.fixture(scope="module")
def scorer(checkpoint, store, types):
    from cisformer.links.inputs import LinkOptions
    from cisformer.links.scorer import prepare

    return prepare(checkpoint, store, types, LinkOptions(), "cpu")


def residual_correlation(design: np.ndarray, left: np.ndarray, right: np.ndarray) -> tuple[float, int]:
    """Correlate what least squares on `design` leaves of two columns; return r and the degrees of freedom."""
    design = np.column_stack([np.ones(len(design)), design])
    both = np.column_stack([left, right]).astype(float)
    rest = both - design @ np.linalg.lstsq(design, both, rcond=None)[0]
    return np.corrcoef(rest.T)[0, 1], len(design) - np.linalg.matrix_rank(design) - 1


def test_coupling_is_what_states_types_and_depths_leave(scorer, store, types):
    from scipy import stats

    cells, pairs, layout = scorer.cells, scorer.inputs.pairs, scorer.inputs.layout
    rows = np.concatenate([scorer.inputs.members[name] for name in cells.types])
    which = np.repeat(np.eye(len(cells.types)), cells.n_cells, axis=0)
    depths = [np.log1p(np.asarray(m.sum(axis=1))) for m in (store.rna(rows), store.atac(rows))]
    design = np.hstack([*depths, which[:, 1:], cells.states])
    expression = read_modality(store, rows, "rna")[:, layout.target_index].toarray()
    is_open = store.atac(rows)[:, layout.input_index].toarray()
    tested = np.flatnonzero(scorer.tests.coupling)
    for at in tested[:: len(tested) // 20]:
        r, free = residual_correlation(design, expression[:, pairs.gene[at]], is_open[:, pairs.ccre[at]])
        t = r * np.sqrt(free / (1 - r * r))
        z = np.sign(t) * stats.norm.isf(stats.t.sf(abs(t), free))
        assert scorer.tests.coupling[at] == pytest.approx(z, abs=1e-3)


def test_p_values_are_adjusted_for_the_depths_of_the_type(links, store, types):
    from scipy import stats

    part = links.types[0]
    rows = np.flatnonzero(types.reindex(store.barcodes).to_numpy() == part.cell_type)
    depths = np.hstack([np.log1p(np.asarray(m.sum(axis=1))) for m in (store.rna(rows), store.atac(rows))])
    expression, is_open = read_modality(store, rows, "rna"), store.atac(rows)
    tested = np.flatnonzero(~np.isnan(part.evidence["p_value"]))
    for at in tested[:: max(len(tested) // 20, 1)]:
        left = expression[:, part.gene[at]].toarray().ravel()
        right = is_open[:, part.ccre[at]].toarray().ravel()
        r, free = residual_correlation(depths, left, right)
        z = stats.norm.isf(stats.t.sf(abs(r) * np.sqrt(free / (1 - r * r)), free))
        skew = abs(stats.skew(left) * stats.skew(right)) / len(left) ** 0.5
        p = stats.pearson3.sf(z, skew) + stats.pearson3.cdf(-z, skew)
        assert part.evidence["p_value"][at] == pytest.approx(p, rel=1e-2, abs=1e-6)


def test_attention_is_the_mean_rank_over_the_types_cells(links, checkpoint, store, types):
    """Ranks of each cell by pandas, summed over the cells in which the cCRE is open, over all cells of the type."""
    part, layout = links.types[0], checkpoint.layout
    rows = np.flatnonzero(types.reindex(store.barcodes).to_numpy() == part.cell_type)
    total: dict[tuple[int, int], float] = {}
    for row in rows:
        batch = encode_input(read_modality(store, np.array([row]), "atac"), layout, None, None)
        [edges] = checkpoint.model.cis_attention(batch)
        frame = pd.DataFrame(
            {"gene": edges.gene.numpy(), "ccre": edges.ccre.numpy(), "w": edges.weight.mean(dim=1).numpy()}
        )
        both = frame.groupby("gene")["w"].rank(pct=True) + frame.groupby("ccre")["w"].rank(pct=True)
        both = (both - both.min()) / (both.max() - both.min())
        for gene, ccre, rank in zip(frame["gene"], frame["ccre"], both, strict=True):
            total[gene, ccre] = total.get((gene, ccre), 0.0) + rank
    gene = np.searchsorted(layout.target_index, part.gene)
    ccre = np.searchsorted(layout.input_index, part.ccre)
    wanted = [total.get(pair, 0.0) / len(rows) for pair in zip(gene, ccre, strict=True)]
    np.testing.assert_allclose(part.evidence["attention"], wanted, rtol=1e-4, atol=1e-6)


def test_specificity_compares_with_the_mean_of_other_types(scorer):
    scores = [scorer.scorer.of_type(number) for number in range(len(scorer.cells.types))]
    specificity, error = scorer.scorer.specificity(scores[0])
    others = np.mean([score.own for score in scores[1:]], axis=0)
    np.testing.assert_allclose(specificity, scores[0].own - others, atol=1e-8)
    spread = sum(score.variance for score in scores[1:]) / (len(scores) - 1) ** 2
    np.testing.assert_allclose(error, np.sqrt(scores[0].variance + spread))


def test_each_pass_reads_each_cell_once(checkpoint, store, types, monkeypatch):
    """Three passes for ATAC, two for RNA; nothing is read when an attribute is touched."""
    read = {"rna": 0, "atac": 0}
    for name in read:
        original = getattr(CellStore, name)

        def counted(self, rows, name=name, original=original):
            read[name] += len(rows)
            return original(self, rows)

        monkeypatch.setattr(CellStore, name, counted)
    from cisformer.links.inputs import LinkOptions
    from cisformer.links.scorer import prepare

    n_cells = int(types.index.isin(store.barcodes).sum())
    scorer = prepare(checkpoint, store, types, LinkOptions(), "cpu")
    assert read == {"rna": 2 * n_cells, "atac": 2 * n_cells}
    _ = scorer.shared, scorer.tests, scorer.cells, scorer.scorer, scorer.cell_num
    assert read == {"rna": 2 * n_cells, "atac": 2 * n_cells}
    list(scorer.types())
    assert read == {"rna": 2 * n_cells, "atac": 3 * n_cells}
