"""The model "gptfast" of lm-evaluation-harness: our models as `--model hf` runs transformers'."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from gptfast._checks import check_count
from gptfast.evaluation.continuations import ContinuationScorer
from gptfast.evaluation.harness_arguments import (
    OWNER,
    batch_size_of,
    device_of,
    on_device,
    prefix_token_of,
    tokenizer_of,
)
from gptfast.generation.config import GenerationConfig
from gptfast.metadata import drawing, end_option, metadata_of
from gptfast.models import GPT
from gptfast.tokenizer import encode_prompt, lenient
from gptfast.tokenizer.chat import ChatTemplate, encode_bare
from gptfast.tokenizer.conversation import continued

Request = tuple[Any, list[int], list[int]]  # the texts, or None; ids of the context; ids of the continuation


@register_model("gptfast")
class GPTFastLM(TemplateLM):
    """A GPT under lm-evaluation-harness. On the CPU it runs in the native engine, elsewhere in torch.

    Args:
        pretrained: a checkpoint folder, nanoGPT's ckpt.pt, or a hub id; or a GPT.
        dtype: on the CPU a format of the engine: float32, bfloat16, int8, int6, q4, int4, nf4, mxfp4; on a GPU float32, bfloat16 or
            float16. "auto": that of the weights.
        device: "cpu", which is the default, or one of torch's. lm-eval's command line says "cuda:0" unless told otherwise: that
            is the CPU where there is no GPU, as under `--model hf`, and for formats that only the engine has.
        tokenizer: "gpt2", or a folder; None: the checkpoint's own. Or a tokenizer.
        max_length: most tokens that the model reads; None: its block_size. Longer requests lose tokens on the left.
        prefix_token_id: stands before a text that has no context; None: the tokenizer's first token, or its end token.
        adapter: folder of an adapter, ours or peft's. peft: the same by hf's name.
        max_gen_toks: most new tokens of a text, where the task does not say.
        batch_size: texts that are written at a time, or "auto". Scores do not depend on it, nor does their speed.
        max_batch_size: most texts at a time under "auto".
    Raises:
        ValueError, TypeError, OSError: an argument that is unknown or out of range, or a checkpoint that cannot be read.
    """

    def __init__(
        self,
        pretrained: Any,
        dtype: Any = "auto",
        device: str | None = None,
        tokenizer: Any = None,
        max_length: int | None = None,
        prefix_token_id: int | None = None,
        adapter: str | None = None,
        max_gen_toks: int = 256,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,
        peft: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown.pop("trust_remote_code", None) or unknown:
            raise ValueError(
                f"{OWNER}: unknown argument {next(iter(unknown), 'trust_remote_code')!r}; expected pretrained, dtype, device, "
                "tokenizer, max_length, prefix_token_id, adapter, max_gen_toks"
            )
        gpt = GPT.from_pretrained(pretrained) if isinstance(pretrained, str) else pretrained
        if adapter is not None and peft is not None:
            raise ValueError(
                f"{OWNER}: adapter is {adapter!r} and peft is {peft!r}, which mean the same; give one of them"
            )
        if (folder := peft if adapter is None else adapter) is not None:
            gpt.load_adapter(str(folder), "adapter")
        self._name = pretrained if isinstance(pretrained, str) else type(pretrained).__name__
        self._device = device_of(device, dtype)
        self._model, self.dtype = on_device(gpt, dtype, self._device)
        self._tokens = lenient(tokenizer_of(pretrained, tokenizer))
        check_count(OWNER, "max_gen_toks", max_gen_toks)
        block = ContinuationScorer(self._model, 1).limit
        if max_length is not None:
            check_count(OWNER, "max_length", max_length, 1, block, " (what the model reads)")
        self.max_length, self.max_gen_toks = max_length or block, max_gen_toks
        self.batch_size = batch_size_of(batch_size, max_batch_size)
        self._prefix = prefix_token_of(self._model, self._tokens, prefix_token_id)
        self._told = False  # that system messages are left out
        self.truncated = {"loglikelihood": 0, "generate_until": 0}
        shown = "none" if self._prefix is None else f"{self._prefix} {self._tokens.decode([self._prefix])!r}"
        _say(f"{self._name} in {self.dtype} on {self._device}; prefix token {shown}; max_length {self.max_length}")

    @property
    def eot_token_id(self) -> Any:
        return self._tokens.eos_id

    @property
    def prefix_token_id(self) -> int:
        if self._prefix is None:
            raise ValueError(
                f"{OWNER}: a text has no context, and neither the tokenizer nor the model of {self._name} names a first or end "
                "token to put before it; give one with prefix_token_id="
            )
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        return str(self._name).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of a text, special tokens as their ids, as `--model hf` encodes it: a text that begins with the prefix token, such
        as one of a chat template, gets no other first token."""
        if add_special_tokens is None:
            add_special_tokens = self._prefix is None or not string.startswith(self._tokens.decode([self._prefix]))
        return encode_prompt(self._tokens, string) if add_special_tokens else encode_bare(self._tokens, string)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        template = ChatTemplate.of(self._tokens) if chat_template else None
        return None if template is None else template.source

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation; without generation prompt its last message is to be continued, as `--model hf` does."""
        template = ChatTemplate.of(self._tokens)
        if template is None:
            raise ValueError(
                f"{OWNER}: the tokenizer of {self._name} has no chat template; leave out --apply_chat_template"
            )

        def write(messages: list[dict[str, str]]) -> str:
            return template.render(messages, True) if add_generation_prompt else continued(template, messages)

        try:
            return write(chat_history)
        except ValueError as error:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            text = write(others)
            if not self._told:
                _say(f"system messages are left out: {error}")
            self._told = True
            return text

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval puts into its results beside the arguments."""
        return {
            "model_dtype": self.dtype,
            "model_device": str(self._device),
            "max_length": self.max_length,
            "prefix_token_id": self._prefix,
            "truncated_requests": dict(self.truncated),
        }

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        for request in requests:
            context, continuation = _args(request)
            if not continuation:
                raise ValueError(
                    f"{OWNER}: an item of {request.task_name} has an empty continuation after {context[-40:]!r}; "
                    "expected a text to score - correct the task"
                )
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        scorer = ContinuationScorer(self._model, 64 if self._device.type == "cpu" else 8, self.max_length)
        pairs = [self._fitting(*request) for request in requests]
        with tqdm(total=len(pairs), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:
            answers = [(found.logprob, found.is_greedy) for found in scorer.score(pairs, bar.update)]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        self._report("loglikelihood", sum(len(a) + len(b) - 1 > self.max_length for _, a, b in requests), len(requests))
        return answers

    def _fitting(self, texts: Any, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """Context and continuation, the context cut on the left where both are too long."""
        if not continuation:
            raise ValueError(
                f"{OWNER}: the continuation {texts[1]!r} is one token with the end of the context {texts[0][-40:]!r}, so that "
                "nothing is left to score; put the blank between them before the continuation"
            )
        if len(continuation) > self.max_length:
            raise ValueError(
                f"{OWNER}: a continuation has {len(continuation)} tokens and max_length is {self.max_length}; leave the item out"
            )
        return context[-(self.max_length + 1 - len(continuation)) :], continuation

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows: list[Request] = []
        counts = []
        for request in requests:
            ids, before = self.tok_encode(request.args[0]), len(windows)
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(pair)))
            counts.append(len(windows) - before)
        scores, found = iter(self._loglikelihood_tokens(windows, disable_tqdm)), []
        for request, count in zip(requests, counts, strict=True):
            found.append(sum(next(scores)[0] for _ in range(count)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        by_options: dict[str, list[int]] = {}
        for n, request in enumerate(requests):
            by_options.setdefault(repr(_args(request)[1]), []).append(n)
        found, truncated = [""] * len(requests), 0
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running generate_until requests") as bar:
            for same in by_options.values():
                options, until, room = self._options(_args(requests[same[0]])[1])
                ids = {n: self.tok_encode(requests[n].args[0]) or [self.prefix_token_id] for n in same}
                truncated += sum(len(ids[n]) > room for n in same)
                order = sorted(same, key=lambda n: (-len(ids[n]), n))
                for start in range(0, len(order), self.batch_size):
                    part = order[start : start + self.batch_size]
                    prompts = [ids[n][-room:] for n in part]
                    texts = self._model.generate(prompts, tokenizer=self._tokens, **options)
                    for n, prompt, text in zip(part, prompts, texts, strict=True):
                        found[n] = postprocess_generated_text(self._text(text[len(prompt) :]), until, None)
                        self.cache_hook.add_partial("generate_until", requests[n].args, found[n])
                    bar.update(len(part))
        self._report("generate_until", truncated, len(requests))
        return found

    def _options(self, given: dict[str, Any]) -> tuple[dict[str, Any], list[str], int]:
        """Options of `generate`, texts that end a text, and most tokens of a prompt."""
        options: dict[str, Any] = dict(normalize_gen_kwargs(given, self.max_gen_toks))
        ends = metadata_of(self._model).end_tokens(self._model.config.vocab_size, [self.eot_token_id])
        eos = None if self.eot_token_id is None else self._tokens.decode([self.eot_token_id])
        until = handle_stop_sequences(options.pop("until", None), eos)
        new, room = options.pop("max_gen_toks"), self.max_length
        if not 1 <= new < room:
            raise ValueError(
                f"{OWNER}: max_gen_toks is {new}; expected 1 to {room - 1}, so that a prompt fits into max_length = {room} too"
            )
        if "max_length" in options:
            raise ValueError(f"{OWNER}: max_length is {options['max_length']} in the task's options; give max_gen_toks")
        usual = {k: v for k, v in metadata_of(self._model).defaults().items() if k != "max_new_tokens"}
        if not options["do_sample"]:
            names = ("temperature", *drawing(options))
            options = {name: value for name, value in options.items() if name not in names}
            usual = {name: value for name, value in usual.items() if name not in drawing(usual)}
        specials = self._specials()
        ends += tuple(specials[text] for text in until if text in specials)
        stops = [text for text in until if text and text not in specials]
        options = {**usual, **options, "max_new_tokens": new, "eos_token_id": end_option(ends), "stop_strings": stops}
        GenerationConfig.of(**options)  # an unknown option is an error before the first text
        return options, until, room - new

    def _text(self, ids: list[int]) -> str:
        """The text of new tokens, without special ones."""
        skipped = set(self._specials().values()) | {self.eot_token_id}
        return self._tokens.decode([token for token in ids if token not in skipped])

    def _specials(self) -> dict[str, int]:
        return dict(getattr(getattr(self._tokens, "inner", self._tokens), "specials", {}))

    def _report(self, kind: str, truncated: int, requests: int) -> None:
        self.truncated[kind] += truncated
        if truncated:
            _say(f"{truncated} of {requests} {kind} requests were too long and lost tokens on the left")


def _args(request: Instance) -> Any:
    """The arguments of a request, whose types lm-eval does not say."""
    return request.args


def _say(text: str) -> None:
    print(f"{OWNER}: {text}", file=sys.stderr, flush=True)
