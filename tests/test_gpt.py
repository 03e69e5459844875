"""The GPT against an independent float64 reference; its parameters; what generate promises."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pyvizllm.models.gpt import GPT, PRESETS, Block, GPTConfig
from pyvizllm.training.text import decode, encode

# Sizes that tell the axes apart: 2 layers, 3 heads of 4 channels, a vocabulary of 11, windows of 7.
SMALL = GPTConfig(vocab_size=11, block_size=7, n_layer=2, n_head=3, n_embd=12)


def small_gpt(**changes: float) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**vars(SMALL), **changes}))
    # Initial logits are nearly equal; larger weights make every path through the model count.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def small_tokens(length: int = 7, batch: int = 2) -> Tensor:
    return torch.randint(11, (batch, length), generator=torch.Generator().manual_seed(1))


def reference_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / (centred.pow(2).mean(dim=-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def reference_block(block: Block, x: Tensor, n_head: int) -> Tensor:
    """One block written out head by head and position by position; x [T, E] float64."""
    w = {name: parameter.double() for name, parameter in block.named_parameters()}
    length, width = x.shape
    size = width // n_head
    h = reference_norm(x, w["attention_norm.weight"], w["attention_norm.bias"])
    qkv = h @ w["attention.query_key_value.weight"].T + w["attention.query_key_value.bias"]
    mixed = torch.zeros_like(x)
    for head in range(n_head):
        columns = slice(head * size, (head + 1) * size)
        query, key, value = (qkv[:, i * width : (i + 1) * width][:, columns] for i in range(3))
        for t in range(length):
            scores = key[: t + 1] @ query[t] / math.sqrt(size)
            weights = scores.exp() / scores.exp().sum()
            mixed[t, columns] = weights @ value[: t + 1]
    x = x + mixed @ w["attention.projection.weight"].T + w["attention.projection.bias"]
    h = reference_norm(x, w["mlp_norm.weight"], w["mlp_norm.bias"])
    h = h @ w["mlp.expansion.weight"].T + w["mlp.expansion.bias"]
    h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    return x + h @ w["mlp.projection.weight"].T + w["mlp.projection.bias"]


def test_matches_a_float64_reference() -> None:
    model, tokens = small_gpt(), small_tokens(batch=1)
    x = model.token_embedding.weight.double()[tokens[0]] + model.position_embedding.weight.double()
    for block in model.blocks:
        assert isinstance(block, Block)
        x = reference_block(block, x, n_head=3)
    x = reference_norm(x, model.norm.weight.double(), model.norm.bias.double())
    expected = x @ model.token_embedding.weight.double().T
    torch.testing.assert_close(model(tokens)[0].double(), expected, rtol=1e-5, atol=1e-5)


def test_a_later_token_does_not_change_earlier_logits() -> None:
    model, tokens = small_gpt(), small_tokens()
    before = model(tokens)
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 11
    after = model(changed)
    torch.testing.assert_close(after[:, :4], before[:, :4])
    for t in range(4, 7):  # and every later position does see it
        assert (after[:, t] - before[:, t]).abs().max() > 1e-3


def test_embedding_and_head_are_one_parameter() -> None:
    model, tokens = small_gpt(), small_tokens()
    assert model.head.weight is model.token_embedding.weight
    F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    # Token 10 may not occur in the input, but the head pushes every row.
    assert model.token_embedding.weight.grad is not None
    assert (model.token_embedding.weight.grad.norm(dim=1) > 0).all()
    copy = GPT(SMALL)
    copy.load_state_dict(model.state_dict())
    assert copy.head.weight is copy.token_embedding.weight
    torch.testing.assert_close(copy(tokens), model(tokens), rtol=0, atol=0)


def test_gpt2_has_gpt2s_parameters() -> None:
    with torch.device("meta"):
        model = GPT.preset("gpt2")
    parameters = list(model.parameters())
    assert sum(parameter.numel() for parameter in parameters) == 124_439_808
    assert len(parameters) == 148


def test_tiny_reads_bytes_and_changes_are_applied() -> None:
    assert PRESETS["tiny"].vocab_size == 256
    model = GPT.preset("tiny", n_layer=1, block_size=9)
    assert (len(model.blocks), model.position_embedding.weight.shape[0]) == (1, 9)
    assert model.config.n_embd == PRESETS["tiny"].n_embd


def test_without_bias_only_weights_are_left() -> None:
    names = [name for name, _ in small_gpt(bias=False).named_parameters()]
    assert len(names) == 2 + 2 * 6 + 1  # embeddings; per block 2 norms, 4 matrices; the last norm
    assert all(name.endswith("weight") for name in names)


def test_initialisation_is_gpt2s() -> None:
    torch.manual_seed(0)
    # Wide enough that the smallest matrix (96 x 96) has its deviation within 4 % (5 sigma).
    model = GPT(GPTConfig(vocab_size=256, block_size=128, n_layer=8, n_head=4, n_embd=96))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == (1.0 if name.endswith("weight") else 0.0)).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            expected = 0.02 / 4 if "projection" in name else 0.02  # sqrt(2 * 8 layers) = 4
            assert parameter.std().item() == pytest.approx(expected, rel=0.04), name  # sync point
    # The head starts nearly undecided: each byte costs about log(256), whatever comes before it.
    tokens = torch.randint(256, (8, 128), generator=torch.Generator().manual_seed(1))
    loss = F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(256), abs=0.05)  # sync point


def test_dropout_acts_in_training_only() -> None:
    model, tokens = small_gpt(dropout=0.5), small_tokens()
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    torch.testing.assert_close(model(tokens), model(tokens), rtol=0, atol=0)


@pytest.mark.parametrize(
    "prompt", [1, 3, 7, 9]
)  # one token, a few, a full window, more than a window
def test_greedy_generation_is_the_argmax_step_by_step(prompt: int) -> None:
    model, tokens = small_gpt(), small_tokens(length=prompt)
    expected = tokens
    for _ in range(10):  # goes past block_size 7 from every prompt
        logits = model(expected[:, -7:])[:, -1]
        expected = torch.cat((expected, logits.argmax(dim=-1, keepdim=True)), dim=1)
    generated = model.generate(tokens, 10, temperature=0)
    assert generated.tolist() == expected.tolist()  # sync point
    assert len(set(generated[:, prompt:].flatten().tolist())) > 1  # sync point


def test_sampling_follows_the_models_distribution() -> None:
    model, tokens = small_gpt(), small_tokens(length=3, batch=1)
    draws = model.generate(
        tokens.expand(20_000, 3), 1, temperature=2.0, generator=torch.Generator().manual_seed(2)
    )[:, -1]
    expected = (model(tokens)[0, -1] / 2.0).softmax(dim=-1)
    # Five standard deviations of a frequency over 20,000 draws are at most 0.018.
    torch.testing.assert_close(draws.bincount(minlength=11) / 20_000, expected, rtol=0, atol=0.018)


def test_top_k_keeps_the_likeliest_and_the_generator_decides() -> None:
    model, tokens = small_gpt(), small_tokens(length=3, batch=1)
    best = model(tokens)[0, -1].topk(2).indices.tolist()  # sync point

    def draw(seed: int, top_k: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        rows = tokens.expand(200, 3)
        return model.generate(rows, 1, 3.0, top_k, generator)[:, -1].tolist()  # sync point

    assert set(draw(0, top_k=2)) == set(best)
    assert draw(0, top_k=2) == draw(0, top_k=2)
    assert draw(0, top_k=2) != draw(1, top_k=2)
    assert len(set(draw(0, top_k=1000))) > 2  # more than the vocabulary: all of it


def test_generate_restores_the_mode_even_after_an_error() -> None:
    model, tokens = small_gpt(), small_tokens()
    for training in (True, False):
        model.train(training)
        model.generate(tokens, 1)
        assert model.training is training
        assert model.blocks.training is training
        with pytest.raises(IndexError):
            model.generate(tokens + 100, 1)
        assert model.training is training


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ({"n_head": 5}, "expected n_embd to be a multiple of n_head, got n_embd 12 and n_head 5"),
        ({"n_layer": 0}, "expected n_layer of at least 1, got 0"),
        ({"dropout": 1.0}, r"expected dropout in \[0, 1\), got 1.0"),
    ],
)
def test_a_shape_that_cannot_be_built_is_a_sentence(shape: dict[str, float], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        small_gpt(**shape)


def test_wrong_input_is_a_sentence() -> None:
    model = small_gpt()
    with pytest.raises(ValueError, match="expected at most block_size = 7 tokens, got 8"):
        model(small_tokens(length=8))
    with pytest.raises(ValueError, match=r"expected tokens of shape \[B, T\], got \[3\]"):
        model(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"T >= 1, got \[2, 0\]"):
        model.generate(small_tokens(length=0), 1)
    with pytest.raises(ValueError, match="finite temperature of at least 0, got -1"):
        model.generate(small_tokens(), 1, temperature=-1)
    with pytest.raises(ValueError, match="top_k of at least 1, got 0"):
        model.generate(small_tokens(), 1, top_k=0)
    with pytest.raises(ValueError, match="max_new_tokens of at least 0, got -1"):
        model.generate(small_tokens(), -1)
    with pytest.raises(ValueError, match="expected one of tiny, gpt2, got 'huge'"):
        GPT.preset("huge")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"among .*n_embd.*, got 'width'"):
        GPT.preset("tiny", width=3)


def test_learns_three_lines_by_heart() -> None:
    text = "the loss is read once\nthe gradient is seen\nand nothing waits\n"
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=256, block_size=64, n_layer=2, n_head=2, n_embd=64))
    tokens = encode(text)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = F.cross_entropy(model(tokens[None, :-1])[0], tokens[1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.02  # sync point
    assert decode(model.generate(tokens[None, :8], len(text) - 8, temperature=0)[0]) == text
