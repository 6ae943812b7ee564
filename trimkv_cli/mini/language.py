"""The seeded generator of the synthetic language: conversations whose answers are known."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Literal

from trimkv_cli.mini import words
from trimkv_cli.mini.sentences import PLAIN, STRANGE, Fact, Telling, careless, draw_facts, filler, filler_sentence

Role = Literal["system", "user", "assistant"]
TOKENS_PER_WORD = 1.55  # of the mini tokenizer, template included; tests hold it to ±20 %


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
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
class Conversation:
    """Messages with all answers in them."""

    messages: tuple[Message, ...]

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
    messages: list[Message] = field(default_factory=list)
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
        self.messages.append(Message(role="user", content=user))
        self.messages.append(Message(role="assistant", content=assistant, scored=scored))

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

    def done(self) -> Conversation:
        """Close the conversation."""
        return Conversation(messages=tuple(self.messages))


def make_recall(
    rng: Random,
    *,
    facts: int = 6,
    length: int = 500,
    questions: int | None = None,
    unseen: bool = False,
    telling: Telling = PLAIN,
) -> Conversation:
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


def make_multi_turn(rng: Random, *, facts: int = 6, length: int = 500, unseen: bool = False) -> Conversation:
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
