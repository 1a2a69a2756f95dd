"""Where texts end and what a request costs, as tables: every stop in turn, pieces of several characters, every form."""

from __future__ import annotations

import pytest

from gptfast.serving.text import ChoiceText
from gptfast.tokenizer.conversation import TRANSCRIPT_STOPS


class Pieces:
    """A tokenizer whose token n is the n-th piece of a text."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = [piece.encode() for piece in pieces]

    def decode_bytes(self, ids):
        return b"".join(self.pieces[n] for n in ids)

    def decode(self, ids):
        return self.decode_bytes(ids).decode()


def sent(pieces, stops, flush=False):
    """What goes out with each token, and at the end."""
    choice = ChoiceText(Pieces(*pieces), stops, (), flush)
    return [*(choice.push(n) for n in range(len(pieces))), choice.finish()]


@pytest.mark.parametrize(
    ("pieces", "stops", "expected"),
    [
        # held back for the longest stop, not the shortest, in either order
        ("so\nUser:", ["\n", "User:"], ["s", "o"]),
        (["H", "i", "U", "s", "e", "r", ":", "x"], ["\n", "User:"], ["H", "i"]),
        (["H", "i", "U", "s", "e", "r", ":", "x"], ["User:", "\n"], ["H", "i"]),
        (["U", "s", "e", "s", "!"], ["\n", "User:"], ["Uses", "!"]),
        # two stops in one piece: the earlier in the text cuts, wherever it stands in the list
        (["one. two; three"], [";", "."], ["one"]),
        (["one. two; three"], [".", ";"], ["one"]),
        (["a", "b; c. d"], [".", ";"], ["a", "b"]),
        # one stop is the beginning of another; a stop that reaches over pieces; a piece before it within the same token
        (["xEN", "D."], ["END.", "EN"], ["x"]),
        (["ab", "cab", "dz"], ["abd"], ["abc"]),  # codespell:ignore
        (["aaab"], ["aab"], ["a"]),
        # no stop: all of it, what was held back too
        (["Us", "er"], ["User:"], ["User"]),
        (["日", "本E", "ND"], ["END"], ["日", "本"]),  # codespell:ignore
    ],
)
def test_a_text_ends_at_the_earliest_stop(pieces, stops, expected):
    got = sent(list(pieces), stops)
    assert "".join(got) == "".join(expected)
    assert [text for text in got if text] == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\n\nUser: and thou?", ""),  # nothing is said before somebody else speaks
        (" \n\nUser: and thou?", ""),
        ("\nSystem: be brief", ""),
        ("\n  so\nUser: and thou?", "so"),
        ("\n\n so\n\nit is", "so\n\nit is"),
        ("\n \n", ""),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 40])
def test_blanks_before_a_reply_may_begin_a_stop(text, expected, size):
    pieces = [text[n : n + size] for n in range(0, len(text), size)]
    assert "".join(sent(pieces, TRANSCRIPT_STOPS, flush=True)) == expected


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("ask", "prompt_tokens", "completion_tokens"),
    [
        ({"prompt": "to be"}, 5, 7),
        ({"prompt": "to be", "n": 3}, 5, 21),  # a prompt counts once, whatever its choices
        ({"prompt": ["to be", "or"]}, 7, 14),
        ({"prompt": ["to be", "or"], "n": 2}, 7, 28),
        ({"prompt": [[1, 2, 3], [4]], "n": 2}, 4, 28),
        ({"prompt": [1, 2, 3]}, 3, 7),
        ({"prompt": "to be", "n": 2, "echo": True}, 5, 14),
        ({"prompt": "to be", "n": 2, "logprobs": 1}, 5, 14),
    ],
    ids=str,
)
def test_usage_counts_prompts_once_and_choices_each(client, ask, prompt_tokens, completion_tokens, stream):
    ask = {"model": "bard", "max_tokens": 7, "temperature": 1.5, "seed": 1, **ask}
    if stream:
        chunks = list(client.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
        assert all(chunk.usage is None for chunk in chunks[:-1])
        usage = chunks[-1].usage
    else:
        usage = client.completions.create(**ask).usage
    total = prompt_tokens + completion_tokens
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (
        prompt_tokens,
        completion_tokens,
        total,
    )
