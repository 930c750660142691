"""Small questions and small talk from a seeded generator; stories.py generates stories in the same way.

`chatter(number)` depends on its number alone.
"""

from __future__ import annotations

import random

Message = dict[str, str]  # {"role": "user" | "assistant", "content": ...}

OPPOSITES = (
    "hot cold|big small|day night|up down|old young|wet dry|fast slow|happy sad|open shut|long short|hard soft|"
    "light dark|full empty|high low|early late|clean dirty|near far|loud quiet|rich poor|strong weak"
)
SOUNDS = "cow moo|dog woof|cat meow|duck quack|sheep baa|pig oink|owl hoot|lion roar|bee buzz|frog croak|mouse squeak"
COLOUR_OF = (
    "grass green|the sky blue|snow white|a lemon yellow|coal black|a strawberry red|the sea blue|a leaf green|"
    "milk white|a frog green|a crow black|the sun yellow"
)
GREETINGS = "Hello!|Hello.|Hi!|Hi there!|Good morning!|Good evening!|Hello there!".split("|")
SMALL_TALK = (
    (
        ("How are you?", "How are you today?", "Are you well?", "How do you do?"),
        (
            "I am very well, thank you. How are you?",
            "I am well, thank you. Shall I tell you a story?",
            "Very well, thank you!",
        ),
    ),
    (
        ("Thank you!", "Thank you very much.", "Thanks!", "That was a nice story.", "That was kind of you."),
        ("You are welcome!", "You are very welcome.", "I am glad that you like it."),
    ),
    (
        ("Goodbye!", "Good night!", "See you tomorrow.", "I must go now."),
        ("Goodbye! It was nice to talk to you.", "Goodbye! Come back soon."),
    ),
    (
        ("What is your name?", "Do you have a name?", "Who are you?", "What are you?"),
        ("I am a very small model, and I have no name.",),
    ),
    (
        ("What can you do?", "Can you help me?", "What do you know?"),
        ("I can tell you a story, and I can add small numbers.", "I know some stories. Shall I tell you one?"),
    ),
    (("I am sad.", "I am tired.", "I had a bad day."), ("I am sorry to hear that. Shall I tell you a story?",)),
    (
        ("I am well, thank you.", "I am happy today.", "It is a fine day."),
        ("I am glad to hear that.", "That is good to hear."),
    ),
)
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()


def article(word: str) -> str:
    """Return the word after "a" or "an"."""
    return ("an " if word[0] in "aeiou" else "a ") + word


def upper(text: str) -> str:
    """Return the text with a capital first letter."""
    return text[0].upper() + text[1:]


def pairs(text: str) -> list[tuple[str, str]]:
    """Split "a b|c d" into [("a", "b"), ("c", "d")]."""
    return [(left, right) for left, _, right in (pair.rpartition(" ") for pair in text.split("|"))]


def question(rng: random.Random) -> tuple[str, str]:
    """Return a small question and its answer, a sentence."""
    kind = rng.randrange(6)
    if kind == 0:
        a, b = rng.randrange(1, 11), rng.randrange(1, 11)
        return rng.choice((f"What is {a} plus {b}?", f"What is {a} + {b}?")), f"{a} plus {b} is {a + b}."
    if kind == 1:
        left, right = rng.choice(pairs(OPPOSITES))
        left, right = rng.choice(((left, right), (right, left)))
        return f"What is the opposite of {left}?", f"The opposite of {left} is {right}."
    if kind == 2:
        animal, sound = rng.choice(pairs(SOUNDS))
        return f"What does {article(animal)} say?", f"{upper(article(animal))} says {sound}."
    if kind == 3:
        thing, colour = rng.choice(pairs(COLOUR_OF))
        return f"What colour is {thing}?", f"{upper(thing)} is {colour}."
    if kind == 4:
        greeting = rng.choice(("Hello!", "Good morning!", "Hi.", "Good evening."))
        return greeting, f"{greeting.rstrip('.!')}! Shall I tell you a story?"
    return rng.choice(("Who are you?", "What can you do?")), "I am a very small model. I can tell you a story."


def small_talk(rng: random.Random) -> tuple[str, str]:
    """Return one turn: a greeting, a kind word, a sum, a number, or a small question."""
    kind = rng.randrange(8)
    if kind < 3:
        lines, answers = rng.choice(SMALL_TALK[:1] * 3 + SMALL_TALK)
        line = rng.choice(lines)
        return (f"{rng.choice(GREETINGS)} {line}" if rng.random() < 0.4 else line), rng.choice(answers)
    if kind == 3:
        return rng.choice(GREETINGS), rng.choice(("Hello! How are you?", "Hello! Shall I tell you a story?"))
    if kind < 6:
        a, b = rng.randrange(0, 11), rng.randrange(0, 11)
        request = rng.choice(
            (f"What is {a} plus {b}?", f"What is {a} + {b}?", f"How much is {a} plus {b}?", f"Add {a} and {b}.")
        )
        return request, f"{a} plus {b} is {a + b}."
    if kind == 6:
        at = rng.randrange(0, len(NUMBERS) - 1)
        if rng.random() < 0.5:
            return f"Which number comes after {NUMBERS[at]}?", f"After {NUMBERS[at]} comes {NUMBERS[at + 1]}."
        return f"Which number comes before {NUMBERS[at + 1]}?", f"Before {NUMBERS[at + 1]} comes {NUMBERS[at]}."
    return question(rng)


def chatter(number: int) -> list[Message]:
    """Return conversation `number` of small talk: one to four turns."""
    rng = random.Random(f"chatter {number}")
    messages = []
    for _ in range(rng.randrange(1, 5)):
        request, answer = small_talk(rng)
        messages += [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
    return messages
