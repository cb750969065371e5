# SPDX-License-Identifier: Apache-2.0
"""What compression costs in accuracy: perplexity and recall, plain and through a real compressed cache."""

from kvopt.eval.documents import RecallDocument, read_documents, read_recall, windows_of
from kvopt.eval.log_likelihood import LogLikelihoodResult, log_likelihood, log_likelihood_rolling
from kvopt.eval.perplexity import PerplexityResult, paired_ratio, perplexity
from kvopt.eval.recall import RecallResult, recall

__all__ = [
    "LogLikelihoodResult",
    "PerplexityResult",
    "RecallDocument",
    "RecallResult",
    "log_likelihood",
    "log_likelihood_rolling",
    "paired_ratio",
    "perplexity",
    "read_documents",
    "read_recall",
    "recall",
    "windows_of",
]
