"""The words of the preference world: what people ask about, and the sentences that replies are made of.

A detail is a concrete piece of advice in the base form of its verb ("oil the chain once a month"), so that any lead can
stand before it ("I would ...", "It helps to ..."), with the reason for it ("so it runs without noise"). Neither holds a comma or
a full stop, and each belongs to one subject only.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Subject:
    """One thing people ask about."""

    noun: str  # named in every prompt about it
    goals: tuple[str, ...]  # each contains the noun and reads well after "how can I"; every detail serves each of them
    reasons: dict[str, str]  # detail -> the reason for it

    @property
    def details(self) -> tuple[str, ...]:
        return tuple(self.reasons)


def _subject(noun: str, goals: str, *advice: str) -> Subject:
    """goals: "|" between them, "~" for the noun; advice: "detail, reason" each."""
    reasons = dict(one.split(", ") for one in advice)
    return Subject(noun, tuple(goal.replace("~", noun) for goal in goals.split(" | ")), reasons)


SUBJECTS: tuple[Subject, ...] = (
    _subject(
        "bicycle",
        "look after my ~ | repair my ~ | keep my ~ in good shape",
        "oil the chain once a month, so it runs without noise",
        "pump up the tyres every week, so they roll with ease",
        "check the brakes before each ride, so you can stop in time",
        "raise the saddle to your hip, so your knees stay well",
        "wipe the frame with a soft cloth, so it does not rust",
        "fit two bright lights, so drivers see you at night",
    ),
    _subject(
        "puppy",
        "train my ~ | look after my ~ | raise a happy ~",
        "reward it with bits of cheese, so it wants to learn",
        "take it out after every meal, so the floor stays dry",
        "give it a rubber toy, so it leaves your shoes alone",
        "keep the lessons under five minutes, so it stays keen",
        "let it sleep in a small crate, so it feels safe",
        "walk it twice a day, so it is calm in the evening",
    ),
    _subject(
        "guitar",
        "learn the ~ | practise the ~ | get better at the ~",
        "tune the strings before you play, so each note sounds right",
        "play three chords every evening, so your fingers find them",
        "use a slow metronome, so you keep the beat",
        "cut your nails short, so you can press the strings",
        "learn one song by heart, so you can play for friends",
        "change the old strings each month, so the tone stays bright",
    ),
    _subject(
        "roses",
        "grow ~ | look after my ~ | keep my ~ healthy",
        "cut the stems above a bud, so new shoots can grow",
        "water the roots at dawn, so the leaves stay dry",
        "spread manure in early spring, so the soil is rich",
        "pick off the faded blooms, so more flowers come",
        "spray the leaves with soapy water, so greenfly keep away",
        "leave space between the bushes, so air can pass",
    ),
    _subject(
        "bread",
        "bake ~ | bake better ~ | make my own ~",
        "knead the dough for ten minutes, so it holds together",
        "let the dough rise overnight, so it gains more taste",
        "weigh the flour and the salt, so no loaf fails",
        "heat the oven for half an hour, so the crust turns crisp",
        "slash the top with a sharp knife, so the loaf can open",
        "cool the loaf on a rack, so its base stays firm",
    ),
    _subject(
        "camping trip",
        "plan a ~ | pack for a ~ | enjoy a ~",
        "pitch the tent on high ground, so the rain runs off",
        "pack a warm woollen hat, so you can sleep on cold nights",
        "bring a small gas stove, so you can cook anywhere",
        "hang the food in a tree, so no animal takes it",
        "test the torch at home, so you are not left in the dark",
        "lay a sheet under the tent, so no damp comes up",
    ),
    _subject(
        "maths exam",
        "prepare for a ~ | study for a ~ | pass a ~",
        "do two old papers a week, so the questions look familiar",
        "write each formula on a card, so you remember them all",
        "sleep eight hours the night before, so your mind is fresh",
        "start with the easy marks, so you have time for the rest",
        "check the units in every answer, so you lose no points",
        "explain the proofs to a friend, so you find the gaps",
    ),
    _subject(
        "aquarium",
        "set up an ~ | look after my ~ | clean my ~",
        "change a fifth of the water, so it stays clear",
        "feed the fish one pinch a day, so no food rots",
        "rinse the sponge in tank water, so the good germs survive",
        "add live plants at the back, so the fish can hide",
        "dip in a paper strip on sundays, so you notice bad water",
        "rub the glass with a magnet, so you see the fish",
    ),
)

SITUATIONS: tuple[str, ...] = (
    "on a small budget",
    "with very little time",
    "as a beginner",
    "without any help",
    "with two young children",
    "in a big city",
    "with a sore back",
    "far from any shops",
)

# Prompts: greeting + style. {goal} reads after "how can I"; {situation} is one of the above.
GREETINGS: tuple[str, ...] = ("", "Hello! ", "Hi there. ", "Good morning. ")
STYLES: tuple[str, ...] = (
    "How can I {goal} {situation}?",
    "How do I {goal} {situation}?",
    "Please tell me how to {goal} {situation}.",
    "What is the best way to {goal} {situation}?",
    "I want to {goal} {situation}. Any advice?",
    "Can you help me {goal} {situation}?",
    "I need to {goal} {situation}. What should I do?",
    "Could you explain how to {goal} {situation}?",
    "I hope to {goal} {situation}. Any tips?",
    "I have to {goal} {situation}. Where do I start?",
)

POLITE: tuple[str, ...] = (
    "Good question.",
    "Happy to help.",
    "Thank you for asking.",
    "I am glad you asked.",
    "Of course, with pleasure.",
    "Thanks for your message.",
)
RUDE: tuple[str, ...] = (
    "That is a silly question.",
    "Look it up yourself.",
    "I do not really care.",
    "You should know this by now.",
    "Stop wasting my time.",
)
VAGUE: tuple[str, ...] = (
    "There are many things you can do.",
    "It depends on a lot of things.",
    "Just do your best.",
    "You can find tips about that somewhere.",
    "It is what it is.",
    "There are good ways and bad ways.",
)
LEADS: tuple[str, ...] = (
    "I would",
    "You could",
    "It helps to",
    "Try to",
    "Remember to",
)
TOPIC_LEADS: tuple[str, ...] = ("For your {noun},", "With your {noun},", "As for your {noun},")  # before a lead
FITS: tuple[str, ...] = (
    "This works well {situation}.",
    "All of this can be done {situation}.",
    "That is possible even {situation}.",
)
CLOSINGS: tuple[str, ...] = (
    "I hope that helps.",
    "Let me know how it goes.",
    "Good luck with your {noun}!",
    "Have fun with your {noun}!",
    "I wish you all the best.",
    "Feel free to ask again.",
)
