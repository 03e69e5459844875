"""The noise scale of gradients whose signal and noise are known."""

import numpy as np
import pytest
from recorded_steps import steps_of

from pyvizllm.telemetry.assembler import Draft
from pyvizllm.telemetry.noise_scale import TAG, NoiseScale
from pyvizllm.telemetry.records import MicroBatches, Steps

PARAMETERS = 400
SIGNAL = 2.0  # |G|^2
NOISE = 50.0  # tr(Sigma): the noise scale is 25 examples


def recorded(seed: int, steps: int, sizes: list[int], **fields: object) -> Steps:
    """Steps whose examples' gradients are G plus normal noise; micro-batches add up as in torch."""
    generator = np.random.default_rng(seed)
    signal = generator.normal(size=PARAMETERS)
    signal *= np.sqrt(SIGNAL) / np.linalg.norm(signal)
    total, squares, gradients = sum(sizes), np.full((steps, len(sizes)), np.nan), []
    for step in range(steps):
        gradient = np.zeros(PARAMETERS)
        for number, size in enumerate(sizes):
            noise = generator.normal(size=PARAMETERS) * np.sqrt(NOISE / PARAMETERS / size)
            gradient = gradient + (signal + noise) * size / total
            if number < len(sizes) - 1:  # the last one's comes from the step's own read
                squares[step, number] = gradient @ gradient
        gradients.append([gradient])
    shape = squares.shape
    batches = MicroBatches(
        losses=np.full(shape, np.nan),
        seen=np.ones(shape, dtype=bool),
        squared_norms=squares,
        sizes=np.tile(np.array(sizes), (steps, 1)),
        sample_ids=[[None] * len(sizes)] * steps,
    )
    return steps_of(1, ("w",), {"grad": gradients}, micro_batches=batches, **fields)


@pytest.mark.parametrize("sizes", [[8, 8, 8, 8], [3, 29], [16, 16]])
def test_known_signal_and_noise(sizes: list[int]) -> None:
    noise_scale = NoiseScale()
    for seed in range(10):
        noise_scale.add(recorded(seed, 50, sizes))
    draft = Draft(1, 0.0)
    noise_scale.publish(draft)
    # Averaged over some 100 steps: six other sets of seeds gave 24.0 to 25.2.
    assert draft.scalars[TAG] == pytest.approx(NOISE / SIGNAL, rel=0.08)


def test_nothing_is_said_where_nothing_is_known() -> None:
    one_batch = NoiseScale()
    one_batch.add(recorded(0, 50, [32]))
    assert one_batch.value() is None

    few = NoiseScale()
    few.add(recorded(0, 9, [8, 8]))
    assert few.value() is None

    scaled = NoiseScale()
    scaled.add(recorded(0, 50, [8, 8], skipped=np.zeros(50, dtype=bool)))
    assert scaled.value() is None

    unknown = NoiseScale()
    steps = recorded(0, 50, [8, 8])
    assert steps.micro_batches is not None
    steps.micro_batches.sizes[:] = -1
    unknown.add(steps)
    assert unknown.value() is None
