# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The form in which answers are compared: that of the VQA evaluation, and those derived from it."""

import re


NUMBERS = {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())  # noqa: SIM905
}
NUMBERS["none"] = "0"
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

# A number such as 1,000 anywhere in a text, and punctuation disappears everywhere in it.
IN_A_NUMBER = re.compile(r"\d,\d")
# Meant for dots that no digit is beside. As the scripts write it, the digit in front is not looked at; and the flag that they
# give is taken for the number of dots to remove, so that a 33rd one stays.
DOT = re.compile(r"\.(?!\d)")
MOST_DOTS = int(re.UNICODE)

# What a word stands for that lacks one of its apostrophes.
CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's "
    "how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock "
    "oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd "
    "someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's "
    "they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's "
    "where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've "
    "y'all y'all'll y'all'd've you'd you'd've you'll you're you've"
)


def _expansions(apostrophe: str = "'", straight: tuple[str, ...] = ()) -> dict[str, str]:
    """What to write for contractions, with `apostrophe` in all but those of `straight`."""
    table = {f"somebody{apostrophe}d": "somebodyd"}
    for word in CONTRACTIONS.split():
        written = word if word in straight else word.replace("'", apostrophe)
        for place, character in enumerate(word):
            if character == "'":
                table[written[:place] + written[place + 1 :]] = written
    return table


EXPANSIONS = _expansions()
# In VizWiz' script most apostrophes have become typographic ones, in what is looked for and in what it stands for.
TYPOGRAPHIC = "\N{RIGHT SINGLE QUOTATION MARK}"
VIZWIZ_EXPANSIONS = _expansions(
    TYPOGRAPHIC, ("ain't", "aren't", "can't", "could've", "couldn't", "we've", "where's", "who've")
)
for _word in ("couldn'tve", "hadn'tve"):  # there it is looked for as it is here
    VIZWIZ_EXPANSIONS[_word] = VIZWIZ_EXPANSIONS.pop(_word.replace("'", TYPOGRAPHIC))


def without_punctuation(text: str) -> str:
    """`text` without punctuation marks: each is removed if a space is beside one of its kind, else it becomes a space."""
    number = IN_A_NUMBER.search(text) is not None
    out = text
    for mark in PUNCTUATION:
        removed = number or f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if removed else " ")
    return DOT.sub("", out, count=MOST_DOTS)


def in_plain_words(text: str, expansions: dict[str, str] = EXPANSIONS) -> str:
    """`text` in lower case, with digits for the numbers up to ten, without articles, with apostrophes in contractions."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(expansions.get(word, word) for word in words if word not in ARTICLES)


def on_one_line(text: str) -> str:
    """`text` with spaces for line breaks and tabs, without those around it."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def vqa_answer(text: str, expansions: dict[str, str] = EXPANSIONS) -> str:
    """`text` as the VQA evaluation compares it (`processPunctuation` and `processDigitArticle` of its `vqaEval.py`)."""
    return in_plain_words(without_punctuation(on_one_line(text)), expansions)


def m4c_answer(text: str) -> str:
    """`text` as M4C's `EvalAIAnswerProcessor` makes it, which TextVQA is scored with, and which LLaVA applies to answers
    before it submits them to the servers of VQAv2 and VizWiz."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return vqa_answer(text.strip())
