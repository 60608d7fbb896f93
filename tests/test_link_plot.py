"""Figures of links: what is drawn, and in which formats."""

import numpy as np
import pytest

from cisformer.errors import InputError
from cisformer.links.files import COMPONENTS, Links, TypeLinks
from cisformer.links.plot import plot_links


@pytest.fixture(scope="module")
def links(tiny):
    """One gene with links to the five nearest cCREs, in two types."""
    from cisformer.data.own_reference import dataset_reference

    reference = dataset_reference(tiny.rna.var, tiny.atac.var)
    genes, ccres = reference.genes, reference.ccres
    near = np.flatnonzero(ccres["chrom"] == genes["chrom"][7])
    near = np.sort(near[np.argsort(np.abs(ccres["start"][near] - genes["start"][7]), kind="stable")[:5]])
    types = []
    for number, name in enumerate(("B cell", "NK")):
        evidence = {key: np.full(5, 2.0, np.float32) for key in COMPONENTS}
        evidence["score"] = np.linspace(0.1, 0.9, 5).astype(np.float32)
        gene = np.full(5, 7)
        types.append(TypeLinks(name, 10 + number, gene, near, np.arange(5), evidence))
    return Links(reference, 250_000, types, {"B cell": 10, "NK": 11})


def arcs(axes) -> list:
    return [line for line in axes.lines if len(line.get_xdata()) > 2]


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_figure_files(links, tmp_path, suffix):
    gene = links.reference.genes["gene_name"][7]
    for name in ("a", "b"):
        plot_links(links, gene, output=tmp_path / f"{name}{suffix}")
    content = (tmp_path / f"a{suffix}").read_bytes()
    assert content.startswith({".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix])
    assert content == (tmp_path / f"b{suffix}").read_bytes()
    if suffix == ".svg":
        assert gene.encode() in content
        assert b"B cell" in content


def test_a_track_per_type_and_an_arc_per_link(links):
    gene = links.reference.genes["gene_name"][7]
    figure = plot_links(links, gene)
    first, second = figure.axes[0], figure.axes[1]
    assert [text.get_text() for text in first.texts][:2] == ["B cell", "10 cells"]
    assert len(arcs(first)) == len(arcs(second)) == 5
    assert len(arcs(plot_links(links, gene, top=2).axes[0])) == 2
    assert len(arcs(plot_links(links, gene, min_score=0.5).axes[0])) == 3
    one = plot_links(links, gene, cell_types=["NK"])
    assert one.axes[0].texts[0].get_text() == "NK"
    heights = [bar.get_height() for bar in first.patches]
    assert max(heights) == pytest.approx(1)


def test_region(links):
    gene = links.reference.genes.iloc[7]
    start, end = gene["start"] - 1_000, gene["end"] + 2_000
    figure = plot_links(links, gene["gene_id"], region=f"{gene['chrom']}:{start}-{end}")
    assert figure.axes[0].get_xlim() == (start, end)
    with pytest.raises(InputError, match="does not touch"):
        plot_links(links, gene["gene_id"], region="chrZ:1-100")


def test_gene_without_links(links):
    other = next(i for i in range(links.reference.n_genes) if i != 7)
    assert arcs(plot_links(links, links.reference.genes["gene_id"][other]).axes[0]) == []


def test_wrong_format(links, tmp_path):
    with pytest.raises(InputError, match="cannot write a figure"):
        plot_links(links, "x", output=tmp_path / "a.gif")
