"""Lightning modules: what is predicted, how it is scored, how it is optimised."""

from approx_attn.run.tasks.base import SequenceTask
from approx_attn.run.tasks.classification import ClassificationTask
from approx_attn.run.tasks.token_prediction import TokenPredictionTask
from approx_attn.run.tasks.translation import TranslationTask

__all__ = ["ClassificationTask", "SequenceTask", "TokenPredictionTask", "TranslationTask"]
