"""Ragged attention against dense computations."""

import numpy as np
import pytest
import torch

from cisformer.model.attention import LatentPool, pad_ragged, segment_softmax


def ragged(lengths, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    indptr = torch.tensor(np.concatenate([[0], np.cumsum(lengths)]))
    return torch.randn(int(indptr[-1]), width, generator=generator), indptr


def test_padding_keeps_every_row_in_its_place():
    flat, indptr = ragged([2, 0, 3], 4)
    padded, mask = pad_ragged(flat, indptr)
    assert padded.shape == (3, 3, 4)
    assert mask.tolist() == [[True, True, False], [False] * 3, [True] * 3]
    torch.testing.assert_close(padded[mask], flat, rtol=0, atol=0)
    assert padded[~mask].abs().sum() == 0


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


def test_latent_pool_equals_attention_written_out():
    torch.manual_seed(0)
    pool = LatentPool(6, 10, n_latents=3, heads=2, dropout=0.5).eval()
    flat, indptr = ragged([4, 1, 7], 6, seed=5)
    pooled = pool(*pad_ragged(flat, indptr))
    for cell in range(3):
        token_TR = flat[indptr[cell] : indptr[cell + 1]]
        weight_LHT = (torch.einsum("lhr,tr->lht", pool.query_LHR, token_TR) * 6**-0.5).softmax(-1)
        mixed_LX = torch.einsum("lht,tr->lhr", weight_LHT, token_TR).flatten(1)
        torch.testing.assert_close(pooled[cell], pool.out(mixed_LX), rtol=1e-5, atol=1e-6)


def test_a_cell_without_tokens_gives_the_bias_and_no_nan():
    pool = LatentPool(6, 10, n_latents=3, heads=2, dropout=0.0)
    pooled = pool(*pad_ragged(*ragged([0, 2], 6)))
    torch.testing.assert_close(pooled[0], pool.out.bias.expand(3, 10))
    pooled.sum().backward()
    assert torch.isfinite(pool.query_LHR.grad).all()
