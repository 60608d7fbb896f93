"""Link cCREs to genes, cell type by cell type, from a trained ATAC→RNA model and paired cells.

The odds of a link are those of a prior (`prior`) times what association and coupling say, with weights estimated from
the cells at hand (`weights`), and what belongs to the cell type; `type_scores` adds them up. Cells are read in three
passes; each of them reads each cell once (`measure`).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Unpack

import pandas as pd
import torch

from cisformer.data.store import CellStore
from cisformer.links.files import FOLDER, Links, LinkWriter, TypeLinks, safe_name
from cisformer.links.formats import FormatName
from cisformer.links.inputs import LinkKeywords, LinkOptions
from cisformer.links.scorer import LinkScorer, prepare
from cisformer.model.checkpoint import Checkpoint
from cisformer.parallel.processes import Processes
from cisformer.runtime.files import atomic_folder, atomic_path, refuse_existing


def score_links(
    checkpoint: Checkpoint | str | Path,
    data: CellStore | str | Path,
    cell_types: pd.Series | str | Path,
    *,
    device: str | torch.device | None = None,
    **options: Unpack[LinkKeywords],
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
    device
        Where the model runs; an NVIDIA GPU where there is one, else the CPU.
    **options
        Those of `LinkOptions`, such as `window_bp=100_000` or `genes=["GZMB"]`.

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
    scorer = prepare(checkpoint, data, cell_types, LinkOptions(**options), device)
    return Links(scorer.inputs.store.reference, scorer.window_bp, list(scorer.types()), scorer.cell_num)


def link(
    checkpoint: Checkpoint | str | Path,
    data: CellStore | str | Path,
    cell_types: pd.Series | str | Path,
    output_dir: str | Path = "output",
    *,
    formats: Iterable[FormatName] = (),
    device: str | torch.device | None = None,
    force: bool = False,
    **options: Unpack[LinkKeywords],
) -> Path:
    """Score links and write them type by type; return the folder, `<output_dir>/cisformer_link`.

    Parameters
    ----------
    checkpoint, data, cell_types
        See `score_links`.
    output_dir
        Where the folder goes. Under `accelerate launch`, processes share the cell types.
    formats
        Genome browser files to write as well, of each gene's strongest links: "bedpe", "interact", "longrange".
    device
        See `score_links`.
    force
        Replace an existing folder.
    **options
        Those of `LinkOptions`.

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
    chosen = LinkOptions(**options)
    processes = Processes.current(cpu=str(device) == "cpu")
    scorer = prepare(checkpoint, data, cell_types, chosen, device or processes.device)
    if processes.size == 1:
        _write(scorer, scorer.types(), folder, formats, force)
        return folder
    with processes.scratch(folder) as parts:
        for name in processes.balance(scorer.cell_num):
            if scorer.cell_num[name]:
                _save_part(scorer.of_type(name), parts)
        processes.wait()
        if processes.is_main:
            found = (_load_part(name, n, parts) for name, n in scorer.cell_num.items() if n)
            _write(scorer, found, folder, formats, force)
    return folder


def _write(
    scorer: LinkScorer, types: Iterable[TypeLinks], folder: Path, formats: Iterable[FormatName], force: bool
) -> None:
    with (
        atomic_folder(folder, force=force) as temporary,
        LinkWriter(
            temporary, scorer.inputs.store.reference, scorer.window_bp, formats, scorer.record
        ) as writer,
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
