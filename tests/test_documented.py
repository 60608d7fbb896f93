"""The documented architecture: the published numbers, exact shortcuts, and training under the common loop."""

import json
import math
from dataclasses import replace

import anndata as ad
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import rankdata
from torch.nn import functional as F

from cisformer.config import default_config, parse_config
from cisformer.data.batches import Layout, encode_input, normalise_rna, read_modality
from cisformer.data.store import CellStore, find_split
from cisformer.errors import CheckpointError, InputError
from cisformer.model import bf16_attention, documented
from cisformer.model.checkpoint import export_checkpoint, load_checkpoint
from cisformer.model.documented import CHUNK, FullModel, attend, export_published, load_published
from cisformer.model.documented_task import FullTask, choose_genes, counts_of, pair_ranks
from cisformer.prediction.predict import predict
from cisformer.training.loop import train
from cisformer.training.split import validation_batches

DIRECTIONS = ["atac2rna", "rna2atac"]
PADDING = {"atac2rna": {"ccre_index": 5, "gene_index": 4}, "rna2atac": {"gene_index": 4, "gene_value": 4}}
SHAPE = {
    "total_gene": 60, "max_express": 7, "dim": 28, "dec_depth": 2, "dec_heads": 4, "dec_ff_mult": 2,
    "dec_dim_head": 8,
}  # fmt: skip


def small_model(direction, seed=0, **model):
    torch.manual_seed(seed)
    config = parse_config({"model": SHAPE | model | {"architecture": "full"}}, direction)
    return FullModel(config.model, direction).eval()


def tokens(direction, n_cells=2, n_ccres=11, n_genes=9, seed=0):
    rng = np.random.default_rng(seed)
    draw = {
        "ccre_index": np.stack([rng.choice(1_033_239, n_ccres, replace=False) for _ in range(n_cells)]),
        "gene_index": np.stack([rng.choice(60, n_genes, replace=False) for _ in range(n_cells)]),
        "gene_value": rng.integers(1, 8, (n_cells, n_genes)),
    }
    return {k: torch.from_numpy(v) for k, v in draw.items() if direction == "rna2atac" or k != "gene_value"}


# ---- published numbers


@pytest.fixture(params=DIRECTIONS)
def golden(request, shared):
    """Direction, weights, configuration, inputs and the published program's outputs."""
    direction = request.param
    folder = shared / "golden"
    reference = load_file(folder / f"{direction}_reference.safetensors")
    inputs = {k: reference.pop(k) for k in ("ccre_index", "gene_index", "gene_value")}
    config = json.loads((folder / f"{direction}_config.json").read_text())
    return direction, folder / f"{direction}_weights.safetensors", config, inputs, reference


def padded(inputs, direction):
    return {k: F.pad(v, (0, PADDING[direction].get(k, 0)), value=-1) for k, v in inputs.items()}


def test_published_logits_are_reproduced(golden):
    direction, weights, config, inputs, wanted = golden
    logits = load_published(weights, config, direction)(**inputs)
    torch.testing.assert_close(logits, wanted["logits"], atol=1e-4, rtol=0)


def test_published_logits_of_padded_cells_are_reproduced_without_masking(golden):
    direction, weights, config, inputs, wanted = golden
    model = load_published(weights, config, direction, mask_padding=False)
    logits = model(**padded(inputs, direction))[:, : wanted["logits"].shape[1]]
    torch.testing.assert_close(logits, wanted["logits_when_padded"], atol=1e-4, rtol=0)


def test_masked_padding_changes_nothing(golden):
    direction, weights, config, inputs, wanted = golden
    logits = load_published(weights, config, direction)(**padded(inputs, direction))
    torch.testing.assert_close(logits[:, : wanted["logits"].shape[1]], wanted["logits"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("golden", ["atac2rna"], indirect=True)
def test_published_attention_is_reproduced(golden):
    direction, weights, config, inputs, wanted = golden
    model = load_published(weights, config, direction)
    torch.testing.assert_close(model.cross_attention(**inputs), wanted["cross_attention"], atol=1e-4, rtol=0)
    seen = model.cross_attention(**padded(inputs, direction))
    torch.testing.assert_close(seen[:, :9, :11], wanted["cross_attention"], atol=1e-5, rtol=0)
    assert seen[:, 9:].abs().max() == seen[:, :, 11:].abs().max() == 0


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_published_weights_survive_a_round_trip_bit_by_bit(golden, tmp_path, name):
    direction, weights, config, _, _ = golden
    written = export_published(load_published(weights, config, direction), tmp_path / name)
    again = export_published(load_published(written, config, direction), tmp_path / "again.safetensors")
    original, copy = load_file(weights), load_file(again)
    assert original.keys() == copy.keys()
    assert all(torch.equal(original[k], copy[k]) for k in original)


# ---- files that do not fit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dec_depth": 3}, r"layers\.2\.\S+ is missing \(dec_depth\)"),
        ({"dec_depth": 1}, r"layers\.1\.\S+ is unexpected \(dec_depth\)"),
        (
            {"dec_heads": 3},
            r"to_q\.weight is 32 × 28, the config asks for 24 × 28 \(dec_heads × dec_dim_head, dim\)",
        ),
        (
            {"total_gene": 61},
            r"gene_emb\.weight is 61 × 28, the config asks for 62 × 28 \(total_gene \+ 1, dim\)",
        ),
        ({"max_express": 8}, r"\(max_express \+ 1, dim\)"),
        (
            {"dec_ff_mult": 3},
            r"w1\.weight is 56 × 28, the config asks for 84 × 28 \(dim × dec_ff_mult, dim\)",
        ),
    ],
)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_weights_of_another_config_are_refused_with_the_key(direction, change, message, tmp_path):
    path = export_published(small_model(direction), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_published(path, SHAPE | change, direction)


def test_weights_of_the_other_direction_are_refused(tmp_path):
    path = export_published(small_model("atac2rna"), tmp_path / "w.bin")
    with pytest.raises(CheckpointError, match=r"enc\.gene_emb\.weight is missing \(direction\)"):
        load_published(path, SHAPE, "rna2atac")


class Payload:
    def __reduce__(self):
        return (print, ("run",))


def test_files_that_are_not_weights_are_refused(tmp_path, capsys):
    torch.save({"a": Payload()}, tmp_path / "code.bin")
    (tmp_path / "cut.bin").write_bytes(
        export_published(small_model("atac2rna"), tmp_path / "x.bin").read_bytes()[:999]
    )
    (tmp_path / "cut.safetensors").write_bytes(b"\0" * 20)
    torch.save([1, 2], tmp_path / "list.bin")
    for name in ("code.bin", "cut.bin", "cut.safetensors", "list.bin", "absent.bin"):
        with pytest.raises(CheckpointError, match=name):
            load_published(tmp_path / name, SHAPE, "atac2rna")
    assert "run" not in capsys.readouterr().out


# ---- attention


def explicit(q, k, v, heads):
    """Softmax attention of one cell, head by head, in float64."""
    width = q.shape[1] // heads
    out = []
    for h in range(heads):
        at = slice(h * width, (h + 1) * width)
        scores = q[:, at].double() @ k[:, at].double().T / math.sqrt(width)
        out.append(scores.softmax(dim=1) @ v[:, at].double())
    return torch.cat(out, dim=1).float()


@pytest.mark.parametrize(
    ("queries", "keys"), [([4, 4], [6, 6]), ([3, 5, 1], [7, 2, 9]), ([2, 0, 3], [5, 4, 0])]
)
@pytest.mark.parametrize("function", [attend, documented._attend_padded])
def test_each_cell_attends_to_its_own_tokens(function, queries, keys):
    torch.manual_seed(0)
    q, k, v = torch.randn(sum(queries), 12), torch.randn(sum(keys), 12), torch.randn(sum(keys), 12)
    cells = zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
    wanted = torch.cat([explicit(*cell, 3) if len(cell[1]) else cell[0] * 0 for cell in cells])
    torch.testing.assert_close(function(q, k, v, queries, keys, 3), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("width", [30, 31, 32, 140])
def test_bfloat16_gradients_are_as_good_as_those_of_torch(width):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, width) * 1.5 for n in (70, 1300, 1300))
    weight = torch.randn(q.shape)

    def results(function, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = function(*leaves)
        out.backward(weight.to(dtype))
        return [out.detach(), *(x.grad for x in leaves)]

    exact = results(F.scaled_dot_product_attention, torch.float64)
    theirs = results(F.scaled_dot_product_attention, torch.bfloat16)
    for wanted, other, found in zip(
        exact, theirs, results(bf16_attention.attention, torch.bfloat16), strict=True
    ):
        error = (found - wanted).norm() / wanted.norm()
        assert error < max(3 * (other - wanted).norm() / wanted.norm(), 1e-3)
        assert error < 0.02


def test_weights_of_the_explicit_path_give_what_the_kernel_gives():
    model = small_model("atac2rna", dec_heads=1)
    inputs = tokens("atac2rna", n_cells=1)
    last = model.layers[-1].cross_attention
    seen = {}
    last.register_forward_hook(lambda module, args, out: seen.update(out=out))
    with torch.no_grad():
        context = model.encode(inputs["ccre_index"])
        model(**inputs)
        weights = model.cross_attention(**inputs, as_published=False)[0]
        wanted = last.to_out(weights @ context[-1].value)
    torch.testing.assert_close(seen["out"], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("block", [1, 4, 100])
def test_ranks_in_blocks_are_those_of_the_whole_matrix(block):
    torch.manual_seed(0)
    q, k = torch.randn(3, 17, 5), torch.randn(3, 23, 5)
    whole = (q @ k.mT / math.sqrt(5)).softmax(dim=-1).mean(dim=0)
    torch.testing.assert_close(torch.cat(list(documented.attention_blocks(q, k, block))), whole)
    query, key = np.indices(whole.shape).reshape(2, -1)[:, ::3]
    by_row, by_column = rankdata(whole, axis=1) - 1, rankdata(whole, axis=0) - 1
    wanted = (by_row / 22 + by_column / 16)[query, key] / 2
    found = pair_ranks(q, k, torch.from_numpy(query), torch.from_numpy(key), block)
    np.testing.assert_allclose(found, wanted, atol=1e-6)


# ---- tokens in, logits out


def test_a_ccre_is_embedded_by_its_digits():
    embedding = documented.DigitEmbedding(14)
    found = embedding(torch.tensor([1_033_238]))[0]
    assert torch.equal(found, torch.cat([embedding.weight[d] for d in (1, 0, 3, 3, 2, 3, 8)]))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_cells_do_not_touch_each_other_wherever_their_padding_is(direction):
    model, inputs = small_model(direction), tokens(direction, n_cells=3)
    hidden = torch.tensor([[0, 3], [8, 1], [5, 5]])
    for name in PADDING[direction]:
        inputs[name] = inputs[name].scatter(1, hidden, -1)
    with torch.no_grad():
        together = model(**inputs)
        for cell in range(3):
            alone = {k: v[cell][v[cell] >= 0][None] for k, v in inputs.items()}
            kept = inputs["gene_index" if direction == "atac2rna" else "ccre_index"][cell] >= 0
            torch.testing.assert_close(together[cell][kept], model(**alone)[0], atol=1e-5, rtol=1e-5)
            assert (together[cell][~kept] == 0).all()


def test_ccres_are_decoded_in_chunks_to_the_same_logits():
    model, inputs = small_model("rna2atac"), tokens("rna2atac", n_ccres=50)
    with torch.no_grad():
        whole = model(**inputs)
        model.chunk = 7
        torch.testing.assert_close(model(**inputs), whole, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_bfloat16_stays_near_float32(direction):
    model, inputs = small_model(direction), tokens(direction)
    with torch.no_grad():
        exact = model(**inputs)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(**inputs)
    assert (rounded - exact).abs().max() < 0.05 * exact.abs().max()


# ---- the task: targets, draws, values


@pytest.fixture(scope="session")
def full_config(tiny_config):
    """A function that returns a small config of architecture full."""

    def make(direction, prior=False, **training):
        config = tiny_config(direction, **{"epoch": 1} | training)
        model = {"architecture": "full", "dim": 28, "prior": prior}
        limits = {"enc_max_len": 300, "dec_max_len": 60, "multiple": 2}
        return config.model_copy(
            update={
                "model": config.model.model_copy(update=model),
                "datapreprocess": config.datapreprocess.model_copy(update=limits),
            }
        )

    return make


@pytest.fixture(scope="session")
def full_checkpoints(tiny_data, full_config, tmp_path_factory):
    """A trained checkpoint of each direction."""
    save = tmp_path_factory.mktemp("full_save")
    return {
        d: train(tiny_data[d], d, direction=d, save=save, config=full_config(d, epoch=3, lr=3e-3))
        for d in DIRECTIONS
    }


def some_batch(checkpoint, data, n_cells=5):
    store = CellStore.open(find_split(data[checkpoint.direction], "test"))
    return next(iter(validation_batches(store, np.arange(n_cells), checkpoint.layout, checkpoint.config)))


def test_counts_come_back_from_normalised_expression():
    rng = np.random.default_rng(0)
    import scipy.sparse as sp

    counts = sp.csr_matrix(rng.poisson(0.7, (20, 50)).astype(np.float32))
    counts.data[np.unique(counts.indptr[:-1])] = 1
    value = normalise_rna(counts)
    found = counts_of(torch.from_numpy(value.data), torch.from_numpy(value.indptr.astype(np.int64)))
    np.testing.assert_array_equal(found, counts.data)


def test_classes_are_bins_of_log_counts_relative_to_the_maximum(full_checkpoints, tiny_data):
    checkpoint = full_checkpoints["atac2rna"]
    batch = some_batch(checkpoint, tiny_data)
    drawn = checkpoint.model.draw(batch)
    store = CellStore.open(find_split(tiny_data["atac2rna"], "test"))
    counts = store.rna(np.arange(5)).toarray()[:, checkpoint.layout.target_index]
    for cell, of_cell in enumerate(counts):
        edges = np.log1p(of_cell.max()) * np.arange(8) / 7
        wanted = np.searchsorted(edges + 1e-6, np.log1p(of_cell)[drawn.column[cell]], side="left")
        np.testing.assert_array_equal(
            drawn.target[cell], np.where(of_cell[drawn.column[cell]] > 0, wanted, 0)
        )


def test_half_of_the_drawn_ccres_are_open_and_the_shift_says_so(full_checkpoints, tiny_data):
    checkpoint = full_checkpoints["rna2atac"]
    batch = some_batch(checkpoint, tiny_data)
    drawn = checkpoint.model.draw(batch)
    n_known, n_drawn = len(checkpoint.layout.target_index), checkpoint.model.n_drawn
    for cell in range(5):
        is_open = np.zeros(n_known, bool)
        is_open[batch.target_index[batch.target_indptr[cell] : batch.target_indptr[cell + 1]]] = True
        assert len(np.unique(drawn.column[cell])) == n_drawn
        np.testing.assert_array_equal(drawn.target[cell], is_open[drawn.column[cell]])
        n_open = min(n_drawn // 2, is_open.sum())
        assert drawn.target[cell].sum() == n_open
        # At the true share of open cCREs, the shifted probability is the share that was drawn.
        share = torch.logit(torch.tensor(is_open.mean())) + drawn.shift[cell]
        assert math.isclose(float(share.sigmoid()), n_open / n_drawn, rel_tol=1e-5)


@pytest.mark.parametrize(("n_open", "n"), [(0, 40), (3, 40), (38, 40), (40, 40)])
def test_draws_of_cells_with_few_or_no_cCREs_of_a_kind(n_open, n):
    from cisformer.model.documented_task import _half_open

    column, label, shift = _half_open(torch.arange(n_open), n, 20, None)
    assert len(column.unique()) == 20
    assert torch.equal(label, (column < n_open).float())
    assert torch.isfinite(shift)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_draws_differ_in_training_and_are_fixed_in_validation(direction, full_checkpoints, tiny_data):
    model = full_checkpoints[direction].model
    batch = some_batch(full_checkpoints[direction], tiny_data)
    assert torch.equal(model.draw(batch).column, model.draw(batch).column)
    model.train()
    first, second = model.draw(batch).column, model.draw(batch).column
    model.eval()
    assert not torch.equal(first, second)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_training_learns_and_reloads(direction, full_checkpoints):
    best = full_checkpoints[direction]
    records = [json.loads(line) for line in (best.folder.parent / "metrics.jsonl").read_text().splitlines()]
    assert best.metrics["val_loss"] < records[0]["val_loss"]
    assert best.config.model.architecture == "full"
    again = load_checkpoint(best.folder)
    assert all(
        torch.equal(a, b) for a, b in zip(best.model.parameters(), again.model.parameters(), strict=True)
    )


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_prior_starts_at_the_mean_profile(direction, tiny_data, full_config, tmp_path):
    start = train(
        tiny_data[direction],
        "x",
        direction=direction,
        save=tmp_path,
        config=full_config(direction, True, epoch=0),
    )
    assert math.isclose(start.metrics["val_loss"], start.metrics["mean_val_loss"], rel_tol=1e-6)
    store = CellStore.open(find_split(tiny_data[direction], "train"))
    layout = start.layout
    truth = read_modality(store, np.arange(store.n_cells), layout.target_modality)[:, layout.target_index]
    found = start.model.predict(some_batch(start, tiny_data)).numpy()
    assert (found == found[0]).all()
    assert np.corrcoef(found[0], np.asarray(truth.mean(axis=0)).ravel())[0, 1] > 0.95


def test_probabilities_are_those_of_all_ccres_although_half_of_the_drawn_are_open(
    full_checkpoints, tiny_data
):
    checkpoint = full_checkpoints["rna2atac"]
    test = find_split(tiny_data["rna2atac"], "test")
    found = predict(checkpoint, test, batch_size=8, min_prob=0).X.mean()
    store = CellStore.open(test)
    truth = store.atac(np.arange(store.n_cells)).mean()
    assert 0.5 * truth < found < 2 * truth


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_prediction_of_a_cell_depends_on_its_input_alone(direction, full_checkpoints, tiny_data):
    checkpoint = full_checkpoints[direction]
    batch = some_batch(checkpoint, tiny_data)
    together = checkpoint.model.predict(batch)
    without_targets = replace(batch, target_indptr=None, target_index=None, target_value=None)
    assert torch.equal(checkpoint.model.predict(without_targets), together)
    store = CellStore.open(find_split(tiny_data[direction], "test"))
    cells = read_modality(store, np.array([3]), checkpoint.layout.input_modality)
    limit = checkpoint.config.datapreprocess.enc_max_len
    alone = checkpoint.model.predict(encode_input(cells, checkpoint.layout, limit, None))
    torch.testing.assert_close(alone[0], together[3])


def test_genes_are_chosen_from_training_all_or_a_file_never_from_the_cell(full_checkpoints, tmp_path):
    checkpoint = full_checkpoints["atac2rna"]
    layout, reference = checkpoint.layout, checkpoint.reference
    np.testing.assert_array_equal(
        choose_genes("expressed_in_training", layout, reference), layout.target_index
    )
    assert len(choose_genes("all", layout, reference)) == reference.n_genes
    names = reference.genes["gene_name"].iloc[5], reference.genes["gene_id"].iloc[2]
    (tmp_path / "genes.txt").write_text("\n".join(names))
    assert choose_genes(tmp_path / "genes.txt", layout, reference).tolist() == [2, 5]
    (tmp_path / "bad.txt").write_text("NOT_A_GENE\n")
    for bad, message in (("bad.txt", "1 genes .* such as"), ("absent.txt", "cannot be read")):
        with pytest.raises(InputError, match=message):
            choose_genes(tmp_path / bad, layout, reference)


def test_prediction_gives_the_chosen_genes_and_refuses_the_choice_elsewhere(
    full_checkpoints, tiny_checkpoints, tiny_data, tmp_path
):
    checkpoint = full_checkpoints["atac2rna"]
    test = find_split(tiny_data["atac2rna"], "test")
    chosen = checkpoint.layout.target_index[[3, 8]]
    (tmp_path / "genes.txt").write_text("\n".join(checkpoint.reference.genes["gene_id"].iloc[chosen]))
    found = predict(checkpoint, test, genes=tmp_path / "genes.txt")
    assert np.flatnonzero(found.X.toarray().any(axis=0)).tolist() == chosen.tolist()
    with pytest.raises(InputError, match="architecture full"):
        predict(tiny_checkpoints["atac2rna"], test, genes="all")


def test_a_chunk_is_of_one_prediction_and_leaves_the_caller_s_model(full_checkpoints, tiny_data, monkeypatch):
    checkpoint = full_checkpoints["rna2atac"]
    test = find_split(tiny_data["rna2atac"], "test")
    whole = predict(checkpoint, test, min_prob=0)
    weights = {name: tensor.clone() for name, tensor in checkpoint.model.state_dict().items()}
    sizes = []
    decode = FullModel.decode_chunks

    def noted(self, context, index_BQ):
        for logits in decode(self, context, index_BQ):
            sizes.append(logits.shape[1])
            yield logits

    monkeypatch.setattr(FullModel, "decode_chunks", noted)
    parts = predict(checkpoint, test, min_prob=0, chunk=100)
    assert max(sizes) == 100
    assert checkpoint.model.network.chunk == CHUNK
    assert all(torch.equal(weights[name], found) for name, found in checkpoint.model.state_dict().items())
    sizes.clear()
    again = predict(checkpoint, test, min_prob=0)
    assert set(sizes) == {len(checkpoint.layout.target_index)}
    np.testing.assert_array_equal(again.X.toarray(), whole.X.toarray())
    np.testing.assert_allclose(parts.X.toarray(), whole.X.toarray(), atol=1e-3)


def test_other_targets_keep_what_is_known_of_them(full_checkpoints, tiny_data):
    checkpoint = full_checkpoints["rna2atac"]
    rows = checkpoint.layout.target_index[::7]
    batch = some_batch(checkpoint, tiny_data)
    torch.testing.assert_close(
        checkpoint.model.with_targets(rows).predict(batch), checkpoint.model.predict(batch)[:, ::7]
    )


def test_link_ranks_come_from_the_cell_s_own_attention(full_checkpoints, tiny_data):
    checkpoint = full_checkpoints["atac2rna"]
    batch = some_batch(checkpoint, tiny_data)
    n_tokens = int((batch.token_indptr if batch.token is not None else batch.indptr)[1])
    gene, token = torch.tensor([0, 5, 5]), torch.tensor([0, 1, n_tokens - 1])
    ranks = checkpoint.model.pair_ranks(batch, 0, gene, token)
    assert ((ranks >= 0) & (ranks <= 1)).all()
    whole = checkpoint.model.pair_ranks(
        batch, 0, torch.arange(60).repeat_interleave(n_tokens), torch.arange(n_tokens).repeat(60)
    ).view(60, n_tokens)
    assert torch.equal(ranks, whole[gene, token])


def test_links_hold_the_mean_rank_of_attention_over_cells(full_checkpoints, tiny_data, tiny):
    from cisformer.links.score import score_links

    checkpoint = full_checkpoints["atac2rna"]
    store = CellStore.open(find_split(tiny_data["atac2rna"], "test"))
    cell_types = tiny.rna.obs["cell_type"].astype(str)
    of_type = score_links(checkpoint, store, cell_types).types[0]
    rows = np.flatnonzero((cell_types[store.barcodes] == of_type.cell_type).to_numpy())
    assert np.isnan(of_type.evidence["effect"]).all()
    assert np.isfinite(of_type.evidence["score"]).all()
    n_open = store.atac(rows).toarray()[:, of_type.ccre].sum(axis=0)
    attention = of_type.evidence["attention"]
    assert ((attention > 0) <= (n_open > 0)).all()
    assert (attention <= n_open / len(rows) + 1e-6).all()
    assert attention.max() > 0


def test_only_the_documented_architecture_is_exported(tiny_checkpoints, tmp_path):
    with pytest.raises(CheckpointError, match="architecture cis"):
        export_checkpoint(tiny_checkpoints["rna2atac"], tmp_path / "pytorch_model.bin")


def test_bare_weights_are_loaded_with_a_config(full_checkpoints, tiny_data, tmp_path):
    trained = full_checkpoints["rna2atac"]
    path = export_checkpoint(trained, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="neither their direction nor their configuration"):
        load_checkpoint(path)
    loaded = load_checkpoint(path, "rna2atac", config=trained.config, reference=trained.reference)
    batch = some_batch(trained, tiny_data)
    assert isinstance(loaded.layout, Layout)
    logits = trained.model.predict(batch).logit() - trained.model.base
    found = (
        loaded.model.with_targets(trained.layout.target_index).predict(some_batch(loaded, tiny_data)).logit()
    )
    torch.testing.assert_close(found, logits, atol=0.05, rtol=0)
    assert isinstance(loaded.model, FullTask)


def test_the_commands_choose_genes_decode_in_chunks_and_export(
    full_checkpoints, tiny_files, command, tmp_path
):
    (tmp_path / "genes.txt").write_text(
        "\n".join(full_checkpoints["atac2rna"].reference.genes["gene_id"][:5])
    )
    given = ["-m", full_checkpoints["atac2rna"].folder, "-d", tiny_files / "atac.h5ad"]
    done = command("atac2rna_predict", *given, "--genes", "genes.txt", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = ad.read_h5ad(tmp_path / "output/cisformer_predicted_rna.h5ad")
    assert set(found.X.indices) == set(range(5))

    given = ["rna2atac_predict", "-r", tiny_files / "rna.h5ad", "--min_prob", "0"]
    best = full_checkpoints["rna2atac"].folder
    for name, more in (("whole", []), ("parts", ["--chunk", "1e2"])):
        done = command(*given, "-m", best, "-n", name, *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    whole, parts = (ad.read_h5ad(tmp_path / f"output/{name}.h5ad").X for name in ("whole", "parts"))
    assert abs(parts - whole).max() < 1e-3

    done = command("export_checkpoint", "-m", best, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    tensors = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert "dec.block.net.layers.0.0.fn.to_q.weight" in tensors
    assert command("export_checkpoint", "-m", best, cwd=tmp_path).returncode == 1
    cis = command("rna2atac_predict", "-r", tiny_files / "rna.h5ad", "-m", best.parent, "--chunk", "0", cwd=tmp_path,
                  )  # fmt: skip
    assert "the chunk is 0 cCREs" in cis.stderr


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_documented_sizes_make_the_documented_model(direction):
    with torch.device("meta"):
        model = FullModel(default_config(direction).model, direction)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert round(millions, 1) == {"atac2rna": 22.0, "rna2atac": 14.1}[direction]


def test_counts_of_cells_with_more_genes_than_attention_sees(full_checkpoints, tiny_data):
    """Attention sees the highest genes; the count of 1 that says what a count is may not be among them."""
    checkpoint = full_checkpoints["rna2atac"]
    store = CellStore.open(find_split(tiny_data["rna2atac"], "test"))
    rows = np.arange(4)
    cells = read_modality(store, rows, "rna")
    task = checkpoint.model
    seen = {}
    task.network.encode, kept = (
        lambda rows, counts: seen.update(rows=rows, counts=counts),
        task.network.encode,
    )
    try:
        task._encode(encode_input(cells, checkpoint.layout, 4, None))
    finally:
        task.network.encode = kept
    counts = store.rna(rows).toarray()
    for cell in rows:
        genes = seen["rows"][cell].numpy()
        wanted = np.minimum(counts[cell, genes], checkpoint.config.model.max_express)
        np.testing.assert_array_equal(seen["counts"][cell], wanted)
        assert wanted.min() > 1 or cell > 0


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_validation_loss_of_a_cell_does_not_depend_on_its_batch(direction, full_checkpoints, tiny_data):
    checkpoint = full_checkpoints[direction]
    store = CellStore.open(find_split(tiny_data[direction], "val"))
    rows = np.arange(min(6, store.n_cells))
    training = checkpoint.config.training
    found = []
    for size in (6, 2):
        config = checkpoint.config.model_copy(
            update={"training": training.model_copy(update={"batch_size": size})}
        )
        batches = validation_batches(store, rows, checkpoint.layout, config)
        with torch.no_grad():
            found.append(torch.cat([checkpoint.model(batch) for batch in batches]))
    torch.testing.assert_close(*found, rtol=5e-3, atol=5e-3)
