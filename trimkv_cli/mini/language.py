"""Sentences and conversations of the synthetic language: facts and their values, filler, questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Literal

from trimkv_cli.mini import words

_OPENING = tuple(word for word in words.COMMON if word != "you")  # as the openers of unseen phrasings have
STRANGE = 0.08  # of the sentences that matter to nobody hold a number or a strange word


@dataclass(frozen=True, slots=True, kw_only=True)
class Telling:
    """How facts are told: which shares of the sentences have a form that is harder to remember."""

    value_first: float = 0.0  # have the value before its thing
    openers: float = 0.0  # begin with other words: "You see, …"
    loose_openers: float = 0.0  # of these, with any words


PLAIN = Telling()


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """A thing and its value."""

    relation: words.Relation
    thing: str
    value: str

    @property
    def answer(self) -> str:
        """The one answer to every question about the fact."""
        return self.relation.answer.format(t=self.thing, v=self.value)

    def tell(self, rng: Random, *, unseen: bool = False, telling: Telling = PLAIN) -> str:
        """Say the fact in one sentence."""
        phrases = self.relation.unseen_statements if unseen else self.relation.statements
        if telling.value_first and rng.random() < telling.value_first:
            phrases = self.relation.value_first
        said = rng.choice(phrases).format(t=self.thing, v=self.value)
        if telling.openers and rng.random() < telling.openers:
            same = said.startswith((self.value, "I "))
            listed = not telling.loose_openers or rng.random() < 1 - telling.loose_openers
            opener = rng.choice(words.OPENERS) if listed else _loose_opener(rng)
            said = f"{opener} {said if same else said[0].lower() + said[1:]}"
        return said

    def ask(self, rng: Random, *, unseen: bool = False) -> str:
        """Ask for the fact in one sentence."""
        phrases = self.relation.unseen_questions if unseen else self.relation.questions
        return rng.choice(phrases).format(t=self.thing, v="")


def draw_facts(rng: Random, count: int, *, numbers: float = 1.0, alike: bool = False) -> list[Fact]:
    """Draw facts about different things; one thing in ten is a word that nobody knows.

    Numbers come `numbers` times as often as their share of all things. If they are `alike`, all facts are of one
    kind, so that only their things tell which value is whose.
    """
    facts: dict[str, Fact] = {}
    weights = [len(one.things) * (numbers if one.value == "number" else 1.0) for one in words.RELATIONS]
    only = None
    if alike:
        many = [weight if len(one.things) > 1 else 0 for one, weight in zip(words.RELATIONS, weights, strict=True)]
        only = rng.choices(words.RELATIONS, weights=many)[0]
    while len(facts) < count:
        relation = only or rng.choices(words.RELATIONS, weights=weights)[0]
        thing = rng.choice(relation.things)
        if len(relation.things) > 1 and rng.random() < 0.1:
            thing = draw_word(rng)
        facts.setdefault(thing, Fact(relation=relation, thing=thing, value=draw_value(rng, relation.value)))
    return list(facts.values())


def draw_value(rng: Random, kind: words.ValueKind) -> str:
    """Draw a value that nothing but the conversation can tell."""
    match kind:
        case "name" | "place":
            return draw_word(rng).capitalize()
        case "code":
            return "".join(rng.choice("0123456789") for _ in range(rng.choice((3, 4, 4))))
        case "number":
            return str(rng.randint(2, 999))
        case "date":
            return f"{rng.randint(1, 28)} {rng.choice(words.MONTHS)}"


def draw_word(rng: Random) -> str:
    """Draw two or three syllables."""
    syllables = (draw_syllable(rng) for _ in range(rng.choice((2, 2, 3))))
    return "".join(syllables) + rng.choice(("", "", "n", "r", "s"))


def draw_syllable(rng: Random) -> str:
    """Draw a consonant and a vowel."""
    return rng.choice(words.CONSONANTS) + rng.choice(words.VOWELS)


def draw_words(rng: Random, count: int) -> list[str]:
    """Draw different words."""
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        drawn[draw_word(rng)] = None
    return list(drawn)


def filler(rng: Random, sentences: int, *, strange: float = STRANGE) -> str:
    """Write sentences that matter to nobody."""
    return " ".join(filler_sentence(rng, strange=strange) for _ in range(sentences))


def filler_sentence(rng: Random, *, strange: float = STRANGE) -> str:
    """Write one sentence that matters to nobody; the share `strange` holds a number or a strange word."""
    draw = rng.random()
    if draw < 0.3:
        return rng.choice(words.OPINIONS)
    subject, verb, thing = rng.choice(words.SUBJECTS), rng.choice(words.VERBS), rng.choice(words.OBJECTS)
    if draw < 0.3 + strange / 2:
        thing = f"{rng.randint(2, 99)} {rng.choice(('birds', 'ships', 'clouds', 'trees'))}"
    elif draw < 0.3 + strange:
        thing = f"the {draw_word(rng)}"
    sentence = f"{subject} {verb} {thing}{rng.choice(words.TAILS)}."
    return sentence[0].upper() + sentence[1:]


def _loose_opener(rng: Random) -> str:
    """Write one to three common words, and a comma after half of them."""
    return " ".join(rng.sample(_OPENING, k=rng.randint(1, 3))).capitalize() + rng.choice(("", ","))


def careless(rng: Random, text: str) -> str:
    """Type some texts as people do: without capitals at the start, without a mark at the end."""
    if rng.random() < 0.15:
        text = text[0].lower() + text[1:]
    if rng.random() < 0.1:
        text = text.rstrip(".?!")
    return text


Role = Literal["system", "user", "assistant"]
TOKENS_PER_WORD = 1.55  # of the mini tokenizer, template included; tests hold it to ±20 %


@dataclass(frozen=True, slots=True, kw_only=True)
class Utterance:
    """One message; `scored` marks an assistant's answer that only one text can be."""

    role: Role
    content: str
    scored: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question of a conversation: ask with `messages[:turn]`, expect `answer`."""

    turn: int
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialogue:
    """Messages with all answers in them."""

    messages: tuple[Utterance, ...]

    @property
    def questions(self) -> tuple[Question, ...]:
        """The questions in the order in which they are asked."""
        return tuple(
            Question(turn=turn, answer=message.content) for turn, message in enumerate(self.messages) if message.scored
        )


@dataclass(slots=True)
class Talk:
    """A conversation while it is written: its messages, and the facts told so far.

    `fresh` is the share of questions that go to facts not asked for yet, as long as there are any; `strange`
    the share of filler that holds a number or a strange word.
    """

    rng: Random
    unseen: bool = False
    messages: list[Utterance] = field(default_factory=list)
    facts: list[Fact] = field(default_factory=list)
    told: int = 0
    fresh: float = 0.0
    telling: Telling = PLAIN
    strange: float = STRANGE
    asked: set[str] = field(default_factory=set)

    @property
    def words(self) -> int:
        """The words written so far."""
        return sum(len(message.content.split()) + 2 for message in self.messages)

    def turn(self, user: str, assistant: str, *, scored: bool = False) -> None:
        """Add a message and its answer."""
        self.messages.append(Utterance(role="user", content=user))
        self.messages.append(Utterance(role="assistant", content=assistant, scored=scored))

    def tell(self) -> None:
        """Let the user tell the next one or two facts, sometimes among other things."""
        some = self.facts[self.told : self.told + (2 if self.rng.random() < 0.2 else 1)]
        self.told += len(some)
        sentences = [fact.tell(self.rng, unseen=self.unseen, telling=self.telling) for fact in some]
        if self.rng.random() < 0.3:
            sentences.insert(self.rng.randrange(len(sentences) + 1), filler_sentence(self.rng, strange=self.strange))
        self.turn(careless(self.rng, " ".join(sentences)), self.rng.choice(words.ACKNOWLEDGEMENTS))

    def ask(self, fact: Fact | None = None) -> None:
        """Let the user ask for a fact that was told."""
        fact = fact or self._pick()
        self.asked.add(fact.thing)
        question = careless(self.rng, fact.ask(self.rng, unseen=self.unseen))
        if self.rng.random() < 0.1:
            question = f"{filler_sentence(self.rng, strange=self.strange)} {question}"
        self.turn(question, fact.answer, scored=True)

    def _pick(self) -> Fact:
        told = self.facts[: self.told]
        if self.fresh and self.rng.random() < self.fresh:
            told = [fact for fact in told if fact.thing not in self.asked] or told
        return self.rng.choice(told)

    def chat(self) -> None:
        """Let both talk about other things."""
        said = filler(self.rng, self.rng.choice((1, 1, 2, 3)), strange=self.strange)
        self.turn(careless(self.rng, said), self.rng.choice(words.REPLIES))

    def done(self) -> Dialogue:
        """Close the conversation."""
        return Dialogue(messages=tuple(self.messages))


def make_recall(
    rng: Random,
    *,
    facts: int = 6,
    length: int = 500,
    questions: int | None = None,
    unseen: bool = False,
    telling: Telling = PLAIN,
) -> Dialogue:
    """Tell `facts` facts within the first half of about `length` words, chat on, and ask for them at the end.

    Every fact is asked for once, or `questions` of them. About `TOKENS_PER_WORD` tokens make a word.
    """
    talk = Talk(rng, unseen=unseen, facts=draw_facts(rng, facts), telling=telling)
    asked = rng.sample(talk.facts, k=facts if questions is None else min(questions, facts))
    closing = 7 * len(asked)
    while talk.told < facts:
        for _ in range(rng.randrange(3)):
            if talk.words < length * talk.told / (2 * facts):
                talk.chat()
        talk.tell()
    while talk.words < length - closing:
        talk.chat()
    for fact in asked:
        talk.ask(fact)
    return talk.done()


def make_multi_turn(rng: Random, *, facts: int = 6, length: int = 500, unseen: bool = False) -> Dialogue:
    """Tell, ask and chat in any order until `length` words are written; facts are asked for more than once."""
    talk = Talk(rng, unseen=unseen, facts=draw_facts(rng, facts))
    talk_on(talk, length)
    return talk.done()


def talk_on(talk: Talk, length: int) -> None:
    """Go on telling, asking and chatting until `length` words are written."""
    ask_share = talk.rng.uniform(0.4, 0.9)
    while talk.words < length:
        if talk.told < len(talk.facts) and (talk.told == 0 or talk.rng.random() < 0.3):
            talk.tell()
        elif talk.told and talk.rng.random() < ask_share:
            talk.ask()
        else:
            talk.chat()


def make_steps(rng: Random, *, rows: int = 8, unseen: bool = False) -> Dialogue:
    """Write arrows between `rows` words and follow them to the end, one step per line."""
    keys = draw_words(rng, rows)
    leads: dict[str, str] = {}
    rest = list(keys)
    while rest:
        size = rng.randint(2, 5)
        chain, rest = rest[:size], rest[size:]
        leads |= dict(zip(chain, [*chain[1:], "end"], strict=True))
    lines = [f"{here} -> {there}" for here, there in leads.items()]
    rng.shuffle(lines)
    requests = words.UNSEEN_STEPS_REQUESTS if unseen else words.STEPS_REQUESTS
    turns = []
    for start in rng.sample(list(leads), k=min(len(leads), 2)):
        steps, here = [], start
        while here != "end":
            steps.append(f"{here} -> {leads[here]}")
            here = leads[here]
        turns.append((rng.choice(requests).format(k=start), "\n".join(steps)))
    return open_with(rng, "\n".join([rng.choice(words.STEPS_TITLES), *lines]), turns)


def open_with(rng: Random, text: str, turns: Sequence[tuple[str, str]]) -> Dialogue:
    """Put a text into the first question, before or after it."""
    talk = Talk(rng)
    (question, answer), *more = turns
    talk.turn(f"{question}\n\n{text}" if rng.random() < 0.2 else f"{text}\n\n{question}", answer, scored=True)
    for question, answer in more:
        talk.turn(question, answer, scored=True)
    return talk.done()
