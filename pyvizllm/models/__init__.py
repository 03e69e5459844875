"""Models to train: a GPT in one readable file."""

from pyvizllm.models.gpt import GPT, GPTConfig

__all__ = ["GPT", "GPTConfig"]
