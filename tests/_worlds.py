"""Worlds whose truth is known: a tiny Llama and stories in which six emotions are there, are not there, or are there and not used.

Each token of a cue writes the direction u_e of its emotion into the stream (through the embedding), one uniform attention head carries the
mean of what was written so far to every later token, and the unembedding of each emotion's target words reads u_e. No cue occurs in two
topics, so words alone cannot tell the emotions of a topic that was held out. Three worlds:

    "effect"    the stories of e have cues of e, and the words that name e read u_e
    "shuffled"  the same, but the labels of the stories are shuffled within their topic: nothing can be told apart
    "unused"    the stories of e have cues of e, but the words that name e, and the prompts of the causal tests, live in other directions
    "scenes"    the stories of e share nothing but with themselves: each (emotion, topic) has a direction of its own, and what reads it writes its cues
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any, Literal

import numpy as np
import torch
from _answers import NO_MODEL, answers

import emolens as em
from emolens import geometry, stats
from emolens.collect.activations import Activations, TextInfo
from emolens.collect.histogram import NORM_BINS
from emolens.experiments import causal, person, separability, transfer, validation
from emolens.experiments import fitting as refit
from emolens.experiments import logit_lens as lens
from emolens.experiments.base import Inputs, Stories
from emolens.experiments.rows import Row
from emolens.experiments.rules import Answer
from emolens.sets.emotion_sets import Emotion, EmotionSet, Story, Topic
from emolens.sets.external import Labelled
from emolens.sets.materials import load_pairs, load_stems
from emolens.sets.norms import load_norms

World = Literal["effect", "shuffled", "unused", "scenes"]
D = 40
EMOTIONS = ("joy", "sadness", "anger", "fear", "disgust", "surprise")
WORDS = {"joy": ["happy", "merry"], "sadness": ["sorry", "blue"], "anger": ["cross", "mad"], "fear": ["afraid", "timid"], "disgust": ["queasy", "sick"], "surprise": ["amazed", "stunned"]}  # fmt: skip
TOPICS = {f"topic{i}": "first" if i % 2 else "third" for i in range(8)}
FILLERS = [f"w{i}" for i in range(60)]
LOUD = 3.0  # how far a cue moves the stream, where the common part of a token has a size of about 3
NEW = "x"  # in place of a topic: cues that no story has


def cues(emotion: str, topic: str) -> list[str]:
    return [f"cue{EMOTIONS.index(emotion)}{topic}n{i}" for i in range(3)]


def tell(
    rng: np.random.Generator, emotion: str | None, topic: str, person: str = "third", n: int = 30
) -> str:
    """A text without sense: fillers, words of the topic, of the person, and cues."""
    words = []
    for k in range(n):
        kind = rng.random()
        if emotion and kind < 0.3:
            words.append(str(rng.choice(cues(emotion, topic))))
        elif kind < 0.4:
            words.append(topic)
        elif kind < 0.5:
            words.append("I" if person == "first" else "she")
        else:
            words.append(str(rng.choice(FILLERS)))
        if k % 9 == 8:
            words.append(".")
    return " ".join(words)


def planted_set(seed: int, *, shuffled: bool = False) -> EmotionSet:
    """Six emotions in eight topics, two of them told in both persons, and 24 neutral texts."""
    rng = np.random.default_rng(seed)
    other = {"first": "third", "third": "first"}
    told: dict[str, list[Story]] = {e: [] for e in EMOTIONS}
    for split in ("main", "other_person"):
        for topic, usual in TOPICS.items() if split == "main" else list(TOPICS.items())[:2]:
            who = usual if split == "main" else other[usual]
            meant = rng.permutation(EMOTIONS).tolist() if shuffled else EMOTIONS
            for label, e in zip(EMOTIONS, meant, strict=True):
                text = tell(rng, e, topic, who)
                told[label].append(Story(id=f"{label}-{topic}-{split}", topic=topic, person=who, text=text, split=split))  # type: ignore[arg-type]  # fmt: skip
    neutral = tuple(
        Story(id=f"plain-{i}-{t}", topic=t, person=p, text=tell(rng, None, t, p)) for i in range(3) for t, p in TOPICS.items()
    )  # fmt: skip
    return EmotionSet(
        name="planted",
        language="en",
        emotions=tuple(
            Emotion(name=e, adjective=f"adj{e}", target_words=WORDS[e], norm_key=e)
            for e in EMOTIONS
        ),
        topics=tuple(Topic(name=t, person=p) for t, p in TOPICS.items()),
        stories={e: tuple(s) for e, s in told.items()},
        neutral=neutral,
        source="made by the test suite",
    )


@cache
def vocabulary() -> list[str]:
    texts = [t for p in load_pairs() for t in (p.clean, p.corrupted, p.control)]
    texts += [
        *load_stems().choose,
        *load_stems().report,
        "I opened the door and",
        "Someone feels today.",
    ]
    words = (
        {w for t in texts for w in t.split()}
        | set(FILLERS)
        | set(TOPICS)
        | {"I", "she", ".", "<unk>", "<s>"}
    )
    words |= {c for e in EMOTIONS for t in (*TOPICS, NEW) for c in cues(e, t)}
    words |= {w for ws in WORDS.values() for w in ws} | {f"adj{e}" for e in EMOTIONS}
    return sorted(words)


def planted_model(seed: int, *, used: bool = True, scenes: bool = False) -> Any:
    """The tiny Llama; with `used` false the target words and the prompts' facts have directions of their own, with `scenes` each topic's cues."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = vocabulary()
    at = {w: i for i, w in enumerate(words)}
    core = Tokenizer(models.WordLevel(at, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", at["<s>"])]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token="<unk>")
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=D, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=256, tie_word_embeddings=False, bos_token_id=at["<s>"], eos_token_id=None, pad_token_id=None,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    hf_model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=generator)

    basis = torch.linalg.qr(noise(D, D)).Q.T
    common, u, w = (
        basis[:3],
        basis[3:9],
        basis[9:15],
    )  # what all words vary in; what stories write; what words read
    name = u if used else w
    embed = 0.5 * noise(len(words), D) / D**0.5 + 3 * noise(len(words), 3) / 3**0.5 @ common
    unembed = 0.05 * noise(len(words), D)
    for (k, e), t in product(enumerate(EMOTIONS), (*TOPICS, NEW)):
        here = [at[c] for c in cues(e, t)]
        own = noise(D) / D**0.5 if scenes else u[k]
        embed[here] += LOUD * own
        unembed[here] += 2 * own if scenes else 0
    for p in load_pairs():
        if p.emotion_clean in EMOTIONS and p.emotion_corrupted in EMOTIONS:
            for a, b in zip(p.clean.split(), p.corrupted.split(), strict=True):
                if a != b:
                    embed[at[a]] += LOUD * name[EMOTIONS.index(p.emotion_clean)]
                    embed[at[b]] += LOUD * name[EMOTIONS.index(p.emotion_corrupted)]
    for k, e in enumerate(EMOTIONS):
        unembed[[at[x] for x in WORDS[e]]] += 2 * name[k]
        embed[[at[x] for x in WORDS[e]]] += LOUD * name[k]
    carried = torch.cat([u, w])
    with torch.no_grad():
        for p in hf_model.parameters():
            p.copy_(0.02 * noise(*p.shape) if p.ndim > 1 else torch.ones_like(p))
        hf_model.model.embed_tokens.weight.copy_(embed)
        hf_model.lm_head.weight.copy_(unembed)
        attention = hf_model.model.layers[0].self_attn
        attention.v_proj.weight.copy_(torch.eye(D))
        attention.o_proj.weight.copy_(4 * carried.T @ carried)
    with tempfile.TemporaryDirectory() as folder:
        hf_model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return em.load_model(folder)


def comments(seed: int, *, n: int = 15) -> dict[str, Labelled]:
    """Other people's texts with cues that no story has: labelled, and rated by the norms of their emotion."""
    rng, norms = np.random.default_rng(1000 + seed), load_norms()
    labels = [e for e in (*EMOTIONS, None) for _ in range(n)]
    texts = [tell(rng, e, NEW, n=12).replace(f" {NEW} ", " ") for e in labels]
    rated = [i for i, e in enumerate(labels) if e]
    v, a = (np.array([getattr(norms[labels[i] or ""], axis) + rng.normal() for i in rated]) for axis in ("valence", "arousal"))  # fmt: skip
    return {
        "goemotions_test.tsv": Labelled(texts, [{e} if e else set() for e in labels]),
        "emobank.csv": Labelled([texts[i] for i in rated], [set() for _ in rated], v, a),
    }


def planted(world: World, seed: int = 0) -> Inputs:
    """What a study gives to its experiments in this world, the layer chosen as a study chooses it."""
    model = planted_model(seed, used=world != "unused", scenes=world == "scenes")
    emotions = planted_set(seed, shuffled=world == "shuffled")
    acts = em.collect_resid_post(model, emotions, progress=False)
    s = Stories(emotions, acts, seed)
    accuracy = refit.choose_layer(
        s.main.rows, s.labels, s.topics, s.folds, s.neutral_components(())
    )
    layer = acts.layers[int(accuracy.argmax())]
    v = replace(em.mean_difference(acts), layer=layer)
    return Inputs(model, s, v, layer, False, comments(seed))


def planted_geometry(effect: bool, seed: int = 0, *, d_model: int = 16) -> Inputs:
    """36 words of the norms in four topics, whose direction has their valence and arousal in it, or those of another word; no model."""
    rng, norms = np.random.default_rng(seed), load_norms()
    names = [e for e in sorted(norms) if e not in load_norms("russell_mehrabian_1977")][
        :36
    ]  # one table, for speed
    rated = np.array([[norms[e].valence, norms[e].arousal] for e in names])
    rated = (rated - rated.mean(0)) / rated.std(0)
    if not effect:
        rated = rng.permutation(rated)
    axes = np.linalg.qr(rng.normal(size=(d_model, d_model)))[0][:2]
    own = 2 * rated * [1.5, 1.0] @ axes + rng.normal(size=(len(names), d_model))
    topics = tuple(Topic(name=t, person=p) for t, p in list(TOPICS.items())[:4])
    told = {e: tuple(Story(id=f"{i}-{t.name}", topic=t.name, person=t.person, text=tell(rng, None, t.name)) for t in topics) for i, e in enumerate(names)}  # type: ignore[arg-type]  # fmt: skip
    emotions = EmotionSet(
        name="words", language="en", topics=topics, stories=told, neutral=(),
        emotions=tuple(Emotion(name=e, norm_key=e, family="ab"[i % 2]) for i, e in enumerate(names)),
    )  # fmt: skip
    texts = tuple(
        TextInfo(s.id, e, s.topic, s.person, "main", s.id[:16], 100) for e, s in emotions.texts()
    )
    base = np.repeat(own, len(topics), 0)
    rows = np.stack([base + rng.normal(size=base.shape) for _ in range(2)], 1)
    n = len(texts)
    acts = Activations(
        hook_point="resid_post", layers=(0, 1), rows=torch.from_numpy(rows).float(), embed=torch.from_numpy(rng.normal(size=base.shape)).float(),
        row_text=torch.arange(n), row_position=torch.full((n,), -1), texts=texts, norm_histogram=torch.ones(2, NORM_BINS, dtype=torch.int64),
        sinks=torch.ones(n, 2), info={"model": {"n_layers": 2, "fingerprint": "f", "process_weights": {}}},
    )  # fmt: skip
    v = replace(em.mean_difference(acts, remove_neutral=None), layer=1)
    return Inputs(NO_MODEL, Stories(emotions, acts, seed), v, 1)


@contextmanager
def fewer_draws(resamples: int = 100, permutations: int = 99) -> Iterator[None]:
    """Bootstraps and Mantel tests of at most so many draws: intervals a little rougher, runs several times faster; nothing else changes."""
    most = {(stats, "bootstrap"): resamples, (stats, "bootstrap_each"): resamples, (stats, "bootstrap_two_way"): resamples,
            (geometry, "rsa"): permutations, (geometry, "procrustes"): permutations, (geometry, "family_agreement"): permutations}  # fmt: skip
    before = {(module, name): getattr(module, name) for module, name in most}

    def capped(run: Any, limit: int) -> Any:
        parameters = inspect.signature(run).parameters
        n = next(p for p in ("n", "n_permutations") if p in parameters)
        return lambda *args, **options: run(
            *args, **(options | {n: min(options.get(n, parameters[n].default), limit)})
        )

    for (module, name), run in before.items():
        setattr(module, name, capped(run, most[module, name]))
    try:
        yield
    finally:
        for (module, name), run in before.items():
            setattr(module, name, run)


def run_all(inputs: Inputs, *, causal_only: bool = False) -> list[Row]:
    """The rows of every experiment that a model is needed for, as a study runs them."""
    reading = [] if causal_only else [separability, person, transfer]
    rows = [r for experiment in (*reading, lens) for r in experiment.run(inputs).rows]
    steered = validation.run(inputs)
    after = causal.run(replace(inputs, earlier={"validation": steered}))
    return [*rows, *steered.rows, *after.rows]


def verdicts_of(rows: Sequence[Row], inputs: Inputs) -> dict[str, Answer]:
    """Claim to answer, by the report's own rules."""
    return {a.name: a for a in answers(rows, inputs.stories.emotions)}
