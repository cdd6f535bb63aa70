"""Search among the token sequences of a vocabulary, the lattice of texts, for one with the embedding of a target."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_equiv import bars
from hf_equiv.checks import check_count, check_embeddings, check_rtol
from hf_equiv.matching.search import ProgressHook
from hf_equiv.precision import no_tf32
from hf_equiv.results import Progress, Status
from hf_equiv.text.encoder import TextEncoder

_TRIALS = 48  # texts that are tried at once, for 16 evaluations
_FEWEST, _MOST = 16, 1024  # exchanges of a token among which is drawn; twice as many after a step without success
_EXCHANGES, _SWAPS = (
    0.6,
    0.8,
)  # share of the trials that exchange a token, and with those that swap two; others move one
_DRAWS = 8  # times the trials: draws after which no new text is expected


@dataclass(frozen=True, slots=True)
class TokenResult:
    """Texts whose embedding is near that of a target, one for each source.

    Attributes:
        texts: the best text of each source.
        embeddings: their embeddings, computed from the texts alone, (N, D).
        errors: embedding errors ‖f(text) − z‖ / ‖z‖, (N,), float64.
        cosines: cosine similarities of f(text) and z, (N,), float64.
        shared: share of the tokens of each text that are also in its target; None if targets were embeddings.
        num_evals: evaluations spent on each, (N,), float64; an embedding is a third of one.
        seconds: wall time of each, (N,), float64.
        status: `converged`, `max_evals`, or `stalled` where no untried exchange was left.
    """

    texts: tuple[str, ...]
    embeddings: Tensor
    errors: Tensor
    cosines: Tensor
    shared: Tensor | None
    num_evals: Tensor
    seconds: Tensor
    status: tuple[Status, ...]

    def __repr__(self) -> str:
        """State the number of texts, their cosines and cost in one line."""
        cosines = " to ".join(f"{value:.4f}" for value in (self.cosines.min(), self.cosines.max()))
        return f"TokenResult({len(self.texts)} texts; cosines {cosines}; {self.num_evals.sum():.0f} evaluations)"


def refine_tokens(
    f: TextEncoder,
    texts: Sequence[str],
    target: Sequence[str] | Tensor,
    *,
    rtol: float = 0.05,
    max_evals: int = 2000,
    generator: torch.Generator | None = None,
    progress: ProgressHook | bool | None = None,
) -> TokenResult:
    """Change the tokens of texts until their embeddings are those of a target.

    Minimises ‖f(e(i₁), …, e(i_T)) − z‖ over token ids i. Each step takes the gradient g of ½‖f − z‖² in the token
    embeddings, and draws trials: exchanges of a token i_t for one of the v that promise the largest decrease,
    −g_t·(e(v) − e(i_t)), swaps of two tokens, and moves of one. All trials are embedded. The best one that improves,
    and whose text is tokenised into the same tokens again, is taken. T stays that of the source.

    The texts found are no language: fluency is left out. A text with the tokens of its target is never taken.

    Args:
        f: the text encoder.
        texts: texts to start from.
        target: one text or as many as `texts`, or embeddings (1 or N, D).
        rtol: embedding error at which a text is done; 0.05 is a cosine of 0.99875 for unit embeddings.
        max_evals: evaluations for each text: one for a gradient, a third for the embedding of a trial.
        generator: random numbers of the draws; None for the seed 0.
        progress: called with a `Progress` after every step, or True or False for a bar.

    Returns:
        The best texts, with errors of the embeddings computed from these texts.

    Raises:
        TypeError: a single string in place of a sequence.
        ValueError: a text that the encoder refuses, or targets of another number or dimension.

    References:
        Ebrahimi et al. (2018), arXiv:1712.06751, eq. 10; Zou et al. (2023), arXiv:2307.15043, algorithm 1.
    """
    check_rtol(rtol)
    check_count(max_evals, "max_evals")
    if isinstance(texts, str) or isinstance(target, str):
        raise TypeError("`texts` and `target` must be sequences of strings; got a single one. Pass [text].")
    sources = [f.tokenize(text) for text in texts]
    own = None if isinstance(target, Tensor) else [f.tokenize(text) for text in target]
    z = target if isinstance(target, Tensor) else f.encode(target)
    if z.ndim != 2 or z.shape[1] != f.embedding_dim or len(z) not in (1, len(sources)) or not sources:
        raise ValueError(
            f"`target` must be one text or embedding (1, {f.embedding_dim}), or as many as `texts` ({len(sources)}); "
            f"got {len(z) if own else tuple(z.shape)}."
        )
    check_embeddings(z)
    z, own = z.to(f.device).double().expand(len(sources), -1), own and own * (len(sources) // len(own))
    drawn, words = generator or torch.Generator().manual_seed(0), _words(f)
    searches = [
        _Search(f, words, ids, z[i], own[i] if own else None, rtol, max_evals, drawn) for i, ids in enumerate(sources)
    ]
    with bars.shown(progress, "refine", bars.errors_to(rtol)) as hook, no_tf32():
        for search in searches:
            for _ in search.steps():
                if hook is not None:
                    hook(_snapshot(searches))
    found = tuple(f.text_of(search.ids) for search in searches)
    embeddings = f.encode(found)
    wide = embeddings.double()
    return TokenResult(
        found,
        embeddings,
        ((wide - z).norm(dim=1) / z.norm(dim=1)).cpu(),
        torch.nn.functional.cosine_similarity(wide, z).cpu(),
        None if own is None else _column([_shared(s.ids, s.own or []) for s in searches]),
        _column([search.thirds / 3 for search in searches]),
        _column([search.seconds for search in searches]),
        tuple(search.status for search in searches),
    )


def round_tokens(f: TextEncoder, tokens: Tensor) -> list[str]:
    """Return the text of the nearest token of the vocabulary to each token embedding, by Euclidean distance.

    Args:
        f: the text encoder.
        tokens: token embeddings, such as those of a float match, (B, T, d).

    Returns:
        B texts.
    """
    ids, rows = _words(f)
    return [f.text_of(ids[torch.cdist(one.double(), rows.double()).argmin(dim=1)].tolist()) for one in tokens]


class _Search:
    """The search for one text: its tokens, their error, and the cost so far."""

    def __init__(
        self, f: TextEncoder, words: tuple[Tensor, Tensor], ids: list[int], z: Tensor, own: list[int] | None,
        rtol: float, max_evals: int, generator: torch.Generator,
    ) -> None:  # fmt: skip
        self.f, self.ids, self.z, self.own = f, ids, z, own
        self.rtol, self.thirds_left, self.generator = rtol, 3 * max_evals, generator
        self.thirds, self.seconds, self.error, self.status = 0, 0.0, float("inf"), Status.MAX_EVALS
        self.tried, self.width = {tuple(ids), tuple(own or [])}, _FEWEST
        self.choice, self.rows = words

    def steps(self) -> Iterator[None]:
        """Take steps until the search ends."""
        while self.thirds + 3 < self.thirds_left:
            began = time.perf_counter()
            ranked = self._rank()
            trials = [] if self.error <= self.rtol else self._draw(ranked)
            taken = self._try(trials)
            self.width = _FEWEST if taken else min(2 * self.width, _MOST)
            self.seconds += time.perf_counter() - began
            yield
            if not trials or self.error <= self.rtol:
                self.status = Status.CONVERGED if self.error <= self.rtol else Status.STALLED
                return

    def _rank(self) -> list[list[int]]:
        """Return for each position the tokens that promise the largest decrease, the best first."""
        x = self.f.tokens_of(self.ids).requires_grad_(True)
        with torch.enable_grad():
            residual = self.f(x)[0].double() - self.z
            (gradient,) = torch.autograd.grad(0.5 * residual.square().sum(), x)
        self.error = float(residual.detach().norm() / self.z.norm())
        self.thirds += 3
        order = (gradient[0] @ self.rows.T).topk(min(self.width, len(self.rows)), dim=1, largest=False).indices
        return self.choice[order].tolist()

    def _draw(self, ranked: list[list[int]]) -> list[list[int]]:
        """Draw texts that were not tried before."""
        count, most = len(self.ids), min(_TRIALS, self.thirds_left - self.thirds)
        kinds = torch.rand(_DRAWS * _TRIALS, generator=self.generator).tolist()
        places = torch.randint(count, (_DRAWS * _TRIALS, 2), generator=self.generator).tolist()
        ranks = torch.randint(len(ranked[0]), (_DRAWS * _TRIALS,), generator=self.generator).tolist()
        trials: list[list[int]] = []
        for kind, (i, j), rank in zip(kinds, places, ranks, strict=True):
            ids = list(self.ids)
            if kind < _EXCHANGES:
                ids[i] = ranked[i][rank]
            elif kind < _SWAPS:
                ids[i], ids[j] = ids[j], ids[i]
            else:
                ids.insert(j, ids.pop(i))
            if tuple(ids) not in self.tried and len(trials) < most:
                self.tried.add(tuple(ids))
                trials.append(ids)
        return trials

    def _try(self, trials: list[list[int]]) -> bool:
        """Embed the trials, and take the best one that improves and survives its tokeniser."""
        if not trials:
            return False
        z = self.f.embed_ids(torch.tensor(trials, device=self.f.device)).double()
        errors = ((z - self.z).norm(dim=1) / self.z.norm()).tolist()
        self.thirds += len(trials)
        for error, ids in sorted(zip(errors, trials, strict=True)):
            if error >= self.error:
                return False
            if self._survives(ids):
                self.error, self.ids = error, ids
                return True
        return False

    def _survives(self, ids: list[int]) -> bool:
        try:
            return self.f.tokenize(self.f.text_of(ids)) == ids
        except ValueError:
            return False


def _words(f: TextEncoder) -> tuple[Tensor, Tensor]:
    """Return the ids of the tokens that texts are made of, without special ones, and their embeddings."""
    return torch.tensor(f.words, device=f.device), f.tokens_of(f.words)[0]


def _shared(ids: Sequence[int], own: Sequence[int]) -> float:
    return sum(one in set(own) for one in ids) / len(ids)


def _column(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _snapshot(searches: Sequence[_Search]) -> Progress:
    active = torch.tensor([0 < s.thirds and s.status is Status.MAX_EVALS for s in searches])
    ids = torch.zeros(len(searches), 1)
    return Progress(ids, _column([s.error for s in searches]), _column([s.thirds / 3 for s in searches]), active)
