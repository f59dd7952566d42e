"""The words of the preference world: what people ask about, and the sentences that replies are made of.

A detail is a concrete piece of advice in the base form of its verb ("water the roots at dawn"), so that any lead can
stand before it ("I would ...", "It helps to ..."). Details hold no comma and no full stop; each has one subject.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Subject:
    """One thing people ask about."""

    noun: str  # named in every prompt about it; reads well after "your"
    family: str  # key of REASONS
    goals: tuple[str, ...]  # each contains the noun and reads well after "how can I"
    details: tuple[str, ...]


def _subject(noun: str, family: str, goals: str, details: str) -> Subject:
    return Subject(noun, family, tuple(g.replace("~", noun) for g in goals.split(" | ")), tuple(details.split(" | ")))


SUBJECTS: tuple[Subject, ...] = (
    _subject(
        "tomatoes",
        "garden",
        "grow ~ | keep ~ healthy | plant ~ in pots",
        "water the roots at dawn | tie the stems to a tall cane | pick off the yellow leaves"
        " | feed them every second week | choose a pot of ten litres | give them six hours of sun",
    ),
    _subject(
        "roses",
        "garden",
        "grow ~ | prune ~ | keep ~ free of greenfly",
        "cut the stems above a bud | spread manure in early spring | spray the leaves with soapy water"
        " | dig a hole two feet deep | remove the faded blooms | let air pass between the bushes",
    ),
    _subject(
        "lawn",
        "garden",
        "look after a ~ | start a new ~ | mend a patchy ~",
        "mow it twice a week | sow fresh seed in april | rake out the dead moss"
        " | leave the grass three inches tall | poke holes with a garden fork | water it once a week",
    ),
    _subject(
        "herbs",
        "garden",
        "grow ~ | dry ~ | keep ~ on a windowsill",
        "sow basil under glass | trim the mint every few days | hang thyme upside down to dry"
        " | mix sand into the soil | turn the pots toward the light | pick the leaves before noon",
    ),
    _subject(
        "compost",
        "garden",
        "make ~ | start a ~ heap | keep ~ from smelling",
        "add dry leaves to the kitchen scraps | turn the heap every sunday | keep meat out of the bin"
        " | cover it with an old carpet | chop the stalks into short pieces | wet it when it looks dusty",
    ),
    _subject(
        "bread",
        "kitchen",
        "bake ~ | make better ~ | keep ~ fresh",
        "knead the dough for ten minutes | let it rise overnight in the fridge | bake it in a hot iron pot"
        " | weigh the flour on a scale | add a spoon of salt | cool the loaf on a rack",
    ),
    _subject(
        "soup",
        "kitchen",
        "cook ~ | make a thick ~ | give ~ more taste",
        "fry the onions until they are golden | simmer the stock for an hour | add a handful of red lentils"
        " | blend half of the vegetables | squeeze a lemon over it | roast the carrots first",
    ),
    _subject(
        "pasta",
        "kitchen",
        "cook ~ | make fresh ~ | choose a sauce for ~",
        "salt the boiling water well | save a cup of the cooking water | toss it with garlic and oil"
        " | roll the sheets very thin | grate some old cheese on top | drain it one minute early",
    ),
    _subject(
        "coffee",
        "kitchen",
        "brew ~ | buy good ~ | make ~ less bitter",
        "grind the beans just before brewing | pour the water slowly in circles | use water below the boil"
        " | store the beans in a sealed tin | rinse the paper filter | weigh fifteen grams a cup",
    ),
    _subject(
        "guitar",
        "music",
        "learn the ~ | practise the ~ | buy a first ~",
        "play three chords every evening | tune the strings before you start | use a slow metronome"
        " | cut your nails short | learn one song by heart | change the strings each month",
    ),
    _subject(
        "piano",
        "music",
        "learn the ~ | practise the ~ | pick a teacher for the ~",
        "play each hand on its own | keep your wrists level | repeat the hard bars slowly"
        " | read one new page a day | sit at the height of the keys | count the beats aloud",
    ),
    _subject(
        "marathon",
        "sport",
        "train for a ~ | run a ~ | recover from a ~",
        "run ten miles every sunday | rest two days a week | eat porridge three hours before"
        " | buy shoes half a size larger | drink at every second mile | stretch your calves after each run",
    ),
    _subject(
        "swimming",
        "sport",
        "get better at ~ | start ~ | plan a ~ routine",
        "breathe out under the water | kick from the hips | swim eight lengths without a break"
        " | wear goggles that fit | go to the pool on tuesdays | keep your head in line",
    ),
    _subject(
        "bicycle",
        "sport",
        "repair a ~ | choose a ~ | ride a ~ to work",
        "oil the chain once a month | pump the tyres every week | carry a spare tube"
        " | raise the saddle to your hip | fit two bright lights | check the brakes before hills",
    ),
    _subject(
        "football team",
        "sport",
        "coach a ~ | start a ~ | cheer up a losing ~",
        "meet for training on fridays | let every child play | practise short passes in pairs"
        " | bring oranges at half time | set one clear goal a match | thank the parents by name",
    ),
    _subject(
        "puppy",
        "animals",
        "train a ~ | welcome a new ~ | stop a ~ from biting",
        "reward it with tiny bits of cheese | take it out after every meal | offer a rubber toy"
        " | keep the lessons under five minutes | let it sleep in a crate | say its name before each word",
    ),
    _subject(
        "cat",
        "animals",
        "look after a ~ | calm a nervous ~ | move house with a ~",
        "put a box on a high shelf | brush the fur on sundays | scoop the tray twice a day"
        " | play with a feather at dusk | leave an old shirt in its bed | keep it in one room at first",
    ),
    _subject(
        "aquarium",
        "animals",
        "set up an ~ | clean an ~ | choose fish for an ~",
        "change a fifth of the water | let the tank run for a month | rinse the sponge in old water"
        " | add live plants at the back | feed a pinch once a day | test the water with strips",
    ),
    _subject(
        "trip to Rome",
        "travel",
        "plan a ~ | save money on a ~ | enjoy a ~",
        "book the forum tickets online | walk along the river at night | eat lunch near the market"
        " | take the early train from the airport | visit the old harbour by bus | stay close to the station",
    ),
    _subject(
        "camping holiday",
        "travel",
        "plan a ~ | pack for a ~ | enjoy a ~",
        "pitch the tent on high ground | pack a warm woollen hat | bring a small gas stove"
        " | hang the food in a tree | test the torch at home | lay a sheet under the tent",
    ),
    _subject(
        "suitcase",
        "travel",
        "pack a ~ | choose a ~ | fit everything in a ~",
        "roll the shirts into tight tubes | put socks inside the shoes | weigh it on the bathroom scale"
        " | tie a red ribbon to the handle | keep the medicine on top | pack three colours that match",
    ),
    _subject(
        "job interview",
        "work",
        "prepare for a ~ | stay calm in a ~ | follow up after a ~",
        "read the firm's last report | practise two short stories aloud | arrive fifteen minutes early"
        " | ask about the first ninety days | send a short note next day | lay out your clothes at night",
    ),
    _subject(
        "speech",
        "work",
        "write a ~ | give a ~ | open a ~",
        "start with a short story | write three points on a card | look at the back row"
        " | pause after each main idea | time it with a kitchen clock | finish with one clear wish",
    ),
    _subject(
        "budget",
        "work",
        "make a ~ | keep to a ~ | plan a family ~",
        "write down every bill for a month | pay the rent on the first | move a tenth into savings"
        " | use cash for treats | cancel what you never watch | check the list on sundays",
    ),
    _subject(
        "old sofa",
        "home",
        "clean an ~ | repair an ~ | sell an ~",
        "vacuum under the cushions | rub the stains with white vinegar | staple new cloth over the frame"
        " | take photos in daylight | fill the seat with firm foam | tighten the screws in the legs",
    ),
    _subject(
        "kitchen sink",
        "home",
        "unblock a ~ | clean a ~ | replace a ~",
        "pour soda and vinegar down the drain | place a bucket under the trap | turn off the water valve"
        " | use a rubber plunger | scrub the steel with half a lemon | seal the rim with silicone",
    ),
    _subject(
        "wooden table",
        "home",
        "build a ~ | polish a ~ | mend a ~",
        "sand it along the grain | glue the joints and clamp them | rub in two coats of oil"
        " | measure the legs twice | wipe the dust with a damp cloth | drill a hole before each screw",
    ),
    _subject(
        "French",
        "study",
        "learn ~ | practise ~ | remember more ~",
        "learn ten words a day | label the things in your home | listen to the radio at breakfast"
        " | write a diary of three lines | talk to a partner on mondays | read a book for children",
    ),
    _subject(
        "chess",
        "study",
        "learn ~ | get better at ~ | teach ~ to a child",
        "solve five puzzles a day | castle before move ten | control the four centre squares"
        " | go over each lost game | play slow games with a clock | learn the rook endings",
    ),
    _subject(
        "maths exam",
        "study",
        "prepare for a ~ | stop worrying about a ~ | pass a ~",
        "do two old papers a week | write each formula on a card | sleep eight hours the night before"
        " | start with the easy marks | check the units in every answer | explain the proof to a friend",
    ),
    _subject(
        "birthday party",
        "people",
        "plan a ~ | host a ~ | save money on a ~",
        "send the invitations three weeks ahead | bake one large sponge cake | hang paper chains in the hall"
        " | ask each guest to bring a dish | plan a treasure hunt outside | borrow chairs from next door",
    ),
    _subject(
        "wedding",
        "people",
        "plan a ~ | dress for a ~ | make a ~ feel personal",
        "book the hall a year ahead | choose flowers that are in season | seat the old friends together"
        " | hire a small jazz band | write your own vows | serve the meal on long tables",
    ),
)

REASONS: dict[str, tuple[str, ...]] = {
    "garden": ("so the roots stay strong", "because plants hate sudden change", "so the soil stays rich"),
    "kitchen": ("so the taste comes through", "because heat does the rest", "so nothing gets soggy"),
    "music": ("so your ear learns too", "because small steps last", "so the sound stays clear"),
    "sport": ("so your body can adapt", "because tired legs get hurt", "so you keep your strength"),
    "animals": ("so it feels safe", "because animals love a routine", "so it stays in good health"),
    "travel": ("so you lose no time", "because plans often change", "so the first day is easy"),
    "work": ("so the main point is clear", "because nerves need a plan", "so nothing takes you by surprise"),
    "home": ("so the surface stays smooth", "because rushed work looks rough", "so it lasts for years"),
    "study": ("so it stays in your memory", "because little and often wins", "so you can see your progress"),
    "people": ("so everyone feels welcome", "because guests notice the care", "so you can enjoy the day"),
}

SITUATIONS: tuple[str, ...] = (
    "on a tight budget",
    "in a small flat",
    "with two young children",
    "for the first time",
    "with very little time",
    "during the winter",
    "before the weekend",
    "as a complete beginner",
    "with a sore back",
    "after a long illness",
    "without any help",
    "in a noisy city",
    "while working nights",
    "with a nervous friend",
    "far from any shops",
    "in very hot weather",
)

# Prompts: greeting + style. {goal} reads after "how can I"; {situation} is one of the above.
GREETINGS: tuple[str, ...] = ("", "", "Hello! ", "Hi there. ", "Good morning. ")
STYLES: tuple[str, ...] = (
    "How can I {goal} {situation}?",
    "How do I {goal} {situation}?",
    "Please tell me how to {goal} {situation}.",
    "What is the best way to {goal} {situation}?",
    "I want to {goal} {situation}. Any advice?",
    "Can you help me {goal} {situation}?",
    "What do you recommend if I want to {goal} {situation}?",
    "I need to {goal} {situation}. What should I do?",
    "Could you explain how to {goal} {situation}?",
    "My sister hopes to {goal} {situation}. Any tips?",
    "Is it hard to {goal} {situation}?",
    "I have to {goal} {situation}. Where do I start?",
)

POLITE: tuple[str, ...] = (
    "Good question.",
    "Happy to help.",
    "Thank you for asking.",
    "That is a lovely plan.",
    "What a nice idea.",
    "I am glad you asked.",
    "Of course, with pleasure.",
    "Thanks for your message.",
    "You have come to the right place.",
    "It is kind of you to ask.",
)
RUDE: tuple[str, ...] = (
    "That is a silly question.",
    "Look it up yourself.",
    "I do not really care.",
    "Why would you ask me that?",
    "You should know this by now.",
    "Stop wasting my time.",
    "Whatever.",
)
VAGUE: tuple[str, ...] = (
    "There are many things you can do.",
    "It depends on a lot of things.",
    "Just do your best.",
    "Some people like it.",
    "You can find tips about that somewhere.",
    "It is what it is.",
    "There are good ways and bad ways.",
    "Things usually work out in the end.",
    "You could try something.",
    "It can be good or bad.",
)
LEADS: tuple[str, ...] = (
    "I would",
    "You could",
    "It helps to",
    "Try to",
    "Remember to",
    "A good start is to",
    "Be sure to",
    "I suggest that you",
    "My advice is to",
    "You may want to",
)
TOPIC_LEADS: tuple[str, ...] = ("For your {noun},", "With your {noun},", "As for your {noun},")
FITS: tuple[str, ...] = (
    "This works {situation}.",
    "It can be done {situation}.",
    "That is possible even {situation}.",
    "People manage this {situation}.",
)
CLOSINGS: tuple[str, ...] = (
    "I hope that helps.",
    "Let me know how it goes.",
    "Good luck with your {noun}!",
    "Enjoy your {noun}!",
    "Have fun with it!",
    "Feel free to ask again.",
    "I wish you all the best.",
    "Take care and enjoy it.",
    "You will do well.",
    "Write to me if you get stuck.",
)
