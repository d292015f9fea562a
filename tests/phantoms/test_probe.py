"""The reader of phantoms finds in pictures what was drawn."""

from pathlib import Path

import numpy as np
import pytest

from cxr.classifier import to_tensor
from cxr.phantoms import probe, protocol


def test_structure_and_burden_are_read_from_held_out_pictures(arm):
    data, samples = arm.dataset(), arm.samples()
    reader = probe.Reader.fit(data, samples)
    true, read = [], []
    for row in np.flatnonzero(data.splits != "train"):
        sample, burden = samples[Path(data.paths[row]).stem]
        true.append([getattr(sample.structure, name) for name in probe.STRUCTURE] + [burden])
        read.append(reader(to_tensor(data.images[row : row + 1])))
    found = [np.corrcoef(a, b)[0, 1] for a, b in zip(np.transpose(true), np.transpose(read))]
    assert np.mean(found[:-1]) > 0.6 and found[-1] > 0.3


def test_swapped_reading_tells_kept_from_leaked():
    rng = np.random.default_rng(0)
    names = [*probe.STRUCTURE, "burden"]
    rows = []
    for own, other in zip(rng.normal(size=(40, 9)), rng.normal(size=(40, 9))):
        mixed = [*own[:-1], other[-1]]  # the structure of one, the burden of the other
        kinds = {"real": own, "true": own, "other": other, "mixed": mixed}
        rows.append({f"raw/{k}_{n}": v for k, of in kinds.items() for n, v in zip(names, of)})
    swap = protocol.summary([rows])["swap"]
    assert swap["structure"]["kept"]["value"] == pytest.approx(1)
    assert swap["burden"]["moved"]["value"] == pytest.approx(1)
    assert abs(swap["structure"]["leaked"]["value"]) < 0.3
    assert abs(swap["burden"]["leaked"]["value"]) < 0.4
