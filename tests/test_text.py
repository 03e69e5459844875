"""Which bytes become which windows, and that the two splits never share one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pyvizllm.training.text import TextDataset, decode, encode


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_windows_are_back_to_back_with_targets_one_ahead(tmp_path: Path) -> None:
    # 200 bytes: 180 to train on, 20 to evaluate on; a window of 9 needs a tenth byte as target.
    path = write(tmp_path, {"a.txt": bytes(range(1, 201))}) / "a.txt"
    train = TextDataset(path, block_size=9, split="train")
    evaluation = TextDataset(str(path), block_size=9, split="eval")
    assert (len(train), len(evaluation)) == (19, 2)  # (180 - 1) // 9, (20 - 1) // 9
    for index in range(19):
        inputs, targets = train[index]
        first = 1 + 9 * index
        assert inputs.tolist() == list(range(first, first + 9))  # sync point
        assert targets.tolist() == list(range(first + 1, first + 10))  # sync point
        assert inputs.dtype == targets.dtype == torch.int64
    assert evaluation[0][0].tolist() == list(range(181, 190))  # sync point
    assert evaluation[-1][1].tolist() == list(range(191, 200))  # sync point
    with pytest.raises(IndexError, match="expected an index below 19, got 19"):
        train[19]


def test_no_byte_is_in_both_splits(tmp_path: Path) -> None:
    path = write(tmp_path, {"a.txt": bytes(range(1, 251))}) / "a.txt"
    train = TextDataset(path, block_size=5, split="train").tokens.tolist()  # sync point
    evaluation = TextDataset(path, block_size=5, split="eval").tokens.tolist()  # sync point
    assert train + evaluation == list(range(1, 251))
    assert len(evaluation) == 25


def test_a_folder_is_its_visible_text_files_in_order(tmp_path: Path) -> None:
    folder = write(
        tmp_path,
        {
            "b.txt": b"second " * 20,
            "a/z.md": b"first " * 20,
            "c.py": b"third " * 20,
            ".hidden": b"no " * 20,
            ".git/config": b"no " * 20,
            "image.png": b"no\0" * 20,
            "empty.txt": b"",
        },
    )
    (folder / "broken").symlink_to(folder / "nowhere")
    text = b"first " * 20 + b"second " * 20 + b"third " * 20
    train = TextDataset(folder, block_size=4, split="train")
    evaluation = TextDataset(folder, block_size=4, split="eval")
    joined = torch.cat((train.tokens, evaluation.tokens))
    assert decode(joined) == text.decode()


def test_a_zero_byte_later_in_a_text_file_is_text(tmp_path: Path) -> None:
    # Git's rule looks at 8 KiB; what follows is read whole.
    folder = write(tmp_path, {"long.txt": b"x" * 9000 + b"\0" + b"y" * 9000})
    train = TextDataset(folder, block_size=4, split="train")
    assert train.tokens.numel() == 18001 - 1800
    assert train.tokens[9000] == 0


def test_the_standard_library_is_python_source_and_the_same_every_time() -> None:
    train = TextDataset(block_size=128, split="train")
    again = TextDataset(block_size=128, split="train")
    evaluation = TextDataset(block_size=128, split="eval")
    assert torch.equal(train.tokens, again.tokens)
    assert train.tokens.dtype == torch.uint8
    assert len(train) > 10_000  # more than a megabyte, whatever the version of Python
    assert len(evaluation) == pytest.approx(len(train) / 9, rel=0.01)
    text = decode(train.tokens)
    assert "class OrderedDict(dict):" in text  # collections/__init__.py
    assert "class CodecRegistryError" not in text  # encodings/__init__.py: skipped


def test_errors_are_sentences(tmp_path: Path) -> None:
    folder = write(
        tmp_path, {"empty": b"", "binary": b"a\0b" * 99, "short": b"x" * 50, "d/.h": b"x"}
    )
    with pytest.raises(
        FileNotFoundError, match=r"expected a text file or a folder, got .*/none, which"
    ):
        TextDataset(tmp_path / "none", block_size=8, split="train")
    with pytest.raises(ValueError, match=r"expected some text, got .*/empty, which is empty"):
        TextDataset(folder / "empty", block_size=8, split="train")
    with pytest.raises(ValueError, match=r"expected a text file, got .*/binary, which is binary"):
        TextDataset(folder / "binary", block_size=8, split="train")
    with pytest.raises(ValueError, match=r"at least 90 bytes .* windows of 8 .*, got 50 bytes in"):
        TextDataset(folder / "short", block_size=8, split="eval")
    with pytest.raises(ValueError, match=r"expected some text, got .*/d, in which no text"):
        TextDataset(folder / "d", block_size=8, split="train")
    with pytest.raises(ValueError, match="expected block_size of at least 1, got 0"):
        TextDataset(block_size=0, split="train")
    with pytest.raises(ValueError, match="expected split 'train' or 'eval', got 'test'"):
        TextDataset(block_size=8, split="test")  # type: ignore[arg-type]


def test_ninety_bytes_are_enough_for_windows_of_eight(tmp_path: Path) -> None:
    """The length that the error asks for is enough, and one byte less is not."""
    path = write(tmp_path, {"a.txt": b"x" * 90}) / "a.txt"
    assert len(TextDataset(path, block_size=8, split="eval")) == 1
    path.write_bytes(b"x" * 89)
    with pytest.raises(ValueError, match="at least 90 bytes"):
        TextDataset(path, block_size=8, split="eval")


def test_both_splits_refuse_the_same_texts(tmp_path: Path) -> None:
    """A text too short to evaluate on is refused before an hour of training on it."""
    path = write(tmp_path, {"a.txt": b"x" * 50}) / "a.txt"
    with pytest.raises(ValueError, match="at least 90 bytes"):
        TextDataset(path, block_size=8, split="train")


def test_encode_and_decode_are_inverse_and_forgiving() -> None:
    text = "naïve ✓\n"
    assert encode(text).tolist() == list(text.encode())  # sync point
    assert decode(encode(text)) == text
    assert decode([104, 105, 255]) == "hi\ufffd"
