"""Models: a readable GPT."""

from pyvizllm.models.gpt import GPT, GPTConfig

__all__ = ["GPT", "GPTConfig"]
