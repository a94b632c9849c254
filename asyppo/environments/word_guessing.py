"""Guessing a word of a few, by what is said of the letters of each guess."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any

WORDS = [
    "bake",
    "bale",
    "bank",
    "bark",
    "barn",
    "base",
    "bath",
    "bead",
    "beak",
    "beam",
    "bear",
    "beat",
    "bell",
    "belt",
    "bend",
    "bent",
    "best",
    "bike",
    "bird",
    "bite",
    "boat",
    "bold",
    "bolt",
    "bond",
    "bone",
    "book",
    "boot",
    "bore",
    "born",
    "cake",
    "calm",
    "camp",
    "cane",
    "cape",
    "card",
    "care",
    "cart",
    "case",
    "cash",
    "cave",
    "coal",
    "coat",
    "coin",
    "cold",
    "cone",
    "cook",
    "cool",
    "cord",
    "core",
    "corn",
    "cost",
    "crab",
    "crow",
    "dale",
    "damp",
    "dark",
    "dart",
    "date",
    "dawn",
    "deal",
    "dear",
    "deep",
    "deer",
    "dirt",
    "dock",
    "door",
    "dove",
    "down",
    "dune",
    "dust",
    "east",
    "face",
    "fact",
    "fair",
    "fall",
    "farm",
    "fast",
    "fern",
    "fire",
    "fish",
    "five",
    "flag",
    "flat",
    "foam",
    "fold",
    "food",
    "fork",
    "fort",
    "four",
    "frog",
    "game",
    "gate",
    "gift",
    "goat",
    "gold",
    "gate",
    "hail",
    "hair",
    "half",
    "hall",
    "hand",
    "hare",
    "harp",
    "hawk",
    "head",
    "heat",
    "hill",
    "home",
    "hood",
    "hook",
    "horn",
    "hour",
    "iron",
    "kite",
    "lake",
]


class WordPuzzles:
    """Rows: ``candidates`` words, one of which is meant. All rows are of the same ``words`` words (None: of all there
    are): with few of them a small model can learn what each says of the others."""

    def __init__(self, size: int, seed: int, candidates: int = 8, words: int | None = None):
        self.words = sorted(set(WORDS))
        if words is not None:
            if not 2 <= words <= len(self.words):
                raise ValueError(f"words: got {words}, needs 2 to {len(self.words)}")
            self.words = sorted(Random("words").sample(self.words, words))
        if not 2 <= candidates <= len(self.words):
            raise ValueError(f"candidates: got {candidates}, needs 2 to {len(self.words)}")
        self.size, self.seed, self.candidates = size, seed, candidates

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = Random(f"word guessing {self.seed} {index}")
        words = rng.sample(self.words, self.candidates)
        secret = rng.choice(words)
        return {
            "question": f"one of {' '.join(words)}",
            "answer": secret,
            "metadata": {"source_dataset": "word_guessing", "words": words},
        }


def marks(guess: str, secret: str) -> str:
    """Return a letter for each of ``guess``: g where ``secret`` has it there, y where it has it elsewhere, each of its
    letters counted once, x where it does not."""
    left = [s for g, s in zip(guess, secret, strict=True) if g != s]
    found = []
    for g, s in zip(guess, secret, strict=True):
        if g == s:
            found.append("g")
        elif g in left:
            left.remove(g)
            found.append("y")
        else:
            found.append("x")
    return "".join(found)


class WordGuessing:
    """An action is a word, and is answered by ``marks``. The right one ends the episode, with reward 1.

    For rows of the task ``word_guessing``. ``noise`` is the probability that a mark is one of the three, whichever.
    """

    def __init__(self, noise: float = 0.0):
        if not 0 <= noise <= 1:
            raise ValueError(f"noise: got {noise}, needs a probability")
        self.noise = noise

    def reset(self, entry: Mapping[str, Any], seed: int) -> str:
        """Begin with the word of ``entry``; the prompt has those that it may be."""
        self.secret, self.rng = entry["answer"], Random(seed)
        self.words = list(entry["metadata"]["words"])
        self.possible = list(self.words)
        return ""

    def step(self, action: str) -> tuple[str, float, bool]:
        """Mark a guess."""
        guess = action.strip()
        if guess == self.secret:
            return "right", 1.0, True
        if len(guess) != len(self.secret):
            return "no word of that length", 0.0, False
        said = "".join(
            self.rng.choice("gyx") if self.rng.random() < self.noise else mark for mark in marks(guess, self.secret)
        )
        self.possible = [w for w in self.possible if w != guess and (self.noise > 0 or marks(guess, w) == said)]
        return said, 0.0, False


def guess_word(environment: WordGuessing, noise: float, guess: float, rng: Random) -> str:
    """Guess a word that what was said leaves possible, as it stands in the prompt, behind a space; with probability
    ``noise`` or ``guess`` any of the prompt's."""
    anything = rng.random() < noise or rng.random() < guess or not environment.possible
    return f" {rng.choice(environment.words if anything else environment.possible)}"
