"""Features brought onto a reference, held to brute force."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from cisformer.config import Modality
from cisformer.data.alignment import accept_map, describe_genes, map_genes, map_peaks
from cisformer.data.genome import region_names
from cisformer.data.reference import Reference, load_reference
from cisformer.data.sources import open_rows
from cisformer.errors import InputError

HUMAN = load_reference("human")


def tiny_reference() -> Reference:
    genes = pd.DataFrame(
        {
            "gene_id": ["ENSG00000000001", "ENSG00000000002", "ENSG00000000003"],
            "gene_name": ["AAA", "C1orf5", "CCC"],
            "chrom": "chr1", "start": [1, 2, 3], "end": [9, 9, 9], "strand": "+",
        }
    )  # fmt: skip
    ccres = pd.DataFrame(
        {
            "chrom": ["chr1", "chr1", "chr2", "chr1"],
            "start": [100, 150, 100, 300],
            "end": [200, 250, 200, 310],
        }
    )
    return Reference("own", "", genes, ccres)


def rna(names: list[str], counts: list[list[int]], **var: list) -> ad.AnnData:
    obs = pd.DataFrame(index=[f"c{i}" for i in range(len(counts))])
    return ad.AnnData(sp.csr_matrix(np.array(counts, np.float32)), obs, pd.DataFrame(var, index=names))


def align(adata: ad.AnnData, modality: Modality, reference: Reference) -> sp.csr_matrix:
    """Align all cells of an AnnData, as preprocessing and prediction align blocks of them."""
    find = map_genes if modality == "rna" else map_peaks
    with open_rows(adata, modality) as source:
        found = find(source.var, reference)
        accept_map(found, source.var, reference, source.label)
        return found.apply(source.rows(0, source.n_cells))


@pytest.mark.parametrize(
    "names",
    [
        ["AAA", "C1orf5", "CCC"],
        ["aaa", "c1orf5", "ccc"],
        ["AAA", "C1ORF5", "CCC"],
        ["ENSG00000000001.12", "ENSG00000000002", "ENSG00000000003.1"],
        ["ENSG00000000001", "c1orf5", "CCC"],
    ],
)
def test_genes_are_found_by_whatever_names_them(names: list[str]):
    aligned = align(rna(names[::-1], [[1, 0, 3], [0, 5, 0]]), "rna", tiny_reference())
    assert aligned.toarray().tolist() == [[3, 0, 1], [0, 5, 0]]


def test_ids_in_a_column_come_before_names():
    adata = rna(["CCC", "x"], [[4, 7]], gene_ids=["ENSG00000000001.2", "ENSG00000000002"])
    assert align(adata, "rna", tiny_reference()).toarray().tolist() == [[4, 7, 0]]


def test_genes_given_twice_are_summed_and_noted():
    found = map_genes(pd.DataFrame(index=["AAA", "ENSG00000000001", "nobody"]), tiny_reference())
    assert (found.n_found, found.n_features) == (2, 3)
    assert any("more than once" in note for note in found.notes)
    cells = sp.csr_matrix(np.array([[2, 3, 9]], np.float32))
    assert found.apply(cells).toarray().tolist() == [[5, 0, 0]]


def test_mouse_symbols_are_not_taken_for_human_ones():
    mouse = load_reference("mouse").genes["gene_name"].iloc[::40]
    adata = rna(mouse.tolist(), np.ones((1, len(mouse)), int).tolist())
    assert map_genes(adata.var, load_reference("mouse")).share_found > 0.99
    with pytest.raises(InputError, match="look like mouse gene symbols") as caught:
        align(adata, "rna", HUMAN)
    assert caught.value.hint == "use --reference mouse"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["ENSMUSG00000051951.1", "ENSMUSG00000025900"], ("mouse Ensembl ids", "mouse")),
        (["ENSG00000223972", "ENSG00000278267.5"], ("human Ensembl ids", "human")),
        (["ENSDARG00000000001", "ENSDARG00000000002"], ("other Ensembl ids", "")),
        (["CD8A", "HLA-DRA", "C1orf112"], ("human gene symbols", "human")),
        (["Cd8a", "H2-Aa", "1700001C19Rik", "Actb"], ("mouse gene symbols", "mouse")),
        (["cd8a", "actb"], ("gene symbols", "")),
    ],
)
def test_genes_are_described(names: list[str], expected: tuple[str, str]):
    assert describe_genes(pd.Series(names)) == expected


def test_peaks_open_every_ccre_they_touch():
    peaks = ["chr1:199-200", "chr1:140-160", "chr1:200-300", "1:305-400", "chr2:0-100", "chr2:199-500"]
    found = map_peaks(pd.DataFrame(index=peaks), tiny_reference())
    expected = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0]]
    assert found.matrix.toarray().tolist() == expected


def test_a_peak_that_is_a_ccre_opens_that_one_alone():
    found = map_peaks(pd.DataFrame(index=["chr1:100-200", "chr1:100-201"]), tiny_reference())
    assert found.matrix.toarray().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0]]


def test_aligned_atac_is_binary_sorted_and_without_zeros():
    cells = sp.csr_matrix((np.array([5.0, 0, 2], np.float32), ([0, 0, 1], [0, 1, 2])), shape=(2, 3))
    adata = ad.AnnData(cells, var=pd.DataFrame(index=["chr1:100-260", "chr2:150-160", "chr1-300-301"]))
    aligned = align(adata, "atac", tiny_reference())
    assert aligned.toarray().tolist() == [[1, 1, 0, 0], [0, 0, 0, 1]]
    assert aligned.nnz == 3
    assert aligned.has_sorted_indices
    assert aligned.dtype == np.float32


def test_other_spellings_of_peaks_are_noted():
    assert (
        "read as chrom:start-end"
        in map_peaks(pd.DataFrame(index=["chr1-300-301"]), tiny_reference()).notes[0]
    )


def test_peaks_of_another_genome_are_refused():
    mouse = load_reference("mouse").ccres.iloc[::200]
    adata = ad.AnnData(sp.csr_matrix((2, len(mouse))), var=pd.DataFrame(index=region_names(mouse)))
    with pytest.raises(InputError, match=r"that is by chance.*look like mm39") as caught:
        align(adata, "atac", HUMAN)
    assert caught.value.hint == "use --reference mouse"


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_alignment_agrees_with_brute_force_in_any_order(seed: int):
    rng = np.random.default_rng(seed)
    reference = tiny_reference()
    start = 2 * rng.choice(np.arange(25, 175), 12, replace=False) + 1  # odd: no peak is a cCRE itself
    peaks = pd.DataFrame(
        {"chrom": rng.choice(["chr1", "chr2"], 12), "start": start, "end": start + rng.integers(1, 120, 12)}
    )
    matrix = sp.random(6, 12, 0.4, "csr", random_state=seed % 1000, data_rvs=lambda n: rng.integers(1, 4, n))
    matrix, var = sp.csr_matrix(matrix.astype(np.float32)), pd.DataFrame(index=region_names(peaks))
    expected = np.zeros((6, 4))
    for cell, peak in zip(*matrix.nonzero(), strict=True):
        for j, ccre in enumerate(reference.ccres.itertuples()):
            p = peaks.iloc[peak]
            if p.chrom == ccre.chrom and p.start < ccre.end and ccre.start < p.end:
                expected[cell, j] = 1
    assert np.array_equal(map_peaks(var, reference).apply(matrix).toarray(), expected)
    cells, features = rng.permutation(6), rng.permutation(12)
    aligned = map_peaks(var.iloc[features], reference).apply(matrix[cells][:, features])
    assert np.array_equal(aligned.toarray(), expected[cells])


def test_chromosomes_that_the_reference_lacks_are_said():
    reference = load_reference("human")
    names = ["chr1:104896-105048", "chrX:100-600", "chrX:900-1400", "chrM:5-500"]
    found = map_peaks(pd.DataFrame(index=names), reference)
    assert found.n_found == 1
    note = next(note for note in found.notes if "lacks" in note)
    assert "3 peaks" in note
    assert "chrX 2, chrM 1" in note
    assert "--reference dataset" in note
    genes = pd.DataFrame({"interval": ["chr1:11868-14412", "chrX:100-600"]}, index=["DDX11L1", "XIST"])
    assert any("1 genes lie" in note and "chrX 1" in note for note in map_genes(genes, reference).notes)
    assert not [note for note in map_peaks(pd.DataFrame(index=names[:1]), reference).notes if "lacks" in note]
