"""A user's function in a process of its own: one JSON line in, one JSON line out, until the input ends.

    python -m rlhf_ray.rewards.function_worker package.module:function

    out  {"ready": true, "needed": names, "welcome": names, "everything": true or false}, the columns it asks for,
         or {"refused": sentence}                           once, after the import
    in   {"prompt": text, "response": text, "columns": {name: value}}
    out  {"score": number} or {"raised": sentence} or {"returned": text}

What the function prints goes to standard error; the answers have a pipe that it does not know. They are JSON, so
nothing that this process writes can run code in its reader. Light imports keep the start under a second.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from rlhf_ray.config.columns import asked_by
from rlhf_ray.config.user_functions import import_function
from rlhf_ray.errors import UserError
from rlhf_ray.rewards.returned import NotNumbers, numbers_of, shown_error

PARENT_POLL_S = 1.0


def main(path: str) -> None:
    requests, answers = _private_pipes()
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    _be_first_without_memory()

    def say(answer: dict) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        function = import_function(path)
    except UserError as error:
        say({"refused": str(error)})
        return
    asked = asked_by(function)
    say({"ready": True, "needed": asked.needed, "welcome": asked.welcome, "everything": asked.everything})
    for line in requests:
        say(answer_to(function, json.loads(line)))


def answer_to(function: Callable, request: dict) -> dict:
    """Call the function on one sample."""
    try:
        columns = {name: [value] for name, value in request["columns"].items()}
        scores = function([request["prompt"]], [request["response"]], **columns)
    except Exception as error:  # fault boundary: the user's code may raise anything
        return {"raised": shown_error(error)}
    try:
        (score,) = numbers_of(scores, 1)
    except NotNumbers as wrong:
        return {"returned": str(wrong)}
    return {"score": score}


def _private_pipes():
    """Standard input and output under other numbers; 0 is empty and 1 is standard error from now on."""
    requests, answers = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return requests, answers


def _end_with(parent: int) -> None:
    """End with the parent: a function that hangs would outlive an actor that was killed."""
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_S)
    os._exit(1)


def _be_first_without_memory() -> None:
    """When memory runs out, Linux ends this process rather than the actor."""
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


if __name__ == "__main__":
    main(sys.argv[1])
