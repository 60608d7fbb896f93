"""Names of files, cell types, and one gene out of many."""

import pickle

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cisformer.errors import InputError
from cisformer.links.files import COMPONENTS, Links, TypeLinks, kbp, read_cell_types, safe_name
from cisformer.links.gene import find_gene, gene_links, read_gene_links


@pytest.fixture(scope="module")
def links(tiny):
    from cisformer.data.own_reference import dataset_reference

    reference = dataset_reference(tiny.rna.var, tiny.atac.var)
    rng = np.random.default_rng(0)
    types = []
    for name in ("a", "b"):
        pair = np.unique(rng.integers(0, reference.n_genes * reference.n_ccres, 300))
        gene, ccre = np.divmod(pair, reference.n_ccres)
        evidence = {key: rng.random(len(pair)).astype(np.float32) for key in ("score", *COMPONENTS)}
        types.append(TypeLinks(name, 10, gene, ccre, rng.integers(-9, 9, len(pair)), evidence))
    return Links(reference, 250_000, types, {"a": 10, "b": 10, "c": 0})


def test_distance_in_names():
    assert [kbp(bp) for bp in (250_000, 1_000_000, 1_500, 200)] == ["250kbp", "1000kbp", "1.5kbp", "0.2kbp"]


@given(st.text(min_size=1))
def test_any_name_is_a_safe_file_name(name):
    safe = safe_name(name)
    assert safe
    assert not set(safe) & set('/\\:*?"<>|\0\n\t')
    assert not safe.startswith((".", " "))
    assert len(safe.encode()) <= 140


@given(st.lists(st.text(min_size=1, max_size=5), unique=True, max_size=8))
def test_safe_names_are_different(names):
    safe: list[str] = []
    for name in names:
        safe.append(safe_name(name, safe))
    assert len({name.casefold() for name in safe}) == len(names)


def test_ordinary_names_stay():
    assert [safe_name(n) for n in ("CD4-intermediate", "CD14 Mono", "γδ T")] == [
        "CD4-intermediate",
        "CD14 Mono",
        "γδ T",
    ]
    assert safe_name("B cell", ["b Cell"]) != "B cell"


def test_written_links_of_a_gene_are_those_in_memory(links, tmp_path):
    links.write(tmp_path)
    assert pickle.loads((tmp_path / "cell_num.pkl").read_bytes()) == links.cell_num
    gene = links.reference.genes["gene_name"][int(links.types[0].gene[0])]
    memory, disk = gene_links(links, gene), read_gene_links(tmp_path, gene)
    assert (memory.chrom, memory.start, memory.end, memory.tss) == (
        disk.chrom,
        disk.start,
        disk.end,
        disk.tss,
    )
    assert disk.n_cells == {"a": 10, "b": 10}
    for name in "ab":
        pd.testing.assert_frame_equal(
            memory.tables[name], disk.tables[name][memory.tables[name].columns], check_dtype=False
        )
    assert len(memory.tables["a"]) > 0
    assert list(disk.select(["b"]).tables) == ["b"]
    with pytest.raises(InputError, match="cell type 'z'"):
        disk.select(["z"])


def test_same_links_same_bytes(links, tmp_path):
    for name in "xy":
        links.write(tmp_path / name)
    assert (tmp_path / "x/links.tsv.gz").read_bytes() == (tmp_path / "y/links.tsv.gz").read_bytes()


def test_genes_are_found_by_name_and_id(links):
    genes = links.reference.genes
    assert find_gene(genes, genes["gene_name"][3]) == 3
    assert find_gene(genes, genes["gene_id"][5]) == 5
    assert find_gene(genes, genes["gene_name"][3].swapcase()) == 3
    with pytest.raises(InputError, match="no gene 'NOPE42'"):
        find_gene(genes, "NOPE42")


def test_folder_without_links(tmp_path):
    with pytest.raises(InputError, match="holds no links"):
        read_gene_links(tmp_path, "A")


def test_cell_types_are_read_as_text(tmp_path):
    path = tmp_path / "types.tsv"
    path.write_text("\ufeffAAA-1\t1\nCCC-1\tNA\nAAA-1\t1\n")
    types = read_cell_types(path)
    assert types.to_dict() == {"AAA-1": "1", "CCC-1": "NA"}


def test_a_types_file_holds_links_and_names_once(links, tmp_path):
    """Layers share their places with X; names of cCREs are compressed and can be read in part."""
    import anndata as ad
    import h5py

    links.write(tmp_path)
    path = tmp_path / "a_250kbp_correlation_matrix.h5ad"
    adata = ad.read_h5ad(path)
    assert list(adata.var_names) == list(links.reference.ccre_labels)
    with h5py.File(path) as file:
        assert file["var/_index"].compression == "gzip"
        assert file["var/_index"].dtype.kind == "S"
        for name in COMPONENTS:
            assert file[f"layers/{name}/indices"] == file["X/indices"]
            assert file[f"layers/{name}/indptr"] == file["X/indptr"]
        stored = sum(file[f"layers/{name}/data"].id.get_storage_size() for name in COMPONENTS)
    assert (
        path.stat().st_size < stored + 40 * links.reference.n_ccres + 400 * links.reference.n_genes + 100_000
    )
    again = tmp_path / "again.h5ad"
    adata.write_h5ad(again)
    assert np.array_equal(ad.read_h5ad(again).layers["fdr"].toarray(), adata.layers["fdr"].toarray())


def test_reading_one_gene_reads_its_part_of_the_names(links, tmp_path, monkeypatch):
    import h5py

    links.write(tmp_path)
    read = []
    original = h5py.Dataset.__getitem__

    def spy(dataset, key, *more, **options):
        if dataset.name in ("/X/data", "/var/_index", "/X/indices", "/X/indptr"):
            read.append((dataset.name, np.size(original(dataset, key))))
        return original(dataset, key, *more, **options)

    monkeypatch.setattr(h5py.Dataset, "__getitem__", spy)
    gene = links.reference.genes["gene_name"][int(links.types[0].gene[0])]
    found = read_gene_links(tmp_path, gene)
    most = max(len(table) for table in found.tables.values())
    assert most > 0
    assert max(size for name, size in read if name != "/var/_index") <= max(most, 2)
