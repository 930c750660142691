"""Short stories from a seeded generator: the domain in which the embedded model learns to answer.

All sentences were written for this project and have its licence. `talk(number)` depends on its number alone, so one
range of numbers is a training set and another range a held-out set.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from scripts.tiny_model.small_talk import Message, article, question, upper

GIRLS = "Lily Anna Mia Rose Clara Nora Ella Ruth Ivy Maud Tess Vera".split()
BOYS = "Tom Ben Max Sam Leo Finn Hugo Jack Oscar Paul Will Ned".split()
ANIMALS = "fox rabbit bear mouse duck hedgehog frog squirrel kitten puppy goat donkey pony lamb badger mole".split()
PETS = "Pip Dot Bramble Rusty Clover Pepper Button Fern Nutmeg Patch Willow Biscuit".split()
TRAITS = "little small young curious cheerful shy clever kind brave merry gentle lazy quiet proud".split()
COLOURS = "red blue green yellow white brown golden silver black purple".split()
THINGS = "kite ball hat bell lantern drum scarf boat whistle basket spoon button shell feather key ring".split()
FOODS = "bread|cake|soup|apples|berries|cheese|honey|nuts|plums|porridge|pears|biscuits".split("|")
HELPERS = "owl|crow|old tortoise|robin|otter|beaver|swan|heron|hare|goose|swallow|wise cat".split("|")
PLACES = (
    "at the edge of the forest",
    "in a village by the sea",
    "on a farm beside the river",
    "in a cottage on the hill",
    "in a house with a green door",
    "near the old mill",
    "under a great oak tree",
    "in a quiet valley",
    "beside a deep blue lake",
    "at the end of a long lane",
)
WEATHER = (
    "The sun was shining and the birds were singing.",
    "The wind was blowing and the leaves were dancing.",
    "It had rained all night, and everything was wet.",
    "There was snow on the ground.",
    "The sky was clear and blue.",
    "It was a warm day, and the bees were busy in the flowers.",
    "A thin mist lay over the fields.",
)


@dataclass(frozen=True)
class Hero:
    """The hero of a story: `name`, `kind` of person or animal, a trait, and pronouns."""

    name: str
    kind: str
    trait: str
    he: str
    him: str
    his: str

    @property
    def described(self) -> str:
        return f"{article(self.trait)} {self.kind} called {self.name}"


def hero(rng: random.Random) -> Hero:
    """Draw a hero."""
    girl = rng.random() < 0.5
    pronouns = ("she", "her", "her") if girl else ("he", "him", "his")
    if rng.random() < 0.5:
        return Hero(rng.choice(GIRLS if girl else BOYS), "girl" if girl else "boy", rng.choice(TRAITS), *pronouns)
    return Hero(rng.choice(PETS), rng.choice(ANIMALS), rng.choice(TRAITS), *pronouns)


def opening(rng: random.Random, who: Hero) -> str:
    """Draw the first sentences, up to "One day, "."""
    place = rng.choice(PLACES)
    first = rng.choice(
        (
            f"Once upon a time there was {who.described}, who lived {place}.",
            f"There was once {who.described}. {upper(who.he)} lived {place}.",
            f"Long ago, {place}, there lived {who.described}.",
            f"{who.name} was {article(who.trait)} {who.kind} who lived {place}.",
        )
    )
    morning = rng.choice(("One morning", "One day", "One fine afternoon", "Early one day", "One evening"))
    return first + rng.choice(("", " " + rng.choice(WEATHER))) + f" {morning}, "


def ending(rng: random.Random, who: Hero, lesson: str) -> str:
    """Draw the last sentence."""
    return rng.choice(
        (
            f"{who.name} never forgot that {lesson}.",
            f"From that day on {who.name} knew that {lesson}.",
            f"And {who.name} went home happy, for {who.he} had learned that {lesson}.",
            f"That night {who.name} slept well, and in the morning {who.he} told everyone that {lesson}.",
            f"So {who.name} learned that {lesson}.",
        )
    )


def lost(rng: random.Random, who: Hero) -> tuple[str, str]:
    """Draw a topic and a plot: a thing is lost and found again."""
    thing, colour, helper = rng.choice(THINGS), rng.choice(COLOURS), rng.choice(HELPERS)
    where, there = rng.choice(
        (
            ("the river", "the river"),
            ("a deep hole", "the hole"),
            ("the long grass", "the grass"),
            ("a thorn bush", "the bush"),
            ("the old well", "the well"),
            ("a tall tree", "the tree"),
        )
    )
    topic = f"{article(colour)} {thing}"
    a = rng.choice(
        (
            f"{who.name} went out to play with {who.his} {colour} {thing}.",
            f"{who.name} was carrying {who.his} {colour} {thing} through the fields.",
            f"{who.name} showed {who.his} {colour} {thing} to {who.his} friends.",
        )
    )
    b = rng.choice(
        (
            f"But {who.he} slipped on a stone, and the {thing} fell into {where}.",
            f"But a strong wind came and blew the {thing} into {where}.",
            f"Then {who.he} ran too fast, and the {thing} dropped into {where}.",
        )
    )
    c = rng.choice(
        (
            f"{who.name} looked and looked, but {who.he} could not reach it.",
            f"{who.name} sat down and began to cry.",
            f'"Oh dear!" said {who.name}. "What shall I do now?"',
        )
    )
    d = rng.choice(
        (
            f'{upper(article(helper))} came by and asked, "Why are you so sad?" '
            f'"My {thing} is in {where}," said {who.name}.',
            f'Just then {article(helper)} heard {who.him}. "Do not be sad," said the {helper}. "I will help you."',
            f"{who.name} asked {article(helper)} for help. "
            f'"Of course," said the {helper}. "That is what friends are for."',
        )
    )
    e = rng.choice(
        (
            f"The {helper} went to {there} and brought back the {thing}.",
            f"Together they took a long stick and pulled the {thing} out of {there}.",
            f"The {helper} knew a clever way, and soon the {thing} was safe again.",
        )
    )
    f = rng.choice(
        (
            f'"Thank you!" said {who.name}, and gave the {helper} some {rng.choice(FOODS)}.',
            f'{who.name} was so glad that {who.he} danced. "Thank you, dear {helper}," {who.he} said.',
            f"{who.name} thanked the {helper}, and they played together until the sun went down.",
        )
    )
    lesson = rng.choice(
        ("a good friend is always near", "it is wise to ask for help", "kind friends are the best treasure")
    )
    return topic, " ".join((a, b, c, d, e, f, ending(rng, who, lesson)))


def afraid(rng: random.Random, who: Hero) -> tuple[str, str]:
    """Draw a topic and a plot: a fear is overcome."""
    helper = rng.choice(HELPERS)
    fear, place, good = rng.choice(
        (
            ("the dark", "the cellar", "the stars come out only in the dark"),
            ("the water", "the lake", "the water carries those who trust it"),
            ("the thunder", "the hill", "thunder is only noise, and rain makes the flowers grow"),
            ("high places", "the tower", "from high up one can see the whole world"),
            ("the forest", "the forest", "the trees stand still and hurt nobody"),
        )
    )
    a = rng.choice(
        (
            f"{who.name} had to go to {place}, but {who.he} was afraid of {fear}.",
            f"{who.his} mother sent {who.name} to {place}. Now {who.name} was very much afraid of {fear}.",
            f"all the others went to {place}. Only {who.name} stayed behind, because {who.he} was afraid of {fear}.",
        )
    )
    b = rng.choice(
        (
            f"{upper(who.he)} stood still and shook from head to foot.",
            f'"I cannot do it," {who.he} said, and {who.his} heart beat fast.',
            f"{upper(who.he)} hid behind a wall and shut {who.his} eyes.",
        )
    )
    c = rng.choice(
        (
            f"{upper(article(helper))} saw {who.him} and said, "
            f'"Everyone is afraid of something. Do you know that {good}?"',
            f"Then {article(helper)} sat down beside {who.him}. "
            f'"I was afraid too," said the {helper}, "until I learned that {good}."',
        )
    )
    d = rng.choice(
        (
            f"{who.name} thought about this for a long time. Then {who.he} took one step, and then another.",
            f'"Will you come with me?" asked {who.name}. "I will," said the {helper}, and they went together.',
            f"So {who.name} took a deep breath and went on, very slowly.",
        )
    )
    e = rng.choice(
        (
            f"Nothing bad happened at all. {who.name} began to laugh.",
            f'It was not so bad. "Look at me!" cried {who.name}. "I am not afraid any more!"',
            f"And soon {who.he} had quite forgotten to be afraid.",
        )
    )
    lesson = rng.choice(("being brave means to go on when one is afraid", "the first step is the hardest", good))
    return f"someone who is afraid of {fear}", " ".join((a, b, c, d, e, ending(rng, who, lesson)))


def sharing(rng: random.Random, who: Hero) -> tuple[str, str]:
    """Draw a topic and a plot: food is shared, and the kindness comes back."""
    food, other = rng.choice(FOODS), rng.choice(HELPERS)
    later = rng.choice(("winter came", "a storm came", "the river rose", "the snow fell"))
    a = rng.choice(
        (
            f"{who.name} found some {food} and wanted to eat every bit alone.",
            f"{who.name} was walking home with a basket of {food}.",
            f"{who.his} grandmother gave {who.name} some fresh {food}.",
        )
    )
    b = rng.choice(
        (
            f'On the way {who.he} met {article(other)}. "I have not eaten for two days," said the {other}.',
            f"There sat {article(other)}, thin and hungry, by the side of the road.",
            f'Then {article(other)} knocked at the door. "Please," said the {other}, "I am so hungry."',
        )
    )
    c = rng.choice(
        (
            f"{who.name} did not want to share at first. "
            f"But {who.he} looked at the poor {other} and gave half of the {food} away.",
            f'"Here," said {who.name}, "there is enough for two." They ate the {food} together.',
            f"{who.name} felt sorry for the {other} and shared the {food}.",
        )
    )
    d = rng.choice(
        (
            f"Many weeks later {later}, and {who.name} could not find the way home.",
            f"Not long after that {later}, and {who.name} was cold and alone.",
            f"Then {later}, and {who.name} had nothing left to eat.",
        )
    )
    e = rng.choice(
        (
            f'Who came to help? It was the {other}! "You were kind to me," said the {other}. "Now come with me."',
            f"But the {other} had not forgotten. It came and led {who.him} to a warm house.",
            f'"Do you remember me?" asked a voice. It was the {other}, with food and a warm blanket.',
        )
    )
    lesson = rng.choice(
        ("those who share are never poor", "a kind deed comes back one day", "two can be happy where one is not")
    )
    return f"someone who shares some {food}", " ".join((a, b, c, d, e, ending(rng, who, lesson)))


def building(rng: random.Random, who: Hero) -> tuple[str, str]:
    """Draw a topic and a plot: something is built at the second attempt."""
    made, part = rng.choice(
        (
            ("boat", "wood"),
            ("house", "stones"),
            ("bridge", "branches"),
            ("nest", "straw"),
            ("tower", "bricks"),
            ("garden", "seeds"),
        )
    )
    helper = rng.choice(HELPERS)
    verb = "plant" if made == "garden" else "build"
    a = rng.choice(
        (
            f'{who.name} said, "I will {verb} {article(made)}, and it will be the best in the world."',
            f"{who.name} wanted to {verb} {article(made)}.",
        )
    )
    b = rng.choice(
        (
            f"{upper(who.he)} took some {part} and worked very fast. But in the night it all came to nothing.",
            f"{upper(who.he)} was in such a hurry that {who.he} forgot half of the {part}, and the {made} was spoiled.",
        )
    )
    c = rng.choice(
        (
            f"{who.name} was angry and threw the {part} away.",
            f'"It is too hard for me," said {who.name}.',
            f"{who.name} wanted to give up.",
        )
    )
    d = rng.choice(
        (
            f'"You were too quick," said {article(helper)} who had watched. '
            '"Good work takes time. Begin again, and begin slowly."',
            'An old woman came by and said, "I have seen many things fail the first time. Try once more."',
        )
    )
    e = rng.choice(
        (
            f"So {who.name} began again. {upper(who.he)} worked for three days, "
            f"a little at a time, and at last the {made} was finished.",
            f"The next day {who.name} got up early and tried again, with more care. This time it went well.",
        )
    )
    f = rng.choice(
        (
            f"Everyone came to look at the {made} and was amazed.",
            f"It was a fine {made}, and {who.name} was proud of it.",
        )
    )
    lesson = rng.choice(("good work takes time", "one must try again", "those who are patient reach the end"))
    return article(made), " ".join((a, b, c, d, e, f, ending(rng, who, lesson)))


def story(rng: random.Random) -> tuple[str, str]:
    """Return a request for a story, and the story."""
    who = hero(rng)
    start = opening(rng, who)
    topic, rest = rng.choice((lost, afraid, sharing, building))(rng, who)
    request = rng.choice(
        (
            f"Tell me a story about {article(who.kind)}.",
            f"Tell me a story about {article(who.trait)} {who.kind} and {topic}.",
            f"Write a short story about {topic}.",
            f"Please tell me a story about {article(who.kind)} called {who.name}.",
            f"I would like to hear a story about {article(who.kind)} and {topic}.",
            "Tell me a story.",
        )
    )
    return request, start + rest


def talk(number: int) -> list[Message]:
    """Return conversation `number`: one or two turns, most of them with a story."""
    rng = random.Random(f"talk {number}")
    turns = [story(rng)] if rng.random() < 0.75 else [question(rng) for _ in range(rng.randrange(1, 4))]
    if rng.random() < 0.1:
        turns.insert(0, question(rng))
    messages = []
    for request, answer in turns:
        messages += [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
    return messages
