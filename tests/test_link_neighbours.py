"""What a small data set hides from the prior: genes that it lacks, and breadth that few counts cannot tell."""

import numpy as np
import pandas as pd

from cisformer.data.known_genomes import load_annotation
from cisformer.data.reference import Reference
from cisformer.links.measure import CellSums
from cisformer.links.prior import UNKNOWN_BREADTH, count_between
from cisformer.links.shared import _breadth, _genes_of_genome

CCRES = pd.DataFrame({"chrom": ["chr1"], "start": [1000], "end": [1500]})


def few_genes(genome: str, chrom: str = "chr1") -> Reference:
    """Two genes of chromosome 1 that lie 1 Mb apart."""
    known = load_annotation("hg38")
    near = known[(known["chrom"] == "chr1") & known["start"].between(1_000_000, 2_000_000)]
    return Reference("dataset", genome, near.iloc[[0, -1]].assign(chrom=chrom).reset_index(drop=True), CCRES)


def between(reference: Reference, chrom: str) -> int:
    genes = _genes_of_genome(reference)
    return int(count_between(genes, np.array([chrom]), np.array([1_100_000]), np.array([1_900_000]))[0])


def test_genes_that_the_data_lack_lie_between_gene_and_ccre():
    assert between(few_genes("hg38"), "chr1") > 20
    assert between(few_genes("hg38", "1"), "1") > 20


def test_genes_with_which_the_prior_was_not_fitted_are_left_out():
    """A data set with all genes of GENCODE has the neighbours that the built-in reference has."""
    every = Reference("dataset", "hg38", load_annotation("hg38", every_gene=True), CCRES)
    assert _genes_of_genome(every)["gene_id"].tolist() == load_annotation("hg38")["gene_id"].tolist()


def test_an_unknown_genome_has_its_own_genes_only():
    assert between(few_genes(""), "chr1") == 0


def test_breadth_of_few_counts_is_that_of_an_unknown_gene():
    few, many = np.array([[1.0, 0], [0, 0], [0, 0]]), np.array([[1e4, 1e4], [0, 1e4], [0, 1e4]])
    counts = np.hstack([few[:, :1], many])  # one count, many in one type, many in all types
    nothing = np.zeros((3, 0))
    cells = CellSums(["a", "b", "c"], np.full(3, 50), nothing, nothing, counts, counts, nothing)
    once, narrow, broad = _breadth(cells)
    assert abs(once - UNKNOWN_BREADTH) < 0.02
    assert narrow < 0.5 < 0.9 < broad
