"""The same cells as five programs write them, through the seven commands: the same predictions and the same links."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from formats import write_10x, write_h5mu
from test_fragments import simulate_fragments, write

from cisformer.simulation import SimulatedCells

pytest.importorskip("pyarrow")

Files = tuple[Path, Path, list[str]]
"""RNA, ATAC, and options of data_preprocess."""


def as_10x(rna: ad.AnnData, atac: ad.AnnData, folder: Path) -> Files:
    """`outs/` of Cell Ranger ARC: one h5 of genes and peaks, fragments."""
    outs = folder / "sample/outs"
    outs.mkdir(parents=True)
    write_10x(outs / "filtered_feature_bc_matrix.h5", rna, atac)
    write(simulate_fragments(atac, np.random.default_rng(0)), outs / "atac_fragments.tsv.gz")
    return outs, outs, []


def as_snapatac2(rna: ad.AnnData, atac: ad.AnnData, folder: Path) -> Files:
    """Files compressed with zstd, unsigned counts, 64-bit indices; the peak matrix of `make_peak_matrix`."""
    zstd = pytest.importorskip("hdf5plugin").FILTERS["zstd"]
    peaks = ad.AnnData(sp.csr_matrix(atac.X).astype(np.uint32), pd.DataFrame(index=atac.obs_names))
    peaks.var_names = atac.var_names
    peaks.X.indices = peaks.X.indices.astype(np.int64)
    peaks.obs["n_fragment"], peaks.obs["tsse"] = np.uint64(1000), 12.5
    peaks.uns["reference_sequences"] = pd.DataFrame(
        {"reference_seq_name": ["chr1"], "reference_seq_length": [9]}
    )
    peaks.write_h5ad(folder / "atac.h5ad", compression=zstd)
    rna.write_h5ad(folder / "rna.h5ad", compression=zstd)
    return folder / "rna.h5ad", folder / "atac.h5ad", []


def as_archr(rna: ad.AnnData, atac: ad.AnnData, folder: Path) -> Files:
    """Cells named sample#barcode, peaks by GRanges columns that count from 1, CSC; RNA named as 10x does."""
    named = atac.copy()
    named.obs_names = [f"PBMC#{name}" for name in atac.obs_names]
    named.obs["Sample"], named.obs["TSSEnrichment"] = "PBMC", 12.5
    named.var = pd.DataFrame(
        {
            "seqnames": pd.Categorical(atac.var["chrom"]),
            "start": atac.var["start"].to_numpy(float) + 1,
            "end": atac.var["end"].to_numpy(float),
            "strand": "*",
            "idx": range(1, atac.n_vars + 1),
        }
    ).set_axis([f"f{i + 1}" for i in range(atac.n_vars)])
    named.X = sp.csc_matrix(named.X)
    named.write_h5ad(folder / "atac.h5ad")
    rna.write_h5ad(folder / "rna.h5ad")
    return folder / "rna.h5ad", folder / "atac.h5ad", []


def as_seurat(rna: ad.AnnData, atac: ad.AnnData, folder: Path) -> Files:
    """SeuratDisk: scaled values in X, counts in `raw`, symbols, peaks with dashes, `_index` columns, factor codes."""
    converted = rna.copy()
    converted.var = pd.DataFrame({"vst.variable": True}, index=rna.var_names)
    converted.raw = converted.copy()
    values = np.log1p(rna.X.toarray())
    converted.X = (values - values.mean(0)) / (values.std(0) + 1)
    converted.obs = pd.DataFrame(
        {"orig.ident": 0, "seurat_clusters": ["0", "1"] * (rna.n_obs // 2)}, rna.obs_names
    )
    converted.write_h5ad(folder / "rna.h5ad")
    peaks = ad.AnnData(sp.csr_matrix(atac.X).astype(np.float64), pd.DataFrame(index=atac.obs_names))
    peaks.var_names = atac.var_names.str.replace(":", "-")
    peaks.write_h5ad(folder / "atac.h5ad")
    return folder / "rna.h5ad", folder / "atac.h5ad", []


def as_muon(rna: ad.AnnData, atac: ad.AnnData, folder: Path) -> Files:
    """One h5mu of both."""
    write_h5mu(folder / "cells.h5mu", rna, atac)
    return folder / "cells.h5mu", folder / "cells.h5mu", []


def as_tiles(rna: ad.AnnData, atac: ad.AnnData, folder: Path) -> Files:
    """The matrix of `add_tile_matrix`: tiles of 500 bp, which open all cCREs that they overlap."""
    tile = atac.var["chrom"].astype(str) + ":" + (atac.var["start"] // 500 * 500).astype(str)
    names, column = np.unique(tile, return_inverse=True)
    member = sp.csr_matrix((np.ones(atac.n_vars), (np.arange(atac.n_vars), column)))
    tiles = ad.AnnData(sp.csr_matrix(atac.X @ member), pd.DataFrame(index=atac.obs_names))
    tiles.var_names = [f"{name}-{int(name.split(':')[1]) + 500}" for name in names]
    tiles.write_h5ad(folder / "atac.h5ad")
    rna.write_h5ad(folder / "rna.h5ad")
    return folder / "rna.h5ad", folder / "atac.h5ad", ["--genome", "hg38"]


PROGRAMS = [as_10x, as_snapatac2, as_archr, as_seurat, as_muon, as_tiles]


@pytest.fixture(scope="module")
def reference(tiny: SimulatedCells, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reference of the simulated genes and cCREs, so that all programs' cells meet the same."""
    from cisformer.data.own_reference import build_reference

    folder = tmp_path_factory.mktemp("reference")
    tiny.atac.var[["chrom", "start", "end"]].to_csv(folder / "p.bed", sep="\t", header=False, index=False)
    lines = [
        f'{g.chrom}\tx\tgene\t{g.start + 1}\t{g.end}\t.\t{g.strand}\t.\tgene_id "{g.gene_id}"; gene_name "{name}";\n'
        for name, g in tiny.rna.var.iterrows()
    ]
    (folder / "g.gtf").write_text("".join(lines), encoding="utf-8")
    build_reference(folder / "g.gtf", folder / "p.bed", folder / "own")
    return folder / "own"


def run_all(files: Files, reference: Path, types: Path, config: Callable) -> dict[str, object]:
    """Run the seven commands in the working folder; return predictions and links."""
    from cisformer.cli import cisformer
    from cisformer.config import dump_config

    def run(*arguments: object) -> None:
        cisformer.main([str(part) for part in arguments], standalone_mode=False)

    rna, atac, options = files
    run("generate_default_config", "--preset", "small")
    for direction in ("atac2rna", "rna2atac"):
        text = dump_config(config(direction, epoch=1))
        Path(f"cisformer_config/{direction}_config.yaml").write_text(text, encoding="utf-8")
    for direction in (["--atac2rna"], []):
        run(
            "data_preprocess",
            "-r",
            rna,
            "-a",
            atac,
            "-s",
            "data",
            "--reference",
            reference,
            *options,
            *direction,
        )
    run("atac2rna_train", "-d", "data", "-n", "a")
    run("rna2atac_train", "-t", "data/rna2atac_train", "-v", "data/rna2atac_val", "-n", "r")
    to_rna, to_atac = next(Path("save").glob("*_a")), next(Path("save").glob("*_r"))
    few = ["--min_fragments", 1] if atac.is_dir() else []
    run("atac2rna_predict", "-d", atac, "-m", to_rna, *few)
    run("rna2atac_predict", "-r", rna, "-m", to_atac)
    run("atac2rna_link", "-d", "data/atac2rna_train", "-c", types, "-m", to_rna)
    predicted = {name: ad.read_h5ad(f"output/cisformer_predicted_{name}.h5ad") for name in ("rna", "atac")}
    for adata in predicted.values():
        adata.obs_names = adata.obs_names.str.removeprefix("PBMC#")
    links = gzip.decompress(Path("output/cisformer_link/links.tsv.gz").read_bytes())
    return {name: adata.to_df().sort_index() for name, adata in predicted.items()} | {"links": links}


@pytest.fixture(scope="module")
def wanted(
    cells: tuple, reference: Path, tmp_path_factory: pytest.TempPathFactory, tiny_config: Callable
) -> tuple[dict[str, object], Path]:
    """What plain h5ad files give, and the table of cell types."""
    folder = tmp_path_factory.mktemp("plain")
    for name, adata in zip(("rna", "atac"), cells, strict=True):
        adata.write_h5ad(folder / f"{name}.h5ad")
    cells[0].obs["cell_type"].to_csv(folder / "types.tsv", sep="\t", header=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        files = folder / "rna.h5ad", folder / "atac.h5ad", []
        return run_all(files, reference, folder / "types.tsv", tiny_config), folder / "types.tsv"


@pytest.mark.parametrize("program", PROGRAMS)
def test_cells_of_every_program_go_through_the_seven_commands(
    program: Callable, cells: tuple, reference: Path, wanted: tuple, tiny_config: Callable, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    want, types = wanted
    monkeypatch.chdir(tmp_path)
    got = run_all(program(*cells, tmp_path), reference, types, tiny_config)
    if program is as_tiles:  # coarser than the cCREs: other numbers
        assert got["rna"].shape == want["rna"].shape
        assert len(got["links"]) > 1000
        return
    pd.testing.assert_frame_equal(got["atac"], want["atac"], check_names=False)
    pd.testing.assert_frame_equal(got["rna"], want["rna"], check_names=False)
    assert got["links"] == want["links"]


# ---------------------------------------------------------------------------------------------- run, with fragments


@pytest.fixture(scope="module")
def fragments(cells: tuple, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """RNA and fragments of the same cells."""
    folder = tmp_path_factory.mktemp("fragments")
    cells[0].write_h5ad(folder / "rna.h5ad")
    return folder / "rna.h5ad", write(
        simulate_fragments(cells[1], np.random.default_rng(0)), folder / "f.tsv.gz"
    )


def test_run_counts_fragments_on_the_cCREs_of_the_genes_species(fragments: tuple, tmp_path: Path):
    from cisformer.workflow import RunOptions, _Workflow

    workflow = _Workflow(*fragments, tmp_path, RunOptions(groupby="cell_type"))
    assert workflow.options.reference == "human"
    assert workflow.types.nunique() == 3
    assert workflow.inspect()["found"][1] == {
        "modality": "atac", "n_cells": None, "n_features": None, "values": "fragments",
    }  # fmt: skip
    assert _Workflow(*fragments, tmp_path, RunOptions(genome="mm39")).options.reference == "mouse"
    assert _Workflow(*fragments, tmp_path, RunOptions(reference="own")).options.reference == "own"


def test_run_says_what_is_wrong_with_fragments_before_any_work(
    fragments: tuple, cells: tuple, tmp_path: Path
):
    from cisformer.errors import InputError
    from cisformer.workflow import run

    with pytest.raises(InputError, match="obs has no column 'cluster'"):
        run(*fragments, tmp_path / "out", groupby="cluster")
    with pytest.raises(InputError, match="a GTF has no cCREs"):
        run(*fragments, tmp_path / "out", gtf="genes.gtf")
    rna = cells[0].copy()
    rna.var = pd.DataFrame(index=[f"gene_{i}" for i in range(rna.n_vars)])
    rna.write_h5ad(tmp_path / "rna.h5ad")
    with pytest.raises(InputError, match="nothing says on which cCREs") as caught:
        run(tmp_path / "rna.h5ad", fragments[1], tmp_path / "out")
    assert "--reference human" in caught.value.hint
    assert not (tmp_path / "out").exists()
