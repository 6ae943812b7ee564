"""Facts that nobody can know, each told in one sentence and asked for in other words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

Kind = str


@dataclass(frozen=True, slots=True, kw_only=True)
class Topic:
    """Something that has one value: the sentences that tell it, with `{v}`, and the questions for it."""

    kind: Kind
    told: tuple[str, ...]
    asked: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """A topic with its value, told and asked in one wording each; `also` are other ways to write the value."""

    kind: Kind
    value: str
    also: tuple[str, ...]
    told: str
    asked: str


def draw_facts(rng: Random, count: int) -> list[Fact]:
    """Draw facts whose topics and values all differ."""
    assert count <= len(TOPICS), "no topic is told twice"
    facts: list[Fact] = []
    deck = rng.sample(TOPICS, len(TOPICS))
    taken: set[str] = set()
    while len(facts) < count:
        topic = deck.pop()
        value, also = _VALUES[topic.kind](rng)
        while value in taken:
            value, also = _VALUES[topic.kind](rng)
        taken.add(value)
        told, asked = rng.choice(topic.told), rng.choice(topic.asked)
        facts.append(Fact(kind=topic.kind, value=value, also=also, told=told.format(v=value), asked=asked))
    return facts


def _code(rng: Random) -> tuple[str, tuple[str, ...]]:
    letters = "".join(rng.choice("BCDFGHJKLMNPRSTVWXZ") for _ in range(2))
    return rng.choice((f"{rng.randrange(1000, 9999)}", f"{letters}{rng.randrange(100, 999)}")), ()


def _name(rng: Random) -> tuple[str, tuple[str, ...]]:
    return f"{rng.choice(_FIRST)} {rng.choice(_LAST)}", ()


def _date(rng: Random) -> tuple[str, tuple[str, ...]]:
    day, month = rng.randrange(2, 29), rng.choice(_MONTHS)
    ordinal = f"{day}{'th' if 10 < day < 20 else {1: 'st', 2: 'nd', 3: 'rd'}.get(day % 10, 'th')}"
    return f"{day} {month}", (f"{month} {day}", f"{month} {ordinal}", f"{ordinal} of {month}", f"{ordinal} {month}")


def _price(rng: Random) -> tuple[str, tuple[str, ...]]:
    amount = rng.randrange(13, 980)
    return f"{amount} dollars", (f"${amount}", f"${amount}.00")


def _time(rng: Random) -> tuple[str, tuple[str, ...]]:
    return f"{rng.randrange(1, 13)}:{rng.choice((5, 10, 15, 20, 25, 35, 40, 45, 50, 55)):02}", ()


def _file(rng: Random) -> tuple[str, tuple[str, ...]]:
    return f"{rng.choice(_STEMS)}{rng.randrange(2, 99)}.{rng.choice(('csv', 'txt', 'pdf', 'zip', 'xml'))}", ()


def _number(rng: Random) -> tuple[str, tuple[str, ...]]:
    return str(rng.randrange(21, 990)), ()


def _one_of(words: Sequence[str]) -> Callable[[Random], tuple[str, tuple[str, ...]]]:
    return lambda rng: (rng.choice(words), ())


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_FIRST = _words(
    "Agatha Basil Cressida Desmond Enid Fergus Greta Horace Imogen Jasper Leonora Magnus Nadine Otto Petra "
    "Quentin Rowena Silas Tabitha Ulric Verena Winifred"
)
_LAST = _words(
    "Ashdown Bellweather Corrigan Dunmore Eastlake Fairbrook Gantry Holloway Inskip Jardine Kettering Lockwood "
    "Merrow Northcote Osgood Penhale Quill Rushford Stanhope Thorne Underhill Wexford"
)
_MONTHS = _words("January February March April May June July August September October November December")
_PLACES = _words(
    "Aberdeen Bologna Cordoba Dresden Esbjerg Funchal Granada Haarlem Innsbruck Jaipur Kampala Lucerne Malaga "
    "Nairobi Odense Palermo Quebec Rotterdam Salzburg Tallinn Uppsala Valencia Windhoek Zagreb"
)
_COLOURS = _words(
    "amber crimson beige indigo lilac maroon olive orange pink purple scarlet silver teal turquoise violet yellow"
)
_STEMS = _words("budget harvest minutes roster survey voyage weights tickets")
_ANIMALS = _words(
    "badger camel dolphin falcon giraffe heron jaguar koala lobster ostrich panther rabbit salmon tiger walrus zebra"
)
_MATERIALS = _words("bamboo brass canvas copper cork felt glass granite leather marble oak porcelain silk wool")

_VALUES: dict[Kind, Callable[[Random], tuple[str, tuple[str, ...]]]] = {
    "code": _code,
    "name": _name,
    "place": _one_of(_PLACES),
    "date": _date,
    "price": _price,
    "colour": _one_of(_COLOURS),
    "time": _time,
    "file": _file,
    "number": _number,
    "animal": _one_of(_ANIMALS),
    "material": _one_of(_MATERIALS),
}


def _topic(kind: Kind, told: str, *asked: str) -> Topic:
    """Read a topic; wordings that tell it are parted by a bar."""
    return Topic(kind=kind, told=tuple(told.split(" | ")), asked=asked)


TOPICS = (
    _topic(
        "code",
        "To get past the gate of the marina you type {v}. | The marina gate opens when you key in {v}.",
        "Which digits or letters must be entered to come into the marina?",
        "What lets a visitor through the marina gate?",
    ),
    _topic(
        "code",
        "The combination of the safe behind the painting is {v}.",
        "How can the safe behind the picture be opened: with which combination?",
        "Which combination does the hidden safe have?",
    ),
    _topic(
        "code",
        "Locker 9 at the swimming baths was set to {v} by its owner.",
        "What did the owner choose for the lock at the swimming baths?",
        "Which code belongs to locker 9?",
    ),
    _topic(
        "code",
        "Anyone who joins the wireless network of the bakery has to enter the password {v}.",
        "How do I get onto the bakery's network: what is the password?",
        "Which password do guests of the bakery need?",
    ),
    _topic(
        "code",
        "The parcel from the watchmaker travels under the tracking number {v}.",
        "Under what number can the watchmaker's parcel be followed?",
        "What is the tracking number of the watchmaker's shipment?",
    ),
    _topic(
        "code",
        "The seat reserved for the conductor of the orchestra is {v}.",
        "Which seat is kept for the orchestra's conductor?",
        "Where does the conductor sit: what is the seat's number?",
    ),
    _topic(
        "name",
        "The lighthouse is looked after by {v} these days. | These days {v} looks after the lighthouse.",
        "Who is the keeper of the lighthouse?",
        "What is the name of the person in charge of the lighthouse?",
    ),
    _topic(
        "name",
        "The prize for the best marmalade went to {v}.",
        "Who won with the best marmalade?",
        "Whose marmalade was judged to be the best?",
    ),
    _topic(
        "name",
        "The broken piano was finally mended by {v}.",
        "Who repaired the piano?",
        "Thanks to whom does the piano play again?",
    ),
    _topic(
        "name",
        "The new headmaster of the village school is called {v}.",
        "Who runs the village school now?",
        "What is the headmaster's name?",
    ),
    _topic(
        "name",
        "The map of the caves was drawn by {v}.",
        "Who made the map of the caves?",
        "Whose work is the cave map?",
    ),
    _topic(
        "name",
        "The only witness of the accident on the bridge was {v}.",
        "Who saw the accident on the bridge?",
        "Which person could testify about the bridge accident?",
    ),
    _topic(
        "place",
        "The travelling circus spends every winter in {v}.",
        "In which city does the circus stay when it is cold?",
        "Where are the circus people during the winter?",
    ),
    _topic(
        "place",
        "The violin in the glass case was built in {v}.",
        "Where does the violin in the glass case come from?",
        "In which city was that violin made?",
    ),
    _topic(
        "place",
        "The dentist's twin brother moved to {v}.",
        "Where does the twin brother of the dentist live now?",
        "To which city did the dentist's brother go?",
    ),
    _topic(
        "place",
        "The next congress of beekeepers will be held in {v}.",
        "Which city hosts the beekeepers when they meet next?",
        "Where are the beekeepers going to meet?",
    ),
    _topic(
        "place",
        "The stolen bicycle turned up again in {v}.",
        "Where was the stolen bicycle found?",
        "In which city did the missing bicycle reappear?",
    ),
    _topic(
        "date",
        "The roof of the chapel will be repaired on {v}.",
        "When do the works on the chapel's roof take place?",
        "On what day is the chapel roof to be mended?",
    ),
    _topic(
        "date",
        "Subscriptions to the rowing club run out on {v}.",
        "Until when are members of the rowing club paid up?",
        "On which day does a rowing club subscription end?",
    ),
    _topic(
        "date",
        "The glassblower celebrates his birthday on {v}.",
        "When was the glassblower born: on which day of the year?",
        "What day is the glassblower's birthday?",
    ),
    _topic(
        "date",
        "The ferry to the island sails for the first time on {v}.",
        "When does the island ferry begin to run?",
        "What is the date of the ferry's first trip?",
    ),
    _topic(
        "price",
        "A night at the inn by the mill costs {v}.",
        "How much does one pay to sleep at the inn by the mill?",
        "What does the inn near the mill charge per night?",
    ),
    _topic(
        "price",
        "The antique clock was sold for {v}.",
        "How much money did the old clock bring?",
        "What did the buyer pay for the antique clock?",
    ),
    _topic(
        "price",
        "The fine for the overdue library book came to {v}.",
        "How much was owed for the late library book?",
        "What sum did the library ask for?",
    ),
    _topic(
        "price",
        "Lessons with the fencing master are {v} a month.",
        "What does the fencing master charge each month?",
        "How expensive is a month of fencing lessons?",
    ),
    _topic(
        "colour",
        "The front door of the embassy has been painted {v}.",
        "Which colour is the entrance of the embassy?",
        "What does the embassy's door look like: which colour?",
    ),
    _topic(
        "colour",
        "The team from the harbour plays in {v} shirts.",
        "What colour do the harbour's players wear?",
        "In which colour does the harbour team play?",
    ),
    _topic(
        "colour",
        "The wire that must never be cut is the {v} one.",
        "Which wire has to be left alone: what is its colour?",
        "What colour is the wire that nobody may cut?",
    ),
    _topic(
        "colour",
        "The countess wore a {v} hat at the races.",
        "Of what colour was the hat of the countess?",
        "At the races, what colour did the countess have on her head?",
    ),
    _topic(
        "time",
        "The night train leaves platform two at {v}.",
        "When does the night train depart?",
        "At what time must sleepy travellers be on the platform?",
    ),
    _topic(
        "time",
        "The gardener waters the roses at {v} sharp.",
        "At what hour do the roses get water?",
        "When does the gardener attend to the roses?",
    ),
    _topic(
        "time",
        "The guided tour of the brewery starts at {v}.",
        "When should one be at the brewery to join the tour?",
        "What time does the brewery tour begin?",
    ),
    _topic(
        "file",
        "The results of the bird count were saved as {v}.",
        "In which file are the numbers of the bird count?",
        "What is the file with the bird count called?",
    ),
    _topic(
        "file",
        "The architect sent the final drawings in {v}.",
        "Which file holds the architect's last drawings?",
        "What is the name of the file that the architect sent?",
    ),
    _topic(
        "file",
        "All the recipes of the hotel kitchen are kept in {v}.",
        "Where are the hotel's recipes stored: in what file?",
        "Which file has to be opened to read the hotel's recipes?",
    ),
    _topic(
        "number",
        "Exactly {v} steps lead up to the bell tower.",
        "How many steps are there to the bell tower?",
        "How many stairs does one climb to reach the bells?",
    ),
    _topic(
        "number",
        "The cellar of the monastery holds {v} barrels.",
        "How many barrels lie in the monastery's cellar?",
        "What is the number of barrels that the monks store?",
    ),
    _topic(
        "number",
        "The choir of the miners has {v} singers.",
        "How many people sing in the miners' choir?",
        "How large is the choir of the miners?",
    ),
    _topic(
        "animal",
        "The family's coat of arms shows a {v}.",
        "Which animal is on the coat of arms?",
        "What creature did the family choose as its emblem?",
    ),
    _topic(
        "animal",
        "For his costume at the ball the mayor dressed as a {v}.",
        "As which animal did the mayor go to the ball?",
        "What was the mayor's disguise?",
    ),
    _topic(
        "material",
        "The lid of the old chest is made of {v}.",
        "What is the chest's lid made from?",
        "Of which material is the lid of the chest?",
    ),
    _topic(
        "material",
        "The statue in the courtyard was carved from {v}.",
        "What material did the sculptor of the courtyard statue use?",
        "Of what is the statue in the courtyard?",
    ),
)
