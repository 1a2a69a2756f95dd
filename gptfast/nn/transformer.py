"""The network of a GPT: embeddings, blocks, head and loss.  B batch, T time, C channels (n_embd), V vocabulary."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gptfast import ops
from gptfast.config import GPTConfig
from gptfast.nn.adapted import DROPOUTS, call
from gptfast.nn.adapter_watch import watch, watch_rows
from gptfast.nn.bidirectional import Beside, check_next_sentence
from gptfast.nn.block import Block, add_branch, written_for
from gptfast.nn.counts import Counted
from gptfast.nn.dropout import DropoutCounter, NumberedDropouts
from gptfast.nn.embeddings import Embeddings
from gptfast.nn.heads import Heads
from gptfast.nn.inputs import REFUSED, Packed, check_call, check_form, one_of, packed_row, padded, refuse, shifted
from gptfast.nn.kv_cache import KVCache
from gptfast.nn.norm import norm_of
from gptfast.nn.position import SinusoidalEmbedding
from gptfast.nn.rotary import RotaryEmbedding
from gptfast.nn.selection import AdapterState, Selection, select_rows
from gptfast.nn.soft_prompt import Prefix

INIT_STD = 0.02  # of all matrices and embeddings (GPT-2)


class Transformer(Embeddings, Heads, Counted, NumberedDropouts):
    """The network of a GPT with GPT-2's parameter names; all of it runs through `gptfast.ops`.
    `gptfast.GPT` is this with generation and checkpoints.

    Weights are normal with standard deviation 0.02, divided by sqrt(2 n_layer) for the projections into the
    residual stream of a causal model (Radford et al. 2019, section 2.3); biases are 0.

    By default each forward in training mode draws the seed of its dropouts from torch's CPU generator, so `torch.manual_seed`,
    `torch.get_rng_state`, activation checkpointing, deep copies and ranks behave as with torch's own dropout. Once
    dropout_seed is set, dropout is a function of (dropout_seed, dropout_step) alone, these two integers restore it, and such
    a forward advances dropout_step by one. A deep copy then continues with a seed drawn for it.

    Args:
        config: see `GPTConfig`.
    """

    recompute: bool = False  # in training: keep only what enters a block, and compute it again in the backward pass
    adapters: AdapterState | None = None  # of a GPT with adapters, see `gptfast.GPT.add_adapter`
    dropout_row: int = 0  # which row of the whole batch the first one of a forward is, where ranks share a batch
    quantized_mark: str = ""  # of a model that was quantised as it was read: tells the checkpoint from others

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        if not isinstance(config, GPTConfig):
            raise TypeError(f"GPT: config is a {type(config).__name__}; expected a GPTConfig")
        self.config = config
        C = config.n_embd
        self.wte = nn.Embedding(config.vocab_size, C)
        if config.position_embedding == "rotary":
            self.rotary = RotaryEmbedding(config)
        else:
            places = nn.Embedding if config.position_embedding == "learned" else SinusoidalEmbedding
            self.wpe = places(config.block_size, C).to(self.wte.weight.dtype)
        self.wse = None if config.type_vocab_size is None else nn.Embedding(config.type_vocab_size, C)
        self.ln_e = norm_of(config) if config.embedding_norm else None
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = norm_of(config) if config.final_norm else None
        self._add_heads(config)
        self._dropout = DropoutCounter()  # its offset counts forwards
        self.tie_weights()
        self._init_weights()

    def _init_weights(self) -> None:
        for name, parameter in self.named_parameters():
            self.init_parameter(name, parameter)

    def init_parameter(self, name: str, parameter: nn.Parameter) -> None:
        """Give a parameter, by its name, its value in a new model; the weight of a LayerNorm stays 1."""
        if parameter.dim() >= 2 and not name.endswith("bias"):
            residual = self.config.causal and name.endswith(("c_proj.weight", "mlp.down_proj"))
            nn.init.normal_(parameter, std=INIT_STD / math.sqrt(2 * self.config.n_layer) if residual else INIT_STD)
        elif name.endswith(("bias", "sinks")):
            nn.init.zeros_(parameter)

    def forward(
        self,
        ids: Tensor | Mapping[str, Tensor] | None = None,
        targets: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        ignore_index: int = -100,
        cache: KVCache | None = None,
        last_only: bool = False,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        adapter_names: Sequence[str] | None = None,
        inputs_embeds: Tensor | None = None,
        prefix_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        **others: Any,
    ) -> Tensor | tuple[Tensor | None, Tensor]:
        """Logits, or logits and mean cross-entropy. A batch of transformers' collators may be expanded: model(**batch).

        Args:
            ids: (B, T) int64 or int32 in [0, V), 1 <= T <= block_size; input_ids is another name. Or a
                BatchEncoding or dict with input_ids.
            targets: (B, T) int64, the token that follows each id, in [0, V) or ignore_index; without `causal` the token that
                belongs at each position. In training mode the head and the loss are one op that never holds all logits.
            attention_mask: (B, T), 0 where ids are padding, on either side, 1 else. The results of the other positions are
                those of their row without padding; those of padding mean nothing, and their targets do not count.
            ignore_index: targets of this value do not count; -1 in nanoGPT.
            cache: append the T positions of every row to it and attend to what it holds; no gradients.
            last_only: logits of the last position only, with attention_mask of the last one that it shows.
            labels: instead of targets, as in transformers: (B, T), the ids themselves or ignore_index, shifted here if `causal`.
            cu_seqlens: (n + 1,) int32 or int64, rising from 0 to T: B = 1, and the row is n texts one after another, text d at
                positions cu_seqlens[d] .. cu_seqlens[d + 1]. None sees another, and the positions of each begin at 0, so
                T may be more than block_size. labels are not shifted over the ends.
            adapter_names: the adapter of each row, "__base__" for none; None: the active ones for all rows. Logits are those of
                the tokens, without the virtual ones of a soft prompt, which count in block_size. In labels the first token
                of a row counts too where a soft prompt is before it, as in peft.
            inputs_embeds: (B, T, C), instead of ids: vectors in the places of the token embeddings, to which positions are
                added as to these. Targets and labels are those of the same positions, ignore_index where there is no token.
            prefix_embeds: (B, n, C), vectors before the tokens of each row, which take the positions 0 to n - 1. Mask,
                targets, labels and logits are those of the tokens alone; labels of first tokens count.
            token_type_ids: (B, T) int64 or int32, the type of each token (BERT: 0 in the first text, 1 in the second); None: 0.
            next_sentence_label: (B,) int64, 0 where the second text follows the first, 1 where it does not: its mean
                cross-entropy is added to the loss.
            others: what transformers has besides is refused.
        Returns:
            Without targets: logits (B, T, V), or (B, V) with last_only.
            With targets or labels: (logits, loss), logits None in training mode; loss is a scalar.
        Raises:
            TypeError, ValueError: wrong dtype, shape or range; sequence too long.
        """
        if isinstance(ids, Mapping):
            named = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
            named |= {"token_type_ids": token_type_ids, "next_sentence_label": next_sentence_label}
            given = {name: value for name, value in named.items() if value is not None}
            options = {"ignore_index": ignore_index, "cache": cache, "last_only": last_only, "cu_seqlens": cu_seqlens}
            options |= {"adapter_names": adapter_names, "prefix_embeds": prefix_embeds}
            return self.forward(None, targets, **ids, **given, **options, **others)
        refuse("GPT", others, REFUSED)
        ids = one_of("ids", ids, "input_ids", input_ids)
        tokens = one_of("ids", ids, "inputs_embeds", inputs_embeds)
        check_form(tokens, inputs_embeds is not None, self.config.n_embd)
        if prefix_embeds is not None:
            columns = {"targets": targets, "attention_mask": attention_mask, "labels": labels}
            columns |= {"token_type_ids": token_type_ids}
            options = {"ignore_index": ignore_index, "cache": cache, "last_only": last_only, "cu_seqlens": cu_seqlens}
            return self._behind(prefix_embeds, tokens, columns, adapter_names=adapter_names, **options)
        padding = None if attention_mask is None else padded(tokens, attention_mask, cache)
        tokens = tokens if padding is None else padding.without(tokens)
        packed = None if cu_seqlens is None else packed_row(tokens, cu_seqlens, padding, cache, last_only, self.config)
        wanted = one_of("targets", targets, "labels", labels)
        check_call(self.config, tokens, wanted, cache, last_only, ignore_index, packed, self.training)
        beside = Beside.of(self.config, tokens, token_type_ids, padding)
        check_next_sentence(self.config, next_sentence_label, wanted, len(tokens))
        targets = wanted if labels is None or not self.config.causal else shifted(labels, ignore_index, packed)
        if targets is not None and padding is not None:
            targets = targets.masked_fill(~padding.counts, ignore_index)  # nothing is predicted from padding
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            numbers = self._take_numbers()
            adapters = self._selection(adapter_names, len(tokens), *numbers)
            tokens = tokens if padding is None else padding.compact(tokens)
            prefix = self._prefix(tokens, adapters, packed)
            reader = self.lm_head if self.lm_transform is None else None
            x = self._hidden(tokens, cache, numbers, adapters, packed, prefix, reader, beside)  # B T C, or with virtual
            ends = None
            if prefix is not None and x.shape[1] > tokens.shape[1]:
                x, ends = prefix.tokens(x), prefix.ends(x)
            if last_only:
                return self.logits_of(x[:, -1] if padding is None else padding.last(x), adapters)
            x = x if padding is None else padding.restore(x)
            if targets is None:
                return self.logits_of(x, adapters)
            if prefix is not None and ends is not None and labels is not None:
                x = torch.cat((x, ends), 1)
                targets = torch.cat((targets, prefix.firsts(labels, padding, ignore_index)), 1)
            wanted = targets.flatten()
            if self.training:
                logits, loss = None, self._training_loss(x, wanted, ignore_index, adapters)
            else:
                logits = self.logits_of(x, adapters)
                loss = ops.cross_entropy(logits.flatten(0, 1), wanted, ignore_index=ignore_index)
            if next_sentence_label is not None:
                loss = loss + ops.cross_entropy(self.next_sentence_logits(x, adapters), next_sentence_label)
            if self.training and self.adapters is not None:
                named = adapter_names is not None and self.adapters.enabled
                watch_rows(self, self.adapters, adapters) if named else watch(self, self.adapters, loss)
            if logits is None:
                return None, loss
            return logits if x.shape[1] == tokens.shape[1] else logits[:, : tokens.shape[1]], loss

    def hidden_states(
        self,
        ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        adapter_names: Sequence[str] | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """What the head multiplies: (B, T, C) after the last block and the final LayerNorm. Arguments as in `forward`."""
        padding = None if attention_mask is None else padded(ids, attention_mask, None)
        ids = ids if padding is None else padding.without(ids)
        check_call(self.config, ids, None, None, False, -100, None, self.training)
        beside = Beside.of(self.config, ids, token_type_ids, padding)
        numbers = self._take_numbers()
        adapters = self._selection(adapter_names, len(ids), *numbers)
        prefix = self._prefix(ids, adapters, None)
        ids = ids if padding is None else padding.compact(ids)
        x = self._hidden(ids, None, numbers, adapters, None, prefix, None, beside)
        x = x if prefix is None else prefix.tokens(x)
        return x if padding is None else padding.restore(x)

    def _hidden(
        self,
        ids: Tensor,
        cache: KVCache | None,
        numbers: tuple[int, int],
        adapters: Selection | None,
        packed: Packed | None = None,
        prefix: Prefix | None = None,
        reader: nn.Module | None = None,
        beside: Beside | None = None,
    ) -> Tensor:
        """Hidden states before the head, (B, T, C), or with the virtual tokens of soft prompts that these rows got now (see
        `Prefix`). Each forward has 1 + 3 n_layer dropouts, numbered in order. reader: the layer that alone takes them."""
        config, (seed, step) = self.config, numbers
        first, under = step * (1 + 3 * config.n_layer), {} if adapters is None else {"adapters": adapters}
        row = (self.dropout_row,) if self.dropout_row else ()
        residual, rotation = self._enter(ids, cache, adapters, packed, prefix, beside)
        under = under if rotation is None else {**under, "rotation": rotation}
        under = under if beside is None or beside.lengths is None else {**under, "seq_lens": beside.lengths}
        cu_seqlens = None if packed is None else packed.cu_seqlens if prefix is None else prefix.cu_seqlens
        if self.training and config.embd_pdrop > 0:
            residual = ops.dropout(residual, config.embd_pdrop, seed, first, first_row=self.dropout_row)
        branch = None
        again = self.recompute and self.training and cache is None and torch.is_grad_enabled()
        for layer, block in enumerate(self.h):
            options = {"rng": (seed, first + 1 + 3 * layer, *row), "cache": cache, "cu_seqlens": cu_seqlens, **under}
            if again:  # dropout is a function of rng: torch's own generator need not be kept
                branch, residual = checkpoint(
                    block, branch, residual, use_reentrant=False, preserve_rng_state=False, **options
                )
            else:
                branch, residual = block(branch, residual, **options)
        if cache is not None:
            cache.finish(ids.shape[1])
        return self._final_norm(branch, residual, seed, first + 3 * config.n_layer, adapters, reader)

    def _final_norm(
        self,
        branch: Tensor | None,
        residual: Tensor,
        seed: int,
        offset: int,
        adapters: Selection | None,
        reader: nn.Module | None,
    ) -> Tensor:
        """Add the last block's branch and normalise, as far as the config has these."""
        p = self.config.resid_pdrop if self.training else 0.0
        dropout = {"dropout_p": p, "seed": seed, "offset": offset} if p > 0 else {}
        if dropout and self.dropout_row:
            dropout["first_row"] = self.dropout_row
        if self.ln_f is None:
            return add_branch(branch, residual, dropout)
        out = written_for(reader, self.ln_f, residual)
        if branch is None:
            return call(self.ln_f, adapters, residual, **out)
        return call(self.ln_f, adapters, branch, residual, **dropout, **out)[0]

    def _take_numbers(self) -> tuple[int, int]:
        """(seed, step) of the dropouts of this forward."""
        c = self.config
        drops = c.embd_pdrop or c.attn_pdrop or c.resid_pdrop or (self.adapters is not None and self.adapters.drops)
        return self._dropout.take() if self.training and drops else (0, 0)

    def skip_forward(self) -> None:
        """Count a forward that is not run, so that the dropouts of later ones are the same as if it had been."""
        self._take_numbers()

    def _selection(self, adapter_names: Any, rows: int, seed: int, step: int) -> Selection | None:
        """The adapters of this forward; the dropouts before A are numbered as the others, apart from them."""
        state = self.adapters
        if state is None and adapter_names is None:
            return None
        state = state or AdapterState()
        rng = (seed, DROPOUTS + step * (1 + 4 * self.config.n_layer)) if self.training and state.drops else None
        if adapter_names is None:
            return state.selection(rng)
        return select_rows(state, adapter_names, rows, rng)
