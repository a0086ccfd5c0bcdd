#!/usr/bin/env python3
"""The official `openai` client talks with `kvloom serve --http`: streaming and not, several answers,
logprobs, errors as its own exceptions, a conversation that goes on, files and batches.

    python3 tests/integration/openai_client.py build/release

Exit status 77 where the model is not in the cache or pip cannot fetch the client."""
import json
import os
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(os.path.dirname(HERE), "support"))
import batch_rows  # noqa: E402
import contract  # noqa: E402
import peers  # noqa: E402
from http_server import MODEL, Server  # noqa: E402

KEY = "a-key-of-this-test-0123"


def check_conversation(client):
    messages = [{"role": "system", "content": "You are the keeper of a lighthouse."},
                {"role": "user", "content": "What is your first duty at dusk?"}]
    cached = []
    for question in ("Why?", "And then?"):
        answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=24,
                                                temperature=0)
        assert answer.choices[0].message.role == "assistant"
        assert answer.choices[0].message.content
        assert answer.usage.total_tokens == (answer.usage.prompt_tokens
                                             + answer.usage.completion_tokens)
        cached.append(answer.usage.prompt_tokens_details.cached_tokens)
        messages += [{"role": "assistant", "content": answer.choices[0].message.content},
                     {"role": "user", "content": question}]
    # The second turn begins as the first did.
    assert cached[1] >= 32, cached


def check_streaming(client):
    asked = {"model": MODEL, "max_tokens": 20, "temperature": 0,
             "messages": [{"role": "user", "content": "Name a colour."}]}
    whole = client.chat.completions.create(**asked)
    text, usage = "", None
    for chunk in client.chat.completions.create(**asked, stream=True,
                                                stream_options={"include_usage": True}):
        if chunk.choices and chunk.choices[0].delta.content:
            text += chunk.choices[0].delta.content
        usage = chunk.usage or usage
    assert text == whole.choices[0].message.content
    assert usage.completion_tokens == whole.usage.completion_tokens


def check_completions(client):
    answer = client.completions.create(model=MODEL, prompt="One, two, three,", max_tokens=8,
                                       temperature=0, logprobs=2, n=2)
    assert len(answer.choices) == 2
    assert answer.choices[0].text == answer.choices[1].text
    assert "".join(answer.choices[0].logprobs.tokens) == answer.choices[0].text
    chat = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "hi"}], max_tokens=4, logprobs=True,
        top_logprobs=3, seed=5, temperature=0.7, top_p=0.9, presence_penalty=0.1,
        frequency_penalty=0.1, stop=["\n\n"], extra_body={"top_k": 40, "min_p": 0.01})
    assert all(len(entry.top_logprobs) == 3 for entry in chat.choices[0].logprobs.content)


def check_responses(client):
    asked = {"model": MODEL, "instructions": "Be brief.", "temperature": 0, "max_output_tokens": 12,
             "input": [{"role": "user", "content": "Name a metal."}]}
    whole = client.responses.create(**asked)
    chat = client.chat.completions.create(
        model=MODEL, temperature=0, max_tokens=12,
        messages=[{"role": "system", "content": "Be brief."},
                  {"role": "user", "content": "Name a metal."}])
    assert whole.output_text == chat.choices[0].message.content
    assert whole.usage.output_tokens == chat.usage.completion_tokens
    assert whole.usage.input_tokens == chat.usage.prompt_tokens
    text, types, numbers = "", [], []
    for event in client.responses.create(**asked, stream=True):
        types.append(event.type)
        numbers.append(event.sequence_number)
        if event.type == "response.output_text.delta":
            text += event.delta
    assert text == whole.output_text
    assert types[0] == "response.created" and types[-1] == f"response.{whole.status}", types
    assert numbers == list(range(len(numbers)))


def check_tools(client):
    """Functions are told of, called in a history and answered; whether this small model calls one
    itself is its own affair, but what it says is one thing or the other, streamed as whole."""
    tools = [{"type": "function", "function": {
        "name": "get_weather", "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}]
    messages = [{"role": "user", "content": "What is the weather in Oslo?"},
                {"role": "assistant", "content": None, "tool_calls": [
                    {"id": "call_1", "type": "function",
                     "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}]},
                {"role": "tool", "tool_call_id": "call_1", "content": "12 degrees, rain"}]
    for asked in (messages[:1], messages):
        fields = {"model": MODEL, "messages": asked, "tools": tools, "temperature": 0,
                  "max_tokens": 40}
        whole = client.chat.completions.create(**fields).choices[0]
        assert (whole.finish_reason == "tool_calls") == bool(whole.message.tool_calls)
        assert whole.message.content or whole.message.tool_calls
        text, n_calls, finish = "", 0, None
        for chunk in client.chat.completions.create(**fields, stream=True):
            delta = chunk.choices[0].delta
            text += delta.content or ""
            n_calls += len(delta.tool_calls or [])
            finish = chunk.choices[0].finish_reason or finish
        assert text == (whole.message.content or "") and finish == whole.finish_reason
        assert n_calls == len(whole.message.tool_calls or [])


def check_batches(client):
    """A file of requests goes up, a batch answers it, its output comes down."""
    made = batch_rows.rows(1, 3, 10, 10, 8)
    rows = "".join(json.dumps({"custom_id": i, "method": "POST", "url": "/v1/chat/completions",
                               "body": b}) + "\n" for i, b in made)
    file = client.files.create(file=("rows.jsonl", rows.encode()), purpose="batch")
    assert client.files.retrieve(file.id).bytes == len(rows.encode())
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions",
                                  completion_window="24h", metadata={"of": "a test"})
    deadline = time.monotonic() + 60
    while batch.status not in ("completed", "failed") and time.monotonic() < deadline:
        time.sleep(0.1)
        batch = client.batches.retrieve(batch.id)
    assert batch.status == "completed", batch
    assert batch.request_counts.completed == len(made) and batch.error_file_id is None, batch
    lines = client.files.content(batch.output_file_id).text.splitlines()
    assert {json.loads(line)["custom_id"] for line in lines} == {i for i, _ in made}
    assert batch.id in [one.id for one in client.batches.list(limit=1)]
    assert {one.id for one in client.files.list()} == {file.id, batch.output_file_id}
    assert client.files.delete(file.id).deleted
    import openai
    for gone in (lambda: client.files.retrieve(file.id), lambda: client.batches.cancel("batch_1")):
        try:
            gone()
        except openai.NotFoundError:
            continue
        raise AssertionError("what is not there was found")


def check_models(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def check_errors(client):
    import openai
    asked = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
    for kind, change in ((openai.BadRequestError, {"temperature": 5}),
                         (openai.BadRequestError, {"tool_choice": "required"}),
                         (openai.BadRequestError, {"response_format": {"type": "json_object"}}),
                         (openai.NotFoundError, {"model": "another"})):
        try:
            client.chat.completions.create(**{**asked, **change})
        except kind as error:
            assert error.body["message"] and error.param, error
        else:
            raise AssertionError(f"{change} was not refused")
    try:
        client.with_options(api_key="another-key-0123456789").models.list()
    except openai.AuthenticationError:
        return
    raise AssertionError("a wrong key was let in")


def main():
    contract.need_model(MODEL)
    try:
        peers.run_again_under("openai", ["openai"])
    except (subprocess.CalledProcessError, OSError) as error:
        print(f"the openai client could not be fetched: {error}")
        return 77
    import openai
    checks = contract.Checks()
    with tempfile.TemporaryDirectory() as folder:
        keys = os.path.join(folder, "keys")
        with open(keys, "w", encoding="ascii") as out:
            out.write(f"tests {KEY}\n")
        with Server(contract.program(), "127.0.0.1:0", "--api-keys", keys, "--data",
                    os.path.join(folder, "data")) as server:
            client = openai.OpenAI(base_url=server.address + "/v1", api_key=KEY, max_retries=0)
            for check in (check_conversation, check_streaming, check_completions, check_responses,
                          check_tools, check_batches, check_models, check_errors):
                checks.run(check, client)
            client.close()
    return checks.status()


if __name__ == "__main__":
    sys.exit(main())
