"""Measure `annotate_variants`: is the linked gene right more often than the nearest one, and is the enrichment honest?

    python benchmarks/variants.py WORK --simulated contact 31     one mode and seed at a time, a minute and a half each
    python benchmarks/variants.py WORK --enrichment contact 31    planted traits, on the links that --simulated left
    python benchmarks/variants.py WORK --null contact31 uniform31    random variants, on these links
    python benchmarks/variants.py WORK --real DATA                DATA holds `truth/`, `crispr/` and `heme_bulk_14/`

*Simulated*: 1,500 cells, 1,200 genes, 10,000 cCREs, 6 types; the `small` preset; all cells are linked. One variant is
planted in each cCRE whose links are all distal (more than 1 kb from the TSS), at a random base. A gene is right if the
cCRE is linked to it in some type. The linked gene is that of the highest score, however low (`min_score` 0); the
column `gene` is that of the default: the linked gene where a link scores enough, else the nearest one.

*Enrichment*: random variants fall into listed cCREs in proportion to their length, scattered (80) or three
within 20 kb of each of 40 places. Planted traits: half of the loci in cCREs with a distal link in one type, of which
the third most open there relative to other types; the other half anywhere.

*Real*: fine-mapped eQTL (label 1) and links of 14 sorted blood populations: the prior fitted to CRISPRi screens alone,
which are K562, and correlation over populations with the weight that the data give it, as `atac2rna_link` estimates
it. Prints markdown.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from cisformer.analysis.enrichment import LinkedShare, MatchedCcres, one_per_locus
from cisformer.analysis.stored import StoredLinks, open_links
from cisformer.analysis.variant_genes import annotate_variants, collect
from cisformer.config import default_config
from cisformer.data.genome import region_names, signed_distance, tss, window_pairs
from cisformer.data.preprocess import preprocess
from cisformer.data.reference import Reference, load_reference
from cisformer.links.files import COMPONENTS, Links, TypeLinks
from cisformer.links.score import link
from cisformer.simulation import simulate
from cisformer.training.loop import train

DISTAL_BP, WINDOW_BP = 1_000, 250_000
BINS_BP = (1_000, 10_000, 50_000, 250_000)
CLUSTER_BP = 20_000
SCORES = (0.0, 0.1, 0.5, 0.9)
N_NULL, N_PLANTED, N_DRAWS = 300, 30, 500
DEFAULT = {"genome": "hg38", "n_permutations": 1}
EVERYTHING = DEFAULT | {"min_score": 0.0}


def right(table: pd.DataFrame, genes_of: dict[str, set[str]]) -> pd.DataFrame:
    """Say of each variant whether the linked gene and the nearest gene are right, and whether they are the same."""
    truth = [genes_of[name] for name in table["variant"]]
    columns = {
        "linked": [gene in known for gene, known in zip(table["linked_gene"], truth, strict=True)],
        "nearest": [gene in known for gene, known in zip(table["nearest_gene"], truth, strict=True)],
        "same": (table["linked_gene"] == table["nearest_gene"]).tolist(),
        "score": table["score"].fillna(0).tolist(),
    }
    return pd.DataFrame(columns)


def compare(answers: pd.DataFrame, distance: np.ndarray) -> None:
    """Print how often each is right, over all and by distance to the nearest right gene, with a sign test."""
    print(
        "| distance of right gene, or score | variants | nearest right | linked right | linked : nearest alone | p |"
    )
    print("|---|---|---|---|---|---|")
    parts = {"all": np.ones(len(answers), dtype=bool)}
    for low, high in zip((0, *BINS_BP[:-1]), BINS_BP, strict=True):
        parts[f"{low / 1000:g}–{high / 1000:g} kb"] = (distance >= low) & (distance < high)
    for low, high in zip(SCORES, (*SCORES[1:], np.inf), strict=True):
        inside = ((answers["score"] >= low) & (answers["score"] < high)).to_numpy()
        parts[f"score {low:g}–{high:g}" if high < 1 else f"score {low:g} or more"] = inside
    for name, inside in parts.items():
        own = answers[inside]
        if len(own):
            ours, theirs = (own["linked"] & ~own["nearest"]).sum(), (own["nearest"] & ~own["linked"]).sum()
            p = stats.binomtest(ours, ours + theirs).pvalue if ours + theirs else 1.0
            shares = f"{own['nearest'].mean():.1%} | {own['linked'].mean():.1%}"
            print(f"| {name} | {len(own):,} | {shares} | {ours} : {theirs} | {p:.1g} |")
    same = answers["same"]
    print(
        f"\nthe two agree on {same.sum():,} variants, and are right for {answers['nearest'][same].mean():.1%} of these"
    )


def compare_column(links: Path, variants: Path, answers: pd.DataFrame, genes_of: dict[str, set[str]]) -> None:
    """Print how often the column `gene` is right, beside the nearest gene and the linked gene, with sign tests."""
    found = annotate_variants(links, variants, **DEFAULT).variants
    gene = np.array(
        [gene in genes_of[name] for gene, name in zip(found["gene"], found["variant"], strict=True)]
    )
    print(f"\ncolumn gene: {gene.mean():.1%} of {len(gene):,} right; right alone : wrong alone", end="")
    for name in ("nearest", "linked"):
        other = answers[name].to_numpy(bool)
        ours, theirs = int((gene & ~other).sum()), int((other & ~gene).sum())
        p = stats.binomtest(ours, ours + theirs).pvalue if ours + theirs else 1.0
        print(f"; against {name} ({other.mean():.1%}) {ours} : {theirs}, p {p:.1g}", end="")
    print()


# ---------------------------------------------------------------------------------------------- simulated


def simulated(work: Path, mode: str, seed: int) -> None:
    """Make links of simulated cells, plant variants in cCREs with distal links, and ask for their genes."""
    folder = work / f"{mode}{seed}"
    if not (folder / "cisformer_link").is_dir():
        make_links(folder, mode, seed)
    planted = pd.read_csv(folder / "true_links.tsv", sep="\t", keep_default_na=False)
    nearest = planted.assign(far=planted["distance"].abs()).groupby("ccre")["far"].min()
    distal = planted[planted["ccre"].isin(nearest.index[nearest > DISTAL_BP])]
    genes_of = distal.groupby("ccre")["gene_name"].agg(set).to_dict()
    ends = pd.Series(list(genes_of)).str.extract(r"(.+):(\d+)-(\d+)").astype({1: int, 2: int})
    rng = np.random.default_rng(seed)
    position = rng.integers(ends[1], ends[2])
    bed = pd.DataFrame({"chrom": ends[0], "start": position, "end": position + 1, "name": list(genes_of)})
    bed.to_csv(folder / "variants.bed", sep="\t", header=False, index=False)
    table = annotate_variants(folder, folder / "variants.bed", **EVERYTHING).variants
    near = distal.assign(far=distal["distance"].abs()).groupby("ccre")["far"].min().reindex(table["variant"])
    print(f"\n{mode}, seed {seed}:\n")
    answers = right(table, genes_of)
    compare(answers, near.to_numpy())
    compare_column(folder, folder / "variants.bed", answers, genes_of)


def make_links(folder: Path, mode: str, seed: int) -> None:
    """Simulate cells, train, and link all of them."""
    cells = simulate(1500, 1200, 10_000, n_types=6, mode=mode, seed=seed)
    cells.write(folder)
    options = {"direction": "atac2rna", "reference": "dataset", "force": True}
    preprocess(cells.rna, cells.atac, folder / "data", **options)
    small = default_config("atac2rna", "small")
    best = train(folder / "data", "v", direction="atac2rna", save=folder / "save", cpu=True, config=small)
    store = preprocess(cells.rna, cells.atac, folder / "all", manually=True, **options)["all"]
    link(best, store.path, cells.rna.obs["cell_type"], folder)


@dataclass(frozen=True)
class Trial:
    """Links of a simulated set, what random variants are drawn from, and what they are compared with."""

    stored: StoredLinks
    linked: LinkedShare
    matched: MatchedCcres
    rng: np.random.Generator

    @classmethod
    def of(cls, folder: Path, seed: int) -> Trial:
        """Read the links that `simulated` made."""
        stored = open_links(folder)
        _, linked = collect(stored, pd.DataFrame({"variant": [0], "ccre": [0]}), 0.0)
        matched = MatchedCcres.of(linked, stored.ccres, stored.genes)
        return cls(stored, linked, matched, np.random.default_rng(seed))

    def p_values(self, rows: np.ndarray) -> np.ndarray:
        """Test variants, one in each of these cCREs; [types]."""
        about = self.stored.ccres.iloc[rows][["chrom", "start"]].assign(pip=np.nan, ccre=rows)
        place = np.searchsorted(self.linked.ccre, one_per_locus(about, int(rows[0])))
        return self.matched.test(place, n_draws=N_DRAWS, seed=int(rows[0]))[1]

    def random(self, kind: str) -> np.ndarray:
        """Draw cCREs in proportion to their length: 80 scattered ones, or three around each of 40."""
        share = self.matched.width / self.matched.width.sum()
        if kind == "scattered":
            return np.sort(self.rng.choice(self.linked.ccre, 80, replace=False, p=share))
        regions = self.stored.ccres.iloc[self.linked.ccre]
        middle, chrom = ((regions["start"] + regions["end"]) // 2).to_numpy(), regions["chrom"].to_numpy()
        found = []
        for k in self.rng.choice(len(share), 40, p=share):
            near = np.flatnonzero((chrom == chrom[k]) & (np.abs(middle - middle[k]) <= CLUSTER_BP))
            found.append(self.rng.choice(near, 3, p=share[near] / share[near].sum()))
        return np.unique(self.linked.ccre[np.concatenate(found)])


def null(work: Path, names: list[str]) -> None:
    """Print λ of random variants for each set of links, and for all, with its error from sets of variants."""
    print("| links | random variants | λ | its s.e. | p below 0.05 | below 0.01 | KS, worst type |")
    print("|---|---|---|---|---|---|---|")
    rng = np.random.default_rng(0)
    for kind in ("scattered", "clustered"):
        parts = []
        for name in names:
            trial = Trial.of(work / name, 1)
            parts.append(np.stack([trial.p_values(trial.random(kind)) for _ in range(N_NULL)]))
            print_null(name, kind, parts[-1], rng)
        print_null("all", kind, np.concatenate(parts), rng)


def print_null(name: str, kind: str, p: np.ndarray, rng: np.random.Generator) -> None:
    """Print one row; p-values are [sets of variants, types], whose types go together."""

    def inflation(values: np.ndarray) -> float:
        return float(np.median(stats.chi2.isf(values, 1)) / stats.chi2.ppf(0.5, 1))

    drawn = [inflation(p[rng.integers(0, len(p), len(p))]) for _ in range(200)]
    worst = min(stats.kstest(row, "uniform").pvalue for row in p.T)
    print(
        f"| {name} | {kind} | {inflation(p):.3f} | {np.std(drawn):.3f} | {(p < 0.05).mean():.4f} | "
        f"{(p < 0.01).mean():.4f} | {worst:.2g} |", flush=True,
    )  # fmt: skip


def planted(work: Path, mode: str, seed: int) -> None:
    """Print how often the type of a planted trait is significant, and first."""
    trial = Trial.of(work / f"{mode}{seed}", seed)
    stored, linked, rng = trial.stored, trial.linked, trial.rng
    links = pd.read_csv(work / f"{mode}{seed}" / "true_links.tsv", sep="\t", keep_default_na=False)
    links = links[links["distance"].abs() > DISTAL_BP]
    row_of = pd.Series(np.arange(len(stored.ccres)), region_names(stored.ccres))
    share = {}
    for name in stored.cell_types:
        table = stored.of_type(name, ("n_open",)).drop_duplicates("ccre")
        share[name] = np.bincount(table["ccre"], table["n_open"], len(stored.ccres)) / stored.n_cells[name]
    mean = np.mean(list(share.values()), axis=0)
    print(f"\n{mode}, seed {seed}:\n")
    print("| planted trait, loci | right type: p below 0.05 / types | right type first |\n|---|---|---|")
    for n in (30, 100):
        hit = []
        for number in range(N_PLANTED):
            name = stored.cell_types[number % len(stored.cell_types)]
            own = np.intersect1d(row_of[links.loc[links["cell_type"] == name, "ccre"].unique()], linked.ccre)
            ratio = (share[name][own] + 0.005) / (mean[own] + 0.005)
            own = own[ratio >= np.quantile(ratio, 2 / 3)]
            rows = np.concatenate(
                [rng.choice(own, n // 2, replace=False), rng.choice(linked.ccre, n - n // 2)]
            )
            p = pd.Series(trial.p_values(np.unique(rows)), list(linked.score))
            hit.append((p[name] < 0.05 / len(p), p.idxmin() == name))
        found, first = np.mean(hit, axis=0)
        print(f"| {n} | {found:.0%} | {first:.0%} |")


# ---------------------------------------------------------------------------------------------- real


def real(work: Path, data: Path) -> None:
    """Make links of blood populations, and ask for the genes of fine-mapped eQTL."""
    if not (work / "heme").is_dir():
        blood_links(data).write(work / "heme")
    table = pd.read_csv(data / "truth" / "eqtl_finemapped_pgboost_example_hg38.tsv.gz", sep="\t")
    table = table[
        (table["label"] == 1) & table["gene"].isin(set(open_links(work / "heme").genes["gene_name"]))
    ]
    table["variant"] = table["chrom"] + ":" + table["end"].astype(str)
    genes_of = table.groupby("variant")["gene"].agg(set).to_dict()
    table.drop_duplicates("variant")[["chrom", "start", "end", "variant"]].to_csv(
        work / "eqtl.bed", sep="\t", header=False, index=False
    )
    found = annotate_variants(work / "heme", work / "eqtl.bed", **EVERYTHING)
    print(f"\n{found.counts}\n")
    answers, within = found.variants, (found.variants["linked_gene"] != "").to_numpy()
    genes = load_reference("human").genes.drop_duplicates("gene_name").set_index("gene_name")
    known = table.assign(far=np.abs(table["start"].to_numpy() - tss(genes.loc[table["gene"]])))
    near = known.groupby("variant")["far"].min().reindex(answers["variant"]).to_numpy()
    print("variants in a peak:\n")
    compare(right(answers[within], genes_of), near[within])
    compare_column(work / "heme", work / "eqtl.bed", right(answers, genes_of), genes_of)
    outside = right(answers[~within], genes_of)
    print(
        f"\nvariants in no peak: {len(outside):,}; the nearest gene is right for {outside['nearest'].mean():.1%}"
    )


def blood_links(data: Path) -> Links:
    """Return links of the 14 populations: prior with the population's accessibility, expression, correlation."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
    from link_truths import Blood, blood_correlation, screens
    from sklearn.linear_model import LogisticRegression

    from cisformer.links.prior import (
        FEATURES,
        LinkPrior,
        count_between,
        count_near,
        is_noncoding,
        pair_features,
        relative_activity,
    )  # fmt: skip
    from cisformer.links.type_scores import works
    from cisformer.links.weights import Evidence, estimate_weights, exchange_genes, probability

    blood, human = Blood.read(data), load_reference("human")
    truth = screens(data, human, blood)
    fitted = LogisticRegression(C=1e6, max_iter=2000).fit(truth.features[list(FEATURES)], truth.is_link)
    prior = LinkPrior(float(fitted.intercept_[0]), tuple(fitted.coef_[0]))
    genes = human.genes[(human.genes["end"] > 0) & human.genes["gene_name"].isin(blood.gene.index)]
    genes = genes[~is_noncoding(genes["gene_name"])].drop_duplicates("gene_name")
    level = blood.level[:, blood.gene.reindex(genes["gene_name"])]
    genes, level = genes[level.max(axis=0) > 1].reset_index(drop=True), level[:, level.max(axis=0) > 1]
    reference = Reference("dataset", "hg38", genes, blood.peaks)
    site, middle = tss(genes), (blood.peaks["start"] + blood.peaks["end"]).to_numpy() // 2
    gene, peak = window_pairs(genes, blood.peaks, WINDOW_BP)
    distance = signed_distance(genes, blood.peaks, gene, peak)
    names = genes["gene_name"]
    chrom = genes["chrom"].to_numpy()
    between = count_between(human.genes, chrom[gene], middle[peak], site[gene])
    near = count_near(human.genes, chrom, site)[gene]
    breadth, promoter = blood.breadth_of(names)[gene], blood.is_promoter(genes)
    partner = exchange_genes(chrom, level.mean(axis=0), np.random.default_rng(0))
    correlation = blood_correlation(blood, names.iloc[gene], peak)
    exchanged = blood_correlation(blood, names.iloc[partner[gene]], peak)

    def log_odds(signal: np.ndarray) -> np.ndarray:
        activity = relative_activity(signal, promoter)[peak]
        return prior.log_odds(pair_features(distance, activity, between, breadth, near))

    one, zero = np.ones(len(gene)), np.zeros(len(gene))
    evidence = Evidence(probability(log_odds(blood.signal.mean(axis=0))), correlation, exchanged, zero, one)
    weights = estimate_weights(evidence.rows(np.abs(distance) > DISTAL_BP))
    print(
        f"{len(gene):,} pairs; weight of correlation {weights.of_association(one[:1])[0]:.2f} per unit of r"
    )
    expression = np.clip(level - level.mean(axis=0), -2, 2) * np.log(2)
    types = []
    for number, name in enumerate(blood.names):
        odds = log_odds(blood.signal[number]) + weights.log_odds(correlation, zero, one)
        score = probability(odds + works(expression[number][gene])).astype(np.float32)
        blank = {key: np.full(len(gene), np.nan, np.float32) for key in COMPONENTS}
        is_open = (blood.signal[number] > 0)[peak].astype(np.float32)
        types.append(TypeLinks(name, 1, gene, peak, distance, blank | {"score": score, "n_open": is_open}))
    return Links(reference, WINDOW_BP, sorted(types, key=lambda one: one.cell_type), {})


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description="Measure annotate_variants.")
    parser.add_argument("work", type=Path)
    parser.add_argument("--simulated", nargs=2, metavar=("MODE", "SEED"))
    parser.add_argument("--enrichment", nargs=2, metavar=("MODE", "SEED"))
    parser.add_argument("--null", nargs="+", metavar="MODESEED")
    parser.add_argument("--real", type=Path, metavar="DATA")
    options = parser.parse_args()
    if options.simulated:
        simulated(options.work, options.simulated[0], int(options.simulated[1]))
    if options.null:
        null(options.work, options.null)
    if options.enrichment:
        planted(options.work, options.enrichment[0], int(options.enrichment[1]))
    if options.real:
        real(options.work, options.real)


if __name__ == "__main__":
    main()
