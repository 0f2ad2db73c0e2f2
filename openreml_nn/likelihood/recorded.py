"""The log-likelihood as one operation of autograd."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from openreml_nn.likelihood.problem import Problem
from openreml_nn.terms.term import Term

__all__ = ["LogLikelihood"]


class LogLikelihood(torch.autograd.Function):
    """A multiple of the log-likelihood of a prepared problem with its closed-form score.

    Under ``create_graph`` the score itself is recorded, through the plain
    formula of the likelihood.
    """

    @staticmethod
    def forward(
        ctx: Any,
        problem: Problem,
        terms: list[Term],
        scale: float,
        y: Tensor,
        Q: Tensor,
        *matrices: Tensor,
    ) -> Tensor:
        ctx.problem, ctx.scale = problem, scale
        ctx.evaluation = problem.evaluate(terms)
        ctx.save_for_backward(y, Q, *matrices)
        return ctx.evaluation.log_likelihood * scale

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[3:]
        found: list[Tensor | None] = [None] * len(needed)
        if torch.is_grad_enabled():
            y, Q, *matrices = ctx.saved_tensors
            problem = ctx.problem
            problem.check_rounding(ctx.evaluation.recorded_rounding)
            if any(needed[:2]):
                problem = problem.with_fixed(replace(problem.fixed, y=y, Q=Q))
            value = problem.recorded(matrices)
            wanted = [t for t, need in zip((y, Q, *matrices), needed, strict=True) if need]
            parts = iter(torch.autograd.grad(value, wanted, create_graph=True))
            found = [next(parts) if need else None for need in needed]
        else:
            if any(needed[:2]):
                found[:2] = ctx.evaluation.data_scores()
            if any(needed[2:]):
                found[2:] = ctx.evaluation.scores()
        cotangent = cotangent * ctx.scale
        scaled = [
            part * cotangent if need and part is not None else None
            for part, need in zip(found, needed, strict=True)
        ]
        return (None, None, None, *scaled)
