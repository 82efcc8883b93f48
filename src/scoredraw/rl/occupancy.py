r"""A penalty for being where the reference policy never is, from a network that tells them apart.

A discriminator d(s, a) is trained on what both policies did to minimise

    E_π[softplus(-d)] + E_ref[softplus(d)],      best at d* = log mu_π/mu_ref,

and each step of the policy is then paid -coef · D on top of its reward:

    "kl"           D = d
    "chi2"         D = e^d - 1
    "sqrt_chi2"    D = (e^d - 1)/√c, c the trimmed mean of e^d - 1 over the batch
    "tv"           D = sign d                  (a discriminator with a loss of its own)
    "wasserstein"  D = d                       (a critic: Lipschitz, not a log-ratio)

At d* the mean of D over the policy is KL, χ² and √χ² of the occupancies. As a gradient "kl" and
"sqrt_chi2" are those divergences' own (up to a constant, which no policy can change); "chi2" is
half of it, the slope of χ² being 2 e^d. A language model needs no discriminator: see
`sequence_occupancy_penalty`.

Laidlaw, Singhal and Dragan 2024, arXiv 2403.03185 ("ORPO", which is not the odds-ratio method). The
released code takes the slice [i : -i] of the sorted values with i = int(0.01 N); below 100 values
that is empty and c is NaN: here nothing is trimmed then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, pad, softplus

from scoredraw.errors import require
from scoredraw.rl.divergences import sequence_log_ratio

KINDS = ("kl", "chi2", "sqrt_chi2", "tv", "wasserstein")
LARGEST = 20.0  # of d before e^d: a discriminator that is surer than that has seen no overlap


# ── the penalty ─────────────────────────────────────────────────────────────────────────────────


def occupancy_penalty(
    logits: Any,
    kind: str = "sqrt_chi2",
    coef: float = 1.0,
    clip: float | None = None,
    trim: float = 0.01,
    reference_logits: Any = None,
) -> Tensor:
    """-coef · D of each step, to be added to its reward: (N,), clipped to [-clip, clip].

    logits: (N,) d of the policy's steps. D as `pointwise_divergence`, which trim and
    reference_logits go to. Raises InputError as that, for coef < 0 and for clip <= 0.

    >>> occupancy_penalty([0.0, 1.0], kind="kl", coef=0.5)
    tensor([-0.0000, -0.5000])
    """
    require(0 <= coef < float("inf"), "coef", coef, "a number of at least 0")
    require(clip is None or clip > 0, "clip", clip, "a positive number or None")
    penalty = -coef * pointwise_divergence(logits, kind, trim, reference_logits)
    return penalty if clip is None else penalty.clamp(-clip, clip)


def pointwise_divergence(
    logits: Any, kind: str = "sqrt_chi2", trim: float = 0.01, reference_logits: Any = None
) -> Tensor:
    """D of each of N discriminator logits, (N,), without a gradient; half precision to float32.

    trim: the share left out at each end of the sorted e^d - 1 for c, nothing below one value; where
    c <= 0, D is e^d - 1. reference_logits: "wasserstein" only, their mean is subtracted, so that
    the mean of D is the distance. d is clamped to at most 20 before e^d; what is still no finite
    number becomes 0, and is not in c. Raises InputError for shapes, N = 0, an unknown kind, and
    trim outside [0, 1/2). Needs the whole batch ("sqrt_chi2"), else row-local. O(N log N).

    >>> pointwise_divergence([-1.0, 0.0, 1.0]).round(decimals=3)
    tensor([-1.0510,  0.0000,  2.8560])
    """
    d = _logits(logits, "logits")
    require(kind in KINDS, "kind", repr(kind), ", ".join(KINDS))
    require(0 <= trim < 0.5, "trim", trim, "a share in [0, 0.5)")
    only = reference_logits is None or kind == "wasserstein"
    require(only, "reference_logits", f"kind {kind!r}", "kind 'wasserstein'")
    if kind in {"chi2", "sqrt_chi2"}:
        found = torch.expm1(d.clamp(max=LARGEST))
        if kind == "sqrt_chi2":
            c = _trimmed_mean(found[~found.isnan()], trim)
            found = found / c.sqrt() if bool(c > 0) else found
    elif kind == "wasserstein" and reference_logits is not None:
        there = _logits(reference_logits, "reference_logits")
        require(bool(there.isfinite().all()), "reference_logits", "NaN or infinity", "numbers")
        found = d - there.mean()
    else:
        found = d.sign() if kind == "tv" else d
    return found.nan_to_num(0.0, 0.0, 0.0)


def _trimmed_mean(x: Tensor, trim: float) -> Tensor:
    cut = int(trim * len(x))
    return x.sort().values[cut : len(x) - cut].mean()


def _logits(logits: Any, name: str) -> Tensor:
    d = torch.as_tensor(logits).detach()
    d = d.float() if d.dtype in {torch.float16, torch.bfloat16} else d
    fits = d.ndim == 1 and len(d) > 0 and d.is_floating_point()
    require(fits, name, f"shape {tuple(d.shape)} of {d.dtype}", "numbers (N,), N >= 1")
    return d


# ── the discriminator ───────────────────────────────────────────────────────────────────────────


class OccupancyDiscriminator(nn.Module):
    """d(x) of states and actions x (N, features): two hidden layers of 256.

    >>> OccupancyDiscriminator(3)(torch.zeros(2, 3)).shape
    torch.Size([2])
    """

    def __init__(self, features: int, width: int = 256) -> None:
        super().__init__()
        require(features >= 1 and width >= 1, "features, width", (features, width), "at least 1")
        self.net = nn.Sequential(
            nn.Linear(features, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
            nn.Linear(width, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.net(x)
        return found.squeeze(-1)


def discriminator_loss(
    policy_logits: Tensor,
    reference_logits: Tensor,
    kind: str = "sqrt_chi2",
    policy_weights: Tensor | None = None,
    reference_weights: Tensor | None = None,
) -> Tensor:
    """What the discriminator minimises, a scalar.

    "kl", "chi2", "sqrt_chi2": E_π[softplus(-d)] + E_ref[softplus(d)]. "tv": E_π[tanh(-d) + d²/100]
    + E_ref[tanh(d) + d²/100]. "wasserstein": E_ref[d] - E_π[d], to be kept Lipschitz besides.
    Logits (N,), (M,); weights: of the rows, to any scale, such as γ^t. InputError for an unknown
    kind, shapes, and weights that are below 0 or all 0.

    >>> discriminator_loss(torch.zeros(2), torch.zeros(3)).round(decimals=4)
    tensor(1.3863)
    """
    require(kind in KINDS, "kind", repr(kind), ", ".join(KINDS))
    p, q = policy_logits, reference_logits
    if kind == "tv":
        of_p, of_q = (-p).tanh() + 0.01 * p**2, q.tanh() + 0.01 * q**2
    elif kind == "wasserstein":
        of_p, of_q = -p, q
    else:
        of_p, of_q = softplus(-p), softplus(q)
    return _mean(of_p, policy_weights, "policy") + _mean(of_q, reference_weights, "reference")


def _mean(x: Tensor, weights: Tensor | None, name: str) -> Tensor:
    require(x.ndim == 1 and len(x) > 0, f"{name}_logits", f"shape {tuple(x.shape)}", "(N,), N >= 1")
    if weights is None:
        return x.mean()
    fits = weights.shape == x.shape and bool((weights >= 0).all()) and bool(weights.sum() > 0)
    require(fits, f"{name}_weights", f"shape {tuple(weights.shape)}", f"{tuple(x.shape)}, >= 0")
    w = weights.to(x)
    return (x * w).sum() / w.sum()


def train_discriminator(
    net: nn.Module,
    policy_x: Tensor,
    reference_x: Tensor,
    kind: str = "sqrt_chi2",
    *,
    steps: int = 100,
    batch_size: int | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    learning_rate: float = 1e-3,
    policy_weights: Tensor | None = None,
    reference_weights: Tensor | None = None,
    gradient_penalty: float | None = 10.0,
    weight_clip: float | None = None,
    generator: torch.Generator | None = None,
) -> float:
    """Some steps of `discriminator_loss`; the last loss. Call it before the penalty is computed.

    net: any module (N, features) -> (N,), trained in place; policy_x (N, features), reference_x
    (M, features); batch_size: rows of each a step, drawn with replacement (None: all); optimizer:
    of net, to go on with in the next round (None: a fresh Adam). weights as `discriminator_loss`.
    "wasserstein" keeps the critic Lipschitz by gradient_penalty · E(|∇d| - 1)² between the two
    samples (Gulrajani et al. 2017, arXiv 1704.00028), or, where weight_clip is given, by clipping
    its weights (Arjovsky et al. 2017, arXiv 1701.07875). Randomness from generator, else torch's.
    Raises InputError for steps or batch_size < 1, shapes, no rows, and neither of the two or one
    that is not positive. O(steps x batch).
    """
    require(steps >= 1, "steps", steps, "at least 1")
    require(batch_size is None or batch_size >= 1, "batch_size", batch_size, "at least 1, or None")
    fits = policy_x.ndim == reference_x.ndim == 2 and policy_x.shape[1:] == reference_x.shape[1:]
    came = f"{tuple(policy_x.shape)} and {tuple(reference_x.shape)}"
    fits = fits and len(policy_x) > 0 and len(reference_x) > 0
    wanted = "(N, features) and (M, features), N, M >= 1"
    require(fits, "policy_x and reference_x", came, wanted)
    for name, x, weights in (
        ("policy_weights", policy_x, policy_weights),
        ("reference_weights", reference_x, reference_weights),
    ):
        rows = None if weights is None else tuple(weights.shape)
        require(rows in {None, (len(x),)}, name, f"shape {rows}", f"({len(x)},), one a row")
    lipschitz = [bound for bound in (gradient_penalty, weight_clip) if bound is not None]
    fits = kind != "wasserstein" or (bool(lipschitz) and all(bound > 0 for bound in lipschitz))
    came = f"{gradient_penalty} and {weight_clip}"
    require(fits, "gradient_penalty, weight_clip", came, "one of them, and above 0")
    descent = optimizer or torch.optim.Adam(net.parameters(), learning_rate)
    loss = policy_x.new_zeros(())
    for _ in range(steps):
        p, p_weights = _batch(policy_x, policy_weights, batch_size, generator)
        q, q_weights = _batch(reference_x, reference_weights, batch_size, generator)
        both = net(torch.cat([p, q]))
        loss = discriminator_loss(both[: len(p)], both[len(p) :], kind, p_weights, q_weights)
        total = loss
        if kind == "wasserstein" and weight_clip is None:
            assert gradient_penalty is not None
            total = loss + gradient_penalty * _steepness(net, p, q, generator)
        descent.zero_grad()
        total.backward()
        descent.step()
        if kind == "wasserstein" and weight_clip is not None:
            with torch.no_grad():
                for weights in net.parameters():
                    weights.clamp_(-weight_clip, weight_clip)
    return float(loss.detach())


def _batch(
    x: Tensor, weights: Tensor | None, size: int | None, generator: torch.Generator | None
) -> tuple[Tensor, Tensor | None]:
    if size is None:
        return x, weights
    rows = torch.randint(len(x), (size,), generator=generator, device=x.device)
    return x[rows], None if weights is None else weights[rows]


def _steepness(net: nn.Module, p: Tensor, q: Tensor, generator: torch.Generator | None) -> Tensor:
    """E(|∇d| - 1)² at random places between rows of p and q."""
    rows = torch.randint(len(q), (len(p),), generator=generator, device=p.device)
    share = torch.rand(len(p), 1, generator=generator, device=p.device, dtype=p.dtype)
    between = (share * p + (1 - share) * q[rows]).requires_grad_()
    (slope,) = torch.autograd.grad(net(between).sum(), between, create_graph=True)
    return ((slope.norm(dim=1) - 1) ** 2).mean()


# ── language models ─────────────────────────────────────────────────────────────────────────────


def sequence_occupancy_penalty(
    logp: Tensor,
    ref_logp: Tensor,
    mask: Tensor | None = None,
    kind: str = "sqrt_chi2",
    coef: float = 1.0,
    clip: float | None = None,
    trim: float = 0.01,
) -> Tensor:
    """The penalty of whole answers, (B,), from log-probabilities: no discriminator is needed.

    d = Σ_t log π/π_ref over the tokens that count, the exact log-ratio of the chances to be at the
    end of this answer; then `occupancy_penalty`. logp, ref_logp, mask: (B, T). Token KL (TRL's
    `beta`) adds up along an answer; here e^d does, so that one answer that the reference would
    hardly ever give weighs more than many that it might. O(B T).

    >>> sequence_occupancy_penalty(torch.zeros(2, 3), torch.zeros(2, 3)).tolist()
    [-0.0, -0.0]
    """
    ratio = sequence_log_ratio(logp.detach(), ref_logp.detach(), mask)
    return occupancy_penalty(ratio, kind, coef, clip, trim)


class SequencePenaltyReward:
    """`sequence_occupancy_penalty` as a reward function that TRL adds to the proxy's reward.

    policy, reference: causal language models of transformers, the policy being the one that is
    trained; tokenizer: theirs. kind, coef, clip, trim: as there. batch_size: answers a forward
    pass. A prompt is text or a list of messages. Two forward passes without gradients a batch.

    reward_funcs=[proxy, SequencePenaltyReward(model, reference, tokenizer, coef=0.1)]
    """

    def __init__(
        self, policy: Any, reference: Any, tokenizer: Any, *, kind: str = "sqrt_chi2",
        coef: float = 1.0, clip: float | None = None, trim: float = 0.01, batch_size: int = 8,
    ) -> None:  # fmt: skip
        require(batch_size >= 1, "batch_size", batch_size, "at least 1")
        occupancy_penalty([0.0], kind, coef, clip, trim)  # refuses bad options now
        self.policy, self.reference, self.tokenizer = policy, reference, tokenizer
        self.options: dict[str, Any] = {"kind": kind, "coef": coef, "clip": clip, "trim": trim}
        self.batch_size = batch_size
        self.__name__ = f"{kind}_penalty"

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """The penalty of each answer; completion_ids: its tokens, as TRL passes them."""
        require(completion_ids is not None, "completion_ids", None, "the tokens of the answers")
        assert completion_ids is not None
        if not len(completion_ids):
            return []
        asked = [self._prompt(prompt) for prompt in prompts]
        rows = [(q, list(a)) for q, a in zip(asked, completion_ids, strict=True)]
        found = []
        for start in range(0, len(rows), self.batch_size):
            part = rows[start : start + self.batch_size]
            found.append(_answer_log_probabilities(self.policy, part).sum(dim=1)
                         - _answer_log_probabilities(self.reference, part).sum(dim=1))  # fmt: skip
        penalty = occupancy_penalty(torch.cat(found), **self.options)
        values: list[float | None] = penalty.tolist()
        return values

    def _prompt(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt)["input_ids"])
        chat = self.tokenizer.apply_chat_template
        text = chat(prompt, tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return list(ids)


def _answer_log_probabilities(model: Any, rows: Sequence[tuple[list[int], list[int]]]) -> Tensor:
    """log p of each token of the answers, float32 (B, T), 0 elsewhere, on the CPU.

    In the weights' own precision: accelerate wraps the model that is trained, and no other, in
    autocast, whose rounding would look like a step away from the reference.
    """
    ids = [torch.tensor([*prompt, *answer]) for prompt, answer in rows]
    width = max(len(row) for row in ids)
    real = torch.stack([pad(torch.ones_like(row), (0, width - len(row))) for row in ids])
    tokens = torch.stack([pad(row, (0, width - len(row))) for row in ids]).to(model.device)
    starts = torch.tensor([len(prompt) for prompt, _ in rows])
    with torch.no_grad(), _evaluating(model):
        forward = getattr(model, "_original_forward", model)
        logits = forward(input_ids=tokens, attention_mask=real.to(model.device)).logits
        said = log_softmax(logits[:, :-1].float(), dim=-1)
        logp = said.gather(2, tokens[:, 1:, None]).squeeze(2).cpu()
    answers = (torch.arange(1, width) >= starts[:, None]) & real[:, 1:].bool()
    return torch.where(answers, logp, 0.0)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
