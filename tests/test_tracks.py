"""Mean accessibility per group, and the browser tracks made of it."""

from xml.etree import ElementTree

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from cisformer.errors import InputError, OutputExistsError
from cisformer.prediction.groups import group_accessibility
from cisformer.prediction.predict import predict
from cisformer.prediction.tracks import write_tracks

pybigtools = pytest.importorskip("pybigtools", reason="bigWig files need the extra tracks")


def shares(adata: ad.AnnData) -> pd.DataFrame:
    """Share of open cells per cell type, by hand."""
    return pd.DataFrame((adata.X.toarray() > 0).astype(float), columns=adata.var_names).groupby(
        adata.obs["cell_type"].astype(str).to_numpy()
    ).mean()  # fmt: skip


def read_bigwig(path, chrom: str, start: int, end: int) -> float:
    """Return the mean value of a region, by the independent reader."""
    pyBigWig = pytest.importorskip("pyBigWig", reason="an independent reader of bigWig files")
    with pyBigWig.open(str(path)) as file:
        return file.stats(chrom, start, end, exact=True)[0] or 0.0


def test_measured_shares_are_those_of_a_pandas_groupby(tiny):
    found = group_accessibility(tiny.atac, "cell_type")
    wanted = shares(tiny.atac)
    assert found.groups.index.tolist() == wanted.index.tolist()
    np.testing.assert_allclose(found.accessibility, wanted.to_numpy(), atol=1e-6)


def test_full_and_compact_predictions_give_the_same_means(tiny, tiny_checkpoints, tmp_path):
    rna = tiny.rna[:50].copy()
    full = predict(tiny_checkpoints["rna2atac"], rna, output=tmp_path / "f.h5ad", compact=False)
    compact = predict(tiny_checkpoints["rna2atac"], rna, output=tmp_path / "c.h5ad", compact=True)
    one, other = (group_accessibility(path, "cell_type") for path in (full, compact))
    np.testing.assert_allclose(one.accessibility, other.accessibility, atol=1e-6)
    assert 0 < one.accessibility.max() < 1


def test_bigwigs_hold_the_pseudobulk(tiny, tmp_path):
    folder = write_tracks(tiny.atac, tmp_path / "tracks", groupby="cell_type", genome="hg38")
    wanted = shares(tiny.atac)
    for name in wanted.index:
        path = folder / f"{name.replace(chr(32), chr(95))}.bw"
        for region in tiny.atac.var_names[::100]:
            chrom, place = region.split(":")
            start, end = map(int, place.split("-"))
            assert read_bigwig(path, chrom, start, end) == pytest.approx(wanted.loc[name, region], abs=1e-6)


def test_hub_and_session_name_every_file(tiny, tmp_path):
    tiny_atac = tiny.atac.copy()
    names = dict(
        zip(sorted(tiny_atac.obs["cell_type"].astype(str).unique()), ["a/b c", "A_b_c", "1.10"], strict=True)
    )
    tiny_atac.obs["label"] = tiny_atac.obs["cell_type"].astype(str).map(names)
    folder = write_tracks(tiny_atac, tmp_path / "t", groupby="label", genome="hg38")
    files = sorted(path.name for path in folder.glob("*.bw"))
    assert len({name.lower() for name in files}) == 3
    hub = (folder / "hub.txt").read_text()
    assert "genome hg38" in hub
    assert sorted(line.split()[-1] for line in hub.splitlines() if "bigDataUrl" in line) == files
    session = ElementTree.parse(folder / "igv_session.xml").getroot()
    assert sorted(r.get("path") for r in session.iter("Resource")) == files
    assert {track.get("name") for track in session.iter("Track")} == set(names.values())


def test_overlapping_peaks_show_the_larger_value(tmp_path):
    var = pd.DataFrame(index=["chr1:100-200", "chr1:150-300", "chr1:160-170", "chr2:0-50"])
    cells = sp.csr_matrix(np.array([[1, 1, 0, 0], [0, 1, 1, 1]]))
    adata = ad.AnnData(cells.astype(np.float32), pd.DataFrame({"t": ["x", "x"]}, index=["a", "b"]), var)
    folder = write_tracks(adata, tmp_path / "t", groupby="t", genome="hg38")
    for place, value in {(100, 150): 0.5, (150, 200): 1.0, (200, 300): 1.0}.items():
        assert read_bigwig(folder / "x.bw", "chr1", *place) == pytest.approx(value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.X.__imul__(2.5), "neither a count nor a probability"),
        (lambda a: a.X.__imul__(-1), "negative or missing"),
    ],
)
def test_values_that_are_no_accessibility_are_refused(change, message, tiny):
    adata = tiny.atac[:20].copy()
    adata.X = adata.X.astype(np.float32)
    change(adata)
    with pytest.raises(InputError, match=message):
        group_accessibility(adata, "cell_type")


def test_what_is_missing_is_said_before_anything_is_written(tiny, tmp_path):
    with pytest.raises(InputError, match="which genome"):
        write_tracks(tiny.atac, tmp_path / "t", groupby="cell_type")
    with pytest.raises(InputError, match="no column 'nothing'"):
        write_tracks(tiny.atac, tmp_path / "t", groupby="nothing", genome="hg38")
    (tmp_path / "sizes").write_text("chr10\t5\n")
    with pytest.raises(InputError, match="where a region ends at"):
        write_tracks(
            tiny.atac, tmp_path / "t", groupby="cell_type", genome="hg38", chrom_sizes=tmp_path / "sizes"
        )
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "precious").touch()
    with pytest.raises(OutputExistsError):
        write_tracks(tiny.atac, tmp_path / "t", groupby="cell_type", genome="hg38")
