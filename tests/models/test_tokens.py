"""From text to tokens and back: chats, words where they stand, ends, and the same on every path."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from toys import randomise, tiny_config, tiny_tokenizer

import emolens as em
from emolens.interventions.sweep import sweep
from emolens.models.adapters.gguf import read
from emolens.models.identity import model_info
from emolens.models.tokens import encode
from emolens.readout import first_tokens

TL4 = int(importlib.metadata.version("transformer-lens").split(".")[0]) >= 4
BACKENDS = ["bridge"] if TL4 else ["hooked", "bridge"]
USER = {"role": "user", "content": "Was the door open?"}
BEGUN = {"role": "assistant", "content": "It was, all"}
PROMPT = "The door was open"


def made(path: Path, tokenizer, *, family="llama", edit=None, **config) -> Path:
    """A directory with a tiny random model and this tokenizer."""
    from transformers import AutoModelForCausalLM

    hf_model = AutoModelForCausalLM.from_config(tiny_config(family, **config))
    randomise(hf_model)
    if edit is not None:
        edit(hf_model)
    hf_model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def vector(model, layer=0, size=1.0, **options):
    return em.steer_resid_post(
        torch.ones(model.cfg.d_model), layer=layer, dose=size, dose_unit="raw", **options
    )


# --- chats ------------------------------------------------------------------------------------------------------------


def test_a_last_turn_of_the_assistant_is_continued(tiny_model):
    """As transformers does with continue_final_message."""
    made = em.generate(tiny_model, [USER, BEGUN], max_new_tokens=2)
    ours = tiny_model.tokenizer.apply_chat_template(
        [USER, BEGUN], tokenize=False, continue_final_message=True
    )
    assert made.prompts == (ours,) == ("<s>[user] Was the door open?</s>[assistant] It was, all",)
    assert encode(tiny_model, [[USER, BEGUN]])[0].ids[-1] != tiny_model.tokenizer.eos_token_id


def test_a_turn_of_the_assistant_that_is_empty_is_one_that_begins(tiny_model):
    empty = [USER, {"role": "assistant", "content": ""}]
    assert encode(tiny_model, [empty]) == encode(tiny_model, [[USER]])


def test_one_chat_is_one_text_on_every_path(tiny_model, toy_set):
    """Rendered in one way everywhere, so that positions of a chat fit what is generated, checked and read."""
    chat = [USER, BEGUN]
    text = em.generate(tiny_model, chat, max_new_tokens=1).prompts[0]
    v = em.mean_difference(
        em.collect_resid_post(tiny_model, em.load_emotion_set(toy_set), progress=False)
    )
    acts = em.collect_resid_post(tiny_model, chat, progress=False, pooling=em.last_token())
    assert len(acts.texts) == 1
    assert (
        acts.texts[0].sha256
        == em.collect_resid_post(tiny_model, [chat], progress=False).texts[0].sha256
    )
    calibration = v.calibration
    assert calibration is not None
    known = replace(
        v, calibration=replace(calibration, band=torch.ones_like(calibration.band))
    )  # of a larger set
    assert em.score(tiny_model, known, chat).texts == (text,)
    at = em.positions(tiny_model, chat, "last")
    hooks = vector(tiny_model, positions=at)
    assert em.generate(tiny_model, chat, hooks, max_new_tokens=1).prompts == (text,)
    assert em.check(tiny_model, hooks, chat).marked.endswith("al[l]")
    assert em.check(tiny_model, hooks, chat).text == text
    words = {"glimmer": ["happy"], "gloamer": ["sorry"]}
    swept = sweep(
        tiny_model,
        chat,
        v[["glimmer"]],
        target_words=words,
        controls={},
        doses=[0.1],
        progress=False,
    )
    assert swept.prompts == (text,)
    other = [{"role": "user", "content": USER["content"].replace("?", "!")}, BEGUN]
    patched = em.patch_resid_pre(
        tiny_model, clean=chat, corrupted=other, metric=em.logit_diff(" open", " home")
    )
    assert len(patched.labels) == len(at.encoded[0].ids)
    assert em.attribute(tiny_model, v["glimmer"], chat).total.shape == ()
    assert em.prompt_baseline(
        tiny_model, chat, em.load_emotion_set(toy_set), names=["glimmer"]
    ).prompts == (text,)


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": "Was the "}, {"type": "text", "text": "door open?"}],
        ({"type": "text", "text": "Was the door open?"},),
        ["Was the door open?"],
    ],
)
def test_content_may_be_in_parts(tiny_model, content):
    assert encode(tiny_model, [[{"role": "user", "content": content}]]) == encode(
        tiny_model, [[USER]]
    )


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([[{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]], r"message 0 of chat 0 has a part of type 'image_url'; only text"),
        ([[USER, {"role": "user", "content": 3}]], r"content of message 1 of chat 0 is a string or a list of text parts, not 3"),
        ([[{"role": "user", "content": None}]], r"message 0 of chat 0 needs 'role' and 'content'"),
        ([[("user", "Hi")]], r"message 0 of chat 0 needs 'role' and 'content'.*found \('user', 'Hi'\)"),
        ([[]], r"chat 0 has no messages"),
        ([[{"role": "assistant", "content": ""}]], r"chat 0 has no words"),
        ([PROMPT, USER], r"entry 1 is a message beside texts or chats"),
        (USER, r"a single message; a chat is a list of them"),
    ],
)  # fmt: skip
def test_a_chat_that_is_none_is_refused_with_the_fix(tiny_model, texts, message):
    with pytest.raises(ValueError, match=message):
        em.generate(tiny_model, texts, max_new_tokens=1)


def test_what_is_no_text_is_refused(tiny_model):
    with pytest.raises(
        ValueError, match="text 1 is of type int: a text is a string, or a list of chat messages"
    ):
        em.generate(tiny_model, [PROMPT, 3], max_new_tokens=1)


STRICT = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate') }}"
    "{% endif %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
FORGETS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "chat", "message"),
    [
        (STRICT, [{"role": "system", "content": "Be kind."}, USER], r"refuses chat 0: System role not supported; .* at the beginning of the first turn of the user"),
        (STRICT, [USER, USER], r"refuses chat 0: Conversation roles must alternate; .* in alternation"),
        ("{{ messages[0]['content'].nothing() }}", [USER], r"refuses chat 0: .*nothing"),
        ("{% for m in messages %}", [USER], r"refuses chat 0: "),
        (FORGETS, [{"role": "system", "content": "Hi"}, {"role": "user", "content": "Hi, who are you?"}], r"leaves out message 0 of chat 0"),
        (FORGETS, [{"role": "system", "content": "Be kind."}, USER], r"leaves out message 0 of chat 0 \(role 'system'\)"),
        (FORGETS, [USER, {"role": "tool", "content": "42"}], r"leaves out message 1 of chat 0 \(role 'tool'\); it may not know the role 'tool'"),
        (FORGETS, [USER, BEGUN], r"refuses chat 0: "),
        (None, [USER], "no chat template; give plain text"),
    ],
)  # fmt: skip
def test_what_a_template_does_not_take_is_said_as_ours(
    tmp_path, tiny_model, monkeypatch, template, chat, message
):
    monkeypatch.setattr(tiny_model.tokenizer, "chat_template", template)
    for call in (
        lambda: em.generate(tiny_model, chat, max_new_tokens=1),
        lambda: em.collect_resid_post(tiny_model, chat, progress=False),
        lambda: em.positions(tiny_model, chat),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_tool_message_in_json_and_a_chat_of_a_system_message_alone_are_taken(
    tiny_model, monkeypatch
):
    assert encode(tiny_model, [[{"role": "system", "content": "Be kind."}]])[0].text.endswith(
        "[assistant] "
    )
    template = "{% for m in messages %}{% if m['role'] == 'tool' %}{{ m['content'] | tojson }}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    monkeypatch.setattr(tiny_model.tokenizer, "chat_template", template)
    assert encode(tiny_model, [[USER, {"role": "tool", "content": 'say "42" é'}]])[0].text.endswith(
        '"say \\"42\\" é"'
    )


def test_dates_in_templates_stand_still(tiny_model, monkeypatch):
    import transformers.utils.chat_template_utils as utils

    class Day(datetime.datetime):
        today_ = datetime.datetime(2026, 11, 30)

        @classmethod
        def now(cls, tz=None):
            return cls.today_

    monkeypatch.setattr(utils, "datetime", Day)
    dated = "\n{{ bos_token }}{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}|{{ strftime_now('%Y-%m-%d') }}{% endif %} {{ messages[0]['content'] }}"
    monkeypatch.setattr(tiny_model.tokenizer, "chat_template", dated)
    [before] = encode(tiny_model, [[USER]])
    monkeypatch.setattr(Day, "today_", datetime.datetime(2026, 12, 1))
    assert encode(tiny_model, [[USER]]) == [before]
    assert (
        before.text == "\n<s>26 Jul 2024|2024-07-26 Was the door open?"
    )  # the line break at its beginning stays


# --- special tokens ---------------------------------------------------------------------------------------------------


def test_a_text_that_begins_with_the_bos_is_not_given_another(tiny_model):
    [as_chat] = encode(tiny_model, [[USER]])
    assert encode(tiny_model, [as_chat.text]) == [as_chat]
    for prepend in (None, True, False):
        assert (
            encode(tiny_model, ["<s>The"], prepend_bos=prepend)[0].ids
            == encode(tiny_model, ["The"])[0].ids
        )


def test_what_a_tokenizer_puts_behind_a_text_is_left_off(tiny):
    plain, ends = (em.load_model(tiny("llama", tokenizer=kind)) for kind in ("bos", "eos"))
    assert ends.tokenizer(PROMPT).input_ids[-1] == ends.tokenizer.eos_token_id
    assert [e.ids for e in encode(ends, [PROMPT, ""])] == [
        e.ids for e in encode(plain, [PROMPT, ""])
    ]
    assert (
        encode(ends, ["The</s>"])[0].ids[-1] == ends.tokenizer.eos_token_id
    )  # written in the text, it stays
    a, b = (
        em.collect_resid_post(m, [PROMPT], pooling=em.last_token(), progress=False)
        for m in (plain, ends)
    )
    assert torch.equal(a.rows, b.rows)
    assert (
        em.generate(ends, PROMPT, max_new_tokens=4).tokens
        == em.generate(plain, PROMPT, max_new_tokens=4).tokens
    )


# --- words ------------------------------------------------------------------------------------------------------------

TARGETS = {"joy": ["happy"], "sadness": ["sad"], "anger": ["angry"]}


def test_the_tokens_of_a_word_are_those_in_a_sentence(tiny):
    """SentencePiece kept as tokenizer.json: ' happy' by itself is two tokens, of which the first is that of every word."""
    m = em.load_model(tiny("llama", tokenizer="sentencepiece"))
    t = m.tokenizer
    own = {
        e: t("I felt " + w, add_special_tokens=False).input_ids[2:] for e, [w] in TARGETS.items()
    }
    assert first_tokens(t, TARGETS) == {e: ids[:1] for e, ids in own.items()}
    a, b = em.logit_diff(" happy", " sad").ids(t)
    assert (a, b) == (own["joy"][:1], own["sadness"][:1])


def test_the_metric_of_a_patch_reads_the_words_that_follow(tiny):
    m = em.load_model(tiny("llama", tokenizer="sentencepiece"))
    metric = em.logit_diff(" happy", " sad")
    result = em.patch_resid_pre(m, clean="I felt", corrupted="I opened", metric=metric)
    ids = m.tokenizer("I felt", return_tensors="pt").input_ids
    happy, sad = (m.tokenizer("I felt" + w).input_ids[-1] for w in (" happy", " sad"))
    logits = m(ids, return_type="logits")[0, -1].detach()
    assert result.clean[0] == pytest.approx(float(logits[happy] - logits[sad]), abs=1e-4)  # float32


def test_a_sweep_scores_whole_words_where_they_follow_each_prompt(tiny, toy_set):
    """Prompts with and without a space at the end, and an opening bracket, side by side, against a pass for each word."""
    m = em.load_model(tiny("llama", tokenizer="sentencepiece"))
    v = em.mean_difference(em.collect_resid_post(m, em.load_emotion_set(toy_set), progress=False))
    words = {"glimmer": ["happy", "home"], "gloamer": ["sad"]}
    prompts = ["I felt", "I felt ", "I felt ("]
    hooks = em.steer_resid_post(v["glimmer"], layer=1, dose=0.5)
    s = sweep(
        m,
        prompts,
        v[["glimmer"]],
        layers=[1],
        doses=[0.5],
        target_words=words,
        controls={},
        progress=False,
    )

    def log_p(prompt: str, word: str, hooks) -> float:
        start = m.tokenizer(prompt).input_ids
        whole = m.tokenizer(prompt + word).input_ids
        if (
            whole[: len(start)] != start
        ):  # after a space that has been read the word stands without one
            whole = start + m.tokenizer("\n" + word).input_ids[len(m.tokenizer("\n").input_ids) :]
        with torch.no_grad(), m.hooks(fwd_hooks=hooks):
            log = m(torch.tensor([whole]), return_type="logits")[0].log_softmax(-1)
        return sum(float(log[i - 1, whole[i]]) for i in range(len(start), len(whole)))

    for j, (prompt, space) in enumerate(zip(prompts, (" ", "", ""), strict=True)):
        for k, ws in enumerate(words.values()):
            base = sum(log_p(prompt, space + w, []) for w in ws) / len(ws)
            moved = sum(log_p(prompt, space + w, hooks) for w in ws) / len(ws)
            assert float(s.baseline[j, k]) == pytest.approx(
                base, abs=1e-3
            )  # float32, up to ten tokens
            assert float(s.change[0, j, k]) == pytest.approx(moved - base, abs=1e-3)


@pytest.mark.parametrize("kind", ["bos", "sentencepiece"])
def test_words_of_scripts_without_spaces_have_none_before_them(kind):
    t = tiny_tokenizer(kind)
    for prompt in (None, "她感到"):
        assert [t.decode(_word(t, w, prompt)) for w in ("高兴", "难过")] == ["高兴", "难过"]
        assert _word(t, "高兴", prompt) != t(" 高兴", add_special_tokens=False).input_ids


def _word(tokenizer, word, prompt=None):
    from emolens.models.tokens import word_tokens

    return word_tokens(tokenizer, word, prompt)


@pytest.mark.parametrize(
    ("prompt", "word", "text"),
    [
        ("He felt", "happy", " happy"),
        ("He felt", " happy", " happy"),
        ("He felt ", "happy", "happy"),
        ("He felt ", " happy", "happy"),
        ("Mood:\n", "happy", "happy"),
        ("(", "happy", "happy"),
        ("She said “", "happy", "happy"),
        ("她感到", "高兴", "高兴"),
        ("她感到", "happy", "happy"),
        ("Her mood is", "高兴", "高兴"),
        ("彼女は、", "嬉しい", "嬉しい"),
        ("나는", "행복한", " 행복한"),
        ("", "happy", "happy"),
        ("He is happy", "!", "!"),
        ("He is happy", " .", "."),
        ("He is (very happy", ")", ")"),
        ("She said “yes", "”", "”"),
        ("She", "'s", "'s"),
        ("She", "’s", "’s"),
        ('She said "', "happy", "happy"),
        ("'", "happy", "happy"),
        ('("', "happy", "happy"),
        ("She said \"'", "happy", "happy"),
        ('She said "yes"', "happy", " happy"),
        ("the girls'", "happy", " happy"),
        ('She said "yes', '"', '"'),
        ("She said", '"', ' "'),
        ("She felt", '"happy"', ' "happy"'),
        ("It costs", ".5", " .5"),
        (None, "!", "!"),
        (None, "happy", " happy"),
        (None, "高兴", "高兴"),
    ],
)
def test_whether_a_word_has_a_space_before_it_is_said_by_script_and_prompt(prompt, word, text):
    from emolens.models.tokens import joined

    assert joined(word, prompt) == text


def test_tokens_are_shown_as_they_stand_in_the_text(tmp_path):
    """SentencePiece's decoder takes the space off a token by itself."""
    m = em.load_model(made(tmp_path, tiny_tokenizer("sentencepiece")))
    prompt = "I felt happy or sad"
    fired = em.check(m, [("blocks.0.hook_resid_post", lambda act, hook: act + 1)], prompt)
    assert "".join(fired.tokens[1:]) == prompt
    metric = em.logit_diff(" happy", " sad")
    sweep = em.patch_resid_pre(
        m, clean=prompt, corrupted=prompt.replace("happy", "angry"), metric=metric
    )
    assert "".join(label.partition(":")[2] for label in sweep.labels[1:]) == prompt


def test_words_with_another_first_token_after_another_prompt_are_no_one_metric():
    def by_letter(text, add_special_tokens):
        return SimpleNamespace(
            input_ids=[-1 if text[max(i - 1, 0)] == "(" else ord(c) for i, c in enumerate(text)]
        )

    metric = em.logit_diff("happy", "sad")
    assert metric.ids(by_letter, ["felt", "was"]) == ([ord("h")], [ord("s")])
    with pytest.raises(
        ValueError, match="'happy' begins with another token after one prompt than after another"
    ):
        metric.ids(by_letter, ["felt", "felt ("])


@pytest.mark.parametrize("kind", ["bos", "sentencepiece"])
def test_prompt_and_text_together_are_what_was_written(tmp_path, kind):
    """A model that says one word: SentencePiece's decoder takes the space off the first word of whatever it is given."""
    t = tiny_tokenizer(kind)
    says = t("I felt and", add_special_tokens=False).input_ids[-1]

    def always(hf):
        hf.lm_head.weight.data.zero_()
        hf.lm_head.weight.data[says] = 1.0
        hf.model.norm.weight.data.abs_()

    m = em.load_model(made(tmp_path, t, edit=always))
    ones = [
        (f"blocks.{m.cfg.n_layers - 1}.hook_resid_post", lambda act, hook: torch.ones_like(act))
    ]
    prompt = "I opened the door"
    out = em.generate(m, prompt, ones, max_new_tokens=2)
    assert out.tokens == ((says, says),)
    whole = t.decode([*t(prompt).input_ids, says, says], skip_special_tokens=True)
    assert (
        out.prompts[0] + out.texts[0]
        == whole
        == prompt + t.decode([*t("a", add_special_tokens=False).input_ids, says, says])[1:]
    )


# --- ends -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("said_in", ["generation_config", "config"])
def test_generation_ends_where_that_of_transformers_does(tmp_path, backend, said_in):
    from transformers import AutoModelForCausalLM, GenerationConfig

    t = tiny_tokenizer("chat")
    t.add_special_tokens({"additional_special_tokens": ["<|turn_end|>"]})
    end = t.convert_tokens_to_ids("<|turn_end|>")
    ids = t(PROMPT, return_tensors="pt").input_ids

    def ends_the_turn(hf):
        with torch.no_grad():
            h = hf.model(ids).last_hidden_state[0, -1]
            hf.lm_head.weight[end] = 5 * h / h.norm()
        if said_in == "generation_config":
            hf.generation_config = GenerationConfig(
                eos_token_id=[t.eos_token_id, end], pad_token_id=2
            )
        else:
            hf.config.eos_token_id = [t.eos_token_id, end]

    path = made(tmp_path, t, edit=ends_the_turn)
    if said_in == "config":
        (path / "generation_config.json").unlink()
    theirs = AutoModelForCausalLM.from_pretrained(path).generate(
        ids, max_new_tokens=12, do_sample=False, pad_token_id=2
    )
    m = em.load_model(path, backend=backend)
    assert theirs[0, ids.shape[1] :].tolist() == [end]
    assert em.generate(m, PROMPT, max_new_tokens=12).tokens == ((),)
    assert model_info(m).stop_tokens == {"</s>": t.eos_token_id, "<|turn_end|>": end}
    assert model_info(m).to_dict()["stop_tokens"]["<|turn_end|>"] == end


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("several", [True, False])
def test_generation_ends_at_the_strings_of_generation_config(tmp_path, backend, several):
    path = made(tmp_path, tiny_tokenizer("chat"))
    whole = em.generate(em.load_model(path, backend=backend), PROMPT, max_new_tokens=12).texts[0]
    start = next(i for i in range(3, len(whole)) if whole[i : i + 3] not in whole[: i + 2])
    stop = whole[start : start + 3]
    file = path / "generation_config.json"
    found = json.loads(file.read_text(encoding="utf-8")) | {
        "stop_strings": [stop, "never"] if several else stop
    }
    file.write_text(json.dumps(found), encoding="utf-8")
    m = em.load_model(path, backend=backend)
    assert em.generate(m, PROMPT, max_new_tokens=12).texts == (whole[:start],)
    assert model_info(m).to_dict()["stop_strings"] == [stop, "never"][: several + 1]


@pytest.mark.parametrize("given", [[""], [None], 3, [3]], ids=str)
def test_strings_of_generation_config_that_are_none_are_said_when_the_model_is_loaded(
    tmp_path, given
):
    """They ended in generate, as a stop that nobody had given, or in "not iterable"."""
    path = made(tmp_path, tiny_tokenizer("chat"))
    file = path / "generation_config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text(encoding="utf-8")) | {"stop_strings": given}),
        encoding="utf-8",
    )
    with pytest.raises(
        ValueError, match=r"generation_config: stop_strings .*; allowed: strings that are not empty"
    ):
        em.load_model(path)


def test_more_ends_may_be_given_as_tokens_and_as_strings(tiny_model):
    whole = em.generate(tiny_model, PROMPT, max_new_tokens=12)
    [ids], [text] = whole.tokens, whole.texts
    third = next(i for i in range(2, 12) if ids[i] not in ids[:i])
    by_token = em.generate(tiny_model, PROMPT, max_new_tokens=12, stop=ids[third])
    assert by_token.tokens == (ids[:third],)
    start = next(i for i in range(3, len(text)) if text[i : i + 3] not in text[: i + 2])
    for stop in (text[start : start + 3], ["never written", text[start : start + 3]]):
        by_string = em.generate(tiny_model, PROMPT, max_new_tokens=12, stop=stop)
        assert by_string.texts == (text[:start],)
        assert by_string.tokens[0] == ids[: len(by_string.tokens[0])]
        assert len(by_string.tokens[0]) < len(ids)
    assert em.generate(tiny_model, PROMPT, max_new_tokens=12, stop="</s>").tokens == whole.tokens
    for bad in ("", 320, -1, 1.5, [True]):
        with pytest.raises(ValueError, match=r"stop="):
            em.generate(tiny_model, PROMPT, stop=bad)


def test_a_sweep_ends_its_texts_there_too(tiny_model, toy_set):
    v = em.mean_difference(
        em.collect_resid_post(tiny_model, em.load_emotion_set(toy_set), progress=False)
    )
    words = {"glimmer": ["happy"], "gloamer": ["sorry"]}
    stop = em.generate(tiny_model, PROMPT, max_new_tokens=2).tokens[0][1]
    options = {
        "target_words": words,
        "controls": {},
        "doses": [0.0],
        "progress": False,
        "max_new_tokens": 6,
    }
    s = sweep(tiny_model, PROMPT, v[["glimmer"]], stop=[stop], **options)
    assert s.written is not None
    assert s.written.length.tolist() == [[1.0]]
    assert s.info["key"] != sweep(tiny_model, PROMPT, v[["glimmer"]], **options).info["key"]


def test_the_ends_of_a_gguf_file_are_read(tmp_path):
    gguf = pytest.importorskip("gguf", reason="the gguf package is an extra")
    w = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "llama")
    w.add_token_list(["a", "bc", "é"])
    w.add_token_scores([0.5, 1.5, 2.5])
    w.add_string("tokenizer.chat_template", "{{ x }}")
    w.add_array("x.nested", [[1, 2], [3]])
    w.add_head_count_kv(1)
    w.add_eos_token_id(1)
    w.add_bool("tokenizer.ggml.add_bos_token", True)
    w.add_eot_token_id(7)
    w.add_float32("x.y", 0.5)
    w.add_uint32("tokenizer.ggml.eom_token_id", 9)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.close()
    assert read(tmp_path / "x.gguf").stops == [1, 7, 9]


# --- finite -----------------------------------------------------------------------------------------------------------

OVERFLOW = r"resid_post of layer 1 is not finite in float16; half precision overflows here: load with dtype='float32'"


@pytest.fixture(scope="module", params=BACKENDS)
def overflowing(request, tmp_path_factory, toy_set):
    """A model that overflows in float16 in its second block, and directions of it from float32."""

    def large(hf):
        hf.model.layers[1].mlp.down_proj.weight.data.mul_(3e5)

    path = made(
        tmp_path_factory.mktemp("overflow"), tiny_tokenizer("bos"), family="qwen2", edit=large
    )
    exact = em.load_model(path, backend=request.param)
    v = em.mean_difference(
        em.collect_resid_post(exact, em.load_emotion_set(toy_set), progress=False)
    )
    m = em.load_model(path, backend=request.param, dtype="float16")
    assert v.calibration is not None
    known = {
        name: torch.ones_like(getattr(v.calibration, name)) for name in ("band", "token_band")
    }  # 16 neutral texts are too few
    v = replace(v, calibration=replace(v.calibration, **known))
    return path, request.param, m, replace(v, info=v.info | {"model": model_info(m).to_dict()})


def test_no_path_lets_a_number_pass_that_is_none(overflowing, toy_set):
    path, backend, m, v = overflowing
    neutral = ["The door was open when she came home."] * 4
    words = {"glimmer": ["happy"], "gloamer": ["sorry"]}
    pair = {"clean": "The door was open", "corrupted": "The dog was open"}
    metric = em.logit_diff(" home", " door")
    paths = {
        "generate": lambda: em.generate(m, PROMPT, max_new_tokens=2),
        "generate, sampled": lambda: em.generate(m, PROMPT, decoding=em.Decoding(2, 0.8)),
        "generate, uncached": lambda: em.generate(m, PROMPT, max_new_tokens=2, cache=False),
        "sweep": lambda: sweep(
            m, [PROMPT], v[["glimmer"]], layers=[0], target_words=words, controls={}
        ),
        "calibrate_dose": lambda: em.calibrate_dose(m, v["glimmer"], neutral, layer=0),
        "prompt_baseline": lambda: em.prompt_baseline(
            m, [PROMPT], em.load_emotion_set(toy_set), names=["glimmer"]
        ),
        "patching": lambda: em.patch_resid_pre(m, metric=metric, **pair),
        "patching, a metric": lambda: em.patch_z(m, metric=lambda logits: logits[:, 0], **pair),
        "attribution patching": lambda: em.attribution_patching(m, metric=metric, **pair),
        "attribute": lambda: em.attribute(m, v["glimmer"], PROMPT, layer=1),
        "check": lambda: em.check(m, vector(m), PROMPT),
        "collect": lambda: em.collect_resid_post(m, [PROMPT], progress=False),
        "score": lambda: em.score(m, v, PROMPT, layer=1),
        "verify": lambda: em.load_model(path, backend=backend, dtype="float16", verify=True),
    }
    said = {}
    for name, call in paths.items():
        try:
            said[name] = f"went on: {call()!r}"
        except FloatingPointError as error:
            said[name] = str(error)
    assert {name: text for name, text in said.items() if not re.search(OVERFLOW, text)} == {}


def test_a_dose_that_overflows_is_named_by_its_layer(tiny):
    m = em.load_model(tiny("qwen2"), dtype="float16")
    for hooks, layer in ((vector(m, 0, 1e6), 0), (vector(m, 2, 1e6), 2)):
        with pytest.raises(
            FloatingPointError, match=f"resid_post of layer {layer} is not finite in float16"
        ):
            em.check(m, hooks, PROMPT)
        with pytest.raises(
            FloatingPointError, match=f"resid_post of layer {layer} is not finite in float16"
        ):
            em.generate(m, PROMPT, hooks, max_new_tokens=3)
    later = [
        (
            "blocks.1.hook_resid_post",
            lambda act, hook: act * (1 if act.shape[1] > 1 else float("nan")),
        )
    ]
    with pytest.raises(FloatingPointError, match="not finite in float16"):  # at the second step
        em.generate(m, PROMPT, later, max_new_tokens=3)


def test_a_metric_that_makes_nan_is_named(tiny_model):
    with pytest.raises(
        FloatingPointError, match="the metric is NaN or infinite where the logits are not"
    ):
        em.patch_resid_pre(
            tiny_model,
            clean="The door",
            corrupted="The dog",
            metric=lambda x: x[:, 0] * float("nan"),
        )


def test_in_full_precision_the_fix_is_another(tiny_model):
    hooks = [("blocks.1.hook_resid_post", lambda act, hook: act * float("inf"))]
    with pytest.raises(
        FloatingPointError,
        match=r"not finite in float32, although .*: a weight is damaged, or a hook adds too much",
    ):
        em.generate(tiny_model, PROMPT, hooks, max_new_tokens=1)
