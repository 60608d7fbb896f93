"""The default model: what it starts from, its ragged cis attention, and what must not change its output."""

import copy

import numpy as np
import pytest
import torch

from cisformer.data.batches import add_targets, encode_input, read_modality
from cisformer.data.store import CellStore, find_split
from cisformer.model.cell_rows import CellRows
from cisformer.model.cis import CisModel
from cisformer.model.closed_form import StartOptions, count_features, fit_linear, pace_of
from cisformer.model.closed_form_atac import Hat, Sums
from cisformer.model.closed_form_cis import Windows, fit_local
from cisformer.model.link_function import change_of_log_odds
from cisformer.model.projection import states
from cisformer.training.closed_form_start import make_layout


def started(direction, tiny_data, config):
    """Return store, layout, closed form and the untrained model."""
    store = CellStore.open(find_split(tiny_data[direction], "train"))
    rows = np.arange(store.n_cells)
    counts = count_features(store, rows, direction)
    layout = make_layout(counts, direction, store)
    start = fit_linear(CellRows.of(store, rows), CellRows(()), layout, counts, StartOptions(5, 1.0, 0))
    windows = local = None
    if direction == "atac2rna":
        windows = Windows.of(store.reference, layout, 250_000)
        local = fit_local(CellRows.of(store, rows), CellRows.of(store, rows[:30]), layout, start, windows, 0)
    torch.manual_seed(0)
    return store, layout, start, local, CisModel.from_start(config, layout, start, windows, local).eval()


def batch_of(store, layout, rows, targets=False):
    batch = encode_input(read_modality(store, rows, layout.input_modality), layout, None, None)
    return (
        add_targets(batch, read_modality(store, rows, layout.target_modality), layout) if targets else batch
    )


@pytest.mark.parametrize("direction", ["atac2rna", "rna2atac"])
def test_the_untrained_model_is_the_closed_form(direction, tiny_data, tiny_config):
    store, layout, start, local, model = started(direction, tiny_data, tiny_config(direction))
    rows = np.arange(25)
    z = states(start.projection, store, rows, layout)
    expected = z @ start.loadings.T
    if local is None:
        expected = change_of_log_odds(torch.from_numpy(expected), torch.from_numpy(start.prior)).numpy()
    expected += start.prior / start.scale
    if local is not None:
        x = read_modality(store, rows, "atac").toarray()[:, layout.input_index]
        spread = np.zeros((len(layout.target_index), x.shape[1]), np.float32)
        windows = Windows.of(store.reference, layout, 250_000)
        spread[windows.gene, windows.ccre] = local.weight
        expected += local.bias + z @ local.loadings.T + x @ spread.T
    eta = model.eta(batch_of(store, layout, rows)).detach()
    np.testing.assert_allclose(eta, expected, atol=2e-5)


def shake(model):
    """Give every weight that starts at zero a value, so that all paths count."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def shaken(tiny_data, tiny_config):
    store, layout, _, _, model = started("atac2rna", tiny_data, tiny_config("atac2rna"))
    return store, layout, shake(model)


def dense_cis(model, batch, h_BR):
    """The cis path as a masked dense softmax over all (gene, cCRE) pairs of each cell, in float64."""
    path, ccre_PR = model.cis.double(), model.encoder.token.weight.double()
    n_input, n_target = len(ccre_PR), len(path.gene.weight)
    mask = torch.zeros(n_target, n_input, dtype=torch.bool)
    mask[path.window_gene, path.window_ccre] = True
    product_GPR = path.gene.weight[:, None] * ccre_PR
    bias = torch.zeros(n_target, n_input, path.heads, dtype=torch.float64)
    bias[path.window_gene, path.window_ccre] = path.distance_bias(path.window_bin)
    single = torch.zeros(n_target, n_input, dtype=torch.float64)
    single[path.window_gene, path.window_ccre] = path.pair_weight
    outputs = []
    for cell in range(batch.n_cells):
        is_open = torch.zeros(n_input, dtype=torch.bool)
        is_open[batch.index[batch.indptr[cell] : batch.indptr[cell + 1]]] = True
        query_HK = path.cell_query(h_BR[cell].double()).unflatten(-1, (path.heads, -1)) / 4
        score = path.pair_score(product_GPR) + path.cell_key(ccre_PR) @ query_HK.T + bias
        score = score.masked_fill(~(mask & is_open)[..., None], -torch.inf)
        null = path.null.expand(n_target, 1, path.heads)
        weight = torch.cat([score, null], dim=1).softmax(dim=1)[:, :-1]
        outputs.append(
            (weight * path.pair_value(product_GPR)).sum(dim=(1, 2)) + (single * is_open).sum(dim=1)
        )
    path.float()
    return torch.stack(outputs).detach()


def test_ragged_cis_attention_equals_a_dense_masked_softmax(shaken):
    store, layout, model = shaken
    batch = batch_of(store, layout, np.arange(6))
    _, h_BR, tokens = model.encode(batch)
    ours = model.cis(batch, h_BR, tokens, None).detach()
    torch.testing.assert_close(ours.double(), dense_cis(model, batch, h_BR), rtol=1e-4, atol=1e-4)
    assert ours.abs().max() > 0.05
    with torch.no_grad():  # the way of prediction, with all pairs computed ahead
        torch.testing.assert_close(model.cis(batch, h_BR, tokens, None), ours)


def test_drawn_targets_get_what_they_get_among_all(shaken):
    store, layout, model = shaken
    batch = batch_of(store, layout, np.arange(6))
    columns = torch.tensor([0, 3, 4, 20])
    from dataclasses import replace

    some = model.eta(replace(batch, columns=columns))
    torch.testing.assert_close(some, model.eta(batch)[:, columns], rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # pairs of all cCREs, computed ahead
        torch.testing.assert_close(some, model.eta(batch)[:, columns], rtol=1e-5, atol=1e-5)


def test_the_effect_of_closing_a_ccre_is_exact(shaken):
    """Against running the cis path again without that cCRE, the cell's state held fixed."""
    store, layout, model = shaken
    rows = np.array([3])
    batch = batch_of(store, layout, rows)
    [attention] = model.cis_attention(batch)
    _, h_BR, tokens = model.encode(batch)
    whole = model.cis(batch, h_BR, tokens, None)
    for edge in range(0, len(attention.gene), max(1, len(attention.gene) // 12)):
        kept = batch.index != attention.ccre[edge]
        from dataclasses import replace

        without = replace(
            batch, index=batch.index[kept], value=batch.value[kept], indptr=torch.tensor([0, kept.sum()])
        )
        gene = attention.gene[edge]
        change = (model.cis(without, h_BR, tokens, None) - whole)[0, gene]
        torch.testing.assert_close(attention.effect[edge], change, rtol=1e-3, atol=1e-5)


def test_a_training_step_moves_a_target_by_no_more_than_its_pace(tiny_data, tiny_config):
    store, layout, start, _, model = started("atac2rna", tiny_data, tiny_config("atac2rna"))
    before, weights = model.state_loadings(), model.pair_weights()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    model(batch_of(store, layout, np.arange(40), targets=True)).mean().backward()
    optimizer.step()
    np.testing.assert_allclose(model.pace, pace_of(start.loadings))
    moved = (model.state_loadings() - before).abs().amax(dim=1)
    assert model.pace.min() < 0.1
    assert (moved <= 1.01e-2 * model.pace + 1e-7).all()
    assert (moved >= 0.5e-2 * model.pace).float().mean() > 0.9
    moved_weight = (model.pair_weights() - weights).abs()
    assert (moved_weight <= 1.01e-2 * model.pace[model.cis.window_gene] + 1e-7).all()


def test_attention_of_a_gene_and_its_null_slot_sum_to_one(shaken):
    store, layout, model = shaken
    [attention] = model.cis_attention(batch_of(store, layout, np.arange(6)))
    segment = attention.cell * len(layout.target_index) + attention.gene
    total = torch.zeros(6 * len(layout.target_index), model.cis.heads).index_add(0, segment, attention.weight)
    assert (total <= 1 + 1e-5).all()
    assert (attention.weight > 0).all()


@pytest.mark.parametrize("direction", ["atac2rna", "rna2atac"])
def test_prediction_does_not_depend_on_batch_or_order(direction, tiny_data, tiny_config):
    store, layout, _, _, model = started(direction, tiny_data, tiny_config(direction))
    shake(model)
    rows = np.arange(13)
    together = model.predict(batch_of(store, layout, rows))
    alone = torch.cat([model.predict(batch_of(store, layout, rows[i : i + 1])) for i in rows])
    backwards = model.predict(batch_of(store, layout, rows[::-1].copy())).flip(0)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together, backwards, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("direction", ["atac2rna", "rna2atac"])
def test_every_weight_gets_a_gradient(direction, tiny_data, tiny_config):
    store, layout, _, _, model = started(direction, tiny_data, tiny_config(direction))
    shake(model).train()
    model(batch_of(store, layout, np.arange(40), targets=True)).mean().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@pytest.mark.parametrize(
    "key",
    [
        "dim",
        "dec_depth",
        "dec_heads",
        "dec_ff_mult",
        "dec_dim_head",
        "num_latents",
        "emb_rank",
        "max_express",
    ],
)
def test_every_shape_key_shapes_the_model(key, tiny_data, tiny_config):
    _, layout, start, _, model = started("rna2atac", tiny_data, tiny_config("rna2atac"))
    config = tiny_config("rna2atac")
    value = getattr(config.model, key) + (7 if key == "dim" else 1)
    other = config.model_copy(update={"model": config.model.model_copy(update={key: value})})
    bigger = CisModel.from_start(other, layout, start, None, None)
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    assert count(bigger) > count(model)


def test_probabilities_and_expression_are_in_range(shaken, tiny_data, tiny_config):
    store, layout, model = shaken
    expression = model.predict(batch_of(store, layout, np.arange(8)))
    assert expression.min() >= 0
    assert expression.max() > 0
    store, layout, _, _, model = started("rna2atac", tiny_data, tiny_config("rna2atac"))
    probability = shake(model).predict(batch_of(store, layout, np.arange(8)))
    assert 0 <= probability.min() < probability.max() <= 1


def test_pairs_computed_ahead_are_forgotten_with_the_weights_they_came_of(tiny_data, tiny_config):
    store, layout, _, _, model = started("atac2rna", tiny_data, tiny_config("atac2rna"))
    batch = batch_of(store, layout, np.arange(6))
    before = model.predict(batch)
    weights = {name: tensor.clone() for name, tensor in shake(model.train()).eval().state_dict().items()}
    expected = model.predict(batch)
    assert (expected - before).abs().max() > 0.01
    _, _, _, _, other = started("atac2rna", tiny_data, tiny_config("atac2rna"))
    torch.testing.assert_close(other.predict(batch), before)
    other.load_state_dict(weights)
    torch.testing.assert_close(other.predict(batch), expected)
    with torch.no_grad():  # in place, and still in eval mode
        other.cis.gene.weight.mul_(-1)
    fresh = copy.deepcopy(other).train().eval()
    torch.testing.assert_close(other.predict(batch), fresh.predict(batch))
    assert (other.predict(batch) - expected).abs().max() > 0.001


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of torch's compiler, by itself
@pytest.mark.parametrize("direction", ["atac2rna", "rna2atac"])
def test_every_attention_block_is_compiled_where_asked(direction, tiny_data, tiny_config):
    *_, model = started(direction, tiny_data, tiny_config(direction))
    assert [block._compiled_call_impl for block in model.encoder.blocks] == [None]
    model.compile_blocks()
    assert all(block._compiled_call_impl is not None for block in model.encoder.blocks)


def test_training_sees_accessibility_as_of_cells_that_were_not_fitted_to(tiny_data, tiny_config):
    """The closed form refitted without a cell, but for what cCREs share, predicts what the model says in training."""
    store, layout, start, _, model = started("rna2atac", tiny_data, tiny_config("rna2atac"))
    rows = np.arange(store.n_cells)
    sd = start.projection.sd.double().numpy()
    whole = Sums.over(CellRows.of(store, rows), start.projection, layout)
    y = read_modality(store, rows, "atac").toarray()[:, layout.target_index]
    p = 1 / (1 + np.exp(-start.prior.astype(np.float64)))
    z = states(start.projection, store, rows, layout).astype(np.float64)
    batch = batch_of(store, layout, rows[:6], targets=True)
    change = model.held_out_change(batch, torch.from_numpy(z[:6].astype(np.float32))).numpy()
    inverse = Hat.of(whole, sd, start.penalty)
    for f in (3, 17, 40):
        for cell in range(6):
            others = np.delete(rows, cell)
            system = (
                z[others].T @ z[others] + np.linalg.pinv(inverse.basis @ inverse.basis.T) * inverse.ridge[f]
            )
            own = (y[others, f] - p[f]) / (p[f] * (1 - p[f])) - z[others] @ inverse.shared
            wanted = z[cell] @ (inverse.shared + np.linalg.solve(system, z[others].T @ own))
            assert change[cell, f] + z[cell] @ start.loadings[f] == pytest.approx(wanted, rel=1e-3, abs=1e-4)
