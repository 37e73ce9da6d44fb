"""Classes of IconWorld: kinds of things by Unicode's subgroups, which are held out, and what each looks like."""

from __future__ import annotations

import hashlib

KINDS: dict[str, tuple[str, ...]] = {
    "smiling face": ("face-smiling", "face-affection"),
    "worried face": ("face-concerned",),
    "doubtful face": ("face-neutral-skeptical",),
    "sick face": ("face-unwell",),
    "heart": ("heart",),
    "comic symbol": ("emotion",),
    "hand": ("hand-fingers-open", "hand-fingers-partial", "hand-single-finger", "hand-fingers-closed", "hands"),
    "gesturing person": ("person-gesture",),
    "professional": ("person-role",),
    "active person": ("person-activity",),
    "athlete": ("person-sport",),
    "mammal": ("animal-mammal",),
    "bird": ("animal-bird",),
    "sea animal": ("animal-marine",),
    "insect": ("animal-bug",),
    "flower": ("plant-flower",),
    "plant": ("plant-other",),
    "fruit": ("food-fruit",),
    "vegetable": ("food-vegetable",),
    "meal": ("food-prepared",),
    "asian food": ("food-asian",),
    "dessert": ("food-sweet",),
    "drink": ("drink",),
    "landscape": ("place-geographic",),
    "building": ("place-building", "place-religious"),
    "sight": ("place-other",),
    "vehicle": ("transport-ground",),
    "aircraft": ("transport-air",),
    "clock": ("time",),
    "weather": ("sky-weather",),
    "celebration": ("event",),
    "sport": ("sport",),
    "game": ("game",),
    "clothing": ("clothing",),
    "sound": ("sound", "music"),
    "electronic device": ("computer", "phone"),
    "camera or light": ("light-video",),
    "book": ("book-paper",),
    "money": ("money",),
    "mail": ("mail",),
    "office supply": ("office", "writing"),
    "tool": ("tool",),
    "household item": ("household",),
    "sign": ("transport-sign", "warning"),
    "religious symbol": ("religion",),
    "zodiac sign": ("zodiac",),
}
"""The classes, and the subgroups that make each."""

HELD_OUT: dict[str, tuple[str, ...]] = {
    "reptile": ("animal-reptile", "animal-amphibian"),
    "cat face": ("cat-face",),
    "fantasy being": ("person-fantasy", "face-costume"),
    "body part": ("body-parts",),
    "dishware": ("dishware",),
    "map": ("place-map",),
    "boat": ("transport-water",),
    "medal": ("award-medal",),
    "art": ("arts-crafts",),
    "musical instrument": ("musical-instrument",),
    "lock": ("lock",),
    "science": ("science",),
    "medicine": ("medical",),
}
"""Kinds that are no class: the near OOD set."""

OTHERS: dict[str, tuple[str, ...]] = {
    "silly face": ("face-tongue", "face-hat", "face-glasses"),
    "face with a hand": ("face-hand",),
    "sleepy face": ("face-sleepy",),
    "angry face": ("face-negative",),
    "monkey face": ("monkey-face",),
    "hand with an object": ("hand-prop",),
    "person": ("person", "person-resting", "person-symbol"),
    "family": ("family",),
    "hotel": ("hotel",),
    "object": ("other-object",),
    "arrow": ("arrow",),
    "player button": ("av-symbol",),
    "math symbol": ("math", "gender", "currency"),
    "punctuation mark": ("punctuation",),
    "symbol": ("other-symbol",),
    "number": ("keycap",),
    "letters": ("alphanum",),
    "geometric shape": ("geometric",),
    "flag": ("flag",),
}
"""Kinds that pre-training has words for, and no set shows."""

TEMPLATES = ("a drawing of a {}", "an icon of a {}", "{} icon", "an emoji of a {}", "{}")

DESCRIPTIONS: dict[str, tuple[str, ...]] = {
    "active person": ("a person walking or running", "a body with two legs, running"),
    "aircraft": ("wings and a long body in the sky", "a machine to fly with"),
    "asian food": ("rice in a bowl with chopsticks", "food on a stick or in a box"),
    "athlete": ("a person with a ball or on a bike", "a body in sport clothing, running"),
    "bird": ("a beak, wings and a feather", "an animal with two legs and wings to fly"),
    "book": ("a white page with text", "paper in a closed or open cover"),
    "building": ("a wall with a window and a door", "a high house or tower"),
    "camera or light": ("a round glass in a black box", "a bright light in the dark"),
    "celebration": ("a decoration with ribbon and sparkles", "a gift, balloon or tree for a party"),
    "clock": ("a round face with two hands", "sand in a glass"),
    "clothing": ("clothes for the body", "a shoe, hat, dress or shirt"),
    "comic symbol": ("a speech bubble with a tail", "a star or a flash of fire"),
    "dessert": ("cream and chocolate on a cake", "a sweet food with sugar"),
    "doubtful face": ("a yellow face with a flat mouth", "a round face with eyes looking to the side"),
    "drink": ("liquid in a glass or a cup", "a bottle or mug with a hot or cold beverage"),
    "electronic device": ("a monitor with keys", "a machine with a button and a plug"),
    "flower": ("a pink or red blossom with a yellow middle", "a blossom with a green leaf"),
    "fruit": ("a round red or green shape with a leaf", "sweet food from a tree"),
    "game": ("a card, die or puzzle to play with", "a toy for a child"),
    "gesturing person": ("a person with an arm up", "a head and a raised hand"),
    "hand": ("fingers and a thumb", "a palm or a fist"),
    "heart": ("a red or pink sign with a point", "a red sign of love"),
    "household item": ("an object to clean with", "a chair, bed or bath in a room of a home"),
    "insect": ("six legs and two antenna", "a small bug with wings"),
    "landscape": ("a mountain or a beach under the sky", "land with sand, tree and water"),
    "mail": ("a white envelope", "a box for letters"),
    "mammal": ("a hairy animal with four legs", "a face with ears, nose and whiskers"),
    "meal": ("cooked meat or bread on a plate", "hot food to eat with a fork"),
    "money": ("a round gold coin or paper with a dollar sign", "cash in a bag"),
    "office supply": ("paper with a clip or a chart", "a pencil or a folder for work"),
    "plant": ("a green leaf", "a tree with a brown trunk"),
    "professional": ("a person in uniform with a hat", "a head with a hat and clothing of a job"),
    "religious symbol": ("a white cross or star in a purple square", "a sign of a religion"),
    "sea animal": ("a fish with a tail in the water", "an animal with a shell or tentacles"),
    "sick face": ("a green or white face with a mask", "a face with thermometer or bandage"),
    "sight": ("a city at night with stars", "a tent or wheel for people on a holiday"),
    "sign": ("a blue square with a white man", "a red circle with a line"),
    "smiling face": ("a yellow face with a big smile", "happy eyes and an open mouth"),
    "sound": ("a speaker with waves", "notes of music, or a bell"),
    "sport": ("a round ball", "a stick, net or shoe to play with"),
    "tool": ("metal with a handle", "an object to hit, cut or turn with"),
    "vegetable": ("a green leaf and an orange root", "a plant from the garden to cook"),
    "vehicle": ("two wheels and a window", "a car, bus or train on a road"),
    "weather": ("a cloud with rain or the sun", "the moon, stars or snow"),
    "worried face": ("a yellow face with a sad mouth", "eyes with tears"),
    "zodiac sign": ("a white symbol in a purple square", "a line for a sign of stars"),
}
"""What drawings of each class show, in words for DRM: no word about studios or styles."""

ADJECTIVES = (
    "ancient", "angular", "black", "blank", "blurred", "broken", "circular", "colorful", "crossed", "curved",
    "dark", "dotted", "empty", "filled", "flat", "folded", "framed", "golden", "gray", "hollow", "narrow", "outlined",
    "plain", "rounded", "sharp", "square", "striped", "symmetric", "transparent", "triangular", "white", "wooden",
)  # fmt: skip
SUPERCLASSES = ("object", "creature", "place", "machine", "shape", "pattern", "material")
"""For negative texts by CSP's recipe: "striped object", and so on. They name no kind and none of the OOD sets."""

SUBGROUPS = {group: kind for kind, groups in (KINDS | HELD_OUT | OTHERS).items() for group in groups}
"""The kind of each subgroup that has one."""


def place(*key: str) -> float:
    """A number in [0, 1) that only depends on the key: orders and splits by it stay when drawings are added."""
    digest = hashlib.sha256("\0".join(key).encode()).digest()
    return int.from_bytes(digest[:8], "little") / 2**64
