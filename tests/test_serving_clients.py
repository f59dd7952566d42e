"""What clients send back, ask about and mistype."""

from __future__ import annotations

import json

import openai
import pytest
from served_app import ask, save_tiny, send, start

from rlhf_ray.errors import UserError
from rlhf_ray.serving.config import check_cors_origins, given_key, read_api_key, resolve_allowed_hosts
from rlhf_ray.serving.protocol import ChatRequest, CompletionRequest

USER = {"role": "user", "content": "hi"}
# openai.types.chat.ChatCompletionMessage.model_dump(), as versions of the client have written it.
DUMPED = {"content": "hello", "refusal": None, "role": "assistant", "annotations": None, "audio": None,
          "function_call": None, "tool_calls": None}  # fmt: skip
ANSWERS = [
    DUMPED,
    DUMPED | {"annotations": [], "tool_calls": []},
    DUMPED | {"reasoning_content": "I think", "reasoning": None, "provider_field": None, "another": {}},
    {"role": "assistant", "content": [{"type": "text", "text": "hello", "annotations": []}]},
    {"role": "assistant", "content": "hello", "name": "model"},
    {"role": "assistant", "content": [{"type": "output_text", "text": "hel"}, {"type": "text", "text": "lo"}]},
    {"role": "assistant", "content": None, "refusal": "hello"},
    {"role": "assistant", "content": [{"type": "refusal", "refusal": "hello"}]},
]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    runner, reader = start(save_tiny(tmp_path_factory.mktemp("run") / "model"))
    yield runner, reader
    runner.close()


def test_the_clients_own_answer_can_be_sent_back(served):
    async def talk(client):
        create = client.chat.completions.create
        first = await create(model="tiny", messages=[USER], max_tokens=5, seed=1)
        message = first.choices[0].message
        for back in (message, message.model_dump(), message.to_dict(), json.loads(message.model_dump_json())):
            again = await create(model="tiny", messages=[USER, back, USER], max_tokens=5, seed=2)
            assert again.usage.prompt_tokens > first.usage.prompt_tokens + 5
        return None

    ask(served, talk)


@pytest.mark.parametrize("answer", ANSWERS)
def test_answers_are_taken_as_any_client_holds_them(served, answer):
    def chat(message):
        body = {"model": "tiny", "messages": [USER, message, USER], "max_tokens": 5, "seed": 2}
        return send(served, "POST", "/v1/chat/completions", json=body)

    plain, found = chat({"role": "assistant", "content": "hello"}), chat(answer)
    assert found.status_code == 200, found.text
    assert found.json()["choices"] == plain.json()["choices"] and found.json()["usage"] == plain.json()["usage"]


@pytest.mark.parametrize(
    "message",
    [
        DUMPED | {"tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        DUMPED | {"audio": {"id": "a"}},
        {"role": "assistant"},
        {"role": "user", "content": "x", "image": "y"},
        {"role": "user", "content": None},
        {"role": "user", "content": [{"type": "text"}]},
        {"role": "tool", "content": "x", "tool_call_id": "1"},
    ],
)
def test_messages_that_say_more_than_text_are_refused(served, message):
    response = send(served, "POST", "/v1/chat/completions", json={"model": "tiny", "messages": [USER, message, USER]})
    assert response.status_code == 400 and response.json()["error"]["param"].startswith("messages")


def test_other_endpoints_are_named_in_the_refusal(served):
    async def talk(client):
        calls = [
            ("embeddings", client.embeddings.create(model="tiny", input="x")),
            ("responses", client.responses.create(model="tiny", input="x")),
            ("moderations", client.moderations.create(input="x")),
            ("files", client.files.list()),
        ]
        found = []
        for name, call in calls:
            with pytest.raises(openai.NotFoundError) as error:
                await call
            found.append((name, error.value))
        return found

    for name, error in ask(served, talk):
        assert f"/v1/{name}" in error.message and "/v1/chat/completions" in error.message
        assert error.code == "unknown_url"


def test_a_trailing_slash_gets_no_redirect(served):
    for path in ("/v1/completions/", "/v1/chat/completions/", "/health/"):
        method = "GET" if "health" in path else "POST"
        response = send(served, method, path, json={"model": "tiny", "prompt": "x"}, headers={"Host": "evil.example"})
        assert response.status_code == 404 and "location" not in response.headers
        assert f"Did you mean {path.rstrip('/')}?" in response.json()["error"]["message"]


def test_errors_repeat_a_part_of_what_was_sent_only(served):
    long = "x" * 15_000
    for body, path in (
        ({"model": long, "prompt": "x"}, "completions"),
        ({"model": "tiny", "prompt": "x", long: 1}, "completions"),
        ({"model": "tiny", "prompt": "x", "tools": long}, "completions"),
        ({"model": "tiny", "prompt": "x"}, long),
        ({"model": "tiny", "prompt": "x", "logit_bias": {long: 1}}, "completions"),
    ):
        response = send(served, "POST", f"/v1/{path}", json=body)
        assert response.status_code in (400, 404) and len(response.content) < 1200
    response = send(served, "POST", "/v1/completions", json={}, headers={"Content-Type": long})
    assert response.status_code == 415 and len(response.content) < 1200
    assert len(send(served, "GET", f"/v1/models/{long}").content) < 1200


def test_version_head_and_the_document(served):
    assert send(served, "GET", "/version").json()["version"][0].isdigit()
    for path in ("/health", "/v1/models", "/version", "/openapi.json"):
        head = send(served, "HEAD", path)
        assert head.status_code == 200 and head.content == b""
    document = send(served, "GET", "/openapi.json").json()
    assert document["openapi"].startswith("3.")
    for path, kind in (("/v1/completions", CompletionRequest), ("/v1/chat/completions", ChatRequest)):
        schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        found = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        assert set(found["properties"]) == set(kind.model_fields)
    references = [part.split('"')[0] for part in json.dumps(document).split('"$ref": "#/components/schemas/')[1:]]
    assert references and set(references) <= set(document["components"]["schemas"])


def test_keys_come_from_files_and_not_from_the_command_line(tmp_path):
    path = tmp_path / "key"
    path.write_text("s3cret\n")
    assert read_api_key(path) == given_key(None, path) == "s3cret" and given_key(None, None) is None
    with pytest.raises(UserError, match="--api-key-file") as refused:
        given_key("s3cret", None)
    assert "s3cret" not in str(refused.value)
    path.write_text("\n")
    for bad, words in ((path, "empty"), (tmp_path / "none", "can't be read"), (tmp_path, "can't be read")):
        with pytest.raises(UserError, match=words):
            read_api_key(bad)


def test_hosts_and_origins_are_checked_before_the_start():
    assert resolve_allowed_hosts("127.0.0.1", ()) == ("localhost", "127.0.0.1")
    assert resolve_allowed_hosts("0.0.0.0", ()) is None
    assert "a.example" in (resolve_allowed_hosts("0.0.0.0", ["a.example"]) or ())
    for name in ("http://a", "a:80", "*", ""):
        with pytest.raises(UserError, match="host name"):
            resolve_allowed_hosts("127.0.0.1", [name])
    assert check_cors_origins(["https://a.example", "http://localhost:3000"], None)
    assert check_cors_origins(["*"], "key") == ("*",)
    for origin in ("*", "a.example", "https://a.example/", "https://a.example/page"):
        with pytest.raises(UserError):
            check_cors_origins([origin], None)
