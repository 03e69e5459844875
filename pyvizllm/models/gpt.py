"""A GPT in one readable file: the architecture of GPT-2 (Radford et al., 2019).

Pre-norm blocks, learned positions, fused causal attention, one matrix for embedding and head.
Shapes: B sequences, T tokens of each, E = n_embd channels, H = n_head heads, V = vocab_size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Preset: TypeAlias = Literal["tiny", "gpt2"]


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT, GPT-2 small by default; ValueError if it cannot be built."""

    vocab_size: int = 50257
    block_size: int = 1024
    """Longest sequence the model can read, in tokens."""
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True
    """Biases in the linear layers and the layer norms."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"GPTConfig: expected {name} of at least 1, got {getattr(self, name)}"
                )
        if self.n_embd % self.n_head:
            raise ValueError(
                f"GPTConfig: expected n_embd to be a multiple of n_head, got n_embd {self.n_embd} "
                f"and n_head {self.n_head}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"GPTConfig: expected dropout in [0, 1), got {self.dropout}")


PRESETS: dict[str, GPTConfig] = {
    # Reads bytes; small enough to learn something on two CPU cores in minutes.
    "tiny": GPTConfig(vocab_size=256, block_size=128, n_layer=4, n_head=4, n_embd=128),
    "gpt2": GPTConfig(),  # 124,439,808 parameters
}


class KeyValueCache:
    """The keys and values that one layer has computed, each [B, H, T, E / H]; empty at first."""

    def __init__(self) -> None:
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add the newest keys and values, [B, H, new, E / H]; return all of them."""
        if self._keys is not None and self._values is not None:
            keys = torch.cat((self._keys, keys), dim=2)
            values = torch.cat((self._values, values), dim=2)
        self._keys, self._values, self.length = keys, values, keys.size(2)
        return keys, values


class Attention(nn.Module):
    """Causal self-attention, [B, T, E] -> [B, T, E]."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.query_key_value = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.projection = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        heads = self.query_key_value(x).unflatten(-1, (3, self.n_head, -1))  # [B, T, 3, H, E / H]
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each [B, H, T, E / H]
        if cache is not None:
            key, value = cache.append(key, value)
        # A single token sees everything in the cache; torch aligns its causal mask with the first
        # key, so under a mask that token would see the first key only. Without a cache it is no
        # question of sizes, which are tensors while torch.jit.trace looks.
        mixed = F.scaled_dot_product_attention(
            query,
            key,
            value,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=cache is None or query.size(2) > 1,
        )
        out: Tensor = self.projection(mixed.transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    """Two linear layers with a GELU between them, [B, T, E] -> [B, T, E]."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.expansion = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.projection = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        # GPT-2's weights were trained with the tanh approximation.
        out: Tensor = self.projection(F.gelu(self.expansion(x), approximate="tanh"))
        return out


class Block(nn.Module):
    """One pre-norm transformer block, [B, T, E] -> [B, T, E]."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), cache))
        x = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return x


class GPT(nn.Module):
    """A decoder-only transformer.

    Example:
        >>> model = GPT.preset("tiny")
        >>> logits = model(torch.zeros(1, 16, dtype=torch.int64))  # [1, 16, 256]
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.head.weight = self.token_embedding.weight
        self._initialise()

    @classmethod
    def preset(cls, name: Preset, **changes: Any) -> GPT:
        """A model of a named shape; `changes` replace fields of its GPTConfig.

        ValueError if there is no such name or field.
        """
        if name not in PRESETS:
            raise ValueError(f"GPT.preset: expected one of {', '.join(PRESETS)}, got {name!r}")
        known = [field.name for field in fields(GPTConfig)]
        for change in changes:
            if change not in known:
                raise ValueError(
                    f"GPT.preset: expected changes to be among {', '.join(known)}, got {change!r}"
                )
        return cls(replace(PRESETS[name], **changes))

    def _initialise(self) -> None:
        """GPT-2's: normal of deviation 0.02, smaller where the residual is written; zero biases."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # 2 * n_layer terms add up along the residual: its variance shall not grow so.
                residual = name.endswith("projection.weight")
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def features(self, tokens: Tensor, caches: list[KeyValueCache] | None = None) -> Tensor:
        """What the head reads: tokens [B, T] int64 -> [B, T, E].

        With `caches` (one a layer), `tokens` follow those already cached: any number at first,
        then one at a time.
        """
        if tokens.dim() != 2:
            raise ValueError(f"GPT: expected tokens of shape [B, T], got {list(tokens.shape)}")
        start = caches[0].length if caches else 0
        end = start + tokens.size(1)
        if end > self.config.block_size:
            raise ValueError(
                f"GPT: expected at most block_size = {self.config.block_size} tokens, got {end}"
            )
        positions = torch.arange(start, end, device=tokens.device)
        x: Tensor = self.dropout(self.token_embedding(tokens) + self.position_embedding(positions))
        for layer, block in enumerate(self.blocks):
            x = block(x, caches[layer] if caches else None)
        x = self.norm(x)
        return x

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the token after each: tokens [B, T] int64 -> [B, T, V].

        ValueError if T > block_size.
        """
        logits: Tensor = self.head(self.features(tokens))
        return logits

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue `tokens` [B, T] int64 (T >= 1) to [B, T + max_new_tokens].

        Args:
            max_new_tokens: how many to add; each depends on the last block_size tokens at most.
            temperature: divides the logits before sampling; 0 takes the likeliest token every time.
            top_k: sample only from this many likeliest tokens.
            generator: source of randomness, on the tokens' device.

        Raises:
            ValueError: for an empty prompt, a negative count or temperature, or top_k below 1.
        """
        _check_generate(tokens, max_new_tokens, temperature, top_k)
        was_training = self.training
        self.eval()
        try:
            caches: list[KeyValueCache] = []
            for _ in range(max_new_tokens):
                if not caches or caches[0].length == self.config.block_size:
                    # A full window slides: each token gets a new position, nothing cached holds.
                    caches = [KeyValueCache() for _ in self.blocks]
                    unread = tokens[:, -self.config.block_size :]
                else:
                    unread = tokens[:, -1:]
                logits = self.head(self.features(unread, caches)[:, -1])  # [B, V]
                tokens = torch.cat((tokens, _sample(logits, temperature, top_k, generator)), dim=1)
        finally:
            self.train(was_training)
        return tokens


def _check_generate(
    tokens: Tensor, max_new_tokens: int, temperature: float, top_k: int | None
) -> None:
    if tokens.dim() != 2 or tokens.size(1) == 0:
        raise ValueError(
            f"GPT.generate: expected tokens of shape [B, T] with T >= 1, got {list(tokens.shape)}"
        )
    if max_new_tokens < 0:
        raise ValueError(
            f"GPT.generate: expected max_new_tokens of at least 0, got {max_new_tokens}"
        )
    if not 0.0 <= temperature < math.inf:
        raise ValueError(
            f"GPT.generate: expected a finite temperature of at least 0, got {temperature}"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"GPT.generate: expected top_k of at least 1, got {top_k}")


def _sample(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None
) -> Tensor:
    """The next token of each row: logits [B, V] -> [B, 1]."""
    if temperature == 0.0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None:
        kept, indices = logits.topk(min(top_k, logits.size(-1)), dim=-1)
        choice = torch.multinomial(kept.softmax(dim=-1), 1, generator=generator)
        return indices.gather(-1, choice)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
