"""From logits to tokens: truncation, renormalisation and drawing, by hand and by frequency. Tests of `algorithms.sampling`."""

import numpy as np
import pytest
import torch
from crossed import crossed

from rlhf_ray.algorithms.sampling import draw, inverse_cdf, tempered_logprobs, truncate

OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


def test_draws_have_the_frequencies_of_the_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0])
    probs = np.exp(logits.double().numpy())
    probs /= probs.sum()
    count = 200_000
    uniforms = torch.from_numpy(np.random.default_rng(3).random(count, dtype=np.float32))
    tokens, logprobs = draw(logits.expand(count, -1), uniforms, temperature=1.0)
    seen = np.bincount(tokens.numpy(), minlength=5) / count
    assert (np.abs(seen - probs) < 4 * np.sqrt(probs * (1 - probs) / count)).all()
    np.testing.assert_allclose(logprobs.numpy(), np.log(probs)[tokens.numpy()], atol=1e-6)


def test_truncation_by_hand():
    """p = 0.4 0.3 0.2 0.1: the kept sets and what they are renormalised to, worked out by hand."""
    logprobs = torch.tensor([[0.2, 0.4, 0.1, 0.3]]).log()
    for options, expected in [
        ({}, [0.2, 0.4, 0.1, 0.3]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 9}, [0.2, 0.4, 0.1, 0.3]),
        ({"top_p": 0.39}, [0, 1, 0, 0]),
        ({"top_p": 0.65}, [0, 4 / 7, 0, 3 / 7]),  # 0.4 < 0.65, so 0.3 is needed; 0.7 is enough
        ({"top_p": 0.75}, [2 / 9, 4 / 9, 0, 3 / 9]),
        ({"min_p": 0.6}, [0, 4 / 7, 0, 3 / 7]),  # 0.6 * 0.4 = 0.24
        ({"top_k": 3, "top_p": 0.75}, [0, 4 / 7, 0, 3 / 7]),  # of 4/9 3/9 2/9 the first two make 7/9: top_p after top_k
        ({"top_k": 3, "top_p": 0.8, "min_p": 0.7}, [0, 4 / 7, 0, 3 / 7]),
    ]:
        expected = torch.tensor([expected], dtype=torch.float32)
        torch.testing.assert_close(truncate(logprobs, **options).exp(), expected, atol=1e-6, rtol=0)
        vectors = {name: torch.tensor([value, OFF[name]]) for name, value in options.items()}
        both = truncate(logprobs.expand(2, -1), **vectors).exp()
        torch.testing.assert_close(both[:1], expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(both[1:], logprobs.exp(), atol=1e-6, rtol=0)  # the row whose options are off


def test_ties_with_the_last_kept_token_are_kept():
    logprobs = torch.tensor([[0.4, 0.2, 0.2, 0.2]]).log()
    torch.testing.assert_close(truncate(logprobs, top_k=2).exp(), logprobs.exp(), atol=1e-6, rtol=0)
    torch.testing.assert_close(truncate(logprobs, top_p=0.5).exp(), logprobs.exp(), atol=1e-6, rtol=0)


def test_top_p_over_more_tokens_than_the_first_sort():
    torch.manual_seed(0)
    logprobs = torch.cat([torch.zeros(1, 3000), torch.randn(1, 3000) * 5]).log_softmax(-1)
    logprobs[0] += torch.linspace(0, 1e-3, 3000)
    logprobs = logprobs.log_softmax(-1)
    kept = (truncate(logprobs, top_p=0.5) > -torch.inf).sum(-1).tolist()
    for row, count in zip(logprobs.double().exp().numpy(), kept, strict=True):
        assert abs(count - (np.searchsorted(np.cumsum(-np.sort(-row)), 0.5) + 1)) <= 3  # float32 sums
    assert kept[0] > 512 > kept[1]


def test_inverse_cdf_never_draws_what_has_no_probability():
    logprobs = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0]).log().expand(4, -1)
    uniforms = torch.tensor([0.0, 0.4999999, 0.5, 1 - 2**-24])
    assert inverse_cdf(logprobs, uniforms).tolist() == [1, 1, 3, 3]


@pytest.mark.parametrize(("vocab_size", "count"), [(256, 128), (300, 128), (128, 64), (70, 32)])
def test_inverse_cdf_over_pieces_of_the_vocabulary(vocab_size, count):
    """Every second of the first tokens has probability 1 / count, a power of two: sums of such numbers are exact in float32."""
    drawable = torch.arange(1, 2 * count, 2)
    probs = torch.zeros(256, vocab_size)
    probs[:, drawable] = 1 / count
    uniforms = torch.arange(256) / 256
    expected = drawable[(uniforms * count).long()]
    assert inverse_cdf(probs.log(), uniforms).tolist() == expected.tolist()
    below = (uniforms + 1 / 256).nextafter(torch.tensor(0.0))
    assert inverse_cdf(probs.log(), below).tolist() == expected.tolist()


def test_a_draw_at_the_end_of_a_piece_does_not_leave_it():
    """63 equal parts of 1: their sum comes out differently in one order than in another."""
    probs = torch.zeros(1, 127)
    probs[0, 1:126:2] = 1 / 63
    assert inverse_cdf(probs.log(), torch.tensor([1 - 2**-24])).tolist() == [125]


def test_inverse_cdf_draws_as_often_as_probabilities_say():
    """Against one scan in float64, with gaps: the same token but where rounding decides, and never one without probability."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(40, 1000, generator=generator)
    logits[torch.rand(40, 1000, generator=generator) < 0.5] = -torch.inf
    logprobs, uniforms = logits.log_softmax(-1), torch.rand(200, 40, generator=generator)
    cumulative = logprobs.double().exp().cumsum(-1)
    differ = 0
    for draws in uniforms:
        found = inverse_cdf(logprobs, draws)
        wanted = torch.searchsorted(cumulative, draws.double()[:, None] * cumulative[:, -1:], right=True).squeeze(1)
        differ += int((found != wanted).sum())
        assert logprobs.gather(1, found[:, None]).isfinite().all()
    assert differ < 10  # of 8,000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_a_draw_from_the_whole_vocabulary_is_that_of_float64(temperature, dtype):
    """Logits about 100, whose exponentials no float32 holds; one row with a single token, whose log-prob is 0."""
    generator = torch.Generator().manual_seed(1)
    logits = 100 + 3 * torch.randn(400, 1000, generator=generator)
    logits[0, 1:] = -torch.inf
    logits, uniforms = logits.to(dtype), torch.rand(400, generator=generator)
    tokens, logprobs = draw(logits, uniforms, temperature=temperature)
    exact = (logits.double() / temperature).log_softmax(-1)
    wanted = torch.searchsorted(exact.exp().cumsum(-1), uniforms.double()[:, None], right=True).squeeze(1)
    assert int((tokens != wanted).sum()) < 3 and tokens[0] == 0 and logprobs[0] == 0
    assert logprobs.dtype == torch.float32 and bool((logprobs <= 0).all())
    torch.testing.assert_close(logprobs.double(), exact.gather(1, tokens[:, None]).squeeze(1), atol=2e-5, rtol=0)


def test_temperature_divides_logits():
    logits = torch.tensor([[0.0, float(np.log(2.0))]], dtype=torch.float32)
    for temperature, odds in ((1.0, 2.0), (0.5, 4.0), (2.0, 2**0.5)):
        logprobs = tempered_logprobs(logits, temperature=temperature)
        assert float((logprobs[0, 1] - logprobs[0, 0]).exp()) == pytest.approx(odds, rel=1e-6)


def test_greedy_rows_tell_the_untempered_logprob():
    logits = torch.tensor([[0.0, float(np.log(3.0))]])
    for temperature in (0.0, torch.tensor([0.0])):
        token, logprob = draw(logits, torch.tensor([0.1]), temperature=temperature)
        assert token.tolist() == [1] and logprob.item() == pytest.approx(np.log(0.75), abs=1e-6)


def test_knobs_that_are_off_leave_the_input_alone():
    logprobs = torch.tensor([[0.4, 0.6]]).log()
    assert truncate(logprobs) is logprobs and truncate(logprobs, **OFF) is logprobs


def test_an_entry_exactly_at_the_edge():
    """Powers of two are exact in float32: 0.5 of the mass is enough for top_p 0.5, and 0.25 is half of the likeliest."""
    logprobs = torch.log2(torch.tensor([[0.5, 0.25, 0.125, 0.125]])) * float(np.log(2.0))
    torch.testing.assert_close(truncate(logprobs, top_p=0.5).exp(), torch.tensor([[1.0, 0, 0, 0]]))
    even = torch.zeros(1, 4).log_softmax(-1)
    torch.testing.assert_close(truncate(even, min_p=1.0), even)  # at least the likeliest's share: all of them


def test_rows_with_knobs_of_their_own():
    """top_k 1, off, beyond the vocabulary; and a top_p of 1 keeps even what float32 sums lose sight of."""
    logprobs = torch.tensor([[0.1, 0.6, 0.3]]).log().expand(3, -1)
    kept = truncate(logprobs, top_k=torch.tensor([1, 0, 3])) > -torch.inf
    assert kept.tolist() == [[False, True, False], [True] * 3, [True] * 3]
    steep = torch.tensor([[0.0, -30.0, -60.0]]).log_softmax(-1).expand(2, -1)
    kept = truncate(steep, top_p=torch.tensor([0.5, 1.0])) > -torch.inf
    assert kept.tolist() == [[True, False, False], [True] * 3]
    kept = truncate(steep, top_k=torch.tensor([0, 0])) > -torch.inf
    assert kept.all()


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.3}, {"top_k": 5, "top_p": 0.9}])
def test_any_number_of_dimensions_before_the_vocabulary(options):
    """Each row by itself in float64, from the definition."""
    logprobs = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    found = truncate(logprobs, **options).reshape(-1, 9)
    for row, mine in zip(logprobs.double().reshape(-1, 9).numpy(), found.double().numpy(), strict=True):
        probs = np.exp(row)
        order = np.argsort(-probs)
        kept = probs * np.isin(np.arange(9), order[: options.get("top_k", 9)])
        kept /= kept.sum()
        sums = np.cumsum(kept[order])
        kept[order[np.searchsorted(sums, options.get("top_p", 1.0)) + 1 :]] = 0.0
        kept[kept < options.get("min_p", 0.0) * kept.max()] = 0.0
        np.testing.assert_allclose(np.exp(mine), kept / kept.sum(), atol=1e-6)


def test_draws_are_scaled_by_the_sum_that_there_is():
    """Log-probs of a row that sums to 1/2: u = 0.6 is beyond the first 0.3 / 0.5, u = 0.5 is not."""
    logprobs = torch.tensor([[0.3, 0.2]]).log().expand(2, -1)
    assert inverse_cdf(logprobs, torch.tensor([0.5, 0.61])).tolist() == [0, 1]


def test_temperatures_of_their_own_divide_their_row():
    logits = torch.tensor([[0.0, float(np.log(2.0))]]).expand(3, -1)
    logprobs = tempered_logprobs(logits, temperature=torch.tensor([1.0, 0.5, 2.0]))
    odds = (logprobs[:, 1] - logprobs[:, 0]).exp()
    np.testing.assert_allclose(odds, [2.0, 4.0, 2**0.5], rtol=1e-6)


@pytest.mark.parametrize("vector", [False, True])
def test_a_draw_is_from_the_truncated_distribution(vector):
    """p = 0.1 0.2 0.3 0.4 and u = 0.05: the first token, unless an option has cut it off."""
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    temperature = torch.tensor([1.0]) if vector else 1.0
    for options, token, prob in (
        ({}, 0, 0.1),
        ({"top_k": 2}, 2, 3 / 7),
        ({"top_p": 0.85}, 1, 2 / 9),
        ({"min_p": 0.8}, 3, 1.0),  # 0.8 * 0.4 = 0.32
    ):
        tokens, logprobs = draw(logits, torch.tensor([0.05]), temperature=temperature, **options)
        assert tokens.tolist() == [token] and logprobs.item() == pytest.approx(np.log(prob), abs=1e-6), options


def test_a_greedy_row_beside_one_that_is_drawn():
    logits = torch.tensor([[0.1, 0.2, 0.7], [0.6, 0.3, 0.1], [0.2, 0.5, 0.3]]).log()
    tokens, logprobs = draw(logits, torch.full((3,), 0.95), temperature=torch.tensor([0.0, 1.0, 0.0]))
    assert tokens.tolist() == [2, 2, 1]
    np.testing.assert_allclose(logprobs.exp(), [0.7, 0.1, 0.5], atol=1e-6)
    assert draw(logits, torch.zeros(3), temperature=0.0)[0].tolist() == [2, 0, 1]


def expected_draw(logits, uniform, temperature):
    """The first token whose cumulative probability exceeds the draw, and all tokens' log-probs."""
    logprobs = (logits.double() / temperature).log_softmax(-1)
    cumulative = logprobs.exp().cumsum(0)
    return int((cumulative <= uniform * cumulative[-1]).sum()), logprobs, cumulative / cumulative[-1]


@crossed("dtype, vocab_size, temperature", [torch.bfloat16, torch.float32], [1, 5, 128, 300, 4096], [1.0, 0.7])
def test_draws_from_the_whole_vocabulary(dtype, vocab_size, temperature):
    generator = torch.Generator().manual_seed(vocab_size)
    logits = (torch.randn(40, vocab_size, generator=generator) * 3).to(dtype)
    uniforms = torch.rand(40, generator=generator)
    uniforms[:4] = torch.tensor([0.0, 1e-38, 1 - 2**-24, 0.5])
    tokens, logprobs = draw(logits, uniforms, temperature=temperature)
    exact = 0
    for row in range(40):
        token, expected, cumulative = expected_draw(logits[row], float(uniforms[row]), temperature)
        found = int(tokens[row])
        exact += token == found
        # A draw at the border of two tokens' shares may fall to either.
        below = cumulative[found - 1] if found else 0.0
        assert below - 1e-6 <= uniforms[row] <= cumulative[found] + 1e-6
        assert float(logprobs[row]) == pytest.approx(float(expected[found]), abs=2e-6, rel=1e-6)
    assert exact >= 39


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_token_without_probability_is_never_drawn(dtype):
    """Nor any beyond the last one that has some, however near to 1 the draw."""
    logits = torch.full((6, 500), -torch.inf)
    logits[:, 130:140] = torch.linspace(0, 1, 10)
    logits[:, 260] = -200.0  # 0 in float32
    logits[3:, 450] = 0.5
    uniforms = torch.tensor([0.0, 0.5, 1 - 2**-24] * 2)
    tokens, logprobs = draw(logits.to(dtype), uniforms, temperature=1.0)
    assert tokens.tolist()[:1] == [130] and tokens.tolist()[2:4] == [139, 130] and int(tokens[5]) == 450
    assert logprobs.isfinite().all()
    logits = torch.randn(500, 128).to(dtype)  # sums of which round up as often as down
    logits[:, 100:] = -torch.inf
    tokens, _ = draw(logits, uniforms[2].expand(500).contiguous(), temperature=1.0)
    assert tokens.max() == 99


def test_draws_follow_the_probabilities():
    logits = torch.tensor([0.5, 0.0, 0.25, 0.25]).log().expand(1000, 4).contiguous()
    tokens, _ = draw(logits, (torch.arange(1000) + 0.5) / 1000, temperature=1.0)
    assert tokens.bincount(minlength=4).tolist() == [500, 0, 250, 250]
    tokens, _ = draw(torch.zeros(3, 4), torch.tensor([0.25, 0.5, 0.75]), temperature=1.0)
    assert tokens.tolist() == [1, 2, 3], "a draw that a cumulative probability equals belongs to the next token"


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_not_a_number_shows_in_the_log_prob(bad, dtype):
    logits = torch.randn(3, 300).to(dtype)
    logits[1, 200] = bad
    if bad == -torch.inf:
        logits[1] = bad
    tokens, logprobs = draw(logits, torch.full((3,), 0.4), temperature=1.0)
    assert logprobs.isfinite().tolist() == [True, False, True]
    assert ((tokens >= 0) & (tokens < 300)).all()
