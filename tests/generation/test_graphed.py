"""Generation in captured steps (`gptfast.generation.cuda_graphs`), without a GPU: the same steps uncaptured give the tokens of
the ordinary loop; on fake CUDA tensors none of them waits for a value."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

import gptfast
from gptfast.generation import cuda_graphs
from tests.support.captured import PROMPTS, graphed_tokens, requests_of
from tests.support.cuda_models import tiny


@pytest.mark.parametrize("backend", ["cpu", "emu"])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0, "max_new_tokens": 17},  # one more than a burst
        {"temperature": 0.9, "top_k": 20, "seed": 3, "max_new_tokens": 5, "num_return_sequences": 3},
        {"top_p": 0.8, "seed": 2**63 + 1, "max_new_tokens": 16},
    ],
    ids=["greedy", "three a prompt", "nucleus"],
)
def test_tokens_are_those_of_the_ordinary_loop(options, backend, emu):
    model = tiny().eval()
    with gptfast.backend(backend):
        expected = model.generate(PROMPTS, **options)
        assert graphed_tokens(model, PROMPTS, **options) == expected


def test_rows_end_at_different_places():
    """At an end token; the rest move together into smaller buckets, and go on as before."""
    model = tiny(n_layer=1, block_size=90).eval()
    options = {"seed": 7, "max_new_tokens": 80, "eos_token_id": [7]}
    expected = model.generate(PROMPTS, **options)
    ends = sorted(len(tokens) - len(prompt) for tokens, prompt in zip(expected, PROMPTS, strict=True))
    assert ends[0] <= cuda_graphs.BURST < 2 * cuda_graphs.BURST < ends[-1], f"nothing is tested: {ends}"
    assert graphed_tokens(model, PROMPTS, **options) == expected


def test_up_to_the_end_of_the_context():
    """Rows that have ended run along to the end of the burst, past the last position."""
    model = tiny().eval()
    prompts, options = [[1] * 14, [2] * 3], {"temperature": 0.0, "max_new_tokens": 10}
    assert graphed_tokens(model, prompts, **options) == model.generate(prompts, **options)
    early = {**options, "eos_token_id": model.generate(prompts[:1], **options)[0][15]}
    assert graphed_tokens(model, prompts, **early) == model.generate(prompts, **early)


def test_decoders_are_kept_for_the_model_and_its_weights():
    model = tiny().eval()
    decoder = cuda_graphs._decoder_of(model, 3, 20)
    assert cuda_graphs._decoder_of(model, 4, 24) is decoder, "the room is rounded up"
    assert cuda_graphs._decoder_of(model, 5, 20) is not decoder
    decoder = cuda_graphs._decoder_of(model, 2, 20)
    model.wte.weight = torch.nn.Parameter(model.wte.weight.clone())
    assert cuda_graphs._decoder_of(model, 2, 20) is not decoder, "a graph would read the old weights"
    count = len(cuda_graphs._decoders)
    del model, decoder
    assert len(cuda_graphs._decoders) == count - 1, "it dies with its model"


def test_what_needs_the_host_or_has_no_gpu_is_left_to_the_ordinary_loop():
    model = tiny().eval()
    assert not cuda_graphs.takes(model, requests_of([[1]], max_new_tokens=3))
    for options in ({"repetition_penalty": 1.2}, {"min_p": 0.1}, {"prompt_lookup_num_tokens": 2}):
        assert not cuda_graphs._simple(requests_of([[1]], max_new_tokens=3, **options))
    assert cuda_graphs._simple(requests_of([[1]], max_new_tokens=3, top_k=3))


def test_bad_logits_are_an_error_of_the_request():
    """As the GPU tells them: tokens -1 and -2."""
    for token, text in ((-1, "the logits hold nan"), (-2, "no token is left to choose")):
        [request] = requests_of([[1]], max_new_tokens=3)
        request.rows = [cuda_graphs.Row(request, 0, 0, [1])]
        cuda_graphs._take(request.rows[0], [5, token, 6])
        assert text in str(request.error) and request.rows[0].tokens == [1, 5] and request.done


def test_steps_are_of_one_token():
    decoder = cuda_graphs.Decoder(tiny().eval(), 1, 8)
    cache = cuda_graphs.StepCache(decoder.store, 1, decoder.state.lengths)
    with pytest.raises(ValueError, match="StepCache: 2 new positions a row; expected 1"):
        cache.start(2)


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 0.7, "top_k": 9, "top_p": 0.8, "seed": 1}])
def test_no_step_waits_for_the_gpu(sampling, on_fake_gpu, monkeypatch):
    """A value that Python asked for, as by `.item()`, would raise here."""
    monkeypatch.setattr(cuda_graphs, "_addresses", lambda model: ())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    # the method asks for a driver, even of fake tensors
    monkeypatch.setattr(torch.Tensor, "copy_", lambda to, x: torch.ops.aten.copy_.default(to, x))
    model = on_fake_gpu.eval()
    assert cuda_graphs.takes(model, requests_of([[1]]))
    model.h[0].ln_1.eps = 1.0
    assert not cuda_graphs.takes(model, requests_of([[1]])), "the config says another"
    model.h[0].ln_1.eps = model.config.layer_norm_epsilon
    decoder = cuda_graphs.Decoder(model, 3, 20)
    decoder.bucket = 4
    decoder.draw(sampling)
    decoder.forward(model)
    assert decoder.state.logits.device.type == "cuda"
    with pytest.raises(RuntimeError):
        decoder.state.column.item()
