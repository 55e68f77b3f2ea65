"""Files that 0.1 wrote before its rooms were moved are read: directions, activations, a collection by shards, results."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import emolens as em
from emolens.collect import Collection
from emolens.experiments.rows import Row
from emolens.study import run_study

BEFORE = Path(__file__).parent / "data" / "before"
TOYS = ("glimmer", "gloamer", "brindle", "tarrow")


def test_directions_and_activations_are_read_and_belong_to_each_other():
    v = em.load_directions(BEFORE / "vectors.safetensors")
    acts = em.Activations.load(BEFORE / "activations.safetensors")
    assert (v.emotions, v.hook_point, v.layers) == (TOYS, "resid_post", (1,))
    again = em.mean_difference(acts)
    torch.testing.assert_close(again.vectors, v.vectors)
    torch.testing.assert_close(again.calibration.mean, v.calibration.mean)
    torch.testing.assert_close(again.calibration.std, v.calibration.std)
    assert v["glimmer"].tensor(1).shape == (32,)


def test_a_collection_by_shards_is_opened_and_is_that_of_memory():
    acts = em.Activations.load(BEFORE / "activations.safetensors")
    found = Collection.open(BEFORE / "shards").load()
    assert torch.equal(found.rows, acts.rows)
    assert [t.id for t in found.texts] == [t.id for t in acts.texts]


def test_results_are_rows_and_a_study_in_their_folder_is_refused_by_what_they_say(
    tmp_path, tiny_model, toy_set
):
    found = json.loads((BEFORE / "results.json").read_text(encoding="utf-8"))
    rows = [Row(**r) for r in found["rows"]]
    assert {f.name for f in fields(Row)} == set(found["rows"][0])
    assert all(r.primary for r in rows)
    shutil.copy(BEFORE / "results.json", tmp_path)
    with pytest.raises(FileExistsError, match=r"another study \(tiny-.* on six, seed 0"):
        run_study(tiny_model, em.load_emotion_set(toy_set), out=tmp_path, progress=False)
