"""Fragments counted on cCREs, held to the peak matrix that they were made from and to brute force."""

from __future__ import annotations

import contextlib
import gzip
import tracemalloc
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

pytest.importorskip("pyarrow")

from cisformer.data import fragments
from cisformer.data.fragments import FragmentOptions, Pieces, count_fragments
from cisformer.data.preprocess import preprocess
from cisformer.data.sources import open_rows
from cisformer.errors import InputError
from cisformer.simulation import SimulatedCells

Row = tuple[str, int, int, str]


def write(rows: list[Row], path: Path, header: str = "# id=simulated\n", columns: int = 5) -> Path:
    """Write fragments, sorted by position as 10x does, gzipped in several members as bgzip does."""
    lines = [
        "\t".join([chrom, str(start), str(end), barcode, "1", "+"][:columns]) + "\n"
        for chrom, start, end, barcode in sorted(rows)
    ]
    half = len(lines) // 2
    parts = (header + "".join(lines[:half]), "".join(lines[half:]))
    path.write_bytes(b"".join(gzip.compress(part.encode()) for part in parts))
    return path


def simulate_fragments(atac: ad.AnnData, rng: np.random.Generator) -> list[Row]:
    """One fragment for each open peak of each cell, one of its ends within the peak, the other outside all peaks."""
    cell, peak = atac.X.nonzero()
    regions = list(atac.var[["chrom", "start", "end"]].itertuples(index=False, name=None))
    rows = []
    for i, j in zip(cell, peak, strict=True):
        chrom, start, end = regions[j]
        inside = int(rng.integers(start, end))
        rows.append(
            (chrom, inside, inside + 500_000_000, atac.obs_names[i])
        )  # the far end lies behind the chromosome
    return rows


@pytest.mark.parametrize("columns", [4, 5, 6])
@pytest.mark.parametrize("chr_", ["chr", ""])
def test_fragments_give_the_accessibility_of_the_peaks(
    columns: int, chr_: str, tiny: SimulatedCells, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fragments, "_RUN", 500)  # many runs
    monkeypatch.setattr(fragments, "_MOST_PAIRS", 300)  # many blocks of cells
    monkeypatch.setattr(fragments, "_BLOCK_BYTES", 10_000)
    rng = np.random.default_rng(2)
    rows = simulate_fragments(tiny.atac, rng)
    rows += [
        (chrom, 3 * i, 3 * i + 2, "AAAACCCCGGGGTTTT-9") for i, chrom in enumerate(["chr1", "chrNone"] * 50)
    ]
    rows = [(chrom.replace("chr", chr_, 1), *rest) for chrom, *rest in rows]
    path = write(rows, tmp_path / "fragments.tsv.gz", columns=columns)
    got = preprocess(tiny.rna, path, tmp_path / "fragments", manually=True)["all"]
    want = preprocess(tiny.rna, tiny.atac, tmp_path / "peaks", manually=True)["all"]
    cells = np.arange(want.n_cells)
    assert got.barcodes.tolist() == want.barcodes.tolist()
    assert (got.atac(cells) != want.atac(cells)).nnz == 0
    assert got.cell_info["n_fragments_atac"].sum() == tiny.atac.X.nnz


regions = pd.DataFrame(
    {"chrom": ["chr1", "chr1", "chr2", "chr1"], "start": [100, 150, 0, 300], "end": [200, 250, 50, 301]}
)


def test_both_ends_count_and_overlapping_regions_are_cut():
    pieces = Pieces(regions)
    assert pieces.table().to_numpy().tolist() == [
        ["chr1", 100, 150], ["chr1", 150, 200], ["chr1", 200, 250], ["chr1", 300, 301], ["chr2", 0, 50],
    ]  # fmt: skip
    assert pieces.find(np.array([99, 100, 149, 150, 249, 250, 300, 301])).tolist() == [
        -1,
        0,
        0,
        1,
        2,
        -1,
        3,
        -1,
    ]


def test_counts_agree_with_brute_force(tmp_path: Path):
    rng = np.random.default_rng(0)
    barcodes = [f"c{i}" for i in range(7)]
    rows = [
        (
            str(rng.choice(["chr1", "chr2", "chrX"])),
            int(start),
            int(start + rng.integers(1, 200)),
            str(rng.choice(barcodes)),
        )
        for start in rng.integers(0, 320, 400)
    ]
    path = write(rows, tmp_path / "f.tsv.gz")
    expected = np.zeros((7, 5))
    table = Pieces(regions).table()
    for chrom, start, end, barcode in rows:
        for j, piece in enumerate(table.itertuples()):
            for base in (start, end - 1):
                if chrom == piece.chrom and piece.start <= base < piece.end:
                    expected[barcodes.index(barcode), j] = 1
    with contextlib.ExitStack() as files:
        cells = count_fragments(path, FragmentOptions(regions, min_fragments=1), files)
        order = cells.barcodes.get_indexer(barcodes)
        assert np.array_equal(cells.rows(0, 7).toarray()[order], expected)
        assert np.array_equal(cells.rows(2, 4).toarray(), cells.rows(0, 7).toarray()[2:4])
        on_regions = pd.Series([row[3] for row in rows if row[0] != "chrX"]).value_counts()
        assert cells.n_fragments[order].tolist() == on_regions[barcodes].tolist()
        few = int(on_regions.min())
        more = count_fragments(path, FragmentOptions(regions, min_fragments=few + 1), files)
        assert set(more.barcodes) == set(on_regions.index[on_regions > few])


def test_barcodes_spelt_otherwise_than_the_rna_are_found(tiny: SimulatedCells, tmp_path: Path):
    rows = simulate_fragments(tiny.atac, np.random.default_rng(1))
    path = write([(c, s, e, b.split("-")[0]) for c, s, e, b in rows], tmp_path / "fragments.tsv.gz")
    store = preprocess(tiny.rna, path, tmp_path / "data", manually=True)["all"]
    want = preprocess(tiny.rna, tiny.atac, tmp_path / "peaks", manually=True)["all"]
    assert store.barcodes.tolist() == want.barcodes.tolist()
    assert (store.atac(np.arange(5)) != want.atac(np.arange(5))).nnz == 0


def test_what_is_refused(tiny: SimulatedCells, tmp_path: Path):
    path = write([("chr1", 100, 300, "A")], tmp_path / "f.tsv.gz")
    with pytest.raises(InputError, match="nothing says on which cCREs") as caught:
        preprocess(tiny.rna, path, tmp_path, reference="dataset")
    assert "--reference human" in caught.value.hint
    with pytest.raises(InputError, match="holds ATAC fragments; wanted RNA"), open_rows(path, "rna"):
        pass
    with pytest.raises(InputError, match="shares no barcode with the RNA: it has A"):
        preprocess(tiny.rna, path, tmp_path)
    options = FragmentOptions(regions)
    with (
        pytest.raises(InputError, match="no barcode with 1,000 fragments"),
        open_rows(path, "atac", fragments=options),
    ):
        pass
    backward = write([("chr1", 300, 100, "A")], tmp_path / "b.tsv.gz")
    with (
        pytest.raises(InputError, match="ends before it starts"),
        open_rows(backward, "atac", fragments=options),
    ):
        pass
    cut = tmp_path / "cut.tsv.gz"
    cut.write_bytes(write([("chr1", 10 * i, 10 * i + 5, "A") for i in range(9999)], cut).read_bytes()[:-900])
    with pytest.raises(InputError, match="cut short or damaged"), open_rows(cut, "atac", fragments=options):
        pass


def test_memory_does_not_grow_with_the_fragments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fragments, "_RUN", 1 << 14)
    monkeypatch.setattr(fragments, "_BLOCK_BYTES", 1 << 16)
    peaks = []
    for n in (20_000, 200_000):
        position = np.random.default_rng(0).integers(0, 300, n)
        lines = "".join(f"chr1\t{s}\t{s + 40}\tc{s % 50}\t1\n" for s in position)
        (tmp_path / "f.tsv").write_text(lines)
        tracemalloc.start()
        with contextlib.ExitStack() as files:
            count_fragments(tmp_path / "f.tsv", FragmentOptions(regions, min_fragments=1), files)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] + 1e6


def test_an_arc_folder_gives_genes_and_fragments(tiny: SimulatedCells, tmp_path: Path):
    from formats import write_10x

    outs = tmp_path / "sample/outs"
    outs.mkdir(parents=True)
    write_10x(outs / "filtered_feature_bc_matrix.h5", tiny.rna, tiny.atac)
    write(simulate_fragments(tiny.atac, np.random.default_rng(2)), outs / "atac_fragments.tsv.gz")
    want = preprocess(tiny.rna, tiny.atac, tmp_path / "peaks", manually=True)["all"]
    for reference in ("human", "dataset"):  # the latter takes the peaks
        got = preprocess(outs.parent, outs.parent, tmp_path / reference, manually=True, reference=reference)[
            "all"
        ]
        assert (got.rna(np.arange(9)).sum(), got.n_cells) == (want.rna(np.arange(9)).sum(), want.n_cells)
        assert got.atac(np.arange(got.n_cells)).nnz == want.atac(np.arange(got.n_cells)).nnz
        assert got.manifest["input"]["atac"]["kind"] == ("fragments" if reference == "human" else "10x h5")
