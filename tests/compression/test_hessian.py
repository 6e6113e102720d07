"""Gram matrices: sums that do not depend on how tokens arrive, and a factor that multiplies back.

Shapes: E experts, I input features, T tokens, K experts chosen per token.
"""

import pytest
import torch
from torch import Tensor

from compression.moe import by_expert
from compression.slimming.hessian import Gram, InputNorm, Statistic, damped_factors_


def tokens(count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def small_integers(count: int, width: int, seed: int = 0) -> Tensor:
    """Sums of their products stay below 2^24 and are exact in float32, in any order."""
    return torch.randint(-8, 9, (count, width), generator=torch.Generator().manual_seed(seed)).float()


def routes(count: int, experts: int, chosen: int, seed: int = 0) -> Tensor:
    return torch.rand(count, experts, generator=torch.Generator().manual_seed(seed)).topk(chosen, dim=1).indices


def gram_of(x_TI: Tensor) -> Tensor:
    gram = Gram(1, x_TI.shape[1])
    gram.update(x_TI)
    return gram.value


def add_routed(statistic: Statistic, x_TI: Tensor, ids_TK: Tensor) -> None:
    """Show every token to the experts that it chose."""
    for expert, tokens_S, _ in by_expert(ids_TK, len(statistic.tokens_E)):
        statistic.add_rows(expert, x_TI[tokens_S])


def natural_order(gram_EII: Tensor) -> Tensor:
    return torch.arange(gram_EII.shape[1]).expand(gram_EII.shape[0], -1)


def test_the_mean_outer_product_of_two_tokens_by_hand():
    gram = Gram(1, 2)

    gram.update(torch.tensor([[1.0, 2.0], [3.0, -4.0]]))

    assert gram.value.tolist() == [[[5.0, -5.0], [-5.0, 10.0]]]
    assert gram.tokens_E.tolist() == [2]


@pytest.mark.parametrize("width", [7, 128, 300])  # less than a stripe, one, and two with a rest
def test_the_mean_equals_the_float64_product_and_is_exactly_symmetric(width: int):
    x_TI = tokens(500, width)

    mean_II = gram_of(x_TI)[0]

    exact_II = x_TI.double().T @ x_TI.double() / 500
    # 500 products of unit variance summed in float32: about 500^0.5 x 2^-24 = 1.3e-6 of the diagonal, at worst a few times that.
    assert (mean_II - exact_II).abs().max() < 1e-5
    assert torch.equal(mean_II, mean_II.T)


@pytest.mark.parametrize("width", [7, 300])
def test_splitting_the_calibration_set_changes_no_count_and_no_exact_sum(width: int):
    x_TI, ids_TK = small_integers(400, width), routes(400, experts=6, chosen=2)
    whole, parts = Gram(6, width), Gram(6, width)

    add_routed(whole, x_TI, ids_TK)
    for start in (0, 1, 150, 151):
        stop = {0: 1, 1: 150, 150: 151, 151: 400}[start]
        add_routed(parts, x_TI[start:stop], ids_TK[start:stop])

    assert torch.equal(whole.tokens_E, parts.tokens_E)
    assert torch.equal(whole.value, parts.value)


def test_splitting_changes_other_sums_only_by_float32_rounding():
    x_TI = tokens(4000, 64)
    parts = Gram(1, 64)

    for x_tI in x_TI.split(37):
        parts.update(x_tI)

    # 109 partial sums, each rounded to 2^-24 of a running sum that ends near the diagonal's value of one.
    assert (parts.value - gram_of(x_TI)).abs().max() < 109 * 2**-24
    assert parts.tokens_E.tolist() == [4000]


def test_routed_tokens_are_counted_for_each_expert_that_was_chosen_and_no_other():
    x_TI, ids_TK = small_integers(300, 20), routes(300, experts=5, chosen=2)
    gram = Gram(5, 20)

    add_routed(gram, x_TI, ids_TK)

    for expert in range(5):
        own_TI = x_TI[(ids_TK == expert).any(dim=1)]
        assert gram.tokens_E[expert] == len(own_TI)
        assert torch.equal(gram.value[expert], gram_of(own_TI)[0])


def test_an_expert_without_tokens_keeps_a_matrix_of_zeros():
    gram = Gram(3, 4)

    add_routed(gram, tokens(10, 4), torch.full((10, 1), 2))

    assert gram.tokens_E.tolist() == [0, 0, 10]
    assert (gram.value[:2] == 0).all()


def test_showing_tokens_leaves_them_alone():
    x_TI = tokens(40, 9)
    before_TI = x_TI.clone()

    for statistic in (Gram(1, 9), InputNorm(1, 9)):
        statistic.update(x_TI)
        statistic.add_rows(0, x_TI, torch.rand(40))

    assert torch.equal(x_TI, before_TI)


def test_rescaling_one_expert_leaves_the_others_alone():
    gram, before = Gram(2, 8), Gram(2, 8)
    for statistic in (gram, before):
        for expert in range(2):
            statistic.add_rows(expert, tokens(20, 8, seed=expert))
    factor_EI = torch.ones(2, 8)
    factor_EI[1, 3] = 2

    gram.rescale_(factor_EI)

    assert torch.equal(gram.value[0], before.value[0])
    assert gram.value[1, 3, 3] == before.value[1, 3, 3] / 4
    assert gram.value[1, 3, 5] == before.value[1, 3, 5] / 2


def test_bf16_tokens_are_multiplied_exactly():
    x_TI = tokens(64, 16).bfloat16()

    exact_II = x_TI.double().T @ x_TI.double() / 64

    # 64 exact products summed in float32; products rounded to bf16 would miss by 2^-9.
    assert (gram_of(x_TI)[0] - exact_II).abs().max() < 64 * 2**-24


def test_reading_twice_gives_the_same_and_no_token_is_accepted_after():
    gram = Gram(1, 4)
    gram.update(tokens(9, 4))
    first_EII = gram.value.clone()

    assert torch.equal(gram.value, first_EII)
    with pytest.raises(AssertionError, match="no more tokens"):
        gram.update(tokens(1, 4))


def test_a_stack_does_not_guess_whose_tokens_it_is_shown():
    with pytest.raises(AssertionError, match="add_rows"):
        Gram(2, 4).update(tokens(3, 4))


@pytest.mark.parametrize("width", [1, 5, 64, 65, 200])
def test_the_factor_multiplies_back_to_the_damped_matrix_in_the_order_given(width: int):
    gram_EII = torch.cat([gram_of(tokens(2 * width, width, seed)) for seed in range(3)])
    order_EI = torch.stack([torch.randperm(width, generator=torch.Generator().manual_seed(seed)) for seed in range(3)])
    factor_EII = torch.empty_like(gram_EII)

    used_E, left_EI = damped_factors_(factor_EII, gram_EII, order_EI, damping=0.01)

    assert used_E.tolist() == [0.01] * 3
    for gram_II, order_I, factor_II, left_I in zip(gram_EII.double(), order_EI, factor_EII.double(), left_EI, strict=True):
        damped_II = (gram_II + 0.01 * gram_II.diagonal().mean() * torch.eye(width))[order_I][:, order_I]
        unit_II = factor_II.tril(-1) + torch.eye(width)
        inverse_II = torch.linalg.inv(unit_II)
        pivots_II = inverse_II.T @ damped_II @ inverse_II
        # gram = N^T D N with D diagonal and positive; float32 of a matrix with a condition number around 1e3.
        assert (pivots_II - left_I.double().diag()).abs().max() < 1e-4
        assert (left_I > 0).all()


@pytest.mark.parametrize("width", [1, 5, 64, 65, 200])
def test_what_is_left_of_an_input_is_what_the_papers_read_off_the_factor_of_the_inverse(width: int):
    gram_EII = torch.cat([gram_of(tokens(2 * width, width, seed)) for seed in range(3)])
    order_EI = torch.stack([torch.randperm(width, generator=torch.Generator().manual_seed(seed)) for seed in range(3)])

    _, left_EI = damped_factors_(torch.empty_like(gram_EII), gram_EII, order_EI, damping=0.01)

    for gram_II, order_I, left_I in zip(gram_EII.double(), order_EI, left_EI, strict=True):
        damped_II = (gram_II + 0.01 * gram_II.diagonal().mean() * torch.eye(width))[order_I][:, order_I]
        upper_II = torch.linalg.cholesky(torch.linalg.inv(damped_II), upper=True)
        # float32 of a matrix with a condition number around 1e3.
        assert left_I.tolist() == pytest.approx(upper_II.diagonal().square().reciprocal().tolist(), rel=1e-4)


def test_damping_rises_tenfold_for_the_experts_that_fail_and_for_them_alone():
    def pair(off_diagonal: float) -> Tensor:
        return torch.tensor([[1.0, off_diagonal], [off_diagonal, 1.0]])

    gram_EII = torch.stack([pair(0.5), pair(1.05), pair(1.5), pair(3.0), pair(30.0)])
    factor_EII, alone_EII = torch.empty_like(gram_EII), torch.empty_like(gram_EII[:1])

    used_E, _ = damped_factors_(factor_EII, gram_EII, natural_order(gram_EII), damping=0.01)
    damped_factors_(alone_EII, gram_EII[:1], natural_order(gram_EII[:1]), damping=0.01)

    assert used_E.tolist() == pytest.approx([0.01, 0.1, 1.0, 10.0, torch.inf])
    assert factor_EII[:, 1, 0].tolist() == pytest.approx([0.5 / 1.01, 1.05 / 1.1, 1.5 / 2, 3.0 / 11, 0.0])
    assert torch.equal(factor_EII[0], alone_EII[0])


def test_what_is_left_of_an_input_is_told_for_the_expert_that_needed_more_damping_too():
    # 1 + 0.01 and, of the second, 1 + 0.1: the last input keeps its mean square, the first what the last cannot stand in for.
    gram_EII = torch.tensor([[[1.0, 0.5], [0.5, 1.0]], [[1.0, 1.05], [1.05, 1.0]]])

    _, left_EI = damped_factors_(torch.empty_like(gram_EII), gram_EII, natural_order(gram_EII), damping=0.01)

    assert left_EI[0].tolist() == pytest.approx([1.01 - 0.25 / 1.01, 1.01])
    assert left_EI[1].tolist() == pytest.approx([1.1 - 1.05**2 / 1.1, 1.1], rel=1e-5)  # float32, nearly cancelling


@pytest.mark.parametrize("poison", [0.0, float("nan"), float("inf"), -1.0])
def test_a_hopeless_matrix_is_given_up_and_repairs_nothing(poison: float):
    gram_EII = torch.full((1, 70, 70), poison)
    factor_EII = torch.empty_like(gram_EII)

    used_E, left_EI = damped_factors_(factor_EII, gram_EII, natural_order(gram_EII), damping=0.01)

    assert used_E.tolist() == [torch.inf]
    assert (factor_EII == 0).all()
    assert (left_EI == 1).all()


def test_a_factor_that_is_not_finite_is_given_up_even_if_the_solver_reports_success(monkeypatch: pytest.MonkeyPatch):
    # LAPACK reports a NaN pivot; not every accelerator's library does.
    def unsuspecting(matrix: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full_like(matrix, torch.nan), torch.zeros(len(matrix), dtype=torch.int32)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", unsuspecting)
    gram_EII = gram_of(tokens(20, 10))
    factor_EII = torch.empty_like(gram_EII)

    used_E, left_EI = damped_factors_(factor_EII, gram_EII, natural_order(gram_EII), damping=0.01)

    assert used_E.tolist() == [torch.inf]
    assert (factor_EII == 0).all()
    assert (left_EI == 1).all()


def test_the_callers_matrices_are_left_alone():
    gram_EII = gram_of(tokens(20, 10))
    before_EII = gram_EII.clone()

    damped_factors_(torch.empty_like(gram_EII), gram_EII, natural_order(gram_EII), damping=0.01)

    assert torch.equal(gram_EII, before_EII)


def norms_of(x_TI: Tensor) -> Tensor:
    norm = InputNorm(1, x_TI.shape[1])
    norm.update(x_TI)
    return norm.value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mean_squares_alone_are_the_diagonal_of_the_gram_matrix(dtype: torch.dtype):
    x_TI = tokens(500, 70).to(dtype)

    mean_square_EI = norms_of(x_TI)

    assert mean_square_EI.dtype == torch.float64
    # The Gram matrix sums 500 squares in float32: about 500^0.5 x 2^-24 = 1.3e-6 of a value, at worst a few times that.
    assert mean_square_EI.tolist()[0] == pytest.approx(gram_of(x_TI).diagonal(dim1=1, dim2=2)[0].tolist(), rel=1e-5)
    # Against float64 only the squares of float32 numbers are rounded, each by at most 2^-24 of itself.
    assert mean_square_EI.tolist()[0] == pytest.approx(x_TI.double().square().mean(dim=0).tolist(), rel=2**-23)


@pytest.mark.parametrize("kind", [Gram, InputNorm])
def test_both_statistics_name_their_mean_squares_alike(kind: type[Statistic]):
    x_TI, ids_TK = small_integers(90, 12), routes(90, experts=3, chosen=2)
    statistic = kind(4, 12)

    add_routed(statistic, x_TI, ids_TK)

    for expert in range(3):
        own_SI = x_TI[(ids_TK == expert).any(dim=1)]
        assert torch.equal(statistic.mean_square_EI[expert].float(), own_SI.square().sum(dim=0) / len(own_SI))
    assert (statistic.mean_square_EI[3] == 0).all()
    assert statistic.tokens_E[3] == 0


@pytest.mark.parametrize("width", [7, 300])
def test_splitting_changes_no_mean_square_of_whole_numbers(width: int):
    x_TI = small_integers(400, width)
    parts = InputNorm(1, width)

    for x_tI in x_TI.split(37):
        parts.update(x_tI)

    assert torch.equal(parts.value, norms_of(x_TI))
    assert parts.tokens_E.tolist() == [400]


@pytest.mark.parametrize("kind", [Gram, InputNorm])
def test_with_routing_weights_a_token_counts_as_often_as_a_slow_loop_adds_it(kind: type[Statistic]):
    x_TI, weight_T = tokens(60, 130), torch.rand(60, generator=torch.Generator().manual_seed(1))
    statistic = kind(2, 130)

    for part in (slice(25), slice(25, 60)):
        statistic.add_rows(1, x_TI[part], weight_T[part])

    slow_II = torch.zeros(130, 130, dtype=torch.float64)
    for x_I, weight in zip(x_TI.double(), weight_T.tolist(), strict=True):
        slow_II += weight * torch.outer(x_I, x_I) / 60
    expected = slow_II if kind is Gram else slow_II.diagonal()
    assert statistic.tokens_E.tolist() == [0, 60]
    assert (statistic.value[0] == 0).all()
    # Roots, products and 60 sums in float32, of entries up to 2.
    assert (statistic.value[1] - expected).abs().max() < 60 * 2**-24


@pytest.mark.parametrize("kind", [Gram, InputNorm])
def test_a_routing_weight_of_one_is_none_and_of_four_is_a_token_twice_as_loud(kind: type[Statistic]):
    x_TI = tokens(50, 9)
    plain, ones, louder, fours = (kind(1, 9) for _ in range(4))

    plain.update(x_TI)
    ones.add_rows(0, x_TI, torch.ones(50, dtype=torch.bfloat16))
    louder.update(2 * x_TI)
    fours.add_rows(0, x_TI, torch.full((50,), 4.0))

    assert torch.equal(ones.value, plain.value)
    assert torch.equal(fours.value, louder.value)
    assert torch.equal(fours.value, 4 * plain.value)


def test_rescaling_by_powers_of_two_is_exactly_what_scaled_inputs_would_have_given():
    x_TI = tokens(200, 150)
    factor_EI = 2.0 ** torch.randint(-6, 7, (2, 150), generator=torch.Generator().manual_seed(1))
    gram, scaled = Gram(2, 150), Gram(2, 150)
    for expert in range(2):
        gram.add_rows(expert, x_TI)
        scaled.add_rows(expert, x_TI / factor_EI[expert])

    gram.rescale_(factor_EI)

    assert torch.equal(gram.value, scaled.value)
    assert torch.equal(gram.value, gram.value.mT)
    assert not torch.equal(gram.value[0], gram.value[1])


def test_an_input_that_never_fires_leaves_the_others_as_they_are_without_it():
    gram_EII = gram_of(tokens(100, 30))
    gram_EII[:, 7] = gram_EII[:, :, 7] = 0
    others_I = torch.arange(30) != 7
    without_EII = gram_EII[:, others_I][:, :, others_I]
    damping = 0.01 * gram_EII.diagonal(dim1=1, dim2=2).mean() / without_EII.diagonal(dim1=1, dim2=2).mean()

    _, left_EI = damped_factors_(torch.empty_like(gram_EII), gram_EII, natural_order(gram_EII), damping=0.01)
    _, alone_EI = damped_factors_(torch.empty_like(without_EII), without_EII, natural_order(without_EII), damping=damping.item())

    assert left_EI[0, others_I].tolist() == pytest.approx(alone_EI[0].tolist(), rel=1e-4)  # float32, in another order


def test_a_gram_matrix_remembers_all_that_its_inputs_were_divided_by():
    statistic = Gram(1, 3)
    statistic.update(tokens(20, 3))

    assert statistic.moved_EI is None
    statistic.rescale_(torch.tensor([[2.0, 1.0, 0.5]]))
    statistic.rescale_(torch.tensor([[4.0, 1.0, 4.0]]))

    assert statistic.moved_EI is not None
    assert statistic.moved_EI.tolist() == [[8.0, 1.0, 2.0]]
