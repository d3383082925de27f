"""The language-model head, applied only where a token counts, and never to the whole vocabulary at once.

A tensor [N, V] is what a training step of a small model spends most of its memory on: 4,000 tokens of a vocabulary of
128,000 words are 2 GB in float32, and autograd holds three of them. Here the vocabulary is walked in chunks. The head is
frozen, so a token's loss depends on its hidden state alone, and the gradient with respect to that state is known in
the forward pass already:

    d logp_n   / d h_n = W[y_n] - sum_v softmax(z_n)_v W[v]      accumulated chunk by chunk with a running maximum
    d margin_n / d h_n = W[argmax_v z_nv] - mean_v W[v]          one head row per token

so nothing is recomputed in backward. The running maximum is that of FlashAttention (Dao et al. 2022, arXiv 2205.14135);
computing the gradient in the forward pass is Liger Kernel's (Hsu et al. 2024, arXiv 2410.10989).

Sums are float32 (float64 if the inputs are). First derivatives only: asking for a second one raises.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from worker.tokens import Distribution

CHUNK_BYTES = 64 * 2**20  # of one chunk of logits: large enough for a fast product, small beside any model
CACHED_BYTES = 4 * 2**20  # a chunk of columns that stays in a CPU's cache is done in two thirds of the time


@dataclass(frozen=True, eq=False)
class Head:
    """The frozen output projection, cut to the tokeniser's vocabulary: rows that no token has would enter the mean.

    Raises:
        ValueError: the weight or the bias is trained; their gradient is not computed here.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None

    def __post_init__(self) -> None:
        if self.weight_VD.requires_grad or (self.bias_V is not None and self.bias_V.requires_grad):
            raise ValueError("the head must be frozen: the fused predictions give no gradient for it")

    @cached_property
    def mean_D(self) -> Tensor:
        return self.weight_VD.mean(0, dtype=_wide(self.weight_VD.dtype))

    @cached_property
    def mean_bias(self) -> Tensor | float:
        return 0.0 if self.bias_V is None else self.bias_V.mean(dtype=_wide(self.bias_V.dtype))

    def logits(self, hidden_ND: Tensor) -> Tensor:
        return linear(hidden_ND, self.weight_VD, self.bias_V)


class _HiddenStates:
    """What both kinds of predictions know: the states that the head reads and, where a loss asked for them, inner ones."""

    last_ND: Tensor
    target_N: Tensor
    inner_ND: Tensor | None
    vocabulary: int
    _known_N: Tensor | None = None

    def logp_N(self) -> Tensor:
        """See worker.tokens.Predictions. Computed once: a loss, a metric and the bounded NLL ask for the same."""
        known_N = self._known_N
        if known_N is None or (_wants_grad(self.last_ND) and not known_N.requires_grad):
            known_N = self._known_N = self._logp_N()
        return known_N

    def _logp_N(self) -> Tensor:
        raise NotImplementedError

    def hidden_ND(self) -> Tensor:
        return self.last_ND if self.inner_ND is None else self.inner_ND

    def logits_nV(self, h_nD: Tensor) -> Tensor:
        """Whole rows of logits over the tokeniser's vocabulary, in the wide type."""
        raise NotImplementedError

    def map_logits(self, f: Callable[..., Tensor], *others: Any) -> Tensor:
        """See worker.tokens.Predictions."""

        def on_chunk(h_nD: Tensor, at: slice) -> Tensor:
            with torch.no_grad():
                theirs = [other.logits_nV(other.last_ND[at]) for other in others]
            return f(self.target_N[at], self.logits_nV(h_nD), *theirs)

        return _map_tokens(on_chunk, self.last_ND, (1 + len(others)) * self.vocabulary)


class FusedPredictions(_HiddenStates):
    """worker.tokens.Predictions for a plain linear head: logits = W h + b."""

    def __init__(self, last_ND: Tensor, target_N: Tensor, head: Head, inner_ND: Tensor | None = None) -> None:
        """
        Args:
            last_ND: what the head reads at the N positions that predict a counted token.
            inner_ND: the states at the same positions at the depth that a loss asked for; None: those that the head reads.
        """
        self.last_ND, self.target_N, self.inner_ND = last_ND, target_N, inner_ND
        self.head, self.vocabulary = head, len(head.weight_VD)

    def logits_nV(self, h_nD: Tensor) -> Tensor:
        return _widened(self.head.logits(h_nD))

    def _logp_N(self) -> Tensor:
        if _wants_grad(self.last_ND):
            return _LogProb.apply(self.last_ND, self.target_N, self.head)  # type: ignore[no-any-return,no-untyped-call]
        return _logp(self.last_ND, self.target_N, self.head, with_grad=False).value_N

    def margin_N(self) -> Tensor:
        return _Margin.apply(self.last_ND, self.head)  # type: ignore[no-any-return,no-untyped-call]

    @torch.no_grad()
    def distribution(self) -> Distribution:
        """See worker.tokens.Predictions."""
        return _distribution(_logits_by_chunk(self.last_ND, self.head), self.target_N)


class PlainPredictions(_HiddenStates):
    """The same for any other head (a cap or a scale on the logits): whole rows of logits, a chunk of tokens at a time."""

    def __init__(
        self,
        last_ND: Tensor,
        target_N: Tensor,
        logits: Callable[[Tensor], Tensor],
        vocabulary: int,
        inner_ND: Tensor | None = None,
    ) -> None:
        """
        Args:
            logits: hidden states [n, D] -> the model's own logits [n, at least `vocabulary`].
            vocabulary: of the tokeniser; logits beyond it are cut off.
        """
        self.last_ND, self.target_N, self.inner_ND = last_ND, target_N, inner_ND
        self.logits, self.vocabulary = logits, vocabulary

    def logits_nV(self, h_nD: Tensor) -> Tensor:
        return _widened(self.logits(h_nD)[:, : self.vocabulary])

    def _logp_N(self) -> Tensor:
        return self.map_logits(lambda y_n, z_nV: z_nV.log_softmax(-1).gather(1, y_n[:, None])[:, 0])

    def margin_N(self) -> Tensor:
        return self.map_logits(lambda _, z_nV: z_nV.max(-1).values - z_nV.mean(-1))

    @torch.no_grad()
    def distribution(self) -> Distribution:
        """See worker.tokens.Predictions."""
        parts = [
            _distribution([(0, self.logits_nV(self.last_ND[at]))], self.target_N[at])
            for at in _token_chunks(self.last_ND, self.vocabulary)
        ]
        return Distribution(*(torch.cat(values) for values in zip(*parts, strict=True)))


class _LogpResult(NamedTuple):
    value_N: Tensor
    grad_ND: Tensor | None


def _logp(h_ND: Tensor, target_N: Tensor, head: Head, *, with_grad: bool) -> _LogpResult:
    """log softmax(W h + b)[target] and its gradient in h, in one walk over the vocabulary."""
    wide = _wide(h_ND.dtype)
    top_N = h_ND.new_full((len(h_ND),), -torch.inf, dtype=wide)  # running maximum
    sum_N = torch.zeros_like(top_N)  # of exp(z - top)
    target_logit_N = torch.zeros_like(top_N)
    pull_ND = torch.zeros_like(h_ND, dtype=wide) if with_grad else None  # sum of exp(z - top) W
    for start, z_Nv in _logits_by_chunk(h_ND, head):
        width = z_Nv.shape[1]
        at_N = target_N - start
        found_N = z_Nv.gather(1, at_N.clamp(0, width - 1)[:, None])[:, 0]
        target_logit_N = torch.where((at_N >= 0) & (at_N < width), found_N, target_logit_N)
        new_top_N = torch.maximum(top_N, z_Nv.amax(1))
        shrink_N = (top_N - new_top_N).exp()
        e_Nv = z_Nv.sub_(new_top_N[:, None]).exp_()
        sum_N = sum_N * shrink_N + e_Nv.sum(1)
        if pull_ND is not None:
            rows_vD = head.weight_VD[start : start + width]
            pull_ND = pull_ND.mul_(shrink_N[:, None]).add_(_product(e_Nv, rows_vD, wide))
        top_N = new_top_N
    value_N = target_logit_N - (top_N + sum_N.log())
    if pull_ND is None:
        return _LogpResult(value_N, None)
    return _LogpResult(value_N, head.weight_VD[target_N].to(wide) - pull_ND.div_(sum_N[:, None]))


def _distribution(chunks: Iterable[tuple[int, Tensor]], target_N: Tensor) -> Distribution:
    """From the logits, a chunk of the vocabulary at a time; they are overwritten.

    With x = z - top and running sums s, s_x, s_xx of exp(x), x exp(x), x^2 exp(x): mean = s_x / s - log s and variance =
    s_xx / s - (s_x / s)^2. A higher top shifts every x so far.
    """
    top_N = s_N = s_x_N = s_xx_N = target_logit_N = torch.zeros(0)
    likeliest_N = torch.zeros_like(target_N)
    for start, z_Nv in chunks:
        if start == 0:
            top_N = z_Nv.new_full((len(z_Nv),), torch.finfo(z_Nv.dtype).min)
            s_N = s_x_N = s_xx_N = target_logit_N = torch.zeros_like(top_N)
        width = z_Nv.shape[1]
        at_N = target_N - start
        found_N = z_Nv.gather(1, at_N.clamp(0, width - 1)[:, None])[:, 0]
        target_logit_N = torch.where((at_N >= 0) & (at_N < width), found_N, target_logit_N)
        here_N, at_N = z_Nv.max(1)
        likeliest_N = torch.where(here_N > top_N, at_N + start, likeliest_N)
        new_top_N = torch.maximum(top_N, here_N)
        shift_N = (top_N - new_top_N).clamp(min=-1e4)  # beyond that exp(shift) is 0, and the square must stay finite
        shrink_N = shift_N.exp()
        s_xx_N = shrink_N * (s_xx_N + 2 * shift_N * s_x_N + shift_N.square() * s_N)
        s_x_N = shrink_N * (s_x_N + shift_N * s_N)
        x_Nv = z_Nv.sub_(new_top_N[:, None])
        e_Nv = x_Nv.exp()
        s_N = shrink_N * s_N + e_Nv.sum(1)
        s_x_N = s_x_N + e_Nv.mul_(x_Nv).sum(1)
        s_xx_N = s_xx_N + e_Nv.mul_(x_Nv).sum(1)
        top_N = new_top_N
    mean_x_N, log_s_N = s_x_N / s_N, s_N.log()
    variance_N = (s_xx_N / s_N - mean_x_N.square()).clamp(min=0.0)
    return Distribution(target_logit_N - top_N - log_s_N, likeliest_N, mean_x_N - log_s_N, variance_N)


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, target_N: Tensor, head: Head) -> Tensor:
        value_N, grad_ND = _logp(h_ND, target_N, head, with_grad=True)
        assert grad_ND is not None
        ctx.save_for_backward(grad_ND)
        ctx.dtype = h_ND.dtype
        return value_N

    @staticmethod
    def backward(ctx: Any, up_N: Tensor) -> tuple[Tensor, None, None]:
        _refuse_second_derivative()
        (grad_ND,) = ctx.saved_tensors
        return (grad_ND * up_N[:, None]).to(ctx.dtype), None, None


class _Margin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, head: Head) -> Tensor:
        wide = _wide(h_ND.dtype)
        top_N = h_ND.new_full((len(h_ND),), -torch.inf, dtype=wide)
        argmax_N = torch.zeros(len(h_ND), dtype=torch.int64, device=h_ND.device)
        for start, z_Nv in _logits_by_chunk(h_ND, head):
            here_N, at_N = z_Nv.max(1)
            argmax_N = torch.where(here_N > top_N, at_N + start, argmax_N)
            top_N = torch.maximum(top_N, here_N)
        ctx.save_for_backward(argmax_N)
        ctx.head, ctx.dtype = head, h_ND.dtype
        return top_N - (h_ND.to(wide) @ head.mean_D.to(wide) + head.mean_bias)

    @staticmethod
    def backward(ctx: Any, up_N: Tensor) -> tuple[Tensor, None]:
        _refuse_second_derivative()
        (argmax_N,) = ctx.saved_tensors
        grad_ND = ctx.head.weight_VD[argmax_N].to(up_N.dtype) - ctx.head.mean_D.to(up_N.dtype)
        return grad_ND.mul_(up_N[:, None]).to(ctx.dtype), None


def _refuse_second_derivative() -> None:
    # torch's once_differentiable raises only if the incoming gradient is itself differentiable; else a term would be lost.
    if torch.is_grad_enabled():  # in a backward pass: create_graph=True
        raise RuntimeError("the fused predictions have first derivatives only; use finite differences of gradients")


def _logits_by_chunk(h_ND: Tensor, head: Head) -> Iterator[tuple[int, Tensor]]:
    """First column and logits [N, v] of each chunk of the vocabulary, in the wide type; the caller may overwrite them."""
    wide = _wide(h_ND.dtype)
    budget = min(CHUNK_BYTES, CACHED_BYTES) if h_ND.device.type == "cpu" else CHUNK_BYTES
    width = max(1, budget // (max(len(h_ND), 1) * wide.itemsize))
    for start in range(0, len(head.weight_VD), width):
        z_Nv = _product(h_ND, head.weight_VD[start : start + width].T, wide)
        if head.bias_V is not None:
            z_Nv += head.bias_V[start : start + width].to(wide)
        yield start, z_Nv


def _map_tokens(f: Callable[[Tensor, slice], Tensor], h_ND: Tensor, width: int) -> Tensor:
    """f over chunks of tokens, small enough that `width` numbers for each fit the budget; recomputed in backward."""
    done = []
    for at in _token_chunks(h_ND, width):
        if _wants_grad(h_ND):
            done.append(checkpoint(f, h_ND[at], at, use_reentrant=False, preserve_rng_state=False))
        else:
            done.append(f(h_ND[at], at))
    return torch.cat(done)


def _token_chunks(h_ND: Tensor, width: int) -> Iterator[slice]:
    count = max(1, CHUNK_BYTES // (width * _wide(h_ND.dtype).itemsize))
    for start in range(0, max(len(h_ND), 1), count):
        yield slice(start, start + count)


def _product(a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """a @ b, summed and returned in the wide type, whatever the type of the factors."""
    if a.is_cuda and b.element_size() == 2:  # tensor cores multiply half precision and sum in float32
        return torch.mm(a.to(b.dtype), b, out_dtype=wide)
    return a.to(wide) @ b.to(wide)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _widened(z: Tensor) -> Tensor:
    return z.to(_wide(z.dtype))


def _wants_grad(t: Tensor) -> bool:
    return torch.is_grad_enabled() and t.requires_grad
