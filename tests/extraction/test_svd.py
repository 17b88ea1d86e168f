"""Which singular directions a factorization finds, and that it says so where they are not the leading ones."""

from __future__ import annotations

from pathlib import Path

import oracle
import pytest
import torch
import zoo
from torch import Tensor

import pkt
from pkt import ops
from pkt.extraction import SETTLED, Extraction
from pkt.extraction.factorization import factorize
from pkt.options import Factorization

RANK = 16


def flat() -> Tensor:
    return torch.randn(640, 512, generator=torch.Generator().manual_seed(0))


def decaying() -> Tensor:
    torch.manual_seed(0)
    u, v = torch.linalg.qr(torch.randn(640, 512))[0], torch.linalg.qr(torch.randn(512, 512))[0]
    return (u / torch.arange(1, 513)) @ v.t()


def overlap(matrix: Tensor, B: Tensor) -> float:
    """The share of the leading left directions that the columns of B span."""
    leading = torch.linalg.svd(matrix.double())[0][:, :RANK]
    found = torch.linalg.qr(B.double())[0]
    return float((found.t() @ leading).square().sum()) / RANK


def test_flat_spectra_are_told_and_settled_on_request() -> None:
    matrix = flat()
    fast, adaptive, exact = (factorize(matrix, RANK, svd=svd) for svd in ("fast", "adaptive", "exact"))
    best = float(torch.linalg.svdvals(matrix.double())[:RANK].square().sum() / matrix.double().square().sum())
    assert fast.unsettled > SETTLED
    assert overlap(matrix, fast.B) < 0.9
    assert adaptive.unsettled <= SETTLED
    assert overlap(matrix, adaptive.B) > overlap(matrix, fast.B)
    assert exact.unsettled < 1e-3
    assert exact.energy == pytest.approx(best, rel=1e-5)
    assert overlap(matrix, exact.B) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decaying_spectra_are_settled_in_four_steps(dtype: torch.dtype) -> None:
    matrix = decaying().to(dtype)
    fast, adaptive = (factorize(matrix, RANK, svd=svd) for svd in ("fast", "adaptive"))
    assert fast.unsettled <= SETTLED
    assert torch.equal(fast.A, adaptive.A)
    assert torch.equal(fast.B, adaptive.B)


def test_the_default_is_the_four_steps() -> None:
    U, S, V, _ = ops.rsvd(flat(), RANK)
    made = factorize(flat(), RANK)
    assert torch.equal(made.A, V.t())
    assert torch.equal(made.B, U * S)
    assert "svd" not in Factorization().as_dict()
    assert Factorization(svd="exact").as_dict()["svd"] == "exact"
    with pytest.raises(pkt.PktError, match="choose one of fast, adaptive, exact"):
        Factorization(svd="full")  # type: ignore[arg-type]


@pytest.mark.parametrize("svd", ["adaptive", "exact"])
def test_what_cannot_be_decomposed_is_named(svd: str) -> None:
    matrix = flat()
    matrix[3, 5] = torch.nan
    with pytest.raises(pkt.PktError, match="mine contains NaN or Inf"):
        factorize(matrix, RANK, svd=svd, name="mine")  # type: ignore[arg-type]
    zero = factorize(torch.zeros(64, 48), 4, svd=svd)  # type: ignore[arg-type]
    assert not zero.B.any()
    assert zero.unsettled == 0


def test_an_extraction_says_it_in_its_line(tmp_path: Path) -> None:
    model = zoo.llama(hidden=192, layers=1, heads=2, kv=2, ffn=192)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    sens = pkt.sensitivity(model, oracle.batched(oracle.token_samples(2), 1), progress=False)
    plan = pkt.plan(sens, model, model, modules="ffn")
    fast, exact = (pkt.extract(model, plan, rank=8, svd=svd, progress=False) for svd in ("fast", "exact"))
    told = fast.provenance["unsettled"]
    assert told.keys() <= fast.pairs.keys()
    assert all(SETTLED < residual < 1 for residual in told.values())
    assert f"{len(told)} of them are not quite the leading directions" in str(fast)
    assert "--svd" in str(fast)
    assert "unsettled" not in exact.provenance
    fast.save(tmp_path / "fast")
    assert str(Extraction.load(tmp_path / "fast")) == str(fast)


@pytest.mark.parametrize("shape", [(40, 64), (64, 40)])
def test_a_parameter_of_a_model_is_factorized_as_its_values_are(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    of_parameter, of_values = pkt.factorize(torch.nn.Parameter(matrix), 4), pkt.factorize(matrix, 4)
    assert not of_parameter.A.requires_grad
    assert torch.equal(of_parameter.A, of_values.A)
    assert of_parameter.unsettled == of_values.unsettled
