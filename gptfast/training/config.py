"""TrainConfig: every choice of a training run, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from gptfast._options import Real, Whole, check_fields, describe_fields, device_option, option
from gptfast.training.config_checks import check_together

WARMUP_STEPS = 100
AUX_LOSS_COEF = 0.01  # Fedus et al., arXiv 2101.03961, section 2.2
_LEARNING, _RUN = "Learning", "The run"


@describe_fields
@dataclass(frozen=True)
class TrainConfig:
    """How a GPT is trained. A step is one update of the weights.

    Runs of one config and data are equal bit for bit on one machine, but for the number of steps under max_minutes.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range, or two that contradict each other.
    """

    objective: str = option(
        "lm",
        "What is learnt. lm: the next token, from those before it (GPT). mlm: tokens that are masked, from both sides, and whether "
        "the second of two texts follows the first (BERT).",
        allowed=("lm", "mlm"),
        group=_LEARNING,
    )
    mlm_probability: float = option(
        0.15,
        "Under mlm, the part of the tokens that are to be predicted: 80% of them are [MASK] in the input, 10% a random token, "
        "10% themselves. At least one in a row.",
        allowed=Real(above=0, below=1),
        group=_LEARNING,
    )
    whole_words: bool = option(False, "Under mlm, mask whole words instead of single pieces.", group=_LEARNING)
    no_next_sentence: bool = option(
        False, "Under mlm, one text in a row, and nothing learnt about next sentences.", group=_LEARNING
    )
    batch_size: int = option(
        32,
        "B, rows of text in one forward and backward pass. A larger batch gives a steadier gradient and a slower step. May "
        "change when a run is resumed, as `grad_accum` may.",
        allowed=Whole(1),
        group=_LEARNING,
    )
    grad_accum: int = option(
        1,
        "Passes whose gradients are summed into one step, which then sees `batch_size` * `grad_accum` rows: a larger batch "
        "without more memory.",
        allowed=Whole(1),
        group=_LEARNING,
    )
    batch_warmup_tokens: int = option(
        0,
        "Tokens over which a step grows from `batch_warmup_from` tokens to its whole size, a pass at a time. GPT-3: 4 to 12 "
        "billion. 0: every step has all its passes.",
        allowed=Whole(),
        group=_LEARNING,
    )
    batch_warmup_from: int = option(
        32_768,
        "Tokens of the first steps under `batch_warmup_tokens`; the default is GPT-3's.",
        allowed=Whole(1),
        group=_LEARNING,
    )
    sequence_warmup: int = option(
        0,
        "Steps over which rows grow from `sequence_warmup_from` tokens to T. A row is cut into shorter ones, so that a step has "
        "the same tokens; early steps are faster and steadier. An option of ours, of no published recipe. 0: all rows have T.",
        allowed=Whole(),
        group=_LEARNING,
    )
    sequence_warmup_from: int | None = option(
        None,
        "Tokens of the first rows under `sequence_warmup`. Lengths are the divisors of T.",
        words="an eighth of T",
        allowed=Whole(1),
        group=_LEARNING,
    )
    block_size: int | None = option(
        None, "T, tokens of one row.", words="the longest that the model takes", allowed=Whole(1)
    )
    pack_documents: bool = option(
        False,
        "Learn each document of a row as if it stood alone: attention stays inside it, its positions begin at 0, and nothing is "
        "predicted from the end of one to the beginning of the next. Without it a row is a window of the text. Needs more than "
        "one document to make a difference.",
        group=_LEARNING,
    )
    max_steps: int | None = option(
        2000,
        "Steps to train; without a limit `max_minutes` is needed.",
        words="{}, or no limit with `max_minutes`",
        allowed=Whole(1),
        group=_RUN,
    )
    max_minutes: float | None = option(
        None,
        "Wall-clock minutes to train, evaluations and checkpoints included. The number of steps that fit is planned from "
        "the measured speed, and again after every step, so that the learning rate still ends low.",
        words="no limit",
        allowed=Real(above=0),
        group=_RUN,
    )
    optimizer: str = option(
        "adamw",
        "adamw; muon: orthogonalised updates for the matrices inside the blocks and AdamW for the rest, which learns more "
        "from a token and needs more time for a step; or lion: the sign of a momentum, with half of AdamW's memory, a three to "
        "ten times smaller `learning_rate` and as much more `weight_decay`.",
        allowed=("adamw", "muon", "lion"),
        group=_LEARNING,
    )
    learning_rate: float = option(
        1e-3,
        "The largest learning rate, reached after the warm-up. Too high and the loss jumps; too low and it falls slowly.",
        allowed=Real(above=0, example="1e-3"),
        group=_LEARNING,
    )
    schedule: str = option(
        "cosine",
        "How the learning rate falls after the warm-up. cosine: half a cosine; linear: a line; wsd: it stays at its largest and "
        "falls on a line over the last `decay_share`.",
        allowed=("cosine", "linear", "wsd"),
        group=_LEARNING,
    )
    decay_share: float = option(
        0.2,
        "The part of the steps after the warm-up over which wsd falls.",
        allowed=Real(above=0, most=1),
        group=_LEARNING,
    )
    min_lr: float | None = option(
        None,
        "The learning rate at the end of the schedule.",
        words="a tenth of `learning_rate`",  # Brown et al., arXiv 2005.14165, appendix B
        allowed=Real(least=0),
        group=_LEARNING,
    )
    warmup_steps: int | None = option(
        None,
        "Steps over which the learning rate rises linearly from 0.",
        words=f"{WARMUP_STEPS}, at most a tenth of the steps",
        allowed=Whole(),
        group=_LEARNING,
    )
    lr_decay_steps: int | None = option(
        None, "The step at which the schedule ends.", words="the last step", allowed=Whole(1), group=_LEARNING
    )
    weight_decay: float = option(
        0.1,
        "Decoupled weight decay (AdamW) of matrices and embeddings; biases and LayerNorms have none.",
        allowed=Real(least=0, example="0.1"),
        group=_LEARNING,
    )
    beta1: float = option(
        0.9,
        "AdamW's decay of the first moment, Lion's share of the momentum in a step; the default is GPT-3's.",
        allowed=Real(0, below=1),
        group=_LEARNING,
    )
    beta2: float = option(
        0.95,
        "AdamW's decay of the second moment, Lion's of the momentum; the default is GPT-3's.",
        allowed=Real(0, below=1),
        group=_LEARNING,
    )
    grad_clip: float = option(
        1.0,
        "Largest norm of the gradient; a larger gradient is scaled down to it. 0: no clipping.",
        allowed=Real(least=0, example="1.0 (0: no clipping)"),
        group=_LEARNING,
    )
    router_aux_loss_coef: float | None = option(
        None,
        "Of a model with experts: weight of the loss that spreads tokens over them; it is added to the loss that is minimised, not "
        "to the one in the log. Too small and a few experts get all tokens; too large and the router learns nothing else. 0: none.",
        words=f"{AUX_LOSS_COEF:g} where the model has experts",
        allowed=Real(least=0, example="0.01"),
        group=_LEARNING,
    )
    ema: float = option(
        0.0,
        "Decay of a moving average of the weights, such as 0.999. It is evaluated too, and its best is kept in OUT/best-ema. 0: "
        "none is kept.",
        allowed=Real(0, below=1, example="0.999"),
        group=_LEARNING,
    )
    eval_every: int = option(250, "Steps between evaluations on the validation text.", allowed=Whole(1), group=_RUN)
    eval_batches: int = option(
        20,
        "Batches of validation text in an evaluation, the same ones each time; 0: all of the validation text.",
        allowed=Whole(),
        group=_RUN,
    )
    checkpoint_every: int | None = option(
        None, "Steps between checkpoints in OUT/last.", words="`eval_every`", allowed=Whole(1), group=_RUN
    )
    keep_last: int = option(
        1,
        "Newest checkpoints to keep: OUT/last, and those before it as OUT/step-N. Where the newest is damaged, `resume` takes "
        "the one before.",
        allowed=Whole(1),
        group=_RUN,
    )
    patience: int | None = option(
        None,
        "Evaluations in a row without a better one after which training ends early.",
        words="train to the last step",
        allowed=Whole(1),
        group=_RUN,
    )
    on_spike: str | None = option(
        None,
        "What to do about a step whose loss or gradient is not finite or far above those before. skip: leave its batch out. "
        "rewind: go back to the last checkpoint, and leave its batch out on the way. stop: end with an error.",
        words="a note in the log, and an error where they are not finite",
        allowed=("skip", "rewind", "stop"),
        group=_RUN,
    )
    log_every: int = option(10, "Steps between records in OUT/log.jsonl.", allowed=Whole(1), group=_RUN)
    seed: int = option(
        0,
        "Seed of the initial weights, of the order of the text and of dropout, in [0, 2**63). The same command and seed give "
        "the same bits on the same machine, busy or not (with `max_minutes`: as many steps as the time allows).",
        allowed=Whole(),
        group=_RUN,
    )
    dtype: str = option(
        "auto",
        "Dtype of the matrix products: float32, bfloat16 (8 bits of precision; weights stay float32), or auto: bfloat16 "
        "where the CPU (AVX-512 BF16, AMX) or GPU has instructions for it.",
        allowed=("auto", "float32", "bfloat16"),
        group=_RUN,
    )
    compile: bool = option(
        False,
        "Run the network through torch.compile: a minute at the start, on the CPU with a C++ compiler.",
        group=_RUN,
    )
    device: str = device_option(_RUN)
    recompute: bool = option(
        False,
        "Keep no activations inside the blocks, but compute these again in the backward pass: less memory, more time, the "
        "same bits.",
        group=_RUN,
    )

    def __post_init__(self) -> None:
        check_fields("TrainConfig", self)
        if not isinstance(self.device, str):
            raise TypeError(f"TrainConfig: device is {self.device!r}; expected a str such as 'cpu' or 'cuda'")
        if self.seed >= 2**63:
            raise ValueError(f"TrainConfig: seed is {self.seed}; expected a seed in [0, 2**63)")
        check_together(self)

    def replace(self, **changes: Any) -> TrainConfig:
        """A checked copy with some fields changed.

        Raises:
            TypeError: an unknown field.
        """
        names = [f.name for f in fields(self)]
        for name in changes:
            if name not in names:
                raise TypeError(f"TrainConfig has no field {name!r}; it has {', '.join(names)}")
        return replace(self, **changes)

    @property
    def rows_per_step(self) -> int:
        """Rows of tokens in one step."""
        return self.batch_size * self.grad_accum

    def passes(self, tokens: int, tokens_per_row: float) -> int:
        """Passes of the step that begins after `tokens` tokens of training: `grad_accum`, or fewer in the batch's warm-up."""
        if tokens >= self.batch_warmup_tokens:
            return self.grad_accum
        whole = self.rows_per_step * tokens_per_row
        wanted = self.batch_warmup_from + (whole - self.batch_warmup_from) * tokens / self.batch_warmup_tokens
        return min(self.grad_accum, max(1, round(wanted / (self.batch_size * tokens_per_row))))

    @property
    def lowest_rate(self) -> float:
        """The learning rate at the end of the schedule."""
        return self.learning_rate / 10 if self.min_lr is None else self.min_lr

    @property
    def steps_per_checkpoint(self) -> int:
        """Steps between checkpoints."""
        return self.eval_every if self.checkpoint_every is None else self.checkpoint_every
