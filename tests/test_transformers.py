"""Patched Hugging Face models against the same models as they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

import pyvizllm  # noqa: E402
from pyvizllm.integrations.planned_logits import Layer, Logits  # noqa: E402
from pyvizllm.integrations.transformers import patch  # noqa: E402

VOCABULARY = 101  # odd, larger than the hidden size of 32
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=32,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        **SMALL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    return transformers.BertForMaskedLM(config)


def gemma2() -> nn.Module:
    # A cap of 0.1: logits of an untrained model are small, and it has to show.
    config = transformers.Gemma2Config(**SMALL, head_dim=16, final_logit_softcapping=0.1)
    return transformers.Gemma2ForCausalLM(config)


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))


def cohere() -> nn.Module:
    return transformers.CohereForCausalLM(transformers.CohereConfig(**SMALL, logit_scale=0.25))


def granite() -> nn.Module:
    return transformers.GraniteForCausalLM(transformers.GraniteConfig(**SMALL, logits_scaling=4.0))


def bart() -> nn.Module:
    """Sequence to sequence; its logits have a bias that is no part of the layer."""
    config = transformers.BartConfig(
        vocab_size=VOCABULARY, d_model=32, encoder_layers=1, decoder_layers=1, dropout=0.0,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=48,
        decoder_ffn_dim=48, max_position_embeddings=32, pad_token_id=0, decoder_start_token_id=1,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config)
    model.final_logits_bias.copy_(torch.linspace(-1, 1, VOCABULARY))
    return model


MODELS = (gpt2, llama, bert, gemma2, cohere, granite, bart)


@pytest.fixture(params=MODELS, ids=lambda make: make.__name__)
def model(request) -> nn.Module:
    torch.manual_seed(0)
    return request.param().train()


@pytest.fixture
def batch() -> dict[str, Tensor]:
    tokens = torch.randint(1, VOCABULARY, (3, 17), generator=torch.Generator().manual_seed(0))
    labels = tokens.clone()
    labels[0, :5] = -100
    return {"input_ids": tokens, "labels": labels}


def run(model: nn.Module, batch, **options):
    model.zero_grad()
    output = model(**batch, **options)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(ours, theirs) -> None:
    (got, gradients), (expected, references) = ours, theirs
    torch.testing.assert_close(got.loss, expected.loss, rtol=2e-6, atol=0)
    assert gradients.keys() == references.keys()
    for name, gradient in gradients.items():
        scale = references[name].abs().max()
        assert (gradient - references[name]).abs().max() <= 1e-5 * scale + 1e-9, name


@pytest.fixture
def count_logits(monkeypatch):
    """How often logits are computed after all."""
    calls = []
    tensor = Logits.tensor
    monkeypatch.setattr(Logits, "tensor", lambda self: calls.append(1) or tensor(self))
    return calls


def test_loss_and_gradients(model, batch, count_logits):
    expected = run(model, batch)
    with patch(model):
        got = run(model, batch)
    assert_same(got, expected)
    assert got[0].logits is None
    assert "logits" not in got[0]
    assert not count_logits


def test_items_in_batch(model, batch, count_logits):
    if model.config.model_type in ("bert", "bart"):
        pytest.skip("its forward takes no num_items_in_batch")
    items = torch.tensor(100)
    expected = run(model, batch, num_items_in_batch=items)
    with patch(model):
        assert_same(run(model, batch, num_items_in_batch=items), expected)
    assert not count_logits
    assert not torch.isclose(expected[0].loss, run(model, batch)[0].loss)


def test_removed(model, batch):
    before = run(model, batch)
    handle = patch(model)
    handle.remove()
    handle.remove()
    after = run(model, batch)
    assert torch.equal(after[0].logits, before[0].logits)
    assert "forward" not in vars(model.get_output_embeddings())


def test_evaluation_and_generation_keep_their_logits(model, batch):
    with torch.no_grad(), patch(model):
        without_labels = model(input_ids=batch["input_ids"]).logits
        assert without_labels.shape == (3, 17, VOCABULARY)
        evaluated = model.eval()(**batch)
    assert evaluated.logits.shape == (3, 17, VOCABULARY)
    assert evaluated.loss.isfinite()


def test_tuple_output(model, batch):
    with patch(model):
        loss, logits, *_ = model(**batch, return_dict=False)
    assert logits is None
    assert loss.requires_grad


def test_bfloat16_loss_is_float32_where_the_model_s_is(batch):
    torch.manual_seed(0)
    model = llama().bfloat16().train()
    expected = model(**batch).loss
    with patch(model):
        got = model(**batch).loss
    assert got.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)


def test_output_layer_with_hooks(batch, count_logits):
    torch.manual_seed(0)
    model = gemma2().train()
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(type(output)))
    expected = run(model, batch)
    with patch(model):
        got = run(model, batch)
    assert_same(got, expected)
    assert seen == [Tensor, Logits]
    assert not count_logits


def test_logits_that_something_else_wants(batch, count_logits):
    torch.manual_seed(0)
    model = llama().train()
    model.loss_function = lambda logits, labels, **_: (logits.softmax(-1) ** 2).sum()
    expected = run(model, batch)
    with patch(model):
        assert_same(run(model, batch), expected)
    assert len(count_logits) == 1


def test_shifted_by_hand(batch, count_logits):
    """As older models do it in their own forward."""

    def loss(logits, labels, vocab_size, **_):
        logits = logits[..., :-1, :].contiguous()
        return nn.CrossEntropyLoss()(logits.view(-1, vocab_size), labels[..., 1:].reshape(-1))

    torch.manual_seed(0)
    model = llama().train()
    model.loss_function = loss
    expected = run(model, batch)
    with patch(model):
        assert_same(run(model, batch), expected)
    assert not count_logits


def test_a_failed_forward_leaves_the_model_as_it_was(batch):
    model = llama().train()
    with patch(model):
        with pytest.raises(IndexError):
            model(input_ids=batch["input_ids"] + VOCABULARY, labels=batch["labels"])
        assert isinstance(model.lm_head(torch.zeros(1, 32)), Tensor)


def test_no_output_layer():
    with pytest.raises(TypeError, match="got Linear, which has no output layer"):
        patch(nn.Linear(2, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_loss_under_autocast_is_float32(dtype, batch):
    """BERT's own loss is of logits in 16 bits, which autocast widens."""
    torch.manual_seed(0)
    model = bert().train()
    with torch.autocast("cpu", dtype):
        expected = model(**batch).loss
        with patch(model):
            loss = model(**batch).loss
    assert loss.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)


def test_ours_in_the_place_of_torchs_function_too(model, batch, monkeypatch):
    expected = model(**batch).loss
    monkeypatch.setattr(nn.functional, "cross_entropy", pyvizllm.cross_entropy)
    with patch(model):
        torch.testing.assert_close(model(**batch).loss, expected)


def test_output_layer_with_a_forward_of_its_own(batch):
    model = llama().train()
    original = model.lm_head.forward
    model.lm_head.forward = lambda x: original(x) * 3
    expected = model(**batch).loss
    with patch(model):
        torch.testing.assert_close(model(**batch).loss, expected)
    assert "forward" in vars(model.lm_head)


def test_backward_hooks_of_the_output_layer_are_called(batch):
    model, calls = llama().train(), []
    model.lm_head.register_full_backward_pre_hook(lambda *_: calls.append(1))
    with patch(model):
        model(**batch).loss.backward()
    assert calls == [1]


def test_patched_twice():
    model = llama()
    with patch(model), pytest.raises(ValueError, match="one that is: remove"):
        patch(model)
    assert "forward" not in vars(model.lm_head)
    patch(model).remove()


def test_a_forward_that_takes_anything(batch):
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = llama()

        def forward(self, *args, **kwargs):
            return self.model(*args, **kwargs)

        def get_output_embeddings(self):
            return self.model.lm_head

    model = Wrapper().train()
    expected = model(**batch)
    with patch(model):
        got = model(**batch)
    assert got.logits is None
    torch.testing.assert_close(got.loss, expected.loss)


def test_logits_are_tensors_to_everything_else(batch):
    x, head = torch.randn(2, 3, 4), nn.Linear(4, 5)
    expected = head(x)

    def logits() -> Logits:
        return Logits(Layer(x, head.weight, head.bias), torch.Size((2, 3, 5)), x.dtype)

    operations = {
        "+": lambda z: z + 1.0, "1 -": lambda z: 1 - z, "neg": lambda z: -z, "**": lambda z: z**2,
        ">": lambda z: z > 0, "==": lambda z: z == 0, "1 /": lambda z: 1 / z, "len": len,
        "shape": lambda z: z.shape[:-1].numel(), "abs": abs, "@": lambda z: z @ torch.ones(5),
        "[()]": lambda z: z[()], "[array]": lambda z: z[np.array([0, 1])], "/ 0": lambda z: z / 0,
        "view(dtype)": lambda z: z.view(torch.int32), "[..., 1]": lambda z: z[..., 1],
        "reshape(shape=)": lambda z: z.reshape(shape=(6, 5)), "[1, :, ...]": lambda z: z[1, :, ...],
        "+ bias": lambda z: z + torch.arange(5.0), "+ wider": lambda z: z + torch.ones(5).double(),
        "+ narrower": lambda z: z + torch.ones(5).half(), "bias +": lambda z: torch.ones(1, 5) + z,
    }  # fmt: skip
    for name, operation in operations.items():
        got, wanted = operation(logits()), operation(expected)
        got = got.tensor() if isinstance(got, Logits) else got
        torch.testing.assert_close(got, wanted, msg=name)
    written, copy = logits(), expected.clone()
    written[..., 2] = copy[..., 2] = -7.0
    torch.testing.assert_close(written * 1.0 + 0, copy)
    target = torch.tensor([0, 1, 2, 3, 4, 0])
    of_0 = (logits().tanh() * 0).view(-1, 5)
    torch.testing.assert_close(
        nn.functional.cross_entropy(of_0, target), torch.tensor(5.0).log(), rtol=1e-6, atol=0
    )


def tensors_and_logits() -> list[tuple]:
    """The same logits [2, 3, 5] as a tensor and as a patched head hands them out, twice."""
    torch.manual_seed(0)
    x, head = torch.randn(2, 3, 4, requires_grad=True), nn.Linear(4, 5)
    shape = torch.Size((2, 3, 5))
    computed = Logits(Layer(head(x)), shape, x.dtype)
    return [
        (head(x), Logits(Layer(x, head.weight, head.bias), shape, x.dtype)),
        (head(x), computed),
    ]


def scaled_slice(z):
    z[..., :-1, :].mul_(2.0)
    return z


def written_view(z):
    view = z.view(-1, 5)
    view[:, 3] = -9.0
    return z


def earlier_view(z):
    view = z[:, 1:]
    z.mul_(0.5)
    return view


def later_view(z):
    z.clamp_(max=0.1)
    return z[:, 1:].float() * 2


def multiplied(z):
    alias = z
    z *= 3.0
    return alias


def copied(z):
    copy = z[:, 1:].contiguous() * 1.0
    copy.mul_(7.0)
    return z


WRITES = {
    "mul_": lambda z: (z.mul_(2.0), z)[1],
    "masked_fill_": lambda z: (z.masked_fill_(torch.arange(5) == 3, -50.0), z)[1],
    "clamp_": lambda z: (torch.clamp_(z, max=0.2), z)[1],
    "slice": scaled_slice,
    "view": written_view,
    "earlier view": earlier_view,
    "later view": later_view,
    "*=": multiplied,
    "copy": copied,
}


@pytest.mark.parametrize("name", WRITES)
def test_what_is_written_to_logits_is_not_lost(name):
    for tensor, logits in tensors_and_logits():
        losses = []
        for z in (WRITES[name](tensor), WRITES[name](logits)):
            rows = z.reshape(-1, 5)
            losses.append(nn.functional.cross_entropy(rows, torch.arange(rows.shape[0]) % 5))
        torch.testing.assert_close(losses[1], losses[0])


def test_hooks_of_logits_are_called():
    for _, logits in tensors_and_logits():
        seen = []
        logits.register_hook(seen.append)
        nn.functional.cross_entropy(logits.view(-1, 5), torch.arange(6) % 5).backward()
        assert len(seen) == 1


@pytest.mark.parametrize("part", ["head", "loss"])
def test_a_part_of_it_compiled(part):
    """What the compiler hands over was not written to."""
    torch._dynamo.reset()
    x, head = torch.randn(2, 3, 4), nn.Linear(4, 5)

    def logits(x):
        return Logits(Layer(x, head.weight, head.bias), torch.Size((2, 3, 5)), x.dtype)

    def loss(z):
        return nn.functional.cross_entropy(z.float().view(-1, 5), torch.arange(6) % 5)

    expected = loss(head(x))
    if part == "head":
        logits = torch.compile(logits, backend="eager")
    else:
        loss = torch.compile(loss, backend="eager")
    torch.testing.assert_close(loss(logits(x)), expected)


def test_logits_of_hidden_states_that_were_written_to_are_refused():
    x, head = torch.randn(2, 3, 4), nn.Linear(4, 5)
    logits = Logits(Layer(x, head.weight, head.bias), torch.Size((2, 3, 5)), x.dtype)
    x.mul_(2.0)
    with pytest.raises(RuntimeError, match=r"patch: expected hidden states, .* written to since"):
        nn.functional.cross_entropy(logits.view(-1, 5), torch.arange(6) % 5)
