"""Generates text through the queue: `python docs/examples/generate_text.py`, beside `millstream up` with chat.yaml.

docs/generation.md quotes it.
"""

from __future__ import annotations

from millstream.client import Client


def ask(client: Client) -> str:
    answer = client.chat([{"role": "user", "content": "What is the capital of France?"}], temperature=0)
    return f"{answer.text} ({answer.finish_reason}, {answer.usage['completion_tokens']} tokens)"


def tell(client: Client) -> str:
    messages = [
        {"role": "system", "content": "You write one short paragraph."},
        {"role": "user", "content": "Tell me about water mills."},
    ]
    with client.chat_stream(messages, max_tokens=60, temperature=0.7, seed=7) as stream:
        for delta in stream:
            print(delta.text, end="", flush=True)
    print()
    return stream.text


if __name__ == "__main__":
    with Client() as client:
        print(ask(client))
        tell(client)
