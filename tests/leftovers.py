"""What a test may not leave changed for those that come after it. `conftest` looks after each test and after each file."""

import os
import signal
import sys
from collections.abc import Mapping, MutableSequence, MutableSet

#: New variables that count: those that the package, torch and the Hugging Face libraries read. Others a library sets for itself.
READ = ("RLHF_RAY_", "RAY_AUTH", "HF_", "TRANSFORMERS_", "TOKENIZERS_", "DS_", "OMP_", "CUDA_", "MASTER_", "RANK",
        "LOCAL_RANK", "WORLD_SIZE", "XDG_", "TRITON_", "GLOO_", "NCCL_")  # fmt: skip

#: vLLM's and torch's own, set anew by each start of an engine
SET_BY_LIBRARIES = ("VLLM_DIST_IDENT", "TRITON_CACHE_AUTOTUNING")


class Constants:
    """The package's, without private ones, which may be caches: which object each stands for, and how many entries tables and lists
    have."""

    def __init__(self):
        self.imported, self.places = 0, []  # (a module's names, the module's name, the constant's name, whether it has entries)

    def now(self) -> list:
        if len(sys.modules) != self.imported:
            self.imported, known = len(sys.modules), {place[1:3] for place in self.places}
            self.places += [
                (vars(module), path, name, isinstance(value, (Mapping, MutableSequence, MutableSet)))
                for path, module in list(sys.modules.items()) if path.startswith("rlhf_ray.")
                for name, value in list(vars(module).items())
                if name.isupper() and name[0] != "_" and (path, name) not in known
            ]  # fmt: skip
        values = [(names.get(name), sized) for names, _, name, sized in self.places]
        return [(id(value), len(value) if sized and value is not None else 0) for value, sized in values]

    def changed(self, before: list) -> list[str]:
        pairs = zip(self.places, before, self.now(), strict=False)  # of modules imported since, nothing was known before
        return [f"{path}.{name}" for (_, path, name, _), one, other in pairs if one != other]


CONSTANTS = Constants()


class Before:
    """What there was, to compare with what there is later: torch's settings, the package's constants, and this process's
    environment, folder, search path and handler of Ctrl-C."""

    def __init__(self, *, starts_ray: bool):
        """starts_ray: Ray sets variables and handlers of its own, for as long as the process lives."""
        self.starts_ray = starts_ray
        self.constants, self.settings = CONSTANTS.now(), settings(starts_ray)

    def left(self) -> list[str]:
        """In words, what is not as it was."""
        found = []
        for name, value in settings(self.starts_ray).items():
            before = self.settings[name]
            if isinstance(value, dict):
                names = [each for each in before | value if before.get(each) != value.get(each)]
                names = [each for each in names if each in before or each.startswith(READ)]
                found += [f"{name} {each}: {before.get(each)!r}, now {value.get(each)!r}" for each in names]
            elif value != before:
                found.append(f"{name}: {before!r}, now {value!r}")
        return found + [f"the constant {name}" for name in CONSTANTS.changed(self.constants)]


def settings(starts_ray: bool) -> dict:
    import torch

    found = {
        "torch.get_num_threads()": torch.get_num_threads(),
        "torch.get_default_dtype()": torch.get_default_dtype(),
        "torch.is_grad_enabled()": torch.is_grad_enabled(),
        "torch.are_deterministic_algorithms_enabled()": torch.are_deterministic_algorithms_enabled(),
        "the working directory": os.getcwd(),
        # Without "", where a plugin is looked for in the working directory, and without what libraries add that are imported late.
        "sys.path": [path for path in sys.path if path and "site-packages" not in path],
    }
    if not starts_ray:
        own = ("PYTEST_CURRENT_TEST", *SET_BY_LIBRARIES)
        found["the environment's"] = {name: value for name, value in os.environ.items() if name not in own}
        found["the handler of SIGINT"] = signal.getsignal(signal.SIGINT)
    return found
