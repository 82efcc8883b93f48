"""Scores of torch tensors: those of the array to rounding, where the tensor lies."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch", reason="the extra scoredraw[torch] is not installed")

from scoredraw.coresets import combined, leverage, lewis, sketching, tensors  # noqa: E402
from scoredraw.coresets import sensitivities as exact  # noqa: E402
from scoredraw.coresets.tensor_sensitivities import lp_sensitivities  # noqa: E402
from scoredraw.errors import InputError  # noqa: E402
from scoredraw.execution import BLOCK_ROWS  # noqa: E402
from scoredraw.sampling import poisson  # noqa: E402

pytestmark = pytest.mark.oracle
Float = NDArray[np.float64]
RankWarning = np.exceptions.RankWarning

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
    ),
]


def uneven(n: int, d: int, seed: int = 0) -> Float:
    rng = np.random.default_rng(seed)
    return np.asarray(rng.standard_normal((n, d)) * rng.exponential(1, (n, 1)))


def agree(found: torch.Tensor, want: Float, device: str = "cpu", rtol: float = 1e-10) -> None:
    assert found.dtype == torch.float64
    assert found.device.type == device
    assert not found.requires_grad
    np.testing.assert_allclose(found.cpu().numpy(), want, rtol=rtol, atol=1e-14)


@pytest.mark.parametrize("device", DEVICES)
def test_leverage_equals_that_of_the_array(device: str) -> None:
    A = uneven(2 * BLOCK_ROWS + 333, 7)
    A[11] = 0
    T = torch.tensor(A, device=device)
    for method in ("auto", "gram", "qr"):
        agree(leverage.leverage_scores(T, method=method), leverage.leverage_scores(A), device)
    agree(combined.root_leverage_scores(T, 1), combined.root_leverage_scores(A, 1), device, 1e-9)
    for ridge in (None, 0, 1e-9, 2.5):
        want = leverage.ridge_leverage_scores(A, ridge)
        agree(leverage.ridge_leverage_scores(T, ridge), want, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, 5.0])
def test_lewis_weights_equal_those_of_the_array(p: float, device: str) -> None:
    A = uneven(3000, 5)
    A[11] = 0
    want, steps = lewis.lewis_weights(A, p, return_info=True)
    found, info = lewis.lewis_weights(torch.tensor(A, device=device), p, return_info=True)
    agree(found, want, device, 1e-9)
    assert info.converged
    assert abs(info.steps - steps.steps) <= 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", sketching.SKETCHES)
def test_sketches_equal_those_of_the_array(name: str, device: str) -> None:
    A = uneven(3 * BLOCK_ROWS + 100, 6)
    T = torch.tensor(A, device=device)
    larger = {"size": 1500 if name == "gaussian" else BLOCK_ROWS + 500}
    for options in ({}, {"size": 900, "projection": 3}, larger):
        want = sketching.sketched_leverage(A, sketch=name, rng=5, **options)
        agree(sketching.sketched_leverage(T, sketch=name, rng=5, **options), want, device, 1e-9)
    want = leverage.leverage_scores(A, method="sketch", sketch=name, rng=6)
    agree(leverage.leverage_scores(T, method="sketch", sketch=name, rng=6), want, device, 1e-9)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("p", [1.01, 1.3, 1.7, 2.0, 2.5, 4.0, 9.0])
def test_sensitivities_equal_those_of_the_array(p: float, device: str) -> None:
    A = uneven(150, 4)
    A[20], A[30:33] = 0, A[29]
    T = torch.tensor(A, device=device)
    want = exact.lp_sensitivities(A, p, workers=1)
    agree(lp_sensitivities(T, p), want, device, 1e-8)
    some = lp_sensitivities(T, p, rows=[40, 20, 3])
    agree(some, want[[40, 20, 3]], device, 1e-8)


@pytest.mark.parametrize("p", [1.0, np.inf])
def test_linear_programmes_are_done_on_the_cpu(p: float) -> None:
    A = uneven(40, 3)
    agree(lp_sensitivities(torch.tensor(A), p), exact.lp_sensitivities(A, p), rtol=1e-12)


def test_complete_graph() -> None:
    """Grounded incidence matrix of K_6: 1/(1 + 4·2^{1-p}) for every edge."""
    rows = [np.eye(6)[i] - np.eye(6)[j] for i in range(6) for j in range(i)]
    A = torch.tensor(np.array(rows)[:, :5])
    for p in (1.2, 1.9, 2.2, 3.0, 6.0):
        agree(lp_sensitivities(A, p), np.full(15, 1 / (1 + 4 * 2 ** (1 - p))), rtol=1e-9)


def test_many_pieces_and_products_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from scoredraw.coresets import tensor_sensitivities

    A = uneven(2 * BLOCK_ROWS + 9, 3)
    T = torch.tensor(A)
    monkeypatch.setattr(tensors, "PIECE_CELLS", 1)
    assert len(list(tensors.pieces(T))) == 3
    agree(tensors.leverage_scores(T, method="qr"), leverage.leverage_scores(A))
    few = torch.tensor(A[:100])
    for p in (1.5, 3.0):
        want = lp_sensitivities(few, p)
        with monkeypatch.context() as patch:
            patch.setattr(tensor_sensitivities, "PRODUCT_CELLS", 0)
            patch.setattr(tensor_sensitivities, "PIECE_CELLS", 70)
            patch.setattr(tensor_sensitivities, "BATCH_CELLS", 1)
            agree(lp_sensitivities(few, p), want.numpy(), rtol=1e-9)


@pytest.mark.parametrize("gap", [1e-4, 1e-9])
def test_nearly_dependent_columns(gap: float) -> None:
    A = uneven(3000, 5)
    A[:, 4] = A[:, 0] + gap * A[:, 4]
    found = leverage.leverage_scores(torch.tensor(A))
    allowed = 100 * np.finfo(float).eps / gap  # what rounding A itself would do
    assert float((found - torch.tensor(leverage.leverage_scores(A))).abs().max()) < allowed
    assert abs(float(found.sum()) - 5) < 1e-10
    if gap > 1e-6:
        agree(lewis.lewis_weights(torch.tensor(A), 1), lewis.lewis_weights(A, 1), rtol=1e-7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "bool", "uint8"])
def test_narrow_types_are_computed_in_float64(dtype: str) -> None:
    T = torch.tensor(np.round(np.abs(uneven(500, 4)))).to(getattr(torch, dtype))
    A = T.double().numpy()
    agree(leverage.leverage_scores(T), leverage.leverage_scores(A))
    agree(tensors.sketched_leverage(T, rng=0), sketching.sketched_leverage(A, rng=0))


def test_gradients_strides_and_parameters() -> None:
    A = uneven(60, 4)
    for T in (
        torch.tensor(A, requires_grad=True),
        torch.nn.Parameter(torch.tensor(A)),
        torch.tensor(A.T.copy()).T,
        torch.tensor(np.repeat(A, 2, 0))[::2],
    ):
        agree(leverage.leverage_scores(T), leverage.leverage_scores(A))
    grown = torch.tensor(A, requires_grad=True) * 2
    agree(lewis.lewis_weights(grown, 1), lewis.lewis_weights(A, 1), rtol=1e-9)


def test_rank_and_shape() -> None:
    A = uneven(100, 3)
    with pytest.warns(RankWarning, match="rank 3 of 5"):
        tau = leverage.leverage_scores(torch.tensor(np.column_stack([A, A[:, 0], np.zeros(100)])))
    agree(tau, leverage.leverage_scores(A), rtol=1e-8)
    with pytest.warns(RankWarning, match="every row has leverage 1"):
        agree(leverage.leverage_scores(torch.tensor(uneven(3, 8))), np.ones(3))
    with pytest.warns(RankWarning, match="rank 0"):
        agree(leverage.leverage_scores(torch.zeros(4, 2)), np.zeros(4))
    wide = uneven(3, 8)
    want = leverage.ridge_leverage_scores(wide, 1.0)
    agree(leverage.ridge_leverage_scores(torch.tensor(wide), 1.0), want)
    agree(lewis.lewis_weights(torch.tensor(wide), 1), np.ones(3), rtol=1e-9)
    assert lp_sensitivities(torch.zeros(4, 2), 3).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.ones(3), "matrix"),
        (lambda: torch.ones(0, 3), "at least one row"),
        (lambda: torch.ones(3, 2, dtype=torch.complex64), "complex64, want real numbers"),
        (lambda: torch.ones(3, 2, device="meta"), "device meta"),
        (lambda: torch.ones(3, 2).to_sparse(), "layout torch.sparse_coo"),
        (lambda: torch.tensor([[1.0], [float("nan")]]), "nan at row 1, column 0"),
        (lambda: torch.tensor([[1.0, float("-inf")]]), "-inf at row 0, column 1"),
    ],
)
def test_bad_tensors(make: object, words: str) -> None:
    T = make()  # type: ignore[operator]
    for score in (
        leverage.leverage_scores,
        leverage.ridge_leverage_scores,
        lambda A: lewis.lewis_weights(A, 1),
        sketching.sketched_leverage,
        lambda A: lp_sensitivities(A, 3),
    ):
        with pytest.raises(InputError, match=words):
            score(T)


def test_bad_arguments() -> None:
    T = torch.eye(3)
    for call, words in (
        (lambda: leverage.leverage_scores(T, method="svd"), "method"),
        (lambda: leverage.ridge_leverage_scores(T, -1.0), "ridge"),
        (lambda: lewis.lewis_weights(T, 0), "p: got 0"),
        (lambda: sketching.sketched_leverage(T, sketch="hash"), "sketch"),
        (lambda: lp_sensitivities(T, 0.5), "p: got 0.5"),
        (lambda: lp_sensitivities(T, 3, rows=[3]), "rows"),
        (lambda: lp_sensitivities(T, 3, rows=[0.5]), "rows"),
    ):
        with pytest.raises(InputError, match=words):
            call()


def test_scores_of_a_tensor_are_drawn_from() -> None:
    A = uneven(400, 3)
    T = torch.tensor(A)
    draw = poisson(leverage.leverage_scores(T), 50, rng=0)
    assert (draw.indices == poisson(leverage.leverage_scores(A), 50, rng=0).indices).all()
    assert torch.equal(draw.take(T), T[torch.tensor(draw.indices)])


@pytest.mark.contract
def test_arrays_do_not_import_torch() -> None:
    code = "import sys, numpy as np; from scoredraw.coresets import leverage_scores, lewis_weights;"
    code += "leverage_scores(np.eye(3), method='sketch'); lewis_weights(np.eye(3), 1);"
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
