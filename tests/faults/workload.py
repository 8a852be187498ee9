"""Jobs whose right results are known."""

import random
from dataclasses import dataclass, field

import numpy as np

from tests.faults.cluster import Cluster

_WORDS = (
    "fox",
    "barn",
    "snow",
    "river",
    "castle",
    "harbour",
    "light",
    "old",
    "red",
    "small",
    "under",
    "with",
    "a",
    "the",
)
_SPECIAL = ["", " ", "[IMG] a picture [IMG]", "雪の中の狐", "🦊 " * 40, "one word " * 600, "[/INST] [INST]", "\n\n"]
CHUNK_ROWS = 10


@dataclass(frozen=True)
class Row:
    """What an undisturbed run made of a prompt."""

    own_rows: np.ndarray  # (n, D)
    num_tokens: int
    truncated: bool


@dataclass
class Job:
    """A job, and what was asked."""

    id: str
    prompts: list[dict]
    options: dict
    num_chunks: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_chunks = -(-len(self.prompts) // self.options["chunk_rows"])


def known_prompts(rng: random.Random, count: int) -> list[str]:
    """Different prompts of many lengths, among them some that ask for trouble."""
    made = {" ".join(rng.choices(_WORDS, k=rng.randint(1, 16))): None for _ in range(4 * count)}
    return [*_SPECIAL, *made][:count]


def entries(rng: random.Random, known: list[str], count: int) -> list[dict]:
    return [{"id": f"{n}-{rng.randrange(10**6)}", "prompt": rng.choice(known)} for n in range(count)]


def random_options(rng: random.Random) -> dict:
    # The repeated prompts of a job that deduplicates are not encoded again, so it takes another path.
    return {
        "dtype": "float32",
        "chunk_rows": CHUNK_ROWS,
        "deduplicate": rng.random() < 0.5,
        "compression": rng.choice(["none", "zstd"]),
    }


def submit(cluster: Cluster, rng: random.Random, prompts: list[dict], **options) -> Job:
    chosen = random_options(rng) | options
    return Job(cluster.submit(prompts, chosen), prompts, chosen)
