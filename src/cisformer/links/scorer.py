"""Prepare the scores of links: check that the parts belong together, and make the passes over the cells."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from cisformer.data.store import CellStore
from cisformer.errors import CheckpointError, InputError
from cisformer.links.files import TypeLinks, check_cell_types, read_cell_types
from cisformer.links.inputs import (
    LinkOptions,
    check_design,
    choose_cells,
    chosen_genes,
    design_of,
    donors_of,
    with_background,
)
from cisformer.links.measure import CellSums, LinkInputs, PairTests, read_attention, read_cells, read_tests
from cisformer.links.shared import SharedEvidence, share_evidence
from cisformer.links.statistics import Pairs, activity_contact, false_discovery_rate
from cisformer.links.type_scores import TypeScorer
from cisformer.links.weights import score_fdr
from cisformer.model.checkpoint import Checkpoint, check_reference, load_checkpoint
from cisformer.model.cis import CisModel
from cisformer.model.closed_form import count_features
from cisformer.model.documented_task import FullTask
from cisformer.runtime.device import best_device
from cisformer.training.closed_form_start import fit_closed_form, make_layout
from cisformer.training.split import CellSplit

logger = logging.getLogger(__name__)
SMALLEST_P = 1e-37  # what float32 holds


def prepare(
    checkpoint: Checkpoint | str | Path,
    data: CellStore | str | Path,
    cell_types: pd.Series | str | Path,
    options: LinkOptions,
    device: str | torch.device | None,
) -> LinkScorer:
    """Check that the parts belong together, choose the cells, and read what scores need (passes one and two)."""
    device = torch.device(device or best_device())
    if isinstance(cell_types, str | Path):
        types, source = read_cell_types(cell_types), str(cell_types)
    else:
        types, source = check_cell_types(cell_types, "cell_types"), "cell_types"
    checkpoint = _atac2rna(checkpoint)
    store = data if isinstance(data, CellStore) else CellStore.open(data)
    store.verify()
    check_reference(checkpoint.reference, store.reference, "the checkpoint")
    members = choose_cells(store.barcodes, types, source, options.max_cells, options.seed)
    model, attending = checkpoint.model, None
    if isinstance(model, FullTask):
        model, attending = _closed_form(model, store, members, options.seed)
    elif options.window_bp > checkpoint.config.model.cis_window:
        logger.warning(
            "links beyond the model's own window of %d bp have no attention and no effect",
            checkpoint.config.model.cis_window,
        )
    chosen = chosen_genes(store.reference, options)
    design = design_of(store, options.covariates)
    check_design(design, members, options.covariates)
    inputs = LinkInputs(
        model=model.to(device),
        attending=attending,
        store=store,
        members=members,
        pairs=_pairs(model, store, chosen, options),
        covariates=design,
        donor=None if options.donor is None else donors_of(store, options.donor),
        device=device,
    )
    record: dict[str, object] = {
        "checkpoint": checkpoint.folder,
        "data": store.path,
        "seed": options.seed,
        "max_cells": options.max_cells,
        "options": json.dumps(asdict(options)),
    }
    return LinkScorer.measure(inputs, options.window_bp, chosen, record)


def _atac2rna(checkpoint: Checkpoint | str | Path) -> Checkpoint:
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = load_checkpoint(checkpoint, "atac2rna")
    if checkpoint.direction != "atac2rna":
        raise CheckpointError(
            f"links need an atac2rna model; this one is {checkpoint.direction}",
            hint="train one with cisformer atac2rna_train",
        )
    return checkpoint


def _pairs(model: CisModel, store: CellStore, chosen: np.ndarray | None, options: LinkOptions) -> Pairs:
    """Return the pairs of all genes, or of those chosen and some others that help to estimate weights."""
    layout = model.layout
    pairs = Pairs.of(store.reference, layout.target_index, layout.input_index, options.window_bp)
    if chosen is None:
        return pairs
    if not chosen[layout.target_index].any():
        raise InputError(
            "the model knows none of the genes to link: they were expressed in too few training cells",
            hint="choose other genes",
        )
    wanted = with_background(chosen, layout.target_index, options.seed)[layout.target_index]
    kept = wanted[pairs.gene]
    return Pairs(pairs.gene[kept], pairs.ccre[kept], pairs.distance[kept])


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


@dataclass(frozen=True)
class LinkScorer:
    """What scores of any type take: pairs, two passes' sums, and the evidence that types share.

    Attributes
    ----------
    inputs, cells, tests
        What was read, and what the first two passes found.
    shared, scorer
        Evidence of all types, and scores of each.
    window_bp
        Largest distance between gene body and cCRE in bp.
    wanted
        Pairs to report; bool [E].
    record
        What to note in every file of how the links were made.
    """

    inputs: LinkInputs
    cells: CellSums
    tests: PairTests
    shared: SharedEvidence
    scorer: TypeScorer
    window_bp: int
    wanted: np.ndarray
    record: dict[str, object]

    @classmethod
    def measure(
        cls, inputs: LinkInputs, window_bp: int, chosen: np.ndarray | None, record: dict[str, object]
    ) -> LinkScorer:
        """Make the first two passes over the cells."""
        cells = read_cells(inputs)
        tests = read_tests(inputs, cells)
        shared = share_evidence(inputs, cells, tests)
        gene = inputs.layout.target_index[inputs.pairs.gene]
        wanted = np.ones(len(gene), dtype=bool) if chosen is None else chosen[gene]
        made = {"prior": json.dumps(asdict(shared.prior)), "weights": json.dumps(asdict(shared.weights))}
        record = record | made | {"less": shared.less}
        return cls(inputs, cells, tests, shared, TypeScorer(shared, cells, tests), window_bp, wanted, record)

    @property
    def cell_num(self) -> dict[str, int]:
        """Cell type → number of cells."""
        return {name: len(rows) for name, rows in self.inputs.members.items()}

    def types(self) -> Iterator[TypeLinks]:
        """Yield the links of each type that has cells; each takes a pass over its cells."""
        for name in self.cells.types:
            yield self.of_type(name)

    def of_type(self, name: str) -> TypeLinks:
        """Return the links of one type; a pass over its cells."""
        number, pairs, layout = self.cells.types.index(name), self.inputs.pairs, self.inputs.layout
        n_cells, n_open = int(self.cells.n_cells[number]), self.cells.n_open[number][pairs.ccre]
        kept = np.flatnonzero(self.wanted & (n_open > 0) & (self.cells.n_expressed[number][pairs.gene] > 0))
        attention, effect = read_attention(self.inputs, name)
        unit = (self.inputs.model.scale * self.inputs.model.pace).double().cpu().numpy()[pairs.gene]
        scores = self.scorer.of_type(number)
        specificity, specificity_se = self.scorer.specificity(scores)
        p_value = np.maximum(self.tests.p_value[number].astype(np.float64), SMALLEST_P)
        evidence = {
            "score": scores.score,
            "prior": scores.prior,
            "association": self.shared.association,
            "coupling": scores.coupling,
            "expression": scores.expression,
            "power": self.shared.power,
            "specificity": specificity,
            "specificity_se": specificity_se,
            "attention": attention / n_cells,
            "effect": effect * unit / np.maximum(n_open, 1),
            "activity_contact": activity_contact(pairs, self.cells.n_open[number] / n_cells),
            "p_value": p_value,
            "n_open": n_open,
        }
        values = {key: value[kept] for key, value in evidence.items()}
        values["fdr"] = false_discovery_rate(values["p_value"])
        values["score_fdr"] = score_fdr(values["score"])
        return TypeLinks(
            cell_type=name,
            n_cells=n_cells,
            gene=layout.target_index[pairs.gene[kept]],
            ccre=layout.input_index[pairs.ccre[kept]],
            distance=pairs.distance[kept],
            evidence={key: value.astype(np.float32) for key, value in values.items()},
        )
