"""Link cCREs to genes, cell type by cell type, from a trained ATAC→RNA model and paired cells.

The odds of a link are those of a prior (`prior`) times what association and coupling say, with weights estimated from
the cells at hand (`weights`), and what belongs to the cell type; `type_scores` adds them up. Cells are read in three
passes; each of them reads each cell once (`measure`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from cisformer.data.genome import overlap_pairs, rename_chroms, tss
from cisformer.data.known_genomes import GENOMES, load_annotation
from cisformer.data.reference import Reference
from cisformer.data.store import CellStore
from cisformer.errors import CheckpointError, InputError
from cisformer.links.evidence import state_profiles
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
from cisformer.links.inputs import (
    WINDOW_BP,
    LinkOptions,
    check_design,
    choose_cells,
    chosen_genes,
    design_of,
    donors_of,
    with_background,
)
from cisformer.links.measure import CellSums, LinkInputs, PairTests, read_attention, read_cells, read_tests
from cisformer.links.prior import PROMOTER_BP, UNKNOWN_BREADTH, count_between, expression_breadth, load_prior
from cisformer.links.statistics import Pairs, activity_contact, associate, false_discovery_rate
from cisformer.links.type_scores import SharedEvidence, TypeScorer, pair_power
from cisformer.links.weights import (
    Evidence,
    EvidenceWeights,
    estimate_weights,
    exchange_genes,
    keep_total,
    probability,
    score_fdr,
)
from cisformer.model.checkpoint import Checkpoint, check_reference, load_checkpoint
from cisformer.model.cis import CisModel
from cisformer.model.closed_form import count_features
from cisformer.model.documented_task import FullTask
from cisformer.parallel.processes import Processes
from cisformer.runtime.device import best_device
from cisformer.runtime.files import atomic_folder, atomic_path, refuse_existing
from cisformer.training.closed_form_start import fit_closed_form, make_layout
from cisformer.training.split import CellSplit

logger = logging.getLogger(__name__)
SMALLEST_P = 1e-37  # what float32 holds
SEEN_GENE, SEEN_CCRE = 0.05, 0.02
"""Weights are estimated from genes and cCREs seen in at least these shares of the cells."""
FEWEST_CELLS_OF_BREADTH, COUNTS_OF_BREADTH = 20, 20.0
"""A type tells breadth of expression with so many cells; with so many counts a type, half of it is believed."""


def score_links(
    checkpoint: Checkpoint | str | Path,
    data: CellStore | str | Path,
    cell_types: pd.Series | str | Path,
    *,
    window_bp: int = WINDOW_BP,
    max_cells: int | None = None,
    covariates: Sequence[str] = (),
    donor: str | None = None,
    genes: Sequence[str] = (),
    region: str | None = None,
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
        Largest distance between gene body and cCRE in bp.
    max_cells
        Maximum number of cells per type, drawn by `seed`; `None` takes all.
    covariates
        Columns of the store's `cell_info` to adjust p-values and coupling for, beside depth. Text, booleans and
        integers with at most 10 values are categories.
    donor
        Column that names the donor of each cell. p-values are then of a t-test over donors.
    genes
        Names or ids of the genes to link; all where empty.
    region
        Link genes whose TSS lies in this region, chrom:start-end.
    seed
        Random seed of the choice of cells.
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
    options = LinkOptions(window_bp, max_cells, tuple(covariates), donor, tuple(genes), region, seed)
    scorer = prepare(checkpoint, data, cell_types, options, device)
    return Links(scorer.inputs.store.reference, window_bp, list(scorer.types()), scorer.cell_num)


def link(
    checkpoint: Checkpoint | str | Path,
    data: CellStore | str | Path,
    cell_types: pd.Series | str | Path,
    output_dir: str | Path = "output",
    *,
    window_bp: int = WINDOW_BP,
    max_cells: int | None = None,
    covariates: Sequence[str] = (),
    donor: str | None = None,
    genes: Sequence[str] = (),
    region: str | None = None,
    seed: int = 0,
    formats: Iterable[FormatName] = (),
    device: str | torch.device | None = None,
    force: bool = False,
) -> Path:
    """Score links and write them type by type; return the folder, `<output_dir>/cisformer_link`.

    Parameters
    ----------
    checkpoint, data, cell_types
        See `score_links`.
    output_dir
        Where the folder goes. Under `accelerate launch`, processes share the cell types.
    window_bp, max_cells, covariates, donor, genes, region, seed
        See `score_links`.
    formats
        Genome browser files to write as well, of each gene's strongest links: "bedpe", "interact", "longrange".
    device
        See `score_links`.
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
    options = LinkOptions(window_bp, max_cells, tuple(covariates), donor, tuple(genes), region, seed)
    scorer = prepare(checkpoint, data, cell_types, options, device)
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
        kept = self.wanted & (n_open > 0) & (self.cells.n_expressed[number][pairs.gene] > 0)
        attention, effect = read_attention(self.inputs, name)
        scale = self.inputs.model.scale.double().cpu().numpy()[pairs.gene]
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
            "effect": effect * scale / np.maximum(n_open, 1),
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


def share_evidence(inputs: LinkInputs, cells: CellSums, tests: PairTests) -> SharedEvidence:
    """Return prior, association and weights of evidence, from all cells."""
    reference, layout, pairs = inputs.store.reference, inputs.layout, inputs.pairs
    genes = reference.genes.iloc[layout.target_index].reset_index(drop=True)
    ccres = reference.ccres.iloc[layout.input_index].reset_index(drop=True)
    site, middle = tss(genes), ((ccres["start"] + ccres["end"]) // 2).to_numpy()
    chrom = genes["chrom"].to_numpy()
    profiles = state_profiles(inputs.model, float(np.exp(np.median(cells.depths[:, 1]))))
    shared = SharedEvidence(
        pairs=pairs,
        prior=load_prior(),
        weights=EvidenceWeights(),
        genes_between=count_between(
            _genes_of_genome(reference), chrom[pairs.gene], middle[pairs.ccre], site[pairs.gene]
        ),
        breadth=_breadth(cells)[pairs.gene],
        is_promoter=_promoters(genes, ccres),
        association=associate(pairs, *profiles).astype(np.float64),
        less=0.0,
        power=pair_power(pairs, cells),
    )
    n_cells, n_open = int(cells.n_cells.sum()), cells.n_open.sum(axis=0)
    level = cells.n_expressed.sum(axis=0) / n_cells
    partner = exchange_genes(chrom, level, np.random.default_rng(0))
    exchanged = associate(pairs, profiles[0][partner], profiles[1]).astype(np.float64)
    prior = shared.prior_log_odds(shared.activity(n_open, n_cells))
    used = (level[pairs.gene] >= SEEN_GENE) & ((n_open / n_cells)[pairs.ccre] >= SEEN_CCRE)
    used &= np.abs(pairs.distance) > PROMOTER_BP
    measured = Evidence(probability(prior), shared.association, exchanged, tests.coupling, shared.power)
    weights = estimate_weights(measured.rows(used))
    added = weights.log_odds(shared.association, tests.coupling, shared.power)
    less = keep_total(prior[used], added[used]) if used.any() else 0.0
    return replace(shared, weights=weights, less=less)


def _genes_of_genome(reference: Reference) -> pd.DataFrame:
    """Return the genes of the reference's genome; its own where the genome is not built in, or has fewer.

    A data set may hold few genes. A pair would then seem to have none between gene and cCRE.
    """
    own = reference.genes.assign(gene_name=reference.gene_labels)
    if reference.genome not in GENOMES:
        return own
    known = load_annotation(reference.genome)
    if (known["end"] > 0).sum() <= (own["end"] > 0).sum():
        return own
    return known.assign(chrom=rename_chroms(known["chrom"], own["chrom"]))


def _breadth(cells: CellSums) -> np.ndarray:
    """Return the breadth of expression over the types that have enough cells to tell; [G].

    Few counts make any gene look specific, so breadth is shrunk to that of an unknown gene.
    """
    enough = cells.n_cells >= FEWEST_CELLS_OF_BREADTH
    counts = cells.counts[enough] if enough.sum() > 1 else cells.counts
    seen = counts.mean(axis=0)
    trust: np.ndarray = seen / (seen + COUNTS_OF_BREADTH)
    return UNKNOWN_BREADTH + trust * (expression_breadth(counts) - UNKNOWN_BREADTH)


def _promoters(genes: pd.DataFrame, ccres: pd.DataFrame) -> np.ndarray:
    """Say which cCREs lie within 500 bp of the TSS of a known gene; bool [P]."""
    site = tss(genes)
    around = pd.DataFrame(
        {"chrom": genes["chrom"], "start": np.maximum(site - PROMOTER_BP, 0), "end": site + PROMOTER_BP}
    )
    found = np.zeros(len(ccres), dtype=bool)
    found[overlap_pairs(around[(genes["end"] > 0).to_numpy()], ccres)[1]] = True
    return found
