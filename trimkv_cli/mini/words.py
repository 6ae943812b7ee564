"""The words of the synthetic language: relations that facts are made of, filler, and requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# fmt: off
ValueKind = Literal["name", "code", "number", "place", "date"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Relation:
    """A kind of fact: what it is about, how it is told, asked for and answered.

    `unseen_*` are phrasings that training never uses; tests and evaluations do. `value_first` has the value before its
    thing, which is the hardest to remember: the value comes when nothing says yet what it will be asked for by.
    """

    value: ValueKind
    things: tuple[str, ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    answer: str
    unseen_statements: tuple[str, ...]
    unseen_questions: tuple[str, ...]
    value_first: tuple[str, ...]


RELATIONS = (
    Relation(
        value="name",
        things=(
            "cat", "dog", "sister", "brother", "boss", "teacher", "neighbour", "boat", "horse", "doctor", "uncle",
            "aunt", "friend", "baker", "bird", "cousin", "son", "daughter", "mother", "father", "wife", "husband",
        ),
        statements=(
            "My {t} is called {v}.", "My {t} is called {v}.", "My {t}'s name is {v}.", "The name of my {t} is {v}.",
            "I have a {t} called {v}.", "My {t} is named {v}.", "By the way, my {t} is called {v}.",
            "Remember that my {t}'s name is {v}.",
        ),
        questions=(
            "What is my {t} called?", "What is my {t} called?", "What is my {t}'s name?",
            "What is the name of my {t}?", "Do you remember the name of my {t}?", "Tell me my {t}'s name.",
            "Who is my {t}?", "How is my {t} called?",
        ),
        answer="Your {t} is called {v}.",
        unseen_statements=("By the way, my {t}'s name is {v}.", "You know, my {t} is named {v}."),
        unseen_questions=("Tell me the name of my {t}.", "Do you remember what my {t} is called?"),
        value_first=("{v} is my {t}.", "{v} is the name of my {t}."),
    ),
    Relation(
        value="code",
        things=(
            "door", "safe", "locker", "alarm", "gate", "phone", "bike", "bank", "garage", "suitcase", "wifi", "ticket",
            "parcel", "printer", "shed", "box",
        ),
        statements=(
            "The code of the {t} is {v}.", "The {t} code is {v}.", "My {t} code is {v}.", "The code of my {t} is {v}.",
            "The {t} opens with {v}.", "Remember that the {t} code is {v}.",
        ),
        questions=(
            "What is the code of the {t}?", "What is the {t} code?", "What is my {t} code?",
            "What is the code of my {t}?", "Do you remember the {t} code?", "Tell me the {t} code.",
        ),
        answer="The {t} code is {v}.",
        unseen_statements=("Remember that the code of the {t} is {v}.", "By the way, the {t} code is {v}."),
        unseen_questions=("Tell me the code of the {t}.", "Do you remember the code of my {t}?"),
        value_first=("{v} is the code of the {t}.", "{v} opens the {t}."),
    ),
    Relation(
        value="number",
        things=(
            "apples", "books", "coins", "chairs", "stamps", "plates", "bottles", "lamps", "keys", "shirts", "cards",
            "eggs", "roses", "hens",
        ),
        statements=(
            "I have {v} {t}.", "I own {v} {t}.", "There are {v} {t} in my house.", "I bought {v} {t}.",
            "Remember that I have {v} {t}.",
        ),
        questions=(
            "How many {t} do I have?", "How many {t} do I own?", "How many {t} are there?",
            "Do you remember how many {t} I have?", "Tell me how many {t} I have.",
        ),
        answer="The number of {t} is {v}.",
        unseen_statements=("By the way, I own {v} {t}.", "You know, I have {v} {t}."),
        unseen_questions=("Tell me how many {t} I own.", "How many {t} are there in my house?"),
        value_first=("I have {v} {t}.", "I own {v} {t}.", "There are {v} {t} in my house.", "I bought {v} {t}."),
    ),
    Relation(
        value="place",
        things=(
            "office", "school", "hotel", "market", "garden", "cabin", "shop", "studio", "gym", "museum", "home",
            "bakery", "club", "church",
        ),
        statements=(
            "My {t} is in {v}.", "The {t} is in {v}.", "You find my {t} in {v}.", "By the way, my {t} is in {v}.",
            "Remember that the {t} is in {v}.",
        ),
        questions=(
            "Where is my {t}?", "Where is the {t}?", "In which town is my {t}?", "Do you remember where my {t} is?",
            "Tell me where the {t} is.",
        ),
        answer="Your {t} is in {v}.",
        unseen_statements=("You find the {t} in {v}.", "Remember that my {t} is in {v}."),
        unseen_questions=("Tell me where my {t} is.", "In which town is the {t}?"),
        value_first=("{v} is where my {t} is.", "In {v} you find my {t}."),
    ),
    Relation(
        value="date",
        things=(
            "exam", "wedding", "party", "trip", "flight", "concert", "visit", "interview", "race", "lesson", "meeting",
            "birthday", "move", "show",
        ),
        statements=(
            "My {t} is on {v}.", "The {t} is on {v}.", "I have my {t} on {v}.", "By the way, the {t} is on {v}.",
            "Remember that my {t} is on {v}.",
        ),
        questions=(
            "When is my {t}?", "When is the {t}?", "On which day is my {t}?", "Do you remember when my {t} is?",
            "Tell me when the {t} is.",
        ),
        answer="Your {t} is on {v}.",
        unseen_statements=("By the way, my {t} is on {v}.", "Remember that the {t} is on {v}."),
        unseen_questions=("Tell me when my {t} is.", "On which day is the {t}?"),
        value_first=("On {v} I have my {t}.", "{v} is the day of my {t}."),
    ),
    Relation(
        value="name",
        things=("name",),
        statements=("My name is {v}.", "I am {v}.", "Call me {v}.", "Remember that my name is {v}."),
        questions=("What is my name?", "Who am I?", "Do you remember my name?", "What am I called?"),
        answer="Your name is {v}.",
        unseen_statements=("By the way, my name is {v}.",),
        unseen_questions=("Tell me my name.",),
        value_first=("{v} is my name.",),
    ),
    Relation(
        value="place",
        things=("town",),
        statements=("I live in {v}.", "I live in the town of {v}.", "Remember that I live in {v}."),
        questions=("Where do I live?", "In which town do I live?", "Do you remember where I live?"),
        answer="You live in {v}.",
        unseen_statements=("By the way, I live in {v}.",),
        unseen_questions=("Tell me where I live.",),
        value_first=("{v} is where I live.",),
    ),
)

OPENERS = (
    "Listen,", "You see,", "Well,", "As I said,", "So,", "To be sure,", "You must see that", "As you may hear,",
    "I think", "In the end,", "Of late,", "Now", "Tell them that", "It is good that", "For all that,", "The thing is,",
)

MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)

CONSONANTS = "bdfgklmnprstvz"
VOWELS = "aeiou"

SUBJECTS = (
    "the old man", "a young girl", "the river", "the train", "a small house", "the wind", "the garden", "my friend",
    "the king", "a grey bird", "the sea", "the road", "the baker", "a tall tree", "the rain", "the night",
    "the morning", "the city", "the people", "the children", "a long letter", "the music", "the cold water",
    "the mountain",
)
VERBS = (
    "waits for", "looks at", "comes from", "walks to", "sings about", "thinks of", "moves with", "stands near",
    "talks about", "dreams of", "falls on", "turns to", "goes past", "hears", "knows", "likes", "follows", "sees",
)
OBJECTS = (
    "the white hill", "the open window", "an old song", "the quiet street", "the first snow", "a green field",
    "the last light", "the big bridge", "the warm bread", "the deep forest", "a good story", "the blue sky",
    "the long summer", "the other side", "the small lake", "the red roof", "a cup of tea", "the stone wall",
)
TAILS = (
    "", "", "", " every day", " in the evening", " again", " for a while", " without a word", " after the rain",
    " in the summer", " and then rests", " at night", " now and then", " as before",
)
OPINIONS = (
    "I like this very much.", "That was a good day.", "It was nice outside.", "I slept well.", "Time goes by.",
    "It is late now.", "I am a little tired.", "We had bread and tea.", "The weather is fine.", "I will go for a walk.",
    "I read a book about it.", "It is warm in here.", "What do you think about that?", "How are you today?",
    "Tell me a story.", "Let us talk about the sea.", "There is not much to say.", "Hello!", "Thank you.",
)
ACKNOWLEDGEMENTS = ("Noted.", "Good to know.", "I will remember that.", "All right, noted.")
REPLIES = ("I see.", "Yes, indeed.", "That is good.", "How nice.", "Go on.", "Tell me more.", "That sounds fine.")

COMMON = (  # the hundred words that English uses most
    "the", "be", "to", "of", "and", "a", "in", "that", "have", "I", "it", "for", "not", "on", "with", "he", "as",
    "you", "do", "at", "this", "but", "his", "by", "from", "they", "we", "say", "her", "she", "or", "an", "will",
    "my", "one", "all", "would", "there", "their", "what", "so", "up", "out", "if", "about", "who", "get", "which",
    "go", "me", "when", "make", "can", "like", "time", "no", "just", "him", "know", "take", "people", "into", "year",
    "your", "good", "some", "could", "them", "see", "other", "than", "then", "now", "look", "only", "come", "its",
    "over", "think", "also", "back", "after", "use", "two", "how", "our", "work", "first", "well", "way", "even",
    "new", "want", "because", "any", "these", "give", "day", "most", "us",
)

TABLE_TITLES = ("Here is a table:", "Table:", "Use this table.", "This is the price list:", "Look at this table:")
UNSEEN_LOOKUPS = ("Tell me the value of {k}.", "What does {k} stand for in the table?")
STEPS_TITLES = ("Follow the arrows:", "Rules:", "Here are the steps:", "Each line leads to another one:")
STEPS_REQUESTS = (
    "Start at {k} and follow the arrows to the end, one per line.", "Begin with {k} and go on until the end.",
    "Start at {k} and go on until the end.",
)
UNSEEN_STEPS_REQUESTS = ("Begin with {k} and follow the arrows to the end.",)
