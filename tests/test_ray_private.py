"""Ray's private names (`actors.ray_private`): here a new Ray fails before a run does. test_ray_internals.py has those of forks."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import rlhf_ray
from rlhf_ray.actors import ray_private

ROOT = Path(rlhf_ray.__file__).parent
PRIVATE = re.compile(r"\bray(\.\w+)*\._(?!_)\w+")  # not ray.__version__
ALLOWED = {"actors/ray_private.py", "forking/ray_internals.py"}


def private_names(source):
    """In imports, in names and in strings; prose may speak of them."""
    tree = ast.parse(source)
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    said = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.Attribute))]
    said += [f"{node.module}.{alias.name}" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
    said += [node.value for node in ast.walk(tree)
             if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose]  # fmt: skip
    return [each for each in said if PRIVATE.search(each)]


def test_two_modules_use_them():
    found = {path.relative_to(ROOT).as_posix(): private_names(path.read_text()) for path in ROOT.rglob("*.py")}
    users = {name: names for name, names in found.items() if names}
    assert users.keys() <= ALLOWED and "actors/ray_private.py" in users, users


def test_the_test_sees_what_it_must_refuse():
    assert private_names("from ray._private import services") and private_names("import ray._private.worker as worker")
    assert private_names("ray.train.v2._internal.x()") and private_names("x = 'ray._private.node'")
    assert private_names("from ray import _raylet")
    assert not private_names("import ray\nfrom ray.exceptions import RayError\n'ray._private in prose'\nray.__version__")


def test_the_thread_that_prints_reports_calls_the_function_that_is_replaced():
    import ray._private.worker as worker

    printed = worker.print_to_stdstream
    assert "print_to_stdstream(" in inspect.getsource(worker.listen_error_messages)
    assert list(inspect.signature(printed).parameters) == ["data", "ignore_prefix"]
    with ray_private.reports_given_to(print):
        assert worker.print_to_stdstream is print
    assert worker.print_to_stdstream is printed


def test_a_start_looks_for_its_node_by_the_function_that_is_replaced():
    from ray._private import node, services

    look = services.get_node
    assert "services.get_node(" in inspect.getsource(node)
    assert list(inspect.signature(look).parameters) == ["gcs_address", "node_id"]
    with ray_private.node_looked_up_by(lambda own: (lambda: own)):
        assert services.get_node() is look
    assert services.get_node is look


def test_a_nodes_statistics_have_those_of_its_store():
    from ray._private import internal_api
    from ray.core.generated import node_manager_pb2

    parameters = list(inspect.signature(internal_api.node_stats).parameters)
    assert parameters == ["node_manager_address", "node_manager_port", "include_memory_info"]
    store = node_manager_pb2.GetNodeStatsReply().store_stats
    assert (store.object_store_bytes_used, store.cumulative_created_bytes) == (0, 0)


def test_ray_trains_trainers_make_their_callbacks_by_the_method_that_is_overridden():
    from ray.train.torch import TorchTrainer

    from rlhf_ray.actors.ray_trainer import StageTorchTrainer

    name = ray_private.DEFAULT_CALLBACKS
    assert name in vars(StageTorchTrainer) and f"self.{name}()" in inspect.getsource(TorchTrainer.fit)
    source = inspect.getsource(getattr(TorchTrainer, name))
    for callback in ray_private.unused_callbacks():
        assert f"{callback.__name__}(" in source, "Ray Train no longer makes it"


def test_ray_train_says_that_there_is_no_room_by_this_error():
    from ray.train.v2._internal import exceptions

    assert issubclass(getattr(exceptions, ray_private.NO_ROOM), Exception)


def test_it_is_read_without_ray_train():
    """Which takes seconds."""
    code = "import sys, rlhf_ray.actors.ray_private; print('ray.train' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
