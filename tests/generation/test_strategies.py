"""Every strategy beside transformers' with the same weights: greedy and beams token for token, drawing in distribution."""

from __future__ import annotations

import json

import pytest
import torch

import gptfast
from gptfast.generation import Generation, GenerationConfig, generate, score, stream
from gptfast.generation.beam import largest
from gptfast.generation.sampling import ban_repeated, penalise, warp
from gptfast.tokenizer import CharTokenizer
from tests.support.generation_pairs import make_pair
from tests.support.strategies import assert_distributed, next_probs, without_padding

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("writer")

V, BLOCK, PAD = 61, 48, 60
PROMPTS = [[1, 2, 3], [7], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 11, 12, 13]]
PROCESSORS = {
    "repetition": {"repetition_penalty": 1.7},
    "rewarded": {"repetition_penalty": 0.6},
    "presence": {"presence_penalty": 3.0},
    "frequency": {"frequency_penalty": 1.5},
    "both": {"presence_penalty": -1.0, "frequency_penalty": 2.0},
    "ngram-1": {"no_repeat_ngram_size": 1},
    "ngram-3": {"no_repeat_ngram_size": 3},
    "bias": {"logit_bias": {3: 2.5, 17: -30.0, 40: 4.0}},
    "all": {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "logit_bias": {3: 2.5, 40: 4.0}},
}


@pytest.fixture(scope="module", params=["gpt2", "openai-gpt"])
def pair(request, tmp_path_factory):
    return make_pair(request.param, tmp_path_factory.mktemp(request.param), V, BLOCK)


FOUND = {}  # what transformers wrote: the engine and torch are compared with the same


def theirs_generate(model, prompt, **options):
    """One prompt in transformers; the new tokens of each sequence, without padding."""
    key = model, tuple(prompt), json.dumps(options, sort_keys=True)
    if key not in FOUND:
        FOUND[key] = _theirs_generate(model, prompt, **options)
    return FOUND[key]


def _theirs_generate(model, prompt, **options):
    bias = options.pop("logit_bias", None)
    if bias:
        options["sequence_bias"] = [[[token], value] for token, value in bias.items()]
    penalties = options.pop("presence_penalty", 0.0), options.pop("frequency_penalty", 0.0)
    if any(penalties):
        options["logits_processor"] = [OpenAIPenalties(len(prompt), *penalties)]
    ids = torch.tensor([prompt])
    rows = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=PAD, do_sample=False, **options)
    return [without_padding(row[len(prompt) :], options.get("eos_token_id")) for row in rows.tolist()]


class OpenAIPenalties(transformers.LogitsProcessor):
    """The formula of OpenAI's documentation, token by token; transformers has none of its own."""

    def __init__(self, first, presence, frequency):
        self.first, self.presence, self.frequency = first, presence, frequency

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        for n, row in enumerate(input_ids.tolist()):
            for token in range(scores.shape[1]):
                count = row[self.first :].count(token)
                scores[n, token] -= count * self.frequency + float(count > 0) * self.presence
        return scores


def ours_generate(model, prompts, **options):
    copies = options.get("num_return_sequences", 1)
    rows = model.generate(prompts, **options)
    return [row[len(prompts[n // copies]) :] for n, row in enumerate(rows)]


@pytest.mark.parametrize("name", PROCESSORS)
def test_greedy_with_processors_equals_transformers(pair, name):
    options = {"max_new_tokens": 16, **PROCESSORS[name]}
    expected = [new for prompt in PROMPTS for new in theirs_generate(pair[0], prompt, **options)]
    assert ours_generate(pair[1], PROMPTS, do_sample=False, **options) == expected
    plain = ours_generate(pair[1], PROMPTS, do_sample=False, max_new_tokens=16)
    assert plain != expected, "the processor changes nothing here"


ENDINGS = [True, False, "never"]  # processors act before the rules of ending: each meets one of these, in turn
BEAMS = [(None, rule) for rule in ENDINGS] + [(name, ENDINGS[n % 3]) for n, name in enumerate(PROCESSORS)]


@pytest.mark.parametrize(("name", "early_stopping"), BEAMS)
def test_beams_with_processors_equal_transformers(pair, name, early_stopping):
    eos = ours_generate(pair[1], PROMPTS, temperature=0, max_new_tokens=3)[0][-1]
    for length_penalty in (-0.5, 1.0, 2.0):
        options = {
            "num_beams": 4,
            "num_return_sequences": 3,
            "early_stopping": early_stopping,
            "length_penalty": length_penalty,
            "eos_token_id": eos,
            "max_new_tokens": 10,
            **(PROCESSORS[name] if name else {}),
        }
        expected = [new for prompt in PROMPTS for new in theirs_generate(pair[0], prompt, **options)]
        assert ours_generate(pair[1], PROMPTS, **options) == expected


def test_never_ends_by_the_longest_text_and_false_by_the_present_one(pair):
    """The two rules differ only where the best running beam lies between their bounds: end tokens that bring that about."""
    told_apart = 0
    for eos in range(V):
        if told_apart == 2:
            break
        options = {"num_beams": 2, "length_penalty": 2.0, "eos_token_id": eos, "max_new_tokens": 12}
        ours = {rule: ours_generate(pair[1], PROMPTS, early_stopping=rule, **options) for rule in (False, "never")}
        if ours[False] == ours["never"]:
            continue
        told_apart += 1
        for rule, rows in ours.items():
            assert rows == [n for p in PROMPTS for n in theirs_generate(pair[0], p, early_stopping=rule, **options)]
    assert told_apart


@pytest.mark.parametrize("beams", [1, 3])
def test_ragged_prompts_equal_transformers_with_left_padding(tmp_path, beams):
    theirs, ours = make_pair("gpt2", tmp_path, V, BLOCK)
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[PAD] * (longest - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in PROMPTS])
    options = {"max_new_tokens": 12, "num_beams": beams, "eos_token_id": 5}
    expected = theirs.generate(ids, attention_mask=mask, pad_token_id=PAD, do_sample=False, **options)
    got = ours_generate(ours, PROMPTS, do_sample=False, **options)
    assert got == [without_padding(row, 5) for row in expected[:, longest:].tolist()]


def test_beams_that_meet_a_stop_string_end_as_in_transformers(pair):
    tokenizer = CharTokenizer.train("".join(chr(48 + n) for n in range(V)))
    free = ours_generate(pair[1], PROMPTS, num_beams=4, max_new_tokens=10)
    text = tokenizer.decode(free[0][3:5])
    stopped = ours_generate(pair[1], PROMPTS, num_beams=4, max_new_tokens=10, stop_strings=text, tokenizer=tokenizer)
    assert all(text not in tokenizer.decode(new)[:-1] for new in stopped) and stopped != free


def test_beams_continue_when_most_of_them_stop(pair):
    """Candidates are made for two tokens that end; here nearly all do, and the rest must still be K rows."""
    tokenizer = CharTokenizer.train("".join(chr(48 + n) for n in range(V)))
    stops = [tokenizer.decode([n]) for n in range(V - 3)]
    rows = ours_generate(pair[1], PROMPTS, num_beams=4, max_new_tokens=5, stop_strings=stops, tokenizer=tokenizer)
    assert all(token >= V - 3 for new in rows for token in new[:-1])


@pytest.mark.parametrize("V", [1, 255, 256, 3000, 8192])
def test_the_largest_are_found_by_blocks(V):
    scores = torch.randn(3, V).masked_fill(torch.rand(3, V) < 0.3, float("-inf"))
    scores[0] = scores[0].sort().values  # all of the largest in the last block
    count = min(V, 10)
    places = largest(scores, count)
    assert torch.equal(scores.gather(1, places), scores.topk(count).values)
    assert all(len(set(row)) == count for row in places.tolist())


# ---- drawing ----


@pytest.mark.parametrize(
    "cuts",
    [{"min_p": 0.3}, {"min_p": 0.05, "top_p": 0.8, "top_k": 20, "temperature": 1.7}, {"top_k": 4}, {"top_p": 0.6}],
    ids=str,
)
@pytest.mark.parametrize("least", [1, 3])
def test_warp_keeps_what_transformers_keeps(cuts, least):
    logits = torch.randn(20, V) * 3
    scores = logits / cuts.get("temperature", 1.0)
    if "top_k" in cuts:
        scores = transformers.TopKLogitsWarper(cuts["top_k"], min_tokens_to_keep=least)(None, scores)
    if "top_p" in cuts:
        scores = transformers.TopPLogitsWarper(cuts["top_p"], min_tokens_to_keep=least)(None, scores)
    if "min_p" in cuts:
        scores = transformers.MinPLogitsWarper(cuts["min_p"], min_tokens_to_keep=least)(None, scores)
    torch.testing.assert_close(warp(logits, GenerationConfig(**cuts), least), scores)


@pytest.mark.parametrize("options", [{"min_p": 0.05}, {"min_p": 0.02, "top_p": 0.9, "temperature": 1.3}, {}], ids=str)
def test_draws_have_the_distribution(pair, options):
    options = {"temperature": 1.0, **options}
    rows = pair[1].generate(
        [[1, 2, 3]],
        max_new_tokens=1,
        num_return_sequences=4000,
        **{**options, "temperature": 4 * options["temperature"]},
    )
    assert_distributed([row[-1] for row in rows], next_probs(pair[1], [1, 2, 3], **options))
    with pytest.raises(AssertionError, match="chi-square"):  # the test can fail: the tokens of another prompt
        assert_distributed([row[-1] for row in rows], next_probs(pair[1], [1, 2, 4], **options).clamp_min(1e-4))


def test_drawn_beams_are_draws_without_replacement(tmp_path):
    """The first step of two beams: both orders of each pair of tokens together, against p_a p_b / (1 - p_a) + ..."""
    model = make_pair("gpt2", tmp_path, 6, 16, layers=1)[1]
    options = {"num_beams": 2, "num_return_sequences": 2, "do_sample": True, "temperature": 4.0, "max_new_tokens": 1}
    with torch.no_grad():
        p = (model(torch.tensor([[1, 2]]))[0, -1].log_softmax(-1) / 4).softmax(-1).tolist()
    pairs = [(a, b) for a in range(6) for b in range(a)]
    probs = torch.tensor([p[a] * p[b] / (1 - p[a]) + p[b] * p[a] / (1 - p[b]) for a, b in pairs])
    drawn = []
    for seed in range(600):
        first, second = (row[-1] for row in model.generate([[1, 2]], seed=seed, **options))
        drawn.append(pairs.index((max(first, second), min(first, second))))
    assert_distributed(drawn, probs)


def test_drawn_beams_do_not_depend_on_the_batch_and_repeat(pair):
    options = {"num_beams": 3, "do_sample": True, "temperature": 3.0, "max_new_tokens": 8, "seed": 5, "eos_token_id": 5}
    together = pair[1].generate(PROMPTS, **options)
    assert together == [pair[1].generate([prompt], **options)[0] for prompt in PROMPTS]
    assert together != pair[1].generate(PROMPTS, **{**options, "seed": 6})
    assert together != pair[1].generate(PROMPTS, **{**options, "do_sample": False, "temperature": 1.0})


def test_drawn_beams_at_a_low_temperature_are_plain_beams(pair):
    """Scores are divided by the temperature, so beside them the noise is nothing."""
    options = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 6}
    drawn = pair[1].generate(PROMPTS, do_sample=True, temperature=1e-4, **options)
    assert drawn == pair[1].generate(PROMPTS, **options)


# ---- diverse beams ----


def diverse_beams(model, prompt, K, groups, penalty, steps):
    """Vijayakumar et al. written out, without a cache and without end tokens: (score, sequence) of all groups."""
    size = K // groups
    beams = [[(0.0, list(prompt))] for _ in range(groups)]
    for _ in range(steps):
        taken = torch.zeros(V)
        for g in range(groups):
            extended = []
            for total, row in beams[g]:
                with torch.no_grad():
                    scores = model(torch.tensor([row]))[0, -1].log_softmax(-1) - penalty * taken
                best = scores.topk(2 * size)
                extended += [
                    (total + s, [*row, t]) for s, t in zip(best.values.tolist(), best.indices.tolist(), strict=True)
                ]
            beams[g] = sorted(extended, reverse=True)[:size]
            for _, row in beams[g]:
                taken[row[-1]] += 1
    return sorted((beam for group in beams for beam in group), reverse=True)


@pytest.mark.parametrize(("K", "groups", "penalty"), [(4, 2, 1.5), (6, 3, 0.4), (3, 3, 20.0)])
def test_diverse_beams_equal_the_paper_written_out(pair, K, groups, penalty):
    options = {"num_beams": K, "num_beam_groups": groups, "diversity_penalty": penalty, "max_new_tokens": 6}
    rows = pair[1].generate(PROMPTS, num_return_sequences=K, **options)
    for n, prompt in enumerate(PROMPTS):
        expected = [row for _, row in diverse_beams(pair[1], prompt, K, groups, penalty, 6)]
        assert rows[n * K : (n + 1) * K] == expected


def test_groups_end_each_for_itself(pair):
    eos = ours_generate(pair[1], PROMPTS, temperature=0, max_new_tokens=3)[0][-1]
    options = {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 2.0, "max_new_tokens": 9, "eos_token_id": eos}
    together = pair[1].generate(PROMPTS, early_stopping=True, num_return_sequences=4, **options)
    alone = [
        row for p in PROMPTS for row in pair[1].generate([p], early_stopping=True, num_return_sequences=4, **options)
    ]
    assert together == alone and any(row[-1] == eos and len(row) < len(PROMPTS[0]) + 9 for row in together)


# ---- ends, logprobs, streams ----


@pytest.fixture(scope="module")
def letters():
    return CharTokenizer.train("".join(chr(48 + n) for n in range(V)))


def test_stop_strings_end_a_text_where_they_are_complete(pair, letters):
    free = ours_generate(pair[1], PROMPTS, seed=3, max_new_tokens=20)
    stops = [letters.decode(free[0][4:7]), letters.decode(free[2][9:10])]
    stopped = ours_generate(pair[1], PROMPTS, seed=3, max_new_tokens=20, stop_strings=stops, tokenizer=letters)
    for new, full in zip(stopped, free, strict=True):
        text = letters.decode(full)
        ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
        assert new == full[: min(ends, default=20)]
    assert len(stopped[0]) <= 7 and len(stopped[2]) <= 10


def test_a_stop_string_in_the_prompt_does_not_count(pair, letters):
    text = letters.decode(PROMPTS[0][-1:])
    new = ours_generate(pair[1], PROMPTS[:1], temperature=0, max_new_tokens=1, stop_strings=[text], tokenizer=letters)
    assert len(new[0]) == 1


@pytest.mark.parametrize("beams", [1, 3])
def test_logprobs_are_the_models(pair, beams):
    options = {"num_beams": beams} if beams > 1 else {"temperature": 2.0, "repetition_penalty": 1.4, "top_k": 20}
    got = generate(pair[1], PROMPTS, max_new_tokens=7, eos_token_id=5, return_logprobs=True, **options)
    assert isinstance(got, Generation) and (got.scores is None) == (beams == 1)
    for n, (row, logprobs) in enumerate(zip(got.sequences, got.logprobs, strict=True)):
        with torch.no_grad():
            scores = pair[1](torch.tensor([row]))[0].log_softmax(-1)
        new = range(len(PROMPTS[n]), len(row))
        assert logprobs == pytest.approx([scores[t - 1, row[t]].item() for t in new], abs=1e-4)
        if got.scores is not None:
            assert got.scores[n] == pytest.approx(sum(logprobs) / len(logprobs), abs=1e-4)
    ids = torch.tensor(PROMPTS[:1])
    assert generate(pair[1], ids, max_new_tokens=2, return_logprobs=True).sequences.shape == (1, 5)


def test_score_covers_the_whole_text(pair):
    row = PROMPTS[2]
    with torch.no_grad():
        scores = pair[1](torch.tensor([row]))[0].log_softmax(-1)
    expected = [scores[t - 1, row[t]].item() for t in range(1, len(row))]
    assert score(pair[1], row) == pytest.approx(expected, abs=1e-4)
    assert score(pair[1], torch.tensor(row), first=4) == pytest.approx(expected[3:], abs=1e-4)
    assert len(score(pair[1], [1] * (BLOCK + 1))) == BLOCK


@pytest.mark.parametrize(
    ("row", "first", "error", "match"),
    [
        ([1], 1, ValueError, "tokens has 1 ids and first is 1; expected 2 to 49 tokens"),
        ([1] * 50, 1, ValueError, "tokens has 50 ids and first is 1; expected 2 to 49 tokens"),
        ([1, 2], 0, ValueError, "tokens has 2 ids and first is 0; .* 1 <= first < their number"),
        ([1, 2], 2, ValueError, "first is 2"),
        ([1, V], 1, ValueError, "holds token id 61"),
        ("ab", 1, TypeError, "holds 'a'; expected int token ids"),
    ],
)
def test_errors_of_score(pair, row, first, error, match):
    with pytest.raises(error, match=match):
        score(pair[1], row, first)


def test_streamers_of_transformers_work(pair):
    class Streamer(transformers.generation.streamers.BaseStreamer):
        def __init__(self):
            self.got = []

        def put(self, value):
            self.got += value.flatten().tolist()

        def end(self):
            self.got.append("end")

    streamer = Streamer()
    rows = pair[1].generate(PROMPTS[:1], max_new_tokens=5, streamer=streamer, seed=2)
    assert streamer.got == [*rows[0], "end"]


# ---- past the block ----


def sliding(model, prompt, n, half):
    """Greedy, each token from as much as the rule leaves visible."""
    row = list(prompt)
    for _ in range(n):
        start = 0
        while len(row) - start > BLOCK:
            start += half
        with torch.no_grad():
            row.append(model(torch.tensor([row[start:]]))[0, -1].argmax().item())
    return row


def test_slide_forgets_the_older_half(pair):
    long = [int(t) for t in torch.randint(V, (BLOCK + 30,))]
    prompts = [[1, 2, 3], long[: BLOCK - 1], long[:BLOCK], long]
    rows = pair[1].generate(prompts, max_new_tokens=60, temperature=0, overflow="slide")
    assert rows == [sliding(pair[1], prompt, 60, BLOCK // 2) for prompt in prompts]
    told = list(stream(pair[1], [long], max_new_tokens=60, temperature=0, overflow="slide"))
    assert [step.tokens[0] for step in told] == rows[3][len(long) :]


# ---- bad input ----


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"min_p": 1.5}, ValueError, "min_p is 1.5; expected 0 <= min_p <= 1"),
        ({"repetition_penalty": 0}, ValueError, r"repetition_penalty is 0; expected a number > 0 \(1 is none\)"),
        ({"presence_penalty": float("nan")}, ValueError, "presence_penalty is nan; expected a finite number"),
        ({"frequency_penalty": "high"}, TypeError, "frequency_penalty is 'high'; expected a number"),
        ({"no_repeat_ngram_size": -1}, ValueError, "no_repeat_ngram_size is -1; expected at least 0"),
        ({"logit_bias": [1]}, TypeError, "logit_bias is a list; expected {token id: number}"),
        ({"logit_bias": {"a": 1.0}}, TypeError, "a token of logit_bias is 'a'; expected an int"),
        ({"logit_bias": {1: float("nan")}}, ValueError, r"logit_bias\[1\] is nan; expected a finite number"),
        ({"logit_bias": {61: 1.0}}, ValueError, r"logit_bias holds token 61; expected ids in \[0, 61\)"),
        ({"stop_strings": "a"}, ValueError, "stop_strings without tokenizer; pass tokenizer=gptfast.tokenizer.load"),
        ({"stop_strings": 5}, TypeError, "stop_strings is 5; expected a text, or a list of texts"),
        ({"stop_strings": b"a"}, TypeError, "stop_strings is b'a'; expected a text, or a list of texts"),
        ({"logit_bias": {1: 1e39}}, ValueError, r"logit_bias\[1\] is 1e\+39; expected a finite number"),
        ({"stop_strings": [""]}, ValueError, "stop_strings holds ''; expected texts of at least one character"),
        (
            {"stop_strings": "a", "tokenizer": 3},
            TypeError,
            "tokenizer is a int without decode_bytes; stop_strings need",
        ),
        ({"do_sample": "yes"}, TypeError, "do_sample is 'yes'; expected True, False or None"),
        ({"do_sample": True, "temperature": 0}, ValueError, "do_sample=True with temperature=0, which draws nothing"),
        ({"do_sample": False, "top_p": 0.5}, ValueError, "do_sample=False with temperature=1.0, top_k=0, top_p=0.5;"),
        ({"num_beams": 2, "do_sample": True, "temperature": 0}, ValueError, "do_sample=True with temperature=0"),
        ({"num_beams": 2, "min_p": 0.1}, ValueError, "min_p=0.1; beam search draws nothing .* or set do_sample=True"),
        ({"num_beam_groups": 2}, ValueError, "num_beam_groups=2, diversity_penalty=0.0 with one beam"),
        (
            {"num_beams": 4, "num_beam_groups": 3, "diversity_penalty": 1.0},
            ValueError,
            "num_beams is 4 and num_beam_groups 3; expected a mult",
        ),
        ({"num_beams": 4, "num_beam_groups": 2}, ValueError, "num_beam_groups is 2 and diversity_penalty 0.0; groups"),
        ({"num_beams": 4, "diversity_penalty": 1.0}, ValueError, "num_beam_groups is 1 and diversity_penalty 1.0"),
        ({"diversity_penalty": -1.0}, ValueError, "diversity_penalty is -1.0; expected a number >= 0"),
        (
            {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0, "do_sample": True},
            ValueError,
            "num_beam_groups=2 with do_sample=True; diverse beams draw nothing",
        ),
        ({"num_beams": 2, "overflow": "slide"}, ValueError, "overflow='slide' with beams"),
        ({"overflow": "wrap"}, ValueError, "overflow is 'wrap'; expected 'error' or 'slide'"),
        ({"num_beams": 2, "prompt_lookup_num_tokens": 3}, ValueError, "prompt_lookup_num_tokens=3 with num_beams=2"),
        ({"max_new_tokens": 99}, ValueError, "overflow='slide' goes on by forgetting the oldest"),
        ({"logit_bias": dict.fromkeys(range(V), float("-inf"))}, RuntimeError, "no token is left to choose, all are"),
        (
            {"no_repeat_ngram_size": 1, "logit_bias": dict.fromkeys(range(3, V), float("-inf")), "num_beams": 3},
            RuntimeError,
            "no token is left to choose, all are",
        ),
    ],
)
def test_errors(pair, options, error, match):
    with pytest.raises(error, match=match):
        generate(pair[1], [[1]], **{"max_new_tokens": 4, **options})


def test_errors_of_streamers(pair):
    with pytest.raises(TypeError, match="streamer is a int; expected an object with put and end"):
        generate(pair[1], [[1]], streamer=3, max_new_tokens=2)
    with pytest.raises(
        ValueError, match="streamer with 2 prompts, num_return_sequences=1, num_beams=1; it follows one"
    ):
        generate(pair[1], [[1], [2]], streamer=object(), max_new_tokens=2)
    with pytest.raises(ValueError, match="streamer with 1 prompts, num_return_sequences=1, num_beams=2"):
        generate(pair[1], [[1]], streamer=object(), num_beams=2, max_new_tokens=2)


def test_nan_is_an_error_and_not_a_token(pair):
    model = gptfast.GPT(pair[1].config)
    with torch.no_grad():
        model.wte.weight[1] = torch.nan
    with pytest.raises(RuntimeError, match="generate: the logits hold nan - look for an overflow"):
        model.generate([[1]], max_new_tokens=2)
    with pytest.raises(RuntimeError, match="generate: the logits hold nan - look for an overflow"):
        model.eval().generate([[1]], max_new_tokens=2)  # the engine does not take it


def test_processors_leave_their_input_alone():
    scores = torch.randn(V)
    before = scores.clone()
    penalise(scores, [1, 2, 2], 1.5)
    ban_repeated(scores, [1, 2, 1], 2)
    assert torch.equal(scores, before)
