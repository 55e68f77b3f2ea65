"""What the directions of each set write: the feeling, or the scenes of its stories?

    python benchmarks/writes.py --sets core,core2,everyday [--model smollm2-135m-instruct-q4] [--rows FOLDER] [--markdown FILE]

The directions of six tones are added at every block of a band (the middle third, which no result has chosen), at doses shared over the band,
after three openings in which nothing is felt; beside them two random directions at the same dose. Text is greedy. What was written is read
without hooks by the directions of *another* set, so that a set does not read its own scenes: mean z of the tone over openings and tones, minus
the same of the random directions' text, with a 95 % interval over tones; and the perplexity of what was written, in units of the text without a hook.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

import emolens as em
from emolens import stats

TONES = ("joy", "sadness", "anger", "fear", "disgust", "serenity")
# the paper's words have other names
WORDS = dict(zip(TONES, ("joyful", "sad", "angry", "afraid", "disgusted", "serene"), strict=True))
OPENINGS = (
    "On Tuesday morning I",
    "My neighbour came by this afternoon and",
    "There is one thing I want to tell you about the week:",
)
N_NEW, N_RANDOM = 40, 2


def directions(model: Any, name: str, folder: Path) -> em.EmotionDirections:
    acts = em.collect_to(folder / name, model, em.load_emotion_set(name), progress=False).load()
    return em.mean_difference(acts)


def perplexity(model: Any, opening: str, text: str) -> float:
    """Of what was written after the opening, by the model without hooks."""
    ids = model.tokenizer(opening + text, add_special_tokens=False).input_ids
    n = len(model.tokenizer(opening, add_special_tokens=False).input_ids)
    if len(ids) <= n:
        return math.nan
    with torch.no_grad():
        logits = model(torch.tensor([ids]), return_type="logits")[0].float()
    gold = torch.tensor(ids[n:])
    return float(torch.nn.functional.cross_entropy(logits[n - 1 : -1], gold).exp())


def written(model: Any, v: em.EmotionDirections, dose: float, band: list[int]) -> list[str]:
    hooks = em.steer_resid_post(v, layer=band, dose=dose / math.sqrt(len(band)))
    return list(em.generate(model, list(OPENINGS), hooks, max_new_tokens=N_NEW).texts)


def main() -> None:
    parser = argparse.ArgumentParser(description="What do the directions of each set write?")
    parser.add_argument("--sets", default="core,core2,everyday,emotions171,emotions171v2")
    parser.add_argument("--model", default="smollm2-135m-instruct-q4")
    parser.add_argument("--rows", type=Path, default=Path("editions"), help="pooled rows, kept")
    parser.add_argument("--doses", default="0.2,0.4", help="of the whole band, in median norms")
    parser.add_argument("--markdown", type=Path, help="write all texts there")
    args = parser.parse_args()
    model = em.load_model(args.model)
    n = model.cfg.n_layers
    band = list(range(n // 3, 2 * n // 3))
    names = args.sets.split(",")
    made = {name: directions(model, name, args.rows) for name in names}
    plain = list(em.generate(model, list(OPENINGS), max_new_tokens=N_NEW).texts)
    base = [perplexity(model, o, t) for o, t in zip(OPENINGS, plain, strict=True)]
    page = [f"# What directions write: {args.model}, blocks {band[0]} to {band[-1]}\n"]
    page += [f"- no hook: {o} *{t.strip()}*" for o, t in zip(OPENINGS, plain, strict=True)]
    print(f"{'set':<16}{'dose':<7}{'read by':<16}{'tone minus random, z':<26}{'perplexity x':<14}{'of random'}")  # fmt: skip
    for name, v in made.items():
        reader_name = next(other for other in ("core2", "everyday", "core") if other != name and other in made)  # fmt: skip
        reader = made[reader_name]
        random = em.random_directions(v, N_RANDOM, seed=0)
        for dose in map(float, args.doses.split(",")):
            page.append(f"\n## {name}, dose {dose:g}\n")
            texts: dict[str, list[str]] = {}
            for tone in TONES:
                word = tone if tone in v else WORDS[tone]
                texts[tone] = written(model, v[word], dose, band)
            for one in random:
                texts[one] = written(model, random[one], dose, band)
            for what, some in texts.items():
                page += [f"- {what}: {o} *{' '.join(t.split())}*" for o, t in zip(OPENINGS, some, strict=True)]  # fmt: skip
            every = [t if t.strip() else "." for some in texts.values() for t in some]
            z = em.score(model, reader, every).values.reshape(len(texts), len(OPENINGS), -1)
            gained = []
            for i, tone in enumerate(TONES):
                column = reader.index(tone if tone in reader else WORDS[tone])
                gained.append(float(z[i, :, column].mean() - z[len(TONES) :, :, column].mean()))
            e = stats.bootstrap_mean(np.array(gained), list(TONES))
            worse = {
                kind: float(np.nanmedian([
                    perplexity(model, o, t) / b
                    for key in keys for o, t, b in zip(OPENINGS, texts[key], base, strict=True)
                ]))
                for kind, keys in (("tones", TONES), ("random", tuple(random)))
            }  # fmt: skip
            print(f"{name:<16}{dose:<7g}{reader_name:<16}{f'{e.value:+.2f} [{e.low:+.2f}, {e.high:+.2f}]':<26}{worse['tones']:<14.2f}{worse['random']:.2f}", flush=True)  # fmt: skip
    if args.markdown:
        args.markdown.write_text("\n".join(page) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
