"""TarFlow: a normalizing flow of causal transformers over the patches of an image.

An image is T patches of C numbers. Every block reads them in one order, forwards or backwards by
turns, and shifts and scales each by what a causal transformer makes of those before it,

    z_t = exp(-s_t(x_<t)) (x_t - u_t(x_<t)),      log |dz/dx| = -Σ s,

with s_1 = u_1 = 0. All blocks in a row take the image to noise, in one pass each:

    log p(x) = Σ over blocks of (-Σ s) - ½ Σ z² - ½ n log 2π.

Backwards a block is solved token by token with a cache of keys and values, or by the parallel
sweeps of `flow_inversion`, with the same result. Weights bear the names of the published
checkpoints, which load as they are but for their `attn_mask`.

Zhai, Zhang, Nakkiran, Berthelot, Gu, Zheng, Chen, Bautista, Jaitly and Susskind, "Normalizing
flows are capable generative models", ICML 2025, arXiv 2412.06329.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scoredraw.diffusion.flow_inversion import (
    Inversion,
    InvertResult,
    SegmentPlan,
    Sweep,
    affine_inverse,
    block_metrics,
    check_tokens,
    plan_strategy,
)
from scoredraw.errors import import_extra, require
from scoredraw.journal import atomic_path

SEQUENTIAL = SegmentPlan(segments=0)

Cache = list[tuple[Tensor, Tensor]]  # keys and values (B, heads, T, width) of every layer


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: s + g (s - s'), u + g (u - u'), s' and u' without the label.

    scale: g ≥ 0. what: "a" for s alone, "c" for u alone, "ac" for both. annealed: token t of
    0 .. T - 1 has g t / (T - 1). temperature: of the attention behind s' and u'; other than 1 it
    guides a model without labels too.
    """

    scale: float = 0.0
    what: str = "ac"
    annealed: bool = False
    temperature: float = 1.0

    def __post_init__(self) -> None:
        require(0 <= self.scale < math.inf, "scale", self.scale, "0 or more")
        require(self.what in ("a", "c", "ac"), "what", repr(self.what), "a, c or ac")
        require(self.temperature > 0, "temperature", self.temperature, "above 0")

    def mix(self, with_label: Tensor, without: Tensor, first: int, T: int) -> Tensor:
        """s and u side by side (B, n, 2C) of the tokens from `first` on."""
        n, width = with_label.shape[1:]
        g = torch.full((n, 2), self.scale, dtype=with_label.dtype, device=with_label.device)
        if self.annealed:
            g = g * torch.arange(first, first + n, device=g.device)[:, None] / max(T - 1, 1)
        g = g * torch.tensor([float(part in self.what) for part in "ac"]).to(g)
        return with_label + g.repeat_interleave(width // 2, dim=1) * (with_label - without)


class Attention(nn.Module):
    """Causal self-attention behind a layer norm; over a cache, from position `start` on."""

    def __init__(self, channels: int, head_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.head_dim = head_dim

    def forward(
        self, h: Tensor, cache: tuple[Tensor, Tensor] | None, start: int, temperature: float
    ) -> Tensor:
        B, n, channels = h.shape
        heads = self.qkv(self.norm(h)).reshape(B, n, -1, self.head_dim).transpose(1, 2)
        q, k, v = heads.chunk(3, dim=1)
        mask = None
        if cache is not None:
            end = start + n
            for kept, new in zip(cache, (k, v), strict=True):
                kept[:, :, start:end] = new
            k, v = (kept[:, :, :end] for kept in cache)
            if start and n > 1:
                mask = torch.ones(n, end, dtype=torch.bool, device=h.device).tril(start)
        scale = 1 / (math.sqrt(self.head_dim) * temperature)
        causal = mask is None and n > 1
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale)
        return self.proj(out.transpose(1, 2).reshape(B, n, channels))


class FeedForward(nn.Module):
    """Two layers with a GELU behind a layer norm."""

    def __init__(self, channels: int, expansion: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        wide = channels * expansion
        self.main = nn.Sequential(nn.Linear(channels, wide), nn.GELU(), nn.Linear(wide, channels))

    def forward(self, h: Tensor) -> Tensor:
        return self.main(self.norm(h))


class Layer(nn.Module):
    """Attention and feed-forward, each added to what comes in."""

    def __init__(self, channels: int, head_dim: int, expansion: int) -> None:
        super().__init__()
        self.attention = Attention(channels, head_dim)
        self.mlp = FeedForward(channels, expansion)

    def forward(
        self, h: Tensor, cache: tuple[Tensor, Tensor] | None, start: int, temperature: float
    ) -> Tensor:
        h = h + self.attention(h, cache, start, temperature)
        return h + self.mlp(h)


class TarFlowBlock(nn.Module):
    """One autoregressive block: `forward` to z in one pass, `inverse` by a `SegmentPlan`.

    in_channels C, channels of the transformer (a multiple of head_dim), length T, layers;
    backwards: it reads the tokens from the last to the first. classes: 0 without labels. Labels are
    int64 (B,), -1 for none, or None. `parameters_at` and `sweep` want tokens in the block's own
    order (`ordered`), all else takes and returns them in the image's. A new block is the identity.

    >>> block = TarFlowBlock(in_channels=2, channels=8, length=5, head_dim=4)
    >>> z, logdet = block(torch.ones(3, 5, 2))
    >>> torch.equal(block.inverse(z).x, torch.ones(3, 5, 2)), logdet.tolist()
    (True, [-0.0, -0.0, -0.0])
    """

    def __init__(
        self, in_channels: int, channels: int, length: int, *, layers: int = 1, head_dim: int = 64,
        expansion: int = 4, classes: int = 0, backwards: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        require(
            channels % head_dim == 0, "channels", channels, f"a multiple of head_dim {head_dim}"
        )
        self.length, self.backwards = length, backwards
        self.proj_in = nn.Linear(in_channels, channels)
        self.pos_embed = nn.Parameter(1e-2 * torch.randn(length, channels))
        shape = (classes, 1, channels)
        self.class_embed = nn.Parameter(1e-2 * torch.randn(shape)) if classes else None
        self.attn_blocks = nn.ModuleList(
            Layer(channels, head_dim, expansion) for _ in range(layers)
        )
        self.proj_out = nn.Linear(channels, 2 * in_channels)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def ordered(self, x: Tensor, dim: int = 1) -> Tensor:
        """Tokens from the image's order to the block's, or back."""
        return x.flip(dim) if self.backwards else x

    def parameters_at(self, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """s and u of all tokens, (B, T, C) each, in one pass; in the block's own order."""
        s_u = self._after(x, 0, labels)
        s, u = F.pad(s_u[:, :-1], (0, 0, 1, 0)).chunk(2, dim=-1)
        return s, u

    def forward(self, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z (B, T, C) and log |dz/dx| (B,) in nats, a sum (the published code has the mean)."""
        x = self.ordered(x)
        s, u = self.parameters_at(x, labels)
        scale = torch.exp(-s if s.dtype.itemsize >= 4 else -s.float()).to(s.dtype)
        return self.ordered(scale * (x - u)), -s.flatten(1).sum(dim=1)

    def sweep(
        self, z: Tensor, labels: Tensor | None = None, guidance: Guidance | None = None
    ) -> Sweep:
        """The inverse of z as `Inversion` wants it, with a cache of keys and values.

        The cache holds those of the last pass over each position. Memory: 2 B T channels a layer,
        twice with guidance.
        """
        guided = guidance is not None and guidance.scale > 0
        caches = [self._empty_cache(z) for _ in range(1 + guided)]

        @torch.no_grad()
        def sweep(tokens: Tensor, start: int) -> Tensor:
            s_u = self._after(tokens, start, labels, caches[0])
            if guidance is not None and guided:
                plain = self._after(tokens, start, None, caches[1], guidance.temperature)
                s_u = guidance.mix(s_u, plain, start + 1, self.length)
            s, u = s_u.chunk(2, dim=-1)
            return affine_inverse((s, u), z[:, start + 1 : start + 1 + tokens.shape[1]])

        return sweep

    @torch.no_grad()
    def inverse(
        self, z: Tensor, plan: SegmentPlan = SEQUENTIAL, labels: Tensor | None = None,
        guidance: Guidance | None = None,
    ) -> InvertResult:  # fmt: skip
        """x with z = f(x), and what it took; token by token unless the plan says otherwise.

        Raises `InputError` for z that is not (B, T, C), and what `invert_autoregressive` refuses.
        """
        check_tokens(z)
        wanted = (self.length, self.proj_in.in_features)
        came = f"{tuple(z.shape)}"
        require(tuple(z.shape[1:]) == wanted, "z", came, f"(B, {wanted[0]}, {wanted[1]})")
        z = self.ordered(z)
        if isinstance(plan.init, Tensor):
            plan = replace(plan, init=self.ordered(plan.init))
        found = Inversion(plan, self.sweep(z, labels, guidance), z).run()
        return InvertResult(
            self.ordered(found.x), found.iterations, found.residuals, found.passes, found.tokens,
            found.fallbacks, found.converged,
        )  # fmt: skip

    def metrics(
        self, x: Tensor, labels: Tensor | None = None, norm: float | str = 2
    ) -> dict[str, float]:
        """`block_metrics` of what reaches the block, in the image's order."""
        W_s, W_u = self.proj_out.weight.chunk(2)
        return block_metrics(
            lambda tokens: self.parameters_at(tokens, labels), self.ordered(x), (W_s, W_u), norm
        )

    def _after(
        self, x: Tensor, start: int, labels: Tensor | None, cache: Cache | None = None,
        temperature: float = 1.0,
    ) -> Tensor:  # fmt: skip
        """s and u side by side, (B, n, 2C), of the tokens after each of x, from `start` on."""
        places = self.ordered(self.pos_embed, dim=0)[start : start + x.shape[1]]
        h = self.proj_in(x) + places + self._label(labels, len(x))
        for i, layer in enumerate(self.attn_blocks):
            h = layer(h, None if cache is None else cache[i], start, temperature)
        return self.proj_out(h)

    def _label(self, labels: Tensor | None, B: int) -> Tensor | float:
        """What the labels add, (B, 1, channels); no label is the mean of all."""
        if self.class_embed is None:
            require(labels is None, "labels", "labels", "none: the block has no classes")
            return 0.0
        mean = self.class_embed.mean(dim=0)
        if labels is None:
            return mean
        came, K = f"{tuple(labels.shape)} {labels.dtype}", len(self.class_embed)
        fine = labels.dtype == torch.int64 and tuple(labels.shape) == (B,)
        require(fine, "labels", came, f"({B},) torch.int64")
        top = int(labels.max()) if B else -1
        require(top < K, "labels", top, f"below {K}, or -1 for none")
        known = (labels >= 0)[:, None, None]
        return torch.where(known, self.class_embed[labels.clamp(min=0)], mean)

    def _empty_cache(self, z: Tensor) -> Cache:
        B, T = z.shape[:2]
        width = self.attn_blocks[0].attention.head_dim
        shape = (B, self.proj_in.out_features // width, T, width)
        return [(z.new_empty(shape), z.new_empty(shape)) for _ in self.attn_blocks]


# ── blocks in a row ─────────────────────────────────────────────────────────────────────────────


class FlowInverse(NamedTuple):
    """Images (B, channels, side, side), and what each block took, in forward order."""

    images: Tensor
    blocks: list[InvertResult]

    @property
    def passes(self) -> int:
        """Calls of all blocks together."""
        return sum(block.passes for block in self.blocks)


@dataclass(frozen=True)
class TarFlowShape:
    """Sizes of a TarFlow; T = (image_size / patch_size)², C = image_channels patch_size²."""

    image_size: int
    patch_size: int
    image_channels: int = 1
    channels: int = 64
    blocks: int = 4
    layers: int = 2
    head_dim: int = 32
    expansion: int = 4
    classes: int = 0


class TarFlow(nn.Module):
    """Blocks that read forwards and backwards by turns, from square images to noise and back.

    `forward` and `log_prob` take one pass a block; `inverse` and `sample` a `SegmentPlan` a block,
    in forward order, and go token by token without. `var` (T, C) is the second moment of the
    training data's z, by which `sample` scales its noise.
    Raises `InputError` where patches do not tile the image.

    >>> flow = TarFlow(TarFlowShape(image_size=4, patch_size=2, channels=8, head_dim=4))
    >>> images = torch.linspace(-1, 1, 32).reshape(2, 1, 4, 4)
    >>> z, logdet = flow(images)
    >>> z.shape, torch.equal(flow.inverse(z).images, images), flow.inverse(z).passes
    (torch.Size([2, 4, 4]), True, 12)
    """

    var: Tensor

    def __init__(self, shape: TarFlowShape) -> None:
        super().__init__()
        side, patch = shape.image_size, shape.patch_size
        tiles = 0 < patch <= side and side % patch == 0
        require(tiles, "patch_size", patch, f"a divisor of image_size {side}")
        self.shape = shape
        T, C = (side // patch) ** 2, shape.image_channels * patch**2
        self.blocks = nn.ModuleList(
            TarFlowBlock(
                C, shape.channels, T, layers=shape.layers, head_dim=shape.head_dim,
                expansion=shape.expansion, classes=shape.classes, backwards=i % 2 == 1,
            )
            for i in range(shape.blocks)
        )  # fmt: skip
        self.register_buffer("var", torch.ones(T, C))

    def patches(self, images: Tensor) -> Tensor:
        """Images (B, channels, side, side) as tokens (B, T, C)."""
        wanted = (self.shape.image_channels, self.shape.image_size, self.shape.image_size)
        came = tuple(images.shape)
        require(came[1:] == wanted, "images", came, f"(B, {', '.join(map(str, wanted))})")
        patch = self.shape.patch_size
        return F.unfold(images, patch, stride=patch).transpose(1, 2)

    def images(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T, C) as images."""
        side, patch = self.shape.image_size, self.shape.patch_size
        return F.fold(tokens.transpose(1, 2), (side, side), patch, stride=patch)

    def trace(self, images: Tensor, labels: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """What reaches each block, and z at the end, each (B, T, C); log |dz/dx| (B,)."""
        passed = [self.patches(images)]
        logdet = torch.zeros(len(images), dtype=images.dtype, device=images.device)
        for block in self.blocks:
            z, one = block(passed[-1], labels)
            passed.append(z)
            logdet = logdet + one
        return passed, logdet

    def forward(self, images: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z (B, T, C) and log |dz/dx| (B,) in nats."""
        passed, logdet = self.trace(images, labels)
        return passed[-1], logdet

    def log_prob(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """log p in nats, (B,), under z ~ N(0, I)."""
        z, logdet = self(images, labels)
        return logdet - 0.5 * (z.square() + math.log(2 * math.pi)).flatten(1).sum(dim=1)

    def inverse(
        self,
        z: Tensor,
        plans: Sequence[SegmentPlan] | SegmentPlan = SEQUENTIAL,
        labels: Tensor | None = None,
        guidance: Guidance | None = None,
    ) -> FlowInverse:
        """Images of z (B, T, C); one plan for all blocks, or one each, in forward order.

        An image in which the flow overflows is NaN, and the others as they are.
        """
        K = len(self.blocks)
        each = [plans] * K if isinstance(plans, SegmentPlan) else list(plans)
        require(len(each) == K, "plans", f"{len(each)} plans", f"one a block, {K}")
        check_tokens(z)
        results: list[InvertResult] = []
        lost = torch.zeros_like(z[:, :1, :1], dtype=torch.bool)
        for block, plan in zip(reversed(self.blocks), reversed(each), strict=True):
            results.insert(0, block.inverse(z, plan, labels, guidance))
            z = results[0].x
            lost = lost | ~torch.isfinite(z).flatten(1).all(dim=1)[:, None, None]
            z = torch.where(lost, 0, z)
        return FlowInverse(self.images(torch.where(lost, math.nan, z)), results)

    def sample(
        self,
        n: int,
        plans: Sequence[SegmentPlan] | SegmentPlan = SEQUENTIAL,
        labels: Tensor | None = None,
        guidance: Guidance | None = None,
        *,
        truncate: float | None = None,
        generator: torch.Generator | None = None,
    ) -> FlowInverse:
        """n images from noise times √var, which is normal given |noise| ≤ truncate."""
        z = self.noise(n, truncate=truncate, generator=generator)
        return self.inverse(z, plans, labels, guidance)

    def noise(
        self, n: int, *, truncate: float | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """What `sample` starts from, (n, T, C)."""
        require(n >= 0, "n", n, "a count")
        require(truncate is None or truncate > 0, "truncate", truncate, "above 0")
        shape = (n, *self.var.shape)
        z = torch.empty(shape, dtype=self.var.dtype, device=self.var.device)
        bound = math.inf if truncate is None else truncate
        if math.isinf(bound):
            z.normal_(generator=generator)
        else:
            nn.init.trunc_normal_(z, a=-bound, b=bound, generator=generator)
        return z * self.var.sqrt()

    @torch.no_grad()
    def metrics(
        self, images: Tensor, labels: Tensor | None = None, norm: float | str = 2
    ) -> list[dict[str, float]]:
        """`block_metrics` of every block on data, in forward order."""
        passed, _ = self.trace(images, labels)
        return [
            block.metrics(x, labels, norm) for block, x in zip(self.blocks, passed, strict=False)
        ]

    def plan(self, images: Tensor, labels: Tensor | None = None) -> list[SegmentPlan]:
        """`plan_strategy` from data, about 1000 images; for other settings call that."""
        return plan_strategy(self.metrics(images, labels), T=self.var.shape[0])

    def denoise(
        self, images: Tensor, noise_std: float, labels: Tensor | None = None, strength: float = 1.0
    ) -> Tensor:
        """E[clean | noisy] = y + σ² ∇ log p(y), where σ is the noise that the flow trained with."""
        with torch.enable_grad():
            y = images.detach().requires_grad_()
            (score,) = torch.autograd.grad(self.log_prob(y, labels).sum(), y)
        return images.detach() + strength * noise_std**2 * score


def save_flow(
    flow: TarFlow, path: str | os.PathLike[str], dtype: torch.dtype | None = None
) -> None:
    """Write shape and weights as safetensors, in one step; dtype: a torch one, of the file's."""
    safetensors = import_extra("safetensors.torch", "diffusion")
    state = {name: value.to("cpu", dtype).contiguous() for name, value in flow.state_dict().items()}
    with atomic_path(Path(path)) as temporary:
        safetensors.save_file(state, temporary, {"shape": json.dumps(asdict(flow.shape))})


def load_flow(path: str | os.PathLike[str]) -> TarFlow:
    """A flow that `save_flow` wrote, in float32 and ready for use."""
    safetensors = import_extra("safetensors", "diffusion")
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        require("shape" in metadata, "path", path, "a file of save_flow")
        state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    with torch.device("meta"):
        flow = TarFlow(TarFlowShape(**json.loads(metadata["shape"])))
    flow.load_state_dict(state, assign=True)
    return flow.requires_grad_(False).eval()
