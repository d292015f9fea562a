"""A model knows the data that it was trained on, under any name and in any order."""

import dataclasses

import numpy as np

from cxr.data import identity
from cxr.datasets import open_dataset


def test_a_model_knows_its_data_by_their_name_or_their_images(xrays):
    data = open_dataset(xrays, 32)
    info = {"split": data.rule, "provenance": {"data": data.name}}
    assert identity.trained_on(info, data) == "yes"
    info["provenance"] |= {"digests": identity.of_data(data)}
    renamed = dataclasses.replace(data, name="renamed")
    assert identity.trained_on(info, renamed) == "yes"
    moved = dataclasses.replace(renamed, splits=data.splits[::-1])
    assert identity.trained_on(info, moved) == "resplit"
    assert identity.trained_on({**info, "split": "another"}, data) == "resplit"
    fewer = dataclasses.replace(renamed, images=data.images[1:], splits=data.splits[1:])
    assert identity.trained_on(info, fewer) == "no"
    order = np.random.default_rng(0).permutation(len(data))
    shuffled = dataclasses.replace(renamed, images=data.images[order], splits=data.splits[order])
    assert identity.trained_on(info, shuffled) == "yes"
