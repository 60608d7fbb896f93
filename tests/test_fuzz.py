"""Whatever a file holds, reading it ends in a result or in a `CisformerError`, never in another exception.

Every test draws its cases from one fixed seed, some 1,500 in all; `HYPOTHESIS_PROFILE=thorough` draws ten
times as many.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from cisformer.config import DIRECTIONS, default_config, dump_config, load_config, parse_config
from cisformer.data.annotation import read_bed, read_gtf
from cisformer.data.genome import parse_regions, region_names
from cisformer.data.h5ad import read_atac, read_rna
from cisformer.data.inspect import inspect
from cisformer.data.preprocess import preprocess
from cisformer.data.reference import load_reference
from cisformer.data.store import CellStore
from cisformer.errors import CisformerError
from cisformer.evaluation.figures import read_training_log
from cisformer.links.files import read_cell_types, safe_name
from cisformer.links.formats import export_links, read_links
from cisformer.links.truth import read_truth
from cisformer.model.checkpoint import load_checkpoint
from cisformer.model.published import read_tensors
from cisformer.parallel.launch import n_usable_processes, read_accelerate_config
from cisformer.training.run_folder import read_state

THOROUGH = 10 if os.environ.get("HYPOTHESIS_PROFILE") == "thorough" else 1


def cases(number: int) -> settings:
    """Settings for so many cases in the gate, and ten times as many in a thorough run."""
    return settings(
        max_examples=number * THOROUGH, derandomize=True, database=None, deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large,
                               HealthCheck.large_base_example],
    )  # fmt: skip


def answer(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Return what `function` returns, or the `CisformerError` that it raises; any other exception goes on."""
    try:
        return function(*arguments, **options)
    except CisformerError as error:
        told = error
    assert told.message
    assert len(str(told)) < 3000
    return told


# ---- text ------------------------------------------------------------------------------------------------------

CHROMS = st.sampled_from(
    ["chr1", "1", "GL000194.1", "chr1_random", "HLA-A*01:01", "a b", "x\ty", "", "\r", "é", "\x00"]
)
NUMBERS = st.one_of(
    st.integers(-5, 10**15).map(str), st.sampled_from(["", "1e3", "²", "٣", "9" * 30, "0x10", " 7"])
)
REGIONS = st.one_of(
    st.text(max_size=30),
    st.builds(
        "{}{}{}{}{}".format, CHROMS, st.sampled_from(":-_\t "), NUMBERS, st.sampled_from("-_:"), NUMBERS
    ),
)


@cases(150)
@given(st.lists(REGIONS, max_size=5))
def test_region_strings(names: list[str]):
    found = answer(parse_regions, names)
    if isinstance(found, CisformerError):
        return
    assert len(found) == len(names)
    assert (found["start"] < found["end"]).all()
    for name, (chrom, start, end) in zip(names, found.itertuples(index=False), strict=True):
        assert name.startswith(chrom)
        assert [int(part) for part in name[len(chrom) + 1 :].replace("_", "-").split("-")] == [start, end]
    assert answer(parse_regions, region_names(found)).equals(found)


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(10**300, 10**310), st.floats(), st.text(max_size=8),
    st.sampled_from(["whole", "auto", "5e-4", "1e4", "cis", "full", "inf", "nan"]), st.binary(max_size=4), st.dates(),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALARS, inner, max_size=3),
    max_leaves=6,
)
KNOWN_KEYS = [key for _, section in default_config("atac2rna") for key, _ in section]
SECTIONS = st.dictionaries(st.one_of(st.sampled_from(KNOWN_KEYS), SCALARS), VALUES, max_size=4)
CONFIGS = st.dictionaries(
    st.one_of(st.sampled_from(["model", "training", "datapreprocess"]), SCALARS),
    st.one_of(SECTIONS, VALUES),
    max_size=3,
)


@cases(150)
@given(CONFIGS, st.sampled_from(DIRECTIONS))
def test_config_values(content: dict, direction: str):
    config = answer(parse_config, content, direction)
    if not isinstance(config, CisformerError):
        assert parse_config(yaml.safe_load(dump_config(config)), direction) == config


YAML_PIECES = st.sampled_from(
    [
        "model:\n",
        "training:\n",
        "  lr: ",
        "  epoch: ",
        "dim: 7\n",
        "- ",
        "{",
        "}",
        "[",
        "]",
        "&a ",
        "*a",
        "!!int ''",
        "!!bool x",
        "!!timestamp x",
        "!!python/object/apply:os.system ['false']",
        "!!float .",
        "? ",
        ": ",
        "|\n",
        "'",
        '"',
        "\t",
        "2001-13-45",
        "0o9",
        "1:99:99",
        "<<: ",
        "\n",
        "---\n",
        "%YAML 3\n",
        "\x00",
        "\ud800",
        "9" * 40,
        "!!set {a}",
        "!!binary ='",
        "=",
    ]
)


@cases(150)
@given(pieces=st.lists(st.one_of(YAML_PIECES, st.text(max_size=5)), max_size=12))
def test_config_files(pieces: list[str], tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_bytes("".join(pieces).encode(errors="surrogatepass"))
    answer(load_config, path, "rna2atac")
    found = answer(read_accelerate_config, path)
    if isinstance(found, dict):
        n_usable_processes(found, 0)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "a: &a [x]\n" + "".join(f"b{i}: &b{i} [{'*a, ' * 9}*a]\n" for i in range(3))]
)
def test_yaml_that_is_deep_or_multiplies(text: str, tmp_path: Path):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(CisformerError):
        load_config(tmp_path / "config.yaml", "rna2atac")


TABLE_PIECES = st.sampled_from(
    [
        "cell1",
        "cell2",
        "T cell",
        "\t",
        "\t",
        "\n",
        "\n",
        '"',
        "'",
        ",",
        "\r",
        "\x00",
        "\ufeff",
        "../x",
        "NA",
        "",
        " ",
        "#",
        "gene\tpeak\tscore",
        "chr1:1-2",
        "chr1\t1\t2",
        "gene_id",
        "\n\n",
        "\xff",
        'gene_id "g"; gene_name "n"',
        "gene",
        "\t.\t",
        "1e999",
        "²",
        "-1",
        "9" * 25,
    ]
)
TABLES = st.one_of(
    st.binary(max_size=60),
    st.lists(TABLE_PIECES, max_size=25).map(lambda pieces: "".join(pieces).encode()),
    st.lists(TABLE_PIECES, max_size=9).map(lambda pieces: gzip.compress("".join(pieces).encode())),
    st.lists(st.lists(TABLE_PIECES, min_size=2, max_size=12).map("\t".join), max_size=4).map(
        lambda rows: "\n".join(rows).encode()
    ),
)


@cases(200)
@given(content=TABLES, suffix=st.sampled_from(["", ".gz"]), cut=st.integers(0, 40))
def test_tables(content: bytes, suffix: str, cut: int, tmp_path: Path):
    path = tmp_path / f"table.tsv{suffix}"
    path.write_bytes(content[: len(content) - cut] if cut > 30 else content)
    types = answer(read_cell_types, path)
    if isinstance(types, pd.Series):
        assert types.index.is_unique
    bedpe = path.with_name(f"table.bedpe{suffix}")
    shutil.copy(path, bedpe)
    for read in (read_links, read_bed, read_gtf, read_truth, read_training_log):
        answer(read, path)
    answer(read_links, bedpe)
    answer(export_links, path, tmp_path / "out.bedpe")


@cases(150)
@given(st.lists(st.text(), unique=True, max_size=8))
def test_names_of_files(names: list[str]):
    taken: list[str] = []
    for name in names:
        taken.append(safe_name(name, taken))
    assert len({name.casefold() for name in taken}) == len(names)
    for name in taken:
        assert len(name.encode()) <= 200
        assert name not in ("", ".", "..")
        assert not set(name) & set('/\\:*?"<>|\0\n\r\t')


# ---- matrices --------------------------------------------------------------------------------------------------

DTYPES = [
    "int8",
    "uint8",
    "int16",
    "int32",
    "int64",
    "uint64",
    "float16",
    "float32",
    "float64",
    ">f4",
    ">i8",
    "bool",
    "longdouble",
    "complex64",
    "object",
    "U3",
]
BARCODES = st.one_of(
    st.sampled_from(["a", "b", "AAAC-1", "", "a\nb", "a\tb", "\x00", "é", "\ud800", "nan", "1"]),
    st.integers(0, 9),
)
ANNOTATION = st.one_of(
    st.sampled_from(["Gene Expression", "Peaks", "chr1:1-5", "chr1", "+", "-1", "NaN", "", "x\ty\r\n"]),
    st.integers(),
    st.floats(),
    st.none(),
    st.booleans(),
)
COLUMNS = st.sampled_from(
    ["feature_types", "interval", "chrom", "start", "end", "strand", "gene_id", "gene_name", "n", "x", 3]
)
GENES = st.sampled_from(
    [
        "ENSG00000000001",
        "ENSG00000000001.7",
        "ACTB",
        "Actb",
        "gene",
        "",
        "chr1:5-9",
        "chr1-5-9",
        "chr2:1-2",
        "é",
        "5",
    ]
)
NUMERIC = st.sampled_from([0, 0, 0, 1, 1, 2, 3, 0.5, -1, 300, 70_000, 1e9, 1e30, np.nan, np.inf])


@st.composite
def frames(draw: Any, names: Any, n: int) -> pd.DataFrame:
    index = draw(st.lists(names, min_size=n, max_size=n))
    columns = draw(st.lists(COLUMNS, max_size=3))
    values = [draw(st.lists(ANNOTATION, min_size=n, max_size=n)) for _ in columns]
    frame = pd.DataFrame(dict(enumerate(values)), index=pd.Index(index, dtype=object), dtype=object)
    frame.columns = pd.Index(columns, dtype=object)
    if n and columns and draw(st.booleans()):
        frame.isetitem(0, pd.Categorical(frame.iloc[:, 0].map(str)))
    return frame


@st.composite
def adatas(draw: Any) -> ad.AnnData:
    """Cells as odd as AnnData allows; an AnnData that refuses them itself is drawn anew."""
    n_cells, n_features = draw(st.integers(0, 5)), draw(st.integers(0, 5))
    values = draw(st.lists(NUMERIC, min_size=n_cells * n_features, max_size=n_cells * n_features))
    with np.errstate(all="ignore"):
        dense = np.array(values, object).reshape(n_cells, n_features)
        dtype = draw(st.sampled_from(DTYPES))
        finite = (
            np.where(pd.isna(dense) | (dense == np.inf), 0, dense) if np.dtype(dtype).kind in "iub" else dense
        )
        matrix = finite.astype(float).astype(dtype)
    if (
        matrix.dtype.kind in "biufc"
        and matrix.dtype not in (np.float16, np.longdouble)
        and matrix.dtype.isnative
    ):
        matrix = draw(st.sampled_from([np.asarray, sp.csr_matrix, sp.csc_matrix, sp.csr_array]))(matrix)
        if sp.issparse(matrix) and draw(st.booleans()):
            matrix.indices, matrix.indptr = matrix.indices.astype(np.int64), matrix.indptr.astype(np.int64)
    obs, var = draw(frames(BARCODES, n_cells)), draw(frames(GENES, n_features))
    adata = ad.AnnData(np.zeros((n_cells, n_features), np.float32))
    adata.obs, adata.var = obs, var
    if draw(st.booleans()):
        adata.layers["counts"] = matrix
    else:
        adata.X = matrix
    return adata


@pytest.mark.filterwarnings("ignore")
@cases(60)
@given(adatas())
def test_cells_in_memory(adata: ad.AnnData):
    for read in (read_rna, read_atac):
        found = answer(read, adata)
        if isinstance(found, ad.AnnData):
            assert found.n_obs == adata.n_obs
            assert np.isfinite(found.X.data).all()


@pytest.mark.filterwarnings("ignore")
@cases(40)
@given(adata=adatas())
def test_cells_on_disk(adata: ad.AnnData, tmp_path: Path):
    path = tmp_path / "cells.h5ad"
    try:
        adata.write_h5ad(path)
    except Exception:  # what anndata does not write, it does not hand us
        return
    for read in (read_rna, read_atac):
        answer(read, path)
    json.dumps(report) if isinstance(report := answer(inspect, [path]), dict) else None


@pytest.mark.filterwarnings("ignore")
@cases(20)
@given(rna=adatas(), atac=adatas())
def test_preprocessing(rna: ad.AnnData, atac: ad.AnnData, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("out")
    stores = answer(preprocess, rna, atac, folder, reference="dataset", manually=True, num_workers=1)
    if isinstance(stores, CisformerError):
        assert list(folder.iterdir()) == []
    else:
        cells = stores["all"]
        cells.verify()
        assert len(cells.barcodes) == len(cells.cell_info) == cells.n_cells
        cells.rna(np.arange(cells.n_cells))
    shutil.rmtree(folder)


# ---- damaged files of ours ---------------------------------------------------------------------------------------


MOST = 10**9
PLACES = st.integers(0, MOST - 1)


@st.composite
def damages(draw: Any) -> Callable[[bytes], bytes]:
    """A function that flips some bytes of a file, cuts it, or puts something into it."""
    kind = draw(st.sampled_from(["flip", "flip", "flip", "cut", "insert", "zero"]))
    places = draw(st.lists(st.tuples(PLACES, st.integers(1, 255)), min_size=1, max_size=4))
    near_start = draw(st.booleans())

    def damage(content: bytes) -> bytes:
        changed = bytearray(content)
        size = min(len(changed), 400) if near_start else len(changed)
        for where, value in places:
            position = where * size // MOST
            if kind == "flip":
                changed[position] ^= value
            elif kind == "zero":
                changed[position : position + value] = bytes(min(value, len(changed) - position))
            elif kind == "insert":
                changed[position:position] = bytes([value])
            else:
                del changed[position:]
                break
            size = min(size, len(changed))
        return bytes(changed)

    return damage


@pytest.fixture(scope="module")
def ours(
    tiny_data: dict, tiny_files: Path, tiny_checkpoints: dict, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with an h5ad, a data set, a checkpoint and a training state, to be damaged."""
    folder = tmp_path_factory.mktemp("ours")
    shutil.copy(tiny_files / "rna.h5ad", folder / "rna.h5ad")
    shutil.copytree(tiny_data["atac2rna"] / "atac2rna_val", folder / "store")
    shutil.copytree(tiny_checkpoints["atac2rna"].folder, folder / "model")
    shutil.copy(tiny_checkpoints["atac2rna"].folder.parent / "training_state.pt", folder)
    return folder


def read_store(folder: Path) -> None:
    store = CellStore.open(folder)
    rows = np.arange(store.n_cells)
    store.rna(rows), store.atac(rows), store.barcodes, store.cell_info, store.reference


DAMAGED = {
    "rna.h5ad": (lambda ours: (read_rna(ours / "rna.h5ad"), inspect([ours / "rna.h5ad"])), 40),
    "store/manifest.json": (lambda ours: read_store(ours / "store"), 40),
    "store/atac2rna_0.pt": (lambda ours: read_store(ours / "store"), 60),
    "store/barcodes.txt": (lambda ours: read_store(ours / "store"), 20),
    "store/cell_info.tsv": (lambda ours: read_store(ours / "store"), 20),
    "store/reference/genes.tsv.gz": (lambda ours: load_reference(ours / "store/reference"), 20),
    "store/reference/ccres.bed.gz": (lambda ours: load_reference(ours / "store/reference"), 20),
    "store/reference/reference.json": (lambda ours: load_reference(ours / "store/reference"), 20),
    "model/checkpoint.json": (lambda ours: load_checkpoint(ours / "model"), 20),
    "model/config.yaml": (lambda ours: load_checkpoint(ours / "model"), 20),
    "model/model.safetensors": (lambda ours: load_checkpoint(ours / "model"), 20),
    "training_state.pt": (lambda ours: read_state(ours / "training_state.pt"), 30),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files(name: str, ours: Path):
    read, number = DAMAGED[name]
    path, whole = ours / name, (ours / name).read_bytes()

    @cases(number)
    @given(damages())
    def check(damage: Callable[[bytes], bytes]) -> None:
        path.write_bytes(damage(whole))
        answer(read, ours)
        if path.suffix == ".json":
            answer(inspect, [path.parent], verify=True)

    try:
        check()
    finally:
        path.write_bytes(whole)
    read(ours)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["store/atac2rna_0.pt", "model/model.safetensors", "model/config.yaml"])
def test_damaged_files_whose_checksums_agree(name: str, ours: Path, monkeypatch: pytest.MonkeyPatch):
    """Someone who wants to do harm gets the checksum right: sizes and types have to be checked none the less."""
    read, number = DAMAGED[name]
    path, whole = ours / name, (ours / name).read_bytes()
    monkeypatch.setattr("cisformer.model.checkpoint.check_sum", lambda *given: None)
    manifest = ours / "store" / "manifest.json"
    noted = manifest.read_text()

    @cases(number)
    @given(damages())
    def check(damage: Callable[[bytes], bytes]) -> None:
        path.write_bytes(damage(whole))
        about = json.loads(noted)
        about["shards"][0]["bytes"] = (ours / "store" / "atac2rna_0.pt").stat().st_size
        manifest.write_text(json.dumps(about))
        answer(read, ours)

    try:
        check()
    finally:
        path.write_bytes(whole)
        manifest.write_text(noted)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["../x", "/etc/passwd", 10**18]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@pytest.mark.parametrize(
    "name", ["store/manifest.json", "model/checkpoint.json", "store/reference/reference.json"]
)
def test_manifests_with_other_entries(name: str, ours: Path):
    read, _ = DAMAGED[name]
    path, noted = ours / name, (ours / name).read_text()

    @cases(60)
    @given(st.lists(PLACES, min_size=1, max_size=4), JSON, st.booleans())
    def check(way: list[int], value: Any, remove: bool) -> None:
        about = json.loads(noted)
        node: Any = about
        for step in way:
            keys = (
                list(node)
                if isinstance(node, dict)
                else list(range(len(node)))
                if isinstance(node, list)
                else []
            )
            if not keys:
                break
            parent, key = node, keys[step * len(keys) // MOST]
            node = parent[key]
        if remove:
            del parent[key]
        else:
            parent[key] = value
        path.write_text(json.dumps(about))
        answer(read, ours)
        answer(inspect, [path.parent], verify=True)

    try:
        check()
    finally:
        path.write_text(noted)


@cases(60)
@given(
    content=st.one_of(st.binary(max_size=200), damages()), suffix=st.sampled_from([".bin", ".safetensors"])
)
def test_published_weights(content: Any, suffix: str, ours: Path, tmp_path: Path):
    whole = (ours / ("training_state.pt" if suffix == ".bin" else "model/model.safetensors")).read_bytes()
    (tmp_path / f"weights{suffix}").write_bytes(content if isinstance(content, bytes) else content(whole))
    answer(read_tensors, tmp_path / f"weights{suffix}")
