"""Sweeps: rows in shared batches equal one run at a time, whichever way the batch is cut; interruption loses nothing."""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

import emolens as em
from emolens.directions.controls import random_directions, shuffled_directions
from emolens.interventions import measure as measure_room
from emolens.interventions.dose import calibrate_dose, prompt_baseline
from emolens.interventions.measure import Cell
from emolens.interventions.sweep import shortest_words, sweep
from emolens.models.tokens import encode

TL4 = int(importlib.metadata.version("transformer-lens").split(".")[0]) >= 4
BACKENDS = [
    pytest.param(
        "hooked",
        marks=pytest.mark.skipif(TL4, reason="transformer-lens 4 has no HookedTransformer"),
    ),
    "bridge",
]
STEMS = ["The door was open and she was", "He", "I put the kettle on and felt"]
WORDS = {
    "glimmer": ["happy", "merry"],
    "gloamer": ["sorry"],
    "brindle": ["cross", "wild"],
    "tarrow": ["shy"],
}
NEUTRAL = [
    "The door was open when she came home.",
    "They laughed, then they stopped laughing.",
    "On Sunday the neighbours were in the garden again.",
    "I put the kettle on and waited for the letter.",
]
# float32 noise of three blocks and a softmax, with log-probabilities near -6; batches of other widths sum in another order
TOLERANCE = 2e-4


@pytest.fixture(scope="module", params=BACKENDS)
def model(request, tiny):
    return em.load_model(tiny("llama", tokenizer="bos"), backend=request.param)


@pytest.fixture(scope="module")
def v(model, toy_set):
    return em.mean_difference(
        em.collect_resid_post(model, em.load_emotion_set(toy_set), progress=False)
    )


def log_prob(model, prompt, word, hooks):
    """Teacher-forced log-probability of a whole word after a prompt, with hooks, in a run of its own."""
    [e] = encode(model, [prompt])
    new = model.tokenizer(" " + word, add_special_tokens=False).input_ids
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        log = model(torch.tensor([e.ids + new]), return_type="logits")[0].float().log_softmax(-1)
    return sum(float(log[len(e.ids) - 1 + k, token]) for k, token in enumerate(new))


def naive(model, v, cell, prompt, words):
    hooks = em.steer_resid_post(v[cell.direction], layer=cell.layer, dose=cell.dose)
    return np.mean(
        [log_prob(model, prompt, w, hooks) - log_prob(model, prompt, w, []) for w in words]
    )


def test_a_sweep_equals_one_run_for_every_cell_prompt_and_word(model, v):
    assert any(
        len(model.tokenizer(" " + w, add_special_tokens=False).input_ids) > 1
        for ws in WORDS.values()
        for w in ws
    )
    result = sweep(
        model,
        STEMS,
        v[["glimmer", "brindle"]],
        layers=[0, 1, 2],
        doses=[0.3],
        target_words=WORDS,
        controls={},
        progress=False,
    )
    assert result.change.shape == (6, 3, 4)
    for i, cell in enumerate(result.cells):
        for j, stem in enumerate(STEMS):
            for k, words in enumerate(WORDS.values()):
                assert float(result.change[i, j, k]) == pytest.approx(
                    naive(model, v, cell, stem, words), abs=TOLERANCE
                )


@pytest.mark.parametrize(
    "mutation", ["sign", "twice the dose", "another layer", "another direction"]
)
def test_a_wrong_hook_is_told_from_the_right_one(model, v, mutation):
    """The comparison above turns red for each of these."""
    cell = Cell("glimmer", None, 1, 0.5)
    wrong = {
        "sign": replace(cell, dose=-0.5),
        "twice the dose": replace(cell, dose=1.0),
        "another layer": replace(cell, layer=2),
        "another direction": replace(cell, direction="gloamer"),
    }[mutation]
    result = sweep(
        model,
        STEMS[:1],
        v[["glimmer"]],
        layers=[1],
        doses=[0.5],
        target_words=WORDS,
        controls={},
        progress=False,
    )
    seen = result.change[0, 0].numpy()
    right, other = (
        np.array([naive(model, v, c, STEMS[0], ws) for ws in WORDS.values()]) for c in (cell, wrong)
    )
    assert np.abs(seen - right).max() < TOLERANCE
    assert np.abs(seen - other).max() > 10 * TOLERANCE


def test_batches_of_any_size_give_the_same(model, v):
    options = {
        "layers": [1],
        "doses": [0.1, 0.4],
        "target_words": WORDS,
        "neutral": NEUTRAL[:2],
        "progress": False,
    }
    one = sweep(model, STEMS, v, batch_tokens=1, **options)
    all_at_once = sweep(model, STEMS, v, batch_tokens=100_000, **options)
    torch.testing.assert_close(one.change, all_at_once.change, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(one.kl, all_at_once.kl, atol=TOLERANCE, rtol=0)


def test_dose_zero_changes_nothing(model, v):
    result = sweep(
        model,
        STEMS,
        v,
        layers=[1],
        doses=[0.0],
        target_words=WORDS,
        neutral=NEUTRAL[:2],
        controls={},
        progress=False,
    )
    assert result.change.abs().max() < TOLERANCE
    assert result.kl is not None
    assert result.kl.abs().max() < 1e-5


def test_kl_is_the_divergence_over_real_tokens_but_the_first(model, v):
    result = sweep(
        model,
        STEMS,
        v[["glimmer"]],
        layers=[1],
        doses=[0.4],
        target_words=WORDS,
        neutral=NEUTRAL,
        neutral_tokens=6,
        controls={},
        progress=False,
    )
    assert result.kl is not None
    hooks = em.steer_resid_post(v["glimmer"], layer=1, dose=0.4)
    for k, text in enumerate(NEUTRAL):
        ids = torch.tensor([encode(model, [text])[0].ids[:6]])
        with torch.no_grad():
            base = model(ids, return_type="logits")[0].log_softmax(-1)
            with model.hooks(fwd_hooks=hooks):
                steered = model(ids, return_type="logits")[0].log_softmax(-1)
        expected = (base.exp() * (base - steered)).sum(-1)[1:].mean()
        assert float(result.kl[0, k]) == pytest.approx(float(expected), abs=TOLERANCE)


def test_the_unembedding_of_a_word_as_a_direction_raises_that_word(model, v):
    token = model.tokenizer(" sorry", add_special_tokens=False).input_ids[0]
    gain = model.ln_final.w
    vectors = (model.W_U[:, token] - model.W_U.mean(1)).detach() * gain.detach()
    planted = replace(v["gloamer"], vectors=vectors.float().expand(1, 3, -1).clone())
    first = {"gloamer": ["sorry"], "glimmer": ["happy"]}
    result = sweep(
        model,
        STEMS,
        planted,
        layers=[2],
        doses=[1.0],
        target_words=first,
        controls={},
        progress=False,
    )
    assert (result.margin[0, :, 0] > 0).all()


def test_random_directions_stand_beside_every_sweep_unless_turned_off(model, v):
    on = sweep(model, STEMS[:1], v, layers=[1], doses=[0.1], target_words=WORDS, progress=False)
    assert sum(c.control == "random directions" for c in on.cells) == 8
    off = sweep(
        model,
        STEMS[:1],
        v,
        layers=[1],
        doses=[0.1],
        target_words=WORDS,
        controls={},
        progress=False,
    )
    assert all(c.control is None for c in off.cells)
    assert len(off.cells) == 4
    assert "random directions" in repr(on)
    assert len(on.to_dicts()) == 12 * 4
    assert len(on.select(control=None).cells) == 4


def test_a_killed_sweep_goes_on_where_it_was(model, v, tmp_path, monkeypatch):
    options = {
        "layers": [0, 2],
        "doses": [0.1, 0.4],
        "target_words": WORDS,
        "neutral": NEUTRAL[:2],
        "batch_tokens": 1,
        "progress": False,
    }
    whole = sweep(model, STEMS, v, **options)
    file, calls = tmp_path / "sweep", []
    measure = measure_room.Run.measure

    def dies(self, *args):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return measure(self, *args)

    monkeypatch.setattr(measure_room.Run, "measure", dies)
    with pytest.raises(KeyboardInterrupt):
        sweep(model, STEMS, v, out=file, **options)
    assert sorted(p.name for p in file.iterdir()) == [f"{i:05d}.json" for i in range(6)]
    (file / "00003.json").write_text('{"made_by": "', encoding="utf-8")  # damaged: made again
    calls.clear()
    monkeypatch.setattr(
        measure_room.Run, "measure", lambda self, *a: calls.append(1) or measure(self, *a)
    )
    resumed = sweep(model, STEMS, v, out=file, **options)
    assert len(calls) == len(whole.cells) - 5
    torch.testing.assert_close(
        resumed.change, whole.change, atol=0, rtol=0
    )  # JSON keeps every digit of a float
    torch.testing.assert_close(resumed.kl, whole.kl, atol=0, rtol=0)
    assert not any(hook.fwd_hooks for hook in model.hook_dict.values())


def test_what_is_written_is_what_generate_writes_and_is_read_without_the_hook(model, v):
    """Against `em.generate`, and against one plain run of prompt and new text for each."""
    options = {
        "layers": [1],
        "doses": [0.8],
        "target_words": WORDS,
        "controls": {},
        "progress": False,
    }
    result = sweep(model, STEMS, v[["glimmer", "tarrow"]], max_new_tokens=5, read=v, **options)
    w, base = result.written, result.unsteered
    assert w is not None
    assert base is not None
    for i, cell in enumerate((*result.cells, None)):
        hooks = [] if cell is None else em.steer_resid_post(v[cell.direction], layer=1, dose=0.8)
        made, at = (w, i) if cell is not None else (base, 0)
        expected = em.generate(model, STEMS, hooks, max_new_tokens=5)
        assert made.texts[at] == expected.texts
        for j, (prompt, ids) in enumerate(zip(STEMS, expected.tokens, strict=True)):
            before = encode(model, [prompt])[0].ids
            with torch.no_grad():
                logits, cache = model.run_with_cache(
                    torch.tensor([[*before, *ids]]), return_type="logits"
                )
            log = logits[0].float().log_softmax(-1)
            nll = [-float(log[len(before) - 1 + k, t]) for k, t in enumerate(ids)]
            assert float(made.log_perplexity[at, j]) == pytest.approx(np.mean(nll), abs=TOLERANCE)
            rows = cache[f"blocks.{v.layer}.hook_resid_post"][0, len(before) :, None].float()
            z = v.at(v.layer).token_z(rows, torch.arange(len(before), len(before) + len(ids)))[
                ..., 0
            ]
            torch.testing.assert_close(
                made.score[at, j], z.mean(0), atol=1e-2, rtol=1e-3
            )  # z divides by small spreads
            assert made.length[at, j] == len(ids)
            pairs = list(pairwise(ids))
            assert float(made.distinct[at, j]) == pytest.approx(len(set(pairs)) / len(pairs))
    assert not torch.equal(
        w.log_perplexity[0], base.log_perplexity[0]
    )  # the dose is large enough to matter
    torch.testing.assert_close(
        result.perplexity_ratio, (w.log_perplexity - base.log_perplexity).exp()
    )
    [row] = [
        r
        for r in result.to_dicts()
        if (r["prompt"], r["emotion"], r["direction"]) == (STEMS[1], "gloamer", "tarrow")
    ]
    assert row["text"] == w.texts[1][1]
    assert row["score"] == pytest.approx(float(w.score[1, 1, v.emotions.index("gloamer")]))
    assert "perplexity" in repr(result)
    assert result.select(dose=0.8).written.texts == w.texts


def test_a_text_that_ends_at_once_has_no_perplexity_and_length_zero(model, v, monkeypatch):
    first = em.generate(model, STEMS[:1], max_new_tokens=1).tokens[0][0]
    monkeypatch.setattr(type(model.tokenizer), "eos_token_id", first, raising=False)
    result = sweep(
        model, STEMS[:1], v[["glimmer"]], layers=[1], doses=[0.0], target_words=WORDS, controls={}, max_new_tokens=3, read=v, progress=False
    )  # fmt: skip
    assert result.written is not None
    assert result.written.texts == (("",),)
    assert result.written.length.tolist() == [[0.0]]
    assert result.written.log_perplexity.isnan().all()
    assert result.written.score.isnan().all()


def test_written_text_survives_a_kill_and_a_small_memory(model, v, tmp_path, monkeypatch):
    options = {
        "layers": [0, 2],
        "doses": [0.4],
        "target_words": WORDS,
        "max_new_tokens": 4,
        "read": v,
        "progress": False,
    }
    whole = sweep(model, STEMS, v, **options)
    real, calls = measure_room.Run.text, []

    def small_and_dies(self, vectors, *args):
        if vectors is not None:
            if len(vectors) > 2:
                raise torch.OutOfMemoryError("out of memory")
            calls.append(len(vectors))
            if sum(calls) > 14:
                raise KeyboardInterrupt
        return real(self, vectors, *args)

    monkeypatch.setattr(measure_room.Run, "text", small_and_dies)
    file = tmp_path / "sweep"
    with pytest.raises(KeyboardInterrupt):
        sweep(model, STEMS, v, out=file, **options)
    calls[:] = [-100]
    resumed = sweep(model, STEMS, v, out=file, **options)
    assert resumed.info["splits"] > 0
    assert resumed.written.texts == whole.written.texts
    torch.testing.assert_close(
        resumed.written.log_perplexity, whole.written.log_perplexity, atol=TOLERANCE, rtol=0
    )
    torch.testing.assert_close(resumed.written.score, whole.written.score, atol=1e-2, rtol=1e-3)
    with pytest.raises(FileExistsError, match="something else"):
        sweep(model, STEMS, v, out=file, **(options | {"max_new_tokens": 3}))
    assert not any(hook.fwd_hooks for hook in model.hook_dict.values())


def test_a_file_of_another_sweep_is_refused(model, v, tmp_path):
    file = tmp_path / "sweep"
    sweep(
        model, STEMS[:1], v, layers=[1], doses=[0.1], target_words=WORDS, out=file, progress=False
    )
    with pytest.raises(FileExistsError, match="something else"):
        sweep(
            model,
            STEMS[:1],
            v,
            layers=[1],
            doses=[0.2],
            target_words=WORDS,
            out=file,
            progress=False,
        )
    louder = replace(v, norm_median=v.norm_median * 2)
    with pytest.raises(FileExistsError, match="something else"):
        sweep(
            model,
            STEMS[:1],
            louder,
            layers=[1],
            doses=[0.1],
            target_words=WORDS,
            out=file,
            progress=False,
        )
    with pytest.raises(FileExistsError, match="something else"):
        sweep(
            model,
            STEMS[:1],
            v,
            layers=[1],
            doses=[0.1],
            target_words=WORDS,
            out=file,
            prepend_bos=False,
            progress=False,
        )
    assert all("made_by" in json.loads(f.read_text(encoding="utf-8")) for f in file.iterdir())


def test_a_sweep_that_is_read_by_another_calibration_does_not_go_on_in_the_same_file(
    model, v, tmp_path
):
    options = {
        "layers": [1],
        "doses": [0.1],
        "target_words": WORDS,
        "progress": False,
        "out": tmp_path / "sweep",
    }
    sweep(model, STEMS[:1], v, max_new_tokens=2, read=v, **options)
    assert v.calibration is not None
    for other in (
        replace(v, calibration=replace(v.calibration, token_mean=v.calibration.token_mean + 5)),
        replace(v, calibration=replace(v.calibration, token_std=v.calibration.token_std * 2)),
        replace(v, reference=v.reference + 1),
    ):
        with pytest.raises(FileExistsError, match="something else"):
            sweep(model, STEMS[:1], v, max_new_tokens=2, read=other, **options)


def test_a_sweep_of_another_head_or_final_norm_does_not_go_on_in_the_same_file(model, v, tmp_path):
    options = {
        "layers": [1],
        "doses": [0.1],
        "target_words": WORDS,
        "progress": False,
        "out": tmp_path / "sweep",
    }
    sweep(model, STEMS, v, **options)
    for name in ("unembed", "ln_final"):
        part = getattr(model, name)
        tensor = next(p for p in part.parameters() if p.count_nonzero())
        kept = tensor.detach().clone()
        try:
            with torch.no_grad():
                tensor[..., -1] += 0.5
            with pytest.raises(
                FileExistsError,
                match=r"holds the results of something else .*; choose another folder",
            ):
                sweep(model, STEMS, v, **options, allow_other_model=True)
        finally:
            with torch.no_grad():
                tensor.copy_(kept)
            em.models.present_info(model)
    sweep(model, STEMS, v, **options)


def test_running_out_of_memory_halves_the_batch_and_is_recorded(model, v, monkeypatch):
    options = {"layers": [1], "doses": [0.1], "target_words": WORDS, "progress": False}
    expected = sweep(model, STEMS, v, **options)
    real = measure_room.Run._next_words

    def small_machine(self, vectors, *args):
        if len(vectors) > 3:
            torch.empty(2**60)  # the error of this machine
        return real(self, vectors, *args)

    monkeypatch.setattr(measure_room.Run, "_next_words", small_machine)
    result = sweep(model, STEMS, v, **options)
    assert result.info["splits"] == 3  # 12 cells: 6 + 6, 3 + 3 + 3 + 3
    torch.testing.assert_close(result.change, expected.change, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"doses": [float("nan")]}, "finite doses"),
        ({"doses": []}, "finite doses"),
        ({"layers": [7]}, "layer 7 has no directions"),
        ({"target_words": {"glimmer": ["happy"]}}, "at least two emotions"),
        (
            {"target_words": {"glimmer": ["happy"], "gloamer": ["sorry"]}},
            "'brindle' has no target words",
        ),
        ({"neutral": NEUTRAL, "neutral_tokens": 1}, "at least 2"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1: how many to write"),
        ({"max_new_tokens": 10_000}, "this model reads"),
    ],
)
def test_bad_requests_are_refused_before_any_run(model, v, change, message):
    with pytest.raises(ValueError, match=message):
        sweep(model, STEMS, v, **({"target_words": WORDS, "layers": [1]} | change))
    with pytest.raises(ValueError, match="no texts given"):
        sweep(model, [], v, target_words=WORDS)
    with pytest.raises(ValueError, match="needs max_new_tokens="):
        sweep(model, STEMS, v, layers=[1], target_words=WORDS, read=v)


def test_a_calibrated_dose_keeps_its_budget_and_a_larger_one_does_not(model, v):
    found = calibrate_dose(model, v["glimmer"], NEUTRAL, layer=1, budget=0.02, max_dose=4.0)
    assert 0 < found.dose < 4.0
    order = np.random.default_rng(0).permutation(4)  # the half that it chose on
    chosen_on = [NEUTRAL[i] for i in order[:2]]

    def kl(texts: list[str], dose: float) -> float:
        at: Any = {
            "layers": [1],
            "doses": [dose],
            "target_words": WORDS,
            "controls": {},
            "progress": False,
        }
        r = sweep(model, STEMS, v["glimmer"], neutral=texts, **at)
        assert r.kl is not None
        return float(r.kl.mean())

    assert (
        kl(chosen_on, found.dose)
        <= 0.02 + TOLERANCE
        < kl(chosen_on, found.dose * 1.05) + 2 * TOLERANCE
    )
    assert found.kl.value == pytest.approx(
        kl([NEUTRAL[i] for i in order[2:]], found.dose), abs=TOLERANCE
    )
    assert (
        abs(found.kl.value - kl(chosen_on, found.dose)) > 10 * TOLERANCE
    )  # the halves differ: it is not that of the one it chose on
    assert found.n_texts == 2
    assert found.kl.low <= found.kl.value <= found.kl.high


def test_a_dose_is_lowered_until_what_is_written_keeps_its_budget_too(model, v):
    """A budget that every text keeps changes nothing; a tight one lowers the dose, and the next larger dose breaks it."""
    options = {"layer": 1, "budget": 0.5, "max_dose": 4.0, "max_new_tokens": 6}
    prompts = [*STEMS, "The letter came and"]
    kl_only = calibrate_dose(model, v["glimmer"], NEUTRAL, **options)
    loose = calibrate_dose(
        model, v["glimmer"], NEUTRAL, prompts=prompts, perplexity_budget=1e6, **options
    )
    assert loose.dose == kl_only.dose
    tight = calibrate_dose(
        model, v["glimmer"], NEUTRAL, prompts=prompts, perplexity_budget=1.5, **options
    )
    assert tight.dose < kl_only.dose
    assert tight.n_prompts == 2
    assert "other prompts" in str(tight)
    rng = np.random.default_rng(0)
    rng.permutation(len(NEUTRAL))  # the texts are drawn first
    chosen_on = [prompts[i] for i in rng.permutation(4)[:2]]
    for dose, inside in ((tight.dose, True), (tight.dose / 0.9, False)):
        r = sweep(
            model, chosen_on, v["glimmer"], layers=[1], doses=[dose], target_words=WORDS, controls={}, max_new_tokens=6, progress=False
        )  # fmt: skip
        assert (float(r.perplexity_ratio.log().nanmean().exp()) <= 1.5) == inside


def test_calibrate_dose_says_what_it_needs(model, v):
    with pytest.raises(ValueError, match="at least four prompts"):
        calibrate_dose(model, v["glimmer"], NEUTRAL, prompts=STEMS)
    with pytest.raises(ValueError, match="above one"):
        calibrate_dose(model, v["glimmer"], NEUTRAL, prompts=[*STEMS, "A"], perplexity_budget=1.0)
    with pytest.raises(ValueError, match="one direction"):
        calibrate_dose(model, v, NEUTRAL)
    with pytest.raises(ValueError, match="four texts"):
        calibrate_dose(model, v["glimmer"], NEUTRAL[:2])


def test_a_prompt_baseline_is_the_instruction_before_the_text(model, toy_set):
    emotions = em.load_emotion_set(toy_set)
    result = prompt_baseline(model, STEMS[:2], emotions, names=["glimmer"], neutral=NEUTRAL[:2])
    assert result.cells[0].control == "prompt"
    assert result.kl is not None
    assert (result.kl > 0).all()
    said = "Someone feels glimmering today. "
    words = emotions["glimmer"].target_words
    for j, stem in enumerate(STEMS[:2]):
        expected = np.mean(
            [log_prob(model, said + stem, w, []) - log_prob(model, stem, w, []) for w in words]
        )
        assert float(result.change[0, j, 0]) == pytest.approx(expected, abs=TOLERANCE)
    with pytest.raises(ValueError, match="no adjective"):
        prompt_baseline(model, STEMS, emotions, names=["hunger"])


def test_the_shortest_words_of_each_emotion_are_kept(model):
    tokenizer = model.tokenizer
    kept = shortest_words(tokenizer, WORDS)
    for e, words in WORDS.items():
        size = {w: len(tokenizer(" " + w, add_special_tokens=False).input_ids) for w in words}
        assert kept[e] == [w for w in words if size[w] == min(size.values())]


def test_random_directions_are_as_long_and_point_anywhere(model, v, toy_set):
    acts = em.collect_resid_post(model, em.load_emotion_set(toy_set), progress=False)
    for like in (None, acts):
        r = random_directions(v, 50, seed=3, like=like)
        size = torch.linalg.vector_norm(v.vectors, dim=-1).mean(0)
        torch.testing.assert_close(torch.linalg.vector_norm(r.vectors, dim=-1), size.expand(50, -1))
        assert r.calibration is None
        assert r.emotions[0] == "random 0"
        assert not torch.equal(r.vectors, random_directions(v, 50, seed=4, like=like).vectors)
    cosine = random_directions(v, 50, seed=3).cosine(layer=1)
    assert (
        cosine - torch.eye(50)
    ).abs().mean() < 3 / 32**0.5  # mean |cosine| of random directions in d_model 32 is about 0.14


def test_shuffled_directions_lose_the_emotion_and_keep_the_texts(model, v, toy_set):
    acts = em.collect_resid_post(model, em.load_emotion_set(toy_set), progress=False)
    shuffled = shuffled_directions(acts, v, seed=1)
    assert shuffled.emotions == v.emotions
    assert shuffled.calibration is None
    own = torch.nn.functional.cosine_similarity(v.vectors, shuffled.vectors, dim=-1)
    assert own.mean() < 0.7  # the right labels would give 1
    again = shuffled_directions(acts, v["glimmer"].at([1]), seed=1)
    torch.testing.assert_close(again.vectors[0, 0], shuffled.at([1])["glimmer"].vectors[0, 0])


def labelled(model, emotions, topics=None):
    """Plain texts with labels, one after the other."""
    texts = [
        f"Number {i} came to the {['kitchen', 'train', 'office'][i % 3]}. Then it was {e}."
        for i, e in enumerate(emotions)
    ]
    return em.collect_resid_post(model, texts, emotions=emotions, topics=topics, progress=False)


def test_texts_without_topics_are_shuffled_over_all_of_them(model):
    """Each text is no group of its own: that gave the real directions back."""
    acts = labelled(model, ["joy", "fear", "calm"] * 4)
    v = em.mean_difference(acts, remove_neutral=None)
    for seed in range(5):
        own = torch.nn.functional.cosine_similarity(
            v.vectors, shuffled_directions(acts, v, seed=seed).vectors, dim=-1
        )
        assert own.min() < 0.95


@pytest.mark.parametrize(
    "topics",
    [[f"t{i}" for i in range(6)], ["a", "b", "c"] * 2],
    ids=["one text each", "one emotion each"],
)
def test_labels_that_cannot_move_are_no_control(model, topics):
    acts = labelled(model, ["joy", "fear", "calm"] * 2, topics)
    v = em.mean_difference(acts, remove_neutral=None)
    with pytest.raises(
        ValueError,
        match=r"labels cannot be shuffled within \d groups that have one label each: nothing moves",
    ):
        shuffled_directions(acts, v)


@pytest.mark.parametrize(
    "emotions", [["joy", "fear"] * 2, ["joy", "fear", "calm"] * 2], ids=["two", "three"]
)
def test_a_shuffle_is_never_the_truth_itself_nor_the_truth_under_other_names(model, emotions):
    """Two topics with a text of each emotion: half of the shuffles of two only turn the axis round."""
    acts = labelled(model, emotions, ["a"] * (len(emotions) // 2) + ["b"] * (len(emotions) // 2))
    v = em.mean_difference(acts, remove_neutral=None)
    for seed in range(8):
        shuffled = shuffled_directions(acts, v, seed=seed)
        for own in v.vectors:
            assert (
                torch.nn.functional.cosine_similarity(own, shuffled.vectors, dim=-1).abs().max()
                < 0.99
            )


@pytest.mark.parametrize(
    ("emotions", "topics"),
    [(["joy", "fear"], ["a", "a"]), (["joy", "fear", "calm"], None), (["joy", "fear"] * 2 + ["calm"] * 2, ["a"] * 4 + ["b"] * 2)],
    ids=["one text each", "one text each, no topics", "an emotion with a topic of its own"],
)  # fmt: skip
def test_texts_that_stay_together_however_they_are_shuffled_are_no_control(model, emotions, topics):
    acts = labelled(model, emotions, topics)
    v = em.mean_difference(acts, remove_neutral=None)
    with pytest.raises(ValueError, match=r"texts of '(joy|calm)' stay together in 100 shuffles"):
        shuffled_directions(acts, v)


def test_directions_drawn_from_rows_that_span_no_more_are_no_control(model):
    acts = labelled(model, ["joy", "fear"])
    v = em.mean_difference(acts, remove_neutral=None)
    with pytest.raises(
        ValueError, match="like= has 2 rows, which span no more than 2 directions do"
    ):
        random_directions(v, 3, like=acts)


@pytest.mark.parametrize("control", ["anywhere", "of the rows", "shuffled"])
def test_every_control_differs_from_what_it_controls(model, v, toy_set, control):
    acts = em.collect_resid_post(model, em.load_emotion_set(toy_set), progress=False)
    make = {
        "anywhere": lambda seed: random_directions(v, len(v.emotions), seed=seed),
        "of the rows": lambda seed: random_directions(v, len(v.emotions), seed=seed, like=acts),
        "shuffled": lambda seed: shuffled_directions(acts, v, seed=seed),
    }[control]
    unit = torch.nn.functional.normalize(v.vectors, dim=-1)
    for seed in range(5):
        other = torch.nn.functional.normalize(make(seed).vectors, dim=-1)
        assert (
            torch.einsum("eld,eld->el", unit, other).mean() < 0.7
        )  # the directions themselves would give 1
