"""Scoring functions as a user writes them, in a module that imports nothing heavy: for processes of their own."""

import time


def brevity(prompts, responses):
    """Minus the letters; too late for every fifth length."""
    (response,) = responses
    time.sleep(5.0 if len(response) % 5 == 0 else 0.0)
    return [-float(len(response))]


def shortest(prompts, responses):
    return [-float(len(response)) for response in responses]


def answer_of_row(prompts, responses, *, answer):
    return list(answer)
