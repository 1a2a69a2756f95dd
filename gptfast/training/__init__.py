"""Training: configuration, loop, checkpoints, log, and a comparison of the training step with eager PyTorch."""

from gptfast.training.checkpoint import Checkpoint, read_checkpoint
from gptfast.training.config import TrainConfig
from gptfast.training.gradients import accumulate_gradients
from gptfast.training.trainer import Trainer, TrainResult

__all__ = ["Checkpoint", "TrainConfig", "TrainResult", "Trainer", "accumulate_gradients", "read_checkpoint"]
