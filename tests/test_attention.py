"""bigmodel.models.attention: the same numbers as the formula and as PyTorch's own layer, cached or not."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from bigmodel.models import attention as module
from bigmodel.models.attention import (
    ACTIVATIONS,
    FeedForward,
    KVCache,
    LayerCache,
    MultiHeadAttention,
    TransformerBlock,
    attention,
    causal_mask,
)

EXACT = {"rtol": 0, "atol": 1e-12}  # in float64
CLOSE = {"rtol": 0, "atol": 1e-6}  # in float32


def formula(query, key, value, mask=None, causal=False, scale=None):
    """Attention one query at a time, by nothing but the formula."""
    batch, heads, new, size = query.shape
    total = key.shape[2]
    sees = (torch.ones(1, dtype=torch.bool) if mask is None else mask).expand(batch, heads, new, total)
    out = torch.zeros_like(query)
    for b in range(batch):
        for h in range(heads):
            for n in range(new):
                seen = [t for t in range(total) if sees[b, h, n, t] and not (causal and t > n + total - new)]
                if seen:
                    scores = key[b, h, seen] @ query[b, h, n] * (size ** -0.5 if scale is None else scale)
                    out[b, h, n] = scores.softmax(0) @ value[b, h, seen]
    return out


def draw_tensors(seed, batch, heads, new, total, size, dtype=torch.float64):
    dice = torch.Generator().manual_seed(seed)
    make = lambda length: torch.randn(batch, heads, length, size, generator=dice, dtype=dtype)
    return make(new), make(total), make(total), dice


def agrees(seed=0, batch=2, heads=2, new=3, total=5, size=4, mask_shape=None, causal=True, scale=None):
    """Whether `attention` is the formula for one drawn case."""
    query, key, value, dice = draw_tensors(seed, batch, heads, new, total, size)
    mask = None
    if mask_shape is not None:
        shape = [full if keep else 1 for keep, full in zip(mask_shape, (batch, heads, new, total), strict=True)]
        mask = torch.rand(shape, generator=dice) < 0.6
    expected = formula(query, key, value, mask, causal, scale)
    return torch.allclose(module.attention(query, key, value, mask, causal, scale=scale), expected, **EXACT)


def randomize(layer, seed=0):
    """Weights so large that everything matters, biases and norms included."""
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=dice, dtype=parameter.dtype))
    return layer


# --- the formula

@given(st.data())
@settings(max_examples=60)
def test_attention_is_the_formula(data):
    whole = lambda low, high: data.draw(st.integers(low, high))
    total = whole(1, 7)
    case = {"seed": whole(0, 999), "batch": whole(1, 3), "heads": whole(1, 3), "new": whole(1, total), "total": total,
            "size": whole(1, 5), "causal": data.draw(st.booleans()),
            "scale": data.draw(st.sampled_from([None, 1.0, 0.3])),
            "mask_shape": data.draw(st.none() | st.tuples(*[st.booleans()] * 4))}
    assert agrees(**case), case


@given(st.integers(1, 9), st.integers(0, 9))
def test_causal_mask_cell_by_cell(new, before):
    mask = causal_mask(new, new + before)
    assert mask.dtype == torch.bool and mask.shape == (new, new + before)
    assert mask.tolist() == [[key <= before + query for key in range(new + before)] for query in range(new)]


def test_gradients_are_those_of_finite_differences():
    query, key, value, _ = draw_tensors(1, 1, 2, 3, 4, 2)
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    mask = torch.tensor([[True, False, True, True]] * 3)[None, None]
    for how in ({}, {"causal": True}, {"mask": mask}, {"mask": mask, "causal": True}):
        assert torch.autograd.gradcheck(lambda q, k, v, how=how: attention(q, k, v, **how), inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_a_query_that_sees_nothing_gets_zeros_and_spoils_no_gradient(dtype, causal):
    query, key, value, _ = draw_tensors(2, 2, 2, 4, 4, 8, dtype)
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    mask = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    mask[0], mask[1, :, 2] = False, False
    out = attention(*inputs, mask, causal)
    out.square().sum().backward()
    assert not out[0].any() and not out[1, :, 2].any() and out[1, :, 3].any()
    assert all(tensor.grad.isfinite().all() for tensor in inputs)
    assert not any(tensor.grad[0].any() for tensor in inputs)


def test_no_output_depends_on_a_later_token():
    block = randomize(TransformerBlock(8, 2, 16, causal=True).double())
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    influence = torch.autograd.functional.jacobian(block, x).abs().amax(dim=(0, 2, 3, 5))  # (output place, input place)
    assert not influence.triu(1).any() and (influence.tril() > 0).sum() == 21


def test_scores_of_any_size_give_finite_weights():
    query, key, value, _ = draw_tensors(3, 1, 1, 4, 4, 8)
    out = attention(1e4 * query, 1e4 * key, value, causal=True)
    assert out.isfinite().all()


# --- the layer

@pytest.mark.parametrize("hidden, heads", [(8, 1), (12, 3), (32, 4), (6, 6)])
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_parity_with_torch(hidden, heads, causal):
    ours = randomize(MultiHeadAttention(hidden, heads, causal).double())
    theirs = nn.MultiheadAttention(hidden, heads, batch_first=True, dtype=torch.float64)
    theirs.load_state_dict({"in_proj_weight": ours.query_key_value.weight, "in_proj_bias": ours.query_key_value.bias,
                            "out_proj.weight": ours.output.weight, "out_proj.bias": ours.output.bias})
    x = torch.randn(3, 7, hidden, dtype=torch.float64)
    padding = torch.rand(3, 7) < 0.3
    padding[:, 0] = False
    hidden_pairs = ~causal_mask(7, 7) if causal else None
    expected = theirs(x, x, x, attn_mask=hidden_pairs, key_padding_mask=padding, need_weights=True)[0]
    torch.testing.assert_close(ours(x, ~padding[:, None, None, :]), expected, **EXACT)


def test_parity_with_torch_of_a_whole_block():
    ours = randomize(TransformerBlock(16, 4, 40, causal=True, norm_epsilon=1e-3).double())
    theirs = nn.TransformerEncoderLayer(16, 4, 40, dropout=0.0, activation="gelu", layer_norm_eps=1e-3,
                                        batch_first=True, norm_first=True, dtype=torch.float64)
    with torch.no_grad():
        for mine, other in zip(_in_torch_order(ours), theirs.parameters(), strict=True):
            other.copy_(mine)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    expected = theirs(x, src_mask=~causal_mask(9, 9))  # in training mode, which takes the plain path; dropout is 0
    torch.testing.assert_close(ours(x), expected, **EXACT)


def _in_torch_order(block):
    first, second = block.attention, block.feed_forward
    for part in (first.query_key_value, first.output, second.expand, second.contract, block.attention_norm,
                 block.feed_forward_norm):
        yield from (part.weight, part.bias)


@given(st.permutations(range(6)))
@settings(max_examples=20)
def test_without_a_causal_mask_order_means_nothing(order):
    layer = randomize(MultiHeadAttention(8, 2).double())
    x = torch.randn(2, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order], **EXACT)


def test_with_a_causal_mask_order_means_something():
    layer = randomize(MultiHeadAttention(8, 2, causal=True).double())
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    assert not torch.allclose(layer(x.flip(1)), layer(x).flip(1), atol=1e-3)


def test_a_batch_is_its_rows():
    block = randomize(TransformerBlock(8, 2, 16, causal=True).double())
    x = torch.randn(5, 6, 8, dtype=torch.float64)
    torch.testing.assert_close(block(x), torch.cat([block(row[None]) for row in x]), **EXACT)


def test_scale_is_a_factor_on_the_scores():
    layer = randomize(MultiHeadAttention(8, 2).double())
    x, plain = torch.randn(1, 5, 8, dtype=torch.float64), 4 ** -0.5
    expected = layer(x)
    layer.scale = plain
    torch.testing.assert_close(layer(x), expected, **EXACT)
    layer.scale = 0.0  # every token looks at all alike, so all gather the same
    assert torch.allclose(layer(x)[:, 0], layer(x)[:, 4], **EXACT) and not torch.allclose(layer(x), expected)


@pytest.mark.parametrize("dropout", [{"dropout": 0.5}, {"attention_dropout": 0.5}], ids=str)
def test_dropout_only_in_training(dropout):
    x = torch.randn(2, 6, 8)
    plain, block = (randomize(TransformerBlock(8, 2, 16, causal=True, **how)) for how in ({}, dropout))
    torch.testing.assert_close(block.eval()(x), plain(x), **CLOSE)
    block.train()
    assert not torch.allclose(block(x), block(x)) and not torch.allclose(block(x), plain(x))


def test_dropped_weights_keep_the_mean():
    torch.manual_seed(5)
    query, key, value = torch.randn(3, 1, 1, 4, 8).unbind(0)
    mean = torch.stack([attention(query, key, value, dropout=0.3) for _ in range(2000)]).mean(0)
    torch.testing.assert_close(mean, attention(query, key, value), rtol=0, atol=0.1)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_feed_forward_is_two_linear_layers_with_a_bend(name):
    bend = {"gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
            "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3))),
            "relu": lambda x: x.clamp(min=0), "silu": lambda x: x / (1 + torch.exp(-x)), "tanh": torch.tanh}[name]
    layer = randomize(FeedForward(6, 10, name).double())
    for shape in ((6,), (3, 6), (2, 3, 6)):
        x = torch.randn(shape, dtype=torch.float64)
        inner = bend(x @ layer.expand.weight.T + layer.expand.bias)
        torch.testing.assert_close(layer(x), inner @ layer.contract.weight.T + layer.contract.bias, **EXACT)


def test_a_block_adds_to_the_stream():
    block = randomize(TransformerBlock(8, 2, 16).double())
    for part in (block.attention.output, block.feed_forward.contract):
        nn.init.zeros_(part.weight), nn.init.zeros_(part.bias)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    assert torch.equal(block(x), x)


# --- the cache

@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.booleans(), st.integers(0, 99))
@settings(max_examples=40)
def test_in_pieces_is_at_once(pieces, padded, seed):
    dice = torch.Generator().manual_seed(seed)
    blocks = [randomize(TransformerBlock(8, 2, 16, causal=True).double(), seed + layer).eval() for layer in range(2)]
    time = sum(pieces)
    x = torch.randn(3, time, 8, dtype=torch.float64, generator=dice)
    mask = torch.ones(3, 1, 1, time, dtype=torch.bool)
    if padded:
        mask[1, ..., :time // 2] = False  # the second row has padding on its left
    cache, outputs, end = KVCache(2), [], 0
    with torch.no_grad():
        for piece in x.split(pieces, dim=1):
            end += piece.shape[1]
            for block, layer in zip(blocks, cache.layers, strict=True):
                piece = block(piece, mask[..., :end] if padded else None, layer)
            outputs.append(piece)
            assert cache.length == end and cache.num_bytes() == 2 * 2 * 3 * end * 8 * 8
        for block in blocks:
            x = block(x, mask if padded else None)
    torch.testing.assert_close(torch.cat(outputs, dim=1), x, **EXACT)


@given(st.lists(st.integers(1, 200), min_size=1, max_size=10))
@settings(max_examples=40)
def test_buffers_double_and_keep_what_they_held(pieces):
    cache, seen, capacities = LayerCache(), [], []
    for number, new in enumerate(pieces):
        seen.append(torch.full((1, 2, new, 3), float(number)))
        keys, values = cache.append(seen[-1], -seen[-1])
        assert torch.equal(keys, torch.cat(seen, dim=2)) and torch.equal(values, -keys)
        capacities.append(cache.keys.shape[2])
        assert cache.length == sum(pieces[:number + 1]) <= capacities[-1] <= max(64, 2 * cache.length)
        if number and capacities[-1] != capacities[-2]:
            assert capacities[-1] >= 2 * sum(pieces[:number])


def test_a_thousand_tokens_need_few_buffers():
    cache, token, buffers = LayerCache(), torch.zeros(1, 1, 1, 4), set()
    for _ in range(1000):
        cache.append(token, token)
        buffers.add(cache.keys.shape[2])
    assert buffers == {64, 128, 256, 512, 1024}


def test_an_empty_cache():
    cache = KVCache(3)
    assert cache.length == 0 and cache.num_bytes() == 0 and len(cache.layers) == 3


def test_the_cache_has_the_dtype_of_what_it_holds():
    cache = KVCache(1)
    half = torch.ones(2, 1, 3, 4, dtype=torch.bfloat16)
    keys, _ = cache.layers[0].append(half, half)
    assert keys.dtype == torch.bfloat16 and cache.num_bytes() == 2 * 2 * 1 * 3 * 4 * 2


# --- bad input: one line, what was wrong and what was expected

@pytest.mark.parametrize("make, said", [
    (lambda: MultiHeadAttention(32, 5), r"^hidden_size 32 .* 5 heads; expected a multiple of num_heads$"),
    (lambda: MultiHeadAttention(32, 0), r"^hidden_size 32 .* 0 heads; expected a multiple of num_heads$"),
    (lambda: TransformerBlock(32, 5, 64), r"^hidden_size 32 .* 5 heads"),
    (lambda: FeedForward(8, 16, "gleu"), r"^unknown activation 'gleu'; expected one of gelu, .*tanh$"),
    (lambda: TransformerBlock(8, 2, 16, activation="GELU"), r"^unknown activation 'GELU'"),
], ids=["heads", "no heads", "heads of a block", "activation", "activation of a block"])
def test_bad_input_gets_one_clear_line(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_another_batch_needs_another_cache():
    layer, cache = MultiHeadAttention(8, 2, causal=True), LayerCache()
    with torch.no_grad():
        layer(torch.randn(2, 3, 8), cache=cache)
        with pytest.raises(ValueError, match=r"^the cache holds 2 sequences, but 3 came; start a new cache$"):
            layer(torch.randn(3, 1, 8), cache=cache)
        assert cache.length == 3 and layer(torch.randn(2, 1, 8), cache=cache).shape == (2, 1, 8)


# --- controls: each check is seen to fail

def test_control_a_mask_shifted_by_one_is_seen(monkeypatch):
    assert agrees()
    monkeypatch.setattr(module, "causal_mask", lambda new, total, device=None:
                        torch.ones(new, total, dtype=torch.bool).tril(total - new + 1))
    assert not agrees()
    assert not agrees(mask_shape=(True, False, False, True), new=5)


def test_control_a_mask_that_forgets_the_past_is_seen(monkeypatch):
    monkeypatch.setattr(module, "causal_mask", lambda new, total, device=None:
                        torch.ones(new, total, dtype=torch.bool).tril())
    assert not agrees()


def test_control_the_wrong_axis_is_seen(monkeypatch):
    def wrong(query, key, value, attn_mask=None, **_):
        scores = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).masked_fill(~attn_mask, -torch.inf)
        return scores.softmax(dim=-2).nan_to_num() @ value
    monkeypatch.setattr(F, "scaled_dot_product_attention", wrong)
    assert not agrees()


def test_control_a_dropped_transpose_is_seen(monkeypatch):
    test_parity_with_torch(12, 3, True)
    monkeypatch.setattr(module, "_split_heads", lambda qkv, heads: torch.stack(
        [part.reshape(len(part), heads, part.shape[1], -1) for part in qkv.chunk(3, dim=-1)]))
    with pytest.raises(AssertionError):
        test_parity_with_torch(12, 3, True)


def test_control_a_cache_that_forgets_when_it_grows_is_seen(monkeypatch):
    def grown(self, old, like, needed):
        return like.new_zeros(*like.shape[:2], max(2 * self.length, needed, 64), like.shape[3])
    monkeypatch.setattr(LayerCache, "_grown", grown)
    with pytest.raises(AssertionError):
        test_in_pieces_is_at_once.hypothesis.inner_test([60, 10], False, 0)
