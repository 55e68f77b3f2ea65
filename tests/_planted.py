"""A model whose use of emotions is known: one word of a story carries its emotion along an axis, and words for feelings are read off axes.

The blocks of the model add little, so the stream is nearly the embedding. `reads` says along which axes the words for feelings are read:
those that the stories' marks lie on ("same": the directions of the stories are used), or others ("other": they can be read, and move
nothing).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from toys import randomise, tiny_config

import emolens as em
from emolens.experiments.base import Inputs, Stories
from emolens.sets.emotion_sets import Emotion, EmotionSet, Story, Topic
from emolens.sets.materials import Pair, load_stems

EMOTIONS = ("joy", "fear", "anger", "disgust")
WORDS = {e: f"feel{e}" for e in EMOTIONS}
MARKS = {e: f"mark{e}" for e in EMOTIONS}  # in stories
FACTS = {e: f"fact{e}" for e in EMOTIONS}  # at the end of prompts; read along the axes of `reads`
TOPICS = tuple(f"topic{i}" for i in range(12))
FILLERS = tuple(f"w{i}" for i in range(80))
OPENINGS = [
    w
    for part in load_stems().__dict__.values()
    for text in part
    for w in text.replace(".", " .").replace(",", " ,").split()
]
D_MODEL, SIZE = 48, 12.0


def planted_model(path: Path, *, reads: Literal["same", "other"]) -> Any:
    """Made and loaded; `path` is a folder to write it to."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    words = [*FILLERS, *TOPICS, *WORDS.values(), *MARKS.values(), *FACTS.values(), *OPENINGS]
    vocabulary = {w: i for i, w in enumerate(dict.fromkeys(["<unk>", "</s>", *words]))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")
    hf_model = AutoModelForCausalLM.from_config(
        tiny_config("llama", hidden_size=D_MODEL, vocab_size=len(vocabulary))
    )
    randomise(hf_model)
    generator = torch.Generator().manual_seed(3)
    axes = torch.linalg.qr(torch.randn(D_MODEL, 2 * len(EMOTIONS), generator=generator)).Q.T
    marks, others = axes[: len(EMOTIONS)], axes[len(EMOTIONS) :]
    read = marks if reads == "same" else others
    with torch.no_grad():
        for name, p in hf_model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                p.mul_(0.02)
        embed, head = (
            hf_model.get_input_embeddings().weight,
            hf_model.get_output_embeddings().weight,
        )
        embed.sub_(embed @ axes.T @ axes)  # nothing else lies along the axes
        head.mul_(0.05)
        for k, e in enumerate(EMOTIONS):
            embed[vocabulary[MARKS[e]]] += SIZE * marks[k]
            embed[vocabulary[FACTS[e]]] += SIZE * read[k]
            head[vocabulary[WORDS[e]]] += read[k]
    hf_model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return em.load_model(path)


def planted_set(*, marked: bool = True, seed: int = 0) -> EmotionSet:
    """Four emotions in twelve topics, and neutral texts; without marks the labels mean nothing."""
    rng = np.random.default_rng(seed)

    def tell(topic: str, mark: str) -> str:
        about = rng.choice(FILLERS, 26).tolist()
        return " ".join([*about[:14], topic, mark, *about[14:20], mark, *about[20:]])

    person = {t: "first" if i % 2 else "third" for i, t in enumerate(TOPICS)}
    told = {
        e: tuple(
            Story(
                id=f"{e}-{t}",
                topic=t,
                person=p,
                text=tell(t, MARKS[e] if marked else str(rng.choice(FILLERS))),
            )  # type: ignore[arg-type]
            for t, p in person.items()
        )
        for e in EMOTIONS
    }
    neutral = tuple(
        Story(id=f"plain{i}-{t}", topic=t, person=p, text=tell(t, str(rng.choice(FILLERS))))  # type: ignore[arg-type]
        for i in range(2)
        for t, p in person.items()
    )
    return EmotionSet(
        name="planted", language="en", source="made by the test suite", stories=told, neutral=neutral,
        emotions=tuple(Emotion(name=e, adjective=e, target_words=[WORDS[e]]) for e in EMOTIONS),
        topics=tuple(Topic(name=t, person=p) for t, p in person.items()),  # type: ignore[arg-type]
    )  # fmt: skip


def planted_pairs(n: int = 24, seed: int = 1) -> tuple[Pair, ...]:
    """Prompts that end with the fact that decides; the control changes another word."""
    rng, out = np.random.default_rng(seed), []
    for i in range(n):
        a, b = (EMOTIONS[k] for k in (i % 4, (i + 1 + i // 4 % 3) % 4))
        said, other = " ".join(rng.choice(FILLERS, 8)), " ".join(rng.choice(FILLERS, 8))
        out.append(
            Pair(
                id=f"pair{i}",
                clean=f"{said} {FACTS[a]}",
                corrupted=f"{said} {FACTS[b]}",
                control=f"{other} {FACTS[a]}",
                emotion_clean=a,
                emotion_corrupted=b,
            )
        )
    return tuple(out)


def planted_inputs(model: Any, emotions: EmotionSet, *, layer: int = 1, seed: int = 0) -> Inputs:
    """What a study would give an experiment: everything read, directions of all stories."""
    acts = em.collect_resid_post(model, emotions, progress=False)
    v = replace(em.mean_difference(acts), layer=layer)
    return Inputs(model, Stories(emotions, acts, seed), v, layer)
