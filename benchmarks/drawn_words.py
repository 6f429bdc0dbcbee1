# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The words of the drawn scenes: how questions are phrased, what signs say, how bars are called; and texts without an image.

Of each question there are phrasings for training, before the bar, and others that only evaluation uses, after it.
"""

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

# Categories of which scenes count and relate things, with their plural: what belongs to them is never in doubt.
COUNTED = {"animal": "animals", "plant": "plants", "fruit": "fruits", "vegetable": "vegetables", "vehicle": "vehicles"}
COUNTED |= {
    "tool": "tools",
    "building": "buildings",
    "instrument": "instruments",
    "person": "people",
    "drink": "drinks",
}
# Category -> those whose things could be counted among it. Things without a category could be among any.
OVERLAPS = {
    "animal": {"face", "toy", "body part"},
    "plant": {"fruit", "vegetable", "landscape", "food"},
    "fruit": {"food", "vegetable", "plant", "drink"},
    "vegetable": {"food", "fruit", "plant"},
    "vehicle": {"ride", "machine", "toy", "sport", "furniture"},
    "tool": {"machine", "stationery", "weapon", "dish", "bathroom", "sport", "accessory", "instrument"},
    "building": {"landscape", "ride", "furniture"},
    "instrument": {"machine", "tool"},
    "person": {"face", "body part", "machine", "toy"},
    "drink": {"dish", "food", "bathroom"},
}

PHRASES = {
    "name": """What is this? / What does the picture show? / What do you see? / Name the thing in the picture. /
        What is it called? / Which thing is this?
        | What is shown here? / What can be seen in the image?""",
    "category": """What kind of thing is this? / Which category does it belong to? / What sort of thing do you see? /
        What is its category? / Which group of things is this part of?
        | What type of thing is shown here? / To which kind of things does this belong?""",
    "category at": """What kind of thing is in the {place}? / Which category does the thing in the {place} belong to? /
        What sort of thing do you see in the {place}? / Which kind of thing is drawn in the {place}?
        | What type of thing is shown in the {place}?""",
    "colour": """What colour {verb} the {thing}? / Which colour {verb} the {thing}? / Name the colour of the {thing}. /
        What is the main colour of the {thing}? / The {thing} {verb} what colour?
        | In which colour {verb} the {thing} drawn? / Tell me the colour of the {thing}.""",
    "colour of it": """What colour is it? / Which colour is this thing? / Name its colour. / What is its main colour?
        | In which colour is it drawn? / Tell me its colour.""",
    "count": """How many {things} are there? / How many {things} do you see? / Count the {things}. /
        What is the number of {things}? / How many {things} does the picture show?
        | How many {things} can you find? / How many {things} are in the image?""",
    "where": """Where {verb} the {thing}? / In which place {verb} the {thing}? / Where do you see the {thing}? /
        Which part of the picture shows the {thing}? / Where in the picture {verb} the {thing}?
        | In what part of the image {verb} the {thing}? / Where can I find the {thing}?""",
    "what at": """What is in the {place}? / What do you see in the {place}? / Which thing is in the {place}? /
        Name the thing in the {place}.
        | What is shown in the {place}? / What can be seen in the {place} of the image?""",
    "what beside": """What is {side} the {thing}? / Which thing is {side} the {thing}? / What do you see {side} the {thing}? /
        Name the thing {side} the {thing}.
        | What is shown {side} the {thing}? / What can be seen {side} the {thing}?""",
    "is beside": """{Verb} the {one} {side} the {other}? / Do you see the {one} {side} the {other}? /
        In the picture, {verb} the {one} {side} the {other}? / Would you find the {one} {side} the {other}?
        | Can the {one} be seen {side} the {other}?""",
    "presence": """Do you see {one}? / Does the picture show {one}? / Can you find {one}? /
        Does the picture have {one} in it? / Can you see {one} here?
        | Does the image contain {one}? / Could you point at {one} in the image?""",
    "sign": """What does the sign say? / What is written on the sign? / Read the sign. / Which text is on the sign? /
        What do you read on the sign?
        | What text does the sign show? / Read out what is written here.""",
    "word": """What is the {nth} word? / Which word comes {nth}? / Read the {nth} word on the sign. /
        What does the {nth} word say?
        | Which is the {nth} word of the text?""",
    "says": """Does the sign say {text}? / Is {text} written on the sign? / Do you read {text} on the sign? /
        Is the text on the sign {text}?
        | Does the text read {text}? / Is it {text} that the sign says?""",
    "sign colour": """What colour is the sign? / Which colour does the sign have? / Name the colour of the sign. /
        What is the colour of the sign?
        | In which colour is the sign painted?""",
    "which bar": """Which bar is the {most}? / What is the name of the {most} bar? / Name the {most} bar. /
        Which name stands below the {most} bar?
        | What is written under the {most} bar? / Which of the bars is the {most}?""",
    "bar colour": """What colour is the {most} bar? / Which colour does the {most} bar have? /
        Name the colour of the {most} bar. / The {most} bar has which colour?
        | In which colour is the {most} bar drawn?""",
    "named bar": """What colour is the bar of {name}? / Which colour does {name} have? / Name the colour of the bar {name}. /
        The bar of {name} has which colour?
        | In which colour is the bar of {name} drawn?""",
    "taller": """Is {one} taller than {other}? / Is the bar of {one} taller than {other}? /
        Is the bar {other} shorter than {one}? / Does {one} have a taller bar than {other}?
        | Is the bar of {one} higher than that of {other}?""",
}


def phrasings(form: str, held_out: bool) -> list[str]:
    """The phrasings of a form of question: for training, or the others."""
    training, _, others = PHRASES[form].partition("|")
    return [" ".join(text.split()) for text in (others if held_out else training).split("/")]


# Words on signs and names below bars.
WORDS = """
open closed push pull stop exit sale free milk tea shop park school bank hotel taxi bus train north south east west
left right up down hot cold fresh fish bread cheese apple juice water fire danger slow fast quiet please wait enter
here home garden street road bridge river lake beach hill city town market station music dance art book film news
sport game team win cup gold silver green blue red white black pink happy lucky big small new old good best nice sweet
sour salt sugar soup pizza cake pie ice cream lunch dinner summer winter spring monday friday sunday today now soon
early late day night morning sun moon star rain snow wind cloud tree leaf rose bird cat dog horse lion bear wolf duck
frog bike boat plane ship phone radio paper pen ink table chair lamp door key box bag hat coat shoe shirt ring clock
coin card map plan idea voice smile dream world peace love hope luck joy magic royal super first last next more less
only every keep clean dry safe turn look listen read write think play work rest sleep walk run jump swim ride drive
fly cook bake paint sing build fix move call send meet help share give take
"""
LABELS = """
Ann Ben Cleo Dan Eva Finn Gus Hana Ivan Jane Kurt Lea Max Nina Omar Pia Rosa Sam Tom Uma Vera Will Zoe Jan Feb Mar Apr
May Jun Jul Aug Sep Oct Nov Dec Mon Tue Wed Thu Fri Sat Sun tea milk juice rice corn wool coal iron oil gas cats dogs
cows pigs hens fish cars bikes ships trains red blue north south east west Rome Oslo Lima Cairo Paris Delhi Tokyo
Perth
"""


def text_turns() -> list[list[str]]:
    """Conversations without an image, as the messages of a user: 45 for training, then 15 that are held out."""
    return [[message.strip() for message in line.split(" // ")] for line in TEXTS.strip().splitlines()]


TRAINING_TEXTS = 45
TEXTS = """
What is the capital of Italy?
How many days does a week have?
Why is the sky blue?
Explain in one sentence what photosynthesis is.
Who wrote Romeo and Juliet?
What is the largest planet of the solar system?
What is 7 plus 15?
What is 12 times 3?
If I have 10 apples and give away 4, how many are left?
List three fruits that are yellow.
List five animals that live in the sea.
Name four tools that a carpenter uses.
Give me a list of things to pack for a weekend in the mountains.
Rewrite this sentence politely: Give me the book.
Rewrite in the past tense: She walks to school and meets her friends.
Correct the grammar: He don't like no vegetables.
Make this shorter: I am writing to you in order to ask whether you would be able to come to the meeting on Monday.
Translate "good morning" into French.
Write a short poem about the sea.
Write a two-sentence story about a lost dog.
Write a thank-you note to a neighbour who watered my plants.
Write a Python function that adds two numbers.
Write a Python loop that prints the numbers from 1 to 10.
What does the HTML tag <p> do?
What is a variable in programming?
How do I sleep better at night?
Give me some advice for a job interview.
How can I learn to cook?
I feel nervous before exams. What can I do?
What should I do if I miss my train?
Explain to a child what the moon is.
What is the difference between a lake and a river?
Compare cats and dogs as pets.
What are the advantages of riding a bicycle?
Summarize the story of Cinderella in three sentences.
What is the opposite of "generous"?
Give a synonym for "quick".
Use the word "bridge" in a sentence.
Is water wet? Answer briefly.
Hello! How are you today?
What can you help me with?
What is the boiling point of water? // And in Fahrenheit?
Suggest a name for a small bakery. // Why did you choose it? // Suggest another one.
Tell me a fun fact about elephants. // Is that true for all elephants?
I want to plant a garden. // Which vegetables are easy for beginners? // How often should I water them?
What is the capital of Japan?
How many months have 31 days?
Who painted the Mona Lisa?
What is 9 times 8?
List four musical instruments.
Rewrite this sentence in a formal tone: Hey, can you send me that stuff?
Write a haiku about winter.
Write a short email that asks for a day off.
Write a Python function that returns the largest number of a list.
How do I stay focused while studying?
Explain what gravity is in simple words.
What is the difference between a fruit and a vegetable?
Give me three ideas for a birthday present for my sister.
What is a healthy breakfast? // I do not like eggs. What else could I eat?
Tell me a joke. // Tell me another one.
"""
