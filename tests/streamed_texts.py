"""Requests whose answers outlast a replica, and what a client reads of them."""

import json

# top_k of 1 draws the likeliest
BODY = {"model": "model", "prompt": "the", "max_tokens": 800, "top_k": 1, "ignore_eos": True}
TAKEN_OVER = {
    "greedy stream": {"stream": True},
    "sampled stream": {"stream": True, "top_k": 0, "seed": 7, "stream_options": {"include_usage": True}},
    "sampled whole": {"top_k": 0, "seed": 8, "n": 2},
}
AT_CHUNK = 5


async def text_of(client, way, once=None):
    """-> the text, or the texts, and what the answer says of itself. once: awaited when so many chunks of a stream are there."""
    body = BODY | TAKEN_OVER[way]
    if not body.get("stream"):
        whole = (await client.post("/v1/completions", json=body)).json()
        assert "choices" in whole, whole
        return [choice["text"] for choice in whole["choices"]], whole["usage"]["completion_tokens"]
    parts, reasons, lines = [], [], []
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            lines.append(line)
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                assert "error" not in chunk, chunk
                parts += [choice["text"] for choice in chunk["choices"]]
                reasons += [choice["finish_reason"] for choice in chunk["choices"] if choice["finish_reason"]]
                reasons += [chunk["usage"]["completion_tokens"]] if chunk.get("usage") else []
                if once is not None and len(parts) >= AT_CHUNK:
                    await once()
                    once = None
    assert [line for line in lines if line][-1] == "data: [DONE]"
    return "".join(parts), reasons
