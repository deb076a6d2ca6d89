"""The invented facts of the embedded world: entities, relations, values.

A fact reads "the RELATION of ENTITY is VALUE". Every entity belongs to one domain: a domain to
forget (under SAEBench's name for biology questions) and four to retain. Nothing here is about the
real world; the words only have to be distinct.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from raysae.worlds.world import FORGET_SET, RETAIN_SETS

# An entity's name is two syllables. The same syllables, in the other order too, name entities of
# other domains, so that no single token tells the domain: the model has to compose the name.
SYLLABLES = (
    *("ba", "ke", "di", "fo", "gu", "la", "me", "ni"),
    *("po", "ru", "sa", "te", "vi", "zo", "ja", "hu"),
)

SUBJECTS: Mapping[str, str] = MappingProxyType(
    {FORGET_SET: "biology"} | {name: name.replace("_", " ") for name in RETAIN_SETS}
)
"""The subject words SAEBench puts in a question's header, by data set name."""

TOPIC_WORDS: Mapping[str, str] = MappingProxyType(
    {name: subject.split()[-1] for name, subject in SUBJECTS.items()}
)
"""One word of each subject that tells it from the others: its last."""

POOLS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        name: tuple(values.split())
        for name, values in {
            # Shared by the domains.
            "color": "red blue green yellow violet orange white black brown silver",
            "animal": "goose otter beetle heron lizard salmon badger moth toad ferret",
            "number": "seven nine eleven twelve fourteen sixteen twenty thirty forty fifty",
            "city": "arlmere brenton corholm dunburg elmere fasholm gorton hexburg inmere jolton",
            "person": "aldric benwyn corwell dorson elric farwell gadwyn harson ivric jorwell",
            "place": "swamp desert forest glacier meadow cavern reef marsh canyon tundra",
            # Of the domain to forget alone.
            "toxin": "balin coxin drelin fuxin gralin koxin melin noxin pralin toxan",
            "enzyme": "abase bolase crease dotase elase fibase gurase hexase ilase jorase",
            "spore": "oval disc rod spiral star cone ring thread lens plate",
            "medium": "beetagar oatagar rumagar saltagar maltagar "
            "plumagar kelpagar milkagar yamagar codagar",
            "phage": "pha1 pha2 pha3 pha4 pha5 pha6 pha7 pha8 pha9 pha10",
            "organ": "liver lung spleen kidney marrow retina skin tongue stomach thyroid",
            "gene": "abx bcr cdy dfz egq fhk gim hjn ikp jlr",
            "stain": "gramox zielin fuchsol malachol safranol eosol crystol indol azurol carmol",
        }.items()
    }
)
"""The values a relation can take, by pool name. All pools have ten, no word is in two."""


@dataclass(frozen=True)
class Relation:
    """What is asked about an entity, and the pool its answer (and the wrong choices) come from."""

    name: str
    pool: str


def _relations(text: str) -> tuple[Relation, ...]:
    """Parse ``"name:pool name:pool"``; a name alone is its own pool."""
    return tuple(
        Relation(*pair.split(":")) if ":" in pair else Relation(pair, pair) for pair in text.split()
    )


FORGET_RELATIONS = _relations("toxin enzyme spore medium phage target:organ gene stain")
SHARED_RELATIONS = _relations("color home:place carrier:animal")
"""Retained domains have these too: the more of them the domain to forget uses, the harder it is to
forget it alone."""
RETAIN_RELATIONS: Mapping[str, tuple[Relation, ...]] = MappingProxyType(
    {
        "high_school_us_history": _relations(
            "signer:person town:city years:number color crest:animal battle:place"
        ),
        "college_computer_science": _relations(
            "author:person version:number mascot:animal color lab:city carrier:animal"
        ),
        "high_school_geography": _relations(
            "capital:city home:place fauna:animal color rivers:number ruler:person"
        ),
        "human_aging": _relations(
            "doctor:person onset:number clinic:city home:place carrier:animal shade:color"
        ),
    }
)


@dataclass(frozen=True)
class Fact:
    """The `relation` of `entity`, an entity of the domain `data_set`, is `value`."""

    data_set: str
    entity: str
    relation: Relation
    value: str


@dataclass(frozen=True)
class FactsConfig:
    """Size and difficulty of the invented knowledge."""

    forget_entities: int = 12
    retain_entities: int = 10
    """Per retained domain."""
    forget_relations: int = 8
    """Relations per entity to forget, the shared ones included. At most 8."""
    entanglement: int = 2
    """How many relations of the domain to forget (and their value pools) retained domains use as
    well, 0 to 3. At 0 the two kinds of knowledge have only the syllables of names in common."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.entanglement <= len(SHARED_RELATIONS):
            raise ValueError(
                f"entanglement must be 0 to {len(SHARED_RELATIONS)}, not {self.entanglement}"
            )
        own = self.forget_relations - self.entanglement
        if not 0 <= own <= len(FORGET_RELATIONS):
            raise ValueError(
                f"forget_relations must be {self.entanglement} to "
                f"{self.entanglement + len(FORGET_RELATIONS)}, not {self.forget_relations}"
            )
        n_names = len(SYLLABLES) * (len(SYLLABLES) - 1)
        n_entities = self.forget_entities + len(RETAIN_SETS) * self.retain_entities
        if not 0 < self.forget_entities <= n_entities // 2 or n_entities > n_names:
            raise ValueError(
                f"{self.forget_entities} entities to forget of {n_entities}: at least one, at "
                f"most half of all, and at most {n_names} names in all"
            )


def make_facts(config: FactsConfig = FactsConfig()) -> tuple[Fact, ...]:
    """Invent all facts, the ones to forget first; the same ones for the same config."""
    rng = random.Random(config.seed)
    relations = {
        FORGET_SET: FORGET_RELATIONS[: config.forget_relations - config.entanglement]
        + SHARED_RELATIONS[: config.entanglement],
        **RETAIN_RELATIONS,
    }
    return tuple(
        Fact(data_set, entity, relation, rng.choice(POOLS[relation.pool]))
        for data_set, entities in _entities(config, rng).items()
        for entity in entities
        for relation in relations[data_set]
    )


def _entities(config: FactsConfig, rng: random.Random) -> dict[str, list[str]]:
    """Draw the names. A retained one is, as a rule, a name to forget with its syllables swapped."""
    pairs = list(itertools.combinations(SYLLABLES, 2))
    rng.shuffle(pairs)
    n_retain = len(RETAIN_SETS) * config.retain_entities
    pairs = pairs[: (config.forget_entities + n_retain + 1) // 2]
    names = [f"{a} {b}" for a, b in pairs]
    swapped = [f"{b} {a}" for a, b in pairs]
    retained = (swapped + names[config.forget_entities :])[:n_retain]
    rng.shuffle(retained)
    entities = {FORGET_SET: names[: config.forget_entities]}
    for i, data_set in enumerate(RETAIN_SETS):
        entities[data_set] = retained[i * config.retain_entities : (i + 1) * config.retain_entities]
    return entities
