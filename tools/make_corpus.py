"""Writes the embedded corpus, little stories put together from hand-written sentences.

    python tools/make_corpus.py

One story a paragraph. The text is ours, so it can be shipped; the seed makes it the same text
everywhere. Its tokenizer, a small byte-level BPE, is learnt from it and written beside it.
"""

import json
import random
import re
from collections.abc import Iterable
from pathlib import Path

from moeconv_train.tokenizer import CORPUS, TOKENIZER, read_stories
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

STORIES = 400
SEED = 20
BOS = "<|begin_of_text|>"
EOS = "<|end_of_text|>"
# MaxText masks every token that equals the pad id, and without a pad token takes id 0 for it.
PAD = "<|pad|>"
VOCAB_SIZE = 1024

GIRLS = ["Lily", "Mia", "Anna", "Sara", "Emma", "Rosie", "Nora", "Ella", "Lucy", "Zoe"]
BOYS = ["Tom", "Ben", "Max", "Sam", "Leo", "Jack", "Tim", "Finn", "Oscar", "Noah"]
CREATURES = ["cat", "dog", "rabbit", "duck", "fox", "bear", "mouse", "frog", "owl", "squirrel"]
RELATIVES = ["mom", "dad", "grandma", "grandpa", "big sister", "big brother"]
SIZES = ["little", "small", "tiny", "big", "old", "brave", "kind", "funny"]
COLORS = ["red", "blue", "green", "yellow", "purple", "brown", "white", "golden"]
TOYS = ["ball", "kite", "boat", "drum", "doll", "truck", "train", "hat", "balloon", "bucket"]
FOODS = ["cake", "soup", "bread", "pie", "berries", "apples", "cookies", "carrots", "honey"]
PLACES = {
    "park": "in the park",
    "garden": "in the garden",
    "forest": "in the forest",
    "beach": "at the beach",
    "farm": "on the farm",
    "field": "in the field",
    "river": "by the river",
    "hill": "on the hill",
}
HIDING = [
    "under the bed",
    "behind the tree",
    "in the long grass",
    "near the old well",
    "under a wide leaf",
    "behind the door",
    "in the basket",
    "at the end of the path",
]
WEATHER = [
    "The sun was warm and bright.",
    "The wind was soft and cool.",
    "It had rained, and the ground was wet.",
    "Snow lay on the roofs.",
    "The sky was blue.",
    "Birds sang in the trees.",
]
GLAD = ["happy", "proud", "glad", "full of joy"]
MORALS = [
    "From that day on, {N} always shared with {his} friends.",
    "{N} learned that it is good to ask for help.",
    "{N} knew that being kind makes everyone happy.",
    "That night {N} slept well and dreamed of the {place}.",
    "And {N} and {F} were best friends for a long time.",
    "{N} never forgot that day.",
]

# A plot is a list of beats, a beat a list of ways to say it; the empty way leaves the beat out.
PLOTS: dict[str, list[list[str]]] = {
    "lost": [
        [
            "Once upon a time there was a {size} {kind} named {N}. {N} had a {color} {toy}.",
            "{N} was a {size} {kind} who had a {color} {toy}. {He} took it everywhere.",
            "One day {N} went to the {place} with {his} {color} {toy}.",
        ],
        ["{weather}", ""],
        [
            "But then the {toy} was gone. {N} looked {hiding}, but it was not there.",
            "After lunch {N} could not find the {toy}. {He} began to cry.",
            "{N} played all morning. Then {he} saw that the {toy} was lost.",
        ],
        [
            '"Why are you sad?" asked {F}. "I lost my {toy}," said {N}.',
            '{F} the {animal} came by. "Can you help me find my {toy}?" asked {N}.',
            '{He} ran to {his} friend {F}. "Please help me look," {he} said.',
        ],
        [
            "They looked together, and there it was, {hiding}!",
            "{F} looked {hiding2} and found it at once.",
            "They looked and looked. At last they saw something {color} {hiding}.",
        ],
        ['"Thank you!" said {N}. {He} was so {glad}.', "{N} gave {F} a big hug."],
    ],
    "share": [
        [
            "{N} had some {food} for lunch. {weather}",
            "One morning {N}'s {relative} made {food} for {him}.",
            "Once there was a {size} {kind} named {N} who loved {food}.",
        ],
        [
            "{He} sat down {at_place} and began to eat.",
            "{He} took the {food} to the {place}. {weather}",
        ],
        [
            "A hungry {animal} named {F} came and looked at the {food}.",
            "Then {F} the {animal} came by. {F} had nothing to eat.",
        ],
        [
            '"May I have some?" asked {F}. At first {N} said no.',
            '"I am so hungry," said {F}. {N} thought about it.',
            '"Go away," said {N}. "This is mine." {F} was very sad.',
        ],
        [
            "Then {N} felt sorry and gave {F} half of it.",
            '"We can share," said {N}, and they ate the {food} together.',
        ],
        [
            "It was better to eat with a friend. They were both {glad}.",
            '{F} smiled. "You are very kind," said {F}.',
            "After that they played {at_place} until it was dark.",
        ],
    ],
    "scared": [
        [
            "{N} was a {size} {kind}. {He} was afraid of the dark.",
            "One night {N} heard a loud noise {hiding}.",
            "It was late, and {N} was alone in {his} room.",
        ],
        [
            '"What is that?" {he} said. {He} hid under the blanket.',
            "{He} could not sleep. Something went bump, bump, bump.",
        ],
        [
            "{His_cap} {relative} came in with a light.",
            "{N} took a deep breath and went to look.",
            '"I must be brave," said {N}, and {he} got up.',
        ],
        [
            "It was only a {size2} {animal} with a {color} {toy}!",
            "There, {hiding2}, sat a {size2} {animal}. It was scared too.",
        ],
        [
            '"Do not be afraid," said {N}. "I will be your friend."',
            '"Hello," said the {animal}. "My name is {F}. I lost my way."',
        ],
        [
            "They laughed, and {N} was not scared any more.",
            "{N} gave it some {food} and went back to bed.",
        ],
    ],
    "make": [
        [
            "{N} wanted to make a gift for {his} {relative}.",
            "It was raining, and {N} could not go out to play.",
            '"I want to build something," said {N} one day.',
        ],
        [
            "{He} found some paper and a {color} box.",
            "{He} got wood, string and {color} paint.",
        ],
        [
            "First {he} tried to make a {toy}, but it fell down.",
            "{He} worked and worked, but the {toy} would not stand.",
        ],
        [
            '"Do not give up," said {his_relative}. "Try again."',
            '"May I help you?" asked {F} the {animal}. "Yes, please!" said {N}.',
            "{He} was angry and wanted to stop. Then {he} had an idea.",
        ],
        [
            "{He} tried again, slowly this time. Now it was a fine {color} {toy}!",
            "Together they made the best {toy} in the world.",
        ],
        [
            '"I love it!" said {his_relative}. {N} was {glad}.',
            "They took it to the {place} and played all day.",
        ],
    ],
    "help": [
        [
            "One day {N} took a walk {at_place}. {weather}",
            "{N} and {his} {relative} went to the {place}.",
            "Once upon a time a {size} {kind} named {N} lived near the {place}.",
        ],
        [
            "{He} saw a {size2} {animal} {hiding}.",
            "{He} heard someone cry. It was {F}, a {size2} {animal}.",
        ],
        [
            'The {animal} was hurt. "Please help me," it said.',
            '"I cannot get up," said the {animal}. "My leg hurts."',
            'The {animal} was stuck. "I want to go home," it said.',
        ],
        [
            "{N} ran to get {his} {relative}, and they came back fast.",
            "{N} was not very strong, but {he} pulled as hard as {he} could.",
            "{N} gave the {animal} some water and some {food}.",
        ],
        [
            "Soon the {animal} felt better and could walk again.",
            "At last the {animal} was free. It jumped up and down.",
        ],
        [
            '"Thank you, {N}," said the {animal}. "You are my hero."',
            "Every day after that the {animal} came to play with {N}.",
        ],
    ],
    "race": [
        [
            '"I am the fastest of all!" said {F} the {animal}.',
            "{N} and {F} the {animal} wanted to have a race.",
        ],
        [
            "They would run from the {place} to the big tree.",
            "All the animals came to the {place} to see it. {weather}",
        ],
        [
            "One, two, three, go! {F} ran very fast.",
            "{F} laughed at {N}. But {N} did not mind.",
        ],
        [
            "Then {F} fell down and hurt a foot. {N} stopped to help.",
            "{F} stopped to eat some {food}, but {N} did not stop.",
            "{F} saw a {color} {toy} and stopped to play with it.",
        ],
        [
            "{N} walked on and on, and came to the tree first.",
            "They came to the tree at the same time, hand in hand.",
        ],
        [
            '"Well done," said {F}. "Next time I will try harder."',
            "Everyone clapped, and they all ate {food}.",
        ],
    ],
    "weather": [
        [
            "{N} had a new {color} {toy} and wanted to play {at_place}.",
            "{N} woke up early. Today {he} would go to the {place} with {F}.",
        ],
        [
            "But big gray clouds came, and it began to rain.",
            "But the wind blew and blew, and it was very cold.",
        ],
        [
            '"Oh no," said {N}. "Now we cannot go out."',
            "{N} sat by the window and was sad.",
        ],
        [
            '"We can play here," said {his_relative}. They sang and danced.',
            "{F} the {animal} came in to get dry. They ate {food} and told stories.",
            "{His_cap} {relative} read {him} a book about a {size2} {animal}.",
        ],
        [
            "When the rain stopped, a rainbow stood over the {place}.",
            "Then the sun came out, and they ran outside.",
        ],
        [
            '"Look!" said {N}. "It is so pretty!"',
            "They jumped in the puddles and got very wet.",
            "It was the best day of all.",
        ],
    ],
}


def tell(rng: random.Random) -> str:
    """One story: a plot, its people and things, and a way to say each beat."""
    girl = rng.random() < 0.5
    size, size2 = rng.sample(SIZES, 2)
    hiding, hiding2 = rng.sample(HIDING, 2)
    name, friend = rng.choice(GIRLS if girl else BOYS), rng.choice(GIRLS + BOYS)
    while friend == name:
        friend = rng.choice(GIRLS + BOYS)
    relative = rng.choice(RELATIVES)
    place, at_place = rng.choice(list(PLACES.items()))
    words = {
        "N": name,
        "F": friend,
        "he": "she" if girl else "he",
        "He": "She" if girl else "He",
        "his": "her" if girl else "his",
        "him": "her" if girl else "him",
        "His_cap": "Her" if girl else "His",
        "his_relative": f"{'her' if girl else 'his'} {relative}",
        "kind": "girl" if girl else "boy",
        "relative": relative,
        "size": size,
        "size2": size2,
        "hiding": hiding,
        "hiding2": hiding2,
        "animal": rng.choice(CREATURES),
        "color": rng.choice(COLORS),
        "toy": rng.choice(TOYS),
        "food": rng.choice(FOODS),
        "place": place,
        "at_place": at_place,
        "glad": rng.choice(GLAD),
        "weather": rng.choice(WEATHER),
    }
    beats = [rng.choice(beat) for beat in PLOTS[rng.choice(sorted(PLOTS))]]
    met_friend = any("{F}" in beat for beat in beats)
    beats.append(rng.choice([moral for moral in MORALS if met_friend or "{F}" not in moral]))
    story = " ".join(filter(None, beats)).format(**words)
    return re.sub(r"\b([Aa]) (?=old\b)", r"\1n ", story)


def make_corpus(stories: int = STORIES, seed: int = SEED) -> str:
    """All stories, each different, separated by empty lines."""
    rng = random.Random(seed)
    told: dict[str, None] = {}
    while len(told) < stories:
        told[tell(rng)] = None
    return "\n\n".join(told) + "\n"


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Learns the merges; encoding puts BOS first, as Llama-3's tokenizer does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS}:1 $B:1",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return tokenizer


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The files of a Hugging Face tokenizer; no transformers needed.

    The class is named by hand: transformers 5 would write one that 4.x does not know.
    """
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode(),
    }


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Writes these files."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer_files(tokenizer).items():
        (directory / name).write_bytes(content)


if __name__ == "__main__":
    CORPUS.write_text(make_corpus(), encoding="utf-8")
    save_tokenizer(train_tokenizer(read_stories()), TOKENIZER)
