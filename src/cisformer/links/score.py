"""Link cCREs to genes, cell type by cell type, from a trained ATAC→RNA model and paired cells.

Cells are read three times, in blocks: for their states and depths; for what expression and accessibility
share beyond these (coupling); and type by type, for attention, effect and p-values. Only sums over pairs
are kept.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from cisformer.data.batches import Layout, encode_input, read_modality, row_blocks
from cisformer.data.store import CellStore
from cisformer.errors import CheckpointError, InputError
from cisformer.links.evidence import AttentionSums, WholeAttentionSums, state_profiles
from cisformer.links.files import (
    FOLDER,
    Links,
    LinkWriter,
    TypeLinks,
    check_cell_types,
    read_cell_types,
    safe_name,
)
from cisformer.links.formats import FormatName
from cisformer.links.statistics import (
    Pairs,
    PartialCorrelation,
    activity_contact,
    associate,
    combine,
    false_discovery_rate,
    orthonormal,
)
from cisformer.model.checkpoint import Checkpoint, check_reference, load_checkpoint
from cisformer.model.cis import CisModel
from cisformer.model.closed_form import count_features
from cisformer.model.documented_task import FullTask
from cisformer.parallel.processes import Processes
from cisformer.runtime.device import best_device
from cisformer.runtime.files import atomic_folder, atomic_path, refuse_existing
from cisformer.runtime.progress import progress
from cisformer.training.closed_form_start import fit_closed_form, make_layout
from cisformer.training.split import CellSplit

logger = logging.getLogger(__name__)
WINDOW_BP = 250_000
BATCH_CELLS = 16
BLOCK_CELLS = 256
SMALLEST_P = 1e-37  # what float32 holds
HEADER = re.compile(r"(cell[ _.-]?)?(types?|labels?|annotations?|clusters?)", re.IGNORECASE)
"""What a column of cell types is called."""


def score_links(
    checkpoint: Checkpoint | str | Path,
    data: CellStore | str | Path,
    cell_types: pd.Series | str | Path,
    *,
    window_bp: int = WINDOW_BP,
    max_cells: int | None = None,
    covariates: Sequence[str] = (),
    seed: int = 0,
    device: str | torch.device | None = None,
) -> Links:
    """Score the link of every gene with every cCRE near it, in each cell type.

    Parameters
    ----------
    checkpoint
        A trained ATAC→RNA model, or where one is.
    data
        Preprocessed cells: a store, or where one is.
    cell_types
        Cell type by barcode (a Series indexed by barcode), or a two-column table without header.
    window_bp
        Most bases between gene body and cCRE.
    max_cells
        Most cells per type, drawn by `seed`; `None` takes all.
    covariates
        Columns of the store's `cell_info` to adjust p-values and coupling for, beside depth.
    seed
        Of the choice of cells.
    device
        Where the model runs; an NVIDIA GPU where there is one, else the CPU.

    Returns
    -------
    Links
        Of the types that have cells, sorted by name. A pair is listed where the cCRE is open and the gene
        expressed in at least one of the type's cells, and both were seen in training.

    Raises
    ------
    CheckpointError, ReferenceMismatchError, StoreError, InputError
        The parts do not belong together, or no cell has a type.
    """
    scorer = _prepare(checkpoint, data, cell_types, window_bp, max_cells, covariates, seed, device)
    return Links(scorer.store.reference, window_bp, list(scorer.types()), scorer.cell_num)


def link(
    checkpoint: Checkpoint | str | Path,
    data: CellStore | str | Path,
    cell_types: pd.Series | str | Path,
    output_dir: str | Path = "output",
    *,
    window_bp: int = WINDOW_BP,
    max_cells: int | None = None,
    covariates: Sequence[str] = (),
    seed: int = 0,
    formats: Iterable[FormatName] = (),
    device: str | torch.device | None = None,
    force: bool = False,
) -> Path:
    """Score links and write them type by type; return the folder, `<output_dir>/cisformer_link`.

    Parameters
    ----------
    checkpoint, data, cell_types
        As of `score_links`.
    output_dir
        Where the folder goes. Under `accelerate launch`, processes share the cell types.
    window_bp, max_cells, covariates, seed
        As of `score_links`.
    formats
        Genome browser files to write as well, of each gene's strongest links: "bedpe", "interact", "longrange".
    device
        As of `score_links`.
    force
        Replace an existing folder.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    OutputExistsError
        If the folder has something in it and `force` is not given; and what `score_links` raises.
    """
    folder = Path(output_dir) / FOLDER
    refuse_existing(folder, force=force)
    processes = Processes.current(cpu=str(device) == "cpu")
    device = device or processes.device
    scorer = _prepare(checkpoint, data, cell_types, window_bp, max_cells, covariates, seed, device)
    if processes.size == 1:
        _write(scorer, scorer.types(), folder, formats, force)
        return folder
    with processes.scratch(folder) as parts:
        for name in processes.balance(scorer.cell_num):
            if len(scorer.members[name]):
                _save_part(scorer.of_type(name, scorer.members[name]), parts)
        processes.wait()
        if processes.is_main:
            found = (_load_part(name, n, parts) for name, n in scorer.cell_num.items() if n)
            _write(scorer, found, folder, formats, force)
    return folder


def _write(
    scorer: _Scorer, types: Iterable[TypeLinks], folder: Path, formats: Iterable[FormatName], force: bool
) -> None:
    with (
        atomic_folder(folder, force=force) as temporary,
        LinkWriter(temporary, scorer.store.reference, scorer.window_bp, formats, scorer.record) as writer,
    ):
        for links in types:
            writer.add(links)
        writer.finish(scorer.cell_num)


def _save_part(links: TypeLinks, folder: Path) -> None:
    """Keep the links of a type for the process that writes them all."""
    from safetensors.numpy import save_file

    place = {"gene": links.gene, "ccre": links.ccre, "distance": links.distance}
    with atomic_path(_part(links.cell_type, folder)) as path:
        save_file(place | links.evidence, path)


def _load_part(name: str, n_cells: int, folder: Path) -> TypeLinks:
    from safetensors.numpy import load_file

    arrays = load_file(_part(name, folder))
    place = {key: arrays.pop(key) for key in ("gene", "ccre", "distance")}
    return TypeLinks(name, n_cells, evidence=arrays, **place)


def _part(name: str, folder: Path) -> Path:
    return folder / f"{safe_name(name, [name])}.safetensors"  # always with its hash: no two are the same


def _prepare(
    checkpoint: Checkpoint | str | Path,
    data: CellStore | str | Path,
    cell_types: pd.Series | str | Path,
    window_bp: int,
    max_cells: int | None,
    covariates: Sequence[str],
    seed: int,
    device: str | torch.device | None,
) -> _Scorer:
    """Check that the parts belong together and choose the cells."""
    device = torch.device(device or best_device())
    for name, value in (("distance", window_bp), ("number of cells", 1 if max_cells is None else max_cells)):
        if value < 1:
            raise InputError(f"the {name} is {value}", hint="give a number above 0")
    if isinstance(cell_types, str | Path):
        types, source = read_cell_types(cell_types), str(cell_types)
    else:
        types, source = check_cell_types(cell_types, "cell_types"), "cell_types"
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = load_checkpoint(checkpoint, "atac2rna")
    if checkpoint.direction != "atac2rna":
        raise CheckpointError(
            f"links need an atac2rna model; this one is {checkpoint.direction}",
            hint="train one with cisformer atac2rna_train",
        )
    store = data if isinstance(data, CellStore) else CellStore.open(data)
    store.verify()
    check_reference(checkpoint.reference, store.reference, "the checkpoint")
    if window_bp > checkpoint.config.model.cis_window and isinstance(checkpoint.model, CisModel):
        logger.warning(
            "links beyond the model's own window of %d bp have no attention and no effect",
            checkpoint.config.model.cis_window,
        )
    members = choose_cells(store.barcodes, types, source, max_cells, seed)
    record: dict[str, object] = {
        "checkpoint": checkpoint.folder,
        "data": store.path,
        "seed": seed,
        "max_cells": max_cells,
    }
    adjust = _covariates(store, covariates)
    model, attending = checkpoint.model, None
    if isinstance(model, FullTask):
        model, attending = _closed_form(model, store, members, seed)
    return _Scorer(model.to(device), store, members, window_bp, adjust, record, device, attending)


def _closed_form(
    task: FullTask, store: CellStore, members: dict[str, np.ndarray], seed: int
) -> tuple[CisModel, FullTask]:
    """Return what architecture full lacks, states and the association over them, fitted to the cells themselves.

    Also its network, as one of the features that these cells have.
    """
    shuffled = np.random.default_rng(seed).permutation(np.concatenate(list(members.values())))
    n_val = max(1, len(shuffled) // 10)
    cells = CellSplit(store, np.sort(shuffled[n_val:]), store, np.sort(shuffled[:n_val]))
    counts = count_features(store, np.sort(shuffled), "atac2rna")
    layout = make_layout(counts, "atac2rna", store)
    model, _ = fit_closed_form(task.config, cells, layout, counts)
    return model.eval(), FullTask(task.config, layout, task.network).eval()


def choose_cells(
    barcodes: np.ndarray, types: pd.Series, source: str, max_cells: int | None, seed: int
) -> dict[str, np.ndarray]:
    """Return the ascending rows of each type's cells, types sorted by name.

    Cells and types are joined by barcode. Which cells of a large type are drawn depends on them and `seed`
    alone, not on the order of `types` or on other types.
    """
    row = pd.Index(barcodes).get_indexer(types.index)
    known = row >= 0
    if not known.any():
        raise InputError(
            f"none of the {len(types)} barcodes in {source} is in the data: "
            f"{_some(types.index)} against {_some(barcodes)}",
            hint="give the barcodes as in the data set's barcodes.txt",
        )
    once = len(types) > 1 and (types == types.iloc[0]).sum() == 1
    if not known[0] and once and (known[1:].all() or HEADER.fullmatch(types.iloc[0])):
        raise InputError(
            f"line 1 of {source} looks like a header: {types.index[0]!r}, {types.iloc[0]!r}",
            hint="remove it: the table has no header",
        )
    if not known.all():
        logger.info("%d of %d barcodes in %s are not in this data", (~known).sum(), len(types), source)
    if (unnamed := len(barcodes) - known.sum()) > 0:
        logger.info("%d of %d cells have no type in %s and are left out", unnamed, len(barcodes), source)
    members = {}
    for name in sorted(types.unique()):
        rows = np.sort(row[known & (types == name).to_numpy()])
        if len(rows) == 0:
            logger.warning("cell type %r has no cells in this data: no links are written for it", name)
        if max_cells is not None and len(rows) > max_cells:
            rows = np.sort(np.random.default_rng(seed).choice(rows, max_cells, replace=False))
        members[name] = rows
    return members


def _some(names: Iterable[str]) -> str:
    return ", ".join(list(names)[:3])


def _covariates(store: CellStore, names: Sequence[str]) -> np.ndarray:
    """Return columns of `cell_info` as numbers [n_cells, k]; text becomes a column per value but one."""
    info = store.cell_info
    columns = [np.zeros((store.n_cells, 0))]
    for name in names:
        found = next((c for c in (name, f"{name}_rna", f"{name}_atac") if c in info.columns), None)
        if found is None:
            raise InputError(
                f"there is no column {name!r} in the cell_info.tsv of {store.path}",
                hint=f"there are: {', '.join(map(str, info.columns)) or 'none'}",
            )
        column = info[found]
        if pd.api.types.is_numeric_dtype(column) and not column.isna().any():
            columns.append(column.to_numpy(np.float64)[:, None])
        else:
            columns.append(pd.get_dummies(column, drop_first=True, dummy_na=True).to_numpy(np.float64))
    return np.hstack(columns)


@dataclass
class _Scorer:
    """All that it takes to score links type by type; genes and cCREs are numbered as the model knows them."""

    model: CisModel
    store: CellStore
    members: dict[str, np.ndarray]
    window_bp: int
    covariates: np.ndarray
    record: dict[str, object]
    device: torch.device
    attending: FullTask | None = None

    @property
    def layout(self) -> Layout:
        return self.model.layout

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.layout.target_index), len(self.layout.input_index)

    @property
    def cell_num(self) -> dict[str, int]:
        return {name: len(rows) for name, rows in self.members.items()}

    @cached_property
    def pairs(self) -> Pairs:
        layout = self.layout
        return Pairs.of(self.store.reference, layout.target_index, layout.input_index, self.window_bp)

    def cells(self, rows: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, sp.csr_matrix, sp.csr_matrix]]:
        """Yield blocks of cells: their rows, known expression and known open cCREs."""
        for part in row_blocks(rows, size):
            rna, atac = read_modality(self.store, part, "rna"), read_modality(self.store, part, "atac")
            yield (
                part,
                rna[:, self.layout.target_index],
                atac[:, self.layout.input_index],
            )

    @cached_property
    def used(self) -> np.ndarray:
        return np.sort(np.concatenate(list(self.members.values())))

    @cached_property
    def cell_table(self) -> tuple[np.ndarray, np.ndarray]:
        """States [n, K] and log depths (RNA, ATAC) [n, 2] of the used cells."""
        states, depths = [], []
        for part in row_blocks(self.used, BLOCK_CELLS):
            atac = self.store.atac(part)
            batch = encode_input(atac, self.layout, None, None).to(self.device)
            states.append(self.model.cell_states(batch).double().cpu().numpy())
            counts = [self.store.rna(part).sum(axis=1), atac.sum(axis=1)]
            depths.append(np.log1p(np.hstack([np.asarray(total).reshape(-1, 1) for total in counts])))
        return np.concatenate(states), np.concatenate(depths)

    def adjusted(self, rows: np.ndarray, *others: np.ndarray) -> np.ndarray:
        """Return a basis of depths, covariates and `others` of the cells in `rows`."""
        place = np.searchsorted(self.used, rows)
        return orthonormal(self.cell_table[1][place], self.covariates[rows], *others)

    @cached_property
    def coupling(self) -> np.ndarray:
        """What expression and accessibility share beyond states, types and depths: z of each pair."""
        which = np.zeros(len(self.used), dtype=np.int64)
        for number, rows in enumerate(self.members.values()):
            which[np.searchsorted(self.used, rows)] = number
        types = np.eye(len(self.members))[which]
        test = PartialCorrelation(self.pairs, self.adjusted(self.used, types, self.cell_table[0]), self.shape)
        total = -(-len(self.used) // BLOCK_CELLS)
        for _, rna, atac in progress(
            self.cells(self.used, BLOCK_CELLS), total=total, desc="coupling", unit="blocks"
        ):
            test.add(rna, atac)
        return test.z()

    @cached_property
    def association(self) -> np.ndarray:
        """Conditional association over the model's states; see `associate`."""
        gene, ccre = state_profiles(self.model, float(np.exp(np.median(self.cell_table[1][:, 1]))))
        return associate(self.pairs, gene, ccre)

    def types(self) -> Iterator[TypeLinks]:
        """Yield the links of each type that has cells."""
        for name, rows in self.members.items():
            if len(rows):
                yield self.of_type(name, rows)

    def of_type(self, name: str, rows: np.ndarray) -> TypeLinks:
        """Score the links of one type from its cells."""
        test = PartialCorrelation(self.pairs, self.adjusted(rows), self.shape)
        attended: AttentionSums | WholeAttentionSums = AttentionSums(self.model, self.pairs)
        if self.attending is not None:
            attended = WholeAttentionSums(self.attending.to(self.device), self.pairs)
        total = -(-len(rows) // BATCH_CELLS)
        blocks_ = self.cells(rows, BATCH_CELLS)
        for part, rna, atac in progress(blocks_, total=total, desc=f"links of {name}", unit="batches"):
            test.add(rna, atac)
            attended.add(encode_input(self.store.atac(part), self.layout, None, None).to(self.device))
        gene, ccre = self.pairs.gene, self.pairs.ccre
        n_open = test.n_open[ccre]
        kept = (n_open > 0) & (test.n_expressed[gene] > 0)
        share = activity_contact(self.pairs, test.n_open / len(rows))
        p_value = np.maximum(test.p_value()[kept], SMALLEST_P)
        scale = self.model.scale.double().cpu().numpy()[gene]
        evidence = {
            "attention": attended.attention / len(rows),
            "effect": attended.effect * scale / np.maximum(n_open, 1),
            "association": self.association,
            "coupling": self.coupling,
            "activity_contact": share,
            "n_open": n_open,
        }
        values = {key: value[kept].astype(np.float32) for key, value in evidence.items()}
        values["score"] = combine(share[kept], self.association[kept], self.coupling[kept], len(self.used))
        values["p_value"], values["fdr"] = (
            x.astype(np.float32) for x in (p_value, false_discovery_rate(p_value))
        )
        return TypeLinks(
            cell_type=name,
            n_cells=len(rows),
            gene=self.layout.target_index[gene[kept]],
            ccre=self.layout.input_index[ccre[kept]],
            distance=self.pairs.distance[kept],
            evidence=values,
        )
