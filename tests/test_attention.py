"""Ragged attention against dense computations."""

import itertools

import numpy as np
import pytest
import torch

from cisformer.model import attention
from cisformer.model.attention import LatentPool, ragged_attention, segment_softmax


def ragged(lengths, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    indptr = torch.tensor(np.concatenate([[0], np.cumsum(lengths)]))
    return torch.randn(int(indptr[-1]), width, generator=generator), indptr


@pytest.mark.parametrize("shuffled", [False, True])
def test_segment_softmax_equals_a_dense_masked_softmax(shuffled):
    """Scatter the edges into [segments, edges + null], mask, softmax: the same weights."""
    rng = np.random.default_rng(3)
    segment = torch.from_numpy(np.sort(rng.integers(0, 6, 25)))
    if shuffled:
        segment = segment[torch.from_numpy(rng.permutation(25))]
    score = torch.from_numpy(rng.normal(0, 5, (25, 3)))
    null = torch.from_numpy(rng.normal(0, 1, 3))
    dense = torch.full((7, 26, 3), -torch.inf, dtype=torch.float64)
    dense[:, 25] = null
    dense[segment, torch.arange(25)] = score
    expected = dense.softmax(dim=1)[segment, torch.arange(25)]
    torch.testing.assert_close(segment_softmax(score, segment, 7, null), expected)


def test_segment_softmax_survives_large_scores():
    score = torch.tensor([[1000.0], [999.0], [-1000.0]])
    weight = segment_softmax(score, torch.tensor([0, 0, 1]), 2, torch.zeros(1))
    torch.testing.assert_close(weight[:2, 0], torch.tensor([1000.0, 999.0]).softmax(0))
    assert weight[2].item() == 0


@pytest.fixture(params=["of a CPU", "padded"])
def shared_tokens(request, monkeypatch):
    """Cells of none, one, some and many tokens, some tokens in several of them; attended to in both ways."""
    if request.param == "padded":
        monkeypatch.setattr(attention, "_attend_by_cell", attention._attend_padded)
    generator = torch.Generator().manual_seed(5)
    lengths = [3, 0, 1, 255, 256, 513, 0]
    indptr = torch.tensor(np.concatenate([[0], np.cumsum(lengths)]))
    token = torch.randn(50, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    query = 3 * torch.randn(5, 6, generator=generator, dtype=torch.float64)
    return query.requires_grad_(), token, torch.randint(50, (sum(lengths),), generator=generator), indptr


def attention_written_out(query_QR, token_PR, slot_N, indptr):
    """Return what `ragged_attention` does, cell by cell from its definition."""
    found, mean = [], []
    for start, stop in itertools.pairwise(indptr):
        token_TR = token_PR[slot_N[start:stop]]
        found.append((query_QR @ token_TR.T).softmax(-1) @ token_TR)
        mean.append(token_TR.sum(dim=0) / max(1, stop - start))
    return torch.stack(found), torch.stack(mean)


def test_ragged_attention_equals_attention_written_out(shared_tokens):
    for ours, theirs in zip(
        ragged_attention(*shared_tokens), attention_written_out(*shared_tokens), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_ragged_attention_has_the_gradient_of_attention_written_out(shared_tokens):
    query, token, *_ = shared_tokens
    gradients = []
    for function in (ragged_attention, attention_written_out):
        out, mean = function(*shared_tokens)
        loss = (out * torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)).sum()
        gradients.append(torch.autograd.grad(loss + mean.square().sum(), (query, token)))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_ragged_attention_is_in_single_precision_under_autocast_too(shared_tokens):
    query, token, slot, indptr = shared_tokens
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = torch.autograd.grad(
            ragged_attention(query, token, slot, indptr)[0].square().sum(), (query, token)
        )
    whole = torch.autograd.grad(
        ragged_attention(query, token, slot, indptr)[0].square().sum(), (query, token)
    )
    for left, right in zip(half, whole, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=0)


@pytest.mark.parametrize("shift", [-1e3, 1e3])
def test_ragged_attention_survives_large_scores(shared_tokens, shift):
    """Tokens with one coordinate in common, by which every score moves and no weight does."""
    query, token, slot, indptr = (x.detach() for x in shared_tokens)
    query[:, 0], token[:, 0] = 1.0, shift
    out, _ = ragged_attention(query.float(), token.float(), slot, indptr)
    expected, _ = attention_written_out(query, token, slot, indptr)
    torch.testing.assert_close(out, expected.float(), rtol=1e-3, atol=1e-3)


def test_latent_pool_folds_heads_and_scale_into_its_queries():
    torch.manual_seed(0)
    pool = LatentPool(6, 10, n_latents=3, heads=2, dropout=0.5).eval()
    flat, indptr = ragged([4, 1, 7], 6, seed=5)
    pooled, mean = pool(flat, torch.arange(12), indptr)
    for cell in range(3):
        token_TR = flat[indptr[cell] : indptr[cell + 1]]
        weight_LHT = (torch.einsum("lhr,tr->lht", pool.query_LHR, token_TR) * 6**-0.5).softmax(-1)
        mixed_LX = torch.einsum("lht,tr->lhr", weight_LHT, token_TR).flatten(1)
        torch.testing.assert_close(pooled[cell], pool.out(mixed_LX), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(mean[cell], token_TR.mean(dim=0))


@pytest.mark.parametrize("sizes", [[0, 2], [0]])
def test_a_cell_without_tokens_gives_the_bias_and_no_nan(sizes):
    pool = LatentPool(6, 10, n_latents=3, heads=2, dropout=0.0)
    flat, indptr = ragged(sizes, 6)
    pooled, mean = pool(flat, torch.arange(sum(sizes)), indptr)
    torch.testing.assert_close(pooled[0], pool.out.bias.expand(3, 10))
    assert mean[0].abs().sum() == 0
    pooled.sum().backward()
    assert torch.isfinite(pool.query_LHR.grad).all()


@torch.no_grad()
def test_in_training_a_share_of_the_tokens_is_hidden():
    """Of 2,000 tokens of 1 and 2,000 of 0, the mean is a half, but hardly ever exactly so in training."""
    torch.manual_seed(0)
    pool = LatentPool(1, 1, n_latents=1, heads=1, dropout=0.25)
    cell = torch.tensor([[0.0], [1.0]]), torch.arange(4000) % 2, torch.tensor([0, 4000])
    means = [float(pool.train()(*cell)[1]) for _ in range(20)]
    assert np.mean(means) == pytest.approx(0.5, abs=0.01)
    assert len(set(means)) > 10
    assert float(pool.eval()(*cell)[1]) == 0.5
