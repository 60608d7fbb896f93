"""A mosaic is completed in one command; what was measured and what was predicted cannot be taken for each other."""

import re
import shutil
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from formats import damage

from cisformer.data.batches import normalise_rna
from cisformer.errors import InputError, OutputExistsError
from cisformer.model.checkpoint import load_checkpoint
from cisformer.prediction.compact import compact_of
from cisformer.prediction.complete import _warn_of_unpaired_groups, complete
from cisformer.prediction.mosaic import complete_side, join_sides, read_mosaic
from cisformer.prediction.predict import predict
from cisformer.simulation import simulate

mudata = pytest.importorskip("mudata")
N_CELLS, N_PAIRED = 1500, 300


@pytest.fixture(scope="module")
def truth():
    return simulate(n_cells=N_CELLS, n_genes=300, n_ccres=1500, n_types=3, seed=5)


@pytest.fixture(scope="module")
def cells(truth):
    """Barcodes by what is left of them: a fifth has both, the others one."""
    names = np.random.default_rng(0).permutation(truth.rna.obs_names)
    return {"both": names[:N_PAIRED], "rna": names[N_PAIRED:900], "atac": names[900:]}


def write(path, rna, atac, **others):
    with mudata.set_options(pull_on_update=False):
        mudata.MuData({"rna": rna.copy(), "atac": atac.copy(), **others}).write(path)
    return path


def read(path):
    with mudata.set_options(pull_on_update=False):
        return mudata.read_h5mu(path)


def mosaic_of(truth, cells):
    """Return the RNA and ATAC that are left, in an order of their own."""
    rng = np.random.default_rng(1)
    rna = truth.rna[rng.permutation(np.r_[cells["both"], cells["rna"]])].copy()
    return rna, truth.atac[rng.permutation(np.r_[cells["both"], cells["atac"]])].copy()


@pytest.fixture(scope="module")
def path(truth, cells, tmp_path_factory):
    rna, atac = mosaic_of(truth, cells)
    rna.layers["doubled"] = rna.X * 2
    rna.obs["flag"] = True
    return write(tmp_path_factory.mktemp("mosaic") / "x.h5mu", rna, atac)


@pytest.fixture(scope="module")
def done(path, command):
    """The folder of a completion by the command."""
    folder = path.parent / "out"
    ran = command("complete", path, "-o", folder, "--groupby", "cell_type", "--epochs", "1")
    assert ran.returncode == 0, ran.stderr
    assert f"wrote {folder / 'completed.h5mu'}" in ran.stdout
    return folder


@pytest.fixture(scope="module")
def whole(done):
    return read(done / "completed.h5mu")


def test_every_cell_has_both_and_which_is_measured_is_marked(whole, truth, cells):
    assert set(whole.obs_names) == set(truth.rna.obs_names)
    for name, other in (("rna", "atac"), ("atac", "rna")):
        side = whole[name]
        assert side.n_obs == N_CELLS
        assert set(side.obs_names[side.obs["measured"]]) == {*cells["both"], *cells[name]}
        assert set(whole.obs_names[whole.obs["measured"] == other]) == set(cells[other])
        assert side.var["seen_in_training"].mean() > 0.8
    assert whole.uns["cisformer"]["n_paired"] == N_PAIRED
    types = truth.rna.obs["cell_type"]
    assert (whole.obs["cell_type"].astype(str) == types.reindex(whole.obs_names).astype(str)).all()


def test_measured_and_predicted_never_share_a_matrix(whole):
    for name, unit in (("rna", "log1p(counts per 10,000)"), ("atac", "probability of being open")):
        side = whole[name]
        assert side.X is None
        measured = side.obs["measured"].to_numpy()
        filled = {layer: np.diff(sp.csr_matrix(side.layers[layer]).indptr) > 0 for layer in side.layers}
        assert np.array_equal(filled["measured"], measured)
        assert np.array_equal(filled["predicted"], ~measured)
        assert np.isnan(side.obsm["X_cisformer"]).all(axis=1).tolist() == measured.tolist()
        assert side.uns["cisformer"]["predicted_unit"] == unit
        assert side.uns["cisformer"]["predicted_in"] == "layers['predicted']"


def test_measured_values_are_as_they_were(whole, path):
    before = read(path)
    for name in ("rna", "atac"):
        then, now = before[name], whole[name][before[name].obs_names]
        assert now.layers["measured"].dtype == then.X.dtype
        assert (now.layers["measured"] != then.X).nnz == 0
        assert now.var_names.equals(then.var_names)
    doubled = whole["rna"][before["rna"].obs_names].layers["measured_doubled"]
    assert (doubled != before["rna"].layers["doubled"]).nnz == 0
    assert whole["rna"].obs["flag"].sum() == before["rna"].n_obs


def test_the_prediction_beats_the_mean_profile_on_the_hidden_truth(whole, truth, cells):
    """Even that of all measured cells, of which the models know the paired fifth; on what can be predicted."""
    hidden, seen = cells["atac"], whole["rna"].var["seen_in_training"].to_numpy()
    known = np.r_[cells["both"], cells["rna"]]
    expression, measured = (
        normalise_rna(sp.csr_matrix(truth.rna[c].X)).toarray()[:, seen] for c in (hidden, known)
    )
    predicted = whole["rna"][hidden].layers["predicted"].toarray()[:, seen]
    mean = measured.mean(axis=0)
    assert np.square(expression - predicted).mean() < 0.97 * np.square(expression - mean).mean()

    hidden, seen = cells["rna"], whole["atac"].var["seen_in_training"].to_numpy()
    known = np.r_[cells["both"], cells["atac"]]
    is_open, measured = (sp.csr_matrix(truth.atac[c].X).toarray()[:, seen] > 0 for c in (hidden, known))
    predicted = np.clip(whole["atac"][hidden].layers["predicted"].toarray()[:, seen], 1e-6, 1 - 1e-6)
    mean = np.broadcast_to(np.clip(measured.mean(axis=0), 1e-3, 1 - 1e-3), is_open.shape)
    assert log_loss(is_open, predicted) < 0.995 * log_loss(is_open, mean)


def without(rna, barcodes):
    """Return a copy whose rows of these cells are all zero."""
    rna = rna.copy()
    rna.X = sp.csr_matrix(sp.diags_array((~rna.obs_names.isin(barcodes)).astype(np.float32)) @ rna.X)
    return rna


def log_loss(is_open, probability):
    return -np.log(np.where(is_open, probability, 1 - probability)).mean()


def test_a_second_call_does_nothing_again_and_other_options_are_refused(done, path, monkeypatch):
    def never(*_args, **_options):
        raise AssertionError("trained again")

    monkeypatch.setattr("cisformer.prediction.complete.train", never)
    before = (done / "completed.h5mu").stat().st_mtime_ns
    complete(path, done, groupby="cell_type", epochs=1)
    assert (done / "completed.h5mu").stat().st_mtime_ns == before
    with pytest.raises(OutputExistsError, match="--seed"):
        complete(path, done, groupby="cell_type", epochs=1, seed=1)
    (done / "completed.h5mu").unlink()  # the last step alone is done again
    complete(path, done, groupby="cell_type", epochs=1)
    assert (done / "completed.h5mu").is_file()


def test_a_large_prediction_stays_compact(path, done):
    """Its factors stand in the modality; a row times the loadings is the logit."""
    checkpoint = load_checkpoint(next((done / "models").glob("*rna2atac")))
    mosaic = read_mosaic(path)
    lacking = mosaic.side("rna")[mosaic.lacking("atac")].copy()
    full, compact = (predict(checkpoint, lacking, compact=form) for form in (False, True))
    side = complete_side(mosaic, "atac", compact, checkpoint.reference)
    assert "predicted" not in side.layers
    part = compact_of(side[~side.obs["measured"]].copy(), "part")
    wanted = complete_side(mosaic, "atac", full, checkpoint.reference)
    wanted = wanted[~wanted.obs["measured"]].layers["predicted"].toarray()
    assert np.allclose(part.toarray(), wanted, atol=1e-6)


# ---------------------------------------------------------------- what cannot be completed


def test_too_few_paired_cells_and_how_many_are_wanted(truth, cells, tmp_path):
    rna, atac = mosaic_of(truth, {**cells, "both": cells["both"][:20]})
    with pytest.raises(InputError, match=r"20 of 1,220 cells .* wanted at least 50"):
        complete(write(tmp_path / "x.h5mu", rna, atac), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_paired_cell_tells_how_barcodes_differ(truth, tmp_path):
    atac = truth.atac[:60].copy()
    atac.obs_names = atac.obs_names.str.removesuffix("-1")
    with pytest.raises(InputError, match=r"no cell in .* has both") as caught:
        complete(write(tmp_path / "x.h5mu", truth.rna[:60], atac), tmp_path / "out")
    assert "written in two ways" in caught.value.hint


def test_nothing_lacks(truth, tmp_path):
    with pytest.raises(InputError, match=r"all 1,500 cells .* nothing is to be completed"):
        complete(write(tmp_path / "x.h5mu", truth.rna, truth.atac), tmp_path / "out")


def test_cells_with_neither_modality(truth, tmp_path):
    rna, atac = without(truth.rna, truth.rna.obs_names[[5, 250]]), truth.atac[:200].copy()
    with pytest.raises(
        InputError, match=f"1 of 1,500 cells .* neither RNA nor ATAC, such as {rna.obs_names[250]}"
    ):
        complete(write(tmp_path / "x.h5mu", rna, atac), tmp_path / "out")


def test_rows_without_counts_count_as_lacking(truth, cells, tmp_path):
    """As of a mosaic padded with zeros."""
    mosaic = read_mosaic(write(tmp_path / "x.h5mu", without(truth.rna, cells["atac"]), truth.atac))
    assert set(mosaic.lacking("rna")) == set(cells["atac"])
    assert len(mosaic.lacking("atac")) == 0


def test_a_modality_missing_another_file_or_a_damaged_one(truth, path, tmp_path):
    with mudata.set_options(pull_on_update=False):
        mudata.MuData({"rna": truth.rna.copy()}).write(tmp_path / "rna.h5mu")
    with pytest.raises(InputError, match="no ATAC modality"):
        complete(tmp_path / "rna.h5mu", tmp_path / "out")
    truth.rna.write_h5ad(tmp_path / "rna.h5ad")
    with pytest.raises(InputError, match=r"is h5ad; wanted an \.h5mu"):
        complete(tmp_path / "rna.h5ad", tmp_path / "out")
    shutil.copy(path, tmp_path / "cut.h5mu")
    damage(tmp_path / "cut.h5mu")
    with pytest.raises(InputError, match="damaged"):
        complete(tmp_path / "cut.h5mu", tmp_path / "out")


def test_groups_without_paired_cells_are_named(truth, path, tmp_path, caplog):
    types = truth.rna.obs["cell_type"]
    atac = truth.atac[(types != types.iloc[0]).to_numpy()]
    with pytest.raises(InputError, match="has no annotation 'nothing'"):
        complete(path, tmp_path / "out", groupby="nothing")
    mosaic = read_mosaic(write(tmp_path / "x.h5mu", truth.rna, atac))
    _warn_of_unpaired_groups(mosaic, {"cell_type": mosaic.column("cell_type")})
    assert f"both modalities, so models are not trained on them: {types.iloc[0]}" in caplog.text


def test_other_modalities_stay(truth, cells, tmp_path):
    rna, atac = mosaic_of(truth, cells)
    protein = ad.AnnData(np.ones((5, 2), np.float32), obs=rna.obs.iloc[:5].copy())
    mosaic = read_mosaic(write(tmp_path / "x.h5mu", rna, atac, prot=protein))
    sides = {name: complete_side(mosaic, name, None, None) for name in ("rna", "atac")}
    assert join_sides(mosaic, sides, {})["prot"].shape == (5, 2)


@pytest.mark.filterwarnings("ignore:Some cells have zero counts")  # those that were predicted
def test_the_page_makes_one_matrix_of_both(done, monkeypatch):
    """Its code runs as it stands, and fills every row once."""
    pytest.importorskip("scanpy")
    page = (Path(__file__).resolve().parents[1] / "docs" / "sharing.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    monkeypatch.chdir(done.parent)
    (done.parent / "completed").symlink_to(done)
    names: dict = {}
    with mudata.set_options(pull_on_update=False):
        exec(compile(code, "sharing.md", "exec"), names)
    assert (np.diff(names["rna"].X.indptr) > 0).all()
